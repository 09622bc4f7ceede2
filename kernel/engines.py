"""Engines: both halves at the machine's speed, checked against plain PyTorch."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kernel.images import Image
from kernel.logs import log
from kernel.members import Member, split

SHAPES = 4  # of strips that an engine is ready for at a time
AGREE = 1e-3  # mean difference of probabilities; fp16's is below it, a wrong network's far above


def fold_batch_norm(module: nn.Module) -> None:
    """Folds each batch norm into the convolution before it: the same numbers, one step less.

    Neighbours are taken to run one after another; where they do not, `check_engine` will tell.
    """
    for (name, conv), (norm_name, norm) in itertools.pairwise(list(module.named_children())):
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            continue
        if type(norm) is nn.BatchNorm2d and conv.out_channels == norm.num_features:
            setattr(module, name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())
    for child in module.children():
        fold_batch_norm(child)


class OpenVino:
    """One half as OpenVINO runs it on the CPU, compiled once for every shape that comes.

    A compiled shape keeps the memory that it works in: the oldest of more than `SHAPES` goes.
    """

    def __init__(self, path: Path) -> None:
        import openvino

        self.core, self.tensor = openvino.Core(), openvino.Tensor
        self.model = self.core.read_model(path)
        self.requests: dict[tuple[torch.Size, ...], Any] = {}  # shapes → what runs them

    def __call__(self, *tensors: Tensor) -> Any:
        """What the half that was packed gives: one tensor, or a tuple of them."""
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.requests:
            if len(self.requests) == SHAPES:
                del self.requests[next(iter(self.requests))]
            self.requests[shapes] = self.compiled(shapes)
        request = self.requests[shapes]
        inputs = [tensor.contiguous() for tensor in tensors]  # OpenVINO keeps addresses alone
        # written where they are to stay: a request's own outputs would be copied, and kept as well
        outputs = tuple(torch.empty(list(found.shape)) for found in request.model_outputs)
        for index, tensor in enumerate(inputs):
            request.set_input_tensor(index, self.shared(tensor))
        for index, tensor in enumerate(outputs):
            request.set_output_tensor(index, self.shared(tensor))
        request.infer(share_outputs=True)
        return outputs if len(outputs) > 1 else outputs[0]

    def compiled(self, shapes: tuple[torch.Size, ...]) -> Any:
        """The half for inputs of these shapes, as a request to be filled."""
        self.model.reshape({index: list(shape) for index, shape in enumerate(shapes)})
        precise = {"INFERENCE_PRECISION_HINT": "f32"}
        return self.core.compile_model(self.model, "CPU", precise).create_infer_request()

    def rest(self) -> None:
        """Gives back the memory that it works in, until it runs again."""
        for request in self.requests.values():
            request.get_compiled_model().release_memory()

    def shared(self, tensor: Tensor) -> Any:
        """A tensor as OpenVINO takes it, in the same memory."""
        return self.tensor(tensor.numpy(), shared_memory=True)


def openvino_files(file: str) -> list[str]:
    """Where a member's halves lie beside its checkpoint `file`, if they were packed."""
    return [f"{Path(file).stem}.{half}.xml" for half in ("encoder", "decoder")]


def in_half_precision(half: nn.Module) -> Callable[..., Any]:
    """A half that computes in fp16 on a GPU."""

    def run(*tensors: Tensor) -> Any:
        with torch.autocast("cuda", torch.float16):
            return half(*tensors)

    return run


def fastest(plain: Member, folder: Path, device: torch.device) -> Member:
    """A loaded member of the bundle `folder` on the fastest engine that this machine has for it.

    OpenVINO on the CPU, where it imports and `build_kernel.py --openvino` packed the halves. Else
    PyTorch with batch norm folded; on a GPU in fp16, channels last. `plain` stays as it is.
    """
    halves = [folder / name for name in openvino_files(plain.spec.file)]
    if device.type == "cpu" and halves[0].is_file():
        try:
            encode, decode = map(OpenVino, halves)
            return replace(plain, encode=encode, decode=decode, rests=(encode.rest, decode.rest))
        except Exception as error:  # a failed engine must not cost the submission
            log.warning("%s runs on PyTorch, not on OpenVINO: %r", plain.spec.name, error)
    network = copy.deepcopy(plain.encode.network)
    fold_batch_norm(network)
    engine = split(network, plain.spec, device)
    if device.type == "cpu":
        return engine
    network.to(memory_format=torch.channels_last)
    fp16 = in_half_precision
    return replace(engine, encode=fp16(engine.encode), decode=fp16(engine.decode))


def liveliest(image: Image, width: int = 400) -> Image:
    """The part of an image, about `width` pixels wide, whose grey varies most."""
    parts = np.array_split(image, max(image.shape[1] // width, 1), axis=1)
    return max(parts, key=lambda part: float(part.std()))


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Images (B, 1, H, W) with the last row and column repeated up to the next multiple."""
    height, width = images.shape[-2:]
    padding = (0, -width % multiple, 0, -height % multiple)
    return nn.functional.pad(images, padding, mode="replicate") if any(padding) else images


@torch.inference_mode()
def check_engine(
    engine: Member, plain: Member, image: Image | None, device: torch.device
) -> Member:
    """The engine, or plain fp32 PyTorch where the engine fails or gives something else.

    Both see one part of an image (H, W): enough to tell, in a quarter of the time. Gates and masks
    are compared apart: a shut gate would hide wrong masks. Without an image it stays unchecked.
    """
    if image is None:
        return engine
    images, answers = torch.from_numpy(liveliest(image))[None, None].to(device) / 255, []
    images = pad_to_multiple(images, plain.stride)
    try:
        for member in (plain, engine):
            gates, *features = member.encode(images)
            masks = member.decode(torch.ones_like(gates), *features)
            answers.append((gates.float(), masks.float()))
            for rest in member.rests:
                rest()
        apart = [(a - b).abs().mean().item() for a, b in zip(*answers, strict=True)]
        agree = all(difference <= AGREE for difference in apart)  # which NaN is not
        fault = "" if agree else f"gates and masks are {apart} apart"
    except Exception as error:  # a failed engine must not cost the submission
        fault = repr(error)
    if fault:
        log.warning("%s runs on plain PyTorch, the engine fails: %s", plain.spec.name, fault)
    for half in (engine.encode, engine.decode):
        if isinstance(half, OpenVino):
            half.requests.clear()  # a part's shape does not come again
    return plain if fault else engine


class DeviceLost(RuntimeError):
    """A GPU that runs nothing any more."""


def works(device: torch.device) -> bool:
    """Whether one real operation runs; Kaggle's P100 is available and dies at its first."""
    try:
        half = torch.float16 if device.type == "cuda" else torch.float32
        ones = torch.ones(1, 1, 8, 8, device=device, dtype=half)
        torch.nn.functional.conv2d(ones, ones[:, :, :3, :3]).sum().item()
    except Exception as error:  # a failed device must not cost the submission
        log.warning("%s fails one small convolution: %s", device, error)
        return False
    return True


def pick_device() -> torch.device:
    """CUDA where it works, else the CPU."""
    cuda = torch.device("cuda")
    return cuda if torch.cuda.is_available() and works(cuda) else torch.device("cpu")
