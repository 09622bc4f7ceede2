"""Scheduling: strips through their passes, in batches, until nothing can change their masks."""

import itertools
import math
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernel.deadline import Deadline
from kernel.device import DeviceLost, device_usable, free_memory, is_out_of_memory, to_host
from kernel.early_exit import Tally
from kernel.engines import MAX_CACHED_SHAPES
from kernel.images import Image, Size, Strip, size_of
from kernel.logs import log
from kernel.manifest import Manifest
from kernel.stages import Stages
from kernel.tta import Half, Pass


class PassSource(Protocol):
    """Where passes come from: an `Ensemble`, or what it gave before."""

    manifest: Manifest
    passes: list[Pass]
    device: torch.device
    stages: Stages

    def prepare(self, image: Image) -> Tensor:
        """Return an image, grey or RGB, as a pass takes it, (1, channels, H, W)."""

    def run_encoder(self, pass_id: int, images: Tensor) -> tuple[Tensor, ...]:
        """Return gates (B, classes), then whatever `run_decoder` needs."""

    def run_decoder(self, pass_id: int, encoded: Sequence[Tensor], size: Size) -> Tensor:
        """Return probabilities (B, classes, H, W) of images of `size`."""

    def run_pass(self, pass_id: int, images: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Return gates and probabilities: both halves in one piece, for the same bits."""


Step = tuple[Half, ...]  # the halves of a pass that run at once
TOO_LATE = "no time was left for it"  # the one fault that no other engine could mend
LONGEST_WAIT = 16  # batches' worth of strips that may end before one that came earlier
FEATURES_SHARE = 0.6  # of a GPU's free memory, for what is encoded and not decoded yet
ENCODE, DECODE, WHOLE = (Half.ENCODER,), (Half.DECODER,), (Half.ENCODER, Half.DECODER)


# --- one strip ------------------------------------------------------------------------------------


@dataclass(eq=False)
class StripState:
    """A strip between its first pass and its masks."""

    strip: Strip
    images: Tensor  # (1, channels, H, W), on the device
    tally: Tally
    pass_ids: list[int] = field(default_factory=list)  # of the passes in its mean, in their order
    size: Size = (0, 0)  # of the strip
    ended_at_admission: int = 0  # how many strips had ended when it came
    encoded: list[tuple[Tensor, ...]] = field(default_factory=list)  # and not decoded yet
    ran: dict[Half, list[int]] = field(default_factory=lambda: {half: [] for half in Half})
    next_step: tuple[Step, int] = (ENCODE, 0)  # which halves of which pass
    pending_features: tuple[Tensor, ...] = ()  # what the step under way encoded
    host_masks: npt.NDArray[np.bool_] | None = None  # once it has ended and they were copied
    fault: str = ""
    alone: bool = False  # the others wait for its end: beside them memory was too small for it

    def __post_init__(self) -> None:
        self.planned = list(self.pass_ids)
        if self.pass_ids:
            self._set_next_step()

    @property
    def done(self) -> bool:
        """Whether its masks are known, or never will be."""
        return bool(self.fault) or not self.tally.open

    @property
    def masks(self) -> npt.NDArray[np.bool_]:
        """Masks (classes, H, W) of a strip that is done and has no fault."""
        if self.host_masks is not None:
            return self.host_masks
        return to_host(self.tally.masks(self.size))

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is encoded and not decoded yet."""
        return sum(tensor.nbytes for features in self.encoded for tensor in features)

    def launch(self, encoded: tuple[Tensor, ...], probabilities: Tensor | None) -> Tensor:
        """Queue what its next step gave, gates first; return what `settle` takes."""
        self.pending_features = encoded
        return self.tally.launch(encoded[0][0] if encoded else None, probabilities)

    def settle(self, found: npt.NDArray[np.float64]) -> None:
        """End its next step with what `launch` found; a pass that gave NaN is dropped."""
        step, pass_id = self.next_step
        for half in step:
            self.ran[half].append(pass_id)
        index = len(self.tally.gates) if Half.ENCODER in step else self.tally.decoded
        if step == DECODE:
            del self.encoded[0]
        if not self.tally.settle(found):
            self._drop_pass(index)
        elif step == ENCODE:
            self.encoded.append(self.pending_features)
        self.pending_features = ()
        self._set_next_step()

    def cancel(self) -> None:
        """Give up what its next step launched: it failed, and may come again."""
        self.pending_features, self.tally.launched = (), (None, None)

    def release_features(self) -> None:
        """Give up what is encoded and not decoded yet: those passes are encoded again."""
        kept = self.pass_ids[self.tally.decoded : len(self.tally.gates)]
        self.ran[Half.ENCODER] = [i for i in self.ran[Half.ENCODER] if i not in kept]
        self.encoded.clear()
        self.tally.release_gates()
        self._set_next_step()

    def finalize(self) -> None:
        """End with the passes that are decoded, for the hour ends."""
        if self.tally.decoded:
            self.tally.finalize()
        else:
            self.fault = self.fault or TOO_LATE

    def _drop_pass(self, index: int) -> None:
        pass_id = self.pass_ids.pop(index)
        log.warning("%s: pass %d gives NaN, dropped from its mean", self.strip.name, pass_id)
        self.fault = "" if self.pass_ids else "every pass gave NaN"

    def _set_next_step(self) -> None:
        """Encoders alone while they may prove everything, else whole passes.

        What is encoded is decoded before that.
        """
        tally = self.tally
        if self.done:
            return
        if self.encoded and (len(tally.gates) == tally.n_passes or not tally.may_be_clean):
            self.next_step = (DECODE, self.pass_ids[tally.decoded])
        else:
            step = ENCODE if tally.may_be_clean else WHOLE
            self.next_step = (step, self.pass_ids[len(tally.gates)])


@dataclass(frozen=True)
class StripWork:
    """What ran for a strip that is done, by pass ids."""

    passes: tuple[int, ...]  # that it was planned with
    encoders: tuple[int, ...]  # whose encoder ran, in order
    decoders: tuple[int, ...]
    nan: tuple[int, ...]  # that gave NaN
    share: float  # that its halves have of the flops of all passes

    def renumber(self, ids: Mapping[int, int]) -> "StripWork":
        """Return the same by other ids of the passes, `ids` from old to new."""

        def new(old: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(ids[pass_id] for pass_id in old)

        halves = new(self.encoders), new(self.decoders)
        return StripWork(new(self.passes), *halves, new(self.nan), self.share)


def pad_batch(tensors: Sequence[Tensor], size: int) -> Tensor:
    """A batch of `size`, filled up with the last tensor; a batch of one is not copied."""
    filled = list(tensors) + [tensors[-1]] * (size - len(tensors))
    return torch.cat(filled) if len(filled) > 1 else filled[0]


def one_row(batch: Tensor, row: int) -> Tensor:
    """A row (1, …) of a batch, which does not keep the others' memory."""
    return batch[row : row + 1].clone() if len(batch) > 1 else batch


# --- many strips ----------------------------------------------------------------------------------


class SharedIterator:
    """One iterator for several threads: each item goes to one of them."""

    def __init__(self, items: Iterable[Strip]) -> None:
        self.items, self.lock = iter(items), threading.Lock()

    def __iter__(self) -> "SharedIterator":
        return self

    def __next__(self) -> Strip:
        with self.lock:
            return next(self.items)


class Scheduler:
    """Runs the passes of strips that come one after another.

    Strips of one size that need the same half of the same pass go through it together. `pass_ids`
    are the source's passes to run, in this order; all of them if it is None. With more `threads` as
    many batches are under way at once, each strip in one thread from first to last.
    """

    def __init__(
        self,
        source: PassSource,
        batch_size: int = 1,
        early_exit: bool = True,
        deadline: Deadline | None = None,
        pass_ids: Sequence[int] | None = None,
        threads: int = 1,
    ) -> None:
        self.source, self.batch_size, self.early_exit = source, batch_size, early_exit
        self.smaller = dict[torch.Size, int]()  # batches of images that memory was too small for
        self.shapes = set[torch.Size]()  # of images that a GPU ran
        self.room = FEATURES_SHARE * free_memory(source.device)  # bytes for features that are kept
        self.bytes_a_value = 0.0  # the most that a strip kept for each value of its images
        self.kept = 0  # bytes, by all strips that go on
        self.threads, self.stopped = threads, False
        self.deadline = deadline or Deadline(math.inf, time.monotonic())
        self.pass_ids = list(range(len(source.passes)) if pass_ids is None else pass_ids)

    def predict_strips(
        self, strips: Iterable[Strip], count: int = 1
    ) -> Generator[StripState, None, None]:
        """Yield every strip when it is done, in completion order; the deadline expects `count`."""
        self.deadline.start_strips(count)
        self.stopped = False
        if self.threads == 1:
            yield from self._predict_started(strips)
        else:
            yield from self._predict_in_threads(strips)

    def _predict_in_threads(self, strips: Iterable[Strip]) -> Generator[StripState, None, None]:
        shared, done = SharedIterator(strips), queue.SimpleQueue[StripState | Exception | None]()

        def run() -> None:
            try:
                for state in self._predict_started(shared):
                    done.put(state)
            except Exception as error:  # raised again below
                done.put(error)
            done.put(None)

        with ThreadPoolExecutor(self.threads) as pool:
            running = len([pool.submit(run) for _ in range(self.threads)])
            try:
                while running:
                    given = done.get()
                    if isinstance(given, Exception):
                        raise given
                    if given is None:
                        running -= 1
                    else:
                        yield given
            finally:  # interrupted: each thread ends after the step that it is in
                self.stopped = running > 0

    @torch.inference_mode()
    def _predict_started(self, strips: Iterable[Strip]) -> Iterator[StripState]:
        coming, states, n_ended = iter(strips), list[StripState](), 0
        while not self.stopped:
            size = min(map(self._batch_size_of, states), default=self.batch_size)
            most = 1 if size == 1 else 4 * size  # so that batches stay full
            room = max(most - len(states), 0)
            states += [self._admit(strip, n_ended) for strip in itertools.islice(coming, room)]
            if not states:
                return
            if self.deadline.over:
                for state in states:
                    state.finalize()
            going = [state for state in states if not state.done]
            self._run_next_step(self._with_room(going), n_ended)
            done = [state for state in states if state.done]
            if done:
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
        """How many strips of its size run at once: no more than of one that is no larger."""
        values = state.images.numel()
        known = [n for shape, n in list(self.smaller.items()) if shape.numel() <= values]
        return min(known, default=self.batch_size)

    def _with_room(self, states: list[StripState]) -> list[StripState]:
        """The strips that memory holds the features of, a batch at the least.

        By the most that any strip kept so far. The others wait, without features.
        """
        states = sorted(states, key=lambda state: not state.alone)
        most = len(states)
        if states and states[0].alone:
            most = 1
        elif self.room < math.inf:
            values = [state.images.numel() for state in states]
            kept = [state.kept_bytes for state in states]
            of_each = (n / count for n, count in zip(kept, values, strict=True))
            self.bytes_a_value = max([self.bytes_a_value, *of_each])
            needed = self.bytes_a_value * sum(values)  # by all of them
            if needed > self.room:
                size = max(map(self._batch_size_of, states))
                most = max(size, int(most * self.room / needed))
            self.kept = sum(kept[:most])
        for state in states[most:]:
            state.release_features()
        return states[:most]

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
            return waited > LONGEST_WAIT * size, min(len(group) / size, 1), -pass_id

        if groups:
            group = max(groups.values(), key=priority)
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
            size, shape = self._batch_size_of(states[0]), states[0].images.shape
            if is_out_of_memory(error) and size > 1:
                self.smaller[shape] = size // 2  # these states are where they were, and come again
                if self.kept > self.room / 4:  # else it is the step's own memory
                    self.room /= 2
                what = "out of memory: %d strips of %d×%d at a time from here on"
                log.warning(what, size // 2, shape[-1], shape[-2])
                return
            if is_out_of_memory(error) and not states[0].alone:
                states[0].alone = True  # it comes again when the others have made room
                return
            fault, middle = self._fault_of(error), len(states) // 2
            if middle:
                self._run_step(step, pass_id, states[:middle])
                self._run_step(step, pass_id, states[middle:])
            else:
                states[0].fault = fault
        else:
            self._count_seconds(step, pass_id, time.monotonic() - start, len(states))
            with self.source.stages("tally"):
                self._settle(states, found)

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
            if self.source.stages.queued:
                self.source.stages.networks[ran.member, half] += half_s

    def _launch(self, step: Step, pass_id: int, states: list[StripState]) -> Tensor:
        """Queue a step; return what its strips' `settle` takes, (B, 4, classes)."""
        encoded, probabilities = self._run_networks(step, pass_id, states)
        stages = self.source.stages  # where networks are queued, so are the sums: both are waited
        with nullcontext() if stages.queued else stages("tally"):  # for, and counted, together
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
        source, size, batch_size = self.source, states[0].size, self._padded_size(states)
        if step == DECODE:
            oldest = zip(*(state.encoded[0] for state in states), strict=True)
            encoded = [pad_batch(tensors, batch_size) for tensors in oldest]
            return (), source.run_decoder(pass_id, encoded, size)
        images = pad_batch([state.images for state in states], batch_size)
        if step == ENCODE:
            return source.run_encoder(pass_id, images), None
        gates, probabilities = source.run_pass(pass_id, images, size)
        return (gates,), probabilities

    def _padded_size(self, states: list[StripState]) -> int:
        """What a batch of strips is filled up to: a power of two on a GPU that ran many shapes.

        There cuDNN would try its algorithms for each of them.
        """
        size = self._batch_size_of(states[0])
        if self.source.device.type != "cuda":
            return size
        self.shapes.add(states[0].images.shape)
        if len(self.shapes) <= MAX_CACHED_SHAPES:
            return size
        torch.backends.cudnn.benchmark = False
        return int(min(size, 2 ** math.ceil(math.log2(len(states)))))

    def _settle(self, states: list[StripState], found: npt.NDArray[np.float64]) -> None:
        """End a step; masks of strips that end with it come from the device together."""
        for state, row in zip(states, found, strict=True):
            state.settle(row)
        ended = [
            state for state in states if state.done and not state.fault and state.tally.decoded
        ]
        if ended:
            self._fetch_masks(ended)

    def _fetch_masks(self, states: list[StripState]) -> None:
        """Copy the masks of strips that end; where memory is short, of fewer at a time."""
        try:
            masks = to_host(torch.stack([state.tally.masks(state.size) for state in states]))
        except Exception as error:
            fault, middle = self._fault_of(error), len(states) // 2
            if middle:
                self._fetch_masks(states[:middle])
                self._fetch_masks(states[middle:])
            else:
                states[0].fault = fault
        else:
            for state, mask in zip(states, masks, strict=True):
                state.host_masks = mask
