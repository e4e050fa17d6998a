"""Captioning: the language-model loss on answers, through cross-attention.

Trains everything that `train.frozen` does not name.
"""

from torch import Tensor, nn

from megavlm.data.packing import Batch


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of every label, (b, t), in nats; before the last pipeline stage, what it sends.

    Padding and prompts take part, so that every batch runs every module.
    """
    return model(
        batch.tokens_bt,
        batch.labels_bt,
        batch.text_numbers_bt,
        batch.image_ranges_2bt,
        batch.pixels,
    )


def loss_sum_of(losses_bt: Tensor, batch: Batch) -> Tensor:
    """Sum over the learned tokens.

    A sum, so that the caller can average over the tokens of all micro-batches and ranks.
    """
    return (losses_bt * batch.learned_bt).sum()


def loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of the cross entropy over the batch's learned tokens, in nats."""
    return loss_sum_of(token_losses(model, batch), batch)
