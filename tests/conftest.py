"""What all tests share. Set before anything imports torch's or DeepSpeed's modules."""

import os

# The tests compare real CPU ranks, on machines with GPUs too. (tools/gpu_check.sh runs those of the
# kernels without this file.)
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"

import io
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from megavlm.config.data import AugmentSettings, DataSettings, SourceSettings
from megavlm.config.engines import Zero3Settings
from megavlm.config.load import run_as_tree
from megavlm.config.presets import PRESETS
from megavlm.config.run import (
    CheckpointSettings,
    OptimizerSettings,
    RunSettings,
    TrainSettings,
)
from megavlm.data.samples import Sample, text
from megavlm.data.shards import write_shards
from megavlm.data.tokenizer import train_tokenizer

# Ranks are forked from this process; a fork copies no worker threads, so have none.
torch.set_num_threads(1)

COLOURS = ("red", "green", "blue", "black", "white", "yellow", "purple", "orange")


def picture(colour: str, side: int = 40) -> bytes:
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def coloured_sample(number: int) -> Sample:
    """A coloured square with a caption and a question; every fifth sample is text-only."""
    colour = COLOURS[number % len(COLOURS)]
    caption = text("Caption:", f"a {colour} square", task="caption", kind="en")
    question = text("Which colour?", colour, task="vqa", kind="colour")
    if number % 5 == 4:
        texts = (text("Say it.", f"number {number}", task="text", pictures=()),)
        return Sample(key=f"{number:06d}", pictures=(), texts=texts)
    return Sample(key=f"{number:06d}", pictures=(picture(colour),), texts=(caption, question))


@pytest.fixture(scope="session")
def coloured_squares(tmp_path_factory) -> Path:
    """Folder with splits `train` (40 samples in 4 shards) and `heldout`, and a tokenizer."""
    folder = tmp_path_factory.mktemp("squares")
    for split, count in (("train", 40), ("heldout", 10)):
        (folder / split).mkdir()
        write_shards(folder / split, (coloured_sample(n) for n in range(count)), 10)
    texts = [t for n in range(40) for x in coloured_sample(n).texts for t in (x.prompt, x.answer)]
    # Each with a word of its own, as there must be enough to make pieces of.
    words = [f"{a} {b} {n:b}" for n, a in enumerate(texts) for b in texts[:9]]
    words = [line.replace("0", "o").replace("1", "i") for line in words]
    vocabulary = PRESETS["vlm-tiny"].decoder.vocabulary
    train_tokenizer([*words, *texts], folder / "tokenizer.model", vocabulary)
    return folder


@pytest.fixture
def tiny_run(coloured_squares, tmp_path) -> RunSettings:
    """Settings of a run of seconds."""
    return RunSettings(
        run_folder=tmp_path / "run",
        model=PRESETS["vlm-tiny"],
        data=DataSettings(
            train=(SourceSettings(folder=coloured_squares / "train"),),
            heldout=SourceSettings(folder=coloured_squares / "heldout"),
            tokenizer=coloured_squares / "tokenizer.model",
            row_tokens=24,
            texts_per_sample=2,
            workers=0,
            augment=AugmentSettings(minimum_area=0.5),
        ),
        optimizer=OptimizerSettings(learning_rate=2e-3),
        train=TrainSettings(steps=6, samples_per_step=8, micro_batches=2, precision="fp32"),
        checkpoint=CheckpointSettings(every=2),
        zero3=Zero3Settings(reduce_bucket=20_000, prefetch_bucket=10_000, persistence_threshold=40),
    )


@pytest.fixture
def tiny_run_file(tiny_run, tmp_path) -> Path:
    """The same as a YAML file."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_as_tree(tiny_run)))
    return path
