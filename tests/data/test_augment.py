"""RandAugment against torchvision's definitions, written out again in numpy.

torchvision's values are float32 tables of 31 entries.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from megavlm.data import augment
from megavlm.data.augment import apply_operation, magnitude_value, rand_augment

FILL = (255, 0, 128)
WIDTH, HEIGHT = 97, 61
GEOMETRIC = ["Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"]
COLOUR = [
    *("Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
]
UNSIGNED = ["Identity", "Posterize", "Solarize", "AutoContrast", "Equalize"]
# Where an affine map lands on the border of two pixels, either is right. Pillow keeps slopes to
# 1/65,536, so positions are off by up to 0.0008 of a pixel at a side of 97.
BORDER = 0.001
# Pillow's table for AutoContrast is made in floats, the oracle's in integers: worst measured 1.
AUTO_CONTRAST_LEVELS = 1


def picture(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Noise over 20 to 230 in red and 0 to 255 elsewhere, uint8 (height, width, 3)."""
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    array[..., 0] = 20 + array[..., 0] * 210.0 / 255
    return array


def signs(name: str) -> list[int]:
    return [1] if name in UNSIGNED else [1, -1]


def table(name: str, width: int, height: int) -> list[float]:
    """torchvision's value for each magnitude."""
    last = {
        **{"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0},
        **{"TranslateX": 150 / 331 * width, "TranslateY": 150 / 331 * height},
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9),
    }
    if name == "Posterize":
        return (8 - (torch.arange(31) / 7.5).round().int()).tolist()
    if name == "Solarize":
        return torch.linspace(255.0, 0.0, 31).tolist()
    return torch.linspace(0.0, last.get(name, 0.0), 31).tolist()


def sample_nearest(pixels: np.ndarray, matrix: list[list[float]], centre: tuple[float, float]):
    """Output position p shows input position centre + matrix (p - centre); the fill outside.

    Returns the acceptable results, (4, height, width, 3): they differ on the borders of pixels.
    """
    height, width, _ = pixels.shape
    y, x = np.mgrid[:height, :width] + 0.5
    offset = np.stack([x - centre[0], y - centre[1], np.ones_like(x)])
    source_x, source_y = np.tensordot(matrix, offset, 1) + np.array(centre)[:, None, None]
    results = np.empty((4, *pixels.shape), dtype=np.uint8)
    results[:] = FILL
    shifts = itertools.product((-BORDER, BORDER), repeat=2)
    for result, (dx, dy) in zip(results, shifts, strict=True):
        column, row = np.floor(source_x + dx).astype(int), np.floor(source_y + dy).astype(int)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        result[inside] = pixels[row[inside], column[inside]]
    return results


def blend(base: np.ndarray, pixels: np.ndarray, factor: float) -> np.ndarray:
    base = base.astype(np.float32)
    mixed = base + np.float32(factor) * (pixels.astype(np.float32) - base)
    return np.clip(mixed, 0, 255).astype(np.uint8)


def luma(pixels: np.ndarray) -> np.ndarray:
    """ITU-R 601-2 in 16-bit fixed point, (height, width)."""
    return (pixels.astype(int) @ [19595, 38470, 7471] + 32768) >> 16


def smooth(pixels: np.ndarray) -> np.ndarray:
    """3 x 3 mean in which the middle counts five times; the border stays."""
    height, width, _ = pixels.shape
    wide = pixels.astype(int)
    total = 4 * wide[1:-1, 1:-1]
    for y in range(3):
        for x in range(3):
            total = total + wide[y : height - 2 + y, x : width - 2 + x]
    result = pixels.copy()
    result[1:-1, 1:-1] = np.rint(total / 13)
    return result


def stretch(channel: np.ndarray) -> np.ndarray:
    low, high = int(channel.min()), int(channel.max())
    return ((channel.astype(int) - low) * 255 // (high - low)).astype(np.uint8)


def equalise(channel: np.ndarray) -> np.ndarray:
    counts = np.bincount(channel.ravel(), minlength=256)
    step = (channel.size - counts[channel.max()]) // 255
    below = np.cumsum(counts) - counts
    return np.minimum((below + step // 2) // step, 255).astype(np.uint8)[channel]


def per_channel(function, pixels: np.ndarray) -> np.ndarray:
    return np.stack([function(pixels[..., channel]) for channel in range(3)], axis=-1)


def expected(pixels: np.ndarray, name: str, value: float) -> np.ndarray:
    height, width, _ = pixels.shape
    centre, corner = (width / 2, height / 2), (0.0, 0.0)
    match name:
        case "Identity":
            return pixels
        case "ShearX":
            return sample_nearest(pixels, [[1, value, 0], [0, 1, 0]], corner)
        case "ShearY":
            return sample_nearest(pixels, [[1, 0, 0], [value, 1, 0]], corner)
        case "TranslateX":
            return sample_nearest(pixels, [[1, 0, -int(value)], [0, 1, 0]], corner)
        case "TranslateY":
            return sample_nearest(pixels, [[1, 0, 0], [0, 1, -int(value)]], corner)
        case "Rotate":  # counter-clockwise, y pointing down
            cos, sin = np.cos(np.radians(value)), np.sin(np.radians(value))
            return sample_nearest(pixels, [[cos, -sin, 0], [sin, cos, 0]], centre)
        case "Brightness":
            return blend(np.zeros_like(pixels), pixels, 1 + value)
        case "Color":
            return blend(np.repeat(luma(pixels)[..., None], 3, axis=-1), pixels, 1 + value)
        case "Contrast":
            mean = int(luma(pixels).mean() + 0.5)
            return blend(np.full_like(pixels, mean), pixels, 1 + value)
        case "Sharpness":
            return blend(smooth(pixels), pixels, 1 + value)
        case "Posterize":
            levels = 2 ** (8 - int(value))
            return pixels // levels * levels
        case "Solarize":
            return np.where(pixels < value, pixels, 255 - pixels)
        case "AutoContrast":
            return per_channel(stretch, pixels)
        case "Equalize":
            return per_channel(equalise, pixels)
    raise AssertionError(name)


@pytest.mark.parametrize("name", [*GEOMETRIC, *COLOUR])
def test_operation_is_torchvisions_at_every_magnitude(name: str) -> None:
    pixels = picture()
    for magnitude, value in enumerate(table(name, WIDTH, HEIGHT)):
        ours = magnitude_value(name, magnitude, (WIDTH, HEIGHT))
        assert (round(ours) if name == "Posterize" else ours) == value
        for sign in signs(name):
            result = np.array(apply_operation(Image.fromarray(pixels), name, sign * value, FILL))
            wanted = expected(pixels, name, sign * value)
            where = f"magnitude {magnitude}, sign {sign}"
            if name == "AutoContrast":
                assert np.abs(result.astype(int) - wanted).max() <= AUTO_CONTRAST_LEVELS, where
            else:
                acceptable = wanted.reshape(-1, HEIGHT, WIDTH, 3)
                assert (result == acceptable).all(-1).any(0).all(), where


@pytest.mark.parametrize("value", [-0.9, -0.3, 0.0, 0.27, 0.9])
@pytest.mark.parametrize("size", [(224, 224), (3, 3), (9, 2), (2, 9), (3, 1), (1, 1)])
def test_sharpness_is_pillows(size: tuple[int, int], value: float) -> None:
    image = Image.fromarray(picture(*size))
    wanted = ImageEnhance.Sharpness(image).enhance(1 + value)
    assert apply_operation(image, "Sharpness", value, FILL).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", ["ShearX", "ShearY"])
def test_shear_takes_torchvisions_side_on_pixel_borders(name: str) -> None:
    """torchvision takes the slope through degrees; equal bit for bit at the training size."""
    image = Image.fromarray(picture(224, 224))
    for value in table(name, 224, 224):
        for signed in (value, -value):
            slope = math.tan(math.radians(math.degrees(math.atan(signed))))
            matrix = (1, slope, 0, 0, 1, 0) if name == "ShearX" else (1, 0, 0, slope, 1, 0)
            wanted = image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=FILL)
            assert apply_operation(image, name, signed, FILL).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", COLOUR)
def test_one_colour_picture_survives_every_colour_operation(name: str) -> None:
    flat = Image.new("RGB", (5, 4), (10, 200, 90))
    value = magnitude_value(name, 30, flat.size)
    assert apply_operation(flat, name, value, FILL).size == (5, 4)
    if name in ("AutoContrast", "Equalize"):  # nothing to stretch
        assert apply_operation(flat, name, value, FILL).tobytes() == flat.tobytes()


def augmented(seed: int, **changes) -> bytes:
    settings = {"operations": 3, "magnitude": 9, "colour_operations": True, "fill": FILL} | changes
    image = Image.fromarray(picture())
    return rand_augment(image, np.random.default_rng(seed), **settings).tobytes()


def test_same_seed_gives_the_same_bytes() -> None:
    assert [augmented(seed) for seed in range(20)] == [augmented(seed) for seed in range(20)]
    assert len({augmented(seed) for seed in range(20)}) > 15


def test_no_operations_change_nothing() -> None:
    assert augmented(0, operations=0) == picture().tobytes()


def test_without_colour_operations_no_new_colour_appears() -> None:
    image = Image.new("RGB", (40, 30), (10, 20, 30))
    image.paste((200, 100, 0), (10, 5, 30, 20))
    generator = np.random.default_rng(1)
    for _ in range(100):
        result = rand_augment(
            image, generator, operations=2, magnitude=30, colour_operations=False, fill=FILL
        )
        colours = {colour for _, colour in result.getcolors()}
        assert colours <= {(10, 20, 30), (200, 100, 0), FILL}


@pytest.mark.parametrize(
    ("colour_operations", "names"), [(True, [*GEOMETRIC, *COLOUR]), (False, GEOMETRIC)]
)
def test_operations_and_signs_are_drawn_evenly(
    monkeypatch: pytest.MonkeyPatch, colour_operations: bool, names: list[str]
) -> None:
    drawn: list[tuple[str, float]] = []

    def record(image: Image.Image, name: str, value: float, fill: augment.Fill) -> Image.Image:
        drawn.append((name, float(np.sign(value))))
        return image

    monkeypatch.setattr(augment, "apply_operation", record)
    rand_augment(
        Image.new("RGB", (2, 2)),
        np.random.default_rng(0),
        operations=500 * len(names),
        magnitude=15,
        colour_operations=colour_operations,
        fill=FILL,
    )
    for name in names:
        draws = [sign for drawn_name, sign in drawn if drawn_name == name]
        assert abs(len(draws) - 500) < 5 * 500**0.5  # five standard deviations
        if name not in UNSIGNED:
            assert abs(draws.count(-1.0) - 250) < 5 * 250**0.5
        else:
            assert -1.0 not in draws
    assert {name for name, _ in drawn} == set(names)
