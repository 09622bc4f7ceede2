"""Scores a bundle against ground truth: the competition's mean Dice, and what it hides.

Predicting nothing scores 0.856 on Kaggle, for most (image, class) pairs are empty, so the mean over
the pairs that have a mask, and the share of clean strips left wholly empty, always stand beside it.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernel.early_exit import Tally
from kernel.engines import pick_device
from kernel.ensemble import Ensemble, Flight, load_ensemble
from kernel.images import Image, Strip, read_image
from kernel.logs import Stages, progress, start_log
from kernel.manifest import load_manifest
from kernel.rows import read_rows
from kernel.validate import decode_rle

Masks = npt.NDArray[np.bool_]  # (classes, H, W)


def read_truth(path: Path) -> dict[str, dict[int, str]]:
    """RLE per class of every image that a train.csv names, in either layout."""
    truth: dict[str, dict[int, str]] = defaultdict(dict)
    for image, label, rle in read_rows(path)[1]:
        truth[image] |= {label: rle} if rle else {}
    return dict(truth)


def draw_truth(rles: dict[int, str], classes: int, size: tuple[int, int]) -> Masks:
    """Masks (classes, H, W) of one image's RLEs."""
    return np.stack([decode_rle(rles.get(label, ""), size) for label in range(1, classes + 1)])


def dice_of(both: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Dice of the pixels that pairs of masks share and have; empty pairs score 1, as on Kaggle."""
    return np.where(sizes > 0, 2 * both / np.maximum(sizes, 1), 1.0)


def dice(found: Masks, truth: Masks) -> list[float]:
    """Dice per class of masks (classes, H, W)."""
    both = (found & truth).sum(axis=(-2, -1))
    sizes = found.sum(axis=(-2, -1)) + truth.sum(axis=(-2, -1))
    return [float(value) for value in dice_of(both, sizes)]


@dataclass
class Scores:
    """Dice of every (image, class) pair so far."""

    all_pairs: list[float] = field(default_factory=list)
    per_class: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    clean_strips: list[bool] = field(default_factory=list)  # whether each was left wholly empty

    def add(self, found: Masks, truth: Masks) -> None:
        """One image's masks (classes, H, W) beside its ground truth."""
        values = dice(found, truth)
        self.all_pairs += values
        for label, (value, mask) in enumerate(zip(values, truth, strict=True), 1):
            if mask.any():
                self.per_class[label].append(value)
        if not truth.any():
            self.clean_strips.append(not found.any())

    @property
    def non_empty(self) -> float:
        """Mean Dice over the pairs that have a mask."""
        return mean(value for values in self.per_class.values() for value in values)

    def summary(self) -> dict[str, float | dict[str, float]]:
        """The three figures that belong together, and the classes' own."""
        return {
            "dice": round(mean(self.all_pairs), 4),
            "dice_non_empty": round(self.non_empty, 4),
            "clean_left_empty": round(mean(self.clean_strips), 4),
            "per_class": {str(k): round(mean(v), 4) for k, v in sorted(self.per_class.items())},
        }


def mean(values: Iterable[float]) -> float:
    """The mean, or NaN of nothing, without numpy's warning."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else float("nan")


@torch.inference_mode()
def score_strip(ensemble: Ensemble, image: Image, truth: Masks, scores: dict[str, Scores]) -> None:
    """Adds one strip to every member's score (alone, without flips) and to the ensemble's.

    The members' own passes come first in the ensemble; of the others only those run that can still
    change a mask.
    """
    size, images = (image.shape[0], image.shape[1]), ensemble.prepare(image)
    encoded: dict[int, tuple[Tensor, ...]] = {}
    decoded: dict[int, Tensor] = {}
    for number, (member, flip) in enumerate(ensemble.passes):
        if flip == "none":
            encoded[number] = ensemble.encode(number, images)
            decoded[number] = ensemble.decode(number, encoded[number])[0]
            alone = Tally(1, ensemble.manifest, early_exit=False)
            alone.decode(decoded[number][:, : size[0], : size[1]])
            scores[member.spec.name].add(alone.masks(size), truth)
    order = sorted(range(len(ensemble.passes)), key=lambda number: number not in decoded)
    tally = Tally(len(order), ensemble.manifest, early_exit=True)
    flight = Flight(Strip("", image), images, tally, order, size)
    while not flight.landed:
        half, number = flight.step
        if half == "encode":
            outputs = encoded.get(number) or ensemble.encode(number, images)
            flight.encode(outputs, outputs[0][0].cpu().double().numpy())
        elif number in decoded:
            flight.decode(decoded[number])
        else:
            flight.decode(ensemble.decode(number, flight.kept[0])[0])
    scores["ensemble"].add(tally.masks(size), truth)


EXAMPLE = "  python weights/score.py --images data/steel/test_images --truth data/steel/test.csv"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=f"{EXAMPLE}\n\n{__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, default=Path("dist/dataset"), help="default dist/dataset")
    add("--images", type=Path, required=True, help="folder of strips")
    add("--truth", type=Path, required=True, help="a train.csv of these strips, either layout")
    add("--out", type=Path, default=Path("scores.json"), help="kept up to date strip by strip")
    return parser.parse_args()


def main() -> None:
    """Scores every strip of `--images`; those that `--truth` does not name are clean."""
    start_log()
    args = parse_args()
    truth = read_truth(args.truth)
    manifest = load_manifest(args.bundle)
    ensemble = load_ensemble(args.bundle, manifest, pick_device(), Stages())
    scores: dict[str, Scores] = defaultdict(Scores)
    names = sorted(path.name for path in args.images.iterdir())
    for name in progress(names, "strips", "strip"):
        image = read_image(args.images / name)
        size = (image.shape[0], image.shape[1])
        masks = draw_truth(truth.get(name, {}), manifest.classes, size)
        score_strip(ensemble, image, masks, scores)
        summary = {who: score.summary() for who, score in scores.items()}
        args.out.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
