"""What a start of a run depended on, for whoever wants to repeat it: RUN_FOLDER/record.json."""

import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.state import checkpoint_root
from megavlm.config.load import plan_as_tree
from megavlm.config.plan import Plan
from megavlm.data.sources import training_sources
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.files.folder import Folder
from megavlm.redact import tree_without_secrets
from megavlm.terminal import warn
from megavlm.train.start import Start, left_out_before

RECORD_FILE = "record.json"
ENVIRONMENT = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
    *("NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "DS_ACCELERATOR"),
    *("NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE"),
    *("NCCL_ALGO", "NCCL_PROTO", "NCCL_NET", "NCCL_CROSS_NIC", "NCCL_TIMEOUT"),
    *("GLOO_SOCKET_IFNAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    *("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_RESTART_COUNT", "WANDB_MODE"),
)
"""Variables that are recorded, and no others: the environment is where secrets lie."""


def write_record(plan: Plan, start: Start, restarts: int) -> None:
    """Add a start to the file, on the first rank, which raises StorageError; collective."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    ranks = groups.from_all_ranks({"host": socket.gethostname(), "gpu": gpu})
    if groups.rank() != 0:
        return
    run = start.stage.run
    sources = training_sources(run)
    record = {
        "restart": restarts,
        "unix_seconds": time.time(),
        "command": sys.argv,
        "settings": plan_as_tree(plan),
        "seed": run.seed,
        "step": start.steps_done,
        "checkpoint": str(start.checkpoint) if start.checkpoint else None,
        "checkpoints": str(checkpoint_root(run)),
        "data": {
            "stage": start.stage.name,
            "samples_seen": start.stage.sample_at(start.steps_done),
            "left_out": left_out_before(start.checkpoint),
            "training_samples": len(sources),
            "training_sha256": sources.fingerprint,
            "tokenizer_sha256": Tokenizer(run.data.tokenizer).fingerprint,
        },
        "ranks": ranks,
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": _packages(),
        "git": _git(Path(__file__).parents[2]),
    }
    starts = [*read_record(run.run_folder), tree_without_secrets(record)]
    content = json.dumps({"starts": starts}, indent=1) + "\n"
    Folder(run.run_folder).write_atomically(RECORD_FILE, content.encode())


def read_record(run_folder: Path) -> list[dict[str, Any]]:
    """What was recorded of each start of a run; nothing before the first."""
    path = run_folder / RECORD_FILE
    try:
        return json.loads(path.read_text())["starts"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):  # a crash of the machine may empty it
        broken = path.with_suffix(".broken.json")
        path.rename(broken)
        warn(f"{path} cannot be read, and is {broken.name} now; a new one begins")
        return []


def _packages() -> dict[str, str]:
    """Versions of what we depend on, as far as it is installed."""
    versions: dict[str, str] = {}
    try:
        required = importlib.metadata.requires("megavlm") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        required = ["torch", "deepspeed", "megatron-core", "numpy", "pillow", "sentencepiece"]
    for requirement in ("megavlm", *required):
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert match is not None
        try:
            versions[match[0]] = importlib.metadata.version(match[0])
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git(folder: Path) -> dict[str, Any] | None:
    """Revision of a checkout, and whether files differ from it; None elsewhere."""
    if not (folder / ".git").exists():
        return None

    def said(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        revision, changes = said("rev-parse", "HEAD"), said("status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "dirty": bool(changes)}
