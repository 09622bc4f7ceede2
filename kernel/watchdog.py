"""The watchdog: ends a hung run shortly before the budget is spent; an action that may hang."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from kernel.logs import log
from kernel.submission import Submission


def ends_within(seconds: float, action: Callable[[], object]) -> bool:
    """Run an action that may hang, and raises nothing; return whether it ends in time.

    One that does not goes on in a thread that keeps no process alive.
    """
    thread = threading.Thread(target=action, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system has no other thread
        action()
        return True
    thread.join(seconds)
    return not thread.is_alive()


def after(seconds: float, action: Callable[[], object]) -> threading.Timer:
    """Start a timer that keeps no process alive."""
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    return timer


def end_at_once() -> None:
    """End this process with exit code 0, whatever hangs in it: what it wrote is whole."""
    with suppress(OSError):  # not by the log, which may hang
        os.write(2, b"the run hangs: it ends here, with what it has written\n")
    os._exit(0)


@contextmanager
def ended_after(seconds: float, end: Callable[[], object] = end_at_once) -> Iterator[None]:
    """Call `end`, which ends this process, unless the block is over by then."""
    with ExitStack() as timers:
        with suppress(RuntimeError):  # no thread can be started
            timers.callback(after(max(seconds, 0.0), end).cancel)
        yield


@contextmanager
def watchdog(submission: Submission, seconds: float, margin: float) -> Iterator[None]:
    """End a run that hangs for so many seconds, keeping the finished rows, within half a margin.

    `Deadline` ends a run in time as long as passes return; this is for one that does not.
    """

    def kill_run() -> None:
        with ExitStack() as last:
            last.callback(end_at_once)
            with suppress(RuntimeError):  # no thread can be started
                hung = after(margin / 2, end_at_once)  # the disk or log may hang
                last.callback(hung.cancel)
            with suppress(OSError):  # a disk that is full: an earlier save stands
                submission.save()
            log.error("the budget is spent: ending with the strips that are done, the others empty")
            logging.shutdown()

    with ended_after(seconds, kill_run):
        yield
