"""What evaluation reads, and how ranks share it."""

import pytest
import torch

from megavlm.config.data import SourceSettings
from megavlm.data.samples import Sample, Text, Turn, text
from megavlm.data.shards import write_shards
from megavlm.data.tokenizer import Tokenizer
from megavlm.eval.answers import answered, find_prompts
from megavlm.eval.samples import Split, batched, joined
from tests.conftest import COLOURS, coloured_sample, picture
from tests.model.test_vlm import random_model
from tests.ranks import run_on_ranks


@pytest.fixture
def mixed(tmp_path):
    """Samples of two pictures, with texts of all forms; the second one is bad."""
    tail = dict(task="vqa", kind="colour")
    samples = []
    for number in range(4):
        pictures = [picture(COLOURS[number]), picture(COLOURS[number + 4])]
        texts = (
            text("Which?", "second", **tail, pictures=(1,)),
            text("Which?", "both", **tail, pictures=(0, 1)),
            text("Which?", "none", **tail, pictures=()),
            Text(turns=(Turn(prompt="A", answer="B", pictures=(0,)),) * 2, **tail),
            text("Caption:", "first", task="caption", pictures=(0,)),
        )
        if number == 1:
            pictures[0] = pictures[0][:50]
        samples.append(Sample(key=f"{number}", pictures=tuple(pictures), texts=texts))
    (tmp_path / "mixed").mkdir()
    write_shards(tmp_path / "mixed", samples, 1000)
    return [SourceSettings(folder=tmp_path / "mixed")]


def test_texts_of_one_turn_and_one_picture_are_asked(mixed, tiny_run, capfd):
    def asked(_):
        split = Split("heldout", mixed, tiny_run, None)
        return find_prompts(split, ["vqa"]), find_prompts(split, ["vqa", "caption"])

    alone, *two = run_on_ranks(1, asked) + run_on_ranks(2, asked)
    assert two == [alone, alone]
    questions, everything = alone
    assert [(*prompt.picture, prompt.text.answer) for prompt in questions] == [
        (sample, 1, "second") for sample in (0, 2, 3)
    ]
    assert [prompt.text.answer for prompt in everything] == ["second", "first"] * 3
    told = capfd.readouterr().err
    # Four times: two questions, on one rank and on two.
    assert told.count("skipped 000000.tar:1: picture of 1 cannot be used") == 4
    assert told.count("heldout: 9 texts of several turns, or not of one picture") == 4


@pytest.mark.parametrize(("limit", "samples"), [(None, 10), (3, 3), (50, 10)])
def test_a_limit_takes_the_first_samples(tiny_run, limit, samples):
    split = Split("heldout", [tiny_run.data.heldout], tiny_run, limit)
    assert len(split) == samples
    assert [shown.sample for shown in split.share()] == list(range(samples))
    assert [len(shown.pictures) for shown in split.share()] == [1, 1, 1, 1, 0, 1, 1, 1, 1, 0][
        :samples
    ]
    expected = [t for number in range(samples) for t in coloured_sample(number).texts]
    assert list(split.share_of_texts()) == expected


def test_shares_join_in_the_samples_order(tiny_run):
    """Also where a rank has nothing, as the third one here."""

    def shared(rank):
        split = Split("heldout", [tiny_run.data.heldout], tiny_run, 2)
        names, features = [], []
        for some in batched(split.share()):
            names += [f"sample {shown.sample}" for shown in some]
            features.append(torch.tensor([[shown.sample, 7.0] for shown in some]))
        numbers = [int(name.split()[1]) for name in names]
        return joined(numbers, names, [features, features])

    for numbers, names, (first, second) in run_on_ranks(3, shared):
        assert (numbers, names) == ([0, 1], ["sample 0", "sample 1"])
        assert first.tolist() == second.tolist() == [[0, 7], [1, 7]]


@pytest.mark.slow
def test_several_ranks_answer_as_one_does(monkeypatch, tiny_run):
    # Several batches, and several rounds of them, on every rank.
    monkeypatch.setattr("megavlm.eval.answers.BATCH_SIZE", 2)
    monkeypatch.setattr("megavlm.eval.answers.PROMPTS_AT_ONCE", 3)

    def on_rank(_):
        split = Split("heldout", [tiny_run.data.heldout], tiny_run, None)
        tokenizer = Tokenizer(tiny_run.data.tokenizer)
        prompts = find_prompts(split, ["caption", "vqa"])
        done = []
        model = random_model().eval()
        predictions = answered(model, tokenizer, split, prompts, tiny_run.seed, done.append)
        return predictions, sum(done)

    [(alone, done_alone)] = run_on_ranks(1, on_rank)
    (first, done_first), (second, done_second) = run_on_ranks(2, on_rank)
    assert first == second == alone
    assert done_alone == done_first + done_second == 2 * len(alone) == 32
    assert [p.sample for p in alone] == sorted(2 * [0, 1, 2, 3, 5, 6, 7, 8])
    assert [p.text for p in alone] == [
        t for n in (0, 1, 2, 3, 5, 6, 7, 8) for t in coloured_sample(n).texts
    ]
    assert len({p.answer for p in alone}) > 2
    # Only samples 0 and 8 have the same picture.
    assert sum(p.answer != p.answer_to_wrong_picture for p in alone) > len(alone) / 2
