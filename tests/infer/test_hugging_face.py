"""Greedy answers against `generate` of transformers on the exported model."""

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from transformers import MllamaForConditionalGeneration

from megavlm.checkpoint.lazy import in_memory
from megavlm.config.engines import MegatronSettings
from megavlm.convert import mllama
from megavlm.data.tokenizer import BEGIN, END, PADDING
from megavlm.infer.engine import Engine, Limits
from megavlm.infer.prompts import Prompt, Request
from megavlm.model.vit import normalise
from megavlm.model.vlm import VisionLanguageModel
from tests.batches import TINY
from tests.convert.hugging_face import opened, write
from tests.infer.test_generate import pictures
from tests.infer.tokens import run
from tests.model.test_vlm import random_model
from tests.ranks import alone, run_on_ranks

PROMPTS = 100
NEW_TOKENS = 12
IMAGE = 4
TP2 = MegatronSettings(tensor_parallel=2)


def random_requests():
    """Of all lengths, about none to four of six pictures."""
    chance = random.Random(11)
    shown = pictures(6)
    requests = []
    for number in range(PROMPTS):
        count = number % 5
        words = [chance.randrange(10, 500) for _ in range(chance.randint(1, 14))]
        tokens = [*[IMAGE] * count, BEGIN, *words]
        seen = [(0, min(at + 1, count)) for at in range(len(tokens))]
        pixels = tuple(chance.sample(shown, count))
        prompt = Prompt(tokens, seen)
        requests.append(Request(prompt=prompt, pixels=pixels, max_new_tokens=NEW_TOKENS))
    return requests


def theirs_of(model, requests):
    """Their answers to prompts of one number of pictures, padded on the left."""
    longest = max(len(request.prompt.tokens) for request in requests)
    pictured = len(requests[0].pixels)
    rows = [[*[PADDING] * (longest - len(r.prompt.tokens)), *r.prompt.tokens] for r in requests]
    tokens = torch.tensor(rows)
    arguments = {"input_ids": tokens, "attention_mask": (tokens != PADDING).long()}
    if pictured:
        mask = torch.zeros(len(requests), longest, pictured, 1, dtype=torch.long)
        for row, request in zip(mask, requests, strict=True):
            for at, (_, stop) in enumerate(request.prompt.seen, longest - len(request.prompt.seen)):
                row[at, :stop] = 1
        pixels = torch.stack([normalise(torch.stack(request.pixels)) for request in requests])
        arguments |= {
            "pixel_values": pixels[:, :, None],
            "aspect_ratio_ids": torch.ones(len(requests), pictured, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(len(requests), pictured, 1, dtype=torch.long),
            "cross_attention_mask": mask,
        }
    made = model.generate(
        **arguments,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=PADDING,
    )
    answers = made[:, longest:].tolist()
    return [answer[: answer.index(END)] if END in answer else answer for answer in answers]


@pytest.mark.slow
def test_answers_are_those_of_transformers(tmp_path):
    limits = Limits(rows=8, tokens=40, pictures=4)
    requests = random_requests()
    with alone():
        model = random_model().eval()
        batched = run(Engine(model, limits), requests)
        one_row = Engine(model, replace(limits, rows=1))
        singly = [run(one_row, [request])[0] for request in requests]
    weights = {name: p.detach() for name, p in model.named_parameters()}
    write(
        mllama.to_hugging_face(in_memory(weights), TINY), mllama.mllama_config(TINY), tmp_path / "x"
    )

    def on_rank(_):
        part = VisionLanguageModel(TINY, dtype=torch.float32, parallel=TP2).eval()
        ledger = part.ledger()
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                parameter.copy_(part.shard(ledger[name], weights[name]))
        return run(Engine(part, limits), requests)

    divided = run_on_ranks(2, on_rank, parallel=TP2)

    theirs = opened(MllamaForConditionalGeneration, tmp_path / "x")
    alone_there = [theirs_of(theirs, [request])[0] for request in requests]
    alike = defaultdict(list)
    for number, request in enumerate(requests):
        alike[len(request.pixels)].append(number)
    together_there = {}
    for numbers in alike.values():
        answers = theirs_of(theirs, [requests[n] for n in numbers])
        together_there |= dict(zip(numbers, answers, strict=True))

    assert len({tuple(answer) for answer in alone_there}) > PROMPTS // 3
    assert batched == singly == alone_there == [together_there[n] for n in range(PROMPTS)]
    assert divided == [batched, batched]
