"""What several test files need: images, samples, tiny members and bundles, and the kernel's runs.

Fixtures made of them stand in conftest.py, the oracle of an ensemble's masks in oracle.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kernel.competition import SEVERSTAL, Competition
from kernel.images import Image, Mask, Size, Strip
from kernel.inference import run
from kernel.members import build_network
from kernel.options import Options
from kernel.rows import layouts_of
from kernel.scheduling import Scheduler
from packing.joining import join_modules
from packing.paths import SCRIPT

Grey = npt.NDArray[np.uint8]  # (H, W)

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
CLASSES = 4
LABELS = (1, 2, 3, 4)  # a class as it stands in a csv
SMALL = (64, 96)  # (H, W) of the tiny members' strips
UNSHARE = ["unshare", "--map-root-user", "--net"]  # a command in front of another

# --- real strips ----------------------------------------------------------------------------------

STRIPS = Path(os.environ.get("SEVERSTAL_STRIPS", ROOT.parent / "shared" / "strips"))

needs_strips = pytest.mark.skipif(
    not STRIPS.is_dir(), reason=f"no real strips in {STRIPS}: name theirs with SEVERSTAL_STRIPS"
)

# --- images ---------------------------------------------------------------------------------------


def draw_image(seed: int, size: Size = SMALL) -> Grey:
    """Smooth blotches under noise, grey, asserted not constant."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (4, 5)).astype(np.float32)
    noisy = cv2.resize(coarse, size[::-1]) + rng.normal(0, 20, size)
    image: Grey = np.clip(noisy, 0, 255).astype(np.uint8)
    assert image.std() > 20
    return image


def encode_image(suffix: str, image: np.ndarray) -> bytes:
    """A file's bytes, in the format that a suffix such as `.jpg` stands for."""
    return bytes(cv2.imencode(suffix, image)[1])


def save_image(path: Path, image: np.ndarray) -> None:
    """PNG, which keeps every pixel, whatever the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_image(".png", image))


def save_strips(
    folder: Path, names: Iterable[str], sizes: Iterable[Size] | Size = SMALL, first_seed: int = 0
) -> dict[str, Grey]:
    """Draw a strip a name, all of one size or of `sizes` one by one; name → image."""
    names = list(names)
    each = [sizes] * len(names) if isinstance(sizes, tuple) else list(sizes)
    images = {
        name: draw_image(seed, size)
        for seed, (name, size) in enumerate(zip(names, each, strict=True), first_seed)
    }
    for name, image in images.items():
        save_image(folder / name, image)
    return images


# --- samples and submissions ----------------------------------------------------------------------

LAYOUTS = layouts_of(SEVERSTAL)


def sample_text(names: Iterable[str], layout: str = "three-column") -> str:
    """A sample as the competition has it: three columns name an image once, with class 0."""
    if layout == "two-column":
        lines = [f"{name}_{label},1 6144" for name in names for label in LABELS]
        return "\n".join(["ImageId_ClassId,EncodedPixels", *lines, ""])
    return "\n".join(["ImageId,EncodedPixels,ClassId", *(f"{n},1 6144,0" for n in names), ""])


def write_sample(path: Path, names: Iterable[str], layout: str = "three-column") -> Path:
    """A sample of these images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(sample_text(names, layout), encoding="utf-8")
    return path


def read_table(path: Path) -> pd.DataFrame:
    """A csv as text."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def read_submission(path: Path) -> dict[tuple[str, int], str]:
    """(image, class) → RLE of every row in order, read apart from the kernel's reader."""
    table = read_table(path)
    if "ClassId" in table:
        keys = list(zip(table["ImageId"], map(int, table["ClassId"]), strict=True))
    else:
        keys = [(cell[:-2], int(cell[-1])) for cell in table["ImageId_ClassId"]]
    assert len(keys) == len(set(keys))
    return dict(zip(keys, table["EncodedPixels"], strict=True))


def decode_by_hand(rle: str, size: Size) -> Mask:
    """The mask of a run-length code, decoded apart from the kernel: down the columns, from 1."""
    pixels = np.zeros(size[0] * size[1], np.bool_)
    numbers = [int(word) for word in rle.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        pixels[start - 1 : start - 1 + length] = True
    return pixels.reshape(size, order="F")


# --- pages ----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Every tag with its attributes, in order, and the text under each tag's name and class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # a tag that is never closed, or twice

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], " ".join(data.split())))

    def said(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def widths(self, kind: str) -> list[float]:
        """Per cent, of the bars of a class."""
        styles = [a.get("style", "") for tag, a in self.tags if tag == "i" and kind in a.values()]
        return [float(re.search(r"width: ([\d.]+)%", style)[1]) for style in styles]  # type: ignore[index]


# --- tiny members ---------------------------------------------------------------------------------


def tiny_model(arch: str = "Unet", channels: int = 1, presence: bool = True) -> dict[str, Any]:
    """`smp.create_model`'s arguments for a network of about 400,000 parameters."""
    model: dict[str, Any] = {
        "arch": arch,
        "encoder_name": "tu-test_resnet",
        "in_channels": channels,
        "classes": CLASSES,
    }
    if arch == "Unet":
        model["decoder_channels"] = [16, 8, 8, 8, 8]
    if arch == "FPN":
        model |= {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}
    if presence:
        model["aux_params"] = {"classes": CLASSES, "pooling": "max"}
    return model


DPT: dict[str, Any] = {  # which SMP runs in one piece
    "arch": "DPT",
    "encoder_name": "tu-vit_tiny_patch16_224",
    "encoder_depth": 2,
    "encoder_output_indices": [0, 1],
    "decoder_intermediate_channels": [16, 16],
    "decoder_fusion_channels": 16,
    "dynamic_img_size": True,
    "in_channels": 1,
    "classes": CLASSES,
    "aux_params": {"classes": CLASSES, "pooling": "max"},
}


def random_network(model: dict[str, Any], seed: int) -> nn.Module:
    """A seeded network whose masks are neither empty nor full: its heads are drawn wide."""
    torch.manual_seed(seed)
    network = build_network(model)
    for name, weight in network.named_parameters():
        if name.startswith(("segmentation_head", "classification_head")) and weight.ndim > 1:
            nn.init.normal_(weight, std=2 / weight[0].numel() ** 0.5)
        if name.startswith("segmentation_head") and weight.ndim == 1:
            nn.init.constant_(weight, 0.5)
        if name.startswith("classification_head") and weight.ndim == 1:
            nn.init.constant_(weight, 3)  # most gates open: the mean of passes crosses 0.55
    for name, buffer in network.named_buffers():  # batch norm that does something
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return network.eval()


def tiny_entry(name: str, model: dict[str, Any]) -> dict[str, Any]:
    """A member's entry in a source manifest."""
    channels = model["in_channels"]
    mean, std = [0.3 + 0.05 * c for c in range(channels)], [0.2 + 0.05 * c for c in range(channels)]
    return {
        "name": name,
        "file": f"{name}.safetensors",
        "model": model,
        "mean": mean,
        "std": std,
    }


# --- manifests ------------------------------------------------------------------------------------


def write_manifest(folder: Path, members: list[dict[str, Any]], **changes: Any) -> None:
    """A source manifest at 64×96, three flips, threshold 0.55."""
    entries = {
        "format": 1,
        "competition": "severstal-steel-defect-detection",
        "image_size": list(SMALL),
        "classes": CLASSES,
        "threshold": 0.55,
        "min_area": 0,
        "flips": ["none", "horizontal", "vertical"],
        "members": members,
    }
    (folder / "ensemble.json").write_text(json.dumps(entries | changes), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The entries of a folder's ensemble.json, unchecked."""
    entries: dict[str, Any] = json.loads((folder / "ensemble.json").read_text(encoding="utf-8"))
    return entries


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Let `edit` change the entries of a folder's ensemble.json."""
    entries = read_manifest(folder)
    edit(entries)
    (folder / "ensemble.json").write_text(json.dumps(entries), encoding="utf-8")


def change_manifest(folder: Path, **changes: Any) -> None:
    """Replace entries of a folder's ensemble.json."""
    edit_manifest(folder, lambda entries: entries.update(changes))


def change_member(folder: Path, **changes: Any) -> None:
    """Replace entries of the first member of a folder's ensemble.json."""
    edit_manifest(folder, lambda entries: entries["members"][0].update(changes))


# --- bundles --------------------------------------------------------------------------------------


def write_tiny_weights(folder: Path) -> Path:
    """Folder with ensemble.json and three members; the third: three channels, no presence head."""
    folder.mkdir()
    models = {
        "unet-a": tiny_model("Unet"),
        "fpn-b": tiny_model("FPN"),
        "unet-c": tiny_model("Unet", channels=3, presence=False),
    }
    for seed, (name, model) in enumerate(models.items()):
        network = random_network(model, seed)
        save_file(network.state_dict(), folder / f"{name}.safetensors")
    write_manifest(folder, [tiny_entry(name, model) for name, model in models.items()])
    return folder


def write_light_bundle(folder: Path) -> Path:
    """The kernel's script and one member under no flip, fpn.safetensors, whose sha256 is open."""
    folder.mkdir()
    model = tiny_model("FPN", presence=False)
    save_file(random_network(model, 1).state_dict(), folder / "fpn.safetensors")
    write_manifest(folder, [tiny_entry("fpn", model)], flips=["none"], image_size=None)
    (folder / SCRIPT.name).write_text(join_modules(SCRIPT), encoding="utf-8")
    return folder


# --- any competition, by its description ----------------------------------------------------------

TWO_FLIPS = ["none", "vertical"]


def shrunk(competition: Competition) -> Competition:
    """The competition with images and masks of a few pixels."""
    mask_size = competition.mask_size and (SMALL[0] // 4, SMALL[1] // 4)
    return replace(competition, image_size=SMALL, mask_size=mask_size)


def draw_described(folder: Path, competition: Competition) -> dict[str, npt.NDArray[Any]]:
    """Three images as the competition has them; name → (channels, H, W) in [0, 1]."""
    folder.mkdir()
    drawn = {}
    for number in range(3):
        name = f"image_{number}" + (competition.suffix or ".png")
        grey = [draw_image(3 * number + channel) for channel in range(competition.channels)]
        image: npt.NDArray[Any] = np.dstack(grey).squeeze()
        if competition.bits == 16:
            image = image.astype(np.uint16) * 200 + 7
        drawn[name] = np.atleast_3d(image).transpose(2, 0, 1) / np.iinfo(image.dtype).max
        written = image[..., ::-1] if image.ndim == 3 else image  # OpenCV writes BGR
        cv2.imwrite(str(folder / name), written)
    return drawn


def write_described(folder: Path, competition: Competition) -> Path:
    """One member of the images' channels and one of a single channel, both gated."""
    folder.mkdir()
    entries = []
    for seed, channels in enumerate((competition.channels, 1)):
        heads = {"classes": len(competition.classes)}
        model = tiny_model("FPN", channels) | heads
        model["aux_params"] = heads | {"pooling": "max"}
        name = f"fpn-{seed}"
        save_file(random_network(model, seed).state_dict(), folder / f"{name}.safetensors")
        entries.append(tiny_entry(name, model) | {"image_size": [32, 64] if seed else None})
    manifest = {"members": entries, "flips": TWO_FLIPS}
    (folder / "ensemble.json").write_text(json.dumps(manifest))
    return folder


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: its path from there → its content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert files
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- the kernel in this process -------------------------------------------------------------------


def predict(bundle: Path, images: Path | None, output: Path, **options: Any) -> dict[str, Any]:
    """Run the kernel here; the run record, as run.json holds it."""
    record = run(Options(bundle=bundle, images=images, output=output, **options))
    entries: dict[str, Any] = json.loads(json.dumps(vars(record), default=vars))
    return entries


def predict_masks(scheduler: Scheduler, images: Sequence[Image]) -> npt.NDArray[np.bool_]:
    """Masks (B, classes, H, W) of images (H, W) of one size."""
    strips = [Strip(str(index), image) for index, image in enumerate(images)]
    states = {state.strip.name: state for state in scheduler.predict_strips(strips, len(strips))}
    assert not [state.fault for state in states.values() if state.fault]
    return np.stack([states[strip.name].masks for strip in strips])


def exit_code(main: Callable[[list[str]], object], *arguments: object) -> int:
    """The exit code of a command line that runs here."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def error_of(stderr: str) -> str:
    """What bad input leaves on stderr, asserted one line, without its `error: `."""
    [line] = stderr.splitlines()
    assert line.startswith("error: "), line
    return line.removeprefix("error: ")


# --- scripts as processes -------------------------------------------------------------------------


def may_deny_network() -> bool:
    """Whether a process may give up its network here, found out by one that does."""
    command = [*UNSHARE, "true"]
    return bool(shutil.which("unshare")) and not subprocess.run(command, check=False).returncode


def run_script(
    script: Path,
    *arguments: object,
    cwd: Path | None = None,
    timeout_s: float = 300,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script as a process, one thread each; its exit code is for the caller to judge."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@dataclass(frozen=True)
class KernelRun:
    """A run of the kernel as a process, in a folder of its own."""

    folder: Path
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def submission(self) -> bytes:
        """The bytes of submission.csv."""
        return (self.folder / "submission.csv").read_bytes()

    @property
    def record(self) -> dict[str, Any]:
        """What run.json holds; nothing where there is none."""
        path = self.folder / "run.json"
        record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return record


def run_kernel(
    bundle: Path, images: Path, folder: Path, *options: object, **environment: str
) -> KernelRun:
    """Run a bundle's own script as a process; it leaves submission.csv and run.json in `folder`."""
    folder.mkdir(exist_ok=True)
    start = time.monotonic()
    paths = ("--bundle", bundle, "--images", images)
    words = (*paths, *options)
    done = run_script(bundle / SCRIPT.name, *words, cwd=folder, timeout_s=300, **environment)
    seconds = time.monotonic() - start
    return KernelRun(folder, done.returncode, done.stdout, done.stderr, seconds)


def site_without_smp(folder: Path) -> Path:
    """All installed packages but segmentation-models-pytorch and timm, as Kaggle's image has it."""
    site = Path(torch.__file__).parent.parent
    folder.mkdir()
    for entry in site.iterdir():
        if not entry.name.startswith(("segmentation_models_pytorch", "timm", "__editable__")):
            (folder / entry.name).symlink_to(entry)
    return folder


def fail_once(
    monkeypatch: pytest.MonkeyPatch, target: Any, name: str, on: Path, times: int = 1
) -> None:
    """Have a function fail on a path as a network mount does, so many times; nobody waits."""
    left, function = [times], getattr(target, name)

    def fail(path: Any, *given: Any, **named: Any) -> Any:
        if path == on and left[0]:
            left[0] -= 1
            raise OSError(5, "Input/output error", str(path))
        return function(path, *given, **named)

    monkeypatch.setattr(target, name, fail)
    monkeypatch.setattr("kernel.files.AGAIN_S", 0.0)
