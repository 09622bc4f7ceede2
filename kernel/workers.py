"""Workers: one process a GPU, round after round, until no image is left that another would do."""

import os
import signal
import tempfile
import time
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from kernel.backends import predict_here
from kernel.deadline import margin_s
from kernel.device import GPU_LOST, count_gpus
from kernel.faults import one_line
from kernel.logs import log
from kernel.outcome import Outcome
from kernel.run_context import RunContext
from kernel.run_record import RunRecord, read_run_record
from kernel.strip_state import TOO_LATE
from kernel.submission import Submission
from kernel.task import Task
from kernel.worker import NO_GPU, REFUSALS, WorkerProcess, start_worker

COLLECT_S = 1.0  # seconds between two looks at what the workers have written
ENDING_S = 30.0  # that an interrupted worker has for its last save, and a killed one to end
LAST_CALL_S = 20.0  # before the watchdog's time, at the most: what hangs then is killed
STALLED_S = 900.0  # without a sign of life: more than a file's read or one step may take
START_S = 300.0  # the same before the first image: imports, and the GPU's start
MAX_FRUITLESS_ROUNDS = 3  # on the CPU in a row, that give no image


# --- one round ------------------------------------------------------------------------------------


@dataclass
class Round:
    """What the workers of one round gave, and which of them died: without a record of theirs."""

    records: list[RunRecord] = field(default_factory=list)
    exit_codes: dict[int, int] = field(default_factory=dict)  # number → code, of those that died
    image_at_death: str = ""  # that the first of these was at
    suspects: set[str] = field(default_factory=set)  # what those that died had begun
    gpus: set[str] = field(default_factory=set)  # on which something was done
    lost: set[str] = field(default_factory=set)  # on which the last worker died by itself
    stalled: set[str] = field(default_factory=set)  # on which one hung

    @property
    def refused(self) -> bool:
        """Whether those that died did so because of what they were given."""
        return set(self.exit_codes.values()) <= REFUSALS

    @property
    def unusable(self) -> bool:
        """Whether every worker's GPU ran nothing from the start."""
        return set(self.exit_codes.values()) == {GPU_LOST} and not self.image_at_death

    @property
    def killed(self) -> bool:
        """Whether one died of what would end this process, too."""
        return not set(self.exit_codes.values()) <= {*REFUSALS, GPU_LOST}


def run_workers(context: RunContext, task: Task, gpus: Sequence[str], again: bool) -> Round:
    """Share a task among a worker on each of `gpus`; their masks go to the submission.

    With `again` another follows at once on one that dies, for a GPU's fault may end with its
    process. Where none does the round ends: the others plan their time without what is left.
    """
    workers, count = list[WorkerProcess](), len(gpus)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        try:
            for index, gpu in enumerate(gpus):
                shard = task.shard(index, count)
                workers.append(start_worker(context, shard, Path(scratch), index + 1, count, gpu))
            _watch(context, workers, Path(scratch), again)
        finally:  # interrupted: no worker outlives this process, and its finished rows stay
            _end_all(context, workers)
        return _read_round(context.submission.done, workers)


def _watch(context: RunContext, workers: list[WorkerProcess], folder: Path, again: bool) -> None:
    """Collect what workers write until all have ended, or no other takes what one leaves."""
    # One that hangs without ending itself is not waited for until the hour is over:
    last_call_s = min(margin_s(context.budget_s) / 3, LAST_CALL_S)
    running, count = True, len(workers)
    while running and context.until_watchdog_s() > last_call_s:
        time.sleep(COLLECT_S)
        running = not all(worker.ended for worker in workers)
        _collect(workers, context.submission)
        _kill_stalled(workers)  # before a save, which may take long
        context.submission.save_throttled()
        if any(_is_stuck(worker) for worker in workers):
            return
        if context.over:
            continue
        for worker in [each for each in workers if each.died and not each.death_handled]:
            if worker.refused and not context.submission.done:
                continue  # until another has given an image: then what it was given is sound
            if worker.unusable and not any(each.last_image() for each in workers):
                continue  # until another has begun an image: then not all GPUs are
            worker.death_handled = True
            worker.collect(context.submission)  # its last rows
            rest = worker.task.without(context.submission.done)
            if not rest.names:
                continue
            if not again or worker.is_replacement or worker.stalled:
                return
            try:
                workers.append(_start_replacement(context, worker, rest, folder, count))
            except OSError as error:
                log.warning("no other can be started: %s", one_line(error))
                return
            running = True


def _collect(workers: Iterable[WorkerProcess], submission: Submission) -> None:
    for worker in workers:
        worker.collect(submission)


def _patience_s(worker: WorkerProcess) -> float:
    """Seconds without a sign of life after which a worker hangs."""
    return STALLED_S if worker.last_image() else START_S


def _kill_stalled(workers: Sequence[WorkerProcess]) -> None:
    """Kill workers that hang: what they leave runs in others."""
    for worker in workers:
        if not (worker.ended or worker.stalled) and worker.idle_s() > _patience_s(worker):
            idle_s = worker.idle_s()
            log.warning("worker %d has done nothing for %.0f s: killed", worker.number, idle_s)
            worker.stalled = True
            worker.process.kill()


def _is_stuck(worker: WorkerProcess) -> bool:
    """Whether a killed worker has not ended: the system waits for a device or a disk of it."""
    left_s = _patience_s(worker) + ENDING_S - worker.idle_s()
    return worker.stalled and not worker.ended and left_s < 0


def _start_replacement(
    context: RunContext, worker: WorkerProcess, rest: Task, folder: Path, count: int
) -> WorkerProcess:
    """Start a worker for what one that died leaves.

    On a GPU that broke down it runs no engine, which would break it again. There PyTorch may abort.

    Raises:
        OSError: no process can be started.
    """
    code, number, gpu = worker.process.returncode, worker.number, worker.gpu
    what = "worker %d ended with exit code %d: the %d images that it leaves run in another"
    plain = code == GPU_LOST or (code == -signal.SIGABRT and bool(gpu))
    log.warning(f"{what}, on plain PyTorch" if plain else what, number, code, len(rest.names))
    started = start_worker(context, rest, folder, number, count, gpu, plain)
    started.is_replacement = True
    return started


def _end_all(context: RunContext, workers: Sequence[WorkerProcess]) -> None:
    """End the workers that still run, and collect what all wrote last."""
    for worker in workers:
        worker.ended_unasked = worker.ended
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.end(min(ENDING_S, max(context.until_watchdog_s() / 2, 1.0)))
        worker.taken_ns = 0  # a clock may tick too slowly for two saves
    _collect(workers, context.submission)
    context.submission.save_throttled()


def _read_round(done: Set[str], workers: Sequence[WorkerProcess]) -> Round:
    """Read what workers recorded that have ended; `done` are the submission's images."""
    found = Round()
    for worker in sorted(workers, key=lambda worker: not worker.ended_unasked):
        try:
            found.records.append(read_run_record(worker.record))
            found.exit_codes.pop(worker.number, None)
            found.gpus.add(worker.gpu)
        except (OSError, ValueError):
            code = worker.process.returncode  # None: killed, and stuck in the system
            found.exit_codes[worker.number] = -signal.SIGKILL if code is None else code
            found.image_at_death = found.image_at_death or worker.last_image()
        if not done.isdisjoint(worker.task.names):
            found.gpus.add(worker.gpu)
        if worker.death_handled or worker.stalled:
            found.suspects |= worker.begun() - done
    final = {worker.number: worker for worker in workers}  # what replaces one is behind it
    died = (final[number] for number in found.exit_codes)
    found.lost = {worker.gpu for worker in died if worker.ended_unasked or worker.stalled}
    found.stalled = {worker.gpu for worker in workers if worker.stalled}
    return found


# --- round after round ----------------------------------------------------------------------------


def gpus_of(count: int) -> list[str]:
    """The GPU of each of `count` workers, of those that CUDA_VISIBLE_DEVICES leaves, or none."""
    there = count_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(there))))
    gpus = visible.split(",")[:there] or [NO_GPU]
    return [gpus[index % len(gpus)] for index in range(count)]


@dataclass(frozen=True)
class Plan:
    """What a round runs and where, and what those before it showed."""

    task: Task
    gpus: list[str]  # as in CUDA_VISIBLE_DEVICES, no more than images; none: a `rescue`
    all_gpus: list[str]
    first: bool = False
    worked: Set[str] = frozenset()  # GPUs
    lost: Set[str] = frozenset()
    stalled: Set[str] = frozenset()
    fruitless: int = 0  # rounds on the CPU in a row

    @property
    def rescue(self) -> bool:
        """Whether one worker on the CPU runs what crashed the others."""
        return not self.gpus

    def next(self, found: Round, rest: Task, grew: bool) -> "Plan | None":
        """Plan a round for what this one left, by what it gave; None where no other would help.

        `grew`: it gave an image.
        """
        died = bool(found.exit_codes)
        fruitless = 0 if grew else self.fruitless + (died and self.rescue)
        if self.rescue:
            none_to_leave_out = died and not found.image_at_death
            stuck = none_to_leave_out or fruitless == MAX_FRUITLESS_ROUNDS
        else:
            stuck = not died
        if stuck:
            return None
        hung_once = found.stalled - self.stalled  # on the disk, maybe: they are tried again
        worked, lost = self.worked | found.gpus, self.lost | (found.lost - hung_once)
        if self.rescue:  # what crashes the GPUs is found, or did not crash the CPU
            gpus = [gpu for gpu in self.all_gpus if gpu not in lost - worked]
        else:
            again = set[str]() if found.suspects else hung_once  # no image made them hang
            gpus = [gpu for gpu in self.gpus if gpu not in found.lost - again]
            suspects, others = rest.only(found.suspects), rest.without(found.suspects)
            if suspects.names and not gpus:
                rest = suspects  # alone on the CPU
            else:  # behind the others, which one that hangs would hold up
                rest = replace(rest, pairs=others.pairs + suspects.pairs)
        return Plan(
            task=rest,
            gpus=gpus[: len(rest.names)],
            all_gpus=self.all_gpus,
            worked=worked,
            lost=lost,
            stalled=self.stalled | found.stalled,
            fruitless=fruitless,
        )


def predict_by_workers(context: RunContext, task: Task, count: int) -> Outcome:
    """Share a task among `count` processes; what one of them cannot finish others do.

    On the GPU of one that crashes another follows, for a GPU's fault may end with its process; what
    that leaves runs on the other GPUs. Where those crash too a worker on the CPU runs what all had
    begun: the image at which it dies is left out, and the GPUs go on. What killed a worker would
    end the run, so images run in this process only where no worker can be started, where no GPU
    runs anything, where every one refused its input, or where the CPU's did after GPUs that gave
    nothing: then it says why.
    """
    outcome, died, done, killed = Outcome(workers=count), "", context.submission.done, False
    gpus = gpus_of(count)  # no more than images
    plan: Plan | None = Plan(task, gpus, gpus, first=True)
    while plan:
        devices, n_before = plan.gpus or [NO_GPU], len(done)
        try:
            found = run_workers(context, plan.task, devices, again=plan.first)
        except OSError as error:
            died = f"the workers cannot run: {one_line(error)}"
            if done or killed:
                break
            log.warning("%s; running all images in this process", died)
            return predict_here(context, task)
        for record in found.records:
            outcome.add(record)
            context.stages.add(record.stages, record.networks, 1 / len(devices))
        if found.exit_codes:
            number, code = next(iter(found.exit_codes.items()))
            died = f"worker {number} of {len(devices)} ended with exit code {code}"
            log.warning("%s", died)
            if code == 0 and context.over:  # its watchdog ended it
                died = TOO_LATE
            killed = killed or found.killed
            first_or_last = plan.first or plan.rescue
            unusable = found.unusable and len(found.exit_codes) == count
            refused = (found.refused and first_or_last) or unusable
            if refused and not (killed or done):
                log.warning("every worker failed to start; running all images in this process")
                return predict_here(context, task)  # it says what is wrong, as in one process
            if found.image_at_death and found.image_at_death not in done and plan.rescue:
                outcome.faults[found.image_at_death] = died
        rest = task.without(done | outcome.faults.keys())
        over, grew = context.over, len(done) > n_before
        plan = plan.next(found, rest, grew) if rest.names and not over else None
        if plan:
            log.warning("%d images are left, and run in another", len(rest.names))
    rest = task.without(done | outcome.faults.keys())
    outcome.faults |= dict.fromkeys(rest.names, died or "was not predicted")
    return outcome
