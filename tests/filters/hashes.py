"""Hashes of pictures and captions without either, and what goes among them by the plainest loop."""

from pathlib import Path

import numpy as np

from megavlm.config.filters import DuplicateRules
from megavlm.data.index import ShardSize, write_manifest
from megavlm.files.folder import Folder
from megavlm.filters import verdicts
from megavlm.filters.duplicates import BANDS, HASH_BYTES, PERMUTATIONS, band_of, nearness

RULES = DuplicateRules(picture_bits=31, caption_similarity=0.8)


def with_flipped(hash_: np.ndarray, bits: list[int]) -> np.ndarray:
    flipped = np.unpackbits(hash_)
    flipped[bits] ^= 1
    return np.packbits(flipped)


def gone_by_all_pairs(reason, hashes):
    """The same, by the plainest of loops."""
    bands = np.stack([band_of(reason, hashes, band) for band in range(BANDS[reason])])
    of_rows, gone = nearness(reason, RULES).of_rows, {}
    for later in range(len(hashes)):
        if len(copies := np.flatnonzero((hashes[:later] == hashes[later]).all(1))):
            gone[later] = gone.get(int(copies[0]), int(copies[0]))
            continue
        shared = np.flatnonzero((bands[:, :later] == bands[:, later : later + 1]).any(0))
        near = of_rows(hashes[shared], np.tile(hashes[later], (len(shared), 1)))
        stay = [earlier for earlier in shared[near].tolist() if earlier not in gone]
        if stay:
            gone[later] = stay[0]
    return gone


def clusters(reason, generator, samples):
    """Hashes, some of which are alike in few bands or all, in large buckets and small ones."""
    width = HASH_BYTES[reason]
    centres = generator.integers(0, 256, (samples // 20, width), np.uint8)
    hashes = centres[np.minimum(generator.geometric(0.05, samples) - 1, len(centres) - 1)]
    most = {"duplicate_picture": 32, "duplicate_caption": 40}[reason]
    for n in range(samples):
        places = generator.choice(4 * width, generator.integers(0, most + 1), replace=False)
        if reason == "duplicate_picture":
            hashes[n] = with_flipped(hashes[n], places)
        else:
            hashes[n].view("<u2")[places % PERMUTATIONS] += 1
    return hashes


def write_verdicts(source: Path, folder: Folder, rows, shard_samples: int) -> None:
    """A list of shards that are not there, and what was found about their samples.

    rows: (reason, hash of the picture, signature of the caption) of each sample.
    """
    sizes = {}
    folder.create()
    for start in range(0, len(rows), shard_samples):
        name, of_shard = f"{len(sizes):06}.tar", rows[start : start + shard_samples]
        sizes[name] = ShardSize(len(of_shard), 0)
        found = [
            {"reason": reason, "picture_hash": picture, "caption_signature": caption}
            for reason, picture, caption in of_shard
        ]
        verdicts._write(folder, verdicts.name_of(name), found)
    write_manifest(Folder(source), sizes)
