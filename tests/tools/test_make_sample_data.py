import importlib.util
import io
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from megavlm.data.shards import ShardFolder

ROOT = Path(__file__).parents[2]
CLDR = Path("/usr/share/unicode/cldr/common")
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
pytestmark = pytest.mark.skipif(
    not (CLDR.is_dir() and FONT.is_file()),
    reason="needs the Debian packages unicode-cldr-core and fonts-noto-color-emoji",
)


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "make_sample_data.py"
    spec = importlib.util.spec_from_file_location("make_sample_data", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emojis(tool):
    """All that CLDR names in two languages and the font has characters for, undrawn."""
    return [e for e in tool.read_cldr(CLDR) if not e.characters.isascii()]


@pytest.fixture(scope="module")
def splits(tool, emojis):
    return tool.texts_of_splits(emojis)


@pytest.fixture(scope="module")
def built(tool, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "emoji"
    assert tool.main(["--out", str(out), "--limit", "400"]) == 0
    return out


def texts_of(emoji, splits):
    return [text for texts in splits.values() for text in texts.get(emoji, [])]


def test_held_out_pictures_are_not_in_training_but_their_parts_are(tool, splits):
    train, heldout = list(splits["train"]), list(splits["heldout"])
    assert not set(train) & set(heldout)
    assert 0.06 < len(heldout) / (len(train) + len(heldout)) < 0.14
    concepts = {e.concept for e in train}
    gendered = {(e.gender, e.action) for e in train}
    for emoji in heldout:
        other = "man" if emoji.gender == "woman" else "woman"
        assert emoji.concept in concepts or (other, emoji.action) in gendered
    for position in (0, 1):
        tones = {e.tones[position] for e in train if len(e.tones) > position}
        assert tones == set(tool.TONES.values())


def test_a_held_out_gender_is_unseen_in_all_skin_tones(splits):
    trained = {e.concept for e in splits["train"]}
    unseen = {e.concept for e in splits["heldout"]} - trained
    genders = Counter(concept.split()[0].rstrip(":") for concept in unseen)
    assert genders["woman"] == genders["man"] >= 5


def test_a_split_with_an_unseen_part_is_refused(tool, emojis):
    running = [e for e in emojis if e.concept == "woman running"]
    with pytest.raises(AssertionError):
        tool.check_split(running[:1], running[1:])


def test_held_out_questions_are_about_pictures_whose_captions_are_in_training(splits):
    assert len(splits["heldout_questions"]) > 100
    for emoji, texts in splits["heldout_questions"].items():
        assert {text.task for text in texts} == {"vqa"}
        assert {text.task for text in splits["train"][emoji]} <= {"caption", "keywords"}


@pytest.mark.parametrize("split", ["train", "heldout", "heldout_questions"])
def test_each_yes_no_question_is_balanced(splits, split):
    answers = Counter(
        (text.prompt, text.answer)
        for texts in splits[split].values()
        for text in texts
        if text.kind == "yes/no"
    )
    assert answers
    for prompt in {prompt for prompt, _ in answers}:
        assert answers[prompt, "yes"] == answers[prompt, "no"]


def test_skin_tone_answers_agree_with_code_points_and_names(tool, emojis, splits):
    asked = 0
    for emoji in emojis:
        answers = [t.answer for t in texts_of(emoji, splits) if t.kind == "skin tone"]
        tones = {tool.TONES[c] for c in emoji.characters if c in tool.TONES}
        assert answers == (list(tones) if len(tones) == 1 else [])
        assert all(f"{tone} skin tone" in emoji.name_en for tone in tones)
        asked += len(answers)
    assert asked > 1_000


@pytest.mark.parametrize(
    ("key", "kind", "answers"),
    [
        ("u1f3c3-1f3ff-200d-2640", "name", ["woman running"]),
        ("u1f3c3-1f3ff-200d-2640", "gender", ["woman"]),
        ("u1f3c3-1f3ff", "gender", []),
        ("u1f46b", "gender", []),  # woman and man holding hands
        ("u1f45e", "gender", []),  # man's shoe
        ("u1f469-1f3fd-200d-1f9b0", "name", ["woman"]),
        ("u1f469-1f3fd-200d-1f9b0", "category", ["person"]),
        ("u1f9d1-1f3ff-200d-2764-200d-1f9d1-1f3fb", "category", ["people"]),
        ("u1f9d1-1f3ff-200d-2764-200d-1f9d1-1f3fb", "skin tone", []),
        ("u1f1ef-1f1f5", "whose flag", ["Japan"]),
        ("u1f1ef-1f1f5", "name", []),
        ("u1f552", "time", ["three o\N{RIGHT SINGLE QUOTATION MARK}clock"]),
        ("u1f468-200d-1f469-200d-1f467-200d-1f466", "counting", ["four"]),
        ("u1f415-200d-1f9ba", "category", ["animal"]),  # service dog: by its first character
        ("u26f3", "category", []),  # flag in hole
    ],
)
def test_answers(tool, emojis, splits, key, kind, answers):
    (emoji,) = [e for e in emojis if e.key == key]
    assert [t.answer for t in texts_of(emoji, splits) if t.kind == kind] == answers


def test_exceptions_to_the_categories_are_names_in_cldr(tool, emojis):
    assert tool.NO_CATEGORY <= {e.base for e in emojis}


def test_built_shards_read_back(built):
    summary = json.loads((built / "summary.json").read_text())
    keys, names_ja = {}, []
    for split in ("train", "heldout", "heldout_questions"):
        folder = ShardFolder(built / split)
        samples = [folder.read(number) for number in range(len(folder))]
        keys[split] = {sample.key for sample in samples}
        assert summary["pictures"][split] == len(keys[split]) == len(samples)
        for sample in samples:
            picture = Image.open(io.BytesIO(sample.pictures[0]))
            assert picture.size == (136, 136)
            assert picture.convert("L").getextrema()[0] < 250  # not blank
            if split != "heldout_questions":
                captions = {t.kind: t.answer for t in sample.texts if t.task == "caption"}
                assert set(captions) == {"en", "ja"}
                names_ja.append(captions["ja"])
    assert keys["train"].isdisjoint(keys["heldout"])
    assert keys["train"] >= keys["heldout_questions"]
    assert sum(not japanese.isascii() for japanese in names_ja) > 0.95 * len(names_ja)


def test_building_again_gives_the_same_bytes(tool, built, tmp_path):
    assert tool.main(["--out", str(tmp_path / "again"), "--limit", "400"]) == 0
    for path in built.rglob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(built)).read_bytes()


def test_glyphs_that_the_font_lacks_are_left_out(tool):
    font = tool.load_font(FONT)
    assert tool.draw("\N{N-ARY SUMMATION}", font) == "not in the font"
    assert tool.draw("\U0001f468\u200d\U0001f3c0", font) == "not one glyph in the font"


def test_equal_pictures_keep_the_shortest_name(tool, emojis):
    flags = [e for e in emojis if e.name_en in ("flag: Bouvet Island", "flag: Norway")]
    pictures, left_out = tool.draw_all(flags, tool.load_font(FONT), tool.Console(quiet=True))
    assert [e.name_en for e in pictures] == ["flag: Norway"]
    assert left_out == {"same picture as another": ["flag: Bouvet Island"]}


@pytest.mark.parametrize(
    ("option", "package"), [("--font", "fonts-noto-color-emoji"), ("--cldr", "unicode-cldr-core")]
)
def test_a_missing_package_is_named_in_one_line(tool, tmp_path, capsys, option, package):
    arguments = ["--out", str(tmp_path / "out"), option, str(tmp_path / "missing")]
    assert tool.main(arguments) == 2
    errors = capsys.readouterr().err
    assert package in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_text_layout_is_named(tool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool.features, "check", lambda feature: False)
    assert tool.main(["--out", str(tmp_path / "out")]) == 2
    assert "libfribidi0" in capsys.readouterr().err


def test_a_folder_of_someone_else_is_not_replaced(tool, tmp_path, capsys):
    (tmp_path / "train").mkdir()
    assert tool.main(["--out", str(tmp_path), "--limit", "5"]) == 2
    assert (tmp_path / "train").is_dir()
    assert "--out" in capsys.readouterr().err
