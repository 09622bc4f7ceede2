"""What a run prints: log and progress."""

import io
import logging
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger("kernel")

T = TypeVar("T")


def start_log() -> None:
    """Log every line on stdout, in one format."""
    root = logging.getLogger()
    # Kaggle's image gives every Python process one that writes to /tmp/kaggle.log, which nobody
    # sees, and beside which basicConfig does nothing. Others, as pytest's, are of other classes.
    for handler in [each for each in root.handlers if type(each) is logging.FileHandler]:
        root.removeHandler(handler)
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(format=form, level=logging.INFO, stream=sys.stdout)
    logging.raiseExceptions = False  # a line that cannot be written must not stop a run


class LogLines(io.TextIOBase):
    """A text stream that logs what is written to it, for progress without a terminal."""

    def write(self, text: str) -> int:
        """Log `text` unless it is blank."""
        if text.strip():
            log.info("%s", text.strip())
        return len(text)


def progress(
    items: Iterable[T], desc: str, unit: str, total: int | None = None, initial: int = 0
) -> "tqdm[T]":
    """Show progress once it takes 2 s: a bar in a terminal, else a log line every 30 s.

    Iterate over it, or count with its `update`.
    """
    if sys.stderr and sys.stderr.isatty():
        return tqdm(items, desc, total, unit=unit, initial=initial, delay=2)
    lines = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}{postfix}, {remaining} left"
    return tqdm(
        items, desc, total, file=LogLines(), mininterval=30, maxinterval=30, unit=unit,
        initial=initial, delay=2, bar_format=lines,
    )  # fmt: skip
