"""What one training sample is."""

from dataclasses import dataclass, replace
from typing import Any, cast

from megavlm.errors import BadSampleError

MAX_PICTURES = 64
"""Of one sample."""
CAPTION_TASK = "caption"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A prompt with its answer; only the answer is learned."""

    prompt: str
    answer: str
    pictures: tuple[int, ...] = ()
    """Numbers of the sample's pictures that are shown before the prompt."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """One turn, or a chat of several."""

    turns: tuple[Turn, ...]
    task: str
    """What it exercises, for example `caption` or `vqa`; evaluation reports by it."""
    kind: str = ""
    """A finer label within the task: a caption's language, a question's type."""

    @property
    def prompt(self) -> str:
        """Of the first turn."""
        return self.turns[0].prompt

    @property
    def is_bare(self) -> bool:
        """Whether it is a caption alone, without a prompt."""
        return self.task == CAPTION_TASK and len(self.turns) == 1 and not self.prompt

    def with_prompt(self, prompt: str) -> "Text":
        """The same with this prompt in its first turn."""
        first, *later = self.turns
        return replace(self, turns=(replace(first, prompt=prompt), *later))

    @property
    def answer(self) -> str:
        """Of the first turn."""
        return self.turns[0].answer


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Pictures with their texts, or texts alone."""

    key: str
    """Unique within the data set, without dots; names the tar members."""
    pictures: tuple[bytes, ...]
    """Encoded PNG, JPEG or WebP files; none in a text-only sample."""
    texts: tuple[Text, ...]


def text(
    prompt: str, answer: str, task: str, kind: str = "", *, pictures: tuple[int, ...] = (0,)
) -> Text:
    """A text of one turn, which shows the sample's only picture unless told otherwise."""
    return Text(
        turns=(Turn(prompt=prompt, answer=answer, pictures=pictures),), task=task, kind=kind
    )


def texts_to_json(sample: Sample) -> dict[str, Any]:
    """A sample's JSON record; what shows all pictures in one turn has a short form."""
    everything = tuple(range(len(sample.pictures)))
    records: list[dict[str, Any]] = []
    for t in sample.texts:
        labels = {"task": t.task, "kind": t.kind}
        if len(t.turns) == 1 and t.turns[0].pictures == everything:
            records.append({"prompt": t.prompt, "answer": t.answer, **labels})
            continue
        turns = [
            {"prompt": turn.prompt, "answer": turn.answer, "pictures": list(turn.pictures)}
            for turn in t.turns
        ]
        records.append({"turns": turns, **labels})
    return {"texts": records}


def texts_from_json(key: str, record: Any, pictures: int) -> tuple[Text, ...]:
    """Read the `texts` of a sample's JSON record; raises BadSampleError when its form is wrong.

    pictures: how many the sample has.
    """
    try:
        texts = tuple(_text(pictures, **entry) for entry in record["texts"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadSampleError(
            f"sample {key}: its JSON must hold a list `texts` of objects with `prompt` and "
            "`answer`, or with `turns` of them, `task` and perhaps `kind` "
            f"({type(error).__name__}: {error})"
        ) from error
    if not texts:
        raise BadSampleError(f"sample {key}: its list `texts` is empty")
    return texts


def _text(
    all_pictures: int,
    *,
    task: Any,
    kind: Any = "",
    turns: Any = None,
    prompt: Any = None,
    answer: Any = None,
) -> Text:
    if turns is None:
        turns = [{"prompt": prompt, "answer": answer, "pictures": list(range(all_pictures))}]
    elif prompt is not None or answer is not None:
        raise TypeError("a text has `turns`, or `prompt` and `answer`, not both")
    _require_strings(task, kind)
    if not isinstance(turns, list) or not turns:
        raise TypeError("`turns` must be a list of at least one turn")
    parsed = tuple(_turn(all_pictures, **turn) for turn in cast(list[Any], turns))
    return Text(turns=parsed, task=task, kind=kind)


def _turn(all_pictures: int, *, prompt: Any, answer: Any, pictures: Any = ()) -> Turn:
    _require_strings(prompt, answer)
    numbers: list[Any] = list(pictures)
    if any(type(n) is not int or not 0 <= n < all_pictures for n in numbers):
        raise ValueError(f"`pictures` must number the sample's {all_pictures}, not {numbers}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"a turn shows each picture once, not {numbers}")
    return Turn(prompt=prompt, answer=answer, pictures=tuple(numbers))


def _require_strings(*values: Any) -> None:
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"all of a text's words must be strings, not {values}")
    for value in values:
        value.encode()  # raises ValueError for a lone surrogate, which nothing can write or show
