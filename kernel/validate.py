"""Checks a submission against the sample that it answers, and whether its masks look like defects.

An error is what Kaggle refuses or scores as nothing; a warning is what real masks do not do. Every
threshold of a warning was read off the training masks of the real strips.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kernel.images import Mask, read_image
from kernel.mounts import read_sample
from kernel.rows import Layout, read_rows

SIZE = (256, 1600)  # (H, W) of the competition's strips
CLASSES = 4
TRAINING_IMAGES = 12_568
TRAINING = {1: 897, 2: 247, 3: 5150, 4: 801}  # class → images of the training set that have it

Pair = tuple[str, int]  # (image, class)

# --- one run-length code --------------------------------------------------------------------------


def rle_fault(rle: str, pixels: int) -> str | None:
    """What Kaggle would refuse in a run-length code of an image of so many pixels, in words."""
    words = rle.split()
    wrong = next((word for word in words if not re.fullmatch("-?[0-9]+", word)), None)
    if wrong is not None:
        return f"{wrong!r} is no number"
    if len(words) % 2:
        return f"{len(words)} numbers, expected pairs of start and length"
    end = 0  # the last pixel of the run before, from 1
    for start, length in zip(map(int, words[::2]), map(int, words[1::2]), strict=True):
        run = f"run {start} {length}"
        if start < 1:
            return f"{run} starts before pixel 1: is it 0-indexed?"
        if length < 1:
            return f"{run} has no pixel"
        if start <= end + 1 and end:
            how = "touches" if start == end + 1 else "overlaps or comes before"
            return f"{run} {how} the run that ends at {end}: sort and join them"
        end = start + length - 1
        if end > pixels:
            return f"{run} leaves an image of {pixels} pixels"
    return None


def decode_rle(rle: str, size: tuple[int, int]) -> Mask:
    """The mask (H, W) of a run-length code, the inverse of the kernel's `encode_rle`.

    Raises:
        ValueError: the code is not made of pairs, or a run leaves the image.
    """
    numbers = [int(number) for number in rle.split()]
    if len(numbers) % 2:
        raise ValueError(f"{len(numbers)} numbers, expected pairs of start and length")
    mask = np.zeros(size[0] * size[1], np.bool_)
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        if start < 1 or length < 1 or start - 1 + length > mask.size:
            raise ValueError(f"run {start} {length} leaves an image of {mask.size} pixels")
        mask[start - 1 : start - 1 + length] = True
    return mask.reshape(size[1], size[0]).T


# --- the rows -------------------------------------------------------------------------------------


def first_few(faults: Iterable[str], most: int = 3) -> list[str]:
    """The first faults of a kind, and how many more there are."""
    listed = list(faults)
    more = len(listed) - most
    return listed[:most] + ([f"… and {more:,} more like this"] if more > 0 else [])


def misplaced(found: Sequence[Pair], expected: Sequence[Pair]) -> Iterator[str]:
    """The first row that stands elsewhere than in the sample, of rows that both have once."""
    for row, wanted in zip(found, expected, strict=True):
        if row != wanted:
            yield f"row {row} stands where the sample has {wanted}: keep the sample's order"
            return


def row_faults(
    layout: Layout, rows: Sequence[tuple[str, int, str]], pairs: list[Pair]
) -> list[str]:
    """Missing, repeated, unknown and misplaced rows; `pairs` are the sample's.

    Today's layout may leave out the rows of empty masks: all of them, or it would be by mistake.
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
class Look:
    """What one mask looks like."""

    label: int
    area: int  # pixels
    joined: float  # share of its pixels whose neighbour to the right is on too
    black: float  # share of its pixels where the image is black, beside the steel; NaN without it
    first_row: int  # runs that start in the image's first row
    last_row: int  # and in its last, as those would that count pixels from 0


def look(label: int, rle: str, size: tuple[int, int], black: Mask | None) -> Look:
    """One well-formed, non-empty mask, measured."""
    mask = decode_rle(rle, size)
    area = int(mask.sum())
    joined = float((mask[:, :-1] & mask[:, 1:]).sum() / area)
    rows = (np.array(rle.split()[::2], np.int64) - 1) % size[0]
    share = float("nan") if black is None else float(black[mask].mean())
    first, last = int((rows == 0).sum()), int((rows == size[0] - 1).sum())
    return Look(label, area, joined, share, first, last)


def look_at(images: Path | None, name: str, rles: dict[int, str]) -> tuple[list[str], list[Look]]:
    """Faults and looks of one image's masks; without its image, a strip of the competition."""
    size, black = SIZE, None
    if images:
        try:
            image = read_image(images / name)
        except (OSError, ValueError) as error:
            return [f"{name} has a mask, but cannot be read: {error}"], []
        size, black = (image.shape[0], image.shape[1]), image < 12  # JPEG's noise on black
    faults = {label: rle_fault(rle, size[0] * size[1]) for label, rle in rles.items()}
    told = [f"row {(name, label)}: {fault}" for label, fault in faults.items() if fault]
    return told, [look(c, rle, size, black) for c, rle in rles.items() if not faults[c]]


def table_of(looks: Sequence[Look], labels: Iterable[int], images: int) -> list[str]:
    """Per class: images with a mask, their share here and in training, and the median area."""
    lines = [f"{'class':>5} {'masks':>7} {'share':>7} {'training':>9} {'median area':>12}"]
    for label in labels:
        areas = [seen.area for seen in looks if seen.label == label]
        share = f"{TRAINING[label] / TRAINING_IMAGES:.1%}" if label in TRAINING else "?"
        median = f"{np.median(areas):,.0f} px" if areas else "-"
        lines.append(
            f"{label:>5} {len(areas):>7,} {len(areas) / images:>7.1%} {share:>9} {median:>12}"
        )
    return lines


def unlikely_counts(looks: Sequence[Look], images: int) -> Iterator[str]:
    """Classes four times rarer or more frequent than in training, once that can be told."""
    if not looks:
        yield "every mask is empty: that scores 0.856 and is what a run leaves that came to nothing"
        return
    counts = Counter(seen.label for seen in looks)
    for label, of_training in TRAINING.items():
        expected = images * of_training / TRAINING_IMAGES
        if expected >= 5 and not expected / 4 <= counts[label] <= 4 * expected:
            rare = "is missing" if not counts[label] else f"is on {counts[label]:,} images"
            yield f"class {label} {rare}; training's share would be {expected:,.0f} of {images:,}"


def unlikely_masks(looks: Sequence[Look]) -> Iterator[str]:
    """What masks do that are transposed, flipped or shifted.

    On the real strips 92 % of a mask's pixels and more go on to the right, and at most 18 % of a
    mask that was written in row order; no mask lies on black, where a mirrored one does; 470 runs
    start in the first row and none in the last.
    """
    if not looks:
        return
    joined = float(np.median([seen.joined for seen in looks]))
    if joined < 0.6:
        yield (
            f"masks fall into thin pieces: {joined:.0%} of the median mask's pixels go on to the "
            "right, above 90 % in real ones; is the RLE written along the rows, or is it noise?"
        )
    black = float(np.mean([seen.black for seen in looks]))  # NaN without images: no warning
    if black > 0.05:
        yield f"{black:.0%} of a mask lies on black, beside the steel: are the masks mirrored?"
    first, last = sum(seen.first_row for seen in looks), sum(seen.last_row for seen in looks)
    if last >= 5 and last > first:
        yield (
            f"{last} runs start in the last row and {first} in the first: pixels are counted from 1"
        )


# --- the submission -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """What is wrong, what looks wrong, and the table per class."""

    errors: list[str]
    warnings: list[str]
    table: list[str]

    def lines(self) -> list[str]:
        """The whole report, the verdict last."""
        errors = [f"error: {error}" for error in self.errors]
        warnings = [f"warning: {warning}" for warning in self.warnings]
        verdict = "INVALID: Kaggle would refuse it" if errors else "valid"
        return [*self.table, *errors, *warnings, verdict]


def check_submission(
    path: Path, columns: Sequence[str], pairs: list[Pair], images: Path | None = None
) -> Findings:
    """A submission against the columns and (image, class) pairs that it must have.

    With the folder `images` each mask is held against its own image, else against `SIZE`.
    """
    try:
        layout, rows = read_rows(path)
    except (OSError, ValueError) as error:
        return Findings([str(error)], [], [])
    header = ",".join(layout.columns)
    errors = [] if header == ",".join(columns) else [f"header {header}, not {','.join(columns)}"]
    errors += row_faults(layout, rows, pairs)
    masks: dict[str, dict[int, str]] = defaultdict(dict)
    for name, label, rle in rows:
        if rle:
            masks[name][label] = rle
    with ThreadPoolExecutor() as pool:
        looked = list(pool.map(lambda item: look_at(images, *item), masks.items()))
    errors += first_few(fault for faults, _ in looked for fault in faults)
    looks = [seen for _, several in looked for seen in several]
    labels, count = sorted({label for _, label in pairs}), len({name for name, _ in pairs})
    unlikely = [*unlikely_counts(looks, count), *unlikely_masks(looks)] if not errors else []
    return Findings(errors, unlikely, table_of(looks, labels, count))


EXAMPLE = "  python kernel/validate.py submission.csv --sample sample_submission.csv"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the findings; exit code 1 where Kaggle would refuse the submission."""
    parser = argparse.ArgumentParser(
        description=f"{EXAMPLE}\n\n{__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("submission", type=Path)
    parser.add_argument("--sample", type=Path, required=True, help="the competition's own, mounted")
    parser.add_argument("--images", type=Path, help="their folder, for other sizes than 256×1600")
    args = parser.parse_args(arguments)
    try:
        layout, pairs = read_sample(args.sample, None, CLASSES)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    findings = check_submission(args.submission, layout.columns, pairs, args.images)
    print("\n".join(findings.lines()))
    sys.exit(1 if findings.errors else 0)


if __name__ == "__main__":
    main()
