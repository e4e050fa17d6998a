"""The image encoder as generation runs it.

It computes what `VisionLanguageModel.encode_images` does, with the same weights, in fewer steps.

Letters in shapes: n pictures, t tokens, w width, h heads, d head width, v = n x tokens a picture.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from megavlm.config.sizes import EncoderSizes
from megavlm.infer.linear import RowLinear, linear
from megavlm.model.vit import ACTIVATIONS, VisionTransformer
from megavlm.model.vlm import VisionLanguageModel


class Encoder(nn.Module):
    """Encoder and projector of a trained model, this tensor-parallel rank's part of them."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.vit: VisionTransformer = model.encoder
        self.sizes = model.sizes.encoder
        self.layers = nn.ModuleList(_Layer(layer, self.sizes) for layer in self.vit.block.layers)
        self.final_norm: Any = self.vit.block.final_layernorm
        self.projector = model.projector

    def forward(self, pixels: Tensor) -> Tensor:
        """Image states (v, w) of uint8 (n, 3, side, side); picture i lies at i * tokens."""
        x_ntw = self.vit.embed(pixels).transpose(0, 1)
        hidden_mask = self.vit.hidden_mask(pixels.device)
        seen_mask = None if hidden_mask is None else ~hidden_mask
        for layer in self.layers:
            x_ntw = layer(x_ntw, seen_mask)
        x_ntw = self.final_norm(x_ntw[:, : self.sizes.tokens])
        return self.projector(x_ntw).flatten(0, 1)


class _Layer(nn.Module):
    def __init__(self, layer: Any, sizes: EncoderSizes) -> None:
        super().__init__()
        self.input_norm, self.mlp_norm = layer.input_layernorm, layer.pre_mlp_layernorm
        self.qkv = linear(layer.self_attention.linear_qkv)
        self.out = RowLinear(layer.self_attention.linear_proj)
        self.up, self.down = linear(layer.mlp.linear_fc1), RowLinear(layer.mlp.linear_fc2)
        self.activation = ACTIVATIONS[sizes.activation]
        self.head_width = sizes.width // sizes.heads

    def forward(self, x_ntw: Tensor, seen_mask: Tensor | None) -> Tensor:
        # Queries, keys and values of a head lie together.
        qkv = self.qkv(self.input_norm(x_ntw)).unflatten(-1, (-1, 3, self.head_width))
        q, k, v = qkv.transpose(1, 2).unbind(3)
        out_nhtd = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen_mask)
        x_ntw = x_ntw + self.out(out_nhtd.transpose(1, 2).flatten(2))
        return x_ntw + self.down(self.activation(self.up(self.mlp_norm(x_ntw))))
