"""Answers to many requests."""

from collections.abc import Callable, Sequence

from megavlm.data.tokenizer import Tokenizer
from megavlm.infer.engine import Engine, Limits
from megavlm.infer.prompts import Request
from megavlm.infer.texts import GrowingText
from megavlm.model.vlm import VisionLanguageModel


def generate(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Answers, in the order of the requests.

    batch_size: at most so many at once. `on_progress` hears how many more requests are done.
    Call it inside `model_groups`.
    """
    engine = Engine(model, limits_for(requests, batch_size))
    return answer(engine, tokenizer, requests, on_progress)


def limits_for(requests: Sequence[Request], batch_size: int) -> Limits:
    """Room for so many of these requests at once."""
    return Limits(
        rows=max(1, min(batch_size, len(requests))),
        tokens=max((len(r.prompt.tokens) + r.max_new_tokens for r in requests), default=1),
        pictures=max((len(r.pixels) for r in requests), default=0),
    )


def answer(
    engine: Engine,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    on_progress: Callable[[int], None] = lambda done: None,
    on_text: Callable[[str], None] = lambda new: None,
) -> list[str]:
    """The engine's answers, in order; nothing else may be asked of it meanwhile.

    `on_text` hears what is new of any of them.
    """
    numbers = [engine.add(request) for request in requests]
    texts = {
        number: GrowingText(tokenizer, request.stop)
        for number, request in zip(numbers, requests, strict=True)
    }
    answers = dict.fromkeys(numbers, "")
    while engine.running or engine.waiting:
        done = 0
        for event in engine.step():
            text = texts[event.request]
            new = text.add(event.token) if event.token is not None else ""
            if event.finish is not None:
                new += text.end()
            elif text.stopped:
                engine.cancel(event.request)
            answers[event.request] += new
            on_text(new)
            done += event.finish is not None or text.stopped
        if done:
            on_progress(done)
    return [answers[number] for number in numbers]
