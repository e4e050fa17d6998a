"""The image encoder: a vision transformer (Dosovitskiy et al. 2021) as in Llama 3.2 Vision.

Letters in shapes: n images, t tokens, w width.
"""

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
from megavlm.model.layers import Norm, layer_config, self_attention_layer_spec

# Mean and standard deviation of the red, green and blue channels (CLIP, Radford et al. 2021).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionTransformer(MegatronModule):
    """Images to one state per patch, and one for the class token.

    Zero register tokens bring the sequence to a multiple of 8; patches see them, they do not see
    each other, and they are dropped at the end. Hugging Face Mllama pads in exactly this way.
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
            normalization="LayerNorm",
            activation_func=functional.gelu,
            add_bias_linear=True,
        )
        super().__init__(config)
        self.sizes = sizes
        self.patch = nn.Conv2d(
            3, sizes.width, sizes.patch_pixels, sizes.patch_pixels, bias=False, dtype=dtype
        )
        self.class_token = nn.Parameter(torch.empty(sizes.width, dtype=dtype))
        self.positions = nn.Parameter(torch.empty(sizes.tokens, sizes.width, dtype=dtype))
        self.norm_pre = Norm(config, sizes.width, all_tokens=True)
        layer = self_attention_layer_spec(AttnMaskType.no_mask)
        self.block = TransformerBlock(
            config,
            TransformerBlockSubmodules(
                [layer] * sizes.layers,
                layer_norm=Norm,  # pyright: ignore[reportArgumentType] (its hint forgets classes)
            ),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: uint8 (n, 3, side, side), or already normalised floats. Returns (t, n, w)."""
        if pixels.dtype == torch.uint8:
            pixels = normalise(pixels)
        patches = self.patch(pixels.to(self.patch.weight.dtype)).flatten(2).permute(2, 0, 1)
        class_token = self.class_token.expand(1, patches.shape[1], -1)
        x = torch.cat([class_token, patches]) + self.positions[:, None]
        x = self.norm_pre(x)
        x = functional.pad(x, (0, 0, 0, 0, 0, self.sizes.register_tokens))
        hidden_mask = self._hidden_mask(x.device)
        if self.config.sequence_parallel:
            x = self.block(scatter_to_sequence_parallel_region(x), hidden_mask)
            # What follows is computed alike on all ranks, so each already has the whole gradient.
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
        else:
            x = self.block(x, hidden_mask)
        return x[: self.sizes.tokens]

    def _hidden_mask(self, device: torch.device) -> Tensor | None:
        """Registers hidden from registers: (1, 1, t, t) bool, or None without registers."""
        if self.sizes.register_tokens == 0:
            return None
        is_register = torch.zeros(
            self.sizes.tokens + self.sizes.register_tokens, dtype=torch.bool, device=device
        )
        is_register[self.sizes.tokens :] = True
        return (is_register[:, None] & is_register)[None, None]


def normalise(pixels: Tensor) -> Tensor:
    """Bring uint8 (n, 3, side, side) to zero mean and unit variance, in fp32."""
    mean = torch.tensor(PIXEL_MEAN, device=pixels.device)[:, None, None] * 255
    std = torch.tensor(PIXEL_STD, device=pixels.device)[:, None, None] * 255
    return (pixels.float() - mean) / std
