"""Prediction in one process: every image through the ensemble and into the submission."""

import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from kernel.budget import margin_s
from kernel.competition import SEVERSTAL, Competition
from kernel.deadline import Deadline
from kernel.device import DeviceLost, pick_device
from kernel.ensemble import Ensemble, load_ensemble
from kernel.images import Image, Size, Strip, first_image, read_strip, size_of
from kernel.logs import log, progress
from kernel.manifest import Manifest
from kernel.options import Options
from kernel.rle import encode_rle
from kernel.rows import Submission
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from kernel.strip_state import TOO_LATE, StripState, StripWork
from kernel.task import Task
from kernel.tta import Pass

LAST = ".last"  # beside a worker's csv: the image that it began last
MAX_FAILURES = 8  # images in a row that the networks may fail on before another engine runs


def read_ahead(
    folder: Path,
    names: Iterable[str],
    ahead: int,
    competition: Competition = SEVERSTAL,
    deadline: Deadline | None = None,
) -> Iterator[Strip]:
    """Yield strips in order, up to `ahead` of them read beside the networks.

    Once a deadline is over no file is read any more: what is left would take its reserve.
    """

    def read(name: str) -> Strip:
        if deadline and deadline.over:
            return Strip(name, None, TOO_LATE)
        return read_strip(folder, name, competition)

    with ThreadPoolExecutor(max_workers=2) as pool:
        waiting: list[Future[Strip]] = []
        for name in names:
            waiting.append(pool.submit(read, name))
            if len(waiting) > ahead:
                yield waiting.pop(0).result()
        for strip in waiting:
            yield strip.result()


def timed(strips: Iterator[Strip], stages: Stages, name: str) -> Iterator[Strip]:
    """Yield the same strips; the time spent waiting for each goes to stage `name`."""
    while True:
        with stages(name):
            strip = next(strips, None)
        if strip is None:
            return
        yield strip


def note_names(task: Task, submission: Submission) -> Iterator[str]:
    """Yield a task's images; a worker first writes each into a file, for it may die at it."""
    for name in task.names:
        if not submission.whole:
            with suppress(OSError):  # a disk that is full costs no strip
                path = submission.path.with_suffix(LAST)
                path.write_text(name, encoding="utf-8", errors="surrogateescape")
        yield name


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

    def n_workers(self, task: Task) -> int:
        """Processes that share a task: one a GPU, or as many as were asked for."""
        asked = self.options.workers or max(torch.cuda.device_count(), 1)
        return 1 if self.options.worker else min(asked, len(task.names))


class EngineFails(Exception):
    """The networks fail on one image after another."""


class OtherSizes:
    """Logs images of another size than a competition's usual one; without it, than the first's."""

    def __init__(self, usual: Size | None) -> None:
        self.usual, self.counts = usual, Counter[Size]()

    def add(self, name: str, size: Size) -> None:
        """Count an image, and log the first of each other size."""
        self.usual = self.usual or size
        self.counts[size] += 1
        if size != self.usual and self.counts[size] == 1:
            name = name.encode(errors="backslashreplace").decode()  # it may be no UTF-8
            what = (
                "%s is %d×%d, others are %d×%d: predicted as it is; see whether the file is whole"
            )
            log.warning(what, name, *size, *self.usual)

    def log_counts(self) -> None:
        """Log how many there were of each other size, if there were more than one."""
        for size, count in self.counts.items():
            if size != self.usual and count > 1:
                log.warning("%d images are %d×%d", count, *size)


def predict_task(
    scheduler: Scheduler,
    task: Task,
    submission: Submission,
    outcome: Outcome,
    patience: float = math.inf,
) -> None:
    """Predict every image of a task with a scheduler; its masks go to the submission.

    Raises:
        EngineFails: the networks failed on `patience` images, one after another.
    """
    stages, rules, in_a_row = scheduler.source.stages, task.layout.competition, 0
    # A worker on the CPU decodes no strip ahead: so it is known at which image it dies.
    alone = not submission.whole and scheduler.source.device.type == "cpu"
    ahead, names = 0 if alone else 4 * scheduler.limits.batch_size, note_names(task, submission)
    strips = read_ahead(task.images, names, ahead, rules, scheduler.deadline)
    stages.threads = scheduler.threads
    states = scheduler.predict_strips(timed(strips, stages, "decode"), len(task.names))
    before, sizes = time.monotonic(), OtherSizes(rules.image_size)
    with progress(task.names, "strips", "strip") as bar, closing(states):
        for state in states:
            if not state.fault:
                sizes.add(state.strip.name, state.size)
                in_a_row = 0
            in_a_row += _take(state, scheduler, submission, outcome)
            with stages("write"):
                submission.save_throttled()
            before, since = time.monotonic(), before
            outcome.strip_s[state.strip.name] = before - since
            bar.update()
            if in_a_row >= patience:
                raise EngineFails(f"on {in_a_row} images in a row {state.fault}")
    sizes.log_counts()
    late = sum(fault == TOO_LATE for fault in outcome.faults.values())
    if late:
        log.warning("%d images stay empty: %s", late, TOO_LATE)


def _take(
    state: StripState, scheduler: Scheduler, submission: Submission, outcome: Outcome
) -> bool:
    """Take a strip's masks into the submission, or its fault into the outcome.

    Return whether the networks failed on it.
    """
    name, rules = state.strip.name, submission.layout.competition
    if not state.fault:
        with scheduler.source.stages("rle"):
            masks = enumerate(state.masks, 1)
            submission.set_masks(name, {label: encode_rle(mask, rules) for label, mask in masks})
        outcome.work[name] = scheduler.work(state)
        return False
    outcome.faults[name] = state.fault
    if state.fault == TOO_LATE:  # one of many: they are counted
        return False
    if state.strip.image is None:
        log.warning("%s stays empty: %s", name, state.fault)
        return False
    outcome.failed.add(name)
    return True


def log_resizing(ensemble: Ensemble, image: Image | None) -> None:
    """Log which members see strips, judged by the first of them, in another size."""
    for name, size in ensemble.sizes.items():
        if image is not None and size and size != size_of(image):
            (height, width), own = size_of(image), f"{size[0]}×{size[1]}"
            log.warning("strips are %d×%d: %s sees them resized to %s", height, width, name, own)


def predict_on(
    device: torch.device, context: RunContext, task: Task, outcome: Outcome, plain: bool = False
) -> None:
    """Predict a task in this process on a device; `plain` takes no engine but fp32 PyTorch.

    Raises:
        DeviceLost: the GPU broke down; `outcome` has the images that are done.
        EngineFails: so did the engine.
    """
    options, on_gpu = context.options, device.type == "cuda"
    outcome.device = str(device)
    deadline, names = context.deadline(), note_names(task, context.submission)
    image = first_image(task.images, names, task.layout.competition)
    try:
        ensemble = load_ensemble(
            context.bundle,
            context.manifest,
            device,
            context.stages,
            allow_missing=options.allow_missing_members,
            image=image,
            streams=1 if on_gpu else options.streams,
            plain=plain,
        )
        outcome.passes = list(ensemble.passes)
        log_resizing(ensemble, image)
        batch_size = options.batch_size or (8 if on_gpu else 1)
        threads, early_exit = ensemble.streams, options.early_exit
        scheduler = Scheduler(ensemble, batch_size, early_exit, deadline, threads=threads)
        log.info("%d images of %s on %s", len(task.names), task.images, device)
        patience = math.inf if plain else MAX_FAILURES
        predict_task(scheduler, task, context.submission, outcome, patience)
    except RuntimeError as error:
        if not on_gpu or isinstance(error, DeviceLost):
            raise
        raise DeviceLost(f"{device} fails: {error!r}") from error
    finally:
        outcome.dropped += deadline.dropped
        with suppress(RuntimeError):  # of a GPU that broke down
            outcome.gpu_bytes = torch.cuda.max_memory_allocated() if on_gpu else 0


# --- one backend after another --------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """What images run on: a device, with an engine or on `plain` PyTorch."""

    device: torch.device
    plain: bool = False
    after_loss: bool = False  # of another device

    def __str__(self) -> str:
        return "again, on plain PyTorch" if self.plain else "on the CPU"

    def next_after(self, lost: bool) -> "Backend | None":
        """Return what runs what this one leaves, where its device was `lost` or not; None: nothing.

        A device is lost once: what is lost after that has only failed.
        """
        cpu = torch.device("cpu")
        if lost and not self.after_loss:
            return replace(self, device=cpu, after_loss=True)
        if not self.plain:
            return replace(self, plain=True)
        return None if self.device == cpu else replace(self, device=cpu)


def _first_backend(context: RunContext) -> Backend:
    device = pick_device()
    given_gpu = context.options.worker and os.environ.get("CUDA_VISIBLE_DEVICES")
    if given_gpu and device.type == "cpu":
        raise DeviceLost("the GPU of this worker does not work")  # another's may
    return Backend(device, context.options.plain)


def _attempt(
    backend: Backend, context: RunContext, task: Task, found: Outcome, bundle_fault: bool
) -> tuple[bool, str]:
    """Run a task on a backend; return whether the device was lost, and what ended it early.

    Where nothing was done `bundle_fault` says that what ended it is the bundle's, and is raised.
    """
    try:
        predict_on(backend.device, context, task, found, plain=backend.plain)
    except (DeviceLost, EngineFails) as error:
        lost = isinstance(error, DeviceLost)
        if lost and context.options.worker:
            raise
        return lost, str(error)
    except Exception as error:
        if bundle_fault and not found.work:
            raise
        return False, repr(error)
    return False, ""


def _settle_faults(outcome: Outcome) -> None:
    """Forget the faults of images that another backend has done; log those that stay."""
    outcome.faults = {k: fault for k, fault in outcome.faults.items() if k not in outcome.work}
    for name in sorted(outcome.faults.keys() & outcome.failed):
        log.warning("%s stays empty: %s", name, outcome.faults[name])


def predict_here(context: RunContext, task: Task) -> Outcome:
    """Predict a task in this process, on the GPU where there is one.

    Images that a lost GPU leaves run on the CPU. Those that the networks fail on run again on plain
    PyTorch, last of all on the CPU: what failed may be the engine, or the GPU's memory.

    Raises:
        DeviceLost: in a worker, for another process may have the GPU again.
    """
    outcome, rest, threads = Outcome(), task, torch.get_num_threads()
    backend: Backend | None = _first_backend(context)
    while backend:
        found = Outcome()
        torch.set_num_threads(threads)  # one where OpenVINO's members ran
        last = backend.next_after(lost=False) is None
        bundle_fault = rest is task or (last and not outcome.work)
        lost, fault = _attempt(backend, context, rest, found, bundle_fault)
        outcome.add(found)
        rest = rest.without(found.work.keys() | (found.faults.keys() - found.failed))
        more = rest.names and not context.deadline().over
        backend = backend.next_after(lost) if more else None
        if backend:
            fault = fault or found.faults.get(min(found.failed, default=""), "")
            log.warning("%s; the last %d images run %s", fault, len(rest.names), backend)
        elif fault:
            log.warning("%s", fault)
    _settle_faults(outcome)
    return outcome
