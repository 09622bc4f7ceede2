"""Synthetic steel strips in the competition's own layout, seeded, for training and trying out.

Numbers without another source were measured on 22 of the competition's strips (256 × 1600, grey):
lit surface mean 0.23–0.50 of white, grain 4–11 grey levels, dark margins of 5–85 % on 8 of them.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kernel.command import run_command
from kernel.competition import (
    N_CLEAN_TRAINING_IMAGES,
    SEVERSTAL,
    Competition,
    add_competition_option,
    find_competition,
)
from kernel.images import read_image
from kernel.logs import progress
from kernel.mounts import list_images
from kernel.rle import decode_rle, encode_rle, rle_fault
from kernel.rows import LAYOUTS, Layout, layouts_of, write_submission
from kernel.task import expand_rows
from training.config import parse_size
from training.ground_truth import read_truth

Rng = np.random.Generator
Real = NDArray[np.float32] | NDArray[np.float64]
Field = NDArray[np.float32]  # (H, W), a gain around 1 or a weight in [0, 1]
Mask = NDArray[np.bool_]  # (H, W)
Span = tuple[int, int]  # first and last column of the steel, the rest is dark margin
Size = tuple[int, int]  # (H, W)
Point = tuple[float, float] | NDArray[np.float64]  # (x, y)

IMAGE_SIZE = (256, 1600)  # (H, W)
N_CLASSES = len(SEVERSTAL.classes)
N_TRAINING_IMAGES = SEVERSTAL.n_training_images or 0
N_DEFECTIVE = N_TRAINING_IMAGES - N_CLEAN_TRAINING_IMAGES
DEFECTIVE = N_DEFECTIVE / N_TRAINING_IMAGES  # share of the strips
SHARES = tuple(map(float, SEVERSTAL.images_with_class or ()))  # of class 1, 2, 3, 4
SECOND_CLASS = 429 / N_DEFECTIVE  # 7,095 (image, class) pairs on 6,666 defective images
DARK = 15  # grey levels; what is darker on a real strip lies beside the steel
TRAIN, TEST = 0, 1  # splits, the second word of every strip's seed


# --- building blocks ---------------------------------------------------------


def noise(rng: Rng, size: Size, wide: float, high: float) -> Field:
    """Smooth noise of zero mean and unit deviation, features `wide` × `high` pixels."""
    height, width = size
    grid = (max(2, round(height / high) + 1), max(2, round(width / wide) + 1))
    coarse = rng.standard_normal(grid, dtype=np.float32)
    field = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray((field - field.mean()) / (field.std() + 1e-6), np.float32)


def blurred(field: NDArray[np.generic], sigma: float) -> Field:
    """Gaussian blur, as float."""
    return np.asarray(cv2.GaussianBlur(field.astype(np.float32), (0, 0), sigma), np.float32)


def step(field: Real, sharpness: float) -> Field:
    """A soft threshold at zero: 0 where `field` is low, 1 where it is high."""
    return np.asarray(np.clip(0.5 + sharpness * field, 0, 1), np.float32)


def specks(rng: Rng, density: Field | float, size: Size, sigma: float) -> Field:
    """Dots at random places with `density` of them a pixel, mostly faint, some near 1."""
    dots = rng.random(size, dtype=np.float32) < density
    peak = 6.3 * sigma**2  # a blurred unit dot is 1 / (2πσ²) high
    strength = rng.random(size, dtype=np.float32)
    return np.asarray(np.clip(blurred(dots * strength, sigma) * peak, 0, 1))


def relief(rng: Rng, size: Size, wide: float, high: float) -> Field:
    """Folds and bumps lit from the upper left, zero mean and unit deviation."""
    height = np.abs(noise(rng, size, wide, high)) + 0.5 * np.abs(
        noise(rng, size, wide / 2.5, high / 2.5)
    )
    height += 0.12 * noise(rng, size, 3, 3)
    lit = blurred(np.roll(height, (2, 2), (0, 1)) - height, 0.7)
    return np.asarray(lit / (lit.std() + 1e-6), np.float32)


def bent(rng: Rng, field: Field) -> Field:
    """Shift rows and columns slowly by some pixels: the mill's lines are seldom straight."""
    height, width = field.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    rows += rng.uniform(0, 7) * noise(rng, field.shape, 200, 300)
    columns += rng.uniform(0, 4) * noise(rng, field.shape, 300, 90)
    return np.asarray(cv2.remap(field, columns, rows, cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT))


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


def inside(rng: Rng, mask: Mask, border: float) -> Field:
    """How much of the defect shows: 1 well inside the outline, 0 outside, a ragged `border` px."""
    ragged = 0.1 * noise(rng, mask.shape, 2 * border + 1, 2 * border + 1)
    ragged += 0.05 * noise(rng, mask.shape, 3, 3)
    return step(blurred(mask, border + 0.3) - 0.6 + ragged, 4) * mask


# --- the clean surface -------------------------------------------------------


def illumination(rng: Rng, size: Size) -> Field:
    """Brightness bands along and across and the lamp's falloff: deviation 16 of 95 grey levels."""
    height, width = size
    columns = 0.12 * noise(rng, (1, width), 300, 1) + 0.06 * noise(rng, (1, width), 60, 1)
    columns += rng.uniform(0, 0.06) * noise(rng, (1, width), 12, 1)
    slope = rng.uniform(0.05, 0.35) * rng.choice([-1, 1, 1, 1])  # most are brighter below
    rows = slope * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    falloff = rng.uniform(0, 0.3) * np.linspace(-1, 1, width, dtype=np.float32) ** 2
    light = (1 + columns + rows - falloff) * (1 + 0.05 * noise(rng, size, 250, 120))
    return np.asarray(np.maximum(light, 0.3), np.float32)


def grain(rng: Rng, size: Size) -> Field:
    """Fine grain, neighbours correlated 0.3–0.8, coarser or finer from one band to the next."""
    white = rng.standard_normal(size, dtype=np.float32)
    fine = np.asarray(
        cv2.GaussianBlur(white, (0, 0), rng.uniform(0.5, 0.9), sigmaY=rng.uniform(0.3, 0.7))
    )
    loud = 1 + 0.3 * noise(rng, (1, size[1]), 90, 1)
    return np.asarray(rng.uniform(0.04, 0.1) * loud * fine / fine.std(), np.float32)


def rolled_texture(rng: Rng, size: Size) -> Field:
    """Lines of the rolling mill: wavy ripples along the strip, streaks across it, mottling."""
    across, along = rng.permutation([rng.uniform(0.02, 0.06), rng.uniform(0, 0.012)])
    texture = across * noise(rng, size, rng.uniform(1.3, 4), rng.uniform(15, 200))
    texture += along * noise(rng, size, rng.uniform(15, 120), rng.uniform(1.3, 3))
    texture += rng.uniform(0.0, 0.05) * noise(rng, size, rng.uniform(4, 12), rng.uniform(4, 25))
    if rng.random() < 0.4:
        rows = np.arange(size[0], dtype=np.float32)[:, None] / rng.uniform(4, 12)
        waves = np.sin(2 * np.pi * (rows + 1.5 * noise(rng, size, 250, 60)))
        waves += 0.8 * noise(rng, size, rng.uniform(40, 120), 3)
        texture += rng.uniform(0.02, 0.09) * step(noise(rng, size, 400, 120), 0.5) * waves
    return bent(rng, texture)


def scale_blotches(rng: Rng, size: Size) -> Field:
    """Flat patches with sharp edges, hanging down like drips, lighter or darker than the rest."""
    shape = noise(rng, size, rng.uniform(6, 25), rng.uniform(20, 120))
    shape += 0.5 * noise(rng, size, rng.uniform(3, 8), rng.uniform(6, 30))
    where = noise(rng, size, 200, 300) + 0.3 * noise(rng, size, 20, 300)
    tone = rng.uniform(0.05, 0.14) * rng.choice([-1, 1])
    patches = bent(rng, shape) - rng.uniform(0.9, 1.5) + 0.7 * where
    return np.asarray(tone * step(patches, rng.uniform(0.5, 3)))


def shiny_specks(rng: Rng, size: Size) -> Field:
    """Bright dots, dense in some bands and rare elsewhere."""
    density = 0.012 * np.clip(noise(rng, size, 120, 300) - 0.2, 0.02, 2)
    return rng.uniform(0.2, 0.8) * specks(rng, density, size, 0.8)


def chequered_plate(rng: Rng, size: Size) -> Field:
    """Embossed diamonds, about 100 px wide and a strip high, as on tread plate."""
    height, width = size
    pitch = rng.uniform(85, 115)
    across = np.arange(width, dtype=np.float32) / pitch + rng.random()
    down = np.arange(height, dtype=np.float32)[:, None] / rng.uniform(170, 230)
    ridges = np.zeros(size, np.float32)
    for side in (-1, 1):
        distance = ((across + side * down) % 1 - 0.5) * pitch  # px from the ridge
        ridges += 0.35 * np.exp(-(((distance + 3) / 3) ** 2)) - 0.6 * np.exp(
            -(((distance - 3) / 2.5) ** 2)
        )
    return ridges


# --- what looks like a defect and is none ------------------------------------


def soft_shadow(rng: Rng, size: Size) -> Field:
    """A wide curved patch with a clear edge, a little lighter or darker."""
    height, width = size
    canvas = np.zeros(size, np.uint8)
    centre = (int(rng.uniform(0, width)), int(rng.uniform(-1, 2) * height))
    axes = (int(rng.uniform(0.1, 0.4) * width) + 1, int(rng.uniform(0.5, 1.6) * height) + 1)
    cv2.ellipse(canvas, centre, axes, rng.uniform(-20, 20), 0, 360, 1, -1)
    return rng.uniform(-0.12, 0.12) * blurred(canvas, rng.uniform(1, 8))


def oil_specks(rng: Rng, size: Size, unit: float) -> Field:
    """A few small round dark spots, each alone: pits come in clusters and have bright rims."""
    canvas = np.zeros(size, np.float32)
    for _ in range(rng.poisson(7)):
        centre = (int(rng.integers(size[1])), int(rng.integers(size[0])))
        axes = (int(rng.integers(1, 4) * unit), int(rng.integers(1, 5) * unit))
        cv2.ellipse(canvas, centre, axes, 0, 0, 360, -rng.uniform(0.15, 0.6), -1)
    return blurred(canvas, 0.9)


def straight_lines(rng: Rng, size: Size) -> Field:
    """Hair lines exactly across the strip, dark or light, one pixel or two wide."""
    height, width = size
    lines = np.zeros(size, np.float32)
    first = rng.integers(width)
    for _ in range(rng.integers(1, 9)):
        column = int(np.clip(first + rng.normal(0, 0.06 * width), 0, width - 1))
        end = int(height * rng.choice([1.0, rng.random()]))
        lines[:end, column : column + rng.integers(1, 3)] = rng.choice([-0.25, -0.15, 0.2])
    return blurred(lines, 0.5)


def light_streak(rng: Rng, size: Size, unit: float) -> Field:
    """A soft bright band across the strip, straight and smooth: a rough one is class 3."""
    columns = np.arange(size[1], dtype=np.float32)
    centre = rng.uniform(0, size[1]) + 2 * unit * noise(rng, (size[0], 1), 1, 90)
    width = rng.uniform(5, 25) * unit
    band = np.exp(-(((columns - centre) / width) ** 2))
    return np.asarray(band * (rng.uniform(0.1, 0.4) + 0.05 * noise(rng, size, 2, 2)), np.float32)


def water_stain(rng: Rng, size: Size, unit: float) -> Field:
    """Splashes that dazzle the camera: white drops in a few columns, some with a dark middle."""
    height, width = size
    drops = np.zeros(size, np.float32)
    start = rng.uniform(0, width)
    for column in rng.uniform(start, start + 200 * unit, rng.integers(1, 5)):
        for _ in range(rng.integers(4, 25)):
            centre = (int(column + rng.normal(0, 9 * unit)), int(rng.integers(height)))
            radius = rng.gamma(1.5, 3) * unit
            axes = (int(radius) + 1, int(radius * rng.uniform(0.8, 3)) + 1)
            cv2.ellipse(drops, centre, axes, rng.uniform(-15, 15), 0, 360, 1, -1)
            if radius > 5 * unit and rng.random() < 0.3:
                cv2.ellipse(drops, centre, (axes[0] // 3, axes[1] // 2), 0, 0, 360, -0.1, -1)
    ragged = 0.15 * noise(rng, size, 3, 3) + 0.25 * noise(rng, size, 9, 9)
    return 3 * step(blurred(drops, 2.5 * unit + 0.3) + ragged * (blurred(drops, 4) > 0.05) - 0.5, 3)


# --- defects: outlines --------------------------------------------------------


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


# --- defects: the gain inside an outline, drawn or real -------------------------


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


def draw_look(rng: Rng, number: int) -> Look:
    """One of the looks of class `number`, from 1, in their shares."""
    looks = LOOKS[number - 1]
    return looks[rng.choice(len(looks), p=[look.share for look in looks])]


def fitting_look(number: int, mask: Mask, unit: float) -> Look:
    """The look of class `number` that suits a real outline: long ones are scratches or bands."""
    if len(LOOKS[number - 1]) == 1:
        return LOOKS[number - 1][0]
    _, _, boxes, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8))
    _, _, width, height, _ = max(boxes[1:], key=lambda box: int(box[4])).tolist()
    if width > 40 * unit and height > 0.9 * mask.shape[0]:
        return BANDS
    return SCRATCHES if height > 4 * width else PATCHES


# --- real outlines and surfaces -----------------------------------------------


@dataclass(frozen=True)
class RealParts:
    """What is taken from real strips; where there is none it is drawn."""

    outlines: dict[int, list[str]] = field(default_factory=dict)  # class → RLE of 256×1600
    backgrounds: tuple[Path, ...] = ()  # clean strips
    background_share: float = 1.0  # of the strips lie on one of them


NOTHING_REAL = RealParts()


def draw_outline(rng: Rng, number: int, steel: Mask, real: RealParts) -> Mask | None:
    """A real outline of class `number`, flipped at random, nine tenths of it on the steel."""
    outlines = real.outlines.get(number, [])
    for _ in range(20 if outlines else 0):
        mask = decode_rle(outlines[rng.integers(len(outlines))], IMAGE_SIZE)
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
    image = read_image(real.backgrounds[rng.integers(len(real.backgrounds))])
    image = image[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    return np.asarray(cv2.resize(np.ascontiguousarray(image), size[::-1]), np.float32)


def read_outlines(path: Path, leave_out: frozenset[str] = frozenset()) -> dict[int, list[str]]:
    """Read class → RLE of a train.csv of 256×1600 strips, those of `leave_out` left out.

    Raises:
        ValueError: no mask is left, one leaves its strip, or a class is unknown.
    """
    outlines: dict[int, list[str]] = {}
    for name, rles in read_truth(path).items():
        for number, rle in rles.items():
            fault = rle_fault(rle, IMAGE_SIZE[0] * IMAGE_SIZE[1])
            if fault:
                raise ValueError(f"{path}: mask of class {number} of {name}: {fault}")
            if name not in leave_out:
                outlines.setdefault(number, []).append(rle)
    if not outlines:
        raise ValueError(f"{path}: no mask; give a train.csv that has some, or leave out fewer")
    return outlines


def read_names(path: Path) -> frozenset[str]:
    """Read the names in a text file, one a line, or those of a train.csv's strips with a mask."""
    if path.suffix in (".csv", ".gz"):
        return frozenset(name for name, rles in read_truth(path).items() if rles)
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


# --- one strip ---------------------------------------------------------------


def dark_margin(rng: Rng, size: Size, chance: float) -> tuple[Field, Span]:
    """Where the strip ends before the picture does, mostly little, up to 85 % of the width."""
    width = size[1]
    columns = np.arange(width, dtype=np.float32)
    if rng.random() > chance:
        return np.ones((1, width), np.float32), (0, width)
    share = min(0.85, rng.beta(1, 1.8))
    steel = width - int(share * width)
    unit = size[0] / 256
    shade = step(steel - columns, 1 / (rng.uniform(2, 8) * unit + 1))
    shade *= 1 - rng.uniform(0, 0.6) * np.exp(
        np.minimum(columns - steel, 0) / (rng.uniform(8, 60) * unit + 1)
    )
    if rng.random() < 0.5:
        return shade[None, ::-1], (width - steel, width)
    return shade[None], (0, steel)


def surface(rng: Rng, size: Size, unit: float) -> Field:
    """The clean steel with everything on it that is no defect, mean about 1."""
    gain = illumination(rng, size) * (1 + grain(rng, size) + rolled_texture(rng, size))
    extras: tuple[tuple[float, Callable[[], Field]], ...] = (  # chance, what
        (0.3, lambda: scale_blotches(rng, size)),
        (0.5, lambda: shiny_specks(rng, size)),
        (0.3, lambda: soft_shadow(rng, size)),
        (0.6, lambda: oil_specks(rng, size, unit)),
        (0.15, lambda: straight_lines(rng, size)),
        (0.2, lambda: light_streak(rng, size, unit)),
        (0.03, lambda: chequered_plate(rng, size)),
        (0.12, lambda: water_stain(rng, size, unit)),
    )
    for chance, extra in extras:
        if rng.random() < chance:
            gain *= 1 + extra()
    return gain


def draw_defect(
    rng: Rng, number: int, steel: Mask, span: Span, real: RealParts
) -> tuple[Mask, Field]:
    """A defect of class `number`: its mask, on the steel, and the gain inside it."""
    size, unit = (steel.shape[0], steel.shape[1]), steel.shape[0] / 256
    mask = draw_outline(rng, number, steel, real)
    if mask is not None:
        return mask, fitting_look(number, mask, unit).gain(rng, mask, unit)
    look = draw_look(rng, number)
    mask = look.outline(rng, size, span, unit)
    return mask & steel, look.gain(rng, mask, unit)


def steel_on(background: Field, unit: float) -> tuple[Mask, Span]:
    """Where a real strip's steel is, and its first and last column."""
    steel = blurred(background, 3 * unit + 0.5) > DARK
    columns = np.flatnonzero(steel.mean(axis=0) > 0.5)
    span = (int(columns[0]), int(columns[-1]) + 1) if columns.size else (0, steel.shape[1])
    return steel, span


def synthesize_strip(
    rng: Rng,
    classes: Sequence[int] = (),
    size: Size = (256, 1600),
    real: RealParts = NOTHING_REAL,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One strip with the defects of `classes` (1–4): grey (H, W) and its masks (4, H, W)."""
    unit = size[0] / 256  # shapes are drawn in pixels of a full strip and shrink with it
    background = draw_background(rng, size, real)
    if background is None:
        margin, span = dark_margin(rng, size, 0.8 if {1, 2} & set(classes) else 0.35)
        gain, steel = surface(rng, size, unit), np.zeros(size, bool)
        steel[:, span[0] : span[1]] = True
    else:
        gain, (steel, span) = np.ones(size, np.float32), steel_on(background, unit)
    masks = np.zeros((N_CLASSES, *size), bool)
    for number in classes:
        masks[number - 1], defect = draw_defect(rng, number, steel, span, real)
        gain *= 1 + rng.uniform(0.85, 1.3) * (defect - 1)  # fainter ones no eye would find
    if background is not None:
        return np.clip(np.rint(background * gain), 0, 255).astype(np.uint8), masks
    grey = 255 * np.clip(rng.normal(0.415, 0.08), 0.24, 0.56) * gain * margin
    grey += 2.5 + rng.standard_normal(size, dtype=np.float32)  # the camera's black and its noise
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8), masks


def draw_classes(rng: Rng, shares: Sequence[float]) -> tuple[int, ...]:
    """The classes of one strip: often none, else one in proportion to `shares`, seldom two."""
    if rng.random() > DEFECTIVE:
        return ()
    count = 2 if rng.random() < SECOND_CLASS else 1
    chances = np.array(shares) / np.sum(shares)
    return tuple(int(c) + 1 for c in sorted(rng.choice(N_CLASSES, count, replace=False, p=chances)))


def draw_evenly(rng: Rng, shares: Sequence[float], index: int) -> tuple[int, ...]:
    """As `draw_classes` for strip `index`, where among few strips as many have a defect as should.

    By chance 8 strips have 2 to 6, and a run over them takes half or twice as long as others.
    """
    due = math.floor((index + 1) * DEFECTIVE) > math.floor(index * DEFECTIVE)
    while True:
        classes = draw_classes(rng, shares)
        if bool(classes) == due:
            return classes


# --- the competition's files -------------------------------------------------


def strip_name(seed: int, split: int, index: int) -> str:
    """Nine hex digits; multiplying by an odd number permutes them, so no two strips collide."""
    return f"{((2 * index + split) * 0x9E3779B97 + seed * 0x51ED27) % 16**9:09x}.jpg"


@dataclass(frozen=True)
class Plan:
    """What decides the strips of a split."""

    folder: Path
    split: int  # TRAIN or TEST
    seed: int
    shares: Sequence[float]  # weights of class 1, 2, 3, 4
    size: Size
    evenly: bool  # whether few strips too have their share of defects
    real: RealParts
    competition: Competition = SEVERSTAL


def write_strip(plan: Plan, index: int) -> tuple[str, list[str]]:
    """Write strip `index` of a split as JPEG; its name and its four runs, "" for no mask."""
    rng = np.random.default_rng([plan.seed, plan.split, index])
    if plan.evenly:
        classes = draw_evenly(rng, plan.shares, index)
    else:
        classes = draw_classes(rng, plan.shares)
    image, masks = synthesize_strip(rng, classes, plan.size, plan.real)
    name, rules = strip_name(plan.seed, plan.split, index), plan.competition
    if rules.suffix or rules.bits == 16:
        name = Path(name).stem + (rules.suffix or ".png")
    quality = 95 if rng.random() < 0.8 else 90  # the quantisation tables of the real files
    path = plan.folder / name
    options = [] if path.suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, quality]
    written = cv2.imwrite(str(path), coloured(image, rules), options)
    if not written:
        raise ValueError(f"cannot write {path}: is the folder there and writable?")
    return name, [encode_rle(mask, rules) for mask in grouped(masks, rules)]


def coloured(image: NDArray[np.uint8], competition: Competition) -> NDArray[np.uint8 | np.uint16]:
    """A grey image as a competition's files have them; BGR where there is colour, rusty."""
    shares = (0.7, 0.85, 1.0) if competition.channels == 3 else (1.0,) * 3
    picture = np.dstack([image * share for share in shares])
    if competition.bits == 8:
        return picture.astype(np.uint8)
    return picture[..., : competition.channels].astype(np.uint16) * 257


def grouped(masks: NDArray[np.bool_], competition: Competition) -> list[Mask]:
    """The four kinds of defects as a competition's classes: every n-th one together."""
    count = len(competition.classes)
    return [np.asarray(masks[i::count].any(axis=0), np.bool_) for i in range(count)]


def write_split(plan: Plan, count: int, jobs: int) -> list[tuple[str, list[str]]]:
    """Write `count` strips; their names and runs in name order."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    write, what = partial(write_strip, plan), plan.folder.name
    if not count:
        return []
    if jobs == 1:
        return sorted(progress(map(write, range(count)), what, "strip", count))
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        strips = pool.map(write, range(count), chunksize=32)
        return sorted(progress(strips, what, "strip", count))


def write_truth(
    path: Path,
    strips: Sequence[tuple[str, list[str]]],
    layout: str,
    competition: Competition = SEVERSTAL,
) -> None:
    """Write the ground truth: a row a class, or in Severstal's three columns the non-empty ones."""
    if competition != SEVERSTAL:
        rles = {(name, n): run for name, runs in strips for n, run in enumerate(runs, 1)}
        write_submission(path, layouts_of(competition)[layout], rles, rles)
        return
    rows = [(name, n, run) for name, runs in strips for n, run in enumerate(runs, 1)]
    truth = pd.DataFrame(rows, columns=["ImageId", "ClassId", "EncodedPixels"])
    if layout == "two-column":
        truth.insert(0, "ImageId_ClassId", truth.ImageId + "_" + truth.ClassId.astype(str))
        truth = truth[["ImageId_ClassId", "EncodedPixels"]]
    else:
        truth = truth[truth.EncodedPixels != ""]
    truth.to_csv(path, index=False)


def write_competition(
    folder: Path,
    train: int,
    test: int,
    seed: int,
    layout: str = "three-column",
    shares: Sequence[float] = SHARES,
    size: Size = (256, 1600),
    jobs: int = 1,
    evenly: bool = False,
    real: RealParts = NOTHING_REAL,
    competition: Competition = SEVERSTAL,
) -> None:
    """Write a folder like the competition's, and test.csv, which Kaggle keeps to itself.

    `shares` weighs the classes of the train strips; the test strips keep the real proportions.
    `evenly` keeps the share of strips with a defect among few strips too, not only among many.
    `real` is for train and test strips alike. Another competition's four kinds of defects are
    shared out among its classes.

    Raises:
        ValueError: the layout is unknown, or a file that it writes is there already, or strips:
            those that no new row names would count as clean.
    """
    layouts = layouts_of(competition)
    layout = list(layouts)[-1] if competition != SEVERSTAL else layout
    if layout not in layouts:
        raise ValueError(f"layout is {layout!r}, expected one of {list(layouts)}")
    beside = size, evenly, real, competition
    train_plan = Plan(folder / "train_images", TRAIN, seed, shares, *beside)
    test_plan = Plan(folder / "test_images", TEST, seed, SHARES, *beside)
    for each in (train_plan.folder, test_plan.folder):
        if each.is_dir() and any(each.iterdir()):
            raise ValueError(f"{each}: holds files already; give another --out, or remove it")
    for each in (folder / name for name in ("train.csv", "test.csv", "sample_submission.csv")):
        if each.exists():
            raise ValueError(f"{each}: is there already; give another --out, or remove it")
    train_strips = write_split(train_plan, train, jobs)
    test_strips = write_split(test_plan, test, jobs)
    write_truth(folder / "train.csv", train_strips, layout, competition)
    write_truth(folder / "test.csv", test_strips, layout, competition)
    names = [name for name, _ in test_strips]
    write_sample(folder / "sample_submission.csv", names, competition, size)


def write_sample(path: Path, names: Sequence[str], competition: Competition, size: Size) -> None:
    """Write a sample of images: a row for all of an image's classes, or one for each.

    With `any_class` it is written as Severstal's real one is, every pixel of `size` on.
    """
    layout = list(layouts_of(competition).values())[-1]  # today's
    if competition.any_class is not None and layout.may_omit_empty:
        rows = [(name, 0) for name in names]
        whole = f"{competition.first_index} {size[0] * size[1]}"
        write_submission(path, layout, rows, dict.fromkeys(rows, whole))
        return
    rows = expand_rows([(name, 0) for name in names], len(competition.classes))
    named = replace(competition, empty=competition.empty or "")  # a sample names every row
    write_submission(path, Layout(layout.cells, named), rows, {})


# --- command line ------------------------------------------------------------

EXAMPLE = "  python training/synthetic.py --out data/steel --train 1200 --test 400"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=f"{EXAMPLE}\n\nDraw synthetic steel strips in the competition's layout.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write; holds no strips yet")
    add("--train", type=int, default=1200, help="strips in train_images (default 1200)")
    add("--test", type=int, default=400, help="strips in test_images (default 400)")
    add("--seed", type=int, default=0)
    add("--layout", choices=LAYOUTS, default="three-column", help="of train.csv")
    about = "weights of class 1, 2, 3, 4 in train; test stays as on Kaggle (default %(default)s)"
    add("--shares", type=float, nargs=N_CLASSES, default=SHARES, help=about)
    add("--size", type=parse_size, help="HEIGHTxWIDTH in pixels (default: the competition's)")
    add_competition_option(parser)
    add("--jobs", type=int, default=1, help="processes that draw")
    about = "a train.csv of real 256×1600 strips, whose masks the defects are drawn into"
    add("--masks", type=Path, metavar="TRAIN.CSV", help=about)
    about = "names, one a line, of strips whose masks are left out of --masks"
    add("--leave-out", type=Path, metavar="FILE", help=about)
    add("--backgrounds", type=Path, metavar="DIR", help="real strips to draw on, the clean ones")
    about = "which are clean: their names, one a line, or the folder's train.csv"
    add("--clean-list", type=Path, metavar="FILE", help=about)
    about = "share of the strips that lie on one of --backgrounds (default 1)"
    add("--background-share", type=float, default=1.0, help=about)
    return parser.parse_args(arguments)


def read_real_parts(args: argparse.Namespace) -> RealParts:
    """Read what the command line gives of real strips.

    Raises:
        ValueError: --backgrounds without --clean-list, or a file that is not what it should be.
    """
    outlines, backgrounds = dict[int, list[str]](), tuple[Path, ...]()
    if args.masks:
        leave_out = read_names(args.leave_out) if args.leave_out else frozenset[str]()
        outlines = read_outlines(args.masks, leave_out)
    if args.backgrounds:
        if not args.clean_list:
            raise ValueError("--backgrounds needs --clean-list: which of them are clean?")
        backgrounds = find_backgrounds(args.backgrounds, args.clean_list)
    return RealParts(outlines, backgrounds, args.background_share)


def synthesize(args: argparse.Namespace) -> int:
    """Write the strips that the command line asks for."""
    competition = find_competition(args.competition)
    size = args.size or competition.image_size or IMAGE_SIZE
    write_competition(
        args.out, args.train, args.test, args.seed, args.layout, args.shares, size, args.jobs,
        real=read_real_parts(args), competition=competition,
    )  # fmt: skip
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: synthesize(parse_args(arguments)))


if __name__ == "__main__":
    main()
