"""The submission kernel: every strip once through every member under every flip, offline.

Read it top to bottom: log → images → rows → manifest → members → engines → sums → the hour →
ensemble → what is mounted → run → one process a GPU → command line. It is the only code that turns
pixels into a submission; training, packing and the dry run import their steps from here.
"""

import argparse
import atexit
import copy
import csv
import hashlib
import importlib
import io
import itertools
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import PIL.Image
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
COMPETITION = "severstal-steel-defect-detection"
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


MOST_PIXELS = 50_000_000  # 122 strips' worth; a larger image would take the run's memory


def check_header(path: Path, data: bytes) -> None:
    """Refuses what is better not decoded; ValueError for no image, a huge one, a JPEG cut off.

    OpenCV fills up a JPEG that breaks off with grey, in which a network may see anything.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large image, which is judged here
            width, height = PIL.Image.open(io.BytesIO(data)).size
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from error
    except (OSError, SyntaxError) as error:  # what Pillow raises for a header that is none
        raise ValueError(f"{path}: {len(data)} bytes that are no image") from error
    if width * height > MOST_PIXELS:
        raise ValueError(f"{path}: {width}×{height} pixels, at most {MOST_PIXELS:,} are decoded")
    if data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[-1024:]:
        raise ValueError(f"{path}: a JPEG that breaks off after {len(data)} bytes")


def read_image(path: Path) -> Image:
    """One image as grey, (H, W), uint8, 0-255, whatever colours the file has.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: its bytes are no image, not a whole one or too large a one.
    """
    data = path.read_bytes()
    check_header(path, data)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise ValueError(f"{path}: {len(data)} bytes that OpenCV does not decode")
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


def csv_line(cells: Iterable[str]) -> str:
    """One line of a csv, its end included."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


@dataclass(frozen=True)
class Layout:
    """How a csv names an (image, class) pair: 2019 in one column, today in two."""

    columns: tuple[str, ...]

    def line(self, image: str, label: int, rle: str) -> str:
        """One row of the csv; `label` is the class, from 1."""
        cells = {"ImageId_ClassId": f"{image}_{label}", "ImageId": image, "ClassId": str(label)}
        return csv_line(cells.get(column, rle) for column in self.columns)


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
    wrong = np.flatnonzero(~labels.str.fullmatch(r"[0-9]{1,9}"))
    if wrong.size:
        cells = ",".join(table.iloc[wrong[0]])
        raise ValueError(f"{path}: line {wrong[0] + 2} names no class: {cells}")
    return layout, list(zip(images, labels.astype(int), table["EncodedPixels"], strict=True))


class Submission:
    """submission.csv: whole from the first second on, the rows of strips to come empty.

    Each save writes all rows beside the file and puts them in its place: a reader, or a kill at any
    moment, finds the old file or the new one, never a part of it.
    """

    SHARE = 0.01  # of the time may go into saving

    def __init__(self, path: Path, layout: Layout, pairs: Iterable[tuple[str, int]]) -> None:
        self.path, self.layout = path, layout
        self.lines = {pair: layout.line(*pair, "") for pair in pairs}
        self.rles: dict[tuple[str, int], str] = {}  # (image, class) with a mask
        self.next_s = 0.0  # time.monotonic() of the next save that keeps within its share
        self.saving = threading.Lock()  # the watchdog saves too

    def put(self, image: str, rles: dict[int, str]) -> None:
        """The masks of one strip, class → RLE; those that no row asks for are left out."""
        for label, rle in rles.items():
            pair = image, label
            if rle and pair in self.lines:
                self.rles[pair] = rle
                self.lines[pair] = self.layout.line(*pair, rle)

    def save(self, empty_rows: bool = True) -> int:
        """Writes every row, or only those with a mask; their number.

        Raises:
            OSError: the folder is missing or read-only, or the disk is full.
        """
        start = time.monotonic()
        rows = self.lines if empty_rows else self.rles.keys() & self.lines
        text = csv_line(self.layout.columns)
        text += "".join([line for pair, line in self.lines.items() if pair in rows])
        part = self.path.with_name(self.path.name + ".part")
        with self.saving:
            part.write_text(text, encoding="utf-8", newline="")
            part.replace(self.path)
        now = time.monotonic()
        self.next_s = now + (now - start) / self.SHARE
        return len(rows)

    def save_soon(self) -> None:
        """Saves, unless too much time went into that lately; a full disk may be empty later."""
        if time.monotonic() < self.next_s:
            return
        try:
            self.save()
        except OSError as error:
            self.next_s = time.monotonic() + 10
            log.warning("cannot write what is done so far, going on: %s", error)


def write_submission(
    path: Path, layout: Layout, pairs: Iterable[tuple[str, int]], rles: dict[tuple[str, int], str]
) -> None:
    """All rows at once, with the masks of `rles`."""
    submission = Submission(path, layout, pairs)
    for (image, label), rle in rles.items():
        submission.put(image, {label: rle})
    submission.save()


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
    competition: str = COMPETITION
    format: int = 1


def first_fault(manifest: Manifest) -> str | None:
    """What makes a manifest unusable, in words, or nothing."""
    names = Counter(member.name for member in manifest.members)
    files = Counter(member.file for member in manifest.members)
    rules = [
        (bool(manifest.members), "no members"),
        (max(names.values(), default=1) == 1, f"two members named {names.most_common(1)}"),
        (max(files.values(), default=1) == 1, f"two members share {files.most_common(1)}"),
        (manifest.classes >= 1, f"classes {manifest.classes}, expected 1 or more"),
        (0 < manifest.threshold < 1, f"threshold {manifest.threshold}, expected between 0 and 1"),
        (manifest.min_area >= 0, f"min_area {manifest.min_area}, expected 0 or more"),
        (bool(manifest.flips), "no flips; name at least none"),
        (set(manifest.flips) <= set(FLIPS), f"flips {manifest.flips}, known are {list(FLIPS)}"),
        (len(set(manifest.flips)) == len(manifest.flips), f"flips {manifest.flips} name one twice"),
    ]
    rules += itertools.chain.from_iterable(member_rules(m, manifest) for m in manifest.members)
    return next((fault for holds, fault in rules if not holds), None)


def member_rules(member: MemberSpec, manifest: Manifest) -> list[tuple[bool, str]]:
    """What a member's entry must fulfil, each with what is wrong where it does not."""
    who, model = f"member {member.name}: ", member.model
    channels = model.get("in_channels", 3)
    aux = model.get("aux_params") or {"classes": manifest.classes}
    return [
        (
            Path(member.file).name == member.file not in ("", ".."),
            f"{who}file {member.file!r} is not beside the manifest",
        ),
        ({"arch", "encoder_name"} <= set(model), f"{who}model {model} lacks arch or encoder_name"),
        (
            model.get("classes", 1) == aux.get("classes") == manifest.classes,
            f"{who}its classes differ from the manifest's {manifest.classes}: {model}",
        ),
        (
            len(member.mean) == len(member.std) == channels and channels in (1, 3),
            f"{who}mean {member.mean}, std {member.std} for {channels} channels (1 or 3)",
        ),
        (all(std > 0 for std in member.std), f"{who}std {member.std}, expected above 0"),
        (
            all(map(math.isfinite, [*member.mean, *member.std])),
            f"{who}mean {member.mean}, std {member.std}, expected finite numbers",
        ),
        (
            len(member.flops) == 2 and min(member.flops) > 0,
            f"{who}flops {member.flops}, expected its encoder's and its decoder's",
        ),
    ]


def check_manifest(manifest: Manifest, path: Path) -> None:
    """Raises ValueError for the first rule that a manifest breaks."""
    try:
        fault = first_fault(manifest)
    except (TypeError, AttributeError) as error:  # a value of another type
        raise ValueError(f"{path}: not a manifest: {error!r}") from error
    if fault:
        raise ValueError(f"{path}: {fault}")


def parse_manifest(entries: dict[str, Any], path: Path) -> Manifest:
    """The manifest in the JSON object of the file `path`.

    Raises:
        ValueError: a field is missing or unknown, the format is a later one, or a rule is broken.
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
    check_manifest(manifest, path)
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ValueError where the file is missing or holds none."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # not JSON, not even UTF-8, or nested too deep
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


def fastest(plain: Member, folder: Path, device: torch.device) -> Member:
    """A loaded member of the bundle `folder` on the fastest engine that this machine has for it.

    OpenVINO on the CPU, where it imports and `build_kernel.py --openvino` packed the halves. Else
    PyTorch with batch norm folded; on a GPU in fp16, channels last. `plain` stays as it is.
    """
    halves = [folder / name for name in openvino_files(plain.spec.file)]
    if device.type == "cpu" and halves[0].is_file():
        try:
            encode, decode = map(OpenVino, halves)
            return replace(plain, encode=encode, decode=decode)
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
def check_engine(engine: Member, plain: Member, image: Image, device: torch.device) -> Member:
    """The engine, or plain fp32 PyTorch where the engine fails or gives something else.

    Both see one part of an image (H, W): enough to tell, in a quarter of the time. Gates and masks
    are compared apart: a shut gate would hide wrong masks.
    """
    images, answers = torch.from_numpy(liveliest(image))[None, None].to(device) / 255, []
    images = pad_to_multiple(images, plain.stride)
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


# --- seconds and sums -----------------------------------------------------------------------------


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

    Two things take passes away, and the proof begins anew with the K that is left: `leave_out` of
    a pass that gave NaN, and `cut` where the hour ends before the last pass.
    """

    def __init__(self, passes: int, manifest: Manifest, early_exit: bool) -> None:
        self.passes, self.early_exit = passes, early_exit
        self.threshold, self.min_area = manifest.threshold, max(manifest.min_area, 1)
        self.gates: list[npt.NDArray[np.float64]] = []  # (classes,) of every pass encoded
        self.total: Tensor | None = None  # (classes, H, W), of the passes decoded
        self.decoded = 0
        self.classes = manifest.classes
        self.open = list(range(manifest.classes))  # not proven

    @property
    def needed(self) -> float:
        """What a sum must exceed."""
        return self.passes * self.threshold

    @property
    def margin(self) -> float:
        """Above what rounding can do to a sum."""
        return float((self.passes + 1) ** 2 * 2**-23)

    def encode(self, gates: npt.NDArray[np.float64]) -> None:
        """One more pass is encoded; `gates` (classes,) bound its probabilities."""
        self.gates.append(gates)
        self.close()

    def decode(self, probabilities: Tensor) -> None:
        """The next pass is decoded: probabilities (classes, H, W)."""
        self.total = probabilities.clone() if self.total is None else self.total.add_(probabilities)
        self.decoded += 1
        self.close()

    def leave_out(self, encoded: bool) -> None:
        """The next pass counts no more: the next to be encoded, or to be decoded if `encoded`."""
        if encoded:
            del self.gates[self.decoded]
        self.restart(self.passes - 1)

    def cut(self) -> None:
        """No pass comes any more: the mean is that of the passes decoded."""
        self.restart(self.decoded)

    def restart(self, passes: int) -> None:
        """All classes are open again, for another number of passes."""
        self.passes, self.open = passes, list(range(self.classes))
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
            return np.zeros((self.classes, *size), np.bool_)
        if self.decoded == self.passes:
            masks = self.total / self.passes > self.threshold
        else:
            masks = self.total > self.needed + self.margin
        areas = masks.sum(dim=(-2, -1), keepdim=True)
        return (masks & (areas >= self.min_area)).cpu().numpy()


# --- the hour -------------------------------------------------------------------------------------


class Average:
    """A mean that forgets: of the last 16 or so, and of all as long as there are fewer."""

    def __init__(self) -> None:
        self.sum = self.weight = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        """One more value, or the sum of `weight` of them."""
        self.sum, self.weight = 15 / 16 * self.sum + value, 15 / 16 * self.weight + weight

    @property
    def mean(self) -> float:
        """0 of nothing."""
        return self.sum / self.weight if self.weight else 0.0


class Deadline:
    """Which passes the next strip gets, so that the last strip ends inside the budget.

    Measured are the seconds of each member's encoder and decoder, and how many seconds a strip
    takes from one landing to the next for each second that its planned passes would take whole:
    below 1 by the early exit, above it by all that runs outside the networks. A strip's seconds
    under another plan are that ratio times that plan's. Before each strip takes off, passes are
    dropped from its plan until all that are left would end in time: first flips, the dearest first,
    for a member under another flip adds the least; then members, the dearest first, but for the
    last. Nothing is decided for good: where the machine gets faster, passes come back.

    Where even one pass is too much, strips stay empty from `end` on. A part of the budget is kept
    in reserve for what lies outside: the interpreter's start, the last save, a pass that stalls.
    """

    RESERVE_S, RESERVE = 10.0, 0.05  # of the budget

    def __init__(
        self, budget_s: float, start: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.end = start + (1 - self.RESERVE) * budget_s - self.RESERVE_S
        self.last = start  # time of the last landing
        self.seconds: defaultdict[tuple[str, str], Average] = defaultdict(Average)  # member, half
        self.ratio = Average()
        self.most = 0  # passes that a strip went without so far
        self.left_out: Counter[str] = Counter()  # "member/flip" → strips without it

    @property
    def over(self) -> bool:
        """Whether there is no time left for anything but the end."""
        return self.clock() >= self.end

    def ran(self, member: str, half: str, seconds: float, strips: int) -> None:
        """One half of a member ran for a batch of strips."""
        self.seconds[member, half].add(seconds, strips)

    def whole_s(self, passes: Iterable[tuple[str, str]]) -> float:
        """Seconds of passes (member, flip) if all of both halves ran."""
        halves = itertools.product((member for member, _ in passes), ("encoder", "decoder"))
        return sum(self.seconds[key].mean for key in halves if key in self.seconds)

    def takes_off(self) -> None:
        """The first strip: what came before it is no strip's time."""
        self.last = self.clock()

    def landed(self, passes: Sequence[tuple[str, str]]) -> None:
        """One more strip is done, planned with these passes."""
        now = self.clock()
        self.ratio.add(now - self.last, self.whole_s(passes))
        self.last = now

    def plan(self, passes: Sequence[tuple[str, str]], strips: int) -> list[int]:
        """The passes (member, flip) of the next strip, by number; `strips` are still to land."""
        kept, left_s = list(range(len(passes))), self.end - self.clock()
        ratio = self.ratio.mean if self.ratio.weight else 1.0

        def worth(number: int) -> tuple[bool, float]:
            return passes[number][1] == first_flip, -self.whole_s([passes[number]])

        first_flip = passes[0][1]
        for number in sorted(kept, key=worth)[:-1]:
            if strips * ratio * self.whole_s([passes[n] for n in kept]) <= left_s:
                break
            kept.remove(number)
        self.note([f"{member}/{flip}" for n, (member, flip) in enumerate(passes) if n not in kept])
        return kept

    def note(self, dropped: list[str]) -> None:
        """Counts what a strip goes without; logs where that is more than ever before."""
        self.left_out.update(dropped)
        if len(dropped) > self.most:
            self.most = len(dropped)
            log.warning("to end in time, some strips go without %s", ", ".join(dropped))


# --- the ensemble ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Flight:
    """A strip on its way through the passes."""

    strip: Strip
    images: Tensor  # (1, 1, H, W), padded, on the device
    tally: Tally
    passes: list[int] = field(default_factory=list)  # numbers of those that it is to go through
    size: tuple[int, int] = (0, 0)  # of the strip, without padding
    kept: list[tuple[Tensor, ...]] = field(default_factory=list)  # encoded, not decoded
    step: tuple[str, int] = ("encode", 0)  # the half and the number of the pass that it needs next
    fault: str = ""

    def __post_init__(self) -> None:
        if self.passes:
            self.step = ("encode", self.passes[0])

    @property
    def landed(self) -> bool:
        """Whether its masks are known, or never will be."""
        return bool(self.fault) or not self.tally.open

    def encode(self, encoded: tuple[Tensor, ...], gates: npt.NDArray[np.float64]) -> None:
        """Takes what the next pass's encoder gave, and its gates (classes,) once more."""
        if np.isfinite(gates).all():
            self.kept.append(encoded)
            self.tally.encode(gates)
        else:
            self.leave_out(len(self.tally.gates))
        self.plan()

    def decode(self, probabilities: Tensor) -> None:
        """Takes the probabilities (classes, H, W), padded, of the oldest pass that it keeps."""
        del self.kept[0]
        if probabilities.sum().isfinite():
            self.tally.decode(probabilities[:, : self.size[0], : self.size[1]])
        else:
            self.leave_out(self.tally.decoded)
        self.plan()

    def leave_out(self, index: int) -> None:
        """Goes on without a pass that gave NaN; without any pass there is no answer."""
        number = self.passes.pop(index)
        log.warning("%s: pass %d gives NaN and is left out of its mean", self.strip.name, number)
        self.tally.leave_out(encoded=index < len(self.tally.gates))
        self.fault = "" if self.passes else "every pass gave NaN"

    def cut(self) -> None:
        """Lands with what is decoded, for the hour ends."""
        self.kept.clear()
        if self.tally.decoded:
            self.tally.cut()
        else:
            self.fault = "no time was left for it"

    def plan(self) -> None:
        """Encoders alone while they may prove all; else what is kept is decoded first."""
        tally = self.tally
        if self.landed:
            return
        if self.kept and (len(tally.gates) == tally.passes or not tally.looks_clean):
            self.step = ("decode", self.passes[tally.decoded])
        else:
            self.step = ("encode", self.passes[len(tally.gates)])


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
        deadline: Deadline | None = None,
    ) -> None:
        self.manifest, self.device, self.stages = manifest, device, stages
        self.deadline = deadline or Deadline(math.inf, time.monotonic())
        self.batch_size, self.early_exit = batch_size, early_exit
        self.multiple = math.lcm(*(member.stride for member in members))
        self.members = sorted(members, key=lambda member: sum(member.spec.flops))  # cheapest first

    @property
    def passes(self) -> list[tuple[Member, str]]:
        """Every member under every flip, in the order in which they run."""
        return list(itertools.product(self.members, self.manifest.flips))

    @property
    def names(self) -> list[tuple[str, str]]:
        """The passes as (member, flip)."""
        return [(member.spec.name, flip) for member, flip in self.passes]

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
    def fly(self, strips: Iterable[Strip], count: int = 1) -> Iterator[Flight]:
        """Every strip with its masks proven or its fault told, as they land, not as they came.

        Strips that need the same half of the same pass go through it together. `count` strips are
        expected; the deadline reckons with that.
        """
        coming, flying = iter(strips), list[Flight]()
        self.deadline.takes_off()
        while True:
            most = 1 if self.batch_size == 1 else 4 * self.batch_size  # so that batches stay full
            room = max(most - len(flying), 0)
            flying += [self.take_off(strip, count) for strip in itertools.islice(coming, room)]
            if not flying:
                return
            if self.deadline.over:
                for flight in flying:
                    flight.cut()
            groups = defaultdict(list)
            for flight in flying:
                if not flight.landed:
                    groups[*flight.step, flight.images.shape].append(flight)
            if groups:  # the largest, and of equals the one furthest behind
                size = {step: min(len(group), self.batch_size) for step, group in groups.items()}
                step = max(groups, key=lambda step: (size[step], -step[1]))
                self.advance(step[0], step[1], groups[step][: self.batch_size])
            for flight in (flight for flight in flying if flight.landed):
                count -= 1
                if flight.passes:
                    self.deadline.landed([self.names[number] for number in flight.passes])
                yield flight
            flying = [flight for flight in flying if not flight.landed]

    def take_off(self, strip: Strip, count: int) -> Flight:
        """A strip before its first pass; one that could not be read has landed already."""
        if strip.image is None:
            tally = Tally(len(self.passes), self.manifest, self.early_exit)
            return Flight(strip, torch.empty(0), tally, fault=strip.fault)
        passes = self.deadline.plan(self.names, count)
        tally = Tally(len(passes), self.manifest, self.early_exit)
        size = (strip.image.shape[0], strip.image.shape[1])
        with self.stages("prepare"):
            return Flight(strip, self.prepare(strip.image), tally, passes, size)

    def advance(self, half: str, number: int, flights: list[Flight]) -> None:
        """One half of a pass for strips of one size; where it fails, in smaller batches.

        Raises:
            DeviceLost: the GPU runs nothing any more.
        """
        try:
            start = time.monotonic()
            (self.encode_flights if half == "encode" else self.decode_flights)(number, flights)
            member, _ = self.names[number]
            self.deadline.ran(member, f"{half}r", time.monotonic() - start, len(flights))
        except Exception as error:  # out of memory, or one strip that a network cannot take
            if isinstance(error, torch.cuda.OutOfMemoryError) and self.batch_size > 1:
                self.batch_size //= 2  # these flights are where they were, and come again
                log.warning("out of memory: %d strips at a time from here on", self.batch_size)
            elif not works(self.device):
                raise DeviceLost(f"{self.device} fails: {error!r}") from error
            elif len(flights) == 1:
                flights[0].fault = f"the networks failed: {error!r}"
            else:
                middle = len(flights) // 2
                self.advance(half, number, flights[:middle])
                self.advance(half, number, flights[middle:])

    def encode_flights(self, number: int, flights: list[Flight]) -> None:
        """This pass of these strips as far as their gates."""
        images = joined([flight.images for flight in flights], self.batch_size)
        encoded = self.encode(number, images)
        gates = encoded[0].cpu().double().numpy()  # (B, classes)
        for row, flight in enumerate(flights):
            with self.stages("tally"):
                flight.encode(tuple(tensor[row : row + 1] for tensor in encoded), gates[row])

    def decode_flights(self, number: int, flights: list[Flight]) -> None:
        """The rest of this pass of these strips, which is the oldest they keep."""
        oldest = zip(*(flight.kept[0] for flight in flights), strict=True)
        encoded = [joined(tensors, self.batch_size) for tensors in oldest]
        probabilities = self.decode(number, encoded)
        for row, flight in enumerate(flights):
            with self.stages("tally"):
                flight.decode(probabilities[row])

    def work(self, flight: Flight) -> dict[str, float]:
        """What was run for a strip, and its share of the flops of all passes."""
        flops = np.array([member.spec.flops for member, _ in self.passes])  # (passes, halves)
        encoders, decoders = len(flight.tally.gates), flight.tally.decoded
        run = flops[flight.passes[:encoders], 0].sum() + flops[flight.passes[:decoders], 1].sum()
        return {
            "passes": len(flight.passes),
            "encoders": encoders,
            "decoders": decoders,
            "share": float(run / flops.sum()),
        }

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
    budget_s: float = 3600.0  # of Kaggle's hour, from the start of `run`
    strict: bool = False  # a strip that failed is an error
    allow_missing_members: bool = False
    report: Path | None = None  # None is run.json beside the output


def find_one(root: Path, name: str, what: str, option: str) -> Path:
    """The folder under `root`, at any depth, that holds the file `name`; copies of it are one.

    Raises:
        ValueError: there is none, or two differ; the message says what to add or to name.
    """
    found = {path.read_bytes(): path.parent for path in sorted(root.rglob(name), reverse=True)}
    folders = sorted(found.values())
    if not folders:
        there = ", ".join(sorted(path.name for path in root.glob("*"))) or "nothing"
        raise ValueError(
            f"no {name} under {root}, where there is {there}: add {what} to the kernel's sources, "
            f"or give {option}"
        )
    if len(folders) > 1:
        listed = ", ".join(map(str, folders))
        raise ValueError(
            f"more than one {name}: {listed}; remove one from the kernel's sources, "
            f"or choose with {option}"
        )
    return folders[0]


def find_images(sample: Path, names: set[str], root: Path) -> Path:
    """The folder that holds most of a sample's images: below the sample's own, else below `root`.

    Raises:
        ValueError: no folder holds any.
    """
    for top in (sample.parent, root):
        shares = {Path(folder): len(names.intersection(f)) for folder, _, f in os.walk(top)}
        best = max(sorted(shares), key=lambda folder: shares[folder], default=top)
        if shares.get(best):
            return best
    raise ValueError(
        f"no folder below {sample.parent} or {root} holds the images of {sample.name}; "
        "name theirs with --images"
    )


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

    def without(self, names: Set[str]) -> "Task":
        """The rows of all other images."""
        return replace(self, pairs=[pair for pair in self.pairs if pair[0] not in names])


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
    twice = len(pairs) - len(set(pairs))
    if twice:
        log.warning("%s names %d rows twice: each is written once", sample, twice)
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
        what = f"the competition {COMPETITION}"
        sample = sample or find_one(options.input, SAMPLE, what, "--sample") / SAMPLE
        layout, pairs = read_sample(sample, options.layout, classes)
        names = {name for name, _ in pairs}
        task = Task(images or find_images(sample, names, options.input), layout, pairs)
    if not task.pairs:
        raise ValueError(f"{sample or images}: names no image")
    others = {path.name for path in task.images.iterdir()} - set(task.names)
    if others:
        log.info("%s: %d files are in no row, %s…", task.images, len(others), min(others))
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


def first_image(task: Task) -> Image | None:
    """The first strip that can be read."""
    strips = (decode_strip(task.images, name) for name in task.names)
    return next((strip.image for strip in strips if strip.image is not None), None)


def load_members(
    bundle: Path,
    specs: Sequence[MemberSpec],
    device: torch.device,
    stages: Stages,
    allow_missing: bool,
    image: Image | None,
) -> list[Member]:
    """Every member of a bundle on its engine, which is checked on `image`, if there is one.

    Raises:
        ValueError: as `load_member`, unless `allow_missing`; or no member is left.
    """
    members = []
    for spec in progress(specs, "members", "member"):
        try:
            with stages("load"):
                plain = load_member(bundle, spec, device)
                engine = fastest(plain, bundle, device)
        except ValueError as error:
            if not allow_missing:
                raise
            log.warning("going on without member %s: %s", spec.name, error)
            continue
        with stages("check"):
            checked = engine if image is None else check_engine(engine, plain, image, device)
        members.append(checked)
    if not members:
        raise ValueError(f"{bundle}: not one member is usable")
    return members


def load_ensemble(
    bundle: Path,
    manifest: Manifest,
    device: torch.device,
    stages: Stages,
    batch_size: int = 1,
    early_exit: bool = True,
    allow_missing: bool = False,
    image: Image | None = None,
    deadline: Deadline | None = None,
) -> Ensemble:
    """The members of a bundle, ready to run; raises ValueError as `load_members` does."""
    with stages("import"):
        use_wheels(bundle)
        import segmentation_models_pytorch  # noqa: F401 - timed apart from the members
    members = load_members(bundle, manifest.members, device, stages, allow_missing, image)
    return Ensemble(manifest, members, device, stages, batch_size, early_exit, deadline)


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
    """What became of every image; its masks are in the submission."""

    faults: dict[str, str] = field(default_factory=dict)  # image → why its rows stay empty
    work: dict[str, dict[str, float]] = field(default_factory=dict)  # image → what was run for it
    left_out: Counter[str] = field(default_factory=Counter)  # "member/flip" → strips without it
    strip_s: dict[str, float] = field(default_factory=dict)  # image → seconds since the one before
    device: str = ""
    gpu_bytes: int = 0  # the most that PyTorch held on one GPU

    def add(self, other: "Outcome") -> None:
        """Takes in what became of other images."""
        self.faults |= other.faults
        self.work |= other.work
        self.left_out += other.left_out
        self.strip_s |= other.strip_s
        self.device = other.device
        self.gpu_bytes = max(self.gpu_bytes, other.gpu_bytes)


@dataclass(frozen=True)
class Run:
    """What every step of a run needs."""

    options: Options
    bundle: Path
    manifest: Manifest
    submission: Submission
    stages: Stages
    end: float  # time.monotonic() at which the budget is spent

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.end - time.monotonic()

    def workers(self, task: Task) -> int:
        """Processes that a task is dealt out to: one a GPU, or as many as were asked for."""
        asked = self.options.workers or max(torch.cuda.device_count(), 1)
        return 1 if self.options.shard else min(asked, len(task.names))


def predict_task(ensemble: Ensemble, task: Task, submission: Submission, outcome: Outcome) -> None:
    """Every image of a task through the ensemble and into the submission."""
    strips = decode_ahead(task.images, task.names, ahead=4 * ensemble.batch_size)
    strips = timed(strips, ensemble.stages, "decode")
    before = time.monotonic()
    with progress(task.names, "strips", "strip") as bar:
        for flight in ensemble.fly(strips, len(task.names)):
            name = flight.strip.name
            if flight.fault:
                outcome.faults[name] = flight.fault
                log.warning("%s stays empty: %s", name, flight.fault)
            else:
                outcome.work[name] = ensemble.work(flight)
                with ensemble.stages("rle"):
                    masks = enumerate(flight.tally.masks(flight.size), 1)
                    submission.put(name, {label: encode_rle(mask) for label, mask in masks})
            with ensemble.stages("write"):
                submission.save_soon()
            before, since = time.monotonic(), before
            outcome.strip_s[name] = before - since
            bar.update()
    if ensemble.device.type == "cuda":
        outcome.gpu_bytes = torch.cuda.max_memory_allocated()


def predict_on(device: torch.device, run: Run, task: Task, outcome: Outcome) -> None:
    """A task in this process, on this device.

    Raises:
        DeviceLost: the device broke down; `outcome` tells which images are done.
    """
    options, stages = run.options, run.stages
    outcome.device = str(device)
    deadline = Deadline(run.left_s(), time.monotonic())
    ensemble = load_ensemble(
        run.bundle,
        run.manifest,
        device,
        stages,
        batch_size=options.batch_size or (8 if device.type == "cuda" else 1),
        early_exit=options.early_exit,
        allow_missing=options.allow_missing_members,
        image=first_image(task),
        deadline=deadline,
    )
    log.info("%d images of %s on %s", len(task.names), task.images, device)
    try:
        predict_task(ensemble, task, run.submission, outcome)
    finally:
        outcome.left_out += deadline.left_out


def predict_here(run: Run, task: Task) -> Outcome:
    """A task in this process; what a GPU that breaks down leaves undone runs on the CPU."""
    outcome = Outcome()
    try:
        predict_on(pick_device(), run, task, outcome)
    except DeviceLost as error:
        rest = task.without(outcome.work.keys() | outcome.faults.keys())
        log.warning("%s; its last %d images run on the CPU", error, len(rest.names))
        predict_on(torch.device("cpu"), run, rest, outcome)
    return outcome


# --- one process a GPU ----------------------------------------------------------------------------

COLLECT_S = 1.0  # seconds between two looks at what the workers have written


def start_worker(
    run: Run, task: Task, folder: Path, shard: tuple[int, int]
) -> subprocess.Popen[bytes]:
    """This script once more, for one shard of the images on one GPU, its results into `folder`."""
    (number, count), options = shard, run.options
    script = run.bundle / "inference.py"  # a notebook has no file of its own
    command = [sys.executable, str(script if script.is_file() else Path(__file__).resolve())]
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


# --- from the first row to the last line ----------------------------------------------------------


def log_findings(bundle: Path, submission: Path, task: Task) -> None:
    """What the bundle's validate.py, where it has one, says of the submission."""
    if not (bundle / "validate.py").is_file():
        return
    sys.modules.setdefault("inference", sys.modules[__name__])  # which it imports: this very code
    sys.path.insert(0, str(bundle))
    sys.dont_write_bytecode = True  # the bundle stays what was packed
    try:
        check = importlib.import_module("validate").check_submission
        for line in check(submission, task.layout.columns, task.pairs, task.images).lines():
            log.info("%s", line)
    except Exception as error:  # a fault of the check must not cost the submission
        log.warning("the submission stands, but was not checked: %r", error)


LAST_S = 3.0  # seconds before the end of the budget at which nothing is waited for any more
LEAST_FREE = 50_000_000  # bytes of disk: a submission takes some, and the copy beside it


@contextmanager
def watchdog(submission: Submission, left_s: float) -> Iterator[None]:
    """Ends the process with what is done where it hangs until the budget is all but spent.

    `Deadline` ends a run in time as long as passes return; this is for one that does not.
    """

    def bite() -> None:
        log.error("the budget is spent: ending with the strips that are done, the others empty")
        submission.save()
        logging.shutdown()
        os._exit(0)  # the submission is whole, and nothing else could end a hanging thread

    timer = threading.Timer(max(left_s - LAST_S, 0.0), bite)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def open_submission(options: Options, task: Task) -> Submission:
    """A whole, empty submission, before anything else is done.

    Raises:
        ValueError: the disk is all but full.
        OSError: the folder is missing or read-only.
    """
    free = shutil.disk_usage(options.output.absolute().parent).free
    if free < LEAST_FREE:
        raise ValueError(
            f"{options.output}: {free / 1e6:.0f} MB free, {LEAST_FREE / 1e6:.0f} wanted"
        )
    submission = Submission(options.output, task.layout, task.pairs)
    submission.save()
    return submission


def predict(run: Run, task: Task) -> Outcome:
    """A task by one process a GPU, or in this one; a whole submission stands in any case."""
    workers = run.workers(task)
    outcome = predict_by_workers(run, task, workers) if workers > 1 else predict_here(run, task)
    if not outcome.work:
        log.error(
            "not one of %d strips could be predicted: the submission is valid, and all empty",
            len(task.names),
        )
    return outcome


def report_on(run: Run, task: Task, outcome: Outcome, rows: int, seconds: float) -> dict[str, Any]:
    """What `--report` writes; its last line is said here."""
    stages = run.stages.seconds
    cheapest_first = sorted(run.manifest.members, key=lambda spec: sum(spec.flops))
    working_s = seconds - sum(stages[stage] for stage in ("import", "load", "check"))
    log.info(
        "%s: %d rows, %d non-empty masks, %d strips failed, %.1f s, %.2f strips/s",
        *(run.options.output, rows, len(run.submission.rles)),
        *(len(outcome.faults), seconds, len(task.names) / working_s),
    )
    return {
        "strips": len(task.names),
        "rows": rows,
        "non_empty": len(run.submission.rles),
        "faults": outcome.faults,
        "work": outcome.work,
        "strip_s": outcome.strip_s,
        "left_out": dict(outcome.left_out),
        "share": sum(work["share"] for work in outcome.work.values()) / max(len(outcome.work), 1),
        "passes": [[m.name, flip, *m.flops] for m in cheapest_first for flip in run.manifest.flips],
        "device": outcome.device,
        "gpu_bytes": outcome.gpu_bytes,
        "workers": run.workers(task),
        "budget_s": run.options.budget_s,
        "seconds": seconds,
        "stages": dict(stages),
    }


def run(options: Options) -> dict[str, Any]:
    """Predicts and writes the submission; returns what `--report` writes.

    Raises:
        ValueError: the bundle, the sample or the images are not usable, or the disk is full.
        KeyboardInterrupt: as it came, when the submission holds what was done.
    """
    start, stages = time.monotonic(), Stages()
    what = "the dataset that `kaggle datasets create` made of the bundle"
    bundle = options.bundle or find_one(options.input, MANIFEST, what, "--bundle")
    manifest = load_manifest(bundle)
    task = find_task(options, manifest.classes)
    if options.shard:
        number, count = map(int, options.shard.split("/"))
        task = task.shard(number - 1, count)
    submission = open_submission(options, task)
    this = Run(options, bundle, manifest, submission, stages, start + options.budget_s)
    with watchdog(submission, this.left_s()):
        try:
            outcome = predict(this, task)
        finally:  # interrupted too: what is done stands
            with stages("write"):
                rows = submission.save(manifest.empty_rows or "ClassId" not in task.layout.columns)
        if not options.shard:
            with stages("validate"):
                log_findings(bundle, options.output, task)
    return report_on(this, task, outcome, rows, time.monotonic() - start)


# --- command line ---------------------------------------------------------------------------------

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
    add(
        "--budget-s",
        type=float,
        default=Options.budget_s,
        help="seconds until everything is written; default 3600, Kaggle's hour",
    )
    add("--strict", action="store_true", help="exit code 1 where a strip failed")
    add("--allow-missing-members", action="store_true", help="go on without a bad member")
    about = "seconds, work per strip and every failed strip (default: run.json beside the output)"
    add("--report", type=Path, help=about)
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; bad input ends it with one clear line and exit code 2."""
    start_log()
    options = parse_options(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C may be ignored in the background
        signal.signal(number, signal.default_int_handler)
    try:
        report = run(options)
    except (ValueError, OSError, RuntimeError) as error:
        log.error("%s", error)
        sys.exit(2)
    except KeyboardInterrupt:
        log.error("interrupted: %s is whole and holds what was done", options.output)
        sys.exit(130)
    text = json.dumps(report, indent=2, sort_keys=True) + "\n"
    path = options.report or options.output.with_name("run.json")
    path.write_text(text, encoding="utf-8")
    if options.strict and report["faults"]:
        log.error("--strict: %d strips failed", len(report["faults"]))
        sys.exit(1)


if __name__ == "__main__":
    main()
