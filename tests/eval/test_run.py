"""Evaluation after each stage of a run, and the report of it."""

import json
import re
import shutil
from dataclasses import replace

import pytest

import megavlm.eval.run
from megavlm.config.evaluation import EvaluationSettings
from megavlm.dist import groups
from megavlm.errors import ConfigError
from megavlm.eval.run import EVALUATION_FILE, evaluate, evaluate_stage
from megavlm.train.loop import train
from tests.ranks import run_on_ranks
from tests.runs import plan_of

PRETRAINING = {"mim": 1.0, "contrastive": 1.0}


@pytest.fixture
def curriculum(tiny_run):
    """Three stages of two steps."""
    run = replace(
        tiny_run,
        engine="fsdp2",
        train=replace(tiny_run.train, steps=2, ema_decay=0.5),
        evaluation=EvaluationSettings(probe_kind="colour"),
    )
    return plan_of(
        replace(run, objectives=PRETRAINING),
        replace(run, objectives={"captioning": 1.0}),
        replace(run, objectives={"instruction": 1.0}),
    )


def evaluated(plan):
    """All that evaluation has written, as plain data."""
    folder = plan.first.run_folder
    predictions = {
        stage.name: [
            json.loads(line)
            for line in (folder / f"predictions-{stage.name}.jsonl").read_text().splitlines()
        ]
        for stage in plan.stages
    }
    return json.loads((folder / EVALUATION_FILE).read_text()), predictions


def figures(evaluation):
    """Every figure of the tables, by stage, measure and column."""
    return {
        (stage, row["split"], row["measure"], column): value
        for stage, found in evaluation.items()
        for row in found["scores"]
        for column, value in {"model": row["model"], **row["baselines"]}.items()
    }


@pytest.mark.slow
def test_every_stage_is_evaluated_once_by_any_number_of_ranks(monkeypatch, curriculum, capfd):
    run_on_ranks(2, lambda _: train(curriculum, evaluate_stage), groups=False)
    evaluation, predictions = evaluated(curriculum)
    assert {name: found["step"] for name, found in evaluation.items()} == {
        "mim_contrastive": 2,
        "captioning": 4,
        "instruction": 6,
    }
    measures = {
        name: {row["measure"] for row in found["scores"]} for name, found in evaluation.items()
    }
    recalls = {f"{d}, recall@{k}" for d in ("text to picture", "picture to text") for k in (1, 5)}
    assert measures["mim_contrastive"] == {*recalls, "linear probe, colour"}
    captions = {"caption, en, exact match", "caption, en, CIDEr"}
    assert measures["captioning"] == captions
    assert measures["instruction"] == {*captions, "VQA accuracy", "VQA accuracy, colour"}
    items = {row["items"] for found in evaluation.values() for row in found["scores"]}
    assert items == {8}
    printed = capfd.readouterr().out
    assert re.findall(r"stage (\w+), step (\d)", printed) == [
        ("mim_contrastive", "2"),
        ("captioning", "4"),
        ("instruction", "6"),
    ]
    # Eight pictures of seven captions: with chance, samples 0 and 8 are each other's answer.
    chance = figures(evaluation)[
        "mim_contrastive", "heldout", "text to picture, recall@1", "chance"
    ]
    assert chance == pytest.approx((6 / 8 + 2 * 2 / 8) / 8)
    found = predictions["mim_contrastive"]
    assert [row["sample"] for row in found] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert all(len(set(row["best_samples"])) == 5 for row in found)

    # On the next start nothing is left to do; then one rank does all of it anew.
    def again(_):
        with groups.world_group():
            for stage in curriculum.stages:
                evaluate_stage(curriculum, stage)

    with monkeypatch.context() as patch:
        patch.setattr(megavlm.eval.run, "_evaluate", lambda *_, **__: pytest.fail("done already"))
        run_on_ranks(2, again, groups=False)
    (curriculum.first.run_folder / EVALUATION_FILE).unlink()
    run_on_ranks(1, again, groups=False)
    evaluation_alone, predictions_alone = evaluated(curriculum)
    assert figures(evaluation_alone) == pytest.approx(figures(evaluation), abs=1e-9)
    for name in ("captioning", "instruction"):
        assert predictions_alone[name] == predictions[name]
    for row, row_alone in zip(found, predictions_alone["mim_contrastive"], strict=True):
        # Samples 0 and 8 have the same picture: which of them comes first is left to rounding.
        assert [n % 8 for n in row["best_samples"]] == [n % 8 for n in row_alone["best_samples"]]


@pytest.mark.slow
def test_the_newest_checkpoint_is_evaluated_within_a_stage(curriculum):
    longer = curriculum.stages[0].run
    plan = plan_of(
        replace(longer, objectives={"captioning": 1.0}, train=replace(longer.train, steps=3))
    )
    run_on_ranks(1, lambda _: train(plan), groups=False)
    shutil.rmtree(plan.first.run_folder / "checkpoints" / "step-00000003")
    run_on_ranks(1, lambda _: evaluate(plan), groups=False)
    [found] = evaluated(plan)[0].values()
    assert found["step"] == 2 and found["scores"]
    # The end of the stage is another step, and measured when it is reached.
    run_on_ranks(1, lambda _: train(plan, evaluate_stage), groups=False)
    [found] = evaluated(plan)[0].values()
    assert found["step"] == 3


@pytest.mark.parametrize(
    ("objectives", "chosen", "measured"),
    [
        (PRETRAINING, None, ("probe", "retrieval")),
        ({"mim": 1.0}, None, ("probe",)),
        ({"mim": 1.0}, ("retrieval", "probe"), ("probe",)),
        ({"captioning": 1.0}, None, ("captions",)),
        ({"captioning": 1.0}, ("vqa", "probe"), ("vqa",)),
        ({"instruction": 1.0}, ("retrieval",), ()),
    ],
)
def test_a_stage_is_measured_by_what_its_model_can_do(tiny_run, objectives, chosen, measured):
    settings = EvaluationSettings(measures=chosen, probe_kind="colour")
    [stage] = plan_of(replace(tiny_run, objectives=objectives, evaluation=settings)).stages
    assert tuple(sorted(stage.run.measures)) == measured


def test_a_probe_needs_classes():
    with pytest.raises(ConfigError, match=r"set evaluation\.probe_kind"):
        EvaluationSettings(measures=("probe",))
