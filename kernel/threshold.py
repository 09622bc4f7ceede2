"""The threshold: mean probabilities → masks."""

from torch import Tensor


def apply_threshold(mean: Tensor, threshold: float, min_area: int = 0) -> Tensor:
    """Masks (classes, H, W), bool, of mean probabilities (classes, H, W)."""
    return drop_small_masks(mean > threshold, min_area)


def drop_small_masks(masks: Tensor, min_area: int) -> Tensor:
    """Masks (classes, H, W), those of fewer than `min_area` pixels emptied."""
    areas = masks.sum(dim=(-2, -1), keepdim=True)
    return masks & (areas >= min_area)
