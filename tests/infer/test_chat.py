import io
import sys
from functools import partial
from unittest.mock import patch

import pytest

from megavlm.data.samples import Turn
from megavlm.data.tokenizer import Tokenizer
from megavlm.infer.chat import Chat, chat
from megavlm.infer.engine import Engine, Limits
from megavlm.infer.generate import generate
from megavlm.infer.prompts import Request, prompt_of
from megavlm.terminal import printable_lines
from tests.infer.test_generate import pictures
from tests.model.test_vlm import random_model
from tests.ranks import alone


@pytest.fixture(autouse=True)
def groups():
    with alone():
        yield


def test_a_picture_is_shown_in_one_turn():
    talk = Chat(["a", "b"])
    turns, shown = talk.question("which?")
    assert (turns, shown) == ((Turn(prompt="which?", answer="", pictures=(0, 1)),), ("a", "b"))
    talk.answered(turns, "both")
    talk.show("c")
    turns, shown = talk.question("and now?")
    first = Turn(prompt="which?", answer="both", pictures=(0, 1))
    assert turns == (first, Turn(prompt="and now?", answer="", pictures=(2,)))
    assert shown == ("a", "b", "c")


def test_lines_are_answered_as_by_generate(coloured_squares, capsys):
    model, tokenizer = random_model().eval(), Tokenizer(coloured_squares / "tokenizer.model")
    one, two = pictures(2)

    def ask(turns, pixels):
        prompt = prompt_of(tokenizer, turns)
        return Request(prompt=prompt, pixels=tuple(pixels), max_new_tokens=8)

    engine = Engine(model, Limits(rows=1, tokens=200, pictures=2))
    lines = [
        "a red one",
        "/picture two",
        "and this",
        "/new",
        "a red one",
        "x" * 500,
        "caf\xe9",
        "/nwe",
    ]
    typed = io.BytesIO("\n".join([*lines, "/quit", "b"]).encode("latin-1"))
    with patch.object(sys, "stdin", io.TextIOWrapper(typed, "utf-8")):
        chat(engine, tokenizer, ask, lambda _: two, [one])
    said, errors = capsys.readouterr()
    answer = partial(generate, model, tokenizer, batch_size=1)
    [first] = answer([ask([Turn(prompt="a red one", answer="", pictures=(0,))], [one])])
    turns = [
        Turn(prompt="a red one", answer=first, pictures=(0,)),
        Turn(prompt="and this", answer="", pictures=(1,)),
    ]
    [second] = answer([ask(turns, [one, two])])
    [blind] = answer([ask([Turn(prompt="a red one", answer="")], [])])
    assert said == "".join(f"{printable_lines(text)}\n" for text in (first, second, blind))
    assert "exceed the limit of 200 tokens; ask for less; /new begins anew" in errors
    assert "lone surrogate" in errors
    assert "/nwe is no command: /picture PATH" in errors
