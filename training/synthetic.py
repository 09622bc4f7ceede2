"""Synthetic steel strips in the competition's own layout, seeded, for training and trying out."""

import argparse
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernel.command import new_parser, run_command
from kernel.competition import IMAGE_SIZE, SEVERSTAL, Competition
from kernel.images import Mask, Size
from kernel.logs import progress
from kernel.mounts import SAMPLE
from kernel.rle import encode_rle
from kernel.rows import layouts_of
from kernel.shipped import add_competition_option, find_competition
from training.competition_files import (
    grouped,
    suffix_of,
    write_image,
    write_sample,
    write_truth,
)
from training.config import parse_size
from training.defects import draw_look, fitting_look
from training.real_parts import (
    NOTHING_REAL,
    RealParts,
    draw_background,
    draw_outline,
    find_backgrounds,
    read_names,
    read_outlines,
    steel_on,
)
from training.surface import Field, Rng, Span, clean_surface, dark_margin

N_CLASSES = len(SEVERSTAL.classes)
N_TRAINING_IMAGES = SEVERSTAL.n_training_images or 0
N_CLEAN_TRAINING_IMAGES = 5902
N_DEFECTIVE = N_TRAINING_IMAGES - N_CLEAN_TRAINING_IMAGES
DEFECTIVE = N_DEFECTIVE / N_TRAINING_IMAGES  # share of the strips
SHARES = tuple(map(float, SEVERSTAL.images_with_class or ()))  # of class 1, 2, 3, 4
SECOND_CLASS = 429 / N_DEFECTIVE  # 7,095 (image, class) pairs on 6,666 defective images
TRAIN, TEST = 0, 1  # splits, the second word of every strip's seed


# --- one strip ------------------------------------------------------------------------------------


def draw_defect(
    rng: Rng, label: int, steel: Mask, span: Span, real: RealParts
) -> tuple[Mask, Field]:
    """A defect of class `label`: its mask, on the steel, and the gain inside it."""
    size, unit = (steel.shape[0], steel.shape[1]), steel.shape[0] / 256
    mask = draw_outline(rng, label, steel, real)
    if mask is not None:
        return mask, fitting_look(label, mask, unit).gain(rng, mask, unit)
    look = draw_look(rng, label)
    mask = look.outline(rng, size, span, unit)
    return mask & steel, look.gain(rng, mask, unit)


def synthesize_strip(
    rng: Rng,
    classes: Sequence[int] = (),
    size: Size = IMAGE_SIZE,
    real: RealParts = NOTHING_REAL,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One strip with the defects of `classes` (1–4): grey (H, W) and its masks (4, H, W)."""
    unit = size[0] / 256  # shapes are drawn in pixels of a full strip and shrink with it
    background = draw_background(rng, size, real)
    if background is None:
        margin, span = dark_margin(rng, size, 0.8 if {1, 2} & set(classes) else 0.35)
        gain, steel = clean_surface(rng, size, unit), np.zeros(size, bool)
        steel[:, span[0] : span[1]] = True
    else:
        gain, (steel, span) = np.ones(size, np.float32), steel_on(background, unit)
    masks = np.zeros((N_CLASSES, *size), bool)
    for label in classes:
        masks[label - 1], defect = draw_defect(rng, label, steel, span, real)
        gain *= 1 + rng.uniform(0.85, 1.3) * (defect - 1)  # fainter ones no eye would find
    if background is not None:
        return np.clip(np.rint(background * gain), 0, 255).astype(np.uint8), masks
    grey = 255 * np.clip(rng.normal(0.415, 0.08), 0.24, 0.56) * gain * margin
    grey += 2.5 + rng.standard_normal(size, dtype=np.float32)  # the camera's black and its noise
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8), masks


def draw_classes(rng: Rng, shares: Sequence[float]) -> tuple[int, ...]:
    """The classes of one strip: often none, else one in proportion to `shares`, seldom two."""
    if rng.random() > DEFECTIVE:
        return ()
    count = 2 if rng.random() < SECOND_CLASS else 1
    chances = np.array(shares) / np.sum(shares)
    return tuple(int(c) + 1 for c in sorted(rng.choice(N_CLASSES, count, replace=False, p=chances)))


def draw_evenly(rng: Rng, shares: Sequence[float], index: int) -> tuple[int, ...]:
    """As `draw_classes` for strip `index`, where among few strips as many have a defect as should.

    By chance 8 strips have 2 to 6, and a run over them takes half or twice as long as others.
    """
    due = math.floor((index + 1) * DEFECTIVE) > math.floor(index * DEFECTIVE)
    while True:
        classes = draw_classes(rng, shares)
        if bool(classes) == due:
            return classes


# --- a competition of strips ----------------------------------------------------------------------


def strip_name(seed: int, split: int, index: int, suffix: str = ".jpg") -> str:
    """Nine hex digits; multiplying by an odd number permutes them, so no two strips collide."""
    return f"{((2 * index + split) * 0x9E3779B97 + seed * 0x51ED27) % 16**9:09x}{suffix}"


@dataclass(frozen=True)
class Drawing:
    """What is drawn, but for how many strips."""

    seed: int = 0
    size: Size = IMAGE_SIZE
    evenly: bool = False  # few strips too have their share of defects, not only many
    real: RealParts = NOTHING_REAL
    competition: Competition = SEVERSTAL  # the four kinds of defects are its classes in turn


@dataclass(frozen=True)
class Split:
    """The train strips, or the test strips."""

    folder: Path
    number: int  # TRAIN or TEST
    count: int
    shares: Sequence[float]  # weights of class 1, 2, 3, 4
    drawing: Drawing


def write_strip(split: Split, index: int) -> tuple[str, list[str]]:
    """Write strip `index` of a split; its name and its RLE of each class, "" for no mask."""
    drawing, competition = split.drawing, split.drawing.competition
    rng = np.random.default_rng([drawing.seed, split.number, index])
    if drawing.evenly:
        classes = draw_evenly(rng, split.shares, index)
    else:
        classes = draw_classes(rng, split.shares)
    image, masks = synthesize_strip(rng, classes, drawing.size, drawing.real)
    name = strip_name(drawing.seed, split.number, index, suffix_of(competition))
    quality = 95 if rng.random() < 0.8 else 90  # the quantisation tables of the real files
    write_image(split.folder / name, image, competition, quality)
    return name, [encode_rle(mask, competition) for mask in grouped(masks, competition)]


def write_split(split: Split, jobs: int) -> list[tuple[str, list[str]]]:
    """Write the strips of a split; their names and RLEs in name order."""
    split.folder.mkdir(parents=True, exist_ok=True)
    write, what, count = partial(write_strip, split), split.folder.name, split.count
    if not count:
        return []
    if jobs == 1:
        return sorted(progress(map(write, range(count)), what, "strip", count))
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        strips = pool.map(write, range(count), chunksize=32)
        return sorted(progress(strips, what, "strip", count))


def write_competition(
    folder: Path,
    drawing: Drawing,
    train: int = 0,
    test: int = 0,
    layout: str = "",
    shares: Sequence[float] = SHARES,
    jobs: int = 1,
) -> None:
    """Write a folder like the competition's, and test.csv, which Kaggle keeps to itself.

    `layout` is one of the competition's by its name, today's where it is empty. `shares` weighs the
    classes of the `train` strips; the `test` strips keep the real proportions.

    Raises:
        ValueError: the competition has no such layout, or a file that it writes is there already,
            or strips: those that no new row names would count as clean.
    """
    competition, layouts = drawing.competition, layouts_of(drawing.competition)
    layout = layout or list(layouts)[-1]
    if layout not in layouts:
        listed = ", ".join(layouts)
        raise ValueError(f"--layout {layout}: {competition.slug} has {listed}: give one, or none")
    splits = {
        "train.csv": Split(folder / "train_images", TRAIN, train, shares, drawing),
        "test.csv": Split(folder / "test_images", TEST, test, SHARES, drawing),
    }
    for each in (split.folder for split in splits.values()):
        if each.is_dir() and any(each.iterdir()):
            raise ValueError(f"{each}: holds files already; give another --out, or remove it")
    for each in (folder / name for name in (*splits, SAMPLE)):
        if each.exists():
            raise ValueError(f"{each}: is there already; give another --out, or remove it")
    drawn = {name: write_split(split, jobs) for name, split in splits.items()}
    for name, strips in drawn.items():
        write_truth(folder / name, strips, layouts[layout])
    names = [name for name, _ in drawn["test.csv"]]
    write_sample(folder / SAMPLE, names, competition, drawing.size)


# --- command line ---------------------------------------------------------------------------------

EXAMPLE = "  python training/synthetic.py --out data/steel --train 1200 --test 400"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser("Draw synthetic steel strips in the competition's layout.", EXAMPLE)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write; holds no strips yet")
    add("--train", type=int, default=1200, help="strips in train_images (default 1200)")
    add("--test", type=int, default=400, help="strips in test_images (default 400)")
    add("--seed", type=int, default=0)
    about = "of train.csv, like two-column, which Severstal's was in 2019 (default: today's)"
    add("--layout", default="", help=about)
    about = "weights of class 1, 2, 3, 4 in train; test stays as on Kaggle (default %(default)s)"
    add("--shares", type=float, nargs=N_CLASSES, default=SHARES, help=about)
    add("--size", type=parse_size, help="HEIGHTxWIDTH in pixels (default: the competition's)")
    add_competition_option(parser)
    add("--jobs", type=int, default=1, help="processes that draw")
    about = "a train.csv of real 256×1600 strips, whose masks the defects are drawn into"
    add("--masks", type=Path, metavar="TRAIN.CSV", help=about)
    about = "names, one a line, of strips whose masks are left out of --masks"
    add("--leave-out", type=Path, metavar="FILE", help=about)
    add("--backgrounds", type=Path, metavar="DIR", help="real strips to draw on, the clean ones")
    about = "which are clean: their names, one a line, or the folder's train.csv"
    add("--clean-list", type=Path, metavar="FILE", help=about)
    about = "share of the strips that lie on one of --backgrounds (default 1)"
    add("--background-share", type=float, default=1.0, help=about)
    return parser.parse_args(arguments)


def read_real_parts(args: argparse.Namespace) -> RealParts:
    """Read what the command line gives of real strips.

    Raises:
        ValueError: --backgrounds without --clean-list, or a file that is not what it should be.
    """
    outlines, backgrounds = dict[int, list[str]](), tuple[Path, ...]()
    if args.masks:
        leave_out = read_names(args.leave_out) if args.leave_out else frozenset[str]()
        outlines = read_outlines(args.masks, leave_out)
    if args.backgrounds:
        if not args.clean_list:
            raise ValueError("--backgrounds needs --clean-list: which of them are clean?")
        backgrounds = find_backgrounds(args.backgrounds, args.clean_list)
    return RealParts(outlines, backgrounds, args.background_share)


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers that mean nothing."""
    for option, least in (("train", 0), ("test", 0), ("jobs", 1)):
        if getattr(args, option) < least:
            raise ValueError(f"--{option} {getattr(args, option)}: expected {least} or more")
    if min(args.shares) < 0 or sum(share > 0 for share in args.shares) < 2:
        shown = " ".join(f"{share:g}" for share in args.shares)
        raise ValueError(f"--shares {shown}: expected none below 0, and two or more above it")


def synthesize(args: argparse.Namespace) -> int:
    """Write the strips that the command line asks for."""
    check_args(args)
    competition = find_competition(args.competition)
    size = args.size or competition.image_size or IMAGE_SIZE
    drawing = Drawing(args.seed, size, real=read_real_parts(args), competition=competition)
    write_competition(args.out, drawing, args.train, args.test, args.layout, args.shares, args.jobs)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: synthesize(parse_args(arguments)))


if __name__ == "__main__":
    main()
