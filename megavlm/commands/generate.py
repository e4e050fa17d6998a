"""`megavlm generate`: answers about pictures, or a chat."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megavlm.commands.options import Commands, add_execution, add_run_command, positive
from megavlm.config.plan import Plan
from megavlm.errors import ConfigError, DataError
from megavlm.terminal import printable, printable_lines

if TYPE_CHECKING:
    from torch import Tensor

    from megavlm.data.samples import Turn
    from megavlm.data.tokenizer import Tokenizer
    from megavlm.infer.prompts import Request
    from megavlm.infer.sampling import Sampling

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
"""Of the pictures in a folder."""
CHAT_TOKENS, CHAT_PICTURES = 4_096, 16
PICTURES_AT_ONCE = 256
"""Of a folder; their answers are printed before the next are read."""


def add_command(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add its options."""
    generate = add_run_command(commands, "generate", _generate, "answer questions about pictures")
    generate.add_argument("--prompt", default="Caption:", help='what is asked ("Caption:")')
    generate.add_argument(
        "--picture", type=Path, action="append", default=[], dest="pictures", help="repeatable"
    )
    generate.add_argument("--folder", type=Path, help="of pictures, each asked about")
    how = generate.add_mutually_exclusive_group()
    how.add_argument("--together", action="store_true", help="ask once, showing all pictures")
    how.add_argument("--chat", action="store_true", help="answer the lines of standard input")
    generate.add_argument("--max-new-tokens", type=positive, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    generate.add_argument("--top-k", type=positive)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--stop", action="append", default=[], help="end before this text; repeatable"
    )
    generate.add_argument("--batch-size", type=positive, default=32)
    add_execution(generate)


def _generate(plan: Plan, options: argparse.Namespace) -> None:
    from megavlm.infer.chat import Chat, chat
    from megavlm.infer.engine import Engine, Limits
    from megavlm.infer.generate import answer, limits_for
    from megavlm.infer.load import trained
    from megavlm.infer.sampling import Sampling

    # Mistakes are told before the model is loaded.
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    if options.chat and options.max_new_tokens >= CHAT_TOKENS:
        raise ConfigError(
            f"--max-new-tokens {options.max_new_tokens} must be below the {CHAT_TOKENS} tokens "
            "of a chat"
        )
    paths = [*options.pictures, *(_pictures_in(options.folder) if options.folder else [])]
    is_one_chat = options.together or options.chat or not paths
    read_picture = partial(_read_picture, side=plan.first.model.encoder.image_pixels)
    pixels = [read_picture(path) for path in (paths if is_one_chat else options.pictures)]
    if options.compile:
        _tell("compiling takes a minute or more, before the first answers", sys.stderr)
    with trained(plan, options.quantization) as (model, tokenizer):
        ask = partial(_request, options, sampling, tokenizer)
        if options.chat:
            limits = Limits(rows=1, tokens=CHAT_TOKENS, pictures=CHAT_PICTURES)
            engine = Engine(model, limits, compiled=options.compile)
            chat(engine, tokenizer, ask, read_picture, pixels)
            return
        if is_one_chat:
            request = ask(*Chat(pixels).question(options.prompt))
            engine = Engine(model, limits_for([request], 1), compiled=options.compile)
            [said] = answer(engine, tokenizer, [request])
            _tell(printable_lines(said))
            return
        engine = None
        unreadable = 0
        for start in range(0, len(paths), PICTURES_AT_ONCE):
            read: list[Path] = []
            requests: list[Request] = []
            for path in paths[start : start + PICTURES_AT_ONCE]:
                try:
                    requests.append(ask(*Chat([read_picture(path)]).question(options.prompt)))
                    read.append(path)
                except DataError as error:
                    unreadable += 1
                    _tell(f"error: {error}", sys.stderr)
            if requests:
                limits = limits_for(requests, options.batch_size)
                engine = engine or Engine(model, limits, compiled=options.compile)
                for path, said in zip(read, answer(engine, tokenizer, requests), strict=True):
                    _tell(f"{printable(str(path))}\t{printable(said)}")
    if unreadable:
        raise DataError(
            f"{unreadable} of {len(paths)} pictures could not be read, as told above; the others "
            "are answered"
        )


def _tell(line: str, stream: TextIO | None = None) -> None:
    """Print a line on the first rank, to standard output if to nothing else."""
    from megavlm.dist import groups

    if groups.rank() == 0:
        print(line, file=stream, flush=True)


def _request(
    options: argparse.Namespace,
    sampling: "Sampling",
    tokenizer: "Tokenizer",
    turns: Sequence["Turn"],
    pixels: Sequence["Tensor"],
) -> "Request":
    from megavlm.infer.prompts import Request, prompt_of

    return Request(
        prompt=prompt_of(tokenizer, turns),
        pixels=tuple(pixels),
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        stop=tuple(options.stop),
    )


def _pictures_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"--folder {folder} is no folder; name one that holds pictures")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"--folder {folder} holds no picture ({', '.join(sorted(SUFFIXES))})")
    return paths


def _read_picture(path: Path, side: int) -> "Tensor":
    from megavlm.data.image import read_square

    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read picture {path}: {error.strerror}") from error
    return read_square(encoded, str(path), side)
