"""What happened in each step: one JSON line, one TensorBoard point, a progress bar."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from megavlm.files.folder import Folder
from megavlm.redact import without_secrets
from megavlm.train.appended import Appended
from megavlm.train.events import Events
from megavlm.train.exporters import Sink

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Writes the metrics of a run on the rank where it is enabled, and is silent on the others.

    After a resume or a rollback, lines from steps that will be done again are dropped.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        steps: int,
        events: Events,
        sinks: Mapping[str, Sink],
        *,
        enabled: bool,
    ) -> None:
        """sinks: by name, take all that is recorded, too.

        Raises StorageError where it cannot be recorded.
        """
        self.events = events
        self._sinks = {"TensorBoard": self._to_tensorboard, **sinks}
        self._enabled = enabled
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._open(first_step)
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("steps", total=steps, completed=first_step, loss=0.0)

    def __enter__(self) -> "MetricsLog":
        if self._enabled:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._enabled:
            return
        self._progress.stop()
        self._close()

    def _open(self, first_step: int) -> None:
        kept = [line for line in read_metrics(self._folder) if _stays(line, first_step)]
        content = "".join(json.dumps(line) + "\n" for line in kept)
        Folder(self._folder).write_atomically(METRICS_FILE, content.encode())
        self._file = Appended(self._folder / METRICS_FILE)
        self._tensorboard = SummaryWriter(self._folder / "tensorboard", purge_step=first_step)

    def _close(self) -> None:
        try:
            self._tensorboard.close()
        except Exception as error:
            self.say(f"TensorBoard's file is not complete: {error}")

    def go_back(self, step: int) -> None:
        """Steps from this one on will be done again."""
        if self._enabled:
            self._close()
            self._open(step)
            self._progress.update(self._task, completed=step)

    def step(self, values: dict[str, Any], *, say: bool) -> None:
        """Record a finished training step, and print it if told to."""
        if not self._enabled:
            return
        self.record(values)
        done = values["step"] + 1
        self._progress.update(self._task, completed=done, loss=values["loss"])
        if say:
            self.say(
                f"step {done}  loss {values['loss']:.4f}  "
                f"gradient norm {values['gradient_norm']:.3f}  "
                f"learning rate {values['learning_rate']:.2e}  "
                f"{values['samples_per_second']:.1f} samples/s"
            )

    def record(self, values: dict[str, Any]) -> None:
        """Record figures of a step."""
        if not self._enabled:
            return
        # JSON has no NaN.
        values = {name: None if _is_nonfinite(value) else value for name, value in values.items()}
        line = json.dumps({**values, "unix_seconds": time.time()})
        self._file.write(f"{line}\n".encode())
        for name, sink in [*self._sinks.items()]:
            try:
                sink(values)
            except Exception as error:  # of whatever they are, none is worth a run
                del self._sinks[name]
                self.say(f"{name} gets no more figures of this run: {error!r}")

    def _to_tensorboard(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and name not in ("step", "last"):
                self._tensorboard.add_scalar(name, value, values["step"])

    def say(self, message: str) -> None:
        """Print a line without disturbing the progress bar."""
        if self._enabled:
            self._console.print(without_secrets(message), highlight=False, soft_wrap=True)


def _is_nonfinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _stays(line: dict[str, Any], first_step: int) -> bool:
    """Whether a line is not measured again: the held-out loss at a step's end comes before it."""
    return line["step"] < first_step or (line["step"] == first_step and line.get("last", False))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All metrics lines of a run folder; empty when there are none. A torn last line is dropped."""
    path = folder / METRICS_FILE
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines
