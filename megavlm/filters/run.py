"""Filtering a folder of shards.

Three passes over the shards: judge the samples of each by themselves; find duplicates among all;
write those that stay. What is there already is not made again, so that a filtering that was stopped
goes on.
"""

import hashlib
import json
import shutil
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache, lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.config.filters import FilterSettings, rules_as_tree
from megavlm.data.index import MANIFEST, ShardSize, read_manifest, write_manifest
from megavlm.data.samples import Sample
from megavlm.data.shards import ShardFolder
from megavlm.errors import BadSampleError, ConfigError, DataError
from megavlm.files.folder import Folder, is_partial
from megavlm.filters import duplicates, evaluation
from megavlm.filters.arrays import Rows, load_arrays, read_part, save_arrays, write_parts
from megavlm.filters.captions import check_languages
from megavlm.filters.duplicates import BANDS, HASH_BYTES, MOST_SAMPLES, Duplicate, Ints
from megavlm.filters.evaluation import EvaluationSet
from megavlm.filters.models import check_checkpoints
from megavlm.filters.output import (
    UNFINISHED,
    Counts,
    Example,
    count,
    first_of_each,
    write_kept,
)
from megavlm.filters.parallel import InParallel, Job, ray_workers
from megavlm.filters.personal import check_regions
from megavlm.filters.report import print_report, write_report
from megavlm.filters.towers import resolved
from megavlm.filters.verdicts import batches, judge_shard, name_of, read_hashes

INPUTS, EVALUATION = "inputs.json", "evaluation.npz"
VERSION = 2
"""Of what the rules find; a filtering that another one has begun does not go on."""
PACKAGES = {
    "ray": "ray",
    "pyarrow": "pyarrow",
    "lingua": "lingua-language-detector",
    "pdqhash": "pdqhash",
    "rensa": "rensa",
    "faiss": "faiss-cpu",
    "cv2": "opencv-python-headless",
    "presidio_analyzer": "presidio-analyzer",
    "transformers": "transformers",
}
"""Modules of the extra `filter`, with the names of their packages."""
PART_SAMPLES = 2 * 10**6
"""In a group of shards, and in a part of a band: what one worker holds at once."""


def filter_folder(
    rules: FilterSettings,
    source: str,
    target: str,
    *,
    ray_address: str | None = None,
    workers: int | None = None,
) -> Counts:
    """Write the samples of a data folder that the rules keep, and a report, to a new folder.

    ray_address: of a Ray cluster; None: Ray is started on this machine, and stopped. workers: at
    once; None: as many as there are cores. The shards depend on neither. Raises MegavlmError.
    """
    _check_rules(rules, [source, target], ray_address)
    shards = ShardFolder(source)
    shards.check_sizes()
    if rules.duplicates and len(shards) > MOST_SAMPLES:
        raise DataError(
            f"{source} has {len(shards)} samples; duplicates are found among up to {MOST_SAMPLES}: "
            "filter it in several folders"
        )
    job = Job(rules=resolved(rules), source=source, target=target, part_samples=PART_SAMPLES)
    _check_inputs(job)
    with ray_workers(job, ray_address, workers) as in_parallel:
        counts = _filter(job, shards, in_parallel)
    if not counts.kept:
        raise DataError(
            f"no sample of {source} is left; {job.work}/samples.html shows why, by examples"
        )
    return counts


def _filter(job: Job, shards: ShardFolder, in_parallel: InParallel) -> Counts:
    target, rules = Folder(job.target), job.rules
    numbers = [(n,) for n in range(len(shards.shard_samples))]
    measured: dict[str, float | None] = {}

    if rules.evaluation and not job.work.has(EVALUATION):
        folders = [*enumerate(rules.evaluation.folders)]
        parts = [
            (at, n) for at, place in folders for n in range(len(ShardFolder(place).shard_samples))
        ]
        folder = job.work / "evaluation"
        folder.create()
        names = [name for name, _ in in_parallel("evaluation", _fingerprint, parts)]
        known = evaluation.joined([evaluation.load(folder, name) for name in sorted(names)])
        evaluation.save(job.work, EVALUATION, known)

    job.verdicts.create()
    there = job.verdicts.sizes()
    todo = [(n,) for (n,) in numbers if name_of(shards.name(n)) not in there]
    judged, busy_seconds = 0, 0.0
    with _timed(measured, "judge_seconds"):
        for samples, seconds in in_parallel("judge", _judge, todo, rules.gpus_per_worker):
            judged, busy_seconds = judged + samples, busy_seconds + seconds
    samples_per_second = judged / busy_seconds if judged else None
    measured |= {"judged_samples": judged, "samples_per_second_and_worker": samples_per_second}

    with _timed(measured, "duplicates_seconds"):
        crowded = _find_duplicates(job, shards, in_parallel)

    there = target.sizes()
    todo = [(n,) for (n,) in numbers if shards.name(n) not in there]
    with _timed(measured, "write_seconds"):
        for _ in in_parallel("write", _write, todo):
            pass

    counts, examples, kept = Counts(), list[Example](), np.zeros(len(numbers), np.int64)
    for (n, found, of_shard), _ in in_parallel("count", _count, numbers):
        counts += Counts.of(found)
        kept[n] = found["kept"]
        examples = first_of_each([*examples, *(Example(**example) for example in of_shard)])
    sizes, filled = target.sizes(), np.flatnonzero(kept).tolist()
    names = {n: shards.name(n) for n in filled}
    write_manifest(target, {names[n]: ShardSize(int(kept[n]), sizes[names[n]]) for n in filled})
    write_report(job.work, counts, shards, rules, examples, crowded, measured)
    _tidy(job)
    print_report(counts, crowded, target, samples_per_second)
    return counts


@contextmanager
def _timed(measured: dict[str, float | None], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    measured[name] = time.perf_counter() - start


def _find_duplicates(
    job: Job, shards: ShardFolder, in_parallel: InParallel
) -> dict[Duplicate, int]:
    """Write which samples go; pictures first, then captions among the others.

    Where there are several groups of shards, each spreads its hashes over the parts of a band, so
    that no part reads what belongs to others; one band after the other, for the space they take.
    Returns how many samples stay that full buckets had no room for.
    """
    crowded: dict[Duplicate, int] = {}
    for reason in _compared(job.rules):
        if not job.work.has(_crowded_name(reason)):
            _compare_bands(job, shards, reason, in_parallel)
            _choose(job, shards, reason)
        crowded[reason] = json.loads(job.work.read(_crowded_name(reason)))
    return crowded


def _compare_bands(
    job: Job, shards: ShardFolder, reason: Duplicate, in_parallel: InParallel
) -> None:
    same, spread = job.work / "same", job.work / "spread"
    for folder in (same, spread, job.work / "gone"):
        folder.create()
    groups = range(len(_groups(shards, job.part_samples)))
    compared, left = same.sizes(), {*spread.names()}

    def calls(bands: Sequence[int]) -> list[tuple[Duplicate, int, int]]:
        return [(reason, band, n) for band in bands for n in groups]

    bands = range(BANDS[reason])
    for some in [[band] for band in bands] if len(groups) > 1 else [bands]:
        todo = [call for call in calls(some) if _same_name(*call) not in compared]
        if not todo:
            continue
        if len(groups) > 1:
            names = {_spread_name(*call): call for call in calls(some)}
            missing = [call for name, call in names.items() if name not in left]
            for _ in in_parallel(f"{reason}, spread", _spread, missing):
                pass
            left |= names.keys()
        for _ in in_parallel(reason, _compare, todo):
            pass
        for name in left:
            spread.delete_file(name)
        left = set[str]()


def _choose(job: Job, shards: ShardFolder, reason: Duplicate) -> None:
    """Write which samples go, for each group of shards."""
    folder, shards_of = job.work / "same", _groups(shards, job.part_samples)
    groups = range(len(shards_of))
    copies, pairs = [np.empty(0, np.uint64)], np.empty(0, np.uint64)
    is_left_out = np.zeros(len(shards), np.bool_)
    if len(groups) > 1:
        copies += [duplicates.load(folder, _same_name(reason, None, n)).copies for n in groups]
    for band in range(BANDS[reason]):
        new: list[duplicates.Keys] = []
        for part in groups:
            same = duplicates.load(folder, _same_name(reason, band, part))
            copies.append(same.copies)
            new.append(duplicates.not_among(same.pairs, pairs))  # a band finds each pair once
            is_left_out[same.left_out] = True
        pairs = np.concatenate([pairs, *new])
        pairs.sort()
    gone = duplicates.choose(duplicates.distinct(copies), pairs, len(shards))
    firsts = [shards.numbers_of(of_group.start).start for of_group in shards_of]
    ends = np.searchsorted(gone, np.array(firsts[1:], np.uint64) << np.uint64(32))
    for group, here in enumerate(np.split(gone, ends)):
        same_as, number = duplicates.numbers_of(here)
        is_left_out[number] = False
        save_arrays(job.work / "gone", _gone_name(reason, group), number=number, same_as=same_as)
    crowded = int(is_left_out.sum())
    job.work.write_atomically(_crowded_name(reason), json.dumps(crowded).encode())


@lru_cache(maxsize=4)
def _groups(shards: ShardFolder, part_samples: int) -> list[range]:
    """The shards of each group of `part_samples` or a shard more."""
    firsts = np.cumsum(shards.shard_samples) - shards.shard_samples
    starts = np.flatnonzero(np.diff(firsts // part_samples, prepend=-1)).tolist()
    return [range(*bounds) for bounds in pairwise([*starts, len(firsts)])]


def _compared(rules: FilterSettings) -> list[Duplicate]:
    """Which duplicates are looked for, in order."""
    reasons: list[Duplicate] = []
    if rules.duplicates and rules.duplicates.picture_bits is not None:
        reasons.append("duplicate_picture")
    if rules.duplicates and rules.duplicates.caption_similarity is not None:
        reasons.append("duplicate_caption")
    return reasons


def _same_name(reason: Duplicate, band: int | None, part: int) -> str:
    """band: None: of copies within a group of shards."""
    return f"{reason}-{'copies' if band is None else band}-{part}.npz"


def _spread_name(reason: Duplicate, band: int, group: int) -> str:
    return f"{reason}-{band}-{group}.rows"


def _crowded_name(reason: Duplicate) -> str:
    """Of the file that is written last of a reason's."""
    return f"{reason}.crowded.json"


def _gone_name(reason: Duplicate, group: int) -> str:
    return f"{reason}-{group}.npz"


# What workers do. Each file that they write is there whole or not at all.


@cache
def _opened(place: str) -> ShardFolder:
    """Once in each worker: the list of 180,000 shards takes a second to read."""
    return ShardFolder(place)


def _fingerprint(job: Job, at: int, shard: int) -> str:
    """Fingerprints of a shard of an evaluation set."""
    assert job.rules.evaluation
    shards = _opened(job.rules.evaluation.folders[at])

    def samples() -> Iterator[Sample]:
        for batch in batches(shards, shard):
            for number, content in zip(batch, shards.fetch(batch), strict=True):
                with suppress(BadSampleError):  # the evaluation leaves them out, too
                    yield shards.parse(number, content)

    name = f"{at}-{shard}.npz"
    known = evaluation.fingerprints(samples(), job.rules.evaluation)
    evaluation.save(job.work / "evaluation", name, known)
    return name


def _judge(job: Job, shard: int) -> int:
    shards = _opened(job.source)
    return judge_shard(shards, shard, job.rules, _evaluation_set(job), job.verdicts)


@cache
def _evaluation_set(job: Job) -> EvaluationSet | None:
    if job.rules.evaluation is None:
        return None
    return EvaluationSet(evaluation.load(job.work, EVALUATION))


def _row(reason: Duplicate) -> np.dtype[np.void]:
    """Of the files that hashes are spread to."""
    return np.dtype([("number", "<i8"), ("hash", "u1", HASH_BYTES[reason])])


def _rows_of(job: Job, reason: Duplicate, group: int) -> Rows:
    """Numbers and hashes of a group's samples that are still there."""
    shards = _opened(job.source)
    earlier = _compared(job.rules)[: _compared(job.rules).index(reason)]
    column = "picture_hash" if reason == "duplicate_picture" else "caption_signature"
    found: list[Rows] = []
    for shard in _groups(shards, job.part_samples)[group]:
        places, hashes = read_hashes(job.verdicts, shards.name(shard), column)
        rows = np.empty(len(places), _row(reason))
        rows["number"], rows["hash"] = places + shards.numbers_of(shard).start, hashes
        gone = [number for other in earlier for number in _gone_of(job, other, shard)]
        found.append(rows[~np.isin(rows["number"], np.array(gone, np.int64))])
    return np.concatenate(found)


def _spread(job: Job, reason: Duplicate, band: int, group: int) -> None:
    """Write the hashes of a group of shards by the part that their value of a band falls into."""
    rows = _rows_of(job, reason, group)
    copies, is_copy = duplicates.find_copies(rows["number"], rows["hash"])
    if band == 0:
        same = duplicates.Same(copies, copies[:0], rows["number"][:0])
        duplicates.save(job.work / "same", _same_name(reason, None, group), same)
    rows = rows[~is_copy]
    parts = len(_groups(_opened(job.source), job.part_samples))
    part_of = duplicates.band_of(reason, rows["hash"], band) % np.uint64(parts)
    name = _spread_name(reason, band, group)
    write_parts(job.work / "spread", name, rows, part_of.astype(np.int64), parts)


def _compare(job: Job, reason: Duplicate, band: int, part: int) -> None:
    """Compare the samples whose value of a band falls into a part of all values."""
    assert job.rules.duplicates
    groups = range(len(_groups(_opened(job.source), job.part_samples)))
    if len(groups) == 1:
        rows = _rows_of(job, reason, 0)
    else:
        names = [_spread_name(reason, band, group) for group in groups]
        rows = read_part(job.work / "spread", names, part, _row(reason))
    values = duplicates.band_of(reason, rows["hash"], band)
    near = duplicates.nearness(reason, job.rules.duplicates)
    same = duplicates.find_same(rows["number"], rows["hash"], values, near)
    if band:  # copies share all bands
        same = same._replace(copies=same.copies[:0])
    duplicates.save(job.work / "same", _same_name(reason, band, part), same)


@lru_cache(maxsize=4)
def _gone(job: Job, reason: Duplicate, group: int) -> tuple[Ints, Ints]:
    """Numbers of duplicates in a group of shards, ascending, and what they are the same as."""
    found = load_arrays(job.work / "gone", _gone_name(reason, group))
    return found["number"], found["same_as"]


def _gone_of(job: Job, reason: Duplicate, shard: int) -> dict[int, int]:
    """Duplicates in a shard, and what they are the same as."""
    shards = _opened(job.source)
    starts = [of_group.start for of_group in _groups(shards, job.part_samples)]
    group = bisect_right(starts, shard) - 1
    number, same_as = _gone(job, reason, group)
    numbers = shards.numbers_of(shard)
    here = slice(*np.searchsorted(number, [numbers.start, numbers.stop]).tolist())
    return dict(zip(number[here].tolist(), same_as[here].tolist(), strict=True))


def _gone_in(job: Job, shard: int) -> dict[int, tuple[int, Duplicate]]:
    """Duplicates in a shard: what they are the same as, and why they go."""
    return {
        number: (same_as, reason)
        for reason in _compared(job.rules)
        for number, same_as in _gone_of(job, reason, shard).items()
    }


def _write(job: Job, shard: int) -> int:
    gone = _gone_in(job, shard)
    return write_kept(_opened(job.source), shard, job.verdicts, gone, Folder(job.target))


def _count(job: Job, shard: int) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    gone = _gone_in(job, shard)
    counts, examples = count(_opened(job.source), shard, job.verdicts, gone)
    return shard, counts.as_record(), [asdict(example) for example in examples]


# Before and after.


def _check_rules(rules: FilterSettings, places: Sequence[str], ray_address: str | None) -> None:
    """Raise ConfigError for what would come to light in a worker."""
    missing = [package for module, package in PACKAGES.items() if not find_spec(module)]
    if missing:
        raise ConfigError(
            f"filtering needs {', '.join(missing)}; run `pip install 'megavlm[filter]'`"
        )
    check_languages(rules.captions.languages)
    if rules.personal_data:
        check_regions(rules.personal_data.phone_regions)
    check_checkpoints(rules)
    for folder in rules.evaluation.folders if rules.evaluation else ():
        ShardFolder(folder).check_sizes()
    if ray_address is not None:
        evaluated = rules.evaluation.folders if rules.evaluation else ()
        tokenizer = [str(t)] if rules.agreement and (t := rules.agreement.tokenizer) else []
        for place in [*places, *evaluated, *map(str, rules.checkpoints), *tokenizer]:
            if Folder(place).is_local and not Path(place).is_absolute():
                raise ConfigError(
                    f"{place} must be an absolute path or a URL, which all hosts of the Ray "
                    f"cluster {ray_address} see"
                )


def _check_inputs(job: Job) -> None:
    """Raise DataError if the new folder is of something else; note what it is of."""
    target = Folder(job.target, write_remedy="free space or permit writing there, and run again")
    source = Folder(job.source)
    if f"{target}/".startswith(f"{source}/"):
        raise DataError(f"{source} cannot be filtered into itself; name a new folder, not {target}")
    inputs, names = _inputs(job), target.names()
    if job.work.has(INPUTS):
        before = json.loads(job.work.read(INPUTS))
        if changed := _changed(before, inputs):
            raise DataError(
                f"{target} was begun with other inputs ({', '.join(changed)}); name a new folder, "
                f"or delete {target}"
            )
        return
    if MANIFEST in names or any(name.endswith(".tar") for name in names):
        raise DataError(f"{target} holds shards that were not made by filtering; name a new folder")
    job.work.create()
    target.check_writable("permit writing there, or name another folder")
    job.work.write_atomically(INPUTS, json.dumps(inputs, indent=2).encode())


def _inputs(job: Job) -> dict[str, Any]:
    """All that decides which samples stay."""
    folders = job.rules.evaluation.folders if job.rules.evaluation else ()
    files = {
        str(folder): _hash_of([_told_of(f) for f in sorted(folder.iterdir())])
        for folder in job.rules.checkpoints
    }
    return {
        "version": VERSION,
        "part_samples": job.part_samples,
        "rules": rules_as_tree(job.rules),
        "data": {
            place: _hash_of([*read_manifest(Folder(place)).items()])
            for place in (job.source, *folders)
        },
        "checkpoints": files,
        "packages": {package: version(package) for package in ("pillow", *PACKAGES.values())},
    }


def _told_of(file: Path) -> tuple[str, int, str]:
    """What tells a checkpoint's file from another; ours list their checksums in a JSON file."""
    size = file.stat().st_size
    is_small = file.suffix == ".json"
    return file.name, size, hashlib.sha256(file.read_bytes()).hexdigest() if is_small else ""


def _hash_of(record: Any) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _changed(before: Any, now: Any, place: str = "") -> list[str]:
    """Dotted places at which two records differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({*before, *now})
        below = (_changed(before.get(n), now.get(n), f"{place}.{n}" if place else n) for n in names)
        return [name for of_name in below for name in of_name]
    return [place] if before != now else []


def _tidy(job: Job) -> None:
    """Delete what only a filtering that is not done needs, and what killed ones have left."""
    for name in job.work.names():
        if name in ("same", "spread", "evaluation"):
            (job.work / name).delete()
        elif name.startswith(UNFINISHED) and job.work.local_path is not None:
            shutil.rmtree(job.work.local_path / name)
    for folder in (Folder(job.target), job.work, job.verdicts, job.work / "gone"):
        for name in folder.names():
            if is_partial(name):
                folder.delete_file(name)
