"""Predicts the goodput of 128 GPUs from a drill's figures and published failure rates.

    python tools/predict_goodput.py --drill docs/benchmarks/drill-cpu.json --out docs/goodput.md

Writes a page, and a picture beside the others in docs/images. Nothing of it is measured on GPUs.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from megavlm.config.guard import GuardSettings
from megavlm.planner.failures import FailureCosts, best_interval_seconds, predicted_goodput
from megavlm.planner.picture import PICTURE_STYLE, save_picture

DAY = 86_400.0
MTTF_DAYS = {
    2.6: "1,024 GPUs failed every 7.9 h (Kokolis et al. 2024, arXiv:2410.21680), 128 of them "
    "every 63 h",
    16.5: "419 interruptions in 54 days on 16,384 GPUs (Llama 3, Dubey et al. 2024, "
    "arXiv:2407.21783, section 3.3.4), 128 of them every 396 h",
}
RESTARTS = {60.0: "1 min", 300.0: "5 min", 900.0: "15 min", 1800.0: "30 min"}
RANK_BYTES = 2.9e9
"""States of `vlm-30b` on each of 128 ranks: weights and both moments in fp32."""
COPY_BYTES_PER_SECOND = 3.4e9
"""Measured: 17 MB of a rank stood still for 5.1 ms, by a CPU that copies (docs/checkpoints.md)."""
DONE_BYTES_PER_SECOND = 58e6
"""Measured: 17 MB of a rank were with their neighbour after 0.30 s, on two cores that train."""
HANG_SECONDS = GuardSettings().hang_seconds


def main() -> None:
    """Write the page and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--drill", type=Path, required=True, help="what tools/drill.py has written")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file")
    options = parser.parse_args()
    injections = json.loads(options.drill.read_text())
    picture = options.out.parent / "images" / "goodput.svg"
    with matplotlib.rc_context(PICTURE_STYLE):
        save_picture(_figure(), picture)
    options.out.write_text(_page(injections, picture.relative_to(options.out.parent)))


def costs(restart_seconds: float) -> FailureCosts:
    """Of `vlm-30b` on 128 GPUs; every failure is found as late as a hang."""
    return FailureCosts(
        detected_seconds=HANG_SECONDS,
        restart_seconds=restart_seconds,
        stall_seconds=RANK_BYTES / COPY_BYTES_PER_SECOND,
        done_seconds=RANK_BYTES / DONE_BYTES_PER_SECOND,
    )


def goodput(of: FailureCosts, days: float) -> float:
    """With copies as often as is best."""
    return predicted_goodput(of, days * DAY, best_interval_seconds(of, days * DAY))


def _figure() -> Figure:
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes: Any = figure.subplots()
    days = np.geomspace(1, 30, 60)
    for restart, name in RESTARTS.items():
        shares = [100 * goodput(costs(restart), d) for d in days]
        axes.plot(days, shares, label=f"restart in {name}")
    axes.axhline(99, color="#5A5A5A", linewidth=0.8, linestyle="--")
    for at in MTTF_DAYS:
        axes.axvline(at, color="#5A5A5A", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="mean time to failure of 128 GPUs (days)", ylim=(97, 100))
    axes.set(ylabel="predicted goodput (%)", xticks=[1, 2.6, 5, 10, 16.5, 30])
    axes.set_xticklabels(["1", "2.6", "5", "10", "16.5", "30"])
    axes.minorticks_off()
    axes.legend(loc="lower right", frameon=False)
    return figure


def _page(injections: Sequence[dict[str, Any]], picture: Path) -> str:
    killed = [i for i in injections if i["fault"] == "SIGKILL of a rank"]
    hung = [i for i in injections if i["fault"] == "hang of a rank"]
    restart = median(i["recovered_seconds"] - i["detected_seconds"] for i in killed)
    stall, done = costs(0).stall_seconds, costs(0).done_seconds
    lines = [
        "# Goodput of 128 GPUs: a prediction",
        "",
        "Goodput is the share of wall time in which the model learns for good. **Everything below",
        "is arithmetic**: no run on GPUs has been measured. `megavlm report` counts it for yours.",
        "",
        f"![predicted goodput over the mean time to failure]({picture})",
        "",
        "(Without what guards and metrics take of a step; every failure is found like a hang.)",
        "",
        "| time to failure | restart | copies every | goodput, failures found after 9 min | "
        "after 1 s |",
        "|---|---|---|---|---|",
    ]
    for days in MTTF_DAYS:
        for seconds, name in RESTARTS.items():
            of = costs(seconds)
            minutes = best_interval_seconds(of, days * DAY) / 60
            quick = goodput(replace(of, detected_seconds=1.0), days)
            lines.append(
                f"| {days} days | {name} | {minutes:.1f} min | {goodput(of, days):.2%} | "
                f"{quick:.2%} |"
            )
    budget = 0.01 * min(MTTF_DAYS) * DAY / 60
    lines += [
        "",
        f"At 99 %, a failure every {min(MTTF_DAYS)} days may cost {budget:.0f} minutes, one every "
        f"{max(MTTF_DAYS)} days {0.01 * max(MTTF_DAYS) * DAY / 60:.0f}: detection, restart, and "
        "steps that are done again.",
        "",
        "## What goes in",
        "",
        "| what | value | from |",
        "|---|---|---|",
        *(f"| mean time to failure | {days} days | {of} |" for days, of in MTTF_DAYS.items()),
        f"| detection | {HANG_SECONDS:.0f} s | `guard.hang_seconds`, as if every failure were a "
        f"hang; in the drill a killed rank was known after {_median(killed):.1f} s, a stopped one "
        f"after {_median(hung):.1f} s with 8 s set and torchrun's 30 s |",
        f"| restart | 1 to 30 min | an assumption: {restart:.1f} s in the drill, where little is "
        "to be loaded |",
        f"| standing still for a copy | {stall:.2f} s | {RANK_BYTES / 1e9} GB of a rank, at "
        f"the {COPY_BYTES_PER_SECOND / 1e9} GB/s of the demo's copies between two places of a "
        "host's memory |",
        f"| until a copy counts | {done:.0f} s | at the {DONE_BYTES_PER_SECOND / 1e6:.0f} MB/s of "
        "the demo's, on two cores that also train |",
        "",
        "The formula is `predicted_goodput` in [failures.py](../megavlm/planner/failures.py); the",
        "copies come as often as is best (Young 1974). Runs played through with random failures",
        "differ by 0.0003 at most (tests/planner/test_failures.py).",
        "",
    ]
    return "\n".join(lines)


def _median(injections: Sequence[dict[str, Any]]) -> float:
    return median(i["detected_seconds"] for i in injections)


if __name__ == "__main__":
    main()
