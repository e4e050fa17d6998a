"""The command line: `megavlm train | plan | dryrun | data | tokenizer | convert | eval | ...`.

Each command imports what it needs when it runs, so that a mistake in the settings is told at once.
"""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence

from megavlm.commands import convert, data, generate, plan, run, serve, tokenizer
from megavlm.config.load import load_plan
from megavlm.errors import ConfigError, MegavlmError, StoppedError
from megavlm.terminal import tell, tell_error

USER_ERROR = 2
INTERRUPTED = 130
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run it again
OVERRIDE = re.compile(r"[a-z_0-9]+(\.[a-z_0-9]+)*=")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake ends in one line on standard error and exit code 2."""
    options = _parse(arguments)
    # They advise TransformerEngine and newer spellings on every rank, to nobody's use.
    for module in ("megatron", "torch.distributed", "deepspeed", "ray"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")
    # torchao, which transformers imports, names kernels that are for other machines.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        settings = load_plan(options.run_file, options.overrides) if options.run_file else None
        if options.overrides and settings is None:
            raise ConfigError(_without_run_file(options))
        options.command(settings, options)
    except MegavlmError as error:
        if not error.is_told:
            tell_error(error)
        return USER_ERROR
    except StoppedError as stopped:
        if os.environ.get("RANK", "0") == "0":
            tell(str(stopped))
        return STOPPED
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            tell("interrupted")
        return INTERRUPTED
    return 0


def _without_run_file(options: argparse.Namespace) -> str:
    word = options.overrides[0]
    if options.takes_sources:
        return (
            f"{word} changes a run file; name one with --run (or write a folder of that name as "
            f"./{word})"
        )
    return f"{word} is one word too many, or changes a run file, and none is named"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options, and overrides wherever they stand among them."""
    parser = _parser()
    options, options.overrides = parser.parse_known_args(arguments)
    if options.takes_sources:  # sources are as free as overrides are
        words = [*options.sources, *options.overrides]
        options.sources = [w for w in words if not w.startswith("-") and not OVERRIDE.match(w)]
        options.overrides = [w for w in words if w not in options.sources]
    for override in options.overrides:
        if override.startswith("-"):
            parser.error(f"unknown option {override}; `--help` after the command lists its own")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megavlm",
        allow_abbrev=False,
        description="Trains cross-attention vision-language models at scale.",
        epilog="Every command takes overrides of the run file, such as train.steps=200.",
    )
    parser.set_defaults(takes_sources=False)
    # DeepSpeed's launcher adds it; the rank is read from the environment.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="command")
    run.add_commands(commands)
    generate.add_command(commands)
    plan.add_command(commands)
    data.add_commands(commands)
    tokenizer.add_commands(commands)
    convert.add_command(commands)
    serve.add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
