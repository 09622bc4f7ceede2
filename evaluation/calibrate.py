"""Calibrate an ensemble: move its members' logits, and choose the area from which masks count.

A member's Dice alone says little of what it adds to a mean that has to pass a threshold: members
that keep to what they are sure of lose recall together. So the heads are moved by the kernel's own
arithmetic: the mean of every pass of sigmoid(mask + A) × sigmoid(S presence + L + B), cut at the
manifest's threshold, masks of fewer than M pixels left empty.

- S takes back what a presence head is too sure of (temperature scaling, Guo et al., 2017): it was
  fitted on strips that its network had seen.
- L, a number a member, makes the gates of all stand equally wide on these strips. It needs no
  truth. A member whose gates are shut where the others' are open would veto instead of vote.
- A, S, B and M, the same for all, are searched for on strips that no member has seen, and scored by
  leaving one strip out: what is chosen on some strips looks better on them than it is.

`--write` writes `--weights`/ensemble.json with what was found in each member's `mask_shift`,
`gate_scale` and `gate_shift`, and M as its `min_area`. The checkpoints stay as they are.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from kernel.manifest import MANIFEST, Manifest, load_manifest, parse_manifest
from kernel.mounts import list_images, one_folder
from training.ground_truth import check_names, decode_scored_masks, read_truth
from training.losses import SURE
from training.metrics import Floats, Masks, dice_of

MASK_SHIFTS = tuple(step / 2 for step in range(-2, 9))  # added to every mask logit
GATE_SCALES = (1.4, 1.0, 0.7, 0.5, 0.35)  # of every presence logit
GATE_SHIFTS = tuple(step / 2 for step in range(-6, 7))  # then added to it
MIN_AREAS = (0, 500, 1000, 2000, 3000, 4000, 6000, 8000)  # pixels of a class, fewer are left empty
WIDEST = 20.0  # logits by which a member's gates are moved at most
PRINTED = 2  # decimals of a shift

EXAMPLE = """\
  python evaluation/calibrate.py --images data/split/held_out/train_images \\
      --truth data/split/held_out/train.csv --weights my_weights --write my_weights/ensemble.json
"""

# --- levels of the gates --------------------------------------------------------------------------


def shift_to_mean(logits: Tensor, mean: float) -> float:
    """Return what makes the mean of sigmoid(logits + shift) the one asked for, by bisection."""
    low, high = -WIDEST, WIDEST
    while high - low > 1e-4:
        middle = (low + high) / 2
        below = torch.sigmoid(logits + middle).mean().item() < mean
        low, high = (middle, high) if below else (low, middle)
    return round((low + high) / 2, PRINTED) + 0.0  # and not -0.0


Levels = dict[str, float]  # member → the shift of its presence logits


def level_gates(logits: Tensor, members: Sequence[str]) -> Levels:
    """Return a shift for each member, which makes its mean gate the mean of all members' gates.

    `logits` (strips, passes, classes) are of the presence heads, `members` names each pass's.
    """
    mean = torch.sigmoid(logits).mean().item()
    own = {name: [i for i, each in enumerate(members) if each == name] for name in members}
    return {name: shift_to_mean(logits[:, ids], mean) for name, ids in own.items()}


@torch.inference_mode()
def gate_logits(ensemble: Ensemble, folder: Path, names: Sequence[str]) -> Tensor:
    """Return the presence logits (strips, passes, classes), by the encoders alone."""
    gates = []
    for name in progress(names, "gates", "strip"):
        images = ensemble.prepare(read_image(folder / name, ensemble.manifest.competition))
        encoded = [ensemble.run_encoder(i, images)[0] for i in range(len(ensemble.passes))]
        gates.append(torch.cat(encoded).float().cpu())
    return torch.logit(torch.stack(gates), SURE)


def find_levels(ensemble: Ensemble, folder: Path, names: Sequence[str]) -> list[Levels]:
    """Return the levels under each of `GATE_SCALES`, of the members that have a presence head."""
    gated = [spec.name for spec in ensemble.manifest.members if spec.gated]
    passes = [i for i, each in enumerate(ensemble.passes) if each.member in gated]
    if not passes:
        return [{} for _ in GATE_SCALES]
    logits = gate_logits(ensemble, folder, names)[:, passes]
    members = [ensemble.passes[i].member for i in passes]
    found = [level_gates(scale * logits, members) for scale in GATE_SCALES]
    return [{name: levels[name] for name in gated} for levels in found]


# --- what every shift finds -----------------------------------------------------------------------


@dataclass
class Counts:
    """Pixels that each setting finds, and how many of them are true, of all strips."""

    areas: list[npt.NDArray[np.int64]] = field(default_factory=list)  # (A, S, B, classes) a strip
    both: list[npt.NDArray[np.int64]] = field(default_factory=list)
    as_it_is: list[Floats] = field(default_factory=list)  # Dice (classes,) without a change
    truth: list[npt.NDArray[np.int64]] = field(default_factory=list)  # (classes,)

    def add(
        self, gates: Tensor, probabilities: Tensor, levels: Tensor, truth: Masks, threshold: float
    ) -> None:
        """Add a strip: every pass's gates (passes, classes) and probabilities (…, H, W).

        `levels` (S, passes) are the gates' own shifts, NaN for a pass without a presence head.
        """
        weights = moved_gates(gates, levels) / len(gates)
        mask_logits = torch.logit(probabilities / gates.clamp_min(1e-30)[..., None, None], SURE)
        wanted = torch.from_numpy(truth)
        areas, both = [], []
        for mask_shift in MASK_SHIFTS:
            masks = torch.sigmoid(mask_logits + mask_shift)
            for of_scale in weights:
                found = torch.einsum("pchw,bpc->bchw", masks, of_scale) > threshold
                areas.append(found.sum(dim=(2, 3)))
                both.append((found & wanted).sum(dim=(2, 3)))
        shape = (len(MASK_SHIFTS), *weights.shape[:2], len(truth))
        self.areas.append(torch.stack(areas).reshape(shape).numpy())
        self.both.append(torch.stack(both).reshape(shape).numpy())
        self.truth.append(truth.sum(axis=(1, 2)))
        found = probabilities.mean(dim=0) > threshold
        overlap, area = (each.sum(dim=(1, 2)).numpy() for each in (found & wanted, found))
        self.as_it_is.append(dice_of(overlap, area + self.truth[-1]))

    def dice(self) -> Floats:
        """Return Dice (A, S, B, M, strips, classes)."""
        areas, both = np.stack(self.areas, axis=3), np.stack(self.both, axis=3)
        kept = np.stack([areas >= area for area in MIN_AREAS], axis=3)
        areas, both = areas[:, :, :, None] * kept, both[:, :, :, None] * kept
        return dice_of(both, areas + np.stack(self.truth))


def moved_gates(gates: Tensor, levels: Tensor) -> Tensor:
    """Return gates (passes, classes) under every scale and shift: (S, B, passes, classes)."""
    scaled = torch.tensor(GATE_SCALES)[:, None, None] * torch.logit(gates, SURE)
    levelled = (scaled + levels[..., None])[:, None]
    moved = torch.sigmoid(levelled + torch.tensor(GATE_SHIFTS)[:, None, None])
    return torch.where(moved.isnan(), gates, moved)


@torch.inference_mode()
def count_strips(ensemble: Ensemble, images: Path, truth: Path) -> tuple[list[Levels], Counts]:
    """Level the gates on all strips, run every pass, and count under every setting."""
    manifest, counts = ensemble.manifest, Counts()
    images = one_folder(images, manifest.competition)
    named, names = read_truth(truth, manifest.competition), list_images(images)
    check_names(named, names, truth, images)
    check_kinds(images, names, manifest.competition)
    levels = find_levels(ensemble, images, names)
    by_pass = torch.tensor(
        [[each.get(p.member, math.nan) for p in ensemble.passes] for each in levels]
    )
    for name in progress(names, "strips", "strip"):
        image = read_image(images / name, manifest.competition)
        recorded = RecordedPasses(ensemble, image)
        for pass_id in range(len(ensemble.passes)):
            recorded.record(pass_id)
        gates = torch.cat([recorded.encoded[i][0].float().cpu() for i in recorded.encoded])
        found = torch.cat([recorded.probabilities[i].cpu() for i in recorded.encoded])
        masks = decode_scored_masks(named, name, size_of(image), manifest.competition)
        counts.add(gates, found, by_pass, masks, manifest.threshold)
    return levels, counts


# --- what to take ---------------------------------------------------------------------------------

Position = tuple[int, ...]  # in MASK_SHIFTS, GATE_SCALES, GATE_SHIFTS and MIN_AREAS


def best_position(dice: Floats) -> Position:
    """Return the position of the highest mean of Dice (A, S, B, M, strips, classes), smoothed.

    A few strips give a jagged surface, so a position counts with its neighbours.
    """
    padded = np.pad(dice.mean(axis=(4, 5)), 1, mode="edge")
    smooth = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3, 3)).mean(axis=(4, 5, 6, 7))
    return tuple(int(i) for i in np.unravel_index(smooth.argmax(), smooth.shape))


def describe(dice: Floats, truth: npt.NDArray[np.int64]) -> dict[str, float]:
    """Return the figures of Dice (strips, classes), given the true areas."""
    return {
        "dice": round(float(dice.mean()), 4),
        "dice_non_empty": round(float(dice[truth > 0].mean()), 4),
        "clean_left_empty": round(
            float((dice[(truth == 0).all(axis=1)] == 1).all(axis=1).mean()), 4
        ),
    }


def summarise(levels: Sequence[Levels], counts: Counts) -> dict[str, Any]:
    """Return what to take, and the figures without it, with it, and left one out.

    "as it is" leaves the manifest's own `min_area` out of account. The gates' levels, which take
    no truth, are not left out.
    """
    dice, truth = counts.dice(), np.stack(counts.truth)
    best = mask_shift, scale, gate_shift, area = best_position(dice)
    left_out = [
        dice[*best_position(np.delete(dice, strip, axis=4)), strip] for strip in range(len(truth))
    ]
    return {
        "strips": len(truth),
        "mask_shift": MASK_SHIFTS[mask_shift],
        "gate_scale": GATE_SCALES[scale],
        "gate_shift": GATE_SHIFTS[gate_shift],
        "levels": levels[scale],
        "min_area": MIN_AREAS[area],
        "as it is": describe(np.stack(counts.as_it_is), truth),
        "calibrated": describe(dice[best], truth),
        "calibrated without the strip": describe(np.stack(left_out), truth),
    }


# --- ensemble.json --------------------------------------------------------------------------------


def settings_of(manifest: Manifest) -> dict[str, tuple[float, float, float]]:
    """Return how each member's logits are moved."""
    return {
        spec.name: (spec.mask_shift, spec.gate_scale, spec.gate_shift) for spec in manifest.members
    }


def check_entries(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the ensemble.json that a bundle was built of.

    Raises:
        ValueError: its members, or how their logits are moved, are not the bundle's.
    """
    entries = read_json(path)
    own = settings_of(parse_manifest(entries, path, manifest.competition))
    packed = settings_of(manifest)
    if own != packed:
        raise ValueError(f"{path}: members {own}, the bundle has {packed}: build it of this file")
    return entries


def add_found(entries: dict[str, Any], manifest: Manifest, found: dict[str, Any]) -> dict[str, Any]:
    """Return ensemble.json with what was found, on top of how its logits are moved already."""
    settings = settings_of(manifest)
    members = []
    for member in entries["members"]:
        mask_shift, scale, shift = settings[member["name"]]
        moved = {"mask_shift": mask_shift + found["mask_shift"]}
        if member["name"] in found["levels"]:
            level = found["levels"][member["name"]] + found["gate_shift"]
            moved["gate_scale"] = round(scale * found["gate_scale"], PRINTED + 2)
            moved["gate_shift"] = round(shift * found["gate_scale"] + level, PRINTED)
        members.append(member | moved)
    return entries | {"min_area": found["min_area"], "members": members}


# --- command line ---------------------------------------------------------------------------------


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=f"{EXAMPLE}\n{__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, default=Path("dist/dataset"), help="default dist/dataset")
    about = "folder of strips that no member has seen"
    add("--images", type=Path, required=True, help=about)
    add("--truth", type=Path, required=True, help="a train.csv of these strips, either layout")
    about = "the folder whose ensemble.json the bundle was built of (default weights)"
    add("--weights", type=Path, default=Path("weights"), help=about)
    add("--write", type=Path, metavar="FILE", help="where that goes, calibrated")
    return parser.parse_args(arguments)


def calibrate(args: argparse.Namespace) -> int:
    """Find what to take, print it and what it scores; write ensemble.json if asked."""
    manifest = load_manifest(args.bundle)
    entries = check_entries(args.weights / MANIFEST, manifest) if args.write else {}
    ensemble = load_ensemble(args.bundle, manifest, pick_device(), Stages())
    found = summarise(*count_strips(ensemble, args.images, args.truth))
    print(json.dumps(found, indent=2))
    if args.write:
        text = json.dumps(add_found(entries, manifest, found), indent=2, ensure_ascii=False)
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(text + "\n", encoding="utf-8")
        log.info("%s: written", args.write)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: calibrate(parse_args(arguments)))


if __name__ == "__main__":
    main()
