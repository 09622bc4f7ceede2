"""What goes wrong under way, and what becomes of the submission: tests/README.md has the table."""

import itertools
import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import kernel_script, write_manifest
from safetensors.torch import load_file, save_file

import build_kernel
from kernel import inference
from kernel.deadline import Deadline
from kernel.engines import works
from kernel.ensemble import Ensemble, load_ensemble, turned
from kernel.images import Strip, decode_strip, read_image
from kernel.logs import Stages
from kernel.manifest import load_manifest
from kernel.mounts import Options
from kernel.rows import LAYOUTS, Submission, read_rows
from kernel.workers import collect, start_worker

FOUR = range(1, 5)


def grey(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 255, (64, 96), np.uint8)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 4))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six readable strips, 0.jpg to 5.jpg."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(6):
        cv2.imwrite(str(folder / f"{seed}.jpg"), grey(seed))
    return folder


@pytest.fixture
def dataset(tiny_bundle: Path) -> Path:
    return tiny_bundle / "dataset"


def rows_of(path: Path) -> dict[tuple[str, int], str]:
    return {(image, label): rle for image, label, rle in read_rows(path)[1]}


def predict(dataset: Path, images: Path, **options: Any) -> dict[str, Any]:
    options = {"output": images.parent / "submission.csv", **options}
    return inference.run(Options(bundle=dataset, images=images, **options))


def main(*arguments: object) -> int:
    """The command line in this process; its exit code."""
    try:
        inference.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


# --- hostile and broken strips --------------------------------------------------------------------


def encoded(suffix: str, image: np.ndarray) -> bytes:
    return bytes(cv2.imencode(suffix, image)[1])


def truncated(path: Path) -> None:
    data = encoded(".jpg", grey(9))
    path.write_bytes(data[: len(data) // 2])


def huge(path: Path) -> None:
    """20,000 × 20,000 in 50 kB: decoded it would be 400 MB."""
    PIL.Image.new("1", (20_000, 20_000)).save(path, "PNG")


def large(path: Path) -> None:
    """Not so large that Pillow itself would refuse its header."""
    PIL.Image.new("1", (10_000, 8_000)).save(path, "PNG")


def one_pixel(path: Path) -> None:
    """FPN's group norm takes no single value."""
    path.write_bytes(encoded(".png", grey(9)[:1, :1]))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "zero bytes": (lambda path: path.write_bytes(b""), "0 bytes that are no image"),
    "text": (lambda path: path.write_text("not an image"), "that are no image"),
    "a truncated JPEG": (truncated, "a JPEG that breaks off"),
    "20,000 × 20,000": (huge, "400000000 pixels"),
    "10,000 × 8,000": (large, "10000×8000 pixels"),
    "one pixel": (one_pixel, "the networks failed"),
    "a folder": (lambda path: path.mkdir(), "Is a directory"),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_strip_costs_its_own_rows_and_is_named(
    case: str, dataset: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = BROKEN[case]
    make(images / "b_a d.jpg")
    report = predict(dataset, images)
    assert list(report["faults"]) == ["b_a d.jpg"]
    assert reason in report["faults"]["b_a d.jpg"]
    assert any("b_a d.jpg stays empty" in line and reason in line for line in caplog.messages)
    rows = rows_of(images.parent / "submission.csv")
    assert len(rows) == 28
    assert not any(rows["b_a d.jpg", label] for label in FOUR)
    assert all(any(rows[f"{seed}.jpg", label] for label in FOUR) for seed in range(6))


def test_strips_that_are_all_broken_still_give_a_valid_submission(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(b"")
    output = tmp_path / "submission.csv"
    told = ["--bundle", dataset, "--images", tmp_path, "--output", output]
    assert main(*told) == 0
    assert "not one of 2 strips could be predicted" in caplog.text
    assert rows_of(output) == {(name, label): "" for name in ("1.jpg", "2.jpg") for label in FOUR}
    assert main(*told, "--strict") == 1


def test_a_huge_strip_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge(tmp_path / "huge.png")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="400000000 pixels"):
        read_image(tmp_path / "huge.png")


def wide(image: np.ndarray) -> np.ndarray:
    return image.astype(np.uint16) * 257


ODD: dict[str, Callable[[Path], object]] = {
    "PNG named .jpg": lambda path: path.write_bytes(encoded(".png", grey(9))),
    "BMP named .jpg": lambda path: path.write_bytes(encoded(".bmp", grey(9))),
    "16 bit": lambda path: path.write_bytes(encoded(".png", wide(grey(9)))),
    "RGBA": lambda path: path.write_bytes(
        encoded(".png", cv2.cvtColor(grey(9), cv2.COLOR_GRAY2BGRA))
    ),
    "CMYK": lambda path: PIL.Image.fromarray(grey(9)).convert("CMYK").save(path, "JPEG"),
    "a link to an image": lambda path: path.symlink_to("0.jpg"),
}


@pytest.mark.parametrize("name", ["odd.jpg", "ODD.JPG", "ö d_d 鋼.jpg"])
@pytest.mark.parametrize("case", ODD)
def test_an_odd_strip_is_predicted_like_any(
    case: str, name: str, dataset: Path, images: Path
) -> None:
    ODD[case](images / name)
    report = predict(dataset, images)
    assert not report["faults"]
    assert name in report["work"]
    assert len(rows_of(images.parent / "submission.csv")) == 28


@pytest.mark.parametrize("case", ["PNG named .jpg", "BMP named .jpg", "16 bit", "RGBA", "CMYK"])
def test_an_odd_strip_has_the_greys_of_the_plain_one(case: str, tmp_path: Path) -> None:
    ODD[case](tmp_path / "odd.jpg")
    found = read_image(tmp_path / "odd.jpg").astype(int)
    assert np.abs(found - grey(9)).max() <= (6 if case == "CMYK" else 1)  # JPEG rounds


def test_strict_makes_a_failed_strip_an_error_but_writes_everything(
    dataset: Path, images: Path
) -> None:
    (images / "3.jpg").write_bytes(b"")
    output = images.parent / "out.csv"
    common = ["--bundle", dataset, "--images", images, "--output", output]
    assert main(*common) == 0
    whole = output.read_bytes()
    assert main(*common, "--strict") == 1
    assert output.read_bytes() == whole


def test_rows_named_twice_and_strips_in_no_row_are_told(
    dataset: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sample = images.parent / "sample.csv"
    sample.write_text("ImageId,EncodedPixels,ClassId\n2.jpg,1 9,0\n2.jpg,1 9,0\n1.jpg,1 9,0\n")
    caplog.set_level(logging.INFO)
    predict(dataset, images, sample=sample)
    assert list(rows_of(images.parent / "submission.csv")) == [
        (name, label) for name in ("2.jpg", "1.jpg") for label in FOUR
    ]
    assert any("names 1 rows twice" in line for line in caplog.messages)
    assert any("4 files are in no row, 0.jpg" in line for line in caplog.messages)


# --- hostile and broken bundles -------------------------------------------------------------------


@pytest.fixture
def copied(dataset: Path, tmp_path: Path) -> Path:
    """A bundle of this test's own."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for path in dataset.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change(folder: Path, **changes: Any) -> None:
    path = folder / "ensemble.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_member(folder: Path, **changes: Any) -> None:
    members = json.loads((folder / "ensemble.json").read_text())["members"]
    change(folder, members=[members[0] | changes, *members[1:]])


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


def truncate(folder: Path) -> None:
    path = folder / "unet-a.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def duplicate(folder: Path) -> None:
    members = json.loads((folder / "ensemble.json").read_text())["members"]
    change(folder, members=[*members, members[0]])


def fewer_classes(folder: Path) -> None:
    change(folder, classes=3)


BUNDLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (flip_bit, "sha256"),
    "a truncated member": (truncate, "sha256"),
    "a header that lies": (lie_about_sizes, "no safetensors file"),
    "a member outside": (lambda f: change_member(f, file="../x.safetensors"), "not beside"),
    "an absolute path": (lambda f: change_member(f, file="/etc/passwd"), "not beside"),
    "a member twice": (duplicate, "two members named"),
    "other classes": (fewer_classes, "classes differ"),
    "a threshold of 1": (lambda f: change(f, threshold=1.0), "threshold 1.0"),
    "a threshold of 0": (lambda f: change(f, threshold=0), "threshold 0"),
    "an unknown format": (lambda f: change(f, format=7), "format 7"),
    "an unknown flip": (lambda f: change(f, flips=["none", "diagonal"]), "diagonal"),
    "no members": (lambda f: change(f, members=[]), "no members"),
}


@pytest.mark.parametrize("case", BUNDLES)
def test_the_kernel_refuses_a_bundle_with(
    case: str, copied: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, reason = BUNDLES[case]
    spoil(copied)
    output = images.parent / "out.csv"
    assert main("--bundle", copied, "--images", images, "--output", output) == 2
    [error] = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert reason in error
    assert str(copied) in error


@pytest.mark.parametrize("case", ["a flipped bit", "a truncated member", "a header that lies"])
def test_a_bad_member_is_left_out_only_where_that_is_allowed(
    case: str, copied: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    BUNDLES[case][0](copied)
    report = predict(copied, images, allow_missing_members=True)
    assert {work["passes"] for work in report["work"].values()} == {6}  # of nine
    assert any("going on without member unet-a" in line for line in caplog.messages)


def test_not_one_usable_member_is_an_error_even_where_members_may_miss(
    copied: Path, images: Path
) -> None:
    for path in copied.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="not one member is usable"):
        predict(copied, images, allow_missing_members=True)


class Runs:
    """A pickle that makes a file where code of it runs."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (os.system, (f"touch '{self.proof}'",))


@pytest.mark.skipif(
    not hasattr(torch.serialization, "safe_globals"), reason="packing pickles needs PyTorch 2.5"
)
def test_a_pickle_that_runs_code_does_not_run_and_stops_the_build(
    tiny_weights: Path, tmp_path: Path
) -> None:
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(Runs(proof)))  # it does run where it is unpickled
    assert proof.exists()
    proof.unlink()
    (tiny_weights / "evil.pt").write_bytes(pickle.dumps({"state_dict": Runs(proof)}, protocol=2))
    torch.save({"state_dict": Runs(proof)}, tiny_weights / "evil2.pt")
    entries = json.loads((tiny_weights / "ensemble.json").read_text())["members"]
    for name in ("evil.pt", "evil2.pt"):
        write_manifest(tiny_weights, [entries[0] | {"file": name}])
        with pytest.raises(ValueError, match=name):
            build_kernel.build(tiny_weights, tmp_path / "dist", owner="somebody")
        assert not proof.exists()


def test_a_member_that_is_a_link_out_of_the_folder_stops_the_build(
    tiny_weights: Path, tmp_path: Path
) -> None:
    member = tiny_weights / "unet-a.safetensors"
    member.rename(tmp_path / "outside.safetensors")
    member.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match=r"unet-a.*leaves"):
        build_kernel.build(tiny_weights, tmp_path / "dist", owner="somebody")


# --- faults under way -----------------------------------------------------------------------------


def test_a_read_only_output_is_an_error_before_the_first_strip(
    dataset: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's own read-only tree: permissions do not stop root."""
    monkeypatch.setattr("kernel.images.read_image", lambda *_: pytest.fail("read a strip"))
    arguments = ["--bundle", dataset, "--images", images, "--output", "/proc/submission.csv"]
    assert main(*arguments) == 2


def test_a_full_disk_is_an_error_before_the_first_strip(
    dataset: Path, images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Usage:
        free = 1_000_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    monkeypatch.setattr("kernel.images.read_image", lambda *_: pytest.fail("read a strip"))
    output = images.parent / "out.csv"
    assert main("--bundle", dataset, "--images", images, "--output", output) == 2
    assert "1 MB free" in caplog.messages[-1]


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    dataset: Path, images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    predict(dataset, images, output=images.parent / "whole.csv")
    write_text, calls = Path.write_text, [0]

    def full(path: Path, *arguments: Any, **named: Any) -> Any:
        calls[0] += path.name.endswith(".part")
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        return write_text(path, *arguments, **named)

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Submission, "SHARE", 1e9)  # a save after every strip
    predict(dataset, images)
    assert any("No space left" in line for line in caplog.messages)
    whole = (images.parent / "whole.csv").read_bytes()
    assert (images.parent / "submission.csv").read_bytes() == whole


def test_the_next_save_waits_for_a_hundred_times_what_the_last_one_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([1000.0, 1000.5])  # before and after
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    submission = Submission(tmp_path / "out.csv", LAYOUTS["2019"], [("a.jpg", 1)])
    submission.save()
    assert submission.next_s == 1050.5


def test_every_strip_that_is_done_is_on_disk_when_the_next_one_starts(
    dataset: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Submission, "SHARE", 1e9)  # a save costs less than its share here
    output, seen = images.parent / "submission.csv", []
    landed = Deadline.landed

    def spied(deadline: Deadline, passes: Any) -> None:
        seen.append(sum(1 for rle in rows_of(output).values() if rle))
        landed(deadline, passes)

    monkeypatch.setattr(Deadline, "landed", spied)
    predict(dataset, images)
    assert seen[0] == 0
    assert all(before < after for before, after in itertools.pairwise(seen))


def nan_on(
    monkeypatch: pytest.MonkeyPatch, half: str, member: str, strip: np.ndarray, flip: str
) -> None:
    """One member under one flip gives NaN for one strip."""
    original = getattr(Ensemble, half)
    wanted = turned(torch.from_numpy(strip)[None, None] / 255, flip)

    def encode(ensemble: Ensemble, number: int, images: torch.Tensor) -> Any:
        outputs = original(ensemble, number, images)
        name, its_flip = ensemble.names[number]
        seen = turned(images, its_flip)
        if (name, its_flip) == (member, flip) and torch.equal(seen, wanted):
            return (torch.full_like(outputs[0], float("nan")), *outputs[1:])
        return outputs

    def decode(ensemble: Ensemble, number: int, encoded: Any) -> Any:
        probabilities = original(ensemble, number, encoded)
        if ensemble.names[number] == (member, flip):
            probabilities[..., 3, 5] = float("nan")
        return probabilities

    monkeypatch.setattr(Ensemble, half, encode if half == "encode" else decode)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("half", ["encode", "decode"])
def test_a_pass_that_gives_nan_is_left_out_of_its_mean(
    half: str, early: bool, dataset: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    manifest = load_manifest(dataset)
    cpu = torch.device("cpu")
    ensemble = load_ensemble(dataset, manifest, cpu, Stages(), early_exit=early)
    image, probabilities = grey(2), []
    with torch.inference_mode():
        for number in range(9):
            encoded = ensemble.encode(number, ensemble.prepare(image))
            probabilities.append(ensemble.decode(number, encoded)[0].double())
    gone = 4
    kept = [value for number, value in enumerate(probabilities) if number != gone]
    expected = torch.stack(kept).mean(dim=0)
    member, flip = ensemble.names[gone]
    nan_on(monkeypatch, half, member, image, flip)
    found = ensemble([image])[0]
    clear = ((expected - manifest.threshold).abs() > 1e-5).numpy()
    np.testing.assert_array_equal(found[clear], (expected.numpy() > manifest.threshold)[clear])
    assert found.any()
    assert any("pass 4 gives NaN" in line for line in caplog.messages)


def test_a_strip_for_which_every_pass_gives_nan_stays_empty(
    dataset: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Ensemble.encode

    def black(folder: Path, name: str) -> Strip:
        strip = decode_strip(folder, name)
        return Strip(name, np.zeros((64, 96), np.uint8)) if name == "3.jpg" else strip

    def nan_of_black(ensemble: Ensemble, number: int, images: torch.Tensor) -> Any:
        outputs = encode(ensemble, number, images)
        return (outputs[0] / images.amax().clamp(max=1).sign().sub(0).where(
            images.amax() > 0, torch.tensor(float("nan"))), *outputs[1:])  # fmt: skip

    monkeypatch.setattr("kernel.predict.decode_strip", black)
    monkeypatch.setattr(Ensemble, "encode", nan_of_black)
    report = predict(dataset, images)
    assert report["faults"] == {"3.jpg": "every pass gave NaN"}
    assert len(report["work"]) == 5


def test_a_gpu_lost_half_way_leaves_its_strips_to_the_cpu(
    dataset: Path, images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No GPU here: the device that breaks down is a CPU that a switch makes fail."""
    expected = images.parent / "whole.csv"
    predict(dataset, images, output=expected)
    broken, strips = [False], [0]
    decode = Ensemble.decode

    def dies(ensemble: Ensemble, number: int, encoded: Any) -> Any:
        strips[0] += 1
        if strips[0] == 30 and not broken[0]:
            broken[0] = True
            raise RuntimeError("CUDA error: unspecified launch failure")
        return decode(ensemble, number, encoded)

    def fails_once(device: torch.device) -> bool:
        return works(device) and not (broken[0] and strips[0] == 30)

    monkeypatch.setattr(Ensemble, "decode", dies)
    monkeypatch.setattr("kernel.ensemble.works", fails_once)
    report = predict(dataset, images)
    assert not report["faults"]
    assert len(report["work"]) == 6
    [told] = [line for line in caplog.messages if "run on the CPU" in line]
    assert "launch failure" in told
    assert re.search(r"its last [1-5] images", told)  # what was done is not done again
    assert (images.parent / "submission.csv").read_bytes() == expected.read_bytes()


def test_out_of_memory_halves_the_batch_and_goes_on(
    dataset: Path, images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    predict(dataset, images, output=images.parent / "whole.csv", batch_size=2)
    encode = Ensemble.encode

    def small(ensemble: Ensemble, number: int, images: torch.Tensor) -> Any:
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return encode(ensemble, number, images)

    monkeypatch.setattr(Ensemble, "encode", small)
    report = predict(dataset, images, batch_size=8)
    assert not report["faults"]
    halvings = [line for line in caplog.messages if line.startswith("out of memory")]
    assert [line.split()[3] for line in halvings] == ["4", "2"]
    whole = (images.parent / "whole.csv").read_bytes()
    assert (images.parent / "submission.csv").read_bytes() == whole


# --- interruption ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_with_a_line_and_what_it_has_done(
    number: signal.Signals, workers: int, dataset: Path, images: Path, tmp_path: Path
) -> None:
    for index in range(300):
        (images / f"more_{index}.jpg").symlink_to("0.jpg")
    output, printed = tmp_path / "out.csv", tmp_path / "log.txt"
    command = [
        sys.executable,
        kernel_script(),
        "--bundle",
        dataset,
        "--images",
        images,
        "--output",
        output,
    ]
    command += ["--workers", str(workers)]
    with printed.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        give_up = time.monotonic() + 120
        while not (output.is_file() and b" " in output.read_bytes()):
            assert time.monotonic() < give_up, printed.read_text()
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == 130, printed.read_text()
    assert "interrupted" in printed.read_text()
    assert "Traceback" not in printed.read_text()
    rows = rows_of(output)
    assert len(rows) == 4 * 306
    assert 0 < sum(1 for rle in rows.values() if rle) < len(rows)


LAST_WORDS = """
import pathlib, signal, sys, time
folder, number = pathlib.Path(sys.argv[1]), sys.argv[2]
def end(*_):
    time.sleep(1)  # the pass that it is in
    rows = f"ImageId_ClassId,EncodedPixels\\n{number}.jpg_1,1 {number}\\n"
    (folder / f"{number}.csv").write_text(rows)
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
(folder / f"{number}.ready").touch()
time.sleep(60)
"""


def test_what_workers_do_in_their_last_second_stands_too(
    dataset: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run waits for its workers' end before it collects for the last time."""
    started = list[subprocess.Popen[bytes]]()

    def starts(run: Any, task: Any, folder: Path, shard: tuple[int, int]) -> Any:
        started.append(subprocess.Popen([sys.executable, "-c", LAST_WORDS, folder, str(shard[0])]))
        return started[-1]

    def interrupted(folder: Path, *arguments: Any) -> None:
        while len(list(folder.glob("*.ready"))) < 2:
            time.sleep(0.05)
        monkeypatch.setattr("kernel.workers.collect", collect)
        raise KeyboardInterrupt

    monkeypatch.setattr("kernel.workers.start_worker", starts)
    monkeypatch.setattr("kernel.workers.collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(dataset, images, workers=2)
    assert [worker.poll() for worker in started] == [130, 130]
    found = {pair: rle for pair, rle in rows_of(images.parent / "submission.csv").items() if rle}
    assert found == {("1.jpg", 1): "1 1", ("2.jpg", 1): "1 2"}


def test_a_worker_that_is_killed_costs_no_row(
    dataset: Path, images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    predict(dataset, images, output=images.parent / "whole.csv")

    def killed(*arguments: Any) -> Any:
        worker = start_worker(*arguments)
        if arguments[3] == (2, 2):
            worker.kill()
        return worker

    monkeypatch.setattr("kernel.workers.start_worker", killed)
    report = predict(dataset, images, workers=2)
    assert len(report["work"]) == 6
    assert any("worker 2 of 2 ended with exit code -9" in line for line in caplog.messages)
    whole = (images.parent / "whole.csv").read_bytes()
    assert (images.parent / "submission.csv").read_bytes() == whole


def test_weights_that_are_not_numbers_stop_the_build(tiny_weights: Path, tmp_path: Path) -> None:
    path = tiny_weights / "unet-a.safetensors"
    for value in (float("nan"), float("inf")):
        weights = load_file(path)
        key = next(key for key in weights if key.endswith("conv1.weight"))
        weights[key].view(-1)[0] = value
        save_file(weights, path)
        with pytest.raises(ValueError, match=rf"unet-a.*{key}"):
            build_kernel.build(tiny_weights, tmp_path / "dist", owner="somebody")
