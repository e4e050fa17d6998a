"""What is measured when a stage is done."""

from collections.abc import Iterable
from typing import Literal

from pydantic.dataclasses import dataclass

from megavlm.config.objectives import ObjectiveName
from megavlm.config.sizes import STRICT
from megavlm.errors import ConfigError

Measure = Literal["retrieval", "probe", "captions", "vqa"]

_MEASURES: dict[ObjectiveName, tuple[Measure, ...]] = {
    "mim": ("probe",),
    "contrastive": ("retrieval", "probe"),
    "captioning": ("captions",),
    "instruction": ("captions", "vqa"),
}
_POSSIBLE = _MEASURES | {"captioning": _MEASURES["instruction"]}
"""What a model of these objectives can do, whether or not they are for it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationSettings:
    """How a stage is evaluated on the held-out samples."""

    measures: tuple[Measure, ...] | None = None
    """retrieval: pictures by captions and back; probe: a linear classifier on the encoder; captions
    and vqa: what the model writes. None: those that the stage's objectives are for."""
    probe_kind: str | None = None
    """Kind of texts whose answers are the classes of the linear probe; None: no probe."""
    samples: int | None = None
    """At most so many held-out samples, the first ones; None: all."""
    caption_prompt: str = "Caption:"
    """What asks for a caption in standard benchmarks; as in training."""
    question_prompt: str = "{}"
    """What asks a question of them; `{}` is the question."""

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"evaluation.samples={self.samples} must be at least 1")
        if self.question_prompt.count("{}") != 1:
            raise ConfigError(
                f"evaluation.question_prompt={self.question_prompt!r} must hold {{}} once, where "
                "the question belongs"
            )
        if "probe" in (self.measures or ()) and self.probe_kind is None:
            raise ConfigError(
                "evaluation.measures names probe, which needs classes; set evaluation.probe_kind "
                "to a kind of texts whose answers are classes"
            )

    def measures_of(self, objectives: Iterable[ObjectiveName]) -> tuple[Measure, ...]:
        """What is measured after a stage with these objectives, as far as its model can do it."""
        names = list(objectives)
        possible = {measure for name in names for measure in _POSSIBLE[name]}
        if self.probe_kind is None:
            possible.discard("probe")
        chosen: Iterable[Measure] | None = self.measures
        if chosen is None:
            chosen = [measure for name in names for measure in _MEASURES[name]]
        return tuple(dict.fromkeys(measure for measure in chosen if measure in possible))
