"""Scheduling: strips through their passes, in batches, until nothing can change their masks."""

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernel.deadline import Deadline
from kernel.early_exit import Tally
from kernel.engines import DeviceLost, device_usable
from kernel.images import Image, Size, Strip, size_of
from kernel.logs import Stages, log
from kernel.manifest import Manifest
from kernel.tta import Half, Pass


class PassSource(Protocol):
    """Where passes come from: an `Ensemble`, or what it gave before."""

    manifest: Manifest
    passes: list[Pass]
    device: torch.device
    stages: Stages

    def prepare(self, image: Image) -> Tensor:
        """Return an image (H, W) as a pass takes it, (1, 1, H, W)."""

    def run_encoder(self, pass_id: int, images: Tensor) -> tuple[Tensor, ...]:
        """Return gates (B, classes), then whatever `run_decoder` needs."""

    def run_decoder(self, pass_id: int, encoded: Sequence[Tensor], size: Size) -> Tensor:
        """Return probabilities (B, classes, H, W) of images of `size`."""


# --- one strip ------------------------------------------------------------------------------------


@dataclass(eq=False)
class StripState:
    """A strip between its first pass and its masks."""

    strip: Strip
    images: Tensor  # (1, 1, H, W), on the device
    tally: Tally
    pass_ids: list[int] = field(default_factory=list)  # of the passes in its mean, in their order
    size: Size = (0, 0)  # of the strip
    encoded: list[tuple[Tensor, ...]] = field(default_factory=list)  # and not decoded yet
    ran: dict[Half, list[int]] = field(default_factory=lambda: {half: [] for half in Half})
    next_step: tuple[Half, int] = (Half.ENCODER, 0)  # which half of which pass
    fault: str = ""

    def __post_init__(self) -> None:
        self.planned = list(self.pass_ids)
        if self.pass_ids:
            self.next_step = (Half.ENCODER, self.pass_ids[0])

    @property
    def done(self) -> bool:
        """Whether its masks are known, or never will be."""
        return bool(self.fault) or not self.tally.open

    @property
    def masks(self) -> npt.NDArray[np.bool_]:
        """Masks (classes, H, W) of a strip that is done and has no fault."""
        return self.tally.masks(self.size)

    def add_encoded(self, encoded: tuple[Tensor, ...], gates: npt.NDArray[np.float64]) -> None:
        """Add what the next pass's encoder gave; `gates` (classes,) are its first tensor."""
        self.ran[Half.ENCODER].append(self.next_step[1])
        if np.isfinite(gates).all():
            self.encoded.append(encoded)
            self.tally.add_gates(gates)
        else:
            self._drop_pass(len(self.tally.gates))
        self._set_next_step()

    def add_probabilities(self, probabilities: Tensor) -> None:
        """Add the probabilities (classes, H, W) of the oldest pass in `encoded`."""
        self.ran[Half.DECODER].append(self.next_step[1])
        del self.encoded[0]
        if probabilities.sum().isfinite():
            self.tally.add_probabilities(probabilities)
        else:
            self._drop_pass(self.tally.decoded)
        self._set_next_step()

    def finalize(self) -> None:
        """End with the passes that are decoded, for the hour ends."""
        self.encoded.clear()
        if self.tally.decoded:
            self.tally.finalize()
        else:
            self.fault = "no time was left for it"

    def _drop_pass(self, index: int) -> None:
        pass_id = self.pass_ids.pop(index)
        log.warning("%s: pass %d gives NaN, dropped from its mean", self.strip.name, pass_id)
        self.tally.drop_pass(encoded=index < len(self.tally.gates))
        self.fault = "" if self.pass_ids else "every pass gave NaN"

    def _set_next_step(self) -> None:
        """Encoders alone while they may prove everything; else what is encoded is decoded first."""
        tally = self.tally
        if self.done:
            return
        if self.encoded and (len(tally.gates) == tally.n_passes or not tally.looks_clean):
            self.next_step = (Half.DECODER, self.pass_ids[tally.decoded])
        else:
            self.next_step = (Half.ENCODER, self.pass_ids[len(tally.gates)])


def pad_batch(tensors: Sequence[Tensor], size: int) -> Tensor:
    """A batch of `size`, filled up with the last tensor; a batch of one is not copied."""
    filled = list(tensors) + [tensors[-1]] * (size - len(tensors))
    return torch.cat(filled) if size > 1 else tensors[0]


# --- many strips ----------------------------------------------------------------------------------


class Scheduler:
    """Runs the passes of strips that come one after another.

    Strips that need the same half of the same pass go through it together. `pass_ids` are the
    source's passes to run, in this order; all of them if it is None.
    """

    def __init__(
        self,
        source: PassSource,
        batch_size: int = 1,
        early_exit: bool = True,
        deadline: Deadline | None = None,
        pass_ids: Sequence[int] | None = None,
    ) -> None:
        self.source, self.batch_size, self.early_exit = source, batch_size, early_exit
        self.deadline = deadline or Deadline(math.inf, time.monotonic())
        self.pass_ids = list(range(len(source.passes)) if pass_ids is None else pass_ids)

    @torch.inference_mode()
    def predict_strips(self, strips: Iterable[Strip], count: int = 1) -> Iterator[StripState]:
        """Yield every strip when it is done, in completion order.

        The deadline expects `count` strips.
        """
        coming, states = iter(strips), list[StripState]()
        self.deadline.start_strips()
        while True:
            most = 1 if self.batch_size == 1 else 4 * self.batch_size  # so that batches stay full
            room = max(most - len(states), 0)
            states += [self._admit(strip, count) for strip in itertools.islice(coming, room)]
            if not states:
                return
            if self.deadline.over:
                for state in states:
                    state.finalize()
            self._run_next_half([state for state in states if not state.done])
            for state in (state for state in states if state.done):
                count -= 1
                if state.pass_ids:
                    self.deadline.strip_done([self.source.passes[i] for i in state.pass_ids])
                yield state
            states = [state for state in states if not state.done]

    def work(self, state: StripState) -> dict[str, Any]:
        """Which passes a strip was planned with, which halves ran, which passes gave NaN.

        `share` is that of all flops.
        """
        flops = np.array([each.flops for each in self.source.passes])  # (passes, halves)
        encoders, decoders = state.ran[Half.ENCODER], state.ran[Half.DECODER]
        share = (flops[encoders, 0].sum() + flops[decoders, 1].sum()) / flops.sum()
        return {
            "passes": state.planned,
            "encoders": encoders,
            "decoders": decoders,
            "nan": [pass_id for pass_id in state.planned if pass_id not in state.pass_ids],
            "share": float(share),
        }

    def _admit(self, strip: Strip, count: int) -> StripState:
        """A strip before its first pass; one that could not be read is done."""
        source = self.source
        if strip.image is None:
            tally = Tally(len(self.pass_ids), source.manifest, self.early_exit)
            return StripState(strip, torch.empty(0), tally, fault=strip.fault)
        selected = self.deadline.select_passes([source.passes[i] for i in self.pass_ids], count)
        pass_ids = [self.pass_ids[index] for index in selected]
        tally = Tally(len(pass_ids), source.manifest, self.early_exit)
        with source.stages("prepare"):
            images = source.prepare(strip.image)
        return StripState(strip, images, tally, pass_ids, size_of(strip.image))

    def _run_next_half(self, states: list[StripState]) -> None:
        """Run the step that most strips need next, and of equals the one furthest behind."""
        groups = defaultdict(list)
        for state in states:
            groups[*state.next_step, state.images.shape].append(state)
        if groups:
            sizes = {key: min(len(group), self.batch_size) for key, group in groups.items()}
            key = max(groups, key=lambda key: (sizes[key], -key[1]))
            self._run_half(key[0], key[1], groups[key][: self.batch_size])

    def _run_half(self, half: Half, pass_id: int, states: list[StripState]) -> None:
        """One half of a pass for strips of one size; where it fails, in smaller batches.

        Raises:
            DeviceLost: the GPU runs nothing any more.
        """
        run, start = self._encode if half is Half.ENCODER else self._decode, time.monotonic()
        try:
            run(pass_id, states)
        except Exception as error:  # out of memory, or one strip that a network cannot take
            if isinstance(error, torch.cuda.OutOfMemoryError) and self.batch_size > 1:
                self.batch_size //= 2  # these states are where they were, and come again
                log.warning("out of memory: %d strips at a time from here on", self.batch_size)
            elif not device_usable(self.source.device):
                raise DeviceLost(f"{self.source.device} fails: {error!r}") from error
            elif len(states) == 1:
                states[0].fault = f"the networks failed: {error!r}"
            else:
                middle = len(states) // 2
                self._run_half(half, pass_id, states[:middle])
                self._run_half(half, pass_id, states[middle:])
        else:
            member, seconds = self.source.passes[pass_id].member, time.monotonic() - start
            self.deadline.half_done(member, half, seconds, len(states))

    def _encode(self, pass_id: int, states: list[StripState]) -> None:
        images = pad_batch([state.images for state in states], self.batch_size)
        encoded = self.source.run_encoder(pass_id, images)
        gates = encoded[0].cpu().double().numpy()  # (B, classes)
        for row, state in enumerate(states):
            with self.source.stages("tally"):
                state.add_encoded(tuple(tensor[row : row + 1] for tensor in encoded), gates[row])

    def _decode(self, pass_id: int, states: list[StripState]) -> None:
        oldest = zip(*(state.encoded[0] for state in states), strict=True)
        encoded = [pad_batch(tensors, self.batch_size) for tensors in oldest]
        probabilities = self.source.run_decoder(pass_id, encoded, states[0].size)
        for row, state in enumerate(states):
            with self.source.stages("tally"):
                state.add_probabilities(probabilities[row])


def predict_masks(scheduler: Scheduler, images: Sequence[Image]) -> npt.NDArray[np.bool_]:
    """Masks (B, classes, H, W) of images (H, W) of one size."""
    strips = [Strip(str(index), image) for index, image in enumerate(images)]
    states = {state.strip.name: state for state in scheduler.predict_strips(strips, len(strips))}
    faults = [state.fault for state in states.values() if state.fault]
    if faults:
        raise RuntimeError(faults[0])
    return np.stack([states[strip.name].masks for strip in strips])
