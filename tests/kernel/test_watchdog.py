"""The watchdog: a run that hangs ends before its budget with the rows that are done."""

import errno
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import LAYOUTS, predict, read_submission, run_kernel, run_script, save_strips

from kernel import inference
from kernel.deadline import MIN_MARGIN_S, margin_s
from kernel.outcome import Outcome
from kernel.submission import Submission
from kernel.task import Task
from kernel.watchdog import ends_within, watchdog

PAIRS = [(name, label) for name in ("a.png", "b.png") for label in (1, 2, 3, 4)]

HANG = """
import sys, threading
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv.pop(1))
import inference as kernel

def hang(context, task):
    context.submission.set_masks("a.png", {2: "1 9"})
    threading.Event().wait()

kernel.predict = hang
kernel.main(sys.argv[1:])
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    save_strips(tmp_path / "strips", ["a.png", "b.png"])
    return tmp_path / "strips"


def test_a_run_that_hangs_is_ended_with_the_rows_that_are_done(
    session_light: Path, images: Path, tmp_path: Path
) -> None:
    """It would hang for ever. The process ends with exit code 0: Kaggle scores what it finds."""
    script = tmp_path / "hang.py"
    script.write_text(HANG, encoding="utf-8")
    arguments = ("--bundle", session_light, "--images", images, "--budget-s", 5)
    done = run_script(script, session_light, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the budget is spent" in done.stdout
    expected = {pair: "1 9" if pair == ("a.png", 2) else "" for pair in PAIRS}
    assert read_submission(tmp_path / "submission.csv") == expected


def test_a_budget_that_is_spent_at_once_ends_with_every_row_empty(
    session_light: Path, images: Path, tmp_path: Path
) -> None:
    ran = run_kernel(session_light, images, tmp_path / "out", "--budget-s", 1)
    assert ran.code == 0, ran.stderr
    assert "the budget is spent" in ran.stdout
    assert read_submission(tmp_path / "out" / "submission.csv") == dict.fromkeys(PAIRS, "")


# --- in this process, which `os._exit` does not end -----------------------------------------------


class ProcessEnd:
    """Stands in for `os._exit`: remembers its exit code, and when it came."""

    def __init__(self) -> None:
        self.codes, self.called = list[int](), threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.called.set()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> ProcessEnd:
    instead = ProcessEnd()
    monkeypatch.setattr(os, "_exit", instead)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    return instead


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    """One mask is set and not saved."""
    made = Submission(tmp_path / "submission.csv", LAYOUTS["two-column"], PAIRS)
    made.save()
    made.set_masks("b.png", {1: "3 4"})
    return made


def test_the_rows_are_saved_before_the_process_ends(
    submission: Submission, ended: ProcessEnd, caplog: pytest.LogCaptureFixture
) -> None:
    with watchdog(submission, 0.1, MIN_MARGIN_S):
        assert ended.called.wait(timeout=30)
    assert ended.codes == [0]
    assert read_submission(submission.path)["b.png", 1] == "3 4"
    assert "the budget is spent" in caplog.text


def test_the_rows_are_saved_before_a_line_is_logged(
    submission: Submission, ended: ProcessEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the log may hang."""
    seen = list[str]()

    def look(_: str) -> None:
        seen.append(read_submission(submission.path)["b.png", 1])

    monkeypatch.setattr("kernel.watchdog.log", SimpleNamespace(error=look))
    with watchdog(submission, 0.1, MIN_MARGIN_S):
        assert ended.called.wait(timeout=30)
    assert seen == ["3 4"]


def test_a_timer_that_cannot_be_started_keeps_no_hung_process_alive(
    submission: Submission, ended: ProcessEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may have all the threads that the system allows it."""
    start, starts = threading.Timer.start, itertools.count()

    def start_one(timer: threading.Timer) -> None:
        if next(starts):
            raise RuntimeError("can't start new thread")
        start(timer)

    monkeypatch.setattr(threading.Timer, "start", start_one)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # nor is it pytest's
    with watchdog(submission, 0.1, MIN_MARGIN_S):
        assert ended.called.wait(timeout=30)
    assert ended.codes == [0]


def test_a_full_disk_keeps_no_hung_process_alive(
    submission: Submission,
    ended: ProcessEnd,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(submission, "save", full)
    with watchdog(submission, 0.1, MIN_MARGIN_S):
        assert ended.called.wait(timeout=30)
    assert ended.codes == [0]
    assert "the budget is spent" in caplog.text


def test_a_disk_that_hangs_keeps_no_hung_process_alive(
    submission: Submission, ended: ProcessEnd
) -> None:
    """The run hangs in a save, and the watchdog's own save waits for that to end."""
    with watchdog(submission, 0.1, MIN_MARGIN_S):
        with submission.saving:
            assert ended.called.wait(timeout=30)
            assert ended.codes == [0]
        ended.called.clear()  # the thread that waited goes on: this process did not end
        assert ended.called.wait(timeout=30)


@pytest.mark.parametrize(
    ("left_s", "expected_s"),
    [(32400.0, 32340.0), (3600.0, 3540.0), (100.0, 97.0), (3.5, 0.5), (2.0, 0.0)],
)
def test_it_waits_until_a_minute_before_an_hour_or_more_is_over_and_three_seconds_at_least(
    left_s: float,
    expected_s: float,
    submission: Submission,
    ended: ProcessEnd,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A save that hangs has half of what is left then."""
    waits, timer = list[float](), threading.Timer

    def spied(interval: float, function: Callable[[], object]) -> threading.Timer:
        waits.append(interval)
        if len(waits) == 1:
            function()
        return timer(600, lambda: None)

    monkeypatch.setattr(threading, "Timer", spied)
    with watchdog(submission, left_s - margin_s(left_s), margin_s(left_s)):
        pass
    assert waits == [expected_s, (left_s - expected_s) / 2 if left_s > 3 else 1.5]
    assert ended.codes == [0]


def test_where_no_thread_can_be_started_a_run_goes_on_without_it(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with watchdog(submission, 600.0, 60.0):
        submission.set_masks("b.png", {1: "5 6"})
    assert ends_within(60, submission.save)
    assert read_submission(submission.path)["b.png", 1] == "5 6"


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_ends_by_itself_is_left_alone(
    fails: bool, submission: Submission, ended: ProcessEnd
) -> None:
    before = submission.path.read_bytes()
    try:
        with watchdog(submission, 0.3, MIN_MARGIN_S):
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert not ended.called.wait(timeout=0.6)
    assert submission.path.read_bytes() == before


def test_a_thread_that_waits_keeps_no_process_alive(submission: Submission) -> None:
    before = set(threading.enumerate())
    with watchdog(submission, 600.0, 60.0):
        [thread] = set(threading.enumerate()) - before
        assert thread.daemon
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_a_run_predicts_under_the_watchdog_of_its_budget(
    session_light: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lefts, under = list[float](), list[bool]()

    @contextmanager
    def spied(_: Submission, seconds: float, margin: float) -> Iterator[None]:
        lefts.append(seconds + margin)
        yield
        lefts.append(-1)

    def predict_nothing(*_: object) -> Outcome:
        under.append(len(lefts) == 1)
        return Outcome()

    monkeypatch.setattr("kernel.inference.watchdog", spied)
    monkeypatch.setattr("kernel.inference.predict", predict_nothing)
    monkeypatch.setattr("kernel.inference.log_summary", lambda *_: None)
    predict(session_light, images, tmp_path / "out.csv", budget_s=50.0)
    assert under == [True]
    assert 20 < lefts[0] < 50  # less what the start took
    assert lefts[1:] == [-1]


# --- a read that hangs ----------------------------------------------------------------------------


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """What a read that hangs waits for, until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_an_action_ends_in_time_or_not(never: threading.Event) -> None:
    assert ends_within(60, lambda: None)
    assert not ends_within(0.01, never.wait)


def test_a_look_at_images_that_hangs_does_not_hold_up_the_run(
    tmp_path: Path,
    never: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(inference, "check_kinds", lambda *_: never.wait(60))
    monkeypatch.setattr(inference, "KINDS_S", 0.01)
    inference.log_kinds(Task(tmp_path, LAYOUTS["two-column"], [("a.png", 1)]))
    [line] = caplog.messages
    assert line.endswith("going on")
