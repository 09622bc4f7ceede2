"""The run in one process: every image through the ensemble and into the submission."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kernel.deadline import Deadline
from kernel.engines import DeviceLost, pick_device
from kernel.ensemble import Ensemble, load_ensemble
from kernel.images import Image, Strip, decode_strip, encode_rle
from kernel.logs import Stages, log, progress
from kernel.manifest import Manifest
from kernel.mounts import Options, Task
from kernel.rows import Submission


def decode_ahead(folder: Path, names: Sequence[str], ahead: int) -> Iterator[Strip]:
    """Strips in order, up to `ahead` of them decoded beside the network."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        waiting: list[Future[Strip]] = []
        for name in names:
            waiting.append(pool.submit(decode_strip, folder, name))
            if len(waiting) > ahead:
                yield waiting.pop(0).result()
        for strip in waiting:
            yield strip.result()


def first_image(task: Task) -> Image | None:
    """The first strip that can be read."""
    strips = (decode_strip(task.images, name) for name in task.names)
    return next((strip.image for strip in strips if strip.image is not None), None)


def timed(strips: Iterator[Strip], stages: Stages, name: str) -> Iterator[Strip]:
    """The same strips; the time spent waiting for each goes to stage `name`."""
    while True:
        with stages(name):
            strip = next(strips, None)
        if strip is None:
            return
        yield strip


@dataclass
class Outcome:
    """What became of every image; its masks are in the submission."""

    faults: dict[str, str] = field(default_factory=dict)  # image → why its rows stay empty
    work: dict[str, dict[str, float]] = field(default_factory=dict)  # image → what was run for it
    left_out: Counter[str] = field(default_factory=Counter)  # "member/flip" → strips without it
    strip_s: dict[str, float] = field(default_factory=dict)  # image → seconds since the one before
    device: str = ""
    gpu_bytes: int = 0  # the most that PyTorch held on one GPU

    def add(self, other: "Outcome") -> None:
        """Takes in what became of other images."""
        self.faults |= other.faults
        self.work |= other.work
        self.left_out += other.left_out
        self.strip_s |= other.strip_s
        self.device = other.device
        self.gpu_bytes = max(self.gpu_bytes, other.gpu_bytes)


@dataclass(frozen=True)
class Run:
    """What every step of a run needs."""

    options: Options
    bundle: Path
    manifest: Manifest
    submission: Submission
    stages: Stages
    end: float  # time.monotonic() at which the budget is spent

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.end - time.monotonic()

    def workers(self, task: Task) -> int:
        """Processes that a task is dealt out to: one a GPU, or as many as were asked for."""
        asked = self.options.workers or max(torch.cuda.device_count(), 1)
        return 1 if self.options.shard else min(asked, len(task.names))


def predict_task(ensemble: Ensemble, task: Task, submission: Submission, outcome: Outcome) -> None:
    """Every image of a task through the ensemble and into the submission."""
    strips = decode_ahead(task.images, task.names, ahead=4 * ensemble.batch_size)
    strips = timed(strips, ensemble.stages, "decode")
    before = time.monotonic()
    with progress(task.names, "strips", "strip") as bar:
        for flight in ensemble.fly(strips, len(task.names)):
            name = flight.strip.name
            if flight.fault:
                outcome.faults[name] = flight.fault
                log.warning("%s stays empty: %s", name, flight.fault)
            else:
                outcome.work[name] = ensemble.work(flight)
                with ensemble.stages("rle"):
                    masks = enumerate(flight.tally.masks(flight.size), 1)
                    submission.put(name, {label: encode_rle(mask) for label, mask in masks})
            with ensemble.stages("write"):
                submission.save_soon()
            before, since = time.monotonic(), before
            outcome.strip_s[name] = before - since
            bar.update()
    if ensemble.device.type == "cuda":
        outcome.gpu_bytes = torch.cuda.max_memory_allocated()


def predict_on(device: torch.device, run: Run, task: Task, outcome: Outcome) -> None:
    """A task in this process, on this device.

    Raises:
        DeviceLost: the device broke down; `outcome` tells which images are done.
    """
    options, stages = run.options, run.stages
    outcome.device = str(device)
    deadline = Deadline(run.left_s(), time.monotonic())
    ensemble = load_ensemble(
        run.bundle,
        run.manifest,
        device,
        stages,
        batch_size=options.batch_size or (8 if device.type == "cuda" else 1),
        early_exit=options.early_exit,
        allow_missing=options.allow_missing_members,
        image=first_image(task),
        deadline=deadline,
    )
    log.info("%d images of %s on %s", len(task.names), task.images, device)
    try:
        predict_task(ensemble, task, run.submission, outcome)
    finally:
        outcome.left_out += deadline.left_out


def predict_here(run: Run, task: Task) -> Outcome:
    """A task in this process; what a GPU that breaks down leaves undone runs on the CPU."""
    outcome = Outcome()
    try:
        predict_on(pick_device(), run, task, outcome)
    except DeviceLost as error:
        rest = task.without(outcome.work.keys() | outcome.faults.keys())
        log.warning("%s; its last %d images run on the CPU", error, len(rest.names))
        predict_on(torch.device("cpu"), run, rest, outcome)
    return outcome
