"""Hugging Face `MllamaForConditionalGeneration` (Llama 3.2 Vision) and ours, in both directions.

The language half of every Mllama is expressible here, weight for weight. Our encoder is Mllama's
with one tile and without global layers; another Mllama's language half can be converted alone.
Both compute the same where a text sees its image from its first token on, or where no text of the
batch sees one: for other tokens that see none, those before an image, Mllama leaves its
cross-attention open, ours is exactly zero.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from megavlm.checkpoint.lazy import LazyTensor, Tensors
from megavlm.config.sizes import DecoderSizes, EncoderSizes, ModelSizes
from megavlm.convert.llama import (
    EMBEDDING,
    HEAD,
    SWIGLU,
    language_config,
    language_sizes,
    self_attention_layer,
    with_head,
)
from megavlm.convert.names import (
    Absent,
    Converted,
    Extended,
    Joined,
    Rule,
    Shape,
    copied,
    require_values,
    to_ours,
    to_theirs,
    within,
)
from megavlm.convert.towers import ACTIVATIONS, our_activation
from megavlm.model.params import parameters

PARTS = ("encoder", "decoder")
"""What can be converted: the encoder with its projector, and the decoder."""
PREFIXES = {"encoder": ("vision_model.", "multi_modal_projector."), "decoder": ("language_model.",)}
"""How Mllama's names of each part begin."""

_EMBEDDING = "language_model.model.embed_tokens.weight"
_HEAD = "language_model.lm_head.weight"

IMAGE_SYMBOLS = 8
"""Rows that Mllama's embedding has beyond its vocabulary; its head has none for them."""

# What transformers assumes where a config.json is silent.
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4_096,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "rms_norm_eps": 1e-5,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    "rope_theta": 500_000,
}
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1_280,
    "hidden_act": "gelu",
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "intermediate_size": 5_120,
    "vision_output_dim": 7_680,
    "image_size": 448,
    "patch_size": 14,
    "max_num_tiles": 4,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
    "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
}

# One tile, no global layers; an intermediate layer, because Mllama must have one, whose part of the
# projector is zero. Mllama's norms before and after the layers fix their epsilon.
VISION_REQUIRED: dict[str, Any] = {
    "num_channels": 3,
    "num_global_layers": 0,
    "max_num_tiles": 1,
    "supported_aspect_ratios": [[1, 1]],
    "intermediate_layers_indices": [0],
    "norm_eps": 1e-5,
}
ENCODER_REQUIRED: dict[str, Any] = {
    "encoder.attention_bias": False,
    "encoder.class_token": True,
    "encoder.pre_norm": True,
    "encoder.norm_epsilon": 1e-5,
    "encoder.visible_registers": True,
}


def decoder_sizes_of(config: Mapping[str, Any]) -> DecoderSizes:
    """Sizes of our decoder that is the language half of this Mllama.

    config: the contents of config.json. Raises ConfigError when our decoder cannot express it.
    """
    text = TEXT_DEFAULTS | config.get("text_config", {})
    require_values(text, {"hidden_act": "silu"}, "choose a model with it")
    layers: int = text["num_hidden_layers"]
    # Mllama passes over positions that it has no layer for.
    cross = tuple(sorted({i for i in text["cross_attention_layers"] if i < layers}))
    self_layers = layers - len(cross)
    every = cross[0] if cross else 0
    regular = every > 0 and cross == tuple(range(every, layers, every + 1))
    evenly = regular and self_layers % every == 0
    return DecoderSizes(
        **language_sizes(text),
        vocabulary=text["vocab_size"],
        self_layers=self_layers,
        cross_every=every if evenly else None,
        cross_at=None if evenly else cross,
    )


def encoder_sizes_of(config: Mapping[str, Any]) -> EncoderSizes:
    """As `decoder_sizes_of`, of our encoder that is the vision half."""
    vision = VISION_DEFAULTS | config.get("vision_config", {})
    require_values(
        vision,
        VISION_REQUIRED | {"vision_output_dim": 2 * vision["hidden_size"]},
        "our encoder sees one tile and has no global layers; convert the decoder alone, and choose "
        "an encoder for it",
    )
    return EncoderSizes(
        image_pixels=vision["image_size"],
        patch_pixels=vision["patch_size"],
        width=vision["hidden_size"],
        layers=vision["num_hidden_layers"],
        heads=vision["attention_heads"],
        mlp_width=vision["intermediate_size"],
        activation=our_activation(vision["hidden_act"]),
    )


def mllama_config(sizes: ModelSizes, image_token: int | None = None) -> dict[str, Any]:
    """The contents of config.json for a model of ours, as transformers 5.23 reads it.

    image_token: of the tokenizer; without one, the first row beyond the vocabulary. Mllama's model
    does not look at it: which tokens see an image says the mask that its processor makes.
    Raises ConfigError, naming every value that Mllama cannot express.
    """
    encoder, decoder = sizes.encoder, sizes.decoder
    _require_exportable(encoder)
    return {
        "model_type": "mllama",
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": decoder.vocabulary if image_token is None else image_token,
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": encoder.width,
            "hidden_act": ACTIVATIONS[encoder.activation],
            "num_hidden_layers": encoder.layers,
            "attention_heads": encoder.heads,
            "intermediate_size": encoder.mlp_width,
            "image_size": encoder.image_pixels,
            "patch_size": encoder.patch_pixels,
            "vision_output_dim": 2 * encoder.width,
            **VISION_REQUIRED,
        },
        "text_config": {
            "model_type": "mllama_text_model",
            "num_hidden_layers": decoder.layers,
            "cross_attention_layers": list(decoder.cross_layers),
            **language_config(decoder),
        },
    }


def from_hugging_face(
    theirs: Tensors,
    config: Mapping[str, Any],
    sizes: ModelSizes,
    parts: Collection[str] = PARTS,
) -> Converted:
    """An Mllama as our model, or the wanted parts of it; the others stay to be initialised.

    theirs: under the names that its files have. sizes: of `encoder_sizes_of` and
    `decoder_sizes_of` this config.
    The rows of its embedding for image symbols, which our model lacks (its own image symbol is one
    of the vocabulary), are kept beside the model if they are not zero, and so are embeddings of
    tiles. A tied head, which is not filed, becomes a copy of the embedding.
    Raises CheckpointError when the tensors are not those of the config, or when the vision half
    does what our encoder cannot.
    """
    assert set(parts) <= set(PARTS), f"parts={parts} must be of {PARTS}"
    others = tuple(p for part in PARTS if part not in parts for p in PREFIXES[part])
    dropped = tuple(name for name in theirs if name.startswith(others))
    theirs = {name: t for name, t in theirs.items() if name not in dropped}
    if "decoder" in parts:
        text: dict[str, Any] = config.get("text_config", {})
        theirs = with_head(theirs, text, _HEAD, _EMBEDDING, sizes.decoder.vocabulary)
    return Converted(to_ours(theirs, _table(sizes, parts), _shapes(sizes)), dropped)


def to_hugging_face(ours: Tensors, sizes: ModelSizes) -> dict[str, LazyTensor]:
    """Our model as an Mllama, under the names that its files have.

    What Mllama has and our model lacks is zero, unless the model came from an Mllama and its
    checkpoint keeps it beside. Raises ConfigError when Mllama cannot express the encoder, and
    CheckpointError when the tensors are not those of the sizes.
    """
    _require_exportable(sizes.encoder)
    return to_theirs(ours, _table(sizes, PARTS), _shapes(sizes))


def _require_exportable(encoder: EncoderSizes) -> None:
    given = {f"encoder.{name}": value for name, value in dataclasses.asdict(encoder).items()}
    require_values(
        given,
        ENCODER_REQUIRED,
        "Mllama's encoder has no such form; train one of its form to convert the model there",
    )


def _shapes(sizes: ModelSizes) -> dict[str, Shape]:
    return {parameter.name: parameter.shape for parameter in parameters(sizes)}


def _table(sizes: ModelSizes, parts: Collection[str]) -> list[Rule]:
    vision = _vision(sizes.encoder) if "encoder" in parts else []
    language = _language(sizes.decoder) if "decoder" in parts else []
    return [*vision, *language]


def _vision(sizes: EncoderSizes) -> list[Rule]:
    return [
        copied("encoder.patch.weight", "vision_model.patch_embedding.weight"),
        copied("encoder.class_token", "vision_model.class_embedding"),
        copied("encoder.positions", "vision_model.gated_positional_embedding.embedding"),
        *_weight_and_bias("encoder.norm_pre", "vision_model.layernorm_pre"),
        *_weight_and_bias("encoder.block.final_layernorm", "vision_model.layernorm_post"),
        *(
            rule
            for i in range(sizes.layers)
            for rule in within(
                f"encoder.block.layers.{i}.",
                f"vision_model.transformer.layers.{i}.",
                _vision_layer(sizes),
            )
        ),
        # The other columns multiply the intermediate layer.
        Extended("projector.weight", "multi_modal_projector.weight", axis=1, more=sizes.width),
        copied("projector.bias", "multi_modal_projector.bias"),
        *within("", "vision_model.", _tiles(sizes)),
    ]


def _tiles(sizes: EncoderSizes) -> list[Rule]:
    """Which tile of which picture shape this is; of no effect while the gates are closed."""
    tile, token = (2, sizes.tokens * sizes.width), (2, sizes.width)
    return [
        Absent("gated_positional_embedding.gate", (1,)),
        Absent("gated_positional_embedding.tile_embedding.weight", tile, kept=True),
        Absent("pre_tile_positional_embedding.gate", (1,)),
        Absent("pre_tile_positional_embedding.embedding.weight", token, kept=True),
        Absent("post_tile_positional_embedding.gate", (1,)),
        Absent("post_tile_positional_embedding.embedding.weight", token, kept=True),
    ]


def _vision_layer(sizes: EncoderSizes) -> list[Rule]:
    queries_keys_values = {f"self_attn.{kind}_proj.weight": 1 for kind in "qkv"}
    return [
        *_weight_and_bias("input_layernorm", "input_layernorm"),
        Joined("self_attention.linear_qkv.weight", queries_keys_values, groups=sizes.heads),
        copied("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
        *_weight_and_bias("pre_mlp_layernorm", "post_attention_layernorm"),
        *_weight_and_bias("mlp.linear_fc1", "mlp.fc1"),
        *_weight_and_bias("mlp.linear_fc2", "mlp.fc2"),
    ]


def _language(sizes: DecoderSizes) -> list[Rule]:
    return [
        Extended(EMBEDDING, _EMBEDDING, axis=0, more=IMAGE_SYMBOLS, kept=True),
        copied("language.decoder.final_layernorm.weight", "language_model.model.norm.weight"),
        copied(HEAD, _HEAD),
        *(
            rule
            for i in range(sizes.layers)
            for rule in within(
                f"language.decoder.layers.{i}.",
                f"language_model.model.layers.{i}.",
                _cross_layer(sizes) if i in sizes.cross_layers else self_attention_layer(sizes),
            )
        ),
    ]


def _cross_layer(sizes: DecoderSizes) -> list[Rule]:
    keys_values = {"cross_attn.k_proj.weight": 1, "cross_attn.v_proj.weight": 1}
    return [
        copied("input_norm.weight", "input_layernorm.weight"),
        copied("cross_attention.linear_q.weight", "cross_attn.q_proj.weight"),
        Joined("cross_attention.linear_kv.weight", keys_values, groups=sizes.kv_heads),
        copied("cross_attention.q_layernorm.weight", "cross_attn.q_norm.weight"),
        copied("cross_attention.k_layernorm.weight", "cross_attn.k_norm.weight"),
        copied("cross_attention.linear_proj.weight", "cross_attn.o_proj.weight"),
        copied("attention_gate", "cross_attn_attn_gate"),
        copied("mlp_norm.weight", "post_attention_layernorm.weight"),
        *SWIGLU,
        copied("mlp_gate", "cross_attn_mlp_gate"),
    ]


def _weight_and_bias(ours: str, theirs: str) -> list[Rule]:
    return [copied(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]
