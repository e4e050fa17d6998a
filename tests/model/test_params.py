import pytest
import torch

from megavlm.config.presets import PRESETS
from megavlm.model.params import count_by_part, parameters
from megavlm.model.vlm import VisionLanguageModel
from tests.ranks import alone


@pytest.mark.parametrize("preset", PRESETS)
def test_the_ledger_is_the_model(preset):
    sizes = PRESETS[preset]
    with alone(), torch.device("meta"):
        model = VisionLanguageModel(sizes, dtype=torch.bfloat16)
    built = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert built == {p.name: p.shape for p in parameters(sizes)}
    split = {
        name: getattr(p, "partition_dim", None)
        for name, p in model.named_parameters()
        if getattr(p, "tensor_model_parallel", False)
    }
    assert split == {p.name: p.tensor_axis for p in parameters(sizes) if p.tensor_axis is not None}


@pytest.mark.parametrize(
    ("preset", "billions"), [("vlm-1b", 1.105), ("vlm-8b", 7.540), ("vlm-30b", 30.470)]
)
def test_presets_have_the_size_that_they_are_named_for(preset, billions):
    counts = count_by_part(PRESETS[preset])
    assert sum(counts.values()) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert sum(counts.values()) == sum(p.numel for p in parameters(PRESETS[preset]))
