"""What a run prints and measures: log, progress, seconds per stage."""

import io
import logging
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from kernel.tta import Half

log = logging.getLogger("kernel")

T = TypeVar("T")
K = TypeVar("K")


def start_log() -> None:
    """Log every line on stdout, in one format."""
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


class Stages:
    """Seconds spent per named stage, and per member and half in the networks."""

    def __init__(self) -> None:
        self.threads = 1  # that work at once: a second of one of them counts by its share
        self.queued = False  # networks return before they ran, as on a GPU: who waits, counts them
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.networks: defaultdict[tuple[str, Half], float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time inside to stage `name`."""
        with _timed(self.seconds, name, self.threads):
            yield

    @contextmanager
    def network(self, member: str, half: Half) -> Iterator[None]:
        """Add the time inside to one half of a member, unless it is only queued there."""
        with _timed(self._table, (member, half), self.threads):
            yield

    @contextmanager
    def whole_pass(self, member: str, flops: Sequence[int]) -> Iterator[None]:
        """Add the time inside to both halves of a member, by their share of `flops`."""
        taken: defaultdict[str, float] = defaultdict(float)
        with _timed(taken, member, self.threads):
            yield
        for half, count in zip(Half, flops, strict=True):
            seconds = taken[member] * count / sum(flops)
            self._table[member, half] += seconds

    @property
    def _table(self) -> defaultdict[tuple[str, Half], float]:
        return defaultdict(float) if self.queued else self.networks

    def network_table(self) -> dict[str, dict[Half, float]]:
        """Member → half → seconds, as it stands in run.json."""
        table: dict[str, dict[Half, float]] = {}
        for (member, half), seconds in self.networks.items():
            table.setdefault(member, {})[half] = seconds
        return table


@contextmanager
def _timed(table: defaultdict[K, float], key: K, threads: int) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        alone = threading.current_thread() is threading.main_thread()
        seconds = (time.perf_counter() - start) / (1 if alone else threads)
        table[key] += seconds  # nothing comes between its reading and its writing
