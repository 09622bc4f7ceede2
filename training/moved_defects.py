"""Defects moved to other strips: cloned in without a seam, or copied as they are.

With few labelled strips this shows a network the same defect on other steel. The seam is hidden by
Poisson image editing (Pérez, Gangnet, Blake 2003), `cv2.seamlessClone`: the defect keeps its
gradients and takes on the light of the strip that it comes to.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from kernel.command import new_parser, run_command
from kernel.competition import Competition
from kernel.contact_sheet import Picture, add_caption, overlay_masks, stack
from kernel.images import Image, Mask
from kernel.shipped import add_competition_option, find_competition
from training.metrics import Masks
from training.strips import Pair, Strips, read_strips

Rng = np.random.Generator

MARGIN = 6  # pixels of steel that come along around a defect
BORDER = 2  # pixels around a patch: the clone needs a neighbour on every side
DARK = 12  # grey levels; what is darker lies beside the steel
MAX_DARK_SHARE = 0.02  # of a patch's pixels
TRIES = 10  # places that are looked at before a defect is left where it is


@dataclass(frozen=True)
class Patch:
    """A defect cut out of its strip."""

    image: Image  # (h + 2 BORDER, w + 2 BORDER)
    region: Mask  # (h, w), what is moved: the defect and `MARGIN` around it
    masks: Masks  # (classes, h, w), inside the region
    edges: tuple[bool, bool, bool, bool]  # whether it touches top, bottom, left, right of its strip

    def flip(self, axis: int) -> "Patch":
        """Return the patch turned round along `axis`: 0 upside down, 1 left to right."""
        edges = list(self.edges)
        edges[2 * axis : 2 * axis + 2] = reversed(edges[2 * axis : 2 * axis + 2])
        turned = np.flip(self.image, axis), np.flip(self.region, axis)
        return Patch(*turned, np.flip(self.masks, axis + 1), tuple(edges))  # type: ignore[arg-type]


def check_movable(competition: Competition, option: str) -> None:
    """Raise ValueError, naming the option, where a competition's defects cannot be moved."""
    if (competition.channels, competition.bits) != (1, 8):
        raise ValueError(
            f"{option}: defects can be moved between 8-bit grey images only, which those of "
            f"{competition.slug} are not"
        )


# --- cutting out ----------------------------------------------------------------------------------


def pad_border(image: Image) -> Image:
    """Repeat the outermost pixels `BORDER` times on every side."""
    return np.pad(image, BORDER, mode="edge")


def dark_share(image: Image, region: Mask) -> float:
    """Return the share of a region's pixels that lie beside the steel."""
    return float((image[region] < DARK).mean())


def cut_defect(rng: Rng, donor: Pair, label: int) -> Patch | None:
    """Cut one connected defect of class `label` out of a strip; None where it leaves the steel."""
    image, masks = donor
    count, components = cv2.connectedComponents(masks[label - 1].astype(np.uint8))
    component = (components == rng.integers(1, count)).astype(np.uint8)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * MARGIN + 1,) * 2)
    region = cv2.dilate(component, disc).astype(np.bool_)
    if dark_share(image, region) > MAX_DARK_SHARE:
        return None
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    (top, bottom), (left, right) = (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)
    window = np.s_[top:bottom, left:right]
    padded = pad_border(image)[top : bottom + 2 * BORDER, left : right + 2 * BORDER]
    height, width = region.shape
    edges = (top == 0, bottom == height, left == 0, right == width)
    return Patch(padded, region[window], masks[:, *window] & region[window], edges)


# --- putting in -----------------------------------------------------------------------------------


def choose_offset(rng: Rng, room: int, first: bool, last: bool) -> int | None:
    """Draw where a patch begins along one axis that leaves `room`; None where nothing fits.

    A defect that its strip's border cuts off stays at that border.
    """
    if room < 0 or (first and last and room > 0):
        return None
    if first or last:
        return 0 if first else room
    return int(rng.integers(room + 1))


def find_place(rng: Rng, patch: Patch, onto: Pair) -> tuple[int, int] | None:
    """Draw a place (top, left) on clean steel; None where no try of `TRIES` finds one."""
    image, masks = onto
    height, width = patch.region.shape
    rooms = image.shape[0] - height, image.shape[1] - width
    for _ in range(TRIES):
        top = choose_offset(rng, rooms[0], *patch.edges[:2])
        left = choose_offset(rng, rooms[1], *patch.edges[2:])
        if top is None or left is None:
            return None
        window = np.s_[top : top + height, left : left + width]
        taken = masks[:, *window].any(axis=0) & patch.region
        if not taken.any() and dark_share(image[window], patch.region) <= MAX_DARK_SHARE:
            return top, left
    return None


def paste(patch: Patch, under: Image) -> Image:
    """Return the patch's own pixels."""
    return patch.image


def clone_seamlessly(patch: Patch, under: Image) -> Image:
    """Return the patch in the light of what lies `under` it (both with a border)."""
    height, width = patch.region.shape
    mask = np.pad(patch.region.astype(np.uint8) * 255, BORDER)
    centre = BORDER + width // 2, BORDER + height // 2
    source, target = (cv2.cvtColor(each, cv2.COLOR_GRAY2BGR) for each in (patch.image, under))
    cloned = cv2.seamlessClone(source, target, mask, centre, cv2.NORMAL_CLONE)
    return np.asarray(cloned[..., 0], np.uint8)


METHODS: dict[str, Callable[[Patch, Image], Image]] = {
    "seamless": clone_seamlessly,
    "paste": paste,
}


def put_defect(patch: Patch, place: tuple[int, int], onto: Pair, method: str) -> Pair:
    """Return a strip with the patch at `place` (top, left), and its masks."""
    (top, left), (height, width) = place, patch.region.shape
    image, masks = onto[0].copy(), onto[1].copy()
    under = pad_border(image)[top : top + height + 2 * BORDER, left : left + width + 2 * BORDER]
    changed = METHODS[method](patch, under)[BORDER:-BORDER, BORDER:-BORDER]
    window = np.s_[top : top + height, left : left + width]
    image[window][patch.region] = changed[patch.region]
    masks[:, *window][patch.masks] = True
    return image, masks


def move_defect(
    rng: Rng, donor: Pair, onto: Pair, label: int, method: str = "seamless"
) -> Pair | None:
    """Return the strip `onto` with a defect of class `label` of the strip `donor`, and its masks.

    None where the defect fits nowhere on its clean steel. Neither input is changed.
    """
    patch = cut_defect(rng, donor, label)
    if patch is None:
        return None
    for axis in (0, 1):
        patch = patch.flip(axis) if rng.random() < 0.5 else patch
    place = find_place(rng, patch, onto)
    return None if place is None else put_defect(patch, place, onto, method)


# --- command line ---------------------------------------------------------------------------------

EXAMPLE = "  python training/moved_defects.py --data severstal --out moved.png --count 8"


def draw_example(strips: Strips, rng: Rng) -> list[Picture]:
    """Draw one defect's strip, and the strip that it comes to, once by every method."""
    defective = [name for name in strips.names if strips.truth.get(name)]
    name, onto_name = (str(rng.choice(names)) for names in (defective, strips.names))
    label = int(rng.choice(sorted(strips.truth[name])))
    donor, onto, seed = strips.load(name), strips.load(onto_name), int(rng.integers(2**32))
    what = f"class {strips.competition.name_of(label)}"
    pictures = [add_caption(overlay_masks(donor[0], (), donor[1]), f"{name}, {what}")]
    for method in METHODS:
        moved = move_defect(np.random.default_rng(seed), donor, onto, label, method)
        if moved is None:
            return []
        for how, masks in ((method, ()), (f"{method}, its masks", moved[1])):
            caption = f"   moved to {onto_name}: {how}"
            pictures.append(add_caption(overlay_masks(moved[0], (), masks), caption))
    return pictures


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser("Draw defects before and after their move to another strip.", EXAMPLE)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train.csv and train_images/")
    add_competition_option(parser)
    add("--out", type=Path, default=Path("moved.png"), help="default moved.png")
    add("--count", type=int, default=6, help="defects to move (default 6)")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def draw_sheet(args: argparse.Namespace) -> int:
    """Write the contact sheet."""
    competition = find_competition(args.competition)
    check_movable(competition, "--competition")
    strips, rng = read_strips(args.data, competition), np.random.default_rng(args.seed)
    if not any(strips.truth.values()):
        raise ValueError(f"{args.data}: no strip has a defect")
    pictures: list[Picture] = []
    for _ in range(args.count):
        pictures += draw_example(strips, rng)
    if not pictures:
        raise ValueError(f"{args.data}: no defect fits on another strip's clean steel")
    out = str(args.out)
    if not (cv2.haveImageWriter(out) and cv2.imwrite(out, stack(pictures))):
        raise ValueError(f"{args.out}: cannot be written; the folder and a suffix like .png?")
    print(f"{args.out}: {len(pictures)} pictures")
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: draw_sheet(parse_args(arguments)))


if __name__ == "__main__":
    main()
