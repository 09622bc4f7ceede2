"""The submission kernel: every strip once through every member under every flip, offline.

It is the only code that turns pixels into a submission; training, packing and the dry run use the
same modules. Kaggle runs one file: `build_kernel.py` concatenates the modules of kernel/ into it, a
section each, this one last.
"""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from kernel.backends import predict_here
from kernel.command import end_process, end_with_parent, run_command
from kernel.competition import COMPETITION, SEVERSTAL, Competition, load_competition
from kernel.contact_sheet import Picture, draw_submission
from kernel.deadline import margin_s
from kernel.device import GPU_LOST, DeviceLost, share_freed_memory
from kernel.faults import one_line
from kernel.files import retried
from kernel.images import check_kinds
from kernel.kaggle import enter_working_folder, is_scored_run, run_began
from kernel.logs import log
from kernel.manifest import MANIFEST, Manifest, load_manifest
from kernel.members import hash_file
from kernel.mounts import find_one
from kernel.options import Options, check_options, parse_options
from kernel.outcome import Outcome
from kernel.run_context import RunContext
from kernel.run_record import RunRecord, build_run_record, write_run_record
from kernel.scored_run import write_empty_rows
from kernel.stages import Stages
from kernel.submission import Submission
from kernel.task import Task, find_task, unpack_images
from kernel.validator import check_submission
from kernel.watchdog import ended_after, ends_within, watchdog
from kernel.workers import predict_by_workers

MIN_FREE_BYTES = 50_000_000  # of disk: a submission takes some, and the copy beside it
LOOK_S = 60.0  # seconds that the scored run may look for the competition, then for its sample
KINDS_S = 10.0  # seconds that the look at some images may take: it only logs
CHECK_S = 0.02  # seconds that the validator may take for an image; 0.007 were measured
FAILURES = ValueError, OSError, RuntimeError  # of bad input


def open_submission(options: Options, task: Task) -> Submission:
    """Write a complete, empty submission, before anything else is done.

    Raises:
        ValueError: the disk is all but full, except in the scored run, which may have enough.
        OSError: the folder is read-only.
    """
    free = shutil.disk_usage(options.output.absolute().parent).free
    if free < MIN_FREE_BYTES:
        fault = f"{options.output}: {free / 1e6:.0f} MB free, {MIN_FREE_BYTES / 1e6:.0f} needed"
        if not is_scored_run():
            raise ValueError(fault)
        log.warning("%s; going on all the same", fault)
    submission = Submission(options.output, task.layout, task.pairs, whole=not options.worker)
    submission.save()
    return submission


def save_last(submission: Submission, empty_rows: bool) -> None:
    """Save for the last time; where that fails the file of an earlier save stands.

    Raises:
        OSError: in a worker, whose rows that are not saved run in another.
    """
    try:
        submission.save(empty_rows)
    except OSError as error:
        if not submission.whole:
            raise
        log.error("cannot save the last rows, those saved before stand: %s", one_line(error))


def log_kinds(task: Task) -> None:
    """Log an image of another colour or depth than the competition says; the run goes on."""

    def look() -> None:
        try:
            check_kinds(task.images, task.names, task.layout.competition)
        except Exception as error:  # whatever is wrong with one costs its own rows alone
            log.warning("%s; the run goes on", one_line(error))

    if not ends_within(KINDS_S, look):
        log.warning("%s: some images take over %.0f s to read: going on", task.images, KINDS_S)


def predict(context: RunContext, task: Task) -> Outcome:
    """Predict a task with one process a GPU, or in this one where there is none."""
    if count := context.n_workers(task):
        outcome = predict_by_workers(context, task, count)
    else:
        outcome = predict_here(context, task)
    done = context.submission.done
    for name in task.names:
        if name not in done:
            outcome.faults.setdefault(name, "was not predicted")
    if task.names and not done:
        log.error(
            "none of %d strips could be predicted: the submission is valid, and all empty",
            len(task.names),
        )
    return outcome


def log_findings(submission: Path, task: Task, left_s: float) -> None:
    """Log what the validator finds in the submission, if there is time to look."""
    layout = task.layout
    if left_s < CHECK_S * len(task.names):
        log.warning("the submission is written, but no time is left to check it")
        return
    try:
        findings = check_submission(
            submission,
            layout.columns,
            task.pairs,
            layout.competition,
            task.images,
            from_kernel=True,
        )
        for line in findings.lines():
            log.info("%s", line)
    except Exception as error:  # a fault of the check must not cost the submission
        log.warning("the submission is written, but was not checked: %r", error)


def log_summary(record: RunRecord, output: Path) -> None:
    """Log the run's last line."""
    start_s = sum(record.stages.get(stage, 0.0) for stage in ("import", "load", "check"))
    rate = record.strips / (record.seconds - start_s)
    log.info(
        f"{output}: {record.rows} rows, {record.non_empty} non-empty masks, "
        f"{len(record.faults)} strips failed, {record.seconds:.1f} s, {rate:.2f} strips/s"
    )


def log_bundle(bundle: Path, manifest: Manifest) -> None:
    """Log which settings and members these are: the dry run's log and Kaggle's can be compared."""
    files = [bundle / name for name in (MANIFEST, COMPETITION) if (bundle / name).is_file()]
    try:
        hashes = {path.name: retried(hash_file)(path) for path in files}
    except OSError as error:  # a line in the log must not cost the run
        log.warning("no hash of the bundle's settings: %s", one_line(error))
        hashes = {}
    hashes |= {spec.name: spec.sha256 for spec in manifest.members}
    found = ", ".join(f"{name} {sha256[:12]}" for name, sha256 in hashes.items())
    log.info("bundle, by sha256: %s", found)


def find_bundle(options: Options) -> Path:
    """Return the folder of the bundle: the one that was named, else the one that is mounted."""
    what = "the dataset that `kaggle datasets create` made of the bundle"
    return options.bundle or find_one(options.input, MANIFEST, what, "--bundle")


def run(options: Options, start: float | None = None, hangs: ExitStack | None = None) -> RunRecord:
    """Predict and write the submission; return the run record.

    `start` is when the time began that it has, by time.monotonic(); None: now. `hangs` holds what
    ends it where it hangs beside the watchdog: set anew once the bundle says what time it has.

    Raises:
        ValueError: the bundle, the sample or the images are not usable, or the disk is full.
        KeyboardInterrupt: once the submission is begun, with what it holds.
    """
    start = time.monotonic() if start is None else start
    stages, bundle = Stages(options.last_image), find_bundle(options)
    manifest = load_manifest(bundle)
    if not options.worker:
        log_bundle(bundle, manifest)
    seen = not (options.worker or is_scored_run())  # whether anybody reads what only informs
    competition = manifest.competition
    if hangs:
        hangs.close()
        hangs.enter_context(ended_if_hung(options, competition, start))
    task = find_task(options, competition)
    submission = open_submission(options, task)
    context = RunContext(options, bundle, manifest, submission, stages, start)
    guard = watchdog(submission, context.until_watchdog_s(), margin_s(context.budget_s))
    with _saying_what_stands(options.output), guard:
        try:
            task = unpack_images(task)
            if seen:
                log_kinds(task)
            outcome = predict(context, task)
        finally:  # interrupted too: what is done stays
            with stages("write"):
                save_last(submission, manifest.empty_rows or not task.layout.may_omit_empty)
        if seen:
            with stages("validate"):
                log_findings(options.output, task, context.until_watchdog_s())
    seconds = time.monotonic() - start
    record = build_run_record(context, task, outcome, submission.n_rows, seconds)
    log_summary(record, options.output)
    return record


@contextmanager
def _saying_what_stands(output: Path) -> Iterator[None]:
    """Have an interrupt say what is in the submission; one that comes earlier has left none."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{output} is whole and holds what was done") from None


# --- command line ---------------------------------------------------------------------------------


def draw_found(arguments: Sequence[str] | None = None) -> Picture:
    """Draw what the run with these arguments found, for the notebook's last cell."""
    options = parse_options(arguments)
    competition = load_competition(find_bundle(options))
    task = unpack_images(find_task(options, competition))
    return draw_submission(options.output, task.images, competition)


def _competition_of(options: Options) -> Competition:
    """The bundle's description; Severstal's where no bundle or no description can be read."""
    found = [SEVERSTAL]

    def look() -> None:
        try:
            found.append(load_competition(find_bundle(options)))
        except Exception as error:  # the run says it again
            log.warning("%s", one_line(error))

    if not ends_within(LOOK_S, look):
        log.warning("%s: no competition is found in %.0f s: going on", options.input, LOOK_S)
    return found[-1]


def run_options(
    options: Options, start: float | None = None, hangs: ExitStack | None = None
) -> int:
    """Run, as `run` does, and write the run record; return the exit code."""
    if options.worker:
        end_with_parent()
    check_options(options)
    try:
        record = run(options, start, hangs)
    except DeviceLost as error:  # in a worker alone
        log.error("%s", one_line(error))
        return GPU_LOST
    write_run_record(options.record, record)
    if options.strict and record.faults:
        log.error("--strict: %d strips failed", len(record.faults))
        return 1
    return 0


def ended_if_hung(
    options: Options, competition: Competition, start: float
) -> AbstractContextManager[None]:
    """End a run that hangs before or behind the watchdog, half of a margin after that would."""
    given_s = options.budget_s or 0.0
    budget_s = given_s if 0 < given_s < math.inf else competition.time_limit_s
    left_s = start + budget_s - margin_s(budget_s) / 2 - time.monotonic()
    return ended_after(max(left_s, LOOK_S))


def run_scored(options: Options) -> int:
    """Run so that whatever stops it costs no row; return the exit code.

    What would be refused elsewhere is an error in the log: the submission is worth more. A member
    that cannot be used leaves the others, and --strict means nothing. A --budget-s begins now,
    the competition's limit with the process.

    Raises:
        Exception: as `run_options`, where there was no sample to write the rows of.
    """
    called, competition = time.monotonic(), _competition_of(options)
    start = called if options.budget_s else min(called, run_began(competition.time_limit_s))
    with ExitStack() as hangs:
        hangs.enter_context(ended_if_hung(options, competition, start))
        rows_stand = write_empty_rows(options, competition)
        try:
            options = replace(options, allow_missing_members=True, strict=False)
            return run_options(options, start, hangs)
        except Exception as error:
            if not rows_stand:
                raise
            bug = not isinstance(error, FAILURES)
            what = "%s; the run ends here, and the rows in %s stand"
            log.error(what, one_line(error), options.output, exc_info=bug)
            return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""

    def run_parsed() -> int:
        options = parse_options(arguments)
        scored = is_scored_run() and not options.worker  # what stops a worker is the first's to see
        return run_scored(options) if scored else run_options(options)

    share_freed_memory()  # before there are threads that take heaps of their own
    enter_working_folder()
    run_command(run_parsed, FAILURES)


if __name__ == "__main__":
    main()
    if is_scored_run():
        end_process()
