"""Puts a running `megavlm serve` under load, with hostile clients among the good ones.

    python tools/load_serve.py http://127.0.0.1:8000 --clients 64 --seconds 120

First each of a few requests is asked alone; then many clients ask them all at once, half of them
streamed, and every answer must be the same. Meanwhile others send a byte now and then, break off
streams, and send broken pictures, broken JSON and bodies that are too large. At the end the server
must be idle and answer as before. Times say what this machine did, with the clients on it, too.

Exit code 1 if an answer was lost or another one, or the server is not as it was.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

QUESTIONS = ("Caption:", "Which colour?", "What is it?", "Say it.")
COLOURS = ("red", "green", "blue", "black", "white", "orange")
REQUESTS = 24
HOSTILE_CLIENTS = 12
WARM_SECONDS = 20
"""After which the server's memory should not grow any more."""
REQUEST_SECONDS = 300
"""After which an answer counts as lost."""


@dataclass
class Report:
    """What happened."""

    clients: int
    seconds: float = 0
    answers: int = 0
    streamed: int = 0
    different: int = 0
    """Answers that were not those to the same request alone."""
    lost: int = 0
    """Requests without an answer or a refusal."""
    refused: int = 0
    """429, after which the client asked again."""
    tokens: int = 0
    first_piece_seconds: list[float] = field(default_factory=list)
    """Of streamed answers: median and 95th percentile; empty: there was none."""
    hostile: dict[str, int] = field(default_factory=dict)
    """How often each misdeed ended in each way."""
    memory_mib: list[float] = field(default_factory=list)
    """The server's, once a second."""
    is_idle: bool = False
    answers_as_before: bool = False

    @property
    def is_good(self) -> bool:
        return bool(self.answers) and not (self.different or self.lost) and self.is_alive

    @property
    def is_alive(self) -> bool:
        return self.is_idle and self.answers_as_before

    def lines(self) -> list[str]:
        """In words."""
        pieces, memory = self.first_piece_seconds, self.memory_mib
        first_piece = memory_mib = "none"
        if pieces:
            first_piece = f"{pieces[0]:.2f} s (median), {pieces[1]:.2f} s (95th percentile)"
        if memory:
            warm = memory[min(WARM_SECONDS, len(memory) // 2)]
            memory_mib = (
                f"{memory[0]:.0f} at the start, {warm:.0f} when warm, {max(memory):.0f} at most, "
                f"{memory[-1]:.0f} at the end"
            )
        return [
            f"{self.clients} clients for {self.seconds:.0f} s: {self.answers} answers, "
            f"{self.streamed} of them streamed; {self.lost} lost, {self.different} other than "
            f"alone, {self.refused} times 429",
            f"{self.answers / self.seconds:.1f} answers/s, {self.tokens / self.seconds:.0f} "
            f"tokens/s; first piece after {first_piece}",
            f"memory of the server in MiB: {memory_mib}",
            f"hostile: {', '.join(f'{what} {n}' for what, n in sorted(self.hostile.items()))}",
            f"afterwards: {'idle' if self.is_idle else 'NOT IDLE'}, "
            f"{'answers as before' if self.answers_as_before else 'ANSWERS OTHERWISE'}",
        ]


def picture_url(colour: str, side: int) -> str:
    """A picture of one colour with a darker corner."""
    image = Image.new("RGB", (side, side), colour)
    image.paste((side, 60, 90), (0, 0, side // 3, side // 2))
    content = io.BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def requests_of(model: str) -> list[dict[str, Any]]:
    """Of one and two turns, with none to two pictures, half of them sampled."""
    chance = random.Random(1)
    made: list[dict[str, Any]] = []
    for number in range(REQUESTS):
        messages: list[dict[str, Any]] = []
        for turn in range(chance.randint(1, 2)):
            if turn:
                messages.append({"role": "assistant", "content": "yes"})
            urls = [picture_url(c, 40 + number) for c in chance.sample(COLOURS, number % 2)]
            parts: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": url}} for url in urls
            ]
            parts.append({"type": "text", "text": chance.choice(QUESTIONS)})
            messages.append({"role": "user", "content": parts})
        sampling = {"temperature": 1.2, "seed": number} if number % 3 else {"temperature": 0}
        length = {"max_tokens": chance.randint(4, 48)}
        made.append({"model": model, "messages": messages, **sampling, **length})
    return made


class Load:
    """One run of it."""

    def __init__(self, http: httpx.AsyncClient, report: Report) -> None:
        self.http, self.report = http, report
        self.until = 0.0
        self._first_pieces: list[float] = []
        self._requests: list[dict[str, Any]] = []
        self._expected: list[str] = []
        self._hostile: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        model = (await self.http.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        self._requests = requests_of(model)
        self._expected = [await self._whole(request) for request in self._requests]
        began = time.monotonic()
        self.until = began + seconds
        misdeeds = [*MISDEEDS] * -(-HOSTILE_CLIENTS // len(MISDEEDS))
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.report.clients):
                tasks.create_task(self._client(number))
            for misdeed in misdeeds[:HOSTILE_CLIENTS]:
                tasks.create_task(self._misbehave(misdeed))
            watching = tasks.create_task(self._watch())
        del watching
        self.report.seconds = time.monotonic() - began
        pieces = sorted(self._first_pieces)
        if pieces:
            p95 = pieces[int(len(pieces) * 0.95)]
            self.report.first_piece_seconds = [statistics.median(pieces), p95]
        self.report.hostile = dict(self._hostile)
        with _told("afterwards"):
            self.report.is_idle = await self._becomes_idle()
            again = [await self._whole(request) for request in self._requests]
            self.report.answers_as_before = again == self._expected

    async def _whole(self, request: dict[str, Any]) -> str:
        response = await self.http.post("/v1/chat/completions", json=request)
        content = _checked(response.status_code, response.content)
        self.report.tokens += content["usage"]["completion_tokens"] if self.until else 0
        return content["choices"][0]["message"]["content"]

    async def _streamed(self, request: dict[str, Any]) -> str:
        asked = {**request, "stream": True, "stream_options": {"include_usage": True}}
        began = time.monotonic()
        text, is_first, last = "", True, ""
        async with self.http.stream("POST", "/v1/chat/completions", json=asked) as response:
            if response.status_code != 200:
                _checked(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                if not line:
                    continue
                last = line.removeprefix("data: ")
                if last == "[DONE]":
                    continue
                content = _checked(200, last.encode())
                for choice in content["choices"]:
                    text += choice["delta"].get("content", "")
                self.report.tokens += (content.get("usage") or {}).get("completion_tokens", 0)
                if text and is_first:
                    is_first = False
                    self._first_pieces.append(time.monotonic() - began)
        if last != "[DONE]":
            raise LostError("a stream broke off")
        return text

    async def _client(self, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < self.until:
            at = chance.randrange(len(self._requests))
            is_streamed = chance.random() < 0.5
            ask = self._streamed if is_streamed else self._whole
            try:
                answer = await ask(self._requests[at])
            except RefusedError:
                self.report.refused += 1
                await asyncio.sleep(1)
                continue
            except (httpx.HTTPError, LostError) as error:
                self.report.lost += 1
                print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            self.report.answers += 1
            self.report.streamed += is_streamed
            self.report.different += answer != self._expected[at]

    async def _misbehave(self, misdeed: "Misdeed") -> None:
        while time.monotonic() < self.until:
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + 60):
                    ended = await misdeed(self)
            except (OSError, httpx.HTTPError, TimeoutError) as error:
                ended = type(error).__name__
            self._hostile[f"{misdeed.__name__}: {ended}"] += 1
            await asyncio.sleep(0.2)

    async def _watch(self) -> None:
        while time.monotonic() < self.until:
            with _told("memory"):
                self.report.memory_mib.append((await self._metric(MEMORY)) / 2**20)
            await asyncio.sleep(1)

    async def _becomes_idle(self) -> bool:
        for _ in range(100):
            running, waiting = [
                await self._metric(f"megavlm_{name}_requests") for name in ("running", "waiting")
            ]
            if not running and not waiting:
                return True
            await asyncio.sleep(0.1)
        return False

    async def _metric(self, name: str) -> float:
        lines = (await self.http.get("/metrics")).text.splitlines()
        for line in lines:
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        raise LostError(f"there is no {name}")

    @contextlib.asynccontextmanager
    async def _raw(self):
        """A bare connection."""
        url = self.http.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    # Misdeeds; each says how it ended.

    async def slow_head(self) -> str:
        async with self._raw() as (reader, writer):
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx: ")
            return await self._dribble(reader, writer)

    async def slow_body(self) -> str:
        async with self._raw() as (reader, writer):
            writer.write(self._head(b"content-length: 1000000\r\n") + b'{"model": "')
            return await self._dribble(reader, writer)

    async def cancelled_stream(self) -> str:
        asked = {**random.choice(self._requests), "stream": True, "max_tokens": 200}
        async with self.http.stream("POST", "/v1/chat/completions", json=asked) as response:
            async for line in response.aiter_lines():
                if '"content":"' in line and '"content":""' not in line:
                    break
            return str(response.status_code)

    async def broken_picture(self) -> str:
        junk = base64.b64encode(b"\x89PNG\r\n\x1a\n" + os.urandom(50_000)).decode()
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{junk}"}}
        asked = {**self._requests[0], "messages": [{"role": "user", "content": [part]}]}
        return str((await self.http.post("/v1/chat/completions", json=asked)).status_code)

    async def bomb_picture(self) -> str:
        content = io.BytesIO()
        await asyncio.to_thread(Image.new("1", (20_000, 20_000)).save, content, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
        part = {"type": "image_url", "image_url": {"url": url}}
        asked = {**self._requests[0], "messages": [{"role": "user", "content": [part]}]}
        ended = str((await self.http.post("/v1/chat/completions", json=asked)).status_code)
        await asyncio.sleep(5)
        return ended

    async def broken_json(self) -> str:
        headers = {"content-type": "application/json"}
        content = b'{"messages": ' + b"[" * 100_000
        response = await self.http.post("/v1/chat/completions", content=content, headers=headers)
        return str(response.status_code)

    async def huge_body(self) -> str:
        async with self._raw() as (reader, writer):
            writer.write(self._head(b"content-length: 10000000000\r\n") + b" " * 100_000)
            return _status(await reader.readline())

    async def endless_body(self) -> str:
        async with self._raw() as (reader, writer):
            writer.write(self._head(b"transfer-encoding: chunked\r\n"))
            answered = asyncio.ensure_future(reader.readline())
            while not answered.done():
                writer.write(b"100000\r\n" + b" " * 0x100000 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0.02)
            await asyncio.sleep(5)
            return _status(await answered)

    async def never_reading(self) -> str:
        async with self._raw() as (_, writer):
            asked = {**self._requests[0], "stream": True, "max_tokens": 200}
            body = json.dumps(asked).encode()
            writer.write(self._head(b"content-length: %d\r\n" % len(body)) + body)
            await writer.drain()
            await asyncio.sleep(10)
            return "left"

    def _head(self, more: bytes) -> bytes:
        key = self.http.headers.get("authorization")
        key_line = f"authorization: {key}\r\n".encode() if key else b""
        start = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
        return start + b"content-type: application/json\r\n" + key_line + more + b"\r\n"

    async def _dribble(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        ended = asyncio.ensure_future(reader.read(100))
        while not ended.done() and time.monotonic() < self.until:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.5)
        if not ended.done():
            ended.cancel()
            return "not cut off yet"
        return _status(ended.result())


Misdeed = Callable[[Load], Awaitable[str]]
MISDEEDS: tuple[Any, ...] = (
    Load.slow_head,
    Load.slow_body,
    Load.cancelled_stream,
    Load.broken_picture,
    Load.bomb_picture,
    Load.broken_json,
    Load.huge_body,
    Load.endless_body,
    Load.never_reading,
)
MEMORY = "process_resident_memory_bytes"


class LostError(Exception):
    """There was no answer."""


class RefusedError(LostError):
    """Too many ask at once."""


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """So that a bad server does not end the report of how bad it is."""
    try:
        yield
    except (httpx.HTTPError, LostError) as error:
        print(f"{what}: {type(error).__name__}: {error}", file=sys.stderr)


def _checked(status: int, content: bytes) -> dict[str, Any]:
    if status == 429:
        raise RefusedError
    try:
        parsed = json.loads(content)
    except ValueError:
        parsed = {"error": "no JSON"}
    if status != 200 or "error" in parsed:
        raise LostError(f"{status} {parsed}")
    return parsed


def _status(head: bytes) -> str:
    """Of the beginning of a response."""
    return (head.split()[1:2] or [b"cut off"])[0].decode()


async def load(url: str, clients: int, seconds: float, key: str | None) -> Report:
    """Put a server under load for some time."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    report = Report(clients)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=REQUEST_SECONDS
    ) as http:
        await Load(http, report).run(seconds)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="Put a server under load")
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    options = parser.parse_args()
    key = os.environ.get("MEGAVLM_API_KEY")
    report = asyncio.run(load(options.url, options.clients, options.seconds, key))
    print("\n".join(report.lines()))
    if options.out:
        options.out.write_text(json.dumps(asdict(report)))
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
