"""The `deepspeed` launcher: its hostfile (`host slots=8` on each line) and its command line."""

import math
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from megavlm.config.plan import Plan
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.config.sizes import divisors
from megavlm.errors import LaunchError

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


def ranks_of(plan: Plan, hostfile: Path) -> int:
    """Ranks that the hosts of a hostfile start, one for each slot.

    Raises LaunchError where tensor-parallel ranks, which are neighbours, would not share a host,
    and ConfigError where model or batch do not divide over the ranks.
    """
    slots_by_host = read_hostfile(hostfile)
    ranks = sum(slots_by_host.values())
    plan.check(lambda run: check_hosts(run, slots_by_host))
    plan.check(lambda run: samples_per_micro_batch(run.train, data_parallel_ranks(run, ranks)))
    return ranks


def check_hosts(run: RunSettings, slots_by_host: dict[str, int]) -> None:
    """Raise LaunchError unless ranks that talk all the time, which are neighbours, share a host."""
    name, neighbours = "megatron.tensor_parallel", run.model_parallel.tensor_parallel
    if run.engine == "zero3":
        name, neighbours = "zero3.secondary_partition", run.zero3.secondary_partition
    for host, slots in slots_by_host.items():
        if slots % neighbours:
            fitting = divisors(math.gcd(*slots_by_host.values()))
            raise LaunchError(
                f"host {host} has slots={slots}, not a multiple of {name}={neighbours}, whose "
                f"ranks must share a host; change its slots, or try {name} in {fitting}"
            )


def launch_command(hostfile: Path, run_file: Path, overrides: Sequence[str]) -> list[str]:
    """The command line that trains a run on all hosts of a hostfile.

    A hostfile that names only `localhost` needs no ssh, and its run gets a free port, so that
    several fit on one machine.
    """
    local: list[str] = []
    if list(read_hostfile(hostfile)) == ["localhost"]:
        local += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
        local += ["--master_port", str(_free_port())]
    return [
        *("deepspeed", "--log_level", "warning", "--hostfile", str(hostfile), *local),
        *("--module", "megavlm", "train", str(run_file), *overrides),
    ]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
