"""`make parity`: the matrix of worst differences between every layout and one plain process.

Prints Markdown: a table for every precision, recomputation, frozen part and mix of images and text;
rows are what is compared, columns the layouts. Ends with the worst of each over all tables, and
with exit code 1 if a layout does not compute the same.
"""

import argparse
import itertools
import sys
import time
from collections import defaultdict
from functools import lru_cache

from tests.parity.runs import (
    LAYOUTS,
    MIXES,
    Layout,
    Outcome,
    differences,
    engine_outcome,
    plain_outcome,
    settings,
    worst,
)

STEPS = 20
# AdamW divides by the root of the second moment. Where a gradient is near zero, that turns its
# rounding into whole steps; this epsilon does not, so what remains is what the engines do. The
# tables headed "recipe" use the recipe's 1e-8.
EPSILON = 1e-5
RECIPE_EPSILON = 1e-8
RECIPE = "fp32, recipe's epsilon"
# Beyond them a layout has failed. In bf16 every rounding of 4e-3 in a sum is legitimate.
BOUNDS = {
    "fp32": {"loss": 1e-5, "gradient norm": 1e-5, "gradient": 1e-5, "weights": 1e-5},
    "bf16": {"loss": 2e-3, "gradient norm": 3e-2, "gradient": 5e-2, "weights": 2e-2},
    RECIPE: {"loss": 1e-5, "gradient norm": 1e-4, "gradient": 1e-5, "weights": 2e-3},
}

Row = dict[str, float]


@lru_cache
def expected(mix: str, precision: str, frozen: str, epsilon: float) -> Outcome:
    """The plain process; recomputation changes nothing there, to the bit."""
    return plain_outcome(
        settings(None, STEPS, *_overrides(precision, "none", frozen, epsilon)), mix
    )


def _overrides(precision: str, recompute: str, frozen: str, epsilon: float) -> list[str]:
    return [
        f"train.precision={precision}",
        f"train.recompute={recompute}",
        f"train.frozen=[{frozen}]",
        f"optimizer.epsilon={epsilon}",
    ]


def table(
    layouts: list[Layout], mix: str, precision: str, recompute: str, frozen: str, epsilon: float
) -> dict[str, Row]:
    """Differences by column. The bf16 tables begin with what bf16 alone does to one process."""
    reference = expected(mix, precision, frozen, epsilon)
    columns: dict[str, Row] = {}
    if precision == "bf16":
        columns["bf16 itself"] = differences(reference, expected(mix, "fp32", frozen, epsilon))
    for layout in layouts:
        run = settings(layout, STEPS, *_overrides(precision, recompute, frozen, epsilon))
        columns[layout.name] = differences(engine_outcome(layout, run, mix), reference)
    return columns


def print_table(title: str, columns: dict[str, Row]) -> None:
    """One Markdown table."""
    print(f"\n### {title}\n")
    print("| worst difference | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name in next(iter(columns.values())):
        cells = " | ".join(f"{row[name]:.1e}" for row in columns.values())
        print(f"| {name} | {cells} |", flush=True)


def main() -> int:
    """Print the matrix; returns the exit code."""
    names = [layout.name for layout in LAYOUTS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", nargs="+", choices=names, default=names, metavar="LAYOUT")
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"]
    )
    options = parser.parse_args()
    layouts = [layout for layout in LAYOUTS if layout.name in options.layouts]
    cases = [
        (precision, recompute, frozen, mix, EPSILON)
        for precision, recompute, frozen, mix in itertools.product(
            options.precisions, ("none", "selective", "full"), ("", "encoder"), MIXES
        )
    ]
    cases += [("fp32", "none", "", mix, RECIPE_EPSILON) for mix in MIXES]
    worst_of: dict[str, dict[str, Row]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(float))
    )
    started = time.perf_counter()
    for number, (precision, recompute, frozen, mix, epsilon) in enumerate(cases, start=1):
        columns = table(layouts, mix, precision, recompute, frozen, epsilon)
        kind = precision if epsilon == EPSILON else RECIPE
        title = f"{kind}, recompute {recompute}, {frozen or 'nothing'} frozen, {mix}"
        print_table(title, columns)
        for column, row in columns.items():
            for name, difference in row.items():
                worst_of[kind][column][name] = worst([worst_of[kind][column][name], difference])
        minutes = (time.perf_counter() - started) / 60
        print(f"table {number} of {len(cases)}, {minutes:.1f} min", file=sys.stderr, flush=True)
    for kind, columns in worst_of.items():
        print_table(f"Worst of all tables: {kind}", columns)
    failed = [
        f"{kind}, {column}: {name} {difference:.1e}"
        for kind, columns in worst_of.items()
        for column, row in columns.items()
        for name, difference in row.items()
        if column != "bf16 itself"
        and not difference <= BOUNDS[kind].get(name, BOUNDS[kind]["gradient"])
    ]
    print("\n" + ("\n".join(failed) if failed else "Every layout computes what one process does."))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
