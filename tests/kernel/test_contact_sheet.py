"""The contact sheet: masks filled in the colour of their class, the ground truth outlined."""

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from helpers import SMALL, Grey, save_strips

from kernel.competition import SEVERSTAL, Competition
from kernel.contact_sheet import (
    BAR,
    GAP,
    add_caption,
    caption_of,
    draw_submission,
    overlay_masks,
    stack,
    to_picture,
)
from kernel.rows import SPREADSHEET_CELL

COLOURS = np.array([(66, 66, 245), (96, 201, 60), (245, 176, 66), (212, 86, 214)])  # BGR
BACKGROUND = 24  # of a caption


def filled(image: Grey, mask: np.ndarray, label: int) -> np.ndarray:
    """A grey image with one mask in the colour of its class, to within a rounding."""
    picture = np.repeat(image[..., None], 3, axis=2).astype(float)
    picture[mask] += 0.45 * (COLOURS[label - 1] - picture[mask])
    return picture


def test_masks_are_coloured_by_class_and_the_truth_is_outlined() -> None:
    image = np.full((64, 96), 100, np.uint8)
    masks = np.zeros((4, 64, 96), np.bool_)
    for label in range(4):
        masks[label, 8:24, 4 + 24 * label : 16 + 24 * label] = True
    canvas = overlay_masks(image, masks).astype(int)
    inside = [tuple(canvas[16, 10 + 24 * label]) for label in range(4)]
    assert len(set(inside)) == 4
    assert all(np.ptp(colour) > 20 for colour in inside)
    assert (canvas[40:] == 100).all()
    outlined = overlay_masks(image, np.zeros_like(masks), masks).astype(int)
    assert np.ptp(outlined[8, 10]) > 20  # the edge
    assert (outlined[16, 10] == 100).all()  # not the inside


def test_a_fifth_class_has_the_first_ones_colour() -> None:
    image = np.full((6, 10), 100, np.uint8)
    masks = np.zeros((5, 6, 10), np.bool_)
    for label in range(5):
        masks[label, :3, 2 * label : 2 * label + 2] = True
    found = overlay_masks(image, masks)
    assert found.dtype == np.uint8
    for label, mask in enumerate(masks):
        expected = filled(image, mask, label % 4 + 1)
        assert np.abs(found[mask] - expected[mask]).max() < 1
    assert (found[3:] == 100).all()


@pytest.mark.parametrize("label", [1, 2, 3, 4])
def test_an_outline_is_the_colour_of_its_class_within_white_inside_and_out(label: int) -> None:
    image, truth = np.full((60, 80), 100, np.uint8), np.zeros((4, 60, 80), np.bool_)
    truth[label - 1, 10:50, 10:70] = True
    truth[label - 1, 25:35, 30:50] = False  # a hole is outlined too
    found = overlay_masks(image, [], truth)
    for edge in (10, 24, 35, 49):  # the mask's own pixels next to what it is not
        assert (found[edge, 40] == COLOURS[label - 1]).all()
        assert (found[[edge - 2, edge + 2], 40] == 255).all()
        assert (found[[edge - 4, edge + 4], 40] == 100).all()
    assert (found[17, 40] == 100).all() and (found[30, 40] == 100).all()


def test_a_strip_is_drawn_in_the_size_of_its_masks_with_or_without_a_truth() -> None:
    image = np.repeat(np.repeat(np.array([[0, 80, 160], [240, 20, 60]], np.uint8), 2, 0), 2, 1)
    image[::2] += 10  # a pixel of the mask is the mean of four
    mask = np.zeros((2, 3), np.bool_)
    for masks, truth in (([mask, mask], []), ([], [mask]), ([mask], [mask])):
        found = overlay_masks(image, masks, truth)
        assert found[..., 0].tolist() == [[5, 85, 165], [245, 25, 65]]
    assert overlay_masks(image, []).shape == (4, 6, 3)


def test_a_picture_is_bgr_and_as_bright_as_16_bits_come() -> None:
    grey = np.array([[0, 7], [9, 255]], np.uint8)
    np.testing.assert_array_equal(to_picture(grey), np.dstack([grey] * 3))
    rgb = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(to_picture(rgb), rgb[..., ::-1])
    deep = np.array([[0, 500], [1000, 250]], np.uint16)
    assert to_picture(deep)[..., 1].tolist() == [[0, 127], [255, 63]]
    assert not to_picture(np.zeros((2, 2), np.uint16)).any()
    assert (to_picture(np.ones((2, 2), np.uint16)) == 255).all()


def test_a_caption_stands_light_on_dark_above_its_strip() -> None:
    strip = np.full((5, 400, 3), 100, np.uint8)
    found = add_caption(strip, "HHHH")
    assert found.shape == (44 + 5, 400, 3)
    np.testing.assert_array_equal(found[44:], strip)
    bar = found[:44]
    assert (bar.min(), bar.max()) == (BACKGROUND, 230)
    assert (bar == bar[..., :1]).all()  # grey
    rows, columns = np.nonzero(bar[..., 0] > 127)
    assert 8 < rows.min() < 16 and 28 <= rows.max() <= 34
    assert 11 <= columns.min() <= 18 and 60 < columns.max() < 110


def test_a_name_that_is_no_text_is_spelt_out() -> None:
    """OpenCV 5 dies of it, and with it the process."""
    strip, name = np.zeros((4, 600, 3), np.uint8), os.fsdecode(b"caf\xe9.jpg")
    np.testing.assert_array_equal(add_caption(strip, name), add_caption(strip, r"caf\udce9.jpg"))


def test_a_caption_names_image_and_classes() -> None:
    assert caption_of("a.jpg", [], SEVERSTAL) == "a.jpg   found: no defect"
    assert caption_of("a.jpg", [1, 3], SEVERSTAL) == "a.jpg   found: class 1, class 3"
    clouds = Competition(classes=("Fish", "Sugar"))
    assert caption_of("b", [2], clouds) == "b   found: class Sugar"


def test_strips_are_stacked_with_a_gap_the_narrower_ones_filled_up_on_the_right() -> None:
    strips = [np.full((height, width, 3), 9, np.uint8) for height, width in ((2, 3), (4, 7))]
    found = stack(strips)
    expected = np.zeros((2 + 8 + 4 + 8, 7, 3), np.uint8)
    expected[:2, :3] = expected[10:14] = 9
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


# --- a submission ---------------------------------------------------------------------------------


def write(path: Path, rows: list[tuple[str, int, str]]) -> Path:
    lines = ["ImageId,EncodedPixels,ClassId", *(f"{n},{rle},{c}" for n, c, rle in rows)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def caption(text: str, width: int) -> np.ndarray:
    return add_caption(np.zeros((1, width, 3), np.uint8), text)[:BAR]


def test_the_first_strips_with_a_mask_are_drawn_in_their_order(tmp_path: Path) -> None:
    images = save_strips(tmp_path, ["d.png", "c.png", "b.png", "a.png"])
    height, width = SMALL
    rows = [
        ("d.png", 1, ""),
        ("c.png", 3, f"1 {20 * height}"),  # the first 20 columns
        ("c.png", 1, f"{50 * height + 1} {10 * height}"),
        ("b.png", 2, f"1 {5 * height}"),
        ("a.png", 1, "1 1"),
    ]
    path, rest = write(tmp_path / "out.csv", rows), BAR + height + GAP
    sheet = draw_submission(path, tmp_path, SEVERSTAL, most=2)
    assert sheet.shape == (2 * rest, width, 3)
    expected = {"c.png": ("class 1, class 3", (3, 0, 20), (1, 50, 60))}
    expected["b.png"] = ("class 2", (2, 0, 5), (2, 0, 0))
    for index, (name, (classes, *masks)) in enumerate(expected.items()):
        part = sheet[index * rest : (index + 1) * rest]
        np.testing.assert_array_equal(part[:BAR], caption(f"{name}   found: {classes}", width))
        drawn = part[BAR : BAR + height]
        untouched = np.ones(width, np.bool_)
        for label, first, last in masks:
            mask = np.zeros(SMALL, np.bool_)
            mask[:, first:last] = True
            untouched[first:last] = False
            off = np.abs(drawn[mask] - filled(images[name], mask, label)[mask])
            assert off.max(initial=0) < 1
        assert (drawn[:, untouched] == images[name][:, untouched, None]).all()
        assert not part[BAR + height :].any()
    assert draw_submission(path, tmp_path, SEVERSTAL).shape == (3 * rest, width, 3)


def test_a_mask_of_as_many_characters_as_a_spreadsheets_cell_is_drawn(tmp_path: Path) -> None:
    """No spreadsheet has saved what the kernel wrote."""
    save_strips(tmp_path, ["a.png"])
    path = write(tmp_path / "out.csv", [("a.png", 1, "1 3".ljust(SPREADSHEET_CELL))])
    assert draw_submission(path, tmp_path, SEVERSTAL).shape == (BAR + SMALL[0] + GAP, SMALL[1], 3)


def test_another_competitions_masks_are_drawn_by_its_rules(tmp_path: Path) -> None:
    """Along the rows from 0, in a size of their own, on an image in colour."""
    other = Competition(
        layouts=({"id": "{image}_{class}", "rle": "{mask}"},),
        classes=("Fish", "Sugar"),
        suffix=".png",
        run_order="rows",
        first_index=0,
        channels=3,
        mask_size=(20, 500),
    )
    colour = np.full((40, 1000, 3), (200, 100, 50), np.uint8)  # RGB
    PIL.Image.fromarray(colour).save(tmp_path / "a.png")
    (tmp_path / "out.csv").write_text("id,rle\na_Fish,\na_Sugar,0 1000\n")
    sheet = draw_submission(tmp_path / "out.csv", tmp_path, other)
    assert sheet.shape == (BAR + 20 + GAP, 500, 3)
    np.testing.assert_array_equal(sheet[:BAR], caption("a.png   found: class Sugar", 500))
    bgr = np.array([50, 100, 200])
    assert np.abs(sheet[BAR : BAR + 2] - (bgr + 0.45 * (COLOURS[1] - bgr))).max() < 1
    assert (sheet[BAR + 2 : BAR + 20] == bgr).all()


def test_a_submission_without_a_mask_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "out.csv", [("a.png", 1, "")])
    with pytest.raises(ValueError) as error:
        draw_submission(path, tmp_path, SEVERSTAL)
    assert str(error.value) == f"{path}: every mask is empty, there is nothing to draw"
