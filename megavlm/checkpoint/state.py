"""What a checkpoint says of its run beside the tensors, and whether it fits another run."""

import dataclasses
from typing import Any

from pydantic import TypeAdapter

from megavlm.checkpoint.folder import Folder
from megavlm.checkpoint.storage import read_state
from megavlm.config.load import run_as_tree
from megavlm.config.run import RunSettings
from megavlm.config.sizes import DecoderSizes, ModelSizes
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import CheckpointError, TokenizerError
from megavlm.model.params import parameters


def checkpoint_root(run: RunSettings) -> Folder:
    """Where the checkpoints of a run lie."""
    return Folder(run.checkpoint.folder or run.run_folder / "checkpoints")


def check_checkpoint(checkpoint: Folder, sizes: ModelSizes, tokenizer: Tokenizer) -> None:
    """Raise unless the checkpoint is of a model of these sizes and of this tokenizer."""
    state = read_state(checkpoint)
    check_sizes(checkpoint, state["settings"]["model"], sizes)
    if state["tokenizer_sha256"] != tokenizer.fingerprint:
        raise TokenizerError(
            f"checkpoint {checkpoint} was trained with another tokenizer (SHA-256 "
            f"{state['tokenizer_sha256'][:12]}, now {tokenizer.fingerprint[:12]}); restore that "
            "tokenizer or choose another run_folder"
        )


def check_sizes(checkpoint: Folder, saved: dict[str, Any], sizes: ModelSizes) -> None:
    """Raise unless a checkpoint's sizes, as plain data, are these; a part it lacks fits.

    Where gates start does not matter: they come from the checkpoint, or it holds none. Nor does
    how the positions of cross-attention layers are spelled.
    """
    for part, wanted in vars(sizes).items():
        if part not in saved:
            continue
        # Read back as sizes: JSON has no tuples, and older checkpoints have fewer settings.
        have = TypeAdapter(type(wanted)).validate_python(saved[part])
        fields = {name: getattr(wanted, name) for name in dataclasses.asdict(wanted)}
        if isinstance(wanted, DecoderSizes):
            for name in ("initial_gate", "cross_every", "cross_at"):
                del fields[name]
            fields["cross_layers"] = wanted.cross_layers
        for name, value in fields.items():
            if getattr(have, name) != value:
                raise CheckpointError(
                    f"checkpoint {checkpoint} has model.{part}.{name}={getattr(have, name)}, the "
                    f"run file says {value}; match them or take another checkpoint"
                )


def check_weights(checkpoint: Folder, sizes: ModelSizes) -> None:
    """Raise unless a model of these sizes can start from a checkpoint's weights."""
    state = read_state(checkpoint)
    check_sizes(checkpoint, state["settings"]["model"], sizes)
    names = {f"weights/{parameter.name}" for parameter in parameters(sizes)}
    saved = {name for name in state["tensors"] if name.startswith("weights/")}
    for name in sorted(saved - names):
        raise CheckpointError(f"checkpoint {checkpoint} has {name}, which the model has not")
    if not saved:
        raise CheckpointError(f"checkpoint {checkpoint} holds no weights")


def check_data_position(checkpoint: Folder, run: RunSettings, training_samples: int) -> None:
    """Raise unless the run would go on with exactly the samples that the checkpoint has not seen.

    Which sample comes at which step depends on the seed, the global batch and the data set's size.
    """
    state = read_state(checkpoint)
    if state["step"] > run.train.steps:
        raise CheckpointError(
            f"checkpoint {checkpoint} is past train.steps={run.train.steps}; raise train.steps or "
            "choose another run_folder"
        )
    saved, now = state["settings"], run_as_tree(run)
    for name, before, after in (
        ("seed", saved["seed"], now["seed"]),
        (
            "train.samples_per_step",
            saved["train"]["samples_per_step"],
            now["train"]["samples_per_step"],
        ),
        ("the number of training samples", state["training_samples"], training_samples),
    ):
        if before != after:
            raise CheckpointError(
                f"checkpoint {checkpoint} was trained with {name}={before}, now {after}: samples "
                "would be repeated or skipped; restore it or choose another run_folder"
            )


def schedule_change(checkpoint: Folder, run: RunSettings) -> str:
    """How the run's learning rates differ from those it was saved with, in words; empty if not."""
    saved, now = read_state(checkpoint)["settings"], run_as_tree(run)
    before = {**saved["optimizer"], "train.steps": saved["train"]["steps"]}
    after = {**now["optimizer"], "train.steps": now["train"]["steps"]}
    return ", ".join(
        f"{name} {before.get(name)} -> {value}"
        for name, value in after.items()
        if before.get(name) != value
    )


def checkpoint_state(
    run: RunSettings, tokenizer: Tokenizer, steps_done: int, training_samples: int
) -> dict[str, object]:
    """The plain data that a checkpoint carries beside its tensors."""
    return {
        "samples_seen": steps_done * run.train.samples_per_step,
        "training_samples": training_samples,
        "tokenizer_sha256": tokenizer.fingerprint,
        "settings": run_as_tree(run),
    }
