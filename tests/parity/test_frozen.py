"""What is frozen stays to the bit, has no optimiser state and no gradient on the network."""

import math
from typing import Any

import pytest
import torch

from megavlm.dist import groups
from megavlm.engine.start import start_engine
from megavlm.model.params import parameters_of
from tests.batches import random_pairs
from tests.parity.collectives import recorded
from tests.parity.runs import CPU, LAYOUTS, my_micro_batches, settings
from tests.ranks import run_on_ranks
from tests.states import whole_tensors

LAYOUT = {layout.name: layout for layout in LAYOUTS}
PRETRAINING = ("objectives={mim: 1, contrastive: 1}", "data.row_tokens=16")
CASES = [
    *(
        pytest.param((f"train.frozen={parts}",), marks=pytest.mark.slow)
        for parts in ("[]", "[encoder]", "[decoder]")
    ),
    ("train.frozen=[encoder, decoder]",),  # Flamingo
    pytest.param(  # LLaVA's first stage
        ("train.frozen=[encoder, decoder, cross_attention]",), marks=pytest.mark.slow
    ),
    pytest.param(("train.frozen=[text_tower]", *PRETRAINING), marks=pytest.mark.slow),
    ("train.frozen=[encoder]", *PRETRAINING),  # LiT
]


@pytest.mark.parametrize("overrides", CASES, ids=lambda o: f"{o[0]} {len(o) > 1}")
@pytest.mark.parametrize("name", ["DP2", "ZeRO-3 x2", "FSDP2 x2"])
def test_frozen_parts_cost_nothing(name, overrides):
    layout = LAYOUT[name]
    run = settings(layout, 2, *overrides)

    def on_rank(_: int) -> Any:
        engine = start_engine(run, CPU)
        before = whole_tensors(engine)
        with recorded() as calls:
            engine.step(my_batches(), 1e-3)
        engine.step(my_batches(), 1e-3)
        after = whole_tensors(engine)
        engine.close()
        reduced = [
            max(math.prod(shape) for shape in call.shapes)
            for call in calls
            if "reduce_scatter" in call.operation and len(call.ranks) > 1
        ]
        return before, after, sum(reduced)

    def my_batches() -> list[Any]:
        if len(overrides) == 1:
            return my_micro_batches(0)
        of_all = [random_pairs(seed) for seed in range(4)]
        return of_all[groups.data_rank() :: groups.data_ranks()]

    before, after, reduced = run_on_ranks(layout.ranks, on_rank, parallel=run.model_parallel)[0]
    entries = parameters_of(run)
    trained = {e.name: e.numel for e in entries if e.setting not in run.train.frozen}
    assert trained.keys() == {n.partition("/")[2] for n in before if n.startswith("exp_avg/")}
    for entry in entries:
        if entry.name not in trained:
            name_of = f"weights/{entry.name}"
            assert torch.equal(before[name_of], after[name_of]), entry.name
    # Megatron-core reduces once a step, the others after every micro-batch.
    times = 1 if run.engine == "megatron" else run.train.micro_batches
    padding = reduced / times - sum(trained.values())
    assert 0 <= padding <= 64 * (len(trained) + 1)
