"""A race on one machine: the packed ensemble against the ways in which others run the same members.

    python bench/race.py --bundle dist --strips 8 --rounds 5 --real severstal/test_images

Every candidate gets the same strips, half of them clean, and takes its turn in every round;
medians count, and their ratios. Each runs in a process of its own, for they set up their process as
they like; the others idle meanwhile. The others run in their best mode: of the ways that an engine
has (streams, threads, layouts) the quickest on this machine. With `--real` they race a second time,
on real strips drawn with `--seed`. Writes results.json, chart.png and table.md beside this file.
"""

import argparse
import copy
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
import ttach
from safetensors.torch import save_file
from torch import Tensor, nn

from evaluation.inputs import sample_strips
from kernel.command import new_parser, run_command
from kernel.competition import SEVERSTAL
from kernel.ensemble_loading import load_ensemble
from kernel.images import Image, Size, image_to_tensor, read_image, size_of
from kernel.kaggle import KAGGLE_RUN
from kernel.logs import progress
from kernel.manifest import Manifest, load_manifest
from kernel.members import Member, build_network, load_member
from kernel.options import Options
from kernel.predict import read_ahead
from kernel.rle import encode_rle
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from kernel.tta import apply_flip
from packing.bundle import build
from training import synthetic
from training.metrics import Masks, dice

HERE = Path(__file__).parent
CPU = torch.device("cpu")
N_SCORED_IMAGES = SEVERSTAL.n_images
CLASSES_DRAWN = ((), (3,), (), (4,), (), (1,), (), (3,))  # half of the strips are clean
STARTS, LONG_RUN = 3, 100  # runs of one strip, and strips of the run whose memory is measured


# --- candidates -----------------------------------------------------------------------------------

Predict = Callable[[Sequence[Path]], dict[str, Masks]]  # paths → every image's (classes, H, W)


class Whole(nn.Module):
    """A member in one piece: grey images (B, 1, H, W) in [0, 1] → probabilities."""

    def __init__(self, member: Member) -> None:
        super().__init__()
        self.encoder, self.decoder = member.encoder, member.decoder

    def forward(self, images: Tensor) -> Tensor:
        """Both halves."""
        probabilities: Tensor = self.decoder(*self.encoder(images))
        return probabilities


def as_public_kernels(bundle: Path) -> Predict:
    """Eager PyTorch: member by member, each strip decoded anew, two a batch, flips by ttach."""
    manifest = load_manifest(bundle)
    members = [load_member(bundle, spec, CPU) for spec in manifest.members]
    views = list(ttach.Compose([ttach.VerticalFlip(), ttach.HorizontalFlip()]))[:3]  # not both

    @torch.inference_mode()
    def run(paths: Sequence[Path]) -> dict[str, Masks]:
        sums: dict[str, Tensor] = {}
        for member in members:
            for start in range(0, len(paths), 2):
                pair = paths[start : start + 2]
                images = torch.from_numpy(np.stack([read_image(path) for path in pair]))
                images = images[:, None] / 255
                for view in views:
                    found = view.deaugment_mask(member(view.augment_image(images)))
                    for path, probabilities in zip(pair, found, strict=True):
                        sums[path.name] = sums.get(path.name, 0) + probabilities
        masks = {}
        for name, total in sums.items():
            masks[name] = (total / len(members) / len(views) > manifest.threshold).numpy()
            for mask in masks[name]:
                encode_rle(mask)
        return masks

    return run


def load_scheduler(bundle: Path, image: Image, early_exit: bool, streams: int) -> Scheduler:
    """This project's own loading and scheduling, its engines checked on an image."""
    manifest = load_manifest(bundle)
    ensemble = load_ensemble(bundle, manifest, CPU, Stages(), image, streams=streams)
    return Scheduler(ensemble, early_exit=early_exit, threads=streams)


def ours(bundle: Path, image: Image, early_exit: bool, streams: int) -> Predict:
    """The kernel's way: strip by strip, from the file to its run lengths."""
    scheduler = load_scheduler(bundle, image, early_exit, streams)

    def run(paths: Sequence[Path]) -> dict[str, Masks]:
        strips = read_ahead(paths[0].parent, [path.name for path in paths], ahead=4)
        masks = {}
        for state in scheduler.predict_strips(strips, len(paths)):
            if state.fault:
                raise RuntimeError(f"{state.strip.name}: {state.fault}")
            masks[state.strip.name] = state.masks
            for mask in masks[state.strip.name]:
                encode_rle(mask)
        return masks

    return run


# --- the others, in their best mode ---------------------------------------------------------------

Infer = Callable[[Sequence[Tensor]], list[Tensor]]  # images (1, 1, H, W) → their probabilities


def quickest(ways: Sequence[Infer], images: Sequence[Tensor]) -> Infer:
    """The way that takes the least time for these images; the better of two runs counts."""
    seconds = dict.fromkeys(range(len(ways)), float("inf"))
    for index, way in enumerate(ways):
        way(images)  # compiled and warm
        for _ in range(2):
            start = time.perf_counter()
            way(images)
            seconds[index] = min(seconds[index], time.perf_counter() - start)
    return ways[min(seconds, key=lambda index: seconds[index])]


def one_by_one(run: Callable[[Tensor], Tensor]) -> Infer:
    """Images one after another."""
    return lambda images: [run(image) for image in images]


def traced(whole: Whole, images: Sequence[Tensor]) -> Infer:
    """TorchScript, frozen: channels last or first."""
    ways = []
    for layout in (torch.contiguous_format, torch.channels_last):
        network = copy.deepcopy(whole).to(memory_format=layout)
        given = images[0].to(memory_format=layout)
        trace = torch.jit.trace(network, given, check_trace=False)  # type: ignore[no-untyped-call]
        ways.append(one_by_one(torch.jit.freeze(trace)))
    return quickest(ways, images)


def openvino(whole: Whole, images: Sequence[Tensor]) -> Infer:
    """OpenVINO for this one shape, fp32: all cores for one image, or two images at once."""
    import openvino as ov

    model = ov.convert_model(whole, example_input=images[0], input=list(images[0].shape))
    ways = []
    for mode in ({"PERFORMANCE_HINT": "LATENCY"}, {"PERFORMANCE_HINT": "THROUGHPUT"}):
        streams = {"NUM_STREAMS": 2} if "THROUGHPUT" in mode.values() else {}
        hints = mode | streams | {"INFERENCE_PRECISION_HINT": "f32"}
        ways.append(queued(ov.AsyncInferQueue(ov.Core().compile_model(model, "CPU", hints))))
    return quickest(ways, images)


def queued(queue: Any) -> Infer:
    """Images through OpenVINO's own queue, as many at once as it has streams."""

    def infer(images: Sequence[Tensor]) -> list[Tensor]:
        found: dict[int, Tensor] = {}

        def take(request: Any, index: int) -> None:
            found[index] = torch.from_numpy(request.get_output_tensor(0).data.copy())

        queue.set_callback(take)
        for index, image in enumerate(images):
            queue.start_async([image.numpy()], index)
        queue.wait_all()
        return [found[index] for index in range(len(images))]

    return infer


def onnx_runtime(whole: Whole, images: Sequence[Tensor]) -> Infer:
    """ONNX Runtime on the CPU, with all cores or half of them."""
    import onnxruntime

    ways, cores = [], os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "member.onnx")
        torch.onnx.export(whole, (images[0],), str(path), dynamo=False, opset_version=17)
        for threads in sorted({0, cores, max(cores // 2, 1)}):  # 0: its own choice
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            providers = ["CPUExecutionProvider"]
            ways.append(in_session(onnxruntime.InferenceSession(path, options, providers)))
    return quickest(ways, images)


def in_session(session: Any) -> Infer:
    """Images one after another through an ONNX Runtime session."""
    name = session.get_inputs()[0].name
    return one_by_one(lambda image: torch.from_numpy(session.run(None, {name: image.numpy()})[0]))


def every_pass(manifest: Manifest, members: Sequence[Infer]) -> Predict:
    """Member by member and flip by flip, all strips of a pass at once."""

    @torch.inference_mode()
    def run(paths: Sequence[Path]) -> dict[str, Masks]:
        images = [image_to_tensor(read_image(path)) for path in paths]
        totals = [torch.zeros(manifest.classes, *image.shape[-2:]) for image in images]
        for infer, flip in itertools.product(members, manifest.flips):
            found = infer([apply_flip(image, flip).contiguous() for image in images])
            for total, probabilities in zip(totals, found, strict=True):
                total += apply_flip(probabilities, flip)[0]
        n_passes, masks = len(members) * len(manifest.flips), {}
        for path, total in zip(paths, totals, strict=True):
            masks[path.name] = (total / n_passes > manifest.threshold).numpy()
            for mask in masks[path.name]:
                encode_rle(mask)
        return masks

    return run


def exported(
    bundle: Path, export: Callable[[Whole, Sequence[Tensor]], Infer], size: Size
) -> Predict:
    """Every member through an export, all passes, for strips of `size`."""
    manifest, members = load_manifest(bundle), []
    images = [torch.rand(1, 1, *size) for _ in range(2)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # they trace in ways that PyTorch calls deprecated
        for spec in progress(manifest.members, export.__name__, "member"):
            members.append(export(Whole(load_member(bundle, spec, CPU)).eval(), images))
    return every_pass(manifest, members)


# --- a process for each ---------------------------------------------------------------------------

_running: list[Predict] = []  # in a candidate's process: it


def _set_up(load: Callable[[], Predict]) -> None:
    _running.append(load())


def _take_turn(paths: Sequence[Path]) -> tuple[float, dict[str, Masks]]:
    start = time.perf_counter()
    found = _running[0](paths)
    return time.perf_counter() - start, found


@dataclass
class Candidate:
    """One way to run the members, in a process of its own."""

    name: str
    load: Callable[[], Predict]
    process: ProcessPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        fresh = get_context("spawn")
        self.process = ProcessPoolExecutor(1, fresh, initializer=_set_up, initargs=(self.load,))

    def run(self, paths: Sequence[Path]) -> tuple[float, dict[str, Masks]]:
        """Take a turn: seconds, and what was found. The first one sets the process up."""
        return self.process.submit(_take_turn, paths).result()


def candidates(bundle: Path, image: Image, streams: int) -> list[Candidate]:
    """All of them, for strips like `image`; ours on so many streams."""
    size = size_of(image)
    loads = {
        "(a) eager, as public kernels": partial(as_public_kernels, bundle),
        "(b) traced": partial(exported, bundle, traced, size),
        "(c) OpenVINO": partial(exported, bundle, openvino, size),
        "(d) ONNX Runtime": partial(exported, bundle, onnx_runtime, size),
        "(e) ours, every pass": partial(ours, bundle, image, False, streams),
        "(e) ours, early exit": partial(ours, bundle, image, True, streams),
    }
    return [Candidate(name, load) for name, load in loads.items()]


# --- strips and processes -------------------------------------------------------------------------


def draw_strips(folder: Path, count: int) -> list[Path]:
    """Synthetic strips, every other one clean."""
    paths = []
    for index in range(count):
        rng = np.random.default_rng([2020, index])
        image, _ = synthetic.synthesize_strip(rng, CLASSES_DRAWN[index % len(CLASSES_DRAWN)])
        paths.append(folder / f"{index:04}.png")
        cv2.imwrite(str(paths[-1]), image)
    return paths


@dataclass(frozen=True)
class Process:
    """One run of the packed script."""

    seconds: float  # from its start until its report was written, the last thing it does
    peak_gb: float  # resident, of this process alone
    report: dict[str, Any]

    @property
    def outside_networks(self) -> float:
        """Share of the strips' time in which no network ran."""
        networks = sum(s for halves in self.report["networks"].values() for s in halves.values())
        return float(1 - networks / sum(self.report["strip_s"].values()))

    @property
    def before_first_strip_s(self) -> float:
        """From the start of the process until the first strip enters its first pass."""
        stages, networks = self.report["stages"], self.report["networks"].values()
        working = [stages[stage] for stage in ("decode", "prepare", "tally", "rle", "write")]
        working += [seconds for halves in networks for seconds in halves.values()]
        return self.seconds - float(sum(working))


def run_script(dataset: Path, images: Path) -> Process:
    """The packed inference.py over a folder, as a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, str(dataset / "inference.py"), "--bundle", str(dataset)]
        command += ["--images", str(images), "--report", "run.json"]
        start = time.time()
        quiet = subprocess.DEVNULL
        environment = {key: value for key, value in os.environ.items() if key != KAGGLE_RUN}
        process = subprocess.Popen(
            command, cwd=scratch, env=environment, stdout=quiet, stderr=quiet
        )
        peak_kb = 0  # not getrusage's, which starts at what this process holds
        while process.poll() is None:
            found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            peak_kb = int(found[1]) if found else peak_kb
            time.sleep(0.02)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        path = Path(scratch, "run.json")
        seconds = path.stat().st_mtime - start  # taking memory down is not waiting for a strip
        report = json.loads(path.read_text(encoding="utf-8"))
    return Process(seconds, peak_kb / 2**20, report)


def repeat(paths: list[Path], folder: Path, count: int) -> Path:
    """A folder of `count` names for the same strips."""
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:05}.png").symlink_to(paths[index % len(paths)])
    return folder


def stub_bundle(folder: Path) -> Path:
    """A member of next to no work, to run the whole length of the scored run."""
    model = {"arch": "FPN", "encoder_name": "tu-test_resnet", "in_channels": 1, "classes": 4}
    model |= {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}
    folder.mkdir()
    network = build_network(model)
    head = network.get_submodule("segmentation_head.0")
    assert isinstance(head, nn.Conv2d) and head.bias is not None
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, 3)  # every mask whole: noise would be gigabytes of run lengths
    save_file(network.state_dict(), folder / "stub.safetensors")
    entry = {"name": "stub", "file": "stub.safetensors", "model": model, "mean": [0.34]}
    manifest = {"members": [entry | {"std": [0.13]}], "flips": ["none"]}
    (folder / "ensemble.json").write_text(json.dumps(manifest), encoding="utf-8")
    build(folder, folder / "dist", "bench")
    return folder / "dist" / "dataset"


# --- the race -------------------------------------------------------------------------------------


def agreement(found: dict[str, Masks], reference: dict[str, Masks]) -> float:
    """Mean Dice over all (strip, class) pairs."""
    return float(np.mean([dice(found[name], masks) for name, masks in reference.items()]))


def mean_share(bundle: Path, paths: Sequence[Path], clean: Sequence[Path]) -> dict[str, float]:
    """Share of all flops that early exit runs, over the clean strips and over all."""
    scheduler = load_scheduler(bundle, read_image(paths[0]), early_exit=True, streams=1)
    strips = read_ahead(paths[0].parent, [path.name for path in paths], ahead=4)
    shares = {
        state.strip.name: scheduler.work(state).share for state in scheduler.predict_strips(strips)
    }
    of_clean = {"clean": float(np.mean([shares[path.name] for path in clean]))} if clean else {}
    return of_clean | {"all": float(np.mean(list(shares.values())))}


def race(runners: list[Candidate], paths: list[Path], rounds: int) -> dict[str, Any]:
    """Seconds a strip of every candidate in every round, and what they found."""
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in runners}
    found: dict[str, dict[str, Masks]] = {}
    for candidate in runners:
        candidate.run(paths[:2])  # compiled and warm: a clean strip, and one that is not
    bar = progress(range(rounds * len(runners)), "race", "turn")
    for _ in range(rounds):
        for candidate in runners:
            taken, found[candidate.name] = candidate.run(paths)
            seconds[candidate.name].append(taken / len(paths))
            bar.update()
    bar.close()
    return {"seconds": seconds, "found": found}


def rle_ms(masks: Iterable[Masks]) -> float:
    """Median milliseconds for the codes of one strip's masks."""
    taken = []
    for strip in masks:
        start = time.perf_counter()
        for mask in strip:
            encode_rle(mask)
        taken.append(1000 * (time.perf_counter() - start))
    return median(taken)


def summarise(
    bundle: Path, result: dict[str, Any], paths: list[Path], clean: list[Path]
) -> dict[str, Any]:
    """Seconds and masks of a race, side by side."""
    seconds = {name: median(turns) for name, turns in result["seconds"].items()}
    eager, *peers, every, early = seconds
    found = result["found"]
    best = min(seconds[peer] for peer in peers)
    return {
        "strips": len(paths),
        "seconds_a_strip": seconds,
        "turns": result["seconds"],
        "share_of_flops": mean_share(bundle, paths, clean),
        "same_masks_with_and_without": all(
            np.array_equal(found[early][name], masks) for name, masks in found[every].items()
        ),
        "dice_against_eager": {
            name: agreement(masks, found[eager]) for name, masks in found.items()
        },
        "times_faster_than_eager": seconds[eager] / seconds[early],
        "times_faster_than_best_peer": best / seconds[early],
        "every_pass_against_best_peer": best / seconds[every],
        "rle_ms_a_strip": rle_ms(found[early].values()),
    }


def measure_race(
    dataset: Path, paths: list[Path], rounds: int, real: list[Path], streams: int
) -> dict[str, Any]:
    """What all candidates must run for, in turns; of the drawn strips every other one is clean."""
    manifest = load_manifest(dataset)
    runners = candidates(dataset, read_image(paths[0]), streams)
    result = race(runners, paths, rounds)
    flops = len(manifest.flips) * sum(sum(spec.flops) for spec in manifest.members)
    results = {
        "members": [spec.name for spec in manifest.members],
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "gigaflops_a_strip": flops / 1e9,
        **summarise(dataset, result, paths, paths[::2]),
    }
    if real:
        results["real"] = summarise(dataset, race(runners, real, rounds), real, [])
    for candidate in runners:
        candidate.process.shutdown()
    return results


def measure_processes(dataset: Path, paths: list[Path], folder: Path) -> dict[str, Any]:
    """What the packed script takes as a process: one strip, 100, and as many as are scored."""
    print(f"one strip, {LONG_RUN} and {N_SCORED_IMAGES} (with a stub member) as processes")
    one = repeat(paths, folder / "one", 1)
    starts = [run_script(dataset, one) for _ in range(STARTS)]  # the first one warms the disk
    first = sorted(starts, key=lambda process: process.before_first_strip_s)[STARTS // 2]
    hundred = run_script(dataset, repeat(paths, folder / "hundred", LONG_RUN))
    stub = run_script(stub_bundle(folder / "stub"), repeat(paths, folder / "all", N_SCORED_IMAGES))
    return {
        "outside_networks": hundred.outside_networks,
        "start_to_first_strip_s": first.before_first_strip_s,
        "of_which_check_s": first.report["stages"]["check"],
        "peak_gb_100_strips": hundred.peak_gb,
        "peak_gb_5506_strips_stub": stub.peak_gb,
    }


# --- what is written ------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """The table for the README."""
    seconds, eager = results["seconds_a_strip"], next(iter(results["seconds_a_strip"].values()))
    lines = ["| way | seconds a strip | times (a) | Dice against (a) |", "|---|---|---|---|"]
    for name, value in seconds.items():
        agreed = results["dice_against_eager"][name]
        lines.append(f"| {name} | {value:.2f} | {eager / value:.2f} | {agreed:.5f} |")
    share = results["share_of_flops"]
    lines += [
        "",
        f"Members: {', '.join(results['members'])}. {results['strips']} strips, half clean, "
        f"medians of {results['rounds']} rounds, {results['threads']} threads.",
        f"Early exit ran {share['clean']:.0%} of the flops on clean strips, {share['all']:.0%} "
        f"over all; same masks with and without: {results['same_masks_with_and_without']}.",
        f"Early exit is {results['times_faster_than_best_peer']:.2f} times as fast as the best of "
        f"(b) to (d), every pass {results['every_pass_against_best_peer']:.2f} times.",
        *real_lines(results),
        f"RLE of a strip: {results['rle_ms_a_strip']:.2f} ms.",
        *process_lines(results),
    ]
    return "\n".join(lines) + "\n"


def process_lines(results: dict[str, Any]) -> list[str]:
    """What the table says of the packed script as a process, once that is measured."""
    if "outside_networks" not in results:
        return []
    return [
        f"Outside the networks: {results['outside_networks']:.1%} of the time.",
        f"From the start to the first strip: {results['start_to_first_strip_s']:.1f} s, "
        f"{results['of_which_check_s']:.1f} s of it the check of the engines.",
        f"Peak memory: {results['peak_gb_100_strips']:.2f} GiB over {LONG_RUN} strips, "
        f"{results['peak_gb_5506_strips_stub']:.2f} GiB over {N_SCORED_IMAGES:,} of a stub member.",
    ]


def real_lines(results: dict[str, Any]) -> list[str]:
    """What the table says of the race on real strips, if there was one."""
    if "real" not in results:
        return []
    real = results["real"]
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in real["seconds_a_strip"].items())
    return [
        f"On {real['strips']} real strips, seconds a strip: {seconds}. Early exit ran "
        f"{real['share_of_flops']['all']:.0%} of the flops, {real['times_faster_than_eager']:.2f} "
        f"times as fast as (a), {real['times_faster_than_best_peer']:.2f} times as fast as the "
        f"best of the others; same masks with and without: {real['same_masks_with_and_without']}."
    ]


def draw_chart(results: dict[str, Any], path: Path) -> None:
    """Bars of seconds a strip."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, values = zip(*results["seconds_a_strip"].items(), strict=True)
    colours = ["#2b7bba" if name.startswith("(e)") else "#b0b7bf" for name in names]
    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, fmt="%.2f s", padding=4)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds a strip, {len(results['members'])} members × 3 flips, half clean")
    axes.set_xlim(0, 1.1 * max(values))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Write everything that was measured, as JSON, as a table and as a chart."""
    text = json.dumps(results, indent=2) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    (folder / "table.md").write_text(table(results), encoding="utf-8")
    draw_chart(results, folder / "chart.png")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("dist"), help="what build_kernel wrote")
    parser.add_argument("--strips", type=int, default=8, help="half of them clean")
    parser.add_argument("--rounds", type=int, default=5)
    about = "strips at once, ours (default: the kernel's, %(default)s)"
    parser.add_argument("--streams", type=int, default=Options.streams, help=about)
    about = "a folder of real strips: as many are drawn, for a second race"
    parser.add_argument("--real", type=Path, help=about)
    parser.add_argument("--seed", type=int, default=2020, help="of that draw")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the three files")
    about = "measure the processes alone, and keep the race that results.json holds"
    parser.add_argument("--keep-race", action="store_true", help=about)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> int:
    """Run the race and write its three files."""
    args.out.mkdir(parents=True, exist_ok=True)
    dataset, kept = args.bundle.resolve() / "dataset", args.out / "results.json"
    load_manifest(dataset)  # refused before an hour's work
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "strips").mkdir()
        paths = draw_strips(Path(scratch) / "strips", args.strips)
        if args.keep_race:
            results = json.loads(kept.read_text(encoding="utf-8"))
        else:
            real = sample_strips(args.real, args.strips, args.seed) if args.real else []
            results = measure_race(dataset, paths, args.rounds, real, args.streams)
            write_results(results, args.out)  # a quarter of an hour, which --keep-race goes on from
        results |= measure_processes(dataset, paths, Path(scratch))
    write_results(results, args.out)
    print(table(results))
    return 0


def main() -> None:
    """Run the command line."""
    run_command(lambda: measure(parse_args()))


if __name__ == "__main__":
    main()
