"""The image encoder with what its pre-training needs beside it: a text tower and heads.

Letters in shapes: n image slots, p patches, w width, b rows of packed text, t their length, d
feature width.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType, ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from megavlm.config.engines import UNDIVIDED, MegatronSettings
from megavlm.config.objectives import ObjectiveName
from megavlm.config.sizes import ModelSizes, TextTowerSizes
from megavlm.model.layers import LANGUAGE_STYLE, Norm, layer_config, self_attention_layer_spec
from megavlm.model.masks import causal_text_mask
from megavlm.model.params import Parameter, pretraining_parameters
from megavlm.model.recompute import recompute_layers
from megavlm.model.shards import freeze, shard
from megavlm.model.vit import VisionTransformer


class PretrainingModel(MegatronModule):
    """What masked image modelling and contrastive pre-training compute their losses from.

    Every rank runs every module whatever the batch holds. Weights are allocated, not initialised.
    """

    # megatron-core asks its models for these.
    share_embeddings_and_output_weights = False
    model_type = ModelType.encoder_or_decoder
    pre_process = post_process = True
    vp_stage = None

    def __init__(
        self,
        sizes: ModelSizes,
        objectives: Collection[ObjectiveName],
        *,
        dtype: torch.dtype,
        recompute: str = "none",
        frozen: Collection[str] = (),
        parallel: MegatronSettings = UNDIVIDED,
    ) -> None:
        """frozen: parts that are not trained, as in `train.frozen`."""
        style: dict[str, Any] = {"dtype": dtype, "recompute": recompute, "parallel": parallel}
        encoder = VisionTransformer(sizes.encoder, **style)
        super().__init__(encoder.config)
        self.sizes = sizes
        self.objectives = tuple(objectives)
        self.parallel = parallel
        self.encoder = encoder
        self.mim_head = self.text_tower = self.contrastive_head = None
        if "mim" in objectives:
            pixels = 3 * sizes.encoder.patch_pixels**2
            self.mim_head = MimHead(sizes.encoder.width, pixels, dtype)
        if "contrastive" in objectives:
            tower = sizes.text_tower
            assert tower is not None, "the settings are checked for it"
            self.text_tower = TextTower(tower, sizes.decoder.vocabulary, **style)
            self.contrastive_head = ContrastiveHead(sizes.encoder.width, tower, dtype)
        freeze(self, frozen)
        if recompute == "full":
            recompute_layers(self)
        self._encoder_is_trained = "encoder" not in frozen

    def ledger(self) -> dict[str, Parameter]:
        """The ledger's entry for every parameter, by its name."""
        return {e.name: e for e in pretraining_parameters(self.sizes, self.objectives)}

    def shard(self, entry: Parameter, whole: Tensor) -> Tensor:
        """This tensor-parallel rank's part of a whole parameter."""
        return shard(entry, whole, self.parallel)

    def units(self) -> Iterator[nn.Module]:
        """Layers and other large modules, in the order of the forward pass."""
        yield from self.encoder.block.layers
        if self.text_tower is not None:
            yield self.text_tower.gpt.embedding
            yield from self.text_tower.gpt.decoder.layers

    def set_input_tensor(self, received: Sequence[None]) -> None:
        """megatron-core's schedules call this; no stage comes before."""

    def forward(
        self,
        pixels: Tensor,
        masked_np: Tensor | None,
        tokens_bt: Tensor,
        text_numbers_bt: Tensor,
        ends_n: Tensor,
    ) -> tuple[Tensor, ...]:
        """What the losses are computed from, as its objectives need.

        contrastive: features of pictures and of texts, (n, d) fp32, of any norm; the logarithm of
        the scale and the bias, both (1,) fp32. Then mim: predicted pixels of all patches of the
        masked pictures, (n, p, 3 x patch x patch) fp32; without `masked_np` none.

        pixels: uint8 (n, 3, side, side). masked_np: bool, the patches to hide. ends_n: for each
        image slot, where in the flattened tokens_bt its text ends.
        """
        masked = masked_np if self.mim_head is not None else None
        hide = None
        if masked is not None and self.mim_head is not None:
            with_whole = self.contrastive_head is not None
            hide = partial(self.mim_head.mask_token, masked_np=masked, with_whole=with_whole)
        through_encoder = self._encoder_is_trained or hide is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and through_encoder):
            states_tnw = self.encoder(pixels, hide)
        outputs: list[Tensor] = []
        if self.contrastive_head is not None and self.text_tower is not None:
            pooled_nw = self.pooled(states_tnw[:, : len(pixels)])
            texts_nw = self.text_tower(tokens_bt, text_numbers_bt, ends_n)
            outputs += self.contrastive_head(pooled_nw, texts_nw)
        if masked is not None and self.mim_head is not None:
            patches = states_tnw[-masked.shape[1] :, -len(pixels) :]
            outputs.append(self.mim_head(patches.transpose(0, 1)))
        return tuple(outputs)

    def pooled(self, states_tnw: Tensor) -> Tensor:
        """Each picture as one state, (n, w): that of the class token, or the mean of patches."""
        return states_tnw[0] if self.sizes.encoder.class_token else states_tnw.mean(0)


class MaskToken(nn.Module):
    """The learned embedding that stands for hidden patches."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))

    def forward(self, patches_pnw: Tensor, masked_np: Tensor, *, with_whole: bool) -> Tensor:
        """Returns the embedded patches of masked pictures, after those of whole ones if wanted.

        So both go through the encoder as one batch.
        """
        masked_pnw = torch.where(masked_np.t().unsqueeze(-1), self.weight, patches_pnw)
        return torch.cat([patches_pnw, masked_pnw], dim=1) if with_whole else masked_pnw


class MimHead(nn.Module):
    """Predicts a patch's pixels from its state by one linear layer (SimMIM, section 4.1)."""

    def __init__(self, width: int, pixels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.mask_token = MaskToken(width, dtype)
        self.predict = nn.Linear(width, pixels, dtype=dtype)

    def forward(self, states_npw: Tensor) -> Tensor:
        """Returns fp32 (n, p, pixels)."""
        return self.predict(states_npw).float()


class ContrastiveHead(nn.Module):
    """Projects pictures and texts to features that are compared."""

    def __init__(self, image_width: int, sizes: TextTowerSizes, dtype: torch.dtype) -> None:
        super().__init__()
        features = sizes.feature_width
        self.image = nn.Linear(image_width, features, bias=False, dtype=dtype)
        self.text = nn.Linear(sizes.width, features, bias=False, dtype=dtype)
        self.log_scale = nn.Parameter(torch.empty(1, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, dtype=dtype))

    def forward(self, image_nw: Tensor, text_nw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns both features, the logarithm of their scale and the bias, fp32."""
        # Copies of the scalars: engines take parameters away when the module is done.
        scalars = self.log_scale * 1.0, self.bias * 1.0
        image, text = self.image(image_nw), self.text(text_nw)
        return image.float(), text.float(), scalars[0].float(), scalars[1].float()


class TextTower(MegatronModule):
    """Packed texts to one state each, that of their last token."""

    def __init__(
        self,
        sizes: TextTowerSizes,
        vocabulary: int,
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
            norm_epsilon=1e-5,
            **LANGUAGE_STYLE,
        )
        super().__init__(config)
        layer = self_attention_layer_spec(AttnMaskType.causal, attention_bias=False)
        self.gpt = GPTModel(
            config,
            cast(
                Any, TransformerBlockSubmodules([layer] * sizes.layers, layer_norm=cast(Any, Norm))
            ),
            vocab_size=vocabulary,
            max_sequence_length=0,  # unused: rotary embeddings have no table to size
            position_embedding_type="rope",
            post_process=False,
        )
        self.norm = Norm(config, sizes.width, all_tokens=True)

    def forward(self, tokens_bt: Tensor, text_numbers_bt: Tensor, ends_n: Tensor) -> Tensor:
        """Returns (n, w): the states at the flat positions `ends_n` of tokens_bt."""
        mask = causal_text_mask(text_numbers_bt)
        x_tbw = self.gpt(tokens_bt, position_ids=None, attention_mask=mask)
        if self.config.sequence_parallel:
            # What follows is computed alike on all ranks, so each already has the whole gradient.
            x_tbw = gather_from_sequence_parallel_region(x_tbw, tensor_parallel_output_grad=False)
        return self.norm(x_tbw.transpose(0, 1).flatten(0, 1)[ends_n])
