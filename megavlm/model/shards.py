"""What every model of a stage does with its ledger of parameters."""

from collections.abc import Collection
from typing import Any

from megatron.core import parallel_state
from torch import Tensor

from megavlm.config.engines import MegatronSettings
from megavlm.model.params import Parameter


def shard(entry: Parameter, whole: Tensor, parallel: MegatronSettings) -> Tensor:
    """This tensor-parallel rank's part of a whole parameter."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    return entry.shard(whole, parallel.tensor_parallel, rank)


def freeze(model: Any, frozen: Collection[str]) -> None:
    """Have gradients for all but these parts of a model, as in `train.frozen`."""
    ledger = model.ledger()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ledger[name].setting not in frozen)
