"""Contrastive: the loss over the pairs of a whole step, and its gradient, exactly and in blocks.

GradCache (Gao et al. 2021): a first pass without gradient leaves the features of every micro-batch,
what is here makes their gradients, and a second pass runs each micro-batch again and
back-propagates <features, gradients>.

Letters in shapes: n slots of this rank, m slots of all ranks, d width, r and c rows and columns of
a block of logits. A slot holds one pair or none.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

Kind = Literal["infonce", "sigmoid"]

LARGEST_LOG_SCALE = math.log(100)  # Radford et al. 2021, section 2.5
NORM_EPSILON = 1e-12  # as in functional.normalize


class CachedGradients(NamedTuple):
    """Loss over this rank's pairs, and gradients of the loss summed over all ranks; fp32."""

    loss_sum: Tensor
    """(), this rank's share; the shares sum to the step's."""
    image_nd: Tensor
    """Of this rank's image features; zero where there is no pair."""
    text_nd: Tensor
    """Of this rank's text features; zero where there is no pair."""
    log_scale: Tensor
    """(), this rank's share; the shares sum to the gradient."""
    bias: Tensor
    """(), this rank's share."""


def cached_gradients(
    image_nd: Tensor,
    text_nd: Tensor,
    valid_n: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    kind: Kind,
    group: dist.ProcessGroup | None,
    block: int,
) -> CachedGradients:
    """The loss over the pairs of all ranks of `group`, and its gradients; collective.

    image_nd, text_nd: fp32 or bf16, of any norm; they are normalised here, in fp32 like the rest,
    as `functional.normalize` does it.
    valid_n: bool, the slots that hold a pair; the others take part in nothing. Every rank has the
    same number of slots, any number of them valid.
    log_scale, bias: one element each, the same on every rank.
    group: the data-parallel ranks; None for this process alone.
    block: rows and columns of logits that are in memory at a time.

    "infonce": logits are exp(log_scale) <image, text>, and a pair's loss is the mean of the cross
    entropies of its row and its column. The scale is at most 100; where log_scale asks for more,
    only a gradient that lowers it is let through. The bias has no part, and gradient zero. Source:
    Radford et al. 2021, section 2.3.

    "sigmoid": logits are exp(log_scale) <image, text> + bias, and the loss sums softplus(-logit)
    over the pairs and softplus(logit) over every image with every other text. The caller divides by
    the number of pairs. Source: Zhai et al. 2023, section 3.2.
    """
    with torch.no_grad(), torch.autocast(image_nd.device.type, enabled=False):
        step = _gather(image_nd, text_nd, valid_n, log_scale, bias, kind, group, block)
        match kind:
            case "infonce":
                entropies = _cross_entropies(step)
                losses_n = _infonce_losses(entropies)
                image, text = _infonce_gradients(step, entropies, group)
            case "sigmoid":
                losses_n = _sigmoid_losses(step)
                image, text = _sigmoid_gradients(step)
        # A row's share of log_scale, sum over j of slope_ij scale <image_i, text_j>.
        scale_share = step.sum_of_valid((step.image.own_nd * image.unit_nd).sum(1))
        bias_share = step.sum_of_valid(image.slope_sums_n)
        if kind == "infonce":
            within = log_scale.float().reshape(()) <= LARGEST_LOG_SCALE
            scale_share = scale_share * (within | (_over_ranks(scale_share, group) > 0))
            bias_share = torch.zeros_like(bias_share)
        return CachedGradients(
            step.sum_of_valid(losses_n),
            _through_norm(step.image, image.unit_nd, valid_n),
            _through_norm(step.text, text.unit_nd, valid_n),
            scale_share,
            bias_share,
        )


@dataclass(frozen=True)
class _Side:
    """The images or the texts, in fp32 and of norm 1; zeros where there is no pair."""

    norms_n1: Tensor
    """Before they were divided by it, at least NORM_EPSILON."""
    own_nd: Tensor
    all_md: Tensor


@dataclass(frozen=True)
class _Step:
    """What the loss is made from.

    Rows of slots without a pair come out as anything, infinite even: they are only ever selected
    away (`torch.where`), never multiplied by zero.
    """

    image: _Side
    text: _Side
    valid_n: Tensor
    scale: Tensor
    shift_m: Tensor
    """Added to a column's logits: the bias, or minus infinity where there is no pair."""
    pair_logits_n: Tensor
    first: int
    """Number, among all slots, of this rank's first."""
    block: int

    def sides(self) -> tuple[tuple[_Side, _Side], tuple[_Side, _Side]]:
        """Whose own features are the rows, and whose the columns: both ways."""
        return (self.image, self.text), (self.text, self.image)

    def negatives(self, rows: _Side, columns: _Side) -> Iterator[tuple[slice, slice, Tensor]]:
        """Blocks (r, c) of the logits of own rows and all columns, minus infinity for pairs.

        Pairs are left to be treated on their own, so that a small loss, and a slope close to zero,
        is not the difference of large numbers.
        """
        for r in _slices(len(rows.own_nd), self.block):
            scaled_rd = rows.own_nd[r] * self.scale
            for c in _slices(len(columns.all_md), self.block):
                logits_rc = torch.addmm(self.shift_m[c], scaled_rd, columns.all_md[c].T)
                logits_rc.diagonal(self.first + r.start - c.start).fill_(-math.inf)
                yield r, c, logits_rc

    def sum_of_valid(self, values_n: Tensor) -> Tensor:
        return torch.where(self.valid_n, values_n, 0).sum()


class _RowGradients(NamedTuple):
    """What comes back to this rank's rows of one side."""

    unit_nd: Tensor
    """Gradients of the features of norm 1."""
    slope_sums_n: Tensor
    """Gradients of the logits, summed over the columns."""


def _gather(
    image_nd: Tensor,
    text_nd: Tensor,
    valid_n: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    kind: Kind,
    group: dist.ProcessGroup | None,
    block: int,
) -> _Step:
    log_scale, bias = log_scale.float().reshape(()), bias.float().reshape(())
    if kind == "infonce":
        log_scale, bias = log_scale.clamp(max=LARGEST_LOG_SCALE), torch.zeros_like(bias)
    scale = log_scale.exp()
    image, text = _side(image_nd, valid_n, group), _side(text_nd, valid_n, group)
    return _Step(
        image=image,
        text=text,
        valid_n=valid_n,
        scale=scale,
        shift_m=_of_all_ranks(torch.where(valid_n, bias, -math.inf), group),
        pair_logits_n=(image.own_nd * text.own_nd).sum(1) * scale + bias,
        first=0 if group is None else group.rank() * len(valid_n),
        block=block,
    )


def _side(features_nd: Tensor, valid_n: Tensor, group: dist.ProcessGroup | None) -> _Side:
    features_nd = torch.where(valid_n[:, None], features_nd, 0).float()
    # Scaled first: the squares of large features would overflow, those of small ones vanish.
    largest_n1 = features_nd.abs().amax(1, keepdim=True).clamp_min(NORM_EPSILON)
    norms_n1 = largest_n1 * torch.linalg.vector_norm(features_nd / largest_n1, dim=1, keepdim=True)
    norms_n1 = norms_n1.clamp_min(NORM_EPSILON)
    own_nd = features_nd / norms_n1
    return _Side(norms_n1, own_nd, _of_all_ranks(own_nd, group))


def _through_norm(side: _Side, unit_nd: Tensor, valid_n: Tensor) -> Tensor:
    """Gradient of the features, from that of the features of norm 1."""
    along_n1 = (unit_nd * side.own_nd).sum(1, keepdim=True) * (side.norms_n1 > NORM_EPSILON)
    return torch.where(valid_n[:, None], (unit_nd - along_n1 * side.own_nd) / side.norms_n1, 0)


def _cross_entropies(step: _Step) -> list[Tensor]:
    """Of this rank's images among all texts, and of its texts among all images; (n) each."""
    entropies = []
    for rows, columns in step.sides():
        entropies_n = torch.zeros_like(step.pair_logits_n)  # of a pair without any negative
        for r, _, logits_rc in step.negatives(rows, columns):
            margins_rc = logits_rc - step.pair_logits_n[r, None]
            entropies_n[r] = torch.logaddexp(entropies_n[r], margins_rc.logsumexp(1))
        entropies.append(entropies_n)
    return entropies


def _infonce_losses(entropies: list[Tensor]) -> Tensor:
    return (entropies[0] + entropies[1]) / 2


def _infonce_gradients(
    step: _Step, entropies: list[Tensor], group: dist.ProcessGroup | None
) -> list[_RowGradients]:
    # The slope of a logit is (P + Q) / 2, less 1 for a pair, where P is the softmax over its row
    # and Q the one over its column.
    pair_slopes_n = (torch.expm1(-entropies[0]) + torch.expm1(-entropies[1])) / 2
    own = [step.pair_logits_n + entropies_n for entropies_n in entropies]  # log-sum-exps
    everyones = [_of_all_ranks(sums_n, group) for sums_n in own]

    def slopes_of(own_n: Tensor, other_m: Tensor) -> Callable[[slice, slice, Tensor], Tensor]:
        return lambda r, c, logits_rc: (
            ((logits_rc - own_n[r, None]).exp_() + (logits_rc - other_m[c]).exp_()) / 2
        )

    slopes = slopes_of(own[0], everyones[1]), slopes_of(own[1], everyones[0])
    return [
        _row_gradients(step, rows, columns, pair_slopes_n, slope)
        for (rows, columns), slope in zip(step.sides(), slopes, strict=True)
    ]


def _sigmoid_losses(step: _Step) -> Tensor:
    """Of each of this rank's images, with all texts."""
    losses_n = functional.softplus(-step.pair_logits_n)
    for r, _, logits_rc in step.negatives(step.image, step.text):
        losses_n[r] += functional.softplus(logits_rc).sum(1)
    return losses_n


def _sigmoid_gradients(step: _Step) -> list[_RowGradients]:
    pair_slopes_n = -torch.sigmoid(-step.pair_logits_n)
    return [
        _row_gradients(step, rows, columns, pair_slopes_n, lambda _r, _c, x_rc: x_rc.sigmoid_())
        for rows, columns in step.sides()
    ]


def _row_gradients(
    step: _Step,
    rows: _Side,
    columns: _Side,
    pair_slopes_n: Tensor,
    slopes_of: Callable[[slice, slice, Tensor], Tensor],
) -> _RowGradients:
    """Sums of slopes x columns, from the slopes of pairs and the function of those of negatives."""
    slope_sums_n = pair_slopes_n.clone()
    unit_nd = pair_slopes_n[:, None] * columns.own_nd
    for r, c, logits_rc in step.negatives(rows, columns):
        slopes_rc = slopes_of(r, c, logits_rc)
        slope_sums_n[r] += slopes_rc.sum(1)
        unit_nd[r].addmm_(slopes_rc, columns.all_md[c])
    return _RowGradients(unit_nd * step.scale, slope_sums_n)


def _slices(length: int, block: int) -> list[slice]:
    return [slice(start, start + block) for start in range(0, length, block)]


def _of_all_ranks(own_n: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The ranks' tensors, one after another along the first axis; collective."""
    if group is None or group.size() == 1:
        return own_n
    all_m = own_n.new_empty(group.size() * len(own_n), *own_n.shape[1:])
    dist.all_gather_into_tensor(all_m, own_n.contiguous(), group=group)
    return all_m


def _over_ranks(share: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of the ranks' shares; collective."""
    total = share.clone()
    if group is not None and group.size() > 1:
        dist.all_reduce(total, group=group)
    return total
