"""Everything that can be wrong with a run, found before any process starts."""

import numpy as np

from megavlm.checkpoint.listing import newest_checkpoint
from megavlm.checkpoint.state import (
    check_checkpoint,
    check_data_position,
    check_moments,
    check_weights,
    checkpoint_root,
)
from megavlm.checkpoint.storage import STATE_FILE, checked_state, read_state
from megavlm.config.plan import Plan, Stage
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.data.loader import most_pictures
from megavlm.data.sources import Sources, training_sources
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import ConfigError, DamagedError
from megavlm.files.folder import Folder
from megavlm.train.profiler import check_profile
from megavlm.train.start import (
    OTHER_START,
    TO_GO_ON,
    damage_told,
    last_checkpoint,
    of_earlier_stage,
    stages_before,
)


def check_plan(plan: Plan, ranks: int) -> None:
    """Raise the error that training on so many ranks would meet in sizes, data or checkpoint."""
    plan.check(lambda run: check_stage(run, ranks))
    check_profile(plan, ranks)
    run = plan.first
    if not check_newest(plan):
        for place in run.checkpoint.start_from:
            with damage_told(OTHER_START):
                check_weights(Folder(place), run.model, Tokenizer(run.data.tokenizer))
    try:
        run.run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create run_folder {run.run_folder}: {error.strerror}") from error
    checkpoint_root(run).check_writable()


def check_newest(plan: Plan) -> bool:
    """Raise the error that going on from the newest checkpoint would meet; whether there is one."""
    run = plan.first
    checkpoint = newest_checkpoint(checkpoint_root(run), run.checkpoint)
    if checkpoint is not None:
        with damage_told(TO_GO_ON):
            stage = check_checkpoint(checkpoint, plan, Tokenizer(run.data.tokenizer))
        _check_resume(plan, stage, checkpoint)
    return checkpoint is not None


def check_stage(run: RunSettings, ranks: int) -> None:
    """Raise ConfigError or DataError for what is wrong with one stage on so many ranks."""
    copies = data_parallel_ranks(run, ranks)
    samples_per_micro_batch(run.train, copies)
    training = training_sources(run)
    training.check()
    training.check_tasks()
    _check_image_slots(run, training, copies)
    for source in (run.data.heldout, run.data.heldout_questions):
        if source is not None:
            Sources((source,), run.seed).check()
    tokenizer = Tokenizer(run.data.tokenizer)
    if tokenizer.vocabulary != run.model.decoder.vocabulary:
        raise ConfigError(
            f"model.decoder.vocabulary={run.model.decoder.vocabulary} must equal the "
            f"{tokenizer.vocabulary} pieces of tokenizer {run.data.tokenizer}"
        )


def _check_image_slots(run: RunSettings, training: Sources, copies: int) -> None:
    """Raise ConfigError if the first step's pictures, dealt evenly, exceed what is allowed."""
    most = run.data.micro_batch_images
    if most is None:
        return
    first_step = training.shuffled(np.arange(run.train.samples_per_step))
    pictures = np.minimum(training.sizes_of(first_step).pictures_n, most_pictures(run))
    micro_batches = run.train.micro_batches * copies
    needed = -(-int(pictures.sum()) // micro_batches)
    if needed > most:
        raise ConfigError(
            f"data.micro_batch_images={most} would leave samples out of every step: the first one "
            f"has {pictures.sum():,} pictures for {micro_batches} micro-batches of all copies of "
            f"the model; raise it to at least {needed}, or train.micro_batches"
        )


def _check_resume(plan: Plan, stage: Stage, checkpoint: Folder) -> None:
    is_last = stage.name == plan.stages[-1].name
    for earlier in () if is_last else stages_before(plan, stage):
        last = last_checkpoint(earlier)
        with damage_told(of_earlier_stage(earlier)):
            if not last.has(STATE_FILE):
                raise DamagedError(f"checkpoint {last} is gone")
            checked_state(last)
    if read_state(checkpoint)["step"] < stage.end_step:
        check_data_position(checkpoint, stage.run, training_sources(stage.run))
        check_moments(checkpoint, stage.run)
