"""The watchdog: ends a hung run shortly before the budget is spent."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from kernel.budget import margin_s
from kernel.logs import log
from kernel.submission import Submission


def after(seconds: float, action: Callable[[], object]) -> threading.Timer:
    """Start a timer that keeps no process alive."""
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    return timer


def end_at_once() -> None:
    """End this process with exit code 0, whatever hangs in it: what it wrote is whole."""
    os._exit(0)


@contextmanager
def ended_after(seconds: float, end: Callable[[], object] = end_at_once) -> Iterator[None]:
    """Call `end`, which ends this process, unless the block is over by then."""
    timer = after(max(seconds, 0.0), end)
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def watchdog(submission: Submission, left_s: float) -> Iterator[None]:
    """End a hung run `margin_s` before its budget, keeping the finished rows.

    `Deadline` ends a run in time as long as passes return; this is for one that does not.
    """

    def kill_run() -> None:
        with ExitStack() as last:
            last.callback(end_at_once)
            with suppress(RuntimeError):  # no thread can be started
                hung = after(margin_s(left_s) / 2, end_at_once)  # the disk or log may hang
                last.callback(hung.cancel)
            with suppress(OSError):  # a disk that is full: an earlier save stands
                submission.save()
            log.error("the budget is spent: ending with the strips that are done, the others empty")
            logging.shutdown()

    with ended_after(left_s - margin_s(left_s), kill_run):
        yield
