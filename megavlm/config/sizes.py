"""The sizes of a model: all that fixes its parameters' shapes, and what it computes with them."""

import math
from itertools import pairwise
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from megavlm.errors import ConfigError

STRICT = ConfigDict(extra="forbid")
"""Every settings class refuses names it does not know."""

MAX_HEAD_WIDTH = 128  # the widest head that the fused cross-attention kernels hold


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EncoderSizes:
    """The image encoder: a pre-norm vision transformer; by default that of Llama 3.2 Vision.

    The other settings make it that of CLIP, SigLIP or ViT, so that it can start from their weights.
    """

    image_pixels: int = 224
    """Side of the square input image."""
    patch_pixels: int
    """Side of a square patch; must divide image_pixels."""
    width: int
    layers: int
    heads: int
    mlp_width: int
    attention_bias: bool = False
    """Biases on queries, keys, values and the output of self-attention: CLIP, SigLIP, ViT."""
    class_token: bool = True
    """A learned token before the patches: all but SigLIP."""
    pre_norm: bool = True
    """LayerNorm of the embedded patches before the first layer: Mllama and CLIP."""
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"
    """Of the feed-forward network. quick_gelu is x sigmoid(1.702 x), as in OpenAI's CLIP; gelu_tanh
    the approximation by tanh, as in SigLIP."""
    norm_epsilon: float = 1e-5
    """Added to the variance in every LayerNorm: 1e-6 in SigLIP, 1e-12 in ViT."""
    visible_registers: bool = True
    """Patches see the register tokens that pad the sequence, as in Mllama; in no other encoder."""

    def __post_init__(self) -> None:
        _require_positive(self)
        _require_epsilon("encoder", self.norm_epsilon)
        require_divides(
            "encoder.patch_pixels", self.patch_pixels, "image_pixels", self.image_pixels
        )
        _require_heads("encoder", self.width, self.heads)

    @property
    def tokens(self) -> int:
        """Image tokens that the decoder sees for one image: the patches and any class token."""
        return (self.image_pixels // self.patch_pixels) ** 2 + self.class_token

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
    cross_every: int | None = None
    """A cross-attention layer follows every so many self-attention layers."""
    cross_at: tuple[int, ...] | None = None
    """Or: positions (from 0) of the cross-attention layers among all layers, ascending."""
    heads: int
    kv_heads: int
    """Key/value heads of grouped-query attention, in self- and cross-attention alike."""
    mlp_width: int
    rope_base: int = 10_000
    rope_scaling: float | None = None
    """Llama 3's factor for low rotary frequencies: 8 in 3.1 and 3.2 Vision, 32 in the small 3.2."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    initial_gate: float = 0.0
    """Gates start at this value: 0 for a pre-trained decoder (the cross layers start as the
    identity), near 1 when everything is trained from scratch."""

    def __post_init__(self) -> None:
        _require_positive(self)
        _require_epsilon("decoder", self.norm_epsilon)
        _require_heads("decoder", self.width, self.heads)
        require_divides("decoder.kv_heads", self.kv_heads, "heads", self.heads)
        self._require_cross_layers()
        if self.rope_scaling is not None and not 1 <= self.rope_scaling < math.inf:
            raise ConfigError(
                f"decoder.rope_scaling={self.rope_scaling} must be finite and at least 1; null is "
                "no scaling"
            )
        if not math.isfinite(self.initial_gate):
            raise ConfigError(f"decoder.initial_gate={self.initial_gate} must be finite")
        if self.head_width % 2:
            raise ConfigError(
                f"decoder: width / heads = {self.head_width} must be even for rotary embeddings"
            )

    def _require_cross_layers(self) -> None:
        if (self.cross_every is None) == (self.cross_at is None):
            raise ConfigError(
                f"decoder.cross_every={self.cross_every} and decoder.cross_at={self.cross_at}: "
                "give one of them and leave the other null"
            )
        if self.cross_every is not None:
            require_divides(
                "decoder.cross_every", self.cross_every, "self_layers", self.self_layers
            )
            return
        positions = self.cross_layers
        if not positions or any(low >= high for low, high in pairwise(positions)):
            raise ConfigError(
                f"decoder.cross_at={list(positions)} must be positions in ascending order, each "
                "once, and at least one"
            )
        if positions[0] < 0 or positions[-1] >= self.layers:
            raise ConfigError(
                f"decoder.cross_at={list(positions)} must lie in 0 to {self.layers - 1}: "
                f"{self.self_layers} self-attention and {len(positions)} cross-attention layers"
            )

    @property
    def layers(self) -> int:
        """All layers, self- and cross-attention."""
        return self.self_layers + len(self.cross_layers)

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Positions (from 0) of the cross-attention layers among all layers."""
        if self.cross_at is not None:
            return self.cross_at
        assert self.cross_every is not None, "one of the two is given"
        unit = self.cross_every + 1
        return tuple(range(self.cross_every, self.self_layers // self.cross_every * unit, unit))

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextTowerSizes:
    """The text encoder of contrastive pre-training, which is dropped afterwards.

    A causal transformer with the decoder's vocabulary, norms and feed-forward networks.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    feature_width: int
    """Of the features of pictures and texts that are compared."""

    def __post_init__(self) -> None:
        _require_positive(self)
        _require_heads("text_tower", self.width, self.heads)
        if self.width // self.heads % 2:
            raise ConfigError(
                f"text_tower: width / heads = {self.width // self.heads} must be even for rotary "
                "embeddings"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSizes:
    """The whole vision-language model, and what its pre-training needs beside it."""

    encoder: EncoderSizes
    decoder: DecoderSizes
    text_tower: TextTowerSizes | None = None
    """For contrastive stages."""


def divisors(number: int) -> list[int]:
    """All divisors, ascending; error messages offer them."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _require_positive(sizes: EncoderSizes | DecoderSizes | TextTowerSizes) -> None:
    for name, value in vars(sizes).items():
        if type(value) is int and value < 1:  # not of a bool, nor of an option that is left out
            raise ConfigError(f"{type(sizes).__name__}.{name}={value} must be at least 1")


def _require_epsilon(part: str, epsilon: float) -> None:
    if not 0 < epsilon < 1:
        raise ConfigError(f"{part}.norm_epsilon={epsilon} must lie between 0 and 1")


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
