"""Ray Data against the plain kernel: one worker, two, each of one thread.

    python bench/cluster_overhead.py --bundle dist/dataset --strips 200

Each way runs over few strips and over all: the difference is what a strip takes, without what a
run starts. Ratios of one run count, and a machine that does nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from kernel.command import run_command
from training import synthetic

ROOT = Path(__file__).resolve().parents[1]
FEW = 8  # of the strips


def repeat_strips(folder: Path, count: int) -> Path:
    """Make a folder of `count` names for 20 synthetic strips, every other one clean."""
    folder.mkdir()
    for index in range(min(count, 20)):
        labels = (1 + index % 4,) if index % 2 else ()
        image, _ = synthetic.synthesize_strip(np.random.default_rng([2020, index]), labels)
        cv2.imwrite(str(folder / f"{index:07}.png"), image)
    for index in range(20, count):
        (folder / f"{index:07}.png").symlink_to(folder / f"{index % 20:07}.png")
    return folder


def time_command(*words: object) -> float:
    """Seconds of a script of this project, on one thread."""
    start = time.monotonic()
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def time_run(workers: int, bundle: Path, images: Path, scratch: Path) -> float:
    """Seconds of the kernel (no workers), or of so many workers."""
    paths = ["--bundle", bundle, "--images", images]
    if not workers:
        return time_command(bundle / "inference.py", *paths, "--output", scratch / "kernel.csv")
    output = Path(tempfile.mkdtemp(dir=scratch), "out")
    options = ["--address", "local", "--workers", workers, "--cpus-per-worker", 1]
    script = ROOT / "cluster" / "predict.py"
    return time_command(script, *paths, "--output", output, *options)


def measure(bundle: Path, strips: int) -> dict[str, float]:
    """Seconds that one strip adds, each way."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        few = repeat_strips(scratch / "few", FEW)
        every = repeat_strips(scratch / "all", strips)
        return {
            name: (time_run(n, bundle, every, scratch) - time_run(n, bundle, few, scratch))
            / (strips - FEW)
            for name, n in (("kernel", 0), ("one worker", 1), ("two workers", 2))
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print what a strip takes and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=ROOT / "dist" / "dataset")
    parser.add_argument("--strips", type=int, default=200)
    args = parser.parse_args(arguments)
    found = measure(args.bundle.resolve(), args.strips)
    found["one worker / kernel"] = found["one worker"] / found["kernel"]
    found["one worker / two"] = found["one worker"] / found["two workers"]
    found["overhead, ms a strip"] = 1000 * (found["one worker"] - found["kernel"])
    print(json.dumps({"strips": args.strips, **found}, indent=2))
    return 0


if __name__ == "__main__":
    run_command(main, (ValueError, OSError, subprocess.CalledProcessError))
