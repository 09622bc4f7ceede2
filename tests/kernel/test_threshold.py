"""The threshold: which pixels of a mean are on."""

import numpy as np
import pytest
import torch

from kernel.threshold import apply_threshold, drop_small_masks


def test_a_pixel_is_on_only_above_the_threshold() -> None:
    half = np.float32(0.5)
    below, above = (float(np.nextafter(half, np.float32(side))) for side in (0, 1))
    mean = torch.tensor([[[0.0, below, 0.5, above, 1.0]]])
    assert apply_threshold(mean, 0.5, [0]).tolist() == [[[False, False, False, True, True]]]


@pytest.mark.parametrize(
    ("min_areas", "kept"),
    [
        ([0, 0, 0], [2, 3, 0]),
        ([3, 3, 3], [0, 3, 0]),
        ([4, 4, 4], [0, 0, 0]),
        ([2, 4, 0], [2, 0, 0]),
        ([3, 3, 0], [0, 3, 0]),
    ],
)
def test_a_class_of_fewer_pixels_than_its_min_area_is_emptied(
    min_areas: list[int], kept: list[int]
) -> None:
    mean = torch.zeros(3, 2, 4)
    mean[0, 0, :2] = mean[1, 1, 1:] = 1.0
    masks = apply_threshold(mean, 0.5, min_areas)
    assert masks.dtype == torch.bool
    assert masks.sum(dim=(-2, -1)).tolist() == kept
    assert torch.equal(drop_small_masks(mean > 0.5, min_areas), masks)
    assert not (masks & (mean == 0)).any()
