"""The rehearsal: the built bundle in a Kaggle-like tree, run the way Kaggle runs it, and timed.

Lays `input/` out as Kaggle mounts it, runs dist/kernel/inference.py there as its own process, with
no arguments but the input's root and with the network denied where the system allows it, then
prints the seconds per stage, projects them on the scored run's 5,506 strips and draws the masks.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kernel.contact_sheet import MOST, Picture, caption_of, draw_strip, stack
from kernel.inference import (
    IMAGE_SUFFIXES,
    LAYOUTS,
    MANIFEST,
    SAMPLE,
    load_manifest,
    read_image,
    read_sample,
    write_submission,
)
from kernel.validate import check_submission
from weights import steel
from weights.score import Masks, Scores, dice, draw_truth, read_truth

SCORED_STRIPS = 5506  # of the scored run
IMAGES = "test_images"  # the competition's folder of them
BUDGET_S = 3600  # Kaggle's hour

# --- the Kaggle-like tree -------------------------------------------------------------------------


def lay_tree(root: Path, bundle: Path, images: Path) -> Path:
    """`root`/input with the competition and the dataset as Kaggle mounts them today; the sample."""
    manifest = load_manifest(bundle / "dataset")
    slug = json.loads((bundle / "dataset" / "dataset-metadata.json").read_text())["id"]
    shutil.copytree(bundle / "dataset", root / "input" / "datasets" / slug)
    competition = root / "input" / "competitions" / manifest.competition
    shutil.copytree(images, competition / IMAGES)
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


def script_of(bundle: Path) -> Path:
    """The packed kernel; for a notebook the dataset's script, of the same code."""
    script = bundle / "kernel" / "inference.py"
    return script if script.is_file() else bundle / "dataset" / "inference.py"


def run_kernel(root: Path, script: Path) -> dict[str, Any]:
    """Runs the kernel in `root`/working as Kaggle would; its run.json, with the start-up in it.

    Raises:
        ValueError: it ended with another exit code than 0; its own words stand above.
    """
    deny = without_network()
    state = "denied" if deny else "NOT denied, this system does not allow it"
    print(f"   network: {state}", flush=True)  # before the kernel's own lines
    report = root / "working" / "run.json"
    command = [sys.executable, str(script.resolve()), "--input", str(root / "input")]
    start = time.perf_counter()
    ended = subprocess.run(
        [*deny, *command, "--report", str(report)], cwd=root / "working", check=False
    )
    if ended.returncode:
        raise ValueError(f"the kernel ended with exit code {ended.returncode}; see its lines above")
    seconds = time.perf_counter() - start
    result: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    result["stages"] = {"start": seconds - result["seconds"], **result["stages"]}
    return result | {"seconds": seconds}


def check_answer(submission: Path, sample: Path, classes: int) -> None:
    """Raises ValueError where Kaggle would refuse the submission; the kernel's log has the rest."""
    layout, pairs = read_sample(sample, None, classes)
    errors = check_submission(submission, layout.columns, pairs, sample.parent / IMAGES).errors
    if errors:
        raise ValueError(f"{submission.name} is invalid: {'; '.join(errors)}")


# --- what it took ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """A run's seconds, taken to the scored run: what is paid once, and what each strip costs."""

    once_s: float
    strip_s: float

    @property
    def total_s(self) -> float:
        """Seconds for the scored run's strips on this machine."""
        return self.once_s + SCORED_STRIPS * self.strip_s


def project(report: dict[str, Any]) -> Projection:
    """Start-up, import, loading and the engines' check are paid once; the rest grows."""
    once_s = sum(report["stages"][stage] for stage in ("start", "import", "load", "check"))
    return Projection(once_s, (report["seconds"] - once_s) / report["strips"])


def print_stages(report: dict[str, Any]) -> None:
    """Seconds and share of every stage; the networks' by member."""
    by_stage: dict[str, float] = defaultdict(float)
    for stage, seconds in report["stages"].items():
        by_stage["/".join(stage.split("/")[:2])] += seconds
    by_stage["other"] = report["seconds"] - sum(by_stage.values())
    print(f"\n   {'stage':<28}{'seconds':>9}{'share':>8}")
    for stage, seconds in by_stage.items():
        print(f"   {stage:<28}{seconds:>9.2f}{seconds / report['seconds']:>8.1%}")


def print_projection(report: dict[str, Any]) -> None:
    """The verdict on the hour, for this machine alone."""
    projection = project(report)
    fits = projection.total_s <= BUDGET_S
    print(
        f"\n   {projection.once_s:.1f} s once + {projection.strip_s:.3f} s a strip, on"
        f" {report['device']} here: {SCORED_STRIPS:,} strips would take"
        f" {projection.total_s:,.0f} s of {BUDGET_S:,} s: {'fits' if fits else 'TOO LONG'}"
    )
    if report["device"] == "cpu":
        print(
            "   That is this machine's CPU. Kaggle's kernel runs on a GPU; only a run there tells."
        )


# --- the picture ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A run's result beside what is known of it."""

    images: Path
    found: dict[str, dict[int, str]]  # image → class → RLE
    truth: dict[str, dict[int, str]] | None
    classes: int

    def masks(self, name: str, size: tuple[int, int]) -> tuple[Masks, Masks | None]:
        """Found and true masks (classes, H, W) of one image; None where no truth is known."""
        found = draw_truth(self.found[name], self.classes, size)
        if self.truth is None:
            return found, None
        return found, draw_truth(self.truth.get(name, {}), self.classes, size)


def draw_sheet(drawn: Drawn, sheet: Path, most: int = MOST) -> Scores:
    """Writes the contact sheet of the first `most` strips, and scores all that have a truth."""
    scores = Scores()
    strips: list[Picture] = []
    for name, rles in drawn.found.items():
        try:
            image = read_image(drawn.images / name)
        except (ValueError, OSError):
            continue  # the kernel's log has named it
        masks, truth = drawn.masks(name, (image.shape[0], image.shape[1]))
        caption = caption_of(name, sorted(rles))
        if truth is not None:
            scores.add(masks, truth)
            caption += f"   Dice {np.mean(dice(masks, truth)):.3f}"
        if len(strips) < most:
            outlined = [] if truth is None else list(truth)
            strips.append(draw_strip(image, list(masks), outlined, caption))
    cv2.imwrite(str(sheet), stack(strips))
    return scores


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
    add("--ground-truth", type=Path, help="a train.csv of these strips, for the Dice")
    add("--strips", type=int, default=8, help="how many to draw where --images is not given")
    add("--seed", type=int, default=7, help="of the synthetic strips")
    return parser.parse_args()


def rehearse(args: argparse.Namespace, root: Path) -> None:
    """One dry run in the scratch folder `root`; its results go to `--bundle`/report."""
    images, truth_csv = args.images, args.ground_truth
    if images is None:
        print(f"== drawing {args.strips} synthetic strips")
        steel.write_competition(root / "steel", train=0, test=args.strips, seed=args.seed)
        images, truth_csv = root / "steel" / "test_images", root / "steel" / "test.csv"
    print("== laying the Kaggle-like tree and running the kernel in it")
    sample = lay_tree(root, args.bundle, images)
    report = run_kernel(root, script_of(args.bundle))
    classes = load_manifest(args.bundle / "dataset").classes
    check_answer(root / "working" / "submission.csv", sample, classes)
    print_stages(report)
    print_projection(report)
    out = args.bundle / "report"
    out.mkdir(exist_ok=True)
    for name in ("submission.csv", "run.json"):
        shutil.copy(root / "working" / name, out / name)
    truth = read_truth(truth_csv) if truth_csv else None
    drawn = Drawn(images, read_truth(out / "submission.csv"), truth, classes)
    scores = draw_sheet(drawn, out / "contact_sheet.png")
    if truth is not None:
        print(f"\n   Dice {json.dumps(scores.summary())}")
    print(f"\n   {out / 'submission.csv'}\n   {out / 'contact_sheet.png'}\n   {out / 'run.json'}")


def main() -> None:
    """Runs the command line; bad input ends it with one clear line and exit code 2."""
    args = parse_args()
    for folder in (args.bundle / "dataset" / MANIFEST, args.images):
        if folder is not None and not folder.exists():
            sys.exit(f"error: {folder}: not there; build the bundle with build_kernel.py first")
    try:
        with tempfile.TemporaryDirectory(prefix="dry_run_") as root:
            rehearse(args, Path(root))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
