"""The threshold: mean probabilities → masks."""

from collections.abc import Sequence

import torch
from torch import Tensor


def apply_threshold(mean: Tensor, threshold: float, min_areas: Sequence[int]) -> Tensor:
    """Masks (classes, H, W), bool, of mean probabilities (classes, H, W)."""
    return drop_small_masks(mean > threshold, min_areas)


def drop_small_masks(masks: Tensor, min_areas: Sequence[int]) -> Tensor:
    """Masks (classes, H, W), those of fewer pixels than their class's of `min_areas` emptied."""
    kept = [mask & (mask.sum() >= least) for mask, least in zip(masks, min_areas, strict=True)]
    return torch.stack(kept)  # the areas are numbers here: copied to a GPU they would be waited for
