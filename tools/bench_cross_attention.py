"""Times megavlm's cross-attention against every attention that torch and FlashAttention offer.

    python tools/bench_cross_attention.py [--device cpu|cuda] [--dtype float32|bfloat16]

All contenders of a problem run in one process, interleaved. FLOPs count only what tokens see:
4 per score and head channel forward, 10 backward. The floor is the larger of FLOPs over torch's
measured rate for a large matrix product, and least bytes over the measured rate of a large copy.

Letters in shapes: b rows, t text tokens, v image tokens, h heads, g key/value heads, d head width.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import interleaved_seconds, machine, markdown_table, measured_ceilings, write_results
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megavlm.ops import library

HEADS, KV_HEADS, WIDTH = 48, 8, 128  # of vlm-30b


@dataclass(frozen=True)
class Problem:
    """Text rows over packed images. Tokens see all images, or the one whose turn it is."""

    name: str
    rows: int
    text_tokens: int
    images: int
    image_tokens: int
    sees: str  # "all" or "one"
    tensor_parallel: int = 1
    on_cpu: bool = False
    """Small enough to be timed on a CPU."""

    @property
    def heads(self) -> int:
        return HEADS // self.tensor_parallel

    @property
    def kv_heads(self) -> int:
        return KV_HEADS // self.tensor_parallel

    @property
    def all_image_tokens(self) -> int:
        return self.images * self.image_tokens

    def intervals(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """First and one past the last image token each text token sees, (b, t)."""
        tokens = torch.arange(self.rows * self.text_tokens, device=device)
        if self.sees == "all":
            low, high = torch.zeros_like(tokens), torch.full_like(tokens, self.all_image_tokens)
        else:
            low = tokens * self.images // len(tokens) * self.image_tokens
            high = low + self.image_tokens
        shape = (self.rows, self.text_tokens)
        return low.int().view(shape), high.int().view(shape)

    @property
    def visible_scores(self) -> int:
        seen = self.all_image_tokens if self.sees == "all" else self.image_tokens
        return self.rows * self.text_tokens * seen * self.heads

    def least_bytes(self, backward: bool, element_bytes: int) -> int:
        """Every operand read once, every result written once."""
        text = self.rows * self.text_tokens * self.heads
        q, kv = text * WIDTH, 2 * self.all_image_tokens * self.kv_heads * WIDTH
        if backward:  # q, out, their gradients, k, v and theirs; lse
            return element_bytes * (4 * q + 2 * kv) + 4 * text
        return element_bytes * (2 * q + kv) + 4 * text


def problems() -> list[Problem]:
    """Training and decoding shapes of vlm-30b at tensor-parallel sizes 1, 4 and 8."""
    found = []
    for tp in (8, 4, 1):
        cpu = tp == 8
        found += [
            Problem("1 x 2,048 text, 257 image", 1, 2048, 1, 257, "all", tp, cpu),
            Problem("1 x 2,048 text, 576 image", 1, 2048, 1, 576, "all", tp, cpu),
            Problem("1 x 2,048 text, 4 x 257 image, all", 1, 2048, 4, 257, "all", tp, cpu),
            Problem("1 x 2,048 text, 4 x 257 image, one", 1, 2048, 4, 257, "one", tp, cpu),
            Problem("1 x 2,048 text, 8 x 576 image, all", 1, 2048, 8, 576, "all", tp),
            Problem("8 x 256 text, 32 x 257 image, one", 8, 256, 32, 257, "one", tp, cpu),
            Problem("1 x 2,048 text, 64 x 257 image, one", 1, 2048, 64, 257, "one", tp, cpu),
            Problem("decode 1, 257 image", 1, 1, 1, 257, "one", tp, cpu),
            Problem("decode 8, 257 image", 8, 1, 8, 257, "one", tp, cpu),
            Problem("decode 64, 257 image", 64, 1, 64, 257, "one", tp, cpu),
            Problem("decode 64, 1,028 image", 64, 1, 64, 1028, "one", tp),
        ]
    return found


class UnavailableError(Exception):
    """This contender cannot run this problem here."""


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(problem: Problem, device: torch.device) -> Attention:
    low, high = problem.intervals(device)
    operator = torch.ops.megavlm.cross_attention

    def run(q_bthd: Tensor, k_vgd: Tensor, v_vgd: Tensor) -> Tensor:
        return operator(q_bthd, k_vgd, v_vgd, low, high, 1 / math.sqrt(WIDTH))[0]

    return run


def sdpa_masked(problem: Problem, device: torch.device) -> Attention:
    """SDPA with a dense mask, whichever kernel torch picks."""
    low, high = problem.intervals(device)
    tokens = torch.arange(problem.all_image_tokens, device=device)
    mask_b1tv = ((low[..., None] <= tokens) & (tokens < high[..., None]))[:, None]

    def run(q_bthd: Tensor, k_vgd: Tensor, v_vgd: Tensor) -> Tensor:
        q, k, v = heads_first(q_bthd, k_vgd, v_vgd)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask_b1tv, enable_gqa=True)
        return out.transpose(1, 2)

    return run


def sdpa(backend: SDPBackend | None) -> Callable[[Problem, torch.device], Attention]:
    """SDPA without a mask: problems where every token sees all, or its row's one image."""

    def make(problem: Problem, device: torch.device) -> Attention:
        if problem.sees == "one" and problem.rows != problem.images:
            raise UnavailableError("needs a mask")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

        def run(q_bthd: Tensor, k_vgd: Tensor, v_vgd: Tensor) -> Tensor:
            q, k, v = heads_first(q_bthd, k_vgd, v_vgd)
            if problem.sees == "one":
                images = (problem.images, -1)
                k, v = (x.unflatten(0, images).transpose(1, 2) for x in (k_vgd, v_vgd))
            if backend is None:
                return attend(q, k, v).transpose(1, 2)
            with sdpa_kernel(backend):
                return attend(q, k, v).transpose(1, 2)

        return run

    return make


def flex_attention(problem: Problem, device: torch.device) -> Attention:
    """FlexAttention, compiled; building its block mask is not part of its time."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    low, high = problem.intervals(device)

    def sees(b: Tensor, h: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return (low[b, t] <= v) & (v < high[b, t])

    sizes = (problem.rows, None, problem.text_tokens, problem.all_image_tokens)
    mask = create_block_mask(sees, *sizes, device=device.type)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q_bthd: Tensor, k_vgd: Tensor, v_vgd: Tensor) -> Tensor:
        q, k, v = heads_first(q_bthd, k_vgd, v_vgd)
        out: Any = compiled(q, k, v, block_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    return run


def block_mask_building(problem: Problem, device: torch.device) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import create_block_mask

    low, high = problem.intervals(device)
    sizes = (problem.rows, None, problem.text_tokens, problem.all_image_tokens)

    def sees(b: Tensor, h: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return (low[b, t] <= v) & (v < high[b, t])

    return lambda: create_block_mask(sees, *sizes, device=device.type)


def segments(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Cumulative text and image tokens of stretches that attend to each other alone."""
    tokens = problem.rows * problem.text_tokens
    if problem.sees == "all":
        if problem.rows > 1:
            raise UnavailableError("rows share images")
        count, image_tokens = 1, problem.all_image_tokens
    else:
        count, image_tokens = problem.images, problem.image_tokens
    if tokens % count:
        raise UnavailableError("uneven stretches")
    ends = torch.arange(count + 1, device=device, dtype=torch.int32)
    return ends * (tokens // count), ends * image_tokens, tokens // count, image_tokens


def varlen(attend: Callable[..., Any], problem: Problem, device: torch.device) -> Attention:
    text_ends, image_ends, most_text, most_image = segments(problem, device)

    def run(q_bthd: Tensor, k_vgd: Tensor, v_vgd: Tensor) -> Tensor:
        q = q_bthd.flatten(0, 1)
        out = attend(q, k_vgd, v_vgd, text_ends, image_ends, most_text, most_image)
        return (out[0] if isinstance(out, tuple) else out).view_as(q_bthd)

    return run


def torch_varlen(problem: Problem, device: torch.device) -> Attention:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise UnavailableError("this torch has no varlen_attn") from error
    if device.type != "cuda":
        raise UnavailableError("CUDA only")
    group = problem.heads // problem.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        # It takes as many key heads as query heads.
        return varlen_attn(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), *rest)

    return varlen(attend, problem, device)


def flash_attention(module: str) -> Callable[[Problem, torch.device], Attention]:
    def make(problem: Problem, device: torch.device) -> Attention:
        try:
            attend = __import__(module, fromlist=["flash_attn_varlen_func"]).flash_attn_varlen_func
        except ImportError as error:
            raise UnavailableError("not installed") from error
        if device.type != "cuda":
            raise UnavailableError("CUDA only")
        return varlen(attend, problem, device)

    return make


CONTENDERS: dict[str, Callable[[Problem, torch.device], Attention]] = {
    "megavlm": ours,
    "SDPA": sdpa(None),
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA math": sdpa(SDPBackend.MATH),
    "SDPA dense mask": sdpa_masked,
    "FlexAttention": flex_attention,
    "varlen_attn": torch_varlen,
    "FlashAttention-2": flash_attention("flash_attn"),
    "FlashAttention-3": flash_attention("flash_attn_interface"),
    "FlashAttention-4": flash_attention("flash_attn.cute"),
}


def heads_first(q_bthd: Tensor, k_vgd: Tensor, v_vgd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b, h, t, d) and (b, g, v, d), as views."""
    rows = q_bthd.shape[0]
    k, v = (x.transpose(0, 1).expand(rows, -1, -1, -1) for x in (k_vgd, v_vgd))
    return q_bthd.transpose(1, 2), k, v


def operands(problem: Problem, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (
        (problem.rows, problem.text_tokens, problem.heads, WIDTH),
        *[(problem.all_image_tokens, problem.kv_heads, WIDTH)] * 2,
    )
    return [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]


def relative_error(out: Tensor, want: Tensor) -> float:
    return ((out - want).norm() / want.norm()).item()


def contest(
    problem: Problem, device: torch.device, dtype: torch.dtype, names: list[str], rounds: int
) -> Iterator[dict[str, Any]]:
    """One row per contender and direction, with seconds and worst error, or why it cannot run."""
    tensors = operands(problem, device, dtype)
    low, high = problem.intervals(device)
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    trains = not problem.name.startswith("decode")
    errors, refused = {}, {}
    want = library_reference(tensors, low, high)
    grad = torch.randn_like(want).to(dtype)
    for name in names:
        try:
            attend = CONTENDERS[name](problem, device)
            out = attend(*tensors)
            errors[name] = relative_error(out.float(), want)
            if trains:
                torch.autograd.grad(out, tensors, grad, retain_graph=True)
        except UnavailableError as error:
            refused[name] = str(error)
            continue
        except Exception as error:  # whatever a contender raises is its answer
            refused[name] = f"{type(error).__name__}: {str(error)[:80]}".replace("\n", " ")
            continue

        def run_forward(attend: Attention = attend) -> object:
            with torch.no_grad():
                return attend(*tensors)

        def run_backward(out: Tensor = out) -> object:
            return torch.autograd.grad(out, tensors, grad, retain_graph=True)

        forward[name] = run_forward
        backward[name] = run_backward
    directions = {"forward": forward, "backward": backward} if trains else {"forward": forward}
    for direction, functions in directions.items():
        seconds = interleaved_seconds(functions, device, rounds)
        for name in names:
            yield {
                "problem": problem.name,
                "tensor_parallel": problem.tensor_parallel,
                "direction": direction,
                "contender": name,
                "seconds": seconds.get(name),
                "relative_error": errors.get(name) if direction == "forward" else None,
                "refused": refused.get(name),
            }
    if "FlexAttention" in forward:
        seconds = interleaved_seconds(
            {"building": block_mask_building(problem, device)}, device, min(rounds, 5)
        )
        yield {
            "problem": problem.name,
            "tensor_parallel": problem.tensor_parallel,
            "direction": "mask",
            "contender": "FlexAttention",
            "seconds": seconds["building"],
        }


def library_reference(tensors: list[Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The output in fp32, one stretch of text at a time so that it fits."""
    from megavlm.ops import reference

    with torch.no_grad():
        q, k, v = (x.detach().float() for x in tensors)
        step = max(1, (64 << 20) // max(1, len(k) * q.shape[0]))
        return torch.cat(
            [
                reference.cross_attention(
                    q[:, i : i + step], k, v, low[:, i : i + step], high[:, i : i + step]
                )
                for i in range(0, q.shape[1], step)
            ],
            dim=1,
        )


def with_rates(
    row: dict[str, Any], problem: Problem, dtype: torch.dtype, ceilings: tuple[float, float]
) -> dict[str, Any]:
    """Adds FLOP/s, and the fraction of the roofline reached."""
    if row.get("seconds") is None or row["direction"] == "mask":
        return row
    backward = row["direction"] == "backward"
    flops = (10 if backward else 4) * WIDTH * problem.visible_scores
    floor_seconds = max(
        flops / ceilings[0], problem.least_bytes(backward, dtype.itemsize) / ceilings[1]
    )
    return row | {
        "flops_per_second": flops / row["seconds"],
        "roofline_fraction": floor_seconds / row["seconds"],
    }


def table_of(rows: list[dict[str, Any]]) -> str:
    """Problems down; megavlm's figures first, then each contender's time over megavlm's."""
    groups: dict[tuple[str, int, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["problem"], row["tensor_parallel"], row["direction"])
        groups.setdefault(key, {})[row["contender"]] = row
    present = [
        name
        for name in CONTENDERS
        if name != "megavlm" and any(g.get(name, {}).get("seconds") for g in groups.values())
    ]
    lines = []
    for (problem, tp, direction), group in groups.items():
        if direction == "mask":
            continue
        mine = group["megavlm"]
        line = {"problem": problem, "TP": str(tp), "pass": direction}
        if mine["seconds"] is None:
            line |= {"us": mine["refused"] or "-", "TFLOP/s": "-", "of roofline": "-"}
        else:
            line |= {
                "us": f"{mine['seconds'] * 1e6:,.1f}",
                "TFLOP/s": f"{mine['flops_per_second'] / 1e12:.3g}",
                "of roofline": f"{mine['roofline_fraction']:.0%}",
            }
        for name in present:
            other = group.get(name, {}).get("seconds")
            ratio = other / mine["seconds"] if other and mine["seconds"] else None
            line[f"{name} /"] = f"{ratio:.2f}" if ratio else "-"
        lines.append(line)
    masks = [r["seconds"] for r in rows if r["direction"] == "mask"]
    note = (
        f"\nFlexAttention's block mask takes {min(masks) * 1e6:,.0f} to {max(masks) * 1e6:,.0f} us "
        "more, not counted above.\n"
        if masks
        else ""
    )
    refusals = sorted({f"{r['contender']}: {r['refused']}" for r in rows if r.get("refused")})
    return (
        markdown_table(lines)
        + "\n`NAME /`: that contender's time over megavlm's, so above 1 megavlm is faster. `-`: "
        "cannot run there.\n"
        + note
        + ("\nCannot run: " + "; ".join(refusals) + ".\n" if refusals else "")
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of every contender's rate, forward, one group per problem."""
    from matplotlib.figure import Figure

    shown = [r for r in rows if r["direction"] == "forward" and r.get("flops_per_second")]
    names = [n for n in CONTENDERS if any(r["contender"] == n for r in shown)]
    labels = list(dict.fromkeys((r["problem"], r["tensor_parallel"]) for r in shown))
    figure = Figure(figsize=(10, 0.3 * len(labels) * max(3, len(names)) / 3 + 2))
    axes = figure.subplots()
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        rates = {(r["problem"], r["tensor_parallel"]): r["flops_per_second"] / 1e12
                 for r in shown if r["contender"] == name}  # fmt: skip
        places = [j + i * height for j, label in enumerate(labels) if label in rates]
        axes.barh(places, [rates[x] for x in labels if x in rates], height, label=name)
    axes.set_yticks(
        [j + 0.4 for j in range(len(labels))], [f"{p}, TP {tp}" for p, tp in labels], fontsize=7
    )
    axes.invert_yaxis()
    axes.set_xlabel("TFLOP/s of visible scores, forward")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default=default_device)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default: 1)")
    parser.add_argument("--rounds", type=int, help="timed calls of each contender")
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--tensor-parallel", type=int, help="this size alone")
    parser.add_argument("--contenders", help="comma-separated; megavlm always runs")
    parser.add_argument("--out", type=Path, help="writes OUT.md, OUT.json and OUT.png")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if library.MISSING:
        parser.error(f"megavlm's kernels are not built: {library.MISSING}")
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    names = list(CONTENDERS)
    if options.contenders:
        names = ["megavlm", *(n for n in names if n in options.contenders.split(","))]
    chosen = [
        p
        for p in problems()
        if options.only in p.name
        and (device.type == "cuda" or p.on_cpu)
        and options.tensor_parallel in (None, p.tensor_parallel)
    ]
    rounds = options.rounds or (20 if device.type == "cuda" else 5)
    ceilings = measured_ceilings(device, dtype)
    about = machine(device) | {
        "dtype": options.dtype,
        "matrix product": f"{ceilings[0] / 1e12:.3g} TFLOP/s",
        "copy": f"{ceilings[1] / 1e9:.3g} GB/s",
    }
    print(about)
    rows: list[dict[str, Any]] = []
    for i, problem in enumerate(chosen):
        print(f"[{i + 1}/{len(chosen)}] {problem.name}, TP {problem.tensor_parallel}", flush=True)
        for row in contest(problem, device, dtype, names, rounds):
            rows.append(with_rates(row, problem, dtype, ceilings))
    table = table_of(rows)
    print(table)
    if options.out:
        write_results(options.out, "Cross-attention", about, table, rows)
        draw(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
