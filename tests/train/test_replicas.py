"""Copies of the model that drift apart are found, and comparing changes nothing."""

import re
from functools import partial

import pytest
import torch

from megavlm.dist import groups
from megavlm.engine.start import start_engine
from megavlm.errors import DivergenceError
from megavlm.train.replicas import compare_replicas
from tests.parity.runs import CPU, LAYOUTS, my_micro_batches, settings
from tests.ranks import run_on_ranks
from tests.states import whole_tensors

LAYOUT = {layout.name: layout for layout in LAYOUTS}
FAST = ("FSDP2 hybrid 2x2", "TP2 x DP2")
SLOW = ("ZeRO-3 x2", "ZeRO-3 hpZ 2x2", "DP2")


def trained(run, compares):
    """What three steps make of the weights; what is said of a bit that flips on the last rank."""
    engine = start_engine(run, CPU)
    for step in range(3):
        engine.step(my_micro_batches(step), 1e-2)
        if compares:
            compare_replicas(engine.replicated(), step)
    tensors = whole_tensors(engine)
    told = names = None
    if compares:
        replicated = engine.replicated()
        name = sorted(name for name in replicated if name.startswith("weights/"))[0]
        if groups.rank() == groups.world_size() - 1:
            box = next(iter(replicated[name].boxes.values()))
            words = box.view(torch.int16 if box.element_size() == 2 else torch.int32)
            words.view(-1)[-1] ^= 1
        with pytest.raises(DivergenceError) as raised:
            compare_replicas(replicated, 3)
        told, names = str(raised.value), len(replicated)
    engine.close()
    return tensors, told, names


def on_rank(run, _):
    plain, *_ = trained(run, compares=False)
    compared, told, names = trained(run, compares=True)
    assert all(torch.equal(plain[name], compared[name]) for name in plain)
    return told, names


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_one_bit_of_one_rank(name):
    layout = LAYOUT[name]
    gathered = "zero3.persistence_threshold=1000"  # small parameters stay gathered on all ranks
    run = settings(layout, 2, "train.precision=bf16", gathered)
    parallel = run.model_parallel
    told = run_on_ranks(layout.ranks, partial(on_rank, run), parallel=parallel)
    assert len({text for text, _ in told}) == 1, "all ranks say the same"
    text = told[0][0]
    last = rf"\b{layout.ranks - 1} \("
    assert re.search(rf"copies of the model differ: weights/\S+ of ranks .*{last}", text)
    assert "(1 in all)" in text
