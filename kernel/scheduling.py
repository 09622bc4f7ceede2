"""Scheduling: strips through their passes, in batches, until nothing can change their masks."""

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kernel.batch_limits import BatchLimits
from kernel.deadline import Deadline
from kernel.device import DeviceLost, device_usable, is_out_of_memory, to_host
from kernel.early_exit import Tally
from kernel.images import Image, Size, Strip, size_of
from kernel.logs import log
from kernel.manifest import Manifest
from kernel.stages import Stages
from kernel.strip_state import DECODE, ENCODE, Step, StripState, StripWork
from kernel.tta import Half, Pass


class PassSource(Protocol):
    """Where passes come from: an `Ensemble`, or what it gave before."""

    manifest: Manifest
    passes: list[Pass]
    device: torch.device
    stages: Stages
    is_async: bool  # calls return before the GPU has finished; who waits for it counts the seconds

    def prepare(self, image: Image) -> Tensor:
        """Return an image, grey or RGB, as a pass takes it, (1, channels, H, W)."""

    def run_encoder(self, pass_id: int, images: Tensor) -> tuple[Tensor, ...]:
        """Return gates (B, classes), then whatever `run_decoder` needs."""

    def run_decoder(self, pass_id: int, encoded: Sequence[Tensor], size: Size) -> Tensor:
        """Return probabilities (B, classes, H, W) of images of `size`."""

    def run_pass(self, pass_id: int, images: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Return gates and probabilities: both halves in one piece, for the same bits."""


LONGEST_WAIT = 4  # times as many strips as are under way may end before one that came earlier


def pad_batch(tensors: Sequence[Tensor], size: int) -> Tensor:
    """A batch of `size`, filled up with the last tensor; a batch of one is not copied."""
    filled = list(tensors) + [tensors[-1]] * (size - len(tensors))
    return torch.cat(filled) if len(filled) > 1 else filled[0]


def one_row(batch: Tensor, row: int) -> Tensor:
    """A row (1, …) of a batch, which does not keep the others' memory."""
    return batch[row : row + 1].clone() if len(batch) > 1 else batch


class Scheduler:
    """Runs the passes of strips that come one after another.

    Strips of one size that need the same half of the same pass go through it together. `pass_ids`
    are the source's passes to run, in this order; all of them if it is None.
    """

    def __init__(
        self,
        source: PassSource,
        batch_size: int = 1,
        early_exit: bool = True,
        deadline: Deadline | None = None,
        pass_ids: Sequence[int] | None = None,
    ) -> None:
        self.source, self.early_exit = source, early_exit
        self.limits = BatchLimits(batch_size, source.device)
        self.deadline = deadline or Deadline(math.inf, time.monotonic())
        self.pass_ids = list(range(len(source.passes)) if pass_ids is None else pass_ids)

    @torch.inference_mode()
    def predict_strips(
        self, strips: Iterable[Strip], count: int = 1
    ) -> Generator[StripState, None, None]:
        """Yield every strip when it is done, in completion order; the deadline expects `count`."""
        self.deadline.start_strips(count)
        coming, states, waiting, n_ended = iter(strips), list[StripState](), list[StripState](), 0
        while True:
            size = min(map(self._batch_size_of, states), default=self.limits.batch_size)
            room = 0 if waiting else max(self.limits.most_under_way(size) - len(states), 0)
            room = min(room, size)  # no more end in a step
            states += [self._admit(strip, n_ended) for strip in itertools.islice(coming, room)]
            if not states:
                return
            if self.deadline.over:
                for state in states:
                    state.finalize()
            going, waiting = self.limits.divide(state for state in states if not state.done)
            for state in waiting:
                state.release_features()
            self._run_next_step(going, n_ended)
            done = [state for state in states if state.done]
            if done:
                self._copy_masks(done)
                plans = [[self.source.passes[i] for i in state.planned] for state in done]
                self.deadline.strips_done(plans)
            n_ended += len(done)
            for state in done:
                state.encoded.clear()  # hundreds of MB, and whoever gets it may keep it
                yield state
            states = [state for state in states if not state.done]

    def work(self, state: StripState) -> StripWork:
        """Return what ran for a strip that is done."""
        flops = np.array([each.flops for each in self.source.passes])  # (passes, halves)
        encoders, decoders = state.ran[Half.ENCODER], state.ran[Half.DECODER]
        share = (flops[encoders, 0].sum() + flops[decoders, 1].sum()) / flops.sum()
        nan = (pass_id for pass_id in state.planned if pass_id not in state.pass_ids)
        return StripWork(
            tuple(state.planned), tuple(encoders), tuple(decoders), tuple(nan), float(share)
        )

    def _admit(self, strip: Strip, n_ended: int) -> StripState:
        """A strip before its first pass; one that could not be read is done."""
        source, pass_ids, images, size = self.source, list[int](), torch.empty(0), (0, 0)
        fault = strip.fault
        if strip.image is not None:
            passes = [source.passes[i] for i in self.pass_ids]
            selected = self.deadline.select_passes(passes)
            pass_ids, size = [self.pass_ids[index] for index in selected], size_of(strip.image)
            try:
                with source.stages("prepare"):
                    images = source.prepare(strip.image)
            except RuntimeError as error:  # out of memory
                fault = self._fault_of(error)
        tally = Tally(len(pass_ids), source.manifest, self.early_exit)
        return StripState(
            strip, images, tally, pass_ids, size, ended_at_admission=n_ended, fault=fault
        )

    def _batch_size_of(self, state: StripState) -> int:
        return self.limits.batch_size_of(state.images.shape)

    def _run_next_step(self, states: list[StripState], n_ended: int) -> None:
        """Run the step whose batch is fullest, and of equals the one furthest behind.

        Before those comes what has waited too long: of a rare size a batch may never fill.
        """
        groups = defaultdict[tuple[Step, int, torch.Size], list[StripState]](list)
        for state in states:
            groups[*state.next_step, state.images.shape].append(state)

        def priority(group: list[StripState]) -> tuple[bool, float, int]:
            size, (_, pass_id) = self._batch_size_of(group[0]), group[0].next_step
            waited = n_ended - min(state.ended_at_admission for state in group)
            longest = LONGEST_WAIT * self.limits.most_under_way(size)
            return waited > longest, min(len(group) / size, 1), -pass_id

        if groups:
            group = max(groups.values(), key=priority)
            self.limits.note_shape(group[0].images.shape)
            self._run_step(*group[0].next_step, group[: self._batch_size_of(group[0])])

    def _run_step(self, step: Step, pass_id: int, states: list[StripState]) -> None:
        """One step of a pass for strips of one size; where it fails, in smaller batches.

        Raises:
            DeviceLost: the GPU runs nothing any more.
        """
        start = time.monotonic()
        try:
            found = to_host(self._launch(step, pass_id, states))  # (B, 4, classes)
        except Exception as error:  # out of memory, or one strip that a network cannot take
            for state in states:
                state.cancel()
            shape = states[0].images.shape
            if is_out_of_memory(error) and self.limits.batch_size_of(shape) > 1:
                self.limits.halve(shape)  # these states are where they were, and come again
                what = "out of memory: %d strips of %d×%d at a time from here on"
                log.warning(what, self.limits.batch_size_of(shape), shape[-1], shape[-2])
            elif is_out_of_memory(error) and not states[0].alone:
                states[0].alone = True  # it comes again when the others have made room
            else:
                self._run_in_two(step, pass_id, states, self._fault_of(error))
        else:
            self._count_seconds(step, pass_id, time.monotonic() - start, len(states))
            with self.source.stages("tally"):
                for state, row in zip(states, found, strict=True):
                    state.settle(row)

    def _run_in_two(self, step: Step, pass_id: int, states: list[StripState], fault: str) -> None:
        """Run the step of a batch that failed in two; one strip alone has the fault."""
        if len(states) == 1:
            states[0].fault = fault
            return
        middle = len(states) // 2
        self._run_step(step, pass_id, states[:middle])
        self._run_step(step, pass_id, states[middle:])

    def _fault_of(self, error: Exception) -> str:
        """What became of a strip that raised an error; DeviceLost if the device is to blame."""
        if not device_usable(self.source.device):
            raise DeviceLost(f"{self.source.device} fails: {error!r}") from error
        return f"the networks failed: {error!r}"

    def _count_seconds(self, step: Step, pass_id: int, seconds: float, strips: int) -> None:
        """Count what each half took; of a whole pass, by its share of the flops."""
        ran = self.source.passes[pass_id]
        flops = dict(zip(Half, ran.flops, strict=True))
        for half in step:
            half_s = seconds * flops[half] / sum(flops[each] for each in step)
            self.deadline.half_done(ran.member, half, half_s, strips)
            if self.source.is_async:
                self.source.stages.add_network(ran.member, half, half_s)

    def _launch(self, step: Step, pass_id: int, states: list[StripState]) -> Tensor:
        """Queue a step; return what its strips' `settle` takes, (B, 4, classes)."""
        encoded, probabilities = self._run_networks(step, pass_id, states)
        source = self.source  # asynchronous networks are waited for, and counted, with these sums
        with nullcontext() if source.is_async else source.stages("tally"):
            launched = [
                state.launch(
                    tuple(one_row(tensor, row) for tensor in encoded),
                    None if probabilities is None else probabilities[row],
                )
                for row, state in enumerate(states)
            ]
            return torch.stack(launched)

    def _run_networks(
        self, step: Step, pass_id: int, states: list[StripState]
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What a step's networks give: gates with features, and probabilities."""
        source, size, shape = self.source, states[0].size, states[0].images.shape
        batch_size = self.limits.padded_size(shape, len(states))
        if step == DECODE:
            oldest = zip(*(state.encoded[0] for state in states), strict=True)
            encoded = [pad_batch(tensors, batch_size) for tensors in oldest]
            return (), source.run_decoder(pass_id, encoded, size)
        images = pad_batch([state.images for state in states], batch_size)
        if step == ENCODE:
            return source.run_encoder(pass_id, images), None
        gates, probabilities = source.run_pass(pass_id, images, size)
        return (gates,), probabilities

    def _copy_masks(self, states: list[StripState]) -> None:
        """Copy the masks of strips that are done to the host; one that fails has a fault."""
        with self.source.stages("tally"):
            for state in states:
                try:
                    if not state.fault:
                        state.masks = to_host(state.tally.masks(state.size))
                except Exception as error:  # out of memory
                    state.fault = self._fault_of(error)
