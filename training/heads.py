"""The last fit: both heads once more, the network in front of them as it is.

It runs in single precision, as the validation does: one value beyond half precision's range would
leave a head of NaN, after hours of steps.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernel.images import image_to_tensor
from kernel.logs import log, progress
from kernel.manifest import Manifest
from kernel.members import Member
from training.batches import Batches
from training.losses import presence_layer
from training.metrics import dice_of
from training.module import MemberModule
from training.strips import Pair, Strips, load_each, read_each
from training.teacher import presence_probabilities, read_teacher

PRESENT_WEIGHT = 8.0  # of a class that is there: a rare class has its say at last
L2_SP_WEIGHT = 0.01  # keeps the presence head near the trained one: few strips have a rare class
TAUGHT_L2_SP_WEIGHT = 0.1  # where a teacher's gates are learnt: on fewer strips still
# The logit at which the kernel's threshold cuts a mask whose gate is wide open.
MASK_LEVEL = math.log(Manifest.threshold / (1 - Manifest.threshold))
LOGIT_GRID = torch.arange(-8, 8.1, 0.25)  # of mask logits, among which the best cut is looked for
GRID_STRIPS = 60  # of each class, on which it is looked for

# --- strips to fit them on ------------------------------------------------------------------------


class Pairs(Protocol):
    """Strips with their masks, loaded one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...


class StripPairs:
    """The strips of a folder as they are."""

    def __init__(self, strips: Strips) -> None:
        self.strips = strips

    def __len__(self) -> int:
        return len(self.strips.names)

    def __getitem__(self, index: int) -> Pair:
        return self.strips.load(self.strips.names[index])


class SampledPairs:
    """Whole strips drawn as for training, defects moved and flipped, where no others are left."""

    def __init__(self, batches: Batches, count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        rng = np.random.default_rng([self.batches.config.seed, 1, index])  # no step's numbers
        image, masks = self.batches.sample_whole(rng)
        axes = tuple(axis for axis in (1, 0) if rng.random() < 0.5)
        return np.flip(image, axes).copy(), np.flip(masks, tuple(a + 1 for a in axes)).copy()


def load_pairs(pairs: Pairs, what: str) -> Iterator[Pair]:
    """Yield every pair that can be read, as `load_each`, with progress lines."""
    return load_each(progress(range(len(pairs)), what, "strip"), pairs.__getitem__, what)


# --- presence head --------------------------------------------------------------------------------


@torch.inference_mode()
def pool(module: MemberModule, images: Tensor) -> Tensor:
    """Return what the presence head sees (B, channels) of images (B, channels, H, W) in [0, 1]."""
    features: Tensor = module.network.encoder(module.prepare(images))[-1]
    return features.amax(dim=(2, 3))


def pooled_features(module: MemberModule, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return what the presence head sees (N, channels), and what is there (N, classes)."""
    pooled, present = [], []
    for image, masks in load_pairs(pairs, "presence head"):
        pooled.append(pool(module, image_to_tensor(image, module.mean.device)))
        present.append(torch.from_numpy(masks.any(axis=(1, 2))).to(pooled[-1]))
    return torch.cat(pooled), torch.stack(present)


def taught_features(module: MemberModule, teacher: Member, strips: Strips) -> tuple[Tensor, Tensor]:
    """Return what the presence head sees (N, channels), and a teacher's gates (N, classes).

    Raises:
        ValueError: no image can be read; of others it is logged.
    """
    pooled, gates = [], []
    paths = progress([strips.folder / name for name in strips.names], "taught gates", "strip")
    for image in read_each(paths, "taught gates", strips.competition):
        images = image_to_tensor(image, module.mean.device)
        pooled.append(pool(module, images))
        gates.append(presence_probabilities(teacher, images))
    return torch.cat(pooled), torch.cat(gates)


def refit_presence(
    layer: nn.Linear,
    pooled: Tensor,
    present: Tensor,
    present_weight: float = PRESENT_WEIGHT,
    l2_sp_weight: float = L2_SP_WEIGHT,
) -> None:
    """Fit the presence head anew: logistic regression that is pulled to the weights it has (L2-SP).

    `pooled` (N, channels) is what it sees of each strip, `present` (N, classes) what is there: 0, 1
    or a probability. All strips are fitted at once, to the optimum: the steps before take one at a
    time, and leave the gate of a class shut that one strip in sixty has.

    A class that is there weighs `present_weight`: its gate opens where its probability is above
    1 / (1 + present_weight). In the mean over all pairs a mask pays above 1 / (1 + its Dice).
    The gate of a class that all strips have, or none, stays.
    """
    pooled, present = pooled.clone(), present.clone()  # inference tensors have no gradients
    trained, spread = layer.weight.detach().clone(), pooled.std(dim=0, correction=0)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")
    weight = pooled.new_tensor(present_weight)
    varies = present.amin(dim=0) < present.amax(dim=0)  # (classes,)
    if not bool(varies.all()):
        labels = (torch.nonzero(~varies).flatten() + 1).tolist()
        log.warning("gates of class %s stay: the last fit's strips all have it, or none", labels)

    def loss() -> Tensor:
        optimizer.zero_grad()
        asked = F.binary_cross_entropy_with_logits(
            layer(pooled), present, varies.to(pooled), pos_weight=weight
        )
        total = asked + l2_sp_weight * ((layer.weight - trained) * spread).square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]


def refit_taught_gates(module: MemberModule, strips: Strips) -> None:
    """Fit the presence head to the gates of the member's teacher, on strips without truth.

    The labelled strips are known by heart: a teacher that began with better weights tells more of
    what a presence looks like on others than they do. It should not have been fitted on these.
    """
    teacher = read_teacher(Path(module.config.teacher), module.config.classes)
    pooled, gates = taught_features(module, teacher, strips)
    refit_presence(presence_layer(module.network), pooled, gates, 1.0, TAUGHT_L2_SP_WEIGHT)


# --- mask head ------------------------------------------------------------------------------------


def mask_lifts(gates: Tensor) -> Tensor:
    """Return by how much each gate (classes,) lifts the logit at which the kernel cuts a mask.

    It cuts the product: under a gate of 0.8 and a threshold of 0.55 a mask has to pass 0.69. Under
    a gate that is not above the threshold none does: infinity.
    """
    cut = Manifest.threshold / gates
    return torch.logit(cut.clamp(max=1)) - MASK_LEVEL


@torch.inference_mode()
def best_logit_thresholds(module: MemberModule, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return the level (classes,) at which a class's masks score most, and that mean Dice.

    Asked of the strips that have the class and its gate open; each is cut above the level by its
    gate's lift. A class of which there is none, or that no level finds, keeps the level at which it
    is cut as it stands.
    """
    classes, device = module.config.classes, module.mean.device
    grid = LOGIT_GRID.to(device)[:, None, None]
    curves, counts = torch.zeros(classes, len(grid)), torch.zeros(classes)
    for image, masks in load_pairs(pairs, "mask head"):
        labels = [c for c in np.flatnonzero(masks.any(axis=(1, 2))) if counts[c] < GRID_STRIPS]
        if not labels:
            continue
        outputs = module(image_to_tensor(image, device))
        lifts = mask_lifts(outputs.presence[0].sigmoid())
        for label in (c for c in labels if lifts[c].isfinite()):
            truth = torch.from_numpy(masks[label]).to(device)
            found = outputs.masks[0, label] > grid + lifts[label]
            both, sizes = (found & truth).sum(dim=(1, 2)), found.sum(dim=(1, 2)) + truth.sum()
            curves[label] += torch.from_numpy(dice_of(both.cpu().numpy(), sizes.cpu().numpy()))
            counts[label] += 1
    best = curves.argmax(dim=1)
    levels = torch.where(curves.amax(dim=1) > 0, LOGIT_GRID[best], MASK_LEVEL)
    return levels, curves.amax(dim=1) / counts.clamp_min(1)


def calibrate_mask_bias(module: MemberModule, pairs: Pairs) -> None:
    """Move each class's mask logits so that the kernel's threshold cuts them at their best level.

    The gates have to be those that stay: how high a mask must reach depends on them. Averaging
    conservative members loses recall: the mean of five passes the threshold where most of them do.
    """
    levels, dices = best_logit_thresholds(module, pairs)
    shown = [f"{level:.2f} (Dice {dice:.2f})" for level, dice in zip(levels, dices, strict=True)]
    log.info("%s: masks are best cut at logits of %s", module.config.name, ", ".join(shown))
    head = module.network.segmentation_head.modules()
    bias = [m for m in head if isinstance(m, nn.Conv2d)][-1].bias
    assert bias is not None  # SMP's heads have one
    bias.data += (MASK_LEVEL - levels).to(bias)


# --- both heads -----------------------------------------------------------------------------------


def refit_heads(
    module: MemberModule,
    pairs: Pairs,
    present_weight: float = PRESENT_WEIGHT,
    taught_on: Strips | None = None,
) -> None:
    """Fit the presence head once more on all pairs, and set the mask head's biases for its gates.

    Where there are strips without truth to be `taught_on`, the gates are the teacher's in between.
    """
    module.eval()
    if len(pairs):
        pooled, present = pooled_features(module, pairs)
        refit_presence(presence_layer(module.network), pooled, present, present_weight)
    if taught_on:
        refit_taught_gates(module, taught_on)
    if len(pairs):
        calibrate_mask_bias(module, pairs)
