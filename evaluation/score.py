"""Scores a bundle against ground truth: each member alone, and all members under all flips."""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from evaluation.inputs import add_bundle_options, load_for_images
from evaluation.recorded import RecordedPasses, run_each
from kernel.command import new_parser, run_command
from kernel.files import check_place, json_text, write_json
from kernel.image_folders import open_images
from kernel.manifest import TOGETHER, load_manifest
from training.ground_truth import check_masks, check_names, decode_scored_masks, read_truth
from training.metrics import Masks, Scores


def predict_strip(recorded: RecordedPasses) -> dict[str, Masks]:
    """Return the masks that every member finds, alone and under the first flip, and the ensemble.

    In the ensemble the passes of the members alone come first, for they have run; of the others
    only those run that can still change a mask.

    Raises:
        RuntimeError: the networks failed.
    """
    passes, found = list(enumerate(recorded.passes)), dict[str, Masks]()
    for pass_id, each in passes:
        if each.flip == recorded.manifest.flips[0]:
            recorded.record(pass_id)
            found[each.member] = recorded.replay([pass_id]).masks
    order = sorted((i for i, _ in passes), key=lambda i: i not in recorded.probabilities)
    return found | {TOGETHER: recorded.replay(order).masks}


EXAMPLE = "  python evaluation/score.py --images data/steel/test_images --truth data/steel/test.csv"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, EXAMPLE)
    add_bundle_options(parser)
    add = parser.add_argument
    add("--truth", type=Path, required=True, help="a train.csv of these strips, either layout")
    add("--out", type=Path, default=Path("scores.json"), help="updated after every strip")
    return parser.parse_args(arguments)


def score(args: argparse.Namespace) -> int:
    """Score every strip of `--images`; those that `--truth` does not name are clean.

    Raises:
        ValueError: the bundle or the truth is not what it should be, or no strip could be scored.
    """
    manifest = load_manifest(args.bundle)
    competition = manifest.competition
    images, names = open_images(args.images, competition)
    truth = read_truth(args.truth, competition)
    check_names(truth, names, args.truth, images)
    check_masks(truth, names, args.truth, images, competition)
    check_place(args.out)
    ensemble = load_for_images(args.bundle, manifest, images, names)
    scores, paths = defaultdict[str, Scores](Scores), [images / name for name in names]
    for recorded, found in run_each(ensemble, paths, "strips", predict_strip):
        masks = decode_scored_masks(truth, recorded.name, recorded.size, competition)
        for member, each in found.items():
            scores[member].add(each, masks)
        write_json(args.out, {member: each.summary() for member, each in scores.items()})
    if not scores:
        raise ValueError(f"{images}: no strip could be scored, as the lines above say")
    summary = {
        member: each.summary() | {"intervals": each.intervals()} for member, each in scores.items()
    }
    write_json(args.out, summary)
    print(json_text(summary), end="")
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: score(parse_args(arguments)))


if __name__ == "__main__":
    main()
