"""One engine on several ranks, that hold a model together: one is asked, the others follow it.

Before each step the first rank tells the others what was asked of it since the last one, and all
step. What goes wrong on one rank leaves the others in the middle of a collective, from which there
is no way back on a GPU: then all of them end.
"""

import logging
import os
import signal
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch import distributed as dist

from megavlm.dist.groups import rank, world_size
from megavlm.errors import MegavlmError, RanksError
from megavlm.infer.engine import Engine, Event
from megavlm.infer.pictures import Pictures
from megavlm.infer.prompts import Request

log = logging.getLogger("megavlm.infer")

ENDLESS = timedelta(days=365)
"""Followers wait inside a broadcast for as long as nobody asks. Over gloo that costs nothing, on
GPUs too, and no watchdog minds, as NCCL's would; that the others live is what the beats are for."""
BEAT_SECONDS = 1.0
SILENCE = timedelta(seconds=60)
"""After which a rank counts as lost that says nothing: its host is gone, say. One that has ended is
missed at the next beat."""
FAILED = 1


class LeadingEngine:
    """The first rank's engine, which the others follow; used as an `Engine` is."""

    def __init__(self, engine: Engine) -> None:
        """Collective: the others call `follow`."""
        self._engine = engine
        self._orders = _Orders()
        self._calls: list[Request | int] = []
        self._events: list[Event] = []

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return self._engine.running

    @property
    def waiting(self) -> int:
        """Requests that there is no room for yet."""
        return self._engine.waiting

    @property
    def pictures(self) -> Pictures:
        """This rank's."""
        return self._engine.pictures

    def add(self, request: Request) -> int:
        """As of `Engine`; of a request that is refused the others never hear."""
        number = self._engine.add(request)
        self._calls.append(request)
        return number

    def cancel(self, request: int) -> None:
        """As of `Engine`."""
        self._engine.cancel(request)
        self._calls.append(request)

    def step(self) -> list[Event]:
        """As of `Engine`, on all ranks."""
        self._orders.send(_Order(self._calls, _checksum(self._events)))
        self._calls = []
        self._events = self._engine.step()
        return self._events

    def stop(self) -> None:
        """The others return from `follow`."""
        self._orders.send(None)


@contextmanager
def leading(engine: Engine, lost: Callable[[RanksError], None]) -> Iterator[LeadingEngine]:
    """Lead the other ranks, which `follow`, until the body ends; collective.

    lost: is told, in another thread, that a rank is lost; the body may be held in a collective for
    good by then. Whatever the body raises becomes a RanksError: the ranks are at different places
    then, and this process is to end, which ends the others.
    """
    watch = None
    try:
        dist.barrier()  # they load at different speeds, for which `SILENCE` is too short
        leader = LeadingEngine(engine)
        watch = _Watch(lost)
        yield leader
        if watch.lost is None:
            leader.stop()
            watch.end()
    except Exception as error:
        # What a collective says of a lost rank says less than the watch will.
        lost_rank = watch.last_look() if watch else None
        if lost_rank is None:
            raise RanksError(
                f"the engine failed on rank 0 ({type(error).__name__}), from which ranks do not "
                "start anew together; start all of them again"
            ) from error
        raise lost_rank from None
    if watch.lost:
        raise watch.lost


def follow(engine: Engine) -> None:
    """Make the calls of the first rank's engine until it stops; collective.

    From when all ranks have met, SIGTERM and SIGINT are for the first to obey. The process ends,
    with code 1, if an error comes up, or if the first rank has ended.
    """
    watch = None
    try:
        dist.barrier()
        # Before the groups are made, so that no follower ends while the first rank serves.
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, signal.SIG_IGN)
        orders = _Orders()
        watch = _Watch(lambda _: os._exit(FAILED))
        events: list[Event] = []
        while order := orders.receive():
            if order.checksum != _checksum(events):
                raise RanksError(
                    f"rank {rank()} wrote other tokens than rank 0; do all run on equal devices?"
                )
            for call in order.calls:
                engine.add(call) if isinstance(call, Request) else engine.cancel(call)
            events = engine.step()
        watch.end()
    except Exception as error:
        if watch:
            watch.last_look()  # which ends this process, if it is the end of rank 0
        # Without the error's own words: they might quote what was asked.
        places = "".join(traceback.format_tb(error.__traceback__))
        says = f"the engine failed ({type(error).__name__}):\n{places}"
        log.error("rank %d: %s", rank(), error if isinstance(error, MegavlmError) else says)
        os._exit(FAILED)


class _Order(NamedTuple):
    """A step."""

    calls: Sequence[Request | int]
    """Before it: requests to add, and numbers of those to cancel."""
    checksum: int
    """Of the step before."""


class _Orders:
    """The way from the first rank to the others."""

    def __init__(self) -> None:
        self._group = _group(ENDLESS)

    def send(self, order: _Order | None) -> None:
        """None: there will be no more."""
        if order is None:
            self._broadcast(torch.tensor([0, 0, 0, 0, 0]))
            return
        pixels = [p for call in order.calls if isinstance(call, Request) for p in call.pixels]
        side = pixels[0].shape[-1] if pixels else 0
        head = [1, len(order.calls), len(pixels), side, order.checksum]
        self._broadcast(torch.tensor(head))
        if order.calls:
            self._broadcast_objects([_without_pixels(call) for call in order.calls])
        if pixels:
            self._broadcast(torch.stack(pixels))

    def receive(self) -> _Order | None:
        head = self._broadcast(torch.zeros(5, dtype=torch.int64))
        is_step, calls, pictures, side, checksum = head.tolist()
        if not is_step:
            return None
        packed = self._broadcast_objects([None] * calls) if calls else []
        pixels = iter(())
        if pictures:
            shape = pictures, 3, side, side
            pixels = iter(self._broadcast(torch.empty(shape, dtype=torch.uint8)))
        made = [
            replace(call[0], pixels=tuple(next(pixels) for _ in range(call[1])))
            if isinstance(call, tuple)
            else call
            for call in packed
        ]
        return _Order(made, checksum)

    def _broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, group_src=0, group=self._group)
        return tensor

    def _broadcast_objects(self, objects: list[Any]) -> list[Any]:
        """They travel pickled: both ends are ranks of this run."""
        dist.broadcast_object_list(objects, group_src=0, group=self._group)
        return objects


def _without_pixels(call: Request | int) -> tuple[Request, int] | int:
    """A request, and how many pictures go beside it, which pickle would copy several times."""
    return call if isinstance(call, int) else (replace(call, pixels=()), len(call.pixels))


def _group(timeout: timedelta) -> dist.ProcessGroup:
    """All ranks, over gloo; collective."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))


def _checksum(events: Sequence[Event]) -> int:
    return zlib.crc32(repr(events).encode())


class _Watch:
    """Beats between the first rank and each other, in a thread, whatever the engine is at."""

    def __init__(self, lose: Callable[[RanksError], None]) -> None:
        """Collective. lose: called in the thread once a rank is lost."""
        self.lost: RanksError | None = None
        self._lose = lose
        self._group = _group(SILENCE)
        self._is_over = False
        self._is_ending = threading.Event()
        beat = self._beat_first if rank() == 0 else self._beat_other
        self._thread = threading.Thread(target=beat, name="watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """No rank counts as lost any more; collective, and the first rank decides when."""
        self._is_ending.set()
        self._thread.join()

    def last_look(self) -> RanksError | None:
        """Whether a rank is lost, or is by the next beats; later ones count for nothing."""
        self._thread.join(3 * BEAT_SECONDS)
        self._is_over = True
        return self.lost

    def _beat_first(self) -> None:
        is_last = torch.zeros(1, dtype=torch.int64)
        while not is_last:
            is_last[0] = self._is_ending.wait(BEAT_SECONDS)
            for other in range(1, world_size()):
                with self._losing(other):
                    dist.recv(torch.zeros(1, dtype=torch.int64), other, group=self._group)
                    dist.send(is_last, other, group=self._group)
                if self.lost:
                    return

    def _beat_other(self) -> None:
        is_last = torch.zeros(1, dtype=torch.int64)
        while not (is_last or self.lost):
            time.sleep(BEAT_SECONDS)
            with self._losing(0):
                dist.send(is_last, 0, group=self._group)
                dist.recv(is_last, 0, group=self._group)

    @contextmanager
    def _losing(self, other: int) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except Exception:
            seconds = SILENCE.total_seconds()
            is_silent = time.monotonic() - began >= seconds
            how = f"has said nothing for {seconds:.0f} seconds" if is_silent else "has ended"
            self.lost = RanksError(
                f"rank {other} {how}, and the others cannot go on without it; see whether it "
                "printed why, and start all of them again"
            )
            if not self._is_over:
                self._lose(self.lost)
