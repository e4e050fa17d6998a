"""`megavlm plan`: what a run is, without starting it, and which layout suits a cluster."""

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megavlm.commands.options import Commands, add_run_command, positive
from megavlm.config.plan import Plan
from megavlm.errors import ConfigError

if TYPE_CHECKING:
    from megavlm.planner.hardware import Cluster

ONLY_WITH_GPU = ("hosts", "gpus_per_host", "tokens_per_text", "calibrate", "out")


def add_command(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add its options."""
    plan = add_run_command(commands, "plan", _plan, "print what a run is, without starting it")
    plan.add_argument("--hostfile", type=Path, help="plan the run on these hosts")
    plan.add_argument(
        "--ds-json",
        type=Path,
        help="write the last stage's DeepSpeed settings; others differ in batch and bucket sizes",
    )
    plan.add_argument(
        "--gpu",
        help="compare all layouts on hosts of these: a100-40, a100-80, h100-80, h200, or a file "
        "that --calibrate has written",
    )
    plan.add_argument("--hosts", type=positive, help="of the cluster (1)")
    plan.add_argument("--gpus-per-host", type=positive, help="of each of them (8)")
    plan.add_argument(
        "--tokens-per-text",
        type=positive,
        help="mean length, with the prompt (64, or data.row_tokens if that is less)",
    )
    plan.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="measure this machine, use that instead of data sheets, and write it (.json)",
    )
    plan.add_argument(
        "--out", type=Path, help="folder for the chosen layout's pictures, hostfile and scripts"
    )
    plan.add_argument(
        "--picture",
        type=Path,
        help="draw the stages, or one's layout (svg, png, pdf)",
    )


def _plan(plan: Plan, options: argparse.Namespace) -> None:
    from megavlm.dist.launch import launch_command, ranks_of, read_hostfile
    from megavlm.planner.choice_files import make_folder
    from megavlm.planner.report import print_plan, write_deepspeed_json

    # What is wrong with an option comes to light before anything is written or takes long.
    given = [f"--{name.replace('_', '-')}" for name in ONLY_WITH_GPU if getattr(options, name)]
    if given and not options.gpu:
        compare = "compares" if len(given) == 1 else "compare"
        raise ConfigError(f"{' and '.join(given)} {compare} layouts; name a --gpu, too")
    compared = _compared(plan, options) if options.gpu else None
    ranks = ranks_of(plan, options.hostfile) if options.hostfile and not options.gpu else 0
    plan = plan.on(ranks) if ranks else plan
    if options.picture and len(plan.stages) > 1:
        from megavlm.planner.timeline import draw_timeline

        draw_timeline(plan, options.picture)
    elif options.picture:
        from megavlm.planner.picture import draw_layout

        draw_layout(plan.first, options.picture)
    if options.ds_json:
        write_deepspeed_json(plan.last, options.ds_json)
    if options.out:
        make_folder(options.out)
    print_plan(plan, ranks=ranks)
    if compared:
        _choose(plan, options, *compared)
    elif options.hostfile:
        hosts = read_hostfile(options.hostfile)
        command = launch_command(options.hostfile, hosts, options.run_file, options.overrides)
        print(shlex.join(command))


def _compared(plan: Plan, options: argparse.Namespace) -> tuple["Cluster", dict[str, int], float]:
    """The cluster on which layouts are compared, its slots by host, and a text's mean length."""
    from megavlm.dist.launch import check_planned, named_hosts, read_hostfile
    from megavlm.planner.cut import TOKENS_PER_TEXT
    from megavlm.planner.hardware import cluster_of
    from megavlm.planner.search import predicted_stages

    count, slots = options.hosts, options.gpus_per_host
    if options.hostfile:
        hosts = read_hostfile(options.hostfile)
        count, slots = count or len(hosts), slots or next(iter(hosts.values()))
        check_planned(options.hostfile, count, slots)
    else:
        count, slots = count or 1, slots or 8
        hosts = named_hosts(count, slots)
    row_tokens = max(stage.run.data.row_tokens for stage in predicted_stages(plan))
    tokens_per_text = options.tokens_per_text or min(TOKENS_PER_TEXT, row_tokens)
    if tokens_per_text > row_tokens:
        raise ConfigError(
            f"--tokens-per-text {tokens_per_text} is more than data.row_tokens={row_tokens}, which "
            "a text must fit in; lower it, or raise data.row_tokens"
        )
    if options.calibrate and options.calibrate.suffix != ".json":
        raise ConfigError(
            f"--calibrate {options.calibrate} must end in .json, by which --gpu knows the file"
        )
    return cluster_of(options.gpu, count, slots), hosts, tokens_per_text


def _choose(
    plan: Plan,
    options: argparse.Namespace,
    cluster: "Cluster",
    hosts: dict[str, int],
    tokens_per_text: float,
) -> None:
    """Compare layouts on a cluster, whose GPUs are measured first if that is asked for."""
    from megavlm.planner.choice_report import print_choice

    if options.calibrate:
        from megavlm.planner.calibrate import measure, print_calibration
        from megavlm.planner.hardware import save_gpu
        from megavlm.planner.search import planned_stage

        precision = planned_stage(plan).run.train.precision
        measured = measure(cluster.gpu, options.gpus_per_host, precision)
        print_calibration(measured, cluster.gpu, precision)
        save_gpu(measured, options.calibrate)
        print(f"wrote {options.calibrate}; --gpu {options.calibrate} uses it again")
        cluster = replace(cluster, gpu=measured)
    print_choice(
        *(plan, cluster, tokens_per_text, hosts, options.run_file, options.overrides),
        hostfile=options.hostfile,
        folder=options.out,
    )
