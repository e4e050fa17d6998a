"""The HTTP interface: OpenAI's chat completions, a page, health and metrics."""

import asyncio
import base64
import hashlib
import hmac
import importlib.resources
import logging
import re
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megavlm.serve.answers import Completion
from megavlm.serve.chat import Asked, Reader, no_model
from megavlm.serve.engine_thread import EngineThread
from megavlm.serve.limits import MIB, ServeLimits
from megavlm.serve.metrics import Metrics
from megavlm.serve.refusals import GONE, SHUTTING_DOWN, Refusal, out_of_time
from megavlm.serve.threads import Threads

log = logging.getLogger("megavlm.serve")

DECODERS = 2
"""Threads that decode pictures; each may hold some hundred MiB of one, for seconds."""
CHAT = "/v1/chat/completions"
PATHS = ("/", "/health", "/metrics", "/v1/models", CHAT)

Result = TypeVar("Result")


class Service:
    """Answers requests of HTTP with one engine."""

    def __init__(
        self,
        engine: EngineThread,
        metrics: Metrics,
        limits: ServeLimits,
        *,
        model_name: str,
        api_key: str | None,
    ) -> None:
        """api_key: that every request to /v1 must show, if there is one."""
        self.engine = engine
        self.model_name = model_name
        self.in_hand = 0
        """Chats that have come whole and are not answered yet."""
        self._metrics, self._limits = metrics, limits
        self._api_key = api_key
        self._is_draining = False
        self._held_bytes = 0
        """Of bodies that are being read, or whose pictures wait to be."""
        self._reading: set[asyncio.Timeout] = set()
        """How long each chat may be read."""
        self._started_at = int(time.time())
        # Parsing holds the interpreter's lock, so that more than one would gain nothing.
        self._parser, self._decoders = Threads(1, "parser"), Threads(DECODERS, "decoder")
        self._reader: Reader | None = None
        self.app: ASGIApp = _Outermost(self._routes(), metrics)

    def drain(self) -> None:
        """Take nothing new; what runs has `drain_seconds` left."""
        self._is_draining = True
        until = time.monotonic() + self._limits.drain_seconds
        self.engine.drain(until)
        for patience in self._reading:
            if not patience.expired():
                patience.reschedule(min(until, patience.when() or until))

    def close(self) -> bool:
        """End its threads, but for the engine's; whether they have ended."""
        return all([self._parser.close(), self._decoders.close()])

    def _routes(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        app.add_exception_handler(Refusal, _refused)
        app.add_exception_handler(HTTPException, _refused_by_routes)
        app.add_exception_handler(Exception, _failed)
        v1 = APIRouter(prefix="/v1", dependencies=[Depends(self._check_key)])
        v1.add_api_route("/models", self._models, response_model=None)
        v1.add_api_route("/models/{name:path}", self._model, response_model=None)
        v1.add_api_route("/chat/completions", self._chat, methods=["POST"], response_model=None)
        app.include_router(v1)
        page = _page()

        async def show_page() -> Response:
            return page

        app.add_api_route("/", show_page, response_model=None)
        app.add_api_route("/health", self._health, response_model=None)
        app.add_api_route("/metrics", self._counts, response_model=None)
        return app

    async def _check_key(self, request: Request) -> None:
        if self._api_key is None:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(key.strip().encode(), self._api_key.encode())
        if kind.lower() != "bearer" or not is_right:
            raise Refusal(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )

    async def _health(self) -> Response:
        if self._is_draining:
            return JSONResponse({"status": "draining"}, 503)
        if self.engine.loaded is None:
            return JSONResponse({"status": "loading"}, 503)
        return JSONResponse({"status": "ok"})

    async def _counts(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._told_of_model()]})

    async def _model(self, name: str) -> Response:
        if name != self.model_name:
            raise no_model(name, self.model_name)
        return JSONResponse(self._told_of_model())

    def _told_of_model(self) -> dict[str, str | int]:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "megavlm",
        }

    async def _chat(self, request: Request) -> Response:
        with ExitStack() as leaving:  # when all is sent, or nobody is there any more
            asked, asked_at = await self._read(request, leaving)
            answer = self.engine.ask(asked.request, asked_at)
            leaving.callback(self.engine.cancel, answer)
            await _unless_gone(request, answer.begun())
            completion = Completion(answer, self.model_name)
            if asked.is_streamed:
                events = completion.events(with_usage=asked.with_usage)
                return _Stream(events, leaving.pop_all())
            return JSONResponse(await _unless_gone(request, completion.whole()))

    async def _read(self, request: Request, leaving: ExitStack) -> tuple[Asked, float]:
        """A chat, and when it was there on the clock `time.monotonic`."""
        self._check_room()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which browsers do not let other sites send
            raise Refusal(415, "the content type must be application/json")
        body = bytearray()
        size = 0
        try:
            await self._receive(request, body)
            size = len(body)
            reader = self._check_room()
            leaving.enter_context(self._counted())
            asked_at = time.monotonic()
            async with self._in_time(asked_at):
                return await _unless_gone(request, self._parse(reader, body)), asked_at
        finally:
            self._held_bytes -= size or len(body)

    async def _parse(self, reader: Reader, body: bytearray) -> Asked:
        asked = await self._parser.run(partial(reader.read, body))
        body.clear()  # what is held from here on is the pictures in it
        pixels = [await self._decoders.run(partial(reader.decode, p)) for p in asked.pictures]
        return replace(asked, request=replace(asked.request, pixels=tuple(pixels)), pictures=())

    @asynccontextmanager
    async def _in_time(self, asked_at: float) -> AsyncIterator[None]:
        """As long as a request has from `asked_at`, or a server that ends; raises Refusal."""
        seconds = self._limits.request_seconds
        try:
            async with asyncio.timeout_at(asked_at + seconds) as patience:
                self._reading.add(patience)
                try:
                    yield
                finally:
                    self._reading.remove(patience)
        except TimeoutError:
            if self._is_draining:
                raise Refusal(503, SHUTTING_DOWN, code="shutting_down") from None
            raise out_of_time(seconds) from None

    def _check_room(self) -> Reader:
        if self._is_draining:
            raise Refusal(503, SHUTTING_DOWN, code="shutting_down")
        if self.engine.loaded is None:
            raise Refusal(503, "the model is being loaded; ask again later", code="loading")
        if self.in_hand >= self._limits.rows + self._limits.queue:
            raise Refusal(429, "too many requests wait; ask again later", code="queue_full")
        if self._reader is None:
            model, tokenizer = self.engine.loaded
            side = model.sizes.encoder.image_pixels
            self._reader = Reader(tokenizer, side, self.model_name, self._limits)
        return self._reader

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.in_hand += 1
        try:
            yield
        finally:
            self.in_hand -= 1

    async def _receive(self, request: Request, body: bytearray) -> None:
        """Fill the body, within limits of size and time."""
        most = self._limits.body_mib * MIB
        declared = request.headers.get("content-length", "")
        too_large = Refusal(
            413, f"the body exceeds the limit of {self._limits.body_mib} MiB", code="body_too_large"
        )
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        seconds = self._limits.receive_seconds
        try:
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    if len(body) + len(part) > most:
                        raise too_large
                    if self._held_bytes + len(part) > self._limits.bodies_mib * MIB:
                        raise Refusal(
                            429, "too much is being received; ask again later", code="queue_full"
                        )
                    body += part
                    self._held_bytes += len(part)
        except TimeoutError:
            says = f"the body was not there within {seconds} seconds"
            raise Refusal(408, says, code="body_too_slow") from None
        except ClientDisconnect:
            raise Refusal(GONE, "the client went away") from None


class _Stream(StreamingResponse):
    """Server-sent events; `leaving` is closed when they are sent, or cannot be."""

    def __init__(self, events: AsyncIterator[str], leaving: ExitStack) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._leaving = leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._leaving:
            await super().__call__(scope, receive, send)


class _Outermost:
    """Counts responses, and lets no exception out, whose words would be logged."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        try:
            await self._app(scope, receive, counting)
        except Exception as error:
            places = "".join(traceback.format_tb(error.__traceback__))
            log.error("a request to %s failed (%s):\n%s", path, type(error).__name__, places)


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Wait for something as long as the client does; raises Refusal when it goes away."""
    working = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal(GONE, "the client went away")
        return working.result()
    finally:
        working.cancel()
        waiting.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body, error.status, error.headers)


async def _refused_by_routes(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    says = f"there is no such path; see {', '.join(PATHS)}"
    if error.status_code == 405:
        says = f"{request.method} is not what this path takes"
    response = await _refused(request, Refusal(error.status_code, says))
    response.headers.update(error.headers or {})
    return response


async def _failed(request: Request, _: Exception) -> Response:
    return await _refused(request, Refusal(500, "the server failed; its log says where"))


def _page() -> Response:
    """The page, which may do nothing but run its own script and talk to this server."""
    html = (importlib.resources.files("megavlm.serve") / "page.html").read_text()
    [script], [style] = (
        re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL) for tag in ("script", "style")
    )
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "img-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


def _hash(inline: str) -> str:
    digest = hashlib.sha256(inline.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
