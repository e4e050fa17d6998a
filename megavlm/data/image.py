"""Encoded pictures to square uint8 tensors."""

import base64
import io
import math
import re
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import simplejpeg  # pyright: ignore[reportMissingTypeStubs]
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from megavlm.errors import BadSampleError

# Mean and standard deviation of the red, green and blue channels (CLIP, Radford et al. 2021).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

Pixels = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PICTURE_PIXELS = 64 * 10**6
"""Larger pictures are refused before they are decoded."""
MAX_JPEG_SCANS = 100
"""Programs write a dozen. Each scan is a pass over all of the picture, for a few bytes of file."""
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # of those with a segment
_SCAN, _END = b"\xda", b"\xd9"

THUMBNAIL_PIXELS = 160
"""The longer side of a small copy in a report."""

# Width over height of a random crop (Inception; Szegedy et al. 2015), and tries to place one.
CROP_ASPECTS = (3 / 4, 4 / 3)
CROP_TRIES = 10


def decode_picture(encoded: bytes, name: str, pixels: int) -> Image.Image:
    """Decode a PNG, JPEG or WebP file to RGB, upright, transparency on white.

    pixels: the side that the picture will be brought to; a larger JPEG is decoded at a reduced
    scale that still covers it. Raises BadSampleError, naming the sample, for anything unusable.
    """
    with _opened(encoded, name) as image:
        image.draft("RGB", (pixels, pixels))
        return to_rgb(ImageOps.exif_transpose(image))


def decode_for_crop(encoded: bytes, name: str, pixels: int) -> Pixels:
    """The same for a random crop, and faster: uint8 (height, width, 3).

    pixels: a JPEG is reduced to no less than the area of a square of this side.
    """
    head, scans = _head_and_scans(encoded)
    reduced = _reduced_jpeg(encoded, pixels) if 0 < scans <= MAX_JPEG_SCANS else None
    # What turns a picture is in its Exif or its XMP; most have neither, and need no second look.
    if reduced is not None and b"Exif" not in head and b"Orientation" not in head:
        return reduced
    with _opened(encoded, name) as image:
        if reduced is None:
            image.draft("RGB", _covering(image.width, image.height, pixels))
            return np.asarray(to_rgb(ImageOps.exif_transpose(image)))
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return reduced
        lying = Image.fromarray(reduced)
        lying.info = image.info
        return np.asarray(ImageOps.exif_transpose(lying))


def _reduced_jpeg(encoded: bytes, pixels: int) -> Pixels | None:
    """As libjpeg scales it while decoding; None if it is for Pillow to decode or to refuse."""
    try:
        *size, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        height, width = map(int, size)
        if height * width > MAX_PICTURE_PIXELS or colours not in ("YCbCr", "RGB", "Gray"):
            return None
        min_width, min_height = _covering(width, height, pixels)
        return simplejpeg.decode_jpeg(
            encoded,
            min_width=min_width,
            min_height=min_height,
            min_factor=2,  # scales between a half and 1 take longer than the whole
        )
    except ValueError:
        return None


def _head_and_scans(encoded: bytes) -> tuple[bytes, int]:
    """A JPEG's segments up to the first scan, which is nearly all of it, and how many scans it has.

    They are counted as far as `MAX_JPEG_SCANS` + 1; 0 for other files.
    """
    if not encoded.startswith(b"\xff\xd8"):
        return b"", 0
    head, scans, at, sequential_colours = encoded, 0, 2, b""
    while scans <= MAX_JPEG_SCANS and (marker := _JPEG_MARKER.search(encoded, at)):
        kind, at = marker[1], marker.end()
        if kind == _END:
            break
        if kind in (b"\xc0", b"\xc1"):
            sequential_colours = encoded[at + 7 : at + 8]
        elif kind == _SCAN:
            scans += 1
            if scans == 1:
                head = encoded[: marker.start()]
                if encoded[at + 2 : at + 3] == sequential_colours:
                    break  # all is in this one, and decoders take no other
        at += int.from_bytes(encoded[at : at + 2])
    return head, scans


def _covering(width: int, height: int, pixels: int) -> tuple[int, int]:
    """The size of the same aspect that has the area of a square of so many pixels a side."""
    scale = pixels / math.sqrt(width * height)
    return math.ceil(width * scale), math.ceil(height * scale)


@contextmanager
def _opened(encoded: bytes, name: str) -> Generator[Image.Image]:
    """A picture of which the header was read, within bounds; errors name the sample."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > MAX_PICTURE_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} is over the limit of {MAX_PICTURE_PIXELS} "
                    "pixels; shrink it"
                )
            if _head_and_scans(encoded)[1] > MAX_JPEG_SCANS:
                raise ValueError(f"it has over {MAX_JPEG_SCANS} scans; save it anew")
            yield image
    except UnidentifiedImageError as error:  # Pillow names an address in memory
        formats = "no PNG, JPEG or WebP file, or its beginning is broken"
        raise BadSampleError(f"picture of {name} cannot be used: it is {formats}") from error
    # Pillow's decoders raise whatever they stumble over in a broken file: struct.error, TypeError.
    except Exception as error:
        raise BadSampleError(f"picture of {name} cannot be used: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture in RGB: transparency on white, and of 16 bits the upper 8."""
    if image.mode == "I;16":  # convert() would clip 16-bit grey to its lowest 256 levels
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def thumbnail_url(encoded: bytes, name: str) -> str:
    """A small JPEG of a picture, as a URL that holds it; raises BadSampleError as above."""
    image = decode_picture(encoded, name, THUMBNAIL_PIXELS)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def fit_square(image: Image.Image, pixels: int) -> Image.Image:
    """Resize to fit a square, keeping the aspect, and pad with black at the right and the bottom.

    What Hugging Face Mllama's processor does with a picture of one tile, bit for bit.
    """
    size = _fitted_size(image.width, image.height, pixels)
    square = Image.new("RGB", (pixels, pixels))
    square.paste(image.resize(size, Image.Resampling.BILINEAR))
    return square


def read_square(encoded: bytes, name: str, pixels: int) -> Tensor:
    """A picture as a model is shown it outside training, uint8 (3, pixels, pixels).

    Raises BadSampleError, naming the sample, for one that cannot be used.
    """
    return to_uint8_tensor(fit_square(decode_picture(encoded, name, pixels), pixels))


def _fitted_size(width: int, height: int, pixels: int) -> tuple[int, int]:
    # In floats, as in Mllama's processor, so that both round alike: 71 x 71 becomes 223 x 224.
    if width > height:
        return pixels, max(1, math.floor(height * (pixels / width)))
    return max(1, math.floor(width * (pixels / height))), pixels


def random_resized_crop(
    picture: Pixels, pixels: int, generator: np.random.Generator, minimum_area: float
) -> Image.Image:
    """Crop a random part of random aspect, and resize it to a square: bicubic, antialiased.

    picture: uint8 (height, width, 3). minimum_area: smallest share of the picture to keep; 1 keeps
    all of it, fitted and padded as by `fit_square` within a level, which also serves pictures
    too narrow for any crop.
    """
    full_width, full_height = len(picture[0]), len(picture)
    narrowest, widest = map(math.log, CROP_ASPECTS)
    for _ in range(CROP_TRIES if minimum_area < 1 else 0):
        area = full_width * full_height * generator.uniform(minimum_area, 1)
        aspect = math.exp(generator.uniform(narrowest, widest))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= full_width and 0 < height <= full_height:
            left = int(generator.integers(full_width - width + 1))
            top = int(generator.integers(full_height - height + 1))
            crop = picture[top : top + height, left : left + width]
            return Image.fromarray(_resized(crop, pixels, pixels, "bicubic"))
    width, height = _fitted_size(full_width, full_height, pixels)
    square = np.zeros((pixels, pixels, 3), np.uint8)
    square[:height, :width] = _resized(picture, width, height, "bilinear")
    return Image.fromarray(square)


def _resized(picture: Pixels, width: int, height: int, mode: str) -> Pixels:
    """By torch: vectorised, antialiased as by Pillow; the same bits with AVX2 and without."""
    # Without gaps between rows, torch takes it as channels last.
    picture_1chw = torch.as_tensor(np.array(picture))[None].permute(0, 3, 1, 2)
    resized_1chw = interpolate(picture_1chw, (height, width), mode=mode, antialias=True)
    return resized_1chw[0].permute(1, 2, 0).numpy()


def to_uint8_tensor(image: Image.Image) -> Tensor:
    """RGB image to uint8 (3, height, width)."""
    return torch.as_tensor(np.asarray(image).transpose(2, 0, 1).copy())
