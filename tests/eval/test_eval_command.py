"""From training to results by the command line."""

import json
from dataclasses import replace

import pytest
import yaml

from megavlm.__main__ import main
from megavlm.config.load import run_as_tree
from tests.eval import published
from tests.ranks import run_on_ranks


def command(ranks, *arguments):
    """Run a command on so many ranks; returns the exit codes."""
    return run_on_ranks(ranks, lambda _: main(list(map(str, arguments))), groups=False)


@pytest.mark.slow
def test_every_benchmark_of_a_trained_run(tiny_run, tmp_path, capfd):
    tree = run_as_tree(replace(tiny_run, engine="fsdp2"))
    tree["train"]["steps"] = 2
    tree["stages"] = {
        "towers": {"objectives": {"contrastive": 1.0}},
        "chats": {"objectives": {"instruction": 1.0}},
    }
    del tree["objectives"]
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert command(1, "train", run_file) == [0]

    writes = {
        "coco_captions": lambda folder: published.write_coco(folder, 5),
        "flickr30k": lambda folder: published.write_karpathy(folder, "flickr30k", 9),
        "vqav2": lambda folder: published.write_vqa(folder, 5),
        "okvqa": lambda folder: published.write_vqa(folder, 5, prefix=""),
        "vqav2_test_dev": lambda folder: published.write_vqa_test(folder, 5),
        "textvqa": lambda folder: published.write_textvqa(folder, 5),
        "imagenet": lambda folder: published.write_imagenet(folder, 6, 1),
    }
    named = {}
    for name, write in writes.items():
        write(tmp_path / name)
        named[name] = ("--benchmark", f"{name}={tmp_path / name}")
    written = [word for name in writes if name != "imagenet" for word in named[name]]
    assert command(2, "eval", run_file, *written) == [0, 0]
    found = [word for name in ("flickr30k", "imagenet") for word in named[name]]
    assert command(2, "eval", run_file, *found, "--stage", "towers", "--limit", 3) == [0, 0]
    results = tmp_path.glob("run/benchmarks/*/step-*/*/results.json")
    shown = [json.loads(path.read_text()) for path in results]
    assert {(each["stage"], each["benchmark"], each["step"]) for each in shown} == {
        *(("chats", name, 4) for name in writes if name != "imagenet"),
        *(("towers", name, 2) for name in ("flickr30k", "imagenet")),
    }
    assert all(0 <= row["model"] <= 10 for each in shown for row in each["scores"])
    assert "towers, step 2" in capfd.readouterr().out
    together = ("--tensor-parallel", 2, "--limit", 3, "--batch-size", 2)
    assert command(2, "eval", run_file, *named["okvqa"], *together) == [0, 0]
    [path] = tmp_path.glob("run/benchmarks/chats/step-00000004/okvqa-limit-3/submission.json")
    assert len(json.loads(path.read_text())) == 3
    assert command(2, "eval", run_file, *found, "--stage", "towers", *together) == [2, 2]
    assert "--tensor-parallel=2 divides language models, and stage towers" in capfd.readouterr().err
    assert command(1, "eval", run_file, *named["imagenet"]) == [2]
    assert "imagenet needs a stage of contrastive, and stage chats" in capfd.readouterr().err
    assert command(1, "eval", run_file, "--stage", "chat") == [2]
    assert "the run has no stage chat; it has towers, chats" in capfd.readouterr().err
