"""Step times of runs that others have published, and the settings that their sources state.

Each row names its source. Nothing of the planner is adjusted by row: what differs is the model, the
machine, the layout, and which kernels the source says it ran.
"""

from dataclasses import dataclass, replace

from megavlm.planner.hardware import A100_40, A100_80, BF16_BYTES, H100_80, Cluster, Gpu
from megavlm.planner.network import Group, neighbours, send_seconds
from megavlm.planner.step import Division, Sharding, Step, divided_step, sharded_step
from megavlm.planner.work import Block, embedding, head, transformer_layer

# Attention's TFLOP/s, forward and backward, causal, heads of 128, by tokens of a sequence.
# github.com/Dao-AILab/flash-attention, assets: flash2_a100_fwd_bwd, flash2_h100_fwd_bwd and
# flash3_fp16_fwd; "triton" is FlashAttention 1, cudnn's backward is that without a mask, from the
# figure of the FlashAttention 3 paper.
ATTENTION = {
    ("triton", "A100"): {512: 50, 1024: 61, 2048: 68, 4096: 74, 8192: 78},
    ("triton", "H100"): {512: 98, 1024: 109, 2048: 108, 4096: 126, 8192: 135},
    ("flash2", "A100"): {4096: 173, 8192: 182},
    ("flash2", "H100"): {4096: 294, 8192: 308},
    ("cudnn", "H100"): {4096: 504, 8192: 521},
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder-only language model."""

    width: int
    layers: int
    key_width: int
    mlp_width: int
    gated: bool
    vocabulary: int
    rotary: bool
    norm_passes: float = 2
    """18 where the source computes RMSNorm in fp32, an operation at a time."""
    rotary_passes: float = 6


# llm-foundry, scripts/train/yamls/pretrain: ALiBi, so nothing is rotated; fused LayerNorm.
MPT = {
    "7b": Model(
        width=4096,
        layers=32,
        key_width=4096,
        mlp_width=16384,
        gated=False,
        vocabulary=50368,
        rotary=False,
    ),
}
MPT["13b"] = replace(MPT["7b"], width=5120, layers=40, key_width=5120, mlp_width=20480)
MPT["30b"] = replace(MPT["7b"], width=7168, layers=48, key_width=7168, mlp_width=28672)
MPT["70b"] = replace(MPT["7b"], width=8192, layers=80, key_width=8192, mlp_width=32768)
# foundation-model-stack: plain operations, without torch.compile.
LLAMA_34B = Model(
    width=8192,
    layers=48,
    key_width=1024,
    mlp_width=22016,
    gated=True,
    vocabulary=32000,
    rotary=True,
    norm_passes=18,
    rotary_passes=16,
)
LLAMA_2_70B = replace(LLAMA_34B, layers=80, mlp_width=28672)
# NeMo: fused norms and rotations.
LLAMA_31_70B = replace(LLAMA_2_70B, vocabulary=128256, norm_passes=2, rotary_passes=2)
NEMOTRON_15B = Model(
    width=6144,
    layers=32,
    key_width=1024,
    mlp_width=24576,
    gated=False,
    vocabulary=256000,
    rotary=True,
    rotary_passes=2,
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published run."""

    name: str
    source: str
    model: Model
    gpu: Gpu
    gpus: int
    attention: str
    tokens: int
    """Of a sequence."""
    sequences: int
    """Of a micro-batch on one rank."""
    micro_batches: int
    recompute: str
    reduced_bytes: int
    """Of a gradient, as it travels."""
    tokens_per_second: float
    """On each GPU, as published."""
    network_gigabits: float | None = None
    """Of a host, where the source states other than the usual."""
    held_back: bool = False
    """Not among those that the planner's constants were chosen by."""
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1

    @property
    def cluster(self) -> Cluster:
        """Its machine, with the attention kernel that it ran."""
        flops = 1e12 * ATTENTION[self.attention, self.gpu.name[:4]][self.tokens]
        gpu = replace(self.gpu, attention_efficiency=flops / self.gpu.matmul_flops_per_second)
        if self.network_gigabits is not None:
            gpu = replace(gpu, network_bytes_per_second=self.network_gigabits * 1e9 / 8 / 8)
        return Cluster(gpu=gpu, hosts=self.gpus // 8, gpus_per_host=8)

    def blocks(self) -> tuple[Block, list[Block], Block]:
        """Embedding, layers and head, on one rank."""
        model, shards = self.model, self.tensor
        tokens = self.tokens * self.sequences / self.context
        ends = {"value_bytes": BF16_BYTES, "tensor": shards}
        layer = transformer_layer(
            "layer",
            "decoder",
            width=model.width,
            query_width=model.width,
            key_width=model.key_width,
            mlp_width=model.mlp_width,
            gated=model.gated,
            tokens=tokens,
            pairs=tokens * self.tokens / 2,  # causal
            value_bytes=BF16_BYTES,
            rotary=model.rotary,
            norm_passes=model.norm_passes,
            rotary_passes=model.rotary_passes,
            tensor=shards,
            token_shards=shards,
        )
        return (
            embedding(model.width, model.vocabulary, tokens, **ends),
            [layer] * model.layers,
            head(model.width, model.vocabulary, tokens, **ends),
        )

    def predicted(self) -> float:
        """Tokens a second on each GPU."""
        step = self._divided() if self.tensor > 1 else self._sharded()
        copies = self.gpus // (self.tensor * self.pipeline * self.context)
        tokens = self.tokens * self.sequences * self.micro_batches * copies
        return tokens / step.seconds / self.gpus

    def _sharded(self) -> Step:
        world = Group(self.gpus, 8)
        sharding = Sharding(
            first=world,
            later=world,
            reduce=world,
            replicas=Group(1, 1),
            reduced_bytes=self.reduced_bytes,
            gathered_bytes=BF16_BYTES,
        )
        before, layers, after = self.blocks()
        return sharded_step(
            self.cluster,
            [before, *layers, after],
            sharding,
            micro_batches=self.micro_batches,
            recompute=self.recompute,
        )

    def _divided(self) -> Step:
        before, layers, after = self.blocks()
        count = self.pipeline * self.virtual
        size = len(layers) // count
        chunks = [layers[i * size : (i + 1) * size] for i in range(count)]
        chunks[0] = [before, *chunks[0]]
        chunks[-1] = [*chunks[-1], after]
        sent = before.value_bytes * self.tokens * self.sequences * self.model.width
        copies = self.gpus // (self.tensor * self.pipeline)
        division = Division(
            tensor=neighbours(self.cluster, self.tensor),
            pipeline=self.pipeline,
            copies=neighbours(self.cluster, copies, stride=self.tensor),
            send_seconds=send_seconds(self.cluster, False, sent / self.context / self.tensor),
            reduced_bytes=self.reduced_bytes,
            overlapped_tensor=True,  # ub_tp_comm_overlap
        )
        return divided_step(
            self.cluster,
            chunks,
            division,
            micro_batches=self.micro_batches,
            recompute=self.recompute,
        )


def _mpt(
    size: str,
    gpu: Gpu,
    gpus: int,
    tokens: int,
    sequences: int,
    micro_batches: int,
    tokens_per_second: float,
    *,
    recompute: str = "full",
    held_back: bool = True,
) -> Row:
    """`amp_bf16` and DEFAULT reduce in fp32; A100-40 ran PURE, in bf16."""
    return Row(
        name=f"MPT-{size} on {gpus} {gpu.name}, {tokens} tokens",
        source="github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md",
        model=MPT[size],
        gpu=gpu,
        gpus=gpus,
        attention="triton",
        tokens=tokens,
        sequences=sequences,
        micro_batches=micro_batches,
        recompute=recompute,
        reduced_bytes=2 if gpu is A100_40 else 4,
        tokens_per_second=tokens_per_second,
        held_back=held_back,
    )


def _ibm(
    model: Model,
    gpu: Gpu,
    sequences: int,
    tokens_per_second: float,
    *,
    held_back: bool,
) -> Row:
    """Batch 2: the blog; larger ones: the README of its code at 6dc80d2."""
    return Row(
        name=f"Llama of {model.layers} layers on {gpu.name}, batch {sequences}",
        source="pytorch.org/blog/maximizing-training, github.com/foundation-model-stack/fms-fsdp",
        model=model,
        gpu=gpu,
        gpus=128 if gpu is A100_80 else 96,
        attention="flash2",
        tokens=4096,
        sequences=sequences,
        micro_batches=1,
        recompute="full",
        reduced_bytes=2,
        network_gigabits=400 if gpu is A100_80 else 800,
        tokens_per_second=tokens_per_second,
        held_back=held_back,
    )


ROWS = (
    _mpt("30b", A100_40, 128, 2048, 6, 1, 865, held_back=False),
    _mpt("30b", A100_80, 8, 512, 12, 21, 967, held_back=False),
    _mpt("30b", A100_80, 8, 2048, 3, 21, 916, held_back=False),
    _mpt("30b", H100_80, 32, 2048, 14, 3, 2308, held_back=False),
    _ibm(LLAMA_34B, A100_80, 2, 700, held_back=False),
    _ibm(LLAMA_34B, H100_80, 2, 1550, held_back=False),
    Row(
        name="Llama-3.1-70B on 128 H100",
        source="github.com/NVIDIA/dgxc-benchmarking, v24.11.1, llama3.1 70b",
        model=LLAMA_31_70B,
        gpu=H100_80,
        gpus=128,
        attention="cudnn",
        tokens=8192,
        sequences=1,
        micro_batches=64,
        recompute="none",
        reduced_bytes=2,
        tokens_per_second=1112,
        tensor=4,
        pipeline=4,
        virtual=5,
        context=2,
    ),
    Row(
        name="Nemotron-15B on 128 H100",
        source="github.com/NVIDIA/dgxc-benchmarking, v25.02.02, nemotron4 15b",
        model=NEMOTRON_15B,
        gpu=H100_80,
        gpus=128,
        attention="cudnn",
        tokens=4096,
        sequences=4,
        micro_batches=4,
        recompute="none",
        reduced_bytes=4,  # not stated
        tokens_per_second=5731,
        tensor=4,
    ),
    _ibm(LLAMA_2_70B, A100_80, 2, 370, held_back=True),
    _ibm(LLAMA_2_70B, H100_80, 2, 800, held_back=True),
    _ibm(LLAMA_34B, A100_80, 8, 772, held_back=True),
    _ibm(LLAMA_34B, H100_80, 8, 1700, held_back=True),
    _ibm(LLAMA_2_70B, A100_80, 6, 380, held_back=True),
    _ibm(LLAMA_2_70B, H100_80, 6, 850, held_back=True),
    _mpt("70b", H100_80, 512, 2048, 8, 1, 1007),
    _mpt("70b", H100_80, 256, 2048, 8, 1, 1035),
    _mpt("70b", H100_80, 128, 2048, 8, 1, 1058),
    _mpt("70b", H100_80, 64, 2048, 8, 4, 1039),
    _mpt("30b", H100_80, 512, 2048, 8, 1, 2115),
    _mpt("30b", H100_80, 256, 2048, 8, 1, 2148),
    _mpt("30b", H100_80, 128, 2048, 8, 1, 2199),
    _mpt("30b", H100_80, 16, 2048, 10, 3, 2263),
    _mpt("30b", H100_80, 8, 2048, 3, 21, 2002),
    _mpt("30b", A100_80, 8, 1024, 6, 21, 946),
    _mpt("30b", A100_80, 8, 4096, 1, 21, 814),
    _mpt("30b", A100_40, 32, 2048, 4, 1, 857),
    _mpt("13b", H100_80, 512, 2048, 16, 1, 4952),
    _mpt("13b", H100_80, 128, 2048, 16, 1, 5080),
    _mpt("13b", A100_40, 128, 2048, 16, 1, 1972),
    _mpt("13b", A100_80, 8, 1024, 40, 3, 2330),
    _mpt("13b", A100_80, 8, 2048, 2, 3, 2262, recompute="none"),
    _mpt("7b", H100_80, 128, 2048, 6, 1, 10475, recompute="none"),
    _mpt("7b", A100_80, 8, 2048, 6, 2, 4641, recompute="none"),
    _mpt("7b", A100_40, 128, 2048, 18, 1, 3623),
)

# The rest of the table of MPT, up to the longest sequences that ATTENTION knows. No constant was
# chosen by these.
FURTHER = (
    _mpt("13b", H100_80, 256, 2048, 16, 1, 4989),
    _mpt("7b", H100_80, 512, 2048, 6, 1, 9670, recompute="none"),
    _mpt("7b", H100_80, 256, 2048, 6, 1, 10119, recompute="none"),
    _mpt("70b", H100_80, 32, 2048, 2, 16, 882),
    _mpt("30b", H100_80, 8, 8192, 1, 21, 1384),
    _mpt("30b", H100_80, 8, 4096, 1, 21, 1802),
    _mpt("30b", H100_80, 8, 1024, 6, 21, 2084),
    _mpt("13b", H100_80, 8, 4096, 10, 3, 4717),
    _mpt("13b", H100_80, 64, 2048, 2, 1, 4800, recompute="none"),
    _mpt("13b", H100_80, 32, 2048, 2, 1, 4811, recompute="none"),
    _mpt("13b", H100_80, 16, 2048, 2, 1, 4767, recompute="none"),
    _mpt("13b", H100_80, 8, 2048, 2, 1, 4792, recompute="none"),
    _mpt("13b", H100_80, 8, 1024, 40, 3, 5502),
    _mpt("7b", H100_80, 8, 8192, 8, 2, 6935),
    _mpt("7b", H100_80, 8, 4096, 16, 2, 8611),
    _mpt("7b", H100_80, 8, 2048, 6, 1, 10643, recompute="none"),
    _mpt("7b", H100_80, 8, 1024, 64, 2, 10203),
    _mpt("70b", A100_80, 64, 2048, 8, 4, 410),
    _mpt("70b", A100_80, 32, 2048, 2, 16, 373),
    _mpt("30b", A100_80, 8, 8192, 1, 21, 574),
    _mpt("13b", A100_80, 8, 8192, 5, 3, 1795),
    _mpt("13b", A100_80, 8, 4096, 10, 3, 2060),
    _mpt("7b", A100_80, 8, 8192, 8, 2, 3206),
    _mpt("7b", A100_80, 8, 4096, 16, 2, 3684),
    _mpt("7b", A100_80, 8, 1024, 64, 2, 4357),
    _mpt("70b", A100_40, 128, 2048, 4, 1, 376),
    _mpt("70b", A100_40, 64, 2048, 2, 1, 276),
    _mpt("13b", A100_40, 8, 8192, 1, 16, 1407),
    _mpt("13b", A100_40, 8, 4096, 2, 16, 1603),
    _mpt("13b", A100_40, 64, 2048, 16, 1, 1976),
    _mpt("13b", A100_40, 32, 2048, 14, 1, 1998),
    _mpt("13b", A100_40, 16, 2048, 10, 1, 1993),
    _mpt("13b", A100_40, 8, 2048, 4, 16, 1668),
    _mpt("13b", A100_40, 8, 1024, 8, 16, 1727),
    _mpt("13b", A100_40, 8, 512, 16, 16, 1763),
    _mpt("7b", A100_40, 8, 8192, 3, 4, 2887),
    _mpt("7b", A100_40, 8, 4096, 6, 4, 3366),
    _mpt("7b", A100_40, 64, 2048, 18, 1, 3665),
    _mpt("7b", A100_40, 32, 2048, 18, 1, 3725),
    _mpt("7b", A100_40, 16, 2048, 16, 1, 3645),
    _mpt("7b", A100_40, 8, 2048, 12, 4, 3679),
    _mpt("7b", A100_40, 8, 1024, 24, 4, 3854),
    _mpt("7b", A100_40, 8, 512, 48, 4, 3895),
)
