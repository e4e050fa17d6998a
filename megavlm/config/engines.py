"""The settings of each engine: how a model is divided over ranks."""

from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from megavlm.config.sizes import STRICT, ModelSizes, require_divides
from megavlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Zero3Settings:
    """DeepSpeed ZeRO-3. Sizes count parameters, not bytes; None lets the planner choose."""

    reduce_bucket: int | None = None
    """Gradients are reduced in groups of this size."""
    prefetch_bucket: int | None = None
    """Parameters gathered ahead of their use."""
    persistence_threshold: int | None = None
    """Parameters up to this size stay gathered; only the optimiser's share of them is divided."""
    max_live_parameters: int | None = None
    """Nothing is gathered ahead of its use while so many parameters are gathered."""
    overlap_communication: bool = True
    """Reduce gradients while the backward pass goes on."""
    secondary_partition: int = 1
    """Neighbouring ranks, those of one host, that hold the weights a second time between them
    (hpZ of ZeRO++), so that only the first gather of a step leaves the host; 1 is off."""
    quantized_weights: bool = False
    """Gather weights in 8 bits (qwZ of ZeRO++); needs GPUs."""
    quantized_gradients: bool = False
    """Reduce gradients between hosts in 4 bits (qgZ of ZeRO++); needs GPUs."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where master weights and moments live; both cpu and nvme update them on the CPU."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where the share of the weights that a rank holds lives."""
    nvme_folder: Path | None = None
    """Folder on a disk of each host, for an optimiser on nvme."""

    def __post_init__(self) -> None:
        for name in ("prefetch_bucket", "persistence_threshold", "max_live_parameters"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"zero3.{name}={getattr(self, name)} must not be negative")
        for name in ("reduce_bucket", "secondary_partition"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"zero3.{name}={value} must be at least 1")
        if self.offload_optimizer == "nvme" and self.nvme_folder is None:
            raise ConfigError(
                "zero3.offload_optimizer=nvme needs a folder on a disk of each host; set "
                "zero3.nvme_folder"
            )
        if self.nvme_folder is not None and self.offload_optimizer != "nvme":
            raise ConfigError(
                f"zero3.nvme_folder={self.nvme_folder} is not used with zero3.offload_optimizer="
                f"{self.offload_optimizer}; leave it out or set zero3.offload_optimizer=nvme"
            )

    def check_device(self, *, has_gpu: bool) -> None:
        """Raise ConfigError when the settings need GPUs that this host does not have."""
        for name in ("quantized_weights", "quantized_gradients"):
            if getattr(self, name) and not has_gpu:
                raise ConfigError(
                    f"zero3.{name}=true needs GPUs (its kernels are CUDA only) and this host has "
                    "none; set it to false"
                )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Fsdp2Settings:
    """PyTorch `fully_shard`, one unit per layer or other large module."""

    shard_ranks: int | None = None
    """Hybrid sharding: weights are sharded over so many ranks and replicated beyond; None shards
    over all ranks."""
    prefetch_layers: int = 1
    """Units whose weights are gathered ahead of their use, forward and backward."""

    def __post_init__(self) -> None:
        if self.shard_ranks is not None and self.shard_ranks < 1:
            raise ConfigError(f"fsdp2.shard_ranks={self.shard_ranks} must be at least 1")
        if self.prefetch_layers < 0:
            raise ConfigError(f"fsdp2.prefetch_layers={self.prefetch_layers} must not be negative")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MegatronSettings:
    """Megatron-core: tensor, sequence, pipeline and data parallelism.

    The optimiser's states are always sharded over the data-parallel ranks.
    """

    tensor_parallel: int = 1
    """Ranks that split each matrix; must divide heads, key/value heads, MLP and vocabulary."""
    sequence_parallel: bool = False
    """Split what lies between the matrices, too, along the tokens."""
    pipeline_parallel: int = 1
    """Ranks that hold consecutive layers; the image encoder is part of the first."""
    virtual_pipeline: int = 1
    """Chunks of layers on each pipeline rank; above 1 the schedule interleaves them."""
    chunk_layers: tuple[int, ...] | None = None
    """Decoder layers (self- and cross-attention) of each chunk, in the model's order: pipeline x
    virtual numbers. None balances FLOPs, the encoder and the head included."""
    context_parallel: int = 1
    """Not supported above 1: texts are short, and image tokens are not split."""
    overlap_communication: bool = True
    """Reduce gradients during the backward pass and gather weights during the forward pass."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_parallel",
            "pipeline_parallel",
            "virtual_pipeline",
            "context_parallel",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"megatron.{name}={getattr(self, name)} must be at least 1")
        if self.context_parallel != 1:
            raise ConfigError(
                f"megatron.context_parallel={self.context_parallel} is not supported (packed texts "
                "are masked, which megatron-core's context parallelism does not handle without "
                "TransformerEngine); set it to 1 and use megatron.sequence_parallel"
            )
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ConfigError(
                "megatron.sequence_parallel splits tokens over the tensor-parallel ranks; set "
                "megatron.tensor_parallel above 1 or switch it off"
            )
        if self.virtual_pipeline > 1 and self.pipeline_parallel == 1:
            raise ConfigError(
                f"megatron.virtual_pipeline={self.virtual_pipeline} interleaves chunks over "
                "pipeline ranks; set megatron.pipeline_parallel above 1 or virtual_pipeline to 1"
            )
        if self.chunk_layers is not None and min(self.chunk_layers, default=1) < 1:
            raise ConfigError(
                f"megatron.chunk_layers={list(self.chunk_layers)}: every chunk needs at least 1"
            )
        if self.chunk_layers is not None and len(self.chunk_layers) != self.chunks:
            raise ConfigError(
                f"megatron.chunk_layers has {len(self.chunk_layers)} numbers; pipeline_parallel x "
                f"virtual_pipeline = {self.chunks} are needed"
            )

    @property
    def chunks(self) -> int:
        """Pieces that the decoder is cut into."""
        return self.pipeline_parallel * self.virtual_pipeline

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def token_shards(self) -> int:
        """Parts that tokens are split into between the matrices."""
        return self.tensor_parallel if self.sequence_parallel else 1

    def check_model(self, sizes: ModelSizes, row_tokens: int, bucket_tokens: int = 0) -> None:
        """Raise ConfigError unless a model of these sizes can be divided this way."""
        encoder, decoder = sizes.encoder, sizes.decoder
        for name, size in (
            ("model.encoder.heads", encoder.heads),
            ("model.encoder.mlp_width", encoder.mlp_width),
            ("model.decoder.heads", decoder.heads),
            ("model.decoder.kv_heads", decoder.kv_heads),
            ("model.decoder.mlp_width", decoder.mlp_width),
            ("model.decoder.vocabulary", decoder.vocabulary),
            *(
                (f"model.text_tower.{name}", getattr(sizes.text_tower, name))
                for name in ("heads", "mlp_width")
                if sizes.text_tower is not None
            ),
        ):
            require_divides("megatron.tensor_parallel", self.tensor_parallel, name, size)
        padded_tokens = encoder.tokens + encoder.register_tokens
        for name, size in (
            ("data.row_tokens", row_tokens),
            ("data.row_bucket_tokens", bucket_tokens),
            ("tokens of an image in the encoder", padded_tokens),
        ):
            require_divides("megatron.tensor_parallel", self.token_shards, name, size)
        if self.chunks > decoder.layers:
            raise ConfigError(
                f"megatron.pipeline_parallel x virtual_pipeline = {self.chunks} chunks exceed the "
                f"{decoder.layers} decoder layers; every chunk needs at least one"
            )
        if self.chunk_layers is not None and sum(self.chunk_layers) != decoder.layers:
            raise ConfigError(
                f"megatron.chunk_layers={list(self.chunk_layers)} must add up to the "
                f"{decoder.layers} decoder layers, not {sum(self.chunk_layers)}"
            )

    def check_micro_batches(self, micro_batches: int) -> None:
        """Raise ConfigError unless the schedule can run so many micro-batches."""
        if self.virtual_pipeline > 1 and micro_batches % self.pipeline_parallel:
            raise ConfigError(
                f"train.micro_batches={micro_batches} is not divisible by "
                f"megatron.pipeline_parallel={self.pipeline_parallel}, which the interleaved "
                "schedule needs; change it or set megatron.virtual_pipeline=1"
            )


UNDIVIDED = MegatronSettings()
"""Every copy of the model whole on one rank."""
