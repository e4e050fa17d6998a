"""One rank of many in one process: tensors without data, process groups without peers.

What is allocated has no data (torch's FakeTensorMode). What Python values were put into, with
`torch.tensor`, keeps its data: settings, counts, the optimiser's steps. A value that is read from a
tensor without data is 1, or False; what is received is what was there before.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megavlm.config.run import RunSettings
from megavlm.dist.groups import process_groups
from megavlm.dryrun.record import Recorder

aten = torch.ops.aten
_VIEWS = {
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.view.default,
    aten.detach.default,
    aten.t.default,
    aten.transpose.int,
    aten._unsafe_view.default,
}
_LIFTS = (aten.lift_fresh.default, aten.lift.default, aten.lift_fresh_copy.default)


class _Mode(TorchDispatchMode):
    """Lies above FakeTensorMode."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._attributes: dict[torch.device, dict[str, Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and guarding against it costs a third of the time

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.prim.device.default:  # the most frequent by far
            tensor = args[0]
            inside = tensor.fake_mode.in_kernel_invocation
            return torch.device("meta") if inside else tensor.fake_device
        kwargs = kwargs or {}
        recorder = self._recorder
        recorder.operations += 1
        if function.namespace == "c10d":
            recorder.collective(function, args, kwargs)
            return _done(function, args)
        if function in _LIFTS:
            return args[0]
        if function in _VIEWS and type(args[0]) is FakeTensor:
            return self._quickly(function, args, kwargs, like=args[0])
        has_fake, has_real = _inputs((args, kwargs))
        if has_real and not has_fake:
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function is aten._local_scalar_dense.default:
            return _value(args[0].dtype)
        if function is aten.equal.default:
            return True
        if function is aten.cat.default and not has_real:
            out = self._quickly(function, args, kwargs, like=args[0][0])
        else:
            out = function(*args, **kwargs)
        self._see(out)
        return out

    def _quickly(self, function: Any, args: tuple[Any, ...], kwargs: Any, *, like: Any) -> Any:
        """Engines take and join so many views that FakeTensorMode's way takes minutes."""
        with in_kernel_invocation_manager(like.fake_mode):
            out = function(*args, **kwargs)
        return (
            self._fake(out, like)
            if isinstance(out, Tensor)
            else [self._fake(piece, like) for piece in out]
        )

    def _fake(self, meta: Tensor, like: Any) -> Any:
        """As FakeTensor's constructor, whose checks take most of its time."""
        device = like.fake_device
        if device not in self._attributes:
            self._attributes[device] = dict(vars(FakeTensor(like.fake_mode, meta, device)))
        out = Tensor._make_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            FakeTensor,
            meta,
            meta.requires_grad,
            dispatch_device=True,
            device_for_backend_keys=device,
        )
        torch._C._set_throw_on_mutable_data_ptr(out)
        vars(out).update(self._attributes[device])
        return out

    def _see(self, out: Any) -> None:
        if isinstance(out, FakeTensor):
            if out.device.type != "meta":
                self._recorder.memory.see(out)
        elif isinstance(out, list | tuple):
            for item in out:
                self._see(item)


def _done(function: Any, args: tuple[Any, ...]) -> Any:
    """What a call of c10d returns, with its output tensors as they were."""
    work = FakeWork().boxed()
    return (args[0], work) if len(function._schema.returns) == 2 else work


def _inputs(tree: Any) -> tuple[bool, bool]:
    """Whether there are tensors without data, and with."""
    has_fake = has_real = False
    pending = [tree]
    while pending:
        value = pending.pop()
        if isinstance(value, FakeTensor):
            has_fake = True
        elif isinstance(value, Tensor):
            has_real = True
        elif isinstance(value, list | tuple):
            pending.extend(value)
        elif isinstance(value, dict):
            pending.extend(value.values())
    return has_fake, has_real


def _value(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


@contextmanager
def alone_of_many(
    run: RunSettings, rank: int, ranks: int, local_ranks: int, recorder: Recorder
) -> Iterator[None]:
    """Run the body as one rank of many, whose collectives return at once.

    Of tensors with data, one that is gathered is this rank's own part, repeated; one that is
    reduced or received stays what it was.
    """
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank % local_ranks),
        "LOCAL_WORLD_SIZE": str(local_ranks),
    }
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, environment))
        _patch_what_others_have(stack, run.engine, recorder)
        groups = process_groups(run.seed, run.model_parallel, store=FakeStore(), backend="fake")
        stack.enter_context(groups)
        yield


@contextmanager
def fake_rank(run: RunSettings, rank: int, ranks: int, local_ranks: int) -> Iterator[Recorder]:
    """Run the body as one rank of many, on tensors without data."""
    recorder = Recorder()
    with ExitStack() as stack:
        # First: with the groups, megatron-core's stand-in for torch on CPUs takes what it finds.
        _patch_what_needs_data(stack, run.engine, recorder)
        stack.enter_context(alone_of_many(run, rank, ranks, local_ranks, recorder))
        stack.enter_context(patch.object(torch.Tensor, "type", _type_of(torch.Tensor.type)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Mode(recorder))
        yield recorder


def _patch_what_others_have(stack: ExitStack, engine: str, recorder: Recorder) -> None:
    """What asks for the other ranks' data, past the dispatcher."""

    def all_gather_object(objects: list[Any], value: Any, group: Any = None) -> None:
        recorder.of_objects("all_gather_object", group)
        objects[:] = [value] * len(objects)

    def broadcast_object_list(objects: list[Any], *_: Any, group: Any = None, **__: Any) -> None:
        recorder.of_objects("broadcast_object_list", group)

    stack.enter_context(patch.object(dist, "all_gather_object", all_gather_object))
    stack.enter_context(patch.object(dist, "broadcast_object_list", broadcast_object_list))
    if engine == "zero3":
        from deepspeed.runtime.zero import utils
        from deepspeed.utils import nvtx

        stack.enter_context(patch.object(nvtx, "enable_nvtx", False))
        stack.enter_context(patch.object(utils, "dist", _AsFirstRank(utils.dist)))


def _patch_what_needs_data(stack: ExitStack, engine: str, recorder: Recorder) -> None:
    """What does not pass through the dispatcher."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage: Any, size: int) -> Any:
        out = resize(storage, size)
        recorder.memory.resized(storage)
        return out

    random_state = torch.get_rng_state()
    for owner, name, new in (
        (torch.UntypedStorage, "resize_", resize_),
        (torch, "tensor", _tensor_of(torch.tensor)),
        (torch, "get_rng_state", lambda: random_state),
        (torch, "set_rng_state", lambda state: None),
    ):
        stack.enter_context(patch.object(owner, name, new))
    if engine == "fsdp2":
        from megavlm.engine import fsdp2

        mesh = with_data(fsdp2.init_device_mesh)
        stack.enter_context(patch.object(fsdp2, "init_device_mesh", mesh))


class _AsFirstRank:
    """A module of collectives for checks that all ranks have what the first one has."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def get_rank(self) -> int:
        return 0


def _type_of(type_of: Any) -> Any:
    """`Tensor.type`, which megatron-core checks, as with data."""

    def type_(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = type_of(tensor, *args, **kwargs)
        return out.replace("meta.", "") if isinstance(out, str) else out

    return type_


def _tensor_of(tensor: Any) -> Any:
    """`torch.tensor`, which would read numbers that are tensors past the dispatcher."""

    def tensor_(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        return tensor(_numbers(data), *args, **kwargs)

    return tensor_


def _numbers(data: Any) -> Any:
    if isinstance(data, list):
        return [_numbers(item) for item in data]
    return data.item() if isinstance(data, FakeTensor) else data


def with_data(function: Any) -> Any:
    """A function that looks into tensors it allocates, such as DTensor's of places."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call
