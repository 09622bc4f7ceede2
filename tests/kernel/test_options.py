"""Options: each on its command line, and what is refused before the first strip."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import LAYOUTS, save_strips

from kernel import inference
from kernel.options import Options, arguments_of, parse_options
from kernel.submission import Submission


@pytest.fixture
def images(tmp_path: Path) -> Path:
    save_strips(tmp_path / "images", ["a.png", "b.png"])
    return tmp_path / "images"


ALL_GIVEN = Options(
    input=Path("in"),
    bundle=Path("bundle"),
    images=Path("images"),
    sample=Path("sample.csv"),
    output=Path("out.csv"),
    layout="two-column",
    batch_size=3,
    early_exit=False,
    workers=4,
    worker=True,
    budget_s=66.75,
    strict=True,
    plain=True,
    allow_missing_members=True,
    report=Path("report.json"),
)


def test_every_option_comes_back_from_its_command_line() -> None:
    differ = [name for name, value in vars(Options()).items() if value != vars(ALL_GIVEN)[name]]
    assert differ == list(vars(Options()))
    assert parse_options(arguments_of(ALL_GIVEN)) == ALL_GIVEN
    assert parse_options([]) == Options()
    assert arguments_of(Options()) == []


NONSENSE: dict[str, tuple[dict[str, Any], str]] = {
    "a negative batch": ({"batch_size": -1}, "--batch-size -1"),
    "a batch beyond all numbers": ({"batch_size": 10**20}, "--batch-size 100000"),
    "negative workers": ({"workers": -2}, "--workers -2"),
    "no time": ({"budget_s": 0.0}, "--budget-s 0.0"),
    "time without end": ({"budget_s": math.inf}, "--budget-s inf"),
    "no number": ({"budget_s": math.nan}, "--budget-s nan"),
    "a report in no folder": ({"report": Path("nowhere/run.json")}, "--report nowhere/run.json"),
    "a report that is a folder": ({"report": Path(os.sep)}, f"--report {os.sep}: is no regular"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_on_the_command_line_is_refused_before_anything_is_written(
    case: str, session_light: Path, images: Path, tmp_path: Path
) -> None:
    options, message = NONSENSE[case]
    output = tmp_path / "submission.csv"
    asked = Options(bundle=session_light, images=images, output=output)
    with pytest.raises(ValueError, match=message.replace("/", r"\/")):
        inference.run_options(replace(asked, **options))
    assert not output.exists()


def test_a_report_in_the_place_of_the_submission_is_refused(
    session_light: Path, images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "submission.csv"
    (tmp_path / "link.json").symlink_to(output)
    for report in (output, tmp_path / "link.json"):
        options = Options(bundle=session_light, images=images, output=output, report=report)
        with pytest.raises(ValueError, match=r"--report .*: is --output too, and would replace it"):
            inference.run_options(options)


def test_an_output_that_is_no_regular_file_stays_what_it_is(
    session_light: Path, images: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # as /dev/null is
    options = Options(bundle=session_light, images=images, output=pipe)
    with pytest.raises(ValueError, match=r"--output .*pipe: is no regular file"):
        inference.run_options(options)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    Submission(pipe, LAYOUTS["two-column"], [("a.png", 1)]).save()  # written to, not replaced
    assert os.read(reader, 100) == b"ImageId_ClassId,EncodedPixels\na.png_1,\n"
    os.close(reader)
    assert pipe.is_fifo()


def test_the_record_does_not_replace_an_output_of_its_name(
    session_light: Path, images: Path, tmp_path: Path
) -> None:
    options = Options(bundle=session_light, images=images, output=tmp_path / "run.json")
    with pytest.raises(ValueError, match=r"--report .*run\.json: is --output too"):
        inference.run_options(options)
