"""What evaluation sets hold, and whether training samples hold it, too."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megavlm.config.filters import EvaluationRules, PictureRules
from megavlm.data.samples import Sample
from megavlm.files.folder import Folder
from megavlm.filters.arrays import load_arrays, save_arrays
from megavlm.filters.captions import words_of
from megavlm.filters.pictures import HASH_BYTES, hash_picture, open_picture


class Fingerprints(NamedTuple):
    """Of an evaluation set, or of a part of one."""

    pictures: NDArray[np.uint8]
    """(pictures and mirrored pictures, 32)."""
    texts: NDArray[np.uint64]
    """Of so many words in a row; sorted."""


def fingerprints(samples: Iterable[Sample], rules: EvaluationRules) -> Fingerprints:
    """Of samples of an evaluation set; pictures that cannot be decoded have none."""
    pictures: list[bytes] = []
    texts: set[int] = set()
    for sample in samples:
        for encoded in sample.pictures:
            picture = open_picture(encoded, PictureRules())
            if not isinstance(picture, str):
                pictures += [hash_picture(picture), hash_picture(picture, mirrored=True)]
        if rules.words is not None:
            for text in sample.texts:
                for turn in text.turns:
                    texts.update(_runs(turn.answer, rules.words))
    hashes = np.frombuffer(b"".join(pictures), np.uint8).reshape(-1, HASH_BYTES)
    return joined([Fingerprints(hashes, np.array(sorted(texts), np.uint64))])


def joined(parts: Sequence[Fingerprints]) -> Fingerprints:
    """Of several parts together, each fingerprint once."""
    empty = Fingerprints(np.empty((0, HASH_BYTES), np.uint8), np.empty(0, np.uint64))
    pictures, texts = zip(empty, *parts, strict=True)
    return Fingerprints(
        np.unique(np.concatenate(pictures), axis=0), np.unique(np.concatenate(texts))
    )


def _runs(text: str, words: int) -> Iterator[int]:
    """A hash of all so many words in a row."""
    all_words = words_of(text)
    for start in range(len(all_words) - words + 1):
        run = "\0".join(all_words[start : start + words]).encode()
        yield int.from_bytes(hashlib.blake2b(run, digest_size=8).digest(), "little")


class EvaluationSet:
    """Finds training samples that an evaluation set holds, too."""

    def __init__(self, known: Fingerprints) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        self._texts = known.texts
        self._pictures: Any = faiss.IndexBinaryFlat(8 * HASH_BYTES)
        self._pictures.add(known.pictures)

    def holds_pictures(self, hashes: Sequence[bytes], bits: int) -> list[bool]:
        """Whether it holds pictures whose hashes differ in at most so many bits, for each."""
        if not hashes or not self._pictures.ntotal:
            return [False] * len(hashes)
        queries = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, HASH_BYTES)
        distances, _ = self._pictures.search(queries, 1)
        return (distances[:, 0] <= bits).tolist()

    def holds_text(self, text: str, words: int) -> bool:
        """Whether it holds so many words of a text in a row."""
        runs = np.fromiter(_runs(text, words), np.uint64)
        return bool(
            len(self._texts)
            and (self._texts[np.searchsorted(self._texts[:-1], runs)] == runs).any()
        )


def save(folder: Folder, name: str, known: Fingerprints) -> None:
    """Write them for other workers."""
    save_arrays(folder, name, pictures=known.pictures, texts=known.texts)


def load(folder: Folder, name: str) -> Fingerprints:
    """What was saved."""
    return Fingerprints(**load_arrays(folder, name))
