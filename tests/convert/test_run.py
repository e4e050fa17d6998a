"""Whole conversions, as the command line runs them."""

import json
import shutil
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megavlm.checkpoint.lazy import LazyTensor, in_memory
from megavlm.checkpoint.load import load_checkpoint, load_present
from megavlm.checkpoint.storage import read_state
from megavlm.config.run import CheckpointSettings
from megavlm.convert import compare
from megavlm.convert.certificate import Record
from megavlm.convert.files import hugging_face_tensors, remembering, write_native
from megavlm.convert.names import Joined, cast, to_ours
from megavlm.engine.start import start_engine
from megavlm.files.folder import Folder
from megavlm.model.params import CROSS_LAYERS, ENCODER, PROJECTOR, parameters
from tests.batches import TINY
from tests.convert.commands import certificate, command, fails, native, random_native
from tests.convert.hugging_face import assert_same
from tests.convert.test_mllama import random_config, random_mllama
from tests.model.weights import randomise
from tests.parity.runs import CPU, LAYOUTS, my_micro_batches
from tests.ranks import run_on_ranks
from tests.runs import RUN, load_run
from tests.states import save_checkpoint

SAVING = CheckpointSettings(every=1, asynchronous=False)


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


@pytest.mark.slow
def test_through_every_engine_and_back_bit_by_bit(theirs, tmp_path):
    """Hugging Face -> ours -> TP2 x PP2 -> ZeRO-3 -> FSDP2 -> ours -> Hugging Face."""
    assert command(theirs, "--out", tmp_path / "ours") == 0
    sizes = read_state(Folder(tmp_path / "ours"))["settings"]["model"]
    model = [f"model.{part}={json.dumps(of_part)}" for part, of_part in sizes.items()]
    folder, load = Folder(tmp_path / "ours"), load_present
    for number, name in enumerate(("TP2 x PP2", "ZeRO-3 x4", "FSDP2 hybrid 2x2"), start=1):
        layout = next(layout for layout in LAYOUTS if layout.name == name)
        overrides = ["train.precision=bf16", "train.micro_batches=1", "train.samples_per_step=8"]
        run = load_run(RUN, [*model, *layout.overrides, *overrides, "data.row_tokens=16"])

        def on_rank(_, run=run, folder=folder, load=load, number=number):
            engine = start_engine(run, CPU)
            engine.load_state(partial(load, folder), {})
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
    weights = ("--no-tokenizer", "--dtype", "bf16")
    assert command(tmp_path / "with", "--out", tmp_path / "back", *weights) == 0
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
    assert command(tmp_path / "ours", "--no-tokenizer", *arguments) == 0
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


@pytest.mark.parametrize("kind", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
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
    arguments = (tmp_path / "llama", "--out", tmp_path / "decoder", "--run", RUN, *model)
    assert command(*arguments) == 0
    for part in ("encoder", "decoder"):
        assert certificate(tmp_path / part)["comparison"]["worst_difference"] < 2e-5
    layout = next(layout for layout in LAYOUTS if layout.name == "TP2 x PP2")
    run = load_run(RUN, [*model, *layout.overrides, "data.row_tokens=16"])

    def on_rank(_):
        engine = start_engine(run, CPU)
        for part in ("encoder", "decoder"):
            engine.load_state(partial(load_present, Folder(tmp_path / part)), {})
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


def test_memory_holds_a_few_tensors_only(tmp_path):
    """All that a conversion puts between a file and a file; tools/bench_checkpoint.py measures."""
    alive, most = 0, 0

    def read(name):
        nonlocal alive, most
        tensor = torch.full((1000,), float(len(name)))
        alive, most = alive + 1, max(most, alive + 1)
        weakref.finalize(tensor, died)
        return tensor

    def died():
        nonlocal alive
        alive -= 1

    rules = [Joined(f"o{i}", {f"{kind}{i}": 1 for kind in "qkv"}, groups=5) for i in range(50)]
    names = [name for rule in rules for name in rule.theirs]
    theirs = {name: LazyTensor((1000,), torch.float32, partial(read, name)) for name in names}
    source = Record.of(theirs)
    shapes = {rule.ours: (3000,) for rule in rules}
    ours = cast(to_ours(remembering(source.tensors), rules, shapes), torch.bfloat16)
    written = Record.of(ours)
    write_native(Folder(tmp_path), written.tensors, {"step": 0}, max_file_bytes=10**9)
    assert len(source.hashes) == 150 and len(written.hashes) == 50
    assert most <= 4  # the parts of one tensor, and the next one's first
    del source, ours, written
    assert alive == 0


def test_converted_shards_of_megatron(tmp_path):
    random_native(tmp_path / "ours", step=7)
    layout = ("model.preset=vlm-tiny", "engine=megatron", "data.row_tokens=16")
    division = ("megatron.tensor_parallel=2", "megatron.pipeline_parallel=2")
    arguments = ("--to", "megatron", "--run", RUN, *layout, *division)
    assert command(tmp_path / "ours", "--out", tmp_path / "shards", *arguments) == 0
    assert command(tmp_path / "shards", "--out", tmp_path / "back", "--run", RUN, *layout) == 0
    assert_same(native(tmp_path / "back"), native(tmp_path / "ours"))
    assert read_state(Folder(tmp_path / "back"))["step"] == 7
    assert command("--verify", tmp_path / "back") == 0
    assert certificate(tmp_path / "back")["unchanged"] == len(parameters(TINY))
    shards = certificate(tmp_path / "back")["sources"][0]
    assert (shards["tag"], shards["step"]) == ("iter_0000007", 7)
    # A later save does not matter: what was read is checked.
    (tmp_path / "shards" / "latest_checkpointed_iteration.txt").write_text("9")
    assert command("--verify", tmp_path / "back") == 0
    assert command("--verify", tmp_path / "shards") == 2


def random_deepspeed(folder, sizes=TINY, steps=5):
    """As one rank of ZeRO-3 saves, and as `ds_to_universal.py` converts it."""
    shapes = {p.name: torch.Size(p.shape) for p in parameters(sizes)}
    flat = {
        kind: torch.randn(sum(shape.numel() for shape in shapes.values()))
        for kind in ("weights", "exp_avg", "exp_avg_sq")
    }
    model = {
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "buffer_names": [],
        "global_steps": steps,
    }
    weights = flat["weights"]
    state = {0: {kind: flat[kind] for kind in ("exp_avg", "exp_avg_sq")}}
    optimizer = {
        "zero_stage": 3,
        "partition_count": 1,
        "fp32_flat_groups": [weights],
        "optimizer_state_dict": {"state": state},
    }
    for tag, pointer in (("step", "latest"), ("universal", "latest_universal")):
        (folder / tag).mkdir(parents=True)
        (folder / pointer).write_text(tag)
        torch.save(model, folder / tag / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    path = folder / "step" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": optimizer}, path)
    for file, kind in {"fp32": "weights", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}.items():
        parts = flat[kind].split([shape.numel() for shape in shapes.values()])
        for name, part in zip(shapes, parts, strict=True):
            of_name = folder / "universal" / "zero" / name
            of_name.mkdir(parents=True, exist_ok=True)
            torch.save(part.clone(), of_name / f"{file}.pt")


def test_converted_checkpoints_of_deepspeed(tmp_path, capfd):
    random_deepspeed(tmp_path / "theirs")
    layout = ("--weights-only", "--run", RUN, "model.preset=vlm-tiny")
    source = (tmp_path / "theirs", *layout)
    fails(
        capfd, "say which to read with --from universal or --from", *source, "--out", tmp_path / "x"
    )
    for kind, tag in (("zero3", "step"), ("universal", "universal")):
        out = tmp_path / kind
        assert command(*source, "--from", kind, "--out", out) == 0
        assert f"{tmp_path / 'theirs'} {tag}: read at step 5" in capfd.readouterr().out
        told = certificate(out)
        assert (told["sources"][0]["tag"], told["sources"][0]["step"]) == (tag, 5)
        count = len(parameters(TINY))
        left_out = [f"{moment}/* ({count} tensors)" for moment in ("exp_avg", "exp_avg_sq")]
        assert sorted(told["left_out"]) == left_out and told["unchanged"] == count
        assert command("--verify", out) == 0
        assert f"{tmp_path / 'theirs' / tag}: {count} tensors" in capfd.readouterr().out
    assert_same(native(tmp_path / "zero3"), native(tmp_path / "universal"))
    other = (*source, "model.decoder.width=96", "--out", tmp_path / "x")
    fails(capfd, "but its sizes say", *other, "--from", "zero3")
    more = (*source, "model.encoder.layers=3", "--out", tmp_path / "x")
    fails(capfd, "the checkpoint lacks", *more, "--from", "zero3")
    needed = (*source, "--from", "megatron", "--out", tmp_path / "x")
    fails(capfd, "has no file latest_checkpointed_iteration.txt", *needed)
    shutil.rmtree(tmp_path / "theirs" / "universal")
    assert command("--verify", tmp_path / "universal") == 0
    assert "universal is not there any more: not checked" in capfd.readouterr().out


def test_what_is_left_out_is_told(tmp_path):
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    random_native(tmp_path / "ours", kinds=kinds)
    count = len(parameters(TINY))
    moments = {f"{kind}/* ({count} tensors)" for kind in kinds[1:]}
    whole = native(tmp_path / "ours")
    state = read_state(Folder(tmp_path / "ours"))
    (tmp_path / "with").mkdir()
    beside = in_memory({"beside/theirs": torch.ones(3)})
    write_native(Folder(tmp_path / "with"), whole | beside, state, max_file_bytes=10**9)

    def left_out(*arguments):
        assert command(*arguments, "--no-compare", "--out", tmp_path / "out") == 0
        told = certificate(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        return set(told["left_out"]), told["target"]["tensors"]

    ours = tmp_path / "ours"
    native_form = (ours, "--to", "native")
    assert left_out(*native_form) == left_out(*native_form, "--dtype", "fp32") == (set(), 3 * count)
    for option in (["--dtype", "bf16"], ["--weights-only"]):
        assert left_out(*native_form, *option) == (moments, count)
    assert left_out(ours, "--no-tokenizer")[0] == moments
    assert left_out(ours, ours, "--to", "native") == (moments, count)
    layout = ("--to", "megatron", "--run", RUN, "model.preset=vlm-tiny", "engine=megatron")
    found, written = left_out(tmp_path / "with", *layout, "data.row_tokens=16")
    assert (found, written) == ({"beside/theirs", *moments}, count)
    found, written = left_out(tmp_path / "with", "--to", "llama")
    no_part = {p.name for p in parameters(TINY) if p.part in (ENCODER, PROJECTOR, CROSS_LAYERS)}
    assert found == {"beside.theirs", *no_part, *moments}


def test_what_is_compared(theirs, tmp_path, monkeypatch):
    """And that the certificate is there when nothing is."""
    random_native(tmp_path / "ours")
    (tmp_path / "a place").mkdir()
    as_url = f"file://{tmp_path}/a place/llama"
    assert command(tmp_path / "ours", "--to", "llama", "--out", as_url) == 0
    told = certificate(tmp_path / "a place" / "llama")["comparison"]
    # Of logits that spread by 6.8; both models round, each in its own way. Measured: 8.6e-5.
    assert told["compared"] and told["worst_difference"] < 2e-4
    assert command("--verify", as_url) == 0

    def reason(*arguments):
        assert command(*arguments, "--out", tmp_path / "out") == 0
        assert command("--verify", tmp_path / "out") == 0
        told = certificate(tmp_path / "out")["comparison"]
        shutil.rmtree(tmp_path / "out")
        assert not told["compared"]
        return told["reason"]

    exported = ("--to", "mllama", "--no-tokenizer", "--dtype", "fp32")
    assert "both sides are Hugging Face's" in reason(theirs, *exported)
    assert "several checkpoints were merged" in reason(theirs, theirs)
    assert "a part of a model" in reason(theirs, "--decoder-only")
    assert "not asked for" in reason(theirs, "--no-compare")
    assert "our code alone" in reason(tmp_path / "ours", "--to", "native")

    def broken(*_):
        raise AttributeError("of\nanother version")

    monkeypatch.setattr(compare, "compared", broken)
    assert reason(theirs) == "it failed with AttributeError: of another version"


def test_merging_needs_one_model(tmp_path, capfd):
    decoder = TINY.decoder
    respelled = replace(decoder, cross_every=None, cross_at=decoder.cross_layers, initial_gate=0.5)
    forms = {
        "first": {},
        "respelled": {"sizes": replace(TINY, decoder=respelled), "step": 1},
        "vocabulary": {"sizes": replace(TINY, decoder=replace(decoder, vocabulary=400))},
        "bf16": {"dtype": torch.bfloat16, "step": 1},
        "second": {"step": 2},
    }
    for name, changes in forms.items():
        random_native(tmp_path / name, **changes)
    first, out = tmp_path / "first", tmp_path / "out"
    arguments = ("--to", "native", "--out")
    assert command(first, tmp_path / "respelled", *arguments, tmp_path / "mean") == 0
    for other, says in {
        "vocabulary": f"has model.decoder.vocabulary=400, {first} 512; only checkpoints of one",
        "bf16": "torch.bfloat16 in",
    }.items():
        fails(capfd, says, first, tmp_path / other, *arguments, out)
    tensors, state = native(first), read_state(Folder(first))
    extra = in_memory({"beside/theirs": torch.ones(3)})
    (tmp_path / "more").mkdir()
    write_native(Folder(tmp_path / "more"), tensors | extra, state, max_file_bytes=10**9)
    says = f"{tmp_path / 'more'} has beside.theirs and {first} has not"
    fails(capfd, says, first, tmp_path / "more", *arguments, out)
    decay = ("--ema-decay", "0.9")
    says = f"{tmp_path / 'respelled'} of step 1 comes after {tmp_path / 'second'} of step 2"
    fails(capfd, says, tmp_path / "second", tmp_path / "respelled", *decay, *arguments, out)
    assert command(first, tmp_path / "respelled", *decay, *arguments, out) == 0


def test_a_changed_target_is_found(theirs, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").symlink_to(theirs)
    assert command("theirs", "--out", "ours") == 0
    place = certificate(tmp_path / "ours")["sources"][0]["place"]
    assert place == str(tmp_path / "theirs")
    assert command("ours", "--no-tokenizer", "--no-compare", "--out", "back") == 0
    monkeypatch.chdir("/")
    assert command("--verify", tmp_path / "back") == 0
    config = tmp_path / "back" / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"rms_norm_eps"', '"rms_norm_epsilon"'))
    fails(capfd, "config.json has sha256", "--verify", tmp_path / "back")
    config.write_text(before)
    stray = tmp_path / "back" / "model-2.safetensors"
    save_file({"stray": torch.ones(1)}, stray)
    fails(capfd, "holds the tensor stray, which its certificate", "--verify", tmp_path / "back")
    stray.rename(tmp_path / "back" / "stray.bin")
    fails(capfd, "holds the file stray.bin, which its certificate", "--verify", tmp_path / "back")
    (tmp_path / "back" / "stray.bin").rename(tmp_path / "stray.bin")
    (tmp_path / "back" / "generation_config.json").unlink()
    fails(capfd, "lacks generation_config.json", "--verify", tmp_path / "back")
    told = certificate(tmp_path / "ours")
    for broken in ([], {**told, "target": 5}, {**told, "sources": [{"place": "x"}]}):
        (tmp_path / "ours" / "certificate.json").write_text(json.dumps(broken))
        fails(capfd, f"{tmp_path / 'ours'}", "--verify", tmp_path / "ours")
