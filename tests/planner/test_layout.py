from dataclasses import replace

import pytest
import torch

from megavlm.config.engines import MegatronSettings
from megavlm.model.cross_attention import CrossAttentionLayer
from megavlm.model.params import (
    CROSS_LAYERS,
    EMBEDDINGS,
    ENCODER,
    SELF_LAYERS,
    count_by_part,
    parameters,
)
from megavlm.model.vlm import VisionLanguageModel
from megavlm.planner.cut import with_cut
from megavlm.planner.layout import layout_of
from tests.batches import OTHER_FORM, TINY
from tests.planner.test_cut import RUN
from tests.ranks import as_rank
from tests.runs import load_run

OVERRIDES = ["model.preset=vlm-tiny", "engine=megatron"]


def tiny(*overrides: str):
    return load_run(RUN, [*OVERRIDES, *(f"megatron.{override}" for override in overrides)])


def vlm_30b(*overrides: str):
    return load_run(RUN, ["engine=megatron", *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("tensor_parallel=2",),
        ("pipeline_parallel=2",),
        ("pipeline_parallel=4", "chunk_layers=[1,1,3,1]"),
        ("tensor_parallel=2", "pipeline_parallel=2", "virtual_pipeline=2"),
    ],
)
@pytest.mark.parametrize("frozen", [(), ("encoder",), ("encoder", "decoder")])
@pytest.mark.parametrize("sizes", [TINY, OTHER_FORM], ids=["regular", "irregular"])
def test_chunks_hold_what_the_ranks_build(sizes, overrides, frozen):
    run = tiny(*overrides)
    run = replace(run, model=sizes, train=replace(run.train, frozen=frozen))
    parallel, layout = with_cut(run), layout_of(run)
    for rank in range(parallel.model_ranks):
        for vp_stage, chunk in enumerate(layout.on(rank // parallel.tensor_parallel)):
            with as_rank(rank, parallel.model_ranks, parallel), torch.device("meta"):
                model = VisionLanguageModel(
                    run.model,
                    dtype=torch.bfloat16,
                    frozen=frozen,
                    parallel=parallel,
                    vp_stage=vp_stage if parallel.virtual_pipeline > 1 else None,
                )
            assert chunk.parameters == sum(p.numel() for p in model.parameters())
            assert chunk.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
            layers = model.language.decoder.layers
            numbers = [layer.layer_number - 1 for layer in layers]
            assert numbers == list(chunk.layers)
            assert chunk.cross_layers == sum(isinstance(x, CrossAttentionLayer) for x in layers)


def test_the_layout_of_vlm_30b():
    layout = layout_of(vlm_30b("megatron.pipeline_parallel=4"))
    assert [len(chunk.layers) for chunk in layout.chunks] == [4, 23, 23, 22]
    assert [chunk.layers.start for chunk in layout.chunks] == [0, 4, 27, 50]
    assert [chunk.cross_layers for chunk in layout.chunks] == [0, 4, 4, 4]
    parts = [[part for part, _ in chunk.costs] for chunk in layout.chunks]
    assert parts[0] == [ENCODER, *[SELF_LAYERS] * 4]
    assert parts[1][:3] == [SELF_LAYERS, CROSS_LAYERS, SELF_LAYERS]
    assert parts[3][-2:] == [CROSS_LAYERS, EMBEDDINGS]
    assert sum(chunk.cost for chunk in layout.chunks) == pytest.approx(1)
    assert sum(chunk.parameters for chunk in layout.chunks) == sum(
        count_by_part(parameters(vlm_30b().model)).values()
    )


def test_chunks_take_turns_on_the_ranks():
    sizes = ["megatron.pipeline_parallel=2", "megatron.virtual_pipeline=3"]
    layout = layout_of(vlm_30b(*sizes))
    assert [chunk.number for chunk in layout.on(0)] == [0, 2, 4]
    assert [chunk.number for chunk in layout.on(1)] == [1, 3, 5]
    assert layout.cost(0) + layout.cost(1) == pytest.approx(1)
    assert layout.costliest_over_mean == pytest.approx(2 * max(layout.cost(0), layout.cost(1)))


def test_the_bubble():
    assert layout_of(vlm_30b()).bubble == 0
    assert layout_of(vlm_30b("megatron.pipeline_parallel=4")).bubble == 3 / 8
    sizes = ["megatron.pipeline_parallel=4", "megatron.virtual_pipeline=2"]
    assert layout_of(vlm_30b(*sizes)).bubble == 3 / 16


def test_states_of_a_rank():
    whole = sum(count_by_part(parameters(vlm_30b().model)).values())
    # bf16: 2 of weights, 4 of gradients, 12 of master weights and moments.
    assert layout_of(vlm_30b()).state_bytes(0, copies=1) == 18 * whole
    assert layout_of(vlm_30b()).state_bytes(0, copies=4) == (2 + 4 + 12 / 4) * whole
    # fp32: the weights are their own masters.
    assert layout_of(vlm_30b("train.precision=fp32")).state_bytes(0, copies=2) == 12 * whole
    encoder = count_by_part(parameters(vlm_30b().model))[ENCODER]
    frozen = layout_of(vlm_30b("train.frozen=[encoder]"))
    assert frozen.state_bytes(0, copies=1) == 18 * whole - 16 * encoder


def test_a_frozen_decoder_costs_less_where_no_image_is_attended_to():
    layout = layout_of(vlm_30b("train.frozen=[decoder]"))
    trained = layout_of(vlm_30b())
    ratio = {
        part: dict(layout.chunks[0].costs)[part] / cost for part, cost in trained.chunks[0].costs
    }
    assert ratio[SELF_LAYERS] == pytest.approx(ratio[CROSS_LAYERS] * 2 / 3)
    assert ratio[EMBEDDINGS] == pytest.approx(ratio[ENCODER] * 2 / 3)


def test_other_engines_have_one_chunk():
    layout = layout_of(load_run(RUN, ["megatron.pipeline_parallel=4"]))
    assert [len(chunk.layers) for chunk in layout.chunks] == [72]
    assert with_cut(load_run(RUN)) == MegatronSettings()
