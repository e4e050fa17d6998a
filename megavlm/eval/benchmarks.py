"""Standard benchmarks, read from their files as published (docs/evaluation.md)."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megavlm.data.image import read_square
from megavlm.errors import BadSampleError, DataError
from megavlm.eval.imagenet import CLASSES, TEMPLATES
from megavlm.eval.scores import Score
from megavlm.eval.shards import Row
from megavlm.terminal import counted

Task = Literal["captions", "vqa", "classes"]
Part = Literal["evaluated", "examples"]
"""What is evaluated (validation or Karpathy's test split), or training, for few-shot examples."""

NAMED_IN_ERRORS = 3
_WNID = re.compile(r"n\d{8}")
_JSON_FOLDERS = ("", "annotations", "Annotations", "questions", "Questions")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture to caption or to classify, or one question about a picture."""

    key: str
    """The benchmark's id of it."""
    picture: Path
    question: str = ""
    truths: tuple[str, ...]
    """Captions, the annotators' answers, or the number of the class."""
    kind: str = ""
    """VQAv2's type of answer."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is evaluated."""

    name: str
    task: Task
    items: tuple[Item, ...]
    left_out: tuple[str, ...] = ()
    """What the files name but cannot be used, and why."""
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    """Prompts whose `{}` stands for a class."""

    def score(self, measure: str, items: int, value: float) -> Score:
        """A row of the table."""
        return Score(split=self.name, measure=measure, items=items, model=value)


def read_picture(item: Item, side: int) -> Tensor:
    """As a model is shown it, uint8 (3, side, side); raises BadSampleError where it cannot be."""
    try:
        encoded = item.picture.read_bytes()
    except OSError as error:
        raise BadSampleError(f"cannot read {item.picture}: {error.strerror}") from error
    return read_square(encoded, str(item.picture), side)


def prediction(item: Item, answer: str, score: float, right: bool, **more: Any) -> Row:
    """A line of the predictions file."""
    return {
        "key": item.key,
        "picture": str(item.picture),
        "question": item.question,
        "truths": list(item.truths),
        "answer": answer,
        "score": score,
        "right": bool(right),
        **more,
    }


def read_benchmark(
    name: str, folder: Path, part: Part = "evaluated", *, skip_bad: bool = False
) -> Benchmark:
    """Read a benchmark's files; no picture is opened.

    skip_bad: leave out entries that name a picture or an id that is not there; otherwise they raise
    DataError, as do missing and wrong files.
    """
    if name not in READERS:
        raise DataError(f"there is no benchmark {name}; choose from {', '.join(READERS)}")
    if not folder.is_dir():
        raise DataError(f"{name}={folder} is not a folder")
    benchmark = READERS[name](folder, part)
    bad = benchmark.left_out
    if bad and not skip_bad:
        some = "; ".join(bad[:NAMED_IN_ERRORS])
        raise DataError(
            f"{name}={folder}: {counted(len(bad), 'entry', 'entries')} cannot be used: {some}"
            f"{'; ...' if len(bad) > NAMED_IN_ERRORS else ''}; mend them, or leave them out with "
            "--skip-bad"
        )
    if not benchmark.items:
        raise DataError(f"{name}={folder}: no entry of its files can be evaluated")
    return benchmark


class _Entries:
    """Collects what is usable, and names what is not."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.bad: list[str] = []
        self._listed = cache(lambda folder: {path.name for path in folder.iterdir()})

    def add(self, item: Item) -> None:
        folder = item.picture.parent
        if not item.truths:
            self.bad.append(f"{item.key} has no truth")
        elif not folder.is_dir() or item.picture.name not in self._listed(folder):
            self.bad.append(f"{item.key} has no picture {item.picture}")
        else:
            self.items.append(item)

    def as_benchmark(self, name: str, task: Task) -> Benchmark:
        return Benchmark(name=name, task=task, items=tuple(self.items), left_out=tuple(self.bad))


def _coco_captions(folder: Path, part: Part) -> Benchmark:
    karpathy = _found(folder, "dataset_coco.json")
    if karpathy is not None:
        pictures = _first_folder(folder, "images", "")
        return _karpathy(
            "coco_captions",
            karpathy,
            part,
            lambda image: pictures / _plain(image["filepath"]) / _plain(image["filename"]),
            lambda image: str(image["cocoid"]),
        )
    half = "val" if part == "evaluated" else "train"
    names = [f"captions_{half}{year}.json" for year in (2017, 2014)]
    path = _found(folder, *names)
    if path is None:
        raise _missing(folder, "dataset_coco.json", *names)
    subset = path.stem.removeprefix("captions_")
    pictures = _first_folder(folder, subset, f"images/{subset}")
    entries = _Entries()
    with _published_form(path) as content:
        captions: dict[int, list[str]] = defaultdict(list)
        images = {image["id"]: _plain(image["file_name"]) for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation["image_id"] in images:
                captions[annotation["image_id"]].append(_text(annotation["caption"]))
            else:
                entries.bad.append(
                    f"caption {annotation['id']} is of image {annotation['image_id']}, which is "
                    "not listed"
                )
        for number, name in images.items():
            truths = tuple(captions[number])
            entries.add(Item(key=str(number), picture=pictures / name, truths=truths))
    return entries.as_benchmark("coco_captions", "captions")


def _flickr30k(folder: Path, part: Part) -> Benchmark:
    path = _found(folder, "dataset_flickr30k.json")
    if path is None:
        raise _missing(folder, "dataset_flickr30k.json")
    pictures = _first_folder(folder, "flickr30k-images", "flickr30k_images", "images")
    return _karpathy(
        "flickr30k",
        path,
        part,
        lambda image: pictures / _plain(image["filename"]),
        lambda image: Path(image["filename"]).stem,
    )


def _karpathy(
    name: str,
    path: Path,
    part: Part,
    picture_of: Callable[[Any], Path],
    key_of: Callable[[Any], str],
) -> Benchmark:
    """Of Karpathy and Fei-Fei 2015: its test split, or train with restval."""
    splits = {"test"} if part == "evaluated" else {"train", "restval"}
    entries = _Entries()
    with _published_form(path) as content:
        for image in content["images"]:
            if image["split"] in splits:
                truths = tuple(_text(sentence["raw"]) for sentence in image["sentences"])
                entries.add(Item(key=key_of(image), picture=picture_of(image), truths=truths))
    return entries.as_benchmark(name, "captions")


def _vqav2(folder: Path, part: Part) -> Benchmark:
    return _vqa("vqav2", "v2_", folder, part)


def _okvqa(folder: Path, part: Part) -> Benchmark:
    return _vqa("okvqa", "", folder, part)


def _vqa(name: str, prefix: str, folder: Path, part: Part) -> Benchmark:
    subset = "val2014" if part == "evaluated" else "train2014"
    names = [
        f"{prefix}OpenEnded_mscoco_{subset}_questions.json",
        f"{prefix}mscoco_{subset}_annotations.json",
    ]
    questions, annotations = (_found(folder, name) for name in names)
    if questions is None or annotations is None:
        raise _missing(folder, names[0] if questions is None else names[1])
    pictures = _first_folder(folder, subset, f"images/{subset}", f"Images/mscoco/{subset}")
    entries = _Entries()
    with _published_form(annotations) as content:
        annotated: dict[int, Any] = {a["question_id"]: a for a in content["annotations"]}
        answers = {
            number: tuple(_text(answer["answer"]) for answer in annotation["answers"])
            for number, annotation in annotated.items()
        }
        kinds = {number: _text(a.get("answer_type", "")) for number, a in annotated.items()}
    with _published_form(questions) as content:
        for question in content["questions"]:
            number, image = question["question_id"], question["image_id"]
            if number not in annotated:
                entries.bad.append(f"question {number} has no annotation")
                continue
            if annotated.pop(number)["image_id"] != image:
                entries.bad.append(f"question {number} and its annotation name different images")
                continue
            picture = pictures / f"COCO_{subset}_{int(image):012d}.jpg"
            entries.add(
                Item(
                    key=str(number),
                    picture=picture,
                    question=_text(question["question"]),
                    truths=answers[number],
                    kind=kinds[number],
                )
            )
    entries.bad += [f"annotation of question {number}, which is not asked" for number in annotated]
    return entries.as_benchmark(name, "vqa")


def _textvqa(folder: Path, part: Part) -> Benchmark:
    name = f"TextVQA_0.5.1_{'val' if part == 'evaluated' else 'train'}.json"
    path = _found(folder, name)
    if path is None:
        raise _missing(folder, name)
    pictures = _first_folder(folder, "train_images", "train_val_images/train_images")
    entries = _Entries()
    with _published_form(path) as content:
        for entry in content["data"]:
            entries.add(
                Item(
                    key=str(entry["question_id"]),
                    picture=pictures / _plain(f"{entry['image_id']}.jpg"),
                    question=_text(entry["question"]),
                    truths=tuple(_text(answer) for answer in entry["answers"]),
                )
            )
    return entries.as_benchmark("textvqa", "vqa")


def _imagenet(folder: Path, part: Part) -> Benchmark:
    root = _first_folder(folder, "val" if part == "evaluated" else "train", "")
    wnids = sorted(path.name for path in root.iterdir() if _WNID.fullmatch(path.name))
    if not wnids:
        raise DataError(f"{root} holds no folders of classes, named by wnid as in n01440764")
    names = _class_names(folder, wnids)
    entries = _Entries()
    entries.bad += [f"{wnid} has no class name" for wnid in wnids if wnid not in names]
    known = [wnid for wnid in wnids if wnid in names]
    for number, wnid in enumerate(known):
        for picture in sorted((root / wnid).iterdir()):
            key = f"{wnid}/{picture.stem}"
            entries.add(Item(key=key, picture=picture, truths=(str(number),)))
    benchmark = entries.as_benchmark("imagenet", "classes")
    classes = tuple(names[wnid] for wnid in known)
    return replace(benchmark, classes=classes, templates=_templates(folder))


def _class_names(folder: Path, wnids: list[str]) -> Mapping[str, str]:
    """By wnid: those of the folder's list, or CLIP's where all 1,000 classes are there."""
    path = _found(folder, "classnames.txt", "LOC_synset_mapping.txt")
    if path is not None:
        pairs = [line.split(maxsplit=1) for line in _lines(path)]
        if any(len(pair) != 2 or not _WNID.fullmatch(pair[0]) for pair in pairs):
            raise DataError(f"{path}: each line must be a wnid and a name, as in n01440764 tench")
        # Kaggle's list has all synonyms.
        return {wnid: name.split(",")[0].strip() for wnid, name in pairs}
    if len(wnids) != len(CLASSES):
        raise DataError(
            f"{folder} has {counted(len(wnids), 'class', 'classes')}, not ImageNet's "
            f"{len(CLASSES):,}; write their names to {folder}/classnames.txt, in lines such as "
            "n01440764 tench"
        )
    return dict(zip(wnids, CLASSES, strict=True))


def _templates(folder: Path) -> tuple[str, ...]:
    path = _found(folder, "templates.txt")
    if path is None:
        return TEMPLATES
    templates = tuple(_lines(path))
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise DataError(f"{path}: each line must hold {{}} once, where the class belongs")
    return templates


READERS: dict[str, Callable[[Path, Part], Benchmark]] = {
    "coco_captions": _coco_captions,
    "flickr30k": _flickr30k,
    "vqav2": _vqav2,
    "okvqa": _okvqa,
    "textvqa": _textvqa,
    "imagenet": _imagenet,
}


def commonest(truths: tuple[str, ...]) -> str:
    """The answer that an example gives: the most frequent; of equals, the first given."""
    return Counter(truths).most_common(1)[0][0]


def _found(folder: Path, *names: str) -> Path | None:
    """The first of these files that lies in the folder, or in one that is usual for it."""
    places = (folder / inner / name for name in names for inner in _JSON_FOLDERS)
    return next((path for path in places if path.is_file()), None)


def _missing(folder: Path, *names: str) -> DataError:
    return DataError(
        f"{folder} holds no {' and no '.join(names)}; download it there, or into its annotations/"
    )


def _first_folder(folder: Path, *names: str) -> Path:
    """Where pictures lie; the first place where there is none, to be named for what is missing."""
    places = [folder / name for name in names]
    return next((place for place in places if place.is_dir()), places[0])


@contextmanager
def _published_form(path: Path) -> Iterator[Any]:
    """The content of a JSON file; what its reader stumbles over becomes one clear error."""
    try:
        yield json.loads(path.read_bytes())
    except (KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError) as error:
        raise DataError(
            f"{path} is not of the published form ({type(error).__name__}: {error})"
        ) from error


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    value.encode()  # raises ValueError for half a character
    return value


def _plain(name: Any) -> str:
    """A name that leads nowhere else."""
    if _text(name) != Path(name).name or name in ("", ".."):
        raise ValueError(f"{name!r} is not a plain name")
    return name
