import json
from collections import Counter

import pytest

from megavlm.config.filters import CaptionRules, DuplicateRules, FilterSettings
from megavlm.data.samples import Sample, text
from megavlm.data.shards import ShardFolder, write_shards
from megavlm.files.folder import Folder
from megavlm.filters import report, verdicts
from megavlm.filters.duplicates import Duplicate
from megavlm.filters.output import (
    EXAMPLES,
    WORK,
    Counts,
    Example,
    count,
    first_of_each,
    new_keys,
    write_kept,
)
from megavlm.filters.report import REPORT, SHEET, print_report, write_report
from megavlm.filters.verdicts import batches, judge_shard, read_hashes
from tests.filters.planted import encoded, pair, picture

RULES = FilterSettings(
    captions=CaptionRules(maximum_characters=30), duplicates=DuplicateRules(caption_similarity=0.8)
)
LONG = "a caption that is much longer than thirty characters"


@pytest.fixture
def folder(tmp_path):
    captions = ["a red boat", LONG, "a <script>alert(1)</script>", "fog", "a hill", "ice"]
    samples = [pair(f"k{n}", encoded(picture(n)), c) for n, c in enumerate(captions)]
    two = (text("", LONG, "caption"), text("", "a pond", "caption"))
    samples[5] = Sample(key="k5", pictures=samples[5].pictures, texts=two)
    (tmp_path / "in").mkdir()
    write_shards(tmp_path / "in", samples, 3)
    (tmp_path / "out" / WORK).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def judged(folder):
    verdict_folder = Folder(folder / "out" / WORK)
    for shard in (0, 1):
        assert judge_shard(ShardFolder(folder / "in"), shard, RULES, None, verdict_folder) == 3
    return verdict_folder


def test_shards_of_what_stays(folder, judged):
    shards, target = ShardFolder(folder / "in"), Folder(folder / "out")
    gone = {3: (0, "duplicate_picture"), 4: (0, "duplicate_caption")}
    assert write_kept(shards, 0, judged, gone, target) == 2
    assert write_kept(shards, 1, judged, gone, target) == 1
    assert not [n for n in judged.names() if not n.endswith(".parquet")]
    found = [count(shards, shard, judged, gone) for shard in (0, 1)]
    counts = found[0][0] + found[1][0]
    assert counts == Counts(
        samples=6,
        kept=3,
        dropped=Counter(caption_length=1, duplicate_picture=1, duplicate_caption=1),
        texts=4,
        kept_texts=3,
        removed_texts=Counter(caption_length=1),
    )
    assert Counts.of(counts.as_record()) == counts
    sizes = target.sizes()
    assert sizes.keys() == {
        *("000000.tar", "000001.tar", "000000.index.npy", "000001.index.npy", WORK)
    }


def test_the_report_shows_examples_and_runs_nothing(folder, judged):
    shards = ShardFolder(folder / "in")
    gone = {2: (0, "duplicate_picture"), 4: (0, "duplicate_caption")}
    found = [count(shards, shard, judged, gone) for shard in (0, 1)]
    counts, examples = found[0][0] + found[1][0], found[0][1] + found[1][1]
    crowded: dict[Duplicate, int] = {"duplicate_picture": 7}
    measured = {"judge_seconds": 1.0}
    write_report(judged, counts, shards, RULES, examples, crowded, measured)
    page = (folder / "out" / WORK / SHEET).read_text()
    assert page.count("data:image/jpeg;base64") == 3 and "as 000000.tar:k0" in page
    assert LONG in page
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page
    record = json.loads(judged.read(REPORT))
    assert record["kept"] == 3 and record["crowded"] == {"duplicate_picture": 7}


def test_a_search_that_is_not_complete_is_told(capsys):
    print_report(Counts(), {"duplicate_picture": 0, "duplicate_caption": 1_234}, Folder("x"), None)
    out = capsys.readouterr().out
    assert "1,234 kept samples found a bucket full: duplicate_caption may not be complete" in out
    assert "duplicate_picture" not in out


def test_what_is_cut_off_is_masked_before(monkeypatch):
    monkeypatch.setattr(report, "mask", lambda text, _: text.replace("me@example.org", "<EMAIL>"))
    answer = f"{'x' * (report.SHOWN_CHARACTERS - 12)} me@example.org"
    assert report._shown([answer]) == [f"{answer[:-15]} <EMAIL>"]


def test_nothing_is_written_of_a_shard_of_which_nothing_stays(folder, judged):
    gone = {n: (0, "duplicate_picture") for n in range(3)}
    assert write_kept(ShardFolder(folder / "in"), 0, judged, gone, Folder(folder / "out")) == 0
    assert Folder(folder / "out").names() == [WORK]


def test_hashes_of_what_is_left(judged):
    places, hashes = read_hashes(judged, "000000.tar", "picture_hash")
    assert places.tolist() == [0, 2] and hashes.shape == (2, 32)
    places, signatures = read_hashes(judged, "000001.tar", "caption_signature")
    assert places.tolist() == [0, 1, 2] and signatures.shape == (3, 252)


def test_a_batch_is_bounded(folder, monkeypatch):
    shards = ShardFolder(folder / "in")
    assert [*batches(shards, 1)] == [range(3, 6)]
    monkeypatch.setattr(verdicts, "BATCH_SAMPLES", 2)
    assert [*batches(shards, 1)] == [range(3, 5), range(5, 6)]
    monkeypatch.setattr(verdicts, "BATCH_BYTES", 1)
    assert [*batches(shards, 1)] == [range(n, n + 1) for n in (3, 4, 5)]


def test_the_first_examples_are_kept_whatever_comes_first():
    of_shards = [
        [Example(number=n, reason="face" if n % 2 else "agreement", same_as=None, detail="")]
        for n in range(20)
    ]
    kept: list[Example] = []
    for found in reversed(of_shards):
        kept = first_of_each([*kept, *found])
    assert [example.number for example in kept] == [*range(2 * EXAMPLES)]


def test_keys():
    assert new_keys(["a", "b", "a", "a-2"]) == ["a", "b", "a-2", "a-2-3"]
    bad = ["", " ", "a\\b", "a\nb", "x" * 81, "絵" * 27, "c:"]
    assert new_keys(bad) == [f"sample-{n:06}" for n in range(7)]
    assert new_keys(["絵", "it's"]) == ["絵", "it's"]
    hostile = ["sample-000001", "", "sample-000001"]
    assert len(set(new_keys(hostile))) == 3
