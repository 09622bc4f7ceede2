"""Strips read ahead of the networks, each in a thread of its own: a read may hang."""

import math
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kernel.competition import Competition
from kernel.deadline import Deadline
from kernel.images import Strip, read_strip
from kernel.strip_state import TOO_LATE

READ_S = 300.0  # that a file may take: what takes longer hangs
LAST_READS_S = 5.0  # that those under way may take once no strip is asked for any more


class Read(NamedTuple):
    """A file that is being read, or that has been."""

    name: str
    begun: float  # by the deadline's clock
    strip: Future[Strip]


class Reads:
    """Files that are read beside the networks, in order; once a deadline is over none is begun."""

    def __init__(self, folder: Path, competition: Competition, deadline: Deadline) -> None:
        self.folder, self.competition, self.deadline = folder, competition, deadline
        self.waiting = deque[Read]()
        self.answered = -math.inf  # when the last read of any ended

    def begin(self, name: str) -> None:
        """Begin to read a file."""
        read = Read(name, self.deadline.clock(), Future[Strip]())
        self.waiting.append(read)  # first: the start of its thread may be interrupted
        if self.deadline.over:
            read.strip.set_result(Strip(name, None, TOO_LATE))
            return
        try:
            threading.Thread(target=self._run, args=(read,), daemon=True).start()
        except RuntimeError:  # the system has no other thread
            self._run(read)

    def _run(self, read: Read) -> None:
        strip = read_strip(self.folder, read.name, self.competition)
        self.answered = self.deadline.clock()
        read.strip.set_result(strip)

    def take(self) -> Strip:
        """Return the first file's strip; one whose read hangs has that as its fault."""
        read, deadline = self.waiting[0], self.deadline  # it stays among them until it is read
        asked = deadline.clock()
        while not read.strip.done() and (left_s := self._left_s(read, asked)) > 0:
            with suppress(TimeoutError):
                read.strip.result(left_s)
        waited_s = deadline.clock() - asked
        fault = TOO_LATE if deadline.over else f"was not read in {READ_S:.0f} s"
        strip = read.strip.result() if read.strip.done() else Strip(read.name, None, fault)
        if waited_s >= READ_S or strip.image is None:
            deadline.leave_out(waited_s)
        self.waiting.popleft()
        return strip

    def _left_s(self, read: Read, asked: float) -> float:
        """Seconds that a read has left; more where none behind it has ended: it is the disk."""
        patience = 2 if self.answered < read.begun and len(self.waiting) > 1 else 1
        until = max(read.begun, self.answered) + patience * READ_S
        return min(until, asked + 2 * READ_S, self.deadline.end) - self.deadline.clock()


def read_ahead(
    folder: Path,
    names: Iterable[str],
    ahead: int,
    competition: Competition,
    deadline: Deadline | None = None,
) -> Generator[Strip, None, None]:
    """Yield strips in order, up to `ahead` of them read beside the networks.

    Once a deadline is over no file is read any more: what is left would take its reserve. A read
    that hangs costs its own strip, while those behind it are read, and the process's end does not
    wait for it. Where they hang too it may be the disk, which has as long again; once it answers,
    each has its time anew.
    """
    limit = deadline or Deadline(math.inf, time.monotonic())
    reads = Reads(folder, competition, limit)
    try:
        for name in names:
            reads.begin(name)
            if len(reads.waiting) > ahead:
                yield reads.take()
        while reads.waiting:
            yield reads.take()
    finally:  # not all were asked for: a thread that is in OpenCV at the process's end aborts it
        wait([read.strip for read in reads.waiting], LAST_READS_S)
