"""Workers: one process a GPU, its images, and their results."""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kernel.budget import margin_s, worker_budget_s
from kernel.command import BAD_INPUT
from kernel.device import GPU_LOST
from kernel.faults import one_line
from kernel.logs import log
from kernel.options import arguments_of
from kernel.predict import LAST, Outcome, RunContext, predict_here
from kernel.rows import Submission, csv_line, read_rows
from kernel.run_record import read_run_record
from kernel.stages import Stages
from kernel.strip_state import TOO_LATE
from kernel.task import Task

COLLECT_S = 1.0  # seconds between two looks at what the workers have written
ENDING_S = 30.0  # that an interrupted worker has for its last save
LAST_CALL_S = 20.0  # before the watchdog's time, at the most: what hangs then is killed
STALLED_S = 600.0  # without a strip that begins or ends, where another worker has done its own
MAX_FRUITLESS_ROUNDS = 3  # on the CPU in a row, that give no image
REFUSALS = {1, BAD_INPUT}  # exit codes of a traceback and of bad input: no crash


# --- one worker -----------------------------------------------------------------------------------


@dataclass
class Worker:
    """A process with images of its own; its files are its csv and others beside that."""

    number: int
    gpu: str  # for CUDA_VISIBLE_DEVICES; "" is the CPU
    task: Task
    csv: Path
    process: subprocess.Popen[bytes]
    is_replacement: bool = False  # of one that crashed
    crash_handled: bool = False
    ended_unasked: bool = False
    stalled: bool = False  # and was killed for it
    taken_ns: int = 0  # when the csv was written that was taken over last

    @property
    def record(self) -> Path:
        """Its run.json."""
        return self.csv.with_suffix(".json")

    @property
    def ended(self) -> bool:
        """Whether it runs no more."""
        return self.process.poll() is not None

    @property
    def crashed(self) -> bool:
        """Whether it ended without a record, and not because of what it was given."""
        return self.ended and not self.record.is_file() and self.process.returncode not in REFUSALS

    def collect(self, submission: Submission) -> None:
        """Take over what it has written so far; its csv has the images that are done."""
        written_ns = self.csv.stat().st_mtime_ns if self.csv.is_file() else 0
        if written_ns == self.taken_ns:
            return
        self.taken_ns, rules = written_ns, submission.layout.competition
        for image, label, rle in read_rows(self.csv, competition=rules, cut_off=0)[1]:
            submission.set_masks(image, {label: rle})

    def idle_s(self) -> float:
        """Seconds since it was started, began an image or saved one."""
        paths = [self.csv.with_suffix(suffix) for suffix in (".sample", ".csv", LAST)]
        return time.time() - max(path.stat().st_mtime for path in paths if path.is_file())

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
            self.process.wait()


def start_worker(
    context: RunContext,
    task: Task,
    folder: Path,
    number: int,
    count: int,
    gpu: str,
    plain: bool = False,
) -> Worker:
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
        bundle=context.bundle,
        images=task.images,
        sample=csv.with_suffix(".sample"),
        output=csv,
        report=csv.with_suffix(".json"),
        batch_size=1 if alone else options.batch_size,
        streams=1 if alone else options.streams,
        budget_s=worker_budget_s(context.until_watchdog_s()),
        plain=plain or options.plain,
    )
    command = [sys.executable, str(find_script(context.bundle)), *arguments_of(own)]
    threads = max((os.cpu_count() or 1) // count, 1)
    environment = {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": str(threads)}
    # Ctrl-C is for this process alone, which ends its workers:
    process = subprocess.Popen(command, env=os.environ | environment, process_group=0)
    return Worker(number, gpu, task, csv, process)


def find_script(bundle: Path) -> Path:
    """Return the file that this code runs from, of a notebook, which has none, the bundle's own."""
    here = Path(globals().get("__file__", "")).resolve()
    if __name__ != "__main__":  # a module of it
        here = here.with_name("inference.py")
    return here if here.is_file() else bundle / "inference.py"


def write_rows(path: Path, task: Task) -> None:
    """Write a task's rows, empty, as the sample that a worker reads."""
    lines = [csv_line(task.layout.columns), *(task.layout.line(*pair, "") for pair in task.pairs)]
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape", newline="")


def gpus_of(count: int) -> list[str]:
    """The GPU of each of `count` workers, of those that CUDA_VISIBLE_DEVICES leaves."""
    there = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(there))))
    gpus = visible.split(",")[:there] or [""]
    return [gpus[index % len(gpus)] for index in range(count)]


def read_worker(report: Path, stages: Stages, share: float) -> Outcome:
    """Read a worker's run.json; its seconds count by its `share` of the workers."""
    record = read_run_record(report)
    for stage, seconds in record.stages.items():
        stages.seconds[stage] += share * seconds
    for member, halves in record.networks.items():
        for half, seconds in halves.items():
            stages.networks[member, half] += share * seconds
    return Outcome(
        faults=record.faults,
        work=record.work,
        passes=record.passes,
        dropped=Counter(record.dropped),
        strip_s=record.strip_s,
        device=record.device,
        gpu_bytes=record.gpu_bytes,
    )


# --- all of them ----------------------------------------------------------------------------------


@dataclass
class Round:
    """What the workers of one round gave, and which of them died: without a record of theirs."""

    outcome: Outcome = field(default_factory=Outcome)
    exit_codes: dict[int, int] = field(default_factory=dict)  # number → code, of those that died
    image_at_death: str = ""  # that the first of these was at
    suspects: set[str] = field(default_factory=set)  # what those that crashed had begun
    gpus: set[str] = field(default_factory=set)  # on which something was done
    lost: set[str] = field(default_factory=set)  # on which the last worker died by itself

    @property
    def refused(self) -> bool:
        """Whether those that died did so because of what they were given."""
        return set(self.exit_codes.values()) <= REFUSALS

    @property
    def killed(self) -> bool:
        """Whether one died of what would end this process, too."""
        return not set(self.exit_codes.values()) <= {*REFUSALS, GPU_LOST}


def run_workers(context: RunContext, task: Task, gpus: Sequence[str], again: bool) -> Round:
    """Share a task among a worker on each of `gpus`; their masks go to the submission.

    With `again` another follows at once on one that crashes, for a GPU's fault may end with its
    process. Where none does the round ends: the others plan their time without what is left.
    """
    workers, count = list[Worker](), len(gpus)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            for index, gpu in enumerate(gpus):
                shard = task.shard(index, count)
                workers.append(start_worker(context, shard, folder, index + 1, count, gpu))
            # One that hangs without ending itself is not waited for until the hour is over:
            last_call_s = min(margin_s(context.budget_s) / 3, LAST_CALL_S)
            running = True
            while running and context.until_watchdog_s() > last_call_s:
                time.sleep(COLLECT_S)
                running, started = not all(worker.ended for worker in workers), len(workers)
                _collect(workers, context.submission)
                _kill_stalled(workers)
                if not context.deadline().over:
                    if not _follow_crashed(context, workers, folder, count, again):
                        break
                    running = running or len(workers) > started
        finally:  # interrupted: no worker outlives this process, and its finished rows stay
            for worker in workers:
                worker.ended_unasked = worker.ended
            workers.sort(key=lambda worker: not worker.ended_unasked)
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.end(min(ENDING_S, max(context.until_watchdog_s() / 2, 1.0)))
                worker.taken_ns = 0  # a clock may tick too slowly for two saves
            _collect(workers, context.submission)
        return _read_round(context, workers, 1 / count)


def _collect(workers: Iterable[Worker], submission: Submission) -> None:
    for worker in workers:
        worker.collect(submission)
    submission.save_throttled()


def _kill_stalled(workers: Sequence[Worker]) -> None:
    """Kill workers that hang where another has ended with a record: what they leave has a place."""
    if not any(worker.record.is_file() for worker in workers):
        return
    for worker in workers:
        if not (worker.ended or worker.stalled) and worker.idle_s() > STALLED_S:
            log.warning("worker %d has done nothing for %.0f s: killed", worker.number, STALLED_S)
            worker.stalled = True
            worker.process.kill()


def _follow_crashed(
    context: RunContext, workers: list[Worker], folder: Path, count: int, again: bool
) -> bool:
    """Start a worker for what each one leaves that crashed, once; False where that is not to be.

    On a GPU that broke down it runs no engine, which would break it again. There PyTorch may abort.
    """
    for worker in [each for each in workers if each.crashed and not each.crash_handled]:
        worker.crash_handled = True
        worker.collect(context.submission)  # its last rows
        rest = worker.task.without(context.submission.done)
        if not rest.names:
            continue
        if not again or worker.is_replacement or worker.stalled:
            return False
        code, number, gpu = worker.process.returncode, worker.number, worker.gpu
        what = "worker %d ended with exit code %d: the %d images that it leaves run in another"
        plain = code == GPU_LOST or (code == -signal.SIGABRT and bool(gpu))
        log.warning(f"{what}, on plain PyTorch" if plain else what, number, code, len(rest.names))
        try:
            workers.append(start_worker(context, rest, folder, number, count, gpu, plain))
        except OSError as error:
            log.warning("no other can be started: %s", one_line(error))
            return False
        workers[-1].is_replacement = True
    return True


def _read_round(context: RunContext, workers: Sequence[Worker], share: float) -> Round:
    """Read what workers recorded, each for its `share` of the time."""
    found = Round()
    for worker in workers:
        try:
            found.outcome.add(read_worker(worker.record, context.stages, share))
            found.exit_codes.pop(worker.number, None)
            found.gpus.add(worker.gpu)
        except (OSError, ValueError):
            found.exit_codes[worker.number] = worker.process.returncode
            found.image_at_death = found.image_at_death or worker.last_image()
        if not context.submission.done.isdisjoint(worker.task.names):
            found.gpus.add(worker.gpu)
        if worker.crash_handled:
            found.suspects |= worker.begun() - context.submission.done
    replaced_first = sorted(workers, key=lambda worker: worker.is_replacement)
    final = {worker.number: worker for worker in replaced_first}
    died = (final[number] for number in found.exit_codes)
    found.lost = {worker.gpu for worker in died if worker.ended_unasked}
    return found


def _why_died(context: RunContext, found: Round, count: int) -> str:
    """Log which of `count` workers died first; return why, for the images that it leaves."""
    number, code = next(iter(found.exit_codes.items()))
    died = f"worker {number} of {count} ended with exit code {code}"
    log.warning("%s", died)
    ended_by_watchdog = code == 0 and context.deadline().over
    return TOO_LATE if ended_by_watchdog else died


@dataclass
class Places:
    """Where the next round runs: on these GPUs, or where there is none on the CPU."""

    all_gpus: list[str]  # as in CUDA_VISIBLE_DEVICES
    gpus: list[str]
    suspects: set[str] = field(default_factory=set)  # images that alone run on the CPU, if any
    worked: set[str] = field(default_factory=set)  # GPUs
    lost: set[str] = field(default_factory=set)
    fruitless: int = 0  # rounds on the CPU in a row

    def take(self, rest: Task) -> Task:
        """Return what of the task runs in the next round, on no more GPUs than images.

        On GPUs the suspects come last: one that hangs has the others behind it.
        """
        if self.suspects:
            suspects, others = rest.only(self.suspects), rest.without(self.suspects)
            last = replace(rest, pairs=others.pairs + suspects.pairs)
            rest = last if self.gpus else suspects
        self.gpus = self.gpus[: len(rest.names)]
        return rest

    def choose(self, found: Round, rest: Task, grew: bool) -> bool:
        """Choose for what is left, by what the last round gave; False where no other would help.

        `grew`: that round gave an image.
        """
        died, on_cpu = bool(found.exit_codes), not self.gpus
        self.fruitless = 0 if grew else self.fruitless + (died and on_cpu)
        if on_cpu:
            none_to_leave_out = died and not found.image_at_death
            stuck = none_to_leave_out or self.fruitless == MAX_FRUITLESS_ROUNDS
        else:
            stuck = not died
        if stuck:
            return False
        self.worked, self.lost = self.worked | found.gpus, self.lost | found.lost
        if on_cpu:  # what crashes the GPUs is found, or did not crash the CPU
            self.suspects = set()
            self.gpus = [gpu for gpu in self.all_gpus if gpu not in self.lost - self.worked]
        else:
            self.suspects = found.suspects & set(rest.names)
            self.gpus = [gpu for gpu in self.gpus if gpu not in found.lost]
        return True


def predict_by_workers(context: RunContext, task: Task, count: int) -> Outcome:
    """Share a task among `count` processes; what one of them cannot finish others do.

    On the GPU of one that crashes another follows, for a GPU's fault may end with its process; what
    that leaves runs on the other GPUs. Where those crash too a worker on the CPU runs what all had
    begun: the image at which it dies is left out, and the GPUs go on. What killed a worker would
    end the run, so images run in this process only where every worker refused its input, or where
    the CPU's did after GPUs that gave nothing: then it says why.
    """
    outcome, rest, died, done, killed = Outcome(), task, "", context.submission.done, False
    places = Places(gpus_of(count), gpus_of(count))
    for attempt in itertools.count():
        given, n_before = places.take(rest), len(done)
        try:
            found = run_workers(context, given, places.gpus or [""], again=attempt == 0)
        except OSError as error:
            if not done:
                raise
            died = f"the workers cannot run: {one_line(error)}"
            rest = task.without(done | outcome.faults.keys())
            break
        outcome.add(found.outcome)
        if found.exit_codes:
            died = _why_died(context, found, len(places.gpus) or 1)
            killed = killed or found.killed
            first_or_last = attempt == 0 or not places.gpus
            if found.refused and first_or_last and not (killed or done):
                log.warning("all of them did so, and all images run in this process")
                return predict_here(context, task)  # it says what is wrong, as in one process
            if found.image_at_death and found.image_at_death not in done and not places.gpus:
                outcome.faults[found.image_at_death] = died
        rest = task.without(done | outcome.faults.keys())
        over, grew = context.deadline().over, len(done) > n_before
        if not rest.names or over or not places.choose(found, rest, grew):
            break
        log.warning("%d images are left, and run in another", len(rest.names))
    outcome.faults |= dict.fromkeys(rest.names, died or "was not predicted")
    return outcome
