"""A step that does not fit ends in one line that says what was in it and what to change."""

import contextlib
import io

import pytest
import torch

from megavlm.__main__ import main
from megavlm.stages.language import LanguageObjective
from megavlm.train.memory import memory_told
from tests.ranks import run_on_ranks


def too_much():
    torch.empty(1 << 60, dtype=torch.uint8)


def no_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee ...")


def no_python_memory():
    raise MemoryError


@pytest.mark.parametrize(
    ("allocate", "where", "reason", "engine", "remedy"),
    [
        (too_much, "host", "DefaultCPUAllocator", "megatron", "more megatron.tensor_parallel (1"),
        pytest.param(
            *(no_gpu_memory, "GPU", "CUDA out of memory. Tried to allocate 2.00 GiB.;"),
            *("fsdp2", "more ranks to shard over (1 now)"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(no_python_memory, "host", "no memory left", "zero3", "more ranks to shard over"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_out_of_memory(tiny_run_file, allocate, where, reason, engine, remedy):
    def on_rank(_):
        original = LanguageObjective.losses
        calls = []

        def losses(self, outputs, batch, prepared=None):
            calls.append(batch)
            if torch.is_grad_enabled() and len([b for b in calls if b.samples]) > 8:
                allocate()
            return original(self, outputs, batch, prepared)

        LanguageObjective.losses = losses
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = main(["train", str(tiny_run_file), f"engine={engine}"])
        return code, said.getvalue()

    [(code, said)] = run_on_ranks(1, on_rank, groups=False)
    [line] = [line for line in said.splitlines() if line.startswith("megavlm: error")]
    assert code == 2
    assert line.startswith("megavlm: error (rank 0): rank 0, step ")
    assert f"no {where} memory for a micro-batch of up to 4 samples with " in line
    assert reason in line and remedy in line
    assert "more train.micro_batches (2 now)" in line and "train.recompute=full (none now)" in line


def test_other_errors_stay_what_they_are(tiny_run):
    with pytest.raises(RuntimeError, match="something else"), memory_told(0, [], tiny_run):
        raise RuntimeError("something else")
