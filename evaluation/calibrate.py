"""Calibrate an ensemble: shift the logits of its heads, and choose the area from which masks count.

A member's Dice alone says little of what it adds to a mean that has to pass a threshold: members
that keep to what they are sure of lose recall together. So both heads are shifted by the kernel's
own arithmetic: the mean of every pass of sigmoid(mask + A) × sigmoid(presence + B), cut at the
manifest's threshold, masks of fewer than M pixels left empty. All three are searched for on strips
that no member has seen, and scored by leaving one strip out: what is chosen on some strips looks
better on them than it is.

`--write FOLDER` copies the checkpoints of `--weights` there with the shifts in their biases, and
ensemble.json with M as its `min_area`.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluation.recorded import RecordedPasses
from kernel.checks import read_json
from kernel.command import run_command
from kernel.device import pick_device
from kernel.ensemble import Ensemble, load_ensemble
from kernel.images import check_kinds, read_image, size_of
from kernel.logs import Stages, log, progress
from kernel.manifest import MANIFEST, load_manifest
from kernel.mounts import list_images, one_folder
from training.ground_truth import check_names, decode_scored_masks, read_truth
from training.heads import shift_checkpoint
from training.metrics import Floats, Masks, dice_of

MASK_SHIFTS = tuple(step / 2 for step in range(-4, 11))  # added to every mask logit
GATE_SHIFTS = tuple(float(step) for step in range(-4, 6))  # and to every presence logit
MIN_AREAS = (0, 500, 1000, 2000, 3000, 4000, 6000, 8000)  # pixels of a class, fewer are left empty
SURE = 1e-6  # a probability so near to 0 or 1 that its logit is cut off

EXAMPLE = """\
  python evaluation/calibrate.py --images data/split/held_out/train_images \\
      --truth data/split/held_out/train.csv --weights weights --write data/calibrated
"""


@dataclass
class ShiftCounts:
    """Pixels that each pair of shifts finds, and how many of them are true, of all strips."""

    areas: list[npt.NDArray[np.int64]] = field(default_factory=list)  # (A, B, classes) a strip
    both: list[npt.NDArray[np.int64]] = field(default_factory=list)
    truth: list[npt.NDArray[np.int64]] = field(default_factory=list)  # (classes,)

    def add(
        self, gates: Tensor, probabilities: Tensor, moved: Tensor, truth: Masks, threshold: float
    ) -> None:
        """Add a strip: every pass's gates (passes, classes) and probabilities (…, H, W).

        `moved` (passes,) says of which passes the logits are shifted.
        """
        mask_logits = torch.logit(probabilities / gates.clamp_min(1e-30)[..., None, None], SURE)
        gate_shifts = torch.tensor(GATE_SHIFTS)[:, None, None] * moved[:, None]
        shifted = torch.logit(gates, SURE) + gate_shifts
        weights, wanted = torch.sigmoid(shifted) / len(gates), torch.from_numpy(truth)
        areas, both = [], []
        for mask_shift in MASK_SHIFTS:
            masks = torch.sigmoid(mask_logits + mask_shift * moved[:, None, None, None])
            found = torch.einsum("pchw,bpc->bchw", masks, weights) > threshold
            areas.append(found.sum(dim=(2, 3)))
            both.append((found & wanted).sum(dim=(2, 3)))
        self.areas.append(torch.stack(areas).numpy())
        self.both.append(torch.stack(both).numpy())
        self.truth.append(truth.sum(axis=(1, 2)))

    def dice(self) -> Floats:
        """Return Dice (A, B, M, strips, classes)."""
        areas, both = np.stack(self.areas, axis=2), np.stack(self.both, axis=2)
        kept = np.stack([areas >= area for area in MIN_AREAS], axis=2)
        areas, both = areas[:, :, None] * kept, both[:, :, None] * kept
        return dice_of(both, areas + np.stack(self.truth))


Position = tuple[int, int, int]  # in MASK_SHIFTS, GATE_SHIFTS and MIN_AREAS


def best_position(dice: Floats) -> Position:
    """Return the position of the highest mean of Dice (A, B, M, strips, classes), smoothed.

    A few strips give a jagged surface, so a position counts with its neighbours.
    """
    padded = np.pad(dice.mean(axis=(3, 4)), 1, mode="edge")
    smooth = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3)).mean(axis=(3, 4, 5))
    row, column, area = np.unravel_index(smooth.argmax(), smooth.shape)
    return int(row), int(column), int(area)


def describe(dice: Floats, truth: npt.NDArray[np.int64]) -> dict[str, float]:
    """Return the figures of Dice (strips, classes), given the true areas."""
    return {
        "dice": round(float(dice.mean()), 4),
        "dice_non_empty": round(float(dice[truth > 0].mean()), 4),
        "clean_left_empty": round(
            float((dice[(truth == 0).all(axis=1)] == 1).all(axis=1).mean()), 4
        ),
    }


def summarise(counts: ShiftCounts) -> dict[str, object]:
    """Return what to take, and the figures without it, with it, and left one out.

    "as it is" leaves the manifest's own `min_area` out of account.
    """
    dice, truth = counts.dice(), np.stack(counts.truth)
    row, column, area = best_position(dice)
    left_out = [
        dice[*best_position(np.delete(dice, strip, axis=3)), strip] for strip in range(len(truth))
    ]
    now = MASK_SHIFTS.index(0), GATE_SHIFTS.index(0), MIN_AREAS.index(0)
    return {
        "strips": len(truth),
        "mask_shift": MASK_SHIFTS[row],
        "gate_shift": GATE_SHIFTS[column],
        "min_area": MIN_AREAS[area],
        "as it is": describe(dice[now], truth),
        "calibrated": describe(dice[row, column, area], truth),
        "calibrated without the strip": describe(np.stack(left_out), truth),
    }


@torch.inference_mode()
def count_strips(
    ensemble: Ensemble, images: Path, truth: Path, members: Sequence[str] = ()
) -> ShiftCounts:
    """Run every pass of every strip, and count under every pair of shifts of these members.

    Without names all are shifted.
    """
    manifest, counts = ensemble.manifest, ShiftCounts()
    moved = torch.tensor([not members or each.member in members for each in ensemble.passes])
    images = one_folder(images, manifest.competition)
    named, names = read_truth(truth, manifest.competition), list_images(images)
    check_names(named, names, truth, images)
    check_kinds(images, names, manifest.competition)
    for name in progress(names, "strips", "strip"):
        image = read_image(images / name, manifest.competition)
        recorded = RecordedPasses(ensemble, image)
        for pass_id in range(len(ensemble.passes)):
            recorded.record(pass_id)
        gates = torch.cat([recorded.encoded[i][0].float().cpu() for i in recorded.encoded])
        found = torch.cat([recorded.probabilities[i].cpu() for i in recorded.encoded])
        masks = decode_scored_masks(named, name, size_of(image), manifest.competition)
        counts.add(gates, found, moved, masks, manifest.threshold)
    return counts


# --- command line ---------------------------------------------------------------------------------


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=f"{EXAMPLE}\n{__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, default=Path("dist/dataset"), help="default dist/dataset")
    add("--images", type=Path, help="folder of strips that no member has seen")
    add("--truth", type=Path, help="a train.csv of these strips, either layout")
    about = "take these instead of searching, as found on other strips by the same recipe"
    add("--take", type=float, nargs=3, metavar=("A", "B", "M"), help=about)
    about = "shift these alone, by the names of their files without suffix (default: all)"
    add("--members", nargs="+", default=[], metavar="NAME", help=about)
    about = "the checkpoints and their ensemble.json (default weights)"
    add("--weights", type=Path, default=Path("weights"), help=about)
    add("--write", type=Path, metavar="FOLDER", help="where both go, calibrated")
    args = parser.parse_args(arguments)
    if args.take is None and not (args.images and args.truth):
        parser.error("either --images and --truth, or --take")
    return args


def check_members(asked: Sequence[str], there: Sequence[str]) -> None:
    """Raise ValueError for a member that is not there."""
    for name in asked:
        if name not in there:
            raise ValueError(f"--members {name}: there are {', '.join(sorted(there)) or 'none'}")


def write_calibrated(
    source: Path,
    target: Path,
    members: Sequence[str],
    mask_shift: float,
    gate_shift: float,
    min_area: int,
) -> None:
    """Copy the checkpoints and ensemble.json of `source`, these members' shifted (all without)."""
    entries = read_json(source / MANIFEST)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.safetensors")):
        if members and path.stem not in members:
            shutil.copyfile(path, target / path.name)
            continue
        shift_checkpoint(path, target / path.name, mask_shift, gate_shift)
        shifts = f"mask logits {mask_shift:+g}, presence logits {gate_shift:+g}"
        log.info("%s: %s", target / path.name, shifts)
    text = json.dumps(entries | {"min_area": min_area}, indent=2, ensure_ascii=False)
    (target / MANIFEST).write_text(text + "\n", encoding="utf-8")
    log.info("%s: masks of fewer than %d pixels stay empty", target / MANIFEST, min_area)


def calibrate(args: argparse.Namespace) -> int:
    """Find what to take, print it and what it scores; write the checkpoints if asked."""
    taken = args.take
    if taken is None:
        manifest = load_manifest(args.bundle)
        check_members(args.members, [spec.name for spec in manifest.members])
        ensemble = load_ensemble(args.bundle, manifest, pick_device(), Stages())
        found = summarise(count_strips(ensemble, args.images, args.truth, args.members))
        print(json.dumps(found, indent=2))
        taken = found["mask_shift"], found["gate_shift"], found["min_area"]
    if args.write:
        mask_shift, gate_shift, min_area = taken
        check_members(args.members, [path.stem for path in args.weights.glob("*.safetensors")])
        shifts = mask_shift, gate_shift
        write_calibrated(args.weights, args.write, args.members, *shifts, int(min_area))
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: calibrate(parse_args(arguments)))


if __name__ == "__main__":
    main()
