"""A Kaggle-like tree with the bundle mounted in it, and the kernel's process there."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from evaluation.checks import ProcessResult
from kernel.checks import read_json
from kernel.image_folders import IMAGE_SUFFIXES, list_images, one_folder
from kernel.kaggle import KAGGLE_RUN, SCORED_RUN
from kernel.logs import log
from kernel.manifest import load_manifest
from kernel.mounts import SAMPLE
from packing.notebook import PICTURE_CELL
from packing.paths import NOTEBOOK, SCRIPT
from training.competition_files import write_sample

IMAGES = "test_images"  # the competition's folder of them
NO_FILE = "del __file__  # a notebook has none: workers run the dataset's inference.py"
ADD_ARGUMENTS = """\
import re as _re
import sys as _sys

def _in_tree(word, mounted="/kaggle/input"):
    found = _re.fullmatch(f"(--[a-z-]+=)?{mounted}(/.*)?", word)
    return f"{found[1] or ''}{_sys.argv[2]}{found[2] or ''}" if found else word

main = lambda given=None, run=main: run([*map(_in_tree, given or []), *_sys.argv[1:]])"""

# --- the tree -------------------------------------------------------------------------------------


def _not_images(folder: str, names: Iterable[str]) -> list[str]:
    """What lies beside images and is none: a sample or a manifest there is not Kaggle's."""
    files = [name for name in names if Path(folder, name).is_file()]
    return [name for name in files if Path(name).suffix.lower() not in IMAGE_SUFFIXES]


def make_kaggle_tree(
    root: Path, bundle: Path, images: Path, ignore: Callable[..., Iterable[str]] | None = None
) -> Path:
    """Mount competition and dataset below `root`/input as Kaggle does; return the sample.

    What `ignore`, as `shutil.copytree` takes it, names of the dataset is left out.
    """
    manifest = load_manifest(bundle / "dataset")
    path = bundle / "dataset" / "dataset-metadata.json"
    slug = read_json(path).get("id")
    if not isinstance(slug, str):
        raise ValueError(f"{path}: lacks id; build the bundle again")
    mounted = root / "input" / "datasets" / slug
    shutil.copytree(bundle.resolve() / "dataset", mounted, copy_function=os.symlink, ignore=ignore)
    competition = root / "input" / "competitions" / manifest.competition.slug
    shutil.copytree(
        images.resolve(), competition / IMAGES, copy_function=os.symlink, ignore=_not_images
    )
    sample = competition / SAMPLE
    size = manifest.competition.image_size or (1, 1)
    names = list_images(one_folder(images, manifest.competition), manifest.competition.suffix)
    write_sample(sample, names, manifest.competition, size)
    (root / "working").mkdir()
    return sample


# --- the kernel -----------------------------------------------------------------------------------


def join_cells(notebook: Path) -> str:
    """Return the code cells of a notebook as a script that runs as they do.

    Its arguments, `--input` first, come behind those in the cells, where `/kaggle/input` becomes
    that input. The cell that shows the masks is left out: it must not, and cannot, cost the
    submission.

    Raises:
        ValueError: the file is no notebook.
    """
    try:
        cells = [each for each in read_json(notebook)["cells"] if each["cell_type"] == "code"]
        code = ["".join(each["source"]) for each in cells]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{notebook}: no notebook: build the bundle again") from error
    joined = [NO_FILE]
    for cell in code:
        if cell != PICTURE_CELL:
            joined += [cell, ADD_ARGUMENTS] if "\ndef main(" in cell else [cell]
    return "\n\n\n".join(joined) + "\n"


def runnable_script(bundle: Path, root: Path) -> Path:
    """Return the packed kernel; one that is a notebook as a script, which is written to `root`."""
    notebook, script = bundle / "kernel" / NOTEBOOK, bundle / "kernel" / SCRIPT.name
    if notebook.is_file():
        script = root / "notebook.py"
        script.write_text(join_cells(notebook), encoding="utf-8")
    return script


# --- the process ----------------------------------------------------------------------------------


def network_denial() -> list[str]:
    """Return the command prefix that denies the network; empty where unsupported."""
    prefix = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare"):
        return []
    allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    return prefix if allowed else []


def _peak_bytes() -> int:
    """The most memory that a child process has held; macOS counts bytes, Linux KiB."""
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def environment_elsewhere() -> dict[str, str]:
    """Return this process's environment without what marks a run on Kaggle."""
    marks = KAGGLE_RUN, SCORED_RUN
    return {name: value for name, value in os.environ.items() if name not in marks}


def run_kernel(root: Path, script: Path, quiet: bool = False) -> ProcessResult:
    """Run the kernel in `root`/working, as Kaggle does; a `quiet` one shows its log if it fails."""
    deny = network_denial()
    log.info("network %s", "denied" if deny else "NOT denied: this system does not allow it")
    command = [sys.executable, str(script.resolve()), "--input", str(root / "input")]
    start = time.perf_counter()
    done = subprocess.run(
        [*deny, *command],
        cwd=root / "working",
        env=environment_elsewhere(),  # in a session there it stays in its own folder, and refuses
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        check=False,
    )
    if done.returncode and done.stdout:
        sys.stdout.write(done.stdout)
    return ProcessResult(done.returncode, time.perf_counter() - start, bool(deny), _peak_bytes())
