"""What a run's step would take on a cluster."""

from collections.abc import Sequence
from typing import NamedTuple

from megavlm.config.engines import MegatronSettings
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.errors import ConfigError
from megavlm.planner.cut import with_cut
from megavlm.planner.hardware import Cluster
from megavlm.planner.network import Group, neighbours, send_seconds
from megavlm.planner.step import Division, Sharding, Step, divided_step, sharded_step
from megavlm.planner.work import (
    Block,
    Tokens,
    model_blocks,
    passed_on_bytes,
    tokens_of,
    value_bytes,
)

GRADIENT_BYTES = 4
SAMPLES_PER_WORKER_SECOND = 165
"""Pictures of 1,200 x 900 that a loader's worker decodes, crops and varies in a second."""
STATE_BYTES = 12
"""Of a parameter in a checkpoint: the weight and two moments in fp32."""


class Prediction(NamedTuple):
    """Of one optimiser step."""

    step: Step
    seen_flops: float
    """Of the whole model, forward and backward, on tokens that are no padding."""
    data_seconds: float
    """What the loader's workers take for a step's samples, while the step before goes on."""
    checkpoint_seconds: float
    """A step's share of the time in which training waits for a checkpoint's copies in the host."""
    value_bytes: int
    """Of what matrix products multiply."""

    @property
    def seconds(self) -> float:
        """All in all."""
        return max(self.step.seconds, self.data_seconds) + self.checkpoint_seconds

    def utilisation(self, cluster: Cluster) -> float:
        """Model-FLOPs utilisation: 0 to 1, recomputation and padding left out."""
        peak = cluster.gpu.peak_flops_per_second(self.value_bytes) * cluster.ranks
        return self.seen_flops / (self.seconds * peak)


def predict(run: RunSettings, cluster: Cluster, tokens_per_text: float) -> Prediction:
    """Raises ConfigError where the model or the batch does not divide over the cluster's ranks.

    And for an optimiser on NVMe: no rate of such disks is known or measured here.
    """
    if run.engine == "zero3" and run.zero3.offload_optimizer == "nvme":
        raise ConfigError(
            "zero3.offload_optimizer=nvme is not predicted: no rate of the hosts' disks is known; "
            "plan with zero3.offload_optimizer=cpu, which is faster"
        )
    copies = data_parallel_ranks(run, cluster.ranks)
    tokens = tokens_of(run, samples_per_micro_batch(run.train, copies), tokens_per_text)
    shape = {"micro_batches": run.train.micro_batches, "recompute": run.train.recompute}
    if run.engine == "megatron":
        parallel = with_cut(run)
        blocks = model_blocks(run, tokens, parallel)
        chunks = cut_blocks(run, blocks, parallel)
        step = divided_step(cluster, chunks, _division(run, cluster, tokens, copies), **shape)
    else:
        blocks = model_blocks(run, tokens, run.model_parallel)
        step = sharded_step(cluster, blocks, _sharding(run, cluster), **shape)
    seen = sum(block.seen_training_flops for block in blocks)
    own = run.train.samples_per_step / copies  # one rank of each copy loads for the others
    trained = sum(b.parameters for b in blocks if b.trained) * run.model_parallel.tensor_parallel
    written = STATE_BYTES * trained / cluster.ranks
    return Prediction(
        step=step,
        seen_flops=run.train.micro_batches * copies * seen,
        data_seconds=own / (SAMPLES_PER_WORKER_SECOND * max(1, run.data.workers)),
        checkpoint_seconds=written / cluster.gpu.host_link_bytes_per_second / run.checkpoint.every,
        value_bytes=value_bytes(run),
    )


def _sharding(run: RunSettings, cluster: Cluster) -> Sharding:
    world, alone = Group(cluster.ranks, cluster.gpus_per_host), Group(1, 1)
    size = value_bytes(run)
    if run.engine == "zero3":
        zero3 = run.zero3
        host = zero3.secondary_partition
        return Sharding(
            first=world,
            later=neighbours(cluster, host) if host > 1 else world,
            reduce=world,
            replicas=alone,
            reduced_bytes=0.5 if zero3.quantized_gradients else size,
            gathered_bytes=1 if zero3.quantized_weights else size,
            states_in_host=zero3.offload_optimizer != "none",
            weights_in_host=zero3.offload_parameters != "none",
            ahead=0 if zero3.prefetch_bucket == 0 else 1,
            overlapped_reduction=zero3.overlap_communication,
        )
    shards = run.fsdp2.shard_ranks or cluster.ranks
    near = neighbours(cluster, shards)
    return Sharding(
        first=near,
        later=near,
        reduce=near,
        replicas=neighbours(cluster, cluster.ranks // shards, stride=shards),
        reduced_bytes=GRADIENT_BYTES,
        gathered_bytes=size,
        ahead=run.fsdp2.prefetch_layers,
    )


def _division(run: RunSettings, cluster: Cluster, tokens: Tokens, copies: int) -> Division:
    parallel = run.model_parallel
    tensor, pipeline = parallel.tensor_parallel, parallel.pipeline_parallel
    sent = sum(passed_on_bytes(run, tokens, parallel))
    within_host = tensor * copies * pipeline <= cluster.gpus_per_host
    return Division(
        tensor=neighbours(cluster, tensor),
        pipeline=pipeline,
        copies=neighbours(cluster, copies, stride=tensor),
        send_seconds=send_seconds(cluster, within_host, sent) if pipeline > 1 else 0.0,
        reduced_bytes=GRADIENT_BYTES,
        overlapped_copies=run.megatron.overlap_communication,
    )


def cut_blocks(
    run: RunSettings, blocks: Sequence[Block], parallel: MegatronSettings
) -> list[list[Block]]:
    """The blocks of each chunk: the encoder belongs to the first one, the head to the last.

    parallel: with the cut chosen, as `with_cut` does.
    """
    ends = [len(blocks) - 1 - run.model.decoder.layers]
    for count in parallel.chunk_layers or (run.model.decoder.layers,):
        ends.append(ends[-1] + count)
    inner = ends[1:-1]
    return [list(blocks[a:b]) for a, b in zip([0, *inner], [*inner, len(blocks)], strict=True)]
