"""Each launcher on two hosts, which are this machine twice: the run is that of one host."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Forked ranks shall find it imported.
import megavlm.train.loop  # noqa: F401
from megavlm.__main__ import main
from megavlm.config.load import load_plan
from megavlm.dist import launch
from megavlm.dist.launch import launch_command, sbatch_script, torchrun_lines
from megavlm.train.metrics import read_metrics
from tests.ranks import run_on_ranks

TIMEOUT_SECONDS = 200
HOSTS = 2
OVERRIDES = ["train.steps=2", "evaluation.samples=1", "checkpoint={every: 1, keep_last: 1}"]

# Of Slurm: once for each node, what follows srun's own options, each task with the variables that
# Slurm sets. As Slurm does, it passes signals on, and stops when a task fails.
SRUN = """\
#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
  SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 "$@" &
done
trap 'passed=1; kill -USR1 $(jobs -p)' USR1
for node in $(seq $SLURM_JOB_NUM_NODES); do
  passed=
  wait -n || { code=$?; [ "$passed" ] && wait; kill $(jobs -p) 2>/dev/null; exit $code; }
done
"""
SCONTROL = """\
#!/bin/bash
case "$*" in
  "show hostnames node-[1-2]") printf '127.0.0.1\\nnode-2\\n' ;;
  "requeue 17") echo requeued ;;
  *) echo "scontrol $*: not known here" >&2; exit 1 ;;
esac
"""


@pytest.fixture(autouse=True)
def free_port(monkeypatch):
    monkeypatch.setattr(launch, "PORT", launch._free_port())


def environment(*folders: Path) -> dict[str, str]:
    """This process's, with the programs of some folders and those beside its interpreter."""
    path = [*map(str, folders), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {**os.environ, "PATH": ":".join(path)}


def start(command, **arguments):
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **arguments,
    )


def finish(processes):
    """Wait for all, which are one run; kill the rest, and show why, when one fails or hangs."""
    deadline, outputs = time.monotonic() + TIMEOUT_SECONDS, []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=deadline - time.monotonic())
            assert process.returncode == 0, output
            outputs.append(output)
        # Losses do not tell: they would be the same on one rank.
        assert "".join(outputs).count(f"{HOSTS} ranks: {HOSTS} copies of the model") == 1
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def losses(run_folder):
    metrics = read_metrics(run_folder)
    return [m[name] for m in metrics for name in ("loss", "heldout_loss") if name in m]


@pytest.fixture
def run_on_one_host(tiny_run_file, tmp_path):
    """The losses of a run of as many ranks on one host."""
    folder = tmp_path / "one-host"
    command = ["train", str(tiny_run_file), *OVERRIDES, f"run_folder={folder}"]
    assert run_on_ranks(HOSTS, lambda _: main(command), groups=False) == [0] * HOSTS
    assert len(losses(folder)) == 4  # held out before and after, and two steps
    # Worst measured 0; a rank alone on its host has more threads, which may share sums otherwise.
    return pytest.approx(losses(folder), rel=1e-6)


@pytest.mark.slow
def test_deepspeed(run_on_one_host, tiny_run, tiny_run_file, tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node-1 slots=1\nnode-2 slots=1\n")
    program, *words = launch_command(hostfile, ["node-1", "node-2"], tiny_run_file, OVERRIDES)
    no_ssh = ["--no_ssh", "--master_addr=127.0.0.1", f"--master_port={launch.PORT}"]
    finish(
        [
            start([program, *no_ssh, f"--node_rank={node}", *words], env=environment())
            for node in range(HOSTS)
        ]
    )
    assert losses(tiny_run.run_folder) == run_on_one_host


@pytest.mark.slow
def test_torchrun(run_on_one_host, tiny_run, tiny_run_file):
    lines = torchrun_lines({"127.0.0.1": 1, "node-2": 1}, tiny_run_file, OVERRIDES)
    finish([start(["bash", "-c", line], env=environment()) for line in lines.values()])
    assert losses(tiny_run.run_folder) == run_on_one_host


@pytest.fixture
def slurm(tmp_path):
    """The environment of a batch script on two nodes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    slurm = dict(SLURM_JOB_ID="17", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="node-[1-2]")
    return {**environment(folder), **slurm, "SLURM_CPUS_PER_TASK": "1"}


def batch_script(tmp_path, run_file, hosts=HOSTS):
    path = tmp_path / "run.sbatch"
    plan = load_plan(run_file, OVERRIDES)
    path.write_text(sbatch_script(plan, hosts, 1, run_file, OVERRIDES))
    return ["bash", str(path)]


@pytest.mark.slow
def test_slurm(run_on_one_host, slurm, tiny_run, tiny_run_file, tmp_path):
    finish([start(batch_script(tmp_path, tiny_run_file), env=slurm)])
    assert losses(tiny_run.run_folder) == run_on_one_host


def test_slurm_takes_a_job_back_before_its_time_is_over(slurm, tiny_run_file, tmp_path):
    told = "trap 'echo saved; exit 1' USR1; echo started; sleep 60 & wait"
    (tmp_path / "bin" / "torchrun").write_text(f"#!/bin/bash\n{told}\n")
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    process = start(batch_script(tmp_path, tiny_run_file), env=slurm)
    try:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(HOSTS)] == ["started\n"] * HOSTS
        os.kill(process.pid, signal.SIGUSR1)
        assert process.wait(TIMEOUT_SECONDS) == 128 + signal.SIGUSR1
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.stdout.read().split() == ["saved"] * HOSTS + ["requeued"]


@pytest.mark.parametrize(("hosts", "code"), [(HOSTS, 7), (HOSTS + 1, 2)])
def test_slurm_hears_of_failures(slurm, tiny_run_file, tmp_path, hosts, code):
    (tmp_path / "bin" / "torchrun").write_text("#!/bin/bash\nexit 7\n")
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    process = start(batch_script(tmp_path, tiny_run_file, hosts), env=slurm)
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == code, output
    assert ("and this script is for 3; plan anew" in output) == (code == 2)


def test_ranks_without_a_hostfile_check_their_own_host(tiny_run_file):
    def start(_):
        os.environ.update(LOCAL_WORLD_SIZE="1")
        overrides = ["engine=megatron", "megatron.tensor_parallel=2"]
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = main(["train", str(tiny_run_file), *overrides])
        return code, said.getvalue()

    (code, said), (other_code, other_said) = run_on_ranks(2, start, groups=False)
    assert code == other_code == 2
    told = (said + other_said).splitlines()
    assert len(told) == 1, "one of them tells it"
    assert "has slots=1, not a multiple of megatron.tensor_parallel=2" in told[0]
