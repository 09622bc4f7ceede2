"""The defects of a synthetic strip: outlines, and the gain inside one, drawn or real.

Numbers without another source were measured on 22 of the competition's strips.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kernel.images import Mask, Size
from training.surface import Field, Rng, Span, bent, blurred, noise, specks, step

Point = tuple[float, float] | NDArray[np.float64]  # (x, y)


# --- outlines -------------------------------------------------------------------------------------


def blob(rng: Rng, mask: Mask, centre: Point, radii: Point) -> None:
    """Fill one annotator's polygon, 9–14 corners around `centre` (x, y), into `mask`."""
    corners = int(rng.integers(9, 15))
    angles = 2 * np.pi * (np.arange(corners) + rng.uniform(0, 0.9, corners)) / corners
    reach = rng.uniform(0.7, 1.15, corners)[:, None] * np.array(radii)
    fill(mask, np.array(centre) + reach * np.stack([np.cos(angles), np.sin(angles)], 1))


def fill(mask: Mask, corners: NDArray[np.float64]) -> None:
    """Fill a polygon of (x, y) corners into `mask`; never nothing, even where it is a sliver."""
    height, width = mask.shape
    canvas = mask.view(np.uint8)
    points = np.clip(np.rint(corners), (0, 0), (width - 1, height - 1)).astype(np.int32)
    cv2.fillPoly(canvas, [points], 1)


def place(rng: Rng, steel: Span, unit: float, near_edge: float = 0.0) -> float:
    """A column on the steel; with chance `near_edge` 25–160 px from one of its ends."""
    left, right = steel
    offset = min(rng.uniform(25, 160) * unit, (right - left) / 2)
    if rng.random() < near_edge:
        return float(rng.choice([left + offset, right - offset]))
    return float(rng.uniform(left + 0.1 * (right - left), right - 0.1 * (right - left)))


def outline_pits(rng: Rng, size: Size, steel: Span, unit: float) -> Mask:
    """Narrow upright polygons near the strip's edge."""
    mask = np.zeros(size, bool)
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
        centre = (place(rng, steel, unit, 0.7), rng.uniform(0.15, 0.85) * size[0])
        blob(rng, mask, centre, (rng.uniform(8, 15) * unit + 2, rng.uniform(24, 48) * unit + 2))
    return mask


def outline_cracks(rng: Rng, size: Size, steel: Span, unit: float) -> Mask:
    """A narrow stripe around a jagged upright line, or around two."""
    height, mask = size[0], np.zeros(size, bool)
    for _ in range(rng.choice([1, 1, 2])):
        length = rng.uniform(0.35, 0.95) * height
        top = rng.uniform(0, height - length)
        rows = np.linspace(top, top + length, 16)
        walk = np.cumsum(rng.normal(rng.normal(0, 0.6), 1.3, 16)) * unit
        half = rng.uniform(5, 9) * unit + 1
        columns = np.clip(place(rng, steel, unit, 0.6) + walk, steel[0] + 2, steel[1] - 3)
        left, right = np.stack([columns - half, rows], 1), np.stack([columns + half, rows], 1)
        fill(mask, np.concatenate([left[::3], right[::-1][::3]]))
    return mask


def outline_scratches(rng: Rng, size: Size, steel: Span, unit: float) -> Mask:
    """Slightly slanted stripes, often from the upper border."""
    height, mask = size[0], np.zeros(size, bool)
    slant = rng.uniform(-0.12, 0.12)
    for _ in range(1 + rng.poisson(0.9)):
        half, column = rng.uniform(5, 12) * unit + 1, place(rng, steel, unit)
        top, bottom = 0.0, height * rng.uniform(0.4, 1.0)
        if rng.random() < 0.5:
            top, bottom = height - bottom, float(height)
        low, high = column + slant * top, column + slant * bottom
        ends = [(low - half, top), (low + half, top), (high + half, bottom), (high - half, bottom)]
        fill(mask, np.array(ends))
    return mask


def outline_patches(rng: Rng, size: Size, steel: Span, unit: float) -> Mask:
    """One to four polygons, all upright or all lying."""
    mask = np.zeros(size, bool)
    upright = rng.random() < 0.5
    for _ in range(rng.integers(1, 5)):
        centre = (place(rng, steel, unit), rng.uniform(0.1, 0.9) * size[0])
        radii = np.array([rng.uniform(10, 26), rng.uniform(20, 55)]) * unit + 2
        blob(rng, mask, centre, radii if upright else 0.8 * radii[::-1])
    return mask


def outline_bands(rng: Rng, size: Size, steel: Span, unit: float) -> Mask:
    """Zones over the strip's whole height."""
    height, mask = size[0], np.zeros(size, bool)
    for _ in range(rng.choice([1, 1, 2, 3])):
        column, half = place(rng, steel, unit), rng.uniform(20, 80) * unit + 1
        edges = column + half * (rng.normal(0, 0.12, (2, 4)) + np.array([[-1], [1]]))
        rows = np.linspace(0, height - 1, 4)
        left, right = np.stack([edges[0], rows], 1), np.stack([edges[1], rows], 1)
        fill(mask, np.concatenate([left, right[::-1]]))
    return mask


def outline_rolled_in(rng: Rng, size: Size, steel: Span, unit: float) -> Mask:
    """A large polygon, or up to three that overlap."""
    mask = np.zeros(size, bool)
    centre = np.array([place(rng, steel, unit), rng.uniform(0.1, 0.9) * size[0]])
    scale = rng.lognormal(0.18, 0.3) * unit
    for _ in range(rng.integers(1, 4)):
        blob(rng, mask, centre, (rng.uniform(50, 120) * scale, rng.uniform(45, 80) * scale))
        centre = centre + rng.normal(0, (70, 40)) * scale
    return mask


# --- the gain inside an outline -------------------------------------------------------------------


def inside(rng: Rng, mask: Mask, border: float) -> Field:
    """How much of the defect shows: 1 well inside the outline, 0 outside, a ragged `border` px."""
    ragged = 0.1 * noise(rng, mask.shape, 2 * border + 1, 2 * border + 1)
    ragged += 0.05 * noise(rng, mask.shape, 3, 3)
    return step(blurred(mask, border + 0.3) - 0.6 + ragged, 4) * mask


def relief(rng: Rng, size: Size, wide: float, high: float) -> Field:
    """Folds and bumps lit from the upper left, zero mean and unit deviation."""
    height = np.abs(noise(rng, size, wide, high)) + 0.5 * np.abs(
        noise(rng, size, wide / 2.5, high / 2.5)
    )
    height += 0.12 * noise(rng, size, 3, 3)
    lit = blurred(np.roll(height, (2, 2), (0, 1)) - height, 0.7)
    return np.asarray(lit / (lit.std() + 1e-6), np.float32)


def middle_lines(mask: Mask) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Of each connected outline its middle, 16 (x, y) from top to bottom, and half its width."""
    lines = []
    count, components = cv2.connectedComponents(mask.view(np.uint8))
    for number in range(1, count):
        component = components == number
        filled = np.flatnonzero(component.any(axis=1))
        rows = np.rint(np.linspace(filled[0], filled[-1], 16)).astype(int)
        first = component[rows].argmax(axis=1)
        last = mask.shape[1] - 1 - component[rows, ::-1].argmax(axis=1)
        lines.append((np.stack([(first + last) / 2, rows], 1), (last - first) / 2))
    return lines


def draw_line(field: Field, points: NDArray[np.float64], tone: float, width: float) -> None:
    """Draw a line through (x, y) `points` into `field`."""
    corners = np.rint(points).astype(np.int32)
    cv2.polylines(field, [corners], False, tone, max(1, round(width)))


def pits(rng: Rng, mask: Mask, unit: float) -> Field:
    """Class 1: a cluster of small pits with bright rims."""
    size = mask.shape
    density = 0.035 * inside(rng, mask, 3 * unit)
    rims, holes = specks(rng, density, size, 1.3), specks(rng, density, size, 1.9)
    shade = rng.uniform(0.15, 0.35) * inside(rng, mask, 3 * unit)
    return np.asarray(1 - shade - 0.6 * holes + rng.uniform(0.8, 2.0) * rims, np.float32)


def cracks(rng: Rng, mask: Mask, unit: float) -> Field:
    """Class 2: thin jagged cracks along the outline's middle."""
    lines = np.zeros(mask.shape, np.float32)
    for middle, half in middle_lines(mask):
        for _ in range(rng.integers(1, 4)):
            jitter = rng.normal(0, 0.25) * half + rng.normal(0, 0.9 * unit, 16)
            points = middle + np.stack([jitter, np.zeros(16)], 1)
            draw_line(lines, points, 1.0, rng.uniform(1, 3) * unit)
    depth = rng.uniform(0.3, 0.65) * blurred(lines, 0.7)
    shade = rng.uniform(0.05, 0.2) * inside(rng, mask, 3 * unit)
    return np.asarray(1 - depth - shade, np.float32)


def scratches(rng: Rng, mask: Mask, unit: float) -> Field:
    """Class 3: bundles of dark scoring lines along the outline."""
    lines = np.zeros(mask.shape, np.float32)
    for middle, half in middle_lines(mask):
        for offset in rng.uniform(-0.7, 0.7, rng.integers(3, 7)):
            points = middle + np.stack([offset * half, np.zeros(16)], 1)
            shown = points[: rng.integers(13, 17)]
            draw_line(lines, shown, rng.uniform(0.4, 1), rng.uniform(1, 4) * unit)
    depth = rng.uniform(0.45, 0.75) * blurred(lines, 0.7)
    shade = rng.uniform(0.05, 0.2) * inside(rng, mask, 3 * unit)
    return np.asarray(1 - depth - shade, np.float32)


def scale_patches(rng: Rng, mask: Mask, unit: float) -> Field:
    """Class 3: torn patches, dark slanted gouges with bright rims or a rough ground with specks."""
    size = mask.shape
    shown = inside(rng, mask, 3 * unit)
    gouges = bent(rng, relief(rng, size, rng.uniform(7, 18) * unit + 2, 9 * unit + 2))
    gain = 1 - shown * (
        rng.uniform(0.1, 0.35) + 0.1 * noise(rng, size, 12 * unit + 1, 12 * unit + 1)
    )
    gain += rng.uniform(0.1, 0.3) * shown * np.clip(gouges, -3, 2)
    gain -= (
        rng.uniform(0, 0.4) * shown * step(noise(rng, size, 5 * unit + 1, 9 * unit + 1) - 0.8, 1)
    )
    gain += rng.uniform(0, 1.5) * specks(rng, 0.01 * shown, size, 1.1)
    return np.asarray(gain, np.float32)


def scale_bands(rng: Rng, mask: Mask, unit: float) -> Field:
    """Class 3: a blocky dark crust or a bright rash."""
    size = mask.shape
    shown = inside(rng, mask, 10 * unit)
    crust = noise(rng, size, 9 * unit + 1, 60 * unit + 2)
    crust += 0.8 * noise(rng, size, 40 * unit + 1, 5 * unit + 1)
    crust += 0.6 * noise(rng, size, 3, 3) + 0.5 * noise(rng, size, 15 * unit + 1, 15 * unit + 1)
    crust = step(crust + 2.5 * blurred(mask, 14 * unit + 1) - 2.5, 1)
    if rng.random() < 0.6:
        return np.asarray(1 - rng.uniform(0.4, 0.75) * shown * crust, np.float32)
    rash = specks(rng, shown * (0.03 + 0.05 * crust), size, 1.2) + 0.25 * crust * shown
    return np.asarray(1 + rng.uniform(0.4, 0.9) * rash, np.float32)


def rolled_in_patch(rng: Rng, mask: Mask, unit: float) -> Field:
    """Class 4: a large crust rolled into the steel, folded, with dark cracks and bright crests."""
    size = mask.shape
    shown = inside(rng, mask, 7 * unit)
    folds = relief(rng, size, rng.uniform(30, 110) * unit + 2, rng.uniform(15, 45) * unit + 2)
    gain = 1 + shown * (rng.uniform(-0.45, 0.0) + 0.12 * noise(rng, size, 40 * unit, 25 * unit))
    gain += rng.uniform(0.2, 0.35) * shown * bent(rng, np.clip(folds, -2, 4))
    gain += shown * specks(rng, 0.004 * step(folds - 0.5, 1), size, 1.3)
    rim = 4 * shown * (1 - shown)
    return np.asarray(gain - 0.25 * rim, np.float32)


# --- looks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """One way in which a class looks."""

    share: float  # of the class's defects
    outline: Callable[[Rng, Size, Span, float], Mask]
    gain: Callable[[Rng, Mask, float], Field]


SCRATCHES = Look(0.35, outline_scratches, scratches)
PATCHES = Look(0.48, outline_patches, scale_patches)
BANDS = Look(0.17, outline_bands, scale_bands)  # class 3's heavy tail of areas
LOOKS: tuple[tuple[Look, ...], ...] = (  # of class 1, 2, 3, 4
    (Look(1.0, outline_pits, pits),),
    (Look(1.0, outline_cracks, cracks),),
    (SCRATCHES, PATCHES, BANDS),
    (Look(1.0, outline_rolled_in, rolled_in_patch),),
)


def draw_look(rng: Rng, label: int) -> Look:
    """One of the looks of class `label`, from 1, in their shares."""
    looks = LOOKS[label - 1]
    return looks[rng.choice(len(looks), p=[look.share for look in looks])]


def fitting_look(label: int, mask: Mask, unit: float) -> Look:
    """The look of class `label` that suits a real outline: long ones are scratches or bands."""
    if len(LOOKS[label - 1]) == 1:
        return LOOKS[label - 1][0]
    _, _, boxes, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8))
    _, _, width, height, _ = max(boxes[1:], key=lambda box: int(box[4])).tolist()
    if width > 40 * unit and height > 0.9 * mask.shape[0]:
        return BANDS
    return SCRATCHES if height > 4 * width else PATCHES
