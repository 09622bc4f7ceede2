"""Augmentation: flips move image and masks together, light and noise change the image alone."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import SMALL, draw_image
from torch import Tensor
from torchvision import tv_tensors

from training.augmentation import LIGHT, NOISE, RANDOM_FLIPS, augment, augment_pairs


def drawn_pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    """An image that is no mirror of itself, with the masks of its darkest and brightest pixels."""
    image = torch.from_numpy(draw_image(seed))
    return image[None], torch.stack([image < 80, image > 170])


def drawn(transform: Any, image: Tensor, masks: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """One seeded draw of a step of the augmentation, of an image in [0, 1]."""
    torch.manual_seed(seed)
    changed, moved = transform(tv_tensors.Image(image / 255), tv_tensors.Mask(masks))
    return changed.as_subclass(Tensor), moved.as_subclass(Tensor)


def test_the_same_seed_augments_the_same_way_and_another_does_not() -> None:
    images, masks = (torch.stack([each] * 4) for each in drawn_pair())
    first, again, other = (augment_pairs(images, masks, seed) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_each_of_a_batch_is_augmented_on_its_own_and_no_number_of_the_network_is_used() -> None:
    images, masks = (torch.stack([each] * 4) for each in drawn_pair())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    found, _ = augment_pairs(images, masks, 0)
    assert len({image.numpy().tobytes() for image in found}) == 4
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("step", [RANDOM_FLIPS, LIGHT, NOISE])
def test_each_step_draws_anew(step: Any) -> None:
    def images(seed: int) -> list[bytes]:
        return [drawn(step, *drawn_pair(), 8 * seed + i)[0].numpy().tobytes() for i in range(8)]

    assert images(0) == images(0)
    assert images(0) != images(1)


def test_an_augmentation_keeps_shapes_and_its_inputs_and_returns_floats() -> None:
    image, masks = drawn_pair()
    for seed in range(8):
        torch.manual_seed(seed)
        changed, moved = augment(image, masks)
        assert (changed.shape, changed.dtype) == ((1, *SMALL), torch.float32)
        assert 0 <= changed.min() < 0.5 < changed.max() <= 1
        assert (moved.shape, moved.dtype) == ((2, *SMALL), torch.bool)
        assert type(changed) is type(moved) is Tensor
    for found, expected in zip((image, masks), drawn_pair(), strict=True):
        assert torch.equal(found, expected)


def test_a_flip_turns_image_and_masks_together_along_each_axis_and_both() -> None:
    image, masks = drawn_pair()
    ways = {
        "none": image[0].numpy(),
        "left and right": np.fliplr(image[0].numpy()),
        "up and down": np.flipud(image[0].numpy()),
        "both": np.rot90(image[0].numpy(), 2),
    }
    seen = []
    for seed in range(60):
        changed, moved = drawn(RANDOM_FLIPS, image, masks, seed)
        pixels = (changed[0] * 255).round().to(torch.uint8)
        seen.append(next(way for way, turned in ways.items() if np.array_equal(turned, pixels)))
        assert torch.equal(moved, torch.stack([pixels < 80, pixels > 170]))
    assert set(seen) == set(ways)
    assert all(5 <= seen.count(way) <= 28 for way in ways)  # about a quarter each


@pytest.mark.parametrize("step", [LIGHT, NOISE])
def test_an_exposure_changes_the_image_and_not_the_masks(step: Any) -> None:
    image, masks = drawn_pair()
    for seed in range(12):
        changed, moved = drawn(step, image, masks, seed)
        assert not torch.equal(changed, image / 255)
        assert torch.equal(moved, masks)


@pytest.mark.parametrize("step", [LIGHT, NOISE])
def test_an_exposure_stays_between_black_and_white(step: Any) -> None:
    image = torch.zeros(1, *SMALL)
    image[..., SMALL[1] // 2 :] = 255
    for seed in range(12):
        changed, _ = drawn(step, image, drawn_pair()[1], seed)
        dark, bright = changed.chunk(2, dim=-1)
        assert 0 <= dark.min() <= dark.max() <= 60 / 255
        assert 150 / 255 <= bright.min() <= bright.max() <= 1


def test_light_is_one_straight_line_for_the_whole_image() -> None:
    image, masks = drawn_pair()
    image = image / 4 + 76  # no value that light could take to black or white
    grey, slopes, shifts = image.numpy() / 255, [], []
    for seed in range(40):
        changed = drawn(LIGHT, image, masks, seed)[0].numpy()
        slope, shift = np.polyfit(grey.ravel(), changed.ravel(), 1)
        assert np.abs(slope * grey + shift - changed).max() <= 1e-4
        slopes.append(slope)
        shifts.append(shift)
    assert 0.56 < min(slopes) < 0.8 < 1.25 < max(slopes) < 1.57  # both factors, 0.75 to 1.25
    assert -0.14 < min(shifts) < -0.05 < 0.05 < max(shifts) < 0.14


def test_noise_is_as_strong_as_it_says_and_shifts_nothing() -> None:
    image = torch.full((1, 200, 200), 120)
    deviations, means = [], []
    for seed in range(30):
        changed, _ = drawn(NOISE, image, image > 0, seed)
        deviations.append(255 * float(changed.std()))
        means.append(255 * float(changed.mean()))
    assert min(deviations) < 1.5 < 4.5 < max(deviations) < 6.4
    assert abs(np.mean(means) - 120) < 0.1
