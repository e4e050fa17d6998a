"""What the engine generates, as tokens."""

from collections.abc import Sequence

from torch import Tensor

from megavlm.infer.engine import Engine
from megavlm.infer.generate import limits_for
from megavlm.infer.prompts import Prompt, Request
from megavlm.infer.sampling import GREEDY, Sampling
from megavlm.model.vlm import VisionLanguageModel


def request_of(
    prompt: Sequence[int], pixels: Sequence[Tensor], new_tokens: int, sampling: Sampling = GREEDY
) -> Request:
    """All tokens see all pictures."""
    seen = [(0, len(pixels))] * len(prompt)
    return Request(
        prompt=Prompt([*prompt], seen),
        pixels=tuple(pixels),
        max_new_tokens=new_tokens,
        sampling=sampling,
    )


def run(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """All at once, as far as there is room."""
    tokens: dict[int, list[int]] = {engine.add(request): [] for request in requests}
    while engine.running or engine.waiting:
        for event in engine.step():
            tokens[event.request] += [event.token] if event.token is not None else []
    return [*tokens.values()]


def tokens_after(
    model: VisionLanguageModel,
    prompts: Tensor,
    pixels: Sequence[Sequence[Tensor]],
    new_tokens: int,
) -> list[list[int]]:
    """Greedy, of prompts (b, t)."""
    pairs = zip(prompts.tolist(), pixels, strict=True)
    requests = [request_of(prompt, of_row, new_tokens) for prompt, of_row in pairs]
    return run(Engine(model, limits_for(requests, len(requests))), requests)
