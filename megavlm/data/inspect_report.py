"""Folders of shards as tables in a terminal, and as one HTML page."""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from megavlm.data.image import thumbnail_url
from megavlm.data.inspect import FolderReport, Histogram, Row, SheetPicture
from megavlm.errors import BadSampleError, DataError
from megavlm.terminal import printable

BAR_CHARACTERS = 20
MOST_LINES = 6
"""Of a picture's texts on the page."""
EIGHTHS = " ▏▎▍▌▋▊▉█"


class Card(NamedTuple):
    """A picture of the contact sheet."""

    name: str
    url: str
    lines: list[str]
    more: int
    """Texts that are not shown."""


def print_folder(report: FolderReport, console: Console) -> None:
    """Print what was found in a folder."""
    console.rule(_text(report.place))
    facts = Table(Column(), Column(), show_header=False, box=None)
    for name, value in facts_of(report):
        facts.add_row(name, _text(value))
    console.print(facts)
    console.print(f"\nall {report.indexed.samples:,} samples, by the index", style="bold")
    console.print(Columns([_bars(histogram) for histogram in report.of_index if histogram.bins]))
    console.print(f"{report.looked.samples:,} samples, evenly spaced, were read", style="bold")
    console.print(Columns([_bars(histogram) for histogram in report.of_samples]))
    if report.looked.bad:
        bad = Table("bad samples of those read", Column("", justify="right"), box=SIMPLE_HEAD)
        for reason, names in report.looked.bad.items():
            bad.add_row(_text(f"{reason}, as {names[0]}"), f"{len(names):,}")
        console.print(bad)
    if report.packing:
        console.print(_packing(report.packing))


def facts_of(report: FolderReport) -> list[tuple[str, str]]:
    """Names and values of what is known of a folder."""
    indexed, looked = report.indexed, report.looked
    pictures = sum(count * n for count, n in indexed.pictures_per_sample.items())
    bad = sum(map(len, looked.bad.values()))
    texts = looked.texts / max(1, looked.samples - bad)
    per_shard = report.index_seconds / max(1, indexed.shards)
    return [
        ("shards", f"{indexed.shards:,} (index read in {1e3 * per_shard:,.2f} ms each)"),
        ("samples", f"{indexed.samples:,}"),
        ("bytes", f"{indexed.bytes:,} ({indexed.picture_bytes:,} of them pictures)"),
        ("pictures", f"{pictures:,}"),
        ("samples without a picture", _share(indexed.without_picture, indexed.samples)),
        ("samples without a text", _share(indexed.without_text, indexed.samples)),
        ("samples read", f"{looked.samples:,}, evenly spaced"),
        ("bad ones of these", f"{_share(bad, looked.samples)}; pictures were not decoded"),
        ("texts in these", f"{looked.texts:,}, {texts:.2f} a sample"),
        ("texts in all, estimated", f"{round(looked.texts / looked.samples * indexed.samples):,}"),
    ]


def _text(said: str) -> Text:
    """What a folder calls something: neither rich's markup nor what would steer a terminal."""
    return Text(printable(said))


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(1, whole):.2%})" if part else "0"


def _bars(histogram: Histogram) -> Table:
    table = Table(
        Column(justify="right"),
        Column(width=BAR_CHARACTERS),
        Column(justify="right"),
        title=histogram.title,
        title_justify="left",
        caption=histogram.note,
        caption_justify="left",
        show_header=False,
        box=None,
    )
    most = max(histogram.bins.values())
    for name, count in histogram.bins.items():
        eighths = -(-8 * BAR_CHARACTERS * count // most)
        bar = EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8]
        table.add_row(_text(name), bar, f"{count:,}")
    return table


def _packing(rows: Sequence[Row]) -> Table:
    micro_batches = sorted({samples for row in rows for samples in row.filled})
    columns = [Column(f"{n:,}", justify="right") for n in micro_batches]
    cut = Column("texts cut", justify="right")
    title = "filled share of rows, by the samples of a micro-batch"
    table = Table("stage", "row tokens", *columns, cut, box=SIMPLE_HEAD, title=title)
    for row in rows:
        shares = [f"{row.filled[n]:.1%}" if n in row.filled else "" for n in micro_batches]
        table.add_row(row.name, f"{row.row_tokens:,}", *shares, f"{row.cut:.2%}")
    return table


def write_page(reports: Sequence[FolderReport], path: Path) -> None:
    """Write the page, with all that it shows in it; raises DataError if it cannot be written."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = (importlib.resources.files("megavlm.data") / "inspect.html.j2").read_text()
    page = environment.from_string(source).render(
        folders=[
            {
                "report": report,
                "facts": facts_of(report),
                "micro_batches": sorted({n for row in report.packing for n in row.filled}),
                "cards": [_card(picture) for picture in report.looked.sheet],
            }
            for report in reports
        ]
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write page {path}: {error.strerror}") from error


def _card(picture: SheetPicture) -> Card:
    """A small copy of the picture, or why there is none."""
    try:
        url = thumbnail_url(picture.encoded, picture.name)
    except BadSampleError as error:
        return Card(picture.name, "", [str(error)], 0)
    more = max(0, len(picture.lines) - MOST_LINES)
    return Card(picture.name, url, picture.lines[:MOST_LINES], more)
