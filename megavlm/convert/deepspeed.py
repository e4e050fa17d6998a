"""DeepSpeed's own checkpoints, of ZeRO stage 3 and Universal Checkpoints, as lazy tensors.

Stage 3 divides the optimiser's parameters into sub-groups. Each rank's `*_optim_states.pt` holds
one flat tensor of master weights for each sub-group, and the same of both moments: the rank's
equal part of every parameter, one after the other, the last rank's padded. Names, order and shapes
are in every `*_model_states.pt`, and so are the parts of frozen parameters, in the model's type.
`ds_to_universal.py` makes from them one file a tensor, flat. Layout as of DeepSpeed 0.19.8
(runtime/engine.py, runtime/zero/stage3.py, utils/zero_to_fp32.py, checkpoint/ds_to_universal.py).
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megavlm.checkpoint.lazy import LazyTensor
from megavlm.checkpoint.shards import MOMENTS
from megavlm.convert.torch_files import (
    Inert,
    StandIns,
    StoredTensor,
    load_structure,
    newest_tag,
    plain_name,
    reading,
    step_folder_of,
)
from megavlm.errors import CheckpointError

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

# The only classes in these files. Nothing of DeepSpeed is called for them.
_STAND_INS: StandIns = (
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
)


def newest(folder: Path, pointer: Literal["latest", "latest_universal"]) -> str:
    """The tag of the newest checkpoint in the folder that a run, or the conversion, saved to.

    Raises CheckpointError unless it is there.
    """
    tag = newest_tag(folder, pointer)
    step_folder_of(folder, tag)
    return tag


def zero3_tensors(folder: Path, tag: str) -> tuple[dict[str, LazyTensor], int]:
    """The tensors and the number of steps of a checkpoint that ZeRO stage 3 saved to a folder.

    Keys are `weights/NAME`, and `exp_avg/NAME` and `exp_avg_sq/NAME` of parameters that Adam
    trains, all fp32; frozen weights have the type in which they were saved. NAME is the name in
    the model that was trained; a shared parameter appears once. A read takes the memory of one
    tensor. tag: which checkpoint.

    Raises CheckpointError when files are missing, unreadable, damaged, of different saves, of
    another stage, tensor-parallel, or would run code.
    """
    step_folder = step_folder_of(folder, tag)
    with _layout_of(step_folder):
        if (step_folder / "mp_rank_00_model_states.pt").exists():
            raise CheckpointError(
                f"{step_folder} is of a ZeRO stage below 3, which is not read; convert it with "
                "DeepSpeed's ds_to_universal.py first"
            )
        if (step_folder / "offloaded_tensors").exists():
            raise CheckpointError(
                f"{step_folder} has optimiser states in files of DeepSpeed's NVMe offload, which "
                "are not read; save it from a run that offloads to the CPU or not at all"
            )
        optimizers = [
            content["optimizer_state_dict"] for content in _load_ranks(step_folder, _OPTIMIZER_FILE)
        ]
        models = _load_ranks(step_folder, _MODEL_FILE)
        stage, ranks = optimizers[0]["zero_stage"], optimizers[0]["partition_count"]
        if stage != 3:
            raise CheckpointError(f"{step_folder} is of ZeRO stage {stage}; only stage 3 is read")
        if not ranks == len(optimizers) == len(models):
            raise CheckpointError(
                f"{step_folder} was saved by {ranks} ranks but has the optim_states of "
                f"{len(optimizers)} and the model_states of {len(models)}; copy what is missing, "
                "or remove what is left from another save"
            )
        tensors = _frozen(step_folder, models)
        for group, shapes in enumerate(map(_shapes, models[0]["param_shapes"])):
            states = [rank["optimizer_state_dict"]["state"].get(group, {}) for rank in optimizers]
            parts_of = {"weights": [rank["fp32_flat_groups"][group] for rank in optimizers]}
            for moment in MOMENTS:
                if all(moment in state for state in states):
                    parts_of[moment] = [state[moment] for state in states]
            first = 0
            for name, shape in shapes.items():
                for kind, parts in parts_of.items():
                    tensors[f"{kind}/{name}"] = _gathered(parts, shape, first)
                first += _part(shape, len(models))
            for kind, parts in parts_of.items():
                _check_sizes(step_folder, f"{kind} of sub-group {group}", parts, first)
        return tensors, _steps(step_folder, models)


def universal_tensors(folder: Path, tag: str) -> tuple[dict[str, LazyTensor], int]:
    """As `zero3_tensors`, for a folder in which `ds_to_universal.py` left a checkpoint.

    tag: the output folder's name.
    """
    step_folder = step_folder_of(folder, tag)
    with _layout_of(step_folder):
        models = _load_ranks(step_folder, _MODEL_FILE)
        tensors = _frozen(step_folder, models)
        groups = map(_shapes, models[0]["param_shapes"])
        for name, shape in (item for group in groups for item in group.items()):
            of_name = step_folder / "zero" / plain_name(name, step_folder)
            for kind, file in (("weights", "fp32"), *((moment, moment) for moment in MOMENTS)):
                stored = load_structure(of_name / f"{file}.pt")
                if isinstance(stored, dict):  # made from stages 1 and 2
                    stored = stored["param"]
                _check_sizes(step_folder, f"{kind} of {name}", [stored], math.prod(shape))
                tensors[f"{kind}/{name}"] = _gathered([stored], shape)
        # Stage 1's frozen weights lie here alone, among buffers; stage 3 writes neither.
        for path in sorted((step_folder / "zero").glob("*/fp32.pt")):
            name = path.parent.name
            if f"weights/{name}" not in tensors and name not in models[0]["buffer_names"]:
                stored = load_structure(path)["param"]
                tensors[f"weights/{name}"] = _gathered([stored], stored.shape)
        return tensors, _steps(step_folder, models)


@contextmanager
def _layout_of(step_folder: Path) -> Iterator[None]:
    """Files of other versions lack an entry, or have something else in its place."""
    try:
        with reading(step_folder):
            yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{step_folder} is not laid out as by DeepSpeed 0.19: {error!r}; save it again with "
            "that version"
        ) from error


def _load_ranks(step_folder: Path, pattern: re.Pattern[str]) -> list[Any]:
    """What the files hold that the data-parallel ranks wrote, in their order."""
    paths: dict[int, Path] = {}
    for path in sorted(step_folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        rank = int(match[1] or 0)
        if int(match[2]):
            raise CheckpointError(
                f"{path} is of a tensor- or pipeline-parallel run (mp_rank {int(match[2])}), which "
                "is not read; save it from a run that divides the model by ZeRO only"
            )
        if rank in paths:
            raise CheckpointError(
                f"{path} and {paths[rank].name} are of the same rank; remove what is left from "
                "another save"
            )
        paths[rank] = path
    missing = sorted(set(range(max(paths, default=0) + 1)) - set(paths))
    if missing:
        kind = "model_states" if pattern is _MODEL_FILE else "optim_states"
        raise CheckpointError(
            f"{step_folder} has no {kind} file of ranks {missing}; copy what all ranks saved"
        )
    return [load_structure(paths[rank], _STAND_INS) for rank in range(len(paths))]


def _frozen(step_folder: Path, models: list[Any]) -> dict[str, LazyTensor]:
    """Weights that are not trained: the optimiser's files do not have them."""
    tensors: dict[str, LazyTensor] = {}
    for name, shape in _shapes(models[0]["frozen_param_shapes"] or {}).items():
        parts = [model["frozen_param_fragments"][name] for model in models]
        _check_sizes(step_folder, f"weights of {name}", parts, _part(shape, len(models)))
        tensors[f"weights/{name}"] = _gathered(parts, shape)
    return tensors


def _steps(step_folder: Path, models: list[Any]) -> int:
    steps = sorted({model["global_steps"] for model in models})
    if len(steps) > 1:
        raise CheckpointError(
            f"{step_folder} has files of different saves, after steps {steps}; copy it again"
        )
    if not isinstance(steps[0], int) or steps[0] < 0:
        raise ValueError(f"global_steps={steps[0]!r}")
    return steps[0]


def _shapes(shapes: Any) -> dict[str, torch.Size]:
    """A group's shapes by names, if they are that."""
    checked = {name: torch.Size(shape) for name, shape in shapes.items()}
    for name, shape in checked.items():
        if not isinstance(name, str) or min(shape, default=0) < 0:
            raise ValueError(f"{name!r} of the shape {tuple(shape)}")
    return checked


def _part(shape: torch.Size, ranks: int) -> int:
    """Elements that each rank holds of a tensor, padding included."""
    return -(-math.prod(shape) // ranks)


def _check_sizes(
    step_folder: Path, what: str, parts: Sequence[StoredTensor], elements: int
) -> None:
    for rank, part in enumerate(parts):
        if math.prod(part.shape) != elements:
            raise CheckpointError(
                f"{step_folder}: {what} on rank {rank} has {math.prod(part.shape)} elements, the "
                f"shapes in model_states add up to {elements}; copy files of one save"
            )
        if part.dtype != parts[0].dtype:
            raise CheckpointError(
                f"{step_folder}: {what} is {part.dtype} on rank {rank} and {parts[0].dtype} on "
                "rank 0; copy files of one save"
            )


def _gathered(parts: Sequence[StoredTensor], shape: torch.Size, first: int = 0) -> LazyTensor:
    """A tensor of which each rank's flat tensor has an equal part, from its element `first` on."""

    def read() -> Tensor:
        whole = torch.empty(shape, dtype=parts[0].dtype)
        outs = whole.view(-1).split(max(1, _part(shape, len(parts))))
        # A small tensor's last ranks hold padding only.
        for part, out in zip(parts, outs, strict=False):
            part.read_into(out, first)
        return whole

    return LazyTensor(tuple(shape), parts[0].dtype, read)
