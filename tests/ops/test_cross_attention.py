import math

import pytest
import torch

from megavlm.ops.cross_attention import cross_attention


def operands(seed, *, text, image, heads=4, kv_heads=2, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(n, h, width, generator=generator, dtype=dtype)
        for n, h in ((text, heads), (image, kv_heads), (image, kv_heads))
    )
    ends = torch.randint(0, image + 1, (2, text), generator=generator).sort(dim=0).values
    return q, k, v, ends[0], ends[1]


def one_token_at_a_time(q, k, v, low, high):
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            seen = slice(int(low[i]), int(high[i]))
            if low[i] < high[i]:
                scores = k[seen, h // group] @ q[i, h] / math.sqrt(q.shape[2])
                out[i, h] = scores.softmax(0) @ v[seen, h // group]
    return out


@pytest.mark.parametrize("seed", range(20))
def test_equals_one_token_at_a_time(seed):
    heads, kv_heads = [(4, 2), (4, 4), (6, 1)][seed % 3]
    tensors = operands(seed, text=seed % 7 + 1, image=seed + 1, heads=heads, kv_heads=kv_heads)
    error = (cross_attention(*tensors) - one_token_at_a_time(*tensors)).abs().max()
    assert error < 1e-14  # worst measured 1e-15


def test_gradients():
    q, k, v, low, high = operands(3, text=5, image=6)
    low[0] = high[0]
    tensors = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: cross_attention(*x, low, high), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_sees_nothing_is_exactly_zero(dtype):
    q, k, v, low, _ = operands(5, text=6, image=9, dtype=dtype)
    high = low.clone()
    low[2], high[2] = 4, 7
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out = cross_attention(*tensors, low, high)
    out.sum().backward()
    blind = torch.arange(6) != 2
    assert (out[blind] == 0).all() and (out[2] != 0).any()
    assert (q.grad[blind] == 0).all() and (q.grad[2] != 0).any()
    unseen = (torch.arange(9) < 4) | (torch.arange(9) >= 7)
    assert (k.grad[unseen] == 0).all() and (v.grad[unseen] == 0).all()
