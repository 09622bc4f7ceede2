"""Fit the members of a list within some hours on Kaggle, in one session or in several.

It finds the competition's training set under --input, and there too what an earlier session left:
that is copied into the working folder and gone on from. Each member gets its share of the hours,
and as many steps as fit into it by the pace that is measured first. A session ends in time, with
the state of each member that is not finished. It leaves in the working folder what
build_kernel.py --weights packs, out_of_fold.json, experiments.csv and curves.png.
"""

import argparse
import hashlib
import math
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from kernel.checks import check_fields, read_json
from kernel.command import INTERRUPTED, new_parser, run_command
from kernel.competition import SEVERSTAL
from kernel.faults import one_line
from kernel.files import write_json
from kernel.image_folders import open_images
from kernel.images import size_of
from kernel.kaggle import enter_working_folder
from kernel.logs import log, progress
from kernel.manifest import MANIFEST, MemberSpec, source_entries
from kernel.members import hash_file, read_entry
from kernel.mounts import find_one, folders_with
from training.curves import draw_curves
from training.fit_members import Job, fit_all, last_line, list_devices, read_jobs
from training.results import SCORES
from training.strips import read_each

RECORD = "out_of_fold.json"  # each member's scores, or null; what an earlier output is known by
RUNS = Path("runs")
SESSION_HOURS = 11.5  # of Kaggle's 12
RESERVE = 0.03  # of a session: for installing, copying, and what is written in the end
READERS = 16  # files at once
MIN_AREA = 256  # pixels of the full 256×1600, the 4th place's
MEMBERS = Path(__file__).with_name("members.txt")
# What a member's own line does not say. The numbers of steps are a proportion, by --minutes.
COMMON = [
    "--encoder-weights", "imagenet", "--crops", "8", "--crop-size", "256x512",
    "--crop-steps", "6000", "--whole-steps", "600", "--save-every", "1000",
    "--validation-strips", "100000", "--present-weight", "1",
    "--presence-strips", "1256",  # half of a fold: class 2 is on one strip in fifty
]  # fmt: skip

EXAMPLE = "  python training/kaggle_fit.py --input /kaggle/input --hours 11.5"


# --- earlier sessions -----------------------------------------------------------------------------


def bring_earlier(root: Path, resume: bool) -> None:
    """Copy what an earlier session left under `root` into the working folder, unless it is there.

    A member whose checkpoint came damaged is not taken: it is fitted anew.

    Raises:
        ValueError: two earlier outputs are there, and they differ, or none is, and this session is
            to `resume` one.
    """
    found = folders_with(root, RECORD)
    if Path(RECORD).exists():
        return
    if not found:
        if resume:
            raise ValueError(
                f"no earlier output under {root}: the kernel's last version left none, as one that "
                "failed or was cancelled does; make an earlier version's output a dataset and name "
                "it in dataset_sources of kernel-metadata.json before the push, or build without "
                "--resume to begin anew"
            )
        log.info("no earlier output under %s: every member begins anew", root)
        return
    if len(found) > 1:  # Kaggle may mount one output at two places
        found = sorted({hash_folder(folder): folder for folder in found[::-1]}.values())
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise ValueError(f"more than one earlier output: {listed}; leave one among the sources")
    log.info("going on from %s", found[0])
    for source in sorted(path for path in found[0].rglob("*") if path.is_file()):
        target = source.relative_to(found[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)  # without its mode: the mount is read-only
    for path in found[0].glob("*.safetensors"):
        try:
            check_fields(read_entry(path), MemberSpec, "its header")
        except ValueError as error:
            log.warning("%s is damaged (%s): it is fitted anew", path, error)
            Path(path.name).unlink()


def find_competition_data(root: Path) -> Path:
    """Find the folder of the competition's train.csv; a dataset for --extra may have one too.

    Raises:
        ValueError: there is none, or there are several, none of them mounted as the competition.
    """
    mounted = [each for each in folders_with(root, "train.csv") if SEVERSTAL.slug in each.parts]
    if mounted:
        return mounted[0]
    return find_one(root, "train.csv", f"the competition {SEVERSTAL.slug}", "--input")


def hash_folder(folder: Path) -> str:
    """Return one hash of the names and contents of all files below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(folder)} {hash_file(path)}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def scores_of(job: Job) -> dict[str, Any] | None:
    """Return a finished member's scores; None of one that is not finished."""
    path = RUNS / job.name / SCORES
    finished = path.is_file() and Path(f"{job.name}.safetensors").is_file()
    return read_json(path) if finished else None


# --- who gets how long ----------------------------------------------------------------------------


def plan(jobs: Sequence[Job], devices: int, minutes: float) -> list[Job]:
    """Share out each device's minutes, and put the members in the order in which they start.

    Neighbours of the list share a device, alike. Where the devices' numbers differ, the members at
    the head of the list have fewer beside them, and more time. The plan is the same in every
    session, whatever is finished.
    """
    starts: list[tuple[float, Job]] = []
    for device in range(devices):
        first, last = (len(jobs) * (device + i) // devices for i in (0, 1))
        for place, job in enumerate(jobs[first:last]):
            share = minutes / (last - first)
            options = [*COMMON, "--minutes", f"{share:.3f}", *job.options]
            starts.append((place * share, replace(job, options=options)))
    return [job for _, job in sorted(starts, key=lambda start: start[0])]


def read_once(paths: Sequence[Path]) -> None:
    """Read every file, so that it comes from memory from now on.

    The pace of a fit's steps is measured once: on a disk that has not read the strips yet it would
    be the disk's. One that cannot be read is left to the fit, which draws another.
    """

    def read(path: Path) -> None:
        with suppress(OSError):
            path.read_bytes()

    with ThreadPoolExecutor(READERS) as pool:
        for _ in progress(pool.map(read, paths), "strips read", "strip", len(paths)):
            pass


# --- what is left behind --------------------------------------------------------------------------


def write_results(jobs: Sequence[Job], image_size: tuple[int, int]) -> None:
    """Write what the finished members of a list give together; their states are not needed more."""
    record = {job.name: scores_of(job) for job in jobs}
    write_json(Path(RECORD), record)
    finished = [name for name, scores in record.items() if scores]
    if finished:
        members = [read_entry(Path(f"{name}.safetensors")) for name in finished]
        others = {"competition": SEVERSTAL.slug, "image_size": image_size}
        entries = source_entries(members, **others) | {"min_area": MIN_AREA}
        write_json(Path(MANIFEST), entries)
    for name in finished:
        for state in (RUNS / name).glob("*.ckpt"):
            state.unlink()
    try:
        draw_curves(RUNS, [job.name for job in jobs], Path("curves.png"))
    except Exception as error:  # a log that a fit is writing, or that was cut off anywhere
        log.warning("no learning curves: %s", one_line(error))


def check_list(jobs: Sequence[Job]) -> None:
    """Raise ValueError where an earlier output is here, and none of its members in the list.

    Some that the list lacks are logged: they are in what is written no more.
    """
    record = read_json(Path(RECORD)) if Path(RECORD).is_file() else {}
    earlier = {name for name, scores in record.items() if scores}
    earlier |= {path.parent.name for path in RUNS.glob("*/*.ckpt")}
    names = [job.name for job in jobs]
    if earlier and earlier.isdisjoint(names):
        raise ValueError(
            f"the earlier output is of {', '.join(sorted(earlier))}, the list of "
            f"{', '.join(names)}: build with the --members of then, or without --resume"
        )
    if left_out := earlier.difference(names):
        log.warning("no member of the list, so not of the output: %s", ", ".join(sorted(left_out)))


# --- the session ----------------------------------------------------------------------------------


def fit_on_kaggle(args: argparse.Namespace) -> int:
    """Fit what is not finished until the session's end; 1 where nothing came of it.

    A member that fails costs no other, nor the output that there is: it is an error in the log. So
    is anything else once a member or a state is here, for Kaggle keeps no output of a version that
    fails.
    """
    start = time.monotonic()
    if not (math.isfinite(args.hours) and args.hours > 0):
        raise ValueError(f"--hours {args.hours}, expected a number above 0")
    bring_earlier(args.input, args.resume)
    try:
        return fit_until(start + 3600 * (1 - RESERVE) * min(args.hours, SESSION_HOURS), args)
    except Exception as error:
        if not is_output():
            raise
        log.error("%s; what was fitted before is this version's output", one_line(error))
        return 0


def is_output() -> bool:
    """Whether a member or a state is in the working folder."""
    return any(Path().glob("*.safetensors")) or any(RUNS.glob("*/*.ckpt"))


def fit_until(end: float, args: argparse.Namespace) -> int:
    """Fit until `end` of time.monotonic(); 1 where a member failed and there is no output."""
    data = find_competition_data(args.input)
    devices = list_devices(args.devices)
    if not args.devices and devices == ["cpu"]:
        raise ValueError(
            "no GPU is here, and on the CPU the hours hold next to no steps: turn the accelerator "
            "on, or ask for --devices cpu"
        )
    workers = max(1, (os.cpu_count() or 1) // len(devices))
    common = ["--data", str(data), "--runs", str(RUNS), "--out", ".", "--workers", str(workers)]
    jobs = read_jobs(args.members, common)
    check_list(jobs)
    folder, names = open_images(data / "train_images", SEVERSTAL)
    paths = [folder / name for name in names]
    image_size = size_of(next(read_each(paths, str(folder), SEVERSTAL)))
    write_results(jobs, image_size)
    read_once(paths)
    minutes = 60 * (1 - RESERVE) * args.hours
    planned = [job for job in plan(jobs, len(devices), minutes) if not scores_of(job)]
    failed = False
    for job, code in fit_all(planned, devices, end - time.monotonic()):
        if code not in (0, INTERRUPTED):
            failed = True
            log.error("%s failed with exit code %d: %s", job.name, code, last_line(job.log))
        write_results(jobs, image_size)
    left = [job.name for job in jobs if not scores_of(job)]
    if left:
        log.warning("not finished: %s; build with --fit --resume and push again", ", ".join(left))
    return int(failed and not is_output())


# --- command line ---------------------------------------------------------------------------------


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    about = "where the competition and earlier outputs are mounted (default %(default)s)"
    add("--input", type=Path, default=Path("/kaggle/input"), help=about)
    add("--members", type=Path, default=MEMBERS, help="the list (default %(default)s)")
    about = f"for all sessions together (default %(default)s); one ends after {SESSION_HOURS}"
    add("--hours", type=float, default=SESSION_HOURS, help=about)
    add("--resume", action="store_true", help="refuse to begin anew: go on from an earlier output")
    about = "one member at a time on each, like cuda:0 cuda:1 or cpu cpu (default: every GPU)"
    add("--devices", nargs="+", metavar="DEVICE", help=about)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    enter_working_folder()
    run_command(lambda: fit_on_kaggle(parse_args(arguments)))


if __name__ == "__main__":
    main()
