"""Agreement of pictures and captions by a contrastive stage of our own."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy, normalize

from megavlm.checkpoint.shards import whole
from megavlm.checkpoint.state import checkpoint_root, checkpoint_state
from megavlm.checkpoint.storage import folder_name, read_state, write_state
from megavlm.config.data import SourceSettings
from megavlm.config.filters import AgreementRules, FilterSettings, rules_as_tree
from megavlm.config.plan import Plan
from megavlm.data.collate import Drawn, pairs
from megavlm.data.image import read_square
from megavlm.data.samples import Sample, text
from megavlm.data.shards import ShardFolder, write_shards
from megavlm.data.sources import training_sources
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import CheckpointError, ConfigError, DataError, TokenizerError
from megavlm.eval.retrieval import encode_pairs
from megavlm.eval.samples import Split
from megavlm.files.folder import Folder
from megavlm.filters import run as filter_run
from megavlm.filters.judge import judge
from megavlm.filters.models import check_checkpoints
from megavlm.filters.parallel import Job
from megavlm.filters.towers import _loaded, agreement, resolved
from megavlm.infer.load import untrained_pretraining
from tests.conftest import COLOURS, picture
from tests.filters import planted
from tests.ranks import run_on_ranks
from tests.runs import plan_of
from tests.states import save_checkpoint

# Worst measured 9.0e-8, of cosines from -0.39 to 0.40: products of matrices sum in another order.
SUMS = 3e-7
# Worst measured 1.1e-7: a text's place in its row is another where others share it.
COMPANY = 3e-7


@pytest.fixture
def plan(tiny_run) -> Plan:
    """Two stages; the first has two towers, and a head that is of no use here."""
    data = replace(tiny_run.data, row_tokens=64)
    first = replace(tiny_run, objectives={"contrastive": 1.0, "mim": 0.1}, data=data)
    return plan_of(first, replace(first, objectives={"captioning": 1.0}))


def rules_of(checkpoint: Path, minimum: float = 0, **settings) -> FilterSettings:
    return FilterSettings(
        agreement=AgreementRules(checkpoint=checkpoint, minimum=minimum, **settings)
    )


def save(plan, steps: int = 0) -> Path:
    """A checkpoint that has learned colours for so many steps; returns its folder."""
    run = plan.first
    tokenizer = Tokenizer(run.data.tokenizer)
    state = checkpoint_state(plan.stages[0], tokenizer, steps, training_sources(run), {})

    def on_rank(_):
        model = untrained_pretraining(run)
        learn_colours(model, tokenizer, run, steps)
        held = {f"weights/{name}": whole(p.detach()) for name, p in model.named_parameters()}
        save_checkpoint(checkpoint_root(run), steps, held, state, run.checkpoint)

    run_on_ranks(1, on_rank)
    return run.run_folder / "checkpoints" / folder_name(steps)


def learn_colours(model, tokenizer, run, steps: int) -> None:
    side, generator = run.model.encoder.image_pixels, np.random.default_rng(0)
    drawn = [
        Drawn("", (read_square(picture(c), "", side),), (caption(f"a {c} square"),), generator)
        for c in COLOURS
    ]
    batch = pairs(drawn, tokenizer, run, len(drawn))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        image_nd, text_nd, *_ = model(
            batch.pixels, None, batch.tokens_bt, batch.text_numbers_bt, batch.ends_n
        )
        logits_nn = 10 * normalize(image_nd, dim=-1) @ normalize(text_nd, dim=-1).T
        pair_n = torch.arange(len(logits_nn))
        loss = cross_entropy(logits_nn, pair_n) + cross_entropy(logits_nn.T, pair_n)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def save_other_stage(plan, step: int) -> Path:
    """What says that it is a checkpoint of the stage without towers."""
    folder = checkpoint_root(plan.first) / folder_name(step)
    folder.create()
    state = checkpoint_state(
        plan.stages[1],
        Tokenizer(plan.first.data.tokenizer),
        step,
        training_sources(plan.first),
        {},
    )
    tensors = {"weights/projector.weight": {"dtype": "F32", "shape": [1]}}
    write_state(folder, {"step": step, **state, "files": {}, "tensors": tensors})
    return Path(folder.place)


def caption(words: str):
    return text("", words, "caption")


def sample(colour: str, *captions: str) -> Sample:
    texts = tuple(caption(words) for words in captions)
    return Sample(key=colour, pictures=(picture(colour),), texts=texts)


SAMPLES = [
    sample("red", "a red square"),
    sample("blue", "a red square"),
    sample("green", "a white square", "a green square"),
    Sample(key="text", pictures=(), texts=(text("", "a red square", "caption", pictures=()),)),
    sample("black", "a black square"),
]


def test_scores_are_those_of_the_evaluation(plan, tmp_path):
    """Of pictures of all sizes, larger JPEGs too, which are decoded at a reduced scale."""
    step, run = save(plan), plan.first
    sizes = [(1400, 900), (300, 700), (64, 64), (33, 20)]
    captions = [" ".join(COLOURS[n * k % 8] for k in range(1 + n % 12)) for n in range(70)]
    samples = [
        planted.pair(f"{n:03}", planted.encoded(planted.picture(n, sizes[n % 4])), words)
        for n, words in enumerate(captions)
    ]
    pictures = [sample.pictures[0] for sample in samples]
    (tmp_path / "pairs").mkdir()
    write_shards(tmp_path / "pairs", samples, 100)
    rules = resolved(rules_of(step)).agreement

    some = range(0, 70, 7)

    def scored(_):
        scores = agreement(rules, "cpu", pictures, captions)
        alone = [agreement(rules, "cpu", [pictures[n]], [captions[n]])[0] for n in some]
        model, tokenizer, _ = _loaded(rules.checkpoint, rules.tokenizer, "cpu")
        split = Split("heldout", [SourceSettings(folder=str(tmp_path / "pairs"))], run, None)
        return scores, alone, encode_pairs((model,), split, tokenizer, run).features[0]

    [(scores, alone, (image_nd, text_nd))] = run_on_ranks(1, scored, groups=False)
    image_nd, text_nd = normalize(image_nd, dim=-1), normalize(text_nd, dim=-1)
    assert scores == (image_nd * text_nd).sum(-1).tolist()
    assert max(scores) - min(scores) > 0.1
    similarities_n = (text_nd @ image_nd.T).diagonal()
    assert scores == pytest.approx(similarities_n.tolist(), abs=SUMS)
    assert [scores[n] for n in some] == pytest.approx(alone, abs=COMPANY)


def test_wrong_captions_go(plan):
    step = save(plan, 25)
    save_other_stage(plan, 26)
    run = plan.first
    rules = resolved(rules_of(run.run_folder))
    assert rules.agreement == AgreementRules(
        checkpoint=step, minimum=0, tokenizer=run.data.tokenizer
    )
    assert resolved(rules_of(run.run_folder / "checkpoints")) == rules == resolved(rules)

    def judged(_):
        shown = [(a, b) for a in COLOURS for b in COLOURS]
        scores = agreement(
            rules.agreement,
            "cpu",
            [picture(colour) for colour, _ in shown],
            [f"a {word} square" for _, word in shown],
        )
        right = [score for score, (a, b) in zip(scores, shown, strict=True) if a == b]
        wrong = [score for score, (a, b) in zip(scores, shown, strict=True) if a != b]
        minimum = (min(right) + max(wrong)) / 2
        found = replace(rules, agreement=replace(rules.agreement, minimum=minimum))
        contents = [(n, b"") for n in range(len(SAMPLES))]
        verdicts = judge(contents, lambda n, _: SAMPLES[n], found, None)
        texts = [t.answer for t in verdicts[2].sample.texts]
        return min(right) - max(wrong), [v.reason for v in verdicts], texts

    [(lead, reasons, texts)] = run_on_ranks(1, judged, groups=False)
    assert lead > 0.1
    assert reasons == [None, "agreement", None, None, None]
    assert texts == ["a green square"]


def test_what_cannot_score_is_refused_before_ray_starts(plan, tmp_path, monkeypatch):
    captioning = save_other_stage(plan, 7)
    (tmp_path / "in").mkdir()
    write_shards(tmp_path / "in", SAMPLES, 10)
    monkeypatch.setattr(filter_run, "ray_workers", lambda *_: pytest.fail("Ray was started"))
    for folder in (captioning, plan.first.run_folder):
        with pytest.raises(
            ConfigError, match=r"has no towers .* \(its stage: captioning\); name a checkpoint of a"
        ):
            filter_folder_to(tmp_path, rules_of(folder))
    with pytest.raises(ConfigError, match=r"megavlm with checkpoints, or a step's folder, too"):
        filter_folder_to(tmp_path, rules_of(tmp_path))
    assert not (tmp_path / "out").exists()


def filter_folder_to(folder: Path, rules: FilterSettings) -> None:
    filter_run.filter_folder(rules, str(folder / "in"), str(folder / "out"))


def test_tokenizer_and_settings_must_be_there(plan, tmp_path, coloured_squares):
    step = save(plan)
    state = read_state(Folder(step))

    def rewrite(**changed):
        write_state(Folder(step), {k: v for k, v in (state | changed).items() if v is not None})

    elsewhere = tmp_path / "moved.model"
    elsewhere.write_bytes((coloured_squares / "tokenizer.model").read_bytes())
    settings = json.loads(json.dumps(state["settings"]))
    settings["data"]["tokenizer"] = str(tmp_path / "none.model")
    rewrite(settings=settings)
    with pytest.raises(ConfigError, match=r"tokenizer .*none\.model of .*-00000000 does not exist"):
        resolved(rules_of(step))
    assert resolved(rules_of(step, tokenizer=elsewhere)).agreement.tokenizer == elsewhere
    with pytest.raises(ConfigError, match=r"none of .* does not exist; name the file that"):
        resolved(rules_of(step, tokenizer=tmp_path / "none"))
    rewrite(tokenizer_sha256="0" * 64)
    with pytest.raises(TokenizerError, match="was trained with another tokenizer"):
        resolved(rules_of(step))
    for without in ({}, {"model": settings["model"]}, None):
        rewrite(settings=without)
        with pytest.raises(ConfigError, match="does not say of which run it is"):
            resolved(rules_of(step))
    rewrite(tensors={n: t for n, t in state["tensors"].items() if "log_scale" not in n})
    with pytest.raises(CheckpointError, match="which is not listed"):
        resolved(rules_of(step))
    rewrite()
    [file] = step.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes instead of"):
        resolved(rules_of(step))


def test_a_tokenizer_is_for_checkpoints_of_ours(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    check_checkpoints(rules_of(tmp_path))
    assert resolved(rules_of(tmp_path)) == rules_of(tmp_path)
    with pytest.raises(ConfigError, match=r"is for checkpoints of megavlm; .* leave it out"):
        resolved(rules_of(tmp_path, tokenizer=tmp_path / "x"))


def test_another_step_is_another_input(plan, tmp_path):
    save(plan)
    (tmp_path / "in").mkdir()
    write_shards(tmp_path / "in", SAMPLES, 10)
    rules = rules_of(plan.first.run_folder)
    places = {"source": str(tmp_path / "in"), "target": str(tmp_path / "out")}
    job = Job(rules=resolved(rules), **places, part_samples=filter_run.PART_SAMPLES)
    filter_run._check_inputs(job)
    filter_run._check_inputs(replace(job, rules=resolved(rules)))
    save(plan, 1)
    with pytest.raises(DataError, match=r"other inputs \(.*rules\.agreement\.checkpoint"):
        filter_run._check_inputs(replace(job, rules=resolved(rules)))


def test_a_step_that_was_trained_anew_is_another_input(plan, tmp_path):
    save(plan)
    (tmp_path / "in").mkdir()
    write_shards(tmp_path / "in", SAMPLES, 10)
    rules = resolved(rules_of(plan.first.run_folder))
    places = {"source": str(tmp_path / "in"), "target": str(tmp_path / "out")}
    job = Job(rules=rules, **places, part_samples=filter_run.PART_SAMPLES)
    filter_run._check_inputs(job)
    state = rules.agreement.checkpoint / "state.json"
    text = state.read_text()
    digest = json.loads(text)["files"].popitem()[1]["sha256"]
    state.write_text(text.replace(digest, digest[::-1]))
    with pytest.raises(DataError, match=r"other inputs \(checkpoints"):
        filter_run._check_inputs(job)


def test_gpus_that_are_not_there(tmp_path):
    rules = AgreementRules(checkpoint=tmp_path, minimum=0, tokenizer=tmp_path / "x")
    with pytest.raises(ConfigError, match=r"\(gpus_per_worker\), but torch sees no GPU"):
        agreement(rules, "cuda", [picture("red")], ["a red square"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wrong_captions_go_on_ray(plan, tmp_path):
    save(plan, 25)
    (tmp_path / "in").mkdir()
    write_shards(tmp_path / "in", SAMPLES, 2)
    tree = rules_as_tree(rules_of(Path("run"), 0.7))
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"agreement": tree["agreement"]}))
    command = [sys.executable, "-m", "megavlm", "data", "filter", "rules.yaml", "in", "out"]
    done = subprocess.run(
        [*command, "--workers", "2"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kept = ShardFolder(tmp_path / "out")
    found = {kept.read(n).key: len(kept.read(n).texts) for n in range(len(kept))}
    assert found == {"red": 1, "green": 1, "text": 1, "black": 1}
    report = json.loads((tmp_path / "out" / "filter" / "report.json").read_text())
    assert report["dropped"] == {"agreement": 1}
