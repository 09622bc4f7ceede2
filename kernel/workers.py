"""Workers: one process a GPU, its images, and their results."""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from kernel.checks import read_json
from kernel.command import BAD_INPUT
from kernel.logs import Stages, log
from kernel.mounts import Task
from kernel.predict import LAST, Outcome, RunContext, predict_here
from kernel.rows import Submission, csv_line, read_rows
from kernel.tta import Half, Pass

COLLECT_S = 1.0  # seconds between two looks at what the workers have written
WORKER_MARGIN_S = 30.0  # a worker that hangs ends by itself before this process does
ENDING_S = 30.0  # that an interrupted worker has for its last save
GPU_ROUNDS = 2  # in which images run on the GPUs
MOST_IN_VAIN = 3  # rounds on the CPU in a row that give no image
SHARED_SAMPLE = "sample.csv"  # the rows of all workers, which each shards alike


def start_worker(
    run: RunContext, task: Task, folder: Path, shard: tuple[int, int], on_gpu: bool = True
) -> subprocess.Popen[bytes]:
    """Start this script once more, for one shard of the images on one GPU; results to `folder`."""
    (number, count), options, left_s = shard, run.options, run.until_watchdog_s()
    script = run.bundle / "inference.py"  # a notebook has no file of its own
    if not script.is_file():
        script = Path(__file__).resolve().with_name("inference.py")
    command = [sys.executable, str(script)]
    named = {
        "bundle": run.bundle,
        "images": task.images,
        "sample": folder / SHARED_SAMPLE,
        "shard": f"{number}/{count}",
        "output": folder / f"{number}.csv",
        "report": folder / f"{number}.json",
        "batch-size": options.batch_size if on_gpu else 1,
        "streams": options.streams if on_gpu else 1,
        "budget-s": max(left_s - WORKER_MARGIN_S, left_s / 2, 1.0),
    }
    command += [word for key, value in named.items() if value for word in (f"--{key}", str(value))]
    command += [] if options.early_exit else ["--no-early-exit"]
    command += ["--allow-missing-members"] if options.allow_missing_members else []
    threads = max((os.cpu_count() or 1) // count, 1)
    gpu = _gpu_of(number) if on_gpu else ""
    environment = {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": str(threads)}
    # Ctrl-C is for this process alone, which ends its workers:
    return subprocess.Popen(command, env=os.environ | environment, process_group=0)


def write_rows(path: Path, task: Task) -> None:
    """Write a task's rows, empty, as the sample that a worker reads."""
    lines = [csv_line(task.layout.columns), *(task.layout.line(*pair, "") for pair in task.pairs)]
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape", newline="")


def _gpu_of(number: int) -> str:
    """The GPU of a worker, from 1, among those that CUDA_VISIBLE_DEVICES leaves, if it is set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = max(torch.cuda.device_count(), 1)
    gpus = list(map(str, range(count))) if visible is None else visible.split(",")
    return gpus[(number - 1) % len(gpus)]


def collect(folder: Path, numbers: Iterable[int], submission: Submission) -> None:
    """Take over what the workers have written so far; a csv of theirs has the images done."""
    rules = submission.layout.competition
    for path in (folder / f"{number}.csv" for number in numbers):
        if path.is_file():
            for image, label, rle in read_rows(path, competition=rules, cut_off=0)[1]:
                submission.set_masks(image, {label: rle})
    submission.save_throttled()


def read_last(csv: Path) -> str:
    """Return the image that a worker began last, by what `predict_task` notes beside its csv."""
    path = csv.with_suffix(LAST)
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def read_worker(report: Path, stages: Stages, share: float) -> Outcome:
    """Read a worker's run.json; its seconds count by its `share` of the workers."""
    record = read_json(report)
    for stage, seconds in record["stages"].items():
        stages.seconds[stage] += share * seconds
    for member, halves in record["networks"].items():
        for half, seconds in halves.items():
            stages.networks[member, Half(half)] += share * seconds
    same = {key: record[key] for key in ("faults", "work", "strip_s", "device", "gpu_bytes")}
    passes = [Pass(each["member"], each["flip"], tuple(each["flops"])) for each in record["passes"]]
    return Outcome(**same, passes=passes, dropped=Counter(record["dropped"]))


@dataclass
class Round:
    """What the workers of one round gave, and which of them died: without a record of theirs."""

    outcome: Outcome
    codes: dict[int, int]  # number → exit code, of those that died
    last: str = ""  # the image that the first of these was at


def run_workers(run: RunContext, task: Task, count: int, on_gpus: bool) -> Round:
    """Share a task among `count` processes; their masks go to the submission."""
    found, numbers = Round(Outcome(), {}), range(1, count + 1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(folder / SHARED_SAMPLE, task)
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for number in numbers:
                workers.append(start_worker(run, task, folder, (number, count), on_gpus))
            while any(worker.poll() is None for worker in workers):
                time.sleep(COLLECT_S)
                collect(folder, numbers, run.submission)
        finally:  # interrupted: no worker outlives this process, and its finished rows stay
            for worker in workers:
                worker.terminate()
            for worker in workers:
                try:
                    worker.wait(ENDING_S)
                except subprocess.TimeoutExpired:  # a call that hears no signal
                    worker.kill()
                    worker.wait()
            collect(folder, numbers, run.submission)
        for number, worker in zip(numbers, workers, strict=True):
            try:
                outcome = read_worker(folder / f"{number}.json", run.stages, 1 / count)
                found.outcome.add(outcome)
            except (OSError, ValueError, KeyError):
                found.codes[number] = worker.returncode
                found.last = found.last or read_last(folder / f"{number}.csv")
    return found


def predict_by_workers(run: RunContext, task: Task, count: int) -> Outcome:
    """Share a task among `count` processes; what one of them cannot finish others do.

    They are new ones on the same GPUs, for a GPU's fault may end with its process, and then one on
    the CPU: the image at which that dies is left out, and another goes on behind it. What killed a
    worker would end the run, so images run in this process only where every worker refused its
    input: then it says why.
    """
    outcome, rest, died, in_vain = Outcome(), task, "", 0
    for attempt in itertools.count(1):
        on_gpus = attempt <= GPU_ROUNDS
        processes = min(count if on_gpus else 1, len(rest.names))
        done = len(run.submission.done)
        found = run_workers(run, rest, processes, on_gpus)
        in_vain = 0 if on_gpus or len(run.submission.done) > done else in_vain + 1
        outcome.add(found.outcome)
        if found.codes:
            number, code = min(found.codes.items())
            died = f"worker {number} of {processes} ended with exit code {code}"
            log.warning("%s", died)
            if not run.submission.done and set(found.codes.values()) == {BAD_INPUT}:
                return predict_here(run, task)  # it says what is wrong, as in one process
            if not on_gpus and found.last and found.last not in run.submission.done:
                outcome.faults[found.last] = died
        rest = task.without(run.submission.done | outcome.faults.keys())
        stuck = in_vain == MOST_IN_VAIN or (not on_gpus and not found.last)
        if not found.codes or not rest.names or run.deadline().over or stuck:
            break
        log.warning("%d images are left, and run in another", len(rest.names))
    outcome.faults |= dict.fromkeys(rest.names, died or "was not predicted")
    return outcome
