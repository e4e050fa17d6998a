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
    recoveries: list[Event] = field(default_factory=list[Event])
    """What is not as usual about where the run went on: rollbacks, damage, copies in memory."""
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
    account = _Account(_began(events[starts[0]]))
    for event in events[starts[0] :]:
        account.add(event)
    return account.closed(starts=len(starts))


class _Account:
    """Adds up a run's events, in order."""

    def __init__(self, began: float) -> None:
        self._began = self._last = began
        self._uses: dict[Use, float] = dict.fromkeys(get_args(Use), 0.0)
        self._kept: list[_Steps] = []
        self._skipped: list[int] = []
        self._recoveries: list[Event] = []
        self._repeated = 0
        self._ended: str | None = None
        self._process_began: float | None = None
        """Until its first step."""
        self._stops_before = 0.0
        """Of those that are told by themselves, before the process began."""

    def add(self, event: Event) -> None:
        """Count an event, which is later than those before."""
        now, seconds = float(event["unix_seconds"]), float(event.get("seconds", 0.0))
        self._uses["saving"] += float(event.get("stalled_seconds", 0.0))
        if event["event"] in ("first_step_done", "steps", "step_skipped", "bad_step"):
            self._end_start_up(now - seconds)
        if event["event"] in ("rolled_back", "damaged", "recovered"):
            self._recoveries.append(event)
        match event["event"]:
            case "start":
                self._start(_began(event))
            case "built":
                self._uses["start-up"] += seconds if self._process_began is None else 0.0
            case "loaded" | "recovered":
                self._uses["loading"] += seconds
            case "resumed":
                self._lose_from(event["step"])
            case "held_out" | "evaluated":
                self._uses["evaluation"] += seconds
            case "steps":
                self._lose_from(event["first"])
                waited = event.get("data_seconds", 0.0)
                self._kept.append(_Steps(event["first"], event["stop"], seconds, waited))
            case "step_skipped":
                self._lose_from(event["step"])
                self._skipped.append(event["step"])
                self._uses["skipped steps"] += seconds
            case "bad_step":
                self._repeated += 1
                self._uses["repeated steps"] += seconds
            case "rolled_back":
                self._lose_from(event["to"])
            case "ended":
                self._ended = event["how"]
            case _:
                pass
        self._last = max(self._last, now)

    def closed(self, *, starts: int) -> Goodput:
        """What it adds up to."""
        self._end_start_up(self._last)
        wall, uses = self._last - self._began, self._uses
        uses["productive"] = sum(steps.seconds for steps in self._kept)
        # Between steps, and what no event tells of.
        uses["other"] = max(0.0, wall - sum(uses.values()))
        return Goodput(
            wall_seconds=wall,
            seconds=uses,
            data_wait_seconds=sum(steps.data_seconds for steps in self._kept),
            starts=starts,
            steps=sum(steps.stop - steps.first for steps in self._kept),
            repeated_steps=self._repeated,
            skipped=self._skipped,
            recoveries=self._recoveries,
            ended=self._ended,
            last_unix_seconds=self._last,
        )

    def _start(self, began: float) -> None:
        self._end_start_up(self._last)
        self._process_began = max(self._last, began)
        self._uses["down"] += self._process_began - self._last
        self._stops_before = self._known_stops()
        self._ended = None

    def _end_start_up(self, now: float) -> None:
        if self._process_began is not None:
            stops = self._known_stops() - self._stops_before
            self._uses["start-up"] += max(0.0, now - self._process_began - stops)
        self._process_began = None

    def _known_stops(self) -> float:
        return self._uses["loading"] + self._uses["saving"] + self._uses["evaluation"]

    def _lose_from(self, step: int) -> None:
        self._skipped[:] = [other for other in self._skipped if other < step]
        for steps in [steps for steps in self._kept if steps.stop > step]:
            self._kept.remove(steps)
            stays = max(0, step - steps.first) / (steps.stop - steps.first)
            if stays:
                self._kept.append(
                    _Steps(steps.first, step, steps.seconds * stays, steps.data_seconds * stays)
                )
            self._repeated += steps.stop - max(step, steps.first)
            self._uses["repeated steps"] += steps.seconds * (1 - stays)


def goodput_of(run_folder: Path) -> Goodput | None:
    """The same of a run's folder."""
    return goodput(read_events(run_folder / EVENTS_FILE))


def _began(start: Event) -> float:
    """When the process of a `start` began."""
    return float(start.get("process_started_unix_seconds", start["unix_seconds"]))
