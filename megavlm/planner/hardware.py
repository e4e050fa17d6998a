"""What the planner knows of GPUs and networks.

Nominal figures are the makers' data sheets. What of them programs reach is measured by others, and
by `megavlm plan --calibrate` on the machine at hand: see `calibrate`.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from megavlm.errors import ConfigError

GIB = 1024**3
BF16_BYTES, FP32_BYTES = 2, 4


def precision_bytes(precision: str) -> int:
    """Of a value in bf16 or fp32."""
    return {"bf16": BF16_BYTES, "fp32": FP32_BYTES}[precision]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory_bytes: int
    matmul_flops_per_second: float
    """Dense, in bf16, nominal."""
    fp32_matmul_flops_per_second: float
    """The same in fp32, outside of tensor cores: torch does not round to TF32 unless told to."""
    memory_bytes_per_second: float
    """Nominal."""
    multiprocessors: int
    link_bytes_per_second: float
    """To the other GPUs of its host, in one direction, nominal."""
    network_bytes_per_second: float
    """Each GPU's share of what its host sends to other hosts, nominal, as such hosts are sold."""
    matmul_efficiency: float
    """Share of the nominal FLOPs that large matrix products reach under sustained load."""
    attention_efficiency: float
    """The same of fused attention."""
    memory_efficiency: float = 0.85
    """Share of the nominal bandwidth that elementwise kernels reach."""
    link_efficiency: float = 0.8
    """Share of the links' bandwidth that NCCL's rings reach inside a host."""
    network_efficiency: float = 0.85
    """The same between hosts."""
    launch_seconds: float = 5e-6
    """From one small kernel to the next: what the host takes to launch it."""
    host_link_bytes_per_second: float = 25e9
    """To the memory of its host, in one direction, as copies reach it."""
    host_memory_bytes_per_second: float = 25e9
    """Each GPU's share of the bandwidth of its host's memory."""

    def peak_flops_per_second(self, value_bytes: int) -> float:
        """Of matrix products of values of `precision_bytes`; nominal."""
        return {
            BF16_BYTES: self.matmul_flops_per_second,
            FP32_BYTES: self.fp32_matmul_flops_per_second,
        }[value_bytes]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Hosts of one kind of GPU."""

    gpu: Gpu
    hosts: int
    gpus_per_host: int

    @property
    def ranks(self) -> int:
        """One for each GPU."""
        return self.hosts * self.gpus_per_host


A100_40 = Gpu(
    name="A100 40 GB",
    memory_bytes=40 * GIB,
    matmul_flops_per_second=312e12,
    fp32_matmul_flops_per_second=19.5e12,  # NVIDIA A100 data sheet, FP32
    memory_bytes_per_second=1.555e12,
    multiprocessors=108,
    link_bytes_per_second=300e9,
    network_bytes_per_second=25e9,
    matmul_efficiency=0.81,
    attention_efficiency=0.55,
)
A100_80 = replace(
    A100_40, name="A100 80 GB", memory_bytes=80 * GIB, memory_bytes_per_second=2.039e12
)
H100_80 = Gpu(
    name="H100 80 GB",
    memory_bytes=80 * GIB,
    matmul_flops_per_second=989e12,
    fp32_matmul_flops_per_second=67e12,  # NVIDIA H100 and H200 data sheets, SXM, FP32
    memory_bytes_per_second=3.35e12,
    multiprocessors=132,
    link_bytes_per_second=450e9,
    network_bytes_per_second=50e9,
    matmul_efficiency=0.67,
    attention_efficiency=0.38,
)
H200 = replace(H100_80, name="H200 141 GB", memory_bytes=141 * GIB, memory_bytes_per_second=4.8e12)
GPUS = {"a100-40": A100_40, "a100-80": A100_80, "h100-80": H100_80, "h200": H200}


_FILE_KEY = "megavlm_gpu"
_OTHER_CARDS = {"PCIE", "NVL"}
"""Of the same names, with other links and clocks."""


def gpu_named(device_name: str, memory_bytes: int) -> Gpu | None:
    """The known GPU that torch calls so, such as NVIDIA A100-SXM4-80GB; None for any other.

    memory_bytes: as torch reports it, which is up to 7 % from what the maker's data sheet says.
    """
    words = {*re.split(r"[^A-Z0-9]+", device_name.upper())}
    if words & _OTHER_CARDS:
        return None
    for gpu in GPUS.values():
        if gpu.name.split()[0] in words and abs(memory_bytes / gpu.memory_bytes - 1) < 0.1:
            return gpu
    return None


def cluster_of(gpu: str, hosts: int, gpus_per_host: int) -> Cluster:
    """Hosts of a GPU that is known by name, or that `save_gpu` has written to a file (.json).

    Raises ConfigError for an unknown GPU, a broken file, and for no host or GPU.
    """
    named = GPUS.get(gpu.lower())
    if named is None and not gpu.endswith(".json"):
        raise ConfigError(
            f"--gpu {gpu} is unknown; choose from {', '.join(GPUS)}, or name a .json file that "
            "--calibrate has written"
        )
    if hosts < 1 or gpus_per_host < 1:
        raise ConfigError(f"--hosts {hosts} --gpus-per-host {gpus_per_host}: both at least 1")
    return Cluster(gpu=named or load_gpu(Path(gpu)), hosts=hosts, gpus_per_host=gpus_per_host)


def save_gpu(gpu: Gpu, path: Path) -> None:
    """Write what `load_gpu` reads. Raises ConfigError where the file cannot be written."""
    try:
        path.write_text(json.dumps({_FILE_KEY: asdict(gpu)}, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}; choose another file") from error


def load_gpu(path: Path) -> Gpu:
    """Raises ConfigError for a file that is missing, corrupt, or not one of `save_gpu`'s."""
    remedy = "write it anew with `megavlm plan --calibrate`"
    try:
        tree: Any = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read GPU file {path}: {error}; {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(tree, dict) or not isinstance(cast(Any, tree).get(_FILE_KEY), dict):
        raise ConfigError(f"{path} holds no GPU (no {_FILE_KEY}); {remedy}")
    values = cast(dict[str, Any], tree[_FILE_KEY])
    names = {field.name for field in fields(Gpu)}
    if wrong := names ^ values.keys():
        raise ConfigError(f"{path} lacks or does not know {', '.join(sorted(wrong))}; {remedy}")
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "name":
            if not isinstance(value, str):
                raise ConfigError(f"{path}: name={value!r} is no text; {remedy}")
        elif not is_number or not 0 < value < math.inf:
            raise ConfigError(f"{path}: {name}={value!r} must be a number above 0; {remedy}")
    return Gpu(**values)
