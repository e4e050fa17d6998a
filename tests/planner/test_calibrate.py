"""Measured rates are real ones of this machine, and survive their file."""

import json
import math
from dataclasses import replace

import pytest

from megavlm.errors import ConfigError
from megavlm.planner import calibrate
from megavlm.planner.calibrate import LINK_BYTES_OF_CPUS, LINK_REPEATS, Rates, with_rates
from megavlm.planner.hardware import A100_80, GPUS, H100_80, cluster_of, load_gpu, save_gpu
from tests.parity.collectives import recorded
from tests.ranks import run_on_ranks

RATES = Rates(600e12, 300e12, 2e12, 4e-6, 400e9)


@pytest.mark.slow
def test_two_ranks_measure_and_really_send():
    def on_rank(_):
        with recorded() as calls:
            rates = calibrate.measure_rates("fp32", seconds=0.01)
        gathers = [c.shapes for c in calls if c.operation == "_allgather_base_"]
        return tuple(rates), gathers

    results = run_on_ranks(2, on_rank)
    for rates, gathers in results:
        assert all(math.isfinite(rate) and rate > 0 for rate in rates)
        assert rates == results[0][0], "the medians are of all ranks"
        expected = [((size,), (size // 2,)) for size in LINK_BYTES_OF_CPUS]
        assert [g for g in gathers if g[0][0] >= min(LINK_BYTES_OF_CPUS)] == [
            shapes for shapes in expected for _ in range(LINK_REPEATS)
        ]


def forked(function, arguments, nprocs):
    """In place of torch's `spawn`, which imports everything anew."""
    run_on_ranks(nprocs, lambda rank: function(rank, *arguments), groups=False)


def test_the_cpu_is_measured_and_what_it_cannot_tell_is_kept(monkeypatch, capfd):
    monkeypatch.setattr(calibrate, "spawn", forked)
    monkeypatch.setattr(calibrate, "MEASURE_SECONDS", 0.01)
    gpu = calibrate.measure(H100_80, None, "bf16")
    assert "matrix products ... " in capfd.readouterr().out
    assert gpu.name.startswith("CPU") and gpu.name.endswith("bf16")
    assert gpu.matmul_efficiency == gpu.memory_efficiency == 1
    assert gpu.host_link_bytes_per_second == gpu.memory_bytes_per_second
    assert gpu.host_memory_bytes_per_second == gpu.memory_bytes_per_second
    for name in ("link_bytes_per_second", "link_efficiency"):  # one rank has no link
        assert getattr(gpu, name) == getattr(H100_80, name)
    for name in ("network_bytes_per_second", "network_efficiency"):
        assert getattr(gpu, name) == getattr(H100_80, name)
    rates = [gpu.matmul_flops_per_second, gpu.attention_efficiency, gpu.memory_bytes_per_second]
    assert all(math.isfinite(rate) and rate > 0 for rate in [*rates, gpu.launch_seconds])


def test_a_known_gpu_keeps_its_nominal_figures():
    gpu = with_rates(H100_80, RATES, "bf16")
    assert gpu == replace(
        H100_80,
        matmul_efficiency=600 / 989,
        attention_efficiency=300 / 989,
        memory_efficiency=2e12 / 3.35e12,
        link_efficiency=400 / 450,
        launch_seconds=4e-6,
    )
    alone = with_rates(H100_80, RATES._replace(link_bytes_per_second=0.0), "bf16")
    assert alone.link_efficiency == H100_80.link_efficiency


def test_what_fp32_reaches_is_a_share_of_its_own_peak(capsys):
    rates = RATES._replace(matmul_flops_per_second=50e12, attention_flops_per_second=40e12)
    gpu = with_rates(H100_80, rates, "fp32")
    assert (gpu.matmul_efficiency, gpu.attention_efficiency) == (50 / 67, 40 / 67)
    assert gpu.peak_flops_per_second(2) == 989e12 and gpu.peak_flops_per_second(4) == 67e12
    calibrate.print_calibration(gpu, H100_80, "fp32")
    [matmul] = [line for line in capsys.readouterr().out.splitlines() if "matrix" in line]
    assert " 50 " in matmul and "44.89" in matmul


def test_an_unknown_device_is_what_was_measured():
    unknown = replace(
        H100_80,
        matmul_flops_per_second=0.0,
        fp32_matmul_flops_per_second=0.0,
        memory_bytes_per_second=0.0,
        link_bytes_per_second=0.0,
    )
    gpu = with_rates(unknown, RATES, "bf16")
    assert (gpu.matmul_flops_per_second, gpu.matmul_efficiency) == (600e12, 1)
    assert gpu.attention_efficiency == 0.5
    assert (gpu.memory_bytes_per_second, gpu.memory_efficiency) == (2e12, 1)
    assert (gpu.link_bytes_per_second, gpu.link_efficiency) == (400e9, 1)


def test_the_table_tells_what_was_not_measured(capsys):
    calibrate.print_calibration(with_rates(H100_80, RATES, "bf16"), H100_80, "bf16")
    lines = capsys.readouterr().out.splitlines()
    [matmul] = [line for line in lines if "matrix" in line]
    assert "600" in matmul and "662.6" in matmul and "0.905" in matmul
    [network] = [line for line in lines if "network" in line]
    assert "not measured" in network and "42.5" in network


def test_a_gpu_survives_its_file(tmp_path):
    path = tmp_path / "machine.json"
    gpu = with_rates(A100_80, RATES, "bf16")
    save_gpu(gpu, path)
    assert load_gpu(path) == gpu
    cluster = cluster_of(str(path), 2, 4)
    assert (cluster.gpu, cluster.ranks) == (gpu, 8)
    assert cluster_of("h200", 1, 1).gpu is GPUS["h200"]


def changed(**changes):
    values = json.loads(json.dumps(vars(H100_80))) | changes
    return json.dumps({"megavlm_gpu": {k: v for k, v in values.items() if v is not None}})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not valid JSON"),
        ("[]", "no megavlm_gpu"),
        ('{"megavlm_gpu": 3}', "no megavlm_gpu"),
        (changed(launch_seconds=None), "launch_seconds"),
        (changed(launches=3), "launches"),
        (changed(memory_bytes="80 GB"), "memory_bytes='80 GB'"),
        (changed(link_efficiency=True), "link_efficiency=True"),
        (changed(link_efficiency=0), "link_efficiency=0"),
        (changed(matmul_flops_per_second=math.inf), "matmul_flops_per_second=inf"),
        (changed(matmul_flops_per_second=math.nan), "matmul_flops_per_second=nan"),
        (changed(name=5), "name=5"),
    ],
)
def test_a_foreign_file_is_one_clear_error(tmp_path, text, told):
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        cluster_of(str(path), 1, 1)
    message = str(caught.value)
    assert told in message and str(path) in message and "--calibrate" in message
    assert "\n" not in message


def test_a_missing_file_and_a_folder_that_is_not_there(tmp_path):
    path = tmp_path / "none" / "machine.json"
    with pytest.raises(ConfigError, match="--calibrate"):
        cluster_of(str(path), 1, 1)
    with pytest.raises(ConfigError, match="cannot write"):
        save_gpu(H100_80, path)


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ConfigError, match="h100-80"):
        cluster_of("h1000", 1, 1)
