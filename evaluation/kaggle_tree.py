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
from kernel.kaggle import KAGGLE_VARIABLES
from kernel.logs import log
from kernel.manifest import load_manifest
from kernel.mounts import SAMPLE
from training.competition_files import write_sample

IMAGES = "test_images"  # the competition's folder of them

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


def find_script(bundle: Path) -> Path:
    """The packed kernel; where that is a notebook the dataset's script, of the same code."""
    script = bundle / "kernel" / "inference.py"
    return script if script.is_file() else bundle / "dataset" / "inference.py"


def run_kernel(root: Path, script: Path, quiet: bool = False) -> ProcessResult:
    """Run the kernel in `root`/working, as Kaggle does; a `quiet` one shows its log if it fails."""
    deny = network_denial()
    log.info("network %s", "denied" if deny else "NOT denied: this system does not allow it")
    command = [sys.executable, str(script.resolve()), "--input", str(root / "input")]
    elsewhere = {key: value for key, value in os.environ.items() if key not in KAGGLE_VARIABLES}
    start = time.perf_counter()
    done = subprocess.run(
        [*deny, *command],
        cwd=root / "working",
        env=elsewhere,  # a rehearsal in a session there stays in its own folder, and refuses
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        check=False,
    )
    if done.returncode and done.stdout:
        sys.stdout.write(done.stdout)
    return ProcessResult(done.returncode, time.perf_counter() - start, bool(deny), _peak_bytes())
