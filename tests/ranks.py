"""Runs a function on several real ranks over gloo, forked from the test process.

Forking shares the imports, which cost twenty seconds, so that a case takes about one.
"""

import gc
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megavlm.config.engines import UNDIVIDED, MegatronSettings
from megavlm.dist.groups import process_groups

TIMEOUT_SECONDS = 120


def alone() -> AbstractContextManager[None]:
    """Process groups of this one process, on the fake backend.

    gloo must never start here: it keeps a thread that forked ranks would miss, and hang.
    """
    return process_groups(seed=1, store=FakeStore(), backend="fake")


@contextmanager
def as_rank(rank: int, ranks: int, parallel: MegatronSettings) -> Iterator[None]:
    """Process groups as one rank of several has them, on the fake backend: sizes, no data."""
    with (
        patch.dict(os.environ, RANK=str(rank), WORLD_SIZE=str(ranks)),
        process_groups(seed=1, parallel=parallel, store=FakeStore(), backend="fake"),
    ):
        yield


def run_on_ranks(
    ranks: int,
    function: Callable[[int], Any],
    *,
    groups: bool = True,
    parallel: MegatronSettings = UNDIVIDED,
) -> list[Any]:
    """Call `function(rank)` on every rank; returns what each returned.

    It runs inside process groups, divided as `parallel` says, or, without `groups`, in the
    environment that a launcher sets.
    Results travel through files, so they are plain data or tensors. A rank that fails, or that
    hangs, fails the test; the others are killed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        port = _free_port()
        divided = parallel if groups else None
        children = [_fork(rank, ranks, port, function, folder, divided) for rank in range(ranks)]
        failure = _wait(children)
        errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
        assert not failure and not errors, "\n".join([failure, *errors])
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _fork(
    rank: int,
    ranks: int,
    port: int,
    function: Callable[[int], Any],
    folder: Path,
    parallel: MegatronSettings | None,
) -> int:
    child = os.fork()
    if child:
        return child
    gc.freeze()  # else each collection copies what the ranks share
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    os.environ.update(LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with nullcontext() if parallel is None else process_groups(1, parallel):
            torch.save(function(rank), folder / f"{rank}.pt")
            os._exit(0)  # the groups' end would wait 0.2 s for the threads of gloo
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        os._exit(1)


def _wait(children: list[int]) -> str:
    """Wait for all children; on a failure or a hang kill the rest, and say what happened."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    running, failure = set(children), ""
    while running:
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                running.discard(child)
                if status and not failure:
                    failure = f"rank {children.index(child)} ended with status {status}"
        if time.monotonic() > deadline and not failure:
            failure = f"ranks {[children.index(c) for c in running]} hang"
        if failure:
            for child in running:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return failure
