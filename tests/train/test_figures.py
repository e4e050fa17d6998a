from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megavlm.config.engines import UNDIVIDED
from megavlm.config.metrics import ProfileSettings
from megavlm.config.sizes import TextTowerSizes
from megavlm.errors import ConfigError
from megavlm.planner.cut import flops_per_image
from megavlm.planner.hardware import A100_80
from megavlm.planner.work import Tokens, model_blocks
from megavlm.train.figures import StepFigures, seen_training_flops
from megavlm.train.profiler import check_profile
from tests.runs import plan_of

COUNTS = {"images": 16, "texts": 32, "text_tokens": 640}


def test_flops_are_those_of_the_planner(tiny_run):
    """Padding does not count; recomputation neither."""
    found = seen_training_flops(tiny_run, COUNTS)
    for rows, row_tokens in ((16, 64), (32, 24)):
        blocks = model_blocks(tiny_run, Tokens(16, rows, row_tokens, 640, 32), UNDIVIDED)
        assert found == pytest.approx(sum(block.seen_training_flops for block in blocks))
    # The formula that cuts pipelines, for all trained: three passes, but register tokens and
    # patches' projection are counted otherwise there.
    before, layers, after = flops_per_image(tiny_run.model, 40, 20)
    assert found == pytest.approx(3 * 16 * (before + sum(layers) + after), rel=0.2)
    assert seen_training_flops(tiny_run, COUNTS | {"texts": 0, "text_tokens": 0}) == 0
    text_only = seen_training_flops(tiny_run, COUNTS | {"images": 0})
    assert text_only is not None and 0 < text_only < found


def test_pre_training_is_not_counted(tiny_run):
    tower = TextTowerSizes(width=32, layers=1, heads=2, mlp_width=64, feature_width=16)
    run = replace(
        tiny_run,
        model=replace(tiny_run.model, text_tower=tower),
        objectives={"mim": 1.0, "contrastive": 1.0},
    )
    assert seen_training_flops(run, COUNTS) is None


def test_utilisation_is_of_all_gpus(tiny_run, monkeypatch):
    properties = SimpleNamespace(total_memory=A100_80.memory_bytes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    of_bf16 = replace(tiny_run, train=replace(tiny_run.train, precision="bf16"))
    names = {"NVIDIA A100-SXM4-80GB": (19.5e12, 312e12), "NVIDIA Unknown": (None, None)}
    for name, peaks in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        for run, peak in zip((tiny_run, of_bf16), peaks, strict=True):
            found = StepFigures(run, ranks=4).of(COUNTS, 1e-3, step_seconds=2.0)
            flops = seen_training_flops(run, COUNTS)
            assert flops is not None
            expected = None if peak is None else pytest.approx(flops / 2.0 / (4 * peak))
            assert found["model_flops_utilisation"] == expected
            assert found["gpu_peak_allocated_bytes"] == 5
    assert not [name for name in found if name.startswith("learning_rate")]


def test_a_window_that_never_opens(tiny_run):
    plan = plan_of(replace(tiny_run, profile=ProfileSettings(steps=(6, 8))))
    with pytest.raises(ConfigError, match="begins after the 6 steps of the run"):
        check_profile(plan, ranks=1)
    plan = plan_of(replace(tiny_run, profile=ProfileSettings(steps=(5, 8), ranks=(0, 2))))
    with pytest.raises(ConfigError, match="names 2, and the 2 ranks are numbered from 0"):
        check_profile(plan, ranks=2)
    check_profile(plan, ranks=3)
