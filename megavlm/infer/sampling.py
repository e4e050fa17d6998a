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
    """The same request with the same seed has the same answer (`Engine` says how far).

    GPUs draw otherwise than CPUs, and these look at the lower 32 bits alone.
    """

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


def choose(
    logits_bv: Tensor, sampling: Sequence[Sampling], draws: Sequence[torch.Generator]
) -> Tensor:
    """The next token of each row, int64 (b,).

    draws: where each row's random numbers come from, on the device of the logits; greedy rows take
    none. The numbers race (Gumbel-max, Maddison et al. 2014, section 2), each token with its own,
    so that rounding changes a token only where the first two are as close; walking down a sorted
    row, it would wherever two of the tokens on the way are.
    """
    chosen_b = logits_bv.argmax(-1)
    drawn = [row for row, of_row in enumerate(sampling) if of_row.temperature > 0]
    if not drawn:
        return chosen_b
    of_rows = [sampling[row] for row in drawn]
    like: dict[str, Any] = {"dtype": torch.float64, "device": logits_bv.device}
    temperatures_b1 = torch.tensor([[of_row.temperature] for of_row in of_rows], **like)
    logits_bv = logits_bv[drawn].double()
    # At tiny temperatures only the largest stays finite.
    scores_bv = (logits_bv - logits_bv.amax(-1, keepdim=True)) / temperatures_b1
    noise_bv = torch.empty_like(scores_bv)
    for noise_v, row in zip(noise_bv, drawn, strict=True):
        noise_v.exponential_(generator=draws[row])
    raced_bv = scores_bv - noise_bv.log()
    if any(of_row.top_k or of_row.top_p < 1 for of_row in of_rows):
        raced_bv = raced_bv.masked_fill(~_allowed(scores_bv, of_rows), -torch.inf)
    chosen_b[drawn] = raced_bv.argmax(-1)
    return chosen_b


def _allowed(scores_bv: Tensor, sampling: Sequence[Sampling]) -> Tensor:
    """Which tokens top_k and then top_p leave."""
    size, device = scores_bv.shape[-1], scores_bv.device
    sorted_bv, tokens_bv = scores_bv.sort(descending=True, stable=True)
    top_k_b1 = torch.tensor([[of_row.top_k or size] for of_row in sampling], device=device)
    top_p_b1 = scores_bv.new_tensor([[of_row.top_p] for of_row in sampling])
    is_top_k_bv = torch.arange(size, device=device) < top_k_b1
    probabilities_bv = sorted_bv.masked_fill(~is_top_k_bv, -torch.inf).softmax(-1)
    before_bv = probabilities_bv.cumsum(-1) - probabilities_bv
    is_left_bv = is_top_k_bv & ((before_bv < top_p_b1) | (top_p_b1 >= 1))
    return torch.zeros_like(is_left_bv).scatter(1, tokens_bv, is_left_bv)
