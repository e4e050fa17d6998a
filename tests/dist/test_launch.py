from pathlib import Path

import pytest

from megavlm.config.load import load_plan
from megavlm.dist.launch import launch_command, ranks_of, read_hostfile
from megavlm.errors import LaunchError

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


def test_command_line(tmp_path):
    path = write(tmp_path, "node-1 slots=8\nnode-2 slots=8\n")
    command = launch_command(path, Path("run.yaml"), ["train.steps=2"])
    assert command[0] == "deepspeed"
    assert " ".join(command).endswith(
        f"--hostfile {path} --module megavlm train run.yaml train.steps=2"
    )


def test_one_local_host_needs_no_ssh(tmp_path):
    command = launch_command(write(tmp_path, "localhost slots=2\n"), Path("run.yaml"), [])
    assert "--no_ssh_check" in command and "127.0.0.1" in command
