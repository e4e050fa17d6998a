"""The training loop. It knows no engine, and every rank runs it alike."""

import fcntl
import itertools
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from megavlm.checkpoint.folder import Folder
from megavlm.checkpoint.state import changes, checkpoint_root, checkpoint_state
from megavlm.checkpoint.storage import read_state
from megavlm.checkpoint.store import (
    CheckpointSaver,
    claim,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
)
from megavlm.config.run import RunSettings
from megavlm.data.loader import MicroBatches, Share, load
from megavlm.data.packing import Batch
from megavlm.data.shards import ShardFolder
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.dist.launch import check_hosts
from megavlm.engine.base import DTYPES, Engine, StepResult
from megavlm.engine.optim import learning_rate_at
from megavlm.engine.start import start_engine
from megavlm.errors import BadSampleError, DivergenceError, LaunchError
from megavlm.ops import library
from megavlm.train.metrics import MetricsLog
from megavlm.train.preflight import check_run


def train(run: RunSettings) -> None:
    """Train until the last step, from the newest checkpoint if there is one."""
    check_run(run, groups.world_size())
    check_hosts(run, {socket.gethostname(): groups.local_world_size()})
    if run.engine == "zero3":
        run.zero3.check_device(has_gpu=torch.cuda.is_available())
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // groups.local_world_size()))
    hold = _alone_in(run.run_folder) if groups.rank() == 0 else nullcontext()
    with hold, groups.process_groups(run.seed, run.model_parallel):
        engine = start_engine(run, groups.device())
        _run_steps(run, engine, first_step=_resume(run, engine))
        engine.close()


def _resume(run: RunSettings, engine: Engine) -> int:
    """Load the newest checkpoint, or what a new run starts from; returns the steps done."""
    claim(checkpoint_root(run), run.run_folder)
    # One rank looks: the others may see a newer listing, or an older one.
    found = latest_checkpoint(checkpoint_root(run)) if groups.rank() == 0 else None
    newest = groups.from_first_rank(str(found) if found else "")
    if not newest:
        for place in run.checkpoint.start_from:
            engine.load_state(partial(load_weights, Folder(place)), steps_done=0)
            _say(f"weights from {place}")
        return 0
    checkpoint = Folder(newest)
    steps_done = read_state(checkpoint)["step"]
    engine.load_state(partial(load_checkpoint, checkpoint), steps_done)
    _say(f"resumed from {checkpoint}")
    if run.checkpoint.start_from:
        _say("the run has begun already, so checkpoint.start_from is not used")
    for line in changes(checkpoint, run):
        _say(line)
    return steps_done


def _say(line: str) -> None:
    if groups.rank() == 0:
        print(line, flush=True)


def _run_steps(run: RunSettings, engine: Engine, first_step: int) -> None:
    tokenizer = Tokenizer(run.data.tokenizer)
    share = Share(groups.data_rank(), groups.data_ranks())
    training = MicroBatches(ShardFolder(run.data.train), tokenizer, run, share, training=True)
    heldout = MicroBatches(ShardFolder(run.data.heldout), tokenizer, run, share, training=False)
    steps, per_step = run.train.steps, run.train.micro_batches
    numbers = range(first_step * per_step, steps * per_step)
    batches = load(training, numbers, run.data.workers) if groups.is_first_model_rank() else None
    log = MetricsLog(
        run.run_folder, first_step, steps, run.train.log_every, enabled=groups.rank() == 0
    )
    with log, CheckpointSaver(checkpoint_root(run), run.checkpoint) as saver:
        log.say(f"engine {run.engine}, {groups.describe(run.model_parallel)}")
        head_width = run.model.decoder.head_width
        kernels = library.description(groups.device(), DTYPES[run.train.precision], head_width)
        log.say(f"cross-attention and its norms run on {kernels}")
        if first_step == 0:
            _log_heldout_loss(engine, heldout, run, log, step=0)
        for step in range(first_step, steps):
            started = time.perf_counter()
            mine = None if batches is None else list(itertools.islice(batches, per_step))
            micro_batches = groups.from_first_model_rank(mine)
            data_seconds = time.perf_counter() - started
            counts = _count_samples(micro_batches, run)
            learning_rate = learning_rate_at(step, steps, run.optimizer)
            result = engine.step(micro_batches, learning_rate)
            _check_finite(step, result)
            step_seconds = time.perf_counter() - started
            log.step(
                {
                    "step": step,
                    "loss": result.loss,
                    "gradient_norm": result.gradient_norm,
                    "learning_rate": learning_rate,
                    "learned_tokens": result.learned_tokens,
                    **counts,
                    "step_seconds": step_seconds,
                    "data_seconds": data_seconds,
                    "samples_per_second": counts["samples"] / step_seconds,
                }
            )
            saver.check()
            done = step + 1
            if done % run.checkpoint.every == 0 or done == steps:
                started = time.perf_counter()
                state = checkpoint_state(run, tokenizer, done, training.folder)
                saver.save(done, engine.state(), state)
                log.record({"step": step, "checkpoint_seconds": time.perf_counter() - started})
        _log_heldout_loss(engine, heldout, run, log, step=steps)


def _check_finite(step: int, result: StepResult) -> None:
    """Stop before weights that are no numbers are saved."""
    if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
        raise DivergenceError(
            f"step {step}: loss {result.loss}, gradient norm {result.gradient_norm}; nothing of it "
            "is saved. Run again to go on from the last checkpoint, with a lower "
            "optimizer.learning_rate or a longer optimizer.warmup_fraction"
        )


def _count_samples(micro_batches: Sequence[Batch], run: RunSettings) -> dict[str, int]:
    """Samples of a step over all ranks. Names the bad ones, and stops the run if it is told to."""
    skipped = [name for batch in micro_batches for name in _name_skipped(batch)]
    samples, all_skipped, truncated = groups.sum_over_copies(
        sum(batch.samples for batch in micro_batches),
        len(skipped),
        sum(batch.truncated_texts for batch in micro_batches),
    )
    if all_skipped and run.data.on_bad_sample == "stop":
        raise BadSampleError(
            f"stopped at {all_skipped} bad samples ({', '.join(skipped) or 'on other ranks'}); "
            "mend them or set data.on_bad_sample=skip"
        )
    return {"samples": samples, "skipped_samples": all_skipped, "truncated_texts": truncated}


def _log_heldout_loss(
    engine: Engine, heldout: MicroBatches, run: RunSettings, log: MetricsLog, step: int
) -> None:
    """Log the mean loss over the held-out samples, in nats per learned token."""
    log.say("measuring the held-out loss")

    def batches() -> Iterator[Batch]:
        numbers = range(heldout.count())
        loads = groups.is_first_model_rank()
        loaded = load(heldout, numbers, run.data.workers) if loads else itertools.repeat(None)
        for _, mine in zip(numbers, loaded, strict=False):
            batch = groups.from_first_model_rank(mine)
            _name_skipped(batch)
            yield batch

    loss_sum, learned_tokens = engine.evaluate(batches())
    loss = loss_sum / max(1, learned_tokens)
    log.record({"step": step, "heldout_loss": loss})
    log.say(f"step {step}  held-out loss {loss:.4f}")


def _name_skipped(batch: Batch) -> tuple[str, ...]:
    """Tell which samples were bad, once for each copy of the model."""
    for name in batch.skipped if groups.is_first_model_rank() else ():
        print(f"rank {groups.rank()}: skipped {name}", file=sys.stderr, flush=True)
    return batch.skipped


@contextmanager
def _alone_in(run_folder: Path) -> Iterator[None]:
    """Hold a run folder; raises LaunchError while another run writes to it."""
    with (run_folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LaunchError(
                f"another run is writing to {run_folder}; stop it or choose another run_folder"
            ) from error
        yield
