"""Captioning: the language-model loss on answers, through cross-attention; trains everything."""

from torch import Tensor, nn

from megavlm.data.packing import Batch


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of the cross entropy over the batch's learned tokens, in nats.

    A sum, so that the caller can average over the tokens of all micro-batches and ranks. Padding
    and prompts take part with weight zero, so a batch without answers still runs every module.
    """
    losses_bt = model(
        batch.tokens_bt,
        batch.labels_bt,
        batch.text_numbers_bt,
        batch.image_ranges_2bt,
        batch.pixels,
    )
    return (losses_bt * batch.learned_bt).sum()
