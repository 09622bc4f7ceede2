"""The submission kernel: every strip once through every member under every flip, offline.

It is the only code that turns pixels into a submission; training, packing and the dry run use the
same modules. Kaggle runs one file, so `build_kernel.py` joins them into one, a section each: logs →
manifest → rows → mounts → deadline → images → members → engines → early exit → ensemble → predict →
workers, and last the way from the first row to the last line.
"""

import argparse
import importlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kernel.logs import Stages, log, start_log
from kernel.manifest import MANIFEST, load_manifest
from kernel.mounts import SAMPLE, Options, Task, find_one, find_task
from kernel.predict import Outcome, Run, predict_here
from kernel.rows import LAYOUTS, Submission
from kernel.workers import predict_by_workers


def log_findings(bundle: Path, submission: Path, task: Task) -> None:
    """What the bundle's validate.py, where it has one, says of the submission."""
    if not (bundle / "validate.py").is_file():
        return
    sys.path.insert(0, str(bundle))
    sys.dont_write_bytecode = True  # the bundle stays what was packed
    try:
        check = importlib.import_module("validate").check_submission
        for line in check(submission, task.layout.columns, task.pairs, task.images).lines():
            log.info("%s", line)
    except Exception as error:  # a fault of the check must not cost the submission
        log.warning("the submission stands, but was not checked: %r", error)


LAST_S = 3.0  # seconds before the end of the budget at which nothing is waited for any more
LEAST_FREE = 50_000_000  # bytes of disk: a submission takes some, and the copy beside it


@contextmanager
def watchdog(submission: Submission, left_s: float) -> Iterator[None]:
    """Ends the process with what is done where it hangs until the budget is all but spent.

    `Deadline` ends a run in time as long as passes return; this is for one that does not.
    """

    def bite() -> None:
        log.error("the budget is spent: ending with the strips that are done, the others empty")
        submission.save()
        logging.shutdown()
        os._exit(0)  # the submission is whole, and nothing else could end a hanging thread

    timer = threading.Timer(max(left_s - LAST_S, 0.0), bite)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def open_submission(options: Options, task: Task) -> Submission:
    """A whole, empty submission, before anything else is done.

    Raises:
        ValueError: the disk is all but full.
        OSError: the folder is missing or read-only.
    """
    free = shutil.disk_usage(options.output.absolute().parent).free
    if free < LEAST_FREE:
        raise ValueError(
            f"{options.output}: {free / 1e6:.0f} MB free, {LEAST_FREE / 1e6:.0f} wanted"
        )
    submission = Submission(options.output, task.layout, task.pairs)
    submission.save()
    return submission


def predict(run: Run, task: Task) -> Outcome:
    """A task by one process a GPU, or in this one; a whole submission stands in any case."""
    workers = run.workers(task)
    outcome = predict_by_workers(run, task, workers) if workers > 1 else predict_here(run, task)
    if not outcome.work:
        log.error(
            "not one of %d strips could be predicted: the submission is valid, and all empty",
            len(task.names),
        )
    return outcome


def report_on(run: Run, task: Task, outcome: Outcome, rows: int, seconds: float) -> dict[str, Any]:
    """What `--report` writes; its last line is said here."""
    stages = run.stages.seconds
    cheapest_first = sorted(run.manifest.members, key=lambda spec: sum(spec.flops))
    working_s = seconds - sum(stages[stage] for stage in ("import", "load", "check"))
    log.info(
        "%s: %d rows, %d non-empty masks, %d strips failed, %.1f s, %.2f strips/s",
        *(run.options.output, rows, len(run.submission.rles)),
        *(len(outcome.faults), seconds, len(task.names) / working_s),
    )
    return {
        "strips": len(task.names),
        "rows": rows,
        "non_empty": len(run.submission.rles),
        "faults": outcome.faults,
        "work": outcome.work,
        "strip_s": outcome.strip_s,
        "left_out": dict(outcome.left_out),
        "share": sum(work["share"] for work in outcome.work.values()) / max(len(outcome.work), 1),
        "passes": [[m.name, flip, *m.flops] for m in cheapest_first for flip in run.manifest.flips],
        "device": outcome.device,
        "gpu_bytes": outcome.gpu_bytes,
        "workers": run.workers(task),
        "budget_s": run.options.budget_s,
        "seconds": seconds,
        "stages": dict(stages),
    }


def run(options: Options) -> dict[str, Any]:
    """Predicts and writes the submission; returns what `--report` writes.

    Raises:
        ValueError: the bundle, the sample or the images are not usable, or the disk is full.
        KeyboardInterrupt: as it came, when the submission holds what was done.
    """
    start, stages = time.monotonic(), Stages()
    what = "the dataset that `kaggle datasets create` made of the bundle"
    bundle = options.bundle or find_one(options.input, MANIFEST, what, "--bundle")
    manifest = load_manifest(bundle)
    task = find_task(options, manifest.classes)
    if options.shard:
        number, count = map(int, options.shard.split("/"))
        task = task.shard(number - 1, count)
    submission = open_submission(options, task)
    this = Run(options, bundle, manifest, submission, stages, start + options.budget_s)
    with watchdog(submission, this.left_s()):
        try:
            outcome = predict(this, task)
        finally:  # interrupted too: what is done stands
            with stages("write"):
                rows = submission.save(manifest.empty_rows or "ClassId" not in task.layout.columns)
        if not options.shard:
            with stages("validate"):
                log_findings(bundle, options.output, task)
    return report_on(this, task, outcome, rows, time.monotonic() - start)


# --- command line ---------------------------------------------------------------------------------

EXAMPLE = "  python inference.py --bundle dist/dataset --images strips/ --output submission.csv"


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """The command line as Options; none is needed on Kaggle."""
    parser = argparse.ArgumentParser(
        description=f"{EXAMPLE}\n\n{__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        type=Path,
        default=Options.input,
        help="where the bundle and the competition are mounted",
    )
    add("--bundle", type=Path, help=f"folder with {MANIFEST} (default: found under --input)")
    add("--images", type=Path, help="folder of images (default: beside the sample)")
    add(
        "--sample",
        type=Path,
        help=f"the rows to write (default: {SAMPLE} under --input, or every image of --images)",
    )
    add("--output", type=Path, default=Options.output, help="default submission.csv")
    add("--layout", choices=sorted(LAYOUTS), help="default: the sample's own, or 2019 without one")
    add("--batch-size", type=int, default=0, help="strips; default 8 on a GPU and 1 on the CPU")
    add(
        "--no-early-exit",
        dest="early_exit",
        action="store_false",
        help="run every pass, for the same submission",
    )
    add("--workers", type=int, default=0, help="processes; default one a GPU")
    add("--shard", default="", help="2/3: the second of three workers, as the first starts them")
    add(
        "--budget-s",
        type=float,
        default=Options.budget_s,
        help="seconds until everything is written; default 3600, Kaggle's hour",
    )
    add("--strict", action="store_true", help="exit code 1 where a strip failed")
    add("--allow-missing-members", action="store_true", help="go on without a bad member")
    about = "seconds, work per strip and every failed strip (default: run.json beside the output)"
    add("--report", type=Path, help=about)
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; bad input ends it with one clear line and exit code 2."""
    start_log()
    options = parse_options(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C may be ignored in the background
        signal.signal(number, signal.default_int_handler)
    try:
        report = run(options)
    except (ValueError, OSError, RuntimeError) as error:
        log.error("%s", error)
        sys.exit(2)
    except KeyboardInterrupt:
        log.error("interrupted: %s is whole and holds what was done", options.output)
        sys.exit(130)
    text = json.dumps(report, indent=2, sort_keys=True) + "\n"
    path = options.report or options.output.with_name("run.json")
    path.write_text(text, encoding="utf-8")
    if options.strict and report["faults"]:
        log.error("--strict: %d strips failed", len(report["faults"]))
        sys.exit(1)


if __name__ == "__main__":
    main()
