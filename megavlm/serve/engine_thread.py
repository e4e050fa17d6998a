"""The thread that owns the engine; requests come and answers go by way of the event loop."""

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from megavlm.data.tokenizer import Tokenizer
from megavlm.dist.groups import world_size
from megavlm.errors import RanksError, RequestError
from megavlm.infer.engine import Engine, Event, Finish, Limits
from megavlm.infer.following import leading
from megavlm.infer.prompts import Request
from megavlm.infer.texts import GrowingText
from megavlm.model.vlm import VisionLanguageModel
from megavlm.serve.limits import ServeLimits
from megavlm.serve.metrics import Metrics
from megavlm.serve.refusals import SHUTTING_DOWN, Refusal, out_of_time

log = logging.getLogger("megavlm.serve")

Loaded = tuple[VisionLanguageModel, Tokenizer]


class Answer:
    """An answer that grows, as the event loop sees it.

    What a slow reader has not fetched yet gathers here, which is at most the whole answer; nobody
    waits for it.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = 0
        """So far."""
        self.finish: Finish | None = None
        self._refusal: Refusal | None = None
        self._text = ""
        self._news = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self.finish is not None or self._refusal is not None

    async def begun(self) -> None:
        """Return when there is something to read; raises Refusal."""
        await self._news.wait()
        if self._refusal:
            raise self._refusal

    async def pieces(self) -> AsyncIterator[str]:
        """Its text, in order; raises Refusal."""
        while True:
            await self._news.wait()
            self._news.clear()
            text, self._text = self._text, ""
            if text:
                yield text
            if self._refusal:
                raise self._refusal
            # Anything new while this was read has set the event again.
            if self.finish and not self._text:
                return

    def take(self, update: "Update") -> None:
        """In the event loop."""
        self._text += update.text
        self.tokens += update.tokens
        self.finish = update.finish
        self._refusal = update.refusal
        self._news.set()


class Update(NamedTuple):
    """What is new of an answer."""

    text: str = ""
    tokens: int = 0
    finish: Finish | None = None
    refusal: Refusal | None = None


@dataclass
class _Asked:
    """An answer as the engine's thread sees it."""

    answer: Answer
    text: GrowingText
    asked_at: float
    deadline: float
    """Both on the clock `time.monotonic`."""
    told_at: float = 0.0
    """When the newest token came; 0: none yet."""


class EngineThread:
    """Loads a model and steps its engine, until it is told to stop."""

    def __init__(
        self,
        load: Callable[[], AbstractContextManager[Loaded]],
        limits: ServeLimits,
        metrics: Metrics,
        *,
        compiled: bool = False,
    ) -> None:
        """load: the model, within its process groups; it is called in the thread."""
        self._started = partial(started, limits=limits, compiled=compiled)
        self.loaded: Loaded | None = None
        """When the server may be asked."""
        self.failure: BaseException | None = None
        """What has ended the thread before it was told to stop."""
        self._load, self._limits, self._metrics = load, limits, metrics
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._asked: dict[int, _Asked] = {}
        """By the engine's numbers."""
        self._drained_at = math.inf
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Load the model; all methods are to be called in this loop."""
        self._loop = loop
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether it has ended, with `failure` or as it was told, or never will."""
        if isinstance(self.failure, RanksError):
            return True
        return self._loop is not None and not self._thread.is_alive()

    def ask(self, request: Request, asked_at: float) -> Answer:
        """Queue a request; `asked_at` is when it came, on the clock `time.monotonic`."""
        answer = Answer(request)
        self._inbox.put(partial(self._add, answer, asked_at))
        return answer

    def cancel(self, answer: Answer) -> None:
        """Nobody waits for it any more; if it is over, this does nothing."""
        if not answer.is_over:
            self._metrics.cancelled.inc()
            self._inbox.put(partial(self._forget, answer))

    def drain(self, until: float) -> None:
        """Whatever is not over by then ends, on the clock `time.monotonic`."""
        self._drained_at = until

    def stop(self, patience_seconds: float) -> bool:
        """End the thread, and wait for it so long; whether it has ended.

        While it loads the model, or may wait for a lost rank, there is nothing to wait for.
        """
        self._inbox.put(self._stop)
        if self.loaded and not self.failure:
            self._thread.join(patience_seconds)
        return not self._thread.is_alive()

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            with self._load() as loaded:
                self._answer_all(loaded)
        except BaseException as error:
            self.failure = error
        self.loaded = None
        self._refuse_all(Refusal(503, SHUTTING_DOWN, code="shutting_down"))

    def _stop(self) -> None:
        self._is_stopping = True

    def _lose(self, error: RanksError) -> None:
        """In the watch's thread: this one may wait for the lost rank for good."""
        self.failure = error
        self._inbox.put(self._stop)
        self._refuse_all(_engine_failed())

    def _answer_all(self, loaded: Loaded) -> None:
        model, self._tokenizer = loaded
        if world_size() > 1:
            self._answer_together(loaded)
        while not self._is_stopping:
            self._engine = self._started(model)
            self.loaded = loaded
            try:
                self._step_on()
            except Exception as error:
                self._refuse_failed(error, "starts anew")
                del self._engine  # its caches go before there are new ones

    def _answer_together(self, loaded: Loaded) -> None:
        """As one of several ranks; raises RanksError."""
        engine = self._started(loaded[0])
        try:
            with leading(engine, self._lose) as self._engine:
                self.loaded = loaded
                self._step_on()
        except RanksError as error:
            self._refuse_failed(error.__cause__, "ends")
            raise

    def _refuse_failed(self, error: BaseException | None, then: str) -> None:
        if error:
            # Without the error's own words: they might quote what was asked.
            places = "".join(traceback.format_tb(error.__traceback__))
            log.error("the engine failed (%s) and %s:\n%s", type(error).__name__, then, places)
        self._refuse_all(_engine_failed())

    def _step_on(self) -> None:
        while not self._is_stopping:
            engine = self._engine
            self._metrics.running.set(engine.running)
            self._metrics.waiting.set(engine.waiting)
            if not (engine.running or engine.waiting):
                self._inbox.get()()
            with contextlib.suppress(queue.Empty):
                while True:
                    self._inbox.get_nowait()()
            self._end_late()
            if engine.running or engine.waiting:
                self._step()

    def _step(self) -> None:
        pictures = self._engine.pictures
        encoded, reused = pictures.encoded, pictures.reused
        events = self._engine.step()
        self._metrics.pictures_encoded.inc(pictures.encoded - encoded)
        self._metrics.pictures_reused.inc(pictures.reused - reused)
        now = time.monotonic()
        self._tell([self._heard(event, now) for event in events])

    def _heard(self, event: Event, now: float) -> tuple[Answer, Update]:
        asked = self._asked[event.request]
        if not asked.told_at:
            self._metrics.first_token.observe(now - asked.asked_at)
            self._metrics.prompt_tokens.inc(len(asked.answer.request.prompt.tokens))
        elif event.token is not None:
            self._metrics.next_token.observe(now - asked.told_at)
        asked.told_at = now
        piece, finish = "", event.finish
        if event.token is not None:
            self._metrics.generated_tokens.inc()
            piece = asked.text.add(event.token)
        if asked.text.stopped:
            if finish is None:
                self._engine.cancel(event.request)
            finish = "stop"
        elif finish:
            piece += asked.text.end()
        if finish:
            del self._asked[event.request]
        return asked.answer, Update(piece, int(event.token is not None), finish)

    def _add(self, answer: Answer, asked_at: float) -> None:
        request = answer.request
        try:
            number = self._engine.add(request)
        except RequestError as error:
            self._tell([(answer, Update(refusal=Refusal(400, str(error))))])
            return
        text = GrowingText(self._tokenizer, request.stop)
        deadline = asked_at + self._limits.request_seconds
        self._asked[number] = _Asked(answer, text, asked_at, deadline)

    def _forget(self, answer: Answer) -> None:
        for number in [n for n, asked in self._asked.items() if asked.answer is answer]:
            self._engine.cancel(number)
            del self._asked[number]

    def _end_late(self) -> None:
        """End what has had its time: with what there is, or with a refusal if there is nothing."""
        now = time.monotonic()
        late = [n for n, a in self._asked.items() if now > min(a.deadline, self._drained_at)]
        for number in late:
            asked = self._asked.pop(number)
            self._engine.cancel(number)
            if asked.told_at:
                update = Update(asked.text.end(), finish="length")
            elif now > asked.deadline:
                update = Update(refusal=out_of_time(self._limits.request_seconds))
            else:
                update = Update(refusal=Refusal(503, SHUTTING_DOWN, code="shutting_down"))
            self._tell([(asked.answer, update)])

    def _refuse_all(self, refusal: Refusal) -> None:
        all_asked = [*self._asked.values()]
        self._tell([(asked.answer, Update(refusal=refusal)) for asked in all_asked])
        self._asked.clear()

    def _tell(self, updates: list[tuple[Answer, Update]]) -> None:
        def take() -> None:
            for answer, update in updates:
                answer.take(update)

        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(take)


def started(model: VisionLanguageModel, limits: ServeLimits, *, compiled: bool) -> Engine:
    """The engine of a server, which every rank that holds the model makes alike."""
    room = Limits(rows=limits.rows, tokens=limits.tokens, pictures=limits.pictures)
    engine = Engine(model, room, compiled=compiled)
    if compiled:
        engine.warm_up()
    return engine


def _engine_failed() -> Refusal:
    return Refusal(500, "the engine failed; ask again", code="engine_failed")
