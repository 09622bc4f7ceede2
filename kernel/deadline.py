"""The budget of a run, and its deadline: which passes there is time for before the hour ends."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from kernel.logs import log
from kernel.tta import Half, Pass

RESERVE, RESERVE_S = 0.05, 10.0  # of a budget: the interpreter's start, the last save, a stall
MIN_MARGIN_S, MAX_MARGIN_S = 3.0, 60.0
WORKER_MARGIN_S = 30.0  # a worker that hangs ends by itself before the process that started it


def planned_s(budget_s: float) -> float:
    """Seconds of a budget that passes are planned with; the rest is a reserve for what is not."""
    return (1 - RESERVE) * budget_s - RESERVE_S


def margin_s(budget_s: float) -> float:
    """Seconds before the end of a budget at which a hung run is ended: of an hour or more a minute.

    What came before the run, the container's start and the imports, has taken some of it unseen.
    """
    return min(max(budget_s / 60, MIN_MARGIN_S), MAX_MARGIN_S)


def worker_budget_s(left_s: float) -> float:
    """Return a worker's budget where `left_s` seconds are left until the run's watchdog."""
    return max(left_s - WORKER_MARGIN_S, left_s / 2, 1.0)


class MovingAverage:
    """Exponential moving average with bias correction, decay 15/16; 0 before the first value."""

    def __init__(self) -> None:
        self.sum = self.weight = self.earlier = 0.0

    def restart(self) -> None:
        """Begin anew; the mean so far counts until the next value."""
        self.earlier, self.sum, self.weight = self.mean, 0.0, 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        """Add one value, or the sum of `weight` of them."""
        self.sum, self.weight = 15 / 16 * self.sum + value, 15 / 16 * self.weight + weight

    @property
    def mean(self) -> float:
        """The average so far."""
        return self.sum / self.weight if self.weight else self.earlier


class Deadline:
    """Which passes the next strip gets, so that the last strip ends inside the budget.

    Measured are the seconds of each member's encoder and decoder, and how many seconds a strip
    takes from one finished strip to the next for each second that its passes would take in full:
    below 1 by the early exit, above it by all that runs outside the networks. A strip's seconds
    with other passes are that ratio times theirs. Before each strip begins, passes are dropped for
    it until all strips that are left would end in time: first flips, the most expensive first, for
    a member under another flip adds the least; then members, the most expensive first, but for the
    last. Nothing is decided for good: where the machine gets faster, passes come back.

    Nothing is dropped in the first moments, and half-way through them all averages begin anew: a
    GPU's first batches try algorithms and load code, and would be taken for what strips take.

    Where even one pass is too much, strips stay empty from `end` on.
    """

    WARM_UP = 0.03  # of the time that is left when the strips start

    def __init__(
        self, budget_s: float, start: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.end = start + planned_s(budget_s)
        self.last = start  # time at which the last strip was done
        self.restart_at = math.inf  # time at which all averages begin anew
        self.warm_at = start  # time from which on passes are dropped
        self.seconds: defaultdict[tuple[str, Half], MovingAverage] = defaultdict(MovingAverage)
        self.ratio = MovingAverage()
        self.strips_left = 0
        self.most_dropped = 0  # passes, of one strip so far
        self.dropped: Counter[str] = Counter()  # "member/flip" → strips without it

    @property
    def over(self) -> bool:
        """Whether there is no time left for anything but the end."""
        return self.clock() >= self.end

    def start_strips(self, count: int = 0) -> None:
        """Begin to time `count` strips: what came before belongs to none."""
        self.last, self.strips_left = self.clock(), count
        warm_up_s = self.WARM_UP * (self.end - self.last)
        self.restart_at, self.warm_at = self.last + warm_up_s / 2, self.last + warm_up_s

    def half_done(self, member: str, half: Half, seconds: float, strips: int) -> None:
        """Count the seconds of one half of a member for a batch of strips."""
        self.seconds[member, half].add(seconds, strips)

    def leave_out(self, seconds: float) -> None:
        """Count seconds that no strip took: a file that cannot be read does, or one that hangs."""
        self.last += seconds

    def strips_done(self, plans: Sequence[Sequence[Pass]]) -> None:
        """Count strips that end together, each by the passes it began with: each took as long.

        One that had none, for it could not be read, took no time.
        """
        self.strips_left -= len(plans)
        timed = [passes for passes in plans if passes]
        if not timed:
            return
        now = self.clock()
        for passes in timed:
            self.ratio.add((now - self.last) / len(timed), self.full_s(passes))
        self.last = now

    def full_s(self, passes: Iterable[Pass]) -> float:
        """Seconds of these passes if both halves of each ran."""
        keys = [(each.member, half) for each in passes for half in Half]
        return sum(self.seconds[key].mean for key in keys if key in self.seconds)

    def select_passes(self, passes: Sequence[Pass]) -> list[int]:
        """Return the indices of the passes for the next strip."""
        now = self.clock()
        if now >= self.restart_at:
            self.restart_at = math.inf
            for average in [self.ratio, *self.seconds.values()]:
                average.restart()
        kept, left_s = list(range(len(passes))), self.end - now
        if now < self.warm_at:
            return kept
        ratio = self.ratio.mean or 1.0
        first_flip = passes[0].flip

        def value(index: int) -> tuple[bool, float]:
            return passes[index].flip == first_flip, -self.full_s([passes[index]])

        for index in sorted(kept, key=value)[:-1]:
            if self.strips_left * ratio * self.full_s([passes[i] for i in kept]) <= left_s:
                break
            kept.remove(index)
        self._count_dropped([str(each) for i, each in enumerate(passes) if i not in kept])
        return kept

    def _count_dropped(self, dropped: list[str]) -> None:
        self.dropped.update(dropped)
        if len(dropped) > self.most_dropped:
            self.most_dropped = len(dropped)
            log.warning("to end in time, dropped for some strips: %s", ", ".join(dropped))
