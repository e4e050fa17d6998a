"""The contrastive loss and its gradients against float64 autograd on the whole batch at once."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megavlm.stages.contrastive import CachedGradients, cached_gradients
from tests.ranks import run_on_ranks

# Worst measured 2.4e-6: gradients of InfoNCE, fp32 and bf16 features, on 1, 2 and 4 ranks.
TOLERANCE = 6e-6
# Worst measured 3.2e-5, of InfoNCE: at a scale of 100, rounding moves a logit by up to 8e-6.
TOLERANCE_AT_EXTREMES = 1e-4

KINDS = ["infonce", "sigmoid"]
SLOTS, WIDTH = 44, 12
ZERO = torch.tensor(0.0)
LARGEST = torch.tensor(math.log(100)).item()  # of log_scale, in float32
BLOCKS = [5, 7, 64]  # the first two divide neither 44 slots nor the 22 or 11 of a rank


def operands(kind, dtype=torch.float32, log_scale=None, spread=3.0):
    """Images, texts, which slots are valid, log scale and bias, of a step; norms differ.

    Of four ranks the second has no pair, the third has one, the others have a few empty slots.
    """
    generator = torch.Generator().manual_seed(5)
    image_nd, noise_nd = torch.randn(2, SLOTS, WIDTH, generator=generator)
    text_nd = image_nd + noise_nd
    image_nd = image_nd * torch.logspace(-spread, spread, SLOTS)[:, None]
    valid_n = torch.rand(SLOTS, generator=generator) < 0.8
    valid_n[11:33] = False
    valid_n[25] = True
    if log_scale is None:
        log_scale = math.log(1 / 0.07 if kind == "infonce" else 10)  # as the papers begin
    bias = torch.tensor(-10.0)
    return image_nd.to(dtype), text_nd.to(dtype), valid_n, torch.tensor(log_scale), bias


def dense(kind, image_nd, text_nd, valid_n, log_scale, bias) -> CachedGradients:
    """The same by autograd, in float64, from the matrix of all logits."""
    leaves = [x.double().requires_grad_() for x in (image_nd, text_nd, log_scale, bias)]
    image, text = (functional.normalize(x[valid_n], dim=1) for x in leaves[:2])
    if kind == "infonce":
        # The clamp lets gradients through; only those that raise the scale are stopped, below.
        scale = (leaves[2] + (leaves[2].clamp(max=LARGEST) - leaves[2]).detach()).exp()
        logits, pair = scale * image @ text.T, torch.arange(len(image))
        loss = functional.cross_entropy(logits, pair, reduction="sum")
        loss = (loss + functional.cross_entropy(logits.T, pair, reduction="sum")) / 2
    else:
        signs = 2 * torch.eye(len(image), dtype=torch.float64) - 1
        logits = leaves[2].exp() * image @ text.T + leaves[3]
        loss = -functional.logsigmoid(signs * logits).sum()
    grads = list(torch.autograd.grad(loss, leaves, materialize_grads=True))
    if kind == "infonce" and leaves[2] > LARGEST:
        grads[2] = grads[2].clamp(min=0)
    return CachedGradients(loss.detach(), *grads)


def of_rank(rank, ranks, kind, block, step) -> CachedGradients:
    """What one rank of several makes of its slots; those without a pair hold garbage."""
    image_nd, text_nd, valid_n, *scalars = step
    features = [torch.where(valid_n[:, None], x, math.nan) for x in (image_nd, text_nd)]
    share = [x.chunk(ranks)[rank] for x in (*features, valid_n)]
    options = {"kind": kind, "block": block, "group": dist.group.WORLD if ranks > 1 else None}
    got = cached_gradients(*share, *scalars, **options)
    assert all(x.dtype == torch.float32 for x in got)
    assert not got.image_nd[~share[2]].any() and not got.text_nd[~share[2]].any()
    return got


def whole(shares) -> CachedGradients:
    """The ranks' results as one process has them."""
    loss, image, text, log_scale, bias = zip(*shares, strict=True)
    sums = [torch.stack(x).sum(0) for x in (loss, log_scale, bias)]
    return CachedGradients(sums[0], torch.cat(image), torch.cat(text), *sums[1:])


def error(got, want) -> float:
    """Largest norm of a row's difference, relative to that of the row."""
    assert got.shape == want.shape and got.isfinite().all()
    got, want = torch.atleast_2d(got, want)
    sizes_n = want.norm(dim=1)
    if not sizes_n.any():
        assert not got.any()
        return 0.0
    # Rows smaller than this are not exact in float64 either, where 1 - softmax rounds to 1e-16.
    sizes_n = sizes_n.clamp_min(1e-9 * sizes_n.max())
    return ((got - want).norm(dim=1) / sizes_n).max().item()


def worst_error(kind, step, got) -> float:
    want = dense(kind, *step)
    image_norms_n1, text_norms_n1 = (
        x.double().norm(dim=1, keepdim=True).clamp_min(1e-12) for x in step[:2]
    )  # gradients shrink as features grow; those of features of norm 1 are all of one size
    return max(
        error(got.loss_sum, want.loss_sum),
        error(got.image_nd * image_norms_n1, want.image_nd * image_norms_n1),
        error(got.text_nd * text_norms_n1, want.text_nd * text_norms_n1),
        error(got.log_scale, want.log_scale),
        error(got.bias, want.bias),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_and_blocks_make_one_batch(ranks, kind):
    dtypes = torch.float32, torch.bfloat16
    cases = [(block, operands(kind, dtype)) for block in BLOCKS for dtype in dtypes]

    def on_rank(rank):
        return [of_rank(rank, ranks, kind, block, step) for block, step in cases]

    shares_of_ranks = [on_rank(0)] if ranks == 1 else run_on_ranks(ranks, on_rank)
    for (_, step), *shares in zip(cases, *shares_of_ranks, strict=True):
        assert worst_error(kind, step, whole(shares)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log_scale", [-6.0, LARGEST, 5.0])
def test_extremes(kind, log_scale):
    step = operands(kind, log_scale=log_scale, spread=30.0)
    step[0][3] = 0  # no direction at all
    step[0][5] = functional.normalize(step[1][4], dim=0) * 5e-13  # too small to become 1
    assert step[2][3] and step[2][5]
    got = of_rank(0, 1, kind, 7, step)
    assert worst_error(kind, step, got) < TOLERANCE_AT_EXTREMES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_without_any_pair_all_is_zero(ranks, kind):
    image_nd, text_nd, valid_n, *scalars = operands(kind)
    step = image_nd, text_nd, torch.zeros_like(valid_n), *scalars

    def on_rank(rank):
        return of_rank(rank, ranks, kind, 7, step)

    for got in [on_rank(0)] if ranks == 1 else run_on_ranks(ranks, on_rank):
        assert all(torch.equal(x, torch.zeros_like(x)) for x in got)


def test_an_empty_slot_beside_an_opposed_pair_stays_zero():
    """Where a slot is empty, the softmax over the pair's column would be e^100: infinite."""
    image_nd = torch.tensor([[1.0, 0], [0, 0]])
    valid_n, log_scale, bias = torch.tensor([True, False]), torch.tensor(LARGEST), torch.tensor(0.0)
    got = cached_gradients(
        image_nd, -image_nd, valid_n, log_scale, bias, kind="infonce", group=None, block=2
    )
    assert not any(x.any() for x in got)


def test_confident_pairs_keep_their_precision():
    """A loss of e^-60 is not lost in the rounding of logits of 30."""
    eye = torch.eye(2)
    text_nd = torch.stack([eye[0], -eye[0]])
    log_scale = torch.tensor(30.0).log()
    got = cached_gradients(
        text_nd.clone(),
        text_nd,
        torch.tensor([True, True]),
        log_scale,
        torch.tensor(0.0),
        kind="infonce",
        group=None,
        block=1,
    )
    assert got.loss_sum.item() == pytest.approx(2 * math.exp(-60), rel=1e-5)
    assert got.log_scale.item() == pytest.approx(-2 * 60 * math.exp(-60), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind):
    step = operands(kind)
    plain = of_rank(0, 1, kind, 7, step)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, of_rank(0, 1, kind, 7, step), plain))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("slots", "width", "block"), [(96, 2, 16), (96, 12, 4)])
def test_memory_does_not_grow_with_the_square_of_the_batch(kind, slots, width, block):
    image_nd, text_nd = torch.randn(2, slots, width)
    valid_n, zero = torch.ones(slots, dtype=torch.bool), torch.tensor(0.0)
    with LargestTensor() as largest:
        cached_gradients(image_nd, text_nd, valid_n, zero, zero, kind=kind, group=None, block=block)
    assert largest.elements == max(slots * width, block * block)


@pytest.mark.parametrize("aligned", [True, False])
def test_beyond_the_largest_scale_only_the_way_back_is_open(aligned):
    """Else an optimiser step that overshoots would leave the scale there for good."""
    image_nd = torch.eye(4)
    text_nd = image_nd if aligned else image_nd.roll(1, 0)  # every pair is wrong: too sure
    for ranks in (1, 2):

        def on_rank(rank, ranks=ranks):
            step = image_nd, text_nd, torch.ones(4, dtype=torch.bool), torch.tensor(5.0), ZERO
            return of_rank(rank, ranks, "infonce", 3, step)

        shares = [on_rank(0)] if ranks == 1 else run_on_ranks(ranks, on_rank)
        total = sum(share.log_scale for share in shares)
        assert total == 0 if aligned else total > 1
