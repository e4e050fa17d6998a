"""The vision-language model: image encoder, projector and decoder with gated cross-attention.

Letters in shapes: b rows of packed text, t their length, n image slots, v = n x tokens per image,
w width.
"""

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megavlm.config.sizes import ModelSizes
from megavlm.model.decoder import build_decoder
from megavlm.model.vit import VisionTransformer


class VisionLanguageModel(MegatronModule):
    """Predicts text from text and images.

    Every rank runs every module whatever the batch holds: image slots without an image hold zeros
    and no text token sees them. That keeps collectives alike on all ranks.
    """

    def __init__(self, sizes: ModelSizes, *, dtype: torch.dtype, recompute: str = "none") -> None:
        encoder = VisionTransformer(sizes.encoder, dtype=dtype, recompute=recompute)
        language = build_decoder(sizes.decoder, dtype=dtype, recompute=recompute)
        super().__init__(language.config)
        self.sizes = sizes
        self.encoder = encoder
        self.projector = nn.Linear(sizes.encoder.width, sizes.decoder.width, dtype=dtype)
        # Image states come out of a norm; keep their unit variance.
        nn.init.normal_(self.projector.weight, std=sizes.encoder.width**-0.5)
        nn.init.zeros_(self.projector.bias)
        self.language = language

    def forward(
        self,
        tokens_bt: Tensor,
        labels_bt: Tensor,
        text_numbers_bt: Tensor,
        image_ranges_2bt: Tensor,
        pixels: Tensor,
    ) -> Tensor:
        """Cross entropy of every label, (b, t) fp32.

        tokens_bt, labels_bt: int64. text_numbers_bt: which text of its row a token belongs to;
        texts do not see each other. image_ranges_2bt: first and one past the last image token that
        a token sees. pixels: uint8 (n, 3, side, side), n at least 1.
        """
        return self._decode(
            tokens_bt,
            hidden_mask=causal_text_mask(text_numbers_bt),
            image_ranges_2bt=image_ranges_2bt,
            image_states=self.encode_images(pixels),
            labels=labels_bt,
        )

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Image states (v, 1, w) of (n, 3, side, side) pixels; image i lies at i * tokens."""
        states_tnw = self.projector(self.encoder(pixels))
        return states_tnw.transpose(0, 1).flatten(0, 1).unsqueeze(1)

    def next_token_logits(
        self,
        tokens_bt: Tensor,
        image_ranges_2bt: Tensor,
        image_states: Tensor | None,
        context: StaticInferenceContext,
    ) -> Tensor:
        """Logits (b, vocabulary) after the given tokens, which the context then remembers.

        The first call for a context passes the prompts and the image states; later calls pass one
        token a row, and None. All rows have the same length.
        """
        logits_b1v = self._decode(
            tokens_bt,
            image_ranges_2bt=image_ranges_2bt,
            image_states=image_states,
            inference_context=context,
            runtime_gather_output=True,
        )
        context.sequence_len_offset += tokens_bt.shape[1]
        context.enable_decode_mode()
        return logits_b1v[:, -1]

    def _decode(
        self,
        tokens_bt: Tensor,
        *,
        image_ranges_2bt: Tensor,
        image_states: Tensor | None,
        hidden_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return self.language(
            tokens_bt,
            position_ids=None,
            attention_mask=hidden_mask,
            extra_block_kwargs={
                "context": image_states,
                "context_mask": image_ranges_2bt.transpose(1, 2).contiguous(),
            },
            **kwargs,
        )


def causal_text_mask(text_numbers_bt: Tensor) -> Tensor:
    """Hide later tokens, and tokens of other texts: (b, 1, t, t) bool, True where hidden."""
    length = text_numbers_bt.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=text_numbers_bt.device).triu(1)
    other = text_numbers_bt[:, :, None] != text_numbers_bt[:, None, :]
    return (other | later)[:, None]
