"""The model class for lmms-eval, against its own classes, where it is installed."""

import io
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch
import yaml
from PIL import Image

from megavlm.config.load import run_as_tree
from megavlm.errors import CheckpointError, ConfigError, RequestError
from tests.eval import published
from tests.ranks import run_on_ranks

lmms_eval = pytest.importorskip("lmms_eval", reason="install it without its dependencies")

from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.models import MODEL_REGISTRY_V2  # noqa: E402

from megavlm.data.image import fit_square, read_square, to_uint8_tensor  # noqa: E402
from megavlm.eval import run as evaluation  # noqa: E402
from megavlm.eval.lmms import DEFAULT_BATCH_SIZE, Megavlm, _rows, _sampling, manifest  # noqa: E402
from megavlm.infer import load  # noqa: E402
from megavlm.infer.generate import generate  # noqa: E402
from megavlm.infer.prompts import Request, question  # noqa: E402
from tests.eval.test_benchmark_run import untrained_language  # noqa: E402


@pytest.fixture
def run_file(tiny_run, tmp_path, monkeypatch):
    """A run of an instruction stage, whose weights are the initial ones."""
    run = replace(tiny_run, objectives={"instruction": 1.0})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_as_tree(run)))
    monkeypatch.setattr(evaluation, "newest_of", lambda plan, _: (plan.stages[0], None))
    monkeypatch.setattr(load, "load_language", untrained_language)
    return path


def instance(number, pictures, **settings):
    documents = {"vqa": {"val": {number: pictures}}}
    arguments = ("Which colour?", settings, lambda pictures: pictures, number, "vqa", "val")
    metadata = {"task": "vqa", "doc_id": number, "repeats": 1}
    return documents, Instance("generate_until", arguments, 0, metadata)


def ask(run_file, asked):
    """The answers of lmms-eval's way to the model."""
    model = Megavlm.create_from_arg_string(
        f"pretrained={run_file}", {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    )
    for documents, _ in asked:
        for split, held in documents["vqa"].items():
            model.task_dict.setdefault("vqa", {}).setdefault(split, {}).update(held)
    return model.generate_until([each for _, each in asked]), model


def test_the_entry_point_registers_the_class():
    found = EntryPoint("megavlm", "megavlm.eval.lmms:manifest", "lmms_eval.models").load()
    for registered in MODEL_REGISTRY_V2._coerce_payload_to_manifests(found):
        MODEL_REGISTRY_V2.register_manifest(registered, overwrite=True)
    assert MODEL_REGISTRY_V2.get_model_class("megavlm") is Megavlm
    assert manifest().model_id == "megavlm"


def test_answers_are_those_of_generate(run_file, tiny_run):
    pictures = [Image.new("RGB", (50, 30 + n), published.colour_of(n)) for n in range(3)]
    asked = [
        instance(0, [pictures[0]], max_new_tokens=6),
        instance(1, [pictures[1], pictures[2].convert("P")], max_new_tokens=9, until=["\n\n"]),
        instance(2, [], max_new_tokens=4, temperature=0, top_p=None, num_beams=1, do_sample=False),
    ]

    def on_rank(_):
        answers, model = ask(run_file, asked)
        side = tiny_run.model.encoder.image_pixels
        requests = [
            Request(
                prompt=question(model._tokenizer, "Which colour?", pictures=len(shown)),
                pixels=tuple(to_uint8_tensor(fit_square(p.convert("RGB"), side)) for p in shown),
                max_new_tokens=tokens,
            )
            for shown, tokens in (([pictures[0]], 6), (pictures[1:], 9), ([], 4))
        ]
        expected = generate(model._model, model._tokenizer, requests, batch_size=1)
        assert answers == expected and any(answers)
        with pytest.raises(RequestError, match="task vqa shows a str; only pictures"):
            ask_again = instance(5, ["film.mp4"])
            model.task_dict["vqa"]["val"] |= ask_again[0]["vqa"]["val"]
            model.generate_until([ask_again[1]])
        with pytest.raises(NotImplementedError, match="compares likelihoods"):
            model.loglikelihood([])
        # Transparency and 16 bits are as in training.
        for mode, colour in (("RGBA", (0, 0, 0, 0)), ("I;16", 30_000)):
            shown = Image.new(mode, (40, 30), colour)
            file = io.BytesIO()
            shown.save(file, "PNG")
            documents, asked_once = instance(6, [shown])
            model.task_dict["vqa"]["val"] |= documents["vqa"]["val"]
            [pixels] = model._request(*asked_once.args, seed=0).pixels
            assert torch.equal(pixels, read_square(file.getvalue(), "", side))
        # A repeated instance is drawn anew; the same call draws the same.
        _, drawn = instance(0, [pictures[0]], max_new_tokens=8, temperature=5.0)
        several = model.generate_until([drawn, drawn])
        assert several[0] != several[1] and several == model.generate_until([drawn, drawn])
        assert (model.rank, model.world_size, model.device.type) == (0, 1, "cpu")

    run_on_ranks(1, on_rank, groups=False)


def test_a_quantized_model_answers(run_file):
    pytest.importorskip("torchao", reason="the extra `quantization`")

    def on_rank(_):
        model = Megavlm.create_from_arg_string(f"pretrained={run_file},quantization=int8", {})
        layer = model._model.language.decoder.layers[0]
        return type(next(p for p in layer.parameters() if p.ndim == 2)).__name__

    assert run_on_ranks(1, on_rank, groups=False) == ["Int8Tensor"]


def test_settings_of_tasks():
    assert _sampling({}, "t", 1).temperature == 0
    assert _sampling({"temperature": 0.5, "do_sample": False}, "t", 1).temperature == 0
    drawn = _sampling({"temperature": 0.5, "top_p": 0.9, "do_sample": True}, "t", 3)
    assert (drawn.temperature, drawn.top_p, drawn.seed) == (0.5, 0.9, 3)
    with pytest.raises(RequestError, match="task t wants num_beams=4"):
        _sampling({"num_beams": 4}, "t", 1)


def test_sizes_of_batches():
    assert (_rows("auto"), _rows("auto:4"), _rows("3")) == (DEFAULT_BATCH_SIZE,) * 2 + (3,)
    with pytest.raises(ConfigError, match="batch_size=many is not auto or a whole number"):
        _rows("many")


def test_a_stage_that_writes_nothing_is_refused(tiny_run, tmp_path, monkeypatch):
    run = replace(tiny_run, objectives={"contrastive": 1.0})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_as_tree(run)))
    monkeypatch.setattr(evaluation, "newest_of", lambda plan, _: (plan.stages[0], None))

    def on_rank(_):
        with pytest.raises(CheckpointError, match="trains no language model"):
            Megavlm(str(path))

    run_on_ranks(1, on_rank, groups=False)
