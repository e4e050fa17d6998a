"""Image-text scores by the two towers of a contrastive stage of megavlm's own training.

Letters in shapes: n pairs, d feature width.
"""

import atexit
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn.functional import normalize

from megavlm.config.filters import AgreementRules, FilterSettings
from megavlm.config.load import settings_of
from megavlm.config.run import RunSettings
from megavlm.data.image import read_square
from megavlm.data.samples import CAPTION_TASK, text
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import ConfigError
from megavlm.files.folder import Folder

if TYPE_CHECKING:
    from megavlm.model.pretraining import PretrainingModel

# megatron-core and torch's checkpoints take seconds to import; most rules need neither.

BATCH_PAIRS = 64
"""That go through the towers together."""


def is_ours(folder: Path) -> bool:
    """Whether a folder is of a run of megavlm's: its own, that of its checkpoints, or one step."""
    from megavlm.checkpoint.storage import STATE_FILE

    if (folder / "config.json").is_file():
        return False
    return (folder / STATE_FILE).is_file() or bool(_steps(folder))


def resolved(rules: FilterSettings) -> FilterSettings:
    """Rules that name one step's folder, and its tokenizer, where they named a run of megavlm's.

    So all workers take the same, also of a run that goes on. Raises MegavlmError for a checkpoint
    that cannot score pairs.
    """
    agreement = rules.agreement
    if agreement is None:
        return rules
    if not is_ours(agreement.checkpoint):
        if agreement.tokenizer is not None:
            raise ConfigError(
                f"agreement.tokenizer={agreement.tokenizer} is for checkpoints of megavlm; "
                f"{agreement.checkpoint} has its own: leave it out"
            )
        return rules
    step = _step_with_towers(agreement.checkpoint)
    tokenizer = _check(step, agreement.tokenizer)
    return replace(rules, agreement=replace(agreement, checkpoint=step, tokenizer=tokenizer))


def _steps(folder: Path) -> list[Path]:
    """Folders of the checkpoints of a run, the newest first."""
    from megavlm.checkpoint.storage import STATE_FILE

    found = [
        file.parent
        for root in (folder / "checkpoints", folder)
        for file in root.glob(f"step-*/{STATE_FILE}")
    ]
    return sorted(found, key=lambda step: (len(step.name), step.name), reverse=True)


def _step_with_towers(folder: Path) -> Path:
    """The folder itself, if it is a step's, or the run's newest step with both towers."""
    from megavlm.checkpoint.storage import STATE_FILE, read_state

    steps = [folder] if (folder / STATE_FILE).is_file() else _steps(folder)
    stages: dict[str, None] = {}
    for step in steps:
        state = read_state(Folder(step))
        if "weights/contrastive_head.image.weight" in state["tensors"]:
            return step
        stages[str(state.get("stage", "none"))] = None
    raise ConfigError(
        f"agreement: {folder} has no towers to compare pictures and texts with (its stage: "
        f"{', '.join(stages)}); name a checkpoint of a stage with objectives.contrastive (its "
        "last one stays for good)"
    )


def _check(step: Path, tokenizer: Path | None) -> Path:
    """The tokenizer of a step; raises MegavlmError unless pairs can be scored by it."""
    from megavlm.checkpoint.state import check_weights
    from megavlm.checkpoint.storage import CheckpointReader

    reader = CheckpointReader(Folder(step))  # looks for all files
    run = _run_of(step, reader.state)
    path = (tokenizer or run.data.tokenizer).absolute()
    if not path.is_file():
        raise ConfigError(
            f"agreement: tokenizer {path} of {step} does not exist; name the file that it was "
            "trained with in agreement.tokenizer"
        )
    check_weights(reader.folder, run.model, Tokenizer(path))
    return path


def _run_of(step: Path, state: dict[str, Any]) -> RunSettings:
    """The settings of the stage that wrote a checkpoint: image size, tokenizer, row length."""
    try:
        return settings_of(RunSettings, state.get("settings", {}))
    except ConfigError as error:
        raise ConfigError(
            f"agreement: {step} does not say of which run it is, by whose image size and tokenizer "
            f"pairs are prepared ({error}); name a checkpoint as `megavlm train` has written it"
        ) from error


def agreement(
    rules: AgreementRules, device: str, pictures: Sequence[bytes], captions: Sequence[str]
) -> list[float]:
    """Cosine of the features of each encoded picture and its caption, in fp32.

    Prepared and encoded as in the evaluation of retrieval. rules: as `resolved` returns them.
    """
    if not captions:
        return []
    from megavlm.data.collate import Drawn
    from megavlm.infer.features import encode

    assert rules.tokenizer is not None
    model, tokenizer, run = _loaded(rules.checkpoint, rules.tokenizer, device)
    side = run.model.encoder.image_pixels
    generator = np.random.default_rng(0)  # hides patches, which the towers are not shown
    scores: list[float] = []
    for start in range(0, len(captions), BATCH_PAIRS):
        together = slice(start, start + BATCH_PAIRS)
        drawn = [
            Drawn(
                "",
                (read_square(picture, "a sample", side),),
                (text("", caption, CAPTION_TASK),),
                generator,
            )
            for picture, caption in zip(pictures[together], captions[together], strict=True)
        ]
        [(image_nd, text_nd)] = encode([model], drawn, tokenizer, run).features
        scores += (normalize(image_nd, dim=-1) * normalize(text_nd, dim=-1)).sum(-1).tolist()
    return scores


@cache
def _loaded(
    checkpoint: Path, tokenizer: Path, device: str
) -> tuple["PretrainingModel", Tokenizer, RunSettings]:
    import torch.distributed as dist

    from megavlm.checkpoint.storage import read_state
    from megavlm.dist import groups
    from megavlm.infer.load import load_pretraining

    if groups.device().type != device:
        raise ConfigError(
            f"agreement is to run on {device} (gpus_per_worker), but torch sees "
            f"{'a' if device == 'cpu' else 'no'} GPU; set gpus_per_worker as the workers have them"
        )
    if device == "cpu":
        torch.set_num_threads(1)  # a worker has one core, and more would round otherwise
    run = _run_of(checkpoint, read_state(Folder(checkpoint)))
    with ExitStack() as stack:
        # The model's layers keep these groups, so they last as long as the process. Of it alone:
        # whatever the environment says of other ranks is of no use here.
        store = cast(Any, dist).HashStore()
        stack.enter_context(groups.process_groups(run.seed, store=store))
        model = load_pretraining(run, Folder(checkpoint))
        atexit.register(stack.pop_all().close)
    return model, Tokenizer(tokenizer), run
