"""Launching a run: its hosts and environment, and the lines that start it.

A hostfile, which is DeepSpeed's, has `host slots=8` on each line.
"""

import math
import os
import re
import shlex
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megavlm.config.plan import Plan
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.config.sizes import divisors
from megavlm.errors import LaunchError

PORT = 29500  # on the first host; torch's and DeepSpeed's default
STOP_SECONDS = 240  # a step, and writing its checkpoint; torchrun's own 30 s may be too few
RESTARTS = 3  # of ranks that fail, by torchrun, before a host's job ends
NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
"""For torchrun: else the ranks that it starts again find the addresses of those before them."""
REQUEUE_SECONDS = STOP_SECONDS + 60  # of a job's last, in which it is saved and put back

_LINE = re.compile(r"^(?P<host>\S+)\s+slots=(?P<slots>\d+)$")


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots (ranks) by host, in file order.

    Raises LaunchError for a missing or empty file, a malformed line, a host without slots and a
    host that stands there twice.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"cannot read hostfile {path}: {error}") from error
    slots_by_host: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = _LINE.match(entry)
        if match is None:
            raise LaunchError(f"{path}:{number}: {entry!r} is not of the form `host slots=8`")
        host, slots = match["host"], int(match["slots"])
        if host in slots_by_host:
            raise LaunchError(
                f"{path}:{number}: host {host} is listed twice; give each host one line with all "
                "its slots"
            )
        if slots < 1:
            raise LaunchError(f"{path}:{number}: host {host} has slots={slots}; at least 1")
        slots_by_host[host] = slots
    if not slots_by_host:
        raise LaunchError(f"hostfile {path} names no host")
    return slots_by_host


def hostfile_text(slots_by_host: Mapping[str, int]) -> str:
    """What `read_hostfile` reads."""
    return "".join(f"{host} slots={slots}\n" for host, slots in slots_by_host.items())


def named_hosts(hosts: int, slots: int) -> dict[str, int]:
    """Slots by host, under names that stand for those of the real hosts."""
    return {f"node-{number:02d}": slots for number in range(1, hosts + 1)}


def ranks_of(plan: Plan, hostfile: Path) -> int:
    """Ranks that the hosts of a hostfile start, one for each slot.

    Raises LaunchError where tensor-parallel ranks, which are neighbours, would not share a host,
    and ConfigError where model or batch do not divide over the ranks.
    """
    slots_by_host = read_hostfile(hostfile)
    ranks = sum(slots_by_host.values())
    check_ranks(plan, slots_by_host)
    return ranks


def check_ranks(plan: Plan, slots_by_host: dict[str, int]) -> None:
    """Raise LaunchError or ConfigError unless the hosts' ranks can train a plan (`ranks_of`)."""
    ranks = sum(slots_by_host.values())
    plan = plan.on(ranks)
    plan.check(lambda run: check_hosts(run, slots_by_host, ranks))
    plan.check(lambda run: samples_per_micro_batch(run.train, data_parallel_ranks(run, ranks)))


def check_hosts(run: RunSettings, slots_by_host: dict[str, int], ranks: int) -> None:
    """Raise LaunchError unless ranks that talk all the time, which are neighbours, share a host.

    slots_by_host: all hosts, or this one alone. ranks: of the whole run.
    FSDP2 may shard over several whole hosts instead, if they have equal slots.
    """
    whole_hosts = ""
    match run.engine:
        case "megatron":
            name, neighbours = "megatron.tensor_parallel", run.megatron.tensor_parallel
        case "zero3":
            name, neighbours = "zero3.secondary_partition", run.zero3.secondary_partition
        case "fsdp2":
            name, neighbours = "fsdp2.shard_ranks", run.fsdp2.shard_ranks
            slots = set(slots_by_host.values())
            if neighbours in (None, ranks) or (len(slots) == 1 and neighbours % slots.pop() == 0):
                return
            whole_hosts = " or fill several of equal slots"
    for host, slots in slots_by_host.items():
        if slots % neighbours:
            fitting = divisors(math.gcd(*slots_by_host.values()))
            raise LaunchError(
                f"host {host} has slots={slots}, not a multiple of {name}={neighbours}, whose "
                f"ranks must share a host{whole_hosts}; change its slots, or try {name} in "
                f"{fitting}"
            )


def check_planned(hostfile: Path, hosts: int, gpus_per_host: int) -> None:
    """Raise LaunchError unless a hostfile has the hosts and slots that a plan was made for."""
    slots_by_host = read_hostfile(hostfile)
    if len(slots_by_host) != hosts:
        raise LaunchError(
            f"hosts in {hostfile}: {len(slots_by_host)}, and the plan is for {hosts}; change the "
            f"hostfile, or plan with --hosts {len(slots_by_host)}"
        )
    remedy = "plan with another --gpus-per-host"
    if len(set(slots_by_host.values())) > 1:
        remedy = "leave the odd hosts out: --gpu compares equal hosts only"
    for host, slots in slots_by_host.items():
        if slots != gpus_per_host:
            raise LaunchError(
                f"host {host} has slots={slots} in {hostfile} and the plan is for {gpus_per_host} "
                f"GPUs a host; {remedy}"
            )


class Variable(NamedTuple):
    """A variable of the ranks' environment."""

    name: str
    value: str | None
    """Of what `megavlm train` sets; None: left to NCCL or gloo unless the user sets it."""
    reason: str


def environment(run: RunSettings, cores_per_rank: str) -> list[Variable]:
    """The variables that matter to a run, and why.

    cores_per_rank: a number, or what a shell computes it with.
    """
    variables: list[Variable] = []
    if run.model_parallel.tensor_parallel > 1:
        variables.append(
            Variable(
                "CUDA_DEVICE_MAX_CONNECTIONS",
                "1",
                "one hardware queue, so that tensor-parallel communication starts before the "
                "matrix product that hides it",
            )
        )
    offload = run.engine == "zero3" and run.zero3.offload_optimizer != "none"
    return [
        *variables,
        Variable(
            "PYTORCH_ALLOC_CONF",
            "expandable_segments:True",
            "tensors differ in size from step to step, as texts do, and would leave gaps that no "
            "other size fits",
        ),
        Variable(
            "OMP_NUM_THREADS",
            cores_per_rank,
            "a rank's share of its host's cores, where each would take all; torchrun makes it 1 "
            "unless it is exported"
            + (", too few for the optimiser, which runs on the CPU" if offload else ""),
        ),
        Variable(
            "TORCH_FR_BUFFER_SIZE",
            "2000",
            "collectives that each rank remembers, for the report of a hang",
        ),
        Variable(
            "NCCL_SOCKET_IFNAME",
            None,
            "set if hosts reach each other over another interface than the first that NCCL finds",
        ),
        Variable(
            "GLOO_SOCKET_IFNAME",
            None,
            "set if a host's own name resolves to a loopback address; checkpoints are agreed on "
            "over gloo",
        ),
        Variable(
            "NCCL_IB_HCA", None, "set if some of the network cards are not for training (storage)"
        ),
        Variable(
            "NCCL_DEBUG", None, "set to INFO for one start, to see the interfaces and cards used"
        ),
    ]


def set_environment(run: RunSettings) -> None:
    """Set what CUDA and torch read when they start, unless the user has; before torch's import.

    Launchers give ranks what they like of the environment: over ssh DeepSpeed passes on only
    NCCL_*, PYTHON* and a few more.
    """
    # torchrun's name, and DeepSpeed's.
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    for variable in environment(run, str(max(1, len(os.sched_getaffinity(0)) // ranks))):
        # A rank alone may take all cores, as torch counts them.
        if variable.value is not None and (ranks > 1 or variable.name != "OMP_NUM_THREADS"):
            os.environ.setdefault(variable.name, variable.value)


def launch_command(
    hostfile: Path,
    hosts: Iterable[str],
    run_file: Path,
    overrides: Sequence[str],
    *,
    remote: bool = False,
) -> list[str]:
    """The `deepspeed` command that trains a run on all hosts of a hostfile.

    hosts: what it names, or will once it is written. A hostfile that names only `localhost` needs
    no ssh, and its run gets a free port, so that several fit on one machine. remote: a single host
    is reached over ssh, too, as it need not be this one.
    """
    hosts, arguments = list(hosts), [str(run_file), *overrides]
    local: list[str] = []
    if hosts == ["localhost"]:
        local += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
        local += ["--master_port", str(_free_port())]
    elif remote and len(hosts) == 1:
        local.append("--force_multi")
    if len(hosts) > 1 or remote:
        arguments = [_for_remote_shell(word) for word in arguments]
    return [
        *("deepspeed", "--log_level", "warning", "--hostfile", str(hostfile), *local),
        *("--module", "megavlm", "train", *arguments),
    ]


def _for_remote_shell(word: str) -> str:
    """A word that arrives as it is when DeepSpeed has the shells of the hosts read it.

    Words with a blank DeepSpeed puts in double quotes itself, but escapes only quotes in them
    (PDSHRunner.parse_user_args); the others it leaves alone.
    """
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def torchrun_lines(
    slots_by_host: dict[str, int], run_file: Path, overrides: Sequence[str]
) -> dict[str, str]:
    """By host, the shell line to run there. Ranks are numbered in the order of the hosts' names."""
    first_host = next(iter(slots_by_host))
    return {
        host: f"{NEW_STORE} "
        + _torchrun(
            *(str(len(slots_by_host)), slots, first_host, shlex.quote(run_file.stem)),
            *(run_file, overrides),
        )
        for host, slots in slots_by_host.items()
    }


def _torchrun(
    hosts: str, slots: int, first_host: str, job: str, run_file: Path, overrides: Sequence[str]
) -> str:
    """The texts are shell words."""
    words = ["-m", "megavlm", "train", str(run_file), *overrides]
    return (
        f"torchrun --nnodes={hosts} --nproc-per-node={slots} --max-restarts={RESTARTS} "
        f"--rdzv-backend=c10d --rdzv-endpoint={first_host}:{PORT} --rdzv-id={job} "
        f"--shutdown-timeout={STOP_SECONDS} "
        f"--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 {shlex.join(words)}"
    )


def sbatch_script(
    plan: Plan, hosts: int, gpus_per_host: int, run_file: Path, overrides: Sequence[str]
) -> str:
    """A batch script for Slurm that trains a run, and goes on after its time limit."""
    cores = gpus_per_host * (1 + max(stage.run.data.workers for stage in plan.stages))
    exports = "\n".join(
        f"# {variable.reason}\nexport {variable.name}={variable.value}"
        if variable.value is not None
        else f"# {variable.name}: {variable.reason}"
        for variable in environment(plan.first, f"$((SLURM_CPUS_PER_TASK / {gpus_per_host}))")
    )
    torchrun = _torchrun(
        *('"$SLURM_JOB_NUM_NODES"', gpus_per_host, '"$first_host"', '"$SLURM_JOB_ID"'),
        *(run_file, overrides),
    )
    name = shlex.quote(run_file.stem)
    return f"""\
#!/bin/bash
# Submit in the checkout's folder, with its environment active; both hold on the hosts:
#   sbatch --time=24:00:00 THIS_FILE
#SBATCH --job-name={name}
#SBATCH --output={name}-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes={hosts}
# torchrun, which starts the ranks of its host
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus_per_host}
# for each rank, and for each of its data.workers
#SBATCH --cpus-per-task={cores}
#SBATCH --exclusive
#SBATCH --mem=0
# Before the time limit this script is told, and tells the ranks, which save the step that they are
# in; then it puts the job back into the queue. It goes on from the last checkpoint; so it does when
# a host fails.
#SBATCH --signal=B:USR1@{REQUEUE_SECONDS}
#SBATCH --requeue
set -eu

if [ "$SLURM_JOB_NUM_NODES" != {hosts} ]; then
  echo "hosts: $SLURM_JOB_NUM_NODES, and this script is for {hosts}; plan anew for those" >&2
  exit 2
fi

{exports}

# Ranks that torchrun starts again meet anew, not where those before them have left addresses
export {NEW_STORE}

first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# srun takes a task for one core unless it is told again (since Slurm 22.05). In the background, as
# bash hears signals between commands only, and while it waits.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \\
  {torchrun} &
ranks=$!
time_is_over=
trap 'time_is_over=1; kill -USR1 "$ranks" || true' USR1
code=0
wait "$ranks" || code=$?
if [ -n "$time_is_over" ]; then
  wait "$ranks" || true
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
