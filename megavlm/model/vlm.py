"""The vision-language model: image encoder, projector and decoder with gated cross-attention.

Letters in shapes: b rows of packed text, t their length, n image slots, v = n x tokens per image,
w width.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import torch
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional

from megavlm.config.engines import UNDIVIDED, MegatronSettings
from megavlm.config.sizes import ModelSizes
from megavlm.model.decoder import build_decoder
from megavlm.model.masks import causal_text_mask
from megavlm.model.params import Parameter, parameters
from megavlm.model.pipeline import join, padded, split
from megavlm.model.recompute import recompute_layers
from megavlm.model.shards import freeze, shard
from megavlm.model.vit import VisionTransformer

_LAYER = re.compile(r"(?<=^language\.decoder\.layers\.)\d+")


class VisionLanguageModel(MegatronModule):
    """Predicts text from text and images; under pipeline parallelism, the part on this stage.

    Every rank runs every module whatever the batch holds: image slots without an image hold zeros
    and no text token sees them. That keeps collectives alike on all ranks.

    Weights are allocated, not initialised: see `model/initial.py`, or load a checkpoint.
    """

    # megatron-core asks its models for these.
    share_embeddings_and_output_weights = False
    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        sizes: ModelSizes,
        *,
        dtype: torch.dtype,
        recompute: str = "none",
        frozen: Collection[str] = (),
        parallel: MegatronSettings = UNDIVIDED,
        vp_stage: int | None = None,
        z_loss: float = 0.0,
    ) -> None:
        """Build what this rank holds.

        frozen: parts that are not trained, as in `train.frozen`. vp_stage: which of this pipeline
        rank's chunks, if the schedule interleaves.
        """
        style: dict[str, Any] = {"dtype": dtype, "recompute": recompute, "parallel": parallel}
        language = build_decoder(sizes.decoder, **style, vp_stage=vp_stage, z_loss=z_loss)
        super().__init__(language.config)
        self.sizes = sizes
        self.parallel = parallel
        self.vp_stage = vp_stage
        self.pre_process: bool = language.pre_process
        self.post_process: bool = language.post_process
        if self.pre_process:
            self.encoder = VisionTransformer(sizes.encoder, **style)
            self.projector = nn.Linear(sizes.encoder.width, sizes.decoder.width, dtype=dtype)
        self.language = language
        self._received: Tensor | None = None
        freeze(self, frozen)
        if recompute == "full":
            recompute_layers(self)
        self._encoder_is_trained = "encoder" not in frozen

    def ledger(self) -> dict[str, Parameter]:
        """The ledger's entry for every parameter of this stage, by its name here.

        Decoder layers are numbered from 0 on every stage; the ledger numbers them over all.
        """
        first = cast(int, self.language.decoder.layers[0].layer_number) - 1
        entries = {entry.name: entry for entry in parameters(self.sizes)}
        return {
            name: entries[_LAYER.sub(lambda number: str(int(number[0]) + first), name)]
            for name, _ in self.named_parameters()
        }

    def shard(self, entry: Parameter, whole: Tensor) -> Tensor:
        """This tensor-parallel rank's part of a whole parameter."""
        return shard(entry, whole, self.parallel)

    def units(self) -> Iterator[nn.Module]:
        """Layers and other large modules of this stage, in the order of the forward pass."""
        if self.pre_process:
            yield from self.encoder.block.layers
            yield self.projector
            yield self.language.embedding
        yield from self.language.decoder.layers
        if self.post_process:
            yield self.language.output_layer

    def set_input_tensor(self, received: Sequence[Tensor | None]) -> None:
        """Take what the stage before has sent; megatron-core's schedules call this."""
        [self._received] = received

    def forward(
        self,
        tokens_bt: Tensor,
        labels_bt: Tensor,
        text_numbers_bt: Tensor,
        image_ranges_2bt: Tensor,
        pixels: Tensor,
    ) -> Tensor:
        """Cross entropy of every label, (b, t) fp32; on stages before the last, what they send.

        tokens_bt, labels_bt: int64. text_numbers_bt: which text of its row a token belongs to;
        texts do not see each other. image_ranges_2bt: int32, first and one past the last image
        token that a token sees. pixels: uint8 (n, 3, side, side), n at least 1.
        """
        if self.pre_process:
            image_states = self.encode_images(pixels)
        else:
            assert self._received is not None, "the stage before has sent nothing"
            rows, positions = tokens_bt.shape
            shards = self.parallel.token_shards
            text, image_states = split(self._received, positions // shards, rows)
            self.language.set_input_tensor(text)
        out = self._decode(
            tokens_bt,
            hidden_mask=causal_text_mask(text_numbers_bt),
            image_ranges_2bt=image_ranges_2bt,
            image_states=image_states,
            labels=labels_bt,
        )
        return out if self.post_process else join(out, image_states)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Image states (v, 1, w) of (n, 3, side, side) pixels; image i lies at i * tokens.

        Under sequence parallelism, this rank's part of them, padded so that they divide.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._encoder_is_trained):
            features = self.encoder(pixels)
        # In the order of the states, so that no copy of them is needed, which are wider.
        states_ntw = self.projector(features.transpose(0, 1).contiguous())
        states_v1w = states_ntw.flatten(0, 1).unsqueeze(1)
        if not self.parallel.sequence_parallel:
            return states_v1w
        if padding := padded(len(states_v1w), self.parallel) - len(states_v1w):
            states_v1w = functional.pad(states_v1w, (0, 0, 0, 0, 0, padding))
        # A copy: the part is a view, which would keep the whole alive until the backward pass.
        return scatter_to_sequence_parallel_region(states_v1w).clone()

    def logits(self, tokens_bt: Tensor, image_ranges_2bt: Tensor, image_states: Tensor) -> Tensor:
        """Logits (b, t, vocabulary) after every token of whole texts, one a row.

        image_states: as `encode_images` returns them, of one picture at least.
        """
        return self._decode(
            tokens_bt,
            hidden_mask=causal_text_mask(torch.zeros_like(tokens_bt)),
            image_ranges_2bt=image_ranges_2bt,
            image_states=image_states,
            runtime_gather_output=True,
        )

    def _decode(
        self,
        tokens_bt: Tensor,
        *,
        image_ranges_2bt: Tensor,
        image_states: Tensor,
        hidden_mask: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        return self.language(
            tokens_bt,
            position_ids=None,
            attention_mask=hidden_mask,
            extra_block_kwargs={
                "context": image_states,
                "context_mask": image_ranges_2bt,
            },
            **kwargs,
        )
