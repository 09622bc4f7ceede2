"""Threshold and early exit: what a sum of passes proves before the last of them has run."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernel.images import Size
from kernel.manifest import Manifest


def apply_threshold(mean: Tensor, threshold: float, min_areas: Sequence[int]) -> Tensor:
    """Masks (classes, H, W), bool, of mean probabilities (classes, H, W)."""
    return drop_small_masks(mean > threshold, min_areas)


def drop_small_masks(masks: Tensor, min_areas: Sequence[int]) -> Tensor:
    """Masks (classes, H, W), those of fewer pixels than their class's of `min_areas` emptied."""
    kept = [mask & (mask.sum() >= least) for mask, least in zip(masks, min_areas, strict=True)]
    return torch.stack(kept)  # the areas are numbers here: copied to a GPU they would be waited for


class Tally:
    """The passes of one image: their sum, and what it proves before the last of them has run.

    K passes give probabilities p in [0, 1], and a pixel of a class is on where their mean exceeds
    t, that is where their sum exceeds tK. At any moment the first d passes are decoded, their sum
    is S; those after them up to e are encoded, so that their gates g are known and p ≤ g; the
    others can add 1 at the most. The final sum lies between S and S + Σg + (K − e), hence

        surely on   once S > tK,
        surely off  once S + Σg + (K − e) ≤ tK.

    A class is closed when this decides each of its pixels, or when fewer than its `min_area` can
    still be on, for then it will be empty. When all classes are closed no pass can change the
    masks, and none is run. As long as nothing is decoded S is 0, and an image is proven empty by
    gates alone.

    Adding K numbers of at most 1 in fp32 errs by less than K² 2⁻²⁴, the division and the scalars
    that tensors are compared with by a few K 2⁻²⁴ more; `margin` is above their sum and keeps both
    comparisons on the safe side. Where all passes were decoded, the masks are those of `mean > t`
    and of no bound. The proof speaks of a pass's probabilities as they are, so they must not depend
    on what else is in the batch. They do not as long as the batch has one size, so all are padded
    to it: tested bit by bit on the CPU. But PyTorch's loops there leave a tensor's end to scalar
    code, which may round otherwise, so it is certain of batches of one alone. A GPU's libraries
    promise no more than they document; after running out of memory, and there with images of many
    sizes, the size is another, and last bits may be.

    Two things take passes away, and the proof begins anew with the K that is left: `settle` of one
    that gave NaN, and `finalize` where the hour ends before the last pass. Whether a decoder that
    never runs would give NaN nobody knows; run in full, its pass would be dropped. So the masks are
    those of all passes as long as these give numbers.
    """

    def __init__(self, n_passes: int, manifest: Manifest, early_exit: bool) -> None:
        self.n_passes, self.early_exit = n_passes, early_exit
        self.threshold = manifest.threshold
        self.min_areas = [max(area, 1) for area in manifest.min_areas]
        self.gates: list[npt.NDArray[np.float64]] = []  # (classes,) of every pass encoded
        self.bounds: list[Tensor] = []  # the same on the device, of those not decoded
        self.total: Tensor | None = None  # (classes, H, W), of the passes decoded
        self.decoded = 0
        self.classes = manifest.classes
        self.mask_size = manifest.competition.mask_size
        self.highest = np.zeros(manifest.classes)  # of the sum
        self.open = list(range(manifest.classes))  # not proven
        self.launched: tuple[Tensor | None, Tensor | None] = None, None  # gates, sum; not settled

    @property
    def required_sum(self) -> float:
        """What a sum must exceed."""
        return self.n_passes * self.threshold

    @property
    def margin(self) -> float:
        """More than what rounding can do to a sum."""
        return float((self.n_passes + 1) ** 2 * 2**-23)

    # A step is added in two parts, so that a whole batch waits for its device once: `launch` queues
    # what is to be computed there, `settle` takes what came of it on the host.

    def launch(self, gates: Tensor | None, probabilities: Tensor | None) -> Tensor:
        """Queue the next pass's `gates` (classes,), or the oldest kept one's `probabilities`.

        Where no pass is kept, both may come, of the next pass. Returns what `settle` needs,
        (4, classes): the gates, the highest sum, the pixels that may still be on, and those that
        surely are.
        """
        bounds = self.bounds if gates is None else [*self.bounds, gates]
        total = self.total
        if probabilities is not None:  # (classes, H, W)
            bounds = bounds[1:]
            total = probabilities.clone() if total is None else total + probabilities
        self.launched = gates, None if probabilities is None else total
        unknown = self.n_passes - len(self.gates) - (gates is not None)
        device = bounds[0].device if total is None else total.device
        zeros = torch.zeros(self.classes, dtype=torch.float64, device=device)
        highest = zeros if probabilities is None or total is None else total.amax((-2, -1))
        counts = None if total is None else self._count(total, bounds, unknown)
        possible, certain = counts or (zeros, zeros)
        found = (zeros if gates is None else gates, highest, possible, certain)
        return torch.stack([each.double() for each in found])

    def _count(
        self, total: Tensor, bounds: list[Tensor], unknown: int
    ) -> tuple[Tensor, Tensor] | None:
        """Pixels (classes,) that may be on, that surely are; None where none can be off yet."""
        room = self.required_sum - self.margin - unknown
        if not self.early_exit or room < 0:
            return None
        above = torch.full((self.classes,), room, dtype=torch.float64, device=total.device)
        for gates in bounds:
            above = above - gates
        possible = total > above.to(total.dtype)[:, None, None]
        certain = total > self.required_sum + self.margin
        return possible.sum((-2, -1)), certain.sum((-2, -1))

    def settle(self, found: npt.NDArray[np.float64]) -> bool:
        """Take what `launch` found (4, classes); False: the pass gave NaN, and is dropped."""
        bound, total = self.launched
        self.launched = None, None
        gates, highest, possible, certain = found
        if not np.isfinite(found[:2]).all():
            if bound is None:
                del self.gates[self.decoded], self.bounds[0]
            self._restart(self.n_passes - 1)
            return False
        if bound is not None:
            self.gates.append(gates)
            self.bounds.append(bound)
        if total is not None:
            self.total, self.highest = total, highest
            self.decoded += 1
            del self.bounds[0]
        self._close(possible, certain)
        return True

    def release_gates(self) -> None:
        """Take back the passes that are encoded and not decoded: they come again.

        What they proved stays proven.
        """
        del self.gates[self.decoded :]
        self.bounds.clear()

    def finalize(self) -> None:
        """Take the mean of the passes decoded so far: no other comes."""
        self._restart(self.decoded)

    def _restart(self, n_passes: int) -> None:
        """Begin the proof anew; where pixels have to be counted, with the next step."""
        self.n_passes, self.open = n_passes, list(range(self.classes))
        if self.total is None or self.decoded == n_passes:
            self._close(np.zeros(self.classes), np.zeros(self.classes))

    def _close(self, possible: npt.NDArray[np.float64], certain: npt.NDArray[np.float64]) -> None:
        if self.decoded == self.n_passes:
            self.open = []
        elif self.early_exit:
            self.open = [i for i in self.open if not self._proven(i, possible[i], certain[i])]

    def _proven(self, label: int, possible: float, certain: float) -> bool:
        """Whether no pass to come can change the mask of a class with so many pixels."""
        rest = sum(gates[label] for gates in self.gates[self.decoded :])
        rest += self.n_passes - len(self.gates)
        if rest > self.required_sum - self.margin:  # not even a pixel of sum 0 is off
            return False
        return self.total is None or possible < self.min_areas[label] or possible == certain

    @property
    def may_be_clean(self) -> bool:
        """Whether gates alone may still prove all open classes: they do if those to come are 0.

        It costs or saves work and changes no mask: no decoder runs while it holds. An encoder too
        many costs little, for its pass may still be needed, a decoder too many a third of a pass.
        """
        if not self.early_exit or not self.gates:
            return self.early_exit
        kept, unknown = self.gates[self.decoded :], self.n_passes - len(self.gates)
        ungated = self.gates[-1] == 1  # of a member without a presence head; so are those to come
        return all(
            self.highest[i] + sum(gates[i] for gates in kept) + unknown * ungated[i]
            <= self.required_sum - self.margin
            for i in self.open
        )

    def masks(self, size: Size) -> Tensor:
        """Masks (classes, H, W), on the device, of an image of `size`; no class may be open."""
        if self.total is None:
            return torch.zeros((self.classes, *(self.mask_size or size)), dtype=torch.bool)
        if self.decoded == self.n_passes:
            return apply_threshold(self.total / self.n_passes, self.threshold, self.min_areas)
        certain = self.total > self.required_sum + self.margin
        return drop_small_masks(certain, self.min_areas)
