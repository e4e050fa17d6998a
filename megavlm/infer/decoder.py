"""The decoder as generation runs it: static caches, rows at different lengths, one row a text.

It computes what `model/decoder.py` does, with the same weights, and shares their memory. Its linear
layers are torch's own, so that torchao can quantise them and torch.compile sees through them; its
caches keep their shapes and places, as CUDA graphs need. See docs/decisions/0009.

Letters in shapes: b rows, t tokens, w width, g key/value heads, r query heads to each of these, d
head width, s places for rows, c tokens that a place holds, v image tokens of all places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.nn import functional

from megavlm.config.sizes import DecoderSizes
from megavlm.infer.linear import RowLinear, gathered, linear
from megavlm.model.cross_attention import CrossAttentionLayer
from megavlm.model.decoder import Decoder
from megavlm.ops.cross_attention import cross_attention
from megavlm.ops.norm import prepare_keys


@dataclass(frozen=True)
class Step:
    """What rows of a call are."""

    places_b: Tensor
    """int64, where each row's keys and values lie."""
    positions_bt: Tensor
    """int64, of the tokens in their texts."""
    low_bt: Tensor
    """int32, the first image token that each token sees."""
    high_bt: Tensor
    """int32, one past the last; equal: none."""
    sees_images: bool
    """Whether any token sees one; else the cross-attention layers have nothing to do."""
    visible_bc: Tensor | None
    """bool, which tokens of its place the one token of each row sees; None: rows begin here, and
    their tokens see those before them."""


class Caches:
    """Keys and values of texts and their images, in places that rows are put into."""

    def __init__(
        self, decoder: "CachedDecoder", *, places: int, tokens: int, image_tokens: int
    ) -> None:
        """tokens, image_tokens: how many of each a place holds."""
        self.places, self.tokens, self.image_tokens = places, tokens, image_tokens
        self.device = decoder.device
        like: dict[str, Any] = {"dtype": decoder.dtype, "device": decoder.device}
        self.rotation = decoder.rotation(tokens)
        """(c, d) cosines and sines."""
        groups, width = decoder.groups, decoder.head_width
        of_text = places, groups, tokens, width
        self.text = [
            (torch.zeros(of_text, **like), torch.zeros(of_text, **like))
            for _ in decoder.self_layers
        ]
        """(s, g, c, d) keys and values of each self-attention layer."""
        of_images = places * image_tokens, groups, width
        self.images = [
            (torch.zeros(of_images, **like), torch.zeros(of_images, **like))
            for _ in decoder.cross_layers
        ]
        """(v, g, d) keys and values of each cross-attention layer."""

    def tensors(self) -> list[Tensor]:
        """All that a step reads or changes."""
        pairs = [self.rotation, *self.text, *self.images]
        return [tensor for pair in pairs for tensor in pair]

    def put_images(self, place: int, images: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> None:
        """Copy what `CachedDecoder.image_states` has made of a text's images, in order."""
        start = place * self.image_tokens
        for of_image in images:
            stop = start + len(of_image[0][0])
            for mine, given in zip(self.images, of_image, strict=True):
                for cache_vgd, new_vgd in zip(mine, given, strict=True):
                    cache_vgd[start:stop] = new_vgd
            start = stop

    def move(self, source: int, target: int, tokens: int) -> None:
        """Put a row, of so many tokens, into another place."""
        for pair in self.text:
            for cache_sgcd in pair:
                cache_sgcd[target, :, :tokens] = cache_sgcd[source, :, :tokens]
        size = self.image_tokens
        for pair in self.images:
            for cache_vgd in pair:
                cache_vgd[target * size :][:size] = cache_vgd[source * size :][:size]


class CachedDecoder(nn.Module):
    """Embedding, layers and head of a trained decoder, this tensor-parallel rank's part of them."""

    def __init__(self, decoder: Decoder, sizes: DecoderSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.head_width = sizes.head_width
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        self.groups = sizes.kv_heads // ranks
        self.embedding = decoder.embedding.word_embeddings
        layers = [*decoder.decoder.layers]
        built = [
            _CrossLayer(layer, sizes)
            if isinstance(layer, CrossAttentionLayer)
            else _SelfLayer(layer, sizes)
            for layer in layers
        ]
        self.layers = nn.ModuleList(built)
        self.cross_layers = [layer for layer in built if isinstance(layer, _CrossLayer)]
        self.self_layers = [layer for layer in built if isinstance(layer, _SelfLayer)]
        self.final_norm = cast(nn.Module, decoder.decoder.final_layernorm)
        self.head = linear(decoder.output_layer)
        self._rotary = decoder.rotary_pos_emb
        self.dtype, self.device = self.head.weight.dtype, self.head.weight.device

    def rotation(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (c, d) of the rotary embedding at so many positions."""
        angles_cd = self._rotary(tokens).squeeze(1).squeeze(1)
        return angles_cd.cos().to(self.dtype), angles_cd.sin().to(self.dtype)

    def image_states(self, states_vw: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (v, g, d) of image states, of each cross-attention layer."""
        return [layer.image_keys_values(states_vw) for layer in self.cross_layers]

    def read(self, tokens_bt: Tensor, last_b: Tensor, step: Step, caches: Caches) -> Tensor:
        """Logits (b, vocabulary) fp32 after the token `last_b` of rows that begin, or (n, b, v).

        The caches take all tokens. What follows a row's last one is padding, whose places in the
        cache the row's next tokens take.
        """
        x_btw = self._layers(tokens_bt, step, caches)
        return self._logits(x_btw[torch.arange(len(x_btw), device=x_btw.device), last_b])

    # Apart from `read`, as torch.compile makes code for each.
    def write(self, tokens_b1: Tensor, step: Step, caches: Caches) -> Tensor:
        """Logits (b, vocabulary) fp32 after one more token of each row."""
        return self._logits(self._layers(tokens_b1, step, caches)[:, 0])

    def _layers(self, tokens_bt: Tensor, step: Step, caches: Caches) -> Tensor:
        x = self.embedding(tokens_bt)
        rotation = [angles_cd[step.positions_bt].unsqueeze(2) for angles_cd in caches.rotation]
        text, images = iter(caches.text), iter(caches.images)
        for layer in self.layers:
            if isinstance(layer, _CrossLayer):
                keys_values = next(images)
                x = layer(x, step, *keys_values) if step.sees_images else x
            else:
                x = layer(x, rotation, step, *next(text))
        return x

    def _logits(self, x_bw: Tensor) -> Tensor:
        return gathered(self.head(self.final_norm(x_bw))).float()


class _FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.up = linear(mlp.linear_fc1)
        self.down = RowLinear(mlp.linear_fc2)

    def forward(self, x_btw: Tensor) -> Tensor:
        gate, up = self.up(x_btw).chunk(2, -1)
        return self.down(functional.silu(gate) * up)


class _SelfLayer(nn.Module):
    """A TransformerLayer of the decoder."""

    def __init__(self, layer: Any, sizes: DecoderSizes) -> None:
        super().__init__()
        self.input_norm, self.mlp_norm = layer.input_layernorm, layer.pre_mlp_layernorm
        self.qkv = linear(layer.self_attention.linear_qkv)
        self.out = RowLinear(layer.self_attention.linear_proj)
        self.mlp = _FeedForward(layer.mlp)
        self.queries = sizes.heads // sizes.kv_heads
        self.head_width = sizes.head_width

    def forward(
        self,
        x_btw: Tensor,
        rotation: Sequence[Tensor],
        step: Step,
        keys_sgcd: Tensor,
        values_sgcd: Tensor,
    ) -> Tensor:
        attended = self._attend(self.input_norm(x_btw), rotation, step, keys_sgcd, values_sgcd)
        x_btw = x_btw + self.out(attended)
        return x_btw + self.mlp(self.mlp_norm(x_btw))

    def _attend(
        self,
        x_btw: Tensor,
        rotation: Sequence[Tensor],
        step: Step,
        keys_sgcd: Tensor,
        values_sgcd: Tensor,
    ) -> Tensor:
        rows, tokens, _ = x_btw.shape
        # A group of query heads, its keys and its values lie together.
        qkv = self.qkv(x_btw).view(rows, tokens, -1, self.queries + 2, self.head_width)
        qk_bthd = qkv[..., : self.queries + 1, :].flatten(2, 3)
        qk = _rotated(qk_bthd, *rotation).unflatten(2, (-1, self.queries + 1))
        q_btgrd, k_btgd, v_btgd = qk[..., :-1, :], qk[..., -1, :], qkv[..., -1, :]
        places_b1 = step.places_b[:, None]
        keys_sgcd[places_b1, :, step.positions_bt] = k_btgd
        values_sgcd[places_b1, :, step.positions_bt] = v_btgd
        attend = functional.scaled_dot_product_attention
        if step.visible_bc is None:
            out_bhtd = attend(
                q_btgrd.flatten(2, 3).transpose(1, 2),
                k_btgd.transpose(1, 2),
                v_btgd.transpose(1, 2),
                is_causal=True,
                enable_gqa=self.queries > 1,
            )
            return out_bhtd.transpose(1, 2).flatten(2)
        # One token a row: the query heads of a group are as many queries to the same keys.
        rows, seen = step.visible_bc.shape
        out_bgrd = attend(
            q_btgrd[:, 0],
            keys_sgcd[:rows, :, :seen],
            values_sgcd[:rows, :, :seen],
            attn_mask=step.visible_bc[:, None, None],
        )
        return out_bgrd.flatten(1).unsqueeze(1)


class _CrossLayer(nn.Module):
    """A CrossAttentionLayer."""

    def __init__(self, layer: CrossAttentionLayer, sizes: DecoderSizes) -> None:
        super().__init__()
        attention = layer.cross_attention
        self.input_norm, self.mlp_norm = layer.input_norm, layer.mlp_norm
        self.query = linear(attention.linear_q)
        self.key_value = linear(attention.linear_kv)
        self.out = RowLinear(attention.linear_proj)
        self.mlp = _FeedForward(layer.mlp)
        self.attention_gate, self.mlp_gate = layer.attention_gate, layer.mlp_gate
        self.q_norm, self.k_norm = attention.q_layernorm, attention.k_layernorm
        self.head_width = sizes.head_width

    def image_keys_values(self, states_vw: Tensor) -> tuple[Tensor, Tensor]:
        kv_vgd2 = self.key_value(states_vw).unflatten(-1, (-1, 2 * self.head_width))
        k_vgd, v_vgd = kv_vgd2.chunk(2, dim=-1)
        weights = self.k_norm.weight, self.q_norm.weight
        return prepare_keys(k_vgd, *weights, self.k_norm.eps), v_vgd

    def forward(self, x_btw: Tensor, step: Step, keys_vgd: Tensor, values_vgd: Tensor) -> Tensor:
        q_bthd = self.query(self.input_norm(x_btw)).unflatten(-1, (-1, self.head_width))
        attended_bthd = cross_attention(
            q_bthd, keys_vgd, values_vgd, step.low_bt, step.high_bt, self.q_norm.eps
        )
        attended_btw = self.out(attended_bthd.flatten(2))
        x_btw, normed_btw = self.mlp_norm(x_btw, attended_btw, self.attention_gate)
        sees_image_bt1 = (step.low_bt < step.high_bt).unsqueeze(-1)
        gate_bt1 = torch.tanh(self.mlp_gate) * sees_image_bt1
        return torch.addcmul(x_btw, self.mlp(normed_btw), gate_bt1)


def _rotated(x_bthd: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021), the halves of a head as pairs."""
    first, second = x_bthd.chunk(2, -1)
    return x_bthd * cosines + torch.cat([-second, first], -1) * sines
