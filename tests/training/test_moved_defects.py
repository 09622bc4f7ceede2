"""Moved defects: picture and masks agree, nothing is lost, and only clean steel is used."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers import CLASSES, error_of, exit_code, save_image

from kernel.competition import SEVERSTAL
from kernel.rle import encode_rle
from training import moved_defects
from training.moved_defects import MARGIN, METHODS, move_defect
from training.strips import Pair, Strips

SIZE = (96, 200)
GROUND = 120  # grey levels


def donor_pair(top: int = 30, left: int = 40) -> Pair:
    """Flat steel with one L of class 3, darkest at its corner: no flip of it is itself."""
    image, masks = np.full(SIZE, GROUND, np.uint8), np.zeros((CLASSES, *SIZE), np.bool_)
    masks[2, top : top + 24, left : left + 8] = True
    masks[2, top : top + 8, left : left + 20] = True
    rows, columns = np.nonzero(masks[2])
    image[rows, columns] = 40 + 2 * (rows - top) + (columns - left)
    return image, masks


def flat_pair(grey: int = GROUND) -> Pair:
    return np.full(SIZE, grey, np.uint8), np.zeros((CLASSES, *SIZE), np.bool_)


def moved_pair(seed: int, donor: Pair, onto: Pair, method: str, label: int = 3) -> Pair:
    moved = move_defect(np.random.default_rng(seed), donor, onto, label, method)
    assert moved is not None
    return moved


def box_of(mask: Any) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def around(mask: Any, pixels: int) -> Any:
    size = (2 * pixels + 1,) * 2
    return cv2.dilate(mask.astype(np.uint8), np.ones(size)).astype(bool)


@pytest.mark.parametrize("method", METHODS)
def test_picture_and_mask_move_together_whole_in_one_of_four_flips(method: str) -> None:
    image, masks = donor_pair()
    box = box_of(masks[2])
    flips: list[tuple[Any, Any]] = [
        (image[box][::y, ::x], masks[2][box][::y, ::x]) for y in (1, -1) for x in (1, -1)
    ]
    seen, places = set(), set()
    for seed in range(16):
        found, where = moved_pair(seed, donor_pair(), flat_pair(), method)
        there = box_of(where[2])
        assert where[2].sum() == masks[2].sum() and not where[[0, 1, 3]].any()
        [way] = [
            index
            for index, (pixels, mask) in enumerate(flips)
            if mask.shape == where[2][there].shape
            and (mask == where[2][there]).all()
            and np.abs(pixels.astype(int) - found[there])[mask].max() <= 3
        ]
        seen.add(way)
        places.add((there[0].start, there[1].start))
    assert len(seen) == 4 and len(places) > 10


@pytest.mark.parametrize("method", METHODS)
def test_away_from_the_defect_the_strip_stays_as_it_was(method: str) -> None:
    rng = np.random.default_rng(0)
    onto = rng.integers(90, 150, SIZE, dtype=np.uint8), flat_pair()[1]
    for seed in range(8):
        found, where = moved_pair(seed, donor_pair(), onto, method)
        changed = found != onto[0]
        assert changed[where[2]].mean() > 0.9
        assert not changed[~around(where[2], MARGIN)].any()


def test_a_cloned_defect_takes_on_the_light_of_its_strip_and_a_pasted_one_keeps_its_own() -> None:
    donor, bright = donor_pair(), flat_pair(180)
    own = float(donor[0][donor[1][2]].mean())
    for method, expected in (("paste", own), ("seamless", own + 180 - GROUND)):
        found, where = moved_pair(0, donor, bright, method)
        assert float(found[where[2]].mean()) == pytest.approx(expected, abs=4)
    seam = around(where[2], 3) & ~where[2]
    assert found[seam].min() > 170  # the steel that came along is no halo


@pytest.mark.parametrize("method", METHODS)
def test_neither_input_is_changed_and_earlier_masks_stay(method: str) -> None:
    donor, onto = donor_pair(), flat_pair()
    onto[1][0, :20, :20] = True
    copies = [array.copy() for array in (*donor, *onto)]
    for seed in range(8):
        _, where = moved_pair(seed, donor, onto, method)
        assert (where[0] == onto[1][0]).all()
        assert not (where[2] & onto[1][0]).any()
    for array, copy in zip((*donor, *onto), copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("top", "left"), [(0, 40), (30, 0), (72, 40), (30, 180), (0, 0)])
def test_a_defect_cut_off_by_its_strips_border_stays_at_a_border(
    top: int, left: int, method: str
) -> None:
    """The right and lower ends of the L's arms, and its corner's sides."""
    for seed in range(6):
        _, where = moved_pair(seed, donor_pair(top, left), flat_pair(), method)
        rows, columns = box_of(where[2])
        at_rows = rows.start == 0 or rows.stop == SIZE[0]
        at_columns = columns.start == 0 or columns.stop == SIZE[1]
        assert at_rows or top not in (0, 72)
        assert at_columns or left not in (0, 180)
        assert where[2].sum() == donor_pair()[1][2].sum()


def test_one_connected_defect_is_moved_with_what_else_lies_on_it() -> None:
    image, masks = donor_pair()
    masks[2, 80:90, 150:170] = True  # a second defect of the class
    masks[0, 32:36, 42:46] = True  # another class on the first one
    areas = set()
    for seed in range(8):
        _, where = moved_pair(seed, (image, masks), flat_pair(), "paste")
        area = int(where[2].sum())
        areas.add(area)
        assert where[0].sum() == (16 if area != 200 else 0)
    assert areas == {200, int(donor_pair()[1][2].sum())}


def test_a_defect_that_fits_nowhere_is_not_moved() -> None:
    rng = np.random.default_rng(0)
    full, dark = flat_pair(), flat_pair(0)
    full[1][1] = True
    small = np.full((20, 20), GROUND, np.uint8), np.zeros((CLASSES, 20, 20), np.bool_)
    for onto in (full, dark, small):
        assert move_defect(rng, donor_pair(), onto, 3) is None
    image, masks = donor_pair()
    image[:, 45:] = 0  # half of it beside the steel
    assert move_defect(rng, (image, masks), flat_pair(), 3) is None


# --- command line ---------------------------------------------------------------------------------


def run_sheet(*words: object) -> int:
    return exit_code(moved_defects.main, *words)


def test_the_command_draws_defects_before_and_after(
    steel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moved.png"
    assert run_sheet("--data", steel, "--out", out, "--count", 3) == 0
    count = int(capsys.readouterr().out.split()[1])
    assert count in (5, 10, 15)  # the defect, and each method without and with its masks
    sheet = cv2.imread(str(out))
    assert sheet is not None and sheet.shape[0] > 64 * count and sheet.std() > 10


def write_data(folder: Path, grey: int, rows: str) -> Path:
    save_image(folder / "train_images" / "a.png", np.full((64, 96), grey, np.uint8))
    text = f"ImageId,ClassId,EncodedPixels\n{rows}"
    (folder / "train.csv").write_text(text, encoding="utf-8")
    return folder


def test_a_sheet_that_cannot_be_drawn_is_refused_in_one_line(
    steel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corner = np.zeros((64, 96), np.bool_)
    corner[20:40, 20:40] = True
    cases = {
        "no strip has a defect": (write_data(tmp_path / "clean", 120, "a.png,1,\n"), "a.png"),
        "no defect fits on another strip's clean steel": (
            write_data(tmp_path / "dark", 0, f"a.png,1,{encode_rle(corner, SEVERSTAL)}\n"),
            "a.png",
        ),
        "cannot be written": (steel, "gone/a.png"),
        "a.txt: cannot be written": (steel, "a.txt"),
    }
    for message, (data, out) in cases.items():
        assert run_sheet("--data", data, "--out", tmp_path / out, "--count", 4) == 2
        assert message in error_of(capsys.readouterr().err)


def test_a_sheet_of_another_competition_is_drawn_and_one_in_colour_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, image in (("a", donor_pair()[0]), ("b", flat_pair()[0])):
        save_image(tmp_path / "train_images" / f"{name}.png", image)
    rle = encode_rle(donor_pair()[1][2], SEVERSTAL)
    (tmp_path / "train.csv").write_text(f"id,rle_mask\na,{rle}\nb,\n", encoding="utf-8")
    words = ["--data", tmp_path, "--out", tmp_path / "moved.png", "--competition"]
    assert run_sheet(*words, "salt") == 0
    assert cv2.imread(str(tmp_path / "moved.png")) is not None
    assert run_sheet(*words, "clouds") == 2
    line = "defects can be moved between 8-bit grey images only"
    assert line in error_of(capsys.readouterr().err)


def test_the_strips_of_a_folder_are_moved_within_their_size(strips: Strips) -> None:
    defective = [name for name in strips.names if strips.truth.get(name)]
    some, moved = replace(strips, names=defective[:6]), 0
    for seed, name in enumerate(some.names):
        label = min(strips.truth[name])
        for method in METHODS:
            rng, onto = np.random.default_rng(seed), strips.load(strips.clean()[0])
            pair = move_defect(rng, strips.load(name), onto, label, method)
            if pair is not None:
                moved += 1
                assert pair[0].shape == pair[1].shape[1:] and pair[1][label - 1].any()
    assert moved
