"""Ground truth: a train.csv in both layouts, and the masks that it gives."""

from pathlib import Path

import numpy as np
import pytest

from kernel.competition import SEVERSTAL
from kernel.rows import SPREADSHEET_CELL
from training.ground_truth import check_names, decode_masks, read_truth

SIZE = (4, 6)

THREE_COLUMNS = """\
ImageId,ClassId,EncodedPixels
a.jpg,1,1 2
a.jpg,3,5 4
name_with_underscores.jpg,4,9 1
"""
TWO_COLUMNS = """\
ImageId_ClassId,EncodedPixels
a.jpg_1,1 2
a.jpg_2,
a.jpg_3,5 4
a.jpg_4,
clean.jpg_1,
clean.jpg_2,
name_with_underscores.jpg_4,9 1
"""


@pytest.mark.parametrize("text", [THREE_COLUMNS, TWO_COLUMNS], ids=["three-column", "two-column"])
def test_the_truth_is_the_same_in_both_layouts(text: str, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(text, encoding="utf-8")
    truth = read_truth(path, SEVERSTAL)
    assert {name: rles for name, rles in truth.items() if rles} == {
        "a.jpg": {1: "1 2", 3: "5 4"},
        "name_with_underscores.jpg": {4: "9 1"},
    }
    assert not truth.get("clean.jpg")


def test_a_mask_may_be_as_long_as_a_spreadsheets_cell_where_none_can_have_saved_it(
    tmp_path: Path,
) -> None:
    long = "1 2".ljust(SPREADSHEET_CELL)
    path = write(tmp_path, f"a.jpg,1,{long}\n")
    assert read_truth(path, SEVERSTAL, from_kernel=True) == {"a.jpg": {1: long}}
    with pytest.raises(ValueError, match="where spreadsheets cut a cell off"):
        read_truth(path, SEVERSTAL)


def test_decoded_truth_has_one_mask_a_class_and_empty_ones_for_the_rest() -> None:
    masks = decode_masks({"a": {1: "1 2", 3: "5 4"}}, "a", SIZE, SEVERSTAL)
    assert masks.shape == (4, *SIZE)
    assert masks.sum(axis=(-2, -1)).tolist() == [2, 0, 4, 0]
    assert [tuple(place) for place in np.argwhere(masks[0])] == [(0, 0), (1, 0)]  # down a column
    # pixels 5 to 8 of four-row columns are the second column
    assert [tuple(place) for place in np.argwhere(masks[2])] == [(row, 1) for row in range(4)]


def write(folder: Path, rows: str) -> Path:
    path = folder / "train.csv"
    path.write_text(f"ImageId,ClassId,EncodedPixels\n{rows}", encoding="utf-8")
    return path


REFUSED = {
    "class 0": ("a.jpg,1,1 2\nb.jpg,0,1 2\n", "line 3: b.jpg: class 0, expected 1, 2, 3, 4"),
    "class 5": ("a.jpg,5,1 2\n", "line 2: names no class: a.jpg,5,1 2; expected one of 1, 2, 3, 4"),
    "runs that overlap": ("a.jpg,3,1 100 50 100\n", "line 2: a.jpg, class 3: run 50 100 overlaps"),
    "nan": ("a.jpg,3,nan\n", "line 2: a.jpg, class 3: 'nan' is no number"),
    "a run without a length": ("a.jpg,3,1 2 3\n", "line 2: a.jpg, class 3: 3 numbers"),
    "a run from 0": ("a.jpg,3,0 2\n", "line 2: a.jpg, class 3: run 0 2 starts before pixel 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_ground_truth_is_refused_with_its_line_for(case: str, tmp_path: Path) -> None:
    rows, message = REFUSED[case]
    with pytest.raises(ValueError, match=rf"train\.csv: {message}"):
        read_truth(write(tmp_path, rows), SEVERSTAL)


def test_several_rows_of_a_pair_are_joined(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truth = read_truth(write(tmp_path, "a.jpg,3,5 4\na.jpg,1,1 1\na.jpg,3,1 2 8 3\n"), SEVERSTAL)
    assert truth == {"a.jpg": {3: "1 2 5 6", 1: "1 1"}}
    assert "1 masks come in several rows, which are joined: where the compet" in caplog.text


def test_a_ground_truth_of_other_images_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a,3,1 2\nb,1,1 2\n")  # ids without their suffix
    with pytest.raises(
        ValueError, match=r"none of its 2 images is in .*: it names 'a', .* 'a.jpg'"
    ):
        check_names(read_truth(path, SEVERSTAL), ["a.jpg", "b.jpg"], path, tmp_path)
    check_names(read_truth(path, SEVERSTAL), ["a", "c.jpg"], path, tmp_path)


def test_a_ground_truth_without_a_row_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    with pytest.raises(ValueError, match="no row below its header"):
        check_names(read_truth(path, SEVERSTAL), ["a.jpg"], path, tmp_path)


def test_a_mask_that_leaves_its_image_names_it() -> None:
    assert not decode_masks({}, "a.jpg", SIZE, SEVERSTAL).any()
    with pytest.raises(ValueError, match=r"the masks of a\.jpg: run 23 9 leaves an image of 24"):
        decode_masks({"a.jpg": {2: "23 9"}}, "a.jpg", SIZE, SEVERSTAL)
