import pytest
import torch

from megavlm.data.tokenizer import END, Tokenizer
from megavlm.infer.generate import generate
from megavlm.infer.prompts import Request, question
from tests.batches import OTHER_FORM, TINY
from tests.infer.tokens import tokens_after
from tests.model.test_vlm import random_model
from tests.ranks import alone

NEW_TOKENS = 12


@pytest.fixture(autouse=True)
def groups():
    with alone():
        yield


def pictures(count, side=TINY.encoder.image_pixels):
    generator = torch.Generator().manual_seed(9)
    shape = (count, 3, side, side)
    return list(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))


@torch.no_grad()
def without_cache(model, prompt, shown):
    """Greedy tokens by the model's whole forward pass anew for each; all see all pictures."""
    tokens = list(prompt)
    side = model.sizes.encoder.image_pixels
    blank = torch.zeros(3, side, side, dtype=torch.uint8)
    states = model.encode_images(torch.stack([*shown] or [blank]))
    while len(tokens) < len(prompt) + NEW_TOKENS:
        ranges = torch.zeros(2, 1, len(tokens), dtype=torch.int32)
        ranges[1] = len(shown) * model.sizes.encoder.tokens
        token = int(model.logits(torch.tensor([tokens]), ranges, states)[0, -1].argmax())
        if token == END:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(TINY, marks=pytest.mark.slow), OTHER_FORM],
    ids=["preset", "other form"],
)
def test_the_cache_changes_no_token(sizes):
    model = random_model(sizes).eval()
    one, two, three = pictures(3, sizes.encoder.image_pixels)
    shown = [[one], [two], [], [three, one]]
    prompts = torch.randint(10, 500, (4, 5), generator=torch.Generator().manual_seed(4))
    generated = tokens_after(model, prompts, shown, NEW_TOKENS)
    expected = [
        without_cache(model, prompt.tolist(), of_prompt)
        for prompt, of_prompt in zip(prompts, shown, strict=True)
    ]
    assert generated == expected
    assert len({tuple(g) for g in generated}) > 2


def test_requests_of_all_lengths_come_back_in_order(coloured_squares):
    model = random_model().eval()
    tokenizer = Tokenizer(coloured_squares / "tokenizer.model")
    prompts = ["Caption:", "Which colour?", "Caption:", "Say it.", "a"]
    shown = [*pictures(3), None, pictures(5)[4]]
    requests = [
        Request(
            prompt=question(tokenizer, prompt, pictures=int(picture is not None)),
            pixels=() if picture is None else (picture,),
            max_new_tokens=8,
        )
        for prompt, picture in zip(prompts, shown, strict=True)
    ]
    done = []
    together = generate(model, tokenizer, requests, batch_size=2, on_progress=done.append)
    one_by_one = [generate(model, tokenizer, [r], batch_size=1)[0] for r in requests]
    assert together == one_by_one
    assert sum(done) == len(requests)
