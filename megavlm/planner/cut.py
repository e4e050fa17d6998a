"""Where a pipeline cuts the decoder."""

from dataclasses import replace
from functools import cache

from megavlm.config.engines import MegatronSettings
from megavlm.config.run import RunSettings
from megavlm.config.sizes import ModelSizes

TOKENS_PER_TEXT = 64  # a guess at a prompt and its answer; the data decides the true number
# Passes: forward; backward to the inputs; backward to the weights.
TRAINED, ON_GRADIENT_PATH, FROZEN = 3, 2, 1


def with_cut(run: RunSettings) -> MegatronSettings:
    """How each copy of the run's model is divided, with the layers of every chunk chosen."""
    parallel = run.model_parallel
    if parallel.chunks == 1 or parallel.chunk_layers is not None:
        return parallel
    before, layers, after = costs_per_image(run)
    layers[0] += before
    layers[-1] += after
    return replace(parallel, chunk_layers=balanced_cut(tuple(layers), parallel.chunks))


def costs_per_image(run: RunSettings) -> tuple[float, list[float], float]:
    """FLOPs of training on one image and its texts, recomputation left out, as `flops_per_image`.

    Frozen parts cost fewer passes: gradients flow through the decoder, not through the encoder.
    """
    tokens_per_text = min(TOKENS_PER_TEXT, run.data.row_tokens)
    before, layers, after = flops_per_image(
        run.model, run.data.texts_per_sample * tokens_per_text, tokens_per_text
    )
    encoder_passes = FROZEN if "encoder" in run.train.frozen else TRAINED
    decoder_passes = ON_GRADIENT_PATH if "decoder" in run.train.frozen else TRAINED
    cross_layers = run.model.decoder.cross_layers
    layers = [
        (TRAINED if i in cross_layers else decoder_passes) * flops for i, flops in enumerate(layers)
    ]
    return encoder_passes * before, layers, decoder_passes * after


def flops_per_image(
    sizes: ModelSizes, text_tokens: int, tokens_per_text: int
) -> tuple[float, list[float], float]:
    """Forward FLOPs for one image and its texts: before the layers, of each layer, after them.

    Before them come the encoder and the projector, after them the head.
    """
    encoder, decoder = sizes.encoder, sizes.decoder
    patches = encoder.tokens + encoder.register_tokens
    width, kv_width = decoder.width, decoder.kv_heads * decoder.head_width
    encoder_layer = 2 * patches * (4 * encoder.width**2 + 2 * encoder.width * encoder.mlp_width)
    encoder_layer += 4 * encoder.width * patches**2
    before = encoder.layers * encoder_layer + 2 * encoder.tokens * encoder.width * width
    query_out_mlp = 2 * text_tokens * (2 * width**2 + 3 * width * decoder.mlp_width)
    self_layer = query_out_mlp + 2 * text_tokens * 2 * width * kv_width
    self_layer += 2 * width * text_tokens * tokens_per_text
    cross_layer = query_out_mlp + 2 * encoder.tokens * 2 * width * kv_width
    cross_layer += 4 * width * text_tokens * encoder.tokens
    layers = [
        float(cross_layer if i in decoder.cross_layers else self_layer)
        for i in range(decoder.layers)
    ]
    return float(before), layers, 2.0 * text_tokens * width * decoder.vocabulary


@cache
def balanced_cut(layer_costs: tuple[float, ...], chunks: int) -> tuple[int, ...]:
    """Layers of each chunk, at least one, so that the costliest chunk costs least.

    Among equally good cuts it prefers the more even one.
    """

    @cache
    def best(first: int, chunks: int) -> tuple[float, float, tuple[int, ...]]:
        """Highest cost, sum of squared costs, and the cut, of the layers from `first` on."""
        if chunks == 1:
            cost = sum(layer_costs[first:])
            return cost, cost**2, (len(layer_costs) - first,)
        options: list[tuple[float, float, tuple[int, ...]]] = []
        cost = 0.0
        for end in range(first + 1, len(layer_costs) - chunks + 2):
            cost += layer_costs[end - 1]
            highest, squares, cut = best(end, chunks - 1)
            options.append((max(cost, highest), squares + cost**2, (end - first, *cut)))
        return min(options)

    return best(0, chunks)[2]
