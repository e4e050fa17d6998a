"""Many answers at once: rows join and leave the batch between steps (Orca, Yu et al. 2022)."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from megavlm.data.tokenizer import END, PADDING
from megavlm.errors import RequestError
from megavlm.infer.beginnings import beginnings
from megavlm.infer.decoder import CachedDecoder, Caches, Step
from megavlm.infer.encoder import Encoder
from megavlm.infer.pictures import Pictures
from megavlm.infer.prompts import Prompt, Request
from megavlm.infer.sampling import choose
from megavlm.model.vlm import VisionLanguageModel

Finish = Literal["stop", "length"]
PROMPT_TOKENS_AT_ONCE = 4_096
"""At most so many tokens of prompts, padding included, are read between two steps of the others."""
GRAPH_TOKENS, MOST_GRAPHS = 512, 64
"""CUDA graphs are for 1, 2, 4, ... rows that see so many tokens, or twice, four times as many, ...;
and at most so many are made."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What there is room for."""

    rows: int = 16
    """Answers that are written at the same time; others wait."""
    tokens: int = 2_048
    """Of a chat, its answer included."""
    pictures: int = 4
    """Of a chat."""


class Event(NamedTuple):
    """What happened to a request in a step."""

    request: int
    token: int | None
    """A new token of its answer; None if it has ended without one more."""
    finish: Finish | None
    """Why it has ended: the model said so, or it is as long as was allowed."""


@dataclass
class _Row:
    number: int
    asked: Request
    draws: torch.Generator
    tokens: int = 0
    """In the cache."""
    last: int = PADDING
    """The newest token, which is not in the cache yet."""
    written: int = 0
    """Tokens of the answer."""


class Engine:
    """Answers requests; which others run beside a request does not change its answer.

    But for rounding: products of other shapes may be summed in another order. In fp32 that has not
    changed a token in tests; in bf16 it does where two are nearly equally likely.

    Under tensor parallelism all ranks make the same calls in the same order.
    """

    def __init__(
        self, model: VisionLanguageModel, limits: Limits, *, compiled: bool = False
    ) -> None:
        """model: in evaluation mode, whole or this tensor-parallel rank's part of it.

        compiled: by torch.compile, which takes a while (`warm_up`). On a GPU, tokens are written by
        CUDA graphs, for few shapes, to which others are padded.
        """
        self.limits = limits
        self.decoder = CachedDecoder(model.language, model.sizes.decoder)
        encoder = Encoder(model)
        self.pictures = Pictures(encoder, self.decoder)
        self._side, self._picture_tokens = model.sizes.encoder.image_pixels, encoder.sizes.tokens
        self._read, self._write = self.decoder.read, self.decoder.write
        self._uses_graphs = compiled and _has_graphs(self.decoder.device)
        self._caches = Caches(
            self.decoder,
            places=_padded(limits.rows) if self._uses_graphs else limits.rows,
            tokens=limits.tokens,
            image_tokens=limits.pictures * self._picture_tokens,
        )
        if compiled:
            for tensor in self._caches.tensors():
                torch._dynamo.mark_static(tensor)
                torch._dynamo.mark_static_address(tensor)  # or graphs would copy it
            encoder.compile(dynamic=True)
            self._read = torch.compile(self._read, dynamic=True)
            self._write = torch.compile(  # pyright: ignore[reportCallIssue] (forgets an argument)
                self._write,
                dynamic=not self._uses_graphs,
                recompile_limit=MOST_GRAPHS,
                mode="reduce-overhead" if self._uses_graphs else "default",
            )
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []
        """Those being answered; each lies in the place of its number here."""
        self._requests = 0

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that there is no room for yet."""
        return len(self._waiting)

    def add(self, request: Request) -> int:
        """Take a request; returns its number. Raises RequestError for one that is too large."""
        tokens, pictures = len(request.prompt.tokens), len(request.pixels)
        if request.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens={request.max_new_tokens} must be at least 1")
        if tokens + request.max_new_tokens > self.limits.tokens:
            raise RequestError(
                f"the prompt's {tokens} tokens and max_new_tokens={request.max_new_tokens} exceed "
                f"the limit of {self.limits.tokens} tokens; ask for less"
            )
        if pictures > self.limits.pictures:
            raise RequestError(
                f"{pictures} pictures exceed the limit of {self.limits.pictures}; show fewer"
            )
        self._requests += 1
        draws = torch.Generator(self.decoder.device).manual_seed(request.sampling.seed)
        self._waiting.append(_Row(self._requests, request, draws))
        return self._requests

    def cancel(self, request: int) -> None:
        """Forget a request, if it is still here."""
        self._waiting = deque(row for row in self._waiting if row.number != request)
        self._leave({row.number for row in self._rows if row.number == request})

    def warm_up(self) -> None:
        """Compile what most steps need: one row and several, with and without pictures."""
        shape = 3, self._side, self._side
        pictures = [torch.full(shape, shade, dtype=torch.uint8) for shade in (0, 255)]
        for shown in (0, 1)[: 1 + self.limits.pictures]:
            for rows in (1, 2)[: self.limits.rows]:
                for picture in pictures[:rows]:
                    prompt = Prompt([PADDING] * 2, [(0, shown)] * 2)
                    pixels = (picture,)[:shown]
                    self.add(Request(prompt=prompt, pixels=pixels, max_new_tokens=2))
                while self._rows or self._waiting:
                    self.step()
                self.pictures.forget()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One more token of each answer, after room was given to those that wait."""
        running = [*self._rows]
        events = self._decode(running) if running else []
        admitted = self._admit()
        if admitted:
            events += self._prefill(admitted)
        self._leave({event.request for event in events if event.finish})
        return events

    def _admit(self) -> list[_Row]:
        """Those that wait, as far as there are places and their prompts are not too long."""
        admitted: list[_Row] = []
        longest = 0
        while self._waiting and len(self._rows) + len(admitted) < self.limits.rows:
            longest = max(longest, len(self._waiting[0].asked.prompt.tokens))
            if admitted and longest * (len(admitted) + 1) > PROMPT_TOKENS_AT_ONCE:
                break
            admitted.append(self._waiting.popleft())
        return admitted

    def _prefill(self, rows: Sequence[_Row]) -> list[Event]:
        first = len(self._rows)
        self._rows += rows
        places = range(first, first + len(rows))
        pictures = iter(self.pictures([p for row in rows for p in row.asked.pixels]))
        for place, row in zip(places, rows, strict=True):
            self._caches.put_images(place, [next(pictures) for _ in row.asked.pixels])
            row.tokens = len(row.asked.prompt.tokens)
        prompts = [row.asked.prompt for row in rows]
        tokens_bt, step = beginnings(prompts, places, self._caches, self._picture_tokens)
        last_b = torch.tensor([row.tokens - 1 for row in rows], device=self.decoder.device)
        return self._next(rows, self._read(tokens_bt, last_b, step, self._caches))

    def _decode(self, rows: Sequence[_Row]) -> list[Event]:
        device = self.decoder.device
        longest = max(row.tokens for row in rows) + 1
        padding = 0
        if self._uses_graphs:  # with rows that lie behind the others and see nothing
            longest = min(_padded(longest, GRAPH_TOKENS), self._caches.tokens)
            padding = _padded(len(rows)) - len(rows)
        lengths_b = torch.tensor([row.tokens for row in rows] + [0] * padding, device=device)
        places = np.arange(len(lengths_b))
        seen = [row.asked.prompt.seen[-1] for row in rows] + [(0, 0)] * padding
        sees_b2 = (
            np.array(seen) * self._picture_tokens + places[:, None] * self._caches.image_tokens
        )
        low_b, high_b = torch.as_tensor(sees_b2.T.astype(np.int32), device=device)
        step = Step(
            places_b=torch.as_tensor(places, device=device),
            positions_bt=lengths_b[:, None],
            low_bt=low_b[:, None],
            high_bt=high_b[:, None],
            sees_images=any(high > 0 for _, high in seen),
            visible_bc=torch.arange(longest, device=device) <= lengths_b[:, None],
        )
        last = [[row.last] for row in rows] + [[PADDING]] * padding
        tokens_b1 = torch.tensor(last, device=device)
        for row in rows:
            row.tokens += 1
        return self._next(rows, self._write(tokens_b1, step, self._caches)[: len(rows)])

    def _next(self, rows: Sequence[_Row], logits_bv: torch.Tensor) -> list[Event]:
        sampling = [row.asked.sampling for row in rows]
        chosen = choose(logits_bv, sampling, [row.draws for row in rows]).tolist()
        events: list[Event] = []
        for row, token in zip(rows, chosen, strict=True):
            if token == END:
                events.append(Event(row.number, None, "stop"))
                continue
            row.last = token
            row.written += 1
            is_full = row.written == row.asked.max_new_tokens
            events.append(Event(row.number, token, "length" if is_full else None))
        return events

    def _leave(self, requests: set[int]) -> None:
        """Take rows out; the last ones move into their places."""
        for place in reversed(range(len(self._rows))):
            if self._rows[place].number in requests:
                last = len(self._rows) - 1
                if place < last:
                    self._caches.move(last, place, self._rows[last].tokens)
                    self._rows[place] = self._rows[last]
                self._rows.pop()


def _padded(count: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, 1 << (count - 1).bit_length())


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"
