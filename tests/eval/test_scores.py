import pytest

from megavlm.data.samples import Text
from megavlm.eval.caption import cider, exact_match
from megavlm.eval.run import Prediction, score
from megavlm.eval.vqa import majority_answers, normalise_answer, vqa_accuracy


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
    texts = [
        Text(prompt=prompt, answer=answer, task="vqa")
        for prompt, answer in [("p", "yes"), ("p", "no"), ("p", "yes"), ("q", "red")]
    ]
    assert majority_answers(texts) == {"p": "yes", "q": "red"}


def test_the_score_table():
    def prediction(task, kind, truth, answer, wrong):
        text = Text(prompt=kind, answer=truth, task=task, kind=kind)
        return Prediction(
            split="heldout", sample=0, text=text, answer=answer, answer_to_wrong_picture=wrong
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
    assert (exact.model, exact.wrong_picture, exact.majority) == (0.5, 0.5, None)
    colour = rows["VQA accuracy, colour"]
    assert (colour.items, colour.model, colour.wrong_picture, colour.majority) == (2, 1, 0.5, 0.5)
    overall = rows["VQA accuracy"]
    assert overall.model == pytest.approx(2 / 3)
    assert overall.wrong_picture == pytest.approx(1 / 3)
    assert overall.majority == pytest.approx(2 / 3)
