"""Times megavlm's cross-attention against every attention that torch and FlashAttention offer.

    python tools/bench_cross_attention.py [--device cpu|cuda] [--dtype float32|bfloat16]

All contenders of a problem run in one process, interleaved. FLOPs count only what tokens see:
4 per score and head channel forward, 10 backward. The floor is the larger of FLOPs over torch's
measured rate for a large matrix product, and least bytes over the measured rate of a large copy.
Errors are relative, against fp64; of a backward pass, the worst of the three gradients.

Letters in shapes: b rows, t text tokens, v image tokens, h heads, g key/value heads, d head width.
"""

import argparse
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from timing import (
    Row,
    UnavailableError,
    machine,
    markdown_table,
    measured_ceilings,
    race,
    refusals,
    run_in_turn,
    write_results,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
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
    on_cpu: bool
    """Whether a CPU can run it too, with every contender, in a minute."""
    tensor_parallel: int

    def __str__(self) -> str:
        return f"{self.name}, TP {self.tensor_parallel}"

    @property
    def trains(self) -> bool:
        """Whether gradients are taken, too."""
        return self.text_tokens > 1

    @property
    def heads(self) -> int:
        return HEADS // self.tensor_parallel

    @property
    def kv_heads(self) -> int:
        return KV_HEADS // self.tensor_parallel

    @property
    def all_image_tokens(self) -> int:
        return self.images * self.image_tokens

    @property
    def stretches(self) -> int:
        """Equal parts of the text, each of which sees all of an equal part of the images."""
        return 1 if self.sees == "all" else self.images

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
    """Training and decoding shapes of vlm-30b at tensor-parallel sizes 1, 8 and 4.

    What matters most comes first, for runs that end early.
    """
    first = [
        ("1 x 2,048 text, 257 image", 1, 2048, 1, 257, "all", True),
        ("1 x 2,048 text, 576 image", 1, 2048, 1, 576, "all", True),
        ("1 x 2,048 text, 4 x 257 image, all", 1, 2048, 4, 257, "all", True),
        ("1 x 2,048 text, 64 x 257 image, one", 1, 2048, 64, 257, "one", True),
        ("decode 64, 1,028 image", 64, 1, 64, 1028, "one", False),
        ("decode 8, 257 image", 8, 1, 8, 257, "one", True),
    ]
    second = [
        ("1 x 2,048 text, 4 x 257 image, one", 1, 2048, 4, 257, "one", True),
        ("8 x 256 text, 32 x 257 image, one", 8, 256, 32, 257, "one", True),
        ("1 x 2,048 text, 8 x 576 image, all", 1, 2048, 8, 576, "all", False),
        ("decode 64, 257 image", 64, 1, 64, 257, "one", True),
        ("decode 1, 257 image", 1, 1, 1, 257, "one", True),
    ]
    return [Problem(*shape, tp) for part in (first, second) for tp in (1, 8, 4) for shape in part]


# (q (b, t, h, d), k (v, g, d), v) -> (b, t, h, d), or with text in stretches instead of rows
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


def in_stretches(problem: Problem, q_bthd: Tensor, *kv_vgd: Tensor) -> list[Tensor]:
    """(stretches, heads, tokens, d) each, as views; tokens see all of their stretch: no mask."""
    stretches = (problem.stretches, -1)
    return [x.unflatten(0, stretches).transpose(1, 2) for x in (q_bthd.flatten(0, 1), *kv_vgd)]


def sdpa(backend: SDPBackend | None) -> Callable[[Problem, torch.device], Attention]:
    """SDPA without a mask."""

    def make(problem: Problem, device: torch.device) -> Attention:
        def run(q_bthd: Tensor, k_vgd: Tensor, v_vgd: Tensor) -> Tensor:
            q, k, v = in_stretches(problem, q_bthd, k_vgd, v_vgd)
            grouped = k.shape[1] < q.shape[1]
            if backend is None:
                out = scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
            else:
                with sdpa_kernel(backend):
                    out = scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
            return out.transpose(1, 2)

        return run

    return make


def block_mask(problem: Problem, device: torch.device) -> BlockMask:
    """FlexAttention's mask."""
    low, high = problem.intervals(device)

    def sees(b: Tensor, h: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return (low[b, t] <= v) & (v < high[b, t])

    sizes = (problem.rows, None, problem.text_tokens, problem.all_image_tokens)
    return create_block_mask(sees, *sizes, device=device.type)


def compiled_flex_attention(problem: Problem, device: torch.device) -> Attention:
    """FlexAttention, compiled; building its block mask is not part of its time."""
    mask = block_mask(problem, device)
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(q_bthd: Tensor, k_vgd: Tensor, v_vgd: Tensor) -> Tensor:
        q, k, v = heads_first(q_bthd, k_vgd, v_vgd)
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return run


def varlen(attend: Callable[..., Any], problem: Problem, device: torch.device) -> Attention:
    """By cumulative text and image tokens of the stretches."""
    if device.type != "cuda":
        raise UnavailableError("CUDA only")
    text_tokens = problem.rows * problem.text_tokens // problem.stretches
    image_tokens = problem.all_image_tokens // problem.stretches
    ends = torch.arange(problem.stretches + 1, device=device, dtype=torch.int32)
    lengths = (ends * text_tokens, ends * image_tokens, text_tokens, image_tokens)

    def run(q_bthd: Tensor, k_vgd: Tensor, v_vgd: Tensor) -> Tensor:
        out = attend(q_bthd.flatten(0, 1), k_vgd, v_vgd, *lengths)
        return (out[0] if isinstance(out, tuple) else out).view_as(q_bthd)

    return run


def torch_varlen(problem: Problem, device: torch.device) -> Attention:
    grouped = {} if "varlen_attn" in NEED_REPEATED_HEADS else {"enable_gqa": True}
    return varlen(partial(varlen_attn, **grouped), problem, device)


def flash_attention(module: str) -> Callable[[Problem, torch.device], Attention]:
    def make(problem: Problem, device: torch.device) -> Attention:
        try:
            attend = __import__(module, fromlist=["flash_attn_varlen_func"]).flash_attn_varlen_func
        except ImportError as error:
            raise UnavailableError("not installed") from error
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
    "FlexAttention": compiled_flex_attention,
    "varlen_attn": torch_varlen,
    "FlashAttention-2": flash_attention("flash_attn"),
    "FlashAttention-3": flash_attention("flash_attn_interface"),
    "FlashAttention-4": flash_attention("flash_attn.cute"),
}


# These take as many key as query heads: keys and values are repeated before time is taken. Their
# gradients then flow to the repeated ones; to sum these up would be more work, not counted here.
# ("SDPA efficient": sdp_utils.cpp of torch 2.11 to 2.13.)
NEED_REPEATED_HEADS = {"SDPA efficient"}
if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
    NEED_REPEATED_HEADS.add("varlen_attn")


def repeat_heads(problem: Problem, kv_vgd: Tensor) -> Tensor:
    return kv_vgd.repeat_interleave(problem.heads // problem.kv_heads, 1)


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


def relative_error(found: Tensor, want: Tensor) -> float:
    return ((found - want).norm() / want.norm()).item()


def exact(problem: Problem, tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients in fp64, without masks or intervals."""
    leaves = [x.detach().double().requires_grad_() for x in tensors]
    q, k, v = in_stretches(problem, *leaves)
    out = scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    out = out.reshape(grad.shape)
    return out.detach(), list(torch.autograd.grad(out, leaves, grad.double()))


def contest(
    problem: Problem, device: torch.device, dtype: torch.dtype, names: list[str], rounds: int
) -> list[Row]:
    """One row per contender and pass, with seconds and relative error, or why it cannot run."""
    torch._dynamo.reset()
    tensors = operands(problem, device, dtype)
    grad = torch.randn_like(tensors[0])
    want, want_grads = exact(problem, tensors, grad)

    @cache
    def contender(name: str) -> tuple[Attention, list[Tensor]]:
        if name == "megavlm":
            refuse_plain_torch(tensors[0])
        inputs = tensors
        if name in NEED_REPEATED_HEADS:
            q, *kv = (x.detach() for x in tensors)
            inputs = [x.requires_grad_() for x in (q, *(repeat_heads(problem, x) for x in kv))]
        return CONTENDERS[name](problem, device), inputs

    def forward(name: str) -> tuple[Callable[[], Tensor], float]:
        attend, inputs = contender(name)
        inputs = [x.detach() for x in inputs]  # FlexAttention on a CPU refuses all that want grads

        def run() -> Tensor:
            with torch.no_grad():
                return attend(*inputs)

        return run, relative_error(run().reshape(want.shape), want)

    def backward(name: str) -> tuple[Callable[[], tuple[Tensor, ...]], float]:
        attend, inputs = contender(name)
        out = attend(*inputs)
        grad_out = grad.view(out.shape)

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, inputs, grad_out, retain_graph=True)

        dq, *dkv = (x.double() for x in run())
        dkv = [x.unflatten(1, (problem.kv_heads, -1)).sum(2) for x in dkv]  # if repeated
        found = zip((dq, *dkv), want_grads, strict=True)
        return run, max(relative_error(x, want) for x, want in found)

    passes: dict[str, Callable[[str], Any]] = {"forward": forward}
    if problem.trains:
        passes["backward"] = backward
    if "FlexAttention" in names:
        passes["mask"] = lambda _: (partial(block_mask, problem, device), None)
    rows: list[Row] = []
    for direction, prepare in passes.items():
        entered = ["FlexAttention"] if direction == "mask" else names
        about = {"problem": problem.name, "tensor_parallel": problem.tensor_parallel}
        about["direction"] = direction
        results = race({name: partial(prepare, name) for name in entered}, device, rounds)
        rows += [about | row for row in results]
    return rows


def refuse_plain_torch(*operands: Tensor, width_limit: int = library.HEAD_WIDTH_LIMIT) -> None:
    """Raises where megavlm would fall back to it: that time would not be of its kernels."""
    for x in operands:
        if reason := library.refusal(x, width_limit):
            raise UnavailableError(reason)


def with_rates(
    row: Row, problem: Problem, dtype: torch.dtype, ceilings: tuple[float, float]
) -> Row:
    """Adds FLOP/s, and the fraction of the roofline reached."""
    if row["seconds"] is None or row["direction"] == "mask":
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


def table_of(rows: list[Row]) -> str:
    """Problems down; megavlm's figures first, then each contender's time over megavlm's."""
    groups: dict[tuple[str, int, str], dict[str, Row]] = {}
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
    masks = [r["seconds"] for r in rows if r["direction"] == "mask" and r["seconds"]]
    note = (
        f"\nFlexAttention's block mask takes {min(masks) * 1e6:,.0f} to {max(masks) * 1e6:,.0f} us "
        "more, not counted above.\n"
        if masks
        else ""
    )
    return (
        markdown_table(lines)
        + "\n`NAME /`: that contender's time over megavlm's, so above 1 megavlm is faster. `-`: "
        "cannot run there.\n" + note + refusals(rows)
    )


def draw(rows: list[Row], path: Path) -> None:
    """Bars of every contender's rate, forward, one group per problem."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path}: matplotlib is not installed")
        return
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


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses, with the options of all benchmarks; then sets torch up for them."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default: 1)")
    parser.add_argument("--rounds", type=int, help="timed calls of each contender")
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--tensor-parallel", type=int, help="this size alone")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no problem after these"
    )
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.json")
    options = parser.parse_args()
    if library.MISSING:
        parser.error(f"megavlm's kernels are not built: {library.MISSING}")
    options.device, options.dtype = torch.device(options.device), getattr(torch, options.dtype)
    if options.device.type == "cpu":
        torch.set_num_threads(options.threads)
    options.problems = [
        p
        for p in problems()
        if options.only in p.name
        and (options.device.type == "cuda" or (p.on_cpu and p.tensor_parallel == 8))
        and options.tensor_parallel in (None, p.tensor_parallel)
    ]
    if not options.problems:
        parser.error("no problem is left: see --only and --tensor-parallel")
    # A compiled contender must not go on uncompiled without a word.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._functorch.config.donated_buffer = False  # backward passes are timed again and again
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contenders", help="comma-separated; megavlm always runs")
    options = options_of(parser)
    device, dtype = options.device, options.dtype
    names = list(CONTENDERS)
    if options.contenders:
        names = ["megavlm", *(n for n in names if n in options.contenders.split(","))]
    ceilings = measured_ceilings(device, dtype)
    about = machine(device) | {
        "dtype": str(dtype),
        "matrix product": f"{ceilings[0] / 1e12:.3g} TFLOP/s",
        "copy": f"{ceilings[1] / 1e9:.3g} GB/s",
    }
    print(about)

    def contest_with_rates(problem: Problem) -> list[Row]:
        rounds = options.rounds or (20 if device.type == "cuda" else 5)
        rows = contest(problem, device, dtype, names, rounds)
        return [with_rates(row, problem, dtype, ceilings) for row in rows]

    def report(rows: list[Row], not_run: str) -> None:
        if options.out:
            write_results(options.out, "Cross-attention", about, table_of(rows) + not_run, rows)

    rows = run_in_turn(options.problems, contest_with_rates, report, options.seconds)
    print(table_of(rows))
    if options.out:
        draw(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
