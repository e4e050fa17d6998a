from dataclasses import replace

import pytest
import torch
from transformers import CLIPVisionModel

from tests.model.towers import TOWERS, our_tower, their_tower
from tests.model.weights import randomise
from tests.ranks import alone


@pytest.mark.parametrize("image_pixels", [32, 40])  # 16 and 25 patches: 0, 6 or 7 registers
@pytest.mark.parametrize("name", TOWERS)
def test_equals_hugging_face(name, image_pixels, tmp_path):
    tower = TOWERS[name]
    sizes = replace(tower.sizes, image_pixels=image_pixels)
    theirs = their_tower(tower, image_pixels)
    randomise(theirs)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(2, 3, image_pixels, image_pixels, generator=generator)
    expected = theirs(pixel_values=pixels).last_hidden_state
    if tower.model is CLIPVisionModel:  # it norms the class token only
        expected = theirs.post_layernorm(expected)
    with alone():
        ours = our_tower(sizes, theirs, tmp_path)
        actual = ours(pixels).transpose(0, 1)
    assert expected.std() > 0.5  # the comparison says something
    assert (actual - expected).abs().max() < 5e-6  # worst measured 1.6e-6
    direction = torch.randn(actual.shape, generator=generator)
    for states in (actual, expected):
        (states * direction).sum().backward()
    # A norm with ViT's epsilon would multiply the gradient of a zero register by 1e6; it has none.
    assert all(p.grad.isfinite().all() and p.grad.any() for p in ours.parameters())
    [gradient] = [p.grad for name, p in theirs.named_parameters() if p.ndim == 4]
    difference = (ours.patch.weight.grad - gradient).abs().max()
    assert difference < 5e-6 * gradient.abs().max()  # worst measured 1.7e-6


@pytest.mark.parametrize("name", TOWERS)
def test_patches_that_see_registers_differ(name, tmp_path):
    sizes = replace(TOWERS[name].sizes, image_pixels=40)
    theirs = their_tower(TOWERS[name], 40)
    randomise(theirs)
    pixels = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(3))
    with alone(), torch.no_grad():
        plain, mllamas = (
            our_tower(replace(sizes, visible_registers=visible), theirs, tmp_path)(pixels)
            for visible in (False, True)
        )
    assert sizes.register_tokens > 0
    assert (plain - mllamas).abs().max() > 0.1
