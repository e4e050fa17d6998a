"""A server of a tiny random model, in a process of its own."""

import base64
import gc
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from megavlm.data.tokenizer import Tokenizer
from megavlm.dist.groups import process_groups
from megavlm.infer.engine import Engine
from megavlm.serve.chat import Asked, Reader
from megavlm.serve.limits import ServeLimits
from megavlm.serve.server import bound, serve
from tests.model.test_vlm import random_model

MODEL = "tiny"
START_SECONDS = 60


@dataclass
class Served:
    """A server that runs."""

    url: str
    process: int
    log: Path
    """What it has printed."""

    def post(self, body: Any, **headers: str) -> httpx.Response:
        """Ask for a chat completion; a str is sent as it is."""
        content = body if isinstance(body, str | bytes) else json.dumps(body)
        headers = {"content-type": "application/json", **headers}
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, content=content, headers=headers, timeout=60)

    def count(self, name: str) -> float:
        """One of its metrics, summed over labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        found = [line.rsplit(" ", 1) for line in lines if line.startswith(f"megavlm_{name}")]
        return sum(float(value) for key, value in found if key.split("{")[0] == f"megavlm_{name}")

    def wait_until(self, name: str, value: float) -> None:
        """Until a metric has this value."""
        deadline = time.monotonic() + 20
        while self.count(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.count(name)}, not {value}"
            time.sleep(0.02)

    def end(self, sig: int = signal.SIGTERM) -> int:
        """Signal it, and return its exit code."""
        os.kill(self.process, sig)
        return self.wait()

    def wait(self) -> int:
        deadline = time.monotonic() + 30
        while True:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                self.process = 0
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < deadline, "the server does not end"
            time.sleep(0.02)


@contextmanager
def serving(
    tokenizer: Path,
    folder: Path,
    *,
    key: str | None = None,
    before_step: Callable[[Engine], None] = lambda engine: None,
    load_seconds: float = 0,
    host: str = "127.0.0.1",
    **limits: int,
) -> Iterator[Served]:
    """Start it, forked from this process, and end it.

    load_seconds: that loading its model takes longer, of which nothing is waited for.
    """
    listener = bound(host, 0)
    log = folder / f"server-{listener.getsockname()[1]}.log"
    process = os.fork()
    if not process:
        _run(listener, tokenizer, log, key, before_step, load_seconds, ServeLimits(**limits))
    served = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", process, log)
    listener.close()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (load_seconds or _is_ready(served)):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield served
    finally:
        if served.process:
            os.kill(served.process, signal.SIGKILL)
            os.waitpid(served.process, 0)


def shown(encoded: bytes, kind: str = "png") -> dict[str, Any]:
    """A picture as a part of a message."""
    url = f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def words(text: str) -> dict[str, Any]:
    """Text as a part of a message."""
    return {"type": "text", "text": text}


def chat(*contents: Any, **settings: Any) -> dict[str, Any]:
    """A request: contents of users' and assistants' messages in turn."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return {"model": MODEL, "messages": messages, **settings}


def with_pixels(reader: Reader, body: bytes) -> Asked:
    """A chat, read as a server reads it."""
    asked = reader.read(body)
    pixels = tuple(reader.decode(picture) for picture in asked.pictures)
    return replace(asked, request=replace(asked.request, pixels=pixels), pictures=())


def _is_ready(served: Served) -> bool:
    return httpx.get(f"{served.url}/health").status_code == 200


def _run(
    listener: socket.socket,
    tokenizer: Path,
    log: Path,
    key: str | None,
    before_step: Callable[[Engine], None],
    load_seconds: float,
    limits: ServeLimits,
) -> None:
    code = 1
    try:
        gc.freeze()
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        logging.getLogger().handlers.clear()  # pytest's

        @contextmanager
        def load():
            time.sleep(load_seconds)
            with process_groups(1):
                yield random_model().eval(), Tokenizer(tokenizer)

        step = Engine.step

        def patched(engine):
            before_step(engine)
            return step(engine)

        Engine.step = patched
        serve(load, limits, listener, model_name=MODEL, api_key=key)
        threading._shutdown()  # as an interpreter ends
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def slowly(engine: Engine) -> None:
    """Before each step: so that answers take as long as those of a large model."""
    time.sleep(0.02)
