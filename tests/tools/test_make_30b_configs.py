"""The presets for 30.5 billion parameters are what the planner chooses now."""

import re
from pathlib import Path

import pytest

from megavlm.__main__ import main
from megavlm.config.load import load_plan
from megavlm.dist.launch import read_hostfile
from megavlm.planner.hardware import GPUS, cluster_of
from megavlm.planner.search import candidate_of
from tools.make_30b_configs import CONFIGS, ENGINES, GPUS_PER_HOST, HOSTS, files_of

HOSTFILE = CONFIGS / "30b" / "hostfile.example"


def check_files(gpu, engine):
    files = dict(files_of(gpu, engine))
    assert len(files) == 1 + (engine == "zero3")
    for path, text in files.items():
        assert (CONFIGS / path).read_text() == text, f"{path} is stale; run `make configs`"


def test_fsdp2_on_h100_is_what_the_planner_chooses():
    check_files("h100-80", "fsdp2")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gpu", GPUS)
def test_every_preset_is_what_the_planner_chooses(gpu, engine):
    check_files(gpu, engine)


def test_there_is_a_preset_for_every_gpu_and_engine_and_no_other():
    names = {f"{engine}-{gpu}.yaml" for engine in ENGINES for gpu in GPUS}
    assert {path.name for path in (CONFIGS / "30b").iterdir()} == {*names, "hostfile.example"}
    found = {path.name for path in (CONFIGS / "ds").glob("zero3_30b_*")}
    assert found == {f"zero3_30b_{gpu}.json" for gpu in GPUS}


@pytest.mark.parametrize("path", sorted((CONFIGS / "30b").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_runs_on_its_hosts_and_fits(path, capsys):
    assert main(["plan", str(path), "--hostfile", str(HOSTFILE)]) == 0
    assert f"deepspeed --log_level warning --hostfile {HOSTFILE}" in capsys.readouterr().out
    slots = read_hostfile(HOSTFILE)
    assert len(slots) == HOSTS and set(slots.values()) == {GPUS_PER_HOST}
    engine, _, gpu = path.stem.partition("-")
    run = load_plan(path).last
    assert run.engine == engine and run.run_folder == Path("runs/30b") / path.stem
    candidate = candidate_of(run, cluster_of(gpu, HOSTS, GPUS_PER_HOST), 64)
    assert candidate.fits and not candidate.rounds
    # The recipe itself is vlm-30b.yaml's.
    recipe = load_plan(CONFIGS / "vlm-30b.yaml").last
    for name in ("model", "data", "optimizer", "checkpoint", "objectives", "seed"):
        assert getattr(run, name) == getattr(recipe, name), name
    assert run.train.samples_per_step == recipe.train.samples_per_step
    # What its first lines say.
    count = run.train.micro_batches
    differs = f"# Micro-batches: {count}, where the recipe" in path.read_text()
    assert differs == (count != recipe.train.micro_batches)
    told = re.search(r"Predicted: (\S+) s a step, .* utilisation (\d+)%", path.read_text())
    prediction = candidate.prediction
    # And docs/parallelism.md after them.
    table = (CONFIGS.parent / "docs" / "parallelism.md").read_text()
    [row] = [line for line in table.splitlines() if line.startswith(f"| `{gpu}` |")]
    assert row.split("|")[2 + ENGINES.index(engine)].split(",")[0].strip() == told[1]
    assert float(told[1]) == pytest.approx(prediction.seconds, abs=0.006)
    assert float(told[2]) == pytest.approx(
        100 * prediction.utilisation(candidate.cluster), abs=0.51
    )
