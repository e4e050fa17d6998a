"""Standard benchmarks, read from their files as published (docs/evaluation.md)."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """Captions, the annotators' answers, or the number of the class; none where not published."""
    kind: str = ""
    """VQAv2's type of answer."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is evaluated."""

    name: str
    task: Task
    items: tuple[Item, ...]
    has_truths: bool = True
    """Else answers are for the authors' server to score."""
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
    row = unjudged(item, answer)
    return {**row, "truths": list(item.truths), "score": score, "right": bool(right), **more}


def unjudged(item: Item, answer: str) -> Row:
    """The same without truths to compare with."""
    return {
        "key": item.key,
        "picture": str(item.picture),
        "question": item.question,
        "answer": answer,
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

    def __init__(self, *, have_truths: bool = True) -> None:
        self.items: list[Item] = []
        self.bad: list[str] = []
        self._have_truths = have_truths
        self._keys: set[str] = set()
        self._listed = cache(lambda folder: {path.name for path in folder.iterdir()})

    def add(self, item: Item) -> None:
        folder = item.picture.parent
        if item.key in self._keys:
            self.bad.append(f"{item.key} is there twice, of which the first counts")
        elif not _is_utf8(f"{item.key}{item.picture}"):
            self.bad.append(f"{item.key} has a picture whose name is not UTF-8: {item.picture}")
        elif self._have_truths and not item.truths:
            self.bad.append(f"{item.key} has no truth")
        elif not folder.is_dir() or item.picture.name not in self._listed(folder):
            self.bad.append(f"{item.key} has no picture {item.picture}")
        else:
            self.items.append(item)
        self._keys.add(item.key)

    def by_number(self, what: str, entries: Iterable[Any], name: str) -> dict[int, Any]:
        """Entries by their number of this name; those after the first of a number are bad."""
        first: dict[int, Any] = {}
        for entry in entries:
            number = entry[name]
            if number in first:
                self.bad.append(f"{what} {number} is there twice, of which the first counts")
            first.setdefault(number, entry)
        return first

    def as_benchmark(self, name: str, task: Task) -> Benchmark:
        return Benchmark(
            name=name,
            task=task,
            items=tuple(self.items),
            has_truths=self._have_truths,
            left_out=tuple(self.bad),
        )


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
        images = entries.by_number("image", content["images"], "id")
        for annotation in content["annotations"]:
            if annotation["image_id"] in images:
                captions[annotation["image_id"]].append(_text(annotation["caption"]))
            else:
                entries.bad.append(
                    f"caption {annotation['id']} is of image {annotation['image_id']}, which is "
                    "not listed"
                )
        for number, image in images.items():
            picture = pictures / _plain(image["file_name"])
            entries.add(Item(key=str(number), picture=picture, truths=tuple(captions[number])))
    return entries.as_benchmark("coco_captions", "captions")


def _coco_captions_test(folder: Path, part: Part) -> Benchmark:
    """Of the year 2014, which the server scores; without truths."""
    if part == "examples":
        return _coco_captions(folder, part)
    path = _needed(folder, "image_info_test2014.json")
    pictures = _first_folder(folder, "test2014", "images/test2014")
    entries = _Entries(have_truths=False)
    with _published_form(path) as content:
        for image in content["images"]:
            picture = pictures / _plain(image["file_name"])
            entries.add(Item(key=str(image["id"]), picture=picture, truths=()))
    return entries.as_benchmark("coco_captions_test", "captions")


def _flickr30k(folder: Path, part: Part) -> Benchmark:
    path = _needed(folder, "dataset_flickr30k.json")
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
    questions = _needed(folder, f"{prefix}OpenEnded_mscoco_{subset}_questions.json")
    annotations = _needed(folder, f"{prefix}mscoco_{subset}_annotations.json")
    picture_of = _coco_pictures(folder, subset)
    entries = _Entries()
    with _published_form(annotations) as content:
        annotated = entries.by_number("annotation", content["annotations"], "question_id")
        answers = {
            number: tuple(_text(answer["answer"]) for answer in annotation["answers"])
            for number, annotation in annotated.items()
        }
        kinds = {number: _text(a.get("answer_type", "")) for number, a in annotated.items()}
    with _published_form(questions) as content:
        asked = entries.by_number("question", content["questions"], "question_id")
        for number, question in asked.items():
            if number not in annotated:
                entries.bad.append(f"question {number} has no annotation")
            elif annotated.pop(number)["image_id"] != question["image_id"]:
                entries.bad.append(f"question {number} and its annotation name different images")
            else:
                entries.add(_question(question, picture_of, answers[number], kinds[number]))
    entries.bad += [f"annotation of question {number}, which is not asked" for number in annotated]
    return entries.as_benchmark(name, "vqa")


def _vqav2_test_dev(folder: Path, part: Part) -> Benchmark:
    return _vqa_test("vqav2_test_dev", "test-dev2015", folder, part)


def _vqav2_test(folder: Path, part: Part) -> Benchmark:
    return _vqa_test("vqav2_test", "test2015", folder, part)


def _vqa_test(name: str, subset: str, folder: Path, part: Part) -> Benchmark:
    """Questions whose answers the server keeps."""
    if part == "examples":
        return _vqav2(folder, part)
    picture_of = _coco_pictures(folder, "test2015")
    entries = _Entries(have_truths=False)
    with _published_form(
        _needed(folder, f"v2_OpenEnded_mscoco_{subset}_questions.json")
    ) as content:
        for question in content["questions"]:
            entries.add(_question(question, picture_of))
    return entries.as_benchmark(name, "vqa")


def _coco_pictures(folder: Path, subset: str) -> Callable[[Any], Path]:
    """Where the picture of an image's number lies."""
    pictures = _first_folder(folder, subset, f"images/{subset}", f"Images/mscoco/{subset}")
    return lambda image: pictures / f"COCO_{subset}_{int(image):012d}.jpg"


def _question(
    question: Any,
    picture_of: Callable[[Any], Path],
    truths: tuple[str, ...] = (),
    kind: str = "",
) -> Item:
    return Item(
        key=str(question["question_id"]),
        picture=picture_of(question["image_id"]),
        question=_text(question["question"]),
        truths=truths,
        kind=kind,
    )


def _textvqa(folder: Path, part: Part) -> Benchmark:
    split = "val" if part == "evaluated" else "train"
    return _textvqa_split("textvqa", split, "train_images", folder)


def _textvqa_test(folder: Path, part: Part) -> Benchmark:
    if part == "examples":
        return _textvqa(folder, part)
    return _textvqa_split("textvqa_test", "test", "test_images", folder)


def _textvqa_split(name: str, split: str, images: str, folder: Path) -> Benchmark:
    path = _needed(folder, f"TextVQA_0.5.1_{split}.json")
    pictures = _first_folder(folder, images, f"train_val_images/{images}")
    entries = _Entries(have_truths=split != "test")
    with _published_form(path) as content:
        for entry in content["data"]:
            answers = () if split == "test" else entry["answers"]
            entries.add(
                Item(
                    key=str(entry["question_id"]),
                    picture=pictures / _plain(f"{entry['image_id']}.jpg"),
                    question=_text(entry["question"]),
                    truths=tuple(_text(answer) for answer in answers),
                )
            )
    return entries.as_benchmark(name, "vqa")


def _imagenet(folder: Path, part: Part) -> Benchmark:
    subset = "val" if part == "evaluated" else "train"
    root = _first_folder(folder, subset, f"ILSVRC/Data/CLS-LOC/{subset}", "")
    named = [path for path in _visible(root) if _WNID.fullmatch(path.name)]
    solution = _found(folder, "LOC_val_solution.csv")
    entries = _Entries()
    if named or solution is None:
        wnids = [path.name for path in named if path.is_dir()]
        entries.bad += [f"{path} is a file, not a folder" for path in named if path.is_file()]
        pictures = [
            (f"{wnid}/{picture.stem}", wnid, picture)
            for wnid in wnids
            for picture in _visible(root / wnid)
        ]
    else:
        solved = _solved(solution)
        wnids = sorted({wnid for _, wnid in solved})
        pictures = [(image, wnid, root / f"{image}.JPEG") for image, wnid in solved]
        entries.bad += [
            f"{path} is not in {solution}"
            for path in sorted({*root.glob("*.JPEG")} - {path for _, _, path in pictures})
        ]
    if not wnids:
        raise DataError(
            f"{root} holds no folders of classes, named by wnid as in n01440764, and {folder} no "
            "LOC_val_solution.csv, which tells the classes of pictures in one folder"
        )
    names = _class_names(folder, wnids)
    entries.bad += [f"{wnid} has no class name" for wnid in wnids if wnid not in names]
    known = [wnid for wnid in wnids if wnid in names]
    numbers = {wnid: number for number, wnid in enumerate(known)}
    for key, wnid, picture in pictures:
        if wnid in numbers:
            entries.add(Item(key=key, picture=picture, truths=(str(numbers[wnid]),)))
    benchmark = entries.as_benchmark("imagenet", "classes")
    classes = tuple(names[wnid] for wnid in known)
    return replace(benchmark, classes=classes, templates=_templates(folder))


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder, without what systems hide there (`.DS_Store`)."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _solved(path: Path) -> list[tuple[str, str]]:
    """Pictures and their wnids, as Kaggle lists them: `ImageId,PredictionString`."""
    found = [re.match(rf"([\w-]+),({_WNID.pattern})\b", line) for line in _lines(path)[1:]]
    if None in found:
        raise DataError(
            f"{path}: each line after the first must begin with a picture and its wnid, as in "
            "ILSVRC2012_val_00000001,n01751748"
        )
    return [(match[1], match[2]) for match in found if match]


def _class_names(folder: Path, wnids: list[str]) -> Mapping[str, str]:
    """By wnid: those of the user's list; else CLIP's for all 1,000 classes, Kaggle's for fewer."""
    path = _found(folder, "classnames.txt")
    if path is not None:
        return _listed_names(path)
    if len(wnids) == len(CLASSES):
        return dict(zip(wnids, CLASSES, strict=True))
    path = _found(folder, "LOC_synset_mapping.txt")
    if path is None:
        raise DataError(
            f"{folder} has {counted(len(wnids), 'class', 'classes')}, not ImageNet's "
            f"{len(CLASSES):,}; write their names to {folder}/classnames.txt, in lines such as "
            "n01440764 tench"
        )
    # Kaggle's list has all synonyms.
    return {wnid: name.split(",")[0].strip() for wnid, name in _listed_names(path).items()}


def _listed_names(path: Path) -> dict[str, str]:
    pairs = [line.split(maxsplit=1) for line in _lines(path)]
    if any(len(pair) != 2 or not _WNID.fullmatch(pair[0]) for pair in pairs):
        raise DataError(f"{path}: each line must be a wnid and a name, as in n01440764 tench")
    return dict(pairs)


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
    "coco_captions_test": _coco_captions_test,
    "vqav2": _vqav2,
    "vqav2_test_dev": _vqav2_test_dev,
    "vqav2_test": _vqav2_test,
    "okvqa": _okvqa,
    "textvqa": _textvqa,
    "textvqa_test": _textvqa_test,
    "imagenet": _imagenet,
}


def commonest(truths: tuple[str, ...]) -> str:
    """The answer that an example gives: the most frequent; of equals, the first given.

    Empty where there is none.
    """
    return Counter(truths).most_common(1)[0][0] if truths else ""


def _found(folder: Path, *names: str) -> Path | None:
    """The first of these files that lies in the folder, or in one that is usual for it."""
    places = (folder / inner / name for name in names for inner in _JSON_FOLDERS)
    return next((path for path in places if path.is_file()), None)


def _needed(folder: Path, name: str) -> Path:
    path = _found(folder, name)
    if path is None:
        raise _missing(folder, name)
    return path


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


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # Python has other bytes as halves of characters
        return False
    return True


def _plain(name: Any) -> str:
    """A name that leads nowhere else."""
    if _text(name) != Path(name).name or name in ("", ".."):
        raise ValueError(f"{name!r} is not a plain name")
    return name
