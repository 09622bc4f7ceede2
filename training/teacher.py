"""A teacher: a fitted member whose masks, or gates, another one learns (distillation)."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from kernel.images import pad_to_multiple
from kernel.manifest import MemberSpec
from kernel.members import Member, load_member, read_entry


@functools.cache
def read_teacher(path: Path, classes: int) -> Member:
    """Load a checkpoint that `train.py` wrote, on the CPU.

    Raises:
        ValueError: it is no such checkpoint, or knows another number of classes.
    """
    try:
        spec = MemberSpec(**read_entry(path) | {"file": path.name})
        member = load_member(path.parent, spec, torch.device("cpu"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--teacher {error}") from error
    if spec.model["classes"] != classes:
        raise ValueError(f"--teacher {path}: {spec.model['classes']} classes, expected {classes}")
    return member


@torch.no_grad()
def mask_probabilities(teacher: Member, images: Tensor) -> Tensor:
    """Return masks (B, classes, H, W) of images (B, channels, H, W) in [0, 1], gates held open."""
    for half in (teacher.encoder, teacher.decoder):
        half.to(images.device)
    height, width = images.shape[-2:]
    gates, *features = teacher.encoder(pad_to_multiple(images, teacher.stride))
    masks: Tensor = teacher.decoder(torch.ones_like(gates), *features)
    return masks[..., :height, :width].float()


@torch.no_grad()
def presence_probabilities(teacher: Member, images: Tensor) -> Tensor:
    """Return the gates (B, classes) of images (B, channels, H, W) in [0, 1]."""
    teacher.encoder.to(images.device)
    gates: Tensor = teacher.encoder(pad_to_multiple(images, teacher.stride))[0]
    return gates.float()
