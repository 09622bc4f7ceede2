"""Label strips without truth by what an ensemble is sure of, to train on them.

A strip is judged class by class, by the mean of every pass of sigmoid(mask) × sigmoid(presence + B)
over the manifest's threshold. A class is there where that area reaches `--min-area` with the first
of the two `--gate-shifts`; it is not there where even with the second, wider one hardly a pixel is
found: less than a tenth of `--min-area`. A strip with a class between the two is left out, for a
small defect that is taken for none would be taught as background. The mask of a class that is there
is the mean of the mask heads alone, over a half or a lower threshold: how far a defect reaches is
no question of whether it is there.

Writes `--out`/train.csv and train_images/, which `train.py --extra` takes. An image that cannot be
read or run is named and left out; Ctrl-C ends with those that are labelled by then.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from evaluation.inputs import add_bundle_options, load_for_images
from evaluation.recorded import RecordedPasses, run_each
from kernel.command import INTERRUPTED, new_parser, run_command
from kernel.ensemble import Ensemble
from kernel.files import check_place
from kernel.image_folders import open_images
from kernel.logs import log
from kernel.manifest import load_manifest
from kernel.rle import encode_rle
from training.folds import write_strips
from training.ground_truth import Rles
from training.losses import SURE
from training.metrics import Masks
from training.strips import Strips

EXAMPLE = "  python evaluation/pseudo_labels.py --images severstal/test_images --out data/pseudo"


def mean_with_gates(recorded: RecordedPasses, gate_shift: float) -> Tensor:
    """Return the mean probabilities (classes, H, W) with every presence logit shifted."""
    means = []
    for pass_id, (gates,) in recorded.encoded.items():
        gates, found = gates.float(), recorded.probabilities[pass_id]
        shifted = torch.sigmoid(torch.logit(gates, SURE) + gate_shift)
        means.append(found * (shifted / gates.clamp_min(1e-30))[..., None, None])
    return torch.cat(means).mean(dim=0)


def label_strip(
    recorded: RecordedPasses, gate_shifts: tuple[float, float], min_area: int
) -> Masks | None:
    """Return the masks (classes, H, W) of a strip; None where it is not sure, or gave NaN."""
    threshold = recorded.manifest.threshold
    if not all(found.isfinite().all() for found in recorded.probabilities.values()):
        return None
    sure, wide = (
        (mean_with_gates(recorded, shift) > threshold).sum(dim=(1, 2)) for shift in gate_shifts
    )  # pixels (classes,)
    there, absent = sure >= min_area, wide < max(min_area // 10, 1)
    if not bool((there | absent).all()):
        return None
    masks = (mean_with_gates(recorded, math.inf) > min(0.5, threshold)) & there[:, None, None]
    return masks.cpu().numpy()


def label_strips(
    ensemble: Ensemble, paths: Sequence[Path], gate_shifts: tuple[float, float], min_area: int
) -> Iterator[tuple[str, dict[int, str]]]:
    """Yield those of some strips of whose classes the ensemble is sure: name, class → RLE."""
    competition = ensemble.manifest.competition
    for recorded, _ in run_each(ensemble, paths, "strips", RecordedPasses.record_all):
        masks = label_strip(recorded, gate_shifts, min_area)
        if masks is not None:
            found = {label: encode_rle(mask, competition) for label, mask in enumerate(masks, 1)}
            yield recorded.name, {label: rle for label, rle in found.items() if rle}


# --- command line ---------------------------------------------------------------------------------


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, EXAMPLE)
    add_bundle_options(parser, images="folder of strips without truth")
    add = parser.add_argument
    about = "to be sure that a class is there, and that it is not (default %(default)s)"
    add("--gate-shifts", type=float, nargs=2, default=(2.0, 3.0), metavar="B", help=about)
    about = "pixels of a class that is there; one that is not has less than a tenth of them"
    add("--min-area", type=int, default=1000, help=f"{about} (default %(default)s)")
    add("--out", type=Path, required=True, help="folder to write; must not be there")
    return parser.parse_args(arguments)


def label(args: argparse.Namespace) -> int:
    """Label the strips, and write those that are sure."""
    sure, wide = args.gate_shifts
    if sure > wide:
        raise ValueError(f"--gate-shifts {sure:g} {wide:g}: expected the wider one last")
    if args.min_area < 1:
        raise ValueError(f"--min-area {args.min_area}: expected 1 pixel or more")
    if args.out.exists():
        raise ValueError(f"{args.out}: is there already; give another --out, or remove it")
    check_place(args.out)
    manifest = load_manifest(args.bundle)
    competition = replace(manifest.competition, mask_size=None)  # to train on: the image's own size
    folder, names = open_images(args.images, competition)
    manifest = replace(manifest, competition=competition)
    ensemble = load_for_images(args.bundle, manifest, folder, names)
    labels, code = Rles(), 0
    try:
        paths = [folder / name for name in names]
        for name, masks in label_strips(ensemble, paths, (sure, wide), args.min_area):
            labels[name] = masks
    except KeyboardInterrupt:
        log.warning("interrupted: the %d strips that are labelled are written", len(labels))
        code = INTERRUPTED
    if not any(labels.values()):
        raise ValueError(
            f"{folder}: nothing is written, for of no strip is it sure that a class is there "
            f"({len(labels)} are clean): try a wider first --gate-shifts than {sure:g}"
        )
    write_strips(Strips(folder, sorted(labels), labels, competition), args.out)
    return code


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: label(parse_args(arguments)))


if __name__ == "__main__":
    main()
