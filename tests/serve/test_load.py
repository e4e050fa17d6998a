"""A real server process under load, as `tools/load_serve.py` makes it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from megavlm.config.load import load_plan

# Imported before ranks are forked.
from megavlm.train.loop import train
from tests.ranks import run_on_ranks
from tools import load_serve

ROOT = Path(__file__).parents[2]
START_SECONDS = 120
KEY = "sk-load"
GROWTH = 1.05
"""Of the server's memory once it is warm; 482 MiB at most after 480 were seen."""


@pytest.fixture
def server(tiny_run_file):
    """Its URL."""
    run_on_ranks(1, lambda _: train(load_plan(tiny_run_file)), groups=False)
    command = [sys.executable, "-m", "megavlm", "serve", tiny_run_file, "--port", "0"]
    command += ["--receive-seconds", "10", "--body-mib", "4"]
    environment = {**os.environ, "MEGAVLM_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        opened = next(line for line in process.stderr if " is open; " in line)
        url = opened.split()[1]
        deadline = time.monotonic() + START_SECONDS
        while not is_ready(url):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield url
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 0
        assert len(told.splitlines()) == 2, told
    finally:
        process.kill()
        process.wait()


def test_a_bad_server_is_reported(monkeypatch):
    """One that answers each request alone, and nothing afterwards."""
    monkeypatch.setattr(load_serve, "HOSTILE_CLIENTS", 2)
    answered = []

    def answer(request):
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        if request.url.path == "/metrics" or len(answered) == load_serve.REQUESTS:
            return httpx.Response(502, text="bad gateway")
        answered.append(request)
        content = {"choices": [{"message": {"content": ""}}], "usage": {"completion_tokens": 1}}
        return httpx.Response(200, json=content)

    async def load(report):
        transport = httpx.MockTransport(answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:1") as http:
            await load_serve.Load(http, report).run(0.05)

    report = load_serve.Report(clients=1)
    asyncio.run(load(report))
    assert report.lost and not (report.is_good or report.is_alive)
    told = "\n".join(report.lines())
    assert "first piece after none" in told
    assert "MiB: none" in told
    assert "NOT IDLE, ANSWERS OTHERWISE" in told


def is_ready(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.ConnectError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many_clients_and_hostile_ones(server, tmp_path, capfd):
    out = tmp_path / "report.json"
    command = [sys.executable, ROOT / "tools/load_serve.py", server, "--clients", "64"]
    environment = {**os.environ, "MEGAVLM_API_KEY": KEY}
    with capfd.disabled():  # the figures are to be seen
        done = subprocess.run([*command, "--seconds", "120", "--out", out], env=environment)
    report = json.loads(out.read_text())
    assert (report["lost"], report["different"]) == (0, 0)
    assert report["answers"] > 640
    assert report["is_idle"]
    assert report["answers_as_before"]
    assert done.returncode == 0
    ends = {end.split(":")[0]: set() for end in report["hostile"]}
    for end in report["hostile"]:
        misdeed, _, how = end.partition(": ")
        ends[misdeed].add(how)
    assert ends["slow_head"] <= {"cut off", "not cut off yet", "ConnectionResetError"}
    assert "408" in ends["slow_body"]
    assert ends["broken_picture"] == ends["bomb_picture"] == ends["broken_json"] == {"400"}
    assert ends["huge_body"] == ends["endless_body"] == {"413"}
    memory = report["memory_mib"]
    warm = max(memory[15:30])
    assert max(memory[30:]) < GROWTH * warm
