"""The validator: a submission against its sample, and whether its masks look like defects.

An error is what Kaggle refuses or scores as nothing; a warning is what real masks do not do. The
thresholds of the warnings were measured on the training masks of real strips.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kernel.competition import IMAGE_SIZE, N_TRAINING_IMAGES, TRAINING_IMAGES_WITH_CLASS
from kernel.images import Mask, Size, read_image, size_of
from kernel.rle import decode_rle, rle_fault
from kernel.rows import Layout, read_rows

Pair = tuple[str, int]  # (image, class)

# --- the rows -------------------------------------------------------------------------------------


def first_few(faults: Iterable[str], most: int = 3) -> list[str]:
    """Return the first faults of a kind, and how many more there are."""
    listed = list(faults)
    more = len(listed) - most
    return listed[:most] + ([f"… and {more:,} more like this"] if more > 0 else [])


def misplaced(found: Sequence[Pair], expected: Sequence[Pair]) -> Iterator[str]:
    """Yield the first row that is not in the sample's place, of rows that both have once."""
    for row, wanted in zip(found, expected, strict=True):
        if row != wanted:
            yield f"row {row} stands where the sample has {wanted}: keep the sample's order"
            return


def row_faults(
    layout: Layout, rows: Sequence[tuple[str, int, str]], pairs: list[Pair]
) -> list[str]:
    """Return missing, repeated, unknown and misplaced rows; `pairs` are the sample's.

    The three-column layout may leave out rows of empty masks: all of them, or it was by mistake.
    """
    times, wanted = Counter((name, label) for name, label, _ in rows), set(pairs)
    sparse = "ClassId" in layout.columns and all(rle for *_, rle in rows)
    lacking = [] if sparse else [pair for pair in pairs if pair not in times]
    return [
        *first_few(f"row {pair} is missing" for pair in lacking),
        *first_few(f"row {pair} is there {n} times" for pair, n in times.items() if n > 1),
        *first_few(f"row {pair} is not in the sample" for pair in times if pair not in wanted),
        *misplaced([p for p in times if p in wanted], [p for p in pairs if p in times]),
    ]


# --- the masks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskStats:
    """Measurements of one mask."""

    label: int
    area: int  # pixels
    joined: float  # share of its pixels whose neighbour to the right is on too
    black: float  # share of its pixels where the image is black, beside the steel; NaN without it
    first_row: int  # runs that start in the image's first row
    last_row: int  # and in its last, as those would that count pixels from 0


def mask_stats(label: int, rle: str, size: Size, black: Mask | None) -> MaskStats:
    """Measure one well-formed, non-empty mask."""
    mask = decode_rle(rle, size)
    area = int(mask.sum())
    joined = float((mask[:, :-1] & mask[:, 1:]).sum() / area)
    rows = (np.array(rle.split()[::2], np.int64) - 1) % size[0]
    share = float("nan") if black is None else float(black[mask].mean())
    first, last = int((rows == 0).sum()), int((rows == size[0] - 1).sum())
    return MaskStats(label, area, joined, share, first, last)


def check_image(
    images: Path | None, name: str, rles: dict[int, str]
) -> tuple[list[str], list[MaskStats]]:
    """Return faults and measurements of an image's masks; without it, of a strip's size."""
    size, black = IMAGE_SIZE, None
    if images:
        try:
            image = read_image(images / name)
        except (OSError, ValueError) as error:
            return [f"{name} has a mask, but cannot be read: {error}"], []
        size, black = size_of(image), image < 12  # JPEG's noise on black
    faults = {label: rle_fault(rle, size[0] * size[1]) for label, rle in rles.items()}
    words = [f"row {(name, label)}: {fault}" for label, fault in faults.items() if fault]
    return words, [mask_stats(c, rle, size, black) for c, rle in rles.items() if not faults[c]]


def class_table(masks: Sequence[MaskStats], labels: Iterable[int], images: int) -> list[str]:
    """Per class: images with a mask, their share here and in training, the median area."""
    lines = [f"{'class':>5} {'masks':>7} {'share':>7} {'training':>9} {'median area':>12}"]
    for label in labels:
        areas = [each.area for each in masks if each.label == label]
        share = (
            f"{TRAINING_IMAGES_WITH_CLASS[label] / N_TRAINING_IMAGES:.1%}"
            if label in TRAINING_IMAGES_WITH_CLASS
            else "?"
        )
        median = f"{np.median(areas):,.0f} px" if areas else "-"
        lines.append(
            f"{label:>5} {len(areas):>7,} {len(areas) / images:>7.1%} {share:>9} {median:>12}"
        )
    return lines


def unlikely_counts(masks: Sequence[MaskStats], images: int) -> Iterator[str]:
    """Yield classes four times rarer or more frequent than in training, among enough images."""
    if not masks:
        yield "all masks are empty, which scores 0.856: did the run fail?"
        return
    counts = Counter(each.label for each in masks)
    for label, of_training in TRAINING_IMAGES_WITH_CLASS.items():
        expected = images * of_training / N_TRAINING_IMAGES
        if expected >= 5 and not expected / 4 <= counts[label] <= 4 * expected:
            rare = "is missing" if not counts[label] else f"is on {counts[label]:,} images"
            yield f"class {label} {rare}; training's share would be {expected:,.0f} of {images:,}"


def unlikely_masks(masks: Sequence[MaskStats]) -> Iterator[str]:
    """Yield signs of masks that are transposed, flipped or shifted.

    On real strips at least 92 % of a mask's pixels have a neighbour to the right, and at most 18 %
    where the mask was written in row order; no mask lies on black, where a mirrored one does; 470
    runs start in the first row and none in the last.
    """
    if not masks:
        return
    joined = float(np.median([each.joined for each in masks]))
    if joined < 0.6:
        yield (
            f"masks fall into thin pieces: {joined:.0%} of the median mask's pixels go on to the "
            "right, above 90 % in real ones; is the RLE written along the rows, or is it noise?"
        )
    black = float(np.mean([each.black for each in masks]))  # NaN without images: no warning
    if black > 0.05:
        yield f"{black:.0%} of a mask lies on black, beside the steel: are the masks mirrored?"
    first, last = sum(each.first_row for each in masks), sum(each.last_row for each in masks)
    if last >= 5 and last > first:
        yield (
            f"{last} runs start in the last row and {first} in the first: pixels are counted from 1"
        )


# --- the submission -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """Errors, warnings and the table per class."""

    errors: list[str]
    warnings: list[str]
    table: list[str]

    def lines(self) -> list[str]:
        """Return the whole report, the verdict last."""
        errors = [f"error: {error}" for error in self.errors]
        warnings = [f"warning: {warning}" for warning in self.warnings]
        verdict = "INVALID: Kaggle would refuse it" if errors else "valid"
        return [*self.table, *errors, *warnings, verdict]


def check_submission(
    path: Path, columns: Sequence[str], pairs: list[Pair], images: Path | None = None
) -> Findings:
    """Check a submission against the columns and (image, class) pairs that it must have.

    With the folder `images` a mask is checked against its own image, else against `IMAGE_SIZE`.
    """
    try:
        layout, rows = read_rows(path)
    except (OSError, ValueError) as error:
        return Findings([str(error)], [], [])
    header = ",".join(layout.columns)
    errors = [] if header == ",".join(columns) else [f"header {header}, not {','.join(columns)}"]
    errors += row_faults(layout, rows, pairs)
    rles: dict[str, dict[int, str]] = defaultdict(dict)
    for name, label, rle in rows:
        if rle:
            rles[name][label] = rle
    with ThreadPoolExecutor() as pool:
        checked = list(pool.map(lambda item: check_image(images, *item), rles.items()))
    errors += first_few(fault for faults, _ in checked for fault in faults)
    masks = [each for _, several in checked for each in several]
    labels, count = sorted({label for _, label in pairs}), len({name for name, _ in pairs})
    unlikely = [*unlikely_counts(masks, count), *unlikely_masks(masks)] if not errors else []
    return Findings(errors, unlikely, class_table(masks, labels, count))
