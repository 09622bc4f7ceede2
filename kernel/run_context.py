"""The context of a run: its options, its bundle and submission, and the time that it has."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from kernel.budget import margin_s
from kernel.deadline import Deadline
from kernel.device import gpu_supported
from kernel.manifest import Manifest
from kernel.options import Options
from kernel.stages import Stages
from kernel.submission import Submission
from kernel.task import Task


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

    def new_deadline(self) -> Deadline:
        """Return when to end: the same for all parts of a run, however late they begin."""
        return Deadline(self.budget_s, self.start)

    @property
    def over(self) -> bool:
        """Whether there is no time left for anything but the end."""
        return self.new_deadline().over

    def n_workers(self, task: Task) -> int:
        """Processes that share a task: one a GPU, or as many as were asked for."""
        asked = self.options.workers or max(torch.cuda.device_count(), 1)
        return 1 if self.options.worker else min(asked, len(task.names))

    def in_workers(self, task: Task) -> bool:
        """Whether processes beside this one run a task: a GPU that breaks down may end its own.

        `--workers 1` asks for none.
        """
        count, alone = self.n_workers(task), self.options.worker or self.options.workers == 1
        return count > 1 or (count == 1 and not alone and gpu_supported())
