"""A sample set with planted faults: what they are, and what goes by them."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megavlm.data.index_folder import index_folder
from megavlm.data.samples import Sample, text
from megavlm.data.shards import write_shards

RULES = """
pictures: {minimum_side: 64, maximum_aspect: 3}
captions:
  minimum_characters: 5
  maximum_characters: 200
  languages: [en]
  minimum_letters: 0.6
  maximum_repeated_words: 0.5
  maximum_repeated_characters: 6
  boilerplate: true
personal_data: {}
evaluation: {folders: [EVALUATION]}
duplicates: {picture_bits: 31, caption_similarity: 0.8}
"""

SUBJECTS = (
    "an old fisherman repairs his green net beside the harbour wall",
    "three children build a tall sandcastle on the empty beach",
    "a grey cat sleeps on a stack of folded blankets",
    "fresh bread cools on a wooden rack near the kitchen window",
    "the night train crosses a stone bridge over the river",
    "two cyclists rest under an oak tree after a long climb",
    "a market stall sells oranges, lemons and dried figs",
    "snow covers the roofs of the quiet mountain village",
    "a carpenter measures a plank with a yellow ruler",
    "the lighthouse stands on black rocks above the waves",
    "students read newspapers on the steps of the library",
    "a red tractor pulls a trailer of hay across the field",
    "an empty theatre with velvet seats and golden balconies",
    "a woman waters tomato plants on her small balcony",
    "horses gallop through shallow water at sunset",
    "a watchmaker looks through a magnifying glass at tiny gears",
)


def picture(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """A picture unlike that of any other seed: blobs of colour with some detail."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", quality: int = 90) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, quality=quality)
    return content.getvalue()


def pair(key: str, image: bytes, caption: str) -> Sample:
    texts = (text("", caption, task="caption"),)
    return Sample(key=key, pictures=(image,), texts=texts)


def bomb(side: int = 30_000) -> bytes:
    """A PNG of a few hundred bytes whose header promises 900 megapixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(10_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


def clean(number: int) -> Sample:
    subject = SUBJECTS[number % len(SUBJECTS)]
    return pair(f"clean-{number:04}", encoded(picture(number)), subject)


FAULTS: list[tuple[str, str, bytes, str]] = [
    # reason, key, picture, caption
    ("picture_broken", "truncated", encoded(picture(900))[:2500], "a ferry leaves the old port"),
    ("picture_format", "header-alone", b"\xff\xd8\xff\xe0", "a kite above the meadow"),
    ("picture_format", "text-as-picture", b"not found", "an umbrella in the rain"),
    ("picture_format", "gif", encoded(picture(901), "GIF"), "a dog jumps over a fence"),
    ("picture_pixels", "bomb", bomb(), "a very large map of the world"),
    ("picture_pixels", "small-bomb", bomb(9_000), "a large map of the country"),
    ("picture_size", "tiny", encoded(picture(902, (20, 20))), "a small stamp with a ship"),
    ("picture_aspect", "banner", encoded(picture(903, (900, 80))), "a long wall of graffiti"),
    ("duplicate_picture", "copy", encoded(picture(0)), "somebody is working at the sea"),
    (
        "duplicate_picture",
        "recompressed",
        encoded(picture(1).resize((240, 180)), quality=60),
        "kids play all day by the ocean",
    ),
    (
        "duplicate_caption",
        "same-words",
        encoded(picture(904)),
        "A grey cat sleeps on a stack of folded blankets!",
    ),
    ("personal_data", "email", encoded(picture(905)), "portrait, write to ann.lee@example.com"),
    (
        "personal_data",
        "phone",
        encoded(picture(906)),
        "a used bicycle is for sale, call +44 20 7946 0958 today or come along",
    ),
    ("personal_data", "ip", encoded(picture(907)), "the camera at 203.0.113.77 shows a street"),
    (
        "personal_data",
        "card",
        encoded(picture(908)),
        "the number 4111 1111 1111 1111 is on a credit card that lies on a table",
    ),
    (
        "caption_language",
        "german",
        encoded(picture(909)),
        "zwei Hunde spielen im Schnee vor dem alten Haus",
    ),
    (
        "caption_language",
        "french",
        encoded(picture(910)),
        "une voiture rouge garée dans la rue devant la boulangerie",
    ),
    ("caption_boilerplate", "file-name", encoded(picture(911)), "IMG_20190412_1532.JPG"),
    ("caption_boilerplate", "address", encoded(picture(912)), "see https://example.org/a?b=1"),
    ("caption_boilerplate", "empty-phrase", encoded(picture(913)), "Image of"),
    ("caption_boilerplate", "placeholder", encoded(picture(914)), "No image available"),
    ("caption_length", "short", encoded(picture(915)), "cat"),
    ("caption_length", "long", encoded(picture(916)), "a tree and a house " * 20),
    ("caption_letters", "numbers", encoded(picture(917)), "10.99 - 24/7 #1 (50%) a b"),
    ("caption_repetition", "repeated", encoded(picture(918)), "sale sale sale sale sale shoes"),
    ("caption_repetition", "shouting", encoded(picture(919)), "what a viewwwwwwwwww from here"),
    ("evaluation_picture", "leaked-picture", encoded(picture(950), quality=70), "a boat at dawn"),
    (
        "evaluation_picture",
        "leaked-mirror",
        encoded(picture(951).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        "a church by a pond",
    ),
    (
        "evaluation_text",
        "leaked-text",
        encoded(picture(920)),
        "photo: Seven lanterns hang from a rope across the narrow alley, 2019",
    ),
]


def make_folder(folder: Path, clean_samples: int = len(SUBJECTS)) -> dict[str, str]:
    """Shards `folder/pairs` and an evaluation set `folder/evaluation`; faults' reasons by key.

    The faults lie among clean samples, whose originals come before their copies. A last shard is
    as img2dataset writes them, with hostile members.
    """
    (folder / "pairs").mkdir(parents=True)
    (folder / "evaluation").mkdir()
    samples = [clean(n) for n in range(clean_samples)]
    faults = [pair(key, image, caption) for _, key, image, caption in FAULTS]
    mixed: list[Sample] = samples[:4]
    rest = samples[4:]
    for n, fault in enumerate(faults):
        mixed += [fault, *rest[n : n + 1]]
    mixed += rest[len(faults) :]
    write_shards(folder / "pairs", mixed, 8)
    reasons = {key: reason for reason, key, _, _ in FAULTS}
    reasons |= _write_hostile(folder / "pairs" / "zzz.tar")
    held = "seven lanterns hang from a rope across the narrow alley"
    evaluated = [pair(f"e{n}", encoded(picture(n)), held) for n in (950, 951, 952)]
    write_shards(folder / "evaluation", evaluated, 2)
    index_folder(str(folder / "pairs"), workers=1)
    return reasons


def _write_hostile(path: Path) -> dict[str, str]:
    """Members that would lie elsewhere if they were unpacked, links, devices, broken records."""
    caption, image = b"a quiet garden with a stone bench", encoded(picture(930))
    meta = json.dumps({"url": "https://example.org/1.jpg", "width": 320}).encode()
    downloaded = b"a wooden boat lies on the shore of a lake"
    members: Sequence[tuple[str, bytes]] = [
        ("000000001.jpg", encoded(picture(931))),
        ("000000001.txt", downloaded),
        ("000000001.json", meta),
        ("../../climbs.jpg", image),
        ("../../climbs.txt", caption),
        ("/etc/absolute.jpg", image),
        ("/etc/absolute.txt", caption),
        ("x/../../hidden.txt", caption),
        ("broken-record.jpg", image),
        ("broken-record.json", b'{"texts": ['),
        ("../../../tmp/passwd", b"root"),
        ("payload.pkl", b"cos\nsystem\n(S'true'\ntR."),
    ]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for kind, name in ((tarfile.SYMTYPE, "link.jpg"), (tarfile.CHRTYPE, "device.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    unsafe = dict.fromkeys(("climbs", "absolute", "hidden"), "unsafe_name")
    return {**unsafe, "": "unreadable"}
