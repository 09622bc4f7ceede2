"""The watchdog: ends a hung run shortly before the budget is spent."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kernel.logs import log
from kernel.rows import Submission

WATCHDOG_MARGIN_S = 3.0  # before the end of the budget


@contextmanager
def watchdog(submission: Submission, left_s: float) -> Iterator[None]:
    """End a hung run `WATCHDOG_MARGIN_S` before the budget, keeping the finished rows.

    `Deadline` ends a run in time as long as passes return; this is for one that does not.
    """

    def kill_run() -> None:
        log.error("the budget is spent: ending with the strips that are done, the others empty")
        try:
            submission.save()
            logging.shutdown()
        finally:  # a disk that is full too: an earlier save stands
            os._exit(0)  # the submission is whole, and nothing else could end a hanging thread

    timer = threading.Timer(max(left_s - WATCHDOG_MARGIN_S, 0.0), kill_run)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
