"""Tells what a step that did not fit into memory had in it, and what would make it smaller."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megavlm.config.run import RunSettings
from megavlm.dist import groups
from megavlm.errors import OutOfMemoryError


@contextmanager
def memory_told(step: int, micro_batches: Sequence[Any], run: RunSettings) -> Iterator[None]:
    """Raise OutOfMemoryError where torch or Python finds no memory for a step."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        where = "GPU" if isinstance(error, torch.OutOfMemoryError) else "host"
        raise _told(step, micro_batches, run, where, error) from error
    except RuntimeError as error:  # of torch's allocator for CPUs
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise _told(step, micro_batches, run, "host", error) from error


def _told(
    step: int, micro_batches: Sequence[Any], run: RunSettings, where: str, error: BaseException
) -> OutOfMemoryError:
    images = max(batch.images for batch in micro_batches)
    slots = max(len(batch.pixels) for batch in micro_batches)
    tokens = max(batch.text_tokens for batch in micro_batches)
    places = max(batch.tokens_bt.numel() for batch in micro_batches)
    samples = max(batch.samples for batch in micro_batches)
    reason = (str(error) or "no memory left").splitlines()[0]
    remedies = [
        f"more train.micro_batches ({run.train.micro_batches} now), which makes each smaller"
    ]
    if run.train.recompute != "full":
        remedies.append(f"train.recompute=full ({run.train.recompute} now)")
    remedies.append(
        f"data.micro_batch_images below {slots} (it leaves out what exceeds it)"
        if slots > 1
        else "a smaller data.row_tokens"
    )
    match run.engine:
        case "megatron":
            remedies.append(
                f"more megatron.tensor_parallel ({run.megatron.tensor_parallel} now) or "
                f"pipeline_parallel ({run.megatron.pipeline_parallel} now)"
            )
        case "fsdp2" | "zero3":
            remedies.append(f"more ranks to shard over ({groups.world_size()} now)")
    return OutOfMemoryError(
        f"rank {groups.rank()}, step {step + 1}: no {where} memory for a micro-batch of up to "
        f"{samples} samples with {images} images (in {slots} slots) and {tokens:,} text tokens (in "
        f"{places:,} places): {reason}; try {', '.join(remedies)}; `megavlm plan` predicts what "
        "each takes"
    )
