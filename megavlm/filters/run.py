"""Filtering a folder of shards.

Three passes over the shards: judge the samples of each by themselves; find duplicates among all;
write those that stay. What is there already is not made again, so that a filtering that was stopped
goes on.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megavlm.config.filters import FilterSettings, rules_as_tree
from megavlm.data.index import MANIFEST, ShardSize, read_manifest, write_manifest
from megavlm.data.samples import Sample
from megavlm.data.shards import ShardFolder
from megavlm.errors import BadSampleError, ConfigError, DataError
from megavlm.files.folder import Folder
from megavlm.filters import duplicates, evaluation
from megavlm.filters.arrays import load_arrays, save_arrays
from megavlm.filters.captions import check_languages
from megavlm.filters.duplicates import BANDS, Duplicate
from megavlm.filters.evaluation import EvaluationSet
from megavlm.filters.models import check_checkpoints
from megavlm.filters.output import UNFINISHED, Counts, Example, count, write_kept
from megavlm.filters.parallel import InParallel, Job, ray_workers
from megavlm.filters.personal import check_regions
from megavlm.filters.report import print_report, write_report
from megavlm.filters.towers import resolved
from megavlm.filters.verdicts import batches, judge_shard, name_of, read_hashes

INPUTS, EVALUATION = "inputs.json", "evaluation.npz"
VERSION = 1
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
"""Compared by one worker at once, which takes up to 2.6 GB for captions."""

Gone = NDArray[np.int64]
"""(duplicates, 2): a sample's number, and that of the one that it is the same as; sorted."""


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
    job = Job(rules=resolved(rules), source=source, target=target)
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
        _find_duplicates(job, len(shards), in_parallel)

    there = target.sizes()
    todo = [(n,) for (n,) in numbers if shards.name(n) not in there]
    with _timed(measured, "write_seconds"):
        for _ in in_parallel("write", _write, todo):
            pass

    of_shards = sorted(found for found, _ in in_parallel("count", _count, numbers))
    counts = sum((Counts.of(found) for _, found, _ in of_shards), Counts())
    sizes = target.sizes()
    kept = {shards.name(n): int(found["kept"]) for n, found, _ in of_shards if found["kept"]}
    write_manifest(target, {name: ShardSize(of, sizes[name]) for name, of in kept.items()})
    examples = [Example(**example) for _, _, found in of_shards for example in found]
    write_report(job.work, counts, shards, rules, examples, measured)
    _tidy(job.work)
    print_report(counts, target, samples_per_second)
    return counts


@contextmanager
def _timed(measured: dict[str, float | None], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    measured[name] = time.perf_counter() - start


def _find_duplicates(job: Job, samples: int, in_parallel: InParallel) -> None:
    """Write which samples go; pictures first, then captions among the others."""
    folder = job.work / "same"
    folder.create()
    for reason in _compared(job.rules):
        if job.work.has(_gone_name(reason)):
            continue
        parts = math.ceil(samples / PART_SAMPLES)
        calls: list[tuple[Duplicate, int, int]] = [
            (reason, band, part) for band in range(BANDS[reason]) for part in range(parts)
        ]
        there = folder.sizes()
        todo = [call for call in calls if _same_name(*call) not in there]
        for _ in in_parallel(reason, _find_same, todo):
            pass
        gone = duplicates.choose([duplicates.load(folder, _same_name(*call)) for call in calls])
        pairs = np.array(sorted(gone.items()), np.int64).reshape(-1, 2)
        save_arrays(job.work, _gone_name(reason), gone=pairs)


def _compared(rules: FilterSettings) -> list[Duplicate]:
    """Which duplicates are looked for, in order."""
    reasons: list[Duplicate] = []
    if rules.duplicates and rules.duplicates.picture_bits is not None:
        reasons.append("duplicate_picture")
    if rules.duplicates and rules.duplicates.caption_similarity is not None:
        reasons.append("duplicate_caption")
    return reasons


def _same_name(reason: Duplicate, band: int, part: int) -> str:
    return f"{reason}-{band}-{part}.npz"


def _gone_name(reason: Duplicate) -> str:
    return f"{reason}.npz"


# What workers do. Each file that they write is there whole or not at all.


def _fingerprint(job: Job, at: int, shard: int) -> str:
    """Fingerprints of a shard of an evaluation set."""
    assert job.rules.evaluation
    place = job.rules.evaluation.folders[at]
    shards = ShardFolder(place)

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
    return judge_shard(job.source, shard, job.rules, _evaluation_set(job), job.verdicts)


@cache
def _evaluation_set(job: Job) -> EvaluationSet | None:
    if job.rules.evaluation is None:
        return None
    return EvaluationSet(evaluation.load(job.work, EVALUATION))


def _find_same(job: Job, reason: Duplicate, band: int, part: int) -> None:
    """Compare the samples whose value of a band falls into a part of all values."""
    assert job.rules.duplicates
    shards = ShardFolder(job.source)
    parts = math.ceil(len(shards) / PART_SAMPLES)
    earlier = _compared(job.rules)[: _compared(job.rules).index(reason)]
    gone = [_gone(job, other)[:, 0] for other in earlier]
    first, found = 0, list[tuple[Any, Any, Any]]()
    for name, samples in zip(shards.names(), shards.shard_samples, strict=True):
        column = "picture_hash" if reason == "duplicate_picture" else "caption_signature"
        places, hashes = read_hashes(job.verdicts, name, column)
        numbers, values = places + first, duplicates.bands_of(reason, hashes)[:, band]
        here = values % np.uint64(parts) == part
        for numbers_gone in gone:
            here &= ~np.isin(numbers, numbers_gone)
        found.append((numbers[here], hashes[here], values[here]))
        first += samples
    numbers, hashes, values = map(np.concatenate, zip(*found, strict=True))
    are_near = duplicates.nearness(reason, job.rules.duplicates)
    same = duplicates.find_same(numbers, hashes, values, are_near)
    duplicates.save(job.work / "same", _same_name(reason, band, part), same)


@cache
def _gone(job: Job, reason: Duplicate) -> Gone:
    return load_arrays(job.work, _gone_name(reason))["gone"]


def _gone_in(job: Job, shard: int) -> dict[int, tuple[int, Duplicate]]:
    """Duplicates in a shard: what they are the same as, and why they go."""
    numbers = ShardFolder(job.source).numbers_of(shard)
    here: dict[int, tuple[int, Duplicate]] = {}
    for reason in _compared(job.rules):
        gone = _gone(job, reason)
        start, end = np.searchsorted(gone[:, 0], [numbers.start, numbers.stop])
        here |= {number: (same, reason) for number, same in gone[start:end].tolist()}
    return here


def _write(job: Job, shard: int) -> int:
    gone = _gone_in(job, shard)
    return write_kept(job.source, shard, job.verdicts, gone, Folder(job.target))


def _count(job: Job, shard: int) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    gone = _gone_in(job, shard)
    counts, examples = count(ShardFolder(job.source), shard, job.verdicts, gone)
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
        for place in [*places, *evaluated, *map(str, rules.checkpoints)]:
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
        str(folder): _hash_of([(f.name, f.stat().st_size) for f in sorted(folder.iterdir())])
        for folder in job.rules.checkpoints
    }
    return {
        "version": VERSION,
        "rules": rules_as_tree(job.rules),
        "data": {
            place: _hash_of([*read_manifest(Folder(place)).items()])
            for place in (job.source, *folders)
        },
        "checkpoints": files,
        "packages": {package: version(package) for package in ("pillow", *PACKAGES.values())},
    }


def _hash_of(record: Any) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _changed(before: Any, now: Any, place: str = "") -> list[str]:
    """Dotted places at which two records differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({*before, *now})
        below = (_changed(before.get(n), now.get(n), f"{place}.{n}" if place else n) for n in names)
        return [name for of_name in below for name in of_name]
    return [place] if before != now else []


def _tidy(work: Folder) -> None:
    """Delete what only a filtering that is not done needs."""
    for name in work.names():
        if name in ("same", "evaluation"):
            (work / name).delete()
        elif name.startswith(UNFINISHED) and work.local_path is not None:
            shutil.rmtree(work.local_path / name)
