"""Run-length code of masks, both ways, and what Kaggle refuses in it.

`start length` pairs, in the competition's order and from its first index: Severstal's evaluation
page asks for column-major, top to bottom and then left to right, and 1-indexed.
"""

import re
from collections.abc import Iterable

import numpy as np

from kernel.competition import Competition
from kernel.faults import short
from kernel.images import Mask, Size


def in_run_order(mask: Mask, competition: Competition) -> Mask:
    """Transpose a mask where the competition's runs go along rows; a second time undoes it."""
    return mask if competition.run_order == "columns" else mask.T


def encode_rle(mask: Mask, competition: Competition) -> str:
    """Return the run-length code of a mask (H, W), empty for an empty mask."""
    mask = in_run_order(mask, competition)
    columns = np.flatnonzero(mask.any(axis=0))
    if not columns.size:
        return ""
    first, height = int(columns[0]), mask.shape[0]
    part = mask[:, first : int(columns[-1]) + 1]  # a defect is narrow, a strip is wide
    pixels = np.zeros(part.size + 2, np.int8)  # one off pixel at each end closes every run
    pixels[1:-1] = part.T.ravel()
    edges = np.flatnonzero(np.diff(pixels)) + competition.first_index + first * height
    edges[1::2] -= edges[::2]  # ends become lengths
    return " ".join(map(str, edges.tolist()))


def _runs(rle: str) -> list[tuple[int, int]]:
    """The (start, length) of each run; ValueError where the words are no pairs of numbers."""
    numbers = [int(word) for word in rle.split()]
    if len(numbers) % 2:
        raise ValueError(f"{len(numbers)} numbers, expected pairs of start and length")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def decode_rle(rle: str, size: Size, competition: Competition) -> Mask:
    """Return the mask (H, W) of a run-length code.

    Raises:
        ValueError: the code is not made of pairs, or a run leaves the image.
    """
    mask = np.zeros(size[0] * size[1], np.bool_)
    for start, length in _runs(rle):
        begin = start - competition.first_index
        if begin < 0 or length < 1 or begin + length > mask.size:
            raise ValueError(f"run {start} {length} leaves an image of {mask.size} pixels")
        mask[begin : begin + length] = True
    if competition.run_order == "rows":
        return mask.reshape(size)
    return mask.reshape(size[1], size[0]).T


def join_rles(rles: Iterable[str]) -> str:
    """Return the code of the union of masks, given well-formed codes of one image."""
    runs = sorted((start, start + length) for rle in rles for start, length in _runs(rle))
    joined = list[list[int]]()  # start, end
    for start, end in runs:
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    return " ".join(f"{start} {end - start}" for start, end in joined)


def is_empty_mark(cell: str) -> bool:
    """Whether a csv's cell stands for an empty mask: less than a run, or runs without a pixel."""
    words = cell.split()
    return len(words) < 2 or not any(length.strip("0") for length in words[1::2])


def number_fault(rle: str) -> str | None:
    """Return why a code is not made of pairs of numbers, or None."""
    words = rle.split()
    wrong = next((word for word in words if not re.fullmatch("-?[0-9]+", word)), None)
    if wrong is not None:
        return f"{short(wrong)} is no number"
    try:
        _runs(rle)
    except ValueError as error:
        return str(error)
    return None


def rle_fault(rle: str, n_pixels: int, competition: Competition) -> str | None:
    """Return what Kaggle would refuse in the code of an image of `n_pixels`, or None."""
    if fault := number_fault(rle):
        return fault
    first = competition.first_index
    last = first - 1  # pixel of the run before
    for start, length in _runs(rle):
        run = f"run {start} {length}"
        if start < first:
            return f"{run} starts before pixel {first}" + (": is it 0-indexed?" if first else "")
        if length < 1:
            return f"{run} has no pixel"
        if start <= last + 1 and last >= first:
            if start == last + 1:
                return f"{run} touches the run that ends at {last}: join them"
            return (
                f"{run} overlaps or comes before the run that ends at {last}: sort and join them, "
                "or make the starts of a relative code absolute"
            )
        last = start + length - 1
        if last >= n_pixels + first:
            return f"{run} leaves an image of {n_pixels} pixels"
    return None
