"""Augmentation: flips move image and masks together, light and noise change the image alone."""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional


class RandomNoise(v2.Transform):  # type: ignore[misc]  # torchvision ships no types
    """Sensor noise, its standard deviation drawn between 0 and `most`, of values in [0, 1]."""

    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, float]:
        """Draw the noise's standard deviation."""
        return {"sigma": float(torch.rand(())) * self.most}

    def transform(self, inpt: Any, params: dict[str, float]) -> Any:
        """Add the noise to an image; masks stay as they are."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        return functional.gaussian_noise(inpt, sigma=params["sigma"])


RANDOM_FLIPS = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])
LIGHT = v2.ColorJitter(brightness=0.25, contrast=0.25)
NOISE = RandomNoise(6 / 255)
AUGMENTATIONS = v2.Compose([v2.ToDtype(torch.float32, scale=True), RANDOM_FLIPS, LIGHT, NOISE])


def augment(image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Draw an augmentation of an image (channels, H, W) and its masks (classes, H, W), bool.

    The image returned is float in [0, 1].
    """
    changed, moved = AUGMENTATIONS(tv_tensors.Image(image), tv_tensors.Mask(masks))
    return changed.as_subclass(Tensor), moved.as_subclass(Tensor)


def augment_pairs(images: Tensor, masks: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Augment images (B, channels, H, W) with masks (B, classes, H, W), bool, each on its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = [augment(image, each) for image, each in zip(images, masks, strict=True)]
    return torch.stack([image for image, _ in pairs]), torch.stack([each for _, each in pairs])
