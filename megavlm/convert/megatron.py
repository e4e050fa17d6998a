"""Megatron-LM's `torch` checkpoints of this model: weights, one file for each model-parallel rank.

    latest_checkpointed_iteration.txt
    iter_0000100/mp_rank_TT/model_optim_rng.pt       without pipeline parallelism
    iter_0000100/mp_rank_TT_PPP/model_optim_rng.pt   tensor-parallel rank TT, pipeline rank PPP

A file holds a dict with the weights of its rank under `model`, or, where the schedule interleaves,
under `model0`, `model1`, ... for the rank's chunks. Names are those that the rank's module has:
every chunk numbers its decoder layers from 0. What Megatron-LM saves beside them is left unread but
for `args`, an argparse.Namespace, which tells how many ranks there are. Layout as of Megatron-LM in
August 2026 (training/checkpointing.py; core/safe_globals.py lists the classes in these files).
"""

import re
from dataclasses import replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint.lazy import LazyTensor, Tensors
from megavlm.config.engines import MegatronSettings
from megavlm.config.sizes import ModelSizes
from megavlm.convert.torch_files import (
    WRITE_REMEDY,
    Attributes,
    Inert,
    StandIns,
    StoredTensor,
    load_structure,
    newest_tag,
    reading,
    reserve,
    step_folder_of,
    sync,
    writing,
)
from megavlm.errors import CheckpointError, ConfigError
from megavlm.files.folder import Folder
from megavlm.model.params import Parameter, parameters

CHECKPOINT_VERSION = 3.0
LATEST_FILE = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"

_LAYER = re.compile(r"(?<=^language\.decoder\.layers\.)\d+")
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_BEFORE_THE_LAYERS = ("encoder.", "projector.", "language.embedding.")
# Arguments, their enumerations and paths, the generators' states, and FP8's extra states.
_STAND_INS: StandIns = (
    (Attributes, "argparse.Namespace"),
    (Attributes, "types.SimpleNamespace"),
    *(
        (Inert, name)
        for name in (
            "_io.BytesIO",
            "builtins.getattr",  # names members of enumerations in Python 3.11.0 to 3.11.3
            "megatron.core.enums.Fp4Recipe",
            "megatron.core.enums.Fp8Recipe",
            "megatron.core.enums.ModelType",
            "megatron.core.optimizer.optimizer_config.OptimizerConfig",
            "megatron.core.rerun_state_machine.RerunDiagnostic",
            "megatron.core.rerun_state_machine.RerunMode",
            "megatron.core.rerun_state_machine.RerunState",
            "megatron.core.transformer.enums.AttnBackend",
            "megatron.core.transformer.enums.CudaGraphModule",
            "megatron.core.transformer.enums.CudaGraphScope",
            "megatron.core.transformer.enums.InferenceCudaGraphScope",
            "megatron.model.enums.ModelType",
            "numpy._core.multiarray._reconstruct",
            "numpy._core.multiarray.scalar",
            "numpy.core.multiarray._reconstruct",
            "numpy.core.multiarray.scalar",
            "numpy.dtype",
            "numpy.dtypes.UInt32DType",
            "numpy.ndarray",
            "pathlib.PosixPath",
            "pathlib._local.PosixPath",
            "signal.Signals",
            "torch._C.Generator",
        )
    ),
)


def chunk_parameters(sizes: ModelSizes, parallel: MegatronSettings) -> list[dict[str, Parameter]]:
    """For each chunk of the pipeline, in the model's order: its parameters by their names there.

    Chunk i lies on pipeline rank i % pipeline_parallel. Raises ConfigError when the model cannot
    be divided this way, or `chunk_layers` is not chosen (see `planner/cut.py`).
    """
    cut = parallel.chunk_layers or (sizes.decoder.layers,)
    if len(cut) != parallel.chunks:
        raise ConfigError(
            f"megatron.chunk_layers=None leaves open where {parallel.chunks} chunks begin; give "
            "the decoder layers of each"
        )
    # How tokens are split has no effect on weights.
    replace(parallel, sequence_parallel=False).check_model(sizes, row_tokens=0)
    ends = list(accumulate(cut))
    chunks: list[dict[str, Parameter]] = [{} for _ in cut]
    for entry in parameters(sizes):
        if layer := _LAYER.search(entry.name):
            number = int(layer[0])
            chunk = next(i for i, end in enumerate(ends) if number < end)
            local = _LAYER.sub(str(number - ends[chunk] + cut[chunk]), entry.name)
            chunks[chunk][local] = entry
        else:
            chunk = 0 if entry.name.startswith(_BEFORE_THE_LAYERS) else -1
            chunks[chunk][entry.name] = entry
    return chunks


def write_megatron_shards(
    tensors: Tensors, sizes: ModelSizes, parallel: MegatronSettings, folder: Path, iteration: int
) -> None:
    """Write the weights, in the types that they have, as a checkpoint of an iteration.

    tensors: `weights/NAME` of every parameter of the ledger; others are left out. Memory is that
    of one whole tensor and a shard of it: files are laid out first and then filled, tensor by
    tensor. The file that names the checkpoint comes last, when the rest is on the disk.

    Raises CheckpointError when a tensor is missing or has another shape, the checkpoint exists, or
    the disk is full; ConfigError as `chunk_parameters`.
    """
    chunks = chunk_parameters(sizes, parallel)
    for entry in parameters(sizes):
        tensor = tensors.get(f"weights/{entry.name}")
        if tensor is None or tuple(tensor.shape) != entry.shape:
            found = "is missing" if tensor is None else f"has the shape {tensor.shape}"
            raise CheckpointError(
                f"weights/{entry.name} {found}; of a model of these sizes it is {entry.shape}; "
                "check the sizes"
            )
    step_folder = folder / f"iter_{iteration:07d}"
    with writing(step_folder):
        if step_folder.exists():
            raise CheckpointError(f"{step_folder} exists; delete it or choose another folder")
    ranks = parallel.tensor_parallel
    paths: list[Path] = []
    shards_of: dict[str, list[StoredTensor]] = {entry.name: [] for entry in parameters(sizes)}
    for pipeline_rank in range(parallel.pipeline_parallel):
        mine = chunks[pipeline_rank :: parallel.pipeline_parallel]
        models = dict(zip(_model_keys(len(mine)), mine, strict=True))
        for rank in range(ranks):
            path = _path(step_folder, rank, pipeline_rank, parallel.pipeline_parallel)
            paths.append(path)
            with writing(path):
                path.parent.mkdir(parents=True)
            stored = reserve(
                path,
                {
                    "args": _division_as_args(parallel),
                    "checkpoint_version": CHECKPOINT_VERSION,
                    "iteration": iteration,
                    **{key: _blank(model, tensors, ranks) for key, model in models.items()},
                },
            )
            for key, model in models.items():
                for local, entry in model.items():
                    shards_of[entry.name].append(stored[key][local])
    for entry in parameters(sizes):
        _fill(shards_of[entry.name], entry, tensors[f"weights/{entry.name}"].read())
    sync([*paths, *(path.parent for path in paths), step_folder, folder])
    Folder(folder, WRITE_REMEDY).write_atomically(LATEST_FILE, str(iteration).encode())


def newest(folder: Path) -> str:
    """The name of the newest checkpoint's folder, `iter_0000100`, in the one of a run.

    Raises CheckpointError unless it is there.
    """
    tag = newest_tag(folder, LATEST_FILE)
    tag = f"iter_{int(tag):07d}" if tag.isdecimal() else tag
    step_folder_of(folder, tag)
    return tag


def megatron_shards(folder: Path, tag: str, sizes: ModelSizes) -> tuple[dict[str, LazyTensor], int]:
    """`weights/NAME` of every parameter, whole, in the types saved, and the iteration.

    How the model is divided, the checkpoint says itself. A read takes twice the memory of one
    tensor. Where tensor-parallel ranks hold copies, the first one's is read. tag: which checkpoint.

    Raises CheckpointError when files are missing, unreadable, damaged, would run code, or are of a
    model of other sizes.
    """
    step_folder = step_folder_of(folder, tag)
    files = _load_grid(step_folder)
    parallel = _division(files)
    try:
        chunks = chunk_parameters(sizes, parallel)
    except ConfigError as error:
        raise CheckpointError(f"{step_folder} is of a model of other sizes: {error}") from error
    tensors: dict[str, LazyTensor] = {}
    for number, chunk in enumerate(chunks):
        virtual_rank, pipeline_rank = divmod(number, parallel.pipeline_parallel)
        key = _model_keys(parallel.virtual_pipeline)[virtual_rank]
        shards = [files[rank, pipeline_rank][key] for rank in range(parallel.tensor_parallel)]
        for rank, shard in enumerate(shards):
            where = f"{step_folder}: {key} of tensor-parallel rank {rank}, pipeline rank"
            _check_shard(f"{where} {pipeline_rank}", shard, chunk, len(shards))
        for local, entry in chunk.items():
            stored: list[StoredTensor] = [shard[local] for shard in shards]
            if types := {str(tensor.dtype) for tensor in stored[1:]} - {str(stored[0].dtype)}:
                raise CheckpointError(
                    f"{step_folder} has {local} of {key} as {stored[0].dtype} and as "
                    f"{', '.join(sorted(types))}; copy all files of one save"
                )
            tensors[f"weights/{entry.name}"] = _whole(entry, stored)
    return tensors, files[0, 0]["iteration"]


def _path(step_folder: Path, rank: int, pipeline_rank: int, pipeline_ranks: int) -> Path:
    suffix = f"_{pipeline_rank:03d}" if pipeline_ranks > 1 else ""
    return step_folder / f"mp_rank_{rank:02d}{suffix}" / RANK_FILE


def _model_keys(chunks: int) -> list[str]:
    """Where a file has the weights of its rank's chunks."""
    return [f"model{i}" for i in range(chunks)] if chunks > 1 else ["model"]


def _division_as_args(parallel: MegatronSettings) -> dict[str, int | None]:
    interleaved = parallel.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": parallel.tensor_parallel,
        "pipeline_model_parallel_size": parallel.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
    }


def _shard_shape(entry: Parameter, ranks: int) -> torch.Size:
    return entry.shard(torch.empty(entry.shape, device="meta"), ranks, 0).shape


def _blank(chunk: dict[str, Parameter], tensors: Tensors, ranks: int) -> dict[str, Tensor]:
    """A rank's weights, without values."""
    return {
        local: torch.empty(
            _shard_shape(entry, ranks), dtype=tensors[f"weights/{entry.name}"].dtype, device="meta"
        )
        for local, entry in chunk.items()
    }


def _fill(shards: list[StoredTensor], entry: Parameter, whole: Tensor) -> None:
    for rank, shard in enumerate(shards):
        shard.write(entry.shard(whole, len(shards), rank))


def _load_grid(step_folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """What the files hold, by tensor- and pipeline-parallel rank; all of them are there."""
    with reading(step_folder):
        paths = [path / RANK_FILE for path in sorted(step_folder.iterdir())]
        paths = [path for path in paths if path.exists()]
    files: dict[tuple[int, int], dict[str, Any]] = {}
    for path in paths:
        if match := _RANK_FOLDER.fullmatch(path.parent.name):
            content = load_structure(path, _STAND_INS)
            _check_content(path, content)
            files[int(match[1]), int(match[2] or 0)] = content
    if not files:
        raise CheckpointError(
            f"{step_folder} has no mp_rank_*/{RANK_FILE}; only Megatron-LM's format 'torch' is "
            "read, without the distributed optimizer's own files"
        )
    # The arguments know of ranks whose files are all missing.
    args = next(iter(files.values())).get("args")
    args = args if isinstance(args, dict) else {}
    ranks = args.get("tensor_model_parallel_size") or 1 + max(rank for rank, _ in files)
    pipeline_ranks = args.get("pipeline_model_parallel_size") or 1 + max(p for _, p in files)
    for number in (ranks, pipeline_ranks):
        if not isinstance(number, int) or number < 1:
            raise CheckpointError(
                f"{step_folder} is of {number!r:.100} tensor- or pipeline-parallel ranks by its "
                "args, which is no number of them; copy the checkpoint again"
            )
    surplus = sorted((rank, p) for rank, p in files if rank >= ranks or p >= pipeline_ranks)
    if surplus or len(files) != ranks * pipeline_ranks:
        grid = ((rank, p) for rank in range(ranks) for p in range(pipeline_ranks))
        missing = list(islice((place for place in grid if place not in files), 3))
        raise CheckpointError(
            f"{step_folder} is of {ranks} tensor- x {pipeline_ranks} pipeline-parallel ranks but "
            f"has {len(files)} files; missing {missing}, too many {surplus[:3]} (tensor, pipeline; "
            "of each the first 3); copy all files of one save"
        )
    return files


def _check_content(path: Path, content: Any) -> None:
    keys = _keys_of_models(content) if isinstance(content, dict) else []
    if not keys:
        raise CheckpointError(f"{path} has no weights under 'model' or 'model0'")
    for key in keys:
        model = content[key]
        if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
            raise CheckpointError(
                f"{path} has something else than weights by their names under '{key}'; copy the "
                "checkpoint again"
            )
    version, iteration = content.get("checkpoint_version"), content.get("iteration")
    if version != CHECKPOINT_VERSION or not isinstance(iteration, int) or iteration < 0:
        raise CheckpointError(
            f"{path} has checkpoint_version {version!r:.50} and iteration {iteration!r:.50}; only "
            f"version {CHECKPOINT_VERSION} is read, with an iteration; save it again with a "
            "current Megatron-LM"
        )


def _keys_of_models(content: dict[Any, Any]) -> list[str]:
    return [key for key in content if isinstance(key, str) and re.fullmatch(r"model\d*", key)]


def _division(files: dict[tuple[int, int], dict[str, Any]]) -> MegatronSettings:
    """How the files divide the model; where it is cut, their names tell."""
    ranks, pipeline_ranks = (1 + last for last in max(files))
    virtual = len(_keys_of_models(files[0, 0]))
    for (rank, pipeline_rank), content in files.items():
        if sorted(found := _keys_of_models(content)) != sorted(_model_keys(virtual)):
            raise CheckpointError(
                f"the ranks' files do not hold one model: that of tensor-parallel rank {rank}, "
                f"pipeline rank {pipeline_rank} has {found[:3]}, that of the first {virtual} chunks"
            )
    cut = tuple(
        len({layer[0] for name in files[0, p][key] if (layer := _LAYER.search(name))})
        for key in _model_keys(virtual)
        for p in range(pipeline_ranks)
    )
    try:
        return MegatronSettings(
            tensor_parallel=ranks,
            pipeline_parallel=pipeline_ranks,
            virtual_pipeline=virtual,
            chunk_layers=cut,
        )
    except ConfigError as error:
        raise CheckpointError(f"the ranks' files do not hold one model: {error}") from error


def _check_shard(
    where: str, shard: dict[str, Any], chunk: dict[str, Parameter], ranks: int
) -> None:
    """Raise CheckpointError unless a rank's weights have the names and shapes of the ledger."""
    names = {name for name in shard if not name.endswith("_extra_state")}
    if names != chunk.keys():
        missing, surplus = sorted(chunk.keys() - names), sorted(names - chunk.keys())
        raise CheckpointError(
            f"{where} is of another model: missing {missing[:3]}, unknown {surplus[:3]}; check the "
            "sizes"
        )
    for local, entry in chunk.items():
        if not isinstance(shard[local], StoredTensor):
            raise CheckpointError(f"{where} has {local}, which is no tensor; copy it again")
        found, expected = tuple(shard[local].shape), tuple(_shard_shape(entry, ranks))
        if found != expected:
            raise CheckpointError(
                f"{where} has {local} with the shape {found}; of a model of these sizes it is "
                f"{expected}; check the sizes"
            )


def _whole(entry: Parameter, shards: list[StoredTensor]) -> LazyTensor:
    def read() -> Tensor:
        if entry.tensor_axis is None:
            return shards[0].read()
        return entry.unshard([shard.read() for shard in shards])

    return LazyTensor(entry.shape, shards[0].dtype, read)
