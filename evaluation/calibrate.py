"""Calibrate the gates of an ensemble without labels: they open as often as their class occurs.

How many images have a class is known from train.csv. A presence head that was fitted on few images,
on images that its network had seen or on other shares of the classes is shut, or open, as a whole;
and where one member's gates are shut and the others' open, it vetoes instead of voting. So each
member's presence logits of each class are shifted until their mean gate on images without truth is
the class's share (prior matching). Nothing is chosen by a score, so what is scored afterwards on
images with truth is not flattered.

`--write` adds the shifts to `gate_shift` in ensemble.json. The checkpoints stay as they are.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from evaluation.inputs import add_bundle_options, load_for_images
from kernel.checks import read_json
from kernel.command import new_parser, run_command
from kernel.ensemble import Ensemble
from kernel.faults import short
from kernel.files import check_place, write_json
from kernel.image_folders import open_images
from kernel.logs import log, progress
from kernel.manifest import BUILT_FIELDS, MANIFEST, Manifest, MemberSpec, load_manifest
from packing.checkpoints import read_checkpoint
from packing.members import to_half
from packing.models import load_into_model
from packing.sources import read_sources
from training.strips import read_each, read_strips

MAX_SHIFT = 20.0  # logits by which gates are shifted at most
OPEN_OR_SHUT = 1e-9  # a gate so near to 0 or 1 that its logit, 21, is cut off
DECIMALS = 2  # of a shift

EXAMPLE = """\
  python evaluation/calibrate.py --images severstal/test_images --data severstal \\
      --weights my_weights --write my_weights/ensemble.json"""

Shifts = dict[str, list[float]]  # member → of each class

# --- shifts ---------------------------------------------------------------------------------------


def shift_to_mean(logits: Tensor, mean: float) -> float:
    """Return what makes the mean of sigmoid(logits + shift) the one asked for, by bisection."""
    low, high = -MAX_SHIFT, MAX_SHIFT
    while high - low > 1e-4:
        middle = (low + high) / 2
        below = torch.sigmoid(logits + middle).mean().item() < mean
        low, high = (middle, high) if below else (low, middle)
    return round((low + high) / 2, DECIMALS)


@torch.inference_mode()
def gate_logits(ensemble: Ensemble, paths: Sequence[Path]) -> dict[str, Tensor]:
    """Return each gated member's presence logits (images, classes), under the first flip.

    Raises:
        ValueError: no image can be read.
    """
    names = {spec.name for spec in ensemble.manifest.members if spec.gated}
    flip = ensemble.manifest.flips[0]
    passes = {
        each.member: index
        for index, each in enumerate(ensemble.passes)
        if each.member in names and each.flip == flip
    }
    gates: dict[str, list[Tensor]] = {name: [] for name in passes}
    competition = ensemble.manifest.competition
    for image in read_each(progress(paths, "gates", "image"), "gates", competition):
        images = ensemble.prepare(image)
        for member, pass_id in passes.items():
            gates[member].append(ensemble.run_encoder(pass_id, images)[0].double().cpu())
    return {member: torch.logit(torch.cat(found), OPEN_OR_SHUT) for member, found in gates.items()}


def find_shifts(logits: dict[str, Tensor], shares: Sequence[float]) -> Shifts:
    """Return the shifts with which every member's mean gate of a class is the class's share.

    Raises:
        ValueError: a gate is NaN, or no shift up to `MAX_SHIFT` gives that mean; names the member.
    """
    found = {
        member: [shift_to_mean(of_class, s) for of_class, s in zip(each.T, shares, strict=True)]
        for member, each in logits.items()
    }
    for member, shifts in found.items():
        for label, shift in enumerate(shifts, 1):
            if abs(shift) > MAX_SHIFT - 0.1 or logits[member].isnan().any():
                raise ValueError(
                    f"{member}, class {label}: no shift of up to {MAX_SHIFT:g} logits opens its "
                    "gates as often as the class occurs: fit its presence head anew"
                )
    return found


def share_of_classes(folder: Path, manifest: Manifest) -> list[float]:
    """Return each class's share of a training set's images."""
    strips = read_strips(folder, manifest.competition)
    labels = range(1, manifest.classes + 1)
    return [len(strips.with_class(label)) / len(strips.names) for label in labels]


# --- ensemble.json --------------------------------------------------------------------------------


def shifts_of(spec: MemberSpec, classes: int) -> list[float]:
    """Return a member's gate shifts, one a class."""
    found = spec.gate_shift
    return found if isinstance(found, list) else [found] * classes


def _settings(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says of its members, and of the images that their gates are of."""
    found: dict[str, Any] = {
        "members": sorted(spec.name for spec in manifest.members),
        "image_size": manifest.image_size,
        "the first flip": manifest.flips[0],
    }
    built = ("file", *BUILT_FIELDS)
    for spec in manifest.members:
        said = {key: value for key, value in vars(spec).items() if key not in built}
        found |= {f"{key} of {spec.name}": value for key, value in said.items()}
    return found


def check_weights(bundle: Path, manifest: Manifest, weights: Path) -> None:
    """Raise ValueError where a bundle was not built of these weights.

    Members, what is said of them or a checkpoint may have changed since; the message names what
    did.
    """
    own_manifest, sources = read_sources(weights, manifest.competition)
    own, packed = _settings(own_manifest), _settings(manifest)
    for key in own | packed:
        if own.get(key) != packed.get(key):
            raise ValueError(
                f"{weights / MANIFEST}: {key}: {short(own.get(key))}, the bundle has "
                f"{short(packed.get(key))}: build it of this file"
            )
    paths = {spec.name: path for spec, path in zip(own_manifest.members, sources, strict=True)}
    for spec in progress(manifest.members, "checkpoints", "member"):
        source = paths[spec.name]
        network = load_into_model(read_checkpoint(source), spec.model)
        tensors, there = to_half(network.state_dict(), source), load_file(bundle / spec.file)
        if any(not torch.equal(value, there[key]) for key, value in tensors.items()):
            raise ValueError(f"{source}: is not what {bundle / spec.file} holds: build it again")


def add_shifts(entries: dict[str, Any], manifest: Manifest, found: Shifts) -> dict[str, Any]:
    """Return ensemble.json with what was found on top of the shifts that it has."""
    before = {spec.name: shifts_of(spec, manifest.classes) for spec in manifest.members}
    for member in entries["members"]:
        if shifts := found.get(member["name"]):
            pairs = zip(before[member["name"]], shifts, strict=True)
            member["gate_shift"] = [round(old + new, DECIMALS) for old, new in pairs]
    return entries


# --- command line ---------------------------------------------------------------------------------


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, EXAMPLE)
    about = "folder of images without truth, as they come: many, and not picked"
    add_bundle_options(parser, images=about)
    add = parser.add_argument
    known = parser.add_mutually_exclusive_group(required=True)
    about = "a training set, train.csv and train_images/, whose classes are counted"
    known.add_argument("--data", type=Path, help=about)
    about = "each class's share of the images, instead"
    known.add_argument("--shares", type=float, nargs="+", metavar="SHARE", help=about)
    about = "the folder whose ensemble.json the bundle was built of (default weights)"
    add("--weights", type=Path, default=Path("weights"), help=about)
    add("--write", type=Path, metavar="FILE", help="where that goes, with the shifts")
    return parser.parse_args(arguments)


def calibrate(args: argparse.Namespace) -> int:
    """Find the shifts and print them; write ensemble.json if asked."""
    manifest = load_manifest(args.bundle)
    folder, names = open_images(args.images, manifest.competition)
    shares = args.shares or share_of_classes(args.data, manifest)
    if len(shares) != manifest.classes or not all(0 < share < 1 for share in shares):
        raise ValueError(
            f"shares {shares}: expected {manifest.classes}, each above 0 and below 1; "
            "a class without an image cannot be calibrated"
        )
    if not any(spec.gated for spec in manifest.members):
        raise ValueError(
            f"{args.bundle}: no member has a presence head, so there is no gate to calibrate; "
            "name the bundle of members that have one"
        )
    if args.write:
        check_place(args.write)
        check_weights(args.bundle, manifest, args.weights)
    ensemble = load_for_images(args.bundle, manifest, folder, names)
    found = find_shifts(gate_logits(ensemble, [folder / name for name in names]), shares)
    print(json.dumps({"shares": shares, "gate_shift": found}, indent=2))
    if args.write:
        entries = read_json(args.weights / MANIFEST)
        write_json(args.write, add_shifts(entries, manifest, found))
        log.info("%s: written", args.write)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: calibrate(parse_args(arguments)))


if __name__ == "__main__":
    main()
