"""The steel of a synthetic strip: its surface, and what looks like a defect on it and is none.

Numbers without another source were measured on 22 of the competition's strips (256 × 1600, grey):
lit surface mean 0.23–0.50 of white, grain 4–11 grey levels, dark margins of 5–85 % on 8 of them.
"""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from kernel.images import Size

Rng = np.random.Generator
Field = NDArray[np.float32]  # (H, W), a gain around 1 or a weight in [0, 1]
Span = tuple[int, int]  # first and last column of the steel, the rest is dark margin


# --- building blocks ------------------------------------------------------------------------------


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


def step(field: Field | NDArray[np.float64], sharpness: float) -> Field:
    """A soft threshold at zero: 0 where `field` is low, 1 where it is high."""
    return np.asarray(np.clip(0.5 + sharpness * field, 0, 1), np.float32)


def specks(rng: Rng, density: Field | float, size: Size, sigma: float) -> Field:
    """Dots at random places with `density` of them a pixel, mostly faint, some near 1."""
    dots = rng.random(size, dtype=np.float32) < density
    peak = 6.3 * sigma**2  # a blurred unit dot is 1 / (2πσ²) high
    strength = rng.random(size, dtype=np.float32)
    return np.asarray(np.clip(blurred(dots * strength, sigma) * peak, 0, 1))


def bent(rng: Rng, field: Field) -> Field:
    """Shift rows and columns slowly by some pixels: the mill's lines are seldom straight."""
    height, width = field.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    rows += rng.uniform(0, 7) * noise(rng, field.shape, 200, 300)
    columns += rng.uniform(0, 4) * noise(rng, field.shape, 300, 90)
    return np.asarray(cv2.remap(field, columns, rows, cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT))


# --- the clean surface ----------------------------------------------------------------------------


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


# --- what looks like a defect and is none ---------------------------------------------------------


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


# --- all of it ------------------------------------------------------------------------------------


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


def clean_surface(rng: Rng, size: Size, unit: float) -> Field:
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
