"""The rehearsal: the built bundle in a Kaggle-like tree, run the way Kaggle runs it, and judged.

Lays `input/` out as Kaggle mounts it, runs dist/kernel/inference.py there as its own process, with
no arguments but the input's root and with the network denied where the system allows it, then tells
where the seconds went, what the scored run's 5,506 strips would take, and shows what was found.
"""

import argparse
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from kernel.drawing import Found, write_sheet
from kernel.logs import start_log
from kernel.manifest import MANIFEST, load_manifest, read_json
from kernel.mounts import IMAGE_SUFFIXES, SAMPLE, read_sample
from kernel.projection import HOUR_S, calibrate, read_calibration, read_run
from kernel.report import Check, Ended, as_json, as_lines, as_page, check_run, tell
from kernel.rows import LAYOUTS, write_submission
from kernel.validate import check_submission
from weights import steel
from weights.choose import choose
from weights.score import read_truth

IMAGES = "test_images"  # the competition's folder of them

log = logging.getLogger("kernel")

# --- the Kaggle-like tree -------------------------------------------------------------------------


def lay_tree(root: Path, bundle: Path, images: Path) -> Path:
    """`root`/input with the competition and the dataset as Kaggle mounts them today; the sample."""
    manifest = load_manifest(bundle / "dataset")
    slug = json.loads((bundle / "dataset" / "dataset-metadata.json").read_text())["id"]
    mounted = root / "input" / "datasets" / slug
    shutil.copytree(bundle.resolve() / "dataset", mounted, copy_function=os.symlink)
    competition = root / "input" / "competitions" / manifest.competition
    shutil.copytree(images.resolve(), competition / IMAGES, copy_function=os.symlink)
    names = sorted(path.name for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    everything = f"1 {manifest.image_size[0] * manifest.image_size[1]}"  # as the real sample has it
    rows = [(name, 0) for name in names]
    write_submission(competition / SAMPLE, LAYOUTS["today"], rows, dict.fromkeys(rows, everything))
    (root / "working").mkdir()
    return competition / SAMPLE


def without_network() -> list[str]:
    """What to put before a command so that it has no network; nothing where that is not allowed."""
    prefix = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare"):
        return []
    allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    return prefix if allowed else []


def peak_bytes() -> int:
    """The most memory that a process started here has held; macOS counts bytes, Linux KiB."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def script_of(bundle: Path) -> Path:
    """The packed kernel; for a notebook the dataset's script, of the same code."""
    script = bundle / "kernel" / "inference.py"
    return script if script.is_file() else bundle / "dataset" / "inference.py"


def run_kernel(root: Path, script: Path) -> tuple[dict[str, Any], Ended]:
    """Runs the kernel in `root`/working as Kaggle would; its run.json, with the start-up in it.

    Raises:
        ValueError: it ended with another exit code than 0; its own words stand above.
    """
    deny = without_network()
    log.info("network %s", "denied" if deny else "NOT denied: this system does not allow it")
    command = [sys.executable, str(script.resolve()), "--input", str(root / "input")]
    start = time.perf_counter()
    code = subprocess.run([*deny, *command], cwd=root / "working", check=False).returncode
    seconds = time.perf_counter() - start
    if code:
        raise ValueError(f"the kernel ended with exit code {code}; see its lines above")
    told = read_json(root / "working" / "run.json")
    told["stages"]["start"] = seconds - told["seconds"]
    return told | {"seconds": seconds}, Ended(code, seconds, bool(deny), peak_bytes())


def check_answer(submission: Path, sample: Path, classes: int) -> Check:
    """The validator's verdict; what else it has to say stands in the kernel's log.

    Raises:
        ValueError: Kaggle would refuse the submission.
    """
    layout, pairs = read_sample(sample, None, classes)
    errors = check_submission(submission, layout.columns, pairs, sample.parent / IMAGES).errors
    if errors:
        raise ValueError(f"{submission.name} is invalid: {'; '.join(errors)}")
    return Check(True, f"{submission.name} is valid: {len(pairs):,} rows")


# --- command line ---------------------------------------------------------------------------------

EXAMPLE = "  python kernel/dry_run.py --bundle dist --images severstal/test_images"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=f"{EXAMPLE}\n\n{__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, default=Path("dist"), help="what build_kernel.py wrote")
    add("--images", type=Path, help="folder of strips (default: synthetic ones, drawn on the spot)")
    add(
        "--ground-truth",
        type=Path,
        help="a train.csv of these strips: the Dice, and what to choose by it",
    )
    add("--strips", type=int, default=8, help="how many to draw where --images is not given")
    add("--seed", type=int, default=7, help="of the synthetic strips")
    add("--budget-s", type=float, default=HOUR_S, help="seconds that you allow; default the hour's")
    about = "a run.json from Kaggle: its rate replaces the assumed one, from now on"
    add("--calibrate", type=Path, metavar="RUN.JSON", help=about)
    return parser.parse_args()


def tell_all(
    args: argparse.Namespace,
    images: Path,
    truth_csv: Path | None,
    told: dict[str, Any],
    ended: Ended,
    answer: Check,
) -> None:
    """Writes the report of a run into `--bundle`/report, where its submission stands."""
    out, dataset = args.bundle / "report", args.bundle / "dataset"
    rles, truth = read_truth(out / "submission.csv"), read_truth(truth_csv) if truth_csv else None
    names = sorted(told["work"].keys() | told["faults"].keys())
    pictures, scores = Found(images, names, rles, truth, load_manifest(dataset).classes).draw()
    write_sheet(pictures, out / "contact_sheet.png")
    run = read_run(told, out / "run.json")
    defective = np.array([bool(rles.get(name)) for name in told["work"]], np.bool_)
    checks = [*check_run(ended, told), answer]
    calibration = read_calibration(args.bundle)
    report = tell(run, told, ended, checks, defective, calibration, args.budget_s)
    report |= {"dice": None if truth is None else scores.summary(), "choice": None}
    if truth is not None and args.ground_truth:
        log.info("every pass for every strip, to choose by")
        report["choice"] = choose(dataset, images, names, truth, out / MANIFEST)
    (out / "report.json").write_text(as_json(report), encoding="utf-8")
    (out / "index.html").write_text(as_page(report, pictures), encoding="utf-8")
    print(f"\n{as_lines(report)}\n")


def rehearse(args: argparse.Namespace, root: Path) -> None:
    """One dry run in the scratch folder `root`; its results go to `--bundle`/report."""
    images, truth_csv = args.images, args.ground_truth
    if images is None:
        log.info("drawing %d synthetic strips", args.strips)
        steel.write_competition(root / "steel", 0, args.strips, args.seed, evenly=True)
        images, truth_csv = root / "steel" / "test_images", root / "steel" / "test.csv"
    log.info("laying the Kaggle-like tree and running the kernel in it")
    sample = lay_tree(root, args.bundle, images)
    told, ended = run_kernel(root, script_of(args.bundle))
    classes = load_manifest(args.bundle / "dataset").classes
    answer = check_answer(root / "working" / "submission.csv", sample, classes)
    out = args.bundle / "report"
    out.mkdir(exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)  # an earlier run's proposal
    for name in ("submission.csv", "run.json"):
        shutil.copy(root / "working" / name, out / name)
    tell_all(args, images, truth_csv, told, ended, answer)
    for name in ("submission.csv", "contact_sheet.png", "run.json", "report.json", "index.html"):
        print(f"   {out / name}")
    if args.ground_truth:
        print(f"   {out / MANIFEST} is the proposal; yours is as it was")


def main() -> None:
    """Runs the command line; bad input ends it with one clear line and exit code 1."""
    start_log()
    args = parse_args()
    if args.ground_truth and not args.images:
        sys.exit("error: --ground-truth needs the --images that it speaks of")
    for folder in (args.bundle / "dataset" / MANIFEST, args.images):
        if folder is not None and not folder.exists():
            sys.exit(f"error: {folder}: not there; build the bundle with build_kernel.py first")
    try:
        if args.calibrate:
            machine = calibrate(args.bundle, args.calibrate)
            log.info("%s has the rate of %s from now on", machine, args.calibrate)
        with tempfile.TemporaryDirectory(prefix="dry_run_") as root:
            rehearse(args, Path(root))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
