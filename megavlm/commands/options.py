"""What the options of commands have in common."""

import argparse
from pathlib import Path

from megavlm.infer.quantize import KINDS

Commands = argparse._SubParsersAction  # pyright: ignore[reportPrivateUsage]
"""Where a command is added."""


def add_run_command(
    commands: "Commands[argparse.ArgumentParser]", name: str, command: object, help_text: str
) -> argparse.ArgumentParser:
    """A command that takes a run file."""
    parser = commands.add_parser(name, help=help_text, allow_abbrev=False)
    parser.add_argument("run_file", type=Path, help="YAML file with the run's settings")
    parser.set_defaults(command=command)
    return parser


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """The option of commands that load a language model."""
    parser.add_argument(
        "--quantization", choices=KINDS, help="quantise the decoder's weights (none)"
    )


def add_execution(parser: argparse.ArgumentParser) -> None:
    """The options of commands that generate alone."""
    add_quantization(parser)
    parser.add_argument(
        "--compile", action="store_true", help="by torch.compile: faster after some minutes"
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def named_folder(text: str) -> tuple[str, Path]:
    """A name and a folder, as in `vqav2=data/vqav2`."""
    name, equals, folder = text.partition("=")
    if not name or not equals or not folder:
        raise argparse.ArgumentTypeError(f"{text} is not of the form NAME=FOLDER")
    return name, Path(folder)
