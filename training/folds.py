"""Folds: which strips are trained on and which are held out, every class in the same share."""

import argparse
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kernel.command import needs, new_parser, run_command
from kernel.logs import progress
from kernel.rows import layouts_of
from kernel.shipped import add_competition_option, find_competition
from training.competition_files import write_truth
from training.config import NO_FOLD, Config
from training.strips import Strips, read_strips


def split_folds(strips: Strips, folds: int, fold: int) -> tuple[Strips, Strips]:
    """Return training and validation strips, every class in the same share in each fold.

    Raises:
        ValueError: there are fewer strips than folds.
        SystemExit: the stratifier is not installed.
    """
    if fold == NO_FOLD:
        return strips, replace(strips, names=[])
    with needs("training"):  # here, for what imports this may be without it
        from iterstrat.ml_stratifiers import MultilabelStratifiedKFold
    if len(strips.names) < folds:
        raise ValueError(
            f"{strips.folder}: {len(strips.names)} strips for {folds} folds; give fewer --folds"
        )
    labels = [
        [c in strips.truth.get(name, {}) for c in range(1, strips.classes + 1)]
        for name in strips.names
    ]
    if strips.classes == 1:  # the stratifier takes no single column
        labels = [[there, not there] for (there,) in labels]
    splitter = MultilabelStratifiedKFold(folds, shuffle=True, random_state=0)
    train, held_out = list(splitter.split(strips.names, np.array(labels, int)))[fold]

    def subset(index: Iterable[int]) -> Strips:
        return replace(strips, names=[strips.names[i] for i in index])

    return subset(train), subset(held_out)


# --- command line ---------------------------------------------------------------------------------


EXAMPLE = "  python training/folds.py --data severstal --folds 3 --fold 0 --out data/split"


def write_strips(strips: Strips, folder: Path) -> None:
    """Copy strips and their ground truth into a folder like the competition's, and say how many.

    The truth, which may be hours of work, comes first.
    """
    (folder / "train_images").mkdir(parents=True, exist_ok=True)
    labels, layout = range(1, strips.classes + 1), list(layouts_of(strips.competition).values())[-1]
    truths = [(name, strips.truth.get(name, {})) for name in strips.names]
    rows = [(name, [truth.get(label, "") for label in labels]) for name, truth in truths]
    write_truth(folder / "train.csv", rows, layout)
    for name in progress(strips.names, folder.name, "strip"):
        shutil.copyfile(strips.folder / name, folder / "train_images" / name)
    counts = [len(strips.with_class(label)) for label in labels]
    classes = ", ".join(strips.competition.classes)
    found = f"{len(strips.names)} strips, {len(strips.clean())} clean"
    print(f"{folder}: {found}, with class {classes}: {counts}")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    about = (
        "Copy a fold's strips and the others into folders of their own: OUT/train and OUT/held_out,"
        "\nand the held-out names into OUT/held_out.txt."
    )
    parser = new_parser(about, EXAMPLE)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train.csv and train_images/")
    add("--folds", type=int, default=Config.folds, help="default %(default)s")
    add("--fold", type=int, default=Config.fold, help="the fold held out (default %(default)s)")
    add_competition_option(parser)
    add("--out", type=Path, required=True, help="folder to write; must not be there")
    return parser.parse_args(arguments)


def split(args: argparse.Namespace) -> int:
    """Write both folders."""
    if args.folds < 2 or not 0 <= args.fold < args.folds:
        raise ValueError(f"--fold {args.fold} of --folds {args.folds}: expected 0 to folds - 1")
    if args.out.exists():
        raise ValueError(f"{args.out}: is there already; give another --out, or remove it")
    competition = find_competition(args.competition)
    parts = split_folds(read_strips(args.data, competition), args.folds, args.fold)
    for strips, name in zip(parts, ("train", "held_out"), strict=True):
        write_strips(strips, args.out / name)
    names = "".join(f"{name}\n" for name in parts[1].names)
    (args.out / "held_out.txt").write_text(names, encoding="utf-8")
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: split(parse_args(arguments)))


if __name__ == "__main__":
    main()
