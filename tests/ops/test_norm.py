"""The compiled norms against float64, and beside plain torch at the same precision."""

import pytest
import torch

from megavlm.ops import library, reference
from megavlm.ops.norm import gated_norm, rms_norm
from tests.ops.cases import errors
from tests.ops.test_cross_attention import DEVICES, DTYPES

pytestmark = pytest.mark.skipif(bool(library.MISSING), reason=f"not compiled: {library.MISSING}")

# Below these, both are as near as rounding allows and their ratio says nothing.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
SHAPES = [(1, 8), (3, 64), (2, 3, 104), (37, 128), (5, 1000), (2, 6144), (3000, 96)]


def gradients(outputs, operands, seed):
    torch.manual_seed(seed)
    grads = [torch.randn(out.shape).to(out) for out in outputs]
    torch.autograd.backward(outputs, grads)
    return {str(i): out.detach() for i, out in enumerate(outputs)} | {
        f"grad {i}": x.grad for i, x in enumerate(operands)
    }


def run(function, tensors, dtype, device, seed):
    """Weights and gates stay in float32 unless all is float64."""
    operands = [
        x.to(device, dtype if x.dim() > 1 or dtype == torch.float64 else torch.float32)
        for x in tensors
    ]
    operands = [x.detach().requires_grad_() for x in operands]
    outputs = function(*operands, 1e-5)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return gradients(outputs, operands, seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "gated_norm"])
def test_at_most_twice_the_error_of_torch(device, shape, name):
    ours, theirs = {"rms_norm": rms_norm, "gated_norm": gated_norm}[name], getattr(reference, name)
    for seed, dtype in enumerate(DTYPES[device]):
        torch.manual_seed(seed)
        x, branch, weight = torch.randn(shape), torch.randn(shape), torch.rand(shape[-1]) + 0.5
        gate = torch.tensor([0.4])
        tensors = (x, weight) if name == "rms_norm" else (x, branch, gate, weight)
        rounded = [t.to(dtype).float() if t.dim() > 1 else t for t in tensors]
        want = run(theirs, rounded, torch.float64, device, seed)
        got = errors(run(ours, tensors, dtype, device, seed), want)
        plain = errors(run(theirs, tensors, dtype, device, seed), want)
        for what, error in got.items():
            assert error <= max(2 * plain[what], ROUNDING[dtype]), (dtype, what)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, branch = (torch.randn(5, 64, device=device).bfloat16().requires_grad_() for _ in range(2))
    weight, gate = (torch.rand(n, device=device).requires_grad_() for n in (64, 1))
    torch.library.opcheck(torch.ops.megavlm.rms_norm.default, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.megavlm.gated_norm.default, (x, branch, gate, weight, 1e-5))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((torch.randn(3, 8), torch.rand(7)), "weight must be 8"),
        ((torch.randn(3, 8).double(), torch.rand(8)), "float32 and bfloat16"),
        ((torch.randn(8), torch.rand(8)), r"takes \(rows, width\)"),
    ],
)
def test_a_mistake_is_named(tensors, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.megavlm.rms_norm(*tensors, 1e-5)
