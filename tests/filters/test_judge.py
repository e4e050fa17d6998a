import io
import tarfile

import pytest

from megavlm.config.filters import (
    CaptionRules,
    EvaluationRules,
    FilterSettings,
    PersonalDataRules,
)
from megavlm.data.samples import Sample, Text, Turn, text
from megavlm.errors import BadSampleError
from megavlm.files.folder import Folder
from megavlm.filters.evaluation import EvaluationSet, fingerprints, joined, load, save
from megavlm.filters.judge import judge, unsafe_names
from tests.filters.planted import encoded, pair, picture

IMAGE = encoded(picture(0))


def judged(samples, rules, evaluation=None):
    contents = [(n, b"") for n in range(len(samples))]
    return judge(contents, lambda n, _: samples[n], rules, evaluation)


def tar_with(*names: str, kind=tarfile.GNU_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=kind) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    return content.getvalue()


@pytest.mark.parametrize("name", ["../a.jpg", "x/../../a.jpg", "/etc/a.jpg", "..\\a.jpg"])
def test_names_that_lead_elsewhere(name):
    assert unsafe_names(tar_with("a.jpg", name, "b.jpg")) == [name]
    # What a shard's index cuts out ends with the last member's content.
    assert unsafe_names(tar_with("a.jpg", name)[: 3 * 512 + 3]) == [name]


def test_names_that_do_not():
    long = "folder/" * 30 + "a.jpg"
    assert unsafe_names(tar_with("a.jpg", "./b.jpg", "x/y/c.jpg", "d..jpg", long)) == []
    assert unsafe_names(b"no tar at all") == []


def test_what_cannot_be_read_goes():
    def broken(number, _):
        raise BadSampleError(f"sample {number} is broken")

    [verdict] = judge([(7, b"")], broken, FilterSettings(), None)
    assert (verdict.number, verdict.reason) == (7, "unreadable")
    assert verdict.detail == "sample 7 is broken"


def test_texts_go_one_by_one_and_the_sample_with_the_last():
    rules = FilterSettings(captions=CaptionRules(minimum_characters=5))
    good, bad = text("", "a long caption", "caption"), text("", "no", "caption")
    question = text("Is it?", "no", "vqa")  # no caption: rules about captions do not touch it
    samples = [
        Sample(key="a", pictures=(IMAGE,), texts=(bad, good, bad)),
        Sample(key="b", pictures=(IMAGE,), texts=(bad, question)),
        Sample(key="c", pictures=(IMAGE,), texts=(bad, bad)),
    ]
    first, second, third = judged(samples, rules)
    assert first.sample.texts == (good,) and first.removed_texts == {"caption_length": 2}
    assert second.sample.texts == (question,) and second.is_changed
    assert third.reason == "caption_length" and not third.removed_texts


@pytest.mark.slow  # Presidio takes seconds to import
def test_masking_keeps_the_sample_and_its_other_texts():
    rules = FilterSettings(personal_data=PersonalDataRules(action="mask"))
    turns = (
        Turn(prompt="Who is bob@example.com?", answer="My uncle.", pictures=(0,)),
        Turn(prompt="His address?", answer="bob@example.com"),
    )
    clean = text("", "a man", "caption")
    sample = Sample(key="a", pictures=(IMAGE,), texts=(Text(turns=turns, task="chat"), clean))
    [verdict] = judged([sample], rules)
    chat, other = verdict.sample.texts
    assert [t.prompt for t in chat.turns] == ["Who is <EMAIL>?", "His address?"]
    assert chat.turns[1].answer == "<EMAIL>" and chat.turns[0].pictures == (0,)
    assert other == clean and verdict.masked_texts == 1


def test_evaluation_samples(tmp_path):
    rules = EvaluationRules(folders=("x",), words=4)
    held = [pair("e", encoded(picture(1)), "Four words are enough, surely.")]
    known = fingerprints(held, rules)
    assert known.pictures.shape == (2, 32) and len(known.texts) == 2
    save(Folder(tmp_path), "known.npz", joined([known, known]))
    evaluation = EvaluationSet(load(Folder(tmp_path), "known.npz"))
    samples = [
        pair("a", encoded(picture(1), quality=50), "another caption"),
        pair("b", IMAGE, "it says: four WORDS, are enough"),
        pair("c", IMAGE, "four words are too few"),
        Sample(key="d", pictures=(), texts=(text("", "words alone", "text", pictures=()),)),
    ]
    verdicts = judged(samples, FilterSettings(evaluation=rules), evaluation)
    assert [v.reason for v in verdicts] == ["evaluation_picture", "evaluation_text", None, None]


def test_an_evaluation_set_without_pictures_or_long_texts():
    rules = EvaluationRules(folders=("x",))
    evaluation = EvaluationSet(joined([]))
    [verdict] = judged(
        [pair("a", IMAGE, "a caption")], FilterSettings(evaluation=rules), evaluation
    )
    assert verdict.reason is None


def test_hashes_are_only_of_single_pictures():
    rules = FilterSettings(evaluation=EvaluationRules(folders=("x",)))
    evaluation = EvaluationSet(joined([]))
    two = text("", "two pictures", "caption", pictures=(0, 1))
    samples = [
        pair("a", IMAGE, "one picture"),
        Sample(key="b", pictures=(IMAGE, IMAGE), texts=(two,)),
    ]
    one, several = judged(samples, rules, evaluation)
    assert one.picture_hash is not None and several.picture_hash is None
    assert one.pictures == ()  # decoded ones are not kept
