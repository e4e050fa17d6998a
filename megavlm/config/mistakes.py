"""What pydantic finds wrong with settings, in words: the setting, its value, rule and remedy."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pydantic_core import ErrorDetails

Schema = Mapping[str, Any]
"""JSON schema of settings, as pydantic writes it."""

SHOWN_CHARACTERS = 80
"""Of a wrong value."""
TRUTHS = "YAML reads no, off, yes and on as false and true"
KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a string",
    "path": "a path",
}


def in_words(problem: ErrorDetails, schema: Schema) -> str:
    """One mistake in settings of which this is the schema, in one line."""
    place = problem["loc"]
    if not place:
        return f"settings must be a mapping, lines of `name: value`, not {_shown(problem['input'])}"
    if place[-1] == "[key]":  # of a mapping, not a section
        name = ".".join(map(str, place[:-1]))
        names = _at(place[:-2], schema).get("propertyNames", {})
        return f"{name} is not a known name; it must be {_wanted(names, schema)}"
    name = ".".join(map(str, place))
    if problem["type"] in ("unexpected_keyword_argument", "invalid_key"):
        return f"{name} is not a known setting; {_where_known(place, schema)}"
    wanted = _at(place, schema)
    if problem["type"] == "missing":
        return f"{name} is missing; it must be {_wanted(wanted, schema)}"
    value: Any = problem["input"]
    needed = place[-1] in _at(place[:-1], schema).get("required", ())
    remedy = _remedy(place[-1], value, wanted, needed=needed)
    # What is no section: that is left out.
    or_null = " or null" if wanted.get("type") != "object" and _may_be_null(place, schema) else ""
    return f"{name}={_shown(value)} must be {_wanted(wanted, schema)}{or_null}{remedy}"


def truth_for_a_number(tree: Any, schema: Schema) -> str | None:
    """Tells of the first true or false where a number belongs, which pydantic takes for 1 or 0."""
    for place in _truths(tree):
        if _at(place, schema).get("type") in ("integer", "number"):
            for part in place:
                tree = tree[part]
            return in_words({"type": "", "loc": place, "msg": "", "input": tree}, schema)
    return None


def _truths(tree: Any) -> Iterator[tuple[int | str, ...]]:
    """Places of true and false."""
    if isinstance(tree, bool):
        yield ()
    entries: list[tuple[int | str, Any]] = []
    if isinstance(tree, dict):
        entries = [*cast(dict[str, Any], tree).items()]
    elif isinstance(tree, list):
        entries = [*enumerate(cast(list[Any], tree))]
    for part, below in entries:
        yield from ((part, *place) for place in _truths(below))


def _may_be_null(place: Sequence[int | str], schema: Schema) -> bool:
    setting = _at(place[:-1], schema).get("properties", {}).get(place[-1], {})
    return any(option.get("type") == "null" for option in setting.get("anyOf", ()))


def _where_known(place: Sequence[int | str], schema: Schema) -> str:
    """What else an unknown setting may be meant to be, and where it belongs."""
    name, known = str(place[-1]), [*_at(place[:-1], schema).get("properties", {})]
    near = difflib.get_close_matches(name, known, n=1)
    sections = [section for section, leaf in _settings(schema, schema) if leaf == name]
    advice = [f"did you mean {near[0]}?"] if near else []
    advice += [f"{name} belongs to {_either(sections)}"] if sections else []
    return " ".join(advice) or f"known: {', '.join(known)}"


def _settings(below: Schema, schema: Schema, section: str = "") -> Iterator[tuple[str, str]]:
    """Every setting below one: its section, and its name there."""
    for name, setting in below.get("properties", {}).items():
        if section:
            yield section, name
        here = f"{section}.{name}" if section else name
        setting = _resolved(setting, schema)
        if setting.get("type") == "array":
            here = f"{here} (each entry)"
            setting = _resolved(setting.get("items", {}), schema)
        yield from _settings(setting, schema, here)


def _at(place: Sequence[int | str], schema: Schema) -> Schema:
    """What is said of a setting; nothing where it is unknown."""
    below = schema
    for part in place:
        if isinstance(part, int):
            fixed = below.get("prefixItems", ())
            below = fixed[part] if part < len(fixed) else below.get("items", {})
        else:
            below = below.get("properties", {}).get(part, below.get("additionalProperties"))
        below = _resolved(below or {}, schema)
    return below


def _resolved(setting: Schema, schema: Schema) -> Schema:
    """What a setting must be if it is set: references followed, null left out."""
    for option in setting.get("anyOf", ()):
        if option.get("type") != "null":
            return _resolved(option, schema)
    if "$ref" in setting:
        return schema["$defs"][setting["$ref"].rpartition("/")[2]]
    return setting


def _wanted(setting: Schema, schema: Schema) -> str:
    """What a value must be."""
    if "enum" in setting or "const" in setting:
        return _either([repr(value) for value in setting.get("enum", [setting.get("const")])])
    match setting.get("type"):
        case "array":
            of = setting.get("prefixItems", [])
            if of:
                kinds = [_wanted(_resolved(entry, schema), schema) for entry in of]
                return f"a list of {len(of)}: {', '.join(kinds)}"
            return f"a list, each entry {_wanted(_resolved(setting['items'], schema), schema)}"
        case "object" if "properties" in setting:
            return f"a section of settings ({', '.join(setting['properties'])})"
        case "object":
            return "a mapping, lines of `name: value`"
        case kind:
            return KINDS.get(setting.get("format", kind), "something else")


def _remedy(name: int | str, value: Any, wanted: Schema, *, needed: bool) -> str:
    """How to write what was meant, where that can be told."""
    match wanted.get("type"):
        case "array" if isinstance(value, str | float) or type(value) is int:
            return f"; write `{name}: [{value}]`"
        case "array" if isinstance(value, dict):
            return "; put it in [ ]"
        case "string" if isinstance(value, bool):
            return f"; {TRUTHS}: put it in quotes, as in {'yes' if value else 'no'!r}"
        case "integer" | "number" if isinstance(value, bool):
            return f"; {TRUTHS}"
        case "string" if "enum" not in wanted and not isinstance(value, list | dict | None):
            return f"; put it in quotes, as in {str(value)!r}"
        case "object" if "properties" in wanted and not isinstance(value, list | dict):
            settings = ", ".join(f"{setting}: ..." for setting in wanted.get("required", ()))
            line = f"- {{{settings}}}" if isinstance(name, int) else f"{name}: {{{settings}}}"
            defaults = "" if settings else " for its defaults"
            return f"; write `{line}`{defaults}{'' if needed else ', or leave it out'}"
        case _:
            return ""


def _shown(value: Any) -> str:
    """A value as YAML has it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    shown = repr(cast(object, value))
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}..."


def _either(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
