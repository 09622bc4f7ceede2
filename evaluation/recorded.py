"""Recorded passes: what an ensemble gave for one strip, as a source of passes for the scheduler."""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from kernel.ensemble import Ensemble
from kernel.faults import one_line
from kernel.images import Image, Size, Strip, read_image, size_of
from kernel.logs import log, progress
from kernel.manifest import Manifest
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from kernel.strip_state import StripState
from kernel.tta import Half, Pass
from training.metrics import Floats

T = TypeVar("T")


@dataclass
class RecordedPasses:
    """The passes of one strip that ran before; others run on `ensemble` when they are asked for."""

    ensemble: Ensemble
    image: Image
    name: str = ""  # of the strip, for warnings
    encoded: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)  # pass id → gates, …
    probabilities: dict[int, Tensor] = field(default_factory=dict)  # (1, classes, H, W)
    stages: Stages = field(default_factory=Stages, init=False)  # a replay's, not the ensemble's
    is_async: bool = field(default=False, init=False)
    manifest: Manifest = field(init=False)
    passes: list[Pass] = field(init=False)
    device: torch.device = field(init=False)
    images: Tensor = field(init=False)  # the strip as a pass takes it

    def __post_init__(self) -> None:
        self.manifest, self.passes = self.ensemble.manifest, self.ensemble.passes
        self.device, self.images = self.ensemble.device, self.ensemble.prepare(self.image)

    @property
    def size(self) -> Size:
        """(H, W) of the strip."""
        return size_of(self.image)

    @torch.inference_mode()
    def record(self, pass_id: int) -> None:
        """Run both halves of a pass; keep its gates and probabilities, not its features."""
        encoded = self._timed(
            pass_id, Half.ENCODER, lambda: self.ensemble.run_encoder(pass_id, self.images)
        )
        self.probabilities[pass_id] = self._timed(
            pass_id, Half.DECODER, lambda: self.ensemble.run_decoder(pass_id, encoded, self.size)
        )
        self.encoded[pass_id] = encoded[:1]

    def record_all(self) -> None:
        """Record every pass."""
        for pass_id in range(len(self.passes)):
            self.record(pass_id)

    def _timed(self, pass_id: int, half: Half, run: Callable[[], T]) -> T:
        """Run a half; where a device only queues it, wait for it, for its seconds to count."""
        start, found = time.perf_counter(), run()
        if self.ensemble.is_async:
            torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - start
            self.ensemble.stages.add_network(self.passes[pass_id].member, half, seconds)
        return found

    def mean(self, pass_ids: Sequence[int]) -> Tensor:
        """Mean probabilities (classes, H, W) of recorded passes, without those that gave NaN."""
        found = [self.probabilities[pass_id] for pass_id in pass_ids]
        numbers = [each for each in found if each.isfinite().all()] or [torch.zeros_like(found[0])]
        return functools.reduce(torch.add, numbers)[0] / len(numbers)

    def prepare(self, image: Image) -> Tensor:
        """Return the strip as a pass takes it."""
        return self.images

    def run_encoder(self, pass_id: int, images: Tensor) -> tuple[Tensor, ...]:
        """Return what was recorded, else run the encoder."""
        if pass_id in self.encoded:
            return self.encoded[pass_id]
        return self.ensemble.run_encoder(pass_id, images)

    def run_decoder(self, pass_id: int, encoded: Sequence[Tensor], size: Size) -> Tensor:
        """Return what was recorded, else run the decoder."""
        if pass_id in self.probabilities:
            return self.probabilities[pass_id]
        return self.ensemble.run_decoder(pass_id, encoded, size)

    def run_pass(self, pass_id: int, images: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Return what was recorded of both halves, else run them."""
        encoded = self.run_encoder(pass_id, images)
        return encoded[0], self.run_decoder(pass_id, encoded, size)

    def replay(self, pass_ids: Sequence[int]) -> StripState:
        """Return the strip as the kernel leaves it with the passes `pass_ids`, in this order.

        Where each of them gave NaN its masks are empty, as the kernel's rows are.

        Raises:
            RuntimeError: the networks failed.
        """
        (state,) = Scheduler(self, pass_ids=pass_ids).predict_strips([Strip(self.name, self.image)])
        if state.fault and state.pass_ids:
            raise RuntimeError(f"{self.name}: {state.fault}")
        if state.fault:
            log.warning("%s counts as an empty answer: %s", self.name, state.fault)
            size = self.manifest.competition.size_of_mask(self.size)
            state.masks = np.zeros((self.manifest.classes, *size), np.bool_)
        return state


def run_each(
    ensemble: Ensemble, paths: Iterable[Path], desc: str, run: Callable[[RecordedPasses], T]
) -> Iterator[tuple[RecordedPasses, T]]:
    """Yield each strip with what `run`, such as `RecordedPasses.record_all`, returns for it.

    One that cannot be read, or that the networks fail on, is named and left out: the kernel goes
    on with smaller batches or on another device, a measurement does without the strip.
    """
    for path in progress(paths, desc, "strip"):
        try:
            image = read_image(path, ensemble.manifest.competition)
            recorded = RecordedPasses(ensemble, image, path.name)
            found = run(recorded)
        except (ValueError, OSError, RuntimeError) as error:  # of the file, or out of memory
            log.warning("%s is left out: %s", path.name, one_line(error))
            continue
        yield recorded, found


def half_seconds(ensemble: Ensemble, strips: int) -> Floats:
    """Return a strip's seconds in each half of each pass, (passes, 2), of `strips` with all."""
    seconds, runs = ensemble.stages.networks, strips * len(ensemble.manifest.flips)
    return np.array([[seconds[p.member, half] / runs for half in Half] for p in ensemble.passes])
