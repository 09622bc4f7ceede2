"""Backends: a task on one device and engine after another, until each image is predicted."""

import math
import os
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from kernel.batch_limits import default_batch_size
from kernel.device import DeviceLost, pick_device
from kernel.ensemble import Ensemble
from kernel.ensemble_loading import load_ensemble
from kernel.images import Image, first_image, size_of
from kernel.logs import log
from kernel.outcome import Outcome
from kernel.predict import EngineFails, FailuresInARow, note_names, predict_task
from kernel.read_ahead import read_ahead
from kernel.run_context import RunContext
from kernel.scheduling import Scheduler
from kernel.task import Task

MAX_FAILURES = 8  # images in a row that an engine may fail on, or a member of it give NaN on


# --- on one backend -------------------------------------------------------------------------------


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
    deadline, names = context.new_deadline(), note_names(task.names, options.last_image)
    image = first_image(read_ahead(task.images, names, 0, task.layout.competition, deadline))
    try:
        ensemble = load_ensemble(
            context.bundle,
            context.manifest,
            device,
            context.stages,
            allow_missing=options.allow_missing_members,
            image=image,
            plain=plain,
        )
        outcome.passes = list(ensemble.passes)
        log_resizing(ensemble, image)
        batch_size = options.batch_size or default_batch_size(device)
        scheduler = Scheduler(ensemble, batch_size, options.early_exit, deadline)
        log.info("%d images of %s on %s", len(task.names), task.images, device)
        patience = math.inf if plain else MAX_FAILURES
        on_engines = [name for name, member in ensemble.members.items() if not member.plain]
        failures = FailuresInARow(patience, ensemble.passes, on_engines)
        predict_task(scheduler, task, context.submission, outcome, failures, options.last_image)
    except RuntimeError as error:
        if not on_gpu or isinstance(error, DeviceLost):
            raise
        raise DeviceLost(f"{device} fails: {error!r}") from error
    finally:
        outcome.dropped += deadline.dropped
        with suppress(RuntimeError):  # of a GPU that broke down
            outcome.gpu_bytes = torch.cuda.max_memory_allocated() if on_gpu else 0


# --- one after another ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """What images run on: a device, with an engine or on `plain` PyTorch."""

    device: torch.device
    plain: bool = False
    after_loss: bool = False  # of another device

    def __str__(self) -> str:
        device = "GPU" if self.device.type == "cuda" else "CPU"
        return f"on the {device}{' with plain PyTorch' if self.plain else ''}"

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
    outcome.failed = sorted(outcome.faults.keys() & outcome.failed)
    for name in outcome.failed:
        log.warning("%s stays empty: %s", name, outcome.faults[name])


def predict_here(context: RunContext, task: Task) -> Outcome:
    """Predict a task in this process, on the GPU where there is one.

    Images that a lost GPU leaves run on the CPU. Those that the networks fail on run again on plain
    PyTorch, last of all on the CPU: what failed may be the engine, or the GPU's memory.

    Raises:
        DeviceLost: in a worker, for another process may have the GPU again.
    """
    outcome, rest, threads = Outcome(), task, torch.get_num_threads()
    first = _first_backend(context)
    backend: Backend | None = first
    while backend:
        found = Outcome()
        torch.set_num_threads(threads)  # one where OpenVINO's members ran
        last = backend.next_after(lost=False) is None
        bundle_fault = backend == first or (last and not outcome.work)
        lost, fault = _attempt(backend, context, rest, found, bundle_fault)
        outcome.add(found)
        rest = rest.without(found.work.keys() | (found.faults.keys() - found.failed))
        more = rest.names and not context.over
        backend = backend.next_after(lost) if more else None
        if backend:
            fault = fault or found.faults.get(min(found.failed, default=""), "")
            log.warning("%s; the remaining %d images run %s", fault, len(rest.names), backend)
        elif fault:
            log.warning("%s", fault)
    _settle_faults(outcome)
    return outcome
