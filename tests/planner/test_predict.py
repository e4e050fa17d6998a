from dataclasses import replace
from pathlib import Path

import pytest

from megavlm.config.sizes import DecoderSizes, EncoderSizes, ModelSizes
from megavlm.errors import ConfigError
from megavlm.model.params import parameters_of
from megavlm.planner.hardware import H100_80, Cluster, cluster_of
from megavlm.planner.predict import predict
from tests.planner.machines import of_round
from tests.runs import RUN, load_run

CONFIGS = Path(__file__).parents[2] / "configs"
# Every size is a number of whole tiles of 128, so that nothing is computed beside.
ONE_LAYER = ModelSizes(
    encoder=EncoderSizes(
        image_pixels=64, patch_pixels=16, width=128, layers=1, heads=2, mlp_width=256
    ),
    decoder=DecoderSizes(
        vocabulary=512, width=128, self_layers=1, cross_every=1, heads=2, kv_heads=1, mlp_width=256
    ),
)
IMAGES, TEXT = 128, 64
"""Pictures of a micro-batch, with a text of so many tokens each."""


def one_layer(*overrides, micro_batches=2, ranks=1):
    run = load_run(RUN, ["data.texts_per_sample=1", "data.row_tokens=64", *overrides])
    samples = micro_batches * IMAGES * ranks
    train = replace(run.train, micro_batches=micro_batches, samples_per_step=samples)
    return replace(run, model=ONE_LAYER, train=train)


def by_hand():
    """FLOPs, forward: patches, all other matrices, self- and cross-attention; of layers; seen."""
    states, patches, texts = IMAGES * 24, IMAGES * 17, IMAGES * TEXT  # 16, a class token, 7 more
    embed = 2 * patches * (3 * 16 * 16) * 128
    encoder = 4 * 128 * 128 + 2 * 128 * 256
    mlp, head, project = 3 * 128 * 256, 128 * 512, 128 * 128
    self_layer, cross_layer = 2 * 128 * 128 + 2 * 128 * 64 + mlp, 2 * 128 * 128 + mlp
    of_images = 128 * 2 * 64 + project
    of_texts = self_layer + cross_layer + head
    matrices = 2 * (states * encoder + patches * of_images + texts * of_texts)
    attention = 4 * 128 * (states * 24 + texts * TEXT)
    cross_attention = 4 * 128 * texts * 17
    seen = 2 * (patches * (encoder + of_images) + texts * of_texts)
    seen += 4 * 128 * (patches * 17 + texts * TEXT / 2 + texts * 17)
    of_layers = matrices - 2 * (patches * project + texts * head)
    return embed, matrices, attention, cross_attention, of_layers, seen


@pytest.mark.parametrize("engine", ["zero3", "fsdp2", "megatron"])
def test_one_rank_takes_the_time_of_its_flops(engine):
    embed, matrices, self_attention, cross_attention, of_layers, seen = by_hand()
    rate, attention_rate = 0.5e12, 0.25e12
    attention = self_attention + cross_attention
    forward = (embed + matrices) / rate + attention / attention_rate
    # Pictures need no gradients; fused attention's backward pass takes 2.5 times its forward.
    backward = (embed + 2 * matrices) / rate + 2.5 * attention / attention_rate
    alone = of_round(1, 1)
    for recompute, again in (
        ("none", 0),
        ("selective", self_attention / attention_rate),
        ("full", of_layers / rate + attention / attention_rate),
    ):
        run = one_layer(f"engine={engine}", f"train.recompute={recompute}")
        prediction = predict(run, alone, TEXT)
        step = prediction.step
        assert step.compute_seconds == pytest.approx(2 * (forward + backward), rel=1e-9)
        assert step.recompute_seconds == pytest.approx(2 * again, rel=1e-9)
        assert step.communication_seconds == pytest.approx(0, abs=1e-12)
        assert step.bubble_seconds == pytest.approx(0, abs=1e-12)
        assert step.seconds == pytest.approx(2 * (forward + backward + again), rel=1e-9)
        assert prediction.seen_flops == pytest.approx(2 * (2 * embed + 3 * seen), rel=1e-9)


def test_model_flops_utilisation():
    run = one_layer("data.workers=8", ranks=4)
    cluster = of_round(2, 2)
    prediction = predict(run, cluster, TEXT)
    embed, *_, seen = by_hand()
    flops = 4 * 2 * (2 * embed + 3 * seen)
    expected = flops / (4 * 1e12) / prediction.seconds
    assert prediction.utilisation(cluster) == pytest.approx(expected)
    for path in (CONFIGS / "30b").glob("*.yaml"):
        cluster = cluster_of(path.stem.partition("-")[2], 16, 8)
        assert 0.15 < predict(load_run(path), cluster, 64).utilisation(cluster) < 0.6


def test_loading_and_checkpoints():
    run = one_layer("data.workers=3", "checkpoint.every=10")
    slow, fast = (predict(r, of_round(1, 1), TEXT) for r in (one_layer("data.workers=0"), run))
    assert slow.data_seconds == pytest.approx(256 / 165)
    assert fast.data_seconds == pytest.approx(256 / 165 / 3)
    assert slow.seconds == slow.data_seconds + slow.checkpoint_seconds  # it is the bottleneck
    # 12 bytes of each parameter to the host, at 10 GB/s.
    whole = sum(entry.numel for entry in parameters_of(run))
    assert fast.checkpoint_seconds == pytest.approx(12 * whole / 1e10 / 10, rel=0.01)
    assert slow.checkpoint_seconds == pytest.approx(12 * whole / 1e10 / 200, rel=0.01)


LARGE = CONFIGS / "vlm-30b.yaml"
# A network card of 100 Gb/s for two GPUs, so that it matters what leaves a host.
GPU = replace(H100_80, network_bytes_per_second=6.25e9)
TWO_HOSTS = Cluster(gpu=GPU, hosts=2, gpus_per_host=8)
SLOW = {"link_bytes_per_second": 1e7, "network_bytes_per_second": 1e7}
"""So that bytes on their way take all the time."""
ONE_AT_A_TIME = ("zero3.prefetch_bucket=0", "zero3.overlap_communication=false")
SMALLER = ["train.samples_per_step=256", "train.micro_batches=4"]


def step_of(*overrides, cluster=TWO_HOSTS):
    return predict(load_run(LARGE, [*SMALLER, *overrides]), cluster, 64).step


def test_a_secondary_partition_and_fewer_bits_shorten_communication_alone():
    plain = step_of("zero3.secondary_partition=1")
    near = step_of("zero3.secondary_partition=8")
    weights = step_of("zero3.secondary_partition=1", "zero3.quantized_weights=true")
    gradients = step_of("zero3.secondary_partition=1", "zero3.quantized_gradients=true")
    for step in (near, weights, gradients):
        assert step.communication_seconds < 0.8 * plain.communication_seconds
        assert step.compute_seconds == plain.compute_seconds
        assert step.optimizer_seconds == plain.optimizer_seconds

    def bytes_of(step, kind):
        spans = [s.end - s.start for s in step.spans if s.kind == kind]
        latency = 15e-6 + 14 * 1.5e-6 + 2 * 8e-6
        return sum(seconds - latency for seconds in spans) * (6.25e9 * 0.85 * 8) * 16 / 15

    parameters = 30.5e9
    # bf16, forward and backward; then int8; then int4 of gradients, reduced once.
    assert bytes_of(plain, "gather") == pytest.approx(2 * 2 * parameters, rel=0.003)
    assert bytes_of(weights, "gather") == pytest.approx(2 * parameters, rel=0.003)
    assert bytes_of(plain, "reduce") == pytest.approx(2 * parameters, rel=0.003)
    assert bytes_of(gradients, "reduce") == pytest.approx(parameters / 2, rel=0.003)


def test_an_optimiser_on_the_host_moves_gradients_and_weights():
    plain, host = step_of(), step_of("zero3.offload_optimizer=cpu")
    own = 30.5e9 / 16
    # Over the bus, gradients in fp32, there and back in each of 4 micro-batches and there once
    # more, and weights in bf16; 32 bytes of AdamW in memory.
    expected = (4 * 8 + 4 + 2) * own / 25e9
    expected += 32 * own / 25e9
    assert host.optimizer_seconds == pytest.approx(expected, rel=0.002)
    on_gpu = 32 * own / (3.35e12 * 0.85)
    assert plain.optimizer_seconds == pytest.approx(on_gpu, rel=0.002)
    assert host.seconds - plain.seconds == pytest.approx(expected - on_gpu, rel=0.002)
    # New weights cross only between an optimiser and weights that lie apart.
    weights = step_of("zero3.offload_parameters=cpu")
    assert weights.optimizer_seconds == pytest.approx(on_gpu + 2 * own / 25e9, rel=0.002)
    both = step_of("zero3.offload_optimizer=cpu", "zero3.offload_parameters=cpu")
    crossing = host.optimizer_seconds - both.optimizer_seconds
    assert crossing == pytest.approx(2 * own / 25e9, rel=0.002)


def test_weights_on_the_host_are_copied_for_every_gather():
    plain = ("zero3.secondary_partition=1", *ONE_AT_A_TIME)
    moved = 2 * 2 * 30.5e9 / 16 / 25e9  # bf16, forward and backward
    host, gpu = step_of(*plain, "zero3.offload_parameters=cpu"), step_of(*plain)
    assert host.communication_seconds - gpu.communication_seconds == pytest.approx(
        4 * moved, rel=0.003
    )


def test_an_optimiser_on_nvme_is_not_predicted():
    with pytest.raises(ConfigError, match="offload_optimizer=nvme is not predicted"):
        step_of("zero3.offload_optimizer=nvme", "zero3.nvme_folder=/disk")


def test_what_zero3_does_not_overlap_or_gather_ahead_takes_longer():
    neither = step_of(*ONE_AT_A_TIME)
    each = sum(span.end - span.start for span in neither.spans)
    assert max(span.end for span in neither.spans) == pytest.approx(each)
    for overrides in ONE_AT_A_TIME:
        assert step_of().seconds < step_of(overrides).seconds <= neither.seconds


def test_fp32_sends_twice_the_bytes_and_computes_at_its_own_rate():
    bf16, fp32 = step_of(), step_of("train.precision=fp32")
    # Matrix products and attention, and twice the bytes of the rest.
    assert 0.85 * 989 / 67 < fp32.compute_seconds / bf16.compute_seconds < 989 / 67
    for overrides in (
        ("zero3.secondary_partition=1",),
        ("engine=megatron", "megatron.tensor_parallel=8", "megatron.pipeline_parallel=2"),
    ):
        no_latency = replace(TWO_HOSTS, gpu=replace(GPU, **SLOW))
        pair = [
            step_of(*overrides, f"train.precision={precision}", cluster=no_latency).seconds
            for precision in ("bf16", "fp32")
        ]
        assert pair[1] == pytest.approx(2 * pair[0], rel=0.02)


def test_hybrid_shards_reduce_inside_the_host_and_then_between_hosts():
    full, hybrid = step_of("engine=fsdp2"), step_of("engine=fsdp2", "fsdp2.shard_ranks=8")
    assert hybrid.communication_seconds < full.communication_seconds
    assert hybrid.optimizer_seconds == pytest.approx(2 * full.optimizer_seconds)


def test_tensor_parallel_ranks_reduce_what_layers_pass_on():
    one_host = Cluster(gpu=GPU, hosts=1, gpus_per_host=4)
    step = step_of("engine=megatron", "megatron.tensor_parallel=4", cluster=one_host)
    texts, patches, states = 16 * 256, 64 * 264, 64 * 257  # 64 samples, 4 texts in each row

    def seconds(tokens, width):
        return 15e-6 + 3 * 1.5e-6 + 2 * tokens * width * 3 / 4 / 360e9

    # An all-reduce, which is two rings, behind attention and behind the MLP of each layer: forward,
    # backward, and recomputed. One more sums the gradient of each cross-attention's images.
    rings = 4 * (48 * seconds(patches, 1664) + 72 * seconds(texts, 6144))
    expected = 4 * (3 * rings + 2 * 12 * seconds(states, 6144))
    expected += 4 * 2 * 2 * seconds(texts, 6144)  # embedding and head, which are not recomputed
    assert step.communication_seconds == pytest.approx(expected, rel=1e-6)
    assert step.bubble_seconds == pytest.approx(0, abs=1e-9)
    divided = ("engine=megatron", "megatron.tensor_parallel=4", "megatron.sequence_parallel=true")
    shards = step_of(*divided, cluster=one_host)
    assert shards.compute_seconds < step.compute_seconds  # norms are divided, too


def test_the_busiest_pipeline_rank_waits_for_the_others():
    step = step_of("engine=megatron", "megatron.pipeline_parallel=4")
    busy = [
        sum(s.end - s.start for s in step.spans if s.lane == f"rank {rank}") for rank in range(4)
    ]
    ended = max(span.end for span in step.spans)
    assert step.bubble_seconds == pytest.approx(ended - max(busy))
    # At least one micro-batch on every other rank, and at most one on ranks as busy as itself, and
    # the messages of 16 images and 4 rows there and back: measured 1.22 of the former.
    least = (sum(busy) - max(busy)) / 4
    sent = 8e-6 + 15e-6 + 2 * (4 * 256 + 16 * 257) * 6144 / (6.25e9 * 0.85)
    assert least < step.bubble_seconds < 3 * max(busy) / 4 + 6 * sent


@pytest.mark.parametrize(
    "overrides",
    [
        ("zero3.secondary_partition=1",),
        ("zero3.secondary_partition=8",),
        ("engine=fsdp2",),
        ("engine=fsdp2", "fsdp2.shard_ranks=8"),
        ("engine=megatron", "megatron.tensor_parallel=4", "megatron.pipeline_parallel=2"),
    ],
)
def test_more_bandwidth_never_takes_longer(overrides):
    run = load_run(LARGE, [*SMALLER, *overrides])
    for name in ("link_bytes_per_second", "network_bytes_per_second", "memory_bytes_per_second"):
        seconds = [
            predict(run, replace(TWO_HOSTS, gpu=replace(GPU, **{name: rate})), 64).seconds
            for rate in (1e9, 1e10, 5e10, 1e11, 3e11, 1e12, 1e13)
        ]
        assert seconds == sorted(seconds, reverse=True), name
        assert seconds[0] > seconds[-1]
