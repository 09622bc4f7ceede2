"""Flip test-time augmentation: the passes of an ensemble, and how a flip is applied and undone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

FLIPS: dict[str, tuple[int, ...]] = {  # name → axes of (B, C, H, W) that it reverses
    "none": (),
    "horizontal": (-1,),
    "vertical": (-2,),
    "both": (-2, -1),
}


class Half(StrEnum):
    """A pass runs in two halves: the encoder gives gates, the decoder probabilities."""

    ENCODER = "encoder"
    DECODER = "decoder"


@dataclass(frozen=True)
class Pass:
    """One member under one flip."""

    member: str
    flip: str
    flops: tuple[int, int]  # of the encoder and of the decoder, for one image

    def __str__(self) -> str:
        return f"{self.member}/{self.flip}"


def list_passes(members: Iterable[tuple[str, Sequence[int]]], flips: Iterable[str]) -> list[Pass]:
    """Every member (name, flops of both halves) under every flip, member by member."""
    flips = list(flips)
    return [Pass(name, flip, (flops[0], flops[1])) for name, flops in members for flip in flips]


def apply_flip(images: Tensor, flip: str) -> Tensor:
    """Flip images (B, C, H, W); a second time undoes it."""
    return images.flip(FLIPS[flip]) if FLIPS[flip] else images
