import pytest

from megavlm.data.samples import Text, Turn, text
from megavlm.eval.answers import Picture, Prediction, score, wrong_pictures
from megavlm.eval.caption import caption_scores, cider, exact_match, has_ptb_tokenizer
from megavlm.eval.scores import Score, baselines_of, print_scores
from megavlm.eval.vqa import count_answers, majority_answers
from tests.eval.published import captions_of


def test_exact_match():
    assert exact_match(["a dog", " a cat ", "A dog"], ["a dog", "a cat", "a dog"]) == 2 / 3


def test_cider_ranks_captions():
    truths = ["a red flag", "a blue car", "two men running", "女性 の 国旗"]
    # A perfect caption scores 10, or 7.5 if it is too short to have 4-grams, as three of these.
    assert cider(truths, truths) == pytest.approx((3 * 7.5 + 10) / 4)
    near = cider(["a red flag", "a blue bus", "two men", "女性"], truths)
    far = cider(["x", "y", "z", "w"], truths)
    assert far == pytest.approx(0, abs=1e-6) and far < near < cider(truths, truths)


SAID = [
    "a red square",
    "There's a (green) thing.",
    "one blue area, flat",
    "",
    "A dog isn't here; it's a cat...",
    "it is\nyellow\u2028 ",
]
TRUTHS = [captions_of(n) for n in range(6)]


@pytest.mark.skipif(not has_ptb_tokenizer(), reason="needs Java")
def test_captions_score_as_in_the_coco_evaluation():
    found = caption_scores(SAID, TRUTHS, ptb=True)
    # What pycocoevalcap's PTBTokenizer, Cider and Bleu say, called as its `eval.py` calls them.
    assert found.measures == pytest.approx(
        {
            "CIDEr": 2.102059918032092,
            "BLEU-1": 0.7307692307411242,
            "BLEU-2": 0.589902829248507,
            "BLEU-3": 0.4773134364024331,
            "BLEU-4": 0.3153222186571677,
        },
        rel=1e-12,  # worst seen 0: the same code on the same words
    )
    each = [3.95257316, 1.22128882, 3.97241423, 0, 0, 3.46608329]
    assert found.cider_of_each == pytest.approx(each, abs=1e-8)


def test_captions_without_java_are_split_into_letters_and_digits():
    found = caption_scores(SAID, TRUTHS, ptb=False)
    # The tokenizer keeps brackets and splits `isn't` elsewhere; the rest is the same.
    assert found.cider_of_each[0] == pytest.approx(3.95, abs=0.2)
    assert found.cider_of_each[3:5] == [0, 0]
    perfect = caption_scores([t[0] for t in TRUTHS], [t[:1] for t in TRUTHS], ptb=False)
    assert perfect.measures["BLEU-3"] == pytest.approx(1) and perfect.measures["CIDEr"] > 7


def test_majority_answers():
    said = [("p", "yes"), ("p", "no"), ("q", "red"), ("p", "no"), ("p", "yes"), ("r", "1")]
    texts = [text(prompt, answer, task="vqa") for prompt, answer in said]
    chat = Text(turns=(Turn(prompt="a", answer="b"), Turn(prompt="r", answer="2")), task="chat")
    expected = {"p": "no", "q": "red", "r": "1", "a": "b"}  # of equals, the alphabet's first
    # The same however ranks have shared the texts.
    for parts in ([texts, [chat]], [[chat, *texts[::2]], texts[1::2]], [[*texts[::-1], chat]]):
        assert majority_answers(count_answers(part) for part in parts) == expected


def test_a_wrong_picture_is_of_another_sample():
    pictures = [Picture(sample, number) for sample in (3, 8, 20, 21) for number in (1, 0, 1)]
    wrong = wrong_pictures(pictures, seed=1)
    assert wrong.keys() == set(pictures)
    assert all(wrong[picture].sample != picture.sample for picture in pictures)
    assert set(wrong.values()) == {Picture(sample, 0) for sample in (3, 8, 20, 21)}
    assert wrong == wrong_pictures(pictures[::-1], seed=1)


def test_the_score_table():
    def prediction(task, kind, truth, answer, wrong):
        asked = text(kind, truth, task=task, kind=kind)
        return Prediction(
            split="heldout", sample=0, text=asked, answer=answer, answer_to_wrong_picture=wrong
        )

    predictions = [
        prediction("caption", "en", "a red flag", "a red flag", "a cat"),
        prediction("caption", "en", "a blue car", "a red car", "a blue car"),
        prediction("vqa", "colour", "red", "red", "blue"),
        prediction("vqa", "colour", "blue", "blue", "blue"),
        prediction("vqa", "yes/no", "yes", "no", "no"),
    ]
    rows = {row.measure: row for row in score(predictions, {"colour": "red", "yes/no": "yes"})}
    exact = rows["caption, en, exact match"]
    assert (exact.model, exact.baselines) == (0.5, {"wrong picture": 0.5})
    colour = rows["VQA accuracy, colour"]
    assert (colour.items, colour.model) == (2, 1)
    assert colour.baselines == {"wrong picture": 0.5, "majority answer": 0.5}
    overall = rows["VQA accuracy"]
    assert overall.model == pytest.approx(2 / 3)
    assert overall.baselines == pytest.approx({"wrong picture": 1 / 3, "majority answer": 2 / 3})


def test_texts_without_a_kind_have_no_empty_one():
    def measures(*kinds):
        said = [
            text("", "a", task=task, kind=kind) for task in ("caption", "vqa") for kind in kinds
        ]
        predictions = [
            Prediction(split="heldout", sample=0, text=t, answer="a", answer_to_wrong_picture="b")
            for t in said
        ]
        return [row.measure for row in score(predictions, {})]

    assert measures("") == ["caption, exact match", "caption, CIDEr", "VQA accuracy"]
    assert measures("", "en") == [
        *("caption, without kind, exact match", "caption, without kind, CIDEr"),
        *("caption, en, exact match", "caption, en, CIDEr"),
        *("VQA accuracy", "VQA accuracy, without kind", "VQA accuracy, en"),
    ]


def test_the_columns_are_the_union_of_the_baselines(capsys):
    def row(measure, **baselines):
        named = {name.replace("_", " "): value for name, value in baselines.items()}
        return Score(split="heldout", measure=measure, items=7, model=0.5, baselines=named)

    scores = [row("first", chance=0.125), row("second", wrong_picture=0.25, chance=0.375)]
    assert baselines_of(scores) == ["chance", "wrong picture"]
    print_scores("a title", scores)
    printed = capsys.readouterr().out
    lines = [line.split("│")[1:-1] for line in printed.splitlines() if "heldout" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["heldout", "first", "7", "0.500", "0.125", ""],
        ["heldout", "second", "7", "0.500", "0.375", "0.250"],
    ]
    assert "a title" in printed
