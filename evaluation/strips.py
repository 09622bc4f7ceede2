"""Strips for a measurement, drawn from a folder."""

from pathlib import Path

import numpy as np

from kernel.competition import SEVERSTAL, Competition
from kernel.mounts import open_images


def sample_strips(
    folder: Path, count: int, seed: int, competition: Competition = SEVERSTAL
) -> list[Path]:
    """Strips of a folder, drawn with a seed; all of them where there are no more than `count`.

    Raises:
        ValueError: none is asked for, or as `open_images`.
    """
    if count < 1:
        raise ValueError(f"--strips {count}: expected 1 or more")
    folder, names = open_images(folder, competition)
    drawn = np.random.default_rng(seed).permutation(len(names))[:count]
    return [folder / names[index] for index in sorted(drawn)]
