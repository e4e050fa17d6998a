import pytest

from megavlm.infer.texts import HALF, GrowingText


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


def told(text, stop=()):
    growing = GrowingText(Bytes(), stop)
    pieces = []
    for byte in text.encode():
        pieces.append(growing.add(byte))
        if growing.stopped:
            break
    return [*pieces, growing.end()], growing.stopped


def test_a_character_is_told_when_it_is_whole():
    pieces, _ = told("aé🙂b")
    assert pieces == ["a", "", "é", "", "", "", "🙂", "b", ""]
    growing = GrowingText(Bytes())
    assert [growing.add(0xF0), growing.add(0x9F), growing.end()] == ["", "", HALF]


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stops"),
    [
        ("one. two", (".",), "one", True),
        ("one\n\ntwo", ("\n\n", "wo"), "one", True),
        ("aab", ("aab",), "", True),
        ("aaab", ("aab",), "a", True),
        ("one two", ("three",), "one two", False),
        ("one thr", ("three",), "one thr", False),
        ("one", ("",), "one", False),
    ],
)
def test_text_ends_before_a_stop_string(text, stop, expected, stops):
    pieces, stopped = told(text, stop)
    assert "".join(pieces) == expected
    assert stopped == stops


def test_what_may_begin_a_stop_string_waits():
    pieces, _ = told("a threat", ("three",))
    assert pieces == ["a", " ", "", "", "", "", "threa", "", "t"]
