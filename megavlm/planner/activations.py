"""What blocks keep for their backward pass, and what they need while they run.

Counted tensor by tensor, in bf16, from megatron-core's layers as `model/` puts them together.
Letters as in the code's shapes: t tensor-parallel ranks, s parts of the tokens between matrices.
"""

from typing import NamedTuple

from megavlm.config.engines import MegatronSettings
from megavlm.config.run import RunSettings
from megavlm.planner.work import Block, Tokens


class BlockBytes(NamedTuple):
    """Of one block and one micro-batch."""

    kept: float
    """From its forward pass to its backward pass, without recomputation."""
    kept_input: float
    """The same if the block is recomputed."""
    kept_without_core: float
    """The same if the attention core alone is recomputed."""
    forward: float
    """At most, while its forward pass runs, with what it keeps."""
    backward: float
    """At most, while its backward pass runs, with all that it has kept or recomputed."""

    def kept_in(self, mode: str) -> float:
        """What a block keeps under a mode of recomputation."""
        return {
            "none": self.kept,
            "selective": self.kept_without_core,
            "full": self.kept_input,
        }[mode]


def activation_bytes(run: RunSettings) -> int:
    """Of a value."""
    return 2 if run.train.precision == "bf16" else 4


def block_bytes(
    run: RunSettings,
    block: Block,
    tokens: Tokens,
    parallel: MegatronSettings,
    weight_gradients: bool,
) -> BlockBytes:
    """Of a block of the vision-language model; with a matrix's gradient, until it is added up."""
    g = 2 if weight_gradients else 0
    encoder, decoder = run.model.encoder, run.model.decoder
    t, s = parallel.tensor_parallel, parallel.token_shards
    rows, states = tokens.row_total, tokens.images * encoder.tokens
    w, f, kv = decoder.width, decoder.mlp_width, decoder.kv_heads * decoder.head_width
    e, padded = encoder.width, tokens.images * (encoder.tokens + encoder.register_tokens)
    match block.name:
        case "encoder layer":
            # Two norms' inputs and outputs; queries, keys, values and what is attended; the MLP.
            mlp = padded * 4 * encoder.mlp_width / t
            statistics = padded * 4 * encoder.heads / t
            kept = padded * 8 * e * (1 / s + 1 / t) + mlp + statistics
            backward = kept + _mlp_backward(padded, e, encoder.mlp_width, t, s, g, gated=False)
            return _layer(kept, padded * 2 * e / s, statistics, backward)
        case "self-attention layer":
            # The same; queries and keys are rotated into new tensors, the MLP has a gate.
            core = rows * (4 * decoder.heads / t + 2 * tokens.row_tokens)
            kept = rows * (8 * w / s + (6 * w + 6 * kv + 10 * f) / t) + core
            backward = kept + _mlp_backward(rows, w, f, t, s, g, gated=True)
            return _layer(kept, rows * 2 * w / s, core, backward)
        case "cross-attention layer":
            # Besides: both branches before their gates, and each image's keys, normed, and values.
            mlp = rows * 10 * f / t
            of_images = states * 6 * kv / t
            kept = rows * (12 * w / s + 4 * w / t) + mlp + of_images
            # The gradient of keys and values, and of the states they came from.
            to_images = kept - mlp + states * (4 * kv / t + 2 * w)
            backward = max(kept + _mlp_backward(rows, w, f, t, s, g, gated=True), to_images)
            return _layer(kept, rows * 2 * w / s, 0.0, backward)
        case "patches":
            # Pixels, and what is normed first.
            kept = tokens.images * 6 * encoder.image_pixels**2 + padded * 2 * e
            return BlockBytes(kept, kept, kept, 2 * kept, kept + padded * 2 * e)
        case "projector":
            # The last norm's input, and its output in the order of the states.
            kept = padded * 2 * e / s + states * 2 * (e + w / s)
            whole = padded * 2 * e + states * 2 * w if s > 1 else 0.0
            return BlockBytes(kept, kept, kept, kept + whole, kept + states * 2 * (e + w))
        case "head":
            logits = rows * decoder.vocabulary / t
            kept = rows * 4 * w / s + 4 * logits
            weight_gradient = g * w * decoder.vocabulary / t
            backward = max(6 * logits, 2 * logits + weight_gradient + rows * 2 * w)
            return BlockBytes(kept, kept, kept, kept + 2 * logits, rows * 4 * w / s + backward)
        case _:  # the embedding
            kept = rows * tokens.row_tokens  # the mask that tells texts apart
            weight_gradient = g * w * decoder.vocabulary / t
            return BlockBytes(kept, kept, kept, kept, kept + weight_gradient)


def _layer(kept: float, kept_input: float, core: float, backward: float) -> BlockBytes:
    return BlockBytes(
        kept=kept,
        kept_input=kept_input,
        kept_without_core=kept - core,
        forward=kept,
        backward=backward,
    )


def _mlp_backward(rows: float, w: int, f: int, t: int, s: int, g: int, *, gated: bool) -> float:
    """What the last layer of an MLP, or the first, has in its backward pass beside what was kept.

    Sequence parallelism gathers the gradient of the output. Weights' gradients are made in bf16
    before they are added up.
    """
    up = 2 * f if gated else f
    gathered = rows * 2 * w if s > 1 else rows * 2 * w / s
    second = gathered + 2 * rows * f / t + g * f * w / t
    freed = (6 if gated else 2) * rows * f / t
    first = 2 * rows * up / t - freed + rows * 2 * w + g * up * w / t
    return max(second, first)
