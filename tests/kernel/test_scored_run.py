"""The scored run: complete rows and exit code 0, whatever would be refused elsewhere."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from helpers import (
    LABELS,
    SMALL,
    error_of,
    exit_code,
    read_submission,
    run_script,
    sample_text,
    save_strips,
    write_sample,
)

from kernel import inference
from kernel.competition import SEVERSTAL, Competition, load_competition
from kernel.manifest import MANIFEST
from kernel.mounts import SAMPLE
from kernel.run_context import RunContext
from kernel.task import Task, read_sample
from kernel.worker import write_rows

SCORED = "KAGGLE_IS_COMPETITION_RERUN"
NAMES = ["b.png", "a.png"]
EMPTY = {(name, label): "" for name in NAMES for label in LABELS}


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """The competition's folder below /kaggle/input: a sample and its strips."""
    folder = tmp_path / "input" / "competitions" / SEVERSTAL.slug
    save_strips(folder / "test_images", NAMES)
    write_sample(folder / SAMPLE, NAMES)
    return folder


def words_of(bundle: Path, mounted: Path) -> list[object]:
    """The command line; its output is out.csv beside the mounted folder's root."""
    root = mounted.parent.parent
    return ["--bundle", bundle, "--input", root, "--output", root.parent / "out.csv"]


def output_of(mounted: Path) -> Path:
    return mounted.parents[2] / "out.csv"


def errors_in(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno == logging.ERROR]


# --- samples that the description does not fit ----------------------------------------------------

DESCRIPTION: dict[str, Any] = {
    "slug": "severstal-steel-defect-detection",
    "layouts": [{"id": "{image}_{class}", "rle": "{mask}", "set": "public"}],
    "empty": "-1",
}
ODD_SAMPLES = {  # sample → submission
    "classes that are not known": (
        "id,rle,set\na.png_0,1 6144,public\na.png_5,1 6144,public\n",
        "id,rle,set\na.png_0,-1,public\na.png_5,-1,public\n",
    ),
    "one more column": (
        'id,rle,set,note\na.png_1,1 6144,public,"a, b"\n',
        'id,rle,set,note\na.png_1,-1,public,"a, b"\n',
    ),
    "a cell too many": (
        "id,rle,set\na.png_1,1 6144,public,\n",
        "id,rle,set\na.png_1,-1,public,\n",
    ),
    "a header without the mask's": ("id,codes\na.png_1,1 6144\n", "id,codes\na.png_1,1 6144\n"),
    "an open quote": (
        'id,rle,set\n"a.png_1,1 6144,public\n',
        'id,rle,set\n"a.png_1,1 6144,public\n',
    ),
}


@pytest.mark.parametrize("case", ODD_SAMPLES)
@pytest.mark.parametrize("scored", [True, False])
def test_a_sample_that_does_not_fit_gives_its_own_lines_without_masks(
    case: str,
    scored: bool,
    light_bundle: Path,
    mounted: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(SCORED, "1" if scored else "")
    (light_bundle / "competition.json").write_text(json.dumps(DESCRIPTION))
    sample, expected = ODD_SAMPLES[case]
    (mounted / SAMPLE).write_text(sample)
    code = exit_code(inference.main, *words_of(light_bundle, mounted))
    if not scored:
        assert code == 2
        assert f"{mounted / SAMPLE}: line " in error_of(capsys.readouterr().err)
        assert not output_of(mounted).exists()
        return
    assert code == 0
    assert output_of(mounted).read_text() == expected
    [error] = errors_in(caplog)
    assert f"{mounted / SAMPLE}: line " in error.getMessage()
    assert not error.exc_info


ODD_ROWS = {  # row → the same without its mask
    "a class that is not known": ("a.png_5,1 6144,public", "a.png_5,-1,public"),
    "nothing but separators": (",,", ",-1,"),
    "a cell too many": ('b.png_2,1 6144,public,"a, b"', 'b.png_2,-1,public,"a, b"'),
    "a cell too few": ("b.png_2", "b.png_2"),
}


@pytest.mark.parametrize("case", ODD_ROWS)
def test_a_row_that_does_not_fit_stays_without_its_mask_and_costs_the_others_nothing(
    case: str,
    light_bundle: Path,
    mounted: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(SCORED, "1")
    (light_bundle / "competition.json").write_text(json.dumps(DESCRIPTION))
    odd, blanked = ODD_ROWS[case]
    first, last, texts = "a.png_1,1 6144,public\n", "b.png_1,1 6144,public\n", list[str]()
    for lines in (first + last, f"{first}{odd}\n{odd}\n{last}"):
        (mounted / SAMPLE).write_text(f"id,rle,set\n{lines}")
        assert exit_code(inference.main, *words_of(light_bundle, mounted)) == 0
        texts.append(output_of(mounted).read_text())
    assert f"{mounted / SAMPLE}: 2 rows do not fit the description, such as" in caplog.text
    header, *rows = texts[0].splitlines()
    assert all(row.split(",")[1] != "-1" for row in rows)
    assert texts[1].splitlines() == [header, rows[0], blanked, blanked, rows[1]]


def test_a_row_that_does_not_fit_is_no_workers(light_bundle: Path, mounted: Path) -> None:
    (light_bundle / "competition.json").write_text(json.dumps(DESCRIPTION))
    rows = ["a.png_1,1 6144,public", *(odd for odd, _ in ODD_ROWS.values()), "b.png_1,,public"]
    (mounted / SAMPLE).write_text("\n".join(["id,rle,set", *rows, ""]))
    words = *words_of(light_bundle, mounted), "--workers", 2
    done = run_script(light_bundle / "inference.py", *words, KAGGLE_IS_COMPETITION_RERUN="1")
    assert done.returncode == 0, done.stderr
    record = json.loads(output_of(mounted).with_name("run.json").read_text())
    assert (record["workers"], record["strips"], record["faults"]) == (2, 2, {})
    _, first, *odd, last = output_of(mounted).read_text().splitlines()
    assert odd == [blanked for _, blanked in ODD_ROWS.values()]
    assert "-1" not in (first.split(",")[1], last.split(",")[1])


def test_a_row_that_does_not_fit_is_refused_elsewhere(
    light_bundle: Path, mounted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = mounted / SAMPLE
    sample.write_text(sample.read_text() + ",,\n")
    assert exit_code(inference.main, *words_of(light_bundle, mounted)) == 2
    n_lines = len(sample.read_text().splitlines())
    assert f"{sample}: line {n_lines}: names no class" in error_of(capsys.readouterr().err)


@pytest.mark.parametrize("scored", [True, False])
def test_a_cell_that_a_template_does_not_fill_in_stays_the_rows_own(
    scored: bool, light_bundle: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SCORED, "1" if scored else "")
    description = DESCRIPTION | {"any_class": "all"}
    (light_bundle / "competition.json").write_text(json.dumps(description))
    (mounted / SAMPLE).write_text("id,rle,set\na.png_1,-1,public\na.png_2,-1,\nb.png_all,-1,new\n")
    assert exit_code(inference.main, *words_of(light_bundle, mounted)) == 0
    rows = [line.split(",") for line in output_of(mounted).read_text().splitlines()[1:]]
    public, new = [["a.png_1", "public"], ["a.png_2", ""]], [f"b.png_{label}" for label in LABELS]
    assert [[row[0], row[2]] for row in rows] == [*public, *([name, "new"] for name in new)]
    assert len({row[1] for row in rows}) > 1  # masks


def test_a_rows_own_cell_goes_through_a_workers_files(tmp_path: Path) -> None:
    competition = Competition(layouts=tuple(DESCRIPTION["layouts"]))
    sample, shard = tmp_path / "sample.csv", tmp_path / "1.sample"
    sample.write_text("id,rle,set\na.png_1,,public\na.png_2,,private\n")
    layout, pairs = read_sample(sample, competition)
    write_rows(shard, Task(tmp_path, layout, pairs))
    assert shard.read_text() == sample.read_text()
    for asked in (None, "three-column"):
        given, _ = read_sample(shard, competition, asked)
        assert given.line("a.png", 2, "1 3") == "a.png_2,1 3,private\n"


# --- images, bundle and options -------------------------------------------------------------------


Refused = tuple[Callable[[Path], object], tuple[str, ...], str]
REFUSED: dict[str, Refused] = {  # what is changed, words → what the error says
    "no images": (
        lambda mounted: shutil.rmtree(mounted / "test_images"),
        (),
        "no folder or zip below",
    ),
    "no bundle": (lambda _: None, ("--bundle", "nowhere"), "nowhere/ensemble.json: no such file"),
    "an option": (lambda _: None, ("--batch-size", "-1"), "--batch-size -1"),
    "a layout": (lambda _: None, ("--layout", "ten-column"), "--layout 'ten-column'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_elsewhere_leaves_the_empty_rows(
    case: str,
    session_light: Path,
    mounted: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, words, reason = REFUSED[case]
    change(mounted)
    command = *words_of(session_light, mounted), *words
    assert exit_code(inference.main, *command) == 2
    assert reason in error_of(capsys.readouterr().err)
    output_of(mounted).unlink(missing_ok=True)
    caplog.clear()
    monkeypatch.setenv(SCORED, "1")
    assert exit_code(inference.main, *command) == 0
    if case == "a layout":  # none to write by: the sample's own lines
        assert output_of(mounted).read_text() == sample_text(NAMES).replace("1 6144", "")
    else:
        assert read_submission(output_of(mounted)) == EMPTY
    [error] = errors_in(caplog)
    assert reason in error.getMessage()


@pytest.mark.parametrize("named", [True, False])
def test_without_a_description_that_can_be_read_the_rows_are_severstals(
    named: bool, light_bundle: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SCORED, "1")
    (light_bundle / "competition.json").write_text("{")
    words = words_of(light_bundle, mounted)
    assert exit_code(inference.main, *(words if named else words[2:])) == 0
    assert read_submission(output_of(mounted)) == EMPTY


def test_without_a_sample_there_is_nothing_to_write_and_the_run_is_refused(
    session_light: Path,
    mounted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(SCORED, "1")
    (mounted / SAMPLE).unlink()
    assert exit_code(inference.main, *words_of(session_light, mounted)) == 2
    assert f"no {SAMPLE} under" in error_of(capsys.readouterr().err)
    assert not output_of(mounted).exists()


def test_a_worker_refuses_what_it_always_refuses(
    session_light: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process sees by its exit code that another would not help."""
    monkeypatch.setenv(SCORED, "1")
    monkeypatch.setattr(inference, "end_with_parent", lambda: None)
    shutil.rmtree(mounted / "test_images")
    assert exit_code(inference.main, *words_of(session_light, mounted), "--worker") == 2
    assert not output_of(mounted).exists()


def test_a_disk_that_is_almost_full_may_have_room_for_the_rows(
    session_light: Path,
    mounted: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Usage:
        free = 49_000_000

    monkeypatch.setenv(SCORED, "1")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    assert exit_code(inference.main, *words_of(session_light, mounted)) == 0
    rows = read_submission(output_of(mounted))
    assert rows.keys() == EMPTY.keys()
    assert any(rows.values())
    assert any("49 MB free, 50 needed" in line for line in caplog.messages)


# --- errors and bugs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "error"),
    [("find_task", TypeError("a bug")), ("unpack_images", ValueError("the zip is damaged"))],
)
def test_an_error_before_the_first_strip_leaves_the_empty_rows_and_a_bug_its_traceback(
    step: str,
    error: Exception,
    session_light: Path,
    mounted: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> Task:
        raise error

    monkeypatch.setattr(inference, step, fail)
    with pytest.raises((TypeError, SystemExit)):
        inference.main([str(word) for word in words_of(session_light, mounted)])
    output_of(mounted).unlink(missing_ok=True)
    monkeypatch.setenv(SCORED, "1")
    assert exit_code(inference.main, *words_of(session_light, mounted)) == 0
    assert read_submission(output_of(mounted)) == EMPTY
    [logged] = errors_in(caplog)
    assert str(error) in logged.getMessage()
    assert bool(logged.exc_info) == isinstance(error, TypeError)


def test_a_bug_among_the_strips_leaves_those_that_are_done(
    session_light: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict_half(context: RunContext, _: Task) -> None:
        context.submission.set_masks("a.png", {2: "1 3"})
        raise TypeError("a bug")

    monkeypatch.setenv(SCORED, "1")
    monkeypatch.setattr(inference, "predict", predict_half)
    assert exit_code(inference.main, *words_of(session_light, mounted)) == 0
    assert read_submission(output_of(mounted)) == EMPTY | {("a.png", 2): "1 3"}


# --- the script as Kaggle runs it -----------------------------------------------------------------


def test_workers_too_leave_out_a_member_that_cannot_be_used(dataset: Path, mounted: Path) -> None:
    (dataset / "unet-a.safetensors").write_bytes(b"cut")
    words = *words_of(dataset, mounted), "--workers", "2"
    done = run_script(dataset / "inference.py", *words, KAGGLE_IS_COMPETITION_RERUN="1")
    assert done.returncode == 0
    assert done.stdout.count("ERROR going on without member unet-a") == 2
    record = json.loads(output_of(mounted).with_name("run.json").read_text())
    assert {each["member"] for each in record["passes"]} == {"fpn-b", "unet-c"}
    assert (record["workers"], record["faults"]) == (2, {})
    rows = read_submission(output_of(mounted))
    assert rows.keys() == EMPTY.keys()
    assert any(rows.values())


@pytest.mark.parametrize("scored", [True, False])
def test_a_strip_that_fails_ends_no_scored_run_with_an_error(
    scored: bool, light_bundle: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever --strict says: Kaggle takes no output then."""
    monkeypatch.setenv(SCORED, "1" if scored else "")
    (mounted / "test_images" / NAMES[0]).write_bytes(b"x")
    words = [*words_of(light_bundle, mounted), "--strict"]
    assert exit_code(inference.main, *words) == (0 if scored else 1)


def test_the_time_in_which_the_rows_are_written_is_the_runs(
    light_bundle: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow mount the first look for the sample takes long, in a notebook its own cells."""
    now, starts = [1000.0], list[float | None]()

    def write_slowly(*_: object) -> bool:
        now[0] += 90
        return True

    def run(_: object, start: float | None, *__: object) -> None:
        starts.append(start)
        raise ValueError

    monkeypatch.setenv(SCORED, "1")
    monkeypatch.setattr(inference, "run_began", lambda _: 700.0)
    monkeypatch.setattr(inference, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(inference, "write_empty_rows", write_slowly)
    monkeypatch.setattr(inference, "run", run)
    words = words_of(light_bundle, mounted)
    assert exit_code(inference.main, *words) == 0
    assert exit_code(inference.main, *words, "--budget-s", "600") == 0  # that of what it runs now
    assert starts == [700.0, 1090.0]


# --- what only informs, and what hangs ------------------------------------------------------------


@pytest.mark.parametrize("scored", [True, False])
def test_nothing_is_looked_at_again_that_only_informs(
    scored: bool,
    session_light: Path,
    mounted: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody sees it, and a read may hang when all is written."""
    monkeypatch.setenv(SCORED, "1" if scored else "")
    for name in NAMES:
        colour = np.zeros((*SMALL, 3), np.uint8) + np.array([0, 90, 200], np.uint8)
        cv2.imwrite(str(mounted / "test_images" / name), colour)
    assert exit_code(inference.main, *words_of(session_light, mounted)) == 0
    record = json.loads(output_of(mounted).with_name("run.json").read_text())
    assert scored != ("validate" in record["stages"])
    assert scored != ("the run goes on" in caplog.text)


HANG = """
import sys, threading
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv.pop(1))
import inference as kernel

kernel.LOOK_S = 0.5
kernel.predict = lambda *_: kernel.Outcome()  # before the watchdog ends it
step = sys.argv.pop(1)
if step:
    setattr(kernel, step, lambda *_: threading.Event().wait())
kernel.main(sys.argv[1:])
"""


@pytest.mark.parametrize("step", ["find_task", "write_run_record"])
def test_what_hangs_before_or_behind_the_watchdog_ends_with_the_rows(
    step: str, session_light: Path, mounted: Path, tmp_path: Path
) -> None:
    script = tmp_path / "hang.py"
    script.write_text(HANG, encoding="utf-8")
    words = (session_light, step, *words_of(session_light, mounted), "--budget-s", 10)
    done = run_script(script, *words, KAGGLE_IS_COMPETITION_RERUN="1")
    assert done.returncode == 0, done.stderr
    assert read_submission(output_of(mounted)).keys() == EMPTY.keys()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no file that hangs")
def test_a_bundle_that_hangs_costs_no_rows(
    session_light: Path, mounted: Path, tmp_path: Path
) -> None:
    """As a file on a disk that does not answer."""
    script, dataset = tmp_path / "hang.py", mounted.parents[1] / "datasets" / "me" / "other"
    script.write_text(HANG, encoding="utf-8")
    dataset.mkdir(parents=True)
    os.mkfifo(dataset / MANIFEST)
    words = session_light, "", *words_of(session_light, mounted)[2:], "--budget-s", 10
    done = run_script(script, *words, KAGGLE_IS_COMPETITION_RERUN="1")
    assert done.returncode == 0, done.stderr
    assert "no competition is found in" in done.stdout
    assert read_submission(output_of(mounted)) == EMPTY


@pytest.mark.parametrize("found_s", [0.0, 1.0])
def test_the_time_of_a_run_is_its_competitions_however_slow_the_first_look_is(
    found_s: float, light_bundle: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run of nine hours would end within Severstal's one."""
    lefts = list[float]()

    def slowly(bundle: Path) -> Competition:
        time.sleep(found_s)
        return load_competition(bundle)

    @contextmanager
    def spied(seconds: float) -> Iterator[None]:
        lefts.append(seconds)
        yield

    described = asdict(replace(SEVERSTAL, time_limit_s=32400.0))
    (light_bundle / "competition.json").write_text(json.dumps(described), encoding="utf-8")
    monkeypatch.setenv(SCORED, "1")
    monkeypatch.setattr(inference, "LOOK_S", 0.2)
    monkeypatch.setattr(inference, "load_competition", slowly)
    monkeypatch.setattr(inference, "ended_after", spied)
    assert exit_code(inference.main, *words_of(light_bundle, mounted)) == 0
    first_s, last_s = lefts
    assert 32300 < last_s < 32370
    assert (first_s < 3600) == bool(found_s)


SAID = """
import atexit, logging, logging.handlers, os, sys

logging.basicConfig(handlers=[logging.handlers.MemoryHandler(9999, 99)], level=logging.INFO)
logging.getLogger().handlers[0].setTarget(logging.StreamHandler(sys.stderr))
atexit.register(os.abort)
print("said first")
print("said too", end="", file=sys.stderr)
"""


def test_nothing_at_the_interpreters_end_fails_a_scored_run_and_all_it_said_is_written(
    session_light: Path, mounted: Path, tmp_path: Path
) -> None:
    """A thread that reads an image then may abort it."""
    script = tmp_path / "said.py"
    script.write_text(SAID + (session_light / "inference.py").read_text(), encoding="utf-8")
    words = words_of(session_light, mounted)
    done = run_script(script, *words, KAGGLE_IS_COMPETITION_RERUN="1")
    assert done.returncode == 0, done.stderr
    assert read_submission(output_of(mounted)).keys() == EMPTY.keys()
    assert output_of(mounted).with_name("run.json").is_file()
    assert done.stdout == "said first\n"
    assert done.stderr.startswith("said too") and "non-empty masks" in done.stderr


RUNNER = """
import runpy, sys
sys.argv[:1] = []
runpy.run_path(sys.argv[0], run_name="__main__")
print("went on")
"""


def test_what_runs_the_script_goes_on_after_it(
    session_light: Path, mounted: Path, tmp_path: Path
) -> None:
    """As a notebook's next cell after its %run."""
    (tmp_path / "runner.py").write_text(RUNNER, encoding="utf-8")
    words = session_light / "inference.py", *words_of(session_light, mounted)
    done = run_script(tmp_path / "runner.py", *words, KAGGLE_IS_COMPETITION_RERUN="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("went on\n")
