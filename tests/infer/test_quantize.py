import importlib.util
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import megavlm.infer.linear
from megavlm.config.engines import MegatronSettings
from megavlm.errors import ConfigError
from megavlm.infer.engine import Engine
from megavlm.infer.forced import TeacherForced
from megavlm.infer.prompts import Prompt
from megavlm.infer.quantize import GROUP, check_quantization, is_quantized, quantize
from megavlm.model.vlm import VisionLanguageModel
from tests.batches import TINY
from tests.infer.test_engine import LIMITS, random_requests
from tests.infer.test_generate import pictures
from tests.infer.tokens import run
from tests.model.test_vlm import random_model
from tests.ranks import alone, run_on_ranks

pytest.importorskip("torchao", reason="the extra `quantization`")

# What int4's groups divide, also on each of two ranks.
SIZES = replace(TINY, decoder=replace(TINY.decoder, width=64, mlp_width=128))
TP2 = MegatronSettings(tensor_parallel=2)
GROUPS = pytest.mark.usefixtures("groups")
KINDS = pytest.mark.parametrize("kind", ["int8", "int4"])


@pytest.fixture
def groups():
    with alone():
        yield


def model_of(kind=None, dtype=torch.float32):
    model = random_model(SIZES).eval().to(dtype)
    if kind is not None:
        quantize(model, kind)
    return model


def matrices(model):
    return {n: p.detach() for n, p in model.named_parameters() if is_quantized(n, p.ndim)}


def dequantized(weight):
    """The matrix (outputs, inputs) that a product with the weight is computed with."""
    return functional.linear(torch.eye(weight.shape[1], dtype=weight.dtype), weight).T


def steps(kind, weight):
    """The distance of neighbouring values, of each weight: fp64 (outputs, inputs)."""
    outputs, inputs = weight.shape
    if kind == "int8":  # symmetric, a scale for each output
        return np.broadcast_to(np.abs(weight).max(1, keepdims=True) / 127.5, weight.shape)
    groups = weight.reshape(outputs, inputs // GROUP, GROUP)
    step = (groups.max(2) - groups.min(2)) / 15
    return np.repeat(step, GROUP, axis=1)


@GROUPS
@pytest.mark.parametrize(
    ("kind", "dtype", "bound"),
    [
        ("int8", torch.float32, 0.501),  # worst measured 0.5000
        ("int4", torch.float32, 0.501),  # 0.5000
        ("int4", torch.bfloat16, 0.65),  # 0.588: scales and zeros are rounded to bf16
    ],
)
def test_weights_are_within_half_a_step(kind, dtype, bound):
    plain, quantized = matrices(model_of(dtype=dtype)), matrices(model_of(kind, dtype))
    assert plain.keys() == quantized.keys()
    assert len(plain) == 4 * 4 + 2 * 5  # attention 2, MLP 2; cross-attention 3, MLP 2
    worst = 0.0
    for name, weight in plain.items():
        exact = weight.double().numpy()
        error = np.abs(dequantized(quantized[name]).double().numpy() - exact)
        worst = max(worst, (error / steps(kind, exact)).max())
    assert 0.45 < worst < bound


def text():
    """Prompts, their pictures and answers."""
    chance = np.random.default_rng(2)
    prompts = [Prompt(chance.integers(10, 500, 6).tolist(), [(0, 1)] * 6) for _ in range(3)]
    return prompts, [[p] for p in pictures(3)], chance.integers(10, 500, (3, 9)).tolist()


@GROUPS
@pytest.mark.parametrize(
    ("kind", "dtype", "atol"),
    [
        ("int8", torch.float32, 5e-5),  # worst measured 1.0e-5, of logits to 5.7
        ("int4", torch.float32, 5e-5),  # 0
        ("int4", torch.bfloat16, 0.3),  # 0.10: activations are rounded to bf16
    ],
)
def test_logits_are_those_of_the_dequantized_weights(kind, dtype, atol):
    quantized = model_of(kind, dtype)
    oracle = model_of(dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            weight = quantized.get_parameter(name)
            is_matrix = is_quantized(name, weight.ndim)
            parameter.copy_(dequantized(weight) if is_matrix else weight)
    found, wanted, plain = (
        torch.cat(TeacherForced(model).logits(*text())) for model in (quantized, oracle, model_of())
    )
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)
    # The quantisation itself is far larger.
    assert (found - plain).abs().max() > 10 * (found - wanted).abs().max()


@GROUPS
@KINDS
def test_bytes_fall_one_layer_after_the_other(kind, monkeypatch):
    model = model_of(dtype=torch.bfloat16)
    shapes = {name: weight.shape for name, weight in matrices(model).items()}
    others = {n: p for n, p in model.named_parameters() if n not in shapes}
    old = [weakref.ref(model.get_parameter(name)) for name in shapes]
    alive = []
    linear = megavlm.infer.linear.linear

    def watched(layer):
        alive.append(sum(weight() is not None for weight in old))
        return linear(layer)

    monkeypatch.setattr(megavlm.infer.linear, "linear", watched)
    quantize(model, kind)
    assert alive == [len(old) - done for done in range(len(old))]
    assert not any(weight() for weight in old)
    engine = Engine(model, LIMITS)
    assert {n: p for n, p in model.named_parameters() if n not in shapes} == others
    assert all(type(parameter) is nn.Parameter for parameter in others.values())

    of_engine = {id(p) for p in engine.decoder.parameters()}
    for name, (outputs, inputs) in shapes.items():
        weight = model.get_parameter(name)
        assert id(weight) in of_engine
        parts, _ = weight.__tensor_flatten__()
        held = sum(getattr(weight, part).nbytes for part in parts)
        if kind == "int8":  # with an fp32 scale and an int8 zero, which is 0
            assert held == outputs * (inputs + 5)
        else:  # with a bf16 scale and a bf16 zero of each group
            assert held == outputs * (inputs // 2 + 4 * inputs // GROUP)


@KINDS
def test_ranks_quantize_their_parts(kind):
    requests = random_requests(12)
    with alone():
        weights = {n: p.detach() for n, p in model_of().named_parameters()}
        one = model_of(kind)
        expected = run(Engine(one, LIMITS), requests)
        whole = {name: dequantized(weight) for name, weight in matrices(one).items()}

    def on_rank(_):
        part = VisionLanguageModel(SIZES, dtype=torch.float32, parallel=TP2).eval()
        ledger = part.ledger()
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                parameter.copy_(part.shard(ledger[name], weights[name]))
        exact = {name: weight.clone() for name, weight in matrices(part).items()}
        quantize(part, kind)
        for name, weight in matrices(part).items():
            mine = part.shard(ledger[name], whole[name])
            if kind == "int4" or ledger[name].tensor_axis == 0:
                assert torch.equal(dequantized(weight), mine)
            else:  # a scale for its part of an output's weights, which is finer
                errors = [(w - exact[name]).square().mean() for w in (dequantized(weight), mine)]
                assert errors[0] < errors[1]
        return run(Engine(part, LIMITS), requests)

    first, second = run_on_ranks(2, on_rank, parallel=TP2)
    assert first == second
    if kind == "int4":
        assert first == expected


@GROUPS
@pytest.mark.slow
@KINDS
def test_compiled_answers_are_the_same(kind):
    requests = random_requests(2)
    model = model_of(kind)
    plain, compiled = Engine(model, LIMITS), Engine(model, LIMITS, compiled=True)
    assert run(compiled, requests) == run(plain, requests)


def test_what_cannot_be_quantized_is_told(monkeypatch):
    check_quantization("int8", TINY, ranks=2)
    check_quantization("int4", SIZES, ranks=2)
    for kind, sizes, ranks, says in (
        ("int2", SIZES, 1, r"quantization=int2 is unknown; it is int8 or int4"),
        ("int4", TINY, 1, r"groups of 32 inputs.* has 96 and 48; use int8"),
        ("int4", SIZES, 4, r" has 32 and 64 on each of 4 ranks|16 on each of 4 ranks; use int8 or"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_quantization(kind, sizes, ranks)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        patch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
        with pytest.raises(
            ConfigError, match=r"compute capability 8\.0, beyond Tesla T4; use int8"
        ):
            check_quantization("int4", SIZES)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'megavlm\[quantization\]'"):
        check_quantization("int8", SIZES)
