"""The context of a run: its options, its bundle and submission, and the time that it has."""

import time
from dataclasses import dataclass
from pathlib import Path

from kernel.deadline import Deadline, margin_s
from kernel.device import count_gpus
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
        """Processes beside this one that share a task: one a GPU, or as many as were asked for.

        A GPU that breaks down may end its process, so one has a worker too. `--workers 1` asks for
        none.
        """
        asked = self.options.workers
        if self.options.worker or asked == 1:
            return 0
        count = min(asked or count_gpus(), len(task.names))
        return count if count > 1 or count_gpus() else 0
