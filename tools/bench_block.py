"""Times the gated cross-attention block: query and key norms, attention, gate, residual, next norm.

    python tools/bench_block.py [--device cpu|cuda] [--dtype float32|bfloat16]

Without the projections, which are the same on both sides. The peers are compositions of torch's
own RMSNorm and its fastest attention for the problem, eager and (on a GPU) compiled.

Letters in shapes: b rows, t text tokens, v image tokens, h heads, g key/value heads, d head width.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_cross_attention import CONTENDERS, WIDTH, Problem, UnavailableError, operands, problems
from timing import interleaved_seconds, machine, markdown_table, write_results
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
            total = x + torch.tanh(gate) * attend(q, k, v).flatten(2)
            return total, rms_norm(total, w.shape, w, EPSILON)

        return run

    return make


def compiled(make: Callable[[Problem, torch.device], Block]) -> Callable[..., Block]:
    return lambda problem, device: torch.compile(make(problem, device))


PEERS = ("SDPA", "SDPA flash", "SDPA cuDNN", "SDPA dense mask", "varlen_attn", "FlashAttention-3")


def contest(
    problem: Problem, device: torch.device, dtype: torch.dtype, rounds: int
) -> list[dict[str, Any]]:
    q, k, v = operands(problem, device, dtype)
    width = problem.heads * WIDTH
    x = torch.randn(problem.rows, problem.text_tokens, width, device=device, dtype=dtype)
    weights = [torch.rand(n, device=device, dtype=dtype) for n in (1, WIDTH, WIDTH, width)]
    tensors = [q, k, v, *(t.requires_grad_() for t in (x, *weights))]
    blocks: dict[str, Callable[[Problem, torch.device], Block]] = {"megavlm": fused}
    for peer in PEERS:
        blocks[peer] = composed(peer)
        if device.type == "cuda":
            blocks[f"{peer}, compiled"] = compiled(composed(peer))
    forward: dict[str, Callable[[], object]] = {}
    both: dict[str, Callable[[], object]] = {}
    for name, make in blocks.items():
        try:
            block = make(problem, device)
            grads = [torch.randn_like(y) for y in block(*tensors)]
        except UnavailableError:
            continue
        except Exception as error:  # whatever a contender raises is its answer
            print(f"  {name}: {type(error).__name__}: {str(error)[:80]}")
            continue

        def run_forward(block: Block = block) -> object:
            with torch.no_grad():
                return block(*tensors)

        def run_both(block: Block = block, grads: list[Tensor] = grads) -> object:
            return torch.autograd.grad(block(*tensors), tensors, grads)

        forward[name] = run_forward
        both[name] = run_both
    rows = []
    for direction, functions in (("forward", forward), ("forward and backward", both)):
        seconds = interleaved_seconds(functions, device, rounds)
        rows += [
            {
                "problem": problem.name,
                "tensor_parallel": problem.tensor_parallel,
                "direction": direction,
                "contender": name,
                "seconds": value,
            }
            for name, value in seconds.items()
        ]
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """Our time, and how much longer the fastest composition takes."""
    groups: dict[tuple[str, int, str], dict[str, float]] = {}
    for row in rows:
        key = (row["problem"], row["tensor_parallel"], row["direction"])
        groups.setdefault(key, {})[row["contender"]] = row["seconds"]
    lines = []
    for (problem, tp, direction), seconds in groups.items():
        mine = seconds.pop("megavlm")
        peer = min(seconds, key=lambda name: seconds[name])
        lines.append(
            {
                "problem": problem,
                "TP": str(tp),
                "pass": direction,
                "us": f"{mine * 1e6:,.1f}",
                "fastest composition": peer,
                "its time over megavlm's": f"{seconds[peer] / mine:.2f}",
            }
        )
    return markdown_table(lines)


def main() -> None:
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default=default_device)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default: 1)")
    parser.add_argument("--rounds", type=int, help="timed calls of each contender")
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--tensor-parallel", type=int, help="this size alone")
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.json")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if library.MISSING:
        parser.error(f"megavlm's kernels are not built: {library.MISSING}")
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    chosen = [
        p
        for p in problems()
        if options.only in p.name
        and not p.name.startswith("decode")
        and (device.type == "cuda" or p.on_cpu)
        and options.tensor_parallel in (None, p.tensor_parallel)
    ]
    rounds = options.rounds or (20 if device.type == "cuda" else 5)
    rows: list[dict[str, Any]] = []
    for i, problem in enumerate(chosen):
        print(f"[{i + 1}/{len(chosen)}] {problem.name}, TP {problem.tensor_parallel}", flush=True)
        rows += contest(problem, device, dtype, rounds)
    table = table_of(rows)
    print(table)
    if options.out:
        about = machine(device) | {"dtype": options.dtype}
        write_results(options.out, "The gated cross-attention block", about, table, rows)


if __name__ == "__main__":
    main()
