"""Accuracy of answers. All that is expected here is what the published tools returned.

github.com/GT-Vision-Lab/VQA, vqaEval.py, for VQA; MMF's EvalAIAnswerProcessor for TextVQA.
"""

import pytest

from megavlm.eval.vqa import normalise_answer, textvqa_accuracy, vqa_accuracy


@pytest.mark.parametrize(
    ("matching", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_accuracy_by_agreement(matching, accuracy):
    # The published values of the leave-one-out mean over ten annotators.
    annotated = ["yes"] * matching + [f"other {n}" for n in range(10 - matching)]
    assert vqa_accuracy("yes", annotated) == pytest.approx(accuracy)
    assert textvqa_accuracy("yes", annotated) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        (" The  Cat, a DOG. ", "cat dog"),
        ("Three people", "3 people"),
        ("none of the above", "0 of above"),
        # A comma within a number takes all punctuation away without a space.
        ("it's 1,000.50!", "it's 1000.50"),
        ("1,000 (dogs)", "1000 dogs"),
        ("3.14", "3.14"),
        ("U.S.A.", "usa"),
        ("mr. smith's", "mr smith's"),
        ("yes/no", "yes no"),
        ("yes / no", "yes no"),
        ("well-known", "well known"),
        ("blue-green, red", "blue green red"),
        ("{x}@[y]_z", "x y z"),
        ('"red"', "red"),
        ("what? no!", "what no"),
        ("a\tb\nc", "b c"),
        # Contractions are looked up in lower case, so that those with a capital are not found.
        ("dont Im a", "don't im"),
        ("Couldn't've", "couldn't've"),
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        # 32 periods go.
        ("." * 35, "..."),
    ],
)
def test_answers_are_normalised(answer, normalised):
    assert normalise_answer(answer) == normalised


@pytest.mark.parametrize(
    ("answer", "annotated", "accuracy"),
    [
        ("yes", ["yes"] * 10, 1.0),
        # Nothing is normalised where all agree.
        ("Yes", ["yes"] * 10, 0.0),
        ("Yes", ["yes"] * 9 + ["no"], 1.0),
        ("two", ["2"] * 2 + ["3"] * 8, 0.6),
        ("2 dogs", ["two dogs"] * 3 + ["dogs"] * 7, 0.9),
        ("The dog.", ["dog"] * 3 + ["a dog"] + ["cat"] * 6, 1.0),
        ("dont know", ["don't know"] * 2 + ["dont know"] * 3 + ["unknown"] * 5, 1.0),
        ("1,000", ["1000"] * 5 + ["1,000"] * 5, 1.0),
        ("red", ["red"] + ["blue"] * 9, 0.3),
        ("", ["red"] * 4 + ["blue"] * 6, 0.0),
    ],
)
def test_accuracy_of_answers(answer, annotated, accuracy):
    assert vqa_accuracy(answer, annotated) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "annotated", "accuracy"),
    [
        ("Nokia", ["nokia"] * 10, 1.0),
        ("dakota's", ["dakota's"] * 6 + ["dakota"] * 4, 1.0),
        ("Coca, Cola?", ["coca cola"] * 3 + ["pepsi"] * 7, 0.9),
        ("the 7-up", ["7up"] * 5 + ["7 up"] * 5, 1.0),
        ("10:30", ["10:30"] * 2 + ["ten thirty"] * 8, 0.6),
    ],
)
def test_accuracy_of_answers_in_textvqa(answer, annotated, accuracy):
    assert textvqa_accuracy(answer, annotated) == pytest.approx(accuracy)
