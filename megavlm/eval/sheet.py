"""A page of what a checkpoint got right and wrong on a benchmark."""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from megavlm.data.image import thumbnail_url
from megavlm.data.texts import evenly_spaced
from megavlm.eval.scores import Score
from megavlm.eval.shards import Row, write_atomically

CARDS = 40  # of each kind
SHOWN_TRUTHS = 10


def write_sheet(
    path: Path, title: str, scores: Sequence[Score], predictions: Sequence[Row]
) -> None:
    """Write the page, with right and wrong examples spread over all predictions."""
    environment = jinja2.Environment(autoescape=True)
    template = environment.from_string(
        (importlib.resources.files("megavlm.eval") / "sheet.html.j2").read_text()
    )
    kinds = {
        name: [row for row in predictions if row["right"] == is_right]
        for name, is_right in (("wrong", False), ("right", True))
    }
    sections = [
        {"name": name, "count": len(rows), "cards": [_card(row) for row in _spread(rows)]}
        for name, rows in kinds.items()
    ]
    write_atomically(path, template.render(title=title, scores=scores, sections=sections))


def _spread(rows: Sequence[Row]) -> list[Row]:
    return [rows[number] for number in evenly_spaced(len(rows), CARDS)]


def _card(row: Row) -> dict[str, Any]:
    # The most frequent truths first, each once.
    truths = sorted(set(row["truths"]), key=lambda t: (-row["truths"].count(t), t))
    picture = thumbnail_url(Path(row["picture"]).read_bytes(), row["key"])
    return {**row, "truths": truths[:SHOWN_TRUTHS], "picture": picture}
