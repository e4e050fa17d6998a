"""Questions about pictures as the model reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megavlm.data.samples import Turn
from megavlm.data.tokenizer import END, Tokenizer
from megavlm.infer.sampling import GREEDY, Sampling


class Prompt(NamedTuple):
    """Tokens up to where the answer begins."""

    tokens: list[int]
    seen: list[tuple[int, int]]
    """For each token, the first picture that it sees and one past the last; equal: none."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer that is wanted."""

    prompt: Prompt
    pixels: tuple[Tensor, ...]
    """uint8 (3, side, side), as the prompt numbers them."""
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""


def prompt_of(tokenizer: Tokenizer, turns: Sequence[Turn]) -> Prompt:
    """A chat, whose last turn waits for its answer.

    As in training, a token sees the pictures of the last turn, its own included, that shows any,
    of which an image symbol sees those up to its own.
    """
    tokens: list[int] = []
    seen: list[tuple[int, int]] = []
    sees = (0, 0)
    for number, turn in enumerate(turns):
        for picture in turn.pictures:
            sees = turn.pictures[0], picture + 1
            seen.append(sees)
        tokens += tokenizer.turn(turn.prompt, images=len(turn.pictures), first=number == 0)
        if number + 1 < len(turns):
            tokens += [*tokenizer.encode(turn.answer), END]
        seen += [sees] * (len(tokens) - len(seen))
    return Prompt(tokens, seen)


def question(tokenizer: Tokenizer, text: str, pictures: int) -> Prompt:
    """A single question about so many pictures, or none."""
    return prompt_of(tokenizer, [Turn(prompt=text, answer="", pictures=tuple(range(pictures)))])
