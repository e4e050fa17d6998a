"""What a checkpoint says of its run beside the tensors, and whether it fits another run."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from megavlm.checkpoint.shards import MOMENTS
from megavlm.checkpoint.storage import STATE_FILE, folder_name, read_state
from megavlm.config.load import run_as_tree
from megavlm.config.objectives import Part
from megavlm.config.plan import Plan, Stage
from megavlm.config.run import RunSettings
from megavlm.config.sizes import DecoderSizes, EncoderSizes, ModelSizes, TextTowerSizes
from megavlm.data.sources import Sources
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import CheckpointError, TokenizerError
from megavlm.files.folder import Folder
from megavlm.model.params import all_parameters, parameters_of, trained_parameters
from megavlm.redact import tree_without_secrets


def checkpoint_root(run: RunSettings) -> Folder:
    """Where the checkpoints of a run lie."""
    return Folder(run.checkpoint.folder or run.run_folder / "checkpoints")


def checkpoint_bytes(run: RunSettings) -> int:
    """Of a stage's checkpoint, all in fp32: some engines keep what is frozen in less."""
    states = len(MOMENTS) + (1 if run.train.ema_decay else 0)
    weights = sum(entry.numel for entry in parameters_of(run))
    return 4 * (weights + states * sum(entry.numel for entry in trained_parameters(run)))


def check_checkpoint(checkpoint: Folder, plan: Plan, tokenizer: Tokenizer) -> Stage:
    """The stage that a checkpoint was written in, which can go on from there.

    Raises CheckpointError unless it is one of a run with this plan, this model and this tokenizer.
    """
    stage = check_model(checkpoint, plan, tokenizer)
    check_lengths(checkpoint, stage)
    return stage


def check_model(checkpoint: Folder, plan: Plan, tokenizer: Tokenizer) -> Stage:
    """The stage that a checkpoint was written in, whatever the lengths of stages are now.

    Raises CheckpointError unless it is one of a run with such a stage, this model and this
    tokenizer.
    """
    state = read_state(checkpoint)
    if "samples_seen" not in state:
        raise CheckpointError(
            f"checkpoint {checkpoint} holds a model, not the state of a run; move it elsewhere and "
            "start from it with checkpoint.start_from"
        )
    if checkpoint != checkpoint_root(plan.first) / folder_name(state["step"]):
        raise CheckpointError(
            f"checkpoint {checkpoint} is of step {state['step']}; name its folder "
            f"{folder_name(state['step'])}"
        )
    check_sizes(checkpoint, state["settings"]["model"], plan.first.model)
    _check_tokenizer(checkpoint, state, tokenizer)
    stage = plan.named(state["stage"])
    if stage is None:
        raise CheckpointError(
            f"checkpoint {checkpoint} was written in stage {state['stage']}, which the run file "
            f"has not; its stages are {', '.join(stage.name for stage in plan.stages)}"
        )
    return stage


def check_lengths(checkpoint: Folder, stage: Stage) -> None:
    """Raise CheckpointError unless the stages are as long as when a checkpoint was written."""
    state = read_state(checkpoint)
    if stage.first_step != state["stage_first_step"]:
        raise CheckpointError(
            f"checkpoint {checkpoint} was written in stage {stage.name} when it began at step "
            f"{state['stage_first_step']}, now it would at {stage.first_step}; restore the lengths "
            "of the stages before it, or give the same overrides as then"
        )
    if stage.first_sample != state["stage_first_sample"]:
        raise CheckpointError(
            f"checkpoint {checkpoint} was written in stage {stage.name} when the stages before it "
            f"drew {state['stage_first_sample']} samples, now {stage.first_sample}; restore their "
            "train.samples_per_step"
        )
    if state["step"] > stage.end_step:
        raise CheckpointError(
            f"checkpoint {checkpoint} is past the end of stage {stage.name} at step "
            f"{stage.end_step}; raise its train.steps or choose another run_folder"
        )


def _check_tokenizer(checkpoint: Folder, state: dict[str, Any], tokenizer: Tokenizer) -> None:
    saved = state.get("tokenizer_sha256")
    if saved is not None and saved != tokenizer.fingerprint:
        raise TokenizerError(
            f"checkpoint {checkpoint} was trained with another tokenizer (SHA-256 {saved[:12]}, "
            f"now {tokenizer.fingerprint[:12]}); restore that tokenizer or take another checkpoint"
        )


def check_sizes(checkpoint: Folder, saved: dict[str, Any], sizes: ModelSizes) -> None:
    """Raise unless a checkpoint's sizes, as plain data, are these; a part that one lacks fits."""
    for part in ("encoder", "decoder", "text_tower"):
        wanted: EncoderSizes | DecoderSizes | TextTowerSizes | None = getattr(sizes, part)
        if wanted is None or saved.get(part) is None:
            continue
        # Read back as sizes: JSON has no tuples, and older checkpoints have fewer settings.
        then: EncoderSizes | DecoderSizes | TextTowerSizes
        then = TypeAdapter(type(wanted)).validate_python(saved[part])
        have = comparable(then)
        for name, value in comparable(wanted).items():
            if have[name] != value:
                raise CheckpointError(
                    f"checkpoint {checkpoint} has model.{part}.{name}={have[name]}, the run file "
                    f"says {value}; match them, or choose another run_folder or checkpoint"
                )


def comparable(sizes: EncoderSizes | DecoderSizes | TextTowerSizes) -> dict[str, Any]:
    """What sizes must have in common for one model's weights to fit another.

    Where gates start does not matter: they come with the weights, or there are none. Nor does how
    the positions of cross-attention layers are spelled.
    """
    fields = dataclasses.asdict(sizes)
    if isinstance(sizes, DecoderSizes):
        for name in ("initial_gate", "cross_every", "cross_at"):
            del fields[name]
        fields["cross_layers"] = sizes.cross_layers
    return fields


def check_weights(checkpoint: Folder, sizes: ModelSizes, tokenizer: Tokenizer) -> None:
    """Raise unless a model of these sizes and this tokenizer can start from these weights."""
    if not checkpoint.has(STATE_FILE):
        raise CheckpointError(
            f"{checkpoint} is no checkpoint of ours: it has no {STATE_FILE}; name one step's "
            "folder, or convert another program's with `megavlm convert`"
        )
    state = read_state(checkpoint)
    check_sizes(checkpoint, state["settings"]["model"], sizes)
    _check_tokenizer(checkpoint, state, tokenizer)
    names = {f"weights/{parameter.name}" for parameter in all_parameters(sizes)}
    saved = {name for name in state["tensors"] if name.startswith("weights/")}
    for name in sorted(saved - names):
        raise CheckpointError(f"checkpoint {checkpoint} has {name}, which the model has not")
    if not saved:
        raise CheckpointError(f"checkpoint {checkpoint} holds no weights")


def check_data_position(checkpoint: Folder, run: RunSettings, training: Sources) -> None:
    """Raise unless the stage would go on with exactly the samples that it has not seen.

    Which sample comes at which step depends on the seed, the global batch and the shards.
    """
    state = read_state(checkpoint)
    saved, now = state["settings"], run_as_tree(run)
    skipped_then, skipped_now = (
        [*_skipped_before(state["samples_seen"], settings["data"].get("skip_samples", []))]
        for settings in (saved, now)
    )
    for name, before, after in (
        ("seed", saved["seed"], now["seed"]),
        (
            "train.samples_per_step",
            saved["train"]["samples_per_step"],
            now["train"]["samples_per_step"],
        ),
        ("the number of training samples", state["training_samples"], len(training)),
        ("shards of SHA-256", state["training_sha256"], training.fingerprint),
        ("data.skip_samples up to its place", skipped_then, skipped_now),
    ):
        if before != after:
            raise CheckpointError(
                f"checkpoint {checkpoint} was trained with {name}={before}, now {after}: samples "
                "would be repeated or skipped; restore it or choose another run_folder"
            )


def _skipped_before(samples: int, skipped: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Of ranges of positions that are left out, those that so many samples have passed."""
    for first, stop in skipped:
        if samples <= first:
            return
        samples += stop - first
        yield [first, stop]


def check_moments(checkpoint: Folder, run: RunSettings) -> None:
    """Raise unless the checkpoint has the moments of all that the run trains."""
    saved = read_state(checkpoint)
    if not any(name.startswith("exp_avg/") for name in saved["tensors"]):
        raise CheckpointError(
            f"checkpoint {checkpoint} has no moments of the optimiser (merged and cast ones have "
            "none); move it elsewhere and start a new run from it with checkpoint.start_from"
        )
    for parameter in trained_parameters(run):
        if f"exp_avg/{parameter.name}" not in saved["tensors"]:
            raise CheckpointError(
                f"checkpoint {checkpoint} was trained with train.frozen="
                f"{saved['settings']['train']['frozen']}, now {list(run.train.frozen)}: it has no "
                f"moments of {parameter.name}; restore it, or start a new run from its weights "
                "with checkpoint.start_from"
            )


def changes(checkpoint: Folder, run: RunSettings) -> list[str]:
    """What the run does otherwise than the one that wrote the checkpoint, in lines."""
    state = read_state(checkpoint)
    lines = [
        f"{name} has changed: {before} -> {after}"
        for name, before, after in _differences(
            "", *map(tree_without_secrets, (state["settings"], run_as_tree(run)))
        )
        if name.split(".")[0] not in NO_MATTER
    ]
    trained = {f"exp_avg/{parameter.name}" for parameter in trained_parameters(run)}
    left = [name for name in state["tensors"] if name.startswith("exp_avg/")]
    left = [name for name in left if name not in trained]
    if left:
        lines.append(f"moments of {len(left)} tensors that are frozen now are not kept")
    return lines


NO_MATTER = (
    "run_folder",
    "checkpoint",
    "model",
    "engine",
    "zero3",
    "fsdp2",
    "megatron",
    "metrics",
    "profile",
)
"""Settings that change nothing of what is computed, or that are checked elsewhere."""


def _differences(prefix: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in after:
            yield from _differences(f"{prefix}{name}.", before.get(name), after[name])
    elif before != after:
        yield prefix.rstrip("."), before, after


def checkpoint_state(
    stage: Stage,
    tokenizer: Tokenizer,
    step: int,
    training: Sources,
    optimizer_steps: Mapping[Part, int],
    guard: Mapping[str, Any] | None = None,
    left_out: Sequence[tuple[int, int]] = (),
) -> dict[str, Any]:
    """The plain data that a checkpoint of a run's step carries beside its tensors.

    optimizer_steps: steps that the optimiser has taken of each part. guard: what tells bad steps
    from good ones. left_out: positions of samples that rollbacks have left out.
    """
    return {
        "stage": stage.name,
        "stage_first_step": stage.first_step,
        "optimizer_steps": dict(optimizer_steps),
        "guard": dict(guard) if guard else None,
        "left_out": [[*positions] for positions in left_out],
        "stage_first_sample": stage.first_sample,
        "samples_seen": stage.sample_at(step),
        "training_samples": len(training),
        "training_sha256": training.fingerprint,
        "tokenizer_sha256": tokenizer.fingerprint,
        "settings": tree_without_secrets(run_as_tree(stage.run)),
    }
