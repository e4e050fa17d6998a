import pytest

from megavlm.data.samples import Text, Turn, text
from megavlm.eval.answers import Picture, Prediction, score, wrong_pictures
from megavlm.eval.caption import cider, exact_match
from megavlm.eval.scores import Score, baselines_of, print_scores
from megavlm.eval.vqa import count_answers, majority_answers, normalise_answer, vqa_accuracy


def test_exact_match():
    assert exact_match(["a dog", " a cat ", "A dog"], ["a dog", "a cat", "a dog"]) == 2 / 3


def test_cider_ranks_captions():
    truths = ["a red flag", "a blue car", "two men running", "女性 の 国旗"]
    # A perfect caption scores 10, or 7.5 if it is too short to have 4-grams, as three of these.
    assert cider(truths, truths) == pytest.approx((3 * 7.5 + 10) / 4)
    near = cider(["a red flag", "a blue bus", "two men", "女性"], truths)
    far = cider(["x", "y", "z", "w"], truths)
    assert far == pytest.approx(0, abs=1e-6) and far < near < cider(truths, truths)


@pytest.mark.parametrize(
    ("matching", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_vqa_accuracy_by_agreement(matching, accuracy):
    # The published values of the leave-one-out mean over ten annotators.
    annotated = ["yes"] * matching + [f"other {n}" for n in range(10 - matching)]
    assert vqa_accuracy("Yes!", annotated) == pytest.approx(accuracy)


def test_answers_are_normalised():
    assert normalise_answer(" The  Cat, a DOG. ") == "cat dog"
    assert normalise_answer("Three people") == normalise_answer("3 people")


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
