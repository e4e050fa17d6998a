"""What a checkpoint says of its run beside the tensors, and whether it fits another run."""

import dataclasses
from pathlib import Path

from pydantic import TypeAdapter

from megavlm.checkpoint.store import read_state
from megavlm.config.load import run_as_tree
from megavlm.config.run import RunSettings
from megavlm.config.sizes import ModelSizes
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import CheckpointError, TokenizerError


def checkpoint_root(run: RunSettings) -> Path:
    """Where the checkpoints of a run lie."""
    return run.run_folder / "checkpoints"


def check_checkpoint(checkpoint: Path, sizes: ModelSizes, tokenizer: Tokenizer) -> None:
    """Raise unless the checkpoint is of a model of these sizes and of this tokenizer."""
    state = read_state(checkpoint)
    # Read back as sizes: JSON has no tuples, and older checkpoints have fewer settings.
    saved_sizes = dataclasses.asdict(
        TypeAdapter(ModelSizes).validate_python(state["settings"]["model"])
    )
    for part, wanted in dataclasses.asdict(sizes).items():
        for name, value in wanted.items():
            saved = saved_sizes[part][name]
            if saved != value:
                raise CheckpointError(
                    f"checkpoint {checkpoint} has model.{part}.{name}={saved}, the run file says "
                    f"{value}; match them or choose another run_folder"
                )
    if state["tokenizer_sha256"] != tokenizer.fingerprint:
        raise TokenizerError(
            f"checkpoint {checkpoint} was trained with another tokenizer (SHA-256 "
            f"{state['tokenizer_sha256'][:12]}, now {tokenizer.fingerprint[:12]}); restore that "
            "tokenizer or choose another run_folder"
        )


def check_data_position(checkpoint: Path, run: RunSettings, training_samples: int) -> None:
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
