"""The dry run: the built bundle in a Kaggle-like tree, run as Kaggle runs it, and judged.

Lays out `input/` as Kaggle mounts it and runs dist/kernel/inference.py there as its own process,
with no argument but the input's root, and without a network where the system allows that. Its
report answers "will this run on Kaggle?", shows where the seconds went and the masks found. The
exit code is 0 where the bundle is ready for Kaggle, and 1 where it is not.
"""

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from evaluation.ablation import ablate
from evaluation.checks import (
    KILLED,
    Check,
    ProcessResult,
    check_answer,
    check_ended,
    check_metadata,
    check_process,
    check_record,
    check_wheels,
    failed_words,
    has_gpu,
    how_it_ended,
    is_clean,
)
from evaluation.drawing import AnnotatedStrip, draw_predictions, write_sheet
from evaluation.image_sizes import check_sizes, count_again, usual_size
from evaluation.kaggle_tree import make_kaggle_tree, run_kernel, runnable_script
from evaluation.machines import keep_rate, read_rates
from evaluation.measured import MeasuredRun
from evaluation.report import Report, as_page, build_report
from evaluation.report_text import ablation_table, as_lines
from kernel.command import new_parser, run_command
from kernel.competition import IMAGE_SIZE, Competition
from kernel.files import write_json
from kernel.image_folders import list_images, one_folder, open_images
from kernel.logs import log
from kernel.manifest import MANIFEST, Manifest, load_manifest
from kernel.mounts import SAMPLE
from kernel.run_record import RunRecord, read_run_record
from kernel.shipped import add_competition_option, find_competition
from kernel.task import read_sample
from packing.paths import CALIBRATION, DATASET_METADATA, LAST_REPORT, REPORT
from training.ground_truth import Rles, Truth, check_masks, check_names, read_truth
from training.metrics import Scores
from training.synthetic import Drawing, write_competition

OPENVINO_FILES = ("*.xml", "*.bin", "*.reference", "openvino-*.whl")  # in a dataset
SEED = 7  # of the synthetic strips
RESULTS = ("submission.csv", "contact_sheet.png", "run.json", "report.json", "index.html")

# --- the members on PyTorch -----------------------------------------------------------------------


def check_on_pytorch(root: Path, bundle: Path, images: Path, name: str) -> Check:
    """Run one image without OpenVINO: a machine with a GPU loads SMP and every checkpoint.

    By its record it is judged, too: an image that fails there leaves exit code 0.
    """
    one = root / "one" / name
    one.parent.mkdir(parents=True)
    one.symlink_to(images.resolve() / name)
    log.info("one image once more, without OpenVINO, as where there is a GPU")
    make_kaggle_tree(root, bundle, root / "one", shutil.ignore_patterns(*OPENVINO_FILES))
    code = run_kernel(root, runnable_script(bundle, root), quiet=True).exit_code
    without = "without OpenVINO, as where there is a GPU,"
    if code:
        return Check(None if code == KILLED else False, f"{without} it {how_it_ended(code)}")
    checks = [check_ended(root / "working")]
    if is_clean(checks):
        checks += check_record(read_run_record(root / "working" / "run.json"))
    if not is_clean(checks):
        return Check(False, f"{without} {failed_words(checks)}")
    return Check(True, "the members load on PyTorch, too, as where there is a GPU")


# --- the report -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DryRun:
    """What was run: a bundle on a folder of strips."""

    bundle: Path
    manifest: Manifest  # the bundle's
    images: Path
    truth: Truth | None  # where it is known
    budget_s: float | None  # None: the competition's limit
    drawn: bool  # the strips are synthetic, and no truth is a user's

    @property
    def competition(self) -> Competition:
        """The bundle's."""
        return self.manifest.competition

    @property
    def dataset(self) -> Path:
        """The packed dataset."""
        return self.bundle / "dataset"

    @property
    def out(self) -> Path:
        """The folder of the results."""
        return self.bundle / REPORT


def _build_report(
    run: DryRun,
    record: RunRecord,
    result: ProcessResult,
    checks: Sequence[Check],
    rles: Rles,
    scores: Scores,
) -> Report:
    """Build the report of a run that left the masks `rles`; with a known truth by `scores`."""
    defective = np.array([bool(rles.get(name)) for name in record.work], np.bool_)
    competition, calibration = run.competition, read_rates(run.bundle)
    known = competition.image_size or not run.drawn  # else nobody says how large images are
    size = usual_size(run.images, list(record.work)) if known else None
    counted_again = count_again(run.manifest, size) if size else {}
    measured = MeasuredRun(record, competition.n_images, counted_again)
    if size:
        checks = [*checks, *check_sizes(run.manifest, size, counted_again)]
    report = build_report(
        measured,
        result,
        checks,
        defective,
        calibration,
        run.budget_s,
        competition,
        on_gpu=has_gpu(run.bundle),
    )
    if run.truth is None:
        return report
    summary = scores.summary()
    named = summary["per_class"].items()
    per_class = {competition.name_of(int(label)): dice for label, dice in named}
    return replace(report, drawn=run.drawn, dice=summary | {"per_class": per_class})


def _write_report(run: DryRun, report: Report, pictures: list[AnnotatedStrip]) -> None:
    """Write report.json and the page."""
    write_json(run.out / "report.json", asdict(report))
    page = as_page(report, pictures)
    (run.out / "index.html").write_text(page, encoding="utf-8", errors="backslashreplace")


def _add_ablation(
    run: DryRun,
    truth: Truth,
    names: Sequence[str],
    report: Report,
    pictures: list[AnnotatedStrip],
) -> None:
    """Compare members, flips and settings on strips; write that into the report, and print it."""
    log.info("every pass for every strip, to compare members, flips and settings")
    proposal = run.out / MANIFEST
    ablation = ablate(run.dataset, run.images, names, truth, proposal)
    if ablation:
        _write_report(run, replace(report, ablation=ablation), pictures)
        print(f"\n{ablation_table(ablation)}\n\n   {proposal} is the proposal; yours is as it was")


def _report_on(
    run: DryRun, record: RunRecord, result: ProcessResult, checks: Sequence[Check]
) -> Report:
    """Report on the submission in `out`: beside it picture, report.json and page, and printed."""
    out, competition = run.out, run.competition
    rles = read_truth(out / "submission.csv", competition, from_kernel=True)
    names = sorted(record.work.keys() | record.faults.keys())
    pictures, scores = draw_predictions(run.images, names, rles, run.truth, competition)
    write_sheet(pictures, out / "contact_sheet.png")
    report = _build_report(run, record, result, checks, rles, scores)
    _write_report(run, report, pictures)
    print(f"\n{as_lines(report)}\n")
    for name in RESULTS:
        print(f"   {out / name}")
    if run.truth is not None and not run.drawn and record.work:
        _add_ablation(run, run.truth, names, report, pictures)  # long, and may be interrupted
    return report


def _conclude(run: DryRun, working: Path, result: ProcessResult, sample: Path) -> int:
    """Judge a run by what it left in `working`; return the exit code."""
    checks = check_process(result)
    if result.exit_code == 0:
        checks += check_answer(working / "submission.csv", sample, run.images, run.competition)
        checks.append(check_ended(working))
    if not is_clean(checks):  # there is nothing to draw or to time
        lines = "" if result.exit_code == KILLED else "; see its lines above"  # there are none
        print(f"\n== Not ready for Kaggle: {failed_words(checks)}{lines}")
        return 1
    for name in ("submission.csv", "run.json"):
        shutil.copy(working / name, run.out / name)
    checks += [*check_metadata(run.bundle, run.competition), check_wheels(run.dataset)]
    record = read_run_record(working / "run.json")
    if run.drawn:
        what = "Dice and early exit"
        if run.competition.image_size is None:
            what = f"size (the description has no image_size), {what}"
        words = f"these {record.strips} strips were drawn: real ones differ in {what}"
        checks.append(Check(None, f"{words}; give --images of yours"))
    whole = next(iter(record.work), None)  # an image that did not fail
    if whole and record.device == "cpu" and any(run.dataset.glob("*.xml")):
        checks.append(check_on_pytorch(working.parent / "pytorch", run.bundle, run.images, whole))
    stages = record.stages | {"start": result.seconds - record.seconds}
    record = replace(record, seconds=result.seconds, stages=stages)  # with the interpreter's start
    report = _report_on(run, record, result, [*checks, *check_record(record)])
    print(f"\n== {report.verdict}")
    return 0 if report.ready else 1


# --- the input ------------------------------------------------------------------------------------


def check_args(args: argparse.Namespace) -> tuple[Manifest, Path | None]:
    """Return the bundle's manifest, and the folder of the images; None: some are to be drawn.

    Raises:
        ValueError: a file or folder is missing or not what it should be.
    """
    if args.strips < 1:
        raise ValueError(f"--strips {args.strips}: expected 1 or more")
    if args.budget_s is not None and not 0 < args.budget_s < math.inf:
        raise ValueError(f"--budget-s {args.budget_s:g}: expected seconds above 0")
    if args.ground_truth and not args.images:
        raise ValueError("--ground-truth needs the --images that it is of")
    if all((args.bundle / name).is_file() for name in (MANIFEST, DATASET_METADATA.name)):
        raise ValueError(f"{args.bundle}: the dataset of a bundle; name the folder above it")
    manifest = load_manifest(args.bundle / "dataset")
    competition = manifest.competition
    if args.competition and find_competition(args.competition) != competition:
        raise ValueError(
            f"--competition {args.competition}: {args.bundle} was built for {competition.slug}, or "
            "of another description of it; build it again with the same --competition"
        )
    if not args.images:
        return manifest, None
    images, sample = open_images(args.images, competition)[0], args.images.resolve().parent / SAMPLE
    if sample.is_file():  # the competition's own; the run gets one written as described
        read_sample(sample, competition)
    return manifest, images


# --- command line ---------------------------------------------------------------------------------

EXAMPLE = "  python evaluation/dry_run.py --bundle dist --images fifty_strips"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--bundle", type=Path, default=Path("dist"), help="what build_kernel.py wrote")
    add("--images", type=Path, help="folder of strips (default: synthetic ones, drawn on the spot)")
    about = "a train.csv of these strips: their Dice, and an ablation with a proposal"
    add("--ground-truth", type=Path, help=about)
    add("--strips", type=int, default=8, help="how many to draw where --images is not given")
    about = "seconds that the scored run may take, at most and by default the competition's limit"
    add("--budget-s", type=float, help=about)
    about = "a run.json from Kaggle: its rate replaces the assumed one, from now on"
    add("--calibrate", type=Path, metavar="RUN.JSON", help=about)
    add_competition_option(parser)
    return parser.parse_args(arguments)


def _clear(run: DryRun) -> None:
    """Take away an earlier run's results; an ablation took hours, and goes where a build's go."""
    if (run.out / MANIFEST).is_file():
        before = run.bundle / LAST_REPORT
        shutil.rmtree(before, ignore_errors=True)
        run.out.rename(before)
    run.out.mkdir(exist_ok=True)
    for name in RESULTS:
        (run.out / name).unlink(missing_ok=True)


def _run_bundle(
    args: argparse.Namespace, manifest: Manifest, images: Path | None, root: Path
) -> int:
    """One dry run in the scratch folder `root`; without `images`, of strips that are drawn."""
    mounted, truth_csv, competition = args.images, args.ground_truth, manifest.competition
    if images is None:
        log.info("drawing %d synthetic strips", args.strips)
        size = competition.image_size or IMAGE_SIZE
        drawing = Drawing(SEED, size, evenly=True, competition=competition)
        write_competition(root / "steel", drawing, test=args.strips)
        mounted, truth_csv = root / "steel" / "test_images", root / "steel" / "test.csv"
        images = one_folder(mounted, competition)
    truth = read_truth(truth_csv, competition) if truth_csv else None
    if truth is not None and args.ground_truth:
        names = list_images(images)
        check_names(truth, names, truth_csv, mounted)
        check_masks(truth, names, truth_csv, images, competition)
    run = DryRun(args.bundle, manifest, images, truth, args.budget_s, not args.images)
    _clear(run)
    log.info("running the kernel in a Kaggle-like tree")
    sample = make_kaggle_tree(root, run.bundle, mounted)
    result = run_kernel(root, runnable_script(run.bundle, root))
    return _conclude(run, root / "working", result, sample)


def dry_run(args: argparse.Namespace) -> int:
    """Run the bundle and report on it; return 0 where it is ready for Kaggle, else 1.

    Raises:
        ValueError: a file or folder is missing or not what it should be.
    """
    if sys.platform == "win32":
        raise ValueError(
            "the dry run lays links, which Windows keeps from most users: run it in WSL"
        )
    manifest, images = check_args(args)
    if args.calibrate:
        machine = keep_rate(args.bundle, args.calibrate)
        what = "%s has the rate of %s from now on; to forget it, delete %s"
        log.info(what, machine, args.calibrate, args.bundle / CALIBRATION)
    with tempfile.TemporaryDirectory(prefix="dry_run_") as root:
        return _run_bundle(args, manifest, images, Path(root))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: dry_run(parse_args(arguments)))


if __name__ == "__main__":
    main()
