"""The image encoder: a vision transformer (Dosovitskiy et al. 2021).

Without further settings it is that of Llama 3.2 Vision; with them, of CLIP, SigLIP or ViT.

Letters in shapes: n images, t tokens, w width.
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor, nn
from torch.nn import functional

from megavlm.config.engines import MegatronSettings
from megavlm.config.sizes import EncoderSizes
from megavlm.data.image import PIXEL_MEAN, PIXEL_STD
from megavlm.model.layers import Norm, layer_config, self_attention_layer_spec


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU by a sigmoid (Hendrycks and Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": functional.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


class VisionTransformer(MegatronModule):
    """Images to one state per patch, and one for the class token if there is one.

    Zero register tokens bring the sequence to a multiple of 8; they do not see each other, and they
    are dropped at the end. If patches see them, this is exactly Hugging Face Mllama's padding; if
    they do not, the registers change nothing.
    Its layers are tensor and sequence parallel; under pipeline parallelism all of them lie on the
    first stage.
    """

    def __init__(
        self,
        sizes: EncoderSizes,
        *,
        dtype: torch.dtype,
        recompute: str,
        parallel: MegatronSettings,
    ) -> None:
        config = layer_config(
            dtype=dtype,
            recompute=recompute,
            parallel=parallel,
            layers=sizes.layers,
            width=sizes.width,
            heads=sizes.heads,
            kv_heads=sizes.heads,
            mlp_width=sizes.mlp_width,
            norm_epsilon=sizes.norm_epsilon,
            normalization="LayerNorm",
            activation_func=ACTIVATIONS[sizes.activation],
            add_bias_linear=True,
        )
        super().__init__(config)
        self.sizes = sizes
        self.patch = nn.Conv2d(
            3, sizes.width, sizes.patch_pixels, sizes.patch_pixels, bias=False, dtype=dtype
        )
        if sizes.class_token:
            self.class_token = nn.Parameter(torch.empty(sizes.width, dtype=dtype))
        self.positions = nn.Parameter(torch.empty(sizes.tokens, sizes.width, dtype=dtype))
        if sizes.pre_norm:
            self.norm_pre = Norm(config, sizes.width, all_tokens=True)
        layer = self_attention_layer_spec(AttnMaskType.no_mask, attention_bias=sizes.attention_bias)
        self.block = TransformerBlock(
            config,
            TransformerBlockSubmodules(
                [layer] * sizes.layers,
                layer_norm=Norm,  # pyright: ignore[reportArgumentType] (its hint forgets classes)
            ),
        )

    def forward(self, pixels: Tensor, hide: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """pixels: uint8 (n, 3, side, side), or already normalised floats. Returns (t, n, w).

        hide: changes the embedded patches (patches, n, w) before anything else sees them, and
        perhaps the number of images.
        """
        x = self.embed(pixels, hide)
        hidden_mask = self.hidden_mask(x.device)
        if self.config.sequence_parallel:
            # A copy: the part is a view, which would keep the whole alive.
            x = self.block(scatter_to_sequence_parallel_region(x).clone(), hidden_mask)
            # What follows is computed alike on all ranks, so each already has the whole gradient.
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
        else:
            x = self.block(x, hidden_mask)
        return x[: self.sizes.tokens]

    def embed(self, pixels: Tensor, hide: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """What the first layer sees, registers included, (t, n, w); arguments as of `forward`."""
        if pixels.dtype == torch.uint8:
            pixels = normalise(pixels)
        x = self.patch(pixels.to(self.patch.weight.dtype)).flatten(2).permute(2, 0, 1)
        if hide is not None:
            x = hide(x)
        if self.sizes.class_token:
            x = torch.cat([self.class_token.expand(1, x.shape[1], -1), x])
        x = x + self.positions[:, None]
        if self.sizes.pre_norm:
            x = self.norm_pre(x)
        return functional.pad(x, (0, 0, 0, 0, 0, self.sizes.register_tokens))

    def hidden_mask(self, device: torch.device) -> Tensor | None:
        """Registers hidden from registers, and from patches if they are not to be seen.

        (1, 1, t, t) bool, queries first; or None without registers. Every token sees the patches,
        so no row is without keys.
        """
        if self.sizes.register_tokens == 0:
            return None
        is_register = torch.zeros(
            self.sizes.tokens + self.sizes.register_tokens, dtype=torch.bool, device=device
        )
        is_register[self.sizes.tokens :] = True
        if not self.sizes.visible_registers:
            return is_register.expand(1, 1, len(is_register), -1)
        return (is_register[:, None] & is_register)[None, None]


def normalise(pixels: Tensor) -> Tensor:
    """Bring uint8 (n, 3, side, side) to zero mean and unit variance, in fp32."""
    mean = torch.tensor(PIXEL_MEAN, device=pixels.device)[:, None, None] * 255
    std = torch.tensor(PIXEL_STD, device=pixels.device)[:, None, None] * 255
    return (pixels.float() - mean) / std
