"""How much memory a function takes."""

import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

from tests.ranks import run_on_ranks

STATUS = Path("/proc/self/status")


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes by which a forked process's memory grows at most while the function runs."""
    return run_on_ranks(1, lambda _: growth_bytes(function), groups=False)[0]


def growth_bytes(function: Callable[[], object]) -> int:
    """Bytes by which this process's memory grows at most while the function runs."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is taken now
    before = _kilobytes("VmHWM")
    function()
    return 1024 * (_kilobytes("VmHWM") - before)


def live_bytes() -> int:
    """Of all tensors that this process has made, also of those that only wait to be collected."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            parts = [getattr(thing, name, None) for name in ("grad", "ds_tensor", "_local_tensor")]
            for tensor in (thing, *(part for part in parts if part is not None)):
                if type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta:
                    storage = tensor.untyped_storage()
                    storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _kilobytes(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert match is not None
    return int(match[1])
