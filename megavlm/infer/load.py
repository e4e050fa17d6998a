"""A trained model, ready to be used."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from torch import nn

from megavlm.checkpoint.listing import newest_checkpoint
from megavlm.checkpoint.load import load_present
from megavlm.checkpoint.shards import shards_of_range
from megavlm.checkpoint.state import check_model, check_weights, checkpoint_root
from megavlm.checkpoint.storage import read_state
from megavlm.config.engines import UNDIVIDED, MegatronSettings
from megavlm.config.objectives import is_pretraining
from megavlm.config.plan import Plan, Stage
from megavlm.config.run import RunSettings
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.errors import CheckpointError, ConfigError, LaunchError
from megavlm.files.folder import Folder
from megavlm.infer.quantize import Quantization, check_quantization, quantize
from megavlm.model.initial import materialise
from megavlm.model.params import parameters_of
from megavlm.model.pretraining import PretrainingModel
from megavlm.model.vlm import VisionLanguageModel
from megavlm.stages.start import objective_of


@contextmanager
def trained(
    plan: Plan, quantization: Quantization | None = None
) -> Iterator[tuple[VisionLanguageModel, Tokenizer]]:
    """The vision-language model of a run's newest checkpoint, and its tokenizer, in process groups.

    Ranks that a launcher has started hold it together, by tensor parallelism. Before the first
    checkpoint, it is the model that the run starts from, if that is a whole one. Raises
    CheckpointError when there is no model or it does not fit the run file, and ConfigError when it
    does not divide among the ranks or cannot be quantised.
    """
    parallel = MegatronSettings(tensor_parallel=groups.world_size())
    try:
        parallel.check_model(plan.first.model, plan.first.data.row_tokens)
    except ConfigError as error:
        ranks = groups.world_size()
        raise LaunchError(f"{ranks} ranks hold the model together, and {error}") from error
    with groups.process_groups(plan.first.seed, parallel):
        stage, checkpoint = newest(plan)
        check_language(stage)
        model = load_language(stage.run, checkpoint, parallel, quantization)
        yield model, Tokenizer(plan.first.data.tokenizer)


def newest(plan: Plan) -> tuple[Stage, Folder | None]:
    """The newest checkpoint of a run, if it has one, and the stage that it is in."""
    checkpoint = newest_checkpoint(checkpoint_root(plan.first), plan.first.checkpoint)
    if checkpoint is None:
        return plan.stages[-1], None  # which has all that the run starts from
    return check_model(checkpoint, plan, Tokenizer(plan.first.data.tokenizer)), checkpoint


def check_language(stage: Stage) -> None:
    """Raise CheckpointError for a stage without a language model."""
    if is_pretraining(stage.run.objectives):
        raise CheckpointError(
            f"stage {stage.name} of {stage.run.run_folder} trains no language model; train the "
            "stages after it first"
        )


def load_language(
    run: RunSettings,
    checkpoint: Folder | None,
    parallel: MegatronSettings = UNDIVIDED,
    quantization: Quantization | None = None,
) -> VisionLanguageModel:
    """The vision-language model of a stage's checkpoint, in evaluation mode.

    quantization: see `quantize`. Raises ConfigError where it is not possible.
    """
    if quantization is not None:
        check_quantization(quantization, run.model, parallel.tensor_parallel)
    dtype = torch.bfloat16 if quantization == "int4" else _dtype()
    model = _loaded(run, checkpoint, parallel, dtype)
    assert isinstance(model, VisionLanguageModel)
    if quantization is not None:
        quantize(model, quantization)
    return model


def load_pretraining(run: RunSettings, checkpoint: Folder | None) -> PretrainingModel:
    """The encoder of a stage's checkpoint, with its heads, in evaluation mode."""
    model = _loaded(run, checkpoint, UNDIVIDED, _dtype())
    assert isinstance(model, PretrainingModel)
    return model


def untrained_pretraining(run: RunSettings) -> PretrainingModel:
    """The encoder and its heads with their initial weights, in evaluation mode."""
    with torch.device("meta"):
        model = objective_of(run).build(dtype=_dtype(), recompute="none")
    materialise(model, run.seed, groups.device())
    return model.eval()


def weights_of(run: RunSettings, checkpoint: Folder | None) -> list[Folder]:
    """What is loaded: a checkpoint, or without one what the run starts from."""
    if checkpoint is not None:
        return [checkpoint]
    return [Folder(place) for place in run.checkpoint.start_from]


def _loaded(
    run: RunSettings, checkpoint: Folder | None, parallel: MegatronSettings, dtype: torch.dtype
) -> nn.Module:
    """A stage's model with the weights of a checkpoint: their moving average, where there is one.

    Without a checkpoint, with those that the run starts from.
    """
    folders = weights_of(run, checkpoint)
    if checkpoint is None:
        for folder in folders:
            check_weights(folder, run.model, Tokenizer(run.data.tokenizer))
    saved = {name for folder in folders for name in read_state(folder)["tensors"]}
    missing = {f"weights/{parameter.name}" for parameter in parameters_of(run)} - saved
    if missing:
        start = f" and checkpoint.start_from lacks {min(missing)}" if folders else ""
        raise CheckpointError(
            f"{checkpoint_root(run)} holds no checkpoint{start}; train first with `megavlm train`"
        )
    with groups.device():
        model = objective_of(run).build(dtype=dtype, recompute="none", parallel=parallel)
    ledger = model.ledger()
    part = parallel.tensor_parallel, parallel_state.get_tensor_model_parallel_rank()
    held = {
        name: shards_of_range(ledger[name], p.detach().flatten(), 0, *part)
        for name, p in model.named_parameters()
    }
    for folder in folders:
        in_folder = read_state(folder)["tensors"]
        kinds = {name: "ema" if f"ema/{name}" in in_folder else "weights" for name in held}
        load_present(folder, {f"{kinds[name]}/{name}": held[name] for name in held})
    return model.eval()


def _dtype() -> torch.dtype:
    """bf16 on a GPU, fp32 on the CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32
