"""Random cross-attention problems, and what they should give."""

import math
import random
from dataclasses import dataclass

import torch

from megavlm.ops import reference

WIDTHS = (64, 80, 96, 104, 128)


@dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    q_norm_epsilon: float | None
    grad_out: torch.Tensor

    def to(self, dtype):
        cast = [x.to(dtype) for x in (self.q, self.k, self.v, self.grad_out)]
        return Case(*cast[:3], self.low, self.high, self.q_norm_epsilon, cast[3])


def random_case(seed, dtype=torch.float32, device="cpu", long=False):
    """Packed images of uneven sizes, tokens that see none, strided operands.

    Lengths from 1 to some hundred; `long`: so many image tokens that kernels take them in parts.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    width = draw.choice(WIDTHS)
    kv_heads = draw.choice((1, 2, 4))
    heads = kv_heads * draw.choice((1, 2, 3, 6, 8))
    rows, text = draw.choice((1, 1, 2, 3)), draw.choice((1, 2, 7, draw.randint(1, 70)))
    ends = [0]
    for _ in range(draw.choice((1, 1, 2, 5))):
        ends.append(ends[-1] + draw.choice((1, 2, 17, 33, draw.randint(1, 90))))
    if long:
        kv_heads, heads, text = 2, 2 * draw.choice((1, 3)), draw.randint(60, 400)
        image_tokens = draw.choice((257, 577, draw.randint(100, 900)))
        ends = [i * image_tokens for i in range(draw.choice((2, 3, 6)) + 1)]
    image = ends[-1]
    low, high = intervals(draw, rows, text, ends)
    q = torch.randn(text, rows, heads, width).to(dtype).transpose(0, 1)
    if draw.random() < 0.3:
        q = q.contiguous()
    k, v = torch.randn(image, kv_heads, 2 * width).to(dtype).chunk(2, -1)
    grad_out = torch.randn(text, rows, heads, width).to(dtype).transpose(0, 1)
    epsilon = draw.choice((None, 1e-5))
    case = Case(q, k, v, low, high, epsilon, grad_out)
    for name in ("q", "k", "v", "low", "high", "grad_out"):
        setattr(case, name, getattr(case, name).to(device))
    return case


def intervals(draw, rows, text, ends):
    """Each token sees nothing, one image, all up to one, or any stretch; (b, t) int32 each."""
    kind = draw.choice(("one", "earlier", "any", "all", "none"))
    pairs = []
    for _ in range(rows * text):
        image = draw.randrange(len(ends) - 1)
        if kind == "none" or draw.random() < 0.15:
            at = draw.randint(0, ends[-1])
            pairs.append((at, at))
        elif kind == "one":
            pairs.append((ends[image], ends[image + 1]))
        elif kind == "earlier":
            pairs.append((0, ends[image + 1]))
        elif kind == "all":
            pairs.append((0, ends[-1]))
        else:
            pairs.append(tuple(sorted(draw.randint(0, ends[-1]) for _ in range(2))))
    low, high = torch.tensor(pairs, dtype=torch.int32).T.reshape(2, rows, text).contiguous()
    return low, high


def outcome(function, case):
    """The output and the gradients of q, k and v."""
    operands = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    out = function(*operands, case.low, case.high, case.q_norm_epsilon)
    out.backward(case.grad_out)
    return {
        "out": out.detach(),
        **{n: x.grad for n, x in zip(("q", "k", "v"), operands, strict=True)},
    }


def exact(case):
    """The reference in float64, from the case's own operands."""
    return outcome(reference.cross_attention, case.to(torch.float64))


def errors(got, want):
    """Norm of the difference over the norm of what is wanted, by name.

    What is wanted counts as 0.1 an element at least: where everything cancels (the only visible
    token has no rival, so queries have no gradient) rounding is all there is.
    """
    relative = {}
    for name, tensor in want.items():
        size = max(tensor.norm().item(), 0.1 * math.sqrt(tensor.numel()))
        relative[name] = (got[name].double() - tensor).norm().item() / size
    return relative
