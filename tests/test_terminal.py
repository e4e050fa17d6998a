import pytest

from megavlm.errors import ConfigError
from megavlm.terminal import counted, printable, with_progress


def test_counts():
    assert counted(1, "shard") == "1 shard"
    assert counted(1_000, "shard") == "1,000 shards"
    assert counted(2, "copy", "copies") == "2 copies"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red square", "a red square"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\x9b2J", r"\x9b2J"),
        ("evil\u202egnp.", r"evil\u202egnp."),
        ("half \ud800", r"half \ud800"),
        ("日本の　国旗", "日本の　国旗"),  # an ideographic space
        ("🏃🏿‍♀️", "🏃🏿‍♀️"),
    ],
)
def test_what_would_steer_a_terminal_is_escaped(text, shown):
    assert printable(text) == shown


def test_errors_quote_harmlessly_and_may_have_lines():
    assert str(ConfigError("a\x1b[2J\nb")) == "a\\x1b[2J\nb"
    assert str(ConfigError("a", 1)) == "('a', 1)"


def test_progress_leaves_no_trace_where_there_is_no_terminal(capfd):
    assert [*with_progress(range(3), "samples", 3)] == [0, 1, 2]
    assert capfd.readouterr() == ("", "")
