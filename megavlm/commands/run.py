"""Commands that train a run, try a step of it, and look at what it has learned."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from megavlm.commands.options import (
    Commands,
    add_quantization,
    add_run_command,
    named_folder,
    positive,
)
from megavlm.config.plan import Plan
from megavlm.errors import CheckpointError, ConfigError
from megavlm.redact import without_secrets


def add_commands(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add their options."""
    train = add_run_command(
        commands, "train", _train, "train, from the newest checkpoint if there is one"
    )
    train.add_argument("--hostfile", type=Path, help="start the run on these hosts")
    train.add_argument(
        "--restarts",
        type=positive,
        help="start it again where it fails, on the hosts that are left; give up after so many "
        "failures without a new checkpoint, and one more",
    )
    dryrun = add_run_command(
        commands, "dryrun", _dryrun, "run one step of some ranks without data: bytes, collectives"
    )
    dryrun.add_argument("--ranks", type=positive, required=True, help="ranks of the run")
    which = dryrun.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, action="append", help="run this one; repeatable")
    which.add_argument("--all-ranks", action="store_true", help="and check that they fit together")
    dryrun.add_argument("--micro-batches", type=positive, help="of the step, if not as by default")
    dryrun.add_argument("--gpus-per-host", type=positive, default=8)
    dryrun.add_argument("--only-build", action="store_true", help="build the engine, run no step")
    evaluate = add_run_command(
        commands, "eval", _eval, "measure a checkpoint on held-out samples or on benchmarks"
    )
    evaluate.add_argument(
        "--benchmark",
        type=named_folder,
        action="append",
        default=[],
        dest="benchmarks",
        metavar="NAME=FOLDER",
        help="coco_captions, flickr30k, vqav2, okvqa, textvqa, imagenet, or coco_captions_test, "
        "vqav2_test_dev, vqav2_test, textvqa_test, whose answers are only written; repeatable",
    )
    evaluate.add_argument("--shots", type=positive, help="examples before each question")
    evaluate.add_argument("--limit", type=positive, help="at most so many items, evenly spaced")
    evaluate.add_argument("--batch-size", type=positive, help="answers at the same time (64)")
    evaluate.add_argument(
        "--tensor-parallel", type=positive, help="ranks that hold a model together (1)"
    )
    evaluate.add_argument(
        "--skip-bad", action="store_true", help="leave out entries that cannot be used"
    )
    evaluate.add_argument("--stage", help="whose newest checkpoint, if not the run's")
    add_quantization(evaluate)
    add_run_command(commands, "report", _report, "draw a run as one HTML page")


def _train(plan: Plan, options: argparse.Namespace) -> None:
    if options.hostfile is None:
        if options.restarts:
            raise ConfigError("--restarts starts the hosts of a --hostfile again; name one, too")
        from megavlm.dist.launch import set_environment

        set_environment(plan.first)
        # W&B, which DeepSpeed imports where it is installed, would report errors to its makers.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        from megavlm.eval.run import evaluate_stage
        from megavlm.train.loop import train

        train(plan, after_stage=evaluate_stage)
        return
    import torch

    from megavlm.dist.launch import launch_command, ranks_of, read_hostfile
    from megavlm.train.preflight import check_plan

    ranks = ranks_of(plan, options.hostfile)
    check_plan(plan.on(ranks), ranks)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if options.restarts:
        from megavlm.train.restart import Restarts

        restarts = Restarts(plan, options.hostfile, options.run_file, options.overrides)
        sys.exit(restarts.run(options.restarts))
    hosts = read_hostfile(options.hostfile)
    command = launch_command(options.hostfile, hosts, options.run_file, options.overrides)
    print(without_secrets(shlex.join(command)), flush=True)
    # The launcher beside this interpreter, also when its folder is not on the search path.
    os.execv(Path(sys.executable).with_name("deepspeed"), command)


def _dryrun(plan: Plan, options: argparse.Namespace) -> None:
    # Before anything touches them: a host with GPUs and one without do the same.
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    from megavlm.dryrun.report import print_dry_run

    print_dry_run(
        plan.on(options.ranks).last,
        options.ranks,
        chosen=range(options.ranks) if options.all_ranks else options.rank,
        micro_batches=options.micro_batches,
        gpus_per_host=options.gpus_per_host,
        only_build=options.only_build,
    )


def _eval(plan: Plan, options: argparse.Namespace) -> None:
    folders = dict(options.benchmarks)
    if len(folders) < len(options.benchmarks):
        raise ConfigError("a benchmark is named twice; evaluate its folders one after the other")
    if not folders:
        only = ("shots", "limit", "skip_bad", "batch_size", "tensor_parallel")
        if given := [f"--{name.replace('_', '-')}" for name in only if getattr(options, name)]:
            raise ConfigError(
                f"{', '.join(given)}: only for benchmarks; name one with --benchmark, or leave out"
            )
        if options.quantization is not None:
            from megavlm.eval.quantized import evaluate_quantized

            evaluate_quantized(plan, options.stage, options.quantization)
            return
        from megavlm.eval.run import evaluate

        evaluate(plan, options.stage)
        return
    from megavlm.eval.benchmark_run import Wanted, evaluate_benchmarks
    from megavlm.eval.samples import BATCH_SIZE

    wanted = Wanted(
        folders=folders,
        shots=options.shots or 0,
        limit=options.limit,
        skip_bad=options.skip_bad,
        stage=options.stage,
        quantization=options.quantization,
        batch_size=options.batch_size or BATCH_SIZE,
        tensor_parallel=options.tensor_parallel or 1,
    )
    evaluate_benchmarks(plan, wanted)


def _report(plan: Plan, options: argparse.Namespace) -> None:
    from megavlm.checkpoint.listing import newest_checkpoint
    from megavlm.checkpoint.state import check_checkpoint, checkpoint_root
    from megavlm.data.tokenizer import Tokenizer
    from megavlm.eval.report import write_report
    from megavlm.train.goodput import goodput_of

    run = plan.first
    if not run.run_folder.is_dir():
        raise CheckpointError(f"{run.run_folder} is not there; train first with `megavlm train`")
    newest = newest_checkpoint(checkpoint_root(run), run.checkpoint)
    if newest is not None:  # the page would show other stages
        check_checkpoint(newest, plan, Tokenizer(run.data.tokenizer))
    print(f"report: {write_report(plan, options.run_file)}")
    if found := goodput_of(run.run_folder):
        uses = sorted(found.seconds.items(), key=lambda use: -use[1])
        print(
            f"goodput {found.fraction:.1%} of {found.wall_seconds:,.0f} s since the first start: "
            + ", ".join(f"{use} {seconds:,.1f} s" for use, seconds in uses if seconds >= 0.05)
        )
