"""The competition's metric, and what it hides.

Predicting nothing scores 0.856 on Kaggle, for most (image, class) pairs are empty. So the mean over
the pairs that have a mask, and the share of clean strips left empty, always stand beside it.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Masks = npt.NDArray[np.bool_]  # (classes, H, W)


def dice_of(both: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Dice of masks that share `both` pixels and have `sizes` together; 1 for an empty pair."""
    return np.where(sizes > 0, 2 * both / np.maximum(sizes, 1), 1.0)


def dice(found: Masks, truth: Masks) -> list[float]:
    """Dice per class of masks (classes, H, W)."""
    both = (found & truth).sum(axis=(-2, -1))
    sizes = found.sum(axis=(-2, -1)) + truth.sum(axis=(-2, -1))
    return [float(value) for value in dice_of(both, sizes)]


@dataclass
class Scores:
    """Dice of every (image, class) pair so far."""

    all_pairs: list[float] = field(default_factory=list)
    per_class: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    clean_strips: list[bool] = field(default_factory=list)  # whether each was left wholly empty

    def add(self, found: Masks, truth: Masks) -> None:
        """Add one image's masks (classes, H, W) and its ground truth."""
        values = dice(found, truth)
        self.all_pairs += values
        for label, (value, mask) in enumerate(zip(values, truth, strict=True), 1):
            if mask.any():
                self.per_class[label].append(value)
        if not truth.any():
            self.clean_strips.append(not found.any())

    @property
    def non_empty(self) -> float:
        """Mean Dice over the pairs that have a mask."""
        return mean(value for values in self.per_class.values() for value in values)

    def summary(self) -> dict[str, float | dict[str, float]]:
        """The three figures that belong together, and those of each class."""
        return {
            "dice": round(mean(self.all_pairs), 4),
            "dice_non_empty": round(self.non_empty, 4),
            "clean_left_empty": round(mean(self.clean_strips), 4),
            "per_class": {str(k): round(mean(v), 4) for k, v in sorted(self.per_class.items())},
        }


def mean(values: Iterable[float]) -> float:
    """Return the mean, or NaN of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else float("nan")
