"""The validator: a submission against its sample, and whether its masks look like defects.

An error is what Kaggle refuses or scores as nothing; a warning is what real masks do not do. The
thresholds of the warnings were measured on the training masks of real strips.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kernel.competition import Competition
from kernel.faults import one_line
from kernel.images import Mask, Size, planes_of, read_image, size_of
from kernel.rle import decode_rle, in_run_order, rle_fault
from kernel.rows import Layout, Row, RowKey, masks_by_image, read_rows

# --- the rows -------------------------------------------------------------------------------------


def first_few(faults: Iterable[str], most: int = 3) -> list[str]:
    """Return the first faults of a kind, and how many more there are."""
    listed = list(faults)
    more = len(listed) - most
    return listed[:most] + ([f"… and {more:,} more like this"] if more > 0 else [])


def describe_row(pair: RowKey, competition: Competition) -> str:
    """Name a row by its image and, where there are several, its class."""
    image, label = pair
    several = len(competition.classes) > 1
    return f"{image}, class {competition.name_of(label)}" if several else image


def row_faults(layout: Layout, rows: Sequence[Row], pairs: list[RowKey]) -> list[str]:
    """Return missing, repeated, unknown and misplaced rows; `pairs` are the sample's.

    Where a layout may leave out rows of empty masks, it is all of them or was by mistake.
    """
    times, wanted = Counter((name, label) for name, label, _ in rows), set(pairs)
    sparse = layout.may_omit_empty and all(rle for *_, rle in rows)
    lacking = [] if sparse else [pair for pair in pairs if pair not in times]

    def row(pair: RowKey) -> str:
        return f"row {describe_row(pair, layout.competition)}"

    in_both = (pair for pair in times if pair in wanted), (pair for pair in pairs if pair in times)
    misplaced = [(here, there) for here, there in zip(*in_both, strict=True) if here != there]
    return [
        *first_few(f"{row(pair)} is missing" for pair in lacking),
        *first_few(f"{row(pair)} is there {n} times" for pair, n in times.items() if n > 1),
        *first_few(f"{row(pair)} is not in the sample" for pair in times if pair not in wanted),
        *(
            f"{row(here)} stands where the sample has {describe_row(there, layout.competition)}: "
            "keep the sample's order"
            for here, there in misplaced[:1]
        ),
    ]


# --- the masks ------------------------------------------------------------------------------------

DARK = 12  # grey levels; JPEG's noise on black is below
ANY_SIZE = 2**62  # pixels, of an image whose size is not known


@dataclass(frozen=True)
class MaskStats:
    """Measurements of one mask."""

    label: int
    area: int  # pixels
    joined: float  # share of its pixels whose neighbour to the right is on too
    black: float  # share of its pixels where the image is black, beside the steel; NaN without it
    first_row: int  # runs that start in the image's first row
    last_row: int  # and in its last and go on in the next column, as if pixels counted from 0


def mask_stats(
    label: int, rle: str, size: Size, black: Mask | None, competition: Competition
) -> MaskStats:
    """Measure one well-formed, non-empty mask."""
    decoded = decode_rle(rle, size, competition)
    mask = in_run_order(decoded, competition)  # its runs go down
    area, height = int(mask.sum()), mask.shape[0]
    joined = float((mask[:, :-1] & mask[:, 1:]).sum() / area)
    numbers = np.array(rle.split(), np.int64)
    rows, goes_on = (numbers[::2] - competition.first_index) % height, numbers[1::2] > 1
    share = float("nan") if black is None else float(black[decoded].mean())
    first, last = int((rows == 0).sum()), int((goes_on & (rows == height - 1)).sum())
    return MaskStats(label, area, joined, share, first, last)


def check_image(
    images: Path | None, name: str, rles: dict[int, str], competition: Competition
) -> tuple[list[str], list[MaskStats]]:
    """Return faults and measurements of an image's masks; without it, of the usual size."""
    size, black = competition.mask_size or competition.image_size, None
    if images:
        try:
            image = read_image(images / name, competition)
        except (OSError, ValueError) as error:
            return [f"{name} has a mask, but cannot be read: {error}"], []
        size = competition.size_of_mask(size_of(image))
        if competition.dark_outside and size == size_of(image):
            black = planes_of(image).max(axis=0) < DARK
    n_pixels = size[0] * size[1] if size else ANY_SIZE
    faults = {label: rle_fault(rle, n_pixels, competition) for label, rle in rles.items()}
    if size and not images and not competition.mask_size:
        usual = f", the usual {size[0]}×{size[1]}: give --images with this image"
        for label, fault in faults.items():
            if fault and not rle_fault(rles[label], ANY_SIZE, competition):  # it is of the size
                faults[label] = fault + usual
    row = {label: describe_row((name, label), competition) for label in rles}
    words = [f"row {row[label]}: {fault}" for label, fault in faults.items() if fault]
    if size is None:
        return words, []
    sound = [label for label in rles if not faults[label]]
    return words, [mask_stats(c, rles[c], size, black, competition) for c in sound]


def class_table(
    masks: Sequence[MaskStats],
    labels: Iterable[int],
    images: int,
    competition: Competition,
) -> list[str]:
    """Per class: images with a mask, their share here and in training, the median area."""
    width = max(len("class"), *map(len, competition.classes))
    counts, of = competition.images_with_class, competition.n_training_images
    lines = [f"{'class':>{width}} {'masks':>7} {'share':>7} {'training':>9} {'median area':>12}"]
    for label in labels:
        areas = [each.area for each in masks if each.label == label]
        share = f"{counts[label - 1] / of:.1%}" if counts and of else "?"
        median = f"{np.median(areas):,.0f} px" if areas else "-"
        name, here = competition.name_of(label), f"{len(areas) / images:.1%}"
        lines.append(f"{name:>{width}} {len(areas):>7,} {here:>7} {share:>9} {median:>12}")
    return lines


def unlikely_counts(
    masks: Sequence[MaskStats], images: int, competition: Competition
) -> Iterator[str]:
    """Yield classes four times rarer or more frequent than in training, among enough images."""
    if not masks:
        score = competition.empty_score
        scores = "" if score is None else f", which scores {score:g}"
        yield f"all masks are empty{scores}: did the run fail?"
        return
    found, of = Counter(each.label for each in masks), competition.n_training_images
    for label, of_training in enumerate(competition.images_with_class or (), 1):
        expected = images * of_training / of if of else 0
        if expected >= 5 and not expected / 4 <= found[label] <= 4 * expected:
            rare = "is missing" if not found[label] else f"is on {found[label]:,} images"
            usual = f"training's share would be {expected:,.0f} of {images:,}"
            yield f"class {competition.name_of(label)} {rare}; {usual}"


def unlikely_areas(masks: Sequence[MaskStats], competition: Competition) -> Iterator[str]:
    """Yield classes whose median mask is eight times smaller or larger than in training."""
    for label, usual in enumerate(competition.median_areas or (), 1):
        areas = [each.area for each in masks if each.label == label]
        if len(areas) >= 5 and not usual / 8 <= np.median(areas) <= 8 * usual:
            name, median = competition.name_of(label), np.median(areas)
            yield f"class {name}'s median mask has {median:,.0f} px, in training {usual:,}"


def unlikely_masks(masks: Sequence[MaskStats], competition: Competition) -> Iterator[str]:
    """Yield signs of masks that are transposed, flipped or shifted.

    On real strips at least 92 % of a mask's pixels have a neighbour to the right, and at most 18 %
    where the mask was written in row order; no mask lies on black, where a mirrored one does; 470
    runs start in the first row and none in the last.
    """
    if not masks:
        return
    joined = float(np.median([each.joined for each in masks]))
    if joined < 0.6:
        down = competition.run_order == "columns"
        on, other = ("to the right", "rows") if down else ("below", "columns")
        yield (
            f"masks fall into thin pieces: {joined:.0%} of the median mask's pixels go on {on}, "
            f"above 90 % in real ones; is the RLE written along the {other}, or is it noise?"
        )
    blacks = [each.black for each in masks if not np.isnan(each.black)]
    black = float(np.mean(blacks)) if blacks else 0.0  # not known without images: no warning
    if black > 0.05:
        yield f"{black:.0%} of a mask lies on black, beside the steel: are the masks mirrored?"
    first, last = sum(each.first_row for each in masks), sum(each.last_row for each in masks)
    if last >= 5 and last > first:
        line, index = competition.run_order.removesuffix("s"), competition.first_index
        line = "row" if line == "column" else "column"  # across the runs
        yield (
            f"{last} runs go over from the last {line} and {first} start in the first: "
            f"this competition counts pixels from {index}; was {1 - index} taken?"
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
    path: Path,
    columns: Sequence[str],
    pairs: list[RowKey],
    competition: Competition,
    images: Path | None = None,
    from_kernel: bool = False,
) -> Findings:
    """Check a submission against the columns and (image, class) pairs that it must have.

    With the folder `images` a mask is checked against its own image. Without it, and where the
    folder lacks an image, it is checked against the competition's usual size, where that is known.
    `from_kernel` is as in `read_rows`.
    """
    try:
        layout, rows = read_rows(path, competition, from_kernel=from_kernel)
    except (OSError, ValueError) as error:
        return Findings([one_line(error)], [], [])
    header = ",".join(layout.header)
    errors = [] if header == ",".join(columns) else [f"header {header}, not {','.join(columns)}"]
    errors += row_faults(layout, rows, pairs)
    rles = masks_by_image(rows)
    lacking = [name for name in rles if images and not (images / name).exists()]
    folders = dict.fromkeys(rles, images) | dict.fromkeys(lacking)
    with ThreadPoolExecutor() as pool:
        checked = list(
            pool.map(lambda name: check_image(folders[name], name, rles[name], competition), rles)
        )
    errors += first_few(fault for faults, _ in checked for fault in faults)
    masks = [each for _, several in checked for each in several]
    labels, count = sorted({label for _, label in pairs}), len({name for name, _ in pairs})
    unlikely = list[str]()
    if lacking:
        unlikely.append(
            f"{len(lacking):,} images with a mask are not in {images}, such as {lacking[0]!r}: "
            "their masks are not checked against them"
        )
    measured = masks or not rles  # of masks of no known size nothing is
    if pairs and measured and not errors:
        unlikely += unlikely_counts(masks, count, competition)
        unlikely += [*unlikely_areas(masks, competition), *unlikely_masks(masks, competition)]
    return Findings(errors, unlikely, class_table(masks, labels, count, competition))
