"""One process a GPU: images dealt out, results merged, no worker's death a loss."""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from kernel.logs import Stages, log
from kernel.manifest import read_json
from kernel.mounts import Task
from kernel.predict import Outcome, Run, predict_here
from kernel.rows import Submission, read_rows

COLLECT_S = 1.0  # seconds between two looks at what the workers have written


def start_worker(
    run: Run, task: Task, folder: Path, shard: tuple[int, int]
) -> subprocess.Popen[bytes]:
    """This script once more, for one shard of the images on one GPU, its results into `folder`."""
    (number, count), options = shard, run.options
    script = run.bundle / "inference.py"  # a notebook has no file of its own
    if not script.is_file():
        script = Path(__file__).resolve().with_name("inference.py")
    command = [sys.executable, str(script)]
    named = {
        "bundle": run.bundle,
        "images": task.images,
        "sample": options.sample,
        "shard": f"{number}/{count}",
        "output": folder / f"{number}.csv",
        "report": folder / f"{number}.json",
        "batch-size": options.batch_size,
        "budget-s": run.left_s(),
    }
    command += [word for key, value in named.items() if value for word in (f"--{key}", str(value))]
    command += [] if options.early_exit else ["--no-early-exit"]
    command += ["--allow-missing-members"] if options.allow_missing_members else []
    threads = max((os.cpu_count() or 1) // count, 1)
    environment = {"CUDA_VISIBLE_DEVICES": str(number - 1), "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=os.environ | environment)


def collect(folder: Path, numbers: Iterable[int], submission: Submission) -> None:
    """Takes over the masks that the workers have written so far."""
    for path in (folder / f"{number}.csv" for number in numbers):
        if path.is_file():
            for image, label, rle in read_rows(path)[1]:
                submission.put(image, {label: rle})
    submission.save_soon()


def read_worker(report: Path, stages: Stages, share: float) -> Outcome:
    """What a worker says of its images; its seconds count by its `share` of the workers."""
    entries = read_json(report)
    for stage, seconds in entries["stages"].items():
        stages.seconds[stage] += share * seconds
    known = ("faults", "work", "strip_s", "device", "gpu_bytes")
    told = {key: entries[key] for key in known}
    return Outcome(**told, left_out=Counter(entries["left_out"]))


def predict_by_workers(run: Run, task: Task, count: int) -> Outcome:
    """A task dealt out to `count` processes; what one of them cannot finish is done here."""
    outcome, numbers = Outcome(), range(1, count + 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        workers = [start_worker(run, task, folder, (number, count)) for number in numbers]
        try:
            while any(worker.poll() is None for worker in workers):
                time.sleep(COLLECT_S)
                collect(folder, numbers, run.submission)
        finally:  # interrupted: no worker outlives this process, and what they did stands
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()
            collect(folder, numbers, run.submission)
        for number, worker in zip(numbers, workers, strict=True):
            report = folder / f"{number}.json"
            if report.is_file():
                outcome.add(read_worker(report, run.stages, 1 / count))
                continue
            rest = task.shard(number - 1, count)
            log.warning(
                "worker %d of %d ended with exit code %d: its %d images run here",
                *(number, count, worker.returncode, len(rest.names)),
            )
            outcome.add(predict_here(run, rest))
    return outcome
