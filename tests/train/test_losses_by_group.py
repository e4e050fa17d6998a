"""The loss of each source and modality, beside the sum over its samples one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megavlm.config.data import SourceSettings
from megavlm.config.run import RunSettings
from megavlm.data.collate import texts_alone
from megavlm.data.loader import MicroBatches, Share
from megavlm.data.shards import write_shards
from megavlm.data.sources import source_names, training_sources
from megavlm.data.tokenizer import Tokenizer
from megavlm.model.initial import materialise
from megavlm.model.vlm import VisionLanguageModel
from megavlm.train.loop import train
from megavlm.train.metrics import read_metrics
from tests.batches import label_losses
from tests.conftest import coloured_sample
from tests.ranks import run_on_ranks
from tests.runs import plan_of
from tests.train.test_resume import LAYOUTS, MEGATRON

WORST = 1e-6  # relative; worst measured 5.5e-8


@pytest.fixture
def run(tiny_run, tmp_path) -> RunSettings:
    """A mixture of two sources; every fifth sample has no picture."""
    other = tmp_path / "other-source"
    other.mkdir()
    write_shards(other, (coloured_sample(n) for n in range(3, 33)), 10)
    sources = (*tiny_run.data.train, SourceSettings(folder=str(other), parts=2))
    return replace(
        tiny_run,
        data=replace(tiny_run.data, train=sources),
        train=replace(tiny_run.train, steps=1, samples_per_step=16),
        megatron=MEGATRON,
    )


def losses_one_by_one(run):
    """Of the first step: each text in a batch of its own, summed by what its sample is."""
    model = VisionLanguageModel(run.model, dtype=torch.float32, recompute="none", frozen=())
    materialise(model, run.seed, torch.device("cpu"))
    tokenizer, sources = Tokenizer(run.data.tokenizer), training_sources(run)
    reader = MicroBatches(sources, tokenizer, run, Share(0, 1), texts_alone, training=True)
    sums = {}
    for position in range(run.train.samples_per_step):
        [place] = sources.shuffled(np.array([position]))
        drawn = reader._draw(place, *sources.fetch([place]), position)
        names = (
            ("source_train", "source_other_source")[place.source],
            ("modality_image_text" if drawn.pictures else "modality_text"),
        )
        for text in drawn.texts:
            alone = drawn._replace(texts=(text,))
            batch = texts_alone([alone], tokenizer, run, max(1, len(drawn.pictures)))
            with torch.no_grad():
                learned = label_losses(model, batch)[batch.learned_bt].double()
            for name in names:
                loss, items = sums.get(name, (0.0, 0))
                sums[name] = loss + float(learned.sum()), items + len(learned)
    return {f"loss_{name}": loss / items for name, (loss, items) in sums.items()}


@pytest.mark.parametrize(
    "engine",
    ["fsdp2", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("zero3", "megatron"))],
)
def test_losses_are_those_of_each_sample_alone(run, engine):
    run = replace(run, engine=engine)
    run_on_ranks(LAYOUTS[engine], lambda _: train(plan_of(run)), groups=False)
    [expected] = run_on_ranks(1, lambda _: losses_one_by_one(run))
    [line] = [line for line in read_metrics(run.run_folder) if "loss" in line]
    found = {name: value for name, value in line.items() if name.startswith("loss_")}
    assert len(expected) == 4 and found == pytest.approx(expected, rel=WORST)


@pytest.mark.slow
def test_what_holds_all_tokens_is_not_told_twice(tiny_run):
    run = replace(tiny_run, engine="fsdp2", train=replace(tiny_run.train, steps=2))
    run_on_ranks(1, lambda _: train(plan_of(run)), groups=False)
    lines = [line for line in read_metrics(run.run_folder) if "loss" in line]
    assert not [name for line in lines for name in line if name.startswith("loss_source_")]


def test_names_of_sources():
    def names(*folders):
        return source_names([SourceSettings(folder=folder) for folder in folders])

    assert names("data/emoji/train", "s3://key:secret@bucket/llava-1.5/") == ["train", "llava_1_5"]
    assert names("a/train", "b/train") == ["a_train", "b_train"]
    assert names("a/train", "a/train", "b") == ["a_train_0", "a_train_1", "b_2"]
