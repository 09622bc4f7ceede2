"""What synthetic strips take from real ones: outlines of defects, and clean strips to draw on."""

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from kernel.competition import IMAGE_SIZE, SEVERSTAL
from kernel.image_folders import list_images
from kernel.images import Mask, Size, read_image
from kernel.rle import decode_rle, rle_fault
from training.ground_truth import Truth, read_truth
from training.surface import Field, Rng, Span, blurred

DARK = 15  # grey levels; what is darker on a real strip lies beside the steel


@dataclass(frozen=True)
class RealParts:
    """What is taken from real strips; where there is none it is drawn."""

    outlines: dict[int, list[str]] = field(default_factory=dict)  # class → RLE of 256×1600
    backgrounds: tuple[Path, ...] = ()  # clean strips
    background_share: float = 1.0  # of the strips lie on one of them


NOTHING_REAL = RealParts()


def draw_outline(rng: Rng, label: int, steel: Mask, real: RealParts) -> Mask | None:
    """A real outline of class `label`, flipped at random, nine tenths of it on the steel."""
    outlines = real.outlines.get(label, [])
    for _ in range(20 if outlines else 0):
        mask = decode_rle(outlines[rng.integers(len(outlines))], IMAGE_SIZE, SEVERSTAL)
        mask = mask[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
        if mask.shape != steel.shape:
            shape = steel.shape[::-1]
            small = cv2.resize(mask.astype(np.uint8), shape, interpolation=cv2.INTER_NEAREST)
            mask = small.astype(bool)
        shown = np.ascontiguousarray(mask & steel)
        if shown.any() and shown.sum() >= 0.9 * mask.sum():
            return shown
    return None


def draw_background(rng: Rng, size: Size, real: RealParts) -> Field | None:
    """A real clean strip, flipped at random, in grey levels."""
    if not real.backgrounds or rng.random() >= real.background_share:
        return None
    image = read_image(real.backgrounds[rng.integers(len(real.backgrounds))], SEVERSTAL)
    image = image[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    return np.asarray(cv2.resize(np.ascontiguousarray(image), size[::-1]), np.float32)


def steel_on(background: Field, unit: float) -> tuple[Mask, Span]:
    """Where a real strip's steel is, and its first and last column."""
    steel = blurred(background, 3 * unit + 0.5) > DARK
    columns = np.flatnonzero(steel.mean(axis=0) > 0.5)
    span = (int(columns[0]), int(columns[-1]) + 1) if columns.size else (0, steel.shape[1])
    return steel, span


def _read_severstal(path: Path) -> Truth:
    """Read a train.csv of Severstal's; ValueError for another competition's."""
    try:
        return read_truth(path, SEVERSTAL)
    except ValueError as error:
        raise ValueError(f"{error}; real parts are taken from Severstal's strips alone") from error


def read_outlines(path: Path, leave_out: frozenset[str] = frozenset()) -> dict[int, list[str]]:
    """Read class → RLE of a train.csv of 256×1600 strips, those of `leave_out` left out.

    Raises:
        ValueError: no mask is left, one leaves its strip, or a class is unknown.
    """
    outlines: dict[int, list[str]] = {}
    for name, rles in _read_severstal(path).items():
        for label, rle in rles.items():
            fault = rle_fault(rle, IMAGE_SIZE[0] * IMAGE_SIZE[1], SEVERSTAL)
            if fault:
                raise ValueError(f"{path}: mask of class {label} of {name}: {fault}")
            if name not in leave_out:
                outlines.setdefault(label, []).append(rle)
    if not outlines:
        raise ValueError(f"{path}: no mask; give a train.csv that has some, or leave out fewer")
    return outlines


def read_names(path: Path) -> frozenset[str]:
    """Read the names in a text file, one a line, or those of a train.csv's strips with a mask."""
    if path.suffix in (".csv", ".gz"):
        return frozenset(name for name, rles in _read_severstal(path).items() if rles)
    return frozenset(path.read_text(encoding="utf-8").split())


def find_backgrounds(folder: Path, clean_list: Path) -> tuple[Path, ...]:
    """Find the clean strips of a folder.

    `clean_list` names them, one a line, or is the folder's train.csv, which has no row of them.

    Raises:
        ValueError: the folder has none.
    """
    listed, truth = read_names(clean_list), clean_list.suffix in (".csv", ".gz")
    clean = [name for name in list_images(folder) if (name in listed) != truth]
    if not clean:
        raise ValueError(f"{folder}: no clean strip by {clean_list}")
    return tuple(folder / name for name in clean)
