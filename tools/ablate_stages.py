"""What the earlier stages of a plan buy: the last stage with and without them, over several seeds.

    python tools/ablate_stages.py configs/demo.yaml --out docs/benchmarks/curriculum-cpu.md

Every variant leaves out one more stage from the front; what is left trains as the run file says.
Runs lie in `runs/ablation`; those that are done are not done again, those that were stopped go on.
"""

import argparse
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import yaml

from megavlm.eval.run import read_evaluation

FOLDER = Path("runs/ablation")


def main() -> None:
    """Run what is missing, and write the table of what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file of the table")
    options = parser.parse_args()
    plan = yaml.safe_load(options.run_file.read_text())
    names = list(plan["stages"])
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "hostfile").write_text(f"localhost slots={options.ranks}\n")
    scores: dict[tuple[str, ...], list[dict[tuple[str, str], float]]] = defaultdict(list)
    for seed in options.seeds:
        for left_out in range(len(names)):
            kept = names[left_out:]
            scores[tuple(kept)].append(_train(plan, kept, seed))
            options.out.write_text(_page(options, plan, scores))
    print(f"table: {options.out}")


def _train(plan: dict, kept: list[str], seed: int) -> dict[tuple[str, str], float]:
    """One run; the scores of its last stage, by split and measure."""
    folder = FOLDER / f"{'-'.join(kept)}-seed-{seed}"
    run_file = folder.with_suffix(".yaml")
    stages = {name: plan["stages"][name] for name in kept}
    variant = plan | {"run_folder": str(folder), "seed": seed, "stages": stages}
    run_file.write_text(yaml.safe_dump(variant, sort_keys=False, allow_unicode=True))
    if kept[-1] not in read_evaluation(folder):
        command = [sys.executable, "-m", "megavlm", "train", str(run_file)]
        subprocess.run([*command, "--hostfile", str(FOLDER / "hostfile")], check=True)
    rows = read_evaluation(folder)[kept[-1]]["scores"]
    return {(row["split"], row["measure"]): row["model"] for row in rows}


def _page(
    options: argparse.Namespace,
    plan: dict,
    scores: dict[tuple[str, ...], list[dict[tuple[str, str], float]]],
) -> str:
    """The table: a column for each variant; of several seeds the mean and the range."""
    variants = list(scores)
    seeds = options.seeds[: max(len(runs) for runs in scores.values())]
    told = f"seed {seeds[0]}"
    if len(seeds) > 1:
        told = f"mean of the seeds {', '.join(map(str, seeds))}, in brackets lowest and highest"
    samples = [sum(_samples(plan, name) for name in variant) for variant in variants]
    lines = [
        "# What the earlier stages buy",
        "",
        f"Scores after the stage *{variants[0][-1]}*, which is the same in every column, on "
        f"{options.ranks} CPU",
        f"ranks; {told}. The earlier stages are extra work: the second row counts samples.",
        "",
        f"    python tools/ablate_stages.py {options.run_file} --out {options.out}",
        "",
        "| split | measure | " + " | ".join(" + ".join(variant) for variant in variants) + " |",
        "|---|---|" + "---|" * len(variants),
        "| | samples of all stages | " + " | ".join(f"{n:,}" for n in samples) + " |",
    ]
    for split, measure in scores[variants[0]][0]:
        cells = [_cell([run[split, measure] for run in scores[v]]) for v in variants]
        lines.append(f"| {split} | {measure} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def _samples(plan: dict, name: str) -> int:
    train = plan["train"] | plan["stages"][name].get("train", {})
    return train["steps"] * train["samples_per_step"]


if __name__ == "__main__":
    main()
