"""The training loop. It knows no engine, and every rank runs it alike."""

import fcntl
import gc
import itertools
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megavlm.checkpoint.copies import Copies
from megavlm.checkpoint.listing import claim
from megavlm.checkpoint.save import CheckpointSaver
from megavlm.checkpoint.state import checkpoint_root, checkpoint_state
from megavlm.checkpoint.storage import folder_name
from megavlm.config.objectives import Part
from megavlm.config.plan import Plan, Stage
from megavlm.config.run import RunSettings
from megavlm.config.schedule import scheduled
from megavlm.data.cursor import joined_ranges
from megavlm.data.loader import MicroBatches, Share, load
from megavlm.data.sources import Sources, training_sources
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.dist.launch import check_hosts
from megavlm.dist.told import agreed, told_once
from megavlm.engine.base import DTYPES, Accepts, Engine, StepResult
from megavlm.engine.ema import Ema
from megavlm.engine.start import start_engine
from megavlm.errors import BadSampleError, DataError, LaunchError
from megavlm.ops import library
from megavlm.redact import without_secrets
from megavlm.stages.base import Objective, weighted
from megavlm.stages.start import objective_of
from megavlm.terminal import tell
from megavlm.train.events import Events
from megavlm.train.exporters import Sink, exporters
from megavlm.train.figures import StepFigures
from megavlm.train.guard import Guard
from megavlm.train.ledger import Ledger
from megavlm.train.memory import memory_told
from megavlm.train.metrics import MetricsLog
from megavlm.train.preflight import check_plan
from megavlm.train.profiler import ProfileWindow
from megavlm.train.record import write_record
from megavlm.train.recovery import open_copies, pass_damaged
from megavlm.train.replicas import compare_replicas
from megavlm.train.start import (
    Start,
    find_start,
    guard_of,
    left_out_before,
    load_average,
    start_of,
    trained_names,
)
from megavlm.train.stop import StopSignals
from megavlm.train.stragglers import Stragglers
from megavlm.train.watch import Watch

LOCK_SECONDS = 10.0
"""What is started again waits so long for the end of those before it."""


def train(
    plan: Plan, after_stage: Callable[[Plan, Stage], None] = lambda plan, stage: None
) -> None:
    """Train every stage until its last step, from the newest checkpoint if there is one.

    after_stage: called on all ranks after each stage, also when the run goes on at its end.
    """
    # The ranks meet before they check anything, so that they can agree on who tells a mistake.
    with groups.world_group(), told_once():
        _train_checked(agreed(lambda: _checked(plan)), after_stage)


def _checked(plan: Plan) -> Plan:
    """The plan on this run's ranks, before they do anything that takes long."""
    plan = plan.on(groups.world_size())
    check_plan(plan, groups.world_size())
    here = {socket.gethostname(): groups.local_world_size()}
    plan.check(lambda run: check_hosts(run, here, groups.world_size()))
    if plan.first.engine == "zero3":
        plan.first.zero3.check_device(has_gpu=torch.cuda.is_available())
    return plan


def _train_checked(plan: Plan, after_stage: Callable[[Plan, Stage], None]) -> None:
    run, first = plan.first, groups.rank() == 0
    events = Events(run.run_folder, enabled=first)
    with ExitStack() as opened:

        def open_outputs() -> dict[str, Sink]:
            if first:
                opened.enter_context(_alone_in(run.run_folder))
            opened.enter_context(events)
            return opened.enter_context(exporters(plan, enabled=first))

        sinks = agreed(open_outputs)
        events.start(ranks=groups.world_size(), engine=run.engine)
        claim(checkpoint_root(run), run.run_folder)
        copies = open_copies(plan, events)
        pass_damaged(plan, events, copies)
        start = find_start(plan)
        for line in start.told:
            _say(line)
        if start.checkpoint is not None:
            events.write("resumed", step=start.steps_done, checkpoint=str(start.checkpoint))
        write_record(plan, start, events.restarts)
        log = MetricsLog(run.run_folder, start.steps_done, plan.steps, events, sinks, enabled=first)
        with log:
            for stage in plan.stages[plan.stages.index(start.stage) :]:
                if start.steps_done < stage.end_step:
                    with groups.model_groups(run.seed, stage.run.model_parallel):
                        start = _train_stage(plan, stage, start, log, copies)
                with events.timed("evaluated", stage=stage.name):
                    after_stage(plan, stage)


def _say(line: str) -> None:
    if groups.rank() == 0:
        print(without_secrets(line), flush=True)


def _train_stage(
    plan: Plan, stage: Stage, start: Start, log: MetricsLog, copies: Copies | None
) -> Start:
    """Train what is left of a stage; returns where the next one starts."""
    run = stage.run
    with log.events.timed("built", stage=stage.name):
        engine = start_engine(run, groups.device())
    left_out, rollbacks = left_out_before(start.checkpoint), 0
    while True:
        fill, optimizer_steps = start_of(plan, stage, start)
        with log.events.timed("loaded", stage=stage.name, step=start.steps_done):
            engine.load_state(fill, optimizer_steps)
        ema = (
            Ema(engine.state(), trained_names(run), run.train.ema_decay)
            if run.train.ema_decay
            else None
        )
        if ema is not None and start.steps_done > stage.first_step:
            load_average(start, ema)
        sources = training_sources(run, left_out)
        stretch = _Stretch(plan, stage, start.steps_done, sources, left_out, rollbacks)
        guard = guard_of(stage, start)
        bad_step = _run_steps(stretch, engine, ema, guard, optimizer_steps, log, copies)
        if bad_step is None:
            break
        before, start = start.steps_done, find_start(plan)
        rollbacks = rollbacks + 1 if start.steps_done == before else 1
        left_out = _left_out(stretch, start.steps_done, bad_step)
        log.go_back(start.steps_done)
        log.events.write(
            "rolled_back", **{"from": bad_step, "to": start.steps_done}, left_out=left_out
        )
        first, stop = left_out[-1]
        _say(f"back to step {start.steps_done}; samples {first:,} to {stop:,} are left out")
    engine.close()
    del engine, ema
    gc.collect()  # models are full of cycles
    torch.cuda.empty_cache()
    return Start(stage, stage.end_step, checkpoint_root(run) / folder_name(stage.end_step))


class _Stretch(NamedTuple):
    """Steps of a stage that are done without going back."""

    plan: Plan
    stage: Stage
    first_step: int
    sources: Sources
    left_out: Sequence[tuple[int, int]]
    """Positions that rollbacks have left out of the sources."""
    rollbacks: int
    """To this first step, one after the other."""


def _left_out(stretch: _Stretch, step: int, bad_step: int) -> list[tuple[int, int]]:
    """With the samples of all steps from one to a bad one."""
    samples = stretch.stage.sample_at(step), stretch.stage.sample_at(bad_step + 1) - 1
    first, last = stretch.sources.position(np.array(samples)).tolist()
    return joined_ranges([*stretch.left_out, (first, last + 1)])


def _run_steps(
    stretch: _Stretch,
    engine: Engine,
    ema: Ema | None,
    guard: Guard,
    optimizer_steps: Mapping[Part, int],
    log: MetricsLog,
    copies: Copies | None,
) -> int | None:
    """Train until the stage ends; returns the step because of which the run must go back."""
    plan, stage, first_step, sources, left_out, rollbacks = stretch
    run, per_step = stage.run, stage.run.train.micro_batches
    taken: dict[Part, int] = {**optimizer_steps}
    tokenizer = Tokenizer(run.data.tokenizer)
    share = Share(groups.data_rank(), groups.data_ranks())
    objective = objective_of(run)
    collate = objective.collate
    training = MicroBatches(
        *(sources, tokenizer, run, share, collate),
        training=True,
        first_sample=stage.first_sample,
    )
    heldout = MicroBatches(
        Sources((run.data.heldout,), run.seed), tokenizer, run, share, collate, training=False
    )
    numbers = range((first_step - stage.first_step) * per_step, run.train.steps * per_step)
    batches = load(training, numbers, run.data.workers) if groups.is_first_model_rank() else None
    ends = [stage.end_step for stage in plan.stages]
    ledger = Ledger(run, first_step, enabled=groups.rank() == 0) if run.data.ledger else None
    figures = StepFigures(run, groups.world_size())
    stragglers = Stragglers(run, log)
    root = checkpoint_root(run)
    with (
        Watch(run.run_folder / "hangs", run.guard.hang_seconds) as watch,
        StopSignals(watch.hurry) as stop,
        CheckpointSaver(
            root, run.checkpoint, ends, watch.progress, log.events.write, copies
        ) as saver,
        ProfileWindow(run.profile, run.run_folder) as window,
    ):
        log.say(
            f"stage {stage.name} ({', '.join(run.objectives)}): engine {run.engine}, "
            f"{groups.describe(run.model_parallel)}"
        )
        head_width = run.model.decoder.head_width
        kernels = library.description(groups.device(), DTYPES[run.train.precision], head_width)
        log.say(f"cross-attention and its norms run on {kernels}")
        if first_step == stage.first_step:
            _log_heldout_loss(engine, objective, heldout, stage, log, first_step, watch)
        stop.listen()
        for step in range(first_step, stage.end_step):
            window.before(step)
            stragglers.begin(step)
            watch.at(f"step {step + 1}, its samples")
            started = time.perf_counter()
            mine = None if batches is None else list(itertools.islice(batches, per_step))
            loader_seconds = time.perf_counter() - started
            micro_batches = groups.from_first_model_rank(mine)
            watch.at(f"step {step + 1}, the model")
            data_seconds = time.perf_counter() - started
            counts = _count_samples(micro_batches, run)
            if ledger is not None:
                ids = [i for batch in micro_batches for i in batch.sample_ids]
                ledger.write(step, np.concatenate(groups.from_copies(np.array(ids, np.int64))))
            learning_rate = scheduled(plan, stage, step)
            norms: dict[Part, float] = {}
            accepts = _with_norms(run, step, engine, guard.accepts, norms)
            with memory_told(step, micro_batches, run):
                result = engine.step(micro_batches, learning_rate, accepts)
            _check_items(step, result)
            step_seconds = time.perf_counter() - started
            rank_figures = stragglers.end(step, loader_seconds)
            if guard.fault is None:
                log.events.step_done(step, step_seconds, data_seconds)
                taken = {part: steps + 1 for part, steps in taken.items()}
                if ema is not None:
                    ema.update()
            else:
                log.say(f"step {step + 1}  {guard.told(result)}")
                told = {"step": step, "fault": guard.fault, "seconds": step_seconds}
                if guard.goes_back(step, result, rollbacks):
                    log.events.write("bad_step", **told)
                    return step
                log.events.write("step_skipped", **told)
            log.step(
                {
                    "step": step,
                    "stage": stage.name,
                    "loss": result.loss,
                    **_by_objective("loss", result.losses),
                    **{f"loss_{name}": loss for name, loss in result.losses_of_groups.items()},
                    "gradient_norm": result.gradient_norm,
                    "skipped_step": int(guard.fault is not None),
                    "learning_rate": learning_rate,
                    "first_sample": int(sources.position(np.array(stage.sample_at(step)))),
                    "items": result.items,
                    **counts,
                    "step_seconds": step_seconds,
                    "data_seconds": data_seconds,
                    **rank_figures,
                    "samples_per_second": counts["samples"] / step_seconds,
                    **{f"gradient_norm_{part}": norm for part, norm in norms.items()},
                    **figures.of(counts, learning_rate, step_seconds),
                },
                say=(step + 1) % run.train.log_every == 0,
            )
            saver.check()
            done = step + 1
            if done == stage.end_step:
                _log_heldout_loss(engine, objective, heldout, stage, log, done, watch)
            stops = stop.wanted()
            if stops:
                watch.calm()  # a disk may be silent for long
            to_disk = done % run.checkpoint.every == 0 or done == stage.end_step or stops
            memory_every = run.checkpoint.memory_every
            to_memory = memory_every is not None and done % memory_every == 0 and not stops
            every = run.guard.compare_replicas_every
            if every and (to_disk or done % every == 0):
                compare_replicas(engine.replicated(), done)
            if to_disk or to_memory:
                watch.at(f"step {done}, its checkpoint")
                started = time.perf_counter()
                if ledger is not None:
                    ledger.sync()
                state = checkpoint_state(
                    *(stage, tokenizer, done, sources, taken, guard.state(), left_out)
                )
                tensors = {**engine.state(), **(ema.state() if ema is not None else {})}
                saver.save(done, tensors, state, to_disk=to_disk, to_memory=to_memory)
                if to_disk:
                    rollbacks = 0
                    seconds = time.perf_counter() - started
                    log.record({"step": step, "stage": stage.name, "checkpoint_seconds": seconds})
            if stops:
                saver.wait()
                stop.end(done)
        saver.wait()


def _with_norms(
    run: RunSettings, step: int, engine: Engine, accepts: Accepts, norms: dict[Part, float]
) -> Accepts:
    """What also fills in the norms of the parts' gradients, at steps where they are wanted."""
    every = run.metrics.module_norms_every
    if every is None or (step + 1) % every:
        return accepts

    def measured(result: StepResult) -> bool:
        norms.update(engine.gradient_norms())
        return accepts(result)

    return measured


def _by_objective(name: str, losses: Mapping[str, float]) -> dict[str, float]:
    """Each objective's loss, where several share a step."""
    several = len(losses) > 1
    return {f"{name}_{objective}": loss for objective, loss in losses.items() if several}


def _check_items(step: int, result: StepResult) -> None:
    """Stop before weights that nothing has taught are saved."""
    if result.items == 0:
        raise DataError(
            f"step {step + 1}: nothing is to be learned from any of its samples; do they have "
            "texts of the tasks that data.train names, and does data.row_tokens leave room for an "
            "answer?"
        )


def _count_samples(micro_batches: Sequence[Any], run: RunSettings) -> dict[str, float]:
    """Samples of a step over all ranks. Names the bad ones, and stops the run if it is told to."""
    skipped = [name for batch in micro_batches for name in _name_skipped(batch)]
    samples, all_skipped, without_text, truncated, texts, tokens, places, images, slots = (
        groups.sum_over_copies(
            sum(batch.samples for batch in micro_batches),
            len(skipped),
            sum(batch.without_text for batch in micro_batches),
            sum(batch.truncated_texts for batch in micro_batches),
            sum(int((batch.text_numbers_bt.amax(1) + 1).sum()) for batch in micro_batches),
            sum(batch.text_tokens for batch in micro_batches),
            sum(batch.tokens_bt.numel() for batch in micro_batches),
            sum(batch.images for batch in micro_batches),
            sum(len(batch.pixels) for batch in micro_batches),
        )
    )
    if all_skipped and run.data.on_bad_sample == "stop":
        raise BadSampleError(
            f"stopped at {all_skipped} bad samples ({', '.join(skipped) or 'on other ranks'}); "
            "mend them or set data.on_bad_sample=skip"
        )
    return {
        "samples": samples,
        "skipped_samples": all_skipped,
        "samples_without_text": without_text,
        "truncated_texts": truncated,
        "texts": texts,
        "text_tokens": tokens,
        "packing_efficiency": tokens / places,
        "images": images,
        "image_slots_used": images / slots,
    }


def _log_heldout_loss(
    engine: Engine,
    objective: Objective,
    heldout: MicroBatches,
    stage: Stage,
    log: MetricsLog,
    step: int,
    watch: Watch,
) -> None:
    """Log the mean loss over the held-out samples."""
    run = stage.run
    log.say("measuring the held-out loss")

    def batches() -> Iterator[Any]:
        numbers = range(heldout.count())
        loads = groups.is_first_model_rank()
        loaded = load(heldout, numbers, run.data.workers) if loads else itertools.repeat(None)
        for _, mine in zip(numbers, loaded, strict=False):
            watch.at(f"step {step}, the held-out loss")
            batch = groups.from_first_model_rank(mine)
            _name_skipped(batch)
            yield batch

    with log.events.timed("held_out", step=step):
        losses = engine.evaluate(batches())
    loss = weighted(objective, losses.values())
    by_objective = _by_objective("heldout_loss", losses)
    last = step == stage.end_step
    log.record(
        {"step": step, "stage": stage.name, "last": last, "heldout_loss": loss, **by_objective}
    )
    log.say(f"step {step}  held-out loss {loss:.4f}")


def _name_skipped(batch: Any) -> tuple[str, ...]:
    """Tell which samples were bad, once for each copy of the model."""
    for name in batch.skipped if groups.is_first_model_rank() else ():
        tell(f"rank {groups.rank()}: skipped {name}")
    return batch.skipped


@contextmanager
def _alone_in(run_folder: Path) -> Iterator[None]:
    """Hold a run folder; raises LaunchError while another run writes to it."""
    with (run_folder / "lock").open("w") as lock:
        given_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > given_up:
                    raise LaunchError(
                        f"another run is writing to {run_folder}; stop it or choose another "
                        "run_folder"
                    ) from error
                time.sleep(0.1)
        yield
