from dataclasses import replace

import pytest

from megavlm.planner.compute import block_seconds, matmul_seconds
from megavlm.planner.work import Attention, Block, Matmul
from tests.planner.machines import ROUND

RATE, ATTENTION_RATE = 0.5e12, 0.25e12


def test_a_matrix_product_is_bound_by_arithmetic_or_by_memory():
    matmul = Matmul(256, 1024, 384)
    flops, moved = 2 * 256 * 1024 * 384, 2 * (256 * 1024 + 1024 * 384 + 256 * 384)
    assert matmul_seconds(ROUND, matmul, 2) == pytest.approx(flops / RATE)
    slow = replace(ROUND, memory_bytes_per_second=1e6)
    assert matmul_seconds(slow, matmul, 2) == pytest.approx(moved / 0.5e6)


def test_tiles_are_computed_whole_and_too_few_leave_multiprocessors_idle():
    whole = matmul_seconds(ROUND, Matmul(256, 64, 256), 2)
    assert matmul_seconds(ROUND, Matmul(129, 64, 250), 2) == pytest.approx(whole)
    many = replace(ROUND, multiprocessors=8)  # 4 tiles
    assert matmul_seconds(many, Matmul(256, 64, 256), 2) == pytest.approx(2 * whole)


@pytest.mark.parametrize(
    ("trained", "passes_gradients", "passes"),
    [(True, True, 2), (True, False, 1), (False, True, 1), (False, False, 0)],
)
def test_a_block_has_the_backward_passes_that_it_needs(trained, passes_gradients, passes):
    block = Block(
        name="block",
        part="decoder",
        parameters=1,
        value_bytes=2,
        matmuls=(Matmul(256, 128, 512), Matmul(256, 512, 128)),
        attentions=(Attention(256 * 64, 128),),
        streamed_values=3e9,
        kernels=5,
        trained=trained,
        passes_gradients=passes_gradients,
    )
    gpu = replace(ROUND, memory_bytes_per_second=4e12)
    arithmetic, attention = 2 * 2 * 256 * 128 * 512 / RATE, 4 * 256 * 64 * 128 / ATTENTION_RATE
    streamed = 2 * 3e9 / 2e12
    seconds = block_seconds(gpu, block)
    assert seconds.forward == pytest.approx(arithmetic + attention + streamed)
    beside = 2.5 * attention + 2 * streamed
    assert seconds.backward == pytest.approx(passes * arithmetic + bool(passes) * beside)
    modes = {"none": 0, "selective": attention, "full": seconds.forward}  # of a layer
    assert {mode: seconds.recomputed(mode) for mode in modes} == pytest.approx(modes)
    cross = block_seconds(gpu, replace(block, part="cross_attention"))
    assert cross == seconds._replace(recomputed_core=0)
    without = block_seconds(gpu, replace(block, attentions=()))  # is no layer
    assert {without.recomputed(mode) for mode in modes} == {0}
    # A host that launches slowly.
    seconds = block_seconds(replace(gpu, launch_seconds=1), block)
    assert (seconds.forward, seconds.backward) == (5, 5 * passes)


def test_fp32_has_its_own_rate_and_twice_the_bytes():
    block = Block(
        name="block",
        part="decoder",
        parameters=1,
        value_bytes=2,
        matmuls=(Matmul(256, 1024, 256),),
        attentions=(Attention(256 * 64, 128),),
    )
    tenth = replace(ROUND, fp32_matmul_flops_per_second=1e11)
    bf16, fp32 = (block_seconds(tenth, replace(block, value_bytes=size)) for size in (2, 4))
    assert fp32 == pytest.approx([10 * seconds for seconds in bf16])
    streams = replace(block, matmuls=(), attentions=(), streamed_values=3e9)
    slow = replace(ROUND, memory_bytes_per_second=4e12)
    bf16, fp32 = (block_seconds(slow, replace(streams, value_bytes=size)) for size in (2, 4))
    assert fp32 == pytest.approx([2 * seconds for seconds in bf16])
