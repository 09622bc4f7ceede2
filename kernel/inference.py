"""The submission kernel: every strip once through every member under every flip, offline.

Read it top to bottom: images → manifest → members → ensemble → rows → run. It is the only code
that turns pixels into a submission; training, packing and the dry run import their steps from here.
"""

import argparse
import atexit
import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

log = logging.getLogger("kernel")

T = TypeVar("T")

Image = npt.NDArray[np.uint8]  # grey, (H, W), 0-255
Mask = npt.NDArray[np.bool_]  # (H, W)

MANIFEST = "ensemble.json"
SAMPLE = "sample_submission.csv"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}

# --- the log, and progress in it ------------------------------------------------------------------


def start_log() -> None:
    """One format for every line that a script logs, on stdout."""
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(format=form, level=logging.INFO, stream=sys.stdout)


class LogLines(io.TextIOBase):
    """Where a progress bar writes that nobody watches: each state becomes a line of the log."""

    def write(self, text: str) -> int:
        """Logs what is not blank."""
        if text.strip():
            log.info("%s", text.strip())
        return len(text)


def progress(
    items: Iterable[T], desc: str, unit: str, total: int | None = None, initial: int = 0
) -> "tqdm[T]":
    """What takes more than two seconds, by tqdm: a bar in a terminal, else a line every 30 s.

    Kaggle's log keeps every line. Iterate over it, or count by its `update`.
    """
    if sys.stderr.isatty():
        return tqdm(items, desc, total, unit=unit, initial=initial, delay=2)
    lines = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}{postfix}, {remaining} left"
    return tqdm(
        items, desc, total, file=LogLines(), mininterval=30, maxinterval=30, unit=unit,
        initial=initial, delay=2, bar_format=lines,
    )  # fmt: skip


# --- images and masks -----------------------------------------------------------------------------


def read_image(path: Path) -> Image:
    """One image as grey, (H, W), uint8, 0-255, whatever colours the file has.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: its bytes are no image that OpenCV decodes.
    """
    data = np.frombuffer(path.read_bytes(), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) if data.size else None
    if image is None:
        raise ValueError(f"{path}: {data.size} bytes that are no image")
    return image.astype(np.uint8, copy=False)


@dataclass(frozen=True)
class Strip:
    """A decoded image, or the reason why there is none."""

    name: str
    image: Image | None
    fault: str = ""


def decode_strip(folder: Path, name: str) -> Strip:
    """Reads one image; a bad one costs its own rows, never the run."""
    try:
        return Strip(name, read_image(folder / name))
    except Exception as error:  # one bad strip must not cost the submission
        return Strip(name, None, str(error))


def encode_rle(mask: Mask) -> str:
    """Run-length code of a mask (H, W): `start length` pairs, empty for an empty mask.

    Column-major and 1-indexed, as the competition's evaluation page asks.
    """
    columns = np.flatnonzero(mask.any(axis=0))
    if not columns.size:
        return ""
    first, height = int(columns[0]), mask.shape[0]
    part = mask[:, first : int(columns[-1]) + 1]  # a defect is narrow, a strip is wide
    pixels = np.zeros(part.size + 2, np.int8)  # one off pixel at each end closes every run
    pixels[1:-1] = part.T.ravel()
    edges = np.flatnonzero(np.diff(pixels)) + 1 + first * height
    edges[1::2] -= edges[::2]  # ends become lengths
    return " ".join(map(str, edges.tolist()))


# --- rows: sample, ground truth and submission share two layouts ----------------------------------


@dataclass(frozen=True)
class Layout:
    """How a csv names an (image, class) pair: 2019 in one column, today in two."""

    columns: tuple[str, ...]

    def row(self, image: str, label: int, rle: str) -> dict[str, str | int]:
        """One row of the csv; `label` is the class, from 1."""
        cells: dict[str, str | int]
        cells = {"ImageId_ClassId": f"{image}_{label}", "ImageId": image, "ClassId": label}
        return {column: cells.get(column, rle) for column in self.columns}


LAYOUTS = {
    "2019": Layout(("ImageId_ClassId", "EncodedPixels")),
    "today": Layout(("ImageId", "EncodedPixels", "ClassId")),
}


def read_rows(path: Path) -> tuple[Layout, list[tuple[str, int, str]]]:
    """A csv's layout and its rows (image, class, RLE) in its order, in either layout.

    Today's sample names each image once, with class 0.

    Raises:
        ValueError: it is no csv, the header is neither layout's, or a class is no number.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' own errors are ValueErrors that name no file
        raise ValueError(f"{path}: no csv that can be read: {error}") from error
    layout = Layout(tuple(table.columns))
    if set(table.columns) == set(LAYOUTS["2019"].columns):
        images = table["ImageId_ClassId"].str.replace(r"_[^_]*$", "", regex=True)
        labels = table["ImageId_ClassId"].str.replace(r"^.*_", "", regex=True)
    elif set(table.columns) == set(LAYOUTS["today"].columns):
        images, labels = table["ImageId"], table["ClassId"]
    else:
        known = " or ".join(",".join(layout.columns) for layout in LAYOUTS.values())
        raise ValueError(f"{path}: header {','.join(table.columns)}, expected {known}")
    wrong = np.flatnonzero(~labels.str.fullmatch(r"[0-9]+"))
    if wrong.size:
        cells = ",".join(table.iloc[wrong[0]])
        raise ValueError(f"{path}: line {wrong[0] + 2} names no class: {cells}")
    return layout, list(zip(images, labels.astype(int), table["EncodedPixels"], strict=True))


def write_submission(
    path: Path, layout: Layout, pairs: Iterable[tuple[str, int]], rles: dict[tuple[str, int], str]
) -> None:
    """All rows at once: a reader sees the old file or the new one, never a part of it."""
    rows = [layout.row(image, label, rles.get((image, label), "")) for image, label in pairs]
    part = path.with_name(path.name + ".part")
    pd.DataFrame(rows, columns=list(layout.columns)).to_csv(part, index=False, lineterminator="\n")
    part.replace(path)


# --- the manifest: a bundle describes itself ------------------------------------------------------

FLIPS: dict[str, tuple[int, ...]] = {  # name → the axes of (B, C, H, W) that it turns round
    "none": (),
    "horizontal": (-1,),
    "vertical": (-2,),
    "both": (-2, -1),
}


@dataclass(frozen=True)
class MemberSpec:
    """One member's entry in the manifest."""

    name: str
    file: str  # beside the manifest
    model: dict[str, Any]  # keyword arguments of smp.create_model
    mean: list[float]  # of grey in [0, 1], one number a channel
    std: list[float]
    sha256: str = ""  # of the file; empty before the bundle is built
    flops: list[int] = field(
        default_factory=lambda: [1, 1]
    )  # a pass's encoder and decoder, counted

    @property
    def gated(self) -> bool:
        """Whether the member has a presence head beside its mask head."""
        return bool(self.model.get("aux_params"))


@dataclass(frozen=True)
class Manifest:
    """`ensemble.json`: which members under which flips, and what becomes of their mean."""

    members: list[MemberSpec]
    classes: int = 4
    threshold: float = 0.55  # on the mean probability
    min_area: int = 0  # pixels; a class with fewer is left empty
    flips: tuple[str, ...] = ("none", "horizontal", "vertical")
    image_size: tuple[int, int] = (256, 1600)  # (H, W), what the members were trained for
    empty_rows: bool = True  # today's layout: write the rows of empty masks too
    competition: str = "severstal-steel-defect-detection"
    format: int = 1


def parse_manifest(entries: dict[str, Any], path: Path) -> Manifest:
    """The manifest in the JSON object of the file `path`; build_kernel.py has checked its values.

    Raises:
        ValueError: a field is missing or unknown, or the format is a later one.
    """
    try:
        members = [MemberSpec(**member) for member in entries["members"]]
        fields = entries | {"members": members}
        fields |= {key: tuple(fields[key]) for key in ("flips", "image_size") if key in fields}
        manifest = Manifest(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest: {error!r}") from error
    if manifest.format != 1:
        raise ValueError(f"{path}: format {manifest.format}, this kernel reads format 1")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ValueError where the file is missing or holds none."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:  # not JSON, or not even UTF-8
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: no JSON object, found a {type(entries).__name__}")
    return entries


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle; raises ValueError where it is missing or not as it must be."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path}: no such file; build the bundle with build_kernel.py")
    return parse_manifest(read_json(path), path)


# --- members --------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A pass's first half: grey images (B, 1, H, W) in [0, 1] → gates (B, classes) and features.

    A gate is the most that any probability of its class can be: what the presence head says, or 1.
    A network with a way of its own (DPT) runs whole here, and its logits are the features.
    """

    mean: Tensor  # (1, channels, 1, 1)
    std: Tensor

    def __init__(self, network: Any, spec: MemberSpec, whole: bool) -> None:
        super().__init__()
        self.network, self.gated, self.whole = network, spec.gated, whole
        self.classes = spec.model.get("classes", 1)  # SMP's default
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Gates, then the features from the highest resolution to the lowest."""
        images = (images - self.mean) / self.std  # one channel becomes the member's
        if self.whole:
            outputs = self.network(images)
            features, presence = [outputs[0]] if self.gated else [outputs], outputs[-1]
        else:
            features = self.network.encoder(images)
            presence = self.network.classification_head(features[-1]) if self.gated else None
        if self.gated:
            return torch.sigmoid(presence), *features
        return images.new_ones(images.shape[0], self.classes), *features


class Decoder(nn.Module):
    """A pass's second half: gates and features → probabilities (B, classes, H, W)."""

    def __init__(self, network: Any, whole: bool) -> None:
        super().__init__()
        self.network, self.whole = network, whole

    def forward(self, gates: Tensor, *features: Tensor) -> Tensor:
        """The soft gate, `sigmoid(mask) × sigmoid(presence)`: never above the gate."""
        if self.whole:
            logits = features[0]
        else:
            logits = self.network.segmentation_head(self.network.decoder(list(features)))
        return torch.sigmoid(logits) * gates[:, :, None, None]


@dataclass(frozen=True)
class Member:
    """A trained network, its two halves ready to run."""

    spec: MemberSpec
    encode: Any  # an Encoder, or an engine's
    decode: Any
    stride: int  # pixels; an image's sides must be multiples of it

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities (B, classes, H, W) of grey images (B, 1, H, W) in [0, 1]."""
        probabilities: Tensor = self.decode(*self.encode(images))
        return probabilities


def split(network: Any, spec: MemberSpec, device: torch.device) -> Member:
    """A member of its network, cut where the presence head is known and the masks are not."""
    from segmentation_models_pytorch.base import SegmentationModel

    whole = getattr(type(network), "forward", None) is not SegmentationModel.forward
    encoder, decoder = Encoder(network, spec, whole), Decoder(network, whole)
    stride = int(network.encoder.output_stride)
    return Member(spec, encoder.eval().to(device), decoder.eval().to(device), stride)


def use_wheels(bundle: Path) -> None:
    """Puts the bundle's wheels first on the import path: what was packed is what runs.

    Compiled code cannot be imported from inside a wheel, so that one is unpacked, where it is for
    this Python, into a folder that goes when the run ends.
    """
    this_python = "-cp{}{}-".format(*sys.version_info)
    for wheel in sorted(bundle.glob("*.whl"), reverse=True):
        if wheel.name.endswith("-none-any.whl"):
            sys.path.insert(0, str(wheel))
        elif this_python in wheel.name:
            folder = tempfile.mkdtemp(prefix=wheel.stem)
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            shutil.unpack_archive(wheel, folder, "zip")
            sys.path.insert(0, folder)


def build_network(model: dict[str, Any]) -> nn.Module:
    """An untrained network of `smp.create_model`'s keyword arguments; downloads nothing.

    Raises:
        ValueError: SMP knows no such architecture, encoder or option.
    """
    import segmentation_models_pytorch as smp

    try:
        network: nn.Module = smp.create_model(**{**model, "encoder_weights": None})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"SMP builds no network of {model}: {error}") from error
    return network.eval()


def check_sha256(path: Path, expected: str) -> None:
    """Raises ValueError where a file is missing or not the one that was packed."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; the bundle is not whole, build and upload it again"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if expected and found != expected:
        raise ValueError(
            f"{path}: sha256 {found[:12]}…, the manifest says {expected[:12]}…: "
            "the file changed after it was hashed; restore it, or build and upload again"
        )


def load_member(folder: Path, spec: MemberSpec, device: torch.device) -> Member:
    """One member of a bundle, in fp32 and ready to run.

    Raises:
        ValueError: its file is missing, changed, unreadable or not of the declared model.
    """
    path = folder / spec.file
    check_sha256(path, spec.sha256)
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file: {error}") from error
    network = build_network(spec.model)
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]  # PyTorch lists every key
        raise ValueError(f"{path}: not of the declared model {spec.model}: {reason}") from error
    return split(network.float(), spec, device)


# --- engines: both halves at the machine's speed --------------------------------------------------

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
    """One half as OpenVINO runs it on the CPU, compiled once for every shape that comes."""

    def __init__(self, path: Path) -> None:
        import openvino

        self.core = openvino.Core()
        self.model = self.core.read_model(path)
        self.compiled: dict[tuple[torch.Size, ...], Any] = {}

    def __call__(self, *tensors: Tensor) -> Any:
        """What the half that was packed gives: one tensor, or a tuple of them."""
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.compiled:
            self.model.reshape({index: list(shape) for index, shape in enumerate(shapes)})
            precise = {"INFERENCE_PRECISION_HINT": "f32"}
            self.compiled[shapes] = self.core.compile_model(self.model, "CPU", precise)
        found = self.compiled[shapes]([tensor.numpy() for tensor in tensors], share_inputs=True)
        outputs = tuple(torch.from_numpy(found[index]) for index in range(len(found)))
        return outputs if len(outputs) > 1 else outputs[0]


def openvino_files(file: str) -> list[str]:
    """Where a member's halves lie beside its checkpoint `file`, if they were packed."""
    return [f"{Path(file).stem}.{half}.xml" for half in ("encoder", "decoder")]


def in_half_precision(half: nn.Module) -> Callable[..., Any]:
    """A half that computes in fp16 on a GPU."""

    def run(*tensors: Tensor) -> Any:
        with torch.autocast("cuda", torch.float16):
            return half(*tensors)

    return run


def fastest(folder: Path, spec: MemberSpec, device: torch.device) -> Member:
    """A member on the fastest engine that this machine has for it.

    OpenVINO on the CPU, where it imports and `build_kernel.py --openvino` packed the halves. Else
    PyTorch with batch norm folded; on a GPU in fp16, channels last.

    Raises:
        ValueError: as `load_member`.
    """
    halves = [folder / name for name in openvino_files(spec.file)]
    if device.type == "cpu" and halves[0].is_file():
        try:
            encode, decode = map(OpenVino, halves)
            stride = int(encode.model.get_rt_info("stride").value)
            return Member(spec, encode, decode, stride)
        except Exception as error:  # a failed engine must not cost the submission
            log.warning("%s runs on PyTorch, not on OpenVINO: %r", spec.name, error)
    member = load_member(folder, spec, device)
    fold_batch_norm(member.encode.network)  # which both halves share
    if device.type == "cpu":
        return member
    member.encode.network.to(memory_format=torch.channels_last)
    fp16 = in_half_precision
    return replace(member, encode=fp16(member.encode), decode=fp16(member.decode))


def check_engine(engine: Member, plain: Member, images: Tensor) -> Member:
    """The engine, or plain fp32 PyTorch where the engine fails or gives something else.

    Gates and masks are compared apart: a shut gate would hide wrong masks.
    """
    answers = []
    try:
        for member in (plain, engine):
            gates, *features = member.encode(images)
            masks = member.decode(torch.ones_like(gates), *features)
            answers.append((gates.float(), masks.float()))
        apart = [(a - b).abs().mean().item() for a, b in zip(*answers, strict=True)]
        agree = all(difference <= AGREE for difference in apart)  # which NaN is not
        fault = "" if agree else f"gates and masks are {apart} apart"
    except Exception as error:  # a failed engine must not cost the submission
        fault = repr(error)
    if fault:
        log.warning("%s runs on plain PyTorch, the engine fails: %s", plain.spec.name, fault)
    return plain if fault else engine


def pick_device() -> torch.device:
    """CUDA where one real operation runs on it, else the CPU.

    Kaggle's P100 says that it is available and dies at its first operation.
    """
    if torch.cuda.is_available():
        try:
            ones = torch.ones(1, 1, 8, 8, device="cuda", dtype=torch.float16)
            torch.nn.functional.conv2d(ones, ones[:, :, :3, :3]).sum().item()
            return torch.device("cuda")
        except Exception as error:  # a failed device must not cost the submission
            log.warning("the GPU fails its first operation, using the CPU: %s", error)
    return torch.device("cpu")


# --- the ensemble ---------------------------------------------------------------------------------


class Stages:
    """Seconds spent per named stage; what the dry run's table is made of."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time inside to stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Images (B, 1, H, W) with the last row and column repeated up to the next multiple."""
    height, width = images.shape[-2:]
    padding = (0, -width % multiple, 0, -height % multiple)
    return nn.functional.pad(images, padding, mode="replicate") if any(padding) else images


HOPE = 0.8  # of the sum that is needed: below it a strip looks clean


class Tally:
    """The passes of one image: their sum, and what it proves before the last of them has run.

    K passes give probabilities p in [0, 1], and a pixel of a class is on where their mean exceeds
    t, that is where their sum exceeds tK. At any moment the first d passes are decoded, their sum
    is S; those after them up to e are encoded, so that their gates g are known and p ≤ g; the
    others can add 1 at the most. The final sum lies between S and S + Σg + (K − e), hence

        surely on   once S > tK,
        surely off  once S + Σg + (K − e) ≤ tK.

    A class is closed when this decides each of its pixels, or when fewer than `min_area` can still
    be on, for then it will be empty. When all classes are closed no pass can change the masks, and
    none is run. As long as nothing is decoded S is 0, and an image is proven empty by gates alone.

    Adding K numbers of at most 1 in fp32 errs by less than K² 2⁻²⁴, the division and the scalars
    that tensors are compared with by a few K 2⁻²⁴ more; `margin` is above their sum and keeps both
    comparisons on the safe side. Where all passes were decoded, the masks are those of `mean > t`
    and of no bound. The proof speaks of a pass's probabilities as they are,
    so they must not depend on what else is in the batch. They do not as long as the batch has one
    size, so all are filled up to it: tested bit by bit on the CPU. A GPU's libraries promise no
    more than they document; after running out of memory the size is another, and last bits may be.
    """

    def __init__(self, passes: int, manifest: Manifest, early_exit: bool) -> None:
        self.passes, self.early_exit = passes, early_exit
        self.threshold, self.min_area = manifest.threshold, max(manifest.min_area, 1)
        self.needed = passes * manifest.threshold  # what a sum must exceed
        self.margin = (passes + 1) ** 2 * 2**-23  # of rounding
        self.gates: list[npt.NDArray[np.float64]] = []  # (classes,) of every pass encoded
        self.total: Tensor | None = None  # (classes, H, W), of the passes decoded
        self.decoded = 0
        self.open = list(range(manifest.classes))  # classes not proven

    def encode(self, gates: npt.NDArray[np.float64]) -> None:
        """One more pass is encoded; `gates` (classes,) bound its probabilities."""
        self.gates.append(gates)
        self.close()

    def decode(self, probabilities: Tensor) -> None:
        """The next pass is decoded: probabilities (classes, H, W)."""
        self.total = probabilities.clone() if self.total is None else self.total.add_(probabilities)
        self.decoded += 1
        self.close()

    def close(self) -> None:
        """Drops the classes that are proven now."""
        if self.decoded == self.passes:
            self.open = []
        elif self.early_exit:
            self.open = [label for label in self.open if not self.proven(label)]

    def proven(self, label: int) -> bool:
        """Whether no pass to come can change this class's mask."""
        rest = sum(gates[label] for gates in self.gates[self.decoded :])
        rest += self.passes - len(self.gates)
        if rest > self.needed - self.margin:  # not even a pixel of sum 0 is off
            return False
        if self.total is None:
            return True
        possible = self.total[label] > self.needed - self.margin - rest
        count = int(possible.sum())
        return count < self.min_area or count == int(
            (self.total[label] > self.needed + self.margin).sum()
        )

    @property
    def looks_clean(self) -> bool:
        """Whether gates alone may prove all open classes, were the next ones like those seen.

        A guess that costs or saves work and changes no mask: no decoder runs while it holds.
        """
        if not self.early_exit:
            return False
        usual = np.mean(self.gates, axis=0)
        for label in self.open:
            highest = 0.0 if self.total is None else float(self.total[label].max())
            kept = sum(gates[label] for gates in self.gates[self.decoded :])
            rest = (self.passes - len(self.gates)) * usual[label]
            if highest + kept + rest > HOPE * self.needed:
                return False
        return True

    def masks(self, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Masks (classes, H, W); call it when no class is open."""
        if self.total is None:
            return np.zeros((len(self.gates[0]), *size), np.bool_)
        if self.decoded == self.passes:
            masks = self.total / self.passes > self.threshold
        else:
            masks = self.total > self.needed + self.margin
        areas = masks.sum(dim=(-2, -1), keepdim=True)
        return (masks & (areas >= self.min_area)).cpu().numpy()


@dataclass(eq=False)
class Flight:
    """A strip on its way through the passes."""

    strip: Strip
    images: Tensor  # (1, 1, H, W), padded, on the device
    tally: Tally
    size: tuple[int, int] = (0, 0)  # of the strip, without padding
    kept: list[tuple[Tensor, ...]] = field(default_factory=list)  # encoded, not decoded
    step: tuple[str, int] = ("encode", 0)  # the half and the pass that it needs next
    fault: str = ""

    @property
    def landed(self) -> bool:
        """Whether its masks are known, or never will be."""
        return bool(self.fault) or not self.tally.open

    def encode(self, encoded: tuple[Tensor, ...], gates: npt.NDArray[np.float64]) -> None:
        """Takes what the next pass's encoder gave, and its gates (classes,) once more."""
        self.kept.append(encoded)
        self.tally.encode(gates)
        self.plan()

    def decode(self, probabilities: Tensor) -> None:
        """Takes the probabilities (classes, H, W), padded, of the oldest pass that it keeps."""
        del self.kept[0]
        self.tally.decode(probabilities[:, : self.size[0], : self.size[1]])
        self.plan()

    def plan(self) -> None:
        """Encoders alone while they may prove all; else what is kept is decoded first."""
        tally = self.tally
        if self.kept and (len(tally.gates) == tally.passes or not tally.looks_clean):
            self.step = ("decode", tally.decoded)
        else:
            self.step = ("encode", len(tally.gates))


def turned(images: Tensor, flip: str) -> Tensor:
    """Images (B, C, H, W) under a flip, which is also its own way back."""
    return images.flip(FLIPS[flip]) if FLIPS[flip] else images


def joined(tensors: Sequence[Tensor], size: int) -> Tensor:
    """A batch of `size`, filled up with the last image; one alone is not copied."""
    filled = list(tensors) + [tensors[-1]] * (size - len(tensors))
    return torch.cat(filled) if size > 1 else tensors[0]


class Ensemble:
    """Members × flips → mean of probabilities → masks, for strips that come one after another."""

    def __init__(
        self,
        manifest: Manifest,
        members: Sequence[Member],
        device: torch.device,
        stages: Stages,
        batch_size: int = 1,
        early_exit: bool = True,
    ) -> None:
        self.manifest, self.device, self.stages = manifest, device, stages
        self.batch_size, self.early_exit = batch_size, early_exit
        self.multiple = math.lcm(*(member.stride for member in members))
        self.members = sorted(members, key=lambda member: sum(member.spec.flops))  # cheapest first

    @property
    def passes(self) -> list[tuple[Member, str]]:
        """Every member under every flip, in the order in which they run."""
        return list(itertools.product(self.members, self.manifest.flips))

    @torch.inference_mode()
    def check_engines(self, bundle: Path, image: Image) -> None:
        """Replaces every engine that gives another answer than plain PyTorch for one image."""
        images = self.prepare(image)
        for index, engine in enumerate(self.members):
            plain = load_member(bundle, engine.spec, self.device)  # one at a time in memory
            self.members[index] = check_engine(engine, plain, images)

    def prepare(self, image: Image) -> Tensor:
        """An image (H, W) as a pass takes it: (1, 1, H, W) in [0, 1], padded."""
        images = torch.from_numpy(image)[None, None]
        if self.device.type == "cuda":  # from pinned memory the copy runs beside the networks
            images = images.pin_memory().to(self.device, non_blocking=True)
        return pad_to_multiple(images / 255, self.multiple)

    def encode(self, index: int, images: Tensor) -> tuple[Tensor, ...]:
        """Pass `index` as far as its gates: gates (B, classes) and features of images turned."""
        member, flip = self.passes[index]
        with self.stages(f"networks/{member.spec.name}/encoder"):
            encoded: tuple[Tensor, ...] = member.encode(turned(images, flip))
        return encoded

    def decode(self, index: int, encoded: Sequence[Tensor]) -> Tensor:
        """The rest of pass `index`, turned back: probabilities (B, classes, H, W), fp32."""
        member, flip = self.passes[index]
        with self.stages(f"networks/{member.spec.name}/decoder"):
            probabilities: Tensor = member.decode(*encoded).float()
        return turned(probabilities, flip)

    @torch.inference_mode()
    def fly(self, strips: Iterable[Strip]) -> Iterator[Flight]:
        """Every strip with its masks proven or its fault told, as they land, not as they came.

        Strips that need the same half of the same pass go through it together.
        """
        coming, flying = iter(strips), list[Flight]()
        while True:
            most = 1 if self.batch_size == 1 else 4 * self.batch_size  # so that batches stay full
            room = max(most - len(flying), 0)
            flying += [self.take_off(strip) for strip in itertools.islice(coming, room)]
            if not flying:
                return
            groups = defaultdict(list)
            for flight in flying:
                if not flight.landed:
                    groups[*flight.step, flight.images.shape].append(flight)
            if groups:  # the largest, and of equals the one furthest behind
                size = {step: min(len(group), self.batch_size) for step, group in groups.items()}
                step = max(groups, key=lambda step: (size[step], -step[1]))
                self.advance(step[0], step[1], groups[step][: self.batch_size])
            yield from (flight for flight in flying if flight.landed)
            flying = [flight for flight in flying if not flight.landed]

    def take_off(self, strip: Strip) -> Flight:
        """A strip before its first pass; one that could not be read has landed already."""
        tally = Tally(len(self.passes), self.manifest, self.early_exit)
        if strip.image is None:
            return Flight(strip, torch.empty(0), tally, fault=strip.fault)
        size = (strip.image.shape[0], strip.image.shape[1])
        with self.stages("prepare"):
            return Flight(strip, self.prepare(strip.image), tally, size)

    def advance(self, half: str, index: int, flights: list[Flight]) -> None:
        """One half of a pass for strips of one size; where it fails, in smaller batches."""
        try:
            (self.encode_flights if half == "encode" else self.decode_flights)(index, flights)
        except Exception as error:  # out of memory, or one strip that a network cannot take
            if isinstance(error, torch.cuda.OutOfMemoryError) and self.batch_size > 1:
                self.batch_size //= 2  # these flights are where they were, and come again
                log.warning("out of memory: %d strips at a time from here on", self.batch_size)
            elif len(flights) == 1:
                flights[0].fault = f"the networks failed: {error!r}"
            else:
                middle = len(flights) // 2
                self.advance(half, index, flights[:middle])
                self.advance(half, index, flights[middle:])

    def encode_flights(self, index: int, flights: list[Flight]) -> None:
        """Pass `index` of these strips as far as their gates."""
        images = joined([flight.images for flight in flights], self.batch_size)
        encoded = self.encode(index, images)
        gates = encoded[0].cpu().double().numpy()  # (B, classes)
        for row, flight in enumerate(flights):
            with self.stages("tally"):
                flight.encode(tuple(tensor[row : row + 1] for tensor in encoded), gates[row])

    def decode_flights(self, index: int, flights: list[Flight]) -> None:
        """The rest of pass `index` of these strips, which is the oldest they keep."""
        oldest = zip(*(flight.kept[0] for flight in flights), strict=True)
        encoded = [joined(tensors, self.batch_size) for tensors in oldest]
        probabilities = self.decode(index, encoded)
        for row, flight in enumerate(flights):
            with self.stages("tally"):
                flight.decode(probabilities[row])

    def work(self, tally: Tally) -> dict[str, float]:
        """What was run for a strip, and its share of the flops of all passes."""
        flops = np.array([member.spec.flops for member, _ in self.passes])  # (passes, halves)
        run = flops[: len(tally.gates), 0].sum() + flops[: tally.decoded, 1].sum()
        encoders, decoders = len(tally.gates), tally.decoded
        return {"encoders": encoders, "decoders": decoders, "share": float(run / flops.sum())}

    def __call__(self, images: Sequence[Image]) -> npt.NDArray[np.bool_]:
        """Masks (B, classes, H, W) of images (H, W) of one size."""
        flights = list(self.fly(Strip(str(index), image) for index, image in enumerate(images)))
        faults = [flight.fault for flight in flights if flight.fault]
        if faults:
            raise RuntimeError(faults[0])
        flights.sort(key=lambda flight: int(flight.strip.name))
        return np.stack([flight.tally.masks(flight.size) for flight in flights])


# --- finding what is mounted ----------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The command line; its defaults are what runs on Kaggle."""

    input: Path = Path("/kaggle/input")
    bundle: Path | None = None
    images: Path | None = None
    sample: Path | None = None
    output: Path = Path("submission.csv")
    layout: str | None = None
    batch_size: int = 0  # strips; 0 is 8 on a GPU and 1 on the CPU
    early_exit: bool = True
    workers: int = 0  # processes; 0 is one a GPU
    shard: str = ""  # "2/3" in the second of three workers
    report: Path | None = None  # None is run.json beside the output


def find_one(root: Path, name: str, what: str, option: str) -> Path:
    """The folder under `root`, at any depth, that holds the file `name`.

    Raises:
        ValueError: there is none or more than one; the message says what to add or to name.
    """
    folders = sorted(path.parent for path in root.rglob(name))
    if not folders:
        raise ValueError(
            f"no {name} under {root}: add {what} to the kernel's sources, or give {option}"
        )
    if len(folders) > 1:
        listed = ", ".join(map(str, folders))
        raise ValueError(f"more than one {name}: {listed}; choose with {option}")
    return folders[0]


def find_images(sample: Path, names: set[str]) -> Path:
    """The folder beside the sample that holds most of its images.

    Raises:
        ValueError: no folder holds any.
    """
    folders = sorted(path for path in sample.parent.iterdir() if path.is_dir())
    shares = {folder: len(names & {path.name for path in folder.iterdir()}) for folder in folders}
    best = max(folders, key=lambda folder: shares[folder], default=sample.parent)
    if not shares.get(best):
        raise ValueError(f"no folder beside {sample} holds its images; name theirs with --images")
    return best


@dataclass(frozen=True)
class Task:
    """What is to be predicted, and how it is to be written."""

    images: Path
    layout: Layout
    pairs: list[tuple[str, int]]  # (image, class) of every row, in order

    @property
    def names(self) -> list[str]:
        """Every image once, in the order of its first row."""
        return list(dict.fromkeys(name for name, _ in self.pairs))

    def shard(self, index: int, count: int) -> "Task":
        """The rows of every `count`-th image from `index`, from 0."""
        names = set(self.names[index::count])
        return replace(self, pairs=[pair for pair in self.pairs if pair[0] in names])


def expand_rows(rows: Iterable[tuple[str, int]], classes: int) -> list[tuple[str, int]]:
    """(image, class) pairs in order, each once; class 0 stands for every class of its image."""
    spread = ((n, c) for n, label in rows for c in ([label] if label else range(1, classes + 1)))
    return list(dict.fromkeys(spread))


def read_sample(
    sample: Path, layout: str | None, classes: int
) -> tuple[Layout, list[tuple[str, int]]]:
    """A sample's layout and (image, class) pairs; ValueError for a class above `classes`."""
    found, rows = read_rows(sample)
    pairs = [(name, label) for name, label, _ in rows]
    above = next((pair for pair in pairs if pair[1] > classes), None)
    if above:
        raise ValueError(f"{sample}: row {above} names a class above the members' {classes}")
    return LAYOUTS[layout] if layout else found, expand_rows(pairs, classes)


def find_task(options: Options, classes: int) -> Task:
    """The sample's rows, or, where only `--images` is given, every image of that folder.

    Raises:
        ValueError: nothing to predict is found, or a row names a class the members do not know.
    """
    images, sample = options.images, options.sample
    if images and not images.is_dir():
        raise ValueError(f"{images}: no such folder of images")
    if images and not sample:
        found = sorted(p.name for p in images.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        pairs = expand_rows([(name, 0) for name in found], classes)
        task = Task(images, LAYOUTS[options.layout or "2019"], pairs)
    else:
        sample = sample or find_one(options.input, SAMPLE, "the competition", "--sample") / SAMPLE
        layout, pairs = read_sample(sample, options.layout, classes)
        task = Task(images or find_images(sample, {name for name, _ in pairs}), layout, pairs)
    if not task.pairs:
        raise ValueError(f"{sample or images}: names no image")
    return task


# --- the run --------------------------------------------------------------------------------------


def decode_ahead(folder: Path, names: Sequence[str], ahead: int) -> Iterator[Strip]:
    """Strips in order, up to `ahead` of them decoded beside the network."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        waiting: list[Future[Strip]] = []
        for name in names:
            waiting.append(pool.submit(decode_strip, folder, name))
            if len(waiting) > ahead:
                yield waiting.pop(0).result()
        for strip in waiting:
            yield strip.result()


def load_ensemble(
    bundle: Path,
    manifest: Manifest,
    device: torch.device,
    stages: Stages,
    batch_size: int = 1,
    early_exit: bool = True,
) -> Ensemble:
    """Every member of a bundle, ready to run; raises ValueError as `load_member` does."""
    with stages("import"):
        use_wheels(bundle)
        import segmentation_models_pytorch  # noqa: F401 - timed apart from the members
    with stages("load"):
        specs = progress(manifest.members, "members", "member")
        members = [fastest(bundle, spec, device) for spec in specs]
    return Ensemble(manifest, members, device, stages, batch_size, early_exit)


def check_engines(ensemble: Ensemble, bundle: Path, task: Task) -> None:
    """Checks every engine on the first strip that can be read."""
    strips = (decode_strip(task.images, name) for name in task.names)
    image = next((strip.image for strip in strips if strip.image is not None), None)
    if image is not None:
        ensemble.check_engines(bundle, image)


def timed(strips: Iterator[Strip], stages: Stages, name: str) -> Iterator[Strip]:
    """The same strips; the time spent waiting for each goes to stage `name`."""
    while True:
        with stages(name):
            strip = next(strips, None)
        if strip is None:
            return
        yield strip


@dataclass
class Outcome:
    """What became of every image."""

    rles: dict[tuple[str, int], str] = field(default_factory=dict)  # (image, class) with a mask
    faults: dict[str, str] = field(default_factory=dict)  # image → why its rows stay empty
    work: dict[str, dict[str, float]] = field(default_factory=dict)  # image → what was run for it
    strip_s: dict[str, float] = field(default_factory=dict)  # image → seconds since the one before
    device: str = ""
    gpu_bytes: int = 0  # the most that PyTorch held on one GPU

    def add(self, other: "Outcome") -> None:
        """Takes in what became of other images."""
        self.rles |= other.rles
        self.faults |= other.faults
        self.work |= other.work
        self.strip_s |= other.strip_s
        self.device = other.device
        self.gpu_bytes = max(self.gpu_bytes, other.gpu_bytes)


def predict_task(ensemble: Ensemble, task: Task) -> Outcome:
    """Every image of a task through the ensemble."""
    outcome, asked = Outcome(device=str(ensemble.device)), set(task.pairs)
    strips = decode_ahead(task.images, task.names, ahead=4 * ensemble.batch_size)
    before = time.perf_counter()
    with progress(task.names, "strips", "strip") as bar:
        for flight in ensemble.fly(timed(strips, ensemble.stages, "decode")):
            name = flight.strip.name
            if flight.fault:
                outcome.faults[name] = flight.fault
                log.warning("%s stays empty: %s", name, flight.fault)
            else:
                outcome.work[name] = ensemble.work(flight.tally)
                with ensemble.stages("rle"):
                    masks = enumerate(flight.tally.masks(flight.size), 1)
                    rles = {(name, label): encode_rle(mask) for label, mask in masks}
                    outcome.rles |= {
                        pair: rle for pair, rle in rles.items() if rle and pair in asked
                    }
            before, since = time.perf_counter(), before
            outcome.strip_s[name] = before - since
            bar.update()
    outcome.gpu_bytes = torch.cuda.max_memory_allocated()
    return outcome


def write_result(
    options: Options, task: Task, empty_rows: bool, rles: dict[tuple[str, int], str]
) -> int:
    """The submission and its number of rows; today's layout may leave those of empty masks out."""
    keep_all = empty_rows or "ClassId" not in task.layout.columns
    pairs = task.pairs if keep_all else [pair for pair in task.pairs if pair in rles]
    write_submission(options.output, task.layout, pairs, rles)
    return len(pairs)


def predict_here(
    options: Options, bundle: Path, manifest: Manifest, task: Task, stages: Stages
) -> Outcome:
    """A task in this process, on its own device."""
    device = pick_device()
    batch_size = options.batch_size or (8 if device.type == "cuda" else 1)
    ensemble = load_ensemble(bundle, manifest, device, stages, batch_size, options.early_exit)
    with stages("check"):
        check_engines(ensemble, bundle, task)
    log.info("%d images of %s on %s", len(task.names), task.images, device)
    return predict_task(ensemble, task)


def start_worker(
    options: Options, bundle: Path, task: Task, folder: Path, shard: tuple[int, int]
) -> subprocess.Popen[bytes]:
    """This script once more, for one shard of the images on one GPU, its results into `folder`."""
    number, count = shard
    script = bundle / "inference.py"  # a notebook has no file of its own
    command = [sys.executable, str(script if script.is_file() else Path(__file__).resolve())]
    command += [
        "--bundle",
        str(bundle),
        "--images",
        str(task.images),
        "--shard",
        f"{number}/{count}",
    ]
    command += ["--sample", str(options.sample)] if options.sample else []
    command += [
        "--output",
        str(folder / f"{number}.csv"),
        "--report",
        str(folder / f"{number}.json"),
    ]
    command += ["--batch-size", str(options.batch_size)]
    command += [] if options.early_exit else ["--no-early-exit"]
    threads = max((os.cpu_count() or 1) // count, 1)
    environment = {"CUDA_VISIBLE_DEVICES": str(number - 1), "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=os.environ | environment)


def read_worker(folder: Path, number: int, stages: Stages, share: float) -> Outcome:
    """What a worker left in `folder`; its seconds count by its `share` of the workers."""
    report = read_json(folder / f"{number}.json")
    rows = read_rows(folder / f"{number}.csv")[1]
    for stage, seconds in report["stages"].items():
        stages.seconds[stage] += share * seconds
    rles = {(name, label): rle for name, label, rle in rows if rle}
    known = ("faults", "work", "strip_s", "device", "gpu_bytes")
    return Outcome(rles, **{key: report[key] for key in known})


def predict_by_workers(
    options: Options, bundle: Path, manifest: Manifest, task: Task, stages: Stages, count: int
) -> Outcome:
    """A task dealt out to `count` processes; what one of them cannot finish is done here."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        numbers = range(1, count + 1)
        running = [start_worker(options, bundle, task, folder, (n, count)) for n in numbers]
        codes = [worker.wait() for worker in running]
        for number, code in zip(numbers, codes, strict=True):
            if code == 0:
                outcome.add(read_worker(folder, number, stages, 1 / count))
                continue
            rest = task.shard(number - 1, count)
            log.warning(
                "worker %d of %d ended with exit code %d: its %d images run here",
                *(number, count, code, len(rest.names)),
            )
            outcome.add(predict_here(options, bundle, manifest, rest, stages))
    return outcome


def run(options: Options) -> dict[str, Any]:
    """Predicts and writes the submission; returns what `--report` writes.

    Raises:
        ValueError: the bundle, the sample or the images are not usable.
        RuntimeError: not one strip could be predicted.
    """
    start, stages = time.perf_counter(), Stages()
    bundle = options.bundle or find_one(options.input, MANIFEST, "the bundle's dataset", "--bundle")
    manifest = load_manifest(bundle)
    task = find_task(options, manifest.classes)
    if options.shard:
        number, count = map(int, options.shard.split("/"))
        task = task.shard(number - 1, count)
    write_result(options, task, True, {})  # a valid submission stands from here on
    workers = 1 if options.shard else options.workers or max(torch.cuda.device_count(), 1)
    if min(workers, len(task.names)) > 1:
        outcome = predict_by_workers(options, bundle, manifest, task, stages, workers)
    else:
        outcome = predict_here(options, bundle, manifest, task, stages)
    if not outcome.work:
        raise RuntimeError(
            f"not one of {len(task.names)} strips could be predicted; the submission is all empty"
        )
    with stages("write"):
        rows = write_result(options, task, manifest.empty_rows, outcome.rles)
    seconds = time.perf_counter() - start
    cheapest_first = sorted(manifest.members, key=lambda spec: sum(spec.flops))
    working_s = seconds - sum(stages.seconds[stage] for stage in ("import", "load", "check"))
    log.info(
        "%s: %d rows, %d non-empty masks, %d strips failed, %.1f s, %.2f strips/s",
        *(options.output, rows, len(outcome.rles)),
        *(len(outcome.faults), seconds, len(task.names) / working_s),
    )
    return {
        "strips": len(task.names),
        "rows": rows,
        "non_empty": len(outcome.rles),
        "faults": outcome.faults,
        "work": outcome.work,
        "strip_s": outcome.strip_s,
        "share": float(np.mean([work["share"] for work in outcome.work.values()])),
        "passes": [[m.name, flip, *m.flops] for m in cheapest_first for flip in manifest.flips],
        "device": outcome.device,
        "gpu_bytes": outcome.gpu_bytes,
        "workers": workers,
        "seconds": seconds,
        "stages": dict(stages.seconds),
    }


EXAMPLE = "  python inference.py --bundle dist/dataset --images strips/ --output submission.csv"


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """The command line as Options; none is needed on Kaggle."""
    parser = argparse.ArgumentParser(
        description=f"{EXAMPLE}\n\n{__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        type=Path,
        default=Options.input,
        help="where the bundle and the competition are mounted",
    )
    add("--bundle", type=Path, help=f"folder with {MANIFEST} (default: found under --input)")
    add("--images", type=Path, help="folder of images (default: beside the sample)")
    add(
        "--sample",
        type=Path,
        help=f"the rows to write (default: {SAMPLE} under --input, or every image of --images)",
    )
    add("--output", type=Path, default=Options.output, help="default submission.csv")
    add("--layout", choices=sorted(LAYOUTS), help="default: the sample's own, or 2019 without one")
    add("--batch-size", type=int, default=0, help="strips; default 8 on a GPU and 1 on the CPU")
    add(
        "--no-early-exit",
        dest="early_exit",
        action="store_false",
        help="run every pass, for the same submission",
    )
    add("--workers", type=int, default=0, help="processes; default one a GPU")
    add("--shard", default="", help="2/3: the second of three workers, as the first starts them")
    about = "seconds, work per strip and every failed strip (default: run.json beside the output)"
    add("--report", type=Path, help=about)
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; bad input ends it with one clear line and exit code 2."""
    start_log()
    options = parse_options(arguments)
    try:
        report = run(options)
    except (ValueError, OSError, RuntimeError) as error:
        log.error("%s", error)
        sys.exit(2)
    text = json.dumps(report, indent=2, sort_keys=True) + "\n"
    path = options.report or options.output.with_name("run.json")
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
