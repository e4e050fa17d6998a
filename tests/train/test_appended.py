"""Figures of a run whose disk is full for a while."""

import os
import resource
import signal
from pathlib import Path

import pytest

from megavlm.errors import StorageError
from megavlm.train import appended
from megavlm.train.appended import Appended
from megavlm.train.events import Events
from megavlm.train.metrics import MetricsLog, read_metrics
from megavlm.train.record import read_record
from tests.ranks import run_on_ranks

WITHOUT = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def full_at(size):
    """Of every file that this process writes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_what_does_not_fit_waits(tmp_path):
    def on_rank(_):
        told = []
        appended.warn = told.append  # what pytest captures lies in a file, too
        path = tmp_path / "lines"
        file = Appended(path)
        file.write(b"one\n")
        full_at(6)
        for line in (b"two\n", b"three\n"):
            file.write(line)
            assert path.read_bytes() == b"one\n"
        resource.setrlimit(resource.RLIMIT_FSIZE, WITHOUT)
        file.write(b"four\n")
        file.sync()
        assert path.read_bytes() == b"one\ntwo\nthree\nfour\n"
        return told

    [[told]] = run_on_ranks(1, on_rank, groups=False)
    assert "/lines: No space left on device; training goes on" in told


def test_neither_a_full_disk_nor_a_sink_ends_a_run(tmp_path):
    def on_rank(_):
        taken, told = [], []
        MetricsLog.say = lambda _, message: told.append(message)

        def broken(values):
            raise ConnectionResetError("Connection lost")

        events = Events(tmp_path, enabled=True)
        sinks = {"X": broken, "Y": taken.append}
        with MetricsLog(tmp_path, 0, 9, events, sinks, enabled=True) as log:
            for step in range(9):
                if step == 3:
                    full_at(os.path.getsize(tmp_path / "metrics.jsonl") + 10)
                if step == 6:
                    resource.setrlimit(resource.RLIMIT_FSIZE, WITHOUT)
                log.record({"step": step, "loss": 1.0})
        assert [values["step"] for values in taken] == [*range(9)]
        return told

    [told] = run_on_ranks(1, on_rank, groups=False)
    said = "X gets no more figures of this run: ConnectionResetError"
    assert sum(said in line for line in told) == 1, "TensorBoard may be told of, too"
    assert [line["step"] for line in read_metrics(tmp_path)] == [*range(9)]


def test_a_start_on_a_full_disk_is_told_and_loses_nothing(tmp_path):
    lines = tmp_path / "metrics.jsonl"
    lines.write_text('{"step": 0}\n{"step": 1}\n')

    def on_rank(_):
        full_at(6)
        with pytest.raises(StorageError, match=r"cannot write .*/metrics.jsonl.* Free space"):
            MetricsLog(tmp_path, 2, 9, Events(tmp_path, enabled=True), {}, enabled=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, WITHOUT)

    run_on_ranks(1, on_rank, groups=False)
    assert read_metrics(tmp_path) == [{"step": 0}, {"step": 1}]


def test_a_broken_record_is_put_aside(tmp_path, capfd):
    assert read_record(tmp_path) == []
    (tmp_path / "record.json").touch()
    assert read_record(tmp_path) == read_record(tmp_path) == []
    assert [path.name for path in Path(tmp_path).iterdir()] == ["record.broken.json"]
    assert capfd.readouterr().err.count("cannot be read") == 1
