"""Where a run starts from: its newest checkpoint, or what was trained before a stage."""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from megavlm.checkpoint.listing import latest_checkpoint
from megavlm.checkpoint.load import load_checkpoint, load_present
from megavlm.checkpoint.shards import MOMENTS, Shards, State
from megavlm.checkpoint.state import changes, checkpoint_root
from megavlm.checkpoint.storage import folder_name, read_state
from megavlm.config.objectives import Part
from megavlm.config.plan import Plan, Stage
from megavlm.config.run import RunSettings
from megavlm.dist import groups
from megavlm.engine.ema import Ema
from megavlm.errors import CheckpointError, DamagedError
from megavlm.files.folder import Folder
from megavlm.model.params import carried_parts, parameters_of, trained_parameters
from megavlm.train.guard import Guard

TO_GO_ON = (
    "delete that checkpoint's folder, or set checkpoint.on_damage=earlier to go on from an earlier "
    "one"
)
OTHER_START = "restore it, or name another in checkpoint.start_from"
"""What to do about damage of the newest checkpoint, and of those that a run starts from."""


class Start(NamedTuple):
    """Where a run goes on."""

    stage: Stage
    steps_done: int
    checkpoint: Folder | None
    """Of that step; None before the first one."""
    told: tuple[str, ...] = ()
    """What the user is told of it."""


def _length(plan: Plan) -> str:
    """The setting that says how long the last stage is."""
    name = plan.stages[-1].name
    return f"stages.{name}.train.steps" if len(plan.stages) > 1 else "train.steps"


def left_out_before(checkpoint: Folder | None) -> list[tuple[int, int]]:
    """Positions of samples that rollbacks had left out when a checkpoint was written."""
    saved = read_state(checkpoint).get("left_out", []) if checkpoint else []
    return [(first, stop) for first, stop in saved]


def guard_of(stage: Stage, start: Start) -> Guard:
    """What looks at the steps of a stage, which starts, or goes on in its middle."""
    if start.checkpoint is None or start.steps_done == stage.first_step:
        return Guard(stage.run.guard)
    return Guard(stage.run.guard, read_state(start.checkpoint).get("guard"))


def find_start(plan: Plan) -> Start:
    """The newest checkpoint of a run, which `check_plan` has looked at; collective."""
    root = checkpoint_root(plan.first)
    # One rank looks: the others may see a newer listing, or an older one.
    found = latest_checkpoint(root) if groups.rank() == 0 else None
    newest = groups.from_first_rank(str(found) if found else "")
    places = plan.first.checkpoint.start_from
    if not newest:
        return Start(plan.stages[0], 0, None, tuple(f"weights from {place}" for place in places))
    checkpoint = Folder(newest)
    with damage_told(TO_GO_ON):
        state = read_state(checkpoint)
    stage = plan.named(state["stage"])
    assert stage is not None, "check_plan has seen that it is there"
    told = [f"resuming from {checkpoint}, in stage {stage.name}"]
    if places:
        told.append("the run has begun already, so checkpoint.start_from is not used")
    if state["step"] < stage.end_step:
        told += changes(checkpoint, stage.run)
    elif state["step"] == plan.steps:
        told.append(f"all {plan.steps} steps are done; raise {_length(plan)} to go on")
    return Start(stage, state["step"], checkpoint, tuple(told))


def start_of(
    plan: Plan, stage: Stage, start: Start
) -> tuple[Callable[[State], None], dict[Part, int]]:
    """What fills an engine before a stage goes on, and the optimiser's steps of each trained part.

    In the middle of a stage that is its checkpoint. A stage begins with the newest weights of the
    stages before it that have trained them, with those of `checkpoint.start_from` where none has,
    and with initial ones where nothing has any. Moments, and the steps that they have seen, carry
    over for parts that the stage right before it has trained whole; they start fresh for the rest.
    """
    trained = stage.run.trained_parts
    if start.checkpoint is not None and start.steps_done > stage.first_step:
        checkpoint = start.checkpoint
        steps = read_state(checkpoint)["optimizer_steps"]

        def fill_from_own(state: State) -> None:
            with damage_told(TO_GO_ON):
                load_checkpoint(checkpoint, state)

        return fill_from_own, {part: steps.get(part, 0) for part in trained}
    before = stages_before(plan, stage)

    def remedy_of(earlier: Stage) -> str:
        is_newest = earlier.end_step == start.steps_done
        return TO_GO_ON if is_newest else of_earlier_stage(earlier)

    steps_before: Mapping[Part, int] = {}
    if before:
        with damage_told(remedy_of(before[-1])):
            steps = read_state(last_checkpoint(before[-1]))["optimizer_steps"]
        steps_before = {part: steps[part] for part in carried_parts(before[-1].run, stage.run)}
    carried = {e.name for e in parameters_of(stage.run) if e.setting in steps_before}

    def fill_from_before(state: State) -> None:
        for place in stage.run.checkpoint.start_from:
            with damage_told(OTHER_START):
                load_present(Folder(place), _named(state, "weights/"))
        for earlier in before:
            # Some engines keep, and save, what is frozen in bf16 alone.
            wanted = _named(state, "weights/", trained_names(earlier.run))
            if earlier == before[-1]:
                for moment in MOMENTS:
                    wanted |= _named(state, f"{moment}/", carried)
            with damage_told(remedy_of(earlier)):
                load_present(last_checkpoint(earlier), wanted)

    return fill_from_before, {part: steps_before.get(part, 0) for part in trained}


def _named(state: State, kind: str, names: Container[str] | None = None) -> dict[str, Shards]:
    """What a state holds of a kind, of all parameters or of some."""
    return {
        name: held
        for name, held in state.items()
        if name.startswith(kind) and (names is None or name.removeprefix(kind) in names)
    }


def stages_before(plan: Plan, stage: Stage) -> tuple[Stage, ...]:
    """The stages that come before one."""
    return tuple(earlier for earlier in plan.stages if earlier.end_step <= stage.first_step)


def last_checkpoint(stage: Stage) -> Folder:
    """Where a stage leaves its last checkpoint, which stays."""
    return checkpoint_root(stage.run) / folder_name(stage.end_step)


@contextmanager
def damage_told(remedy: str) -> Iterator[None]:
    """Have damage of a checkpoint end in what to do about it."""
    try:
        yield
    except DamagedError as error:
        raise CheckpointError(f"{error}; {remedy}") from error


def of_earlier_stage(stage: Stage) -> str:
    """What to do about damage of a stage's last checkpoint, once a later one has begun."""
    return (
        f"later stages take weights from stage {stage.name}'s last checkpoint: restore it, or "
        "choose another run_folder"
    )


def load_average(start: Start, ema: Ema) -> None:
    """Go on with the moving average of a checkpoint; without one, it starts now."""
    assert start.checkpoint is not None
    saved = read_state(start.checkpoint)["tensors"]
    if any(name.startswith("ema/") for name in saved):  # on every rank, whatever it holds
        load_checkpoint(start.checkpoint, ema.state())


def trained_names(run: RunSettings) -> set[str]:
    """Names of the parameters that a stage trains."""
    return {entry.name for entry in trained_parameters(run)}
