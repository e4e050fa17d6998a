"""The plan of a run from a YAML file and dotted overrides."""

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from megavlm.config.mistakes import in_words, truth_for_a_number
from megavlm.config.plan import Plan, Stage
from megavlm.config.presets import PRESETS
from megavlm.config.run import RunSettings
from megavlm.errors import ConfigError

Tree = dict[str, Any]
Settings = TypeVar("Settings")


SHARED = (
    *("run_folder", "seed", "model", "checkpoint", "engine", "zero3", "fsdp2", "megatron"),
    *("metrics", "profile", "data.tokenizer"),
)
"""Settings that all stages of a run have in common."""

ONLY_STAGE = "training"
"""Name of the stage of a run file that lists none."""

_STAGE_NAME = re.compile(r"[a-z0-9_]+")


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a run file and apply overrides such as `train.steps=200`.

    `stages` maps the name of each stage, in order, to the settings in which it differs from those
    around it; without it, the run has one stage. `model` may name a `preset` and change some of its
    sizes. Raises ConfigError, in one line that says whether the file or an override is wrong, for a
    missing file, broken YAML, unknown names, wrong types, broken rules, and for an override that no
    stage would follow.
    """
    tree = read_yaml(path, "run file")
    try:
        return _plan_of(tree, overrides)
    except ConfigError as error:
        raise ConfigError(f"{_source_of(error, path, tree, overrides)}: {error}") from error


def _source_of(error: ConfigError, path: Path, tree: Tree, overrides: Sequence[str]) -> str:
    """Where a mistake stands: in the file, or in the overrides without which it is not there."""
    guilty: list[str] = []
    for override in dict.fromkeys(overrides):
        try:
            _plan_of(tree, [other for other in overrides if other != override])
        except ConfigError as other_error:
            if str(other_error) == str(error):
                continue
        guilty.append(repr(override))
    if not guilty:
        return str(path)
    return f"{'override' if len(guilty) == 1 else 'overrides'} {' and '.join(guilty)}"


def _plan_of(tree: Tree, overrides: Sequence[str]) -> Plan:
    """The plan of a run file's tree, which stays as it is; raises ConfigError."""
    tree = deepcopy(tree)
    changes_by_stage = _stages(tree)
    for override in overrides:
        name, value = _parsed(override)
        _require_effect(changes_by_stage, override, name, value)
        _apply(tree, name, value)
    if "model" in tree:
        tree["model"] = _with_preset(tree["model"])
    changes_by_stage = _stages(tree)
    tree.pop("stages", None)
    stages: list[Stage] = []
    for name, changes in changes_by_stage.items():
        try:
            run = settings_of(RunSettings, _merged(tree, changes))
        except ConfigError as error:
            is_of_stage = len(changes_by_stage) > 1 and str(error) != _mistake(tree)
            raise ConfigError(f"stages.{name}: {error}" if is_of_stage else str(error)) from error
        first = (stages[-1].end_step, stages[-1].end_sample) if stages else (0, 0)
        stages.append(Stage(name, run, *first))
    return Plan(tuple(stages))


def _mistake(tree: Tree) -> str:
    """What is wrong with the settings that all stages share."""
    try:
        settings_of(RunSettings, tree)
    except ConfigError as error:
        return str(error)
    return ""


def settings_of(kind: type[Settings], tree: Tree) -> Settings:
    """A tree as settings of a class; raises ConfigError, in one line, for its first mistake."""
    adapter, schema = _adapter(kind)
    if mistake := truth_for_a_number(tree, schema):
        raise ConfigError(mistake)
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        raise ConfigError(in_words(error.errors()[0], schema)) from error


@cache
def _adapter(kind: type[Settings]) -> tuple[TypeAdapter[Settings], dict[str, Any]]:
    """What reads settings of a class, and their schema."""
    adapter = TypeAdapter(kind)
    return adapter, adapter.json_schema()


def read_yaml(path: Path, what: str) -> Tree:
    """A file of settings; raises ConfigError, which says `what` it is."""
    try:
        with path.open("rb") as file:  # its name is in what is said of its mistakes
            tree = yaml.load(file, _UniqueKeys)
    except OSError as error:
        raise ConfigError(
            f"cannot read {what} {path}: {error.strerror}; name a YAML file of settings"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, lines of `name: value`")
    return cast(Tree, tree)


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which no name of a mapping stands twice; plain YAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        this: Any = self  # yaml has no types
        names = [this.construct_object(name, deep=True) for name, _ in node.value]
        for name, (name_node, _) in zip(names, node.value, strict=True):
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"{name} stands there twice", problem_mark=name_node.start_mark
                )
        return super().construct_mapping(node, deep)


def _stages(tree: Tree) -> dict[str, Tree]:
    """The settings in which each stage differs, by its name."""
    stages: Any = tree.get("stages", {ONLY_STAGE: {}})
    if not isinstance(stages, dict) or not stages:
        raise ConfigError("stages must map names of stages to their settings")
    for name, changes in cast(dict[Any, Any], stages).items():
        if not isinstance(name, str) or not _STAGE_NAME.fullmatch(name):
            raise ConfigError(
                f"stages: {name!r} must be a name of lower-case letters, digits and _"
            )
        if not isinstance(changes, dict):
            raise ConfigError(f"stages.{name} must hold a mapping of settings")
        for shared in SHARED:
            if _has(changes, shared.split(".")):
                raise ConfigError(
                    f"stages.{name}.{shared}: all stages of a run share {shared}; set it "
                    "outside of stages"
                )
    return cast(dict[str, Tree], stages)


def _require_effect(
    changes_by_stage: dict[str, Tree], override: str, name: str, value: Any
) -> None:
    """Raise ConfigError if an override names no stage of the file, or if none would follow it.

    That is so where every stage has a setting of its own.
    """
    section, *place = name.split(".")
    if section == "stages" and place:
        if changes_by_stage == {ONLY_STAGE: {}}:
            raise ConfigError(f"the run file lists no stages; leave out stages.{place[0]}")
        if place[0] not in changes_by_stage:
            raise ConfigError(
                f"the run file has no stage {place[0]}; its stages are "
                f"{', '.join(changes_by_stage)}"
            )
        return
    leaves = list(_leaves([section, *place], value))
    if all(_has(changes, leaf) for changes in changes_by_stage.values() for leaf in leaves):
        first = next(iter(changes_by_stage))
        raise ConfigError(
            f"it would change nothing: every stage sets {name} itself; say "
            f"stages.{first}.{override}, for one of {', '.join(changes_by_stage)}"
        )


def _leaves(place: list[str], value: Any) -> Iterator[list[str]]:
    """Places of the settings that an override changes, down to what a stage replaces whole."""
    if place[0] in WHOLE:
        yield place[:1]
    elif isinstance(value, dict) and value:
        for name, below in cast(Tree, value).items():
            yield from _leaves([*place, str(name)], below)
    else:
        yield place


def _has(tree: Any, names: Sequence[str]) -> bool:
    """Whether a tree holds a value at a dotted place."""
    for name in names:
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = cast(Tree, tree)[name]
    return True


def plan_as_tree(plan: Plan) -> Tree:
    """The settings of all stages, by name, as JSON-safe plain data."""
    return {stage.name: run_as_tree(stage.run) for stage in plan.stages}


def run_as_tree(run: RunSettings) -> Tree:
    """The settings as JSON-safe plain data."""
    return TypeAdapter(RunSettings).dump_python(run, mode="json")


def _parsed(override: str) -> tuple[str, Any]:
    """The dotted name and the value of an override."""
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise ConfigError("it must have the form section.name=value")
    try:
        return name, yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ConfigError("its value is not valid YAML; close what it opens") from error


def _apply(tree: Tree, name: str, value: Any) -> None:
    *sections, leaf = name.split(".")
    for section in sections:
        below: Any = tree.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{section} is a value, not a section of settings")
        tree = cast(Tree, below)
    tree[leaf] = value


def _with_preset(model: Any) -> Any:
    if isinstance(model, str):
        model = {"preset": model}
    if not isinstance(model, dict) or "preset" not in model:
        return cast(Any, model)
    changes = dict(cast(Tree, model))
    name = changes.pop("preset")
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"model.preset={name!r} is unknown; choose from {', '.join(PRESETS)}")
    return _merged(asdict(PRESETS[name]), changes)


WHOLE = ("objectives",)
"""Mappings that a stage replaces whole."""


def _merged(base: Tree, changes: Tree) -> Tree:
    merged = dict(base)
    for name, value in changes.items():
        below: Any = merged.get(name)
        both_trees = isinstance(below, dict) and isinstance(value, dict) and name not in WHOLE
        merged[name] = _merged(cast(Tree, below), cast(Tree, value)) if both_trees else value
    return merged
