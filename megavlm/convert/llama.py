"""Hugging Face decoders of Llama's form (`LlamaForCausalLM`, `MistralForCausalLM`) and ours.

Their layers become our self-attention layers; our cross-attention layers lie between them and have
no counterpart there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint.lazy import LazyTensor, Tensors
from megavlm.config.sizes import DecoderSizes
from megavlm.convert.names import (
    Converted,
    Joined,
    Rule,
    Shape,
    copied,
    require_values,
    to_ours,
    to_theirs,
    within,
)
from megavlm.data.tokenizer import BEGIN, END, PADDING
from megavlm.errors import ConfigError
from megavlm.model.params import EMBEDDINGS, SELF_LAYERS, decoder_parameters

EMBEDDING = "language.embedding.word_embeddings.weight"
HEAD = "language.output_layer.weight"

# Llama 3's scaling of low rotary frequencies is one function of its factor only with these values,
# which all published models have (megatron-core fixes them).
LLAMA3_ROPE = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
CONTEXT_TOKENS = 131_072
"""What exported configurations state as the longest text; no tensor depends on it."""

# What transformers assumes where a config.json is silent.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4_096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000,
    },
    "mistral": {
        "vocab_size": 32_000,
        "hidden_size": 4_096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000,
        "sliding_window": 4_096,
    },
}
REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}

SWIGLU = [
    Joined("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": 1, "mlp.up_proj.weight": 1}),
    copied("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
]


def self_attention_layer(sizes: DecoderSizes) -> list[Rule]:
    """One layer, in Llama and in Mllama."""
    queries_keys_values = {
        "self_attn.q_proj.weight": sizes.heads // sizes.kv_heads,
        "self_attn.k_proj.weight": 1,
        "self_attn.v_proj.weight": 1,
    }
    return [
        copied("input_layernorm.weight", "input_layernorm.weight"),
        Joined("self_attention.linear_qkv.weight", queries_keys_values, groups=sizes.kv_heads),
        copied("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
        copied("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        *SWIGLU,
    ]


def _table(sizes: DecoderSizes) -> list[Rule]:
    own = [i for i in range(sizes.layers) if i not in sizes.cross_layers]
    return [
        copied(EMBEDDING, "model.embed_tokens.weight"),
        copied("language.decoder.final_layernorm.weight", "model.norm.weight"),
        copied(HEAD, "lm_head.weight"),
        *(
            rule
            for theirs, ours in enumerate(own)
            for rule in within(
                f"language.decoder.layers.{ours}.",
                f"model.layers.{theirs}.",
                self_attention_layer(sizes),
            )
        ),
    ]


def decoder_sizes_of(
    config: Mapping[str, Any],
    *,
    cross_every: int | None = None,
    cross_at: tuple[int, ...] | None = None,
    vocabulary: int | None = None,
    initial_gate: float = 0.0,
) -> DecoderSizes:
    """Sizes of our decoder that holds a Llama, with cross-attention layers put between its layers.

    config: the contents of config.json. cross_every, cross_at: where they go, as in DecoderSizes.
    vocabulary: other than the file's, if the model is to read another tokenizer's tokens.
    Raises ConfigError when our decoder cannot express the model.
    """
    kind = config.get("model_type")
    if kind not in DEFAULTS:
        raise ConfigError(
            f"model_type={kind}: decoders are converted from {' and '.join(DEFAULTS)}; others may "
            "name their tensors alike and compute something else"
        )
    config = {**DEFAULTS[kind], **config}
    require_values(
        config,
        REQUIRED,
        "choose another model; a sliding window, if it is that, may be set to null in config.json "
        "where no text is longer than it",
    )
    return DecoderSizes(
        **language_sizes(config),
        vocabulary=config["vocab_size"] if vocabulary is None else vocabulary,
        self_layers=config["num_hidden_layers"],
        cross_every=cross_every,
        cross_at=cross_at,
        initial_gate=initial_gate,
    )


def language_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What Llama's and Mllama's text configurations say alike, as fields of DecoderSizes."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_width = config.get("head_dim") or width // heads
    if head_width * heads != width:
        raise ConfigError(
            f"head_dim={head_width} times num_attention_heads={heads} must be hidden_size={width}; "
            "choose a model whose heads fill its width"
        )
    rope: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = rope["rope_theta"] if "rope_theta" in rope else config["rope_theta"]
    plain = kind == "default" and rope.get("partial_rotary_factor", 1) == 1
    llama3 = kind == "llama3" and all(rope.get(name) == v for name, v in LLAMA3_ROPE.items())
    if not (plain or llama3) or int(base) != base:
        raise ConfigError(
            f"rotary embeddings {rope | {'rope_theta': base}}: converted are a whole rope_theta, "
            f"and rope_type default or llama3 with {LLAMA3_ROPE}; choose such a model"
        )
    return {
        "width": width,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "mlp_width": config["intermediate_size"],
        "rope_base": int(base),
        "rope_scaling": float(rope["factor"]) if llama3 else None,
        "norm_epsilon": config["rms_norm_eps"],
    }


def language_config(sizes: DecoderSizes) -> dict[str, Any]:
    """What Llama's and Mllama's text configurations say alike, from our sizes."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(sizes.rope_base)}
    if sizes.rope_scaling is not None:
        rope |= {"rope_type": "llama3", "factor": sizes.rope_scaling, **LLAMA3_ROPE}
    return {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "intermediate_size": sizes.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": sizes.norm_epsilon,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "max_position_embeddings": CONTEXT_TOKENS,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": PADDING,
    }


def from_hugging_face(theirs: Tensors, config: Mapping[str, Any], sizes: DecoderSizes) -> Converted:
    """Embeddings, self-attention layers, final norm and head of our decoder.

    sizes: of `decoder_sizes_of` this config. The cross-attention layers stay to be initialised.
    A tied head becomes a copy of the embedding. If the vocabulary differs, rows are cut, or rows
    are added that are the mean of the others, in the embedding and in the head: a new token's
    logit is then the mean of the others', so it takes next to no probability from what the model
    predicts (random rows could take all of it; Hewitt 2021).
    Raises CheckpointError when the tensors are not those of the config.
    """
    vocabulary: int = {**DEFAULTS[config["model_type"]], **config}["vocab_size"]
    as_filed = dataclasses.replace(sizes, vocabulary=vocabulary)
    theirs = with_head(theirs, config, "lm_head.weight", "model.embed_tokens.weight", vocabulary)
    # Buffers that old versions of transformers have written; they follow from the config.
    dropped = tuple(name for name in theirs if name.endswith(".rotary_emb.inv_freq"))
    theirs = {name: t for name, t in theirs.items() if name not in dropped}
    ours = to_ours(theirs, _table(as_filed), _shapes(as_filed))
    ours |= {name: _with_rows(ours[name], sizes.vocabulary) for name in (EMBEDDING, HEAD)}
    if sizes.vocabulary < vocabulary:
        rows = f"[{sizes.vocabulary}:{vocabulary}]"
        dropped += tuple(name + rows for name in ("model.embed_tokens.weight", "lm_head.weight"))
    return Converted(ours, dropped)


def to_hugging_face(ours: Tensors, sizes: DecoderSizes) -> Converted:
    """Our decoder without its cross-attention layers, as a `LlamaForCausalLM`.

    Where no image is seen, that is the same model. What is left out is named in `dropped`.
    """
    kept = {name: t for name, t in ours.items() if name in _shapes(sizes)}
    dropped = tuple(name for name in ours if name not in kept)
    return Converted(to_theirs(kept, _table(sizes), _shapes(sizes)), dropped)


def llama_config(sizes: DecoderSizes) -> dict[str, Any]:
    """The contents of config.json for what `to_hugging_face` makes."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": sizes.self_layers,
        **language_config(sizes),
    }


def with_head(
    theirs: Tensors, config: Mapping[str, Any], head: str, embedding: str, vocabulary: int
) -> Tensors:
    """The tensors; a head that is tied to the embedding, and so not filed, is a copy of it."""
    if head in theirs or embedding not in theirs or not config.get("tie_word_embeddings"):
        return theirs
    rows = theirs[embedding]
    shape = (vocabulary, *rows.shape[1:])
    return {**theirs, head: LazyTensor(shape, rows.dtype, lambda: rows.read()[:vocabulary])}


def _shapes(sizes: DecoderSizes) -> dict[str, Shape]:
    parts = (EMBEDDINGS, SELF_LAYERS)
    return {p.name: p.shape for p in decoder_parameters(sizes) if p.part in parts}


def _with_rows(matrix: LazyTensor, rows: int) -> LazyTensor:
    """The first rows, or all and then their mean as often as needed."""
    present = matrix.shape[0]
    if rows == present:
        return matrix

    def read() -> Tensor:
        whole = matrix.read()
        if rows < present:
            return whole[:rows]
        mean = whole.mean(0, dtype=torch.float32).to(whole.dtype)
        return torch.cat([whole, mean.expand(rows - present, -1)])

    return LazyTensor((rows, *matrix.shape[1:]), matrix.dtype, read)
