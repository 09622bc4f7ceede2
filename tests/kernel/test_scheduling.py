"""Scheduling: batches and regrouping change no mask, and a strip that fails costs only itself."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import (
    CPU,
    SMALL,
    draw_image,
    predict_masks,
    random_network,
    tiny_entry,
    tiny_model,
    write_manifest,
)
from safetensors.torch import save_file
from torch import Tensor

from kernel.batch_limits import GPU_UNDER_WAY, KEPT_SHARE, BatchLimits, default_batch_size
from kernel.deadline import Deadline
from kernel.device import DeviceLost
from kernel.early_exit import Tally
from kernel.ensemble import Ensemble
from kernel.ensemble_loading import load_ensemble
from kernel.images import Image, Size, Strip
from kernel.manifest import Manifest, MemberSpec, load_manifest
from kernel.members import Member
from kernel.scheduling import (
    Scheduler,
    pad_batch,
)
from kernel.stages import Stages
from kernel.strip_state import DECODE, ENCODE, TOO_LATE, Step, StripState, StripWork
from kernel.tta import Half, list_passes

Masks = npt.NDArray[np.bool_]  # (classes, H, W)

# --- a source of drawn passes, without a network --------------------------------------------------

CLASSES, N_PASSES, SIZE = 2, 6, (4, 5)
N_STRIPS = 9


class DrawnPasses:
    """Passes of drawn probabilities; an image's first pixel is its number.

    A number in `refused` makes every batch with it fail; NaN comes where `gates` or
    `probabilities` hold it.
    """

    def __init__(
        self, threshold: float = 0.3, flops: Sequence[tuple[int, int]] = ((3, 2),)
    ) -> None:
        self.manifest = Manifest([], CLASSES, threshold)
        members = [(f"m{i}", flops[i % len(flops)]) for i in range(N_PASSES // 2)]
        self.passes = list_passes(members, ["none", "vertical"])
        self.device, self.stages, self.is_async = CPU, Stages(), False
        rng = np.random.default_rng(4)
        open_gates = rng.random((N_PASSES, N_STRIPS, 1)) < rng.random(N_STRIPS)[:, None]
        gates = np.where(open_gates, 1.0, 0.1 * rng.random((N_PASSES, N_STRIPS, CLASSES)))
        self.gates = torch.from_numpy(gates).float()  # (passes, strips, classes)
        drawn = torch.from_numpy(rng.random((N_PASSES, N_STRIPS, CLASSES, *SIZE))).float()
        self.probabilities = drawn * self.gates[..., None, None]
        self.refused = set[int]()
        self.encoded = list[tuple[int, list[int]]]()  # (pass, numbers) of every batch
        self.decoded = list[tuple[int, list[int]]]()

    def prepare(self, image: Image) -> Tensor:
        return torch.from_numpy(image).float()[None, None]

    def run_encoder(self, pass_id: int, images: Tensor) -> tuple[Tensor, ...]:
        numbers = images[:, 0, 0, 0].long()
        self.encoded.append((pass_id, numbers.tolist()))
        if self.refused.intersection(numbers.tolist()):
            raise RuntimeError("no such strip, said the network")
        return self.gates[pass_id, numbers], numbers[:, None]

    def run_decoder(self, pass_id: int, encoded: Sequence[Tensor], size: Size) -> Tensor:
        assert size[0] == SIZE[0]
        numbers = encoded[1][:, 0]
        self.decoded.append((pass_id, numbers.tolist()))
        return self.probabilities[pass_id, numbers]

    def run_pass(self, pass_id: int, images: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        encoded = self.run_encoder(pass_id, images)
        return encoded[0], self.run_decoder(pass_id, encoded, size)

    def mean(self, number: int, pass_ids: Sequence[int] = range(N_PASSES)) -> Tensor:
        """By hand: over those passes that give numbers."""
        total, count = torch.zeros(CLASSES, *SIZE), 0
        for i in pass_ids:
            if (
                self.gates[i, number].isfinite().all()
                and self.probabilities[i, number].isfinite().all()
            ):
                total, count = total + self.probabilities[i, number], count + 1
        return total / count

    def masks(self, number: int, pass_ids: Sequence[int] = range(N_PASSES)) -> Masks:
        masks: Masks = (self.mean(number, pass_ids) > self.manifest.threshold).numpy()
        return masks


def numbered(count: int = N_STRIPS) -> list[Strip]:
    return [Strip(str(number), np.full(SIZE, number, np.uint8)) for number in range(count)]


def run(scheduler: Scheduler, strips: Sequence[Strip]) -> dict[str, StripState]:
    """Every strip's state when it is done, in completion order."""
    return {state.strip.name: state for state in scheduler.predict_strips(strips, len(strips))}


@pytest.fixture
def source() -> DrawnPasses:
    source = DrawnPasses()
    masks = np.stack([source.masks(number) for number in range(N_STRIPS)])
    assert 0.1 < masks.mean() < 0.9
    assert not masks.any(axis=(1, 2, 3)).all()  # some strips are clean
    return source


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("early_exit", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
def test_masks_are_those_of_every_pass_whatever_the_batch(
    batch_size: int, early_exit: bool, source: DrawnPasses
) -> None:
    scheduler = Scheduler(source, batch_size, early_exit)
    states = run(scheduler, numbered())
    assert len(states) == N_STRIPS and scheduler.deadline.strips_left == 0
    for name, state in states.items():
        assert not state.fault
        np.testing.assert_array_equal(state.masks, source.masks(int(name)))
    sizes = {len(numbers) for _, numbers in source.encoded + source.decoded}
    assert sizes == {batch_size}  # a partial batch is filled up
    runs = sum(len(state.ran[half]) for state in states.values() for half in Half)
    assert (runs == 2 * N_PASSES * N_STRIPS) != early_exit


def test_a_batch_is_filled_up_with_its_last_tensor() -> None:
    tensors = [torch.full((1, 2), float(value)) for value in (3, 4)]
    assert pad_batch(tensors, 4).tolist() == [[3, 3], [4, 4], [4, 4], [4, 4]]
    assert pad_batch(tensors[:1], 1) is tensors[0]


@pytest.mark.parametrize(
    ("device", "shapes", "filled"),
    [("cuda", 5, [1, 2, 4, 4, 8]), ("cuda", 4, [8] * 5), ("cpu", 9, [8] * 5)],
)
def test_a_gpu_that_ran_many_shapes_tries_no_algorithms_and_fills_batches_up_less(
    device: str,
    shapes: int,
    filled: list[int],
    source: DrawnPasses,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr("kernel.batch_limits.free_memory", lambda _: math.inf)
    source.device = torch.device(device)  # its tensors stay on the CPU
    images = [np.full((SIZE[0], 9 + i % shapes), i, np.uint8) for i in range(N_STRIPS)]
    scheduler = Scheduler(source, 8, early_exit=False)
    states = run(scheduler, [Strip(str(index), image) for index, image in enumerate(images)])
    for name, state in states.items():
        np.testing.assert_array_equal(state.masks, source.masks(int(name)))
    shape = torch.Size((1, 1, *images[0].shape))
    assert [scheduler.limits.padded_size(shape, n) for n in (1, 2, 3, 4, 5)] == filled
    sizes = {len(numbers) for _, numbers in source.encoded}
    assert sizes == {8} if filled[0] == 8 else min(sizes) < max(sizes) == 8
    assert torch.backends.cudnn.benchmark == (filled[0] == 8)


def test_strips_are_read_only_as_far_ahead_as_batches_need(source: DrawnPasses) -> None:
    read, done = list[str](), 0

    def reading() -> Iterator[Strip]:
        for strip in numbered():
            read.append(strip.name)
            yield strip

    for batch_size, ahead in ((1, 1), (2, 8)):
        read.clear()
        for done, _ in enumerate(Scheduler(source, batch_size).predict_strips(reading(), N_STRIPS)):
            assert len(read) <= done + ahead
        assert done == N_STRIPS - 1


def test_a_strip_that_is_done_is_yielded_before_those_that_need_more() -> None:
    states = run(Scheduler(DrawnPasses(threshold=0.5), 2), numbered())
    runs = [sum(map(len, state.ran.values())) for state in states.values()]
    assert list(states) != [strip.name for strip in numbered()]
    assert runs[0] < max(runs)


def test_a_strip_that_is_done_keeps_no_features_of_its_passes(source: DrawnPasses) -> None:
    """Proven by gates or failed: its features are as large as all that the next strip needs."""
    source.refused = {2}
    states = run(Scheduler(source, batch_size=1), numbered())
    undecoded = [s for s in states.values() if len(s.ran[Half.ENCODER]) > len(s.ran[Half.DECODER])]
    assert undecoded
    assert all(not state.encoded for state in states.values())


def test_the_first_passes_of_a_strip_are_not_run_twice(source: DrawnPasses) -> None:
    states = run(Scheduler(source, 1, early_exit=False), numbered(3))
    for state in states.values():
        assert state.ran[Half.ENCODER] == state.ran[Half.DECODER] == list(range(N_PASSES))
    assert source.encoded == [(i, [n]) for n in range(3) for i in range(N_PASSES)]


def test_only_the_passes_that_were_asked_for_run_in_their_order(source: DrawnPasses) -> None:
    asked = [4, 0, 3]
    states = run(Scheduler(source, 1, early_exit=False, pass_ids=asked), numbered())
    for name, state in states.items():
        assert state.ran[Half.ENCODER] == asked
        np.testing.assert_array_equal(state.masks, source.masks(int(name), asked))


def test_work_says_which_halves_ran_and_their_share_of_all_flops() -> None:
    source = DrawnPasses(flops=[(1, 10), (2, 20), (4, 40)])
    scheduler = Scheduler(source, pass_ids=[0, 1, 4, 5])
    states = run(scheduler, numbered())
    for number, state in enumerate(states.values()):
        encoders = [i for i, (strip,) in source.encoded if strip == number]
        decoders = [i for i, (strip,) in source.decoded if strip == number]
        work = scheduler.work(state)
        assert (work.passes, work.encoders) == ((0, 1, 4, 5), tuple(encoders))
        assert work.decoders == tuple(decoders)
        flops = sum((1, 1, 2, 2, 4, 4)[i] for i in encoders)
        flops += sum((10, 10, 20, 20, 40, 40)[i] for i in decoders)
        assert work.share == pytest.approx(flops / 154)
    assert len({len(state.ran[Half.DECODER]) for state in states.values()}) > 1


def test_each_image_has_its_own_masks(source: DrawnPasses) -> None:
    images = [np.full(SIZE, number, np.uint8) for number in (5, 0, 7, 2)]
    found = predict_masks(Scheduler(source, 2), images)
    np.testing.assert_array_equal(found, np.stack([source.masks(n) for n in (5, 0, 7, 2)]))


# --- a GPU's batches ------------------------------------------------------------------------------

MEMBERS = [  # GFLOP of the shipped members' encoders and decoders, and MB of features in fp16
    ((5.8, 24.9), 9.7), ((58.5, 38.2), 20.1), ((61.7, 30.6), 38.5), ((65.4, 30.6), 38.5),
    ((68.7, 31.2), 40.9),
]  # fmt: skip
A_MB = 100.0  # values in their stead


class MeteredPasses(DrawnPasses):
    """Passes of the shipped members' sizes, half of the strips clean; `paid` counts the flops.

    Those of what fills batches up, too.
    """

    def __init__(self, count: int) -> None:
        self.manifest = Manifest([], CLASSES, 0.55)
        members = [(f"m{i}", flops) for i, (flops, _) in enumerate(MEMBERS)]
        self.passes = list_passes(members, ["none", "horizontal", "vertical"])  # type: ignore[arg-type]
        self.device, self.stages, self.is_async = torch.device("cuda"), Stages(), True
        rng, n = np.random.default_rng(5), len(self.passes)
        sure = np.where(rng.random(count) < 0.5, 0.05, rng.uniform(0.6, 1, count))[:, None]
        gates = np.clip(rng.normal(sure, 0.1, (n, count, CLASSES)), 0, 1)
        pixels = rng.choice([0.02, 0.5, 0.98], (count, CLASSES, *SIZE), p=[0.45, 0.1, 0.45])
        drawn = np.clip(rng.normal(pixels, 0.1, (n, *pixels.shape)), 0, 1)
        self.gates = torch.from_numpy(gates).float()
        self.probabilities = torch.from_numpy(drawn * gates[..., None, None]).float()
        values = [round(A_MB * mb) for _, mb in MEMBERS for _ in range(3)]
        self.features = [torch.zeros(1, each, dtype=torch.uint8) for each in values]
        self.paid = 0.0

    def run_encoder(self, pass_id: int, images: Tensor) -> tuple[Tensor, ...]:
        self.paid += self.passes[pass_id].flops[0] * len(images)
        numbers = images[:, 0, 0, 0].long()
        features = self.features[pass_id].expand(len(images), -1)
        return self.gates[pass_id, numbers], numbers[:, None], features

    def run_decoder(self, pass_id: int, encoded: Sequence[Tensor], size: Size) -> Tensor:
        self.paid += self.passes[pass_id].flops[1] * len(encoded[0])
        return self.probabilities[pass_id, encoded[1][:, 0]]


@pytest.mark.parametrize(("room_gb", "most"), [(8.6, 1.1), (4.3, 1.4)], ids=["T4", "8 GB"])
def test_of_the_flops_of_a_gpu_few_go_to_what_fills_batches_up(
    room_gb: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = room_gb * 1000 * A_MB / KEPT_SHARE
    monkeypatch.setattr("kernel.batch_limits.free_memory", lambda _: free)
    source = MeteredPasses(count := 250)
    scheduler = Scheduler(source, default_batch_size(source.device))
    strips = [Strip(str(i), np.full(SIZE, i, np.uint8)) for i in range(count)]
    of_all = sum(sum(each.flops) for each in source.passes)
    needed = sum(scheduler.work(s).share * of_all for s in run(scheduler, strips).values())
    assert needed < 0.7 * of_all * count
    assert needed <= source.paid <= most * needed


def test_strips_come_a_batch_at_a_time_and_none_while_others_wait_for_room(
    source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.device, seen = torch.device("cuda"), list[tuple[int, int]]()
    divide = BatchLimits.divide

    def spied(limits: BatchLimits, states: Any) -> Any:
        going, waiting = divide(limits, states)
        seen.append((len(going) + len(waiting), len(waiting)))
        return going, waiting

    monkeypatch.setattr(BatchLimits, "divide", spied)
    for free in (1e9, 500.0):
        monkeypatch.setattr("kernel.batch_limits.free_memory", lambda _, free=free: free)
        seen.clear()
        strips = [Strip(str(i), numbered()[i % N_STRIPS].image) for i in range(60)]
        run(Scheduler(source, 2, early_exit=False), strips)
        for (before, waited), (now, _) in itertools.pairwise(seen):
            assert now <= before + (0 if waited else 2)
        if free == 1e9:
            assert max(seen) == (2 * GPU_UNDER_WAY, 0)
        else:
            assert any(waited for _, waited in seen)


# --- what fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("refused", [{0}, {4}, {8}, {3, 6}])
def test_a_strip_that_the_networks_cannot_take_costs_only_itself(
    refused: set[int], batch_size: int, source: DrawnPasses
) -> None:
    source.refused = refused
    states = run(Scheduler(source, batch_size), numbered())
    for name, state in states.items():
        if int(name) in refused:
            assert state.fault.startswith("the networks failed: RuntimeError('no such strip")
        else:
            assert not state.fault
            np.testing.assert_array_equal(state.masks, source.masks(int(name)))


def test_a_strip_that_there_is_no_memory_for_costs_only_itself(
    source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = source.prepare

    def refuse(image: Image) -> Tensor:
        if image.flat[0] == 1:
            raise RuntimeError("out of memory")
        return prepare(image)

    monkeypatch.setattr(source, "prepare", refuse)
    states = run(Scheduler(source, 4), numbered())
    assert [name for name, state in states.items() if state.fault] == ["1"]
    assert states["1"].fault == "the networks failed: RuntimeError('out of memory')"


def test_a_strip_that_could_not_be_read_is_yielded_with_its_fault(source: DrawnPasses) -> None:
    strips = [*numbered(2), Strip("bad", None, "no image"), Strip("2", np.full(SIZE, 2, np.uint8))]
    states = run(Scheduler(source), strips)
    assert list(states) == ["0", "1", "bad", "2"]
    assert states["bad"].done and states["bad"].fault == "no image"
    assert not any(states["bad"].ran.values())
    assert source.encoded


def test_a_strip_that_could_not_be_read_keeps_its_fault_when_time_is_over(
    source: DrawnPasses,
) -> None:
    over = Deadline(-math.inf, time.monotonic())
    strips = [Strip("bad", None, "no image"), *numbered(1)]
    states = run(Scheduler(source, deadline=over), strips)
    assert {name: each.fault for name, each in states.items()} == {"bad": "no image", "0": TOO_LATE}


def test_a_device_that_is_lost_ends_the_strips_and_names_the_error(
    source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.refused = {1}
    monkeypatch.setattr("kernel.scheduling.device_usable", lambda device: device != CPU)
    done = list[str]()
    with pytest.raises(DeviceLost, match=r"cpu fails: RuntimeError.'no such strip"):
        for state in Scheduler(source).predict_strips(numbered(), N_STRIPS):
            done.append(state.strip.name)
    assert done == ["0"]


def test_a_device_that_is_lost_in_the_words_of_too_little_memory_ends_the_strips(
    source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")

    monkeypatch.setattr(source, "run_encoder", broken)
    monkeypatch.setattr("kernel.scheduling.device_usable", lambda _: False)
    with pytest.raises(DeviceLost, match="CUDNN_STATUS_INTERNAL_ERROR"):
        run(Scheduler(source, 4), numbered())


NO_ROOM = [  # how PyTorch says that a GPU's memory is too small
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate"
        " memory: you tried to allocate 99999999999 bytes. Error code 12"
    ),
]


@pytest.mark.parametrize("error", NO_ROOM, ids=str)
@pytest.mark.parametrize("half", Half)
def test_out_of_memory_halves_the_batch_and_loses_nothing(
    half: Half,
    error: Exception,
    source: DrawnPasses,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name, sizes = f"run_{half}", list[int]()
    run_half = getattr(source, name)

    def hungry(pass_id: int, tensors: Any, *size: Size) -> Any:
        sizes.append(len(tensors) if half is Half.ENCODER else len(tensors[0]))
        if sizes[-1] > 2:  # a batch of 8 fails, one of 4 fails, one of 2 goes
            raise error
        return run_half(pass_id, tensors, *size)

    monkeypatch.setattr(source, name, hungry)
    states = run(Scheduler(source, batch_size=8), numbered())
    assert len(states) == N_STRIPS
    for name, state in states.items():
        assert not state.fault
        np.testing.assert_array_equal(state.masks, source.masks(int(name)))
    assert [size for size in sizes if size > 2] == [8, 4]  # then it is small enough for good
    lines = [line for line in caplog.messages if line.startswith("out of memory")]
    assert [line.split()[3] for line in lines] == ["4", "2"]
    assert all("strips of 5×4 at a time from here on" in line for line in lines)


def test_batches_are_never_halved_to_nothing() -> None:
    limits, shape = BatchLimits(2, CPU), torch.Size((1, 1, 4, 4))
    for _ in range(3):  # two threads may run out of memory at once
        limits.halve(shape)
        assert limits.batch_size_of(shape) == 1


def test_a_large_image_makes_batches_of_its_own_size_alone_smaller(
    source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, run_encoder = {True: list[int](), False: list[int]()}, source.run_encoder

    def hungry(pass_id: int, images: Tensor) -> tuple[Tensor, ...]:
        large = images.shape[-1] > SIZE[1]
        sizes[large].append(len(images))
        if large and len(images) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return run_encoder(pass_id, images)

    monkeypatch.setattr(source, "run_encoder", hungry)
    monkeypatch.setattr(
        source, "run_decoder", lambda i, encoded, _: source.probabilities[i, encoded[1][:, 0]]
    )
    strips = numbered()
    for number, times in ((4, 3), (7, 4)):  # one that is larger still need not be tried
        large = np.full((SIZE[0], times * SIZE[1]), number, np.uint8)
        strips[number] = Strip(str(number), large)
    states = run(Scheduler(source, batch_size=4), strips)
    assert len(states) == N_STRIPS and not any(state.fault for state in states.values())
    assert sizes[True][:3] == [4, 2, 1] and set(sizes[True][2:]) == {1}
    assert set(sizes[False]) == {4}


def test_a_strip_that_there_is_no_memory_for_the_masks_of_costs_only_itself(
    source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(tensor: Tensor) -> npt.NDArray[Any]:
        if tensor.dtype == torch.bool and torch.equal(tensor, torch.from_numpy(source.masks(5))):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return tensor.numpy()

    monkeypatch.setattr("kernel.scheduling.to_host", hungry)
    states = run(Scheduler(source, batch_size=8, early_exit=False), numbered())
    assert [name for name, state in states.items() if state.fault] == ["5"]
    assert "OutOfMemoryError" in states["5"].fault
    for name in states.keys() - {"5"}:
        np.testing.assert_array_equal(states[name].masks, source.masks(int(name)))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_is_kept_of_a_strip_keeps_no_memory_of_its_batch(
    batch_size: int, source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight strips' features in the place of one's would fill a T4."""
    kept, launch = list[Tensor](), StripState.launch

    def spied(
        state: StripState, encoded: tuple[Tensor, ...], probabilities: Tensor | None
    ) -> Tensor:
        kept.extend(encoded)
        return launch(state, encoded, probabilities)

    monkeypatch.setattr(StripState, "launch", spied)
    encode = source.run_encoder  # whose features are no views of what the source holds
    monkeypatch.setattr(
        source, "run_encoder", lambda i, x: tuple(each.clone() for each in encode(i, x))
    )
    run(Scheduler(source, batch_size), numbered())
    assert kept
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)


def test_a_strip_that_takes_all_memory_alone_costs_only_itself(
    source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_encoder = source.run_encoder

    def hungry(pass_id: int, images: Tensor) -> tuple[Tensor, ...]:
        if images[0, 0, 0, 0] == 5:
            raise torch.cuda.OutOfMemoryError("out of memory, said the device")
        return run_encoder(pass_id, images)

    monkeypatch.setattr(source, "run_encoder", hungry)
    states = run(Scheduler(source), numbered())
    assert [name for name, state in states.items() if state.fault] == ["5"]
    assert "OutOfMemoryError" in states["5"].fault


# --- what strips keep -----------------------------------------------------------------------------


class Kept:
    """Bytes of the features of all strips under way, before each step."""

    def __init__(self, source: DrawnPasses, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states, self.seen, admit = list[StripState](), list[int](), Scheduler._admit
        self.of_one = 0  # the most

        def spied(scheduler: Scheduler, *strip: Any) -> StripState:
            self.states.append(admit(scheduler, *strip))
            return self.states[-1]

        def hungry(run_half: Any) -> Any:
            def run(*given: Any) -> Any:
                kept = [
                    sum(each.nbytes for features in state.encoded for each in features)
                    for state in self.states
                ]
                self.seen.append(sum(kept))
                self.of_one = max(self.of_one, *kept)
                if self.seen[-1] > limit:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory")
                return run_half(*given)

            return run

        monkeypatch.setattr(Scheduler, "_admit", spied)
        for half in Half:
            monkeypatch.setattr(source, f"run_{half}", hungry(getattr(source, f"run_{half}")))


A_STRIP = N_PASSES * (4 * CLASSES + 8)  # bytes of its gates and its number, of every pass


def assert_masks(states: dict[str, StripState], source: DrawnPasses) -> None:
    assert len(states) == N_STRIPS
    for name, state in states.items():
        assert not state.fault
        np.testing.assert_array_equal(state.masks, source.masks(int(name)))
        assert state.ran[Half.ENCODER] == sorted(set(state.ran[Half.ENCODER]))


def test_no_more_strips_are_under_way_than_memory_holds_the_features_of(
    source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, most = Kept(source, math.inf, monkeypatch), list[int]()
    for free in (math.inf, 1e9, 200.0, 1.0):
        monkeypatch.setattr("kernel.batch_limits.free_memory", lambda _, free=free: free)
        assert_masks(run(Scheduler(source, 2), numbered()), source)
        most.append(max(kept.seen))
        assert 0 < most[-1] <= max(KEPT_SHARE * free, 2 * kept.of_one)  # a batch has two
        kept.seen.clear()
    assert most[0] == most[1] > 2 * kept.of_one


@pytest.mark.parametrize("batch_size", [2, 4, 16])
def test_no_strip_fails_for_the_memory_that_others_keep(
    batch_size: int, source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(source, A_STRIP, monkeypatch)
    assert_masks(run(Scheduler(source, batch_size), numbered()), source)
    assert max(kept.seen) > A_STRIP


@pytest.mark.parametrize(("free", "left"), [(1e9, 1), (200.0, 0.5)], ids=["ample", "filled"])
def test_a_step_that_is_too_large_itself_leaves_the_others_their_room(
    free: float, left: float, source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_encoder, tried = source.run_encoder, list[int]()

    def hungry(pass_id: int, images: Tensor) -> tuple[Tensor, ...]:
        tried.append(pass_id)
        if len(tried) > 20 and len(images) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return run_encoder(pass_id, images)

    monkeypatch.setattr(source, "run_encoder", hungry)
    monkeypatch.setattr("kernel.batch_limits.free_memory", lambda _: free)
    scheduler = Scheduler(source, 2)
    room = scheduler.limits.room
    assert_masks(run(scheduler, numbered()), source)
    assert scheduler.limits.room == left * room


def test_what_a_step_launched_that_failed_is_not_kept(
    source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, states, kept = StripState.launch, list[StripState](), list[Any]()

    def hungry(state: StripState, *given: Any) -> Tensor:
        states.append(state)
        if len(states) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if len(states) == 3:
            kept.extend((each.pending_features, each.tally.launched) for each in states)
        return launch(state, *given)

    monkeypatch.setattr(StripState, "launch", hungry)
    assert_masks(run(Scheduler(source, 4), numbered()), source)
    assert kept == [((), (None, None))] * 3


# --- passes that give NaN -------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("early_exit", [True, False])
@pytest.mark.parametrize("half", Half)
def test_a_pass_that_gives_nan_is_dropped_from_the_mean_of_that_strip_alone(
    half: Half,
    early_exit: bool,
    batch_size: int,
    source: DrawnPasses,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = source.gates if half is Half.ENCODER else source.probabilities
    given[2, 3].view(-1)[0] = given[0, 7].view(-1)[-1] = given[5, 7].view(-1)[0] = torch.nan
    states = run(Scheduler(source, batch_size, early_exit), numbered())
    for name, state in states.items():
        assert not state.fault
        np.testing.assert_array_equal(state.masks, source.masks(int(name)))
    if not early_exit:
        assert states["3"].pass_ids == [0, 1, 3, 4, 5]
        assert states["7"].pass_ids == [1, 2, 3, 4]
        assert len(caplog.messages) == 3
        assert "3: pass 2 gives NaN, dropped from its mean" in caplog.messages
        for name in ("3", "7"):  # it ran, though it does not count
            assert states[name].planned == list(range(N_PASSES))
            assert all(ran == states[name].planned for ran in states[name].ran.values())


@pytest.mark.parametrize("half", Half)
def test_a_strip_for_which_every_pass_gives_nan_fails_alone(
    half: Half, source: DrawnPasses
) -> None:
    given = source.gates if half is Half.ENCODER else source.probabilities
    given[:, 4] = torch.nan
    if half is Half.DECODER:
        source.gates[:, 4] = 1.0  # open, so that each is decoded
    states = run(Scheduler(source, 4), numbered())
    assert {n: s.fault for n, s in states.items() if s.fault} == {"4": "every pass gave NaN"}
    assert states["4"].ran[half] == list(range(N_PASSES))


# --- the end of the time --------------------------------------------------------------------------


def state_of(decoded: Sequence[float], encoded: int) -> StripState:
    """A strip of 15 passes: some decoded with these probabilities, then some only encoded."""
    tally = Tally(15, Manifest([], 1, threshold=0.5), early_exit=True)
    strip, images = Strip("a", np.zeros((2, 2), np.uint8)), torch.zeros(1, 1, 2, 2)
    state = StripState(strip, images, tally, list(range(15)), (2, 2))
    for pass_id in range(len(decoded) + encoded):
        state.next_step = (ENCODE, pass_id)
        state.settle(state.launch((torch.ones(1, 1),), None).numpy())
    for pass_id, value in enumerate(decoded):
        state.next_step = (DECODE, pass_id)
        state.settle(state.launch((), torch.full((1, 2, 2), value)).numpy())
    assert not state.done
    return state


@pytest.mark.parametrize(("second", "on"), [(0.3, True), (0.05, False)])
@pytest.mark.parametrize("encoded", [0, 2])
def test_a_strip_under_way_at_the_end_keeps_the_mean_of_its_passes(
    encoded: int, second: float, on: bool
) -> None:
    state = state_of([0.9, second], encoded)
    state.finalize()
    assert state.done and not state.fault
    assert state.tally.masks(state.size).all() == on


def test_a_strip_of_which_nothing_is_decoded_at_the_end_fails_for_lack_of_time() -> None:
    state = state_of([], 3)
    state.finalize()
    assert state.done
    assert state.fault == "no time was left for it"


def test_when_the_time_is_over_no_half_is_run_any_more(source: DrawnPasses) -> None:
    """The clock ends in the middle of the fourth strip."""
    deadline = Deadline(1e6, 0.0, clock=lambda: 1e6 if len(source.encoded) > 20 else 0.0)
    states = run(Scheduler(source, 1, early_exit=False, deadline=deadline), numbered())
    assert len(source.encoded) == 21
    faults = {name: state.fault for name, state in states.items() if state.fault}
    assert faults == dict.fromkeys("45678", "no time was left for it")
    np.testing.assert_array_equal(states["3"].masks, source.masks(3, [0, 1, 2]))


def test_a_strip_that_the_deadline_ends_without_memory_for_its_masks_costs_only_itself(
    source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock ends in the middle of the fourth strip."""
    expected = torch.from_numpy(source.masks(3, [0, 1, 2]))

    def hungry(tensor: Tensor) -> npt.NDArray[Any]:
        if tensor.dtype == torch.bool and torch.equal(tensor, expected):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return tensor.numpy()

    monkeypatch.setattr("kernel.scheduling.to_host", hungry)
    deadline = Deadline(1e6, 0.0, clock=lambda: 1e6 if len(source.encoded) > 20 else 0.0)
    states = run(Scheduler(source, 1, early_exit=False, deadline=deadline), numbered())
    assert "OutOfMemoryError" in states["3"].fault
    assert not any(states[name].fault for name in "012")


def test_a_pass_that_the_deadline_drops_does_not_run_for_that_strip(source: DrawnPasses) -> None:
    class Half3(Deadline):
        def select_passes(self, passes: Sequence[Any]) -> list[int]:
            return [0, 2] if self.strips_left == N_STRIPS - 3 else list(range(len(passes)))

    asked = [5, 4, 3]
    deadline = Half3(1e6, 0.0, clock=lambda: 0.0)
    scheduler = Scheduler(source, 1, early_exit=False, deadline=deadline, pass_ids=asked)
    states = run(scheduler, numbered())
    for name, state in states.items():
        assert state.planned == state.ran[Half.ENCODER] == ([5, 3] if name == "3" else asked)
        np.testing.assert_array_equal(state.masks, source.masks(int(name), state.planned))


@pytest.mark.parametrize(("others", "end"), [([1], range(6, 11)), ([1, 3], range(3))])
def test_a_strip_of_another_size_waits_for_one_like_it_but_not_for_ever(
    others: list[int], end: range, source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernel.scheduling.LONGEST_WAIT", 0.75)  # of eight strips under way
    sizes = dict.fromkeys(others, (SIZE[0], SIZE[1] + 8))
    images = [np.full(sizes.get(i, SIZE), i % N_STRIPS, np.uint8) for i in range(40)]
    strips = [Strip(str(index), image) for index, image in enumerate(images)]
    done = list(run(Scheduler(source, 2, early_exit=False), strips))
    assert done.index("1") in end


def test_the_deadline_learns_what_each_half_and_strip_took(
    source: DrawnPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which each step takes 5 s: a whole pass of 3 and 2 flops."""
    clock, heard = itertools.count(0, 5), list[tuple[Any, ...]]()
    monkeypatch.setattr("kernel.scheduling.time", SimpleNamespace(monotonic=clock.__next__))

    class Spied(Deadline):
        def half_done(self, member: str, half: Half, seconds: float, strips: int) -> None:
            heard.append((member, half, seconds, strips))

        def strips_done(self, plans: Sequence[Sequence[Any]]) -> None:
            super().strips_done(plans)
            heard.extend(tuple(map(str, passes)) for passes in plans)

        def select_passes(self, passes: Sequence[Any]) -> list[int]:
            heard.append(("of", self.strips_left))
            return list(range(len(passes)))

    scheduler = Scheduler(source, 1, False, Spied(1e6, 0.0, clock=lambda: 0.0), [1, 2])
    run(scheduler, numbered(2))
    seconds = {Half.ENCODER: 3.0, Half.DECODER: 2.0}
    halves = [(m, half, seconds[half], 1) for m in ("m0", "m1") for half in Half]
    done = ("m0/vertical", "m1/none")
    assert heard == [("of", 2), *halves, done, ("of", 1), *halves, done]


# --- through networks -----------------------------------------------------------------------------


def open_for_some(network: Any, spec: dict[str, Any], seed: int) -> None:
    """Draw the presence head anew so that it says yes to some images and no to others."""
    images = torch.from_numpy(np.stack([draw_image(seed) for seed in range(20)]))[:, None] / 255
    with torch.no_grad():
        features = network.encoder((images - spec["mean"][0]) / spec["std"][0])[-1]
        pooled = features.amax(dim=(-2, -1))  # (20, channels)
        linear = network.classification_head[3]
        torch.manual_seed(seed % 2)  # some members agree
        weight = torch.randn(linear.weight.shape) / (pooled.std(dim=0) + 1e-3)
        logits = pooled @ weight.T
        linear.weight.copy_(weight * 4 / logits.std(dim=0)[:, None])
        linear.bias.copy_(-4 * logits.mean(dim=0) / logits.std(dim=0) - 3)


@pytest.fixture(scope="module")
def doubting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five members: gates that open for some images and classes and stay shut for others."""
    folder = tmp_path_factory.mktemp("doubting")
    models = [tiny_model(arch) for arch in ("Unet", "FPN", "Unet", "FPN")]
    models.append(tiny_model("Unet", channels=3, presence=False))
    flops = [(60, 40), (60, 9), (61, 42), (70, 10), (50, 40)]
    entries = [tiny_entry(f"m{seed}", model) for seed, model in enumerate(models)]
    for seed, (model, entry) in enumerate(zip(models, entries, strict=True)):
        network = random_network(model, seed)
        if "aux_params" in model:
            open_for_some(network, entry, seed)
        save_file(network.state_dict(), folder / entry["file"])
        entry["flops"] = flops[seed]
    write_manifest(folder, entries, threshold=0.45)
    return folder


@pytest.fixture(scope="module")
def ensemble(doubting: Path) -> Ensemble:
    return load_ensemble(doubting, load_manifest(doubting), CPU, Stages(), None)


def strips_of(images: Sequence[Image]) -> list[Strip]:
    return [Strip(str(index), image) for index, image in enumerate(images)]


def test_members_run_in_the_order_of_their_encoders_and_last_without_a_presence_head(
    ensemble: Ensemble,
) -> None:
    """A whole pass of m0 is dearer than one of m3; m4 has the cheapest encoder and no gates."""
    members = list(dict.fromkeys(each.member for each in ensemble.passes))
    assert members == ["m1", "m0", "m2", "m3", "m4"]
    flops = {each.member: each.flops for each in ensemble.passes}
    assert sum(flops["m0"]) > sum(flops["m3"])
    assert min(flops, key=lambda member: flops[member]) == "m4"


def test_a_strip_that_all_gates_call_clean_takes_the_seven_cheapest_encoders_of_15() -> None:
    """No fewer gates prove 15 passes at 0.55 empty, and none cost less."""
    counted = {"dense": (69, 31), "res": (58, 38), "se": (62, 31), "wide": (65, 31), "b0": (6, 25)}
    gated = {"aux_params": {"classes": CLASSES}}
    members = [
        Member(MemberSpec(name, name, gated, [0.0], [1.0], flops=list(flops)), None, None, 1)
        for name, flops in counted.items()
    ]
    ensemble = Ensemble(Manifest([], CLASSES, threshold=0.55), members, CPU, Stages())
    tally = Tally(len(ensemble.passes), ensemble.manifest, early_exit=True)
    while tally.open:
        tally.settle(tally.launch(torch.full((CLASSES,), 0.01), None).numpy())
    taken = sum(each.flops[0] for each in ensemble.passes[: len(tally.gates)])
    encoders = sorted(flops[0] for flops in counted.values() for _ in range(3))
    assert len(tally.gates) == 7
    assert taken == sum(encoders[:7])


def test_a_member_releases_its_memory_when_another_runs(doubting: Path, ensemble: Ensemble) -> None:
    released = list[str]()
    members = [
        replace(member, release_memory=partial(released.append, name))
        for name, member in ensemble.members.items()
    ]
    watched = Ensemble(load_manifest(doubting), members, CPU, Stages())
    run(Scheduler(watched, early_exit=False), strips_of([draw_image(0), draw_image(1)]))
    in_order = list(ensemble.members)
    assert released == [*in_order, *in_order][:-1]


@pytest.fixture(scope="module")
def full(ensemble: Ensemble) -> dict[str, StripState]:
    """Fourteen strips of two sizes with every pass, one by one."""
    sizes = [(64, 96), (40, 70)]
    images = [draw_image(seed, sizes[seed % 2]) for seed in range(14)]
    return run(Scheduler(ensemble, early_exit=False), strips_of(images))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_masks_of_networks_are_the_same_and_take_less_work(
    ensemble: Ensemble, full: dict[str, StripState], batch_size: int
) -> None:
    scheduler = Scheduler(ensemble, batch_size)
    early = run(scheduler, [state.strip for state in full.values()])
    assert early.keys() == full.keys() == {str(index) for index in range(14)}
    shares, every = [], tuple(range(15))
    for name, state in early.items():
        np.testing.assert_array_equal(state.masks, full[name].masks)
        assert scheduler.work(full[name]) == StripWork(every, every, every, (), 1.0)
        shares.append(scheduler.work(state).share)
    assert min(shares) < 0.6 < 0.9 < max(shares)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_pass_gives_an_image_the_same_bits_whatever_shares_its_batch(
    ensemble: Ensemble, batch_size: int
) -> None:
    image, *others = [ensemble.prepare(draw_image(seed)) for seed in range(8)]
    seen = []
    for place in range(batch_size):
        batch = others[place : place + batch_size]
        batch[place] = image
        with torch.inference_mode():
            for index in range(len(ensemble.passes)):
                encoded = ensemble.run_encoder(index, torch.cat(batch))
                probabilities = ensemble.run_decoder(index, encoded, SMALL)
                seen.append((index, probabilities[place].numpy().tobytes()))
    assert len(seen) == batch_size * len(ensemble.passes)
    assert len(set(seen)) == len(ensemble.passes)  # one answer a pass


def test_strips_share_batches_and_partial_ones_are_filled_up(
    ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, groups = list[int](), list[int]()
    run_encoder, launch = Ensemble.run_encoder, Scheduler._launch

    def spied(self: Ensemble, pass_id: int, images: Tensor) -> tuple[Tensor, ...]:
        sizes.append(len(images))
        return run_encoder(self, pass_id, images)

    def counted(self: Scheduler, step: Step, pass_id: int, states: list[StripState]) -> Tensor:
        if Half.ENCODER in step:
            groups.append(len(states))
        return launch(self, step, pass_id, states)

    monkeypatch.setattr(Ensemble, "run_encoder", spied)
    monkeypatch.setattr(Scheduler, "_launch", counted)
    run(Scheduler(ensemble, 4), strips_of([draw_image(seed) for seed in range(32)]))
    assert set(sizes) == {4}
    assert 1 <= min(groups) < 4 == max(groups)
    assert np.mean(groups) > 2.6  # strips on different ways are regrouped
