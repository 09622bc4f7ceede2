"""What a run measures: seconds per stage, member and half."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from kernel.tta import Half

K = TypeVar("K")


class Stages:
    """Seconds spent per named stage, and per member and half in the networks.

    Where a stage ends, as one does with each step of the networks, the file `alive` is touched.
    """

    def __init__(self, alive: Path | None = None) -> None:
        self.alive = alive
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.networks: defaultdict[tuple[str, Half], float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time inside to stage `name`."""
        with _timed(self.seconds, name):
            yield
        if self.alive:
            with suppress(OSError):  # a disk that is full costs no strip
                self.alive.touch()

    @contextmanager
    def network(self, member: str, half: Half) -> Iterator[None]:
        """Add the time inside to one half of a member."""
        with _timed(self.networks, (member, half)):
            yield

    @contextmanager
    def whole_pass(self, member: str, flops: Sequence[int]) -> Iterator[None]:
        """Add the time inside to both halves of a member, by their share of `flops`."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        for half, count in zip(Half, flops, strict=True):
            self.add_network(member, half, seconds * count / sum(flops))

    def add_network(self, member: str, half: Half, seconds: float) -> None:
        """Add seconds to one half of a member."""
        self.networks[member, half] += seconds

    def add(
        self,
        seconds: Mapping[str, float],
        networks: Mapping[str, Mapping[Half, float]],
        share: float,
    ) -> None:
        """Add a `share` of what another process took, by stage, and by member and half."""
        for stage, taken in seconds.items():
            self.seconds[stage] += share * taken
        for member, halves in networks.items():
            for half, taken in halves.items():
                self.add_network(member, half, share * taken)

    def network_table(self) -> dict[str, dict[Half, float]]:
        """Member → half → seconds, as it stands in run.json."""
        table: dict[str, dict[Half, float]] = {}
        for (member, half), seconds in self.networks.items():
            table.setdefault(member, {})[half] = seconds
        return table


@contextmanager
def _timed(table: defaultdict[K, float], key: K) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        table[key] += time.perf_counter() - start
