from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from megavlm.config.engines import MegatronSettings
from megavlm.data.packing import NO_TEXT, Batch
from megavlm.model.initial import materialise
from megavlm.model.pipeline import blank, join, joined_tokens, padded, same_shapes, split
from megavlm.model.vlm import VisionLanguageModel
from tests.batches import ROW_TOKENS, TINY, loss_sum, random_batch
from tests.ranks import alone

# Padding changes the order in which kernels add. Worst measured: 5e-7 of the largest gradient.
RELATIVE_TOLERANCE = 2e-6


def loss_and_gradients(batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Summed loss of the tiny model with large gates, and all gradients."""
    with alone():
        with torch.device("meta"):
            model = VisionLanguageModel(TINY, dtype=torch.float32)
        materialise(model, 5, torch.device("cpu"))
        loss = loss_sum(model, batch)
        loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def shapes(batch: Batch) -> dict[str, torch.Size]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value.shape for name, value in values.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize(("positions", "rows", "images"), [(16, 3, 51), (1, 1, 1), (8, 2, 34)])
def test_splitting_undoes_joining(positions, rows, images):
    text, image = torch.randn(positions, rows, 6), torch.randn(images, 1, 6)
    joined = join(text, image)
    assert joined.shape == (positions * rows + images, 1, 6)
    again = split(joined, positions, rows)
    assert torch.equal(again[0], text) and torch.equal(again[1], image)


def test_gradients_come_back_by_the_same_way():
    text = torch.randn(4, 2, 6, requires_grad=True)
    image = torch.randn(5, 1, 6, requires_grad=True)
    text_out, image_out = split(join(text, image), 4, 2)
    ((text_out * 2).sum() + (image_out * 3).sum()).backward()
    assert torch.equal(text.grad, torch.full_like(text, 2))
    assert torch.equal(image.grad, torch.full_like(image, 3))


@pytest.mark.parametrize(("shards", "images", "image_tokens"), [(1, 3, 51), (2, 3, 52), (4, 4, 68)])
def test_image_tokens_are_padded_to_what_sequence_parallelism_splits(shards, images, image_tokens):
    parallel = MegatronSettings(tensor_parallel=shards, sequence_parallel=shards > 1)
    assert TINY.encoder.tokens == 17
    assert padded(images * 17, parallel) == image_tokens
    batch = random_batch(1, samples=images)
    text_tokens = len(batch.tokens_bt) * ROW_TOKENS
    assert joined_tokens(batch, 17, parallel) == text_tokens + image_tokens


def test_tensor_parallelism_alone_splits_no_tokens():
    assert padded(51, MegatronSettings(tensor_parallel=4)) == 51


def test_batches_of_other_shapes_grow_without_changing_loss_or_gradients():
    batches = [random_batch(1, samples=4), random_batch(2, samples=1), random_batch(3, samples=2)]
    batches.append(random_batch(4, samples=3, images=False))
    grown = same_shapes(batches)
    assert all(shapes(batch) == shapes(batches[0]) for batch in grown)
    for before, after in zip(batches, grown, strict=True):
        assert after.learned_bt.sum() == before.learned_bt.sum()
        loss, gradients = loss_and_gradients(before)
        grown_loss, grown_gradients = loss_and_gradients(after)
        assert grown_loss == pytest.approx(loss, rel=RELATIVE_TOLERANCE)
        assert gradients.keys() == grown_gradients.keys()
        scale = max(gradient.abs().max() for gradient in gradients.values())
        for name, gradient in gradients.items():
            difference = (grown_gradients[name] - gradient).abs().max()
            assert difference <= RELATIVE_TOLERANCE * scale, name


def test_padding_is_no_text_and_sees_no_image():
    small, large = random_batch(1, samples=1), random_batch(2, samples=4)
    grown, _ = same_shapes([small, large])
    rows = len(small.tokens_bt)
    assert (grown.text_numbers_bt[rows:] == NO_TEXT).all()
    assert (grown.image_ranges_2bt[:, rows:] == 0).all()
    assert not grown.learned_bt[rows:].any()
    assert not grown.pixels[len(small.pixels) :].any()
    assert torch.equal(grown.tokens_bt[:rows], small.tokens_bt)


def test_equal_shapes_stay_as_they_are():
    batch = random_batch(1, samples=3)
    [same] = same_shapes([batch])
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(same, field.name)
        assert torch.equal(before, after) if isinstance(before, Tensor) else before == after


def test_nothing_is_learned_from_a_blank():
    batch = replace(random_batch(1, samples=3), samples=3, skipped=("a",))
    empty = blank(batch)
    assert shapes(empty) == shapes(batch)
    assert (empty.samples, empty.skipped) == (0, ())
    loss, gradients = loss_and_gradients(empty)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())
    assert loss_and_gradients(batch)[0] > 0  # the batch itself is as it was
