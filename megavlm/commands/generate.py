"""`megavlm generate`: answers about pictures, or a chat."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megavlm.commands.options import Commands, add_quantization, add_run_command, positive
from megavlm.config.plan import Plan
from megavlm.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from megavlm.data.samples import Turn
    from megavlm.data.tokenizer import Tokenizer
    from megavlm.infer.prompts import Request

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
"""Of the pictures in a folder."""
CHAT_TOKENS, CHAT_PICTURES = 4_096, 16


def add_command(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add its options."""
    generate = add_run_command(commands, "generate", _generate, "answer questions about pictures")
    generate.add_argument("--prompt", default="Caption:")
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
    add_quantization(generate)


def _generate(plan: Plan, options: argparse.Namespace) -> None:
    from megavlm.dist import groups
    from megavlm.infer.chat import Chat, chat
    from megavlm.infer.engine import Engine, Limits
    from megavlm.infer.generate import generate
    from megavlm.infer.load import trained

    folder = _pictures_in(options.folder) if options.folder else []
    paths: list[Path] = [*options.pictures, *folder]
    read_picture = partial(_read_picture, side=plan.first.model.encoder.image_pixels)
    pixels = [read_picture(path) for path in paths]
    ask = partial(_request, options)
    with trained(plan, options.quantization) as (model, tokenizer):
        if options.chat:
            engine = Engine(model, Limits(rows=1, tokens=CHAT_TOKENS, pictures=CHAT_PICTURES))
            chat(engine, tokenizer, partial(ask, tokenizer), read_picture, pixels)
            return
        shown = [pixels] if options.together or not pixels else [[picture] for picture in pixels]
        requests = [ask(tokenizer, *Chat(s).question(options.prompt)) for s in shown]
        answers = generate(model, tokenizer, requests, batch_size=options.batch_size)
    if groups.rank() == 0:
        names = [f"{path}\t" for path in paths] if len(shown) == len(paths) else [""]
        for name, answer in zip(names, answers, strict=True):
            print(f"{name}{answer}")


def _request(
    options: argparse.Namespace,
    tokenizer: "Tokenizer",
    turns: Sequence["Turn"],
    pixels: Sequence["Tensor"],
) -> "Request":
    from megavlm.infer.prompts import Request, prompt_of
    from megavlm.infer.sampling import Sampling

    return Request(
        prompt=prompt_of(tokenizer, turns),
        pixels=tuple(pixels),
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        ),
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
