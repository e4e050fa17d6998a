"""What one rank computes for one micro-batch: matrix products, attention, bytes, messages.

A model is a list of blocks, in the order of the forward pass. Tensor parallelism divides a block's
matrices by `tensor`, sequence parallelism what lies between them by `token_shards`.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

from megavlm.config.engines import MegatronSettings
from megavlm.config.objectives import Part
from megavlm.config.run import RunSettings
from megavlm.planner.hardware import BF16_BYTES, FP32_BYTES, precision_bytes


def value_bytes(run: RunSettings) -> int:
    """Of a weight or an activation, as layers compute with it and messages carry it."""
    return precision_bytes(run.train.precision)


class Matmul(NamedTuple):
    """(rows, inner) times (inner, columns)."""

    rows: float
    inner: float
    columns: float

    @property
    def flops(self) -> float:
        return 2 * self.rows * self.inner * self.columns


class Attention(NamedTuple):
    """softmax(q k) v of all heads together."""

    pairs: float
    """Of a query and a key that the kernel multiplies, over all sequences."""
    width: float
    """Of all query heads."""

    @property
    def flops(self) -> float:
        return 4 * self.pairs * self.width


@dataclass(frozen=True, kw_only=True)
class Block:
    """A layer, or what stands before or after the layers, on one rank."""

    name: str
    part: Part
    parameters: float
    """Those that this rank holds."""
    value_bytes: int
    """Of a weight or an activation."""
    matmuls: tuple[Matmul, ...] = ()
    """Of the forward pass."""
    attentions: tuple[Attention, ...] = ()
    streamed_values: float = 0.0
    """Of `value_bytes` each, read and written by elementwise kernels in the forward pass."""
    kernels: int = 0
    """Launched in the forward pass, matrix products included."""
    gathered: tuple[float, ...] = ()
    """Values of each whole tensor that tensor-parallel ranks gather, or reduce and scatter, in the
    forward pass."""
    regathered: tuple[float, ...] = ()
    """Those that only the backward pass gathers, or reduces and scatters: with sequence
    parallelism inputs of matrices whose weights have gradients; without it images' gradients."""
    seen_flops: float = 0.0
    """Of the forward pass on tokens that are no padding; of the whole model, not of this rank."""
    trained: bool = True
    passes_gradients: bool = True
    """Whether something before it is trained."""

    @property
    def is_layer(self) -> bool:
        """Layers attend. They alone are recomputed in full."""
        return bool(self.attentions)

    @property
    def has_core_checkpoint(self) -> bool:
        """Whether `selective` recomputes its attention core: that of self-attention alone."""
        return self.is_layer and self.part != "cross_attention"

    @property
    def seen_training_flops(self) -> float:
        """`seen_flops`, and those of the backward passes that it needs."""
        return (1 + self.trained + self.passes_gradients) * self.seen_flops

    @property
    def largest_matrix(self) -> float:
        """Parameters of its largest matrix."""
        return max((m.inner * m.columns for m in self.matmuls), default=self.parameters)

    @property
    def keeps(self) -> bool:
        """Whether it has a backward pass."""
        return self.trained or self.passes_gradients


class Tokens(NamedTuple):
    """What a micro-batch holds on one rank."""

    images: int
    rows: int
    row_tokens: int
    text_tokens: float
    """Of the rows' tokens, those that are no padding."""
    texts: float

    @property
    def row_total(self) -> int:
        """Tokens that the decoder runs on."""
        return self.rows * self.row_tokens


def tokens_of(run: RunSettings, samples: int, tokens_per_text: float) -> Tokens:
    """A micro-batch of samples with a picture each, and texts of this mean length."""
    texts = samples * run.data.texts_per_sample
    row_tokens, bucket = run.data.row_tokens, run.data.row_bucket_tokens
    of_text = min(tokens_per_text, row_tokens)
    per_row = max(1, int(row_tokens // of_text)) if run.data.pack_texts else 1
    rows = max(1, ceil(texts / per_row))
    if bucket is not None:
        row_tokens = min(row_tokens, bucket * ceil(ceil(texts / rows) * of_text / bucket))
    return Tokens(samples, rows, row_tokens, texts * of_text, texts)


def passed_on_bytes(
    run: RunSettings, tokens: Tokens, parallel: MegatronSettings
) -> tuple[float, float]:
    """Of the states of texts and of images that a pipeline rank sends to the next one."""
    of_token = value_bytes(run) * run.model.decoder.width / parallel.token_shards
    return of_token * tokens.row_total, of_token * tokens.images * run.model.encoder.tokens


def transformer_layer(
    name: str,
    part: Part,
    *,
    width: int,
    query_width: int,
    key_width: int,
    mlp_width: int,
    gated: bool,
    tokens: float,
    pairs: float,
    value_bytes: int,
    rotary: bool,
    norm_passes: float = 2,
    rotary_passes: float = 6,
    tensor: int = 1,
    token_shards: int = 1,
) -> Block:
    """Pre-norm self-attention and feed-forward network on so many tokens.

    pairs: of a query and a key that attention multiplies, over all heads' sequences. norm_passes,
    rotary_passes: how often kernels read or write each value of a norm (a fused one once
    each), and each query and key.
    """
    t, own = tensor, tokens / token_shards
    up = (2 if gated else 1) * mlp_width
    matmuls = (
        Matmul(tokens, width, (query_width + 2 * key_width) / t),
        Matmul(tokens, query_width / t, width),
        Matmul(tokens, width, up / t),
        Matmul(tokens, mlp_width / t, width),
    )
    norms_and_residuals = 2 * (norm_passes + 3) * own * width
    rotations = rotary_passes * tokens * (query_width + key_width) / t if rotary else 0
    activation = (5 if gated else 2) * tokens * mlp_width / t
    return Block(
        name=name,
        part=part,
        parameters=sum(m.inner * m.columns for m in matmuls) + 2 * width,
        value_bytes=value_bytes,
        matmuls=matmuls,
        attentions=(Attention(pairs, query_width / t),),
        streamed_values=norms_and_residuals + rotations + activation,
        kernels=30 if rotary else 20,
        # A gather and a scatter around the attention, and around the feed-forward network.
        gathered=(tokens * width,) * 4 if t > 1 else (),
        regathered=(tokens * width,) * 2 if token_shards > 1 else (),
    )


def head(
    width: int,
    vocabulary: int,
    tokens: float,
    *,
    value_bytes: int,
    tensor: int = 1,
    part: Part = "decoder",
) -> Block:
    """The last norm, the output layer and the cross entropy."""
    matmul = Matmul(tokens, width, vocabulary / tensor)
    # In fp32: maximum, exponential, sum, division; before that a copy of logits in bf16.
    of_logit = 5 * FP32_BYTES + (BF16_BYTES + FP32_BYTES if value_bytes == BF16_BYTES else 0)
    return Block(
        name="head",
        part=part,
        parameters=matmul.inner * matmul.columns + width,
        value_bytes=value_bytes,
        matmuls=(matmul,),
        streamed_values=of_logit / value_bytes * matmul.rows * matmul.columns,
        kernels=15,
        gathered=(tokens * width,) if tensor > 1 else (),
    )


def embedding(
    width: int, vocabulary: int, tokens: float, *, value_bytes: int, tensor: int = 1
) -> Block:
    """A row of a table for each token."""
    return Block(
        name="embedding",
        part="decoder",
        parameters=width * vocabulary / tensor,
        value_bytes=value_bytes,
        streamed_values=2 * tokens * width,
        kernels=2,
        gathered=(tokens * width,) if tensor > 1 else (),
    )


def model_blocks(run: RunSettings, tokens: Tokens, parallel: MegatronSettings) -> list[Block]:
    """The vision-language model's blocks on one tensor-parallel rank, for one micro-batch."""
    decoder = run.model.decoder
    trained = {part: part in run.trained_parts for part in ("encoder", "projector", "decoder")}
    trained["cross_attention"] = "cross_attention" in run.trained_parts
    self_layer = _self_layer(run, tokens, parallel)
    cross_layer = _cross_layer(run, tokens, parallel)
    blocks = _before(run, tokens, parallel)
    for layer in range(decoder.layers):
        blocks.append(cross_layer if layer in decoder.cross_layers else self_layer)
    last = head(
        decoder.width,
        decoder.vocabulary,
        tokens.row_total,
        value_bytes=value_bytes(run),
        tensor=parallel.tensor_parallel,
    )
    blocks.append(
        replace(last, seen_flops=2 * tokens.text_tokens * decoder.width * decoder.vocabulary)
    )
    reached = of_images = False  # whether anything that is trained lies before a block
    out: list[Block] = []
    same: dict[tuple[str, bool], Block] = {}  # most blocks are alike
    for block in blocks:
        is_trained = trained[block.part]
        if block.name == "embedding":  # texts begin here, and meet images in a cross layer
            reached, of_images = False, reached
        elif block.part == "cross_attention":
            reached = reached or of_images
        if (block.name, reached) not in same:
            same[block.name, reached] = replace(
                block,
                trained=is_trained,
                passes_gradients=reached,
                # Frozen matrices gather no inputs; images' gradients are summed behind them, too.
                regathered=block.regathered
                if is_trained or (of_images and parallel.token_shards == 1)
                else (),
            )
        out.append(same[block.name, reached])
        reached = reached or is_trained
    return out


def _before(run: RunSettings, tokens: Tokens, parallel: MegatronSettings) -> list[Block]:
    """The encoder, the projector and the embedding."""
    encoder, decoder = run.model.encoder, run.model.decoder
    t, size = parallel.tensor_parallel, value_bytes(run)
    states = tokens.images * (encoder.tokens + encoder.register_tokens)
    patches = tokens.images * encoder.tokens
    side = encoder.patch_pixels
    patch = Matmul(patches, 3 * side**2, encoder.width)
    layer = transformer_layer(
        "encoder layer",
        "encoder",
        width=encoder.width,
        query_width=encoder.width,
        key_width=encoder.width,
        mlp_width=encoder.mlp_width,
        gated=False,
        tokens=states,
        pairs=states * (encoder.tokens + encoder.register_tokens),
        value_bytes=size,
        rotary=False,
        tensor=t,
        token_shards=parallel.token_shards,
    )
    seen = sum(m.flops for m in layer.matmuls) * t * patches / states
    seen += 4 * patches * encoder.tokens * encoder.width
    project = Matmul(patches, encoder.width, decoder.width)
    return [
        Block(
            name="patches",
            part="encoder",
            parameters=patch.inner * patch.columns + (encoder.tokens + 1) * encoder.width,
            value_bytes=size,
            matmuls=(patch,),
            streamed_values=8 * patches * encoder.width
            + 6 * tokens.images * 3 * encoder.image_pixels**2,
            kernels=20,
            seen_flops=patch.flops,
        ),
        *[replace(layer, seen_flops=seen)] * encoder.layers,
        Block(
            name="projector",
            part="projector",
            parameters=project.inner * project.columns + decoder.width,
            value_bytes=size,
            matmuls=(project,),
            streamed_values=3 * patches * decoder.width,
            kernels=6,
            seen_flops=project.flops,
        ),
        embedding(decoder.width, decoder.vocabulary, tokens.row_total, value_bytes=size, tensor=t),
    ]


def _self_layer(run: RunSettings, tokens: Tokens, parallel: MegatronSettings) -> Block:
    sizes = run.model.decoder
    layer = transformer_layer(
        "self-attention layer",
        "decoder",
        width=sizes.width,
        query_width=sizes.width,
        key_width=sizes.kv_heads * sizes.head_width,
        mlp_width=sizes.mlp_width,
        gated=True,
        tokens=tokens.row_total,
        # Packed texts are told apart by a mask, so the kernel multiplies all pairs of a row.
        pairs=tokens.row_total * tokens.row_tokens,
        value_bytes=value_bytes(run),
        rotary=True,
        rotary_passes=10,
        tensor=parallel.tensor_parallel,
        token_shards=parallel.token_shards,
    )
    weights = sum(m.inner * m.columns for m in layer.matmuls) * parallel.tensor_parallel
    length = tokens.text_tokens / tokens.texts
    seen = 2 * tokens.text_tokens * weights + 2 * tokens.text_tokens * length * sizes.width
    return replace(layer, seen_flops=seen)


def _cross_layer(run: RunSettings, tokens: Tokens, parallel: MegatronSettings) -> Block:
    sizes, encoder = run.model.decoder, run.model.encoder
    t, texts = parallel.tensor_parallel, tokens.row_total
    states = tokens.images * encoder.tokens
    width, keys = sizes.width, 2 * sizes.kv_heads * sizes.head_width
    of_texts = (
        Matmul(texts, width, width / t),
        Matmul(texts, width / t, width),
        Matmul(texts, width, 2 * sizes.mlp_width / t),
        Matmul(texts, sizes.mlp_width / t, width),
    )
    of_images = Matmul(states, width, keys / t)
    own = texts / parallel.token_shards
    pairs = tokens.text_tokens * encoder.tokens
    seen = sum(m.flops for m in of_texts) * t * tokens.text_tokens / texts
    seen += of_images.flops * t + 4 * pairs * width
    of_text, of_image = (n * width for n in (texts, states))
    sharded = parallel.token_shards > 1
    return Block(
        name="cross-attention layer",
        part="cross_attention",
        parameters=sum(m.inner * m.columns for m in (*of_texts, of_images)) + 2 * width,
        value_bytes=value_bytes(run),
        matmuls=(*of_texts, of_images),
        attentions=(Attention(pairs, width / t),),
        streamed_values=10 * own * width + 4 * states * keys / t + 5 * texts * sizes.mlp_width / t,
        kernels=30,
        gathered=((of_text,) * 4 + (of_image,) * sharded) if t > 1 else (),
        # Without sequence parallelism an all-reduce of images' gradients, which is two rings.
        regathered=(of_text,) * 2 + (of_image,) if sharded else (of_image,) * (2 * (t > 1)),
        seen_flops=seen,
    )
