"""A worker: this script once more, in a process with images of its own."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from kernel.command import BAD_INPUT
from kernel.deadline import worker_budget_s
from kernel.device import GPU_LOST
from kernel.options import LAST, arguments_of
from kernel.rows import csv_line, read_rows
from kernel.run_context import RunContext
from kernel.submission import Submission
from kernel.task import Task

NO_GPU = ""  # in the place of one in CUDA_VISIBLE_DEVICES: the CPU
REFUSALS = {1, BAD_INPUT}  # exit codes of a traceback and of bad input: no crash


@dataclass
class WorkerProcess:
    """A process with images of its own; its files are its csv and others beside that."""

    number: int
    gpu: str  # for CUDA_VISIBLE_DEVICES
    task: Task
    csv: Path
    process: subprocess.Popen[bytes]
    is_replacement: bool = False  # of one that died
    death_handled: bool = False
    ended_unasked: bool = False
    stalled: bool = False  # and was killed for it
    taken_ns: int = 0  # when the csv was written that was taken over last
    seen_ns: tuple[int, ...] = ()  # when its files were written, by the disk's clock
    seen_s: float = field(default_factory=time.monotonic)  # when that was last seen to change

    @property
    def record(self) -> Path:
        """Its run.json."""
        return self.csv.with_suffix(".json")

    @property
    def ended(self) -> bool:
        """Whether it runs no more."""
        return self.process.poll() is not None

    @property
    def died(self) -> bool:
        """Whether it ended without a record."""
        return self.ended and not self.record.is_file()

    @property
    def refused(self) -> bool:
        """Whether it ended because of what it was given, by its exit code."""
        return self.process.returncode in REFUSALS

    @property
    def unusable(self) -> bool:
        """Whether its GPU ran nothing from the start."""
        return self.process.returncode == GPU_LOST and not self.last_image()

    def collect(self, submission: Submission) -> None:
        """Take over what it has written so far; its csv has the images that are done."""
        written_ns, noted_ns = map(_written_ns, (self.csv, self.csv.with_suffix(LAST)))
        if (written_ns, noted_ns) != self.seen_ns:
            self.seen_ns, self.seen_s = (written_ns, noted_ns), time.monotonic()
        if written_ns == self.taken_ns:
            return
        self.taken_ns, competition = written_ns, submission.layout.competition
        rows = read_rows(self.csv, competition, from_kernel=True).rows
        for image, label, rle in rows:
            submission.set_masks(image, {label: rle})

    def idle_s(self) -> float:
        """Seconds since `collect` first saw its last sign of life, or since it was started."""
        return time.monotonic() - self.seen_s

    def last_image(self) -> str:
        """The image that it began last, by what `note_names` writes beside its csv."""
        path = self.csv.with_suffix(LAST)
        if not path.is_file():
            return ""
        return path.read_text(encoding="utf-8", errors="surrogateescape")

    def begun(self) -> set[str]:
        """The images that it began: all up to the last."""
        names, last = self.task.names, self.last_image()
        return set(names[: names.index(last) + 1]) if last in names else set()

    def end(self, patience_s: float) -> None:
        """Wait for its end; kill it if it hears no signal."""
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            with suppress(subprocess.TimeoutExpired):  # it is stuck in the system
                self.process.wait(patience_s)


def _written_ns(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


def start_worker(
    context: RunContext,
    task: Task,
    folder: Path,
    number: int,
    count: int,
    gpu: str,
    plain: bool = False,
) -> WorkerProcess:
    """Start this script once more, for a task of its own on one GPU: one of `count` that run.

    With `plain` it runs no engine.
    """
    options = context.options
    csv = folder / f"{number}.csv"
    if csv.with_suffix(".sample").exists():  # of the one before it
        csv = folder / f"{number}-again.csv"
    write_rows(csv.with_suffix(".sample"), task)
    alone = count == 1 and not gpu  # its strips one at a time: so it is known at which it dies
    own = options.for_worker(
        bundle=context.bundle.absolute(),
        images=task.images.absolute(),
        sample=csv.with_suffix(".sample"),
        output=csv,
        report=csv.with_suffix(".json"),
        batch_size=1 if alone else options.batch_size,
        budget_s=worker_budget_s(context.until_watchdog_s()),
        plain=plain or options.plain,
    )
    command = [sys.executable, str(find_script(context.bundle)), *arguments_of(own)]
    threads = max((os.cpu_count() or 1) // count, 1)
    environment = {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": str(threads)}
    # Ctrl-C is for this process alone, which ends its workers:
    process = subprocess.Popen(command, env=os.environ | environment, process_group=0)
    return WorkerProcess(number, gpu, task, csv, process)


def find_script(bundle: Path) -> Path:
    """Return the file that this code runs from; in a notebook, which has none, the bundle's own."""
    here = Path(globals().get("__file__", "")).resolve()
    if __name__ != "__main__":  # a module of it
        here = here.with_name("inference.py")
    return here if here.is_file() else bundle / "inference.py"


def write_rows(path: Path, task: Task) -> None:
    """Write a task's rows, empty, as the sample that a worker reads."""
    lines = [csv_line(task.layout.columns), *(task.layout.line(*pair, "") for pair in task.pairs)]
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape", newline="")
