"""Keeps credentials out of what is written or shown."""

import re
from collections.abc import Mapping
from typing import Any, cast

HIDDEN = "***"

_USER = re.compile(
    # A password may hold slashes, as keys of object stores do. What looks like one behind a port
    # (`http://host:80/a@b`) is hidden, too: rather that than a key that starts with digits.
    r"""([a-z][a-z0-9+.-]*://)(?:[^\s/?#"'<>:@]*:(?:(?!://)[^\s"'<>])*@|[^\s/?#"'<>]*@)""",
    re.IGNORECASE,
)
_QUERY = re.compile(r"""([a-z][a-z0-9+.-]*://[^\s?#"'<>]*)[?#][^\s"'<>,)\]}]+""", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """A text whose URLs tell neither user nor password, nor what follows a `?` or `#`.

    Signed links and tokens travel there.
    """
    if "://" not in text:
        return text
    return _QUERY.sub(rf"\1?{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))


def tree_without_secrets(tree: Any) -> Any:
    """The same of all texts in plain data, those that are names included."""
    if isinstance(tree, str):
        return without_secrets(tree)
    if isinstance(tree, Mapping):
        return {
            tree_without_secrets(name): tree_without_secrets(value)
            for name, value in cast(Mapping[Any, Any], tree).items()
        }
    if isinstance(tree, list | tuple):
        return [tree_without_secrets(value) for value in cast(list[Any], tree)]
    return tree
