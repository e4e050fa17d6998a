"""Decoding of good and broken pictures; the square fit against Hugging Face's own processor."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from megavlm.data.image import (
    CROP_ASPECTS,
    decode_picture,
    fit_square,
    random_resized_crop,
    to_uint8_tensor,
)
from megavlm.errors import BadSampleError

ORIENTATION = 0x0112
X_RESOLUTION = 0x011A


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * 10_000 + height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: a pixel's colour tells where it was."""
    y, x = np.mgrid[:height, :width]
    levels = [x * 255 / (width - 1), y * 255 / (height - 1), np.full_like(x, 60.0)]
    return Image.fromarray(np.stack(levels, axis=-1).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def worst_difference(a: Image.Image, b: Image.Image) -> int:
    assert a.size == b.size
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_pictures_come_back_exactly(kind: str) -> None:
    image = noise(50, 40)
    result = decode_picture(encode(image, kind, lossless=True), "a", 224)
    assert result.mode == "RGB"
    assert worst_difference(result, image) == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share_kept", [0.0, 0.02, 0.3, 0.7])
def test_truncated_pictures_are_refused_by_name(kind: str, share_kept: float) -> None:
    encoded = encode(noise(50, 40), kind)
    with pytest.raises(BadSampleError, match="shard-7/0042"):
        decode_picture(encoded[: int(len(encoded) * share_kept)], "shard-7/0042", 224)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(BadSampleError, match="sample-1"):
        decode_picture(encode(noise(8, 8), kind), "sample-1", 224)


# The first is over Pillow's own limit, the second only over ours.
@pytest.mark.parametrize("side", [50_000, 8_001])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_before_decoding(side: int) -> None:
    with pytest.raises(BadSampleError, match=r"sample-1.*limit"):
        decode_picture(png_claiming(side, side), "sample-1", 224)


def test_picture_at_the_limit_is_decoded() -> None:
    with pytest.raises(BadSampleError, match="truncated"):  # the header passes, the data is short
        decode_picture(png_claiming(8_000, 8_000), "sample-1", 224)


def test_damaged_pictures_raise_nothing_else() -> None:
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    originals = [encode(noise(20, 16), kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP")]
    for trial in range(600):
        damaged = bytearray(originals[trial % 3])
        for place in generator.integers(len(damaged), size=3):
            damaged[place] = generator.integers(256)
        try:
            decode_picture(bytes(damaged), "sample-1", 16)
        except BadSampleError:
            pass


def test_exif_that_pillow_cannot_rewrite_is_refused() -> None:
    # A turned picture whose resolution is text: Pillow 13 raises TypeError.
    entries = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)
    entries += struct.pack("<HHII", X_RESOLUTION, 2, 1, 0x41)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4)
    with pytest.raises(BadSampleError, match="sample-1"):
        decode_picture(encode(noise(8, 8), "JPEG", exif=exif), "sample-1", 224)


def test_cmyk_jpeg_becomes_rgb() -> None:
    red = Image.new("RGB", (32, 32), (200, 30, 60)).convert("CMYK")
    result = decode_picture(encode(red, "JPEG", quality=95), "a", 32)
    assert worst_difference(result, Image.new("RGB", (32, 32), (200, 30, 60))) <= 3  # measured 1


def test_transparent_palette_png_lies_on_white() -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (2, 0, 4, 2))
    result = decode_picture(encode(image, "PNG", transparency=0), "a", 224)
    assert result.getpixel((0, 0)) == (255, 255, 255)
    assert result.getpixel((3, 0)) == (0, 0, 255)


def test_half_transparent_png_is_mixed_with_white() -> None:
    result = decode_picture(encode(Image.new("RGBA", (2, 2), (200, 0, 0, 51)), "PNG"), "a", 224)
    assert result.getpixel((0, 0)) == (244, 204, 204)  # a fifth of the colour, four of white


def test_sixteen_bit_grey_png_keeps_its_range() -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    result = decode_picture(encode(Image.fromarray(levels * 257), "PNG"), "a", 224)
    np.testing.assert_array_equal(np.asarray(result)[..., 1], levels)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda stored: stored),
        (2, lambda stored: stored[:, ::-1]),
        (3, lambda stored: stored[::-1, ::-1]),
        (4, lambda stored: stored[::-1]),
        (5, lambda stored: stored.swapaxes(0, 1)),
        (6, lambda stored: stored.swapaxes(0, 1)[:, ::-1]),  # turned clockwise
        (7, lambda stored: stored[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda stored: stored.swapaxes(0, 1)[::-1]),
    ],
)
def test_exif_orientation_is_undone(orientation: int, upright) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = noise(6, 4)
    result = decode_picture(encode(image, "PNG", exif=exif), "a", 224)
    np.testing.assert_array_equal(np.asarray(result), upright(np.asarray(image)))


def test_large_jpeg_is_decoded_small_but_not_below_the_target() -> None:
    image = gradient(1200, 900)
    encoded = encode(image, "JPEG", quality=95)
    assert decode_picture(encoded, "a", 224).size == (300, 225)
    assert decode_picture(encoded, "a", 1000).size == (1200, 900)
    small = fit_square(decode_picture(encoded, "a", 224), 224)
    assert worst_difference(small, fit_square(image, 224)) <= 8  # measured 5, at the padding's edge


@pytest.mark.parametrize(
    "size",
    # The last five are sizes at which floating-point scales round down.
    [
        *((224, 224), (640, 480), (480, 640), (30, 20), (1, 1), (1, 1000), (1000, 1), (225, 224)),
        *((55, 20), (20, 83), (71, 71), (95, 190), (142, 71)),
    ],
)
def test_fit_square_is_hugging_faces(size: tuple[int, int]) -> None:
    processor = MllamaImageProcessorPil(
        size={"height": 224, "width": 224}, max_image_tiles=1, do_rescale=False, do_normalize=False
    )
    image = noise(*size)
    wanted = processor(image, return_tensors="np")["pixel_values"][0, 0, 0]
    np.testing.assert_array_equal(to_uint8_tensor(fit_square(image, 224)).numpy(), wanted)


def test_random_resized_crop_keeps_the_asked_area_and_aspect() -> None:
    image = gradient(400, 300)
    generator = np.random.default_rng(0)
    areas, lefts = [], []
    for _ in range(200):
        crop = np.asarray(random_resized_crop(image, 64, generator, 0.3)).astype(float)
        assert crop.shape == (64, 64, 3)
        # Across 63 of the 64 columns red grows by 63/64 of the crop's width; rows and green alike.
        red, green = crop[32, :, 0], crop[:, 32, 1]
        width = (red[-1] - red[0]) / 255 * 400 * 64 / 63
        height = (green[-1] - green[0]) / 255 * 300 * 64 / 63
        areas.append(width * height / (400 * 300))
        lefts.append(red[0])
        # A level of red is 1.6 pixels, one of green 1.2.
        assert CROP_ASPECTS[0] - 0.03 <= width / height <= CROP_ASPECTS[1] + 0.03
    assert 0.28 <= min(areas) < 0.35
    assert 0.85 < max(areas) <= 1.02
    assert np.std(lefts) > 10


def test_random_resized_crop_is_a_function_of_the_seed() -> None:
    image = noise(60, 50)
    crops = [
        random_resized_crop(image, 32, np.random.default_rng(seed), 0.2).tobytes()
        for seed in (1, 1, 2)
    ]
    assert crops[0] == crops[1] != crops[2]


@pytest.mark.parametrize(("size", "minimum_area"), [((60, 50), 1.0), ((1, 1000), 0.9)])
def test_whole_picture_when_asked_or_when_no_crop_fits(
    size: tuple[int, int], minimum_area: float
) -> None:
    image = noise(*size)
    result = random_resized_crop(image, 32, np.random.default_rng(0), minimum_area)
    assert worst_difference(result, fit_square(image, 32)) == 0


def test_tensor_is_channels_first_uint8() -> None:
    image = noise(5, 5)
    tensor = to_uint8_tensor(image)
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3, 5, 5)
    assert tensor.is_contiguous()
    assert tuple(tensor[:, 1, 3].tolist()) == image.getpixel((3, 1))
