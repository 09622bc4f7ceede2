"""The boundary of every command: bad input ends it with one line and an exit code."""

import argparse
import contextlib
import ctypes
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator

from kernel.faults import one_line
from kernel.kaggle import is_scored_run
from kernel.logs import start_log

BAD_INPUT = 2  # the exit code, as argparse's
INTERRUPTED = 130
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h

Failures = tuple[type[Exception], ...]


def new_parser(
    about: str | None, example: str = "", allow_abbrev: bool = True
) -> argparse.ArgumentParser:
    """Return a parser whose help shows a command to copy and `about`, as they are written."""
    return argparse.ArgumentParser(
        description=f"{example}\n\n{about}".strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=allow_abbrev,
    )


def split_line(line: str) -> list[str]:
    """Return the words of a line, without its comment; a backslash stands for itself."""
    words = shlex.shlex(line, posix=True)
    words.whitespace_split, words.escape = True, ""
    return list(words)


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import inside what an extra installs; where it is missing, exit with one line that says so.

    For modules of the extra alone: one of the project's own that is missing is a fault of ours.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install -e '.[{extra}]'", file=sys.stderr)
        sys.exit(BAD_INPUT)


def run_command(main: Callable[[], int], failures: Failures = (ValueError, OSError)) -> None:
    """Run `main`, which parses the command line and returns an exit code; exit unless it is 0.

    `failures` are what bad input raises: `one_line` of it goes to stderr.
    """
    _prepare_streams()
    start_log()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell may ignore Ctrl-C in the background
        signal.signal(number, signal.default_int_handler)
    hangup = getattr(signal, "SIGHUP", None)  # a terminal that closes; nohup ignores it
    if hangup and signal.getsignal(hangup) is signal.SIG_DFL:
        signal.signal(hangup, signal.default_int_handler)
    try:
        code = main()
    except BrokenPipeError:  # whoever read our output has gone, as `| head` does
        code = 1
    except failures as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = BAD_INPUT
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        code = INTERRUPTED
    fault = _flush_output()
    if fault and not (code or is_scored_run()):  # there the rows count, not what is said of them
        print(f"error: stdout: {one_line(fault)}", file=sys.stderr)
        code = BAD_INPUT
    if code:
        sys.exit(code)


def end_with_parent() -> None:
    """Have Linux interrupt this process when the one that started it ends, by whatever signal.

    More exactly, when the thread of it that did so ends.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_process() -> None:
    """End this process with exit code 0 once all that it said is written.

    At an interpreter's own end a thread that still reads a file may abort it. Where something else
    runs the script, as `%run` in a notebook, that goes on.
    """
    if sys._getframe(1).f_back:
        return
    logging.shutdown()
    with contextlib.suppress(AttributeError, OSError):
        sys.stderr.flush()
    _flush_output()
    os._exit(0)


def _prepare_streams() -> None:
    """Make output safe: a terminal of ASCII alone, a name that is no UTF-8, a closed stdout."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file would get this number, and a library's prints
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="backslashreplace")


def _flush_output() -> OSError | None:
    """Flush stdout; return why that fails, unless its reader has gone."""
    try:
        with contextlib.suppress(AttributeError):  # stdout is None where it was closed
            sys.stdout.flush()
    except OSError as error:  # at exit Python would flush once more, and end with code 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return None if isinstance(error, BrokenPipeError) else error
    return None
