"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) on RGB images of any size.

Operations and values are those of torchvision.transforms.RandAugment with 31 magnitudes and
nearest interpolation. All randomness comes from the generator that is passed in.
"""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

Fill = tuple[int, int, int]

MAX_MAGNITUDE = 30

# Each operation's value at magnitude 0 and at magnitude 30.
GEOMETRIC = {
    "Identity": (0.0, 0.0),
    "ShearX": (0.0, 0.3),  # slope
    "ShearY": (0.0, 0.3),
    "TranslateX": (0.0, 150 / 331),  # share of the width
    "TranslateY": (0.0, 150 / 331),
    "Rotate": (0.0, 30.0),  # degrees, counter-clockwise
}
COLOUR = {
    "Brightness": (0.0, 0.9),  # added to a factor of 1
    "Color": (0.0, 0.9),
    "Contrast": (0.0, 0.9),
    "Sharpness": (0.0, 0.9),
    "Posterize": (8.0, 4.0),  # bits that stay
    "Solarize": (255.0, 0.0),  # levels from here on are inverted
    "AutoContrast": (0.0, 0.0),
    "Equalize": (0.0, 0.0),
}
SIGNED = {
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
}
"""Operations that go either way."""


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
    names = [*GEOMETRIC, *(COLOUR if colour_operations else ())]
    for _ in range(operations):
        name = names[int(generator.integers(len(names)))]
        value = magnitude_value(name, magnitude, image.size)
        if name in SIGNED and generator.integers(2):
            value = -value
        image = apply_operation(image, name, value, fill)
    return image


@lru_cache
def magnitude_value(name: str, magnitude: int, size: tuple[int, int]) -> float:
    """An operation's value at a magnitude for an image of (width, height); shifts in pixels."""
    first, last = (GEOMETRIC | COLOUR)[name]
    if name.startswith("Translate"):
        last *= size[name == "TranslateY"]
    # In float32, as torchvision: blends cut off fractions, so the last bit can move a level.
    return float(torch.linspace(first, last, MAX_MAGNITUDE + 1)[magnitude])


def apply_operation(image: Image.Image, name: str, value: float, fill: Fill) -> Image.Image:
    """Apply one operation to an RGB image, at what `magnitude_value` gives or its negative."""
    match name:
        case "Identity":
            return image
        case "ShearX":
            return _affine(image, (1, value, 0, 0, 1, 0), fill)
        case "ShearY":
            return _affine(image, (1, 0, 0, value, 1, 0), fill)
        case "TranslateX":
            return _affine(image, (1, 0, -int(value), 0, 1, 0), fill)
        case "TranslateY":
            return _affine(image, (1, 0, 0, 0, 1, -int(value)), fill)
        case "Rotate":
            return image.rotate(value, Image.Resampling.NEAREST, fillcolor=fill)
        case "Brightness":
            return ImageEnhance.Brightness(image).enhance(1 + value)
        case "Color":
            return ImageEnhance.Color(image).enhance(1 + value)
        case "Contrast":
            return ImageEnhance.Contrast(image).enhance(1 + value)
        case "Sharpness":
            return Image.blend(_smooth(image), image, 1 + value)
        case "Posterize":
            return ImageOps.posterize(image, round(value))
        case "Solarize":
            return ImageOps.solarize(image, value)  # pyright: ignore[reportArgumentType]
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case _:
            raise AssertionError(f"no operation is called {name}")


def _smooth(image: Image.Image) -> Image.Image:
    """Pillow's `ImageFilter.SMOOTH` to the bit, in half the time: whole numbers, many at once.

    The mean of 3 x 3 pixels in which the middle counts five times; the border stays.
    """
    rows = np.asarray(image).astype(np.uint16).reshape(image.height, -1)
    total = rows[:-2] + rows[1:-1]
    total += rows[2:]
    total = total[:, :-6] + total[:, 3:-3] + total[:, 6:]  # neighbours are three channels apart
    total += 4 * rows[1:-1, 3:-3] + 6  # 6 of 13: to round
    rows[1:-1, 3:-3] = total // 13
    return Image.fromarray(rows.astype(np.uint8).reshape(image.height, image.width, 3))


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    """matrix: from output to input positions, (a, b, c, d, e, f)."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.NEAREST,
        fillcolor=fill,
    )
