"""The batch of every step: crops around defects, then whole strips.

The batch of step i is always the same: a resumed run sees what an uninterrupted one would.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kernel.faults import one_line
from kernel.images import Image, planes_of, size_of
from kernel.logs import log
from training.augmentation import augment_pairs
from training.config import Config
from training.metrics import Masks
from training.moved_defects import move_defect
from training.strips import Pair, Strips

DRAWS = 20  # in a row that may find strips which cannot be read


def crop_at(array: npt.NDArray[Any], centre: tuple[int, int], size: tuple[int, int]) -> Any:
    """Return the window of `size` nearest to `centre` that lies inside the last two axes."""
    tops = [
        min(max(c - s // 2, 0), max(full - s, 0))
        for c, s, full in zip(centre, size, array.shape[-2:], strict=True)
    ]
    return array[..., tops[0] : tops[0] + size[0], tops[1] : tops[1] + size[1]]


def pad_to_size(array: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """Repeat the last row and column of the last two axes up to `size`, as the kernel pads."""
    padding = [(0, full - side) for side, full in zip(array.shape[-2:], size, strict=True)]
    if not any(map(any, padding)):
        return array
    return np.pad(array, [(0, 0)] * (array.ndim - 2) + padding, mode="edge")


class StripSampler:
    """Draws strips of one folder: a class in proportion to a power of its count, then a strip."""

    def __init__(self, strips: Strips, config: Config) -> None:
        self.strips, self.config = strips, config
        by_class = [strips.with_class(label) for label in range(1, strips.classes + 1)]
        self.by_class = {label: names for label, names in enumerate(by_class, 1) if names}
        counts = np.array([len(names) for names in self.by_class.values()]) ** config.evenness
        self.odds = counts / counts.sum()
        self.clean = strips.clean() or strips.names

    def sample_strip(
        self, rng: np.random.Generator, defective: bool
    ) -> tuple[Image, Masks, int | None]:
        """Draw a strip with a defect (and the class it was drawn for), or a clean one.

        One that cannot be read is logged, and all is drawn again, from the numbers that follow: a
        damaged file gives the same batch every time.

        Raises:
            ValueError, OSError: `DRAWS` of them cannot be read; the last one's.
        """
        for _ in range(DRAWS - 1):
            try:
                return self._draw_strip(rng, defective)
            except (ValueError, OSError) as error:  # hours of steps, which it must not cost
                log.warning("left out: %s", one_line(error))
        return self._draw_strip(rng, defective)

    def _draw_strip(
        self, rng: np.random.Generator, defective: bool
    ) -> tuple[Image, Masks, int | None]:
        if not (defective and self.by_class):
            return *self._load_one(rng, self.clean), None
        label = int(rng.choice(list(self.by_class), p=self.odds))
        pair = self._load_one(rng, self.by_class[label])
        if rng.random() < self.config.moved_share:
            onto = self._load_one(rng, self.strips.names)
            pair = move_defect(rng, pair, onto, label, self.config.moved_method) or pair
        return *pair, label

    def _load_one(self, rng: np.random.Generator, names: Sequence[str]) -> Pair:
        return self.strips.load(names[int(rng.integers(len(names)))])

    def sample_crop(self, rng: np.random.Generator) -> Pair:
        """Draw a window on a defect's pixel, off its centre, or anywhere on a clean strip."""
        size = self.config.crop_size
        image, masks, label = self.sample_strip(rng, rng.random() < self.config.defect_share)
        if label is None:
            y, x = (int(rng.integers(side)) for side in size_of(image))
        else:
            on = np.flatnonzero(masks[label - 1])
            y, x = divmod(int(on[rng.integers(len(on))]), masks.shape[-1])
            y, x = (
                int(v + rng.integers(-s // 3, s // 3 + 1))
                for v, s in zip((y, x), size, strict=True)
            )
        planes = crop_at(planes_of(image), (y, x), size)
        image = planes[0] if image.ndim == 2 else planes.transpose(1, 2, 0)
        return image, crop_at(masks, (y, x), size)


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batch of step i: images (B, channels, H, W), float in [0, 1], and masks (B, classes, H, W).

    The first of `sources` is drawn from where none of the others, of a share each, is.
    """

    def __init__(self, sources: Sequence[Strips], config: Config) -> None:
        self.config = config
        self.samplers = [StripSampler(strips, config) for strips in sources]
        self.shares = [1 - sum(config.extra_shares), *config.extra_shares]

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.config.seed, step])
        if step < self.config.crop_steps:
            pairs = [self.sampler(rng).sample_crop(rng) for _ in range(self.config.crops)]
        else:
            pairs = [self.sample_whole(rng)]
        size = np.max([size_of(image) for image, _ in pairs], axis=0)
        images = np.stack([pad_to_size(planes_of(image), size) for image, _ in pairs])
        if images.dtype == np.uint16:  # which the augmentations do not take
            images = (images / np.float32(np.iinfo(images.dtype).max)).astype(np.float32)
        masks = np.stack([pad_to_size(masks, size) for _, masks in pairs])
        seed = int(rng.integers(2**63))
        return augment_pairs(torch.from_numpy(images), torch.from_numpy(masks), seed)

    def sampler(self, rng: np.random.Generator) -> StripSampler:
        """Draw the folder that the next strip comes from."""
        return self.samplers[rng.choice(len(self.samplers), p=self.shares)]

    def sample_whole(self, rng: np.random.Generator) -> Pair:
        """Draw a whole strip, half of them clean, before its augmentation."""
        return self.sampler(rng).sample_strip(rng, defective=rng.random() < 0.5)[:2]
