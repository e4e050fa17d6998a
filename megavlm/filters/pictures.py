"""Whether pictures can be used, what they look like, whether they show faces."""

import hashlib
import io
import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from megavlm.config.filters import FaceRules, PictureRules
from megavlm.data.image import FORMATS, decode_picture
from megavlm.errors import BadSampleError

DECODED_PIXELS = 512
"""Longer side of the pictures that rules look at."""
HASHED_PIXELS = 256
SEARCHED_PIXELS = 256
"""For faces, which are a tenth of that: what the cascade has learned is 24 pixels wide."""
HASH_BYTES = 32
LOWEST_QUALITY = 50
"""Of 100: PDQ's hash of a flatter picture says nothing (its authors' advice)."""


@dataclass(frozen=True)
class Picture:
    """A picture that can be used."""

    encoded: bytes
    width: int
    height: int
    image: Image.Image
    """RGB, upright, at most 512 pixels on its longer side."""


def open_picture(encoded: bytes, rules: PictureRules) -> Picture | str:
    """Decode a picture, or say why it goes; what its header says comes first."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # judged below
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as header:
                width, height = header.size
    except Image.DecompressionBombError:
        return "picture_pixels"
    except UnidentifiedImageError:
        return "picture_format"
    except Exception:  # decoders raise whatever they stumble over
        return "picture_broken"
    if width * height > rules.maximum_pixels:
        return "picture_pixels"
    shorter, longer = sorted((width, height))
    if shorter < rules.minimum_side:
        return "picture_size"
    if longer / shorter > (rules.maximum_aspect or math.inf):
        return "picture_aspect"
    try:
        image = decode_picture(encoded, "", DECODED_PIXELS)
    except BadSampleError:
        return "picture_broken"
    image.thumbnail((DECODED_PIXELS, DECODED_PIXELS))
    return Picture(encoded, width, height, image)


def hash_picture(picture: Picture, mirrored: bool = False) -> bytes:
    """256 bits, of which pictures that look alike share most; by PDQ (Facebook, 2019).

    Of a picture too flat for that, the BLAKE2 hash of its file, which only copies share.
    """
    import pdqhash

    square = picture.image.resize((HASHED_PIXELS, HASHED_PIXELS), Image.Resampling.BILINEAR)
    if mirrored:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    bits, quality = pdqhash.compute(np.asarray(square))
    if quality < LOWEST_QUALITY:
        return hashlib.blake2b(picture.encoded, digest_size=HASH_BYTES).digest()
    return np.packbits(bits.astype(np.uint8)).tobytes()


def shows_face(picture: Picture, rules: FaceRules) -> bool:
    """Whether OpenCV's cascade (Viola and Jones 2001) finds a face, seen from the front."""
    image = picture.image.convert("L")
    image.thumbnail((SEARCHED_PIXELS, SEARCHED_PIXELS))
    grey = np.asarray(image)
    side = max(24, int(rules.minimum_share * min(grey.shape)))  # 24: the cascade's own window
    found = _face_cascade().detectMultiScale(
        grey, minNeighbors=rules.neighbours, minSize=(side, side)
    )
    return len(found) > 0


@cache
def _face_cascade() -> Any:
    import cv2

    cv2.setNumThreads(1)
    folder: str = cv2.data.haarcascades  # pyright: ignore[reportAttributeAccessIssue]
    return cv2.CascadeClassifier(f"{folder}haarcascade_frontalface_default.xml")
