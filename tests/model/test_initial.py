import math

import pytest
import torch

from megavlm.config.engines import MegatronSettings
from megavlm.model.initial import initial_values, materialise
from megavlm.model.params import Parameter, parameters
from megavlm.model.vlm import VisionLanguageModel
from tests.batches import TINY
from tests.ranks import alone, as_rank

CPU = torch.device("cpu")
DRAWN = Parameter("language.x.weight", (64, 80), initial_std=0.1)


def test_values_depend_on_the_seed_and_the_name_alone():
    values = initial_values(DRAWN, 1, CPU)
    torch.manual_seed(5)  # torch's own generator has no part in it
    assert torch.equal(values, initial_values(DRAWN, 1, CPU))
    assert not torch.equal(values, initial_values(DRAWN, 2, CPU))
    assert not torch.equal(values, initial_values(DRAWN._replace(name="language.y.weight"), 1, CPU))
    # How it is divided, and which part trains it, change nothing.
    other = DRAWN._replace(tensor_axis=1, tensor_blocks=2, part="projector")
    assert torch.equal(values, initial_values(other, 1, CPU))
    # A seed and a name that read alike when joined are not alike.
    assert not torch.equal(
        initial_values(DRAWN._replace(name="1:w"), 1, CPU),
        initial_values(DRAWN._replace(name="w"), 11, CPU),
    )


@pytest.mark.parametrize("entry", parameters(TINY), ids=lambda entry: entry.name)
def test_mean_and_standard_deviation_are_the_ledgers(entry):
    values = initial_values(entry, 1, CPU)
    assert values.shape == entry.shape and values.dtype == torch.float32
    if entry.initial_std == 0:
        assert torch.equal(values, torch.full(entry.shape, entry.initial_mean))
        return
    # Five standard errors.
    assert values.mean().item() == pytest.approx(
        entry.initial_mean, abs=5 * entry.initial_std / math.sqrt(entry.numel)
    )
    assert values.std().item() == pytest.approx(
        entry.initial_std, rel=5 / math.sqrt(2 * entry.numel)
    )


def held_by(parallel: MegatronSettings, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Initial weights that a rank holds, by the ledger's names."""
    with as_rank(rank, ranks, parallel):
        with torch.device("meta"):
            model = VisionLanguageModel(TINY, dtype=torch.float32, parallel=parallel)
        materialise(model, 3, CPU)
        ledger = model.ledger()
        return {ledger[name].name: p.detach() for name, p in model.named_parameters()}


def test_a_rank_has_its_part_of_what_one_process_has():
    with alone():
        with torch.device("meta"):
            model = VisionLanguageModel(TINY, dtype=torch.float32)
        materialise(model, 3, CPU)
        whole = dict(model.named_parameters())
    entries = {entry.name: entry for entry in parameters(TINY)}
    assert whole.keys() == entries.keys()
    parallel = MegatronSettings(tensor_parallel=2, pipeline_parallel=2, chunk_layers=(2, 4))
    seen = set()
    for rank in range(4):
        for name, part in held_by(parallel, rank, 4).items():
            expected = entries[name].shard(whole[name], 2, rank % 2)
            assert torch.equal(part, expected), f"{name} on rank {rank}"
            seen.add(name)
    assert seen == entries.keys()


def test_marks_and_freezing_survive():
    with alone():
        with torch.device("meta"):
            model = VisionLanguageModel(TINY, dtype=torch.bfloat16, frozen=["encoder"])
        before = {name: (vars(p), p.requires_grad) for name, p in model.named_parameters()}
        materialise(model, 3, CPU)
    after = {name: (vars(p), p.requires_grad) for name, p in model.named_parameters()}
    assert after == before
    assert not after["encoder.class_token"][1] and after["projector.weight"][1]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device for p in model.parameters()} == {CPU}
