"""What fp16 changes in the masks, measured on the CPU: a GPU's precision without a GPU.

Every member runs twice: in fp32, and with its weights and every layer's output rounded to fp16. A
layer itself computes in fp32, for in fp16 a CPU takes minutes a strip.
"""

import argparse
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.inputs import add_bundle_options, add_sample_options, sample_strips
from evaluation.recorded import RecordedPasses
from kernel.command import new_parser, run_command
from kernel.engines import TOLERANCES, compile_member, differences, highest_contrast_crop
from kernel.ensemble import Ensemble
from kernel.files import check_place, write_json
from kernel.images import Image, read_image
from kernel.logs import progress
from kernel.manifest import TOGETHER, Manifest, load_manifest
from kernel.members import Member, load_member, split_network
from kernel.stages import Stages
from training.metrics import Masks, dice

CPU = torch.device("cpu")

# --- members in fp16 ------------------------------------------------------------------------------


def _round(given: Any) -> Any:
    """Tensors of fp32 rounded to fp16, in lists and tuples too."""
    if isinstance(given, Tensor) and given.is_floating_point():
        return given.half().float()
    return type(given)(map(_round, given)) if isinstance(given, list | tuple) else given


def round_layers(network: nn.Module) -> nn.Module:
    """Round the weights, and with every run the output of each layer and block."""
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        if tensor.is_floating_point():
            tensor.data = _round(tensor.data)
    for module in network.modules():
        module.register_forward_hook(lambda _, __, output: _round(output))
    return network


def round_member(plain: Member) -> Member:
    """A member as a GPU runs it: batch norm folded, then rounded."""
    network = compile_member(plain, CPU).encoder.network
    return split_network(round_layers(network), plain.spec, CPU)


# --- both, side by side ---------------------------------------------------------------------------


@dataclass
class Changes:
    """What fp16 changed so far, of one member or of the ensemble."""

    pixels: list[float] = field(default_factory=list)  # share that changed, a strip
    pairs: list[bool] = field(default_factory=list)  # whether its mask changed
    dice: list[float] = field(default_factory=list)  # of each pair, against fp32

    def add(self, exact: Masks, rounded: Masks) -> None:
        """Add one strip's masks (classes, H, W)."""
        changed = exact != rounded
        self.pixels.append(float(changed.mean()))
        self.pairs += changed.any(axis=(-2, -1)).tolist()
        self.dice += dice(rounded, exact)

    def summary(self) -> dict[str, float]:
        """Shares and means."""
        return {
            "pixels_changed": float(np.mean(self.pixels)),
            "pairs_changed": float(np.mean(self.pairs)),
            "dice_against_fp32": float(np.mean(self.dice)),
        }


def compare_strip(
    exact: Ensemble, rounded: Ensemble, image: Image, changes: dict[str, Changes]
) -> None:
    """Add one strip's masks: of every member over its flips, and of the ensemble."""
    both = [RecordedPasses(ensemble, image) for ensemble in (exact, rounded)]
    for recorded in both:
        recorded.record_all()
    for name in (*exact.members, TOGETHER):
        pass_ids = [i for i, each in enumerate(exact.passes) if name in (each.member, TOGETHER)]
        changes[name].add(*(recorded.replay(pass_ids).masks for recorded in both))


def measure(bundle: Path, manifest: Manifest, images: Sequence[Image]) -> dict[str, Any]:
    """Return what fp16 changes on these images, and how far the check at the start sees it."""
    plain = [load_member(bundle, spec, CPU) for spec in manifest.members]
    fp16 = [round_member(member) for member in plain]
    exact, rounded = (Ensemble(manifest, each, CPU, Stages()) for each in (plain, fp16))
    changes: dict[str, Changes] = defaultdict(Changes)
    apart: dict[str, list[float]] = {member.spec.name: [0.0] * 4 for member in plain}
    for image in progress(images, "fp16", "strip"):
        compare_strip(exact, rounded, image, changes)
        tensor = exact.prepare(highest_contrast_crop(image))
        for a, b in zip(plain, fp16, strict=True):
            found = differences(a, b, tensor, exact.sizes[a.spec.name])
            apart[a.spec.name] = [*map(max, apart[a.spec.name], found)]
    return {
        "strips": len(images),
        "changes": {name: each.summary() for name, each in changes.items()},
        "largest_mean_difference": apart,  # of gates, masks and their logits, as in `check_engine`
        "tolerances": TOLERANCES,
    }


# --- command line ---------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """The results for a reader."""
    lines = [
        "| member | pixels changed | pairs changed | Dice against fp32 "
        "| check: gates, masks, their logits |",
        "|---|---|---|---|---|",
    ]
    for name, each in results["changes"].items():
        apart = results["largest_mean_difference"].get(name, [])
        lines.append(
            f"| {name} | {each['pixels_changed']:.4%} | {each['pairs_changed']:.1%} "
            f"| {each['dice_against_fp32']:.5f} | {', '.join(f'{d:.1e}' for d in apart)} |"
        )
    lines.append(f"\n{results['strips']} strips; check to {TOLERANCES}.")
    return "\n".join(lines)


EXAMPLE = "  python evaluation/half_precision.py --images severstal/test_images --strips 8"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, EXAMPLE)
    add_bundle_options(parser)
    add_sample_options(parser)
    add = parser.add_argument
    add("--crop", action="store_true", help="a quarter of each strip, where most is to be seen")
    add("--out", type=Path, default=Path("half_precision.json"))
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Measure on the strips that are drawn, and write what was found."""
    manifest = load_manifest(args.bundle)
    paths = sample_strips(args.images, args.strips, args.seed, manifest.competition)
    check_place(args.out)
    images = [read_image(path, manifest.competition) for path in paths]
    images = [highest_contrast_crop(image) for image in images] if args.crop else images
    results = measure(args.bundle, manifest, images)
    write_json(args.out, results)
    print(table(results))
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: run(parse_args(arguments)))


if __name__ == "__main__":
    main()
