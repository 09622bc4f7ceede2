"""The oracle of an ensemble's masks: members and flips in a plain double loop.

SMP makes the networks, ttach turns the images, numpy means; nothing here is the kernel's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import segmentation_models_pytorch as smp
import torch
import ttach
from helpers import change_manifest, draw_image, read_manifest
from safetensors.torch import load_file
from torch import nn

Grey = npt.NDArray[np.uint8]  # (H, W)
Probabilities = npt.NDArray[np.float64]  # (classes, H, W)

MARGIN = 1e-6  # of the threshold: where two orders of summing may round apart

TTACH: dict[str, list[Any]] = {
    "none": [],
    "horizontal": [ttach.HorizontalFlip()],
    "vertical": [ttach.VerticalFlip()],
    "both": [ttach.HorizontalFlip(), ttach.VerticalFlip()],
}


def pass_by_hand(
    entry: dict[str, Any], network: nn.Module, grey: npt.NDArray[np.float64], flip: str
) -> Probabilities:
    """One member under one flip of an image (H, W) in [0, 1], ttach doing the turning."""
    channels = [(grey - m) / s for m, s in zip(entry["mean"], entry["std"], strict=True)]
    images = torch.from_numpy(np.stack(channels)[None]).float()
    for transform in TTACH[flip]:
        images = transform.apply_aug_image(images, apply=True)
    with torch.no_grad():
        outputs = network(images)
    if isinstance(outputs, tuple):
        logits, presence = outputs
        gates = [1 / (1 + np.exp(-float(number))) for number in presence[0]]
        probabilities = torch.stack(
            [m.sigmoid() * g for m, g in zip(logits[0], gates, strict=True)]
        )
    else:
        probabilities = outputs[0].sigmoid()
    probabilities = probabilities[None]
    for transform in reversed(TTACH[flip]):
        probabilities = transform.apply_deaug_mask(probabilities, apply=True)
    return np.asarray(probabilities[0].double())


def load_networks(folder: Path) -> list[tuple[dict[str, Any], nn.Module]]:
    """Each member's entry with its network, made and loaded by SMP and torch alone."""
    made = []
    for entry in read_manifest(folder)["members"]:
        network = smp.create_model(encoder_weights=None, **entry["model"])
        network.load_state_dict(load_file(folder / entry["file"]))
        made.append((entry, network.eval()))
    return made


def mean_by_hand(folder: Path, image: Grey, multiple: int = 32) -> Probabilities:
    """Mean probability (classes, H, W) of one image over members × flips, summed in float64."""
    height, width = image.shape
    grey = np.pad(image / 255, ((0, -height % multiple), (0, -width % multiple)), mode="edge")
    flips = read_manifest(folder)["flips"]
    passes = [
        pass_by_hand(entry, network, grey, flip)
        for entry, network in load_networks(folder)
        for flip in flips
    ]
    mean: Probabilities = np.mean(passes, axis=0)[:, :height, :width]
    return mean


def assert_masks(
    found: npt.NDArray[np.bool_], mean: npt.NDArray[np.float64], threshold: float
) -> None:
    """Masks are those of `mean > threshold`, but for where rounding may decide."""
    clear = np.abs(mean - threshold) > MARGIN
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], (mean > threshold)[clear])


def assert_crosses(mean: npt.NDArray[np.float64], threshold: float) -> None:
    """Masks are neither all empty nor all full, or nothing would be tested."""
    assert 0.02 < (mean > threshold).mean() < 0.98


def threshold_of(folder: Path) -> float:
    """The threshold of a folder's manifest."""
    return float(read_manifest(folder)["threshold"])


def halve_masks(folder: Path) -> Path:
    """Put the threshold at the median of what the members give, so that masks are half full."""
    mean = mean_by_hand(folder, draw_image(0))
    change_manifest(folder, threshold=round(float(np.median(mean)), 4))
    return folder
