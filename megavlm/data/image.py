"""Encoded pictures to square uint8 tensors."""

import io
import math

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from megavlm.errors import BadSampleError

# Mean and standard deviation of the red, green and blue channels (CLIP, Radford et al. 2021).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PICTURE_PIXELS = 64 * 10**6
"""Larger pictures are refused before they are decoded."""

# Width over height of a random crop (Inception; Szegedy et al. 2015), and tries to place one.
CROP_ASPECTS = (3 / 4, 4 / 3)
CROP_TRIES = 10


def decode_picture(encoded: bytes, name: str, pixels: int) -> Image.Image:
    """Decode a PNG, JPEG or WebP file to RGB, upright, transparency on white.

    pixels: the side that the picture will be brought to; a larger JPEG is decoded at a reduced
    scale that still covers it. Raises BadSampleError, naming the sample, for anything unusable.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > MAX_PICTURE_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} is over the limit of {MAX_PICTURE_PIXELS} "
                    "pixels; shrink it"
                )
            image.draft("RGB", (pixels, pixels))
            return _to_rgb(ImageOps.exif_transpose(image))
    # Pillow's decoders raise whatever they stumble over in a broken file: struct.error, TypeError.
    except Exception as error:
        raise BadSampleError(f"picture of {name} cannot be used: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":  # convert() would clip 16-bit grey to its lowest 256 levels
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def fit_square(image: Image.Image, pixels: int) -> Image.Image:
    """Resize to fit a square, keeping the aspect, and pad with black at the right and the bottom.

    What Hugging Face Mllama's processor does with a picture of one tile, bit for bit.
    """
    # In floats, as there, so that both round alike: 71 x 71 becomes 223 x 224.
    if image.width > image.height:
        width, height = pixels, max(1, math.floor(image.height * (pixels / image.width)))
    else:
        width, height = max(1, math.floor(image.width * (pixels / image.height))), pixels
    square = Image.new("RGB", (pixels, pixels))
    square.paste(image.resize((width, height), Image.Resampling.BILINEAR))
    return square


def random_resized_crop(
    image: Image.Image, pixels: int, generator: np.random.Generator, minimum_area: float
) -> Image.Image:
    """Crop a random part of random aspect, and resize it to a square.

    minimum_area: smallest share of the picture to keep; 1 keeps all of it, as `fit_square` does,
    which also serves pictures too narrow for any crop.
    """
    if minimum_area == 1:
        return fit_square(image, pixels)
    narrowest, widest = map(math.log, CROP_ASPECTS)
    for _ in range(CROP_TRIES):
        area = image.width * image.height * generator.uniform(minimum_area, 1)
        aspect = math.exp(generator.uniform(narrowest, widest))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(generator.integers(image.width - width + 1))
            top = int(generator.integers(image.height - height + 1))
            box = (left, top, left + width, top + height)
            return image.resize((pixels, pixels), Image.Resampling.BICUBIC, box)
    return fit_square(image, pixels)


def to_uint8_tensor(image: Image.Image) -> Tensor:
    """RGB image to uint8 (3, height, width)."""
    return torch.as_tensor(np.array(image)).permute(2, 0, 1).contiguous()
