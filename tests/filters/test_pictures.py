import numpy as np
import pytest
from PIL import Image, ImageDraw

from megavlm.config.filters import FaceRules, PictureRules
from megavlm.filters.pictures import hash_picture, open_picture, shows_face
from tests.filters.planted import bomb, encoded, picture

ANY = PictureRules()


def opened(image: Image.Image, **options):
    result = open_picture(encoded(image, **options), ANY)
    assert not isinstance(result, str)
    return result


def distance(a: bytes, b: bytes) -> int:
    return int(np.bitwise_count(np.frombuffer(a, np.uint8) ^ np.frombuffer(b, np.uint8)).sum())


@pytest.mark.parametrize(
    ("content", "rules", "reason"),
    [
        (encoded(picture(0))[:3000], ANY, "picture_broken"),
        (encoded(picture(0), "PNG")[:3000], ANY, "picture_broken"),
        (encoded(picture(0), "GIF"), ANY, "picture_format"),
        (b"", ANY, "picture_format"),
        (bomb(), ANY, "picture_pixels"),
        (bomb(9_000), ANY, "picture_pixels"),
        (encoded(picture(0)), PictureRules(maximum_pixels=76_799), "picture_pixels"),
        (encoded(picture(0)), PictureRules(minimum_side=241), "picture_size"),
        (encoded(picture(0)), PictureRules(maximum_aspect=1.3), "picture_aspect"),
    ],
)
def test_pictures_that_go(content, rules, reason):
    assert open_picture(content, rules) == reason


def test_pictures_that_stay():
    rules = PictureRules(maximum_pixels=76_800, minimum_side=240, maximum_aspect=1.34)
    for kind in ("JPEG", "PNG", "WEBP"):
        found = open_picture(encoded(picture(0), kind), rules)
        assert not isinstance(found, str) and (found.width, found.height) == (320, 240)


def test_hashes_of_recompressed_and_other_pictures():
    originals = [picture(n, (640, 480)) for n in range(20)]
    hashes = [hash_picture(opened(image)) for image in originals]
    smaller = [
        hash_picture(opened(image.resize((480, 360)), quality=60, kind="WEBP"))
        for image in originals
    ]
    mirrored = [
        hash_picture(opened(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), mirrored=True)
        for image in originals
    ]
    same = [distance(a, b) for a, b in zip(hashes * 2, smaller + mirrored, strict=True)]
    others = [distance(a, b) for n, a in enumerate(hashes) for b in hashes[:n]]
    assert max(same) <= 16 and min(others) > 90  # measured: 8 and 106


def test_flat_pictures_are_the_same_only_if_their_files_are():
    red, blue = (Image.new("RGB", (99, 99), colour) for colour in ("red", "blue"))
    assert hash_picture(opened(red)) == hash_picture(opened(red))
    assert distance(hash_picture(opened(red)), hash_picture(opened(blue))) > 80


def test_faces():
    # What the cascade looks for: eyes darker than the cheeks, the bridge of the nose lighter.
    face = Image.new("L", (200, 240), 90)
    draw = ImageDraw.Draw(face)
    draw.ellipse((30, 20, 170, 225), fill=205)
    for x in (75, 125):
        draw.ellipse((x - 20, 88, x + 20, 108), fill=60)
        draw.rectangle((x - 22, 76, x + 22, 82), fill=80)
    draw.polygon([(100, 105), (88, 150), (112, 150)], fill=190)
    draw.ellipse((75, 172, 125, 188), fill=80)
    canvas = Image.new("RGB", (400, 400), (110, 110, 110))
    canvas.paste(face, (100, 80))
    assert shows_face(opened(canvas), FaceRules(neighbours=2))
    assert not shows_face(opened(picture(0)), FaceRules())
