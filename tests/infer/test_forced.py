"""Logits of given answers against those of the model's whole forward pass."""

import random

import torch

from megavlm.infer.forced import TeacherForced
from megavlm.infer.prompts import Prompt
from tests.infer.test_generate import pictures
from tests.model.test_vlm import random_model
from tests.ranks import alone

ATOL = 2e-5  # worst measured 0, logits to 6.7, fp32


@torch.no_grad()
def expected(model, prompt, pixels, answer):
    side = model.sizes.encoder.image_pixels
    blank = torch.zeros(3, side, side, dtype=torch.uint8)
    states = model.encode_images(torch.stack([*pixels] or [blank]))
    tokens = [*prompt.tokens, *answer]
    ranges = torch.zeros(2, 1, len(tokens), dtype=torch.int32)
    ranges[1] = len(pixels) * model.sizes.encoder.tokens
    logits_tv = model.logits(torch.tensor([tokens]), ranges, states)[0]
    return logits_tv[len(prompt.tokens) - 1 : -1]


def test_answers_of_all_lengths_are_read_as_by_the_model():
    chance = random.Random(3)
    shown = pictures(3)
    prompts, pixels, answers = [], [], []
    for count in (1, 0, 2, 1):
        tokens = [chance.randrange(10, 500) for _ in range(chance.randint(1, 6))]
        prompts.append(Prompt(tokens, [(0, count)] * len(tokens)))
        pixels.append(chance.sample(shown, count))
        answers.append([chance.randrange(10, 500) for _ in range(chance.randint(1, 8))])
    with alone():
        model = random_model().eval()
        found = TeacherForced(model).logits(prompts, pixels, answers)
        wanted = [expected(model, *one) for one in zip(prompts, pixels, answers, strict=True)]
    assert [len(logits) for logits in found] == [len(answer) for answer in answers]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=ATOL, rtol=0)
