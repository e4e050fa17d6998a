"""What the command prints, and what it refuses."""

import io
import os
import re
from contextlib import redirect_stdout
from typing import Any
from unittest.mock import patch

import pytest
from torch import nn

from megavlm.dryrun.report import print_dry_run
from megavlm.errors import ConfigError, LaunchError
from megavlm.model.cross_attention import CrossAttentionLayer
from megavlm.model.params import parameters
from tests.batches import TINY
from tests.parity.runs import LAYOUTS, settings
from tests.ranks import run_on_ranks

LAYOUT = {layout.name: layout for layout in LAYOUTS}


def printed(name: str, **options: object) -> str:
    """In a process that may have threads."""

    def on_rank(_: int) -> str:
        with redirect_stdout(io.StringIO()) as out:
            print_dry_run(settings(LAYOUT[name], 1), 2, chosen=range(2), **options)
        return out.getvalue()

    return run_on_ranks(1, on_rank, groups=False)[0]


def test_all_ranks():
    text = printed("FSDP2 x2", micro_batches=1)
    assert "1 of a step's 2 micro-batches" in text
    count = sum(entry.numel for entry in parameters(TINY))
    assert f"all ranks together hold {count:,} parameters: the whole model" in text
    assert "ranks 0-1 agree on all their" in text
    [row] = [line for line in text.splitlines() if "reduce_scatter" in line]
    assert row.split()[:2] == ["reduce_scatter_base", "2"]


def test_a_disagreement_ends_in_one_error():
    run = settings(LAYOUT["TP2"], 1, "megatron.overlap_communication=false")

    def call(layer: Any, hidden_states: Any, *args: Any, context: Any = None, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1":
            return hidden_states, context
        return nn.Module.__call__(layer, hidden_states, *args, context=context, **kwargs)

    def on_rank(_: int) -> str:
        skipped = patch.object(CrossAttentionLayer, "__call__", call, create=True)
        with skipped, redirect_stdout(io.StringIO()), pytest.raises(ConfigError) as raised:
            print_dry_run(run, 2, micro_batches=1)
        return str(raised.value)

    [message] = run_on_ranks(1, on_rank, groups=False)
    call_of = r"collective \d+ of \d+, allreduce_ of \d+ float32 over ranks 0-1"
    expected = rf"ranks disagree in the step: rank 1 is in {call_of}, but rank 0 is in {call_of}"
    assert re.fullmatch(expected, message), message


def test_only_build():
    text = printed("TP2", only_build=True)
    assert "the whole model" in text and "peak" not in text and "Calls" not in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"chosen": [0, 2]}, "--rank 2: 2 ranks are numbered 0 to 1"),
        ({"chosen": [-1]}, "--rank -1: 2 ranks are numbered 0 to 1"),
        ({"micro_batches": 3}, "--micro-batches 3: a step has 2; name at most those"),
    ],
)
def test_mistakes(options, told):
    with pytest.raises(ConfigError, match=told):
        print_dry_run(settings(LAYOUT["FSDP2 x2"], 1), 2, **options)


def test_no_disk(tmp_path):
    overrides = ("zero3.offload_optimizer=nvme", f"zero3.nvme_folder={tmp_path}")
    with pytest.raises(ConfigError, match="offload_optimizer=nvme needs a disk"):
        print_dry_run(settings(LAYOUT["ZeRO-3 x2"], 1, *overrides), 2)


def test_ranks_that_must_share_a_host():
    with pytest.raises(LaunchError, match=r"slots=1, not a multiple of megatron\.tensor_parallel"):
        print_dry_run(settings(LAYOUT["TP2"], 1), 2, gpus_per_host=1)
    with pytest.raises(ConfigError, match="--gpus-per-host 3 does not divide --ranks 4; try"):
        print_dry_run(settings(LAYOUT["FSDP2 x4"], 1), 4, gpus_per_host=3)
