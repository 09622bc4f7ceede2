"""Synthetic strips to measure with, alternately clean."""

from pathlib import Path

import cv2
import numpy as np

from kernel.competition import IMAGE_SIZE
from kernel.images import Image, Size
from training import synthetic

CLASSES = ((), (3,), (), (4,), (), (1,), (), (3,))  # of eight strips in turn


def draw_strip(index: int, size: Size = IMAGE_SIZE) -> Image:
    """One strip; those with an even number are clean."""
    rng = np.random.default_rng([2020, index])
    return synthetic.synthesize_strip(rng, CLASSES[index % len(CLASSES)], size)[0]


def write_strips(folder: Path, count: int) -> list[Path]:
    """Draw strips into a new folder."""
    folder.mkdir()
    paths = [folder / f"{index:04}.png" for index in range(count)]
    for index, path in enumerate(paths):
        cv2.imwrite(str(path), draw_strip(index))
    return paths


def repeat(paths: list[Path], folder: Path, count: int) -> Path:
    """A new folder of `count` names for the same strips."""
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:05}.png").symlink_to(paths[index % len(paths)])
    return folder
