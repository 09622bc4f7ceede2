"""What a run says: its log, progress in it, seconds per stage."""

import io
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger("kernel")

T = TypeVar("T")


def start_log() -> None:
    """One format for every line that a script logs, on stdout."""
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(format=form, level=logging.INFO, stream=sys.stdout)


class LogLines(io.TextIOBase):
    """Where a progress bar writes that nobody watches: each state becomes a line of the log."""

    def write(self, text: str) -> int:
        """Logs what is not blank."""
        if text.strip():
            log.info("%s", text.strip())
        return len(text)


def progress(
    items: Iterable[T], desc: str, unit: str, total: int | None = None, initial: int = 0
) -> "tqdm[T]":
    """What takes more than two seconds, by tqdm: a bar in a terminal, else a line every 30 s.

    Kaggle's log keeps every line. Iterate over it, or count by its `update`.
    """
    if sys.stderr.isatty():
        return tqdm(items, desc, total, unit=unit, initial=initial, delay=2)
    lines = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}{postfix}, {remaining} left"
    return tqdm(
        items, desc, total, file=LogLines(), mininterval=30, maxinterval=30, unit=unit,
        initial=initial, delay=2, bar_format=lines,
    )  # fmt: skip


class Stages:
    """Seconds spent per named stage; what the dry run's table is made of."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time inside to stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
