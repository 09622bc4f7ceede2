"""A run: what every step of it needs, and what became of its images."""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kernel.budget import margin_s
from kernel.deadline import Deadline
from kernel.manifest import Manifest
from kernel.options import Options
from kernel.stages import Stages
from kernel.strip_state import StripWork
from kernel.submission import Submission
from kernel.task import Task
from kernel.tta import Pass

LAST = ".last"  # beside a worker's csv: the image that it began last


@dataclass
class Outcome:
    """What became of every image; its masks are in the submission."""

    faults: dict[str, str] = field(default_factory=dict)  # image → why its rows stay empty
    failed: set[str] = field(default_factory=set)  # those of them that the networks failed on
    work: dict[str, StripWork] = field(default_factory=dict)  # image → what ran for it
    passes: list[Pass] = field(default_factory=list)  # that were loaded; `work` has their numbers
    dropped: Counter[str] = field(default_factory=Counter)  # "member/flip" → strips without it
    strip_s: dict[str, float] = field(default_factory=dict)  # image → seconds since the one before
    device: str = ""
    gpu_bytes: int = 0  # the most that PyTorch held on one GPU

    def add(self, other: "Outcome") -> None:
        """Add what became of other images."""
        if not self.work:  # the first that did any, whatever took leftovers
            self.device = other.device or self.device
        self.passes += [each for each in other.passes if each not in self.passes]
        number = {i: self.passes.index(each) for i, each in enumerate(other.passes)}
        for image, work in other.work.items():
            self.work[image] = work.renumber(number)
        self.faults = other.faults | self.faults  # the first reason stays
        self.failed |= other.failed
        self.dropped += other.dropped
        self.strip_s |= other.strip_s
        self.gpu_bytes = max(self.gpu_bytes, other.gpu_bytes)


@dataclass(frozen=True)
class RunContext:
    """What every step of a run needs."""

    options: Options
    bundle: Path
    manifest: Manifest
    submission: Submission
    stages: Stages
    start: float  # time.monotonic() at which it began

    @property
    def budget_s(self) -> float:
        """Seconds from the start until everything is written."""
        return self.options.budget_s or self.manifest.competition.time_limit_s

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.start + self.budget_s - time.monotonic()

    def until_watchdog_s(self) -> float:
        """Seconds until the watchdog would end this process."""
        return self.left_s() - margin_s(self.budget_s)

    def deadline(self) -> Deadline:
        """Return when to end: the same for all parts of a run, however late they begin."""
        return Deadline(self.budget_s, self.start)

    @property
    def last_image(self) -> Path | None:
        """The file in which a worker notes the image that it began last."""
        return self.submission.path.with_suffix(LAST) if self.options.worker else None

    def n_workers(self, task: Task) -> int:
        """Processes that share a task: one a GPU, or as many as were asked for."""
        asked = self.options.workers or max(torch.cuda.device_count(), 1)
        return 1 if self.options.worker else min(asked, len(task.names))

    def in_workers(self, task: Task) -> bool:
        """Whether other processes than this one run a task: where a GPU breaks down its may abort.

        One that is asked for is this one.
        """
        alone = self.options.worker or self.options.workers == 1
        on_gpu = torch.cuda.device_count() > 0 and not alone
        return self.n_workers(task) > (0 if on_gpu else 1)
