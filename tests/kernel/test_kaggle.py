"""Where a script works that Kaggle runs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, exit_code

from kernel import inference, kaggle
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


BEGAN = """
import time
first_s = time.monotonic()
{code}
print(run_began(3600), first_s)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say it there")
@pytest.mark.parametrize("own", [True, False])
def test_a_script_began_with_its_process_and_a_module_when_it_is_called(own: bool) -> None:
    """A long-lived process may call the module's code, as the tests do."""
    code = Path(kaggle.__file__).read_text() if own else "from kernel.kaggle import run_began"
    before_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", BEGAN.format(code=code)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    began_s, first_s = map(float, done.stdout.split())
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    assert own == (before_s - tick_s <= began_s <= first_s)


@pytest.mark.parametrize("started", ["", "0", "1", "x", "9" * 18])  # ticks
def test_an_age_that_no_run_can_have_is_not_believed(
    started: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stat").write_text(f"1 (a) b) S {'7 ' * 18}{started}")
    monkeypatch.setattr(kaggle, "Path", lambda _: tmp_path / "stat")
    monkeypatch.setattr(kaggle, "__name__", "__main__")
    before_s = time.monotonic()
    assert kaggle.run_began(0.1) >= before_s


@pytest.mark.parametrize(("value", "scored"), [("1", True), ("True", True), ("", False)])
def test_any_value_but_an_empty_one_marks_the_scored_run(
    value: str, scored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SCORED_RUN, raising=False)
    assert not is_scored_run()
    monkeypatch.setenv(SCORED_RUN, value)
    assert is_scored_run() == scored
