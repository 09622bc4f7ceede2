"""The command that checks a submission: its verdict is its exit code."""

from pathlib import Path

import pytest
from helpers import ROOT, error_of, exit_code, run_script, write_sample

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


def test_a_sample_that_is_missing_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = write_answer(tmp_path / "mine.csv", ["a.jpg"])
    assert exit_code(validate.main, answer, "--sample", tmp_path / "gone.csv") == 2
    assert "gone.csv" in error_of(capsys.readouterr().err)


def test_a_sample_of_another_competition_names_the_description_that_fits_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.csv").write_text("id,class,predicted\na_1,stomach,\n")
    assert exit_code(validate.main, tmp_path / "s.csv", "--sample", tmp_path / "s.csv") == 2
    message = error_of(capsys.readouterr().err)
    assert "line 1: header id,class,predicted, expected" in message
    assert message.endswith("it fits --competition uw-madison")
