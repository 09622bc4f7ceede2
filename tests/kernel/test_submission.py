"""A submission is always whole."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import LAYOUTS, predict, read_submission, save_strips

from kernel.competition import SEVERSTAL, Competition
from kernel.rows import layouts_of
from kernel.submission import Submission


def test_writing_leaves_no_part_behind_and_keeps_every_row_in_order(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    path.write_text("an old file", encoding="utf-8")
    pairs = [("b.jpg", 2), ("a.jpg", 1)]
    submission = Submission(path, LAYOUTS["two-column"], pairs)
    submission.set_masks("a.jpg", {1: "3 4"})
    submission.save()
    assert path.read_bytes() == b"ImageId_ClassId,EncodedPixels\nb.jpg_2,\na.jpg_1,3 4\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["submission.csv"]


def test_a_submission_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    path.write_text("an old file", encoding="utf-8")

    def broken() -> Iterator[tuple[str, int]]:
        yield "a.jpg", 1
        raise OSError("no space left")

    with pytest.raises(OSError):
        Submission(path, LAYOUTS["two-column"], broken()).save()
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
    Submission(path, LAYOUTS["two-column"], [("a.jpg", 1)]).save()
    assert seen == ["an old file"]


def test_a_mask_that_no_row_asks_for_is_not_written(tmp_path: Path) -> None:
    submission = Submission(tmp_path / "out.csv", LAYOUTS["two-column"], [("a.jpg", 1)])
    submission.set_masks("a.jpg", {1: "3 4", 2: "5 6"})
    submission.set_masks("b.jpg", {1: "7 8"})
    submission.save()
    assert submission.n_rows == 1
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


def submission_of(folder: Path, competition: Competition = SEVERSTAL) -> Submission:
    """Two rows, the second with a mask."""
    pairs = [("a.jpg", 1), ("b.jpg", 2)]
    made = Submission(folder / "out.csv", layouts_of(competition)["two-column"], pairs)
    made.set_masks("b.jpg", {2: "3 4"})
    return made


def test_rows_of_empty_masks_are_left_out_where_asked_or_where_the_competition_has_none(
    tmp_path: Path,
) -> None:
    full, sparse = "ImageId_ClassId,EncodedPixels\na.jpg_1,\nb.jpg_2,3 4\n", "b.jpg_2,3 4\n"
    made, without = submission_of(tmp_path), submission_of(tmp_path, replace(SEVERSTAL, empty=None))
    for submission, asked, rows in ((made, True, 2), (made, False, 1), (without, True, 1)):
        submission.save(asked)
        assert submission.n_rows == rows
        text = submission.path.read_text()
        assert text == (full if rows == 2 else full.splitlines(keepends=True)[0] + sparse)
    made.set_masks("b.jpg", {2: ""})  # no mask takes none away
    made.save()
    assert made.n_rows == 2 and made.path.read_text() == full


def test_rows_are_saved_from_the_moment_on_that_the_last_save_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, now = submission_of(tmp_path), [99.9]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    made.next_s = 100.0
    made.save_throttled()
    assert not made.path.exists()
    now[0] = 100.0
    made.save_throttled()
    assert made.path.read_text().endswith("b.jpg_2,3 4\n")
    made.path = tmp_path / "nowhere" / "out.csv"
    made.save_throttled()
    assert made.next_s == 110.0
    [line] = caplog.messages
    assert line.startswith("cannot save the rows so far, going on: [Errno 2]")


def test_an_output_that_is_a_link_stays_one(session_light: Path, tmp_path: Path) -> None:
    save_strips(tmp_path / "images", ["a.png", "b.png"])
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "s.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("kept/s.csv")
    predict(session_light, tmp_path / "images", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert len(read_submission(tmp_path / "kept" / "s.csv")) == 8


def test_names_that_are_not_utf_8_and_a_line_break_keep_their_bytes(
    session_light: Path, tmp_path: Path
) -> None:
    names = [os.fsdecode(b"str\xe4hne.png"), "two\nlines.png"]
    save_strips(tmp_path / "images", names)
    record = predict(session_light, tmp_path / "images", tmp_path / "s.csv")
    assert record["faults"] == {}
    written = (tmp_path / "s.csv").read_bytes()
    assert b"\nstr\xe4hne.png," in written
    assert b'\n"two\nlines.png",' in written
