"""Where a script works that Kaggle runs."""

from pathlib import Path

import pytest
from helpers import exit_code

from kernel import inference
from kernel.kaggle import KAGGLE_RUN, SCORED_RUN, UNATTENDED, is_scored_run


@pytest.mark.parametrize(
    ("run_type", "there", "enters"),
    [
        (UNATTENDED, True, True),
        ("Interactive", True, False),  # somebody's relative paths
        (None, True, False),
        (UNATTENDED, False, False),
    ],
)
def test_only_an_unattended_run_goes_into_the_folder_of_its_output(
    run_type: str | None,
    there: bool,
    enters: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kernel.kaggle.WORKING", tmp_path / "working")
    monkeypatch.delenv(KAGGLE_RUN, raising=False)
    if run_type:
        monkeypatch.setenv(KAGGLE_RUN, run_type)
    if there:
        (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path)
    assert exit_code(inference.main, "--help") == 0
    assert Path.cwd() == (tmp_path / "working" if enters else tmp_path)


def test_a_folder_below_that_of_the_output_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a notebook that cloned a repository there: its paths are relative."""
    monkeypatch.setattr("kernel.kaggle.WORKING", tmp_path / "working")
    monkeypatch.setenv(KAGGLE_RUN, UNATTENDED)
    (tmp_path / "working" / "clone").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "working" / "clone")
    assert exit_code(inference.main, "--help") == 0
    assert Path.cwd() == tmp_path / "working" / "clone"


@pytest.mark.parametrize(("value", "scored"), [("1", True), ("True", True), ("", False)])
def test_any_value_but_an_empty_one_marks_the_scored_run(
    value: str, scored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SCORED_RUN, raising=False)
    assert not is_scored_run()
    monkeypatch.setenv(SCORED_RUN, value)
    assert is_scored_run() == scored
