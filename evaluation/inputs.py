"""What measurements work on: a bundle as it runs here, strips of a folder, and their options."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kernel.competition import SEVERSTAL, Competition
from kernel.device import pick_device
from kernel.ensemble import Ensemble
from kernel.ensemble_loading import load_ensemble
from kernel.image_folders import open_images
from kernel.images import first_image
from kernel.manifest import Manifest
from kernel.read_ahead import read_ahead
from kernel.stages import Stages


def add_bundle_options(parser: argparse.ArgumentParser, images: str = "folder of strips") -> None:
    """Add --bundle, and --images with its help."""
    about = "default dist/dataset"
    parser.add_argument("--bundle", type=Path, default=Path("dist/dataset"), help=about)
    parser.add_argument("--images", type=Path, required=True, help=images)


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    """Add --strips and --seed, what `sample_strips` takes."""
    parser.add_argument("--strips", type=int, default=8, help="as many are drawn")
    parser.add_argument("--seed", type=int, default=2020, help="of the draw")


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


def load_for_images(
    bundle: Path, manifest: Manifest, folder: Path, names: Sequence[str]
) -> Ensemble:
    """Load a bundle's members, their engines checked on the first image that can be read.

    Raises:
        ValueError: as `load_ensemble`.
    """
    image = first_image(read_ahead(folder, names, 0, manifest.competition))
    return load_ensemble(bundle, manifest, pick_device(), Stages(), image)
