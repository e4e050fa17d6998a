"""Generation with a key/value cache; the image's keys and values are computed once."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megavlm.data.tokenizer import END, Tokenizer
from megavlm.model.vlm import VisionLanguageModel


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt about one picture, or about none."""

    prompt: str
    pixels: Tensor | None
    """uint8 (3, side, side)."""


def generate(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy answers, in the order of the requests.

    Requests whose prompts have the same length run together, so that no padding is needed.
    `on_progress` hears how many more requests are done.
    """
    prompts = [
        tokenizer.prompt(request.prompt, with_image=request.pixels is not None)
        for request in requests
    ]
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        by_length[len(prompt)].append(number)
    answers = [""] * len(requests)
    for numbers in by_length.values():
        for start in range(0, len(numbers), batch_size):
            chunk = numbers[start : start + batch_size]
            generated = generate_tokens(
                model,
                torch.tensor([prompts[n] for n in chunk]),
                [requests[n].pixels for n in chunk],
                max_new_tokens,
            )
            for number, tokens in zip(chunk, generated, strict=True):
                answers[number] = tokenizer.decode(tokens)
            on_progress(len(chunk))
    return answers


@torch.inference_mode()
def generate_tokens(
    model: VisionLanguageModel,
    prompts_bt: Tensor,
    pixels: Sequence[Tensor | None],
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy continuation of prompts of one length, up to and without the end symbol.

    prompts_bt: int64 (b, t). pixels: for each row, uint8 (3, side, side) or None.
    """
    device = next(model.parameters()).device
    rows, prompt_tokens = prompts_bt.shape
    side, image_tokens = model.sizes.encoder.image_pixels, model.sizes.encoder.tokens
    blank = torch.zeros(3, side, side, dtype=torch.uint8)
    slots = torch.stack([blank if picture is None else picture for picture in pixels]).to(device)
    low = torch.arange(rows, device=device) * image_tokens
    sees_image = torch.tensor([picture is not None for picture in pixels], device=device)
    ranges_2b1 = torch.stack([low, low + image_tokens * sees_image]).int()[..., None]

    context = StaticInferenceContext(rows, prompt_tokens + max_new_tokens)
    step_tokens = prompts_bt.to(device)
    image_states: Tensor | None = model.encode_images(slots)
    generated: list[Tensor] = []
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    for _ in range(max_new_tokens):
        ranges = ranges_2b1.repeat(1, 1, step_tokens.shape[1])
        logits = model.next_token_logits(step_tokens, ranges, image_states, context)
        image_states = None  # its keys and values are in the context now
        step_tokens = logits.argmax(-1, keepdim=True)
        generated.append(step_tokens)
        ended |= step_tokens[:, 0] == END
        if ended.all():
            break
    return [_until_end(row) for row in torch.cat(generated, dim=1).tolist()]


def _until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END)] if END in tokens else tokens
