"""A new competition: its description, as far as a sample file and a few images show it."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kernel.competition import SLOT, Competition, check_competition
from kernel.files import json_text, write_text
from kernel.image_folders import list_images, no_images_fault
from kernel.images import GREY_MODES, check_header, is_coloured
from kernel.mounts import SAMPLE
from kernel.rle import is_empty_mark, number_fault
from kernel.rows import Row, fits_header, no_csv_fault, read_lines, read_rows
from kernel.shipped import check_scoring
from kernel.task import instances_fault

SEPARATORS = "_-/|: "
MASKS = ("rle", "mask", "pixel", "predict", "segment", "encod")  # in a mask column's name
SEEN = 32  # images that are looked at
SHOWN = 6  # classes that are listed
ASK = {  # what neither a sample nor images show
    "run_order": "down the columns; a fit warns where train.csv's masks look as if along the rows",
    "first_index": "1, as most have it",
    "starts": "absolute; relative ones, which count from the run before, are not written",
    "mask_size": "null, the image's own",
    "time_limit_s": "an hour",
}


NESTED_YET = (  # a description that says `image_path` is what is wanted here
    "where folders are part of the csv's names, copy a few images into one folder, each under its "
    "name in the csv, propose with that, and add `image_path` (competitions/uw-madison.json has it)"
)


@dataclass
class Proposal:
    """A description, and what stands in it without having been seen."""

    competition: Competition
    unsure: list[str] = field(default_factory=list)


def propose(sample: Path, images: Path) -> Proposal:
    """Return the description that a sample submission and some of its images suggest.

    Raises:
        ValueError: the sample names none of the images, has no column of masks or masks that are no
            run-length code or a relative one, has several rows of an image and class or a row that
            is not like the others, names the line; or its folder is named as a competition that
            does not fit.
    """
    names = list_images(images) if images.is_dir() else []
    if not names:
        raise ValueError(no_images_fault(images, nested=NESTED_YET))
    header, rows = _read_table(sample)
    mask = _mask_column(sample, header, rows)
    folder = sample.resolve().parent.name.lower()
    slug = re.sub("[^a-z0-9_]+", "-", folder).strip("-_") or "my-competition"
    check_scoring(slug, f"{sample}: slug {slug}, as its folder is named")
    found = _find_layout(sample, header, rows, names, mask)
    seen, doubts = _look_at_images(images, names)
    titled = {"slug": slug, "title": slug.replace("-", " ").capitalize()}
    competition = Competition(**found | seen | titled)
    check_competition(competition)
    found_rows = read_rows(sample, competition, _code_fault).rows
    if fault := instances_fault(sample, found_rows, competition):
        raise ValueError(fault)
    competition = replace(competition, n_images=len({image for image, *_ in found_rows}))
    doubts = [*_list_unsure(competition), *_doubt_table(sample, competition, rows, mask), *doubts]
    return Proposal(competition, doubts)


def _code_fault(row: Row) -> str | None:
    if is_empty_mark(row[2]):
        return None
    if fault := number_fault(row[2]):
        return f"{fault}: no run-length code, and no other is written"
    starts = [int(word) for word in row[2].split()[::2]]
    falls = [(first, then) for first, then in pairwise(starts) if then < first]
    return (
        f"start {falls[0][1]} behind {falls[0][0]}: a relative code, which is not written, or runs "
        "that are not sorted"
        if falls
        else None
    )


def _list_unsure(competition: Competition) -> list[str]:
    """What a sample does not show, or may show of itself alone, and what was taken for it."""
    shown = () if competition.first_index else ("first_index",)  # by a start of 0
    unsure = [f"{name}: {taken}" for name, taken in ASK.items() if name not in shown]
    unsure.append(f"slug, title: {competition.slug}, as the sample's folder is named")
    unsure.append(f"n_images: {competition.n_images}, the sample's; a hidden set may be larger")
    named = [column for column, cell in competition.layouts[0].items() if "{class}" in cell]
    if competition.any_class is not None:
        unsure.append("classes: the sample names none, take them from train.csv")
    elif not named:
        unsure.append("classes: one, which the sample does not name")
    else:
        classes = ", ".join(competition.classes[:SHOWN])
        more = (
            f" and {len(competition.classes) - SHOWN} more" if competition.classes[SHOWN:] else ""
        )
        unsure.append(f"classes: {classes}{more}, as the column {named[0]} has them, in that order")
    return unsure


def _doubt_table(
    sample: Path, competition: Competition, rows: list[list[str]], mask: int
) -> list[str]:
    """What a sample's header and `rows` leave open; the masks' column has the number `mask`."""
    doubts = [
        f"column {column}: no class, each row's cell is kept, like {cell!r}"
        for column, cell in competition.layouts[0].items()
        if not SLOT.search(cell)
    ]
    named = any(word in sample.name.lower() for word in ("sample", "submission"))
    if not named and not fits_header(sample.with_name(SAMPLE), competition):
        doubts.append(
            f"layouts: {sample.name}'s alone; where the sample has another header, add one for it, "
            "last: the last is written"
        )
    column = list(competition.layouts[0])[mask]
    if not _is_named_as_masks(column):
        doubts.append(f"column {column}: the masks, as its cells are run-length codes")
    if not any(is_empty_mark(row[mask]) for row in rows):
        doubts.append('empty: "", for the sample has no empty mask')
    return doubts


def write_description(sample: Path, images: Path, path: Path) -> Proposal:
    """Write the proposed description; ValueError where a file is there, or as `propose`."""
    if path.exists():
        raise ValueError(f"{path}: is there already; move it away")
    proposal = propose(sample, images)
    write_text(path, json_text(asdict(proposal.competition)))
    return proposal


# --- the sample -----------------------------------------------------------------------------------


def _read_table(sample: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a csv, without the index column that pandas writes."""
    with read_lines(sample) as lines:
        header = [cell.strip() for cell in next(lines, [])]
        if fault := no_csv_fault(header):
            raise ValueError(fault)
        rows = list(lines)
    if header[:1] in ([""], ["Unnamed: 0"]):
        header, rows = header[1:], [row[1:] for row in rows]
    if len(header) < 2 or not rows:
        raise ValueError(
            f"{sample}: line 1: {','.join(header)!r}: no header and rows of two cells; where the "
            "sample is filled in for the scored run only, give train.csv in its place"
        )
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"{sample}: line {number}: {len(row)} cells, not {len(header)}")
    return header, rows


def _is_named_as_masks(column: str) -> bool:
    return any(word in column.lower() for word in MASKS)


def _holds_codes(cells: Sequence[str]) -> bool:
    """Whether cells are run-length codes and empty marks, and one is a code."""
    codes = [cell for cell in cells if not is_empty_mark(cell)]
    return bool(codes) and not any(map(number_fault, codes))


def _mask_column(sample: Path, header: Sequence[str], rows: list[list[str]]) -> int:
    """The last column that is named as masks are, else the only one of run-length codes."""
    named = [i for i, name in enumerate(header) if _is_named_as_masks(name)]
    columns = enumerate(zip(*rows, strict=True))
    coded = [] if named else [i for i, cells in columns if _holds_codes(cells)]
    if not named and len(coded) != 1:
        raise ValueError(
            f"{sample}: line 1: {','.join(header)}: no column is named like a mask "
            f"({', '.join(MASKS)}), and {len(coded)} hold run-length codes; write the description "
            "by hand, see docs/competitions.md"
        )
    return (named or coded)[-1]


def _find_layout(
    sample: Path, header: list[str], rows: list[list[str]], names: list[str], mask: int
) -> dict[str, Any]:
    """Find what the layout says: templates, classes, suffix, empty token and first index.

    `mask` is the number of the masks' column.
    """
    others = [column for column in range(len(header)) if column != mask]
    for suffix in ("", *sorted({Path(name).suffix for name in names})):
        known = {name.removesuffix(suffix) for name in names if name.endswith(suffix)}
        for column in others:
            cells = [row[column] for row in rows]
            template, classes = _split_cells(cells, known)
            if template:
                layout = {
                    name: cell.strip() or "-" for name, cell in zip(header, rows[0], strict=True)
                }
                layout |= {header[column]: template, header[mask]: "{mask}"}
                found: dict[str, Any] = {"suffix": suffix, "classes": classes or ("mask",)}
                rest = {header[i]: [row[i] for row in rows] for i in others if i != column}
                if not classes and (named := _class_column(rest, len(set(cells)))):
                    found |= _read_classes(rest[named])
                    layout[named] = "{class}"
                masks = [row[mask].strip() for row in rows]
                tokens = Counter(filter(is_empty_mark, masks))
                found["empty"] = tokens.most_common(1)[0][0] if tokens else ""
                starts = (cell.split()[0] for cell in masks if not is_empty_mark(cell))
                found["first_index"] = 0 if "0" in starts else 1
                return found | {"layouts": (layout,)}
    raise ValueError(
        f"{sample}: line 2: {','.join(rows[0])[:60]} names no image of the folder, which has "
        f"{names[0]!r}; give a folder with some of the sample's images, each one file; {NESTED_YET}"
    )


def _split_cells(cells: list[str], known: set[str]) -> tuple[str, tuple[str, ...]]:
    """The template of cells that hold known images, and the classes beside them; "" for none."""
    if any(cell in known for cell in cells):
        return "{image}", ()
    for sign in SEPARATORS:
        before, after = dict[str, None](), dict[str, None]()  # ordered sets
        for cell in cells:  # of several images that it may name, the longest: a_1_x is of a_1
            cuts = [i for i, letter in enumerate(cell) if letter == sign]
            if ends := [cut for cut in cuts if cell[:cut] in known]:
                after[cell[ends[-1] + 1 :]] = None
            if starts := [cut for cut in cuts if cell[cut + 1 :] in known]:
                before[cell[: starts[0]]] = None
        if after or before:
            template = f"{{image}}{sign}{{class}}" if after else f"{{class}}{sign}{{image}}"
            return template, tuple(after or before)
    return "", ()


def _class_column(columns: dict[str, list[str]], images: int) -> str | None:
    """Which column, name → cells, has the classes: one so called, or the first of a few values."""
    called = [name for name in columns if "class" in name.lower()]
    counts = {name: len(set(cells)) for name, cells in columns.items()}
    few = [  # not a number of the row, or the like
        name
        for name, count in counts.items()
        if 1 < count < len(columns[name]) or 1 == images < count
    ]
    return next(iter(called + few), None)


def _read_classes(cells: list[str]) -> dict[str, Any]:
    """What the cells of the classes' column say of them; a single one stands for all."""
    values = tuple(dict.fromkeys(cells))
    if len(values) > 1:
        return {"classes": values}
    return {"classes": ("1",) if values[0] != "1" else ("2",), "any_class": values[0]}


# --- the images -----------------------------------------------------------------------------------


def _look_at_images(folder: Path, names: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return channels, bits and the most frequent size of some images, and what is in doubt."""
    sizes, unread = Counter[tuple[int, int]](), list[str]()
    colour, grey, depths = False, False, set[int]()
    for name in names[:: max(len(names) // SEEN, 1)]:
        try:
            mode = check_header((folder / name).read_bytes())
        except (OSError, ValueError) as error:
            unread.append(f"{name}: {error}")
            continue
        pixels = cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.dtype not in (np.uint8, np.uint16):
            unread.append(f"{name}: pixels are {getattr(pixels, 'dtype', 'not decoded')}")
            continue
        sizes[pixels.shape[0], pixels.shape[1]] += 1
        depths.add(8 * pixels.dtype.itemsize)
        colour |= is_coloured(pixels)
        grey |= mode in GREY_MODES
    if not sizes:
        raise ValueError(f"{folder}: none of its images is read, like {(unread or names)[0]}")
    doubts = []
    if unread:
        doubts.append(
            f"images: {len(unread)} of those looked at cannot be read, {unread[0]}; "
            "the rows of such stay empty"
        )
    if others := ["grey"] * (colour and grey) + ["of 8 bits"] * (len(depths) > 1):
        doubts.append(
            f"channels, bits: some images are {' or '.join(others)}, which only the kernel takes "
            "with the others: save those like them"
        )
    size = sizes.most_common(1)[0][0]
    found = {"channels": 3 if colour else 1, "bits": max(depths), "image_size": size}
    return found, doubts
