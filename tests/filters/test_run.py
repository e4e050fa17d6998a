import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megavlm.config.filters import DuplicateRules, FilterSettings, load_rules
from megavlm.data.shards import ShardFolder, write_shards
from megavlm.errors import ConfigError, DataError
from megavlm.files.folder import Folder
from megavlm.filters import duplicates, report, run
from megavlm.filters.duplicates import BANDS
from megavlm.filters.parallel import Job
from megavlm.filters.run import filter_folder
from tests.filters.hashes import RULES as CLOSE
from tests.filters.hashes import clusters, gone_by_all_pairs, write_verdicts
from tests.filters.planted import RULES, clean, make_folder

WITHOUT_LARGE_MODELS = RULES.replace("languages: [en]", "languages: []").replace(
    "personal_data: {}", ""
)
NEEDS_LARGE_MODELS = ("caption_language", "personal_data")


def in_this_process(job):
    """In place of Ray."""

    def in_parallel(_, function, calls, gpus=0):
        for call in calls:
            yield json.loads(json.dumps(function(job, *json.loads(json.dumps(call))))), 1.0

    return in_parallel


def job_of(rules: FilterSettings, source: Path, target: Path | Folder | str) -> Job:
    places = {"source": str(source), "target": str(target)}
    return Job(rules=rules, **places, part_samples=run.PART_SAMPLES)


def filtered(rules: FilterSettings, source: Path, target: Path):
    job = job_of(rules, source, target)
    run._check_inputs(job)
    return run._filter(job, ShardFolder(source), in_this_process(job))


def hashes(folder: Path) -> dict[str, str]:
    """Of all files that training reads."""
    files = (path for path in folder.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def planted(tmp_path):
    """Folder, reasons of planted faults by key, and rules."""
    reasons = make_folder(tmp_path)
    path = tmp_path / "rules.yaml"
    path.write_text(WITHOUT_LARGE_MODELS.replace("EVALUATION", str(tmp_path / "evaluation")))
    return tmp_path, reasons, path


def check(folder: Path, target: Path, reasons: dict[str, str]) -> None:
    """All planted faults went for their reasons and nothing else did; counts add up."""
    source, kept = ShardFolder(folder / "pairs"), ShardFolder(target)
    kept.check_sizes()
    keys = [source.read(n).key for n in range(len(source)) if "zzz" not in source.locate(n)]
    expected = [key for key in keys if key not in reasons]
    samples = [kept.read(n) for n in range(len(kept))]
    assert [sample.key for sample in samples] == [*expected, "000000001"]
    assert samples[-1].texts[0].answer == "a wooden boat lies on the shore of a lake"
    report = json.loads((target / "filter" / "report.json").read_text())
    assert report["dropped"] == Counter(reasons.values())
    assert report["samples"] == len(source) == report["kept"] + sum(report["dropped"].values())
    assert report["kept"] == len(kept) == report["texts"] == report["kept_texts"]
    page = (target / "filter" / "samples.html").read_text()
    assert all(f"<h2>{reason}: {n}</h2>" in page for reason, n in report["dropped"].items())


def test_planted_faults_are_found(planted, tmp_path, capsys, monkeypatch):
    folder, reasons, rules = planted
    monkeypatch.setattr(report, "mask", lambda text, _: text)  # Presidio takes seconds to import
    reasons = {key: r for key, r in reasons.items() if r not in NEEDS_LARGE_MODELS}
    filtered(load_rules(rules), folder / "pairs", tmp_path / "out")
    check(folder, tmp_path / "out", reasons)
    assert not (tmp_path / "tmp").exists() and not (tmp_path.parent / "climbs.jpg").exists()
    assert re.search(r"kept +│ +2\d ", capsys.readouterr().out)
    # Nothing is made twice, and the result is the same.
    before = hashes(tmp_path / "out")
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("**/*.parquet")}
    filtered(load_rules(rules), folder / "pairs", tmp_path / "out")
    assert hashes(tmp_path / "out") == before and made
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("**/*.parquet")}


def test_parts_of_a_comparison_change_nothing(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    copies = [replace(clean(n), key=f"copy-{n}") for n in range(3)]
    write_shards(tmp_path / "in", [*(clean(n) for n in range(5)), *copies], 4)
    rules = FilterSettings(duplicates=DuplicateRules())
    for target, samples in ((tmp_path / "whole", 100), (tmp_path / "parts", 4)):
        monkeypatch.setattr(run, "PART_SAMPLES", samples)
        for folder in ("", "filter/verdicts/"):  # what a killed worker leaves
            (target / "filter" / "verdicts").mkdir(parents=True, exist_ok=True)
            (target / f"{folder}000000.{0:032}.partial").write_bytes(b"?")
        (target / "mine.partial").write_bytes(b"?")
        counts = filtered(rules, tmp_path / "in", target)
        assert (counts.kept, counts.dropped) == (5, {"duplicate_picture": 3})
        assert not {"same", "spread"} & {path.name for path in (target / "filter").iterdir()}
        assert [*target.glob("**/*.partial")] == [target / "mine.partial"]
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "parts")


def test_what_others_have_deleted_ends_nothing(tmp_path, monkeypatch):
    """A worker of a killed run renames its file after it was listed."""
    (tmp_path / "in").mkdir()
    write_shards(tmp_path / "in", [clean(n) for n in range(4)], 2)
    names = Folder.names
    left = f"x.{0:032}.partial"
    monkeypatch.setattr(Folder, "names", lambda folder: [*names(folder), left])
    rules = FilterSettings(duplicates=DuplicateRules())
    monkeypatch.setattr(run, "PART_SAMPLES", 2)
    assert filtered(rules, tmp_path / "in", tmp_path / "out").kept == 4


def test_a_comparison_that_is_done_is_not_looked_at_again(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(run, "PART_SAMPLES", 150)
    job = clusters_job(tmp_path, rows, f"memory://{tmp_path.name}/out")
    listed = []
    entries = Folder.entries

    def counted(folder):
        listed.append(folder.place.rpartition("/")[2])
        return entries(folder)

    monkeypatch.setattr(Folder, "entries", counted)
    run._find_duplicates(job, ShardFolder(job.source), in_this_process(job))
    assert Counter(listed)["same"] == Counter(listed)["spread"] == len(BANDS)
    for name in ("same", "spread"):
        (job.work / name).delete()
    listed.clear()
    run._find_duplicates(job, ShardFolder(job.source), in_this_process(job))
    assert not {"same", "spread"} & {*listed, *job.work.names()}


SAMPLES = 600
FILTER_CLUSTERS = FilterSettings(duplicates=CLOSE)


@pytest.fixture(scope="module")
def rows():
    """Reasons, hashes and signatures of samples, of which many are alike and some have none."""
    generator = np.random.default_rng(7)
    of_pictures, of_captions = (clusters(reason, generator, SAMPLES) for reason in BANDS)
    dropped, textless = generator.random((2, SAMPLES)) < 0.1
    return [
        ("face" if dropped[n] else None, of_pictures[n].tobytes(), caption)
        for n, caption in enumerate(
            None if textless[n] else of_captions[n].tobytes() for n in range(SAMPLES)
        )
    ]


@pytest.fixture(scope="module")
def expected(rows):
    """(what goes, what it is the same as), of pictures and of captions."""
    gone = []
    there = [n for n, (reason, _, _) in enumerate(rows) if reason is None]
    for at, reason in enumerate(BANDS, start=1):
        there = [n for n in there if rows[n][at] is not None]
        of_there = np.frombuffer(b"".join(rows[n][at] for n in there), np.uint8)
        found = gone_by_all_pairs(reason, of_there.reshape(len(there), -1))
        gone.append({there[late]: there[early] for late, early in found.items()})
        there = [n for n in there if n not in gone[-1]]
    return gone


def gone_by(job: Job, in_parallel):
    """The same, as the filter finds it."""
    shards = ShardFolder(job.source)
    found = run._find_duplicates(job, shards, in_parallel)
    assert found == {"duplicate_picture": 0, "duplicate_caption": 0}
    return [
        {
            number: same_as
            for shard in range(len(shards.names()))
            for number, same_as in run._gone_of(job, reason, shard).items()
        }
        for reason in BANDS
    ]


def clusters_job(tmp_path: Path, rows, target: str) -> Job:
    source = tmp_path / "in"
    source.mkdir(exist_ok=True)
    job = job_of(FILTER_CLUSTERS, source, target)
    write_verdicts(source, job.verdicts, rows, 50)
    return job


@pytest.mark.parametrize("samples", [10**6, 150, 1])
def test_the_same_goes_as_by_comparing_all_pairs(tmp_path, rows, expected, samples, monkeypatch):
    """In one group of shards, in 4 of three each, in 12 of one."""
    monkeypatch.setattr(run, "PART_SAMPLES", samples)
    assert all(len(gone) > 50 for gone in expected)
    job = clusters_job(tmp_path, rows, f"memory://{tmp_path.name}/out")
    assert gone_by(job, in_this_process(job)) == expected
    assert not (job.work / "spread").names()


def test_what_full_buckets_have_no_room_for_is_told(tmp_path, rows, monkeypatch):
    """It is the same in one group and in several."""
    monkeypatch.setattr(duplicates, "_QUERIES", 64)
    for name in ("FEW", "PICTURE_CANDIDATES", "CAPTION_CANDIDATES", "MOST_PAIRS", "ENOUGH"):
        monkeypatch.setattr(duplicates, name, 4)
    found = []
    for samples in (10**6, 150):
        monkeypatch.setattr(run, "PART_SAMPLES", samples)
        job = clusters_job(tmp_path, rows, f"memory://{tmp_path.name}/{samples}")
        found.append(run._find_duplicates(job, ShardFolder(job.source), in_this_process(job)))
    assert found[0] == found[1] and all(found[0].values())


@pytest.mark.parametrize("stop", ["_spread", "_compare"])
def test_a_comparison_that_is_stopped_goes_on(tmp_path, rows, expected, stop, monkeypatch):
    """At each call of a band in turn, between two calls and within one."""
    monkeypatch.setattr(run, "PART_SAMPLES", 150)
    job = clusters_job(tmp_path, rows, f"memory://{tmp_path.name}/out")
    calls = Counter()

    def stopped_at(last):
        left = [last]

        def in_parallel(_, function, arguments, gpus=0):
            for call in arguments:
                if function.__name__ == stop:
                    left[0] -= 1
                    if not left[0]:
                        (job.work / "spread").write_atomically("half.rows.0.partial", b"?")
                        raise KeyboardInterrupt
                calls[function.__name__, *call] += 1
                yield function(job, *call), 1.0

        return in_parallel

    for last in range(1, 7):
        with pytest.raises(KeyboardInterrupt):
            gone_by(job, stopped_at(last))
    assert gone_by(job, stopped_at(-1)) == expected
    assert not [call for call, n in calls.items() if n > 1]  # nothing is made twice
    assert len(calls) == 2 * 4 * sum(BANDS.values())


@pytest.fixture
def few(tmp_path):
    (tmp_path / "in").mkdir()
    write_shards(tmp_path / "in", [clean(n) for n in range(4)], 2)
    return tmp_path


def test_other_inputs_are_refused(few, monkeypatch):
    filtered(FilterSettings(), few / "in", few / "out")
    other = FilterSettings(duplicates=DuplicateRules(picture_bits=20))
    with pytest.raises(DataError, match=r"begun with other inputs \(rules\.duplicates\); name"):
        filtered(other, few / "in", few / "out")
    monkeypatch.setattr(run, "PART_SAMPLES", 3)  # files are numbered by the parts
    with pytest.raises(DataError, match=r"other inputs \(part_samples\)"):
        filtered(FilterSettings(), few / "in", few / "out")
    monkeypatch.undo()
    write_shards(few / "in", [clean(n) for n in range(6)], 2)
    with pytest.raises(DataError, match=r"other inputs \(data\./.*/in\)"):
        filtered(FilterSettings(), few / "in", few / "out")


def test_folders_that_hold_other_things_are_refused(few):
    with pytest.raises(DataError, match="cannot be filtered into itself"):
        filtered(FilterSettings(), few / "in", few / "in")
    with pytest.raises(DataError, match="cannot be filtered into itself; name a new folder, not"):
        filtered(FilterSettings(), few / "in", few / "in" / "below")
    (few / "other").mkdir()
    write_shards(few / "other", [clean(0)], 1)
    with pytest.raises(DataError, match="holds shards that were not made by filtering"):
        filtered(FilterSettings(), few / "in", few / "other")


def test_mistakes_are_told_before_ray_starts(few, monkeypatch):
    with pytest.raises(ConfigError, match="in must be an absolute path or a URL"):
        filter_folder(FilterSettings(), "in", str(few / "out"), ray_address="auto")
    monkeypatch.setattr(run, "MOST_SAMPLES", 3)
    with pytest.raises(DataError, match=r"in has 4 samples; duplicates are found among up to 3: "):
        rules = FilterSettings(duplicates=DuplicateRules())
        filter_folder(rules, str(few / "in"), str(few / "out"))
    with pytest.raises(DataError, match="none does not exist"):
        filter_folder(FilterSettings(), str(few / "none"), str(few / "out"))
    monkeypatch.setattr(run, "PACKAGES", {"no_such_module": "no-such-package"})
    with pytest.raises(ConfigError, match=r"needs no-such-package; run `pip install 'megavlm\[fi"):
        filter_folder(FilterSettings(), str(few / "in"), str(few / "out"))


def test_an_object_store(few):
    source, target = few / "in", Folder(f"memory://{few.name}/out")
    filtered(FilterSettings(), source, few / "local")
    job = job_of(FilterSettings(), source, target)
    run._check_inputs(job)
    run._filter(job, ShardFolder(source), in_this_process(job))
    local = hashes(few / "local")
    assert local == {n: hashlib.sha256(target.read(n)).hexdigest() for n in local}


def command(rules: Path, folder: Path, target: Path, workers: int) -> subprocess.Popen[str]:
    places = [str(rules), str(folder / "pairs"), str(target)]
    arguments = [sys.executable, "-m", "megavlm", "data", "filter", *places]
    return subprocess.Popen(
        [*arguments, "--workers", str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(process: subprocess.Popen[str]) -> str:
    """What it printed; it must succeed."""
    out, error = process.communicate()
    assert process.returncode == 0, error
    return out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_planted_faults_are_found_on_ray(planted, tmp_path):
    folder, reasons, rules = planted
    rules.write_text(RULES.replace("EVALUATION", str(folder / "evaluation")))
    out = done(command(rules, folder, tmp_path / "out", 2))
    check(folder, tmp_path / "out", reasons)
    assert "samples judged a second and worker" in out
    found = pq.read_table(tmp_path / "out/filter/verdicts/zzz.parquet").to_pylist()
    assert "../../climbs.jpg" in str([row["detail"] for row in found])


IN_GROUPS = """
import sys
from pathlib import Path
from megavlm.config.filters import load_rules
from megavlm.filters import run
run.PART_SAMPLES = 8
run.filter_folder(load_rules(Path(sys.argv[1])), *sys.argv[2:], workers=2)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_bytes_in_groups_that_are_killed(planted, tmp_path):
    """While they spread hashes, and while they compare them."""
    folder, _, rules = planted
    filtered(load_rules(rules), folder / "pairs", tmp_path / "here")

    def in_groups() -> subprocess.Popen[str]:
        places = [str(rules), str(folder / "pairs"), str(tmp_path / "out")]
        line = [sys.executable, "-c", IN_GROUPS, *places]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    work = tmp_path / "out" / "filter"
    for pattern in ("spread/duplicate_picture-0-*.rows", "same/duplicate_caption-1-*.npz"):
        process = in_groups()
        while not [*work.glob(pattern)]:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done(in_groups())
    assert hashes(tmp_path / "out") == hashes(tmp_path / "here")
    assert not {"same", "spread"} & {path.name for path in work.iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_bytes_on_one_worker_and_after_kills(planted, tmp_path):
    folder, _, rules = planted
    filtered(load_rules(rules), folder / "pairs", tmp_path / "here")
    expected = hashes(tmp_path / "here")
    done(command(rules, folder, tmp_path / "one", 1))
    assert hashes(tmp_path / "one") == expected

    target = tmp_path / "killed"
    for pattern in ("filter/verdicts/*.parquet", "*.tar"):
        process = command(rules, folder, target, 2)
        while not [*target.glob(pattern)]:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (target / "shards.json").exists()
    done(command(rules, folder, target, 2))
    assert hashes(target) == expected
    assert not [*target.glob("filter/unfinished-*")]
