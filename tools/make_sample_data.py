"""Builds the sample data set: colour emoji drawn from a font, described by Unicode CLDR.

Nothing is downloaded: the pictures come from the Debian package fonts-noto-color-emoji, the English
and Japanese names and keywords from unicode-cldr-core. Every answer follows from a name, a code
point or a CLDR label, so none was guessed from the picture.

Three splits, each a folder of shards:
  train              what a model learns from
  heldout            combinations never seen in training, such as (running, dark skin tone), though
                     each part is seen there with other partners; describing them is zero-shot
  heldout_questions  pictures whose captions are in training, but not these questions about them
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megavlm.data.samples import Sample, Text, text
from megavlm.data.shards import write_shards
from megavlm.errors import DataError

SPLITS = ("train", "heldout", "heldout_questions")
FONT_SIZE = 109  # pixels; the only size that the bitmap font holds
SIDE = 136  # pixels; the font's glyphs are 136 x 128
SHARD_SAMPLES = 1_000
MAX_KEYWORDS = 3
MAX_YES = 150  # pictures that answer yes to one question, in one split; as many answer no

TONES = {
    "\U0001f3fb": "light",
    "\U0001f3fc": "medium-light",
    "\U0001f3fd": "medium",
    "\U0001f3fe": "medium-dark",
    "\U0001f3ff": "dark",
}

CATEGORIES = {
    "person": "person person-role person-gesture person-activity person-sport",
    "people": "family",
    "fantasy figure": "person-fantasy",
    "face": "face-positive face-neutral face-negative face-sick face-role",
    "body part": "body",
    "animal": "animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug",
    "plant": "plant-flower plant-other",
    "food": "food-fruit food-vegetable food-prepared food-asian food-sweet",
    "drink": "drink",
    "building": "place-building place-religious",
    "vehicle": "transport-ground transport-water transport-air",
    "clock": "time",
    "clothing": "clothing",
    "sport": "sport",
    "musical instrument": "musical-instrument",
    "sign": "warning transport-sign",
    "arrow": "arrow",
    "zodiac sign": "zodiac",
    "shape": "geometric",
    "keycap": "keycap",
    "flag": "flag country-flag subdivision-flag",
}
"""Answer to the category question, and the CLDR labels that have it; other labels are not asked."""

# Pictures for which their label's category is doubtful, by name.
NO_CATEGORY = {
    name.strip()
    for name in """
    speaking head/bust in silhouette/busts in silhouette/horse racing/racing car/motorcycle/
    mx claus/eye in speech bubble/footprints/red hair/curly hair/white hair/bald/selfie/pig nose/
    paw prints/spiral shell/spider web/microbe/white flower/rosette/takeout box/brick/kaaba/
    building construction/Statue of Liberty/shinto shrine/station/bus stop/motorway/railway track/
    oil drum/fuel pump/police car light/horizontal traffic light/vertical traffic light/stop sign/
    construction/anchor/seat/satellite/skateboard/hourglass done/hourglass not done/watch/
    stopwatch/timer clock/glasses/sunglasses/goggles/purse/handbag/clutch bag/shopping bags/
    backpack/crown/prayer beads/lipstick/ring/gem stone/flag in hole/bowl with spoon
    """.split("/")
}

HUMAN = {"person", "people", "face", "body part"}
LIVING = {"animal", "plant", "food", "drink"}
ASKED_CATEGORIES = {
    "a flag": ("flag", HUMAN | LIVING | {"vehicle", "building"}),
    "a person": ("person", LIVING | {"vehicle", "building", "clock", "flag"}),
    "a face": ("face", {"body part", "plant", "food", "drink", "vehicle", "building", "flag"}),
    "an animal": ("animal", HUMAN | {"vehicle", "building", "clock", "flag"}),
    "food": ("food", HUMAN | {"vehicle", "building", "clock", "flag"}),
    "a vehicle": ("vehicle", LIVING | {"face", "body part", "building", "clock", "flag"}),
    "a building": ("building", HUMAN | LIVING | {"vehicle", "flag"}),
    "a clock": ("clock", HUMAN | LIVING | {"vehicle", "flag"}),
}
"""`Is this ...?`: the category that answers yes, and those that surely answer no."""


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One picture to be, with all that is known about it."""

    characters: str
    """The sequence as CLDR writes it: without U+FE0F, since the font has colour glyphs only."""
    name_en: str
    """For example `woman: dark skin tone, red hair`."""
    name_ja: str
    keywords_en: tuple[str, ...]
    keywords_ja: tuple[str, ...]
    category: str | None

    @property
    def key(self) -> str:
        """For example `u1f3c3-1f3ff-200d-2640`."""
        return "u" + "-".join(f"{ord(character):x}" for character in self.characters)

    @property
    def tones(self) -> tuple[str, ...]:
        """Skin tones, one for each person drawn with one."""
        return tuple(TONES[c] for c in self.characters if c in TONES)

    @property
    def tone(self) -> str | None:
        """The skin tone, where there is exactly one."""
        return self.tones[0] if len(set(self.tones)) == 1 else None

    @property
    def base(self) -> str:
        """The name without its qualifiers: `woman`."""
        return self.name_en.partition(": ")[0]

    @property
    def concept(self) -> str:
        """The name without its skin tones: `woman: red hair`."""
        qualifiers = self.name_en.partition(": ")[2].split(", ")
        kept = ", ".join(q for q in qualifiers if not q.endswith("skin tone"))
        return f"{self.base}: {kept}" if kept else self.base

    @property
    def gender(self) -> str | None:
        """`man` or `woman`, where the name says so of one adult."""
        return self._gender_and_action[0]

    @property
    def action(self) -> str | None:
        """What a person of named gender does or is: `running`, `red hair`."""
        return self._gender_and_action[1]

    @property
    def _gender_and_action(self) -> tuple[str | None, str | None]:
        match = re.fullmatch(r"(man|woman)(?::? (?!and )(.+))?", self.concept)
        return (match[1], match[2]) if match else (None, None)


def draw_lot(purpose: str, name: str) -> float:
    """A number in [0, 1) that depends only on its arguments."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{name}".encode()).digest()[:6]) / 2**48


def by_lot(emojis: Iterable[Emoji], purpose: str) -> list[Emoji]:
    return sorted(emojis, key=lambda emoji: draw_lot(purpose, emoji.key))


# ------------------------------------------------------------------------------------- reading


def read_cldr(common: Path) -> list[Emoji]:
    """All sequences that CLDR names in both languages; raises DataError when a file is missing."""
    labels_path = common / "properties" / "labels.txt"
    folders = [common / "annotations", common / "annotationsDerived"]
    paths = [labels_path, *(f / f"{language}.xml" for f in folders for language in ("en", "ja"))]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is missing; install the Debian package unicode-cldr-core")
    names_en, keywords_en = _read_annotations([f / "en.xml" for f in folders])
    names_ja, keywords_ja = _read_annotations([f / "ja.xml" for f in folders])
    labels = _read_labels(labels_path)
    return [
        Emoji(
            characters=characters,
            name_en=name,
            name_ja=names_ja[characters],
            keywords_en=_split_keywords(keywords_en.get(characters, "")),
            keywords_ja=_split_keywords(keywords_ja.get(characters, "")),
            category=_category_of(characters, name, labels),
        )
        for characters, name in names_en.items()
        if characters in names_ja
    ]


def _read_annotations(paths: list[Path]) -> tuple[dict[str, str], dict[str, str]]:
    names: dict[str, str] = {}
    keywords: dict[str, str] = {}
    for path in paths:
        for annotation in ET.parse(path).iter("annotation"):
            texts = names if annotation.get("type") == "tts" else keywords
            texts[annotation.attrib["cp"]] = annotation.text or ""
    return names, keywords


def _split_keywords(joined: str) -> tuple[str, ...]:
    return tuple(joined.split(" | ")[:MAX_KEYWORDS]) if joined else ()


def _read_labels(path: Path) -> dict[str, str]:
    """CLDR label of each sequence; lines are `[a-c{sequence}d] ; Group ; label`."""
    labels: dict[str, str] = {}
    for line in path.read_text().replace("\ufe0f", "").splitlines():
        if not line.startswith("["):
            continue
        members, _, label = (field.strip() for field in line.split(";"))
        for sequence, first, last, one in re.findall(r"{(.+?)}|(.)-(.)|(.)", members[1:-1]):
            members_range = range(ord(first), ord(last) + 1) if first else ()
            for member in [chr(c) for c in members_range] or [sequence or one]:
                labels[member] = label
    return labels


def _category_of(characters: str, name: str, labels: dict[str, str]) -> str | None:
    """Category by the label of the sequence or, if it has none, of its first character."""
    untoned = "".join(c for c in characters if c not in TONES)
    if name.partition(":")[0] in NO_CATEGORY:
        return None
    if _people_drawn(characters) > 1 or re.match(r"(people|men|women) ", name):
        return "people"
    label = labels.get(untoned) or labels.get(untoned[:1])
    return next((c for c, of_labels in CATEGORIES.items() if label in of_labels.split()), None)


def _people_drawn(characters: str) -> int:
    """Number of people that a sequence lists: boy, girl, man, woman, person, child."""
    people = "\U0001f466\U0001f467\U0001f468\U0001f469\U0001f9d1\U0001f9d2"
    return sum(c in people for c in characters)


def spread(emojis: list[Emoji], limit: int) -> list[Emoji]:
    """About `limit` of them; keeps all skin tones and genders of a concept together."""
    families: dict[str, list[Emoji]] = defaultdict(list)
    for emoji in emojis:
        families[re.sub(r"^(man|woman|person):? ", "", emoji.concept)].append(emoji)
    chosen: list[Emoji] = []
    for name in sorted(families, key=lambda name: draw_lot("limit", name)):
        if len(chosen) + len(families[name]) <= limit:
            chosen += families[name]
    return chosen


# ------------------------------------------------------------------------------------- drawing


def load_font(path: Path) -> ImageFont.FreeTypeFont:
    """Raises DataError when the font, or the library that joins its sequences, is missing."""
    if not path.is_file():
        raise DataError(f"{path} is missing; install the Debian package fonts-noto-color-emoji")
    if not features.check("raqm"):
        raise DataError("Pillow finds no Raqm text layout; install the Debian package libfribidi0")
    return ImageFont.truetype(path, FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)


def draw(characters: str, font: ImageFont.FreeTypeFont) -> Image.Image | str:
    """The glyph in the middle of a white square, or the reason why there is none."""
    if font.getlength(characters) > SIDE:
        return "not one glyph in the font"
    glyph = Image.new("RGBA", (2 * SIDE, 2 * SIDE))
    canvas = ImageDraw.Draw(glyph)
    canvas.text((SIDE // 2, SIDE // 2), characters, font=font, embedded_color=True)
    box = glyph.getbbox()
    if box is None:  # the font's glyph for unknown characters is blank
        return "not in the font"
    glyph = glyph.crop(box)
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    picture.paste(glyph, ((SIDE - glyph.width) // 2, (SIDE - glyph.height) // 2), glyph)
    return picture


def draw_all(
    emojis: list[Emoji], font: ImageFont.FreeTypeFont, console: Console
) -> tuple[dict[Emoji, bytes], dict[str, list[str]]]:
    """PNG file of each emoji, and the names of those left out by reason.

    Of equal pictures only the one with the shortest name stays: Norway, not Bouvet Island, which
    flies Norway's flag. The others' names could not be told from the picture.
    """
    left_out: dict[str, list[str]] = defaultdict(list)
    drawn: dict[bytes, tuple[Emoji, bytes]] = {}  # by pixels
    for emoji in track(
        sorted(emojis, key=lambda emoji: len(emoji.name_en)), "drawing", console=console
    ):
        picture = draw(emoji.characters, font)
        if isinstance(picture, str):
            left_out[picture].append(emoji.name_en)
        elif picture.tobytes() in drawn:
            left_out["same picture as another"].append(emoji.name_en)
        else:
            file = io.BytesIO()
            picture.save(file, "PNG")
            drawn[picture.tobytes()] = (emoji, file.getvalue())
    return dict(drawn.values()), left_out


# ----------------------------------------------------------------------------------- splitting


def held_out_combinations(emojis: Iterable[Emoji]) -> set[str]:
    """Keys of the combinations to hold out.

    - A gender of an action: "woman cook" in all skin tones, for a tenth of the actions, and "man
      ..." for another tenth.
    - One or two of the five skin tones of a concept, for half of the concepts.
    - A fifth of the pairs of two different skin tones, for each concept of two people.
    """
    by_concept: dict[str, list[Emoji]] = defaultdict(list)
    for emoji in emojis:
        by_concept[emoji.concept].append(emoji)
    held_concepts = _held_out_genders(by_concept)
    held = {emoji.key for concept in held_concepts for emoji in by_concept[concept]}
    for concept in by_concept.keys() - held_concepts:
        toned = [emoji for emoji in by_concept[concept] if emoji.tone]
        if len(toned) == len(TONES) and draw_lot("concept", concept) < 0.5:
            count = 1 if draw_lot("one tone", concept) < 0.5 else 2
            held |= {emoji.key for emoji in by_lot(toned, "tone")[:count]}
        pairs = [emoji for emoji in by_concept[concept] if emoji.tones and not emoji.tone]
        held |= {emoji.key for emoji in by_lot(pairs, "pair")[: len(pairs) // 5]}
    return held


def _held_out_genders(by_concept: dict[str, list[Emoji]]) -> set[str]:
    concepts: dict[str, dict[str, str]] = defaultdict(dict)  # by action, then by gender
    for concept, (emoji, *_) in by_concept.items():
        # the dancers are no ZWJ sequences, but two unlike pictures
        if emoji.gender and emoji.action and "\u200d" in emoji.characters:
            concepts[emoji.action][emoji.gender] = concept
    shared = sorted(
        (action for action, genders in concepts.items() if len(genders) == 2),
        key=lambda action: draw_lot("action", action),
    )
    tenth = len(shared) // 10
    women = {concepts[action]["woman"] for action in shared[:tenth]}
    men = {concepts[action]["man"] for action in shared[tenth : 2 * tenth]}
    return women | men


def held_out_questions(emojis: Iterable[Emoji]) -> set[str]:
    """Keys of the pictures, 15 % of those without variants, whose questions are held out."""
    variants = Counter(emoji.action or emoji.concept for emoji in emojis)
    return {
        emoji.key
        for emoji in emojis
        if variants[emoji.action or emoji.concept] == 1 and draw_lot("question", emoji.key) < 0.15
    }


def check_split(train: list[Emoji], heldout: list[Emoji]) -> None:
    """Asserts that no held-out picture is in training, and that all its factors are."""
    assert not {emoji.key for emoji in train} & {emoji.key for emoji in heldout}
    concepts = {emoji.concept for emoji in train}
    genders = {emoji.gender for emoji in train}
    actions = {emoji.action for emoji in train}
    placed_tones = {placed for emoji in train for placed in enumerate(emoji.tones)}
    for emoji in heldout:
        assert placed_tones.issuperset(enumerate(emoji.tones)), emoji
        parts_known = emoji.action and emoji.action in actions and emoji.gender in genders
        assert emoji.concept in concepts or parts_known, emoji


# ------------------------------------------------------------------------------------- texts


def captions(emoji: Emoji) -> list[Text]:
    texts = [
        text("Caption:", emoji.name_en, task="caption", kind="en"),
        text("説明:", emoji.name_ja, task="caption", kind="ja"),
    ]
    for prompt, keywords, language in (
        ("Keywords:", emoji.keywords_en, "en"),
        ("キーワード:", emoji.keywords_ja, "ja"),
    ):
        if keywords:
            answer = ", ".join(keywords)
            texts.append(text(prompt, answer, task="keywords", kind=language))
    return texts


def questions(emojis: list[Emoji]) -> dict[str, list[Text]]:
    """Questions about each picture, by key; each yes/no question has as many yes as no."""
    texts = {emoji.key: _open_questions(emoji) for emoji in emojis}
    asked: dict[str, dict[str, list[Emoji]]] = defaultdict(lambda: {"yes": [], "no": []})
    for emoji in emojis:
        for question, answer in _yes_no_questions(emoji):
            asked[question][answer].append(emoji)
    for question, by_answer in asked.items():
        count = min(MAX_YES, *(len(answering) for answering in by_answer.values()))
        for answer, answering in by_answer.items():
            for emoji in by_lot(answering, question)[:count]:
                texts[emoji.key].append(_question(question, answer, "yes/no"))
    return texts


def _question(prompt: str, answer: str, kind: str) -> Text:
    return text(prompt, answer, task="vqa", kind=kind)


def _open_questions(emoji: Emoji) -> list[Text]:
    texts = []
    if emoji.category:
        texts.append(_question("What kind of picture is this?", emoji.category, "category"))
    if emoji.name_en.startswith("flag: "):
        owner = emoji.name_en.removeprefix("flag: ")
        texts.append(_question("Whose flag is this?", owner, "whose flag"))
    elif emoji.base != "keycap":
        texts.append(_question("What is this?", emoji.base, "name"))
    if emoji.tone:
        texts.append(_question("Which skin tone?", emoji.tone, "skin tone"))
    if emoji.gender:
        texts.append(_question("A man or a woman?", emoji.gender, "gender"))
    if re.search(r"o’clock$|-thirty$", emoji.name_en):  # noqa: RUF001 (CLDR's apostrophe)
        texts.append(_question("What time is it?", emoji.name_en, "time"))
    if emoji.name_en.startswith("family: "):
        number = ("two", "three", "four")[_people_drawn(emoji.characters) - 2]
        texts.append(_question("How many people?", number, "counting"))
    return texts


def _yes_no_questions(emoji: Emoji) -> Iterator[tuple[str, str]]:
    """All yes/no questions whose answer is sure, with the answer."""
    for subject, (category, others) in ASKED_CATEGORIES.items():
        if emoji.category == category or emoji.category in others:
            yield f"Is this {subject}?", "yes" if emoji.category == category else "no"
    for tone in TONES.values() if emoji.tone else ():
        yield f"Is the skin tone {tone}?", "yes" if emoji.tone == tone else "no"
    for gender in ("man", "woman") if emoji.gender else ():
        yield f"Is this a {gender}?", "yes" if emoji.gender == gender else "no"


def texts_of_splits(emojis: list[Emoji]) -> dict[str, dict[Emoji, list[Text]]]:
    """The texts of every picture of every split."""
    held = held_out_combinations(emojis)
    train = [emoji for emoji in emojis if emoji.key not in held]
    heldout = [emoji for emoji in emojis if emoji.key in held]
    check_split(train, heldout)
    unasked_keys = held_out_questions(emojis)
    unasked = [emoji for emoji in train if emoji.key in unasked_keys]
    trained = questions([emoji for emoji in train if emoji.key not in unasked_keys])
    of_heldout, of_unasked = questions(heldout), questions(unasked)
    return {
        "train": {emoji: captions(emoji) + trained.get(emoji.key, []) for emoji in train},
        "heldout": {emoji: captions(emoji) + of_heldout[emoji.key] for emoji in heldout},
        "heldout_questions": {e: of_unasked[e.key] for e in unasked if of_unasked[e.key]},
    }


# ------------------------------------------------------------------------------------- writing


def save_split(folder: Path, texts: dict[Emoji, list[Text]], pictures: dict[Emoji, bytes]) -> None:
    """Write the shards of one split, in an order that mixes all kinds of pictures."""
    folder.mkdir(parents=True)
    samples = [
        Sample(key=emoji.key, pictures=(pictures[emoji],), texts=tuple(texts[emoji]))
        for emoji in by_lot(texts, "shuffle")
    ]
    write_shards(folder, samples, SHARD_SAMPLES)


def build(out: Path, font_path: Path, cldr: Path, limit: int | None, console: Console) -> None:
    """Build the data set in `out`, in place of an earlier one; raises DataError."""
    font = load_font(font_path)
    emojis = read_cldr(cldr)
    if out.exists() and not (out / "summary.json").is_file():
        raise DataError(f"{out} exists and was not built by this tool; choose another --out")
    partial = out.with_name(f"{out.name}.partial")  # gets its name when it is complete
    shutil.rmtree(partial, ignore_errors=True)
    pictures, left_out = draw_all(spread(emojis, limit) if limit else emojis, font, console)
    splits = texts_of_splits(sorted(pictures, key=lambda emoji: emoji.key))
    for split, texts in splits.items():
        save_split(partial / split, texts, pictures)
    counts = {split: Counter(_kinds(texts)) for split, texts in splits.items()}
    summary = {
        "pictures": {split: len(texts) for split, texts in splits.items()},
        "texts": counts,
        "left_out": left_out,
    }
    content = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    (partial / "summary.json").write_text(content)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)

    table = Table("", *splits, title=str(out))
    table.add_row("pictures", *(f"{len(texts):,}" for texts in splits.values()))
    for kind in sorted(set().union(*counts.values())):
        table.add_row(kind, *(f"{counts[split][kind]:,}" for split in splits))
    console.print(table)
    for reason, names in left_out.items():
        console.print(f"left out, {reason}: {len(names):,}")


def _kinds(texts: dict[Emoji, list[Text]]) -> Iterable[str]:
    return (f"{text.task} {text.kind}" for of_emoji in texts.values() for text in of_emoji)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the sample data set of drawn emoji.")
    parser.add_argument("--out", type=Path, default=Path("data/emoji"))
    parser.add_argument(
        "--font", type=Path, default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    )
    parser.add_argument(
        "--cldr", type=Path, default=Path("/usr/share/unicode/cldr/common"), help="CLDR's `common`"
    )
    parser.add_argument("--limit", type=int, help="draw only about this many pictures")
    options = parser.parse_args(arguments)
    try:
        build(options.out, options.font, options.cldr, options.limit, Console())
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
