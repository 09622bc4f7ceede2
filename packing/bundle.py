"""The bundle: a dataset and a kernel, built aside and swapped in when both are complete."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from kernel.competition import COMPETITION, Competition, load_competition
from kernel.files import write_json
from kernel.logs import progress
from kernel.manifest import MANIFEST, Manifest, load_manifest, manifest_entries
from kernel.shipped import check_scoring
from packing.joining import join_modules
from packing.members import PackedMember, pack_member
from packing.metadata import Metadata, read_metadata
from packing.notebook import build_notebook, written_cells
from packing.paths import (
    CALIBRATION,
    DATASET_METADATA,
    FIT,
    KERNEL_METADATA,
    LAST_REPORT,
    NOTEBOOK,
    REPORT,
    SCRIPT,
)
from packing.sources import OUT_OF_FOLD, left_out, propose_manifest, read_sources, unfinished
from packing.wheels import OPENVINO_WHEEL, WHEELS, check_openvino, fetch_wheels

LEFT_BY_SYSTEMS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # where a folder was looked at
BUNDLE_ENTRIES = {"dataset", "kernel", FIT, REPORT, LAST_REPORT, CALIBRATION}
BUILT = (MANIFEST, SCRIPT.name, DATASET_METADATA.name)  # in the dataset of every bundle

# --- staging --------------------------------------------------------------------------------------


def _stage_dataset(
    folder: Path, manifest: Manifest, sources: list[Path], wheels: list[Path], openvino: bool
) -> list[PackedMember]:
    """Lay out members, manifest, wheels and script, flat: Kaggle skips folders silently."""
    pairs = list(zip(sources, manifest.members, strict=True))
    bar = progress(pairs, "packing", "member")
    packed = [pack_member(source, spec, manifest, folder, openvino) for source, spec in bar]
    specs = [each.spec for each in packed]
    write_json(
        folder / MANIFEST, manifest_entries(replace(manifest, members=specs)), sort_keys=True
    )
    write_json(folder / COMPETITION, asdict(manifest.competition))  # columns have their order
    load_manifest(folder)  # what the kernel would refuse
    for wheel in wheels:
        shutil.copyfile(wheel, folder / wheel.name)
    (folder / SCRIPT.name).write_text(join_modules(SCRIPT), encoding="utf-8")
    return packed


def _stage_kernel(folder: Path, script: Path, notebook: bool, title: str) -> None:
    if notebook:
        write_json(
            folder / NOTEBOOK,
            build_notebook(script.read_text(encoding="utf-8"), title),
            sort_keys=True,
        )
    else:
        shutil.copyfile(script, folder / script.name)


# --- swapping in ----------------------------------------------------------------------------------


def check_out(out: Path) -> None:
    """Raise ValueError where `out` holds what is no bundle: the swap would take it away."""
    if out.is_symlink() and not out.exists():
        raise ValueError(f"{out}: a link to itself; choose another --out")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: is a file; choose another --out")
    found = {path.name for path in out.iterdir()} - LEFT_BY_SYSTEMS
    built = all((out / "dataset" / name).is_file() for name in BUILT)
    complete = found <= BUNDLE_ENTRIES and built
    if found - {FIT} and not complete:
        listed = ", ".join(sorted(found)[:3])
        raise ValueError(
            f"{out}: holds other things than a bundle ({listed}); choose another --out"
        )


def _check_inputs(paths: Iterable[Path], out: Path) -> None:
    """Raise ValueError for an input that lies in `out`: the swap would take it away."""
    for path in paths:
        if Path(os.path.realpath(path)).is_relative_to(out):
            raise ValueError(f"{path}: lies in {out}, which is replaced; choose another --out")


def check_not_inside(folder: Path) -> None:
    """Raise ValueError where the shell stands in a folder that is about to be replaced."""
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"{folder}: you are in this folder, which is replaced; go out of it first")


def swap_in(built: Path, out: Path, previous: Path) -> None:
    """Put a complete folder in the place of the previous one, which goes to `previous`.

    Whatever happens on the way, Ctrl-C too, one of both stands there afterwards.
    """
    try:
        if out.exists():
            out.rename(previous)
        built.rename(out)
    except BaseException:
        if previous.exists() and not out.exists():
            previous.rename(out)
        raise


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """A folder beside `out`, which goes at the end.

    Raises:
        ValueError: the disk is full; the error itself names no folder.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            yield Path(scratch)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"{out.parent}: {error.strerror}: make room there, or choose another --out"
        ) from error


def _keep_earlier(out: Path, bundle: Path) -> bool:
    """Copy into a bundle what the one before it, at `out`, leaves: its rate, its fit, a report.

    Return whether its last report is not the one that is kept: an ablation's, which took hours,
    goes before a later run's.
    """
    if (out / CALIBRATION).is_file():
        shutil.copy(out / CALIBRATION, bundle)
    if (out / FIT).is_dir():
        shutil.copytree(out / FIT, bundle / FIT)
    ended = (out / REPORT / "report.json").is_file()  # a run that failed leaves none
    ablated = [name for name in (REPORT, LAST_REPORT) if (out / name / MANIFEST).is_file()]
    report = out / next(iter(ablated), REPORT if ended else LAST_REPORT)
    if report.is_dir():
        shutil.copytree(report, bundle / LAST_REPORT)
    return ended and report.name == LAST_REPORT


def _print_not_kept(out: Path, report: bool, cells: str) -> None:
    """Say what stood at `out` that no build keeps: a report, what was written into a notebook."""
    if report:
        print(
            f"{out / REPORT}: of a run without an ablation, not kept; {LAST_REPORT} stays the "
            "ablation's, of an earlier bundle"
        )
    if cells:
        print(f"{out / 'kernel' / NOTEBOOK}: no build keeps what you wrote there:\n{cells}")


def _find_sources(weights: Path, competition: Competition | None) -> tuple[Manifest, list[Path]]:
    """The manifest of `weights` and its checkpoints; says what of the folder is not packed."""
    if names := unfinished(weights):
        print(
            f"{weights / OUT_OF_FOLD}: not finished, so not packed: {', '.join(names)}; go on with "
            "--fit --resume"
        )
    if not (weights / MANIFEST).is_file():
        propose_manifest(weights / MANIFEST, competition or load_competition(weights))
    manifest, sources = read_sources(weights, competition)
    slug = manifest.competition.slug
    check_scoring(slug, f"{weights}: competition {slug}")
    if others := left_out(weights, sources):
        print(f"not in {weights / MANIFEST}, so not packed: {', '.join(others)}")
    return manifest, sources


def build(
    weights: Path,
    out: Path,
    owner: str | None,
    openvino: bool = False,
    notebook: bool = False,
    competition: Competition | None = None,
) -> tuple[Metadata, list[PackedMember]]:
    """Build the bundle of the folder `weights` and put it in the place of `out`.

    Raises:
        ValueError: an input is bad; what stood at `out` stays as it was.
    """
    out = Path(os.path.realpath(out))
    check_out(out)
    check_not_inside(out)
    if openvino:
        check_openvino()
    manifest, sources = _find_sources(weights, competition)
    _check_inputs([weights, *sources], out)
    metadata = read_metadata(owner, manifest, notebook)
    wheels = fetch_wheels(WHEELS | OPENVINO_WHEEL if openvino else WHEELS)
    with scratch_beside(out) as scratch:
        bundle = scratch / "bundle"
        dataset, kernel = bundle / "dataset", bundle / "kernel"
        for folder in (bundle, dataset, kernel):
            folder.mkdir()
        packed = _stage_dataset(dataset, manifest, sources, wheels, openvino)
        _stage_kernel(kernel, dataset / SCRIPT.name, notebook, manifest.competition.title)
        write_json(dataset / DATASET_METADATA.name, metadata.dataset, sort_keys=True)
        write_json(kernel / KERNEL_METADATA.name, metadata.kernel, sort_keys=True)
        not_kept = _keep_earlier(out, bundle)
        cells = written_cells(out / "kernel" / NOTEBOOK)
        swap_in(bundle, out, scratch / "previous")
    _print_not_kept(out, not_kept, cells)
    return metadata, packed
