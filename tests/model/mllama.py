"""The same model as Hugging Face `MllamaForConditionalGeneration`, weight for weight."""

from typing import Any

import torch
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration

from megavlm.config.sizes import DecoderSizes, ModelSizes
from megavlm.data.tokenizer import BEGIN, END, PADDING
from megavlm.model.vlm import VisionLanguageModel


def as_mllama(model: VisionLanguageModel) -> MllamaForConditionalGeneration:
    """One tile, no global layers; the intermediate layer that Mllama adds is multiplied by zero."""
    sizes = model.sizes
    mllama = MllamaForConditionalGeneration(_config(sizes)).eval()
    ours = {name: p.detach() for name, p in model.named_parameters()}
    theirs = {name: torch.zeros_like(p) for name, p in mllama.state_dict().items()}
    theirs |= _vision(ours, sizes) | _text(ours, sizes)
    embedding = theirs["model.language_model.embed_tokens.weight"]
    rows = embedding.new_zeros(8, embedding.shape[1])  # Mllama's rows for its image symbol
    theirs["model.language_model.embed_tokens.weight"] = torch.cat([embedding, rows])
    mllama.load_state_dict(theirs)
    return mllama


def _config(sizes: ModelSizes) -> MllamaConfig:
    encoder, decoder = sizes.encoder, sizes.decoder
    return MllamaConfig(
        vision_config={
            "hidden_size": encoder.width,
            "num_hidden_layers": encoder.layers,
            "num_global_layers": 0,
            "attention_heads": encoder.heads,
            "intermediate_size": encoder.mlp_width,
            "vision_output_dim": 2 * encoder.width,
            "image_size": encoder.image_pixels,
            "patch_size": encoder.patch_pixels,
            "norm_eps": encoder.norm_epsilon,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "intermediate_layers_indices": [0],
        },
        text_config={
            "vocab_size": decoder.vocabulary,
            "hidden_size": decoder.width,
            "num_hidden_layers": decoder.layers,
            "num_attention_heads": decoder.heads,
            "num_key_value_heads": decoder.kv_heads,
            "intermediate_size": decoder.mlp_width,
            "rms_norm_eps": decoder.norm_epsilon,
            "cross_attention_layers": list(decoder.cross_layers),
            "max_position_embeddings": 131_072,
            "rope_parameters": rope_parameters(decoder),
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            "pad_token_id": PADDING,
        },
        image_token_index=decoder.vocabulary,
    )


def rope_parameters(decoder: DecoderSizes) -> dict[str, Any]:
    """Hugging Face's settings of the rotary embeddings."""
    base = {"rope_theta": float(decoder.rope_base)}
    if decoder.rope_scaling is None:
        return {**base, "rope_type": "default"}
    return {
        **base,
        "rope_type": "llama3",
        "factor": decoder.rope_scaling,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _vision(ours: dict[str, Tensor], sizes: ModelSizes) -> dict[str, Tensor]:
    prefix = "model.vision_model."
    projector = ours["projector.weight"]
    theirs = {
        f"{prefix}patch_embedding.weight": ours["encoder.patch.weight"],
        f"{prefix}class_embedding": ours["encoder.class_token"],
        f"{prefix}gated_positional_embedding.embedding": ours["encoder.positions"],
        "model.multi_modal_projector.weight": torch.cat(
            [projector, torch.zeros_like(projector)], 1
        ),
        "model.multi_modal_projector.bias": ours["projector.bias"],
    }
    for kind in ("weight", "bias"):
        theirs[f"{prefix}layernorm_pre.{kind}"] = ours[f"encoder.norm_pre.{kind}"]
        theirs[f"{prefix}layernorm_post.{kind}"] = ours[f"encoder.block.final_layernorm.{kind}"]
    for i in range(sizes.encoder.layers):
        a, b = f"encoder.block.layers.{i}.", f"{prefix}transformer.layers.{i}."
        qkv = ours[f"{a}self_attention.linear_qkv.weight"]
        theirs |= _split_qkv(qkv, f"{b}self_attn.", sizes.encoder.heads)
        theirs[f"{b}self_attn.o_proj.weight"] = ours[f"{a}self_attention.linear_proj.weight"]
        for kind in ("weight", "bias"):
            theirs[f"{b}input_layernorm.{kind}"] = ours[f"{a}input_layernorm.{kind}"]
            theirs[f"{b}post_attention_layernorm.{kind}"] = ours[f"{a}pre_mlp_layernorm.{kind}"]
            theirs[f"{b}mlp.fc1.{kind}"] = ours[f"{a}mlp.linear_fc1.{kind}"]
            theirs[f"{b}mlp.fc2.{kind}"] = ours[f"{a}mlp.linear_fc2.{kind}"]
    return theirs


def _text(ours: dict[str, Tensor], sizes: ModelSizes) -> dict[str, Tensor]:
    decoder, prefix = sizes.decoder, "model.language_model."
    theirs = {
        f"{prefix}embed_tokens.weight": ours["language.embedding.word_embeddings.weight"],
        f"{prefix}norm.weight": ours["language.decoder.final_layernorm.weight"],
        "lm_head.weight": ours["language.output_layer.weight"],
    }
    for i in range(decoder.layers):
        a, b = f"language.decoder.layers.{i}.", f"{prefix}layers.{i}."
        gate, up = ours[f"{a}mlp.linear_fc1.weight"].chunk(2)
        theirs[f"{b}mlp.gate_proj.weight"], theirs[f"{b}mlp.up_proj.weight"] = gate, up
        theirs[f"{b}mlp.down_proj.weight"] = ours[f"{a}mlp.linear_fc2.weight"]
        if i in decoder.cross_layers:
            kv = ours[f"{a}cross_attention.linear_kv.weight"]
            key, value = kv.unflatten(0, (decoder.kv_heads, 2, -1)).unbind(1)
            theirs |= {
                f"{b}cross_attn.q_proj.weight": ours[f"{a}cross_attention.linear_q.weight"],
                f"{b}cross_attn.k_proj.weight": key.flatten(0, 1),
                f"{b}cross_attn.v_proj.weight": value.flatten(0, 1),
                f"{b}cross_attn.o_proj.weight": ours[f"{a}cross_attention.linear_proj.weight"],
                f"{b}cross_attn.q_norm.weight": ours[f"{a}cross_attention.q_layernorm.weight"],
                f"{b}cross_attn.k_norm.weight": ours[f"{a}cross_attention.k_layernorm.weight"],
                f"{b}cross_attn_attn_gate": ours[f"{a}attention_gate"],
                f"{b}cross_attn_mlp_gate": ours[f"{a}mlp_gate"],
                f"{b}input_layernorm.weight": ours[f"{a}input_norm.weight"],
                f"{b}post_attention_layernorm.weight": ours[f"{a}mlp_norm.weight"],
            }
        else:
            qkv = ours[f"{a}self_attention.linear_qkv.weight"]
            theirs |= _split_qkv(qkv, f"{b}self_attn.", decoder.kv_heads)
            theirs |= {
                f"{b}self_attn.o_proj.weight": ours[f"{a}self_attention.linear_proj.weight"],
                f"{b}input_layernorm.weight": ours[f"{a}input_layernorm.weight"],
                f"{b}post_attention_layernorm.weight": ours[f"{a}pre_mlp_layernorm.weight"],
            }
    return theirs


def _split_qkv(qkv: Tensor, prefix: str, groups: int) -> dict[str, Tensor]:
    """megatron-core keeps the queries, the key and the value of one key/value head together."""
    head_width = _head_width(qkv, groups)
    parts = qkv.unflatten(0, (groups, -1, head_width))
    query, key, value = parts[:, :-2], parts[:, -2], parts[:, -1]
    return {
        f"{prefix}q_proj.weight": query.flatten(0, 2),
        f"{prefix}k_proj.weight": key.flatten(0, 1),
        f"{prefix}v_proj.weight": value.flatten(0, 1),
    }


def _head_width(qkv: Tensor, groups: int) -> int:
    """Rows are (query heads + 2 groups) x head width, and query heads x head width = columns."""
    return (qkv.shape[0] - qkv.shape[1]) // (2 * groups)
