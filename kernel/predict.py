"""Prediction: the images of a task through a scheduler and into the submission."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from kernel.images import Size, Strip
from kernel.logs import log, progress
from kernel.outcome import Outcome
from kernel.read_ahead import read_ahead
from kernel.rle import encode_rle
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from kernel.strip_state import TOO_LATE, StripState
from kernel.submission import Submission
from kernel.task import Task
from kernel.tta import Half, Pass


def timed(strips: Iterator[Strip], stages: Stages, name: str) -> Iterator[Strip]:
    """Yield the same strips; the time spent waiting for each goes to stage `name`."""
    while True:
        with stages(name):
            strip = next(strips, None)
        if strip is None:
            return
        yield strip


def note_names(names: Iterable[str], last_image: Path | None) -> Iterator[str]:
    """Yield names; each is first written into the file `last_image`, for a worker may die at it."""
    for name in names:
        if last_image:
            with suppress(OSError):  # a disk that is full costs no strip
                last_image.write_text(name, encoding="utf-8", errors="surrogateescape")
        yield name


def log_other_sizes(sizes: Mapping[Size, Sequence[str]], usual: Size | None) -> None:
    """Log images of another size than a competition's usual one; without it, than the first's."""
    usual = usual or next(iter(sizes), (0, 0))
    for size, names in sizes.items():
        if size != usual:
            first = names[0].encode(errors="backslashreplace").decode()  # it may be no UTF-8
            what = "images of %d×%d, others are %d×%d: %d, first %s; predicted as they are"
            log.warning(
                f"{what}; see whether the files are whole", *size, *usual, len(names), first
            )


class EngineFails(Exception):
    """The networks fail on one image after another."""


class FailuresInARow:
    """Counts strips, one after another, that the networks fail on, or that a member gives NaN on.

    One for which no pass of the member was decoded says nothing of it, unless its encoder gave NaN.
    """

    def __init__(self, patience: float, passes: Sequence[Pass], members: Iterable[str]) -> None:
        self.patience, self.passes, self.failed = patience, passes, 0
        self.nan = dict.fromkeys(members, 0)

    def add(self, state: StripState) -> None:
        """Count a strip that is done; raise EngineFails where it is the last of `patience`."""
        self.failed = self.failed + state.failed if state.fault else 0
        if self.failed >= self.patience:
            raise EngineFails(f"on {self.failed} images in a row {state.fault}")
        lost = {self.passes[i].member for i in state.planned if i not in state.pass_ids}
        decoded = {self.passes[i].member for i in state.ran[Half.DECODER]}
        for member in self.nan:
            if member in lost:
                self.nan[member] += 1
            elif member in decoded:
                self.nan[member] = 0
            if self.nan[member] >= self.patience:
                raise EngineFails(
                    f"on {self.nan[member]} images in a row member {member} gives NaN"
                )


def predict_task(
    scheduler: Scheduler,
    task: Task,
    submission: Submission,
    outcome: Outcome,
    failures: FailuresInARow,
    last_image: Path | None,
) -> None:
    """Predict every image of a task with a scheduler; its masks go to the submission.

    A worker writes the name of the image that it begins into `last_image`.

    Raises:
        EngineFails: `failures` are too many: plain PyTorch may give numbers.
    """
    stages, competition = scheduler.source.stages, task.layout.competition
    # A worker on the CPU decodes no strip ahead: so it is known at which image it dies.
    alone = last_image is not None and scheduler.source.device.type == "cpu"
    ahead = 0 if alone else 4 * scheduler.limits.batch_size
    names = note_names(task.names, last_image)
    strips = read_ahead(task.images, names, ahead, competition, scheduler.deadline)
    states = scheduler.predict_strips(timed(strips, stages, "decode"), len(task.names))
    before, sizes = time.monotonic(), dict[Size, list[str]]()
    with closing(strips), progress(task.names, "strips", "strip") as bar, closing(states):
        for state in states:
            if state.fault:
                _take_fault(state, outcome)
            else:
                sizes.setdefault(state.size, []).append(state.strip.name)
                _take_masks(state, scheduler, submission, outcome)
            with stages("write"):
                submission.save_throttled()
            before, since = time.monotonic(), before
            outcome.strip_s[state.strip.name] = before - since
            bar.update()
            failures.add(state)
    log_other_sizes(sizes, competition.image_size)
    late = sum(fault == TOO_LATE for fault in outcome.faults.values())
    if late:
        log.warning("%d images stay empty: %s", late, TOO_LATE)


def _take_masks(
    state: StripState, scheduler: Scheduler, submission: Submission, outcome: Outcome
) -> None:
    """Take a strip's masks into the submission, and what ran for it into the outcome."""
    name, competition = state.strip.name, submission.layout.competition
    with scheduler.source.stages("rle"):
        masks = enumerate(state.masks, 1)
        rles = {label: encode_rle(mask, competition) for label, mask in masks}
        submission.set_masks(name, rles)
    outcome.work[name] = scheduler.work(state)


def _take_fault(state: StripState, outcome: Outcome) -> None:
    """Take a strip's fault into the outcome; log it where no other engine could mend it."""
    outcome.faults[state.strip.name] = state.fault
    if state.failed:
        outcome.failed.append(state.strip.name)
    elif state.fault != TOO_LATE:  # one of many: they are counted
        log.warning("%s stays empty: %s", state.strip.name, state.fault)
