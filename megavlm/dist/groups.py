"""Starting and stopping the process groups of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from megavlm.config.engines import UNDIVIDED, MegatronSettings
from megavlm.dist import cpu
from megavlm.errors import LaunchError
from megavlm.terminal import counted

Plain = TypeVar("Plain")


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def local_rank() -> int:
    """This rank's number on its host, from the launcher; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Ranks of the run, from the launcher; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This rank's global number, from the launcher; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def local_world_size() -> int:
    """Ranks on this host, from torchrun or from DeepSpeed's launcher; 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))


def data_rank() -> int:
    """Which copy of the model this rank belongs to; all its ranks work on the same samples."""
    return parallel_state.get_data_parallel_rank()


def data_ranks() -> int:
    """Copies of the model."""
    return parallel_state.get_data_parallel_world_size()


def describe(parallel: MegatronSettings) -> str:
    """How this run's ranks are used, in words."""
    ranks, copies = counted(world_size(), "rank"), counted(data_ranks(), "copy", "copies")
    each = f"{parallel.tensor_parallel} x pipeline {parallel.pipeline_parallel}"
    return f"{ranks}: {copies} of the model, each on tensor {each}"


def copies_group() -> dist.ProcessGroup:
    """This rank's counterparts in all copies of the model."""
    return cast(Any, parallel_state.get_data_parallel_group())


def is_first_model_rank() -> bool:
    """Whether this rank is the first of its copy of the model."""
    return dist.get_rank(_model_group()) == 0


def from_first_model_rank(value: Plain | None) -> Plain:
    """What the first rank of this copy of the model has, on all of its ranks; collective.

    It travels pickled: both ends are this run's own ranks.
    """
    group = _model_group()
    if group.size() > 1:
        value = _from_first(value, group)
    return cast(Plain, value)


def from_first_rank(text: str) -> str:
    """What the first rank of all has; collective."""
    return _from_first(text, None)


def from_all_ranks(value: Plain, group: dist.ProcessGroup | None = None) -> list[Plain]:
    """What each rank (of a group) has, in their order; collective. It travels pickled, as above."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _from_first(value: Any, group: dist.ProcessGroup | None) -> Any:
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0, device=device())
    return box[0]


class Hand:
    """What any rank can raise, and all see alike: `sum_over_ranks` carries it along."""

    raised = False
    """By this rank."""
    seen_on_ranks = 0
    """The same on all of them."""


def sum_over_ranks(*values: Tensor | float) -> list[float]:
    """Add up each value over all ranks, in fp64; collective."""
    mine = [*map(float, values), float(Hand.raised)]
    totals = torch.tensor(mine, dtype=torch.float64, device=device())
    dist.all_reduce(totals)
    *sums, hands = totals.tolist()
    Hand.seen_on_ranks = max(Hand.seen_on_ranks, int(hands))
    return sums


def sum_over_copies(*counts: int) -> list[int]:
    """Add up each count over the copies of the model; collective."""
    totals = torch.tensor(counts, device=device())
    dist.all_reduce(totals, group=copies_group())
    return totals.tolist()


def from_copies(value: Plain) -> list[Plain]:
    """What each copy of the model has, in their order; collective. It travels pickled, as above."""
    return from_all_ranks(value, copies_group())


def _model_group() -> dist.ProcessGroup:
    """The ranks of this copy of the model."""
    return cast(Any, parallel_state.get_model_parallel_group())


@contextmanager
def process_groups(
    seed: int,
    parallel: MegatronSettings = UNDIVIDED,
    *,
    store: Store | None = None,
    backend: str | None = None,
) -> Iterator[None]:
    """Run the body inside `world_group` and `model_groups`."""
    with world_group(store=store, backend=backend), model_groups(seed, parallel):
        yield


@contextmanager
def world_group(*, store: Store | None = None, backend: str | None = None) -> Iterator[None]:
    """Run the body inside the group of all of this run's ranks, and take it down again.

    The launcher's environment says who is who; without one the process is alone. The backend is
    NCCL on GPUs and gloo on CPUs unless one is named. The group is destroyed explicitly, because
    gloo may abort a process that exits without doing so. After an error it is not under NCCL:
    that would wait for the other ranks, which wait for this one, before the error could be told.
    """
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise LaunchError(
                f"this host starts {local_world_size()} ranks but has {torch.cuda.device_count()} "
                "GPUs; lower its slots in the hostfile"
            )
        torch.cuda.set_device(local_rank())
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    try:
        store = store or _meeting_place()
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size())
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LaunchError(
            f"the ranks cannot meet at {place}, see docs/launching.md: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield
    except BaseException:
        if backend != "nccl":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _meeting_place() -> Store | None:
    """Where the ranks of this start meet; None leaves it to torch, which asks the launcher.

    torchrun's own store outlives its ranks, and those that it starts again would find the addresses
    of those before them.
    """
    if "MASTER_ADDR" not in os.environ:
        return cast(Any, dist).HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        # Each host counts its own restarts, so they have no name in common.
        raise LaunchError(
            f"torchrun with --max-restarts={restarts} on several hosts needs "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment; export it on all of them"
        )
    store, *_ = next(iter(cast(Any, dist).rendezvous("env://")))
    return cast(Any, dist).PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


@contextmanager
def model_groups(seed: int, parallel: MegatronSettings) -> Iterator[None]:
    """Run the body with the ranks grouped as `parallel` divides each copy of the model.

    Tensor-parallel ranks are neighbours, so that they share a host; the stages of a pipeline lie
    farthest apart. The groups are destroyed again, unless the body fails.
    """
    before = set(_all_groups())
    parallel_state.initialize_model_parallel(
        parallel.tensor_parallel,
        parallel.pipeline_parallel,
        parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,
    )
    made = [group for group in _all_groups() if group not in before]
    try:
        cpu.install()
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
    for group in made:
        dist.destroy_process_group(group)


def _all_groups() -> list[dist.ProcessGroup]:
    return list(cast(Any, dist).distributed_c10d._world.pg_map)
