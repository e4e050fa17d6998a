import pytest
import torch

from megavlm.data.tokenizer import END, Tokenizer
from megavlm.infer.generate import Request, generate
from tests.batches import OTHER_FORM, TINY
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


def without_cache(model, prompt, picture):
    """Greedy tokens by running the whole sequence anew for each, through the training forward."""
    tokens = list(prompt)
    side = model.sizes.encoder.image_pixels
    blank = torch.zeros(3, side, side, dtype=torch.uint8)
    pixels = (blank if picture is None else picture)[None]
    generated = []
    while len(generated) < NEW_TOKENS:
        ids = torch.tensor([tokens])
        ranges = torch.zeros(2, *ids.shape, dtype=torch.int32)
        ranges[1] = 0 if picture is None else model.sizes.encoder.tokens
        vocabulary = torch.arange(TINY.decoder.vocabulary)
        last = len(tokens) - 1
        with torch.no_grad():
            # One row a candidate: the loss of a label is minus its log probability.
            losses = model(
                ids.expand(len(vocabulary), -1),
                vocabulary[:, None].expand(-1, len(tokens)),
                torch.zeros(len(vocabulary), len(tokens)),
                ranges.expand(-1, len(vocabulary), -1),
                pixels,
            )[:, last]
        token = int(losses.argmin())
        if token == END:
            break
        generated.append(token)
        tokens.append(token)
    return generated


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(TINY, marks=pytest.mark.slow), OTHER_FORM],
    ids=["preset", "other form"],
)
def test_the_cache_changes_no_token(sizes):
    model = random_model(sizes).eval()
    shown = [*pictures(3, sizes.encoder.image_pixels), None]
    prompts = torch.randint(10, 500, (4, 5), generator=torch.Generator().manual_seed(4))
    generated = generate_tokens(model, prompts, shown, NEW_TOKENS)
    expected = [
        without_cache(model, prompt.tolist(), picture)
        for prompt, picture in zip(prompts, shown, strict=True)
    ]
    assert generated == expected
    assert len({tuple(g) for g in generated}) > 2


def test_requests_of_all_lengths_come_back_in_order(coloured_squares):
    model = random_model().eval()
    tokenizer = Tokenizer(coloured_squares / "tokenizer.model")
    prompts = ["Caption:", "Which colour?", "Caption:", "Say it.", "a"]
    shown = [*pictures(3), None, pictures(5)[4]]
    requests = [
        Request(prompt=prompt, pixels=picture)
        for prompt, picture in zip(prompts, shown, strict=True)
    ]
    done = []
    together = generate(
        model, tokenizer, requests, max_new_tokens=8, batch_size=2, on_progress=done.append
    )
    one_by_one = [
        generate(model, tokenizer, [request], max_new_tokens=8, batch_size=1)[0]
        for request in requests
    ]
    assert together == one_by_one
    assert sum(done) == len(requests)
