"""Answers in the form of OpenAI's chat completions."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from megavlm.serve.engine_thread import Answer
from megavlm.serve.refusals import Refusal


class Completion:
    """How one answer is told."""

    def __init__(self, answer: Answer, model_name: str) -> None:
        self._answer = answer
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """In one piece; raises Refusal."""
        text = "".join([piece async for piece in self._answer.pieces()])
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": self._answer.finish,
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(),
        }

    async def events(self, *, with_usage: bool) -> AsyncIterator[str]:
        """As server-sent events; an error on the way is the last of them."""
        usage = {"usage": None} if with_usage else {}
        try:
            yield self._chunk({"role": "assistant", "content": ""}, **usage)
            async for piece in self._answer.pieces():
                yield self._chunk({"content": piece}, **usage)
        except Refusal as refusal:
            yield _event(refusal.body)
            return
        yield self._chunk({}, finish=self._answer.finish, **usage)
        if with_usage:
            head = {**self._head, "object": "chat.completion.chunk"}
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        head = {**self._head, "object": "chat.completion.chunk"}
        return _event({**head, "choices": [choice], **more})

    def _usage(self) -> dict[str, int]:
        prompt, written = len(self._answer.request.prompt.tokens), self._answer.tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
        }


def _event(content: dict[str, Any]) -> str:
    # All in ASCII: some clients take U+2028 and its like for ends of lines.
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
