"""What a filtering kept and dropped: a table, JSON, and a page with examples."""

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table

from megavlm.config.filters import FilterSettings, PersonalDataRules
from megavlm.data.image import thumbnail_url
from megavlm.data.shards import ShardFolder
from megavlm.errors import BadSampleError
from megavlm.files.folder import Folder
from megavlm.filters.duplicates import Duplicate
from megavlm.filters.output import Counts, Example
from megavlm.filters.personal import mask

REPORT, SHEET = "report.json", "samples.html"
SHOWN_CHARACTERS = 300
MASKED_CHARACTERS = 100 * SHOWN_CHARACTERS
"""More than masking could shorten to those shown."""


def write_report(
    work: Folder,
    counts: Counts,
    shards: ShardFolder,
    rules: FilterSettings,
    examples: Sequence[Example],
    crowded: Mapping[Duplicate, int],
    measured: Mapping[str, float | None],
) -> None:
    """Write `report.json` and `samples.html`, which shows examples of each reason.

    crowded: samples that stay and that full buckets had no room for. measured: times of this run,
    which did not judge what an earlier one has.
    """
    record = {**counts.as_record(), "crowded": crowded, "measured": measured}
    work.write_atomically(REPORT, json.dumps(record, indent=2).encode())
    chosen = {
        reason: [example for example in examples if example.reason == reason]
        for reason in counts.as_record()["dropped"]
    }
    environment = jinja2.Environment(autoescape=True)
    template = environment.from_string(
        (importlib.resources.files("megavlm.filters") / "samples.html.j2").read_text()
    )
    covered = {"face", *(classifier.name for classifier in rules.classifiers)}
    page = template.render(
        name=str(shards),
        counts=counts,
        reasons=[
            (reason, counts.dropped[reason], [_card(e, shards) for e in of_reason])
            for reason, of_reason in chosen.items()
        ],
        covered=covered,
    )
    work.write_atomically(SHEET, page.encode())


def _card(example: Example, shards: ShardFolder) -> dict[str, Any]:
    """What the page shows of a dropped sample."""
    card = {"name": shards.locate(example.number), "detail": example.detail, "texts": []}
    if example.same_as is not None:
        card["detail"] = f"as {shards.locate(example.same_as)}"
    try:
        sample = shards.read(example.number)
    except BadSampleError:
        return card
    answers = [turn.answer for text in sample.texts for turn in text.turns]
    return {**card, "texts": _shown(answers[:3]), "picture": _thumbnail(sample.pictures)}


def _shown(answers: Sequence[str]) -> list[str]:
    """Their beginnings. The page is passed around: personal data is masked whatever the rules are.

    Masked before they are cut: half of an address is not known for one.
    """
    masked = (mask(answer[:MASKED_CHARACTERS], PersonalDataRules()) for answer in answers)
    return [answer[:SHOWN_CHARACTERS] for answer in masked]


def _thumbnail(pictures: Sequence[bytes]) -> str | None:
    """The first picture, encoded anew; None if there is none, or none that can be decoded."""
    try:
        return thumbnail_url(pictures[0], "")
    except (BadSampleError, IndexError):
        return None


def print_report(
    counts: Counts,
    crowded: Mapping[Duplicate, int],
    target: Folder,
    samples_per_second: float | None,
) -> None:
    """Print what stayed and what went, which adds up."""
    table = Table(title=f"{counts.samples:,} samples", title_justify="left")
    table.add_column("")
    table.add_column("samples", justify="right")
    table.add_column("of all", justify="right")
    record = counts.as_record()
    for name, number in {"kept": counts.kept, **record["dropped"]}.items():
        share = number / max(1, counts.samples)
        table.add_row(name, f"{number:,}", f"{share:.2%}", end_section=name == "kept")
    console = Console()
    console.print(table)
    for reason, number in record["removed_texts"].items():
        console.print(f"{number:,} texts of kept samples removed: {reason}", highlight=False)
    if counts.masked_texts:
        console.print(f"{counts.masked_texts:,} texts with personal data masked", highlight=False)
    if counts.renamed_keys:
        console.print(f"{counts.renamed_keys:,} keys renamed", highlight=False)
    for reason, number in crowded.items():
        if number:
            console.print(
                f"{number:,} kept samples found a bucket full: {reason} may not be complete",
                highlight=False,
            )
    if samples_per_second is not None:
        console.print(f"{samples_per_second:,.1f} samples judged a second and worker")
    print(f"wrote {target}; examples: {target}/filter/{SHEET}")
