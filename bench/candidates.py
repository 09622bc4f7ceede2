"""The candidates of the race: this project's way and those in which others run the same members."""

import copy
import itertools
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import ttach
from torch import Tensor, nn

from kernel.competition import SEVERSTAL
from kernel.engines import import_openvino
from kernel.ensemble_loading import load_ensemble
from kernel.images import Image, Size, image_to_tensor, read_image, size_of
from kernel.logs import progress
from kernel.manifest import Manifest, load_manifest
from kernel.members import Member, load_member
from kernel.read_ahead import read_ahead
from kernel.rle import encode_rle
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from kernel.tta import apply_flip
from training.metrics import Masks

CPU = torch.device("cpu")
Found = tuple[dict[str, Masks], dict[str, float]]  # (classes, H, W), and ours: share of the flops
Predict = Callable[[Sequence[Path]], Found]  # paths → every image's


def encode(masks: Masks) -> Masks:
    """Return the masks of an image; their run lengths are what every candidate takes time for."""
    for mask in masks:
        encode_rle(mask, SEVERSTAL)
    return masks


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
    def run(paths: Sequence[Path]) -> Found:
        sums: dict[str, Tensor] = {}
        for member in members:
            for start in range(0, len(paths), 2):
                pair = paths[start : start + 2]
                images = torch.from_numpy(np.stack([read_image(path, SEVERSTAL) for path in pair]))
                images = images[:, None] / 255
                for view in views:
                    found = view.deaugment_mask(member(view.augment_image(images)))
                    for path, probabilities in zip(pair, found, strict=True):
                        sums[path.name] = sums.get(path.name, 0) + probabilities
        n_passes = len(members) * len(views)
        masks = {name: (total / n_passes > manifest.threshold) for name, total in sums.items()}
        return {name: encode(each.numpy()) for name, each in masks.items()}, {}

    return run


def ours(bundle: Path, image: Image, early_exit: bool) -> Predict:
    """The kernel's way: strip by strip, from the file to its run lengths."""
    ensemble = load_ensemble(bundle, load_manifest(bundle), CPU, Stages(), image)
    scheduler = Scheduler(ensemble, early_exit=early_exit)

    def run(paths: Sequence[Path]) -> Found:
        strips = read_ahead(
            paths[0].parent, [path.name for path in paths], ahead=4, competition=SEVERSTAL
        )
        masks, shares = dict[str, Masks](), dict[str, float]()
        for state in scheduler.predict_strips(strips, len(paths)):
            if state.fault:
                raise RuntimeError(f"{state.strip.name}: {state.fault}")
            masks[state.strip.name] = encode(state.masks)
            shares[state.strip.name] = scheduler.work(state).share
        return masks, shares

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
    ov = import_openvino()
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
    def run(paths: Sequence[Path]) -> Found:
        images = [image_to_tensor(read_image(path, SEVERSTAL)) for path in paths]
        totals = [torch.zeros(manifest.classes, *image.shape[-2:]) for image in images]
        for infer, flip in itertools.product(members, manifest.flips):
            found = infer([apply_flip(image, flip).contiguous() for image in images])
            for total, probabilities in zip(totals, found, strict=True):
                total += apply_flip(probabilities, flip)[0]
        n_passes = len(members) * len(manifest.flips)
        masks = [total / n_passes > manifest.threshold for total in totals]
        return {
            path.name: encode(each.numpy()) for path, each in zip(paths, masks, strict=True)
        }, {}

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


def _take_turn(paths: Sequence[Path]) -> tuple[float, Found]:
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

    def run(self, paths: Sequence[Path]) -> tuple[float, Found]:
        """Take a turn: seconds, and what was found. The first one sets the process up."""
        return self.process.submit(_take_turn, paths).result()


EAGER = "(a) eager, as public kernels"
EVERY, EARLY = "(e) ours, every pass", "(e) ours, early exit"


def candidates(bundle: Path, image: Image) -> list[Candidate]:
    """All of them, for strips like `image`."""
    size = size_of(image)
    loads = {
        EAGER: partial(as_public_kernels, bundle),
        "(b) traced": partial(exported, bundle, traced, size),
        "(c) OpenVINO": partial(exported, bundle, openvino, size),
        "(d) ONNX Runtime": partial(exported, bundle, onnx_runtime, size),
        EVERY: partial(ours, bundle, image, False),
        EARLY: partial(ours, bundle, image, True),
    }
    return [Candidate(name, load) for name, load in loads.items()]
