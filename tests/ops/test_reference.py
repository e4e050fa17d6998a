import math

import pytest
import torch
from torch.nn import functional

from megavlm.ops import reference
from tests.ops.cases import outcome, random_case


def one_token_at_a_time(q, k, v, low, high, q_norm_epsilon=None):
    out = torch.zeros_like(q)
    rows, text, heads, width = q.shape
    group = heads // k.shape[1]
    if q_norm_epsilon is not None:
        q = q / (q.square().mean(-1, keepdim=True) + q_norm_epsilon).sqrt()
    for b in range(rows):
        for t in range(text):
            seen = slice(int(low[b, t]), int(high[b, t]))
            for h in range(heads if low[b, t] < high[b, t] else 0):
                scores = k[seen, h // group] @ q[b, t, h] / math.sqrt(width)
                out[b, t, h] = scores.softmax(0) @ v[seen, h // group]
    return out


@pytest.mark.parametrize("seed", range(20))
def test_equals_one_token_at_a_time(seed):
    case = random_case(seed).to(torch.float64)
    operands = (case.q, case.k, case.v, case.low, case.high, case.q_norm_epsilon)
    error = (reference.cross_attention(*operands) - one_token_at_a_time(*operands)).abs().max()
    assert error < 1e-14  # worst measured 2e-15


@pytest.mark.parametrize("q_norm_epsilon", [None, 1e-5])
def test_gradients(q_norm_epsilon):
    torch.manual_seed(3)
    q, k, v = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 4, 8), (6, 2, 8), (6, 2, 8)))
    low = torch.tensor([[0, 2, 4], [1, 1, 0]], dtype=torch.int32)
    high = torch.tensor([[2, 2, 6], [5, 6, 6]], dtype=torch.int32)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *x: reference.cross_attention(*x, low, high, q_norm_epsilon), tensors
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_sees_nothing_is_exactly_zero(dtype):
    case = random_case(1, dtype)
    case.low[:], case.high[:] = 0, 0
    assert all((x == 0).all() for x in outcome(reference.cross_attention, case).values())


def test_norm_weights_folded_into_the_keys_are_those_of_two_norms():
    case = random_case(7).to(torch.float64)
    width = case.q.shape[-1]
    q_weight, k_weight = torch.rand(2, width, dtype=torch.float64) + 0.5
    normed_q = functional.rms_norm(case.q, (width,), q_weight, 1e-5)
    normed_k = functional.rms_norm(case.k, (width,), k_weight, 1e-5)
    apart = reference.cross_attention(normed_q, normed_k, case.v, case.low, case.high)
    keys = reference.rms_norm(case.k, k_weight * q_weight, 1e-5)
    folded = reference.cross_attention(case.q, keys, case.v, case.low, case.high, 1e-5)
    assert (folded - apart).abs().max() < 1e-14  # worst measured 2e-15


def test_gated_norm():
    torch.manual_seed(0)
    residual, branch = torch.randn(2, 5, 12, dtype=torch.float64)
    gate, weight = torch.tensor([0.3], dtype=torch.float64), torch.rand(12, dtype=torch.float64)
    total, normed = reference.gated_norm(residual, branch, gate, weight, 1e-5)
    assert torch.equal(total, residual + math.tanh(0.3) * branch)
    scale = (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert (normed - total * scale * weight).abs().max() < 1e-15
