"""Captioning and instruction tuning alike: the language-model loss on answers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megavlm.config.engines import UNDIVIDED, MegatronSettings
from megavlm.config.run import RunSettings
from megavlm.data.packing import Batch
from megavlm.data.sources import source_names
from megavlm.model.vlm import VisionLanguageModel
from megavlm.stages.base import Forward, Losses

MODALITIES = ("modality_text", "modality_image_text")
"""Of tokens that see no picture, and of those that see one."""


class LanguageObjective:
    """Cross entropy of the learned tokens, through cross-attention. An item is a learned token."""

    held_out_together = 1

    def __init__(self, run: RunSettings) -> None:
        self.names = tuple(run.objectives)
        self.weights = tuple(run.objectives.values())
        self._run = run
        self._sources = len(run.data.train)
        names = source_names(run.data.train)
        self.groups = (*(f"source_{name}" for name in names), *MODALITIES)

    def build(
        self,
        *,
        dtype: torch.dtype,
        recompute: str,
        parallel: MegatronSettings = UNDIVIDED,
        vp_stage: int | None = None,
    ) -> VisionLanguageModel:
        return VisionLanguageModel(
            self._run.model,
            dtype=dtype,
            recompute=recompute,
            frozen=self._run.train.frozen,
            parallel=parallel,
            vp_stage=vp_stage,
            z_loss=self._run.train.z_loss,
        )

    def items(self, batch: Batch) -> int:
        return int(batch.learned_bt.sum())

    def prepare(self, forward: Forward, batches: Sequence[Batch]) -> Sequence[None]:
        return [None] * len(batches)

    def outputs(self, model: nn.Module, batch: Batch, prepared: None = None) -> Tensor:
        """Cross entropy of every label, (b, t), in nats; or what a pipeline stage sends.

        Padding and prompts take part, so that every batch runs every module.
        """
        return model(
            batch.tokens_bt,
            batch.labels_bt,
            batch.text_numbers_bt,
            batch.image_ranges_2bt,
            batch.pixels,
        )

    def losses(self, outputs: Tensor, batch: Batch, prepared: None = None) -> Losses:
        losses_bt = outputs * batch.learned_bt
        loss_sum = losses_bt.sum()
        by_group = self._by_group(losses_bt.detach(), batch)
        reported = torch.cat([loss_sum.detach()[None], by_group.flatten()])
        return Losses(self.weights[0] * loss_sum, reported)

    def _by_group(self, losses_bt: Tensor, batch: Batch) -> Tensor:
        """Summed losses and learned tokens, (groups, 2)."""
        first_bt, end_bt = batch.image_ranges_2bt
        kinds_bt = len(MODALITIES) * batch.sources_bt + (end_bt > first_bt)
        numbers_bt2 = torch.stack([losses_bt.float(), batch.learned_bt.float()], -1)
        sums = numbers_bt2.new_zeros(self._sources * len(MODALITIES), 2)
        sums = sums.index_add_(0, kinds_bt.flatten(), numbers_bt2.flatten(0, 1))
        by_both = sums.view(self._sources, len(MODALITIES), 2)
        return torch.cat([by_both.sum(1), by_both.sum(0)])
