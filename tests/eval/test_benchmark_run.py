"""Benchmarks on a tiny model: any number of ranks, interruptions, examples, mistakes."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from megavlm.__main__ import main
from megavlm.checkpoint.storage import write_state
from megavlm.commands.options import named_folder
from megavlm.config.engines import UNDIVIDED
from megavlm.config.evaluation import EvaluationSettings
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.errors import ConfigError, DataError
from megavlm.eval import benchmark_answers, benchmark_run, shards
from megavlm.eval.benchmark_answers import Writes
from megavlm.eval.benchmark_run import Wanted, evaluate_benchmarks
from megavlm.eval.benchmarks import read_benchmark
from megavlm.eval.shards import read_lines
from megavlm.files.folder import Folder
from megavlm.infer.load import untrained_pretraining
from megavlm.infer.quantize import quantize
from megavlm.model.initial import materialise
from megavlm.stages.start import objective_of
from tests.eval import published
from tests.ranks import run_on_ranks
from tests.runs import plan_of


def untrained_language(run, checkpoint, parallel=UNDIVIDED, quantization=None):
    with torch.device("meta"):
        model = objective_of(run).build(dtype=torch.float32, recompute="none", parallel=parallel)
    materialise(model, run.seed, groups.device())
    if quantization is not None:
        quantize(model, quantization)
    return model.eval()


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """Models with their initial weights, of the stage that is asked for; small pieces."""

    def newest_of(plan, name):
        return next(s for s in plan.stages if name in (None, s.name)), None

    monkeypatch.setattr(benchmark_run, "newest_of", newest_of)
    monkeypatch.setattr(benchmark_run, "load_language", untrained_language)
    monkeypatch.setattr(
        benchmark_run, "load_pretraining", lambda run, _: untrained_pretraining(run)
    )
    monkeypatch.setattr(shards, "SHARD_ITEMS", 4)
    monkeypatch.setattr(benchmark_answers, "MAX_ANSWER_TOKENS", 5)
    monkeypatch.setattr(benchmark_answers, "has_ptb_tokenizer", lambda: False)


@pytest.fixture
def plan(tiny_run):
    return plan_of(
        replace(tiny_run, objectives={"instruction": 1.0}),
        replace(tiny_run, objectives={"contrastive": 1.0}),
        replace(tiny_run, objectives={"mim": 1.0}),
    )


def evaluate(plan, ranks=1, **wanted):
    """Run it, and return the results and predictions of every benchmark that it names."""
    run_on_ranks(ranks, lambda _: evaluate_benchmarks(plan, Wanted(**wanted)), groups=False)
    return found(plan, **wanted)


def found(plan, folders, stage="instruction", shots=0, quantization=None, limit=None, **_):
    root = plan.first.run_folder / "benchmarks" / stage / "step-00000000"
    ending = f"-{shots}-shot" if shots else ""
    ending += f"-{quantization}" if quantization else ""
    ending += f"-limit-{limit}" if limit else ""
    places = [root / f"{name}{ending}" for name in folders]
    assert not [part for place in places for part in place.glob("part-*")]
    return [
        (json.loads((place / "results.json").read_text()), read_lines(place / "predictions.jsonl"))
        for place in places
    ]


def measures(results):
    return {row["measure"]: row["model"] for row in results["scores"]}


def test_answers_are_the_same_on_any_number_of_ranks_and_after_a_kill(
    plan, tmp_path, monkeypatch, capfd
):
    published.write_vqa(tmp_path / "vqa", 14)
    published.write_vqa(tmp_path / "vqa", 8, subset="train2014")
    wanted = {"folders": {"vqav2": tmp_path / "vqa"}, "shots": 2}
    [(results, predictions)] = evaluate(plan, **wanted)
    assert results["items"] == 14 and results["shots"] == 2 and results["left_out"] == []
    assert [row["key"] for row in predictions] == [
        str(10 * (42 + n // 2) + n % 2) for n in range(14)
    ]
    assert any(row["answer"] for row in predictions)
    assert set(measures(results)) == {
        *("VQA accuracy", "VQA accuracy, number", "VQA accuracy, other", "VQA accuracy, yes/no")
    }
    items = {row["measure"]: row["items"] for row in results["scores"]}
    assert items["VQA accuracy"] == 14 and items["VQA accuracy, yes/no"] == 5
    printed = capfd.readouterr().out
    assert "vqav2, stage instruction, step 0, 2 shots" in printed and "VQA accuracy" in printed

    # On two ranks, which are killed when the first has done one of its two pieces.
    generate = benchmark_answers.generate
    calls = []

    def killed(*arguments, **options):
        calls.append(len(arguments[2]))
        if len(calls) == 2 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark_answers, "generate", killed)
        with pytest.raises(AssertionError, match="rank 0 ended with status 9"):
            evaluate(plan, 2, **wanted)
    folder = plan.first.run_folder / "benchmarks" / "instruction" / "step-00000000" / "vqav2-2-shot"
    [part] = folder.glob("part-*-00000.jsonl")
    [first] = read_lines(part)
    assert first["piece"] == 0 and len(first["rows"]) == 4
    assert evaluate(plan, 3, **wanted) == [(results, predictions)]
    assert "of 4 pieces of 4 are done already" in capfd.readouterr().err


def test_quantized_results_lie_apart(plan, tmp_path, capfd):
    pytest.importorskip("torchao", reason="the extra `quantization`")
    published.write_vqa(tmp_path / "vqa", 4)
    wanted = {"folders": {"vqav2": tmp_path / "vqa"}}
    plain = evaluate(plan, **wanted)
    [(results, _)] = evaluate(plan, quantization="int8", **wanted)
    assert results["quantization"] == "int8" and plain[0][0]["quantization"] is None
    assert found(plan, **wanted) == plain
    assert "vqav2, stage instruction, step 0, int8" in capfd.readouterr().out
    with pytest.raises(AssertionError, match=r"stage contrastive of .* trains no language model"):
        published.write_coco(tmp_path / "coco", 3)
        coco = {"coco_captions": tmp_path / "coco"}
        evaluate(plan, folders=coco, stage="contrastive", quantization="int8")


def test_captions_and_their_sheet(plan, tmp_path):
    published.write_coco(tmp_path, 6)
    name = "000000001002.jpg"
    (tmp_path / "val2017" / name).write_bytes(b"broken")
    folders = {"coco_captions": tmp_path}
    with pytest.raises(
        AssertionError, match=r"1 item of 5 cannot be read: 1002: picture of .*skip-bad"
    ):
        evaluate(plan, folders=folders, limit=5)
    [(results, predictions)] = evaluate(plan, folders=folders, limit=5, skip_bad=True)
    assert results["items"] == 4 and len(predictions) == 4
    assert len(results["left_out"]) == 1 and name in results["left_out"][0]
    names = [*("CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")]
    expected = {*(f"caption, {name}, own words" for name in names), "caption, exact match"}
    assert set(measures(results)) == expected

    stage_folder = plan.first.run_folder / "benchmarks" / "instruction"
    folder = stage_folder / "step-00000000" / "coco_captions-limit-5"
    captions = json.loads((folder / "submission.json").read_text())
    assert [entry["image_id"] for entry in captions] == [1000, 1001, 1003, 1004]
    assert [entry["caption"] for entry in captions] == [row["answer"] for row in predictions]
    page = (folder / "sheet.html").read_text()
    assert page.count("<img ") == page.count('<img src="data:image/jpeg;base64,') == 4
    assert "Wrong: 4" in page and "There&#39;s a red thing" in page


def test_two_towers_classify_and_retrieve(plan, tmp_path):
    published.write_imagenet(tmp_path / "imagenet", 6, 1)
    published.write_karpathy(tmp_path / "flickr", "flickr30k", 18)
    folders = {"imagenet": tmp_path / "imagenet", "flickr30k": tmp_path / "flickr"}
    wanted = {"folders": folders, "stage": "contrastive"}
    classified, retrieved = evaluate(plan, **wanted)
    assert evaluate(plan, 2, **wanted) == [classified, retrieved]
    results, predictions = classified
    assert results["items"] == 1 + 2 + 3 + 4 + 5 + 6
    right = [row["answer"] == row["truths"][0] for row in predictions]
    assert [row["right"] for row in predictions] == right
    assert measures(results)["zero-shot, accuracy@1"] == sum(right) / 21
    fifth = [row["truths"][0] in row["best"] for row in predictions]
    assert measures(results)["zero-shot, accuracy@5"] == sum(fifth) / 21
    assert all(len(set(row["best"])) == 5 for row in predictions)
    results, predictions = retrieved
    assert results["items"] == 6
    assert [(row["measure"], row["items"]) for row in results["scores"]] == [
        *((f"text to picture, recall@{k}", 30) for k in (1, 5, 10)),
        *((f"picture to text, recall@{k}", 6) for k in (1, 5, 10)),
    ]
    found_own = [[row["key"] in by[:5] for by in row["found_by_captions"]] for row in predictions]
    share = sum(map(sum, found_own)) / 30
    assert measures(results)["text to picture, recall@5"] == pytest.approx(share)


def writes_of(run, folder, shots):
    benchmark = read_benchmark("vqav2", folder)
    examples = read_benchmark("vqav2", folder, "examples").items
    return Writes(benchmark, examples, shots, run, None, Tokenizer(run.data.tokenizer), 8)


def drawn_of(writes, items):
    return [[item for item, _ in writes.examples_of(number)[0]] for number in range(items)]


def test_an_example_that_cannot_be_read_is_drawn_again(plan, tmp_path):
    published.write_vqa(tmp_path, 6)
    published.write_vqa(tmp_path, 16, subset="train2014")
    writes = writes_of(plan.first, tmp_path, 3)
    before = drawn_of(writes, 6)
    broken = before[2][1].picture
    broken.write_bytes(b"broken")
    after = drawn_of(writes, 6)
    assert after == drawn_of(writes, 6)
    bad = [told for number in range(6) for told in writes.examples_of(number)[1]]
    assert len(bad) == sum(broken in [e.picture for e in some] for some in before)
    assert bad and all(f"picture of {broken} cannot be used" in told for told in bad)
    for old, new in zip(before, after, strict=True):
        kept = [example for example in old if example.picture != broken]
        assert new[: len(kept)] == kept and len({e.picture for e in new} - {broken}) == 3

    [(results, predictions)] = evaluate(plan, folders={"vqav2": tmp_path}, shots=3)
    assert results["items"] == len(predictions) == 6 and results["left_out"] == []
    assert results["bad_examples"] == [bad[0]]

    for picture in sorted((tmp_path / "train2014").iterdir())[:5]:
        picture.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"5 of the pictures drawn as examples cannot be read"):
        drawn_of(writes, 6)


def test_rows_are_of_what_is_loaded(plan, tmp_path):
    published.write_karpathy(tmp_path / "f", "flickr30k", 18)
    benchmark = read_benchmark("flickr30k", tmp_path / "f")
    stage = plan.stages[1]

    def settings(**changed):
        run = replace(stage.run, **changed)
        evaluation = benchmark_run._Evaluation(
            stage._replace(run=run), None, benchmark, Wanted(folders={})
        )
        return evaluation._settings(())

    def start_from(name):
        return replace(stage.run.checkpoint, start_from=(str(tmp_path / name),))

    for name in "ab":
        (tmp_path / name).mkdir()
        state = {"step": 0, "files": {}, "tensors": {}, "name": name}
        write_state(Folder(tmp_path / name), state)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    of_a = settings(checkpoint=start_from("a"))
    assert settings(checkpoint=start_from("copy")) == of_a
    assert settings(checkpoint=start_from("b")) != of_a
    assert settings(data=replace(stage.run.data, row_tokens=16)) != settings()


def test_a_limit_takes_items_from_everywhere_and_leaves_other_results(plan, tmp_path):
    published.write_imagenet(tmp_path, 6, 5)
    few = benchmark_run._limited(read_benchmark("imagenet", tmp_path), 10)
    assert len(few.items) == 10 and {item.truths[0] for item in few.items} == set("012345")
    wanted = {"folders": {"imagenet": tmp_path}, "stage": "contrastive"}
    stage = plan.stages[1]
    folders = {
        benchmark_run._Evaluation(stage, None, few, Wanted(**wanted, **more)).folder.name
        for more in ({}, {"limit": 10}, {"shots": 2}, {"shots": 2, "limit": 10})
    }
    assert folders == {
        *("imagenet", "imagenet-limit-10", "imagenet-2-shot", "imagenet-2-shot-limit-10")
    }


def test_a_folder_that_cannot_be_written_is_told_before_the_model_is_loaded(
    plan, tmp_path, monkeypatch
):
    published.write_vqa(tmp_path, 2)
    plan.first.run_folder.mkdir(parents=True)
    (plan.first.run_folder / "benchmarks").write_text("a file")
    monkeypatch.setattr(benchmark_run, "load_language", lambda *_: pytest.fail("loaded"))

    def on_rank(_):
        with pytest.raises(DataError, match=r"cannot write to .*benchmarks is a file, not a fold"):
            evaluate_benchmarks(plan, Wanted(folders={"vqav2": tmp_path}))

    run_on_ranks(1, on_rank, groups=False)


def test_answers_without_published_truths_are_only_written(plan, tmp_path, monkeypatch, capfd):
    published.write_vqa_test(tmp_path, 3)
    generate = benchmark_answers.generate

    def watched(*arguments, **options):
        assert options["batch_size"] == 2
        return generate(*arguments, **options)

    monkeypatch.setattr(benchmark_answers, "generate", watched)
    [(results, predictions)] = evaluate(plan, folders={"vqav2_test_dev": tmp_path}, batch_size=2)
    assert results["items"] == 3 and results["scores"] == []
    assert [row["key"] for row in predictions] == ["0", "10", "20"]
    stage_folder = plan.first.run_folder / "benchmarks" / "instruction"
    folder = stage_folder / "step-00000000" / "vqav2_test_dev"
    assert json.loads((folder / "submission.json").read_text()) == [
        {"question_id": int(row["key"]), "answer": row["answer"]} for row in predictions
    ]
    assert not (folder / "sheet.html").exists()
    told = capfd.readouterr().err
    assert "its truths are not published, so nothing is scored; hand in submission.json" in told


@pytest.mark.slow
def test_ranks_that_hold_the_model_together_answer_alike(plan, tmp_path):
    published.write_vqa(tmp_path, 14)
    wanted = {"folders": {"vqav2": tmp_path}}
    [(results, predictions)] = evaluate(plan, **wanted)
    # Their sums round otherwise, which changes none of these answers.
    assert evaluate(plan, 4, tensor_parallel=2, **wanted) == [(results, predictions)]


def test_examples_are_other_pictures_and_the_question_comes_last(plan, tmp_path):
    published.write_vqa(tmp_path, 6)
    published.write_vqa(tmp_path, 40, subset="train2014")
    run = replace(plan.first, evaluation=EvaluationSettings(question_prompt="Question: {} Answer:"))
    benchmark = read_benchmark("vqav2", tmp_path)
    tokenizer = Tokenizer(run.data.tokenizer)
    writes = writes_of(run, tmp_path, 3)
    drawn = drawn_of(writes, 6)
    assert drawn == drawn_of(writes, 6)
    assert len({tuple(e.key for e in some) for some in drawn}) == 6
    assert drawn_of(writes_of(replace(run, seed=9), tmp_path, 3), 6) != drawn
    for some in drawn:
        assert len({example.picture for example in some}) == 3
        assert all(example.picture.parent.name == "train2014" for example in some)
    request, _ = writes.request(4)
    assert len(request.pixels) == 4
    text = tokenizer.decode([t for t in request.prompt.tokens if t > 10])
    places = [text.index(word) for e in (*drawn[4], benchmark.items[4]) for word in (e.question,)]
    assert places == sorted(places)
    assert text.count("Question: ") == 4 and text.rstrip().endswith("? Answer:")
    answers = [text.index(e.truths[0], place) for e, place in zip(drawn[4], places, strict=False)]
    assert all(place < answer for place, answer in zip(places, answers, strict=False))
    # Each turn sees its own picture, and the question nothing but the last.
    assert request.prompt.seen[0] == (0, 1) and request.prompt.seen[-1] == (3, 4)
    assert {high - low for low, high in request.prompt.seen} == {1}


@pytest.mark.parametrize(
    ("stage", "name", "shots", "told"),
    [
        ("contrastive", "vqav2", 0, "vqav2 needs a stage of captioning or instruction, and stage"),
        ("contrastive", "coco_captions", 2, "coco_captions with --shots needs a stage of capt"),
        ("mim", "coco_captions", 0, "needs a stage of contrastive, captioning or instruction"),
        ("mim", "imagenet", 0, "imagenet needs a stage of contrastive, and stage mim is of mim"),
        ("instruction", "imagenet", 0, "imagenet needs a stage of contrastive"),
        ("instruction", "vqav2", 3, "--shots=3 needs more pictures than the 6 entries"),
        ("contrastive", "coco_captions_test", 0, "coco_captions_test needs a stage of capt"),
    ],
)
def test_what_a_stage_cannot_do_is_told(plan, tmp_path, stage, name, shots, told):
    if name == "vqav2":
        published.write_vqa(tmp_path, 2)
        published.write_vqa(tmp_path, 6, subset="train2014")
    elif name == "imagenet":
        published.write_imagenet(tmp_path, 2, 1)
    elif name == "coco_captions_test":
        published.write_coco_test(tmp_path, 2)
    else:
        published.write_coco(tmp_path, 2)
    stages = {s.name: s for s in plan.stages}
    benchmark = read_benchmark(name, tmp_path)
    examples = read_benchmark(name, tmp_path, "examples") if name == "vqav2" and shots else None
    with pytest.raises(ConfigError, match=told):
        benchmark_run._check(stages[stage], benchmark, examples, Wanted(folders={}, shots=shots))


def test_mistakes_on_the_command_line(tiny_run_file, tmp_path, capsys):
    def told(*arguments):
        assert main(["eval", str(tiny_run_file), *arguments]) == 2
        return capsys.readouterr().err

    assert named_folder("vqav2=a=b")[1].name == "a=b"
    with pytest.raises(SystemExit):
        main(["eval", str(tiny_run_file), "--benchmark", "vqav2"])
    assert "vqav2 is not of the form NAME=FOLDER" in capsys.readouterr().err
    assert "there is no benchmark vqa; choose" in told("--benchmark", f"vqa={tmp_path}")
    twice = ["--benchmark", f"vqav2={tmp_path}", "--benchmark", "vqav2=elsewhere"]
    assert "a benchmark is named twice" in told(*twice)
    assert "--shots, --batch-size: only for benchmarks" in told("--shots", "2", "--batch-size", "9")
    published.write_vqa(tmp_path, 2)
    divided = ["--benchmark", f"vqav2={tmp_path}", "--tensor-parallel"]
    assert "--tensor-parallel=2 does not divide the 1 rank that were" in told(*divided, "2")
    with pytest.raises(DataError, match="holds no TextVQA"):
        read_benchmark("textvqa", tmp_path)
    with pytest.raises(ConfigError, match=r"question_prompt='Answer' must hold \{\} once"):
        EvaluationSettings(question_prompt="Answer")
