"""The competition's metric, and what it hides.

Predicting nothing scores 0.856 on Kaggle, for most (image, class) pairs are empty. So the mean over
the pairs that have a mask, and the share of clean strips left empty, always stand beside it.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Masks = npt.NDArray[np.bool_]  # (classes, H, W)
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles: 95 of 100


def dice_of(both: Ints, sizes: Ints) -> Floats:
    """Dice of masks that share `both` pixels and have `sizes` together; 1 for an empty pair."""
    return np.where(sizes > 0, 2 * both / np.maximum(sizes, 1), 1.0)


def dice(found: Masks, truth: Masks) -> list[float]:
    """Dice per class of masks (classes, H, W)."""
    both = (found & truth).sum(axis=(-2, -1))
    sizes = found.sum(axis=(-2, -1)) + truth.sum(axis=(-2, -1))
    return [float(value) for value in dice_of(both, sizes)]


def ratio(total: Any, count: Any) -> Floats:
    """Return total / count, NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.true_divide(total, count), np.float64)


def figures(dices: Floats, present: Bools, empty: Bools, weights: Floats) -> dict[str, Floats]:
    """Return the three figures that belong together, each (samples,).

    Of `dices` (strips, classes), whether a class is `present` (strips, classes), whether a strip
    was left `empty` (strips,), and how often a strip stands in a sample, `weights` (samples,
    strips).
    """
    clean = ~present.any(axis=1)
    return {
        "dice": ratio(weights @ dices.sum(axis=1), weights.sum(axis=1) * dices.shape[1]),
        "dice_non_empty": ratio(
            weights @ (dices * present).sum(axis=1), weights @ present.sum(axis=1)
        ),
        "clean_left_empty": ratio(weights @ (clean & empty), weights @ clean),
    }


@dataclass
class Scores:
    """Dice of every (image, class) pair so far."""

    dices: list[list[float]] = field(default_factory=list)  # (strips, classes)
    present: list[list[bool]] = field(default_factory=list)  # (strips, classes), in the truth
    empty: list[bool] = field(default_factory=list)  # (strips,), what was found

    def add(self, found: Masks, truth: Masks) -> None:
        """Add one image's masks (classes, H, W) and its ground truth."""
        self.dices.append(dice(found, truth))
        self.present.append([bool(mask.any()) for mask in truth])
        self.empty.append(not found.any())

    def summary(self) -> dict[str, Any]:
        """The three figures that belong together, and the mean of each class that occurs."""
        dices, present, _ = self._arrays()
        every = self._figures(np.ones((1, len(self.dices))))
        classes = ratio((dices * present).sum(axis=0), present.sum(axis=0))
        per_class = {
            str(label): round(float(value), 4)
            for label, value in enumerate(classes, 1)
            if np.isfinite(value)
        }
        rounded = {key: round(float(values[0]), 4) for key, values in every.items()}
        return rounded | {"per_class": per_class}

    def intervals(self, seed: int = 0) -> dict[str, list[float]]:
        """Return the 95 % bootstrap interval over strips of each figure, [low, high]."""
        strips = len(self.dices)
        even = np.full(strips, 1 / strips)
        drawn = np.random.default_rng(seed).multinomial(strips, even, RESAMPLES).astype(float)
        return {
            key: [round(float(v), 4) for v in np.nanpercentile(values, INTERVAL)]
            for key, values in self._figures(drawn).items()
            if np.isfinite(values).any()
        }

    def _arrays(self) -> tuple[Floats, Bools, Bools]:
        shape = len(self.dices), len(self.dices[0]) if self.dices else 0
        present = np.array(self.present, np.bool_).reshape(shape)
        return np.array(self.dices).reshape(shape), present, np.array(self.empty, np.bool_)

    def _figures(self, weights: Floats) -> dict[str, Floats]:
        return figures(*self._arrays(), weights)
