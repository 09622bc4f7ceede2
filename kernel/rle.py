"""Run-length code of masks, both ways, and what Kaggle refuses in it.

Column-major and 1-indexed, as the competition's evaluation page asks: `start length` pairs, top to
bottom and then left to right.
"""

import re
from collections.abc import Iterable

import numpy as np

from kernel.images import Mask, Size


def encode_rle(mask: Mask) -> str:
    """Return the run-length code of a mask (H, W), empty for an empty mask."""
    columns = np.flatnonzero(mask.any(axis=0))
    if not columns.size:
        return ""
    first, height = int(columns[0]), mask.shape[0]
    part = mask[:, first : int(columns[-1]) + 1]  # a defect is narrow, a strip is wide
    pixels = np.zeros(part.size + 2, np.int8)  # one off pixel at each end closes every run
    pixels[1:-1] = part.T.ravel()
    edges = np.flatnonzero(np.diff(pixels)) + 1 + first * height
    edges[1::2] -= edges[::2]  # ends become lengths
    return " ".join(map(str, edges.tolist()))


def rle_fault(rle: str, n_pixels: int) -> str | None:
    """Return what Kaggle would refuse in the code of an image of `n_pixels`, or None."""
    words = rle.split()
    wrong = next((word for word in words if not re.fullmatch("-?[0-9]+", word)), None)
    if wrong is not None:
        return f"{wrong!r} is no number"
    if len(words) % 2:
        return f"{len(words)} numbers, expected pairs of start and length"
    end = 0  # last pixel of the run before, from 1
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
        if end > n_pixels:
            return f"{run} leaves an image of {n_pixels} pixels"
    return None


def join_rles(rles: Iterable[str]) -> str:
    """Return the code of the union of masks, given well-formed codes of one image."""
    runs = []
    for rle in rles:
        numbers = [int(word) for word in rle.split()]
        runs += [(s, s + n) for s, n in zip(numbers[::2], numbers[1::2], strict=True)]
    joined = list[list[int]]()  # start, end
    for start, end in sorted(runs):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    return " ".join(f"{start} {end - start}" for start, end in joined)


def decode_rle(rle: str, size: Size) -> Mask:
    """Return the mask (H, W) of a run-length code.

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
