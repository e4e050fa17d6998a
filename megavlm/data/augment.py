"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719), with torchvision's operations and strengths.

All randomness comes from the generator that is passed in.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Fill = tuple[int, int, int]

MAX_MAGNITUDE = 30
# Each operation's value at full magnitude.
_SHEAR, _TRANSLATE_SHARE, _ROTATE_DEGREES, _ENHANCE = 0.3, 150 / 331, 30.0, 0.9
_POSTERIZE_BITS = 4  # taken away from 8


def rand_augment(
    image: Image.Image,
    generator: np.random.Generator,
    *,
    operations: int,
    magnitude: int,
    colour_operations: bool,
    fill: Fill,
) -> Image.Image:
    """Apply some random operations in a row.

    magnitude: 0 (hardly anything) to 30. colour_operations: whether those that change colours may
    be drawn. fill: colour of what a shear, a shift or a rotation uncovers.
    """
    names = [*_GEOMETRIC, *(_COLOUR if colour_operations else ())]
    for _ in range(operations):
        name = names[int(generator.integers(len(names)))]
        strength = magnitude / MAX_MAGNITUDE
        if name in _SIGNED and generator.integers(2):
            strength = -strength
        image = apply_operation(image, name, strength, fill)
    return image


def apply_operation(image: Image.Image, name: str, strength: float, fill: Fill) -> Image.Image:
    """Apply one operation to an RGB image; strength 0 to 1, or -1 to 1 where it has a direction."""
    if name in _GEOMETRIC:
        return _GEOMETRIC[name](image, strength, fill)
    return _COLOUR[name](image, strength)


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    """matrix: from output to input positions, (a, b, c, d, e, f)."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.NEAREST,
        fillcolor=fill,
    )


_GEOMETRIC: dict[str, Callable[[Image.Image, float, Fill], Image.Image]] = {
    "Identity": lambda image, strength, fill: image,
    "ShearX": lambda image, strength, fill: _affine(
        image, (1, _SHEAR * strength, 0, 0, 1, 0), fill
    ),
    "ShearY": lambda image, strength, fill: _affine(
        image, (1, 0, 0, _SHEAR * strength, 1, 0), fill
    ),
    "TranslateX": lambda image, strength, fill: _affine(
        image, (1, 0, -int(_TRANSLATE_SHARE * image.width * strength), 0, 1, 0), fill
    ),
    "TranslateY": lambda image, strength, fill: _affine(
        image, (1, 0, 0, 0, 1, -int(_TRANSLATE_SHARE * image.height * strength)), fill
    ),
    "Rotate": lambda image, strength, fill: image.rotate(
        _ROTATE_DEGREES * strength, Image.Resampling.NEAREST, fillcolor=fill
    ),
}

_COLOUR: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Brightness": lambda image, strength: ImageEnhance.Brightness(image).enhance(
        1 + _ENHANCE * strength
    ),
    "Color": lambda image, strength: ImageEnhance.Color(image).enhance(1 + _ENHANCE * strength),
    "Contrast": lambda image, strength: ImageEnhance.Contrast(image).enhance(
        1 + _ENHANCE * strength
    ),
    "Sharpness": lambda image, strength: ImageEnhance.Sharpness(image).enhance(
        1 + _ENHANCE * strength
    ),
    "Posterize": lambda image, strength: ImageOps.posterize(
        image, 8 - round(_POSTERIZE_BITS * strength)
    ),
    "Solarize": lambda image, strength: ImageOps.solarize(image, 255 * (1 - strength)),
    "AutoContrast": lambda image, strength: ImageOps.autocontrast(image),
    "Equalize": lambda image, strength: ImageOps.equalize(image),
}

_SIGNED = {
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
}
