"""The sizes of a model: all that fixes its parameters' shapes."""

import math

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from megavlm.errors import ConfigError

STRICT = ConfigDict(extra="forbid")
"""Every settings class refuses names it does not know."""

MAX_HEAD_WIDTH = 128  # the widest head that the fused cross-attention kernels hold


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncoderSizes:
    """The image encoder: a pre-norm vision transformer with a class token."""

    image_pixels: int = 224
    """Side of the square input image."""
    patch_pixels: int
    """Side of a square patch; must divide image_pixels."""
    width: int
    layers: int
    heads: int
    mlp_width: int

    def __post_init__(self) -> None:
        _require_positive(self)
        require_divides(
            "encoder.patch_pixels", self.patch_pixels, "image_pixels", self.image_pixels
        )
        _require_heads("encoder", self.width, self.heads)

    @property
    def tokens(self) -> int:
        """Image tokens that the decoder sees for one image: the patches and the class token."""
        return (self.image_pixels // self.patch_pixels) ** 2 + 1

    @property
    def register_tokens(self) -> int:
        """Extra tokens inside the encoder that bring its sequence to a multiple of 8."""
        return -self.tokens % 8


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DecoderSizes:
    """The language model, with gated cross-attention layers between its self-attention layers."""

    vocabulary: int
    width: int
    self_layers: int
    cross_every: int
    """A cross-attention layer follows every so many self-attention layers."""
    heads: int
    kv_heads: int
    """Key/value heads of grouped-query attention, in self- and cross-attention alike."""
    mlp_width: int
    rope_base: int = 10_000
    initial_gate: float = 0.0
    """Gates start at this value: 0 for a pre-trained decoder (the cross layers start as the
    identity), near 1 when everything is trained from scratch."""

    def __post_init__(self) -> None:
        _require_positive(self, except_for=("initial_gate",))
        _require_heads("decoder", self.width, self.heads)
        require_divides("decoder.kv_heads", self.kv_heads, "heads", self.heads)
        require_divides("decoder.cross_every", self.cross_every, "self_layers", self.self_layers)
        if not math.isfinite(self.initial_gate):
            raise ConfigError(f"decoder.initial_gate={self.initial_gate} must be finite")
        if self.head_width % 2:
            raise ConfigError(
                f"decoder: width / heads = {self.head_width} must be even for rotary embeddings"
            )

    @property
    def layers(self) -> int:
        """All layers, self- and cross-attention."""
        return self.self_layers + self.self_layers // self.cross_every

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Positions (from 0) of the cross-attention layers among all layers."""
        return tuple(range(self.cross_every, self.layers, self.cross_every + 1))

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSizes:
    """The whole vision-language model."""

    encoder: EncoderSizes
    decoder: DecoderSizes


def divisors(number: int) -> list[int]:
    """All divisors, ascending; error messages offer them."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _require_positive(sizes: EncoderSizes | DecoderSizes, except_for: tuple[str, ...] = ()) -> None:
    for name, value in vars(sizes).items():
        if name not in except_for and not name.startswith("_") and value < 1:
            raise ConfigError(f"{type(sizes).__name__}.{name}={value} must be at least 1")


def require_divides(name: str, value: int, of_name: str, of: int) -> None:
    """Raise ConfigError, offering the divisors, unless `value` divides `of`."""
    if of % value:
        raise ConfigError(f"{name}={value} does not divide {of_name}={of}; try {divisors(of)}")


def _require_heads(part: str, width: int, heads: int) -> None:
    require_divides(f"{part}.heads", heads, "width", width)
    if width // heads > MAX_HEAD_WIDTH:
        raise ConfigError(
            f"{part}: width / heads = {width // heads} exceeds {MAX_HEAD_WIDTH}; "
            f"use at least {-(-width // MAX_HEAD_WIDTH)} heads"
        )
