"""Where samples come from and how they become batches."""

from dataclasses import field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from megavlm.config.sizes import STRICT
from megavlm.errors import ConfigError


def _place(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceSettings:
    """One folder of shards."""

    folder: Annotated[str, BeforeValidator(_place)]
    """Or the URL of one in an object store."""
    parts: int = 1
    """Its share of a mixture: so many samples out of as many as all sources' parts."""
    tasks: tuple[str, ...] = ()
    """Texts of these tasks alone are taken; none named: of all."""
    caption_prompts: tuple[str, ...] = ()
    """Prompts of captions that have none, such as img2dataset's: to each sample one of them."""

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ConfigError(f"data: parts={self.parts} of {self.folder} must be at least 1")


def _one_source(value: Any) -> Any:
    """A path alone is short for a source."""
    return {"folder": value} if isinstance(value, str | Path) else value


def _sources(value: Any) -> Any:
    values = cast(list[Any], value) if isinstance(value, list | tuple) else [value]
    return [_one_source(v) for v in values]


Source = Annotated[SourceSettings, BeforeValidator(_one_source)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AugmentSettings:
    """How training pictures are varied (RandAugment, Cubuk et al. 2020)."""

    operations: int = 2
    """RandAugment operations in a row; 0 switches it off."""
    magnitude: int = 9
    """RandAugment strength, 0 to 30."""
    colour_operations: bool = True
    """Whether operations that change colours take part; off where colour is the answer."""
    minimum_area: float = 0.9
    """Smallest share of the picture that a random crop keeps; 1 keeps the whole picture."""

    def __post_init__(self) -> None:
        if self.operations < 0:
            raise ConfigError(f"data.augment.operations={self.operations} must not be negative")
        if not 0 <= self.magnitude <= 30:
            raise ConfigError(f"data.augment.magnitude={self.magnitude} must lie in 0 to 30")
        if not 0 < self.minimum_area <= 1:
            raise ConfigError(
                f"data.augment.minimum_area={self.minimum_area} must lie above 0 and at most 1"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSettings:
    """Where samples come from and how they become batches."""

    train: Annotated[tuple[SourceSettings, ...], BeforeValidator(_sources)]
    """Training shards: a folder, a source, or a mixture of several."""
    heldout: Source
    """Held-out shards, for the held-out loss and the evaluation."""
    heldout_questions: Source | None = None
    """Shards with held-out questions about training pictures."""
    tokenizer: Path
    """SentencePiece model file."""
    shuffle_shards: int = 64
    """Training mixes the samples of so many shards at a time, which come in an order of their own
    in each epoch: more is nearer to a shuffle of everything, and reads from more files at once."""
    row_tokens: int
    """Length of a row of text; longer texts are cut to it, and counted."""
    pack_texts: bool = True
    """Texts share rows; otherwise each has one of its own, and those of like length go together."""
    row_bucket_tokens: int | None = None
    """Rows are only as long as a micro-batch needs, in steps of so many tokens; none: all have
    `row_tokens`."""
    micro_batch_images: int | None = None
    """The most image slots of a micro-batch on a rank; samples that find no room in theirs are
    left out, named and counted. None: as many as an even deal of a step's images needs."""
    texts_per_sample: int = 1
    """Texts drawn for a picture each time it is seen; all of them share its image tokens."""
    skip_samples: tuple[tuple[int, int], ...] = ()
    """Sample positions that are passed over, each from a first one to before another: those at
    which a run went wrong, when it goes on from a checkpoint before them."""
    ledger: bool = False
    """Keep which samples each step took, in the run folder: 2 bytes a sample, about."""
    on_bad_sample: Literal["skip", "stop"] = "skip"
    """A sample that cannot be decoded is skipped, named and counted, or ends the run."""
    workers: int = 1
    """Loader processes for each copy of the model; 0 loads in the training process."""
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("data.train names no source; name a folder of shards")
        for name in (
            *("row_tokens", "row_bucket_tokens", "texts_per_sample", "shuffle_shards"),
            "micro_batch_images",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}={value} must be at least 1")
        ends = [end for skipped in self.skip_samples for end in skipped]
        if any(a >= b for a, b in pairwise([-1, *ends])):
            raise ConfigError(
                f"data.skip_samples={[list(skipped) for skipped in self.skip_samples]} must be "
                "ranges from a first position to before another, ascending and apart"
            )
        if self.workers < 0:
            raise ConfigError(f"data.workers={self.workers} must not be negative")
