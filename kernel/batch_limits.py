"""Batch limits: how many strips memory holds, in one batch and under way."""

import itertools
import math
from collections.abc import Iterable

import torch

from kernel.device import free_memory
from kernel.engines import MAX_CACHED_SHAPES
from kernel.strip_state import StripState

KEPT_SHARE = 0.6  # of a GPU's free memory, for what strips keep from one step to the next
GPU_BATCH_SIZE = 4  # strips of 256×1600 px are as many pixels as 33 of ImageNet, which fill a T4
# Batches' worth of strips under way. The early exit sends them different ways: of few, batches are
# partial, and what fills them up is work for nothing.
GPU_UNDER_WAY, CPU_UNDER_WAY = 16, 4  # the host's memory has no bound here


def default_batch_size(device: torch.device) -> int:
    """Strips that go through a pass together where nobody asked for another number."""
    return GPU_BATCH_SIZE if device.type == "cuda" else 1


class BatchLimits:
    """How many strips run at once: as many as asked for, until memory was too small for them."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size, self.on_gpu = batch_size, device.type == "cuda"
        self.smaller = dict[torch.Size, int]()  # batches of images that memory was too small for
        self.shapes = set[torch.Size]()  # of images that a GPU ran
        self.room = KEPT_SHARE * free_memory(device)  # bytes for what strips keep
        self.bytes_a_value = 0.0  # that strips kept for each value of their images, at most so far
        self.kept = 0  # bytes, by all strips that go on

    def batch_size_of(self, shape: torch.Size) -> int:
        """How many images of a shape run at once: no more than of one that is no larger."""
        values = shape.numel()
        known = [n for other, n in self.smaller.items() if other.numel() <= values]
        return min(known, default=self.batch_size)

    def most_under_way(self, size: int) -> int:
        """How many strips are under way at once, at the most, where `size` of them are a batch."""
        batches = GPU_UNDER_WAY if self.on_gpu else CPU_UNDER_WAY
        return 1 if size == 1 else batches * size

    def halve(self, shape: torch.Size) -> None:
        """Halve the batches of a shape, for which memory was too small, and of larger ones."""
        self.smaller[shape] = max(self.batch_size_of(shape) // 2, 1)
        if self.kept > self.room / 4:  # else it is the step's own memory
            self.room /= 2

    def divide(self, states: Iterable[StripState]) -> tuple[list[StripState], list[StripState]]:
        """Return the strips that go on, a batch at the least, and those that wait for room.

        Memory holds what the first keep, by the most that those that went on kept on average so
        far; the features of the others are to be released.
        """
        ordered = sorted(states, key=lambda state: not state.alone)
        alone = bool(ordered) and ordered[0].alone
        count = 1 if alone else self._count_with_room(ordered)
        return ordered[:count], ordered[count:]

    def _count_with_room(self, states: list[StripState]) -> int:
        """How many strips, from the first, go on; what they keep is noted."""
        if self.room == math.inf or not states:
            return len(states)
        values = list(itertools.accumulate(state.images.numel() for state in states))
        kept = list(itertools.accumulate(state.kept_bytes for state in states))
        size = max(self.batch_size_of(state.images.shape) for state in states)
        while True:
            needed = self.bytes_a_value * values[-1]
            share = self.room / needed if needed > self.room else 1
            count = min(max(size, int(len(states) * share)), len(states))
            average = kept[count - 1] / values[count - 1]
            if average <= self.bytes_a_value:
                break
            self.bytes_a_value = average
        self.kept = kept[count - 1]
        return count

    def note_shape(self, shape: torch.Size) -> None:
        """Note what a step runs on: a GPU that runs many shapes tries no algorithms any more.

        cuDNN would try them for each.
        """
        if self.on_gpu:
            self.shapes.add(shape)
        if len(self.shapes) > MAX_CACHED_SHAPES:
            torch.backends.cudnn.benchmark = False

    def padded_size(self, shape: torch.Size, count: int) -> int:
        """What a batch of `count` images is filled up to: where many shapes ran, a power of two."""
        size = self.batch_size_of(shape)
        many = len(self.shapes) > MAX_CACHED_SHAPES
        return min(size, 1 << (count - 1).bit_length()) if many else size
