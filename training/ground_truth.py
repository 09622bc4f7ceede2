"""Ground truth: the masks that a train.csv gives for its images."""

import difflib
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from kernel.competition import Competition
from kernel.images import Size, read_image, size_of
from kernel.logs import log, progress
from kernel.rle import decode_rle, join_rles, rle_fault
from kernel.rows import Row, read_rows
from kernel.validator import check_image, unlikely_masks
from training.metrics import Masks

NEAREST = cv2.INTER_NEAREST
LOOKED_AT = 32  # images whose masks are looked at before a fit or a score

Rles = dict[str, dict[int, str]]  # image → class → RLE; one without a mask may be missing
Truth = Rles  # an image that it does not name is clean


def read_truth(path: Path, competition: Competition, from_kernel: bool = False) -> Truth:
    """Read a train.csv, in any layout of a competition; `from_kernel` is as in `read_rows`.

    Several rows of an image and class, one a defect, are joined.

    Raises:
        ValueError: a class is none of the competition's, or an RLE is not made of sorted, separate
            runs; names the line.
    """

    def check(row: Row) -> str | None:
        name, label, rle = row
        if rle and not label:
            return (
                f"{name}: class {competition.any_class}, expected {', '.join(competition.classes)}"
            )
        fault = rle_fault(rle, 2**62, competition)  # the image's size is not known here
        return f"{name}, class {competition.name_of(label)}: {fault}" if fault else None

    masks: defaultdict[str, dict[int, list[str]]] = defaultdict(dict)
    for name, label, rle in read_rows(path, competition, check, from_kernel).rows:
        if rle:
            masks[name].setdefault(label, []).append(rle)
        else:
            masks[name]  # named, and clean if nothing else follows
    several = sum(len(rles) > 1 for labels in masks.values() for rles in labels.values())
    if several:
        log.warning(
            "%s: %d masks come in several rows, which are joined: where the competition scores "
            "instances, each by itself, this pipeline does not fit", path, several,
        )  # fmt: skip
    return {
        name: {c: rles[0] if len(rles) == 1 else join_rles(rles) for c, rles in labels.items()}
        for name, labels in masks.items()
    }


def check_names(truth: Truth, names: Collection[str], path: Path, folder: Path) -> None:
    """Raise ValueError where a ground truth names no image of a folder: all would look clean."""
    if not truth:
        raise ValueError(f"{path}: no row below its header; name the csv that has the masks")
    if not truth.keys().isdisjoint(names):
        return
    name = min(truth)
    close = difflib.get_close_matches(name, names, n=1) or sorted(names)[:1]
    raise ValueError(
        f"{path}: none of its {len(truth)} images is in {folder}: it names {name!r}, the folder "
        f"has {close[0]!r}; correct the names, or choose the folder that they are of"
    )


def warn_of_unlikely_masks(
    truth: Truth, names: Collection[str], path: Path, folder: Path, competition: Competition
) -> None:
    """Log what real masks do not have, of some, as where the description has another order."""
    masked = sorted(name for name in names if truth.get(name))
    own = replace(competition, mask_size=None)  # here they are of their image's size
    some = masked[:: max(len(masked) // LOOKED_AT, 1)]
    stats = [each for name in some for each in check_image(folder, name, truth[name], own)[1]]
    for text in unlikely_masks(stats, own):
        log.warning("%s, read as %s's description says: %s", path, competition.slug, text)


def decode_masks(truth: Truth, name: str, size: Size, competition: Competition) -> Masks:
    """Return the masks (classes, H, W) of one image; one that `truth` does not name is clean.

    Raises:
        ValueError: a run leaves the image; names it.
    """
    rles = truth.get(name, {})
    try:
        labels = range(1, len(competition.classes) + 1)
        masks = [decode_rle(rles.get(label, ""), size, competition) for label in labels]
    except ValueError as error:
        raise ValueError(f"the masks of {name}: {error}") from None
    return np.stack(masks)


def check_masks(
    truth: Truth,
    names: Collection[str],
    path: Path,
    folder: Path,
    competition: Competition,
) -> None:
    """Raise ValueError for a mask that leaves its image; images that cannot be read are skipped.

    The message names the csv at `path`. Every image of `folder` that has a mask is read, and
    `warn_of_unlikely_masks` called.
    """
    for name in progress(sorted(truth.keys() & set(names)), "ground truth", "image"):
        try:
            size = size_of(read_image(folder / name, competition))
        except (ValueError, OSError):
            continue  # what uses it will name it
        try:
            decode_masks(truth, name, size, competition)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    warn_of_unlikely_masks(truth, names, path, folder, competition)


def decode_scored_masks(truth: Truth, name: str, size: Size, competition: Competition) -> Masks:
    """Return `decode_masks` of an image of `size`, in the size of the competition's masks."""
    masks, wanted = decode_masks(truth, name, size, competition), competition.size_of_mask(size)
    if wanted == size:
        return masks
    small = [cv2.resize(m.astype(np.uint8), wanted[::-1], interpolation=NEAREST) for m in masks]
    return np.stack(small).astype(np.bool_)
