from dataclasses import replace

import torch

from megavlm.engine.optim import adamw
from megavlm.stages.start import objective_of
from tests.ranks import alone


def groups_of(run):
    """The optimiser's groups of a run's model, as names; and the names of all its parameters."""
    with alone(), torch.device("meta"):
        model = objective_of(run).build(dtype=torch.float32, recompute="none")
        optimizer = adamw(model.named_parameters(), model.ledger(), run)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [(g, {names[id(p)] for p in g["params"]}) for g in optimizer.param_groups]
    return groups, set(names.values())


def test_only_matrices_decay(tiny_run):
    run = replace(tiny_run, train=replace(tiny_run.train, frozen=("projector",)))
    groups, names = groups_of(run)
    decayed = set().union(*(members for group, members in groups if group["weight_decay"]))
    kept = set().union(*(members for group, members in groups if not group["weight_decay"]))
    assert {group["weight_decay"] for group, _ in groups} == {0.0, 0.1}
    assert decayed | kept | {"projector.weight", "projector.bias"} == names
    assert all(name.endswith("weight") for name in decayed)
    for part in ("norm", "bias", "gate", "positions", "class_token", "mask_token", "scale"):
        assert not any(part in name for name in decayed), part


def test_learning_rates_by_part_and_by_encoder_layer(tiny_run):
    """Layer decay as in BEiT: embeddings are layer 0, the last norm is above all layers."""
    settings = replace(tiny_run.optimizer, scales={"decoder": 0.5, "encoder": 0.1})
    run = replace(tiny_run, optimizer=replace(settings, encoder_layer_decay=0.5))
    scales = {name: group["scale"] for group, members in groups_of(run)[0] for name in members}
    expected = {
        "encoder.positions": 0.1 * 0.5**3,
        "encoder.patch.weight": 0.1 * 0.5**3,
        "encoder.norm_pre.bias": 0.1 * 0.5**3,
        "encoder.block.layers.0.mlp.linear_fc1.bias": 0.1 * 0.5**2,
        "encoder.block.layers.1.mlp.linear_fc1.weight": 0.1 * 0.5,
        "encoder.block.final_layernorm.weight": 0.1,
        "projector.weight": 1.0,
        "language.embedding.word_embeddings.weight": 0.5,
        "language.decoder.layers.0.mlp.linear_fc1.weight": 0.5,
        "language.decoder.layers.2.attention_gate": 1.0,
    }
    assert {name: scales[name] for name in expected} == expected
