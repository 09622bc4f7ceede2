"""Scores a bundle against ground truth: each member alone, and all members under all flips."""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from evaluation.recorded import RecordedPasses
from kernel.command import run_command
from kernel.device import pick_device
from kernel.ensemble import load_ensemble
from kernel.images import check_kinds, read_image, size_of
from kernel.logs import Stages, progress
from kernel.manifest import TOGETHER, load_manifest
from kernel.mounts import list_images, one_folder
from training.ground_truth import check_names, decode_scored_masks, read_truth
from training.json_files import to_json, write_json
from training.metrics import Masks, Scores


def score_strip(recorded: RecordedPasses, truth: Masks, scores: dict[str, Scores]) -> None:
    """Add one strip to every member's score, alone and without flips, and to the ensemble's.

    In the ensemble the members' own passes come first, for they have run; of the others only those
    run that can still change a mask.
    """
    passes = list(enumerate(recorded.passes))
    for pass_id, each in passes:
        if each.flip == "none":
            recorded.record(pass_id)
            scores[each.member].add(recorded.replay([pass_id]).masks, truth)
    order = sorted((i for i, _ in passes), key=lambda i: i not in recorded.probabilities)
    scores[TOGETHER].add(recorded.replay(order).masks, truth)


EXAMPLE = "  python evaluation/score.py --images data/steel/test_images --truth data/steel/test.csv"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=f"{EXAMPLE}\n\n{__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, default=Path("dist/dataset"), help="default dist/dataset")
    add("--images", type=Path, required=True, help="folder of strips")
    add("--truth", type=Path, required=True, help="a train.csv of these strips, either layout")
    add("--out", type=Path, default=Path("scores.json"), help="updated after every strip")
    return parser.parse_args(arguments)


def score(args: argparse.Namespace) -> int:
    """Score every strip of `--images`; those that `--truth` does not name are clean."""
    manifest = load_manifest(args.bundle)
    competition = manifest.competition
    images = one_folder(args.images, competition)
    names = list_images(images)
    truth = read_truth(args.truth, competition)
    check_names(truth, names, args.truth, images)
    check_kinds(images, names, competition)
    ensemble = load_ensemble(args.bundle, manifest, pick_device(), Stages())
    scores: dict[str, Scores] = defaultdict(Scores)
    for name in progress(names, "strips", "strip"):
        image = read_image(images / name, competition)
        masks = decode_scored_masks(truth, name, size_of(image), competition)
        score_strip(RecordedPasses(ensemble, image, name), masks, scores)
        write_json(args.out, {member: each.summary() for member, each in scores.items()})
    summary = {
        member: each.summary() | {"intervals": each.intervals()} for member, each in scores.items()
    }
    write_json(args.out, summary)
    print(to_json(summary), end="")
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: score(parse_args(arguments)))


if __name__ == "__main__":
    main()
