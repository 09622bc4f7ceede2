"""What a user or a machine brings beside strips and bundle: refused before the first strip."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import predict, read_submission, run_script, save_strips, write_sample

from kernel import inference, workers
from kernel.mounts import find_one, list_images
from kernel.options import Options, arguments_of, parse_options
from kernel.rows import LAYOUTS
from kernel.scheduling import Scheduler
from kernel.strip_state import StripState
from kernel.submission import Submission
from kernel.task import find_task


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
    streams=2,
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
    "no streams": ({"streams": 0}, "--streams 0"),
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


def test_an_output_that_is_a_link_stays_one(
    session_light: Path, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "s.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("kept/s.csv")
    predict(session_light, images, tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert len(read_submission(tmp_path / "kept" / "s.csv")) == 8


def test_a_strip_that_was_not_predicted_is_a_fault(
    session_light: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(*_: Any) -> Iterator[StripState]:
        yield from ()

    monkeypatch.setattr(Scheduler, "predict_strips", forgetful)
    record = predict(session_light, images, tmp_path / "submission.csv")
    assert record["faults"] == dict.fromkeys(["a.png", "b.png"], "was not predicted")


# --- the machine ----------------------------------------------------------------------------------


def test_linked_folders_are_searched_and_a_circle_ends(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere"
    save_strips(real / "test_images", ["a.png"])
    write_sample(real / "sample_submission.csv", ["a.png"])
    root = tmp_path / "input"
    root.mkdir()
    (root / "severstal").symlink_to(real)
    (real / "back").symlink_to(root)
    assert find_one(root, "sample_submission.csv", "", "") == root / "severstal"
    task = find_task(Options(input=root))
    assert task.images == root / "severstal" / "test_images"
    assert task.names == ["a.png"]


def test_only_images_that_are_not_hidden_are_listed(images: Path) -> None:
    (images / ".DS_Store").write_bytes(b"\0")
    (images / "._a.png").write_bytes(b"\0")
    (images / ".ipynb_checkpoints").mkdir()
    (images / "notes.txt").write_text("")
    (images / "folder.png").mkdir()
    assert list_images(images) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, ["0", "1", "0"]), ("2,5", ["2", "5", "2"]), ("", ["", "", ""]), ("3", ["3"] * 3)],
)
def test_a_worker_takes_a_gpu_of_those_that_are_visible(
    visible: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that are there, where there are more workers than that."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert workers.gpus_of(3) == expected


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


PRINTS = """
import sys
from kernel.command import run_command
from kernel.logs import log
def main():
    for _ in range(20000):
        log.info("mean → 0.55 × \\udce4")
        {also}
    open("done", "w").close()
    return 0
run_command(main)
"""


@pytest.mark.parametrize("also", ["pass", "print('×')"])
def test_a_terminal_of_ascii_alone_stops_nothing(also: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PRINTS.format(also=also).replace("20000", "2"), encoding="utf-8")
    root = str(Path(inference.__file__).parents[1])
    done = run_script(script, cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONPATH=root)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2192" in done.stdout


@pytest.mark.parametrize("shell", ["{run} | head -n 1", "{run} >&-"])
def test_a_log_that_nobody_reads_any_more_stops_no_run(shell: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PRINTS.format(also="pass"), encoding="utf-8")
    root = str(Path(inference.__file__).parents[1])
    command = shell.format(run=f"PYTHONPATH={root} {sys.executable} {script}")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert (tmp_path / "done").exists()
