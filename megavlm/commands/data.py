"""`megavlm data`: prepares, shows and filters folders of shards."""

import argparse
import os
from pathlib import Path

from megavlm.commands.options import Commands, positive
from megavlm.config.plan import Plan
from megavlm.errors import ConfigError, DataError


def add_commands(commands: "Commands[argparse.ArgumentParser]") -> None:
    """Add their options."""
    data = commands.add_parser("data", help="prepare and inspect folders of shards")
    actions = data.add_subparsers(required=True, metavar="action")
    index = actions.add_parser("index", help="list where each sample of tar shards lies")
    index.add_argument("folder", help="or the URL of one in an object store")
    index.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes")
    index.set_defaults(command=_index, run_file=None)
    ledger = actions.add_parser("ledger", help="prove which samples a run has taken")
    ledger.add_argument("run_file", type=Path, help="YAML file of a run with data.ledger=true")
    ledger.set_defaults(command=_ledger)
    inspect = actions.add_parser("inspect", help="show what folders of shards hold")
    inspect.add_argument("sources", nargs="*", metavar="FOLDER", help="or URL; or those of --run")
    inspect.add_argument(
        "--run", dest="run_file", type=Path, help="whose texts and packing to show"
    )
    inspect.add_argument("--tokenizer", type=Path, help="that counts tokens, if not the run's")
    inspect.add_argument("--ranks", type=positive, default=1, help="copies of the run's model")
    inspect.add_argument("--samples", type=positive, default=2_000, help="to read, evenly spaced")
    inspect.add_argument("--html", type=Path, metavar="PAGE", help="write a page, with pictures")
    inspect.set_defaults(command=_inspect, takes_sources=True)
    filtering = actions.add_parser("filter", help="write a folder without bad samples")
    filtering.add_argument("rules", type=Path, help="YAML file (docs/filtering.md)")
    filtering.add_argument("source", help="folder of shards, or its URL")
    filtering.add_argument("target", help="new folder, or its URL")
    filtering.add_argument("--ray-address", help="of a Ray cluster; none: this machine alone")
    filtering.add_argument("--workers", type=positive, help="at once (all cores)")
    filtering.set_defaults(command=_filter, run_file=None)


def _index(_: None, options: argparse.Namespace) -> None:
    from megavlm.data.index_folder import index_folder

    index_folder(options.folder, options.workers)


def _ledger(plan: Plan, _: argparse.Namespace) -> None:
    from megavlm.train.ledger import check_ledger

    print("\n".join(check_ledger(plan)))


def _inspect(plan: Plan | None, options: argparse.Namespace) -> None:
    from rich.console import Console

    from megavlm.data.inspect import inspect_folder, layouts_of, micro_batches_of
    from megavlm.data.inspect_report import print_folder, write_page
    from megavlm.data.tokenizer import Tokenizer

    folders = options.sources
    if plan and not folders:
        settings = [
            s for stage in plan.stages for s in (*stage.run.data.train, stage.run.data.heldout)
        ]
        folders = [*dict.fromkeys(source.folder for source in settings)]
    if not folders:
        raise ConfigError("name a folder of shards, or with --run the run whose folders to look at")
    if options.html and not options.html.parent.is_dir():
        raise DataError(f"cannot write page {options.html}: there is no folder to write it to")
    path = options.tokenizer or (plan and plan.first.data.tokenizer)
    tokenizer = Tokenizer(path) if path else None
    layouts, micro_batches = layouts_of(plan), micro_batches_of(plan, options.ranks)
    console, reports = Console(), []
    for folder in folders:
        reports.append(
            inspect_folder(
                folder,
                samples=options.samples,
                tokenizer=tokenizer,
                layouts=layouts,
                micro_batches=micro_batches,
            )
        )
        print_folder(reports[-1], console)
    if options.html:
        write_page(reports, options.html)
        print(f"page: {options.html}")


def _filter(_: None, options: argparse.Namespace) -> None:
    from megavlm.config.filters import load_rules

    rules = load_rules(options.rules)
    from megavlm.filters.run import filter_folder

    workers, address = options.workers, options.ray_address
    filter_folder(rules, options.source, options.target, ray_address=address, workers=workers)
