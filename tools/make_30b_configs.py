"""Writes configs/30b: for each GPU and engine, the fastest layout that the planner finds."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megavlm.config.load import load_plan
from megavlm.planner.choice import layout_name
from megavlm.planner.cut import TOKENS_PER_TEXT
from megavlm.planner.hardware import GIB, GPUS, cluster_of
from megavlm.planner.report import deepspeed_json
from megavlm.planner.search import Candidate, search

CONFIGS = Path(__file__).parent.parent / "configs"
TEMPLATE = CONFIGS / "vlm-30b.yaml"
HOSTS, GPUS_PER_HOST = 16, 8
ENGINES = ("zero3", "fsdp2", "megatron")


def files_of(gpu: str, engine: str) -> Iterator[tuple[Path, str]]:
    """Paths below configs/, and their texts."""
    run = load_plan(TEMPLATE).last
    cluster = cluster_of(gpu, HOSTS, GPUS_PER_HOST)
    best = search(run, cluster, TOKENS_PER_TEXT, [engine]).best
    name = f"{engine}-{gpu}"
    yield Path("30b") / f"{name}.yaml", _header(best, gpu) + _run_file(best, name)
    if engine == "zero3":
        yield Path("ds") / f"zero3_30b_{gpu}.json", deepspeed_json(best.run)


def _header(best: Candidate, gpu: str) -> str:
    prediction, micro_batches = best.prediction, best.run.train.micro_batches
    recipes = load_plan(TEMPLATE).last.train.micro_batches
    differs = ""
    if micro_batches != recipes:
        differs = (
            f"# Micro-batches: {micro_batches}, where the recipe ({TEMPLATE.name}) has {recipes}; "
            "same gradient, but for rounding.\n"
        )
    return (
        f"# The fastest layout for 30.5 billion parameters on {HOSTS} hosts of {GPUS_PER_HOST} "
        f"{best.cluster.gpu.name}\n# that the planner finds for this engine: "
        f"{layout_name(best.run)}. Written by `make configs`; see\n"
        f"# `megavlm plan configs/vlm-30b.yaml --hosts {HOSTS} --gpu {gpu}`.\n"
        f"# Predicted: {prediction.seconds:.2f} s a step, model-FLOPs utilisation "
        f"{prediction.utilisation(best.cluster):.0%}, {best.fullest.total / GIB:.0f} of "
        f"{best.cluster.gpu.memory_bytes / GIB:.0f} GiB on the fullest GPU.\n{differs}"
    )


def _run_file(best: Candidate, name: str) -> str:
    run, plain = best.run, load_plan(TEMPLATE, [f"engine={best.run.engine}"]).last
    tree: dict[str, Any] = yaml.safe_load(TEMPLATE.read_text())
    for section in ENGINES:
        tree.pop(section, None)
    tree["run_folder"] = f"runs/30b/{name}"
    tree["train"] |= {"micro_batches": run.train.micro_batches, "recompute": run.train.recompute}
    chosen = asdict(getattr(run, run.engine))
    default = asdict(type(getattr(plain, run.engine))())
    changed = {key: value for key, value in chosen.items() if value != default[key]}
    tree["engine"] = run.engine
    if changed:
        tree[run.engine] = changed
    return yaml.safe_dump(tree, sort_keys=False)


def main() -> None:
    """Write all files, and print a line for each."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for gpu in GPUS:
        for engine in ENGINES:
            for path, text in files_of(gpu, engine):
                (CONFIGS / path).parent.mkdir(exist_ok=True)
                (CONFIGS / path).write_text(text)
                print(CONFIGS / path)


if __name__ == "__main__":
    main()
