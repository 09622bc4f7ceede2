"""The early exit: what a sum of passes proves before the last of them has run."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kernel.images import Size
from kernel.manifest import Manifest
from kernel.threshold import apply_threshold, drop_small_masks

CLEAN_FRACTION = 0.8  # of the sum that is needed: below it a strip looks clean


class Tally:
    """The passes of one image: their sum, and what it proves before the last of them has run.

    K passes give probabilities p in [0, 1], and a pixel of a class is on where their mean exceeds
    t, that is where their sum exceeds tK. At any moment the first d passes are decoded, their sum
    is S; those after them up to e are encoded, so that their gates g are known and p ≤ g; the
    others can add 1 at the most. The final sum lies between S and S + Σg + (K − e), hence

        surely on   once S > tK,
        surely off  once S + Σg + (K − e) ≤ tK.

    A class is closed when this decides each of its pixels, or when fewer than `min_area` can still
    be on, for then it will be empty. When all classes are closed no pass can change the masks, and
    none is run. As long as nothing is decoded S is 0, and an image is proven empty by gates alone.

    Adding K numbers of at most 1 in fp32 errs by less than K² 2⁻²⁴, the division and the scalars
    that tensors are compared with by a few K 2⁻²⁴ more; `margin` is above their sum and keeps both
    comparisons on the safe side. Where all passes were decoded, the masks are those of `mean > t`
    and of no bound. The proof speaks of a pass's probabilities as they are, so they must not depend
    on what else is in the batch. They do not as long as the batch has one size, so all are padded
    to it: tested bit by bit on the CPU. A GPU's libraries promise no more than they document; after
    running out of memory the size is another, and last bits may be.

    Two things take passes away, and the proof begins anew with the K that is left: `drop_pass` of
    one that gave NaN, and `finalize` where the hour ends before the last pass.
    """

    def __init__(self, n_passes: int, manifest: Manifest, early_exit: bool) -> None:
        self.n_passes, self.early_exit = n_passes, early_exit
        self.threshold, self.min_area = manifest.threshold, max(manifest.min_area, 1)
        self.gates: list[npt.NDArray[np.float64]] = []  # (classes,) of every pass encoded
        self.total: Tensor | None = None  # (classes, H, W), of the passes decoded
        self.decoded = 0
        self.classes = manifest.classes
        self.mask_size = manifest.competition.mask_size
        self.open = list(range(manifest.classes))  # not proven

    @property
    def required_sum(self) -> float:
        """What a sum must exceed."""
        return self.n_passes * self.threshold

    @property
    def margin(self) -> float:
        """More than what rounding can do to a sum."""
        return float((self.n_passes + 1) ** 2 * 2**-23)

    def add_gates(self, gates: npt.NDArray[np.float64]) -> None:
        """Count one more pass as encoded; `gates` (classes,) bound its probabilities."""
        self.gates.append(gates)
        self._close()

    def add_probabilities(self, probabilities: Tensor) -> None:
        """Add the next pass's probabilities (classes, H, W) to the sum."""
        self.total = probabilities.clone() if self.total is None else self.total.add_(probabilities)
        self.decoded += 1
        self._close()

    def drop_pass(self, encoded: bool) -> None:
        """Drop the next pass: the next to be encoded, or the next to be decoded if `encoded`."""
        if encoded:
            del self.gates[self.decoded]
        self._restart(self.n_passes - 1)

    def finalize(self) -> None:
        """Take the mean of the passes decoded so far: no other comes."""
        self._restart(self.decoded)

    def _restart(self, n_passes: int) -> None:
        self.n_passes, self.open = n_passes, list(range(self.classes))
        self._close()

    def _close(self) -> None:
        if self.decoded == self.n_passes:
            self.open = []
        elif self.early_exit:
            self.open = [label for label in self.open if not self.proven(label)]

    def proven(self, label: int) -> bool:
        """Whether no pass to come can change this class's mask."""
        rest = sum(gates[label] for gates in self.gates[self.decoded :])
        rest += self.n_passes - len(self.gates)
        if rest > self.required_sum - self.margin:  # not even a pixel of sum 0 is off
            return False
        if self.total is None:
            return True
        possible = self.total[label] > self.required_sum - self.margin - rest
        count = int(possible.sum())
        return count < self.min_area or count == int(
            (self.total[label] > self.required_sum + self.margin).sum()
        )

    @property
    def looks_clean(self) -> bool:
        """Whether gates alone may prove all open classes, if the next ones are like those seen.

        A guess that costs or saves work and changes no mask: no decoder runs while it holds.
        """
        if not self.early_exit:
            return False
        usual = np.mean(self.gates, axis=0)
        for label in self.open:
            highest = 0.0 if self.total is None else float(self.total[label].max())
            kept = sum(gates[label] for gates in self.gates[self.decoded :])
            rest = (self.n_passes - len(self.gates)) * usual[label]
            if highest + kept + rest > CLEAN_FRACTION * self.required_sum:
                return False
        return True

    def masks(self, size: Size) -> npt.NDArray[np.bool_]:
        """Masks (classes, H, W) of an image of `size`; call it when no class is open."""
        if self.total is None:
            return np.zeros((self.classes, *(self.mask_size or size)), np.bool_)
        if self.decoded == self.n_passes:
            masks = apply_threshold(self.total / self.n_passes, self.threshold, self.min_area)
        else:
            certain = self.total > self.required_sum + self.margin
            masks = drop_small_masks(certain, self.min_area)
        return masks.cpu().numpy()
