"""Masked image modelling and contrastive pre-training, alone or in one step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megavlm.config.engines import UNDIVIDED, MegatronSettings
from megavlm.config.run import RunSettings
from megavlm.data.collate import pairs
from megavlm.data.packing import PairBatch
from megavlm.dist import groups
from megavlm.model.pretraining import PretrainingModel
from megavlm.stages import mim
from megavlm.stages.base import Forward, Losses
from megavlm.stages.contrastive import CachedGradients, cached_gradients

LOGITS_BLOCK = 1024
"""Features that are compared with as many at once."""


class Prepared(NamedTuple):
    """What one micro-batch must know of the whole step."""

    cached: CachedGradients
    """Of its features; the step's loss and the gradients of the scalars come with the first one."""
    pictures_per_pair: float
    """Of the step."""


class PretrainingObjective:
    """An item is a picture. Losses are averaged over pictures, or over those that have a text."""

    collate = staticmethod(pairs)
    groups = ()

    def __init__(self, run: RunSettings) -> None:
        self._run = run
        # `losses` has them in this order.
        self.names = tuple(sorted(run.objectives))
        self.weights = tuple(run.objectives[name] for name in sorted(run.objectives))
        self.held_out_together = run.train.micro_batches if self._compares else 1

    @property
    def _compares(self) -> bool:
        return "contrastive" in self.names

    def build(
        self,
        *,
        dtype: torch.dtype,
        recompute: str,
        parallel: MegatronSettings = UNDIVIDED,
        vp_stage: int | None = None,
    ) -> PretrainingModel:
        return PretrainingModel(
            self._run.model,
            tuple(self._run.objectives),
            dtype=dtype,
            recompute=recompute,
            frozen=self._run.train.frozen,
            parallel=parallel,
        )

    def items(self, batch: PairBatch) -> int:
        return int(batch.has_image_n.sum())

    @torch.no_grad()
    def prepare(self, forward: Forward, batches: Sequence[PairBatch]) -> Sequence[Prepared | None]:
        """Gradients of the step's contrastive loss with respect to all features (GradCache)."""
        if not self._compares:
            return [None] * len(batches)
        device = groups.device()
        features = [self._run_model(forward, b.to(device), masked_np=None) for b in batches]
        image_nd, text_nd = (torch.cat([f[kind] for f in features]) for kind in (0, 1))
        log_scale, bias = features[0][2:]
        whole = cached_gradients(
            image_nd,
            text_nd,
            torch.cat([batch.is_pair_n for batch in batches]).to(device),
            log_scale,
            bias,
            kind=self._run.contrastive.loss,
            group=groups.copies_group(),
            block=LOGITS_BLOCK,
        )
        pictures, pairs = groups.sum_over_copies(
            sum(self.items(batch) for batch in batches),
            sum(int(batch.is_pair_n.sum()) for batch in batches),
        )
        pictures_per_pair = pictures / max(1, pairs)
        slots = [len(batch.pixels) for batch in batches]
        parts = zip(whole.image_nd.split(slots), whole.text_nd.split(slots), strict=True)
        once = whole
        prepared: list[Prepared] = []
        for image_part, text_part in parts:
            cached = once._replace(image_nd=image_part, text_nd=text_part)
            prepared.append(Prepared(cached, pictures_per_pair))
            once = CachedGradients(*(torch.zeros_like(value) for value in whole))
        return prepared

    def outputs(
        self, model: Forward, batch: PairBatch, prepared: Prepared | None
    ) -> tuple[Tensor, ...]:
        """As `PretrainingModel.forward`."""
        masked_np = batch.masked_np if "mim" in self.names else None
        return self._run_model(model, batch, masked_np)

    def losses(
        self, outputs: tuple[Tensor, ...], batch: PairBatch, prepared: Prepared | None
    ) -> Losses:
        backward: list[Tensor] = []
        reported: list[Tensor] = []
        if prepared is not None:
            cached, factor = prepared
            image_nd, text_nd, log_scale, bias = outputs[:4]
            # Not the loss, but its gradient is that of the whole step's loss.
            features = (image_nd * cached.image_nd).sum() + (text_nd * cached.text_nd).sum()
            scalars = (log_scale * cached.log_scale + bias * cached.bias).sum()
            backward.append((features + scalars) * factor)
            reported.append(cached.loss_sum * factor)
        if "mim" in self.names:
            patch = self._run.model.encoder.patch_pixels
            loss_sum = mim.loss_sum(
                outputs[-1], batch.pixels, batch.masked_np, batch.has_image_n, patch
            )
            backward.append(loss_sum)
            reported.append(loss_sum.detach())
        weighted = [w * loss for w, loss in zip(self.weights, backward, strict=True)]
        return Losses(torch.stack(weighted).sum(), torch.stack(reported))

    def _run_model(
        self, forward: Forward, batch: PairBatch, masked_np: Tensor | None
    ) -> tuple[Tensor, ...]:
        return forward(
            batch.pixels, masked_np, batch.tokens_bt, batch.text_numbers_bt, batch.ends_n
        )
