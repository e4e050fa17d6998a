"""Times the gated cross-attention block: query and key norms, attention, gate, residual, next norm.

    python tools/bench_block.py [--device cpu|cuda] [--dtype float32|bfloat16]

Without the projections, which are the same on both sides. The peers are compositions of torch's
own RMSNorm and every attention for the problem, eager and (on a GPU, the fastest) compiled.

Letters in shapes: b rows, t text tokens, v image tokens, h heads, g key/value heads, d head width.
"""

import argparse
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch._dynamo
from bench_cross_attention import (
    CONTENDERS,
    NEED_REPEATED_HEADS,
    WIDTH,
    Problem,
    operands,
    options_of,
    refuse_plain_torch,
    relative_error,
    repeat_heads,
)
from timing import Row, machine, markdown_table, race, refusals, run_in_turn, write_results
from torch import Tensor
from torch.nn.functional import rms_norm

from megavlm.ops import library
from megavlm.ops.cross_attention import cross_attention
from megavlm.ops.norm import gated_norm, prepare_keys

EPSILON = 1e-5

# (q, k, v, residual, gate, query norm's weight, key norm's weight, next norm's weight) -> the new
# residual and its norm.
Block = Callable[..., tuple[Tensor, Tensor]]


def fused(problem: Problem, device: torch.device) -> Block:
    low, high = problem.intervals(device)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, x, gate, q_w, k_w, w = tensors
        keys = prepare_keys(k, k_w, q_w, EPSILON)
        out = cross_attention(q, keys, v, low, high, EPSILON)
        return gated_norm(x, out.flatten(2), gate, w, EPSILON)

    return run


def composed(attention: str) -> Callable[[Problem, torch.device], Block]:
    """The same by torch's functions, around one of the attention contenders."""

    def make(problem: Problem, device: torch.device) -> Block:
        attend = CONTENDERS[attention](problem, device)

        def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v, x, gate, q_w, k_w, w = tensors
            q, k = rms_norm(q, (WIDTH,), q_w, EPSILON), rms_norm(k, (WIDTH,), k_w, EPSILON)
            if attention in NEED_REPEATED_HEADS:
                k, v = repeat_heads(problem, k), repeat_heads(problem, v)
            total = x + torch.tanh(gate) * attend(q, k, v).reshape(x.shape)
            return total, rms_norm(total, w.shape, w, EPSILON)

        return run

    return make


def compiled(make: Callable[[Problem, torch.device], Block]) -> Callable[..., Block]:
    return lambda problem, device: torch.compile(make(problem, device), dynamic=False)


PEERS = ("SDPA", "SDPA flash", "SDPA cuDNN", "SDPA dense mask", "varlen_attn", "FlashAttention-3")
COMPILED = ("SDPA flash", "SDPA cuDNN", "FlashAttention-3")


def contest(problem: Problem, device: torch.device, dtype: torch.dtype, rounds: int) -> list[Row]:
    torch._dynamo.reset()
    q, k, v = operands(problem, device, dtype)
    width = problem.heads * WIDTH
    x = torch.randn(problem.rows, problem.text_tokens, width, device=device, dtype=dtype)
    weights = [torch.rand(n, device=device, dtype=dtype) for n in (1, WIDTH, WIDTH, width)]
    tensors = [q, k, v, *(t.requires_grad_() for t in (x, *weights))]
    grads = [torch.randn_like(x) for _ in range(2)]
    with torch.no_grad():
        want = composed("SDPA")(problem, device)(*(t.double() for t in tensors))
    blocks: dict[str, Callable[[Problem, torch.device], Block]] = {"megavlm": fused}
    blocks |= {peer: composed(peer) for peer in PEERS}
    if device.type == "cuda":
        blocks |= {f"{peer}, compiled": compiled(composed(peer)) for peer in COMPILED}

    @cache
    def block_of(name: str) -> Block:
        if name == "megavlm":
            refuse_plain_torch(q)
            refuse_plain_torch(x, width_limit=library.NORM_WIDTH_LIMIT)
        return blocks[name](problem, device)

    def error_of(found: tuple[Tensor, Tensor]) -> float:
        return max(relative_error(*pair) for pair in zip(found, want, strict=True))

    def forward(name: str) -> tuple[Callable[[], tuple[Tensor, Tensor]], float]:
        block = block_of(name)

        def run() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return block(*tensors)

        return run, error_of(run())

    def both(name: str) -> tuple[Callable[[], object], float]:
        block = block_of(name)

        def run() -> object:
            return torch.autograd.grad(block(*tensors), tensors, grads)

        run()
        return run, error_of(block(*tensors))

    rows: list[Row] = []
    passes: dict[str, Callable[[str], Any]] = {"forward": forward, "forward and backward": both}
    for direction, prepare in passes.items():
        about = {"problem": problem.name, "tensor_parallel": problem.tensor_parallel}
        about["direction"] = direction
        results = race({name: partial(prepare, name) for name in blocks}, device, rounds)
        rows += [about | row for row in results]
    return rows


def table_of(rows: list[Row]) -> str:
    """Our time, and how much longer the fastest composition takes."""
    groups: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        key = (row["problem"], row["tensor_parallel"], row["direction"])
        groups.setdefault(key, {})[row["contender"]] = row
    lines = []
    for (problem, tp, direction), group in groups.items():
        mine = group.pop("megavlm")
        seconds = {name: row["seconds"] for name, row in group.items() if row["seconds"]}
        peer = min(seconds, key=lambda name: seconds[name], default="-")
        ours = mine["seconds"]
        ratio = seconds[peer] / ours if ours and seconds else None
        lines.append(
            {
                "problem": problem,
                "TP": str(tp),
                "pass": direction,
                "us": f"{ours * 1e6:,.1f}" if ours else mine["refused"],
                "fastest composition": peer,
                "its time over megavlm's": f"{ratio:.2f}" if ratio else "-",
            }
        )
    return markdown_table(lines) + refusals(rows)


def main() -> None:
    options = options_of(argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]))
    device, dtype = options.device, options.dtype
    about = machine(device) | {"dtype": str(dtype)}
    print(about)

    def contest_here(problem: Problem) -> list[Row]:
        return contest(
            problem, device, dtype, options.rounds or (20 if device.type == "cuda" else 3)
        )

    def report(rows: list[Row], not_run: str) -> None:
        if options.out:
            title = "The gated cross-attention block"
            write_results(options.out, title, about, table_of(rows) + not_run, rows)

    problems = [p for p in options.problems if p.trains]
    print(table_of(run_in_turn(problems, contest_here, report, options.seconds)))


if __name__ == "__main__":
    main()
