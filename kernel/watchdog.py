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


@contextmanager
def watchdog(submission: Submission, left_s: float) -> Iterator[None]:
    """End a hung run `margin_s` before its budget, keeping the finished rows.

    `Deadline` ends a run in time as long as passes return; this is for one that does not.
    """

    def end() -> None:
        os._exit(0)  # the submission is whole, and nothing else could end a hanging thread

    def kill_run() -> None:
        with ExitStack() as last:
            last.callback(end)
            with suppress(RuntimeError):  # no thread can be started
                last.callback(after(margin_s(left_s) / 2, end).cancel)  # the disk or log may hang
            with suppress(OSError):  # a disk that is full: an earlier save stands
                submission.save()
            log.error("the budget is spent: ending with the strips that are done, the others empty")
            logging.shutdown()

    timer = after(max(left_s - margin_s(left_s), 0.0), kill_run)
    try:
        yield
    finally:
        timer.cancel()
