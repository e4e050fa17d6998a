from collections import Counter

import pytest
import torch

from megavlm.config.engines import MegatronSettings
from megavlm.config.presets import PRESETS
from megavlm.config.sizes import ModelSizes
from megavlm.model.params import PARTS, Parameter, count_by_part, parameters
from megavlm.model.vlm import VisionLanguageModel
from tests.batches import OTHER_FORM, TINY
from tests.ranks import alone, as_rank

INTERLEAVED = {"pipeline_parallel": 2, "virtual_pipeline": 2}
LAYOUTS = {
    "TP2": MegatronSettings(tensor_parallel=2),
    "TP2 SP": MegatronSettings(tensor_parallel=2, sequence_parallel=True),
    "PP2": MegatronSettings(pipeline_parallel=2, chunk_layers=(3, 3)),
    "PP2 interleaved": MegatronSettings(**INTERLEAVED, chunk_layers=(1, 2, 2, 1)),
    "PP4 uneven": MegatronSettings(pipeline_parallel=4, chunk_layers=(1, 1, 3, 1)),
    "TP2 x PP2 interleaved SP": MegatronSettings(
        tensor_parallel=2, sequence_parallel=True, **INTERLEAVED, chunk_layers=(1, 1, 2, 2)
    ),
}


FORMS = {"preset": TINY, "other form": OTHER_FORM}


@pytest.mark.parametrize("sizes", [*PRESETS.values(), OTHER_FORM], ids=[*PRESETS, "other form"])
def test_the_ledger_is_the_model(sizes):
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


def entries_on(
    parallel: MegatronSettings, rank: int, ranks: int, sizes: ModelSizes = TINY
) -> list[str]:
    """Builds a rank's chunks; returns the ledger's names of what they hold, shapes compared."""
    with as_rank(rank, ranks, parallel):
        virtual = parallel.virtual_pipeline
        names = []
        for vp_stage in range(virtual) if virtual > 1 else [None]:
            with torch.device("meta"):
                model = VisionLanguageModel(
                    sizes, dtype=torch.bfloat16, parallel=parallel, vp_stage=vp_stage
                )
            ledger = model.ledger()
            for name, parameter in model.named_parameters():
                entry = ledger[name]
                expected = model.shard(entry, torch.empty(entry.shape, device="meta"))
                assert parameter.shape == expected.shape, f"{name} on rank {rank}"
                is_split = getattr(parameter, "tensor_model_parallel", False)
                assert is_split == (entry.tensor_axis is not None)
                names.append(entry.name)
        return names


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_together_hold_the_ledger_once(layout, form):
    check_held_once(LAYOUTS[layout], FORMS[form])


def test_four_tensor_parallel_ranks():
    check_held_once(MegatronSettings(tensor_parallel=4, sequence_parallel=True), OTHER_FORM)


def check_held_once(parallel: MegatronSettings, sizes: ModelSizes) -> None:
    ranks, tensor = parallel.model_ranks, parallel.tensor_parallel
    held = [entries_on(parallel, rank, ranks, sizes) for rank in range(ranks)]
    everything = Counter(entry.name for entry in parameters(sizes))
    for tensor_rank in range(tensor):
        # Tensor-parallel ranks are neighbours.
        assert Counter(name for names in held[tensor_rank::tensor] for name in names) == everything
    # The encoder lies on the first pipeline rank, the head on the last.
    assert "encoder.positions" in held[0] and "projector.weight" in held[0]
    assert "language.output_layer.weight" in held[-1]


def test_copies_of_the_model_hold_the_same():
    # 2 pipeline ranks x 2 copies: stages lie farthest apart.
    parallel = LAYOUTS["PP2"]
    first, second, third, fourth = (entries_on(parallel, rank, 4) for rank in range(4))
    assert first == second and third == fourth
    assert not set(first) & set(third)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "entry",
    [
        Parameter("whole", (8, 12)),
        Parameter("rows", (8, 12), 0),
        Parameter("columns", (8, 12), 1),
        Parameter("gate and up", (16, 3), 0, 2),
        Parameter("vector", (8,), 0),
    ],
    ids=lambda entry: entry.name,
)
def test_unsharding_undoes_sharding(entry, ranks):
    whole = torch.arange(entry.numel).view(entry.shape)
    shards = [entry.shard(whole, ranks, rank) for rank in range(ranks)]
    assert torch.equal(entry.unshard(shards), whole)
    if entry.tensor_axis is None:
        assert all(torch.equal(shard, whole) for shard in shards)
    else:
        assert {shard.numel() * ranks for shard in shards} == {entry.numel}


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_of_the_tiny_model_comes_back(form):
    for entry in parameters(FORMS[form]):
        whole = torch.arange(entry.numel).view(entry.shape)
        assert torch.equal(entry.unshard([entry.shard(whole, 2, r) for r in range(2)]), whole)


def test_blocks_are_split_one_by_one():
    entry = Parameter("gate and up", (8,), 0, 2)
    gate_and_up = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    assert entry.shard(gate_and_up, 2, 0).tolist() == [0, 1, 10, 11]
    assert entry.shard(gate_and_up, 2, 1).tolist() == [2, 3, 12, 13]


@pytest.mark.parametrize(
    ("preset", "billions"), [("vlm-1b", 1.105), ("vlm-8b", 7.540), ("vlm-30b", 30.470)]
)
def test_presets_have_the_size_that_they_are_named_for(preset, billions):
    counts = count_by_part(parameters(PRESETS[preset]))
    assert list(counts) == list(PARTS[:5])
    assert sum(counts.values()) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert sum(counts.values()) == sum(p.numel for p in parameters(PRESETS[preset]))
