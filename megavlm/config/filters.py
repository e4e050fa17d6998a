"""By which rules image-text pairs are filtered; `megavlm data filter` reads them from YAML."""

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from megavlm.config.load import read_yaml, settings_of
from megavlm.config.sizes import STRICT
from megavlm.errors import ConfigError

PersonalKind = Literal["email", "phone", "ip", "credit_card"]

REASONS = frozenset(
    (
        *("kept", "unreadable", "unsafe_name", "caption_length", "caption_letters"),
        *("caption_repetition", "caption_boilerplate", "caption_language", "evaluation_text"),
        *("personal_data", "picture_format", "picture_broken", "picture_pixels", "picture_size"),
        *("picture_aspect", "evaluation_picture", "face", "agreement", "duplicate_picture"),
        "duplicate_caption",
    )
)
"""What the report counts; classifiers add their names."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PictureRules:
    """What a picture must be like; those that cannot be decoded are dropped in any case."""

    maximum_pixels: int = 64_000_000
    """Larger pictures are dropped before they are decoded (decompression bombs); training refuses
    them beyond 64 million."""
    minimum_side: int = 1
    """Pixels of the shorter side."""
    maximum_aspect: float | None = None
    """The longer side over the shorter one."""

    def __post_init__(self) -> None:
        _require("pictures", self, "maximum_pixels", 1, 64_000_000)
        _require("pictures", self, "minimum_side", 1)
        _require("pictures", self, "maximum_aspect", 1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CaptionRules:
    """What a caption must be like. One that is not is taken out of its sample."""

    minimum_characters: int = 1
    maximum_characters: int | None = None
    minimum_words: int = 1
    """Between spaces; leave it at 1 for languages that write none."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes (en, de, ja); none named: any language."""
    language_lead: float = 0.3
    """A caption goes if another language is so much more probable than those named. The shorter a
    caption, the closer they are: less finds more, and errs more."""
    minimum_letters: float | None = None
    """Share of letters among its characters, spaces left out."""
    maximum_repeated_words: float | None = None
    """Share of words that were there before, of captions of 5 words and more."""
    maximum_repeated_characters: int | None = None
    """The same character so many times in a row."""
    boilerplate: bool = False
    """Whether file names, addresses of web pages, code, placeholders (`untitled`, `no image
    available`) and empty phrases (`image of`) go."""

    def __post_init__(self) -> None:
        for name in ("minimum_characters", "minimum_words"):
            _require("captions", self, name, 1)
        _require("captions", self, "maximum_characters", self.minimum_characters)
        _require("captions", self, "maximum_repeated_characters", 1)
        for name in ("minimum_letters", "maximum_repeated_words", "language_lead"):
            _require("captions", self, name, 0, 1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PersonalDataRules:
    """What is done about texts with personal data; all texts are searched."""

    kinds: tuple[PersonalKind, ...] = ("email", "phone", "ip", "credit_card")
    action: Literal["drop", "mask"] = "drop"
    """drop: the text is taken out; mask: `<EMAIL>` and so on take the place of the data."""
    phone_regions: tuple[str, ...] = ("US", "GB", "DE", "FR", "IN", "BR")
    """Whose national numbers count, as ISO 3166 codes; numbers with + and a country always do."""

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ConfigError("personal_data.kinds names nothing; leave personal_data out")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FaceRules:
    """Samples with pictures of faces go."""

    minimum_share: float = 0.1
    """Of the picture's shorter side, that a face takes; smaller ones stay."""
    neighbours: int = 6
    """Overlapping detections that make a face: more finds fewer, and errs less."""

    def __post_init__(self) -> None:
        _require("faces", self, "minimum_share", 0.02, 1)
        _require("faces", self, "neighbours", 1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DuplicateRules:
    """Of samples that are nearly the same the first one stays, over all shards."""

    picture_bits: int | None = 31
    """Pictures whose perceptual hashes (PDQ, 256 bits) differ in at most so many are the same;
    null: pictures are not compared."""
    caption_similarity: float | None = None
    """Captions with this share of common 5-character pieces (Jaccard, by MinHash) are the same;
    null: captions are not compared. Short captions of different pictures are often the same."""

    def __post_init__(self) -> None:
        _require("duplicates", self, "picture_bits", 0, 64)
        _require("duplicates", self, "caption_similarity", 0.5, 1)
        if self.picture_bits is None and self.caption_similarity is None:
            raise ConfigError("duplicates compares nothing; leave it out")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationRules:
    """Samples that are in an evaluation set, too, go."""

    folders: tuple[str, ...]
    """Of shards, or their URLs."""
    picture_bits: int = 31
    """As for duplicates; mirrored pictures are found, too."""
    words: int | None = 8
    """A text goes with which an evaluation text shares so many words in a row; null: texts are not
    compared. Shorter texts never match."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise ConfigError("evaluation.folders names no folder; leave evaluation out")
        _require("evaluation", self, "picture_bits", 0, 64)
        _require("evaluation", self, "words", 3)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AgreementRules:
    """Captions that do not fit their picture go, by a CLIP, a SigLIP or a run of megavlm."""

    checkpoint: Path
    """Folder of a Hugging Face checkpoint in safetensors, with tokenizer and image processor; or of
    a megavlm checkpoint of a contrastive stage, or of its run, whose newest such one is taken."""
    minimum: float
    """Cosine of the two embeddings; it depends on the checkpoint."""
    tokenizer: Path | None = None
    """Of a megavlm checkpoint; null: where its run had it."""

    def __post_init__(self) -> None:
        _require("agreement", self, "minimum", -1, 1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ClassifierRules:
    """Samples, or texts, that a classifier is too sure of go: those not safe for work, say."""

    name: str
    """The reason that the report gives."""
    checkpoint: Path
    """Folder of a Hugging Face checkpoint for image or text classification, in safetensors."""
    of: Literal["pictures", "texts"]
    label: str
    """One of the checkpoint's."""
    maximum: float
    """Probability of the label."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ConfigError(
                f"classifiers: name={self.name!r} must be of letters, digits and _, and not begin "
                "with a digit"
            )
        if self.name in REASONS:
            raise ConfigError(
                f"classifiers: name={self.name!r} is what the report calls something else; name it "
                f"otherwise, {self.name}_by_model, say"
            )
        _require(f"classifiers: {self.name}", self, "maximum", 0, 1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FilterSettings:
    """All rules; a section that is left out filters nothing."""

    caption_tasks: tuple[str, ...] = ("caption",)
    """Texts of these tasks are captions."""
    pictures: PictureRules = field(default_factory=PictureRules)
    captions: CaptionRules = field(default_factory=CaptionRules)
    personal_data: PersonalDataRules | None = None
    faces: FaceRules | None = None
    evaluation: EvaluationRules | None = None
    classifiers: tuple[ClassifierRules, ...] = ()
    agreement: AgreementRules | None = None
    duplicates: DuplicateRules | None = None
    gpus_per_worker: float = 0
    """For checkpoints; 0.25 lets four workers share a GPU. 0: they run on the CPU."""

    def __post_init__(self) -> None:
        _require("", self, "gpus_per_worker", 0)
        names = [classifier.name for classifier in self.classifiers]
        if len(set(names)) < len(names):
            raise ConfigError(f"classifiers must have names of their own, not {names}")

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """Folders of all models that the rules use."""
        models = [classifier.checkpoint for classifier in self.classifiers]
        return (*models, self.agreement.checkpoint) if self.agreement else tuple(models)


def load_rules(path: Path) -> FilterSettings:
    """Read a file of rules; raises ConfigError, in one line."""
    tree = read_yaml(path, "rules")
    for section in [name for name, value in tree.items() if value is None]:
        raise ConfigError(
            f"{path}: {section} is empty; write `{section}: {{}}` for its defaults, or leave it out"
        )
    try:
        return settings_of(FilterSettings, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def rules_as_tree(rules: FilterSettings) -> dict[str, Any]:
    """The rules as JSON-safe plain data."""
    return TypeAdapter(FilterSettings).dump_python(rules, mode="json")


def _require(
    section: str, rules: Any, name: str, lowest: float, highest: float | None = None
) -> None:
    """Raise ConfigError unless a number, if it is set, lies within its limits."""
    value = getattr(rules, name)
    if value is None or lowest <= value <= (value if highest is None else highest):
        return
    limits = f"at least {lowest}" if highest is None else f"in {lowest} to {highest}"
    place = f"{section}.{name}" if section else name
    raise ConfigError(f"{place}={value} must be {limits}")
