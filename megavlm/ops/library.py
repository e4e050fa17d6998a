"""The compiled operators torch.ops.megavlm.*: loading, shapes for tracing, gradients.

`csrc/library.cpp` has their schemas and checks.
"""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

try:
    importlib.import_module("megavlm._C")  # registers the operators
    MISSING = ""
except ImportError as error:  # not compiled, or for a later torch
    MISSING = str(error)

HEAD_WIDTH_LIMIT = 128
NORM_WIDTH_LIMIT = 12288  # what every GPU's shared memory has room for


def refusal(x: Tensor, width_limit: int = HEAD_WIDTH_LIMIT) -> str:
    """Why the operators do not take tensors like this, and plain torch must; empty if they do."""
    missing = _missing_kernels(x.device, x.dtype)
    if missing:
        return missing
    width = x.shape[-1]
    if x.is_cuda and (width % 8 != 0 or width > width_limit):
        return f"width {width} is not a multiple of 8 up to {width_limit}"
    return ""


def built() -> str:
    """Which kernels this installation has."""
    if MISSING:
        return f"none, plain torch runs instead ({MISSING})"
    return "for CPUs and GPUs" if _has_cuda_kernels() else "for CPUs, built without CUDA"


def description(device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """What cross-attention and its norms run on, for the log."""
    reason = refusal(torch.empty(0, head_width, device=device, dtype=dtype))
    return f"plain torch ({reason})" if reason else "megavlm's kernels"


def _has_cuda_kernels() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("megavlm::cross_attention", "CUDA")


@torch.compiler.assume_constant_result
def _missing_kernels(device: torch.device, dtype: torch.dtype) -> str:
    if MISSING:
        return MISSING
    name = str(dtype).removeprefix("torch.")
    match device.type:
        case "cpu" if dtype in (torch.float32, torch.bfloat16):
            return ""
        case "cuda" if dtype == torch.bfloat16:
            if not _has_cuda_kernels():
                return "built without CUDA kernels"
            capability = torch.cuda.get_device_capability(device)
            return "" if capability >= (8, 0) else f"compute capability {capability} is below 8.0"
        case "meta":
            return ""
        case _:
            return f"no kernels for {name} on {device.type}"


def _cross_attention_shapes(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    rows, text_tokens, heads, _width = q.shape
    return torch.empty_like(q), q.new_empty((rows, heads, text_tokens), dtype=torch.float32)


def _cross_attention_backward_shapes(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_cross_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, low, high, ctx.scale, ctx.q_norm_epsilon = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, low, high, out, lse)


def _cross_attention_gradients(ctx: Any, grad_out: Tensor, _grad_lse: Any) -> tuple[Any, ...]:
    grads = torch.ops.megavlm.cross_attention_backward(
        grad_out, *ctx.saved_tensors, ctx.scale, ctx.q_norm_epsilon
    )
    return *grads, None, None, None, None


def _rms_norm_shapes(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(x.shape[:1])


def _rms_norm_backward_shapes(
    grad_normed: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _epsilon = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _rms_norm_gradients(ctx: Any, grad_normed: Tensor, _: Any) -> tuple[Any, ...]:
    return *torch.ops.megavlm.rms_norm_backward(grad_normed, *ctx.saved_tensors), None


def _gated_norm_shapes(
    residual: Tensor, branch: Tensor, gate: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = residual.shape
    return residual.new_empty(shape), residual.new_empty(shape), weight.new_empty(shape[:1])


def _gated_norm_backward_shapes(
    grad_sum: Tensor,
    grad_normed: Tensor,
    sum_nw: Tensor,
    branch: Tensor,
    gate: Tensor,
    weight: Tensor,
    inverse_rms: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (sum_nw.new_empty(sum_nw.shape) for _ in range(2))
    return *grads, gate.new_empty((1,)), weight.new_empty(weight.shape)  # pyright: ignore


def _keep_gated_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _residual, branch, gate, weight, _epsilon = inputs
    sum_nw, _normed, inverse_rms = output
    ctx.mark_non_differentiable(inverse_rms)
    ctx.save_for_backward(sum_nw, branch, gate, weight, inverse_rms)


def _gated_norm_gradients(
    ctx: Any, grad_sum: Tensor, grad_normed: Tensor, _: Any
) -> tuple[Any, ...]:
    grads = torch.ops.megavlm.gated_norm_backward(grad_sum, grad_normed, *ctx.saved_tensors)
    return *grads, None


def _no_second_gradients(*_: Any) -> tuple[Any, ...]:
    raise NotImplementedError("megavlm's operators are differentiable once, not twice")


def _register() -> None:
    for name, shapes, gradients, keep in (
        (
            "cross_attention",
            (_cross_attention_shapes, _cross_attention_backward_shapes),
            _cross_attention_gradients,
            _keep_cross_attention,
        ),
        (
            "rms_norm",
            (_rms_norm_shapes, _rms_norm_backward_shapes),
            _rms_norm_gradients,
            _keep_rms_norm,
        ),
        (
            "gated_norm",
            (_gated_norm_shapes, _gated_norm_backward_shapes),
            _gated_norm_gradients,
            _keep_gated_norm,
        ),
    ):
        register_fake(f"megavlm::{name}", shapes[0])
        register_fake(f"megavlm::{name}_backward", shapes[1])
        register_autograd(f"megavlm::{name}", gradients, setup_context=keep)
        register_autograd(f"megavlm::{name}_backward", _no_second_gradients)


if not MISSING:
    try:
        _register()
    except RuntimeError as error:
        MISSING = f"megavlm._C was built from other sources, build it again: {error}"
