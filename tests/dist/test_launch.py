import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megavlm.config.load import load_plan
from megavlm.dist.groups import world_group
from megavlm.dist.launch import (
    check_planned,
    environment,
    launch_command,
    ranks_of,
    read_hostfile,
    sbatch_script,
    set_environment,
    NEW_STORE,
    torchrun_lines,
)
from megavlm.errors import LaunchError
from tests.ranks import run_on_ranks

CONFIGS = Path(__file__).parents[2] / "configs"


def write(tmp_path, text):
    path = tmp_path / "hostfile"
    path.write_text(text)
    return path


def test_reads_hosts_in_order(tmp_path):
    path = write(tmp_path, "# the cluster\nb slots=8\n\na slots=4  # half a host\n")
    assert list(read_hostfile(path).items()) == [("b", 8), ("a", 4)]


def test_the_example_is_16_hosts_of_8():
    hosts = read_hostfile(CONFIGS / "hostfile.example")
    assert sum(hosts.values()) == 128 and len(hosts) == 16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a slots=8\nb slots=8\na slots=8\n", "hostfile:3: host a is listed twice"),
        ("a\n", "hostfile:1: 'a' is not of the form"),
        ("a slots=many\n", "is not of the form"),
        ("a slots=0\n", "host a has slots=0"),
        ("# nothing\n", "names no host"),
    ],
)
def test_mistakes(tmp_path, text, says):
    with pytest.raises(LaunchError) as caught:
        read_hostfile(write(tmp_path, text))
    assert says in str(caught.value)


def test_missing_hostfile(tmp_path):
    with pytest.raises(LaunchError, match="cannot read hostfile"):
        read_hostfile(tmp_path / "none")


def test_tensor_parallel_ranks_share_a_host(tmp_path):
    tensor_4 = ["megatron.tensor_parallel=4", "train.samples_per_step=1536"]
    plan = load_plan(CONFIGS / "vlm-30b.yaml", ["engine=megatron", *tensor_4])
    assert ranks_of(plan, write(tmp_path, "a slots=4\nb slots=8\n")) == 12
    path = write(tmp_path, "a slots=8\nb slots=6\nc slots=10\n")
    with pytest.raises(LaunchError) as caught:
        ranks_of(plan, path)
    assert str(caught.value) == (
        "host b has slots=6, not a multiple of megatron.tensor_parallel=4, whose ranks "
        "must share a host; change its slots, or try megatron.tensor_parallel in [1, 2]"
    )
    # ZeRO-3 splits no matrix, but gathers from a secondary partition all the time.
    plan = load_plan(CONFIGS / "vlm-30b.yaml", ["zero3.secondary_partition=1", *tensor_4])
    assert ranks_of(plan, path) == 24
    plan = load_plan(CONFIGS / "vlm-30b.yaml", ["zero3.secondary_partition=4", *tensor_4])
    with pytest.raises(LaunchError, match=r"host b has slots=6, .* zero3.secondary_partition=4"):
        ranks_of(plan, path)


def test_shards_of_fsdp2_lie_on_one_host_or_on_whole_ones(tmp_path):
    def ranks(shard_ranks, *slots):
        text = "".join(f"host{n} slots={count}\n" for n, count in enumerate(slots))
        overrides = ["engine=fsdp2", f"fsdp2.shard_ranks={shard_ranks}", "train.micro_batches=1"]
        overrides.append(f"train.samples_per_step={sum(slots)}")
        return ranks_of(load_plan(CONFIGS / "vlm-30b.yaml", overrides), write(tmp_path, text))

    assert ranks(4, 8, 4) == 12
    assert ranks(16, 8, 8, 8, 8) == 32
    assert ranks(12, 8, 4) == 12  # all ranks: not hybrid
    assert ranks("null", 8, 3) == 11
    for shard_ranks, slots in ((4, (6, 6)), (12, (8, 8, 8)), (8, (4, 8, 4)), (6, (4, 8))):
        with pytest.raises(LaunchError) as caught:
            ranks(shard_ranks, *slots)
        wrong = next(n for n, count in enumerate(slots) if count % shard_ranks)
        assert str(caught.value).startswith(
            f"host host{wrong} has slots={slots[wrong]}, not a multiple of fsdp2.shard_ranks="
            f"{shard_ranks}, whose ranks must share a host or fill several of equal slots; "
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a slots=8\nb slots=8\n", None),
        ("a slots=8\nb slots=4\n", "host b has slots=4 in .* and the plan is for 8 GPUs a host"),
        ("a slots=8\n", "hosts in .*: 1, and the plan is for 2; .* plan with --hosts 1"),
    ],
)
def test_a_hostfile_is_the_one_that_was_planned_for(tmp_path, text, says):
    path = write(tmp_path, text)
    if says is None:
        check_planned(path, hosts=2, gpus_per_host=8)
    else:
        with pytest.raises(LaunchError, match=says):
            check_planned(path, hosts=2, gpus_per_host=8)


def test_command_line(tmp_path):
    path = write(tmp_path, "node-1 slots=8\nnode-2 slots=8\n")
    command = launch_command(path, read_hostfile(path), Path("run.yaml"), ["train.steps=2"])
    assert command[0] == "deepspeed"
    assert " ".join(command).endswith(
        f"--hostfile {path} --module megavlm train run.yaml train.steps=2"
    )


def test_one_local_host_needs_no_ssh(tmp_path):
    command = launch_command(tmp_path / "hostfile", ["localhost"], Path("run.yaml"), [])
    assert "--no_ssh_check" in command and "127.0.0.1" in command


AWKWARD = [
    'data.augment={"minimum_area":0.5,"operations":2}',
    "data.train=[{folder: a b, parts: 2}, c]",
    'run_folder=$HOME\'s \\ `x` "y"',
    "a=$HOME;'x'",
]


def test_the_shells_of_the_hosts_change_no_word(tmp_path):
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    command = launch_command(tmp_path / "hostfile", "ab", Path("my run.yaml"), AWKWARD)
    words = " ".join(PDSHRunner(parse_args(command[1:]), "").user_arguments)
    read = subprocess.check_output(["bash", "-c", f"printf '%s\\n' {words}"], text=True)
    assert read.splitlines() == ["train", "my run.yaml", *AWKWARD]


def test_torchrun_has_a_line_for_each_host():
    lines = torchrun_lines({"a": 8, "b": 4}, Path("my run.yaml"), AWKWARD)
    assert list(lines) == ["a", "b"]
    setting, program, *words = shlex.split(lines["b"])
    options = get_args_parser().parse_args(words)
    assert setting == NEW_STORE and options.max_restarts == "3" or options.max_restarts == 3
    assert program == "torchrun" and options.module and options.training_script == "megavlm"
    assert (options.nnodes, options.nproc_per_node) == ("2", "4")
    assert (options.rdzv_backend, options.rdzv_endpoint) == ("c10d", "a:29500")
    assert options.training_script_args == ["train", "my run.yaml", *AWKWARD]
    assert lines["a"] == lines["b"].replace("--nproc-per-node=4", "--nproc-per-node=8")


def test_batch_script(tmp_path):
    run_file = CONFIGS / "vlm-30b-megatron.yaml"
    plan = load_plan(run_file, ["data.workers=3"])
    script = sbatch_script(plan, 16, 8, run_file, ["data.workers=3", *AWKWARD])
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in script.splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["nodes"] == "16" and options["ntasks-per-node"] == "1"
    assert options["gpus-per-node"] == "8" and options["cpus-per-task"] == "32"
    assert options["signal"] == "B:USR1@300" and {"exclusive", "requeue"} <= set(options)
    assert "\nexport CUDA_DEVICE_MAX_CONNECTIONS=1\n" in script
    # What torchrun gets, by a shell that starts words for it instead.
    words = script.partition("  torchrun ")[2].partition(" &\n")[0]
    variables = {"SLURM_JOB_NUM_NODES": "16", "first_host": "a", "SLURM_JOB_ID": "17"}
    echo = ["bash", "-c", f"printf '%s\\n' {words}"]
    read = subprocess.check_output(echo, text=True, env={**os.environ, **variables}).splitlines()
    options = get_args_parser().parse_args(read)
    assert (options.nnodes, options.rdzv_endpoint, options.rdzv_id) == ("16", "a:29500", "17")
    assert options.training_script_args == ["train", str(run_file), "data.workers=3", *AWKWARD]


def values(overrides, config="vlm-30b-megatron.yaml"):
    run = load_plan(CONFIGS / config, overrides).first
    return {v.name: v.value for v in environment(run, "9")}


def test_environment_of_a_run():
    assert values([])["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in values(["megatron={}"])
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in values(["engine=fsdp2"])
    assert values([], "vlm-30b.yaml")["OMP_NUM_THREADS"] == "9"


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(os, "environ", {"CUDA_DEVICE_MAX_CONNECTIONS": "8"})
    set_environment(load_plan(CONFIGS / "vlm-30b-megatron.yaml", []).first)
    assert os.environ == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_FR_BUFFER_SIZE": "2000",
    }


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_ranks_share_the_cores_of_their_host(monkeypatch, name):
    run = load_plan(CONFIGS / "vlm-30b.yaml", []).first
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    for ranks, threads in ((1, None), (4, "3"), (24, "1")):
        monkeypatch.setattr(os, "environ", {name: str(ranks)})
        set_environment(run)
        assert os.environ.get("OMP_NUM_THREADS") == threads


def test_a_port_that_is_taken(monkeypatch):
    def start(_):
        with socket.socket() as other:
            other.bind(("0.0.0.0", 0))
            other.listen()
            port = other.getsockname()[1]
            os.environ["MASTER_PORT"] = str(port)
            with pytest.raises(LaunchError) as caught, world_group():
                pass
        return port, str(caught.value)

    [(port, says)] = run_on_ranks(1, start, groups=False)
    assert says.startswith(f"the ranks cannot meet at 127.0.0.1:{port}, see docs/launching.md: ")
    assert "EADDRINUSE" in says and "\n" not in says
