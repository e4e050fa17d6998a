"""Starts a run again where it fails, through DeepSpeed's launcher, on the hosts that are left."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from megavlm.checkpoint.listing import newest_checkpoint
from megavlm.checkpoint.state import checkpoint_root
from megavlm.checkpoint.storage import read_state
from megavlm.config.plan import Plan
from megavlm.dist.launch import check_ranks, hostfile_text, launch_command, read_hostfile
from megavlm.errors import ConfigError, LaunchError
from megavlm.redact import without_secrets
from megavlm.terminal import tell
from megavlm.train.preflight import check_plan
from megavlm.train.stop import SIGNALS

HOSTFILE = "hostfile"
"""In the run folder: the hosts of the newest start, where some are lost."""
ANSWER_SECONDS = 20
"""From asking a host over ssh to its answer."""


class Restarts:
    """Runs the launcher until a run is done.

    A signal that ends runs in good order (`StopSignals`) is passed to all ranks of this machine, or
    to the launcher where there are none, and nothing is started afterwards.
    """

    def __init__(self, plan: Plan, hostfile: Path, run_file: Path, overrides: Sequence[str]):
        self._plan = plan
        self._hostfile = hostfile
        self._slots_by_host = read_hostfile(hostfile)
        self._command = run_file, overrides
        self._launcher: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, most_failures: int) -> int:
        """The exit code of the last start.

        Starts again after at most so many failures one after the other without a new checkpoint.
        """
        if lost := self._silent_hosts():
            raise LaunchError(
                f"no answer over ssh within {ANSWER_SECONDS} s: {', '.join(lost)}; mend them, or "
                f"take them out of {self._hostfile}"
            )
        for number in (*SIGNALS, signal.SIGINT):
            signal.signal(number, self._stop)
        slots_by_host, failures = self._slots_by_host, 0
        while True:
            done = self._steps_done()
            code = self._start(slots_by_host)
            now = self._steps_done()
            if self._stopped or now == self._plan.steps:
                return code
            failures = 1 if now > done else failures + 1
            told = f"the launcher ended with {_named(code)} after step {now} of {self._plan.steps}"
            if failures > most_failures:
                tell(f"{told}, for the {failures}. time without a new checkpoint: given up")
                return code or 1
            slots_by_host = self._hosts_left()
            if self._stopped:  # meanwhile
                return code or 1
            tell(
                f"{told}; started again on {len(slots_by_host)} of {len(self._slots_by_host)} "
                f"hosts ({failures} of {most_failures} failures without a new checkpoint)"
            )

    def _start(self, slots_by_host: dict[str, int]) -> int:
        hostfile = self._hostfile
        if slots_by_host != self._slots_by_host:
            hostfile = self._plan.first.run_folder / HOSTFILE
            hostfile.write_text(hostfile_text(slots_by_host))
        several = len(self._slots_by_host) > 1
        command = launch_command(hostfile, slots_by_host, *self._command, remote=several)
        print(without_secrets(shlex.join(command)), flush=True)
        # The launcher beside this interpreter, also when its folder is not on the search path.
        program = str(Path(sys.executable).with_name(command[0]))
        # ssh shall notice that a host is gone.
        alive = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"
        environment = {"PDSH_SSH_ARGS_APPEND": alive, **os.environ}
        self._launcher = subprocess.Popen([program, *command[1:]], env=environment)
        try:
            if self._stopped:  # while it was started
                self._launcher.terminate()
            return self._launcher.wait()
        finally:
            self._launcher = None

    def _steps_done(self) -> int:
        run = self._plan.first
        checkpoint = newest_checkpoint(checkpoint_root(run), run.checkpoint)
        return 0 if checkpoint is None else read_state(checkpoint)["step"]

    def _silent_hosts(self) -> list[str]:
        """Those that do not answer; a host alone is this one."""
        if len(self._slots_by_host) == 1:
            return []
        options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={ANSWER_SECONDS}"]
        given_up = time.monotonic() + ANSWER_SECONDS
        asked = {
            host: subprocess.Popen(
                ["ssh", *options, host, "true"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for host in self._slots_by_host
        }
        return [host for host, process in asked.items() if not _succeeds(process, given_up)]

    def _hosts_left(self) -> dict[str, int]:
        """The most of those that answer that the run divides over, the first ones first."""
        silent = self._silent_hosts()
        answering = [item for item in self._slots_by_host.items() if item[0] not in silent]
        for many in range(len(answering), 0, -1):
            slots_by_host = dict(answering[:many])
            ranks = sum(slots_by_host.values())
            try:
                check_ranks(self._plan, slots_by_host)
                check_plan(self._plan.on(ranks), ranks)
            except (ConfigError, LaunchError) as error:
                tell(f"not on {many} hosts: {error}")
            else:
                return slots_by_host
        raise LaunchError(
            f"hosts that answer: {len(answering)} of {len(self._slots_by_host)}, and the run "
            "divides over none of them; run again when more are there"
        )

    def _stop(self, number: int, _: object) -> None:
        """Tell the ranks: launchers end without them, or tell one after the other."""
        self._stopped = True
        if self._launcher is None or number == signal.SIGINT:  # which the terminal sends to all
            return
        run_file, overrides = self._command
        words = ["train", str(run_file), *overrides]
        told = False
        # Over ssh they are no children of the launcher, also on this machine.
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                command = process.cmdline()
                ours = command[-len(words) :] == words and process.cwd() == os.getcwd()
                if ours and _is_rank(process):
                    process.send_signal(number)
                    told = True
        if not told:
            tell(f"{signal.Signals(number).name}: no rank is on this machine, so it ends the run")
            self._launcher.terminate()


def _named(code: int) -> str:
    """DeepSpeed's launcher ends as a rank did, and by a signal with 256 less its number."""
    return f"code {code}" + (f" (signal {256 - code})" if code > 192 else "")


def _is_rank(process: psutil.Process) -> bool:
    """And no worker of one, which has its words and its environment."""
    parent = process.parent()
    return "RANK" in process.environ() and (parent is None or "RANK" not in parent.environ())


def _succeeds(process: "subprocess.Popen[bytes]", given_up: float) -> bool:
    """Whether it does in time; it may wait for a disk that is gone."""
    try:
        return process.wait(max(0.0, given_up - time.monotonic())) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
