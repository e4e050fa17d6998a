"""What one training sample is."""

from dataclasses import dataclass
from typing import Any

from megavlm.errors import BadSampleError


@dataclass(frozen=True, kw_only=True)
class Text:
    """One prompt with its answer; only the answer is learned."""

    prompt: str
    answer: str
    task: str
    """What it exercises, for example `caption` or `vqa`; evaluation reports by it."""
    kind: str = ""
    """A finer label within the task: a caption's language, a question's type."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture with its texts, or texts alone."""

    key: str
    """Unique within the data set; names the tar members."""
    picture: bytes | None
    """An encoded PNG, JPEG or WebP file; None for a text-only sample."""
    texts: tuple[Text, ...]


def _text(*, prompt: Any, answer: Any, task: Any, kind: Any = "") -> Text:
    values = (prompt, answer, task, kind)
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"all of a text's values must be strings, not {values}")
    return Text(prompt=prompt, answer=answer, task=task, kind=kind)


def texts_from_json(key: str, record: Any) -> tuple[Text, ...]:
    """Read the `texts` of a sample's JSON record; raises BadSampleError when its form is wrong."""
    try:
        texts = tuple(_text(**text) for text in record["texts"])
    except (KeyError, TypeError) as error:
        raise BadSampleError(
            f"sample {key}: its JSON must hold a list `texts` of objects with `prompt`, `answer`, "
            f"`task` and perhaps `kind` ({type(error).__name__}: {error})"
        ) from error
    if not texts:
        raise BadSampleError(f"sample {key}: its list `texts` is empty")
    return texts
