"""Reads that hang hold up nothing."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import LAYOUTS

from kernel import inference
from kernel.hangs import ends_within
from kernel.task import Task


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
