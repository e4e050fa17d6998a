import json
import re
import shlex
import subprocess
from dataclasses import replace

import pytest
import yaml

import megavlm.planner.calibrate as calibrate
from megavlm.__main__ import main
from megavlm.config.deepspeed_json import deepspeed_config
from megavlm.config.load import load_plan
from megavlm.config.run import data_parallel_ranks, samples_per_micro_batch
from megavlm.dist.launch import NEW_STORE, read_hostfile
from megavlm.planner.choice import layout_name
from megavlm.planner.choice_report import _about_the_run, _in_hosts, _what_travels
from megavlm.planner.hardware import H100_80, cluster_of, load_gpu, save_gpu
from megavlm.planner.search import fastest_in, search
from megavlm.planner.zero3 import with_bucket_sizes
from tests import runs
from tests.planner import recipe

ON_TWO_HOSTS = ("--gpu", "h100-80", "--hosts", "2", "--gpus-per-host", "4")
TEXT = 64


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A terminal in which no cell needs a second line."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def run_file(tmp_path):
    """A run that is searched in no time."""
    path = tmp_path / "tiny.yaml"
    tree = yaml.safe_load(runs.RUN.read_text()) | {"model": {"preset": "vlm-tiny"}}
    tree["data"]["workers"] = 64
    path.write_text(yaml.safe_dump(tree))
    return path


def told_of(capsys, *arguments, code=0):
    assert main(["plan", *(str(argument) for argument in arguments)]) == code
    captured = capsys.readouterr()
    if code:
        assert captured.err.count("\n") == 1, captured.err
    return captured.err if code else captured.out


def rows_of(told):
    """Cells of the table of layouts."""
    table = told.partition("Predicted for")[2].partition("└")[0]
    lines = [line for line in table.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def launched(told):
    """The words of the line that trains the chosen layout, without its hostfile."""
    [line] = re.findall(r"^  (megavlm train .*) --hostfile \S+$", told, re.MULTILINE)
    return shlex.split(line)


def test_the_table_ranks_what_fits_and_shows_the_run_as_it_stands(capsys, run_file):
    told = told_of(capsys, run_file, *ON_TWO_HOSTS)
    assert "texts: 64 tokens each on average, with the prompt; --tokens-per-text sets" in told
    run = load_plan(run_file).last
    found = search(run, cluster_of("h100-80", 2, 4), TEXT)
    title = "Predicted for 2 hosts of 4 x H100 80 GB (80 GiB): the best of each layout"
    assert title in told
    *rows, own = rows_of(told)
    assert len(rows) == 12
    [chosen] = [row for row in rows if row[-1] == "chosen"]
    best = found.best
    gib = max(memory.total for memory in best.memory) / 2**30
    assert chosen == [
        *(layout_name(best.run), "1 x 4", best.run.train.recompute, f"{gib:.1f}"),
        *(f"{best.prediction.seconds:.3f}", f"{best.prediction.utilisation(best.cluster):.1%}"),
        "chosen",
    ]
    seconds = [float(row[4]) for row in rows]
    assert seconds == sorted(seconds)
    assert own[0] == "ZeRO-3 (as it stands)"
    refused = sum(found.refused.values())
    assert f"{len(found.ranked):,} layouts compared; 0 of them do not fit" in told
    assert f"{refused:,} more are refused, such as" in told
    seconds = best.prediction.seconds
    days = seconds * run.train.steps / 86_400
    assert f"{seconds:.3f} s a step, {days:.1f} days for {run.train.steps:,} steps" in told
    assert f"Chosen: {layout_name(best.run)}" in told


def test_the_lines_start_what_was_chosen(capsys, run_file):
    given = ("seed=5", "train.micro_batches=2", "engine=megatron")
    told = told_of(capsys, run_file, *ON_TWO_HOSTS, *given)
    best = search(load_plan(run_file, given).last, cluster_of("h100-80", 2, 4), TEXT).best
    command, train, path, *changes = launched(told)
    assert [command, train, path] == ["megavlm", "train", str(run_file)]
    assert load_plan(run_file, changes).last == best.run and best.run.seed == 5
    names = [change.partition("=")[0] for change in changes]
    assert len(set(names)) == len(names)
    words = shlex.join(changes)
    arguments = f"--hostfile HOSTFILE --module megavlm train {run_file} {words}"
    assert f"\n  deepspeed --log_level warning {arguments}\n" in told
    assert "replace HOSTFILE by your own; --out DIR writes a template" in told
    torchrun = "torchrun --nnodes=2 --nproc-per-node=4 --max-restarts=3 --rdzv-backend=c10d"
    assert torchrun in told and told.count(words) == 3
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True: " in told
    ours, _, yours = told.partition("Environment: `megavlm train` sets")[2].partition("and you")
    assert "OMP_NUM_THREADS=<cores of a host / 4>: " in ours and "NCCL" not in ours
    assert "NCCL_SOCKET_IFNAME: set if" in yours and "OMP" not in yours


def test_the_lines_change_the_one_stage_that_a_file_lists(capsys, tmp_path, run_file):
    """Which sets itself what the chosen layout changes."""
    tree = yaml.safe_load(run_file.read_text())
    stages = {"pairs": {"train": {"micro_batches": 4, "recompute": "full"}}}
    run_file.write_text(yaml.safe_dump(tree | {"stages": stages}))
    told = told_of(capsys, run_file, *ON_TWO_HOSTS, "--out", tmp_path / "out")
    best = search(load_plan(run_file).last, cluster_of("h100-80", 2, 4), TEXT).best
    assert load_plan(run_file, launched(told)[3:]).last == best.run


def test_a_hostfile_that_was_filled_in_stays(capsys, tmp_path, run_file):
    hostfile = tmp_path / "hostfile"
    for before, after in (
        ("a slots=4\nb slots=4\n", {"a": 4, "b": 4}),
        ("a slots=4\n", {"node-01": 4, "node-02": 4}),  # of a plan for other hosts
    ):
        hostfile.write_text(before)
        told = told_of(capsys, run_file, *ON_TWO_HOSTS, "--out", tmp_path)
        assert read_hostfile(hostfile) == after
        assert (f"wrote {hostfile}\n" in told) == ("node-01" in after)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_what_is_written(capsys, tmp_path, run_file, monkeypatch, engine):
    run = load_plan(run_file, [f"engine={engine}"]).last
    chosen = search(run, cluster_of("h100-80", 2, 4), TEXT, [engine])
    monkeypatch.setattr("megavlm.planner.choice_report.search", lambda *_, **__: chosen)
    folder = tmp_path / "new" / "out"
    folder.mkdir(parents=True)
    (folder / "deepspeed.json").write_text("of an earlier choice")
    told = told_of(capsys, run_file, *ON_TWO_HOSTS, "--out", folder, f"engine={engine}")
    names = {"step.svg", "memory.svg", "hostfile", "run.sbatch"}
    names |= {"deepspeed.json"} if engine == "zero3" else set()
    assert {path.name for path in folder.iterdir()} == names
    assert all(f"wrote {folder / name}\n" in told for name in names)
    assert told.count(f"--hostfile {folder / 'hostfile'}") == 2
    assert f"{folder / 'hostfile'} has lines such as `node-01 slots=4`: put the names" in told
    assert read_hostfile(folder / "hostfile") == {"node-01": 4, "node-02": 4}
    _, _, _, *changes = launched(told)
    assert load_plan(run_file, changes).last == chosen.best.run
    script = folder / "run.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    batch = script.read_text()
    assert shlex.join(["train", str(run_file), *changes]) in batch
    assert "#SBATCH --nodes=2\n" in batch and "#SBATCH --gpus-per-node=4\n" in batch
    for name in ("step.svg", "memory.svg"):
        picture = (folder / name).read_text()
        assert picture.startswith("<?xml") and "redicted" in picture
    if engine == "zero3":
        settings = json.loads((folder / "deepspeed.json").read_text())
        run = load_plan(run_file, changes).last
        assert settings == deepspeed_config(with_bucket_sizes(run))


def test_the_recipe_is_bound_by_communication_in_words():
    own = recipe.candidate("zero3.secondary_partition=1")
    stands, *told = _about_the_run(own, recipe.searched(), recipe.TOKENS_PER_TEXT)
    [bound] = [line for line in told if line.startswith("It is bound by communication: ")]
    remedies = told[told.index("What helps, predicted:") + 1 :]
    step = own.prediction.step
    assert f"a step is predicted to take {own.prediction.seconds:.2f} s" in stands
    assert f"{step.communication_seconds:.2f} that communication adds" in stands
    computed = 1e3 * step.compute_seconds / 8
    assert f"a rank computes for {computed:.0f} ms on the 2 samples of a micro-batch" in bound
    assert f"communication adds {1e3 * step.communication_seconds / 8:.0f} ms" in bound
    assert "each micro-batch gathers all weights anew" in bound
    names = ["packed into 1 micro-batch", "zero3.secondary_partition=8", "both", "Megatron TP"]
    assert len(remedies) == 4
    for name, told in zip(names, remedies, strict=True):
        seconds, gain = re.findall(r": (\d+\.\d\d) s a step, (\d+\.\d\d) times as fast$", told)[0]
        assert name in told and float(gain) > 1
        assert float(gain) == pytest.approx(own.prediction.seconds / float(seconds), abs=0.1)


def test_a_run_that_is_not_bound_is_told_no_remedy():
    best = recipe.searched().best
    assert len(_about_the_run(best, recipe.searched(), recipe.TOKENS_PER_TEXT)) == 1
    slow = replace(best, prediction=best.prediction._replace(data_seconds=9.0))
    told = _about_the_run(slow, recipe.searched(), recipe.TOKENS_PER_TEXT)
    assert told[1] == "It is bound by loading: raise data.workers."
    assert not any(line.startswith("It is bound by communication") for line in told)


def test_hosts_have_room_for_the_stage_that_offloads_most():
    offloaded = ("zero3.offload_optimizer=cpu", "zero3.secondary_partition=1")
    frozen = recipe.candidate(*offloaded, "train.frozen=[encoder, decoder]")
    whole = recipe.candidate(*offloaded)
    [of_frozen], [of_whole] = _in_hosts(frozen), _in_hosts(whole)
    assert of_frozen != of_whole == "Each host is predicted to hold 35 GiB of what is offloaded"
    assert _in_hosts(replace(frozen, other_stages={"chats": whole})) == [of_whole]
    assert _in_hosts(replace(whole, other_stages={"pairs": frozen})) == [of_whole]


def test_a_run_that_does_not_divide_as_it_stands_is_planned_all_the_same(capsys, run_file):
    told = told_of(capsys, run_file, *ON_TWO_HOSTS, "train.micro_batches=16")
    says = "As it stands, it is not compared: train.samples_per_step=32 is not divisible by"
    assert says in told and "(as it stands)" not in told
    assert load_plan(run_file, launched(told)[3:]).last.train.micro_batches == 1


def test_a_batch_that_keeps_layouts_out_is_told_with_its_neighbours(capsys, run_file):
    batch = ("train.samples_per_step=36", "train.micro_batches=1")
    told = told_of(capsys, run_file, *ON_TWO_HOSTS, "megatron.tensor_parallel=2", *batch)
    assert "samples_per_step=36 does not divide among 8 GPUs, so that ZeRO-3, FSDP2" in told
    assert "are out; compare with 32 or 40\n" in told
    assert "does not divide among" not in told_of(capsys, run_file, *ON_TWO_HOSTS)


def test_the_longest_stage_is_planned_and_all_are_told_and_can_run(capsys, run_file):
    tree = yaml.safe_load(run_file.read_text())
    # 4 samples a step: at most 4 copies of the model on 8 GPUs.
    few = {"steps": 10, "micro_batches": 4, "samples_per_step": 4, "recompute": "full"}
    stages = {
        "start": {"objectives": {"mim": 1}, "train": {"steps": 9000}},
        "pairs": {"train": {"steps": 1000, "micro_batches": 4}},
        "chats": {"objectives": {"instruction": 1}, "train": few},
    }
    run_file.write_text(yaml.safe_dump(tree | {"stages": stages}, sort_keys=False))
    told = told_of(capsys, run_file, *ON_TWO_HOSTS)
    changes = launched(told)[3:]
    assert len(set(changes)) == len(changes)
    assert {"stages.pairs.train.micro_batches=1", "stages.chats.train.recompute=none"} <= {*changes}
    assert not any(change.startswith("stages.start.") for change in changes)
    plan = load_plan(run_file, changes)
    for stage in plan.stages:
        samples_per_micro_batch(stage.run.train, data_parallel_ranks(stage.run, 8))
    before, cluster = load_plan(run_file), cluster_of("h100-80", 2, 4)
    start, pairs, chats = before.stages
    best = search(pairs.run, cluster, TEXT, other_stages=[start, chats]).best
    other = fastest_in(best.run, chats.run, cluster, TEXT)
    assert [stage.run for stage in plan.stages[1:]] == [best.run, other.run]
    [shown] = [row for row in rows_of(told) if row[-1] == "chosen"]
    assert shown[3] == f"{max(best.fullest.total, other.fullest.total) / 2**30:.1f}"
    says = "stages: pairs is planned, the longest that is predicted; start is checked to divide "
    assert f"{says}only; chats is checked to divide and to fit" in told
    for name, candidate, steps in (("pairs", best, "1,000"), ("chats", other, "10")):
        seconds = re.escape(f"{candidate.prediction.seconds:.3f} s a step, ")
        assert re.search(rf"^  {name}: .*{seconds}.* days for {steps} steps$", told, re.MULTILINE)
    assert "\n  start: not predicted\n" in told and "the prompt, in every stage; " in told


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--hosts", "2"),
            "--hosts compares layouts; name a --gpu, too",
        ),
        (
            ("--out", "x", "--hosts", "2"),
            "--hosts and --out compare layouts; name a --gpu, too",
        ),
        (
            (*ON_TWO_HOSTS, "--tokens-per-text", "65"),
            "--tokens-per-text 65 is more than data.row_tokens=64, which a text must fit in",
        ),
        ((*ON_TWO_HOSTS, "--calibrate", "here"), "--calibrate here must end in .json"),
        ((*ON_TWO_HOSTS, "--picture", "a.svg"), "engine=zero3 has no stages to draw"),
        (("--gpu", "v100"), "--gpu v100 is unknown; choose from a100-40, a100-80, h100-80, h200"),
        (("--gpu", "none.json"), "cannot read GPU file none.json"),
        (
            (*ON_TWO_HOSTS, "objectives={mim: 1}"),
            "a stage of mim is not predicted; plan one of captioning or instruction",
        ),
        (
            (*ON_TWO_HOSTS[:3], "7", *ON_TWO_HOSTS[4:]),
            "no layout divides: train.samples_per_step=32 is not divisible by",
        ),
    ],
)
def test_mistakes(capsys, run_file, options, says):
    assert says in told_of(capsys, run_file, *options, code=2)


@pytest.mark.parametrize(
    "options",
    [("--gpu", "v100"), (*ON_TWO_HOSTS, "--picture", "a.svg"), (*ON_TWO_HOSTS, "--out", __file__)],
)
def test_mistakes_are_told_before_the_search(capsys, run_file, monkeypatch, options):
    monkeypatch.setattr("megavlm.planner.choice_report.search", lambda *_, **__: pytest.fail())
    told_of(capsys, run_file, *options, code=2)


@pytest.mark.parametrize("options", [("--hosts", "2"), ("--gpu", "h200", "--hostfile", "none")])
def test_a_wrong_option_leaves_no_file(capsys, tmp_path, run_file, options):
    before = {*tmp_path.iterdir()}
    written = ("--ds-json", tmp_path / "ds.json", "--picture", tmp_path / "a.svg")
    arguments = ("engine=megatron", *written, "--out", tmp_path / "out", *options)
    told_of(capsys, run_file, *arguments, code=2)
    assert {*tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--hosts", "two"), "argument --hosts: two is not a whole number of at least 1"),
        (("--host", "2"), "unknown option --host"),
    ],
)
def test_words_that_are_no_options(capsys, run_file, option, says):
    with pytest.raises(SystemExit):
        main(["plan", str(run_file), "--gpu", "h200", *option])
    assert says in capsys.readouterr().err


def test_one_host_starts_its_own_ranks(capsys, run_file):
    told = told_of(capsys, run_file, "--gpu", "H200", "--gpus-per-host", "4")
    assert "starts all ranks where it is typed, whatever the hostfile calls that machine" in told
    assert (
        f"\nor on node-01:\n  {NEW_STORE} torchrun --nnodes=1 " in told
        and "on every host" not in told
    )


def test_a_file_in_place_of_the_folder(capsys, run_file):
    told = told_of(capsys, run_file, *ON_TWO_HOSTS, "--out", str(run_file), code=2)
    assert f"cannot write to {run_file}: " in told and "choose another --out" in told


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("a slots=4\nb slots=4\n", ("--hosts", "3"), ": 2, and the plan is for 3"),
        ("a slots=4\nb slots=4\n", ("--gpus-per-host", "2"), "host a has slots=4"),
        (
            "a slots=4\nb slots=2\nc slots=2\n",
            (),
            "GPUs a host; leave the odd hosts out: --gpu compares equal hosts only",
        ),
    ],
)
def test_a_hostfile_that_differs(capsys, tmp_path, run_file, text, options, says):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(text)
    arguments = ("--gpu", "h200", "--hostfile", hostfile, *options)
    assert says in told_of(capsys, run_file, *arguments, code=2)


def test_a_hostfile_tells_the_hosts(capsys, tmp_path, run_file):
    hostfile, folder = tmp_path / "hosts", tmp_path / "out"
    hostfile.write_text("a slots=4\nb slots=4\n")
    # It would not divide over these hosts as it stands, and is planned all the same.
    arguments = ("train.micro_batches=16", "--gpu", "h200", "--out", folder)
    told = told_of(capsys, run_file, *arguments, "--hostfile", hostfile)
    assert "Predicted for 2 hosts of 4 x H200 141 GB (141 GiB)" in told
    assert told.count(f" --hostfile {hostfile}") == 2 and "has lines such as" not in told
    assert "--rdzv-endpoint=a:" in told and "node-01" not in told
    assert not (folder / "hostfile").exists()
    same = told_of(capsys, run_file, *arguments[:3], "--hosts", "2", "--gpus-per-host", "4")
    assert rows_of(told) == rows_of(same)
    assert told.partition("Predicted")[0] == same.partition("Predicted")[0]


def test_where_nothing_fits_what_is_smallest_is_shown(capsys, tmp_path, run_file):
    small = tmp_path / "small.json"
    save_gpu(replace(H100_80, memory_bytes=2**30), small)
    options = ("plan", run_file, "--gpu", small, *ON_TWO_HOSTS[2:])
    assert main([str(option) for option in options]) == 2
    captured = capsys.readouterr()
    assert "none fits; the smallest of each layout" in captured.out
    *rows, own = rows_of(captured.out)
    sizes = [float(row[3]) for row in rows]
    assert len(rows) == 12 and sizes == sorted(sizes)
    assert all(row[-1].startswith("does not fit: ") for row in [*rows, own])
    assert "As it stands, it does not fit: the fullest GPU would hold 2." in captured.out
    assert "a plan fills at most 93% of 1 GiB\nHad it room, a step is predicted" in captured.out
    assert "Chosen" not in captured.out and "the chosen one" not in captured.out
    assert captured.err.startswith("megavlm: error: no layout fits 8 x ")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), "forward and backward, and reduces all gradients"),
        (
            ("zero3.secondary_partition=8", "train.frozen=[encoder, decoder]"),
            "forward and backward where gradients pass (among 8 neighbours, but for a step's first "
            "forward pass), and reduces the gradients of projector, cross attention",
        ),
        (("engine=megatron",), "copies of the model exchange gradients and weights"),
        (
            ("engine=megatron", "megatron.tensor_parallel=2"),
            "tensor-parallel ranks exchange every layer's activations",
        ),
    ],
)
def test_what_travels(run_file, overrides, says):
    assert says in _what_travels(load_plan(run_file, overrides).last)


def test_a_measured_machine_is_used_and_used_again(capsys, tmp_path, run_file, monkeypatch):
    slower = replace(H100_80, name="slower", launch_seconds=1e-4)
    asked = []

    def measure(*arguments):
        asked.append(arguments)
        return slower

    monkeypatch.setattr(calibrate, "measure", measure)
    path = tmp_path / "here.json"
    first = told_of(capsys, run_file, *ON_TWO_HOSTS, "--calibrate", path)
    assert asked == [(H100_80, 4, "fp32")]
    assert f"wrote {path}" in first and load_gpu(path) == slower
    again = told_of(capsys, run_file, "--gpu", path, *ON_TWO_HOSTS[2:])
    assert len(asked) == 1 and "x slower (80 GiB)" in again
    assert rows_of(again) == rows_of(first) != rows_of(told_of(capsys, run_file, *ON_TWO_HOSTS))
