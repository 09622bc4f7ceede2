"""What Ray Data costs beside the plain kernel, in parts that can be asked for by name.

    python bench/cluster_overhead.py kernel thread workers kernels overhead
    python bench/cluster_overhead.py million

- kernel: seconds a strip with one worker on all processors, and with the plain kernel
- thread: the same with one thread each, so that Ray's own processes have another processor
- workers: seconds a strip with one worker of one thread, and with two
- kernels: the same with plain kernels beside each other, which is what the machine allows
- overhead: ms that the engine adds to a strip of stub members, by strips a part
- million: as many images through stub members, and the memory after each tenth of them

A strip's seconds are taken while a run is under way, not from its start: the first parts wait for
Ray's processes, which import PyTorch beside them. What a run takes before is a figure of its own.
All are added to cluster.json beside this file; cluster.md is their table.
Ratios of one run count, on a machine that does nothing else.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch
from strips import repeat, write_strips
from torch import Tensor

from kernel.checks import read_json
from kernel.command import needs, new_parser, run_command
from kernel.competition import IMAGE_SIZE
from kernel.files import write_json
from kernel.images import Image, Size
from kernel.logs import log
from kernel.manifest import MANIFEST, MemberSpec
from kernel.members import Member
from kernel.scheduling import Scheduler

with needs("dev"):
    import psutil

with needs("cluster"):
    import ray

    from cluster.engine import ENVIRONMENT, Workers, predict_parts
    from cluster.images import ImageSet
    from cluster.output import Output
    from cluster.worker import Worker, manifest_hash

HERE = Path(__file__).parent
ROOT = HERE.parent
PER_PART = 8  # strips of real members, every other one clean: parts take equally long
WARM_UP = 1  # parts of each worker that do not count
SMALL = (64, 96)  # (H, W) of the million
STORE_BYTES = 300_000_000  # Ray's object store
Figures = dict[str, Any]

# --- a run's seconds a strip ----------------------------------------------------------------------


def written(output: Path) -> list[float]:
    """When each part was written, in seconds and in order."""
    return sorted(path.stat().st_mtime for path in output.glob("part-*.parquet"))


def strip_seconds(times: Sequence[float], workers: int, per_part: int, warm_up: int = 1) -> float:
    """Seconds a strip from when the workers have written `warm_up` parts each to the last part."""
    first = warm_up * workers
    return (times[-1] - times[first - 1]) / ((len(times) - first) * per_part)


def run_command_line(words: Sequence[object], threads: int | None = None) -> float:
    """Seconds of a script of this project, on all cores or so many threads."""
    environment = {name: text for name, text in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    start = time.monotonic()
    command = [sys.executable, *map(str, words)]
    subprocess.run(command, check=True, env=environment | {"PYTHONPATH": str(ROOT)})
    return time.monotonic() - start


def time_kernel(bundle: Path, images: Path, scratch: Path, threads: int | None = None) -> Figures:
    """The plain kernel."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    places = ["--bundle", bundle, "--images", images, "--output", folder / "submission.csv"]
    record = folder / "run.json"
    seconds = run_command_line([bundle / "inference.py", *places, "--report", record], threads)
    each = [s for _, s in sorted(read_json(record)["strip_s"].items())]
    counted = each[WARM_UP * PER_PART :]
    strip_s = sum(counted) / len(counted)
    return {"strip_s": strip_s, "before_s": seconds - strip_s * len(each)}


def time_kernels(bundle: Path, images: Path, scratch: Path, count: int) -> Figures:
    """So many plain kernels of one thread beside each other, each with all the images."""
    with ThreadPoolExecutor(count) as pool:
        runs = [pool.submit(time_kernel, bundle, images, scratch, 1) for _ in range(count)]
        found = [run.result() for run in runs]
    return {
        "strip_s": sum(each["strip_s"] for each in found) / count**2,
        "before_s": max(each["before_s"] for each in found),
    }


def time_workers(
    bundle: Path, images: Path, scratch: Path, workers: int, cpus: int | None = None
) -> Figures:
    """So many workers on a cluster that is started here."""
    output = Path(tempfile.mkdtemp(dir=scratch), "out")
    words = [ROOT / "cluster" / "predict.py", "--address", "local", "--workers", workers]
    words += ["--bundle", bundle, "--images", images, "--output", output]
    words += ["--images-per-part", PER_PART, *(["--cpus-per-worker", cpus] if cpus else [])]
    seconds, times = run_command_line(words), written(output)
    strip_s = strip_seconds(times, workers, PER_PART, WARM_UP)
    return {"strip_s": strip_s, "before_s": seconds - strip_s * len(times) * PER_PART}


Way = Callable[[Path, Path, Path], Figures]  # bundle, images, scratch → seconds


def _race(args: argparse.Namespace, ways: dict[str, Way]) -> Figures:
    """Two ways in turn, `rounds` times: medians of both, and first ÷ second."""
    found: dict[str, list[Figures]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        pair = write_strips(scratch / "pair", 2)  # one clean, one not
        images = repeat(pair, scratch / "images", args.strips)
        for _ in range(args.rounds):
            for name, run in ways.items():
                found[name].append(run(args.bundle, images, scratch))
    medians: Figures = {
        name: {key: median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    one, other = (medians[name]["strip_s"] for name in medians)
    rounds = {name: [run["strip_s"] for run in runs] for name, runs in found.items()}
    return {"strips": args.strips, "rounds": rounds, "ratio": one / other, "ways": medians}


def measure_kernel(args: argparse.Namespace) -> Figures:
    """One worker against the plain kernel, each on all processors: at most 1.05 is asked."""
    return _race(args, {"one worker": partial(time_workers, workers=1), "kernel": time_kernel})


def measure_thread(args: argparse.Namespace) -> Figures:
    """One worker of one thread against the plain kernel with one."""
    worker, kernel = partial(time_workers, workers=1, cpus=1), partial(time_kernel, threads=1)
    return _race(args, {"one worker": worker, "kernel": kernel})


def measure_workers(args: argparse.Namespace) -> Figures:
    """One worker of one thread against two: at least 1.8 is asked."""
    one, two = (partial(time_workers, workers=workers, cpus=1) for workers in (1, 2))
    return _race(args, {"one worker": one, "two workers": two})


def measure_kernels(args: argparse.Namespace) -> Figures:
    """One plain kernel of one thread against two, without an engine."""
    one, two = (partial(time_kernels, count=count) for count in (1, 2))
    return _race(args, {"one kernel": one, "two kernels": two})


# --- stub members ---------------------------------------------------------------------------------


def encode(images: Tensor) -> tuple[Tensor, ...]:
    """Gates as bright as the brightest pixel, and the images as features."""
    return images.amax(dim=(-2, -1)).expand(-1, 4), images


def decode(gates: Tensor, images: Tensor) -> Tensor:
    """The brighter a pixel, the surer a defect there."""
    return images.expand(-1, 4, -1, -1) * gates[:, :, None, None]


class StubWorker(Worker):
    """A worker whose one member is a stub; all else is as it is."""

    def _load(self, device: torch.device, plain: bool = False) -> Scheduler:
        def stubs(_: Path, specs: Sequence[MemberSpec], *__: Any, **___: Any) -> dict[str, Member]:
            return {spec.name: Member(spec, encode, decode, stride=32) for spec in specs}

        with mock.patch("kernel.ensemble_loading.load_members", stubs):
            return super()._load(device, plain)


class StubImages(ImageSet):
    """Any number of names for two files."""

    def load(self, name: str) -> Image:
        """One of the two."""
        return super().load(f"{int(name) % 2:07}.png")


def write_stub_bundle(folder: Path) -> dict[str, Any]:
    """Write a bundle whose member is never loaded; return what `Worker` takes."""
    folder.mkdir()
    (folder / "stub.safetensors").touch()
    model = {"arch": "FPN", "encoder_name": "resnet18", "in_channels": 1, "classes": 4}
    model["aux_params"] = {"classes": 4}
    member = {"name": "stub", "file": "stub.safetensors", "model": model}
    manifest = {"members": [member | {"mean": [0.0], "std": [1.0]}], "flips": ["none"]}
    write_json(folder / MANIFEST, manifest)
    blank = np.zeros((32, 32), np.uint8)
    return {"bundle": str(folder), "sha256": manifest_hash(folder), "image": blank} | {
        "batch_size": 1,
        "early_exit": True,
    }


def stub_set(scratch: Path, count: int, size: Size) -> StubImages:
    """So many names for two images of a size, a dark one and one with a bright rectangle."""
    folder, (height, width) = scratch / "images", size
    folder.mkdir()
    for index in range(2):
        image = np.random.default_rng(index).integers(20, 90, size, np.uint8)
        image[height // 4 : height // 2, width // 4 : width // 2] += 160 * index
        cv2.imwrite(str(folder / f"{index:07}.png"), image)
    names = [f"{index:07}" for index in range(count)]
    return StubImages(f"file://{folder}", names, f"file://{folder}")


def start_ray() -> None:
    """Start a small cluster in this process."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": ENVIRONMENT | {"PYTHONPATH": str(ROOT)}},
    )


def run_stubs(images: StubImages, per_part: int, workers: Workers, scratch: Path) -> list[float]:
    """The images through the engine; return when each part was written."""
    constructor = write_stub_bundle(scratch / "bundle")
    output = Output(str(scratch / "out"))
    output.begin({})
    with mock.patch("cluster.engine.Worker", StubWorker):
        totals = predict_parts(images, per_part, workers, constructor, output)
    assert (totals.images, totals.faults) == (len(images.names), 0), totals
    assert totals.masks > 0
    return written(scratch / "out")


# --- the engine's overhead ------------------------------------------------------------------------


def time_stub_alone(images: StubImages, scratch: Path) -> float:
    """Seconds a strip of a stub worker in this process."""
    torch.set_num_threads(1)
    constructor, output = write_stub_bundle(scratch / "bundle"), Output(str(scratch / "out"))
    output.begin({})
    worker = StubWorker(images, output, **constructor, cpus=1)
    start = time.monotonic()
    worker.predict(images.names)
    return (time.monotonic() - start) / len(images.names)


def measure_overhead(args: argparse.Namespace) -> Figures:
    """Milliseconds a strip of full size: the worker alone, and what Ray adds by strips a part."""
    count, found = args.stub_strips, {}
    with tempfile.TemporaryDirectory() as folder:
        images = stub_set(Path(folder), count, IMAGE_SIZE)
        alone = time_stub_alone(images, Path(folder))
    start_ray()
    for per_part in (16, max(count // 8, 1)):
        with tempfile.TemporaryDirectory() as folder:
            images = stub_set(Path(folder), count, IMAGE_SIZE)
            times = run_stubs(images, per_part, Workers(1, cpus=1), Path(folder))
            found[str(per_part)] = 1000 * (strip_seconds(times, 1, per_part) - alone)
    ray.shutdown()
    return {"strips": count, "alone_ms": 1000 * alone, "added_ms": found}


# --- a million images -----------------------------------------------------------------------------


def _descendants() -> Iterator[tuple[str, int]]:
    """Command line and private memory, bytes, of this process and those below it, on Linux."""
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # it has ended
            memory = process.memory_info()
            yield " ".join(process.cmdline()), memory.rss - memory.shared


def private_mb() -> dict[str, float]:
    """MB that are not shared: of the driver, the workers, Ray's other processes, its services."""
    sums = Counter[str](driver=0, workers=0, tasks=0, services=0)
    for index, (command, private) in enumerate(_descendants()):
        kind = "tasks" if command.startswith("ray::") else "services"
        kind = "workers" if command.startswith("ray::MapWorker") else kind
        sums["driver" if index == 0 else kind] += private
    return {kind: round(private / 1e6, 1) for kind, private in sums.items()}


def watch(output: Path, parts: int, samples: list[Figures], ended: threading.Event) -> None:
    """Sample the memory after each tenth of the parts."""
    start = time.monotonic()
    for tenth in range(1, 10):
        while len(written(output)) < parts * tenth / 10:
            if ended.wait(1):
                return
        samples.append({"done": tenth / 10, "s": round(time.monotonic() - start, 1)} | private_mb())
        log.info("%s", samples[-1])


def measure_million(args: argparse.Namespace) -> Figures:
    """Small images through stub members: images/s, and the memory on the way."""
    count, per_part, samples = args.images, args.images_per_part, list[Figures]()
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        scratch, ended = Path(folder), threading.Event()
        images, parts = stub_set(scratch, count, SMALL), -(-count // per_part)
        watcher = threading.Thread(target=watch, args=(scratch / "out", parts, samples, ended))
        watcher.start()
        try:
            times = run_stubs(images, per_part, Workers(args.workers, cpus=1), scratch)
        finally:
            ended.set()
            watcher.join()
    ray.shutdown()
    rate = 1 / strip_seconds(times, args.workers, per_part)
    return {"images": count, "per_part": per_part, "images_per_s": rate, "memory_mb": samples}


# --- what is written ------------------------------------------------------------------------------


RATIOS = {
    "kernel": "one worker ÷ the plain kernel",
    "thread": "one worker ÷ the plain kernel, one thread each",
    "workers": "one worker ÷ two workers of one thread",
    "kernels": "one plain kernel ÷ two of one thread",
}


def table(results: Figures) -> str:
    """The figures there are, in Markdown."""
    rows = []
    for name, words in RATIOS.items():
        if name in results:
            found = results[name]
            one, other = (each["strip_s"] for each in found["ways"].values())
            rows.append(
                f"| {words}, seconds a strip | {one:.2f} ÷ {other:.2f} = {found['ratio']:.2f} |"
            )
    for per_part, added in results.get("overhead", {}).get("added_ms", {}).items():
        alone = results["overhead"]["alone_ms"]
        words = f"the engine adds, stub members, {per_part} strips a part"
        rows.append(f"| {words} | {added:.1f} ms to {alone:.1f} ms |")
    if "million" in results:
        found = results["million"]
        words = f"{found['images']:,} small images, stub members, {found['per_part']} a part"
        rows.append(f"| {words} | {found['images_per_s']:,.0f} images/s |")
        for kind in ("driver", "workers", "tasks", "services"):
            tenths = ", ".join(f"{sample[kind]:.0f}" for sample in found["memory_mb"])
            rows.append(f"| private memory after each tenth: {kind} | {tenths} MB |")
    return "\n".join(["| | |", "|---|---|", *rows, ""])


PARTS = {
    "kernel": measure_kernel,
    "thread": measure_thread,
    "workers": measure_workers,
    "kernels": measure_kernels,
    "overhead": measure_overhead,
    "million": measure_million,
}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("parts", nargs="+", choices=PARTS, help="what is measured")
    add("--bundle", type=Path, default=ROOT / "dist" / "dataset", help="of the races")
    add("--strips", type=int, default=32, help="of the races")
    add("--rounds", type=int, default=2, help="of the races")
    add("--stub-strips", type=int, default=1600, help="of overhead")
    add("--images", type=int, default=1_000_000, help="of million")
    add("--images-per-part", type=int, default=2048, help="of million")
    add("--workers", type=int, default=1, help="of million")
    add("--out", type=Path, default=HERE, help="folder of cluster.json and cluster.md")
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace) -> int:
    """Measure the parts that were asked for, and write after each.

    Raises:
        ValueError: too few strips: none would be left to count.
    """
    warm_up = 2 * WARM_UP * PER_PART  # of two workers, which then get as many parts each
    if args.strips <= warm_up or args.strips % (2 * PER_PART):
        raise ValueError(
            f"--strips {args.strips}: expected a multiple of {2 * PER_PART} above {warm_up}"
        )
    args.bundle, path = args.bundle.resolve(), args.out / "cluster.json"
    results = read_json(path) if path.is_file() else {}
    for name in args.parts:
        log.info("%s", name)
        machine = {
            "cpus": os.cpu_count(),
            "ray": ray.__version__,
            "python": platform.python_version(),
        }
        results[name] = PARTS[name](args) | {"machine": machine}
        write_json(path, results)
        (args.out / "cluster.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(
        lambda: measure(parse_args(arguments)), (ValueError, OSError, subprocess.CalledProcessError)
    )


if __name__ == "__main__":
    main()
