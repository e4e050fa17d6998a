"""Zero-shot classification and retrieval on a standard benchmark.

Letters in shapes: n pictures, m texts, d feature width, c classes, k the best ones.
"""

import base64
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from megavlm.config.run import RunSettings
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.errors import BadSampleError
from megavlm.eval.benchmarks import Benchmark, Item, prediction, read_picture
from megavlm.eval.retrieval import best
from megavlm.eval.samples import progress, tell
from megavlm.eval.scores import Score
from megavlm.eval.shards import Row
from megavlm.eval.zero_shot import (
    PUBLISHED_RECALLS,
    class_accuracies,
    class_features,
    ranked,
    recalls,
)
from megavlm.infer.features import image_features, text_features
from megavlm.model.pretraining import PretrainingModel

BEST_CLASSES = 5
CLASSES_AT_ONCE = 8  # whose prompts are encoded together, however many ranks share them

Advance = Callable[[int], None]


class _Towers:
    def __init__(
        self,
        benchmark: Benchmark,
        run: RunSettings,
        model: PretrainingModel,
        tokenizer: Tokenizer,
    ) -> None:
        self._benchmark, self._run = benchmark, run
        self._model, self._tokenizer = model, tokenizer

    def _read(self, numbers: range, advance: Advance) -> tuple[list[Row], list[Row], list[Tensor]]:
        """A row for each item; those whose pictures can be read, and these pictures."""
        rows: list[Row] = []
        readable: list[Row] = []
        pixels: list[Tensor] = []
        for number in numbers:
            item = self._benchmark.items[number]
            rows.append({"key": item.key})
            try:
                pixels.append(read_picture(item, self._run.model.encoder.image_pixels))
                readable.append(rows[-1])
            except BadSampleError as error:
                rows[-1]["unreadable"] = f"{item.key}: {error}"
            advance(1)
        return rows, readable, pixels

    def _tell_cut(self, cut: int) -> None:
        if cut:
            tell(f"{cut:,} texts are cut to data.row_tokens={self._run.data.row_tokens}")


class Classifies(_Towers):
    """Pictures are classified by the prompts that they are most like."""

    def __init__(
        self,
        benchmark: Benchmark,
        run: RunSettings,
        model: PretrainingModel,
        tokenizer: Tokenizer,
    ) -> None:
        """Collective."""
        super().__init__(benchmark, run, model, tokenizer)
        self._classes_cd = self._class_features()

    def _class_features(self) -> Tensor:
        """Fp32 (c, d), of norm 1; ranks share the classes."""
        classes, templates = self._benchmark.classes, self._benchmark.templates
        parts = range(0, len(classes), CLASSES_AT_ONCE)
        rank, ranks = groups.rank(), groups.world_size()
        mine: list[Tensor] = []
        cut = 0
        with progress(f"{self._benchmark.name}, prompts", len(parts[rank::ranks])) as advance:
            for start in parts[rank::ranks]:
                some = classes[start : start + CLASSES_AT_ONCE]
                prompts = [template.replace("{}", c) for c in some for template in templates]
                prompts_nd, cut_now = text_features(
                    self._model, prompts, self._tokenizer, self._run
                )
                mine.append(class_features(prompts_nd.unflatten(0, (len(some), -1))))
                cut += cut_now
                advance(1)
        [all_cut] = groups.sum_over_ranks(cut)
        self._tell_cut(round(all_cut))
        shares = groups.from_all_ranks(mine)
        return torch.cat([shares[n % ranks][n // ranks] for n in range(len(parts))])

    def work(self, numbers: range, advance: Advance) -> list[Row]:
        """The likeliest classes of each of these items."""
        rows, readable, pixels = self._read(numbers, advance)
        if pixels:
            images_nd = image_features(self._model, pixels)
            found_nk = best(BEST_CLASSES, images_nd, self._classes_cd).tolist()
            for row, found in zip(readable, found_nk, strict=True):
                row["best"] = found
        return rows

    def judge(self, items: Sequence[Item], rows: Sequence[Row]) -> tuple[list[Score], list[Row]]:
        """Scores over these items, and a line of the predictions file for each."""
        best_nk = np.array([row["best"] for row in rows])
        truths_n = np.array([int(item.truths[0]) for item in items])
        measured = class_accuracies(best_nk, truths_n)
        scores = [
            self._benchmark.score(f"zero-shot, {name}", len(items), value)
            for name, value in measured.items()
        ]
        names = self._benchmark.classes
        predictions: list[Row] = []
        for item, truth, found in zip(items, truths_n.tolist(), best_nk.tolist(), strict=True):
            named = [names[number] for number in found]
            right = found[0] == truth
            line = prediction(item, named[0], float(right), right, best=named)
            predictions.append({**line, "truths": [names[truth]]})
        return scores, predictions


class Retrieves(_Towers):
    """Pictures find their captions, and captions their pictures."""

    def work(self, numbers: range, advance: Advance) -> list[Row]:
        """The features of each of these items' picture and captions."""
        rows, readable, pixels = self._read(numbers, advance)
        if not pixels:
            return rows
        truths = {self._benchmark.items[n].key: self._benchmark.items[n].truths for n in numbers}
        images_nd = image_features(self._model, pixels)
        captions = [truth for row in readable for truth in truths[row["key"]]]
        texts_md, cut = text_features(self._model, captions, self._tokenizer, self._run)
        texts = iter(texts_md)
        for row, image_d in zip(readable, images_nd, strict=True):
            row["picture"] = _as_text(image_d)
            row["captions"] = [_as_text(next(texts)) for _ in truths[row["key"]]]
        readable[0]["cut"] = cut
        return rows

    def judge(self, items: Sequence[Item], rows: Sequence[Row]) -> tuple[list[Score], list[Row]]:
        """Scores over these items, and a line of the predictions file for each."""
        self._tell_cut(sum(int(row.get("cut", 0)) for row in rows))
        image_nd = torch.stack([_as_tensor(row["picture"]) for row in rows])
        text_md = torch.stack([_as_tensor(text) for row in rows for text in row["captions"]])
        captions = [truth for item in items for truth in item.truths]
        picture_of_m = np.repeat(np.arange(len(items)), [len(item.truths) for item in items])
        texts_nk, pictures_mk = ranked(image_nd, text_md)
        hits = recalls(texts_nk, pictures_mk, picture_of_m)
        scores = [
            self._benchmark.score(name, len(each), float(np.mean(each)))
            for name, each in hits.items()
        ]
        first = hits[f"picture to text, recall@{PUBLISHED_RECALLS[0]}"]
        found_by = iter(pictures_mk.tolist())
        predictions = [
            prediction(
                item,
                captions[found[0]],
                float(right),
                right,
                best=[captions[number] for number in found],
                found_by_captions=[[items[i].key for i in next(found_by)] for _ in item.truths],
            )
            for item, found, right in zip(items, texts_nk.tolist(), first, strict=True)
        ]
        return scores, predictions


def _as_text(feature_d: Tensor) -> str:
    return base64.b64encode(feature_d.numpy().astype("<f4").tobytes()).decode()


def _as_tensor(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy())
