"""`megavlm tokenizer`: trains SentencePiece models, and shows what they make of texts."""

import argparse
import os
import sys
from pathlib import Path

from megavlm.commands.options import Commands, positive
from megavlm.config.plan import Plan
from megavlm.errors import ConfigError, DataError


def add_commands(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add their options."""
    tokenizer = commands.add_parser("tokenizer", help="train and try SentencePiece tokenizers")
    actions = tokenizer.add_subparsers(required=True, metavar="action")
    train = actions.add_parser("train", help="on the texts of a run, or of files and folders")
    train.add_argument("run_file", type=Path, nargs="?", help="YAML file with the run's settings")
    train.add_argument("--vocabulary", type=positive, help="pieces (64,000), without a run file")
    train.add_argument("--out", type=Path, help="the new file, without a run file")
    train.set_defaults(command=_train)
    encode = actions.add_parser("encode", help="write each line's tokens as a line of numbers")
    encode.add_argument("model", type=Path)
    encode.add_argument("file", type=Path, nargs="?", default="-", help="- is standard input")
    encode.add_argument("--pieces", action="store_true", help="write pieces in place of numbers")
    encode.add_argument("--workers", type=positive, default=1, help="processes")
    encode.set_defaults(command=_encode, run_file=None)
    inspect = actions.add_parser("inspect", help="show the vocabulary, and how texts are split")
    inspect.add_argument("model", type=Path)
    inspect.add_argument(
        "--samples", type=positive, default=10_000, help="of a folder of shards, evenly spaced"
    )
    inspect.set_defaults(command=_inspect, run_file=None)
    for sub in (train, inspect):
        sub.add_argument(
            "--texts", nargs="+", metavar="PLACE", help="text files, and folders or URLs of shards"
        )


def _train(plan: Plan | None, options: argparse.Namespace) -> None:
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


def _encode(_: None, options: argparse.Namespace) -> None:
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


def _inspect(_: None, options: argparse.Namespace) -> None:
    from megavlm.data.texts import read_texts
    from megavlm.data.tokenizer_report import print_tokenizer

    texts = read_texts(options.texts, options.samples) if options.texts else None
    print_tokenizer(options.model, texts)
