"""Rows as they are written: a submission is always whole. How they are read: test_csv.py."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernel.rows import LAYOUTS, Submission, write_submission


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
