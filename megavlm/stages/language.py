"""Captioning and instruction tuning alike: the language-model loss on answers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megavlm.config.engines import UNDIVIDED, MegatronSettings
from megavlm.config.run import RunSettings
from megavlm.data.packing import Batch
from megavlm.model.vlm import VisionLanguageModel
from megavlm.stages.base import Forward, Losses


class LanguageObjective:
    """Cross entropy of the learned tokens, through cross-attention. An item is a learned token."""

    held_out_together = 1

    def __init__(self, run: RunSettings) -> None:
        self.names = tuple(run.objectives)
        self.weights = tuple(run.objectives.values())
        self._run = run

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
        loss_sum = (outputs * batch.learned_bt).sum()
        return Losses(self.weights[0] * loss_sum, loss_sum.detach()[None].clone())
