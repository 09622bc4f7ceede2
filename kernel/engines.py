"""Engines: the fastest correct way to run a member here, checked against plain PyTorch."""

import copy
import functools
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kernel.device import lasting_memory
from kernel.images import Image, Size, image_to_tensor, pad_to_multiple, resize_images
from kernel.logs import log
from kernel.manifest import MemberSpec
from kernel.members import Member, split_network
from kernel.reference import answers, logits_of, read_reference, reference_file
from kernel.stages import Stages
from kernel.tta import Half

MAX_CACHED_SHAPES = 4  # of strips that an engine is compiled for at a time
TENSOR_CORES = (7, 0)  # the first compute capability that has them: Volta's
# Mean differences of gates, a few numbers, and of masks, then of their logits; fp16's are below,
# those of a wrong network far above:
TOLERANCES = (5e-3, 1e-3, 0.1, 0.1)


# --- OpenVINO -------------------------------------------------------------------------------------


class OpenVino:
    """A network on OpenVINO's CPU device, compiled once for every input shape.

    A compiled shape keeps its working memory: the oldest of `MAX_CACHED_SHAPES` is dropped. All
    cores, or as many as OMP_NUM_THREADS says, work on one batch.
    """

    def __init__(self, core: Any, model: Any) -> None:
        import openvino

        self.core, self.tensor, self.model = core, openvino.Tensor, model
        limited = "OMP_NUM_THREADS" in os.environ  # PyTorch has as few, OpenVINO does not read it
        self.threads = torch.get_num_threads() if limited else 0  # 0: all cores
        self.requests: dict[tuple[torch.Size, ...], Any] = {}  # by shapes

    def __call__(self, *tensors: Tensor) -> Any:
        """Return what the network returns: one tensor, or a tuple of them."""
        shapes = tuple(tensor.shape for tensor in tensors)
        request = self._request(shapes)
        inputs = [tensor.contiguous() for tensor in tensors]  # OpenVINO keeps only addresses
        # into tensors of ours: a request's own outputs would be copied, and kept as well
        outputs = tuple(torch.empty(list(found.shape)) for found in request.model_outputs)
        for index, tensor in enumerate(inputs):
            request.set_input_tensor(index, _share(self.tensor, tensor))
        for index, tensor in enumerate(outputs):
            request.set_output_tensor(index, _share(self.tensor, tensor))
        request.infer(share_outputs=True)
        return outputs if len(outputs) > 1 else outputs[0]

    def _request(self, shapes: tuple[torch.Size, ...]) -> Any:
        """The request for these shapes, compiled when they are new."""
        if shapes not in self.requests:
            if len(self.requests) == MAX_CACHED_SHAPES:
                del self.requests[next(iter(self.requests))]
            self.requests[shapes] = self._compile(shapes).create_infer_request()
        return self.requests[shapes]

    def _compile(self, shapes: tuple[torch.Size, ...]) -> Any:
        self.model.reshape({index: list(shape) for index, shape in enumerate(shapes)})
        hints: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,  # two processes would pin themselves to the same cores
        }
        if self.threads:
            hints["INFERENCE_NUM_THREADS"] = self.threads
        with lasting_memory():
            return self.core.compile_model(self.model, "CPU", hints)

    def release_memory(self) -> None:
        """Release the working memory; the next run allocates it again."""
        for request in self.requests.values():
            request.get_compiled_model().release_memory()


def _share(openvino_tensor: Any, tensor: Tensor) -> Any:
    """The same memory as a tensor of OpenVINO's."""
    return openvino_tensor(tensor.numpy(), shared_memory=True)


def _join_halves(encoder: Any, decoder: Any) -> Any:
    """Both halves as one network, images → gates, probabilities, over the same weights."""
    import openvino

    gates, *_ = features = encoder.get_results()
    for parameter, result in zip(decoder.get_parameters(), features, strict=True):
        for reader in parameter.output(0).get_target_inputs():
            reader.replace_source_output(result.input_value(0))
    return openvino.Model([gates, *decoder.get_results()], encoder.get_parameters(), "whole")


def openvino_files(file: str) -> list[str]:
    """Names of a member's halves beside its checkpoint `file`, where they were packed."""
    return [f"{Path(file).stem}.{half}.xml" for half in Half]


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry.

    Where that is installed, an import and each conversion report to OpenVINO's makers: a process
    is forked beside PyTorch's threads, and waits for a network.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # then it has none
    import openvino

    return openvino


@functools.cache
def openvino_core() -> Any:
    """Return the one core of this process.

    A core gives its thread a stack for signals. Of several that end in the order in which they
    began the last leaves one that is gone, and Python's next signal handler crashes on it.
    """
    return import_openvino().Core()


def load_openvino(folder: Path, spec: MemberSpec, stride: int) -> Member:
    """Load a member that `build_kernel.py --openvino` packed, in halves and in one piece.

    PyTorch builds no network, which would know the `stride`.
    """
    core = openvino_core()
    models = [core.read_model(folder / name) for name in openvino_files(spec.file)]
    joined = _join_halves(*(model.clone() for model in models))  # of the same weights
    encoder, decoder, whole = (OpenVino(core, model) for model in (*models, joined))

    def release_memory() -> None:
        for engine in (encoder, decoder, whole):
            engine.release_memory()

    return Member(spec, encoder, decoder, stride, release_memory, whole)


def load_checked_openvino(folder: Path, spec: MemberSpec, channels: int, stages: Stages) -> Member:
    """Load a member on OpenVINO, and hold it against its reference; images have `channels`.

    Raises:
        Exception: whatever OpenVINO raises; ValueError where it is not what PyTorch would be.
    """
    with stages("load"):
        reference = read_reference(folder / reference_file(spec.file))
        member = load_openvino(folder, spec, reference.stride)
    with stages("check"):
        reference.check(member, channels)
    for engine in (member.encoder, member.decoder):
        engine.requests.clear()  # the reference's shape does not come again
    return member


# --- PyTorch --------------------------------------------------------------------------------------


def fold_batch_norm(module: nn.Module) -> None:
    """Fold each batch norm into the convolution before it: the same numbers, one step less.

    Neighbours are assumed to run one after another; where they do not, `check_engine` finds out.
    """
    for (name, conv), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            continue
        fixed = type(norm) is nn.BatchNorm2d and norm.running_mean is not None
        if fixed and conv.out_channels == norm.num_features:
            setattr(module, name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())
    for child in module.children():
        fold_batch_norm(child)


def to_half_precision(network: nn.Module) -> nn.Module:
    """The same network with fp16 weights, channels last: what a GPU runs."""
    return network.half().to(memory_format=torch.channels_last)


def compile_member(plain: Member, device: torch.device) -> Member:
    """Return a member on PyTorch with batch norm folded, in fp32; `plain` stays as it is.

    On a GPU that has tensor cores it is in fp16, channels last.
    """
    network = copy.deepcopy(plain.encoder.network)
    fold_batch_norm(network)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= TENSOR_CORES:
        network = to_half_precision(network)
    return split_network(network, plain.spec, device)


def highest_contrast_crop(image: Image, width: int = 400) -> Image:
    """The crop of an image, about `width` pixels wide, whose grey varies most."""
    parts = np.array_split(image, max(image.shape[1] // width, 1), axis=1)
    return max(parts, key=lambda part: float(part.std()))


def differences(
    plain: Member, other: Member, crop: Tensor, size: Size | None = None
) -> list[float]:
    """Mean differences of two members' gates, and of their masks with all gates open.

    First those of probabilities, then those of their logits. Both see a crop (1, channels, H, W),
    padded. Some networks (DPT, Swin) take images of one size alone, `size`: for them it is resized.
    """
    images = pad_to_multiple(crop, plain.stride)
    try:
        expected = answers(plain, images)
    except (RuntimeError, ValueError, AssertionError):
        if size is None:
            raise
        images = pad_to_multiple(resize_images(crop, size), plain.stride)
        expected = answers(plain, images)
    pairs = list(zip(expected, answers(other, images), strict=True))
    pairs += [(logits_of(a), logits_of(b)) for a, b in pairs]
    return [(a - b).abs().mean().item() for a, b in pairs]


def check_engine(
    engine: Member,
    plain: Member,
    image: Image | None,
    device: torch.device,
    size: Size | None = None,
) -> Member:
    """Return the engine, or plain fp32 PyTorch where the engine fails or differs.

    Both see one crop of an image, grey or RGB, in a quarter of a strip's time. Strips are resized
    to `size`, and the crop for a member that takes no other. Gates and masks are compared apart: a
    shut gate would hide wrong masks; and by their logits too: on a clean strip all probabilities
    are near 0. Without an image nothing is checked.
    """
    if image is None:
        return engine
    crop = image_to_tensor(highest_contrast_crop(image), device)
    try:
        apart = differences(plain, engine, crop, size)
        agree = all(each <= most for each, most in zip(apart, TOLERANCES, strict=True))  # NaN not
        fault = "" if agree else f"gates and masks are {apart} apart"
    except Exception as error:  # a failed engine must not cost the submission
        fault = repr(error)
    if fault:
        log.warning("%s runs on plain PyTorch, the engine fails: %s", plain.spec.name, fault)
    return plain if fault else engine
