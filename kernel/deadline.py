"""The hour: which passes there is still time for."""

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from kernel.logs import log


class Average:
    """A mean that forgets: of the last 16 or so, and of all as long as there are fewer."""

    def __init__(self) -> None:
        self.sum = self.weight = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        """One more value, or the sum of `weight` of them."""
        self.sum, self.weight = 15 / 16 * self.sum + value, 15 / 16 * self.weight + weight

    @property
    def mean(self) -> float:
        """0 of nothing."""
        return self.sum / self.weight if self.weight else 0.0


class Deadline:
    """Which passes the next strip gets, so that the last strip ends inside the budget.

    Measured are the seconds of each member's encoder and decoder, and how many seconds a strip
    takes from one landing to the next for each second that its planned passes would take whole:
    below 1 by the early exit, above it by all that runs outside the networks. A strip's seconds
    under another plan are that ratio times that plan's. Before each strip takes off, passes are
    dropped from its plan until all that are left would end in time: first flips, the dearest first,
    for a member under another flip adds the least; then members, the dearest first, but for the
    last. Nothing is decided for good: where the machine gets faster, passes come back.

    Where even one pass is too much, strips stay empty from `end` on. A part of the budget is kept
    in reserve for what lies outside: the interpreter's start, the last save, a pass that stalls.
    """

    RESERVE_S, RESERVE = 10.0, 0.05  # of the budget

    def __init__(
        self, budget_s: float, start: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.end = start + (1 - self.RESERVE) * budget_s - self.RESERVE_S
        self.last = start  # time of the last landing
        self.seconds: defaultdict[tuple[str, str], Average] = defaultdict(Average)  # member, half
        self.ratio = Average()
        self.most = 0  # passes that a strip went without so far
        self.left_out: Counter[str] = Counter()  # "member/flip" → strips without it

    @property
    def over(self) -> bool:
        """Whether there is no time left for anything but the end."""
        return self.clock() >= self.end

    def ran(self, member: str, half: str, seconds: float, strips: int) -> None:
        """One half of a member ran for a batch of strips."""
        self.seconds[member, half].add(seconds, strips)

    def whole_s(self, passes: Iterable[tuple[str, str]]) -> float:
        """Seconds of passes (member, flip) if all of both halves ran."""
        halves = itertools.product((member for member, _ in passes), ("encoder", "decoder"))
        return sum(self.seconds[key].mean for key in halves if key in self.seconds)

    def takes_off(self) -> None:
        """The first strip: what came before it is no strip's time."""
        self.last = self.clock()

    def landed(self, passes: Sequence[tuple[str, str]]) -> None:
        """One more strip is done, planned with these passes."""
        now = self.clock()
        self.ratio.add(now - self.last, self.whole_s(passes))
        self.last = now

    def plan(self, passes: Sequence[tuple[str, str]], strips: int) -> list[int]:
        """The passes (member, flip) of the next strip, by number; `strips` are still to land."""
        kept, left_s = list(range(len(passes))), self.end - self.clock()
        ratio = self.ratio.mean if self.ratio.weight else 1.0

        def worth(number: int) -> tuple[bool, float]:
            return passes[number][1] == first_flip, -self.whole_s([passes[number]])

        first_flip = passes[0][1]
        for number in sorted(kept, key=worth)[:-1]:
            if strips * ratio * self.whole_s([passes[n] for n in kept]) <= left_s:
                break
            kept.remove(number)
        self.note([f"{member}/{flip}" for n, (member, flip) in enumerate(passes) if n not in kept])
        return kept

    def note(self, dropped: list[str]) -> None:
        """Counts what a strip goes without; logs where that is more than ever before."""
        self.left_out.update(dropped)
        if len(dropped) > self.most:
            self.most = len(dropped)
            log.warning("to end in time, some strips go without %s", ", ".join(dropped))
