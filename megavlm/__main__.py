"""The command line: `megavlm train | plan | dryrun | data | tokenizer | convert | eval | ...`."""

import argparse
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megavlm.config.load import load_plan
from megavlm.config.plan import Plan
from megavlm.errors import ConfigError, DataError, MegavlmError

if TYPE_CHECKING:
    from torch import Tensor

    from megavlm.planner.hardware import Cluster

USER_ERROR = 2
INTERRUPTED = 130
ONLY_WITH_GPU = ("hosts", "gpus_per_host", "tokens_per_text", "calibrate", "out")
OVERRIDE = re.compile(r"[a-z_0-9]+(\.[a-z_0-9]+)*=")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake ends in one line on standard error and exit code 2."""
    options = _parse(arguments)
    # They advise TransformerEngine and newer spellings on every rank, to nobody's use.
    for module in ("megatron", "torch.distributed", "deepspeed"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")
    try:
        plan = load_plan(options.run_file, options.overrides) if options.run_file else None
        if options.overrides and plan is None:
            raise ConfigError(_without_run_file(options))
        options.command(plan, options)
    except MegavlmError as error:
        rank = os.environ.get("RANK")
        where = f" (rank {rank})" if rank else ""
        # In one write, so that lines of several ranks do not run into each other.
        print(f"megavlm: error{where}: {error}\n", end="", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("megavlm: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0


# Each command imports what it needs, so that a mistake in the settings is told at once.


def _train(plan: Plan, options: argparse.Namespace) -> None:
    if options.hostfile is None:
        from megavlm.dist.launch import set_environment

        set_environment(plan.first)
        from megavlm.eval.run import evaluate_stage
        from megavlm.train.loop import train

        train(plan, after_stage=evaluate_stage)
        return
    import torch

    from megavlm.dist.launch import launch_command, ranks_of, read_hostfile
    from megavlm.train.preflight import check_plan

    check_plan(plan, ranks_of(plan, options.hostfile))
    hosts = read_hostfile(options.hostfile)
    command = launch_command(options.hostfile, hosts, options.run_file, options.overrides)
    print(shlex.join(command), flush=True)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The launcher beside this interpreter, also when its folder is not on the search path.
    os.execv(Path(sys.executable).with_name("deepspeed"), command)


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


def _dryrun(plan: Plan, options: argparse.Namespace) -> None:
    # Before anything touches them: a host with GPUs and one without do the same.
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    from megavlm.dryrun.report import print_dry_run

    print_dry_run(
        plan.last,
        options.ranks,
        chosen=range(options.ranks) if options.all_ranks else options.rank,
        micro_batches=options.micro_batches,
        gpus_per_host=options.gpus_per_host,
        only_build=options.only_build,
    )


def _tokenizer_train(plan: Plan | None, options: argparse.Namespace) -> None:
    from megavlm.data.texts import read_texts
    from megavlm.data.tokenizer import SEED_TEXTS, VOCABULARY, train_tokenizer

    if plan:
        for name, setting in (
            ("out", "data.tokenizer"),
            ("vocabulary", "model.decoder.vocabulary"),
        ):
            if getattr(options, name):
                raise ConfigError(f"--{name} is {setting} of {options.run_file}; set that instead")
        run = plan.first
        # Each folder once, and all its tasks, whatever the stages take from it.
        folders = {source.folder: None for stage in plan.stages for source in stage.run.data.train}
        places, out = options.texts or [*folders], run.data.tokenizer
        vocabulary = run.model.decoder.vocabulary
    elif options.texts and options.out:
        places, out = options.texts, options.out
        vocabulary = options.vocabulary or VOCABULARY
    else:
        raise ConfigError("name a run file, or with --texts what to train on and --out a new file")
    train_tokenizer(read_texts(places, samples=SEED_TEXTS), out, vocabulary)
    print(f"tokenizer of {vocabulary} pieces: {out}")


def _tokenizer_encode(_: None, options: argparse.Namespace) -> None:
    from megavlm.data.encode import encode_lines
    from megavlm.data.texts import decoded_lines

    is_standard_input = str(options.file) == "-"
    try:
        file = sys.stdin.buffer if is_standard_input else options.file.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {options.file}: {error.strerror}") from error
    place = "standard input" if is_standard_input else str(options.file)
    lines = decoded_lines(file, place)
    try:
        for part in encode_lines(
            options.model, lines, workers=options.workers, pieces=options.pieces
        ):
            sys.stdout.buffer.write(part.encode())
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # its reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tokenizer_inspect(_: None, options: argparse.Namespace) -> None:
    from megavlm.data.texts import read_texts
    from megavlm.data.tokenizer_report import print_tokenizer

    texts = read_texts(options.texts, options.samples) if options.texts else None
    print_tokenizer(options.model, texts)


def _index(_: None, options: argparse.Namespace) -> None:
    from megavlm.data.index_folder import index_folder

    index_folder(options.folder, options.workers)


def _ledger(plan: Plan, _: argparse.Namespace) -> None:
    from megavlm.train.ledger import check_ledger

    print("\n".join(check_ledger(plan)))


def _data_inspect(plan: Plan | None, options: argparse.Namespace) -> None:
    from rich.console import Console

    from megavlm.data.inspect import inspect_folder, layouts_of, micro_batches_of
    from megavlm.data.inspect_report import print_folder, write_page
    from megavlm.data.tokenizer import Tokenizer

    folders = options.sources
    if plan and not folders:
        settings = [
            s for stage in plan.stages for s in (*stage.run.data.train, stage.run.data.heldout)
        ]
        folders = [*dict.fromkeys(source.folder for source in settings)]
    if not folders:
        raise ConfigError("name a folder of shards, or with --run the run whose folders to look at")
    if options.html and not options.html.parent.is_dir():
        raise DataError(f"cannot write page {options.html}: there is no folder to write it to")
    path = options.tokenizer or (plan and plan.first.data.tokenizer)
    tokenizer = Tokenizer(path) if path else None
    layouts, micro_batches = layouts_of(plan), micro_batches_of(plan, options.ranks)
    console, reports = Console(), []
    for folder in folders:
        reports.append(
            inspect_folder(
                folder,
                samples=options.samples,
                tokenizer=tokenizer,
                layouts=layouts,
                micro_batches=micro_batches,
            )
        )
        print_folder(reports[-1], console)
    if options.html:
        write_page(reports, options.html)
        print(f"page: {options.html}")


def _filter(_: None, options: argparse.Namespace) -> None:
    from megavlm.config.filters import load_rules

    rules = load_rules(options.rules)
    from megavlm.filters.run import filter_folder

    workers, address = options.workers, options.ray_address
    filter_folder(rules, options.source, options.target, ray_address=address, workers=workers)


def _generate(plan: Plan, options: argparse.Namespace) -> None:
    from megavlm.dist.groups import process_groups
    from megavlm.infer.generate import Request, generate
    from megavlm.infer.load import load_trained

    side = plan.first.model.encoder.image_pixels
    requests = [
        Request(prompt=options.prompt, pixels=_read_picture(path, side))
        for path in options.pictures
    ]
    with process_groups(plan.first.seed):
        model, tokenizer = load_trained(plan)
        answers = generate(
            model, tokenizer, requests, max_new_tokens=options.max_new_tokens, batch_size=32
        )
    for path, answer in zip(options.pictures, answers, strict=True):
        print(f"{path}\t{answer}")


def _read_picture(path: Path, side: int) -> "Tensor":
    from megavlm.data.image import decode_picture, fit_square, to_uint8_tensor

    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read picture {path}: {error.strerror}") from error
    return to_uint8_tensor(fit_square(decode_picture(encoded, str(path), side), side))


def _eval(plan: Plan, options: argparse.Namespace) -> None:
    from megavlm.eval.run import evaluate

    evaluate(plan)


def _convert(plan: Plan | None, options: argparse.Namespace) -> None:
    from megavlm.convert.certificate import summary
    from megavlm.convert.run import Conversion, convert, verify

    if options.verify:
        if options.sources or options.out or plan:
            raise ConfigError(
                f"--verify {options.verify} knows its sources from its certificate; name nothing "
                "else"
            )
        print("\n".join(verify(options.verify)))
        return
    if not options.sources or not options.out:
        raise ConfigError("name the checkpoint to convert, and with --out a new folder")
    conversion = Conversion(
        sources=tuple(options.sources),
        out=options.out,
        to=options.to,
        kind=options.kind,
        decoder_only=options.decoder_only,
        dtype=options.dtype,
        weights_only=options.weights_only,
        ema_decay=options.ema_decay,
        compare=not options.no_compare,
        max_file_gb=options.max_file_gb,
        tokenizer=options.tokenizer,
        with_tokenizer=not options.no_tokenizer,
        plan=plan,
    )
    print("\n".join(summary(convert(conversion), options.out)))


def _report(plan: Plan, options: argparse.Namespace) -> None:
    from megavlm.eval.report import write_report

    print(f"report: {write_report(plan)}")


def _without_run_file(options: argparse.Namespace) -> str:
    word = options.overrides[0]
    if options.command is _convert:
        return (
            f"{word} changes a run file; name one with --run (or write a folder of that name as "
            f"./{word})"
        )
    return f"{word} is one word too many, or changes a run file, and none is named"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options, and overrides wherever they stand among them."""
    parser = _parser()
    options, options.overrides = parser.parse_known_args(arguments)
    if options.command in (_convert, _data_inspect):  # sources are as free as overrides are
        words = [*options.sources, *options.overrides]
        options.sources = [w for w in words if not w.startswith("-") and not OVERRIDE.match(w)]
        options.overrides = [w for w in words if w not in options.sources]
    for override in options.overrides:
        if override.startswith("-"):
            parser.error(f"unknown option {override}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megavlm",
        allow_abbrev=False,
        description="Trains cross-attention vision-language models at scale.",
        epilog="Every command takes overrides of the run file, such as train.steps=200.",
    )
    # DeepSpeed's launcher adds it; the rank is read from the environment.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command: object, help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text, allow_abbrev=False)
        sub.add_argument("run_file", type=Path, help="YAML file with the run's settings")
        sub.set_defaults(command=command)
        return sub

    train = add("train", _train, "train, from the newest checkpoint if there is one")
    plan = add("plan", _plan, "print what a run is, without starting it")
    dryrun = add("dryrun", _dryrun, "run one step of some ranks without data: bytes, collectives")
    dryrun.add_argument("--ranks", type=_positive, required=True, help="ranks of the run")
    which = dryrun.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, action="append", help="run this one; repeatable")
    which.add_argument("--all-ranks", action="store_true", help="and check that they fit together")
    dryrun.add_argument("--micro-batches", type=_positive, help="of the step, if not as by default")
    dryrun.add_argument("--gpus-per-host", type=_positive, default=8)
    dryrun.add_argument("--only-build", action="store_true", help="build the engine, run no step")
    _add_tokenizer(commands)
    generate = add("generate", _generate, "answer a prompt about pictures")
    add("eval", _eval, "measure the newest checkpoint on held-out samples")
    add("report", _report, "draw a run as one HTML page")
    data = commands.add_parser("data", help="prepare and inspect folders of shards")
    actions = data.add_subparsers(required=True, metavar="action")
    index = actions.add_parser("index", help="list where each sample of tar shards lies")
    index.add_argument("folder", help="or the URL of one in an object store")
    index.add_argument("--workers", type=_positive, default=os.cpu_count(), help="processes")
    index.set_defaults(command=_index, run_file=None)
    ledger = actions.add_parser("ledger", help="prove which samples a run has taken")
    ledger.add_argument("run_file", type=Path, help="YAML file of a run with data.ledger=true")
    ledger.set_defaults(command=_ledger)
    inspect = actions.add_parser("inspect", help="show what folders of shards hold")
    inspect.add_argument("sources", nargs="*", metavar="FOLDER", help="or URL; or those of --run")
    inspect.add_argument(
        "--run", dest="run_file", type=Path, help="whose texts and packing to show"
    )
    inspect.add_argument("--tokenizer", type=Path, help="that counts tokens, if not the run's")
    inspect.add_argument("--ranks", type=_positive, default=1, help="copies of the run's model")
    inspect.add_argument("--samples", type=_positive, default=2_000, help="to read, evenly spaced")
    inspect.add_argument("--html", type=Path, metavar="PAGE", help="write a page, with pictures")
    inspect.set_defaults(command=_data_inspect)
    filtering = actions.add_parser("filter", help="write a folder without bad samples")
    filtering.add_argument("rules", type=Path, help="YAML file (docs/filtering.md)")
    filtering.add_argument("source", help="folder of shards, or its URL")
    filtering.add_argument("target", help="new folder, or its URL")
    filtering.add_argument("--ray-address", help="of a Ray cluster; none: this machine alone")
    filtering.add_argument("--workers", type=_positive, help="at once (all cores)")
    filtering.set_defaults(command=_filter, run_file=None)
    convert = commands.add_parser(
        "convert",
        help="convert checkpoints between formats, with a certificate",
        allow_abbrev=False,
    )
    convert.set_defaults(command=_convert)
    convert.add_argument("sources", nargs="*", help="folders or URLs; several are merged")
    convert.add_argument("--out", help="the new folder")
    convert.add_argument("--to", choices=("native", "mllama", "llama", "megatron"))
    convert.add_argument(
        "--from",
        dest="kind",
        choices=("zero3", "universal", "megatron"),
        help="which to read where a folder holds several",
    )
    convert.add_argument(
        "--decoder-only", action="store_true", help="take the language half of an Mllama alone"
    )
    convert.add_argument("--dtype", choices=("fp32", "bf16"), help="cast the weights")
    convert.add_argument(
        "--weights-only", action="store_true", help="leave the optimiser's moments out"
    )
    convert.add_argument(
        "--ema-decay", type=float, help="merge with weights that fall by this from newest to oldest"
    )
    convert.add_argument(
        "--no-compare", action="store_true", help="do not run both models on the same inputs"
    )
    convert.add_argument("--max-file-gb", type=float, default=5.0)
    words = convert.add_mutually_exclusive_group()
    words.add_argument(
        "--tokenizer", type=Path, help="of an exported model, if not where its checkpoint says"
    )
    words.add_argument(
        "--no-tokenizer", action="store_true", help="export weights alone, without a processor"
    )
    convert.add_argument("--run", dest="run_file", type=Path, help="run file with sizes or layout")
    convert.add_argument("--verify", metavar="FOLDER", help="check a folder by its certificate")
    for sub in (train, plan):
        sub.add_argument("--hostfile", type=Path, help="start (or plan) the run on these hosts")
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
    plan.add_argument("--hosts", type=_positive, help="of the cluster (1)")
    plan.add_argument("--gpus-per-host", type=_positive, help="of each of them (8)")
    plan.add_argument(
        "--tokens-per-text",
        type=_positive,
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
    generate.add_argument("--prompt", default="Caption:")
    generate.add_argument("--max-new-tokens", type=_positive, default=64)
    generate.add_argument(
        "--picture", type=Path, action="append", required=True, dest="pictures", help="repeatable"
    )
    return parser


def _add_tokenizer(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tokenizer = commands.add_parser("tokenizer", help="train and try SentencePiece tokenizers")
    actions = tokenizer.add_subparsers(required=True, metavar="action")
    train = actions.add_parser("train", help="on the texts of a run, or of files and folders")
    train.add_argument("run_file", type=Path, nargs="?", help="YAML file with the run's settings")
    train.add_argument("--vocabulary", type=_positive, help="pieces (64,000), without a run file")
    train.add_argument("--out", type=Path, help="the new file, without a run file")
    train.set_defaults(command=_tokenizer_train)
    encode = actions.add_parser("encode", help="write each line's tokens as a line of numbers")
    encode.add_argument("model", type=Path)
    encode.add_argument("file", type=Path, nargs="?", default="-", help="- is standard input")
    encode.add_argument("--pieces", action="store_true", help="write pieces in place of numbers")
    encode.add_argument("--workers", type=_positive, default=1, help="processes")
    encode.set_defaults(command=_tokenizer_encode, run_file=None)
    inspect = actions.add_parser("inspect", help="show the vocabulary, and how texts are split")
    inspect.add_argument("model", type=Path)
    inspect.add_argument(
        "--samples", type=_positive, default=10_000, help="of a folder of shards, evenly spaced"
    )
    inspect.set_defaults(command=_tokenizer_inspect, run_file=None)
    for sub in (train, inspect):
        sub.add_argument(
            "--texts", nargs="+", metavar="PLACE", help="text files, and folders or URLs of shards"
        )


if __name__ == "__main__":
    sys.exit(main())
