"""Strips for a measurement, drawn from a folder."""

from pathlib import Path

import numpy as np

from kernel.competition import SEVERSTAL, Competition
from kernel.mounts import list_images, no_images, one_folder


def sample_strips(
    folder: Path, count: int, seed: int, competition: Competition = SEVERSTAL
) -> list[Path]:
    """Strips of a folder, drawn with a seed; all of them where there are no more than `count`.

    Raises:
        ValueError: the folder holds none, or none is asked for.
    """
    if count < 1:
        raise ValueError(f"--strips {count}: expected 1 or more")
    folder = one_folder(folder, competition)
    names = list_images(folder)
    if not names:
        raise ValueError(no_images(folder))
    drawn = np.random.default_rng(seed).permutation(len(names))[:count]
    return [folder / names[index] for index in sorted(drawn)]
