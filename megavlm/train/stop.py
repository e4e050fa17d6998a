"""Signals that end a run in good order: all ranks save the step that they are in."""

import os
import signal
import time
from collections.abc import Callable
from threading import Thread
from typing import Any

from megavlm.dist import groups
from megavlm.errors import StoppedError
from megavlm.terminal import tell

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SECONDS_APART = 5.0
"""Signals that come closer are one: launchers send SIGTERM several times, by several ways."""


class StopSignals:
    """From `listen` on a signal to any rank stops all of them, at the end of their step.

    Before, and after the context, it ends the process as usual: nothing would be lost. A thread
    hears it, since Python's own handlers wait while a collective hangs. A second signal ends the
    process at once.
    """

    def __init__(self, on_heard: Callable[[], None] = lambda: None) -> None:
        """on_heard: called, once, when this rank has heard a signal."""
        self._on_heard = on_heard

    def __enter__(self) -> "StopSignals":
        groups.Hand.raised, groups.Hand.seen_on_ranks = False, 0
        self._thread: Thread | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._heard: signal.Signals | None = None
        self._ended = False
        return self

    def listen(self) -> None:
        """Begin."""
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread = Thread(target=self._hear, args=(reading,), name="stop", daemon=True)
        self._thread.start()
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, lambda *_: None)

    def wanted(self) -> bool:
        """Whether the run is to stop, the same on all ranks."""
        return groups.Hand.seen_on_ranks > 0

    def end(self, steps_done: int) -> None:
        """Raise StoppedError: everything is saved."""
        self._ended = True
        raise StoppedError(
            f"stopped by a signal (on {groups.Hand.seen_on_ranks} of {groups.world_size()} ranks); "
            f"step {steps_done} is saved: run again to go on from it"
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        groups.Hand.raised, groups.Hand.seen_on_ranks = False, 0
        if self._thread is None:
            return
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            # What a launcher sends to a process that is about to end anyway changes its code.
            signal.signal(number, signal.SIG_IGN if self._ended else handler)
        os.write(self._writing, b"\0")
        self._thread.join()
        os.close(self._writing)
        if self._heard is not None and kind is None:  # too late for the last step
            signal.raise_signal(self._heard)

    def _hear(self, reading: int) -> None:
        heard_at = 0.0
        while (number := os.read(reading, 1)[0]) != 0:
            if number not in SIGNALS:
                continue
            name, now = signal.Signals(number).name, time.monotonic()
            if self._heard is None:
                self._heard, heard_at = signal.Signals(number), now
                groups.Hand.raised = True
                self._on_heard()
                if groups.local_rank() == 0:
                    tell(
                        f"rank {groups.rank()}: {name}: ends when this step is finished and "
                        "saved; a second signal ends at once"
                    )
            elif now - heard_at > SECONDS_APART and not self._ended:
                tell(
                    f"rank {groups.rank()}: a second signal, {name}: ended before the step is saved"
                )
                os._exit(128 + number)
        os.close(reading)
