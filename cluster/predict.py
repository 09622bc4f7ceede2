"""For more images than one machine can take: the same bundle and the same masks, on Ray Data.

Writes Parquet: image, class, RLE, pixels of the mask, fault, seconds, share of the passes' work.
Addresses are those of fsspec: folders here, s3://…, gs://…. A run that was stopped continues when
it is started again; images that have their rows are skipped.
"""

import argparse
import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from kernel.command import needs, new_parser, run_command
from kernel.files import check_place
from kernel.images import Image
from kernel.logs import log
from kernel.manifest import MANIFEST, Manifest, load_manifest
from kernel.members import check_sha256
from kernel.rows import RowKey
from kernel.task import read_sample

with needs("cluster"):
    from ray.exceptions import RayError

    from cluster.engine import (
        MAX_LOST,
        connect,
        connect_anew,
        plan_workers,
        predict_parts,
        warn_if_busy,
    )
    from cluster.images import ImageSet, NotFetched, absolute, find_images, open_local, store_of
    from cluster.output import Output, Totals, fault_rows
    from cluster.report import Run, write_page
    from cluster.worker import manifest_hash

FIRST_IMAGES = 100  # that are tried for one that can be read, from all of the list
FIRST_S = 60  # after which no other is: a store may let each wait for minutes
PredictNames = Callable[[list[str]], tuple[Totals, set[str]]]
FAILED_START = "error raised in its creation task"  # Ray's words for a worker that never began
FAILED_TWICE = "it failed in its part and alone: the log says why"  # a fault

# --- before work begins ---------------------------------------------------------------------------


def read_bundle(address: str) -> tuple[Manifest, str]:
    """Return a bundle's manifest and its sha256; raise ValueError where it is not whole."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(open_local(address, scratch))
        manifest = load_manifest(folder)
        for spec in manifest.members:
            check_sha256(folder / spec.file, spec.sha256)
        return manifest, manifest_hash(folder)


def first_image(images: ImageSet) -> Image:
    """Return the first image that can be read: what a worker runs on PyTorch is checked on it.

    Raises:
        ValueError: none can of as many from all of the list as are tried.
    """
    faults, start = list[str](), time.monotonic()
    step = -(-len(images.names) // FIRST_IMAGES)
    for name in images.names[::step]:
        try:
            return images.load(name)
        except Exception as error:  # a bad one, as `read` has it, or one that cannot be fetched
            faults.append(str(error) or repr(error))
        if time.monotonic() - start > FIRST_S:
            break
    raise ValueError(
        f"{images.root}: none of {len(faults)} images that were tried can be read: {faults[0]}"
    )


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers that mean nothing."""
    for option in ("gpus", "workers", "cpus_per_worker", "images_per_part", "batch_size"):
        value, least = getattr(args, option), 0 if option in ("gpus", "batch_size") else 1
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')} {value}: expected {least} or more")
    if args.gpus and (args.workers or args.cpus_per_worker):
        raise ValueError("--gpus means one worker a GPU: leave out --workers, --cpus-per-worker")


# --- the run --------------------------------------------------------------------------------------


def check_sample(pairs: Iterable[RowKey], images: ImageSet) -> None:
    """Raise ValueError where a row may be of two images, or all are of others; log which lack."""
    asked, found = {name for name, _ in pairs}, dict[str, str]()
    for name in images.names:
        base = images.competition.name_of_file(name)
        if base in asked and base in found:
            raise ValueError(
                f"{images.root}: {found[base]} and {name} are both {base!r} in a submission: "
                "rename one"
            )
        found[base] = name
    lacking = asked - found.keys()
    if asked and lacking == asked:
        raise ValueError(
            f"--submission: none of its {len(asked)} images, like {min(asked)!r}, is in "
            f"{images.address}, which has {min(found)!r}; name the sample of these images"
        )
    if lacking:
        log.warning("%d images of the sample are missing, such as %r", len(lacking), min(lacking))


def check_store(images: ImageSet, lost: Sequence[str], done: Collection[str]) -> None:
    """Raise RuntimeError where a store gives neither a lost image nor others that it should have.

    A lost image alone may be one that cannot be read: the others tell, first those with rows.
    """
    for name in lost[:MAX_LOST]:
        if fault := _fetch_fault(images, name):
            known = (other for other in itertools.chain(done, lost) if other != name)
            of_store = (other for other in known if store_of(other) == store_of(name))
            others = list(itertools.islice(of_store, MAX_LOST))
            if others and all(_fetch_fault(images, other) for other in others):
                raise RuntimeError(
                    f"{name} and others of its store cannot be fetched: {fault}; start the run "
                    "again once they can"
                )


def _fetch_fault(images: ImageSet, name: str) -> str:
    """What the store says of an image that it has, or may have; "" where it gives it."""
    try:
        images.load(name)
    except NotFetched as error:
        return "" if error.missing else str(error)
    except ValueError:  # it is no image
        pass
    return ""


def predict_lost(
    lost: list[str], names: list[str], output: Output, images: ImageSet, predict: PredictNames
) -> Totals:
    """Predict images that have no rows, each alone; where that fails too: a fault.

    Where none of this run's `names` has rows it is no image's fault, and they are left without.
    """
    log.warning(
        "%d images could not be fetched, or their parts failed: each is tried alone", len(lost)
    )
    totals, done = predict(lost)
    bad = [name for name in lost if name not in done]
    if bad and not done.isdisjoint(names):
        rows = fault_rows(bad, len(images.competition.classes), FAILED_TWICE)
        totals.add(output.write_part(bad, rows))
        for name in bad:
            log.warning("%s stays empty: %s", name, FAILED_TWICE)
    return totals


def passed_images(names: Sequence[str], done: Collection[str]) -> list[str]:
    """Those without rows before the last that has some."""
    behind = itertools.dropwhile(lambda name: name not in done, reversed(names))
    return [name for name in behind if name not in done][::-1]


def why_stopped(error: RayError, names: Sequence[str], output: Output) -> str:
    """What Ray says, without its advice, and which images the run passed."""
    if FAILED_START in str(error):  # behind a traceback
        return str(error).strip().splitlines()[-1]
    said, *_ = str(getattr(error, "cause", None) or error).split("\nFailed to apply")
    reason, passed = " ".join(said.split()), list[str]()
    with contextlib.suppress(ValueError):  # the output's store may be what failed
        passed = passed_images(names, output.done())
    if passed:
        reason += f"; {len(passed)} images have no rows that others behind them have: "
        reason += ", ".join(map(repr, passed[: MAX_LOST + 1]))
    return reason


def predict_rest(
    args: argparse.Namespace, images: ImageSet, names: list[str], record: dict[str, str]
) -> Run:
    """Predict the images that have no rows yet; return what was done."""
    image = first_image(images)
    connect(args.address)
    workers = plan_workers(args.gpus, args.workers, args.cpus_per_worker)
    warn_if_busy(workers)
    output = Output(args.output)
    output.begin(record)
    constructor = {
        "bundle": absolute(args.bundle),
        "sha256": record["manifest"],
        "image": image,
        "batch_size": args.batch_size,
        "early_exit": args.early_exit,
    }
    per_part = args.images_per_part or (256 if workers.gpus else 16)
    log.info("%d images, %s", len(names), workers)
    start = time.monotonic()

    def predict(names: list[str], per_part: int, last_try: bool = False) -> tuple[Totals, set[str]]:
        asked, given = replace(images, names=names), constructor | {"last_try": last_try}
        totals, done = predict_parts(asked, per_part, workers, given, output), output.done()
        unseen = totals.images - len(done.intersection(names))
        if unseen > 0:
            raise RuntimeError(
                f"{output.address}: the rows of {unseen} images were written by other machines and "
                "are not seen here: name a folder that all of them share"
            )
        return totals, done

    try:
        totals, done = predict(names, per_part)
        if lost := [name for name in names if name not in done]:
            check_store(images, lost, done)
            connect_anew(args.address)
            again = partial(predict, per_part=1, last_try=True)
            totals.add(predict_lost(lost, names, output, images, again))
    except RayError as error:
        reason = why_stopped(error, names, output)
        if FAILED_START not in str(error):
            reason += (
                "; start it again to continue, or leave out the images that are missing or end "
                "their workers: --images-per-part 1 finds them"
            )
        raise RuntimeError(f"the run stopped: {reason}") from error
    run = Run(totals, workers, time.monotonic() - start)
    log.info("%s", run)
    return run


def run(args: argparse.Namespace) -> int:
    """Predict every image that has no rows yet; return the exit code.

    Raises:
        ValueError: an address, the bundle or the cluster is not what it should be.
        RuntimeError: Ray gave up, or images have no rows in the end.
    """
    check_args(args)
    if args.report:
        if store_of(args.report):
            raise ValueError(f"--report {args.report}: expected a file on this machine")
        check_place(Path(args.report))
    manifest, sha256 = read_bundle(args.bundle)
    sample = args.submission and read_sample(args.submission, manifest.competition)
    images, output = find_images(args.images, manifest.competition), Output(args.output)
    if sample:
        check_sample(sample[1], images)
    record = {"manifest": sha256, "images": images.address}
    output.check(record)
    done = output.done()
    rest = [name for name in images.names if name not in done]
    count = len(images.names)
    log.info("%d images, %d of them have rows already", count, count - len(rest))
    last = predict_rest(args, images, rest, record) if rest else None
    if last:
        lacking = set(rest) - output.done()
        if lacking:
            why = f"{len(lacking)} images have no rows, such as {min(lacking)!r}"
            raise RuntimeError(f"{why}: start the run again, or leave them out")
    if sample:
        layout, pairs = sample
        empty_rows = manifest.empty_rows or not layout.may_omit_empty
        log.info("%s", output.write_submission(layout, pairs, images.names, empty_rows))
    if args.report:
        write_page(Path(args.report), output, images, last)
        log.info("%s", args.report)
    return 0


# --- command line ---------------------------------------------------------------------------------

EXAMPLE = (
    "  python cluster/predict.py --bundle dist/dataset --images s3://mill/strips "
    "--output s3://mill/masks"
)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--bundle", default="dist/dataset", help=f"folder with {MANIFEST}, on every machine")
    about = "folder of images, or a list of them: .csv or .parquet with a column `image`"
    add("--images", required=True, help=about)
    add("--output", required=True, help="folder that the rows are written to")
    about = "sample submission: its rows are written to submission.csv in the output"
    add("--submission", type=Path, metavar="SAMPLE", help=about)
    about = "HTML page to write: counts, rate, faults and some of the masks"
    add("--report", metavar="PAGE", help=about)
    about = "cluster to join (default: RAY_ADDRESS, or else a cluster that is started here)"
    add("--address", help=about)
    add("--gpus", type=int, help="number of workers with one GPU each; default all GPUs")
    add("--workers", type=int, help="number of workers without a GPU; default as many as fit")
    add("--cpus-per-worker", type=int, help="threads of a worker; default all of a machine")
    about = "a part is written, and retried, as a whole; default 256 with GPUs, 16 without"
    add("--images-per-part", type=int, help=about)
    about = "images that a network takes at once; default 4 on a GPU, 1 on the CPU"
    add("--batch-size", type=int, default=0, help=about)
    about = "run every pass: slower, with the same rows"
    add("--no-early-exit", dest="early_exit", action="store_false", help=about)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: run(parse_args(arguments)), (ValueError, OSError, RuntimeError))


if __name__ == "__main__":
    main()
