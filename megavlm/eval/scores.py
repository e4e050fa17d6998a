"""Rows of the evaluation table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megavlm.terminal import printable

Baseline = Literal[
    "wrong picture", "majority answer", "chance", "untrained", "pixels", "unquantised"
]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the evaluation table."""

    split: str
    """`heldout` (pictures never seen) or `heldout_questions` (questions never asked)."""
    measure: str
    items: int
    """Prompts, pictures or pairs that it is a mean over."""
    model: float
    baselines: dict[Baseline, float] = field(default_factory=lambda: {})
    """The same measure of what has not learned, or does not look, or is not quantised; only
    where that makes sense."""


def baselines_of(scores: Sequence[Score]) -> list[Baseline]:
    """All baselines of a table, in the order in which its rows name them."""
    return list(dict.fromkeys(name for row in scores for name in row.baselines))


def print_scores(title: str, scores: Sequence[Score]) -> None:
    """Print the evaluation table of one stage."""
    baselines = baselines_of(scores)
    table = Table("split", "measure", "items", "model", *baselines, title=title)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in scores:
        figures = [
            f"{row.baselines[name]:.3f}" if name in row.baselines else "" for name in baselines
        ]
        table.add_row(
            row.split, Text(printable(row.measure)), f"{row.items:,}", f"{row.model:.3f}", *figures
        )
    # Wide enough for the table where nothing says how wide the page is.
    console = Console() if Console().is_terminal else Console(width=110)
    console.print(table)
