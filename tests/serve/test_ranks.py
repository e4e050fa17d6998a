"""Real servers of several ranks, as launchers start them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from megavlm.config.load import load_plan
from megavlm.infer.generate import generate
from megavlm.infer.load import trained
from megavlm.serve.chat import Reader
from megavlm.serve.limits import ServeLimits

# Imported before ranks are forked.
from megavlm.train.loop import train
from tests.ranks import run_on_ranks
from tests.serve.server import MODEL, Served, chat, with_pixels
from tests.serve.test_server import CHATS, streaming, text_and_finish

ROOT = Path(__file__).parents[2]
SECONDS = 120
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def run_file(tiny_run_file):
    """Of a run that has ended."""
    run_on_ranks(1, lambda _: train(load_plan(tiny_run_file)), groups=False)
    return tiny_run_file


@contextmanager
def started(commands, folder, **environment):
    """A server that is ready, and the processes that were started, which are killed at the end."""
    log = folder / "server.log"
    processes = []
    try:
        with log.open("w") as out:
            for rank, command in enumerate(commands):
                ranked = {k: v.format(rank=rank) for k, v in environment.items()}
                full = {**os.environ, "OMP_NUM_THREADS": "1", **ranked}
                processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=full, stdout=out, stderr=out)
                )
        deadline = time.monotonic() + SECONDS
        while f"{MODEL} is ready" not in log.read_text():
            assert all(p.poll() is None for p in processes), log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        url = log.read_text().split(" is open; ")[0].split()[-1]
        yield Served(url, processes[0].pid, log), processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def serve_words(run_file):
    return ["-m", "megavlm", "serve", run_file, "--port", "0", "--model-name", MODEL]


def answer(served, body):
    return served.post(body).json()["choices"][0]["message"]["content"]


def test_two_ranks_under_torchrun_serve_as_one_does(run_file, tmp_path):
    plan = load_plan(run_file)

    def alone(_):
        with trained(plan) as (model, tokenizer):
            side = plan.first.model.encoder.image_pixels
            reader = Reader(tokenizer, side, MODEL, ServeLimits())
            requests = [with_pixels(reader, json.dumps(body).encode()).request for body in CHATS]
            return generate(model, tokenizer, requests, batch_size=1)

    [expected] = run_on_ranks(1, alone, groups=False)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    with (
        started([[*torchrun, *serve_words(run_file)]], tmp_path) as (served, [process]),
        ThreadPoolExecutor(2) as clients,
    ):
        told = clients.map(lambda body: answer(served, body), CHATS * 3)
        assert [*told] == expected * 3
        assert served.post(chat("a", max_tokens=3_000)).status_code == 400
        long = chat("a", max_tokens=1_900, temperature=2.0, seed=1)
        with streaming(served, long) as lines:
            next(lines)
        served.wait_until("running_requests", 0)
        assert served.count("cancelled_requests_total") == 1
        assert answer(served, CHATS[0]) == expected[0]
        with streaming(served, long) as lines:
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + SECONDS
            while httpx.get(f"{served.url}/health").status_code == 200:
                assert time.monotonic() < deadline
            assert served.post(chat("a")).status_code == 503
            text, finish = text_and_finish(lines)
        assert finish in ("stop", "length")
        assert len(text) > 100
        process.wait(SECONDS)
        log = served.log.read_text()
        assert "SIGTERM: 1 answers have 30 seconds left" in log
        assert log.count("megavlm: ") == 3
        assert log.count("Traceback") == 1, "torchrun's own"


FAILING = """
import os, sys
from megavlm.__main__ import main
from megavlm.infer.engine import Engine

step = Engine.step

def failing(engine):
    asked = [row.asked.max_new_tokens for row in engine._waiting]
    if 10 + int(os.environ["RANK"]) in asked:
        raise RuntimeError(f"words of {engine}")
    return step(engine)

Engine.step = failing
sys.argv[0] = "megavlm"
sys.exit(main())
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ends_or_fails_ends_all(run_file, tmp_path, rank):
    """Without a launcher that would do so."""
    for how in ("ends", "fails"):
        command = [sys.executable, "-c", FAILING, *serve_words(run_file)[2:]]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        ranked = {"RANK": "{rank}", "LOCAL_RANK": "{rank}"}
        with started([command] * 2, tmp_path, **meeting, **ranked) as (served, processes):
            processes[1].send_signal(signal.SIGTERM)  # which it leaves to rank 0
            assert served.post(chat("a", max_tokens=3)).status_code == 200
            time.sleep(2.5)  # some beats
            assert [process.poll() for process in processes] == [None, None]
            if how == "ends":
                processes[rank].kill()
            else:
                failed = served.post(chat("a", max_tokens=10 + rank))
                assert (failed.status_code, failed.json()["error"]["code"]) == (
                    500,
                    "engine_failed",
                )
            ends = [process.wait(30) for process in processes]
            assert ends == [-signal.SIGKILL if (how, n) == ("ends", rank) else 1 for n in range(2)]
            log = served.log.read_text()
            assert "Traceback" not in log
            assert "words" not in log.replace("words of {engine}", "")
            assert ("error: rank 1 has ended" in log) == (rank == 1)
            assert ("the engine failed on rank 0 (RuntimeError)" in log) == (
                (how, rank) == ("fails", 0)
            )
            assert ("rank 1: the engine failed (RuntimeError)" in log) == (
                (how, rank) == ("fails", 1)
            )
