import random
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from megavlm.config.engines import MegatronSettings
from megavlm.planner.cut import balanced_cut, flops_per_image, with_cut
from tests.runs import load_run

RUN = Path(__file__).parents[2] / "configs" / "vlm-30b.yaml"
LAYERS = 72


def cut_of(pipeline: int, virtual: int = 1, *overrides: str) -> tuple[int, ...]:
    """The chosen layers of every chunk of vlm-30b."""
    sizes = [f"megatron.pipeline_parallel={pipeline}", f"megatron.virtual_pipeline={virtual}"]
    cut = with_cut(load_run(RUN, ["engine=megatron", *sizes, *overrides])).chunk_layers
    assert cut is not None and sum(cut) == LAYERS and min(cut) >= 1
    return cut


def all_cuts(layers: int, chunks: int):
    for ends in combinations(range(1, layers), chunks - 1):
        yield tuple(end - start for start, end in pairwise((0, *ends, layers)))


def costliest(costs: tuple[float, ...], cut: tuple[int, ...]) -> float:
    ends = [sum(cut[: i + 1]) for i in range(len(cut))]
    return max(sum(costs[end - layers : end]) for end, layers in zip(ends, cut, strict=True))


def test_no_cut_has_a_cheaper_costliest_chunk_than_the_balanced_one():
    generator = random.Random(0)
    for _ in range(100):
        layers = generator.randint(1, 10)
        chunks = generator.randint(1, layers)
        costs = tuple(float(generator.randint(0, 9)) for _ in range(layers))
        chosen = balanced_cut(costs, chunks)
        assert len(chosen) == chunks and sum(chosen) == layers and min(chosen) >= 1
        best = min(costliest(costs, cut) for cut in all_cuts(layers, chunks))
        assert costliest(costs, chosen) == best


def test_equal_layers_are_cut_evenly():
    assert balanced_cut((1.0,) * 12, 4) == (3, 3, 3, 3)
    assert sorted(balanced_cut((1.0,) * 14, 4)) == [3, 3, 4, 4]


@pytest.mark.parametrize(("pipeline", "virtual"), [(4, 1), (12, 1), (4, 3)])
def test_the_encoder_makes_the_first_chunk_lighter_in_decoder_layers(pipeline, virtual):
    batch = ["train.samples_per_step=2304", "train.micro_batches=12"]
    first, *others = cut_of(pipeline, virtual, *batch)
    assert first < min(others)
    # The head costs about one layer.
    assert others[-1] <= min(others[:-1])


def test_a_frozen_encoder_leaves_room_for_more_layers_in_the_first_chunk():
    trained, frozen = cut_of(4), cut_of(4, 1, "train.frozen=[encoder]")
    assert trained[0] < frozen[0] < LAYERS / 4


def test_the_more_text_an_image_has_the_less_the_encoder_matters():
    assert cut_of(4)[0] < cut_of(4, 1, "data.texts_per_sample=4")[0]


def test_chunk_layers_of_the_run_file_win():
    assert cut_of(4, 1, "megatron.chunk_layers=[18,18,18,18]") == (18, 18, 18, 18)


def test_one_chunk_and_other_engines_have_no_cut():
    assert with_cut(load_run(RUN, ["engine=megatron"])).chunk_layers is None
    ignored = ["engine=zero3", "megatron.pipeline_parallel=4"]
    assert with_cut(load_run(RUN, ignored)) == MegatronSettings()


def test_flops_are_twice_the_weights_that_each_token_meets_and_the_attention():
    before, layers, after = flops_per_image(load_run(RUN).model, 100, tokens_per_text=50)
    width, kv_width, mlp_width = 6_144, 1_024, 16_192
    self_layer = 2 * 100 * (2 * width**2 + 2 * width * kv_width + 3 * width * mlp_width)
    # Causal: a token sees half of its text.
    assert layers[0] == self_layer + 2 * width * 100 * 50
    cross_layer = 2 * 100 * (2 * width**2 + 3 * width * mlp_width)
    cross_layer += 2 * 257 * 2 * width * kv_width
    assert layers[5] == cross_layer + 4 * width * 100 * 257
    assert [i for i, cost in enumerate(layers) if cost == layers[5]] == list(range(5, LAYERS, 6))
    assert after == 2 * 100 * width * 64_000
    encoder_layer = 2 * 264 * (4 * 1_664**2 + 2 * 1_664 * 8_192) + 4 * 1_664 * 264**2
    assert before == 48 * encoder_layer + 2 * 257 * 1_664 * width
