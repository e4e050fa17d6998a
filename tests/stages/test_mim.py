"""Masked image modelling: what is predicted, and what counts."""

import torch

from megavlm.stages.mim import loss_sum, patch_targets

PATCH, SIDE = 4, 12


def pictures(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (2, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def test_a_target_is_a_patch_at_zero_mean_and_unit_variance():
    pixels = pictures(1)
    targets = patch_targets(pixels, PATCH)
    for image in range(2):
        for patch in range(9):
            row, column = divmod(patch, 3)
            rows = slice(row * PATCH, (row + 1) * PATCH)
            columns = slice(column * PATCH, (column + 1) * PATCH)
            own = pixels[image, :, rows, columns].flatten().double()
            expected = (own - own.mean()) / own.std()
            # Worst measured 1e-5: the floor under the variance.
            torch.testing.assert_close(targets[image, patch].double(), expected, atol=5e-5, rtol=0)


def test_patches_of_one_colour_are_predicted_as_nothing():
    assert not patch_targets(torch.full((1, 3, SIDE, SIDE), 255, dtype=torch.uint8), PATCH).any()


def test_only_hidden_patches_of_pictures_count():
    pixels = pictures(2)
    targets = patch_targets(pixels, PATCH)
    masked = torch.zeros(2, 9, dtype=torch.bool)
    masked[0, :3] = masked[1] = True
    has_image = torch.tensor([True, False])
    predicted = targets.clone()
    predicted[0, 3:] += 7  # shown
    predicted[1] += 7  # no picture
    assert loss_sum(predicted, pixels, masked, has_image, PATCH) == 0
    predicted[0, 0] += 3
    error = loss_sum(predicted, pixels, masked, has_image, PATCH)
    torch.testing.assert_close(error, torch.tensor(3.0))  # 9 on one of three
