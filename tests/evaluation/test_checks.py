"""Whether a run was clean: its answer, and what its record says."""

from pathlib import Path

import pytest
from helpers import LABELS, save_strips, write_sample
from run_records import a_record, run_json

from evaluation.checks import Check, ProcessResult, check_answer, check_process, check_record
from kernel.competition import SEVERSTAL
from kernel.rows import SPREADSHEET_CELL
from kernel.strip_state import TOO_LATE


@pytest.mark.parametrize("layout", ["three-column", "two-column"])
def test_a_valid_answer_is_named_with_the_rows_it_has(layout: str, tmp_path: Path) -> None:
    """Some layouts leave out empty masks; a mask may be as long as a spreadsheet's cell."""
    save_strips(tmp_path / "test_images", ["a.jpg", "b.jpg"])
    sample = write_sample(tmp_path / "sample.csv", ["a.jpg", "b.jpg"], layout)
    header, rle = sample.read_text().split("\n")[0], "1 3".ljust(SPREADSHEET_CELL)
    rows = [f"a.jpg,{rle},1"]
    if layout == "two-column":
        rows = [f"{name}_{label},{rle}" for name in ("a.jpg", "b.jpg") for label in LABELS]
    answer = tmp_path / "submission.csv"
    answer.write_text("\n".join([header, *rows, ""]))
    valid, *_ = check_answer(answer, sample, tmp_path / "test_images", SEVERSTAL)
    assert valid == Check(True, f"submission.csv is valid: {len(rows)} rows")


def test_another_layout_than_the_sample_s_is_one_that_was_asked_for(tmp_path: Path) -> None:
    """But what is no layout of the competition Kaggle refuses."""
    save_strips(tmp_path / "test_images", ["a.jpg"])
    sample = write_sample(tmp_path / "sample.csv", ["a.jpg"], "three-column")
    answer = tmp_path / "submission.csv"
    rows = [f"a.jpg_{label},1 3" for label in LABELS]
    answer.write_text("\n".join(["ImageId_ClassId,EncodedPixels", *rows, ""]))
    found = check_answer(answer, sample, tmp_path / "test_images", SEVERSTAL)
    assert found[:2] == [
        Check(True, "submission.csv is valid: 4 rows"),
        Check(
            None,
            "its header is ImageId_ClassId,EncodedPixels, as --layout may ask, the sample's is "
            "ImageId,EncodedPixels,ClassId",
        ),
    ]
    answer.write_text("ImageId,ClassId,EncodedPixels\na.jpg,1,1 3\n")  # the columns moved
    [refused] = check_answer(answer, sample, tmp_path / "test_images", SEVERSTAL)
    assert refused.ok is False and "header ImageId,ClassId,EncodedPixels, not " in refused.words


def test_masks_that_are_valid_but_unlikely_are_named_and_decide_nothing(tmp_path: Path) -> None:
    save_strips(tmp_path / "test_images", ["a.jpg"])
    sample = write_sample(tmp_path / "sample.csv", ["a.jpg"], "three-column")
    answer = tmp_path / "submission.csv"
    answer.write_text(sample.read_text().split("\n")[0] + "\n")
    valid, warning = check_answer(answer, sample, tmp_path / "test_images", SEVERSTAL)
    assert (valid.ok, warning.ok) == (True, None)
    assert warning.words.startswith("all masks are empty")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (2, "the kernel ended with exit code 2"),
        (-11, "the kernel ended by signal 11"),
        (-9, "the kernel was ended by signal 9, as by a system that is short of memory; Kaggle's"),
    ],
)
def test_a_process_that_a_signal_ended_has_no_exit_code(code: int, words: str) -> None:
    ended, _ = check_process(ProcessResult(code, 1.0, True, 1))
    assert not ended.ok
    assert ended.words.startswith(words)


@pytest.mark.parametrize(("peak_bytes", "named"), [(25 * 10**9, False), (45 * 10**9, True)])
def test_memory_that_kaggle_may_lack_is_named_and_decides_nothing(
    peak_bytes: int, named: bool
) -> None:
    *_, memory = check_process(ProcessResult(0, 1.0, True, peak_bytes))
    assert (memory.ok is None) == ("held 45 GB of memory here" in memory.words) == named


def test_strips_that_no_time_was_left_for_are_counted_apart() -> None:
    faults = {"4.jpg": TOO_LATE, "5.jpg": TOO_LATE, "6.jpg": "no image"}
    said = {check.words: check.ok for check in check_record(a_record(faults=faults))}
    assert said["strips that failed: 1; the first: 6.jpg: no image"] is False
    words = "no time was left here for 2 strips: they stay empty"
    assert said[words] is None
    assert Check(False, words) in check_record(a_record(faults=faults, work={}))


def test_a_pass_that_gave_nan_is_no_clean_run() -> None:
    assert all(check.ok for check in check_record(a_record(faults={})))
    work = run_json()["work"]
    work["2.jpg"]["nan"] = [2]
    said = [check.words for check in check_record(a_record(work=work)) if check.ok is False]
    assert "b/none gave NaN, for up to 1 strips" in said
