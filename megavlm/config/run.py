"""The settings of a run: one frozen tree, read from a YAML file and dotted overrides."""

import math
from dataclasses import field, replace
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from megavlm.config.data import DataSettings
from megavlm.config.engines import UNDIVIDED, Fsdp2Settings, MegatronSettings, Zero3Settings
from megavlm.config.evaluation import EvaluationSettings, Measure
from megavlm.config.guard import GuardSettings
from megavlm.config.metrics import MetricsSettings, ProfileSettings
from megavlm.config.objectives import (
    ContrastiveSettings,
    MimSettings,
    ObjectiveName,
    Part,
    check_objectives,
    is_pretraining,
    parts_of,
)
from megavlm.config.sizes import STRICT, ModelSizes, divisors
from megavlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerSettings:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float
    """Peak, reached at the end of the warm-up."""
    minimum_learning_rate: float = 1e-6
    """Reached at the last step."""
    warmup_fraction: float = 0.05
    """Share of all steps over which the learning rate rises linearly."""
    schedule: Literal["stage", "plan"] = "stage"
    """Whether all steps are those of the stage, or of the whole plan."""
    scales: dict[Part, float] = field(default_factory=lambda: {})
    """Factors on the learning rate, by part of the model; 1 where none is given."""
    encoder_layer_decay: float = 1.0
    """Further factor for each encoder layer from the last one down (BEiT, Bao et al. 2022)."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices; not to norms, biases, gates and embeddings of position."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1"
                )
        for name in ("learning_rate", "epsilon", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.minimum_learning_rate <= self.learning_rate:
            raise ConfigError(
                f"optimizer.minimum_learning_rate={self.minimum_learning_rate} must lie between 0 "
                f"and optimizer.learning_rate={self.learning_rate}"
            )
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigError(
                f"optimizer.warmup_fraction={self.warmup_fraction} must be at least 0 and below 1"
            )
        for part, scale in self.scales.items():
            if not 0 < scale < math.inf:
                raise ConfigError(
                    f"optimizer.scales.{part}={scale} must lie above 0; name what is not to learn "
                    "in train.frozen"
                )
        if not 0 < self.encoder_layer_decay <= 1:
            raise ConfigError(
                f"optimizer.encoder_layer_decay={self.encoder_layer_decay} must lie above 0 and at "
                "most 1"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainSettings:
    """The length and shape of training."""

    steps: int
    """Optimiser steps."""
    samples_per_step: int
    """Global batch: samples over all ranks and micro-batches of one step."""
    micro_batches: int
    """Micro-batches that each rank accumulates in a step."""
    micro_batch_samples: int | None = None
    """Most samples of a rank's micro-batch. Any number of ranks then trains the same global batch:
    fewer ranks accumulate more micro-batches, and shares may differ by one sample. None: as
    `micro_batches` says, and ranks must divide the batch."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of weights and activations; master weights and moments are always fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Gradient checkpointing: nothing, the attention cores, or whole layers."""
    z_loss: float = 0.0
    """Weight of the squared log-partition of each learned token, added to the loss that is trained
    on (PaLM, Chowdhery et al. 2022, section 5: 1e-4); 0 switches it off."""
    ema_decay: float = 0.0
    """Decay, per step, of a moving average of the trained weights, which evaluation then takes;
    0 keeps none. 0.999 averages over some 1,000 steps."""
    frozen: tuple[Part, ...] = ()
    """Parts that are not trained. `decoder` leaves the cross-attention layers trained, as in
    Flamingo."""
    log_every: int = 10
    """Steps between lines of the log; metrics.jsonl holds every step."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"train.{name}={value} must be at least 1")
        if not 0 <= self.z_loss < math.inf:
            raise ConfigError(f"train.z_loss={self.z_loss} must not be negative")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay={self.ema_decay} must be at least 0 and below 1")
        if self.micro_batch_samples is None and self.samples_per_step % self.micro_batches:
            raise ConfigError(
                f"train.samples_per_step={self.samples_per_step} is not divisible by "
                f"train.micro_batches={self.micro_batches}; try {divisors(self.samples_per_step)}"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointSettings:
    """When and where checkpoints are written, and which of them stay."""

    every: int
    """Steps between checkpoints; the last step always writes one."""
    folder: str | None = None
    """A path, or a URL that fsspec knows; None: `checkpoints` in the run folder.

    s3://bucket/run takes `pip install megavlm[s3]`; keys and endpoint are those of the environment
    (`AWS_ENDPOINT_URL`, say) or of fsspec's own configuration. What a crash has uploaded of a file
    stays unseen and takes room: have the bucket's lifecycle abort incomplete uploads after days."""
    keep_last: int = 2
    """The newest so many stay."""
    keep_every: int | None = None
    """And those of steps that this divides, for good."""
    asynchronous: bool = True
    """Write in the background; a step waits only until its tensors are copied."""
    on_failure: Literal["stop", "continue"] = "stop"
    """Where one cannot be written (a full disk): the run ends, or tells it, and goes on to the next
    one. What a stage or a signal ends with must be written in any case."""
    on_damage: Literal["stop", "earlier"] = "stop"
    """Where the newest is not as it was written: the run does not start, or it tells so, and goes
    on from the newest that is."""
    memory_every: int | None = None
    """Steps between copies in the hosts' memory, each on two hosts; they save a crash most of the
    steps since the last checkpoint. None: no copies."""
    memory_folder: Path = Path("/dev/shm")
    """A tmpfs on every host; copies lie in a folder there that this user alone can enter."""
    start_from: tuple[str, ...] = ()
    """Checkpoints, or converted models, whose weights a new run starts from; later ones win. What
    none of them holds starts as usual."""

    def __post_init__(self) -> None:
        for name in ("every", "keep_last", "keep_every", "memory_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"checkpoint.{name}={value} must be at least 1")
        if self.memory_every is not None and self.memory_every >= self.every:
            raise ConfigError(
                f"checkpoint.memory_every={self.memory_every} must be below checkpoint.every="
                f"{self.every}, or copies save nothing; lower it, or set it to null"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunSettings:
    """Everything a run depends on, during one of its stages."""

    run_folder: Path
    """Metrics and reports go here, and checkpoints unless `checkpoint.folder` says otherwise."""
    seed: int = 1
    objectives: dict[ObjectiveName, float] = field(default_factory=lambda: {"captioning": 1.0})
    """What is learned, with weights: captioning or instruction, or mim and contrastive together."""
    mim: MimSettings = field(default_factory=MimSettings)
    contrastive: ContrastiveSettings = field(default_factory=ContrastiveSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    model: ModelSizes
    data: DataSettings
    optimizer: OptimizerSettings
    train: TrainSettings
    checkpoint: CheckpointSettings
    guard: GuardSettings = field(default_factory=GuardSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    engine: Literal["zero3", "fsdp2", "megatron"] = "zero3"
    """zero3: DeepSpeed ZeRO-3. fsdp2: PyTorch fully_shard. megatron: Megatron-core."""
    zero3: Zero3Settings = field(default_factory=Zero3Settings)
    fsdp2: Fsdp2Settings = field(default_factory=Fsdp2Settings)
    megatron: MegatronSettings = field(default_factory=MegatronSettings)

    @property
    def model_parallel(self) -> MegatronSettings:
        """How each copy of the model is divided; ZeRO-3 and FSDP2 split no matrix.

        Pre-training has no decoder that a pipeline could cut: its ranks hold further copies.
        """
        if self.engine != "megatron":
            return UNDIVIDED
        if is_pretraining(self.objectives):
            return replace(
                self.megatron, pipeline_parallel=1, virtual_pipeline=1, chunk_layers=None
            )
        return self.megatron

    @property
    def trained_parts(self) -> tuple[Part, ...]:
        """The parts of the model that are not frozen."""
        return tuple(part for part in parts_of(self.objectives) if part not in self.train.frozen)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is measured when the stage is done."""
        return self.evaluation.measures_of(self.objectives)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must not be negative")
        check_objectives(self.objectives)
        if "contrastive" in self.objectives and self.model.text_tower is None:
            raise ConfigError(
                "objectives.contrastive compares pictures with texts; give the sizes of "
                "model.text_tower"
            )
        encoder = self.model.encoder
        side = encoder.image_pixels // encoder.patch_pixels
        if "mim" in self.objectives and self.mim.block_patches >= side:
            raise ConfigError(
                f"mim.block_patches={self.mim.block_patches} hides all or nothing of a picture of "
                f"{side} x {side} patches; make it smaller than {side}"
            )
        self._check_parts()
        contrastive = "contrastive" in self.objectives
        used = self.model if contrastive else replace(self.model, text_tower=None)
        self.model_parallel.check_model(
            used, self.data.row_tokens, self.data.row_bucket_tokens or self.data.row_tokens
        )
        self.model_parallel.check_micro_batches(self.train.micro_batches)

        if self.train.ema_decay and self.engine == "zero3" and self.zero3.nvme_folder is not None:
            raise ConfigError(
                f"train.ema_decay={self.train.ema_decay} averages weights in memory, and zero3 "
                "keeps them on NVMe; set one of the two off"
            )

    def _check_parts(self) -> None:
        parts = parts_of(self.objectives)
        for name, named in (
            ("train.frozen", self.train.frozen),
            ("optimizer.scales", self.optimizer.scales),
        ):
            for part in named:
                if part not in parts:
                    raise ConfigError(
                        f"{name} names {part}, which a stage of {', '.join(self.objectives)} has "
                        f"not (its parts are {', '.join(parts)}); set it in the stages that have it"
                    )
        if not self.trained_parts:
            raise ConfigError(
                f"train.frozen={list(self.train.frozen)} leaves nothing to train; take a part out"
            )


def data_parallel_ranks(run: RunSettings, ranks: int) -> int:
    """Copies of the model among so many ranks; raises ConfigError when they do not divide."""
    parallel = run.model_parallel
    model_ranks = parallel.model_ranks
    if ranks % model_ranks:
        raise ConfigError(
            f"{ranks} ranks are not divisible by megatron.tensor_parallel="
            f"{parallel.tensor_parallel} x pipeline_parallel={parallel.pipeline_parallel} "
            f"= {model_ranks}; use a multiple of {model_ranks} ranks"
        )
    shard_ranks = run.fsdp2.shard_ranks
    if run.engine == "fsdp2" and shard_ranks is not None and ranks % shard_ranks:
        raise ConfigError(
            f"fsdp2.shard_ranks={shard_ranks} does not divide the {ranks} ranks; try "
            f"{divisors(ranks)}"
        )
    secondary = run.zero3.secondary_partition
    if run.engine == "zero3" and ranks % secondary:
        raise ConfigError(
            f"zero3.secondary_partition={secondary} does not divide the {ranks} ranks; try "
            f"{divisors(ranks)}"
        )
    return ranks // model_ranks


def on_ranks(run: RunSettings, ranks: int) -> RunSettings:
    """The run as so many ranks train it: with as many micro-batches as they need.

    Raises ConfigError where the model does not divide over them.
    """
    train = run.train
    if train.micro_batch_samples is None:
        return run
    copies = data_parallel_ranks(run, ranks)
    needed = -(-train.samples_per_step // (copies * train.micro_batch_samples))
    if run.model_parallel.virtual_pipeline > 1:
        pipeline = run.model_parallel.pipeline_parallel
        needed = -(-needed // pipeline) * pipeline
    micro_batches = max(train.micro_batches, needed)
    return replace(run, train=replace(train, micro_batches=micro_batches))


def samples_per_micro_batch(train: TrainSettings, data_parallel: int) -> int:
    """Samples that one rank handles at once, at most.

    Raises ConfigError when the sizes do not divide, unless shares may differ.
    """
    shares = train.micro_batches * data_parallel
    if train.micro_batch_samples is not None:
        if train.samples_per_step <= shares - data_parallel:  # a whole micro-batch would be empty
            raise ConfigError(
                f"train.samples_per_step={train.samples_per_step} is too few for "
                f"train.micro_batches={train.micro_batches} x data_parallel={data_parallel} = "
                f"{shares} shares; lower train.micro_batches, or take fewer ranks"
            )
        return -(-train.samples_per_step // shares)
    if train.samples_per_step % shares:
        raise ConfigError(
            f"train.samples_per_step={train.samples_per_step} is not divisible by "
            f"train.micro_batches={train.micro_batches} x data_parallel={data_parallel} = "
            f"{shares}; try {train.samples_per_step // shares * shares or shares} or "
            f"{(train.samples_per_step // shares + 1) * shares}, or "
            "train.micro_batch_samples"
        )
    return train.samples_per_step // shares
