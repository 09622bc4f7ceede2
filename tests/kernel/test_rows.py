"""Rows: both layouts are read and written as they stand, and a submission is always whole."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernel.rows import LAYOUTS, Submission, read_rows, write_submission

# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "line", "expected"),
    [
        ("ImageId_ClassId,EncodedPixels", "b.jpg_2,1 3", ("b.jpg", 2, "1 3")),
        ("EncodedPixels,ImageId_ClassId", "1 3,b.jpg_2", ("b.jpg", 2, "1 3")),
        ("ImageId,EncodedPixels,ClassId", "b.jpg,1 3,0", ("b.jpg", 0, "1 3")),
        ("ImageId,ClassId,EncodedPixels", "b.jpg,2,1 3", ("b.jpg", 2, "1 3")),
        ("ImageId_ClassId,EncodedPixels", "a_b_1.jpg_4,", ("a_b_1.jpg", 4, "")),
        ("ImageId,EncodedPixels,ClassId", "NA,,3", ("NA", 3, "")),
    ],
)
def test_a_csv_gives_its_rows_and_keeps_its_columns(
    header: str, line: str, expected: tuple[str, int, str], tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\n{line}\n", encoding="utf-8")
    layout, rows = read_rows(path)
    assert ",".join(layout.columns) == header
    assert rows == [expected]


def test_a_csv_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfImageId,EncodedPixels,ClassId\r\na.jpg,1 3,0\r\n")
    assert read_rows(path)[1] == [("a.jpg", 0, "1 3")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Id,EncodedPixels\na,\n", "header Id,EncodedPixels, expected ImageId_ClassId,Encoded"),
        ("ImageId,EncodedPixels\na,\n", "header ImageId,EncodedPixels, expected"),
        ("ImageId_ClassId,EncodedPixels\na.jpg_1,\nb.jpg,\n", "line 3: names no class: b.jpg"),
        ("ImageId_ClassId,EncodedPixels\na.jpg_x,\n", "line 2: names no class: a.jpg_x"),
        ("ImageId,EncodedPixels,ClassId\na.jpg,1 3,\n", "line 2: names no class"),
        ("ImageId,EncodedPixels,ClassId\na.jpg,1 3,-1\n", "line 2: names no class"),
        ("ImageId,EncodedPixels,ClassId\na.jpg,1 3,1.0\n", "line 2: names no class"),
        ("ImageId,EncodedPixels,ClassId\na.jpg,1 3\n", "line 2: 2 cells, the header has 3: a.jpg"),
        ("ImageId_ClassId,EncodedPixels\na.jpg_1,1 3,\n", "line 2: 3 cells, the header has 2"),
        ("", "line 0: header , expected"),
        (
            "ImageId,EncodedPixels,ClassId\na.jpg,1 3,1\nb.jpg,1 3,1,5,6\n",
            "line 3: 5 cells, the header has 3",
        ),
    ],
)
def test_a_csv_that_is_no_sample_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"rows\.csv: .*{message}"):
        read_rows(path)


# --- writing --------------------------------------------------------------------------------------


def test_writing_leaves_no_part_behind_and_keeps_every_row_in_order(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    path.write_text("an old file", encoding="utf-8")
    pairs = [("b.jpg", 2), ("a.jpg", 1)]
    write_submission(path, LAYOUTS["two-column"], pairs, {("a.jpg", 1): "3 4"})
    assert path.read_bytes() == b"ImageId_ClassId,EncodedPixels\nb.jpg_2,\na.jpg_1,3 4\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["submission.csv"]


def test_a_submission_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    path.write_text("an old file", encoding="utf-8")

    def broken() -> Iterator[tuple[str, int]]:
        yield "a.jpg", 1
        raise OSError("no space left")

    with pytest.raises(OSError):
        write_submission(path, LAYOUTS["two-column"], broken(), {})
    assert path.read_text(encoding="utf-8") == "an old file"


def test_a_reader_meets_only_whole_submissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "submission.csv"
    path.write_text("an old file", encoding="utf-8")
    seen = []
    write_text = Path.write_text

    def spied(written: Path, *arguments: Any, **named: Any) -> None:
        write_text(written, *arguments, **named)
        seen.append(path.read_text(encoding="utf-8"))

    monkeypatch.setattr(Path, "write_text", spied)
    write_submission(path, LAYOUTS["two-column"], [("a.jpg", 1)], {})
    assert seen == ["an old file"]


def test_a_mask_that_no_row_asks_for_is_not_written(tmp_path: Path) -> None:
    submission = Submission(tmp_path / "out.csv", LAYOUTS["two-column"], [("a.jpg", 1)])
    submission.set_masks("a.jpg", {1: "3 4", 2: "5 6"})
    submission.set_masks("b.jpg", {1: "7 8"})
    assert submission.save() == 1
    expected = b"ImageId_ClassId,EncodedPixels\na.jpg_1,3 4\n"
    assert (tmp_path / "out.csv").read_bytes() == expected


def test_the_next_save_waits_for_a_hundred_times_what_the_last_one_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submission = Submission(tmp_path / "out.csv", LAYOUTS["two-column"], [("a.jpg", 1)])
    ticks = iter([1000.0, 1000.5])  # before and after
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    submission.save()
    assert submission.next_s == 1050.5
