"""A chat about pictures, line by line."""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from megavlm.data.samples import Turn
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.errors import ConfigError, MegavlmError, RequestError
from megavlm.infer.engine import Engine
from megavlm.infer.generate import answer
from megavlm.infer.prompts import Request
from megavlm.terminal import printable_lines

HELP = "/picture PATH shows one with the next question, /new begins anew, /quit ends"


class Chat:
    """Turns so far, and the pictures that they show."""

    def __init__(self, pixels: Sequence[Tensor] = ()) -> None:
        """pixels: shown with the first question."""
        self._turns: list[Turn] = []
        self._pixels = [*pixels]
        self._shown = 0
        """Pictures that a turn has shown."""

    def show(self, picture: Tensor) -> None:
        """Show a picture with the next question."""
        self._pixels.append(picture)

    def question(self, text: str) -> tuple[tuple[Turn, ...], tuple[Tensor, ...]]:
        """The turns and pictures of a request for an answer."""
        pictures = tuple(range(self._shown, len(self._pixels)))
        return (*self._turns, Turn(prompt=text, answer="", pictures=pictures)), (*self._pixels,)

    def answered(self, turns: Sequence[Turn], answer: str) -> None:
        """Keep the answer to the last of these turns."""
        last = turns[-1]
        self._turns = [*turns[:-1], Turn(prompt=last.prompt, answer=answer, pictures=last.pictures)]
        self._shown = len(self._pixels)


def chat(
    engine: Engine,
    tokenizer: Tokenizer,
    ask: Callable[[Sequence[Turn], Sequence[Tensor]], Request],
    read_picture: Callable[[Path], Tensor],
    pixels: Sequence[Tensor],
) -> None:
    """Answer the lines of standard input until it ends, each as soon as its words are known.

    ask: makes a request of a chat. pixels: shown with the first question. Collective over the
    ranks that hold the model; the first one reads and writes.
    """
    is_first = groups.rank() == 0

    def tell(new: str) -> None:
        if is_first:
            print(printable_lines(new), end="", flush=True)

    if isinstance(sys.stdin, io.TextIOWrapper):
        # What is no UTF-8 is refused as a question, by all ranks.
        sys.stdin.reconfigure(errors="surrogateescape")
    if is_first and sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    talk = Chat(pixels)
    while (line := groups.from_first_model_rank(_line() if is_first else None)) is not None:
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/new":
                talk = Chat()
            elif command == "/picture":
                talk.show(read_picture(Path(rest)))
            elif command.startswith("/"):
                raise ConfigError(f"{command} is no command: {HELP}")
            elif line:
                turns, shown = talk.question(line)
                [said] = answer(engine, tokenizer, [ask(turns, shown)], on_text=tell)
                tell("\n")
                talk.answered(turns, said)
        except MegavlmError as error:
            remedy = "; /new begins anew" if isinstance(error, RequestError) else ""
            if is_first:
                print(f"error: {error}{remedy}", file=sys.stderr, flush=True)


def _line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
