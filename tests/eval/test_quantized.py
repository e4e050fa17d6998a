"""A quantised model beside the same one as it is."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from megavlm.data.tokenizer import END, Tokenizer
from megavlm.errors import CheckpointError
from megavlm.eval import quantized
from megavlm.eval.answers import Asked, find_prompts
from megavlm.eval.quantized import evaluate_quantized, forced, forced_scores
from megavlm.eval.run import EVALUATION_FILE, read_evaluation, read_predictions
from megavlm.eval.samples import Split
from megavlm.infer.prompts import question
from tests.eval.test_benchmark_run import untrained_language
from tests.ranks import alone, run_on_ranks
from tests.runs import plan_of

pytest.importorskip("torchao", reason="the extra `quantization`")


@pytest.fixture
def plan(tiny_run, monkeypatch):
    """Stages whose models have their initial weights."""
    monkeypatch.setattr(quantized, "newest_of", lambda plan, _: (plan.stages[0], None))
    monkeypatch.setattr(quantized, "load_language", untrained_language)
    return plan_of(replace(tiny_run, objectives={"instruction": 1.0}))


def test_both_are_measured_and_nothing_is_overwritten(plan, capfd):
    folder = plan.first.run_folder
    folder.mkdir()
    (folder / EVALUATION_FILE).write_text(earlier := json.dumps({"instruction": {"step": 3}}))
    outcomes = []
    for ranks in (1, 2):
        run_on_ranks(ranks, lambda _: evaluate_quantized(plan, None, "int8"), groups=False)
        printed = capfd.readouterr().out
        assert "stage instruction, step 0, int8" in printed and "unquantised" in printed
        found = read_evaluation(folder / "int8")["instruction"]
        scores = {row["measure"]: row for row in found["scores"]}
        outcomes.append((scores, read_predictions(folder / "int8", "instruction")))
    assert (folder / EVALUATION_FILE).read_text() == earlier
    assert sorted(path.name for path in folder.iterdir()) == [EVALUATION_FILE, "int8"]

    (scores, predictions), (scores_of_two, predictions_of_two) = outcomes
    assert predictions == predictions_of_two and len(predictions) == 16
    assert {"VQA accuracy", "caption, en, CIDEr"} <= scores.keys() == scores_of_two.keys()
    assert all("unquantised" in r["baselines"] for m, r in scores.items() if m[:4] != "same")
    loss, same = scores["loss per answer token, nats"], scores["same likeliest token"]
    assert loss["items"] == same["items"] > 32
    assert loss["model"] == pytest.approx(scores_of_two[loss["measure"]]["model"])
    # Initial weights know nothing yet, and quantising them changes a little.
    assert loss["baselines"]["unquantised"] == pytest.approx(math.log(512), abs=0.5)
    assert 0 < abs(loss["model"] - loss["baselines"]["unquantised"]) < 0.01
    assert 0.5 < same["model"] <= 1


def test_losses_are_those_of_the_whole_model(plan):
    run = plan.first
    tokenizer = Tokenizer(run.data.tokenizer)
    with alone(), torch.no_grad():
        model = untrained_language(run, None)
        split = Split("heldout", [run.data.heldout], run, 3)
        asked = Asked(split, find_prompts(split, ["vqa"]))
        found = forced(model, tokenizer, asked)
        losses, likeliest = [], []
        for prompt in asked.prompts:
            start = question(tokenizer, prompt.text.prompt, pictures=1).tokens
            answer = [*tokenizer.encode(prompt.text.answer), END]
            states = model.encode_images(split.show(prompt.picture.sample).pictures[0][None])
            tokens = torch.tensor([[*start, *answer]])
            ranges = torch.tensor([[[0]], [[len(states)]]], dtype=torch.int32)
            logits = model.logits(tokens, ranges.expand(2, 1, tokens.shape[1]), states)[0]
            of_answer = logits[len(start) - 1 : -1]
            losses += functional.cross_entropy(
                of_answer, torch.tensor(answer), reduction="none"
            ).tolist()
            likeliest += of_answer.argmax(-1).tolist()
    assert len(asked.prompts) == 3
    assert found.losses == pytest.approx(losses, abs=1e-5)
    assert found.likeliest == likeliest
    [loss, same] = forced_scores("heldout", found, found)
    assert loss.model == pytest.approx(sum(losses) / len(losses)) and same.model == 1
    [_, none_same] = forced_scores(
        "heldout", found, found._replace(likeliest=[-1] * len(likeliest))
    )
    assert none_same.model == 0


def test_two_towers_are_refused(tiny_run, monkeypatch):
    plan = plan_of(replace(tiny_run, objectives={"contrastive": 1.0}))
    monkeypatch.setattr(quantized, "newest_of", lambda plan, _: (plan.stages[0], None))

    def on_rank(_):
        with pytest.raises(CheckpointError, match="trains no language model"):
            evaluate_quantized(plan, None, "int8")

    run_on_ranks(1, on_rank, groups=False)
