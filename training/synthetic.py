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

from kernel.command import run_command
from kernel.competition import (
    IMAGE_SIZE,
    N_CLEAN_TRAINING_IMAGES,
    SEVERSTAL,
    Competition,
    add_competition_option,
    find_competition,
)
from kernel.images import Mask, Size
from kernel.logs import progress
from kernel.rle import encode_rle
from kernel.rows import LAYOUTS, layouts_of
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
    size: Size = (256, 1600),
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
class Plan:
    """What decides the strips of a split."""

    folder: Path
    split: int  # TRAIN or TEST
    seed: int
    shares: Sequence[float]  # weights of class 1, 2, 3, 4
    size: Size
    evenly: bool  # whether few strips too have their share of defects
    real: RealParts
    competition: Competition = SEVERSTAL


def write_strip(plan: Plan, index: int) -> tuple[str, list[str]]:
    """Write strip `index` of a split; its name and its RLE of each class, "" for no mask."""
    rng = np.random.default_rng([plan.seed, plan.split, index])
    if plan.evenly:
        classes = draw_evenly(rng, plan.shares, index)
    else:
        classes = draw_classes(rng, plan.shares)
    image, masks = synthesize_strip(rng, classes, plan.size, plan.real)
    competition = plan.competition
    name = strip_name(plan.seed, plan.split, index, suffix_of(competition))
    quality = 95 if rng.random() < 0.8 else 90  # the quantisation tables of the real files
    write_image(plan.folder / name, image, competition, quality)
    return name, [encode_rle(mask, competition) for mask in grouped(masks, competition)]


def write_split(plan: Plan, count: int, jobs: int) -> list[tuple[str, list[str]]]:
    """Write `count` strips; their names and RLEs in name order."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    write, what = partial(write_strip, plan), plan.folder.name
    if not count:
        return []
    if jobs == 1:
        return sorted(progress(map(write, range(count)), what, "strip", count))
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        strips = pool.map(write, range(count), chunksize=32)
        return sorted(progress(strips, what, "strip", count))


def write_competition(
    folder: Path,
    train: int,
    test: int,
    seed: int,
    layout: str = "three-column",
    shares: Sequence[float] = SHARES,
    size: Size = (256, 1600),
    jobs: int = 1,
    evenly: bool = False,
    real: RealParts = NOTHING_REAL,
    competition: Competition = SEVERSTAL,
) -> None:
    """Write a folder like the competition's, and test.csv, which Kaggle keeps to itself.

    `shares` weighs the classes of the train strips; the test strips keep the real proportions.
    `evenly` keeps the share of strips with a defect among few strips too, not only among many.
    `real` is for train and test strips alike. Another competition's four kinds of defects are
    shared out among its classes.

    Raises:
        ValueError: the layout is unknown, or a file that it writes is there already, or strips:
            those that no new row names would count as clean.
    """
    layouts = layouts_of(competition)
    layout = list(layouts)[-1] if competition != SEVERSTAL else layout
    if layout not in layouts:
        raise ValueError(f"layout is {layout!r}, expected one of {list(layouts)}")
    beside = size, evenly, real, competition
    train_plan = Plan(folder / "train_images", TRAIN, seed, shares, *beside)
    test_plan = Plan(folder / "test_images", TEST, seed, SHARES, *beside)
    for each in (train_plan.folder, test_plan.folder):
        if each.is_dir() and any(each.iterdir()):
            raise ValueError(f"{each}: holds files already; give another --out, or remove it")
    for each in (folder / name for name in ("train.csv", "test.csv", "sample_submission.csv")):
        if each.exists():
            raise ValueError(f"{each}: is there already; give another --out, or remove it")
    train_strips = write_split(train_plan, train, jobs)
    test_strips = write_split(test_plan, test, jobs)
    write_truth(folder / "train.csv", train_strips, layout, competition)
    write_truth(folder / "test.csv", test_strips, layout, competition)
    names = [name for name, _ in test_strips]
    write_sample(folder / "sample_submission.csv", names, competition, size)


# --- command line ---------------------------------------------------------------------------------

EXAMPLE = "  python training/synthetic.py --out data/steel --train 1200 --test 400"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=f"{EXAMPLE}\n\nDraw synthetic steel strips in the competition's layout.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write; holds no strips yet")
    add("--train", type=int, default=1200, help="strips in train_images (default 1200)")
    add("--test", type=int, default=400, help="strips in test_images (default 400)")
    add("--seed", type=int, default=0)
    add("--layout", choices=LAYOUTS, default="three-column", help="of train.csv")
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


def synthesize(args: argparse.Namespace) -> int:
    """Write the strips that the command line asks for."""
    competition = find_competition(args.competition)
    size = args.size or competition.image_size or IMAGE_SIZE
    write_competition(
        args.out, args.train, args.test, args.seed, args.layout, args.shares, size, args.jobs,
        real=read_real_parts(args), competition=competition,
    )  # fmt: skip
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: synthesize(parse_args(arguments)))


if __name__ == "__main__":
    main()
