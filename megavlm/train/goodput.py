"""Where the time of a run went: goodput is the share of it in which the model learned for good."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from megavlm.train.events import EVENTS_FILE, Event, read_events

Use = Literal[
    "productive",
    "start-up",
    "loading",
    "saving",
    "evaluation",
    "repeated steps",
    "skipped steps",
    "down",
    "other",
]


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Of a run, from the start of its first process to its last event."""

    wall_seconds: float
    seconds: dict[Use, float]
    """By what they were used for; they add up to `wall_seconds`.

    productive: steps that stayed, waiting for their data included. start-up: from a process's
    start to its first step, and models that later stages build, without loading. saving: training
    stands still. repeated steps: lost with a crash or a rollback. down: no process was there.
    """
    data_wait_seconds: float
    """Of the productive ones, those spent waiting for data."""
    starts: int
    steps: int
    """That stayed."""
    repeated_steps: int
    """Done, and lost: with those that a rollback left out, and its bad step."""
    skipped: list[int]
    """Steps whose gradients were left out, of those that stayed."""
    rollbacks: list[Event] = field(default_factory=list[Event])
    ended: str | None = None
    """How the last process ended; None while it runs, or if it was killed."""
    last_unix_seconds: float = 0.0
    """Of the last event."""

    @property
    def fraction(self) -> float:
        """Productive time over wall time, 0 to 1."""
        return self.seconds["productive"] / self.wall_seconds if self.wall_seconds else 0.0


class _Steps(NamedTuple):
    """Steps from `first` to before `stop`."""

    first: int
    stop: int
    seconds: float
    data_seconds: float


def goodput(events: Sequence[Event]) -> Goodput | None:
    """What a run's events, in order, say of its time; None before its first start.

    Steps count as productive until they are done again, or the run goes on before them.
    """
    starts = [number for number, event in enumerate(events) if event["event"] == "start"]
    if not starts:
        return None
    events = events[starts[0] :]
    uses: dict[Use, float] = dict.fromkeys(get_args(Use), 0.0)
    kept: list[_Steps] = []
    skipped: list[int] = []
    rollbacks: list[Event] = []
    repeated = 0
    begins = _began(events[0])
    last = begins
    ended: str | None = None
    process_began: float | None = None
    """Until its first step."""
    stops_before = 0.0

    def lose_from(step: int) -> None:
        nonlocal repeated
        skipped[:] = [other for other in skipped if other < step]
        for steps in [steps for steps in kept if steps.stop > step]:
            kept.remove(steps)
            stays = max(0, step - steps.first) / (steps.stop - steps.first)
            if stays:
                kept.append(
                    _Steps(steps.first, step, steps.seconds * stays, steps.data_seconds * stays)
                )
            repeated += steps.stop - max(step, steps.first)
            uses["repeated steps"] += steps.seconds * (1 - stays)

    def known_stops() -> float:
        return uses["loading"] + uses["saving"] + uses["evaluation"]

    def end_start_up(now: float) -> None:
        nonlocal process_began
        if process_began is not None:
            uses["start-up"] += max(0.0, now - process_began - (known_stops() - stops_before))
        process_began = None

    for event in events:
        now, seconds = float(event["unix_seconds"]), float(event.get("seconds", 0.0))
        uses["saving"] += float(event.get("stalled_seconds", 0.0))
        if event["event"] in ("first_step_done", "steps", "step_skipped", "bad_step"):
            end_start_up(now - seconds)
        match event["event"]:
            case "start":
                end_start_up(last)
                process_began = max(last, _began(event))
                uses["down"] += process_began - last
                stops_before = known_stops()
                ended = None
            case "built":
                uses["start-up"] += seconds if process_began is None else 0.0
            case "loaded" | "recovered":
                uses["loading"] += seconds
            case "resumed":
                lose_from(event["step"])
            case "held_out" | "evaluated":
                uses["evaluation"] += seconds
            case "steps":
                lose_from(event["first"])
                kept.append(
                    _Steps(event["first"], event["stop"], seconds, event.get("data_seconds", 0.0))
                )
            case "step_skipped":
                lose_from(event["step"])
                skipped.append(event["step"])
                uses["skipped steps"] += seconds
            case "bad_step":
                uses["repeated steps"] += seconds
                repeated += 1
            case "rolled_back":
                lose_from(event["to"])
                rollbacks.append(event)
            case "ended":
                ended = event["how"]
            case _:
                pass
        last = max(last, now)
    end_start_up(last)
    wall = last - begins
    uses["productive"] = sum(steps.seconds for steps in kept)
    # Between steps, and what no event tells of.
    uses["other"] = max(0.0, wall - sum(uses.values()))
    return Goodput(
        wall_seconds=wall,
        seconds=uses,
        data_wait_seconds=sum(steps.data_seconds for steps in kept),
        starts=len(starts),
        steps=sum(steps.stop - steps.first for steps in kept),
        repeated_steps=repeated,
        skipped=skipped,
        rollbacks=rollbacks,
        ended=ended,
        last_unix_seconds=last,
    )


def goodput_of(run_folder: Path) -> Goodput | None:
    """The same of a run's folder."""
    return goodput(read_events(run_folder / EVENTS_FILE))


def _began(start: Event) -> float:
    """When the process of a `start` began."""
    return float(start.get("process_started_unix_seconds", start["unix_seconds"]))
