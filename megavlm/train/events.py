"""What happened to a run, from its first process to its last: RUN_FOLDER/events.jsonl.

The file only ever grows, whatever is done again: `goodput` counts what that costs.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from megavlm.errors import MegavlmError
from megavlm.redact import tree_without_secrets
from megavlm.train.appended import Appended

EVENTS_FILE = "events.jsonl"
STEPS_SECONDS = 10.0
"""Steps are written together, at least so often: what a crash leaves uncounted."""

Event = dict[str, Any]


class Events:
    """Writes the events of one process, on the rank where it is enabled."""

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self._path = folder / EVENTS_FILE
        self._file = Appended(self._path)
        self._enabled = enabled
        self._steps: Event | None = None
        self._steps_since = 0.0
        self._first_step_done = False
        self._stopped_by: str | None = None
        self.restarts = 0
        """Processes that have trained this run before."""

    def __enter__(self) -> "Events":
        if self._enabled:
            self.restarts = sum(event["event"] == "start" for event in read_events(self._path))
            self._end_torn_line()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.write("ended", how="done")
        else:
            # What others raise may quote what it likes; our own messages are made to be shown.
            message = {"message": str(error)} if isinstance(error, MegavlmError) else {}
            self.write("ended", how=kind.__name__, **message)

    def start(self, **fields: Any) -> None:
        """A process begins to train; its own start, imports included, is told beside."""
        process_started = psutil.Process().create_time()
        self.write(
            "start", restart=self.restarts, process_started_unix_seconds=process_started, **fields
        )

    def write(self, event: str, **fields: Any) -> None:
        """Add an event."""
        self._flush_steps()
        self._append({"event": event, **fields})

    def step_done(self, step: int, seconds: float, data_seconds: float) -> None:
        """A step that the weights have followed; `data_seconds` of it went by without a batch."""
        if not self._enabled:
            return
        if not self._first_step_done:
            self._first_step_done = True
            self._append({"event": "first_step_done", "step": step, "seconds": seconds})
        if self._steps is None:
            self._steps = {"first": step, "stop": step, "seconds": 0.0, "data_seconds": 0.0}
            self._steps_since = time.monotonic()
        self._steps["stop"] = step + 1
        self._steps["seconds"] += seconds
        self._steps["data_seconds"] += data_seconds
        if time.monotonic() - self._steps_since > STEPS_SECONDS:
            self._flush_steps()

    @contextmanager
    def timed(self, event: str, **fields: Any) -> Iterator[None]:
        """Add an event with the seconds that the body took, if it ends well."""
        self._flush_steps()
        started = time.perf_counter()
        yield
        self.write(event, seconds=time.perf_counter() - started, **fields)

    def _flush_steps(self) -> None:
        steps, self._steps = self._steps, None
        if steps is not None:
            self._append({"event": "steps", **steps})

    def _append(self, event: Event) -> None:
        if self._enabled:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps(tree_without_secrets({**event, "unix_seconds": time.time()}))
            self._file.write((line + "\n").encode())

    def _end_torn_line(self) -> None:
        """A crash in the middle of a line shall not cost the next one, too."""
        if self._path.is_file() and self._path.read_bytes()[-1:] not in (b"", b"\n"):
            with self._path.open("a") as file:
                file.write("\n")


def read_events(path: Path) -> list[Event]:
    """All events of a file, in order; none where there is no file. Torn lines are left out."""
    if not path.is_file():
        return []
    events: list[Event] = []
    for line in path.read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event and "unix_seconds" in event:
            events.append(event)
    return events
