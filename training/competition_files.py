"""A competition's files, as they are written here: images, ground truth, sample."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kernel.competition import Competition
from kernel.images import Mask, Size
from kernel.rows import Layout, layouts_of
from kernel.submission import Submission
from kernel.task import expand_rows


def suffix_of(competition: Competition) -> str:
    """Return the suffix of a competition's image files: its own, else one that has their depth."""
    return competition.suffix or (".png" if competition.bits == 16 else ".jpg")


def coloured(image: NDArray[np.uint8], competition: Competition) -> NDArray[np.uint8 | np.uint16]:
    """A grey image as a competition's files have them; BGR where there is colour, rusty."""
    shares = (0.7, 0.85, 1.0) if competition.channels == 3 else (1.0,) * 3
    picture = np.dstack([image * share for share in shares])
    if competition.bits == 8:
        return picture.astype(np.uint8)
    return picture[..., : competition.channels].astype(np.uint16) * 257


def write_image(
    path: Path, image: NDArray[np.uint8], competition: Competition, quality: int
) -> None:
    """Write a grey image as a competition's files have it; `quality` is a JPEG's.

    Raises:
        ValueError: it cannot be written.
    """
    options = [] if path.suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, quality]
    if not cv2.imwrite(str(path), coloured(image, competition), options):
        raise ValueError(f"cannot write {path}: is the folder there and writable?")


def grouped(masks: NDArray[np.bool_], competition: Competition) -> list[Mask]:
    """The four kinds of defects as a competition's classes: every n-th one together."""
    count = len(competition.classes)
    return [np.asarray(masks[i::count].any(axis=0), np.bool_) for i in range(count)]


def write_truth(path: Path, strips: Sequence[tuple[str, list[str]]], layout: Layout) -> None:
    """Write the ground truth of strips, name and RLE of each class, the masks' column last.

    Rows of empty masks are left out where they may be, as in Severstal's train.csv.
    """
    cells = dict(sorted(layout.cells.items(), key=lambda cell: "{mask}" in cell[1]))
    pairs = [(name, label) for name, rles in strips for label in range(1, len(rles) + 1)]
    truth = Submission(path, Layout(cells, layout.competition), pairs)
    for name, rles in strips:
        truth.set_masks(name, dict(enumerate(rles, 1)))
    truth.save(empty_rows=not layout.may_omit_empty)


def write_sample(path: Path, names: Sequence[str], competition: Competition, size: Size) -> None:
    """Write a sample of images: a row for all of an image's classes, or one for each.

    With `any_class` it is written as Severstal's real one is, every pixel of `size` on.
    """
    layout = list(layouts_of(competition).values())[-1]  # today's
    if competition.any_class is not None and layout.may_omit_empty:
        sample = Submission(path, layout, [(name, 0) for name in names])
        for name in names:
            sample.set_masks(name, {0: f"{competition.first_index} {size[0] * size[1]}"})
        sample.save()
        return
    rows = expand_rows([(name, 0) for name in names], len(competition.classes))
    named = replace(competition, empty=competition.empty or "")  # a sample names every row
    Submission(path, Layout(layout.cells, named), rows).save()
