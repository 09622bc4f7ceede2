"""The command that checks a submission: its verdict is its exit code."""

import json
from pathlib import Path

import pytest
from helpers import ROOT, error_of, exit_code, run_script, save_strips, write_sample

from evaluation import validate

COMMAND = ROOT / "evaluation" / "validate.py"


def write_answer(path: Path, names: list[str]) -> Path:
    """A submission of these images, a mask a row."""
    lines = [f"{name},1 3,{label}" for name in names for label in (1, 2, 3, 4)]
    path.write_text("\n".join(["ImageId,EncodedPixels,ClassId", *lines, ""]), encoding="utf-8")
    return path


def test_a_valid_submission_ends_the_command_with_code_0(tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "sample.csv", ["b.jpg", "a.jpg"])
    answer = write_answer(tmp_path / "mine.csv", ["b.jpg", "a.jpg"])
    done = run_script(COMMAND, answer, "--sample", sample)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "valid"


def test_an_invalid_submission_ends_the_command_with_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = write_sample(tmp_path / "sample.csv", ["b.jpg", "a.jpg"])
    answer = write_answer(tmp_path / "mine.csv", ["a.jpg", "b.jpg"])
    assert exit_code(validate.main, answer, "--sample", sample) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("INVALID")


@pytest.mark.parametrize(
    ("name", "fault"), [("gone.csv", "no such file or folder"), (".", "a folder, expected a file")]
)
def test_a_submission_that_is_no_file_is_no_verdict(
    name: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = write_sample(tmp_path / "sample.csv", ["a.jpg"])
    assert exit_code(validate.main, tmp_path / name, "--sample", sample) == 2
    captured = capsys.readouterr()
    assert error_of(captured.err).startswith(f"{tmp_path / name}: {fault}")
    assert "INVALID" not in captured.out


def test_a_sample_that_is_missing_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = write_answer(tmp_path / "mine.csv", ["a.jpg"])
    assert exit_code(validate.main, answer, "--sample", tmp_path / "gone.csv") == 2
    assert "gone.csv" in error_of(capsys.readouterr().err)


def test_a_folder_of_images_that_is_not_there_is_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = write_sample(tmp_path / "sample.csv", ["a.jpg"])
    answer = write_answer(tmp_path / "mine.csv", ["a.jpg"])
    named = ("--sample", sample, "--images", tmp_path / "gone")
    assert exit_code(validate.main, answer, *named) == 2
    assert "gone: no such folder of images" in error_of(capsys.readouterr().err)


def test_a_folder_of_some_of_the_images_is_a_warning_and_one_of_none_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = write_sample(tmp_path / "sample.csv", ["a.jpg", "b.jpg"])
    answer = write_answer(tmp_path / "mine.csv", ["a.jpg", "b.jpg"])
    named = ("--sample", sample, "--images", tmp_path / "images")
    save_strips(tmp_path / "images", ["c.jpg"])
    assert exit_code(validate.main, answer, *named) == 2
    error = error_of(capsys.readouterr().err)
    assert error.startswith(
        f"--images {tmp_path / 'images'}: has none of the sample's images, such"
    )
    save_strips(tmp_path / "images", ["a.jpg"])
    assert exit_code(validate.main, answer, *named) == 0
    out = capsys.readouterr().out
    assert "warning: 1 images with a mask are not in" in out and out.endswith("\nvalid\n")


HEADERS = {
    "id,class,predicted": "it fits --competition uw-madison",
    "EncodedPixels,Image_Label": "it fits --competition clouds",
    "Image_Labels,EncodedPixels": "the nearest that ships is clouds; build_kernel.py --new-compet",
    "what,ever": "EncodedPixels,ClassId; build_kernel.py --new-competition proposes a description",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_sample_of_another_competition_names_the_description_that_is_nearest(
    header: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.csv").write_text(f"{header}\na_1,stomach,\n")
    assert exit_code(validate.main, tmp_path / "s.csv", "--sample", tmp_path / "s.csv") == 2
    message = error_of(capsys.readouterr().err)
    assert f"line 1: header {header}, expected" in message
    assert HEADERS[header] in message


@pytest.mark.parametrize(("empty", "said"), [("", True), ("1 0", False)])
def test_a_sample_that_writes_empty_masks_otherwise_than_described_is_named(
    empty: str, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sample, mine = tmp_path / "sample.csv", tmp_path / "mine.json"
    layout = {"id": "{image}", "rle": "{mask}"}
    described = {"slug": "vessels", "layouts": [layout], "classes": ["vessel"], "empty": empty}
    mine.write_text(json.dumps(described))
    sample.write_text("id,rle\na.tif,1 5\nb.tif,1 0\n")
    answer = tmp_path / "mine.csv"
    answer.write_text(f"id,rle\na.tif,1 5\nb.tif,{empty}\n")
    assert exit_code(validate.main, answer, "--sample", sample, "--competition", mine) == 0
    assert (
        f"{sample}: '1 0' has no pixel, and the description's `empty` is ''" in caplog.text
    ) == said


def test_a_sample_of_instances_is_refused_whatever_its_description_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample, mine = tmp_path / "sample.csv", tmp_path / "mine.json"
    layout = {"ImageId": "{image}", "EncodedPixels": "{mask}"}
    mine.write_text(json.dumps({"slug": "ships", "layouts": [layout], "classes": ["ship"]}))
    sample.write_text("ImageId,EncodedPixels\na.jpg,1 2\nb.jpg,\na.jpg,9 2\na.jpg,5 2\n")
    words = (sample, "--sample", sample, "--competition", mine)
    assert exit_code(validate.main, *words) == 2
    message = error_of(capsys.readouterr().err)
    assert f"{sample}: a.jpg has 3 rows of class ship: it scores instances" in message
