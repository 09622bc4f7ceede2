"""Members: trained networks in two halves, encoder with presence head and decoder."""

import atexit
import functools
import hashlib
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernel.faults import one_line, short
from kernel.files import retried
from kernel.logs import log
from kernel.manifest import MemberSpec

# --- two halves -----------------------------------------------------------------------------------


def _select(outputs: Tensor, channels: list[int] | None) -> Tensor:
    return outputs if channels is None else outputs[:, channels]


def to_channels(images: Tensor, channels: int) -> Tensor:
    """RGB images (B, 3, H, W) as grey ones, by ITU-R BT.601, for a member of one channel."""
    if images.shape[1] <= channels:
        return images
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in another precision: channels last in fp16, rows first in fp32."""
    if tensor.dtype == dtype:
        return tensor
    half = dtype == torch.float16
    return tensor.to(dtype, memory_format=torch.channels_last if half else torch.contiguous_format)


def _fp32_logits(outputs: Tensor) -> Tensor:
    """A network's outputs in fp32; NaN where fp16 was too small, which a sigmoid would hide."""
    logits = _cast(outputs, torch.float32)
    return logits if outputs is logits else logits.where(logits.isfinite(), torch.nan)


def _shift_of(shift: float | list[float]) -> Tensor | None:
    """One number, or one a class, as a tensor (1 or classes,); None where nothing is added."""
    values = shift if isinstance(shift, list) else [shift]  # with numbers alone: it may be meta
    return torch.tensor(values, dtype=torch.float32) if any(values) else None


class Encoder(nn.Module):
    """The first half: images (B, channels, H, W) in [0, 1] → gates (B, classes), features.

    The images are the competition's, grey or RGB, and become what the member takes.

    A gate is the most that any probability of its class can be: sigmoid(presence), or 1 without a
    presence head. A network with its own `forward` (DPT) runs whole here; its logits are the
    features. The network's precision is its own; what is normalised and gated is fp32.
    """

    mean: Tensor  # (1, channels, 1, 1)
    std: Tensor
    shift: Tensor | None  # of the presence logits, (1 or classes,)

    def __init__(self, network: Any, spec: MemberSpec, monolithic: bool) -> None:
        super().__init__()
        self.network, self.gated, self.monolithic = network, spec.gated, monolithic
        self.channels = spec.channels
        self.classes = len(spec.channels or range(spec.model.get("classes", 1)))  # SMP's default
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1))
        self.register_buffer("shift", _shift_of(spec.gate_shift))
        self.dtype = next((weight.dtype for weight in network.parameters()), torch.float32)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the gates, then the features from the highest resolution to the lowest."""
        images = to_channels(images, self.mean.shape[1])
        images = (images - self.mean) / self.std  # one channel becomes the member's
        features, presence = self._run_network(_cast(images, self.dtype))
        if presence is None:
            return images.new_ones(images.shape[0], self.classes), *features
        presence = _fp32_logits(_select(presence, self.channels))
        if self.shift is not None:
            presence = presence + self.shift
        return torch.sigmoid(presence), *features

    def _run_network(self, inputs: Tensor) -> tuple[Sequence[Tensor], Tensor | None]:
        """The features, and the presence logits where there is a head of them."""
        if not self.monolithic:
            features = self.network.encoder(inputs)
            presence = self.network.classification_head(features[-1]) if self.gated else None
            return features, presence
        if not self.gated:
            return [self.network(inputs)], None
        logits, presence = self.network(inputs)
        return [logits], presence


class Decoder(nn.Module):
    """The second half: gates and features → probabilities (B, classes, H, W)."""

    shift: Tensor | None  # of the mask logits, (1 or classes,)

    def __init__(self, network: Any, spec: MemberSpec, monolithic: bool) -> None:
        super().__init__()
        self.network, self.monolithic = network, monolithic
        self.channels, self.softmax = spec.channels, spec.softmax
        self.register_buffer("shift", _shift_of(spec.mask_shift))

    def forward(self, gates: Tensor, *features: Tensor) -> Tensor:
        """Return the soft gate, `sigmoid(mask) × sigmoid(presence)`: never above the gate.

        A softmax over all outputs, the background's too, may stand in the mask's place.
        """
        if self.monolithic:
            logits = features[0]
        else:
            logits = self.network.segmentation_head(self.network.decoder(list(features)))
        if self.softmax:
            masks = _select(_fp32_logits(logits).softmax(1), self.channels)
            return masks * gates[:, :, None, None]
        logits = _fp32_logits(_select(logits, self.channels))
        if self.shift is not None:
            logits = logits + self.shift[:, None, None]
        return torch.sigmoid(logits) * gates[:, :, None, None]


@dataclass(frozen=True)
class Member:
    """A trained network, its two halves ready to run."""

    spec: MemberSpec
    encoder: Any  # an Encoder, or an engine's
    decoder: Any
    stride: int  # pixels; an image's sides must be multiples of it
    release_memory: Callable[[], None] = lambda: None  # its working memory, until it runs again
    whole: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # images → gates, probabilities
    plain: bool = False  # fp32 PyTorch as it was loaded, no engine

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities (B, classes, H, W) of images (B, channels, H, W) in [0, 1]."""
        probabilities: Tensor = self.decoder(*self.encoder(images))
        return probabilities


def split_network(network: Any, spec: MemberSpec, device: torch.device) -> Member:
    """Cut a network where the presence head is known and the masks are not."""
    from segmentation_models_pytorch.base import SegmentationModel

    monolithic = getattr(type(network), "forward", None) is not SegmentationModel.forward
    encoder, decoder = Encoder(network, spec, monolithic), Decoder(network, spec, monolithic)
    stride = int(network.encoder.output_stride)
    return Member(spec, encoder.eval().to(device), decoder.eval().to(device), stride)


# --- loading --------------------------------------------------------------------------------------


@functools.cache  # a second run in this process has them
def use_wheels(bundle: Path) -> None:
    """Put the bundle's wheels first on the import path: what was packed is what runs.

    Compiled code cannot be imported from inside a wheel. Such a wheel is unpacked, if it is for
    this Python and machine, into a folder that is removed when the run ends. One that does not
    unpack is left out: what it holds may be installed, or not be needed here.
    """
    version, machine = "-cp{}{}-".format(*sys.version_info), f"_{platform.machine()}.whl"
    for wheel in sorted(bundle.glob("*.whl"), reverse=True):
        if wheel.name.endswith("-none-any.whl"):
            sys.path.insert(0, str(wheel))
        elif version in wheel.name and wheel.name.endswith(machine) and sys.platform == "linux":
            try:
                folder = tempfile.mkdtemp(prefix=wheel.stem)
                atexit.register(shutil.rmtree, folder, ignore_errors=True)
                shutil.unpack_archive(wheel, folder, "zip")
            except Exception as error:  # a broken wheel must not cost the submission
                log.warning("%s cannot be unpacked: %r", wheel, error)
            else:
                sys.path.insert(0, folder)


def build_network(model: dict[str, Any]) -> nn.Module:
    """Build the untrained network of `smp.create_model`'s arguments; download nothing.

    Raises:
        ValueError: SMP knows no such architecture, encoder or option.
    """
    import segmentation_models_pytorch as smp

    try:
        network: nn.Module = smp.create_model(**{**model, "encoder_weights": None})
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"SMP builds no network of {short(model)}: {one_line(error)}") from error
    return network.eval()


class _Undrawn(TorchFunctionMode):
    """Build networks without the random weights that a checkpoint's are to replace."""

    DRAWS = (
        nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_,
        Tensor.normal_, Tensor.uniform_,
    )  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Leave a tensor as it was allocated where it would be drawn."""
        if func in self.DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _pad_as(network: Any, version: str) -> None:
    """Pad an EfficientNet's convolutions of stride 2 as a version of efficientnet-pytorch did.

    No tensor tells of it. Today's is TensorFlow's "same" of the nominal size at that stage; 0.6.3
    took the image's nominal size at every stage, which is even: a pixel less before than behind;
    0.7.0 as many on both sides (its issues 177, 235 and 262). "" leaves today's.
    """
    for layer in network.modules() if version else ():
        if hasattr(layer, "static_padding") and layer.stride[0] == 2:
            behind = layer.kernel_size[0] // 2
            before = behind - 1 if version == "0.6.3" else behind
            layer.static_padding = nn.ZeroPad2d((before, behind, before, behind))


def in_half(key: str, value: Tensor) -> Tensor:
    """A weight in fp16, as a checkpoint holds it; statistics that fp16 cannot hold in fp32."""
    half = value.half() if value.is_floating_point() else value
    held = key.endswith(("running_mean", "running_var")) and not half.isfinite().all()
    return value.float() if held else half


def read_entry(path: Path) -> dict[str, Any]:
    """Return the member's entry in a checkpoint's header, as a fit and a build write it.

    Raises:
        ValueError: it is no such checkpoint, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            entry = json.loads(file.metadata()["member"])
        if not isinstance(entry, dict):
            raise ValueError(f"its header's member is {short(entry)}")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no checkpoint of train.py: {one_line(error)}") from error
    return entry


def hash_file(path: Path) -> str:
    """Return a file's sha256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@retried  # all of a file: loading then finds it in memory
def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError where a file is missing or not the one that was packed."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; the bundle is not whole, build and upload it again"
        )
    found = hash_file(path)
    if expected and found != expected.lower():
        raise ValueError(
            f"{path}: sha256 {found[:12]}…, the manifest says {expected[:12]}…: "
            "the file changed after it was hashed; restore it, or build and upload again"
        )


def load_member(folder: Path, spec: MemberSpec, device: torch.device) -> Member:
    """Load one member of a bundle, in fp32 and ready to run.

    Raises:
        ValueError: its file is missing, changed, unreadable or not of the declared model.
    """
    path = folder / spec.file
    try:
        check_sha256(path, spec.sha256)
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file: {error}") from error
    except OSError as error:
        raise ValueError(one_line(error)) from error
    with _Undrawn():
        network = build_network(spec.model)
    _pad_as(network, spec.efficientnet_pytorch)
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]  # PyTorch lists every key
        raise ValueError(
            f"{path}: not of the declared model {short(spec.model)}: {reason}"
        ) from error
    return replace(split_network(network.float(), spec, device), plain=True)
