"""What goes wrong under way, and what becomes of the submission: tests/README.md has the table."""

import errno
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import (
    CPU,
    LABELS,
    change_manifest,
    change_member,
    draw_image,
    edit_manifest,
    encode_image,
    error_of,
    exit_code,
    predict,
    read_submission,
    save_image,
    save_strips,
    write_sample,
)
from torch import Tensor

from kernel import ensemble_loading, inference
from kernel.backends import Backend, predict_on
from kernel.competition import SEVERSTAL
from kernel.deadline import Deadline
from kernel.device import DeviceLost, device_usable, pick_device
from kernel.engines import check_engine
from kernel.ensemble import Ensemble
from kernel.images import Image, Mask, Strip, read_strip
from kernel.manifest import MemberSpec
from kernel.members import Member
from kernel.outcome import Outcome
from kernel.read_ahead import Reads, read_ahead
from kernel.rle import encode_rle
from kernel.run_context import RunContext
from kernel.scheduling import Scheduler
from kernel.strip_state import TOO_LATE, StripState
from kernel.submission import Submission
from kernel.tta import Pass

NAMES = [f"{seed}.jpg" for seed in range(6)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six readable strips."""
    save_strips(tmp_path / "images", NAMES)
    return tmp_path / "images"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Path:
    """The three tiny members under three flips, which no test here changes."""
    return tiny_bundle / "dataset"


@pytest.fixture(scope="module")
def whole(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The submission of the six strips when nothing goes wrong; each has a mask."""
    folder = tmp_path_factory.mktemp("whole")
    save_strips(folder / "images", NAMES)
    predict(bundle, folder / "images", folder / "submission.csv")
    rles = read_submission(folder / "submission.csv")
    assert all(any(rles[name, label] for label in LABELS) for name in NAMES)
    return folder / "submission.csv"


# --- hostile and broken strips --------------------------------------------------------------------


def break_off(path: Path) -> None:
    data = encode_image(".jpg", draw_image(9, (256, 1600)))
    path.write_bytes(data[: len(data) // 2])


def save_blank(size: tuple[int, int]) -> Callable[[Path], None]:
    """Large images that take few bytes: 20,000 × 20,000 are 50 kB, and 400 MB when decoded."""
    return lambda path: PIL.Image.new("1", size[::-1]).save(path, "PNG")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero bytes": (lambda path: path.write_bytes(b""), "0 bytes that are no image"),
    "text": (lambda path: path.write_text("not an image"), "12 bytes that are no image"),
    "a truncated JPEG": (break_off, "that OpenCV does not decode|a JPEG whose data end"),
    "20 000 × 20 000": (save_blank((20_000, 20_000)), "400000000 pixels"),
    "10 000 × 8 000": (save_blank((8_000, 10_000)), "10000×8000 pixels"),
    "2 000 000 × 1": (  # OpenCV raises an error of its own
        lambda path: PIL.Image.new("L", (2_000_000, 1), 7).save(path, "BMP"),
        "OpenCV",
    ),
    "16 bits": (  # of which 12 are used, maybe
        lambda path: save_image(path, draw_image(9).astype(np.uint16) * 16),
        'of 16 bits, its competition.json says bits 8: write "bits": 16 there',
    ),
    "one pixel": (  # FPN's group norm takes no single value
        lambda path: save_image(path, draw_image(9)[:1, :1]),
        "the networks failed",
    ),
    "a folder": (lambda path: path.mkdir(), "Is a directory"),
    "a missing file": (lambda path: None, "No such file"),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
}


def test_broken_strips_cost_their_own_rows_and_are_named(
    bundle: Path, images: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reasons = {f"{case}_b d.jpg": reason for case, (_, reason) in BROKEN.items()}
    for case, (make, _) in BROKEN.items():
        make(images / f"{case}_b d.jpg")
    output, report = images.parent / "submission.csv", images.parent / "report.json"
    names = sorted([*NAMES, *reasons])
    sample = write_sample(images.parent / "sample.csv", names, "two-column")
    words = ["--bundle", bundle, "--images", images, "--sample", sample]
    assert exit_code(inference.main, *words, "--output", output, "--report", report) == 0
    empty = {(name, label): "" for name in reasons for label in LABELS}
    assert read_submission(output) == read_submission(whole) | empty
    faults = json.loads(report.read_text())["faults"]
    assert faults.keys() == reasons.keys()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    for name, reason in reasons.items():
        assert re.search(reason, faults[name])
        [line] = [line for line in warnings if name in line]
        assert line == f"{name} stays empty: {faults[name]}"


def fail_once_checked(engine: Member, plain: Member, *check: Any) -> Member:
    """An engine that passes its check and then fails on every strip; plain PyTorch does not."""

    def encode(_: Tensor) -> Any:
        raise RuntimeError("no memory for a strip")

    checked = check_engine(engine, plain, *check)
    return checked if checked is plain else replace(checked, encoder=encode)


@pytest.mark.parametrize(
    ("patience", "reason"),
    [(8, "the networks failed: "), (2, "on 2 images in a row the networks failed: ")],
    ids=["at the end", "at once"],
)
def test_an_engine_that_fails_on_every_strip_costs_none(
    patience: int,
    reason: str,
    bundle: Path,
    images: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Six strips: with less patience than that the engine is given up before the last."""
    monkeypatch.setattr(ensemble_loading, "check_engine", fail_once_checked)
    monkeypatch.setattr("kernel.backends.MAX_FAILURES", patience)
    record = predict(bundle, images, images.parent / "submission.csv")
    assert not (record["faults"] or record["failed"])
    assert record["work"].keys() == set(NAMES)
    assert read_submission(images.parent / "submission.csv") == read_submission(whole)
    [line] = [line for line in caplog.messages if line.startswith(reason)]
    assert "the remaining 6 images run on the CPU with plain PyTorch" in line


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (range(7), "the networks failed: .*; the remaining 7 images run"),
        (range(8), "on 8 images in a row the networks failed: .*; the remaining 20 images run"),
        (range(0, 18, 2), "the networks failed: .*; the remaining 9 images run"),
    ],
    ids=["seven in a row", "eight", "nine, never two together"],
)
def test_an_engine_is_given_up_at_once_after_eight_images_in_a_row(
    fails: range,
    said: str,
    session_light: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Members are stubs; an image's number is its brightness."""

    def load(_: Path, specs: Sequence[MemberSpec], *__: Any, plain: bool, **___: Any) -> Any:
        def encode(images: Tensor) -> tuple[Tensor, ...]:
            if not plain and round(images[0, 0, 0, 0].item() * 255) in fails:
                raise RuntimeError("no memory for a strip")
            return torch.ones(len(images), 4), images

        def decode(gates: Tensor, images: Tensor) -> Tensor:
            return images.expand(-1, 4, -1, -1)

        return {spec.name: Member(spec, encode, decode, stride=1) for spec in specs}

    monkeypatch.setattr(ensemble_loading, "load_members", load)
    for number in range(20):
        image = np.full((8, 8), number, np.uint8)
        save_image(tmp_path / "images" / f"{number:02}.png", image)
    record = predict(session_light, tmp_path / "images", tmp_path / "submission.csv")
    assert not record["faults"] and len(record["work"]) == 20
    [line] = [line for line in caplog.messages if "run on the CPU with plain PyTorch" in line]
    assert re.match(said, line)


@pytest.mark.parametrize(
    ("half", "nan", "engine", "said"),
    [
        ("encoder", range(8), True, "on 8 images in a row member .* gives NaN; the remaining 12 "),
        ("decoder", range(3, 20), True, "on 8 images in a row member .*; the remaining 9 images"),
        ("encoder", range(7), True, None),
        ("decoder", range(0, 20, 2), True, None),
        ("encoder", range(20), False, None),  # plain PyTorch would give no other
    ],
    ids=["eight", "a decoder", "seven", "every other", "a member on plain PyTorch"],
)
def test_an_engine_is_given_up_where_one_member_gives_nan_on_eight_images_in_a_row(
    half: str,
    nan: range,
    engine: bool,
    said: str | None,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Members are stubs; an image's number is its brightness."""

    def load(_: Path, specs: Sequence[MemberSpec], *__: Any, plain: bool, **___: Any) -> Any:
        def lost(images: Tensor, which: str) -> float:
            number = round(images[0, 0, 0, 0].item() * 255)
            return np.nan if which == half and not plain and number in nan else 1.0

        def encode(images: Tensor) -> tuple[Tensor, ...]:
            return torch.ones(len(images), 4), images

        def decode(gates: Tensor, images: Tensor) -> Tensor:
            return images.expand(-1, 4, -1, -1)

        def encode_some(images: Tensor) -> tuple[Tensor, ...]:
            return torch.ones(len(images), 4) * lost(images, "encoder"), images

        def decode_some(gates: Tensor, images: Tensor) -> Tensor:
            return decode(gates, images) * lost(images, "decoder")

        first = Member(specs[0], encode_some, decode_some, stride=1, plain=not engine)
        assert len(specs) > 1
        return {s.name: Member(s, encode, decode, stride=1) for s in specs} | {
            first.spec.name: first
        }

    monkeypatch.setattr(ensemble_loading, "load_members", load)
    for number in range(20):
        image = np.full((8, 8), number, np.uint8)
        save_image(tmp_path / "images" / f"{number:02}.png", image)
    record = predict(bundle, tmp_path / "images", tmp_path / "submission.csv")
    lines = [line for line in caplog.messages if "gives NaN; the remaining" in line]
    assert len(lines) == bool(said)
    assert said is None or re.match(said, lines[0])
    assert said is None or not record["faults"]
    assert len(record["work"]) + len(record["faults"]) == 20


@pytest.fixture
def hang_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets the reads of these images hang until the test ends."""
    answers, unanswered, read_bytes = threading.Event(), list[Path](), Path.read_bytes

    def hang(*names: str, read_s: float = 1.0) -> None:
        def read(path: Path) -> bytes:
            if path.name in names and not answers.wait(timeout=30):
                unanswered.append(path)
            return read_bytes(path)

        monkeypatch.setattr(Path, "read_bytes", read)
        monkeypatch.setattr("kernel.read_ahead.READ_S", read_s)

    yield hang
    answers.set()
    assert not unanswered, "were waited for"


def test_reads_that_hang_cost_their_own_strips_and_no_time_of_others(
    images: Path, hang_reads: Callable[..., None]
) -> None:
    """Others are read beside them, and at the end they are not waited for."""
    hang_reads(*NAMES[:3], NAMES[5])
    deadline = Deadline(3600, time.monotonic())
    deadline.last = before = deadline.clock()
    strips = list(read_ahead(images, NAMES, 1, SEVERSTAL, deadline))
    assert [strip.name for strip in strips] == NAMES
    faults = {strip.name: strip.fault for strip in strips if strip.image is None}
    assert faults == dict.fromkeys([*NAMES[:3], NAMES[5]], "was not read in 1 s")
    assert deadline.last > before


def test_a_disk_that_hangs_for_a_while_costs_no_strip(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers after 450 s, the second file after all others."""
    now, answers, last_answer = [0.0], threading.Event(), threading.Event()
    read_bytes, result = Path.read_bytes, futures.Future.result

    def read(path: Path) -> bytes:
        assert (last_answer if path.name == NAMES[1] else answers).wait(timeout=30)
        return read_bytes(path)

    def wait(strip: futures.Future[Strip], patience_s: float = 0.0) -> Strip:
        if strip.done():
            return result(strip)
        if now[0] + patience_s < 450:
            now[0] += patience_s
            raise TimeoutError
        if answers.is_set():
            last_answer.set()
        now[0] = 450.0
        answers.set()
        return result(strip, 30)

    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(futures.Future, "result", wait)
    deadline = Deadline(3600, 0.0, lambda: now[0])
    strips = list(read_ahead(images, NAMES, 5, SEVERSTAL, deadline))
    assert [strip.name for strip in strips if not strip.fault] == NAMES
    assert deadline.last == 450.0


def test_a_file_that_cannot_be_read_takes_no_time_of_a_strip(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()

    def fail(_: Path) -> bytes:
        assert asked.wait(timeout=30)
        raise OSError("torn")

    def clock() -> float:
        return 5.0 if asked.is_set() else 0.0

    def left_s(*_: object) -> float:
        asked.set()
        return 30.0

    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr(Reads, "_left_s", left_s)
    deadline = Deadline(3600, 0.0, clock)
    [strip] = read_ahead(images, NAMES[:1], 0, SEVERSTAL, deadline)
    assert (strip.image, deadline.last) == (None, 5.0)


def test_where_no_thread_can_be_started_files_are_read_all_the_same(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoThread:
        def __init__(self, **_: object) -> None:
            pass

        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr("kernel.read_ahead.threading", SimpleNamespace(Thread=NoThread))
    strips = list(read_ahead(images, NAMES, 2, SEVERSTAL))
    assert [strip.name for strip in strips if not strip.fault] == NAMES


def test_a_read_that_hangs_is_not_waited_for_once_the_deadline_is_over(
    images: Path, hang_reads: Callable[..., None]
) -> None:
    hang_reads(NAMES[0], read_s=300.0)
    deadline = Deadline(3600, time.monotonic())
    deadline.end = deadline.clock() + 1.0
    strips = list(read_ahead(images, NAMES[:2], 0, SEVERSTAL, deadline))
    assert [strip.fault for strip in strips] == [TOO_LATE] * 2


def test_engines_are_checked_on_another_image_where_the_read_of_the_first_hangs(
    session_light: Path, images: Path, hang_reads: Callable[..., None]
) -> None:
    hang_reads(NAMES[0])
    record = predict(session_light, images, images.parent / "submission.csv")
    assert record["faults"] == {NAMES[0]: "was not read in 1 s"}
    assert record["work"].keys() == set(NAMES[1:])


ENDS = """
import pathlib, sys
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
import inference as kernel
kernel.READ_S = 0.1
names = ["0.jpg", "hangs.jpg"]
strips = kernel.read_ahead(pathlib.Path(sys.argv[2]), names, 1, kernel.SEVERSTAL)
print([strip.name for strip in strips if strip.name == "0.jpg" or strip.fault])
"""


def test_a_process_ends_whatever_reads_hang(session_light: Path, images: Path) -> None:
    """What stands for such a file is a pipe that nobody writes to."""
    os.mkfifo(images / "hangs.jpg")
    command = [sys.executable, "-c", ENDS, str(session_light), str(images)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "['0.jpg', 'hangs.jpg']\n"


def test_reads_under_way_end_before_an_interrupted_run(
    session_light: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that is in OpenCV when the process ends would abort it."""
    waited, read = threading.Event(), list[str]()

    def read_last(folder: Path, name: str, *rules: Any) -> Strip:
        if name == NAMES[2]:
            assert waited.wait(timeout=30)
        read.append(name)
        return read_strip(folder, name, *rules)

    def wait(reads: Sequence[futures.Future[Strip]], seconds: float) -> None:
        if reads:  # not where the image that engines are checked on was read
            waited.set()
        futures.wait(reads, seconds)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kernel.read_ahead.wait", wait)
    monkeypatch.setattr("kernel.read_ahead.read_strip", read_last)
    monkeypatch.setattr("kernel.predict.encode_rle", interrupt)
    with pytest.raises(KeyboardInterrupt) as raised:  # keeps all frames
        predict(session_light, images, images.parent / "submission.csv")
    assert NAMES[2] in read, raised


@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupted_wait_for_a_read_or_start_of_one_leaves_it_to_the_end(
    begun: bool, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited, start = list[int](), threading.Thread.start

    def interrupt(thread: threading.Thread, *_: object) -> None:
        if not begun:
            start(thread)
        raise KeyboardInterrupt

    def wait(reads: Sequence[futures.Future[Strip]], _: float) -> None:
        waited.append(len(reads))

    monkeypatch.setattr("kernel.read_ahead.wait", wait)
    if begun:
        monkeypatch.setattr(futures.Future, "result", interrupt)
    else:
        monkeypatch.setattr(threading.Thread, "start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(read_ahead(images, NAMES, 2, SEVERSTAL))
    assert waited == [3 if begun else 1]


def test_reads_that_hang_do_not_hold_up_an_interrupted_run(
    images: Path, hang_reads: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hang_reads(NAMES[1])
    monkeypatch.setattr("kernel.read_ahead.LAST_READS_S", 0.1)
    coming = read_ahead(images, NAMES, 1, SEVERSTAL)
    assert next(coming).name == NAMES[0]
    coming.close()


def test_an_error_after_strips_that_are_done_ends_nothing(
    bundle: Path, images: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first strip it would be the bundle's fault."""
    calls = itertools.count()

    def short_of_memory(mask: Mask, *rules: Any) -> str:
        if next(calls) == 9:
            raise MemoryError
        return encode_rle(mask, *rules)

    monkeypatch.setattr("kernel.predict.encode_rle", short_of_memory)
    record = predict(bundle, images, images.parent / "submission.csv")
    assert not record["faults"] and record["work"].keys() == set(NAMES)
    assert read_submission(images.parent / "submission.csv") == read_submission(whole)


def test_a_gpu_that_cannot_load_the_members_leaves_them_to_the_cpu(
    bundle: Path,
    images: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No GPU here: what stands for one is a device that no tensor can be moved to."""
    monkeypatch.setattr("kernel.backends.pick_device", lambda: torch.device("cuda"))

    def lost() -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lost)
    record = predict(bundle, images, images.parent / "submission.csv")
    assert record["device"] == "cpu" and not record["faults"]
    assert read_submission(images.parent / "submission.csv") == read_submission(whole)
    [line] = [line for line in caplog.messages if line.endswith("6 images run on the CPU")]
    assert line.startswith("cuda fails: ")


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("backend", "lost", "expected"),
    [
        (Backend(CUDA), False, Backend(CUDA, True)),
        (Backend(CUDA, True), False, Backend(CPU, True)),
        (Backend(CPU), False, Backend(CPU, True)),
        (Backend(CPU, True), False, None),
        (Backend(CUDA), True, Backend(CPU, False, True)),
        (Backend(CUDA, True), True, Backend(CPU, True, True)),
        (Backend(CPU, False, True), True, Backend(CPU, True, True)),
        (Backend(CPU, True, True), True, None),
    ],
)
def test_what_is_left_runs_on_less_and_less(
    backend: Backend, lost: bool, expected: Backend | None
) -> None:
    assert backend.next_after(lost) == expected


def test_a_backend_is_named_by_its_device_and_its_engine() -> None:
    backends = [Backend(CUDA), Backend(CUDA, True), Backend(CPU), Backend(CPU, True)]
    plain = " with plain PyTorch"
    expected = ["on the GPU", f"on the GPU{plain}", "on the CPU", f"on the CPU{plain}"]
    assert list(map(str, backends)) == expected


@pytest.mark.parametrize("over", [False, True])
def test_a_device_that_stays_lost_is_not_tried_for_ever(
    over: bool, session_light: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor anything once the time is over; each way begins with as many threads as the process."""
    ways, threads = list[tuple[torch.device, bool, int]](), torch.get_num_threads()

    def lose(device: torch.device, *_: Any, plain: bool = False) -> None:
        ways.append((device, plain, torch.get_num_threads()))
        torch.set_num_threads(1)  # as beside OpenVINO's
        raise DeviceLost("cuda fails")

    monkeypatch.setattr("kernel.backends.pick_device", lambda: CUDA)
    monkeypatch.setattr("kernel.backends.predict_on", lose)
    monkeypatch.setattr(Deadline, "over", over)
    torch.set_num_threads(3)
    try:
        record = predict(session_light, images, images.parent / "submission.csv")
    finally:
        torch.set_num_threads(threads)
    expected = [(CUDA, False, 3), (CPU, False, 3), (CPU, True, 3)]
    assert ways == expected[: 1 if over else 3]
    assert record["faults"] == dict.fromkeys(NAMES, "was not predicted")


def test_a_run_on_plain_pytorch_begins_with_it(
    session_light: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[bool]()

    def run_plain(*given: Any, **options: Any) -> None:
        asked.append(options["plain"])
        predict_on(*given, **options)

    monkeypatch.setattr("kernel.backends.predict_on", run_plain)
    assert not predict(session_light, images, images.parent / "s.csv", plain=True)["faults"]
    assert asked == [True]


def test_a_bundle_that_is_refused_is_tried_once(
    session_light: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = list[torch.device]()

    def refuse(device: torch.device, *_: Any, **__: Any) -> None:
        ways.append(device)
        raise ValueError("fpn.safetensors: torn")

    monkeypatch.setattr("kernel.backends.predict_on", refuse)
    with pytest.raises(ValueError, match="torn"):
        predict(session_light, images, images.parent / "submission.csv")
    assert len(ways) == 1


def test_what_fails_every_way_before_a_strip_is_done_is_raised(
    session_light: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the bundle, or a library, though the GPU is blamed first; a run of none is no run."""

    def fail(device: torch.device, *_: Any, plain: bool = False) -> None:
        if device == CUDA:
            raise DeviceLost("cuda fails: operator torchvision::nms does not exist")
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("kernel.backends.pick_device", lambda: CUDA)
    monkeypatch.setattr("kernel.backends.predict_on", fail)
    with pytest.raises(RuntimeError, match="operator torchvision::nms does not exist"):
        predict(session_light, images, images.parent / "submission.csv")


def test_strips_that_no_time_is_left_to_run_again_stay_named(
    bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ensemble_loading, "check_engine", fail_once_checked)

    def run_late(
        device: Any, context: RunContext, task: Any, outcome: Any, plain: bool = False
    ) -> None:
        context = replace(context, start=-math.inf) if plain else context
        predict_on(device, context, task, outcome, plain)

    monkeypatch.setattr("kernel.backends.predict_on", run_late)
    record = predict(bundle, images, images.parent / "submission.csv")
    assert record["faults"].keys() == set(NAMES) and not record["work"]
    assert record["failed"] == sorted(NAMES)
    assert all("no memory for a strip" in fault for fault in record["faults"].values())


def test_strips_that_are_all_broken_still_give_a_valid_submission(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(b"")
    output = tmp_path / "submission.csv"
    words = ("--bundle", bundle, "--images", tmp_path, "--output", output)
    assert exit_code(inference.main, *words) == 0
    assert "none of 2 strips could be predicted" in caplog.text
    expected = {(name, label): "" for name in ("1.jpg", "2.jpg") for label in LABELS}
    assert read_submission(output) == expected
    assert exit_code(inference.main, *words, "--strict") == 1


ODD: dict[str, Callable[[Path, Image], object]] = {
    "PNG named .jpg": save_image,
    "BMP named .jpg": lambda path, image: path.write_bytes(encode_image(".bmp", image)),
    "RGBA": lambda path, image: save_image(path, cv2.cvtColor(image, cv2.COLOR_GRAY2BGRA)),
    "CMYK": lambda path, image: PIL.Image.fromarray(image).convert("CMYK").save(path, "JPEG"),
    "a link to an image": lambda path, _: path.symlink_to("0.jpg"),
}


def test_odd_strips_are_predicted_like_any(bundle: Path, images: Path) -> None:
    endings = ["odd.jpg", "ODD.JPG", "ö d_d 鋼.jpg"]
    names = [f"{case} {ending}" for case in ODD for ending in endings]
    for case, ending in itertools.product(ODD, endings):
        ODD[case](images / f"{case} {ending}", draw_image(9))
    record = predict(bundle, images, images.parent / "submission.csv")
    assert not record["faults"]
    assert record["work"].keys() == {*NAMES, *names}
    rows = read_submission(images.parent / "submission.csv")
    assert len(rows) == 4 * (len(NAMES) + len(names))
    assert all(any(rows[name, label] for label in LABELS) for name in names)


def test_rows_named_twice_and_strips_in_no_row_are_told(
    session_light: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sample, output = images.parent / "sample.csv", images.parent / "submission.csv"
    sample.write_text("ImageId,EncodedPixels,ClassId\n2.jpg,1 9,0\n2.jpg,1 9,0\n1.jpg,1 9,0\n")
    caplog.set_level(logging.INFO)
    predict(session_light, images, output, sample=sample)
    expected = [(name, label) for name in ("2.jpg", "1.jpg") for label in LABELS]
    assert list(read_submission(output)) == expected
    assert any("2.jpg has 2 rows of class 0" in line for line in caplog.messages)
    assert any("4 images are in no row, '0.jpg'" in line for line in caplog.messages)


def test_a_strip_that_was_not_predicted_is_a_fault(
    session_light: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(*_: Any) -> Iterator[StripState]:
        yield from ()

    monkeypatch.setattr(Scheduler, "predict_strips", forgetful)
    record = predict(session_light, images, tmp_path / "submission.csv")
    assert record["faults"] == dict.fromkeys(NAMES, "was not predicted")


# --- hostile and broken bundles -------------------------------------------------------------------


def flip_bit(folder: Path) -> None:
    path = folder / "unet-a.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def lie_about_sizes(folder: Path) -> None:
    """The header says that the first tensor ends beyond the file; no hash tells."""
    path = folder / "unet-a.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    tensor = next(value for key, value in header.items() if key != "__metadata__")
    tensor["data_offsets"][1] += 10_000_000
    lie = json.dumps(header).encode()
    path.write_bytes(len(lie).to_bytes(8, "little") + lie + data[8 + length :])
    change_member(folder, sha256="")


def name_twice(folder: Path) -> None:
    edit_manifest(folder, lambda entries: entries["members"].append(entries["members"][0]))


BUNDLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip_bit, "sha256"),
    "a header that lies": (lie_about_sizes, "no safetensors file"),
    "a member outside": (lambda f: change_member(f, file="../x.safetensors"), "not beside"),
    "an absolute path": (lambda f: change_member(f, file="/etc/passwd"), "not beside"),
    "a member twice": (name_twice, "two members named"),
    "other classes": (lambda f: change_manifest(f, classes=3), "the competition has 4"),
    "a threshold of 1": (lambda f: change_manifest(f, threshold=1.0), "threshold 1.0"),
    "a threshold of 0": (lambda f: change_manifest(f, threshold=0), "threshold 0"),
    "an unknown format": (lambda f: change_manifest(f, format=7), "format 7"),
    "an unknown flip": (lambda f: change_manifest(f, flips=["none", "diagonal"]), "diagonal"),
    "no members": (lambda f: change_manifest(f, members=[]), "no members"),
}


@pytest.mark.parametrize("case", BUNDLES)
def test_the_kernel_refuses_a_bundle_with(
    case: str, dataset: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, reason = BUNDLES[case]
    spoil(dataset)
    output = images.parent / "out.csv"
    words = ("--bundle", dataset, "--images", images, "--output", output)
    assert exit_code(inference.main, *words) == 2
    error = error_of(capsys.readouterr().err)
    assert reason in error
    assert str(dataset) in error


@pytest.mark.parametrize("case", ["a flipped bit", "a header that lies"])
def test_a_bad_member_is_left_out_only_where_that_is_allowed(
    case: str, dataset: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    BUNDLES[case][0](dataset)
    output = images.parent / "out.csv"
    record = predict(dataset, images, output, allow_missing_members=True)
    assert {each["member"] for each in record["passes"]} == {"fpn-b", "unet-c"}
    assert [work["passes"] for work in record["work"].values()] == [list(range(6))] * len(NAMES)
    assert any("going on without member unet-a" in line for line in caplog.messages)


def test_not_one_usable_member_is_an_error_even_where_members_may_miss(
    dataset: Path, images: Path
) -> None:
    for path in dataset.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="no member can be used"):
        predict(dataset, images, images.parent / "out.csv", allow_missing_members=True)


# --- the disk -------------------------------------------------------------------------------------


def test_a_read_only_output_is_an_error_before_the_first_strip(
    bundle: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The system's own read-only tree: permissions do not stop root."""
    monkeypatch.setattr(inference, "predict", lambda *_: pytest.fail("predicts"))
    words = ("--bundle", bundle, "--images", images, "--output", "/proc/submission.csv")
    assert exit_code(inference.main, *words) == 2
    assert "/proc" in error_of(capsys.readouterr().err)


def test_a_full_disk_is_an_error_before_the_first_strip(
    bundle: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Usage:
        free = 49_000_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    monkeypatch.setattr(inference, "predict", lambda *_: pytest.fail("predicts"))
    output = images.parent / "out.csv"
    words = ("--bundle", bundle, "--images", images, "--output", output)
    assert exit_code(inference.main, *words) == 2
    assert "49 MB free, 50 needed" in error_of(capsys.readouterr().err)


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    bundle: Path,
    images: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_text, calls = Path.write_text, [0]

    def full(path: Path, *arguments: Any, **named: Any) -> Any:
        calls[0] += path.name.endswith(".part")
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        return write_text(path, *arguments, **named)

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Submission, "MAX_SAVING_SHARE", 1e9)  # a save after every strip
    predict(bundle, images, images.parent / "submission.csv")
    assert any("No space left" in line for line in caplog.messages)
    assert (images.parent / "submission.csv").read_bytes() == whole.read_bytes()


@pytest.fixture
def full_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that has no room for the submission any more once all strips are done."""
    write_text, predict_all, full = Path.write_text, inference.predict, list[bool]()

    def write(path: Path, *arguments: Any, **named: Any) -> Any:
        if full and path.name.startswith("submission.csv"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(path))
        return write_text(path, *arguments, **named)

    def predicted(*given: Any) -> Outcome:
        outcome = predict_all(*given)
        full.append(True)
        return outcome

    monkeypatch.setattr(Path, "write_text", write)
    monkeypatch.setattr(inference, "predict", predicted)
    monkeypatch.setattr(Submission, "MAX_SAVING_SHARE", 1e9)  # a save after every strip


@pytest.mark.usefixtures("full_at_the_end")
def test_where_the_last_save_fails_the_one_before_it_stands(
    bundle: Path, images: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = images.parent / "submission.csv"
    words = ("--bundle", bundle, "--images", images, "--output", output)
    assert exit_code(inference.main, *words) == 0
    assert output.read_bytes() == whole.read_bytes()
    [line] = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert line.startswith("cannot save the last rows") and "quota exceeded" in line
    assert json.loads(output.with_name("run.json").read_text())["rows"] == 4 * len(NAMES)


@pytest.mark.usefixtures("full_at_the_end")
def test_a_worker_whose_last_save_fails_has_no_record(bundle: Path, images: Path) -> None:
    """With one its rows would be taken for done."""
    with pytest.raises(OSError, match="quota exceeded"):
        predict(bundle, images, images.parent / "submission.csv", worker=True)


def test_every_strip_that_is_done_is_on_disk_when_the_next_one_starts(
    bundle: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Submission, "MAX_SAVING_SHARE", 1e9)  # a save costs less than that here
    output, seen = images.parent / "submission.csv", list[int]()
    strips_done = Deadline.strips_done

    def spied(deadline: Deadline, plans: Sequence[Sequence[Pass]]) -> None:
        seen.append(sum(1 for rle in read_submission(output).values() if rle))
        strips_done(deadline, plans)

    monkeypatch.setattr(Deadline, "strips_done", spied)
    predict(bundle, images, output)
    assert seen[0] == 0
    assert len(seen) == len(NAMES)
    assert all(before < after for before, after in itertools.pairwise(seen))


# --- the device -----------------------------------------------------------------------------------


def test_a_gpu_that_fails_its_first_operation_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fails)
    assert pick_device() == CPU
    assert "no kernel image is available" in caplog.text


def test_a_gpu_lost_half_way_leaves_its_strips_to_the_cpu(
    bundle: Path,
    images: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No GPU here: the device that breaks down is a CPU that a switch makes fail."""
    broken, calls = [False], [0]
    run_decoder = Ensemble.run_decoder

    def dies(ensemble: Ensemble, pass_id: int, encoded: Any, size: Any) -> Any:
        calls[0] += 1
        if calls[0] == 30 and not broken[0]:
            broken[0] = True
            raise RuntimeError("CUDA error: unspecified launch failure")
        return run_decoder(ensemble, pass_id, encoded, size)

    def fails_once(device: torch.device) -> bool:
        return device_usable(device) and not (broken[0] and calls[0] == 30)

    monkeypatch.setattr(Ensemble, "run_decoder", dies)
    monkeypatch.setattr("kernel.scheduling.device_usable", fails_once)
    record = predict(bundle, images, images.parent / "submission.csv")
    assert not record["faults"]
    assert len(record["work"]) == 6
    [line] = [line for line in caplog.messages if "run on the CPU" in line]
    assert "launch failure" in line
    assert re.search(r"the remaining [1-5] images", line)  # what was done is not done again
    assert (images.parent / "submission.csv").read_bytes() == whole.read_bytes()


def test_out_of_memory_halves_the_batch_and_costs_no_strip(
    bundle: Path,
    images: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_encoder, refused = Ensemble.run_encoder, list[int]()

    def small(ensemble: Ensemble, pass_id: int, batch: torch.Tensor) -> Any:
        if len(batch) > 2:
            refused.append(len(batch))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return run_encoder(ensemble, pass_id, batch)

    monkeypatch.setattr(Ensemble, "run_encoder", small)
    record = predict(bundle, images, images.parent / "submission.csv", batch_size=8)
    assert refused == [8, 4]
    assert not record["faults"]
    assert (images.parent / "submission.csv").read_bytes() == whole.read_bytes()


# --- interruption ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_an_interrupted_run_ends_with_a_line_and_what_it_has_done(
    number: signal.Signals, workers: int, session_light: Path, tmp_path: Path
) -> None:
    images, names = (
        tmp_path / "images",
        [f"{index}.jpg" for index in range(5000)],
    )  # more than end before a save
    save_strips(images, names[:1])
    for name in names[1:]:
        (images / name).symlink_to(names[0])
    output, printed = tmp_path / "out.csv", tmp_path / "log.txt"
    words = ["--bundle", session_light, "--images", images, "--output", output]
    script = session_light / "inference.py"
    command = [sys.executable, *map(str, (script, *words, "--workers", workers))]
    with printed.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        give_up = time.monotonic() + 120
        while not (output.is_file() and b" " in output.read_bytes()):
            assert time.monotonic() < give_up, printed.read_text()
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == 130, printed.read_text()
    last = printed.read_text().splitlines()[-1]
    assert last.startswith("interrupted") and "out.csv is whole" in last
    assert "Traceback" not in printed.read_text()
    rows = read_submission(output)
    assert len(rows) == 4 * len(names)
    assert 0 < sum(1 for rle in rows.values() if rle) < len(rows)


def test_a_run_interrupted_before_its_submission_says_nothing_of_an_earlier_one(
    bundle: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "find_task", interrupt)
    output = tmp_path / "out.csv"
    output.write_text("of an earlier run")
    words = ["--bundle", str(bundle), "--images", str(images), "--output", str(output)]
    assert exit_code(inference.main, *words) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert output.read_text() == "of an earlier run"
