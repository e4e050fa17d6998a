"""Decoding of good and broken pictures; the square fit against Hugging Face's own processor.

The plain decoding of evaluation and the fast one of training accept and refuse the same.
"""

import io
import math
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageDraw, ImageOps
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from megavlm.data.image import (
    CROP_ASPECTS,
    decode_for_crop,
    decode_picture,
    fit_square,
    random_resized_crop,
    to_uint8_tensor,
)
from megavlm.errors import BadSampleError

ORIENTATION = 0x0112
X_RESOLUTION = 0x011A
BOTH = pytest.mark.parametrize("decode", [decode_picture, decode_for_crop])


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


def photograph(width: int, height: int) -> Image.Image:
    """Shades, edges and grain."""
    image = gradient(width, height)
    draw = ImageDraw.Draw(image)
    generator = np.random.default_rng(width)
    for _ in range(30):
        x, y, radius = generator.integers((width, height, width // 5))
        colour = tuple(int(level) for level in generator.integers(256, size=3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    grain = generator.normal(0, 5, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


class WholePicture:
    """Draws a crop of all of a picture of this aspect."""

    def __init__(self, aspect: float) -> None:
        self.aspect = aspect

    def uniform(self, low: float, high: float) -> float:
        return 1.0 if high == 1 else math.log(self.aspect)

    def integers(self, count: int) -> int:
        assert count == 1
        return 0


Picture = Image.Image | np.ndarray


def worst_difference(a: Picture, b: Picture) -> int:
    assert np.shape(a) == np.shape(b)
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


@BOTH
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_pictures_come_back_exactly(decode, kind: str) -> None:
    image = noise(50, 40)
    result = decode(encode(image, kind, lossless=True), "a", 224)
    assert worst_difference(result, image) == 0


@BOTH
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share_kept", [0.0, 0.02, 0.3, 0.7])
def test_truncated_pictures_are_refused_by_name(decode, kind: str, share_kept: float) -> None:
    encoded = encode(noise(50, 40), kind)
    with pytest.raises(BadSampleError, match="shard-7/0042"):
        decode(encoded[: int(len(encoded) * share_kept)], "shard-7/0042", 224)


@BOTH
@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(decode, kind: str) -> None:
    with pytest.raises(BadSampleError, match="sample-1"):
        decode(encode(noise(8, 8), kind), "sample-1", 224)


@BOTH
# The first is over Pillow's own limit, the second only over ours.
@pytest.mark.parametrize("side", [50_000, 8_001])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_before_decoding(decode, side: int) -> None:
    with pytest.raises(BadSampleError, match=r"sample-1.*limit"):
        decode(png_claiming(side, side), "sample-1", 224)


@BOTH
def test_picture_at_the_limit_is_decoded(decode) -> None:
    with pytest.raises(BadSampleError, match="truncated"):  # the header passes, the data is short
        decode(png_claiming(8_000, 8_000), "sample-1", 224)


@BOTH
def test_damaged_pictures_raise_nothing_else(decode) -> None:
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    originals = [encode(noise(20, 16), kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP")]
    for trial in range(600):
        damaged = bytearray(originals[trial % 3])
        for place in generator.integers(len(damaged), size=3):
            damaged[place] = generator.integers(256)
        try:
            decode(bytes(damaged), "sample-1", 16)
        except BadSampleError as error:
            assert " at 0x" not in str(error)


@BOTH
def test_what_is_no_picture_is_told_as_such(decode) -> None:
    with pytest.raises(BadSampleError) as error:
        decode(b"<html>not found</html>", "sample-1", 16)
    assert str(error.value) == (
        "picture of sample-1 cannot be used: it is no PNG, JPEG or WebP file, or its beginning is "
        "broken"
    )


def jpeg_of_a_scan_for_each_colour(grey: Image.Image) -> bytes:
    """Sequential, with the grey levels as all three colours."""
    encoded = encode(grey, "JPEG")
    frame, scan = encoded.index(b"\xff\xc0"), encoded.index(b"\xff\xda")
    size = encoded[frame + 4 : frame + 9]
    colours = b"".join(bytes((number, 0x11, 0)) for number in (1, 2, 3))
    wide_frame = b"\xff\xc0" + (17).to_bytes(2) + size + b"\x03" + colours
    scans = [
        encoded[scan : scan + 5] + bytes((number,)) + encoded[scan + 6 : -2] for number in (1, 2, 3)
    ]
    return encoded[:frame] + wide_frame + encoded[frame + 13 : scan] + b"".join(scans) + b"\xff\xd9"


@BOTH
@pytest.mark.parametrize("is_progressive", [True, False])
def test_a_jpeg_of_too_many_scans_is_refused_before_decoding(decode, is_progressive: bool) -> None:
    if is_progressive:
        encoded = encode(gradient(48, 32), "JPEG", progressive=True)
    else:
        encoded = jpeg_of_a_scan_for_each_colour(gradient(48, 32).convert("L"))
    assert np.asarray(decode(encoded, "sample-1", 48)).shape == (32, 48, 3)
    last = encoded[encoded.rindex(b"\xff\xda") : -2]
    assert decode(encoded[:-2] + 80 * last + encoded[-2:], "sample-1", 16) is not None
    with pytest.raises(BadSampleError, match=r"sample-1 .*it has over 100 scans; save it anew"):
        decode(encoded[:-2] + 100 * last + encoded[-2:], "sample-1", 16)


@BOTH
@pytest.mark.parametrize("is_progressive", [True, False])
def test_what_follows_a_jpeg_counts_as_no_scan(decode, is_progressive: bool) -> None:
    image = photograph(60, 40)
    encoded = encode(image, "JPEG", progressive=is_progressive)
    # Telephones append films, in which a marker comes every 65,536 bytes.
    with_film = decode(encoded + 200 * b"film\xff\xda", "sample-1", 1000)
    assert worst_difference(with_film, decode(encoded, "sample-1", 1000)) == 0


@BOTH
@pytest.mark.parametrize("filling", [b"", b"\xff\xff\xff"])
def test_a_jpeg_is_turned_whatever_comes_before_its_exif(decode, filling) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    encoded = encode(noise(20, 16), "JPEG", exif=exif)
    before = b"\xff\xfe" + (5_002).to_bytes(2) + bytes(5_000)  # a comment
    found = decode(encoded[:2] + before + filling + encoded[2:], "a", 224)
    assert np.asarray(found).shape == (20, 16, 3)


@BOTH
def test_exif_that_pillow_cannot_rewrite_is_refused(decode) -> None:
    # A turned picture whose resolution is text: Pillow 13 raises TypeError.
    entries = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)
    entries += struct.pack("<HHII", X_RESOLUTION, 2, 1, 0x41)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4)
    with pytest.raises(BadSampleError, match="sample-1"):
        decode(encode(noise(8, 8), "JPEG", exif=exif), "sample-1", 224)


@BOTH
def test_cmyk_jpeg_becomes_rgb(decode) -> None:
    red = Image.new("RGB", (32, 32), (200, 30, 60)).convert("CMYK")
    result = decode(encode(red, "JPEG", quality=95), "a", 32)
    assert worst_difference(result, Image.new("RGB", (32, 32), (200, 30, 60))) <= 3  # measured 1


@BOTH
def test_transparent_palette_png_lies_on_white(decode) -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (2, 0, 4, 2))
    result = decode(encode(image, "PNG", transparency=0), "a", 224)
    assert np.asarray(result)[0, [0, 3]].tolist() == [[255, 255, 255], [0, 0, 255]]


@BOTH
def test_half_transparent_png_is_mixed_with_white(decode) -> None:
    result = decode(encode(Image.new("RGBA", (2, 2), (200, 0, 0, 51)), "PNG"), "a", 224)
    # A fifth of the colour, four of white.
    assert np.asarray(result)[0, 0].tolist() == [244, 204, 204]


@BOTH
def test_sixteen_bit_grey_png_keeps_its_range(decode) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    result = decode(encode(Image.fromarray(levels * 257), "PNG"), "a", 224)
    np.testing.assert_array_equal(np.asarray(result)[..., 1], levels)


@BOTH
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
def test_exif_orientation_is_undone(decode, orientation: int, upright) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = noise(6, 4)
    result = decode(encode(image, "PNG", exif=exif), "a", 224)
    np.testing.assert_array_equal(np.asarray(result), upright(np.asarray(image)))


@BOTH
def test_jpeg_is_turned_upright_by_its_xmp(decode) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
    image = gradient(60, 40)
    result = decode(encode(image, "JPEG", xmp=xmp), "a", 224)
    lying = decode(encode(image, "JPEG"), "a", 224)
    assert worst_difference(result, np.rot90(np.asarray(lying), -1)) == 0


@BOTH
@pytest.mark.parametrize("kind", ["L", "RGB"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_is_turned_upright_without_a_loss(decode, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = photograph(600, 400).convert(kind)
    lying = decode(encode(image, "JPEG"), "a", 150)
    marked = decode(encode(image, "JPEG", exif=exif), "a", 150)
    stored = Image.fromarray(np.asarray(lying))
    stored.info["exif"] = exif.tobytes()
    assert worst_difference(marked, ImageOps.exif_transpose(stored)) == 0


@pytest.mark.parametrize(
    ("size", "pixels", "reduced"),
    [
        ((1024, 768), 273, (384, 288)),
        ((768, 1024), 273, (288, 384)),
        ((640, 480), 273, (320, 240)),
        ((500, 375), 273, (500, 375)),  # six eighths would do, but take longer than the whole
        ((4000, 300), 273, (1000, 75)),  # its crops, too, have the area of a square
        ((1600, 1600), 273, (400, 400)),
        ((1021, 763), 273, (383, 287)),  # rounded up
        ((20, 10), 273, (20, 10)),
    ],
)
def test_jpeg_for_a_crop_is_reduced_as_far_as_the_crop_allows(
    size: tuple[int, int], pixels: int, reduced: tuple[int, int]
) -> None:
    height, width, _ = decode_for_crop(encode(gradient(*size), "JPEG"), "a", pixels).shape
    assert (width, height) == reduced


def test_jpeg_for_a_crop_is_exact_where_it_is_not_reduced() -> None:
    encoded = encode(photograph(500, 375), "JPEG", quality=85)
    assert (
        worst_difference(decode_for_crop(encoded, "a", 273), Image.open(io.BytesIO(encoded))) == 0
    )


@pytest.mark.parametrize("size", [(1024, 768), (1020, 764), (640, 480)])
def test_reduced_jpeg_looks_like_the_whole_one_resized(size: tuple[int, int]) -> None:
    encoded = encode(photograph(*size), "JPEG", quality=85)
    draws = WholePicture(size[0] / size[1])
    fast, plain = (
        random_resized_crop(decode_for_crop(encoded, "a", pixels), 224, draws, 0.9)
        for pixels in (273, 10_000)
    )
    difference = np.abs(np.asarray(fast).astype(int) - np.asarray(plain))
    assert difference.max() <= 95  # measured 89, at an edge between saturated colours
    assert difference.mean() <= 1.3  # measured 1.2


def test_harmless_damage_is_taken_as_in_evaluation() -> None:
    encoded = encode(photograph(300, 200), "JPEG")
    padded = encoded[:-2] + bytes(50) + encoded[-2:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(padded)
    result = decode_for_crop(padded, "a", 224)
    assert worst_difference(result, decode_picture(padded, "a", 224)) == 0


@BOTH
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_that_claims_to_be_huge_is_refused_before_decoding(decode, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    encoded = encode(gradient(30, 20), "JPEG", exif=exif)
    claim = encoded.replace(struct.pack(">HH", 20, 30), struct.pack(">HH", 9_000, 9_000), 1)
    assert claim != encoded
    with pytest.raises(BadSampleError, match=r"sample-1.*limit"):
        decode(claim, "sample-1", 224)


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


@pytest.mark.parametrize("side", [7, 100, 224, 300, 1000])
def test_crop_is_resized_as_pillow_does(side: int) -> None:
    image = photograph(side, side)
    crop = random_resized_crop(np.asarray(image), 224, WholePicture(1), 0.9)
    wanted = image.resize((224, 224), Image.Resampling.BICUBIC)
    assert worst_difference(crop, wanted) <= 2  # measured 2, at a side of 7


def test_random_resized_crop_keeps_the_asked_area_and_aspect() -> None:
    image = np.asarray(gradient(400, 300))
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
    image = np.asarray(noise(60, 50))
    crops = [
        random_resized_crop(image, 32, np.random.default_rng(seed), 0.2).tobytes()
        for seed in (1, 1, 2)
    ]
    assert crops[0] == crops[1] != crops[2]


@pytest.mark.parametrize(
    ("size", "minimum_area"),
    [((600, 500), 1.0), ((60, 50), 1.0), ((71, 71), 1.0), ((1, 1000), 0.9), ((1000, 1), 0.9)],
)
def test_whole_picture_when_asked_or_when_no_crop_fits(
    size: tuple[int, int], minimum_area: float
) -> None:
    image = noise(*size)
    result = random_resized_crop(np.asarray(image), 224, np.random.default_rng(0), minimum_area)
    assert worst_difference(result, fit_square(image, 224)) <= 1  # measured 1


def test_tensor_is_channels_first_uint8() -> None:
    image = noise(5, 5)
    tensor = to_uint8_tensor(image)
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3, 5, 5)
    assert tensor.is_contiguous()
    assert tuple(tensor[:, 1, 3].tolist()) == image.getpixel((3, 1))
