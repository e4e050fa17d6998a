"""Runs the service under uvicorn, with bounds on slow clients and an orderly end."""

import asyncio
import ipaddress
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from megavlm.config.plan import Plan
from megavlm.dist.groups import rank
from megavlm.errors import ConfigError, LaunchError, RanksError
from megavlm.infer.following import follow
from megavlm.infer.load import trained
from megavlm.infer.quantize import Quantization
from megavlm.serve.app import Service
from megavlm.serve.engine_thread import EngineThread, Loaded, started
from megavlm.serve.limits import ServeLimits
from megavlm.serve.metrics import Metrics
from megavlm.serve.refusals import Refusal
from megavlm.terminal import tell

KEEP_ALIVE_SECONDS = 30
"""That an idle connection is kept."""
HEAD_BYTES = 16 * 1024
"""Of a request's line and headers."""
GRACE_SECONDS = 5
"""In which the service's own answer to a late client comes first."""
CLOSING_SECONDS = 5
"""In which connections are closed at the end."""
BACKLOG = 1_024
KEY_VARIABLE = "MEGAVLM_API_KEY"


def serve_run(
    plan: Plan,
    limits: ServeLimits,
    *,
    quantization: Quantization | None = None,
    compiled: bool = False,
    host: str,
    port: int,
    **names: Any,
) -> None:
    """Serve the newest checkpoint of a run; see `serve`.

    Of several ranks, which hold the model together, the first serves.
    """
    load = partial(trained, plan, quantization)
    if rank() > 0:
        with load() as (model, _):
            follow(started(model, limits, compiled=compiled))
        return
    serve(load, limits, bound(host, port), compiled=compiled, **names)


def serve(
    load: Callable[[], AbstractContextManager[Loaded]],
    limits: ServeLimits,
    listener: socket.socket,
    *,
    compiled: bool = False,
    model_name: str,
    api_key: str | None,
) -> None:
    """Serve a model until SIGTERM or SIGINT; raises what stops its engine before.

    The process ends here if a thread cannot: one that loads, decodes, or waits for a lost rank.
    """
    metrics = Metrics()
    engine = EngineThread(load, limits, metrics, compiled=compiled)
    service = Service(engine, metrics, limits, model_name=model_name, api_key=api_key)
    config = uvicorn.Config(
        service.app,
        http=cast(Any, partial(_Connection, limits)),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    server = _Server(config, service, limits)
    host, port, *_ = listener.getsockname()
    where = f"[{host}]" if ":" in host else host
    compiling = ", and compiling it for some minutes" if compiled else ""
    tell(f"http://{where}:{port} is open; loading {model_name}{compiling}")
    if api_key is None and not ipaddress.ip_address(host).is_loopback:
        tell(f"there is no API key: whoever reaches {host} may ask (--api-key-file)")
    try:
        server.run(sockets=[listener])
    finally:
        has_ended = all([engine.stop(CLOSING_SECONDS), service.close()])
    if isinstance(engine.failure, RanksError):
        tell(f"error: {engine.failure}")
        os._exit(1)  # other ranks may hold up an orderly end, and miss this one when it is gone
    if engine.failure:
        raise engine.failure
    if not has_ended:
        os._exit(0)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens; raises LaunchError."""
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        # create_server adds words of its own to those of the system.
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        raise LaunchError(
            f"cannot listen on --host {host} --port {port}: {reason}; choose others"
        ) from error


def read_key(path: Path | None) -> str | None:
    """The API key: of a file, else of the environment, else none. Raises ConfigError."""
    if path is None:
        source, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
        if key is None:
            return None
    else:
        source = f"--api-key-file {path}"
        try:
            key = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ConfigError(f"cannot read {source}: {reason}") from error
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{source} must hold one key, of printable ASCII without spaces")
    return key


class _Server(uvicorn.Server):
    """uvicorn, which on the first signal keeps listening, to refuse, until answers are done."""

    def __init__(self, config: uvicorn.Config, service: Service, limits: ServeLimits) -> None:
        super().__init__(config)
        self._service, self._limits = service, limits
        self._drained_at: float | None = None
        """On the clock `time.monotonic`."""
        self._is_ready = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.engine.start(asyncio.get_running_loop())
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drained_at is not None:
            self.should_exit = self.force_exit = True
            return
        seconds = self._limits.drain_seconds
        self._drained_at = time.monotonic() + seconds + CLOSING_SECONDS
        self._service.drain()
        name = signal.Signals(sig).name
        tell(f"{name}: {self._service.in_hand} answers have {seconds} seconds left")

    async def on_tick(self, counter: int) -> bool:
        engine = self._service.engine
        if not self._is_ready and engine.loaded is not None:
            self._is_ready = True
            tell(f"{self._service.model_name} is ready")
        is_drained = self._drained_at is not None and (
            self._service.in_hand == 0 or time.monotonic() > self._drained_at
        )
        return await super().on_tick(counter) or is_drained or engine.is_over


class _Connection(H11Protocol):
    """A connection on which clients may not take as long as they like."""

    def __init__(self, limits: ServeLimits, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = limits
        self._receiving: asyncio.TimerHandle | None = None
        """While a request is on its way."""
        self._sending: asyncio.TimerHandle | None = None
        """While the client takes no bytes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            refusal = Refusal(503, "too many connections; ask again later", code="overloaded")
            self._refuse(refusal)
            return
        self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._receiving = _cancelled(self._receiving)
        self._sending = _cancelled(self._sending)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_request()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._refuse(Refusal(400, msg, code="invalid_http"))
        else:  # an answer is on its way, and nothing can be told in its middle
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        seconds = self._limits.send_seconds
        self._sending = self._sending or self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._sending = _cancelled(self._sending)

    def _watch_request(self) -> None:
        """Bound the time from a request's first byte, or the connection's start, to its last."""
        state = self.conn.their_state
        is_idle = self.timeout_keep_alive_task is not None
        if state is h11.SEND_BODY or (state is h11.IDLE and not is_idle):
            seconds = self._limits.receive_seconds + GRACE_SECONDS
            self._receiving = self._receiving or self.loop.call_later(seconds, self.transport.abort)
        else:
            self._receiving = _cancelled(self._receiving)

    def _refuse(self, refusal: Refusal) -> None:
        content = json.dumps(refusal.body).encode()
        head = (
            f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        self.transport.close()


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
