"""Whole conversions, as the command line runs them."""

import json
import weakref
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megavlm.__main__ import main
from megavlm.checkpoint.folder import Folder
from megavlm.checkpoint.lazy import LazyTensor, in_memory
from megavlm.checkpoint.storage import CheckpointReader, read_state
from megavlm.checkpoint.store import lazy_tensors, load_checkpoint, load_weights, save_checkpoint
from megavlm.config.load import load_run
from megavlm.config.run import CheckpointSettings
from megavlm.convert.files import hugging_face_tensors, write_native
from megavlm.engine.start import start_engine
from megavlm.model.params import parameters
from tests.batches import TINY
from tests.convert.hugging_face import assert_same
from tests.convert.test_mllama import random_config, random_mllama
from tests.model.weights import randomise
from tests.parity.runs import CPU, DEMO, LAYOUTS, my_micro_batches
from tests.ranks import run_on_ranks

SAVING = CheckpointSettings(every=1, asynchronous=False)


def command(*arguments):
    """The command line in a rank of its own: it starts process groups. The exit code."""
    [code] = run_on_ranks(1, lambda _: main(["convert", *map(str, arguments)]), groups=False)
    return code


def certificate(folder):
    return json.loads((folder / "certificate.json").read_text())


def native(folder):
    return lazy_tensors(CheckpointReader(Folder(folder)))


def random_native(folder, seed=0, dtype=torch.float32, step=0, sizes=TINY):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"weights/{p.name}": torch.randn(p.shape, generator=generator).to(dtype)
        for p in parameters(sizes)
    }
    folder.mkdir()
    state = {"step": step, "settings": {"model": asdict(sizes)}, "tokenizer_sha256": None}
    write_native(Folder(folder), in_memory(tensors), state, max_file_bytes=40_000)
    return tensors


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A random Mllama whose sizes tensor and pipeline parallelism divide, in bf16."""
    folder = tmp_path_factory.mktemp("mllama")
    config = random_config(1)
    config["text_config"] |= {
        "vocab_size": 64,
        "hidden_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "cross_attention_layers": [0, 3, 4],
    }
    config["vision_config"] |= {"attention_heads": 4, "hidden_size": 32, "vision_output_dim": 64}
    random_mllama(config, 1).bfloat16().save_pretrained(folder)
    return folder


def test_through_every_engine_and_back_bit_by_bit(theirs, tmp_path):
    """Hugging Face -> ours -> TP2 x PP2 -> ZeRO-3 -> FSDP2 -> ours -> Hugging Face."""
    assert command(theirs, "--out", tmp_path / "ours") == 0
    sizes = read_state(Folder(tmp_path / "ours"))["settings"]["model"]
    model = [f"model.{part}={json.dumps(of_part)}" for part, of_part in sizes.items()]
    folder, load = Folder(tmp_path / "ours"), load_weights
    for number, name in enumerate(("TP2 x PP2", "ZeRO-3 x4", "FSDP2 hybrid 2x2"), start=1):
        layout = next(layout for layout in LAYOUTS if layout.name == name)
        overrides = ["train.precision=bf16", "train.micro_batches=1", "train.samples_per_step=8"]
        run = load_run(DEMO, [*model, *layout.overrides, *overrides, "data.row_tokens=16"])

        def on_rank(_, run=run, folder=folder, load=load, number=number):
            engine = start_engine(run, CPU)
            engine.load_state(partial(load, folder), steps_done=0)
            state = {"settings": {"model": sizes}, "tokenizer_sha256": None}
            saved = save_checkpoint(Folder(tmp_path), number, engine.state(), state, SAVING)
            engine.close()
            return str(saved)

        folder = Folder(run_on_ranks(layout.ranks, on_rank, parallel=run.model_parallel)[0])
        load = load_checkpoint
    beside = {n: t for n, t in native(tmp_path / "ours").items() if n.startswith("beside/")}
    assert beside  # training has no use for them, so they are not in a run's checkpoints
    trained = {n: t for n, t in native(folder.place).items() if n.startswith("weights/")}
    assert {t.dtype for t in trained.values()} == {torch.float32}
    state = {**read_state(folder), "step": 3}
    (tmp_path / "with").mkdir()
    write_native(Folder(tmp_path / "with"), trained | beside, state, max_file_bytes=10**9)
    assert command(tmp_path / "with", "--out", tmp_path / "back", "--dtype", "bf16") == 0
    back, given = (hugging_face_tensors(Folder(place)) for place in (tmp_path / "back", theirs))
    assert_same(back, given)


def test_the_certificate_finds_what_changes_later(theirs, tmp_path, capfd):
    source, out = tmp_path / "theirs", tmp_path / "ours"
    MllamaForConditionalGeneration.from_pretrained(theirs).save_pretrained(source)
    assert command(source, "--out", out) == 0
    told = certificate(out)
    assert (
        told["comparison"]["compared"] and told["comparison"]["worst_difference"] < 2e-5
    )  # worst measured 7.5e-6
    assert told["comparison"]["standard_deviation"] > 0.5
    assert told["sources"][0]["tensors"] == len(hugging_face_tensors(Folder(source)))
    assert command("--verify", out) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in lines[-2:]] == [
        f"{told[side]['tensors'] if side == 'target' else told['sources'][0]['tensors']} tensors "
        "are as certified"
        for side in ("target", "sources")
    ]
    # One bit of one tensor of the source.
    file = source / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert command("--verify", out) == 2
    last = max(hugging_face_tensors(Folder(source)), key=lambda name: _offset(content, name))
    assert f"{source}: {last} has sha256" in capfd.readouterr().err


def _offset(content, name):
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header[name]["data_offsets"]


def test_a_trained_form_to_mllama_that_generates(tmp_path):
    """Several files with an index, opened by `from_pretrained` unchanged."""
    random_native(tmp_path / "ours")
    arguments = ("--out", tmp_path / "theirs", "--max-file-gb", "0.0001", "--dtype", "bf16")
    assert command(tmp_path / "ours", *arguments) == 0
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    model, loading = MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(loading.values()) and model.dtype == torch.bfloat16
    tokens = model.generate(torch.tensor([[1, 20, 30]]), max_new_tokens=5, do_sample=False)
    assert tokens.shape[1] > 3
    assert certificate(tmp_path / "theirs")["comparison"]["compared"]


def test_means_of_checkpoints(tmp_path):
    models = [random_native(tmp_path / str(i), seed=i, step=i) for i in range(3)]
    sources = [tmp_path / str(i) for i in range(3)]
    assert command(*sources, "--to", "native", "--out", tmp_path / "mean") == 0
    ema = ("--to", "native", "--ema-decay", "0.5", "--out", tmp_path / "ema")
    assert command(*sources, *ema) == 0
    for folder, shares in (("mean", (1 / 3, 1 / 3, 1 / 3)), ("ema", (1 / 7, 2 / 7, 4 / 7))):
        for name, tensor in native(tmp_path / folder).items():
            expected = sum(s * m[name].double() for s, m in zip(shares, models, strict=True))
            torch.testing.assert_close(tensor.read(), expected.float(), rtol=2e-7, atol=0)
    assert read_state(Folder(tmp_path / "ema"))["step"] == 2
    assert [s["kind"] for s in certificate(tmp_path / "ema")["sources"]] == ["native"] * 3


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pretrained_parts_start_a_run(tmp_path, kind):
    """An encoder and a Llama, each from its own folder; the rest starts as usual."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    }
    tower, llama = (
        CLIPVisionModel(CLIPVisionConfig(**sizes))
        if kind == "clip"
        else SiglipVisionModel(SiglipVisionConfig(**sizes)),
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=500,
                hidden_size=48,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=96,
                rms_norm_eps=1e-5,
            )
        ),
    )
    for seed, (name, model) in enumerate({"tower": tower, "llama": llama}.items()):
        randomise(model, seed)
        model.save_pretrained(tmp_path / name)
    assert command(tmp_path / "tower", "--out", tmp_path / "encoder") == 0
    encoder = read_state(Folder(tmp_path / "encoder"))["settings"]["model"]["encoder"]
    model = ["model.preset=vlm-tiny", f"model.encoder={json.dumps(encoder)}"]
    arguments = (tmp_path / "llama", "--out", tmp_path / "decoder", "--run", DEMO, *model)
    assert command(*arguments) == 0
    for part in ("encoder", "decoder"):
        assert certificate(tmp_path / part)["comparison"]["worst_difference"] < 2e-5
    layout = next(layout for layout in LAYOUTS if layout.name == "TP2 x PP2")
    run = load_run(DEMO, [*model, *layout.overrides, "data.row_tokens=16"])

    def on_rank(_):
        engine = start_engine(run, CPU)
        for part in ("encoder", "decoder"):
            engine.load_state(partial(load_weights, Folder(tmp_path / part)), steps_done=0)
        saved = save_checkpoint(Folder(tmp_path), 1, engine.state(), {}, SAVING)
        engine.step(my_micro_batches(0, encoder=run.model.encoder), 1e-3)
        engine.close()
        return str(saved)

    saved = native(run_on_ranks(4, on_rank, parallel=run.model_parallel)[0])
    given = native(tmp_path / "encoder") | native(tmp_path / "decoder")
    assert given["weights/language.output_layer.weight"].shape[0] == 512
    for name, tensor in given.items():
        assert torch.equal(saved[name].read(), tensor.read()), name
    started = {name for name in saved if name.startswith("weights/")} - given.keys()
    assert {name.split(".")[0] for name in started} == {"weights/projector", "weights/language"}
    assert all(".layers.2." in n or ".layers.5." in n or "projector" in n for n in started)


def fails(capfd, says, *arguments):
    assert command(*arguments) == 2
    assert says in capfd.readouterr().err


def test_mistakes_are_told(tmp_path, capfd):
    ours, out = tmp_path / "ours", tmp_path / "out"
    random_native(ours)
    (tmp_path / "empty").mkdir()
    fails(capfd, "name the checkpoint to convert, and with --out a new folder", ours)
    fails(capfd, "holds neither our state.json nor", tmp_path / "empty", "--out", out)
    fails(capfd, "is not empty; choose another folder", ours, "--out", ours)
    fails(capfd, "name the run's file with --run", ours, "--out", out, "--to", "megatron")
    other = replace(TINY, decoder=replace(TINY.decoder, vocabulary=400))
    random_native(tmp_path / "other", sizes=other)
    fails(capfd, "only checkpoints of one model", ours, tmp_path / "other", "--out", out)
    fails(capfd, "has no certificate.json", "--verify", ours)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.json").write_text('{"model_type": "mllama"}')
    fails(capfd, "holds no safetensors files", torn, "--out", out)
    (torn / "pytorch_model.bin").write_bytes(b"a pickle")
    fails(capfd, "save pytorch_model.bin as safetensors first", torn, "--out", out)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (torn / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(capfd, "lacks the file model-00001-of-00002.safetensors", torn, "--out", out)
    (torn / "model-00001-of-00002.safetensors").write_bytes(b"x" * 100)
    fails(capfd, "is no safetensors file", torn, "--out", out)
    (torn / "config.json").write_text("[1]")
    fails(capfd, "must hold a JSON object", torn, "--out", out)
    file = sorted(ours.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    fails(capfd, f"{file.name} is corrupt", ours, "--out", out)
    assert not out.exists()


def test_memory_holds_a_few_tensors_only(tmp_path):
    """The sum of a model's tensors does not matter; tools/bench_checkpoint.py has the figures."""
    alive, most = 0, 0

    def read(name):
        nonlocal alive, most
        tensor = torch.full((1000,), float(name))
        alive, most = alive + 1, max(most, alive + 1)
        weakref.finalize(tensor, died)
        return tensor

    def died():
        nonlocal alive
        alive -= 1

    names = [str(i) for i in range(50)]
    tensors = {name: LazyTensor((1000,), torch.float32, partial(read, name)) for name in names}
    write_native(Folder(tmp_path), tensors, {"step": 0}, max_file_bytes=10**9)
    assert most <= 3 and alive == 0


def test_converted_shards_of_megatron(tmp_path):
    random_native(tmp_path / "ours", step=7)
    layout = ("model.preset=vlm-tiny", "engine=megatron", "data.row_tokens=16")
    division = ("megatron.tensor_parallel=2", "megatron.pipeline_parallel=2")
    arguments = ("--to", "megatron", "--run", DEMO, *layout, *division)
    assert command(tmp_path / "ours", "--out", tmp_path / "shards", *arguments) == 0
    assert command(tmp_path / "shards", "--out", tmp_path / "back", "--run", DEMO, *layout) == 0
    assert_same(native(tmp_path / "back"), native(tmp_path / "ours"))
    assert read_state(Folder(tmp_path / "back"))["step"] == 7
    assert command("--verify", tmp_path / "back") == 0
    assert certificate(tmp_path / "back")["unchanged"] == len(parameters(TINY))
