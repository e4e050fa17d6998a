"""Run settings from a YAML file and dotted overrides."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from megavlm.config.presets import PRESETS
from megavlm.config.run import RunSettings
from megavlm.errors import ConfigError

Tree = dict[str, Any]


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunSettings:
    """Read a run file and apply overrides such as `train.steps=200`.

    `model` may name a `preset` and change some of its sizes. Raises ConfigError, in one line, for
    a missing file, broken YAML, unknown names, wrong types and broken rules.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read run file {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of settings")
    tree = cast(Tree, tree)
    for override in overrides:
        _apply(tree, override)
    if "model" in tree:
        tree["model"] = _with_preset(tree["model"])
    try:
        return TypeAdapter(RunSettings).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_one_line(error, tree)}") from error


def run_as_tree(run: RunSettings) -> Tree:
    """The settings as JSON-safe plain data."""
    return TypeAdapter(RunSettings).dump_python(run, mode="json")


def _apply(tree: Tree, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise ConfigError(f"override {override!r} must have the form section.name=value")
    *sections, leaf = name.split(".")
    for section in sections:
        below: Any = tree.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
        tree = cast(Tree, below)
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error


def _with_preset(model: Any) -> Any:
    if not isinstance(model, dict) or "preset" not in model:
        return cast(Any, model)
    changes = dict(cast(Tree, model))
    name = changes.pop("preset")
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"model.preset={name!r} is unknown; choose from {sorted(PRESETS)}")
    return _merged(asdict(PRESETS[name]), changes)


def _merged(base: Tree, changes: Tree) -> Tree:
    merged = dict(base)
    for name, value in changes.items():
        below: Any = merged.get(name)
        both_trees = isinstance(below, dict) and isinstance(value, dict)
        merged[name] = _merged(cast(Tree, below), cast(Tree, value)) if both_trees else value
    return merged


def _one_line(error: ValidationError, tree: Tree) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "unexpected_keyword_argument":
            return f"{place} is not a known setting{_suggestion(problem['loc'])}"
        case "missing":
            return f"{place} is missing"
        case _:
            return f"{place}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _suggestion(place: tuple[int | str, ...]) -> str:
    fields = TypeAdapter(RunSettings).json_schema()
    definitions = fields["$defs"]
    for section in place[:-1]:
        reference = fields["properties"][section]["$ref"]
        fields = definitions[reference.rsplit("/", 1)[1]]
    known = list(fields["properties"])
    near = difflib.get_close_matches(str(place[-1]), known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
