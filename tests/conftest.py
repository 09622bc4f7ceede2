"""A tiny bundle: three small members in the layout of `weights/`, for every test that needs one."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from build_kernel import CODE, build, join_modules
from kernel.members import build_network

torch.set_num_threads(1)

CLASSES = 4


@pytest.fixture(autouse=True)
def no_process_of_a_mutant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant of `make mutants` lives in this process: a test that starts one tells nothing."""
    if "MUTANT_UNDER_TEST" in os.environ:
        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.skip("another process"))


@functools.cache
def kernel_script() -> Path:
    """The file that Kaggle runs, without a bundle beside it."""
    folder = Path(tempfile.mkdtemp(prefix="kernel-"))
    atexit.register(shutil.rmtree, folder)
    (folder / CODE.name).write_text(join_modules(CODE), encoding="utf-8")
    return folder / CODE.name


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


def write_manifest(folder: Path, members: list[dict[str, Any]], **changes: Any) -> None:
    """A source manifest at 64×96, three flips, threshold 0.55."""
    entries = {
        "format": 1,
        "competition": "severstal-steel-defect-detection",
        "image_size": [64, 96],
        "classes": CLASSES,
        "threshold": 0.55,
        "min_area": 0,
        "flips": ["none", "horizontal", "vertical"],
        "members": members,
    }
    (folder / "ensemble.json").write_text(json.dumps(entries | changes), encoding="utf-8")


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


@pytest.fixture
def tiny_weights(tmp_path: Path) -> Path:
    """A `weights` folder of this test's own."""
    return write_tiny_weights(tmp_path / "weights")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three tiny members, built once by build_kernel.py; copy it before changing it."""
    folder = tmp_path_factory.mktemp("tiny")
    build(write_tiny_weights(folder / "weights"), folder / "dist", owner="somebody")
    return folder / "dist"


def site_without_smp(folder: Path) -> Path:
    """All installed packages but segmentation-models-pytorch and timm, as Kaggle's image has it."""
    site = Path(torch.__file__).parent.parent
    folder.mkdir()
    for entry in site.iterdir():
        if not entry.name.startswith(("segmentation_models_pytorch", "timm", "__editable__")):
            (folder / entry.name).symlink_to(entry)
    return folder
