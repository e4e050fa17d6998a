"""What blocks keep for their backward pass, and what they need while they run.

Counted tensor by tensor from megatron-core's layers as `model/` puts them together.
Letters: t tensor-parallel ranks, s parts of the tokens between matrices; widths w of the decoder,
e of the encoder, f of an MLP, kv of keys. `size` is of a value, in bytes.
"""

from typing import NamedTuple

from megavlm.config.engines import MegatronSettings
from megavlm.config.run import RunSettings
from megavlm.planner.hardware import BF16_BYTES
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


def block_bytes(
    run: RunSettings,
    block: Block,
    tokens: Tokens,
    parallel: MegatronSettings,
    weight_gradients: bool,
) -> BlockBytes:
    """Of a block of the vision-language model; with a matrix's gradient, until it is added up.

    What a matrix multiplies is kept only where it is trained.
    """
    size = block.value_bytes
    gradient_size = size if weight_gradients and block.trained else 0
    inputs_kept = int(block.trained)
    encoder, decoder = run.model.encoder, run.model.decoder
    t, s = parallel.tensor_parallel, parallel.token_shards
    rows, states = tokens.row_total, tokens.images * encoder.tokens
    w, f, kv = decoder.width, decoder.mlp_width, decoder.kv_heads * decoder.head_width
    e, padded = encoder.width, tokens.images * (encoder.tokens + encoder.register_tokens)
    match block.name:
        case "encoder layer":
            # Two norms' inputs and outputs; queries, keys, values and what is attended; the MLP.
            mlp = padded * 2 * size * encoder.mlp_width / t
            statistics = padded * 4 * encoder.heads / t
            kept = padded * 4 * size * e * (1 / s + 1 / t) + mlp + statistics
            backward = kept + _mlp_backward(
                block, padded, e, encoder.mlp_width, t, s, gradient_size, up=1
            )
            return _layer(kept, padded * size * e / s, statistics, backward)
        case "self-attention layer":
            # The same; queries and keys are rotated into new tensors, the MLP has a gate.
            core = rows * (4 * decoder.heads / t + size * tokens.row_tokens)
            norms = (2 + 2 * inputs_kept) * w / s
            kept = rows * size * (norms + (3 * w + 3 * kv + (4 + inputs_kept) * f) / t) + core
            backward = kept + _mlp_backward(block, rows, w, f, t, s, gradient_size, up=2)
            return _layer(kept, rows * size * w / s, core, backward)
        case "cross-attention layer":
            # Besides: both branches before their gates, and each image's keys, normed, and values.
            mlp = rows * size * (4 + inputs_kept) * f / t
            of_images = states * 3 * size * kv / t
            kept = rows * size * ((4 + 2 * inputs_kept) * w / s + 2 * w / t) + mlp + of_images
            # The gradient of keys and values, and of the states they came from.
            to_images = kept - mlp + states * size * (2 * kv / t + w)
            backward = max(
                kept + _mlp_backward(block, rows, w, f, t, s, gradient_size, up=2), to_images
            )
            return _layer(kept, rows * size * w / s, 0.0, backward)
        case "patches":
            # Pixels, and what is normed first.
            kept = tokens.images * 3 * size * encoder.image_pixels**2 + padded * size * e
            return BlockBytes(kept, kept, kept, 2 * kept, kept + padded * size * e)
        case "projector":
            # The last norm's input, and its output in the order of the states.
            kept = padded * size * e / s + states * size * (inputs_kept * e + w / s)
            whole = size * (padded * e + states * w) if s > 1 else 0.0
            return BlockBytes(kept, kept, kept, kept + whole, kept + states * size * (e + w))
        case "head":
            logits = rows * decoder.vocabulary / t
            # The loss is computed in fp32, into which logits in bf16 are copied, and back.
            copied = size * logits if size == BF16_BYTES else 0.0
            normed = rows * (1 + inputs_kept) * size * w / s
            kept = normed + 4 * logits
            weight_gradient = gradient_size * w * decoder.vocabulary / t
            backward = max(4 * logits + copied, size * logits + weight_gradient + rows * size * w)
            return BlockBytes(kept, kept, kept, kept + copied, normed + backward)
        case _:  # the embedding
            kept = rows * tokens.row_tokens  # the mask that tells texts apart
            weight_gradient = gradient_size * w * decoder.vocabulary / t
            return BlockBytes(kept, kept, kept, kept, kept + weight_gradient)


def _layer(kept: float, kept_input: float, core: float, backward: float) -> BlockBytes:
    return BlockBytes(
        kept=kept,
        kept_input=kept_input,
        kept_without_core=kept - core,
        forward=kept,
        backward=backward,
    )


def _mlp_backward(
    block: Block, rows: float, w: int, f: int, t: int, s: int, gradient_size: int, *, up: int
) -> float:
    """What the last layer of an MLP, or the first, has in its backward pass beside what was kept.

    up: matrices of the first one, a gate's included. Sequence parallelism gathers the gradient of
    the output. Weights' gradients are made in the weights' type before they are added up.
    """
    size = block.value_bytes
    second = rows * size * (w + f / t) + gradient_size * f * w / t
    freed = (block.trained + 2 * (up - 1)) * size * rows * f / t
    first = size * rows * up * f / t - freed + size * rows * w + gradient_size * up * f * w / t
    return max(second, first)
