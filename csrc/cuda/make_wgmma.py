"""Writes wgmma.cuh: PTX names every register, so each width is an instruction of its own."""

from pathlib import Path

WIDTHS = [64, 80, 96, 112, 128, 144, 256]

HEADER = """\
// Written by make_wgmma.py; do not edit.
// d (64 x N, fp32) = or += a (64 x 16) . b (16 x N), both bf16, by one warpgroup. Thread 32 w + l
// holds of d: row 16 w + l / 4 + 8 * ((i / 2) % 2), column 8 * (i / 4) + 2 * (l % 4) + i % 2 in
// d[i]; of a in registers: a[j] is columns 2 * (l % 4) + 8 * (j / 2) and the next, of row
// 16 w + l / 4 + 8 * (j % 2). The operands in shared memory are descriptors (sm90.cuh), K-major, or
// MN-major where A_TRANSPOSED / B_TRANSPOSED is 1.
#pragma once

#include <cstdint>

namespace megavlm::sm90 {

template <int N, int A_TRANSPOSED, int B_TRANSPOSED>
struct Wgmma;

template <int A_TRANSPOSED = 0, int B_TRANSPOSED = 0, int R>
__device__ __forceinline__ void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<2 * R, A_TRANSPOSED, B_TRANSPOSED>::product(d, a, b, accumulate);
}

template <int B_TRANSPOSED = 0, int R>
__device__ __forceinline__ void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  Wgmma<2 * R, 0, B_TRANSPOSED>::product(d, a, b, accumulate);
}
// clang-format off
"""

FOOTER = """
// clang-format on
}  // namespace megavlm::sm90
"""


def lines(items: list[str], indent: str, per_line: int = 16) -> str:
    rows = [items[i : i + per_line] for i in range(0, len(items), per_line)]
    return f"\n{indent}".join(", ".join(row) + ("," if row is not rows[-1] else "") for row in rows)


def instruction(width: int) -> str:
    count = width // 2
    accumulators = [f'"+f"(d[{i}])' for i in range(count)]
    rows = [", ".join(f"%{i}" for i in range(r, min(r + 16, count))) for r in range(0, count, 16)]
    text = ', "\n        "'.join(rows)
    name = f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.bf16.bf16"
    outputs = lines(accumulators, "          ", 8)

    def product(a: str, operand: str, inputs: str, predicate: int, flags: str, immediates: str):
        return f"""
  __device__ __forceinline__ static void product(float (&d)[{count}], {a}, uint64_t b,
                                                 bool accumulate) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{predicate}, 0;\\n{name} {{"
        "{text}"
        "}}, {operand}, p, 1, 1, {flags};\\n}}\\n"
        : {outputs}
        : {inputs}, "l"(b), "r"(int(accumulate)), {immediates});
  }}"""

    from_shared = product(
        "uint64_t a",
        f"%{count}, %{count + 1}",
        '"l"(a)',
        count + 2,
        f"%{count + 3}, %{count + 4}",
        '"n"(A_TRANSPOSED), "n"(B_TRANSPOSED)',
    )
    registers = ", ".join(f"%{count + i}" for i in range(4))
    from_registers = product(
        "const uint32_t (&a)[4]",
        f"{{{registers}}}, %{count + 4}",
        '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])',
        count + 5,
        f"%{count + 6}",
        '"n"(B_TRANSPOSED)',
    )
    return f"""
template <int A_TRANSPOSED, int B_TRANSPOSED>
struct Wgmma<{width}, A_TRANSPOSED, B_TRANSPOSED> {{{from_shared}
{from_registers}
}};
"""


if __name__ == "__main__":
    text = HEADER + "".join(instruction(width) for width in WIDTHS) + FOOTER
    Path(__file__).with_name("wgmma.cuh").write_text(text)
