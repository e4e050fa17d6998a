"""The command line, and checkpoints of ours for it."""

import json
from dataclasses import asdict

import torch

from megavlm.__main__ import main
from megavlm.checkpoint.lazy import in_memory
from megavlm.checkpoint.load import lazy_tensors
from megavlm.checkpoint.storage import CheckpointReader
from megavlm.convert.files import write_native
from megavlm.files.folder import Folder
from megavlm.model.params import parameters
from tests.batches import TINY
from tests.ranks import run_on_ranks


def command(*arguments):
    """The command line in a rank of its own: it starts process groups. The exit code."""
    [code] = run_on_ranks(1, lambda _: main(["convert", *map(str, arguments)]), groups=False)
    return code


def certificate(folder):
    return json.loads((folder / "certificate.json").read_text())


def native(folder):
    return lazy_tensors(CheckpointReader(Folder(folder)))


def random_native(folder, seed=0, dtype=torch.float32, step=0, sizes=TINY, kinds=("weights",)):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{kind}/{p.name}": torch.randn(p.shape, generator=generator).to(dtype)
        for kind in kinds
        for p in parameters(sizes)
    }
    folder.mkdir()
    state = {"step": step, "settings": {"model": asdict(sizes)}, "tokenizer_sha256": None}
    write_native(Folder(folder), in_memory(tensors), state, max_file_bytes=40_000)
    return tensors


def fails(capfd, says, *arguments):
    assert command(*arguments) == 2
    told = capfd.readouterr().err
    assert says in told and told.count("\n") == 1, told
