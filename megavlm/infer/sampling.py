"""Choosing the next token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megavlm.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; by default always the likeliest.

    Raises RequestError for values that mean nothing.
    """

    temperature: float = 0.0
    """Logits are divided by it; 0: greedy."""
    top_k: int | None = None
    """Only so many of the likeliest tokens are drawn from."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are (Holtzman et al. 2020)."""
    seed: int = 0
    """The same request with the same seed has the same answer (`Engine` says how far)."""

    def __post_init__(self) -> None:
        rules = {
            "temperature": (0 <= self.temperature <= 100, "lie between 0 and 100"),
            "top_k": (self.top_k is None or 1 <= self.top_k < 2**63, "lie between 1 and 2**63"),
            "top_p": (0 < self.top_p <= 1, "lie above 0 and not above 1"),
            "seed": (0 <= self.seed < 2**63, "lie between 0 and 2**63"),
        }
        for name, (is_kept, rule) in rules.items():
            if not is_kept:
                raise RequestError(f"{name}={getattr(self, name)} must {rule}")


GREEDY = Sampling()


def choose(logits_bv: Tensor, sampling: Sequence[Sampling], uniform_b: Sequence[float]) -> Tensor:
    """The next token of each row, int64 (b,).

    uniform_b: a random number in [0, 1) for each row; greedy rows do not need theirs.
    """
    chosen_b = logits_bv.argmax(-1)
    drawn = [row for row, of_row in enumerate(sampling) if of_row.temperature > 0]
    if not drawn:
        return chosen_b
    device = logits_bv.device
    of_rows = [sampling[row] for row in drawn]
    like: dict[str, Any] = {"dtype": torch.float64, "device": device}
    temperatures_b1 = torch.tensor([[of_row.temperature] for of_row in of_rows], **like)
    uniform_b1 = torch.tensor([[uniform_b[row]] for row in drawn], **like)
    sorted_bv, tokens_bv = logits_bv[drawn].double().sort(descending=True, stable=True)
    probabilities_bv = _restricted((sorted_bv / temperatures_b1).softmax(-1), of_rows)
    sums_bv = probabilities_bv.cumsum(-1)
    # The first whose sum exceeds the random number's share of the last sum. That share may round
    # to the whole of it, which the sum reaches at the last token that may be drawn.
    is_before_bv = (sums_bv <= uniform_b1 * sums_bv[:, -1:]) & (sums_bv < sums_bv[:, -1:])
    ranks_b1 = is_before_bv.sum(-1, keepdim=True)
    chosen_b[drawn] = tokens_bv.gather(1, ranks_b1)[:, 0]
    return chosen_b


def _restricted(probabilities_bv: Tensor, sampling: Sequence[Sampling]) -> Tensor:
    """Zero where top_k and then top_p leave a token out. Probabilities descend."""
    size, device = probabilities_bv.shape[-1], probabilities_bv.device
    top_k_b1 = torch.tensor([[of_row.top_k or size] for of_row in sampling], device=device)
    top_p_b1 = torch.tensor([[of_row.top_p] for of_row in sampling], device=device)
    probabilities_bv = probabilities_bv * (torch.arange(size, device=device) < top_k_b1)
    probabilities_bv = probabilities_bv / probabilities_bv.sum(-1, keepdim=True)
    before_bv = probabilities_bv.cumsum(-1) - probabilities_bv
    return probabilities_bv * ((before_bv < top_p_b1) | (top_p_b1 >= 1))
