"""The ensemble: members × flips → mean of probabilities → masks."""

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernel.deadline import Deadline
from kernel.early_exit import Tally
from kernel.engines import DeviceLost, check_engine, fastest, pad_to_multiple, works
from kernel.images import Image, Strip
from kernel.logs import Stages, log, progress
from kernel.manifest import FLIPS, Manifest, MemberSpec
from kernel.members import Member, load_member, use_wheels


@dataclass(eq=False)
class Flight:
    """A strip on its way through the passes."""

    strip: Strip
    images: Tensor  # (1, 1, H, W), padded, on the device
    tally: Tally
    passes: list[int] = field(default_factory=list)  # numbers of those that it is to go through
    size: tuple[int, int] = (0, 0)  # of the strip, without padding
    kept: list[tuple[Tensor, ...]] = field(default_factory=list)  # encoded, not decoded
    step: tuple[str, int] = ("encode", 0)  # the half and the number of the pass that it needs next
    fault: str = ""

    def __post_init__(self) -> None:
        if self.passes:
            self.step = ("encode", self.passes[0])

    @property
    def landed(self) -> bool:
        """Whether its masks are known, or never will be."""
        return bool(self.fault) or not self.tally.open

    def encode(self, encoded: tuple[Tensor, ...], gates: npt.NDArray[np.float64]) -> None:
        """Takes what the next pass's encoder gave, and its gates (classes,) once more."""
        if np.isfinite(gates).all():
            self.kept.append(encoded)
            self.tally.encode(gates)
        else:
            self.leave_out(len(self.tally.gates))
        self.plan()

    def decode(self, probabilities: Tensor) -> None:
        """Takes the probabilities (classes, H, W), padded, of the oldest pass that it keeps."""
        del self.kept[0]
        if probabilities.sum().isfinite():
            self.tally.decode(probabilities[:, : self.size[0], : self.size[1]])
        else:
            self.leave_out(self.tally.decoded)
        self.plan()

    def leave_out(self, index: int) -> None:
        """Goes on without a pass that gave NaN; without any pass there is no answer."""
        number = self.passes.pop(index)
        log.warning("%s: pass %d gives NaN and is left out of its mean", self.strip.name, number)
        self.tally.leave_out(encoded=index < len(self.tally.gates))
        self.fault = "" if self.passes else "every pass gave NaN"

    def cut(self) -> None:
        """Lands with what is decoded, for the hour ends."""
        self.kept.clear()
        if self.tally.decoded:
            self.tally.cut()
        else:
            self.fault = "no time was left for it"

    def plan(self) -> None:
        """Encoders alone while they may prove all; else what is kept is decoded first."""
        tally = self.tally
        if self.landed:
            return
        if self.kept and (len(tally.gates) == tally.passes or not tally.looks_clean):
            self.step = ("decode", self.passes[tally.decoded])
        else:
            self.step = ("encode", self.passes[len(tally.gates)])


def turned(images: Tensor, flip: str) -> Tensor:
    """Images (B, C, H, W) under a flip, which is also its own way back."""
    return images.flip(FLIPS[flip]) if FLIPS[flip] else images


def joined(tensors: Sequence[Tensor], size: int) -> Tensor:
    """A batch of `size`, filled up with the last image; one alone is not copied."""
    filled = list(tensors) + [tensors[-1]] * (size - len(tensors))
    return torch.cat(filled) if size > 1 else tensors[0]


class Ensemble:
    """Members × flips → mean of probabilities → masks, for strips that come one after another."""

    def __init__(
        self,
        manifest: Manifest,
        members: Sequence[Member],
        device: torch.device,
        stages: Stages,
        batch_size: int = 1,
        early_exit: bool = True,
        deadline: Deadline | None = None,
    ) -> None:
        self.manifest, self.device, self.stages = manifest, device, stages
        self.deadline = deadline or Deadline(math.inf, time.monotonic())
        self.batch_size, self.early_exit = batch_size, early_exit
        self.multiple = math.lcm(*(member.stride for member in members))
        self.members = sorted(members, key=lambda member: sum(member.spec.flops))  # cheapest first
        self.at_work = self.members[0]

    @property
    def passes(self) -> list[tuple[Member, str]]:
        """Every member under every flip, in the order in which they run."""
        return list(itertools.product(self.members, self.manifest.flips))

    @property
    def names(self) -> list[tuple[str, str]]:
        """The passes as (member, flip)."""
        return [(member.spec.name, flip) for member, flip in self.passes]

    def prepare(self, image: Image) -> Tensor:
        """An image (H, W) as a pass takes it: (1, 1, H, W) in [0, 1], padded."""
        images = torch.from_numpy(image)[None, None]
        if self.device.type == "cuda":  # from pinned memory the copy runs beside the networks
            images = images.pin_memory().to(self.device, non_blocking=True)
        return pad_to_multiple(images / 255, self.multiple)

    def turn_of(self, index: int) -> tuple[Member, str]:
        """A pass's member and flip; only one member at a time keeps the memory that it works in."""
        member, flip = self.passes[index]
        if member is not self.at_work:
            for rest in self.at_work.rests:
                rest()
            self.at_work = member
        return member, flip

    def encode(self, index: int, images: Tensor) -> tuple[Tensor, ...]:
        """Pass `index` as far as its gates: gates (B, classes) and features of images turned."""
        member, flip = self.turn_of(index)
        with self.stages(f"networks/{member.spec.name}/encoder"):
            encoded: tuple[Tensor, ...] = member.encode(turned(images, flip))
        return encoded

    def decode(self, index: int, encoded: Sequence[Tensor]) -> Tensor:
        """The rest of pass `index`, turned back: probabilities (B, classes, H, W), fp32."""
        member, flip = self.turn_of(index)
        with self.stages(f"networks/{member.spec.name}/decoder"):
            probabilities: Tensor = member.decode(*encoded).float()
        return turned(probabilities, flip)

    @torch.inference_mode()
    def fly(self, strips: Iterable[Strip], count: int = 1) -> Iterator[Flight]:
        """Every strip with its masks proven or its fault told, as they land, not as they came.

        Strips that need the same half of the same pass go through it together. `count` strips are
        expected; the deadline reckons with that.
        """
        coming, flying = iter(strips), list[Flight]()
        self.deadline.takes_off()
        while True:
            most = 1 if self.batch_size == 1 else 4 * self.batch_size  # so that batches stay full
            room = max(most - len(flying), 0)
            flying += [self.take_off(strip, count) for strip in itertools.islice(coming, room)]
            if not flying:
                return
            if self.deadline.over:
                for flight in flying:
                    flight.cut()
            groups = defaultdict(list)
            for flight in flying:
                if not flight.landed:
                    groups[*flight.step, flight.images.shape].append(flight)
            if groups:  # the largest, and of equals the one furthest behind
                size = {step: min(len(group), self.batch_size) for step, group in groups.items()}
                step = max(groups, key=lambda step: (size[step], -step[1]))
                self.advance(step[0], step[1], groups[step][: self.batch_size])
            for flight in (flight for flight in flying if flight.landed):
                count -= 1
                if flight.passes:
                    self.deadline.landed([self.names[number] for number in flight.passes])
                yield flight
            flying = [flight for flight in flying if not flight.landed]

    def take_off(self, strip: Strip, count: int) -> Flight:
        """A strip before its first pass; one that could not be read has landed already."""
        if strip.image is None:
            tally = Tally(len(self.passes), self.manifest, self.early_exit)
            return Flight(strip, torch.empty(0), tally, fault=strip.fault)
        passes = self.deadline.plan(self.names, count)
        tally = Tally(len(passes), self.manifest, self.early_exit)
        size = (strip.image.shape[0], strip.image.shape[1])
        with self.stages("prepare"):
            return Flight(strip, self.prepare(strip.image), tally, passes, size)

    def advance(self, half: str, number: int, flights: list[Flight]) -> None:
        """One half of a pass for strips of one size; where it fails, in smaller batches.

        Raises:
            DeviceLost: the GPU runs nothing any more.
        """
        try:
            start = time.monotonic()
            (self.encode_flights if half == "encode" else self.decode_flights)(number, flights)
            member, _ = self.names[number]
            self.deadline.ran(member, f"{half}r", time.monotonic() - start, len(flights))
        except Exception as error:  # out of memory, or one strip that a network cannot take
            if isinstance(error, torch.cuda.OutOfMemoryError) and self.batch_size > 1:
                self.batch_size //= 2  # these flights are where they were, and come again
                log.warning("out of memory: %d strips at a time from here on", self.batch_size)
            elif not works(self.device):
                raise DeviceLost(f"{self.device} fails: {error!r}") from error
            elif len(flights) == 1:
                flights[0].fault = f"the networks failed: {error!r}"
            else:
                middle = len(flights) // 2
                self.advance(half, number, flights[:middle])
                self.advance(half, number, flights[middle:])

    def encode_flights(self, number: int, flights: list[Flight]) -> None:
        """This pass of these strips as far as their gates."""
        images = joined([flight.images for flight in flights], self.batch_size)
        encoded = self.encode(number, images)
        gates = encoded[0].cpu().double().numpy()  # (B, classes)
        for row, flight in enumerate(flights):
            with self.stages("tally"):
                flight.encode(tuple(tensor[row : row + 1] for tensor in encoded), gates[row])

    def decode_flights(self, number: int, flights: list[Flight]) -> None:
        """The rest of this pass of these strips, which is the oldest they keep."""
        oldest = zip(*(flight.kept[0] for flight in flights), strict=True)
        encoded = [joined(tensors, self.batch_size) for tensors in oldest]
        probabilities = self.decode(number, encoded)
        for row, flight in enumerate(flights):
            with self.stages("tally"):
                flight.decode(probabilities[row])

    def work(self, flight: Flight) -> dict[str, float]:
        """What was run for a strip, and its share of the flops of all passes."""
        flops = np.array([member.spec.flops for member, _ in self.passes])  # (passes, halves)
        encoders, decoders = len(flight.tally.gates), flight.tally.decoded
        run = flops[flight.passes[:encoders], 0].sum() + flops[flight.passes[:decoders], 1].sum()
        return {
            "passes": len(flight.passes),
            "encoders": encoders,
            "decoders": decoders,
            "share": float(run / flops.sum()),
        }

    def __call__(self, images: Sequence[Image]) -> npt.NDArray[np.bool_]:
        """Masks (B, classes, H, W) of images (H, W) of one size."""
        flights = list(self.fly(Strip(str(index), image) for index, image in enumerate(images)))
        faults = [flight.fault for flight in flights if flight.fault]
        if faults:
            raise RuntimeError(faults[0])
        flights.sort(key=lambda flight: int(flight.strip.name))
        return np.stack([flight.tally.masks(flight.size) for flight in flights])


def load_members(
    bundle: Path,
    specs: Sequence[MemberSpec],
    device: torch.device,
    stages: Stages,
    allow_missing: bool,
    image: Image | None,
) -> list[Member]:
    """Every member of a bundle on its engine, which is checked on `image`, if there is one.

    Raises:
        ValueError: as `load_member`, unless `allow_missing`; or no member is left.
    """
    checks = list[Future[Member]]()
    with ThreadPoolExecutor(max_workers=2) as pool:  # one is checked while the next is loaded
        for spec in progress(specs, "members", "member"):
            try:
                with stages("load"):
                    plain = load_member(bundle, spec, device)
                    engine = fastest(plain, bundle, device)
            except ValueError as error:
                if not allow_missing:
                    raise
                log.warning("going on without member %s: %s", spec.name, error)
                continue
            checks.append(pool.submit(check_engine, engine, plain, image, device))
        with stages("check"):
            members = [check.result() for check in checks]
    if not members:
        raise ValueError(f"{bundle}: not one member is usable")
    return members


def load_ensemble(
    bundle: Path,
    manifest: Manifest,
    device: torch.device,
    stages: Stages,
    batch_size: int = 1,
    early_exit: bool = True,
    allow_missing: bool = False,
    image: Image | None = None,
    deadline: Deadline | None = None,
) -> Ensemble:
    """The members of a bundle, ready to run; raises ValueError as `load_members` does."""
    with stages("import"):
        use_wheels(bundle)
        import segmentation_models_pytorch  # noqa: F401 - timed apart from the members
    members = load_members(bundle, manifest.members, device, stages, allow_missing, image)
    return Ensemble(manifest, members, device, stages, batch_size, early_exit, deadline)
