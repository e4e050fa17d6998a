"""What `megavlm convert` refuses: in one line, and with nothing written."""

import json
import resource
import signal
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from megavlm.__main__ import main
from megavlm.checkpoint.lazy import in_memory
from megavlm.convert import sources
from megavlm.convert.files import write_native
from megavlm.errors import StorageError
from megavlm.files.folder import Folder
from megavlm.model.params import encoder_parameters
from tests.batches import TINY
from tests.convert.commands import certificate, command, fails, random_native
from tests.ranks import run_on_ranks
from tests.runs import RUN


def test_mistakes_are_told(tmp_path, capfd):
    ours, out = tmp_path / "ours", tmp_path / "out"
    random_native(ours)
    (tmp_path / "empty").mkdir()
    fails(capfd, "name the checkpoint to convert, and with --out a new folder", ours)
    fails(capfd, "does not exist, or is empty", tmp_path / "empty", "--out", out)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("nothing")
    fails(capfd, "holds neither our state.json nor", tmp_path / "notes", "--out", out)
    (tmp_path / "notes" / "step-00000007").mkdir()
    fails(capfd, "name one, such as step-00000007", tmp_path / "notes", "--out", out)
    fails(capfd, "is not empty; choose another folder", ours, "--out", ours)
    fails(capfd, "which has them, with --run", ours, "--out", out, "--to", "megatron")
    other = replace(TINY, decoder=replace(TINY.decoder, vocabulary=400))
    random_native(tmp_path / "other", sizes=other)
    weights = ("--no-tokenizer", "--out", out)
    fails(capfd, "only checkpoints of one model", ours, tmp_path / "other", *weights)
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
    fails(capfd, f"{file.name} is corrupt", ours, *weights)
    assert not out.exists()


def test_no_source_and_no_option_is_dropped(tmp_path, capfd):
    places = [tmp_path / str(i) for i in range(3)]
    for i, place in enumerate(places):
        random_native(place, seed=i, step=i)
    first, out = places[0], tmp_path / "out"
    assert command(first, "--to", "native", *places[1:], "--out", out) == 0
    assert [source["step"] for source in certificate(out)["sources"]] == [0, 1, 2]
    out = tmp_path / "other"
    one, to = (first, "--out", out), ("--to", "native")
    fails(capfd, "seed=1 changes a run file; name one with --run", *one, *to, "seed=1")
    fails(capfd, "--decoder-only takes the language half of an Mllama", *one, "--decoder-only")
    fails(capfd, "--ema-decay=0.9 merges several checkpoints", *one, "--ema-decay", "0.9")
    for decay in ("0", "1.5", "nan", "-1"):
        says = f"--ema-decay={float(decay)} must lie between 0 and 1"
        fails(capfd, says, *one, places[1], f"--ema-decay={decay}", *to)
    for size in ("0", "-1", "nan", "inf"):
        says = f"--max-file-gb={float(size)} must be above 0"
        fails(capfd, says, *one, f"--max-file-gb={size}")
    fails(capfd, "has no file latest, which --from zero3 needs", *one, "--from", "zero3")
    fails(capfd, "knows its sources from its certificate", "--verify", *one)
    with pytest.raises(SystemExit):
        main(["convert", *map(str, one), "--ema_decay", "0.9"])
    assert not out.exists()


def test_a_full_disk_leaves_nothing(tmp_path, capfd):
    random_native(tmp_path / "ours")
    out = tmp_path / "out"
    arguments = ["convert", str(tmp_path / "ours"), "--to", "native", "--out", str(out)]
    layout = ["--to", "megatron", "--run", str(RUN), "model.preset=vlm-tiny"]
    megatron = [*arguments, *layout, "engine=megatron", "data.row_tokens=16"]

    def with_full_disk(given):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        try:
            return main(given)
        finally:  # the result travels through a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    for given in (arguments, megatron):
        assert run_on_ranks(1, lambda _, given=given: with_full_disk(given), groups=False) == [2]
        told = capfd.readouterr().err
        assert "File too large" in told and told.count("\n") == 1
        assert "again" in told and "earlier checkpoints" not in told, told
        assert not out.exists()
    out.mkdir()  # it was there before
    assert run_on_ranks(1, lambda _: with_full_disk(arguments), groups=False) == [2]
    assert out.exists() and not list(out.iterdir())
    assert command(tmp_path / "ours", "--to", "native", "--out", out) == 0


def test_an_unwritable_target_is_told_before_sources_are_read(tmp_path, capfd, monkeypatch):
    random_native(tmp_path / "ours")

    def unwritable(folder, name, content):
        raise StorageError(f"cannot write {folder}/{name}") from PermissionError(13, "denied")

    def unread(*_):
        raise AssertionError("read though its target is not writable")

    monkeypatch.setattr(Folder, "write_atomically", unwritable)
    monkeypatch.setattr(sources, "check_files", unread)
    says = f"cannot write to {tmp_path / 'out'}: denied; free space or permit writing there, or"
    fails(capfd, says, tmp_path / "ours", "--no-tokenizer", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"model_type": ["mllama"]}'),
        ("config.json", '{"model_type": "bert"}'),
        ("config.json", '{"model_type": "mllama", "text_config": 5}'),
        ("config.json", '{"model_type": "mllama", "text_config": {"hidden_size": "big"}}'),
        ("config.json", '{"model_type": "mllama", "text_config": {"num_attention_heads": 0}}'),
        ("config.json", '{"model_type": "mllama", "text_config": {"cross_attention_layers": {}}}'),
        ("config.json", '{"model_type": "mllama", "vision_config": [1]}'),
        ("config.json", '{"model_type": "clip", "vision_config": {"image_size": []}}'),
        ("config.json", '{"model_type": "clip", "vision_config": {"hidden_size": null}}'),
        ("config.json", '{"model_type": "clip", "vision_config": {"hidden_act": {}}}'),
        ("config.json", '{"model_type": "llama", "rope_scaling": 3}'),
        ("config.json", '{"model_type": "llama", "rope_theta": 1e999}'),
        ("config.json", '{"model_type": "llama", "vocab_size": "all"}'),
        ("config.json", '{"a": ' * 100_000),
        ("config.json", '{"a": \xff}'),
        ("model.safetensors.index.json", '{"weight_map": [1]}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": {"b": "c"}}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../model.safetensors"}}'),
        ("model.safetensors.index.json", "{}"),
        ("preprocessor_config.json", '{"image_mean": 5}'),
        ("preprocessor_config.json", '{"image_std": [1, 2]}'),
        ("state.json", '{"format": 2}'),
        ("state.json", '{"format": 2, "step": 0, "tensors": {}, "files": {}, "settings": []}'),
    ],
)
def test_hostile_json_is_one_error(tmp_path, capfd, name, content):
    source, out = tmp_path / "theirs", tmp_path / "out"
    source.mkdir()
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "image_size": 64}
    config = {"model_type": "clip", "vision_config": sizes | {"num_attention_heads": 1}}
    (source / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, source / "model.safetensors")
    (source / name).write_text(content)
    fails(capfd, str(source), source, "--run", RUN, "--out", out)
    assert not out.exists()


def test_errors_name_folder_and_what_is_supported(tmp_path, capfd):
    source, out = tmp_path / "theirs", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "bert"}')
    known = "converted are mllama, llama, mistral, clip, clip_vision_model, siglip"
    fails(capfd, f"{source} has model_type=bert; {known}", source, "--out", out)
    save_file({"a": torch.ones(1)}, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "mllama"}')
    fails(capfd, f"{source}: num_global_layers=8 must be 0", source, "--out", out)
    (source / "config.json").write_text('{"model_type": "llama", "hidden_act": "gelu"}')
    fails(capfd, f"{source}: hidden_act=gelu must be", source, "--out", out, "--run", RUN)
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    tensors = {f"weights/{p.name}": torch.ones(p.shape) for p in encoder_parameters(TINY.encoder)}
    state = {"step": 0, "settings": {"model": {"encoder": asdict(TINY.encoder)}}}
    write_native(Folder(encoder), in_memory(tensors), state, max_file_bytes=10**9)
    whole = (encoder, "--no-tokenizer", "--out", out)
    fails(capfd, f"{encoder}: the checkpoint holds the encoder only", *whole)
    fails(capfd, f"{encoder}: the checkpoint holds no decoder", encoder, "--to=llama", "--out", out)
