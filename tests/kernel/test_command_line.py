"""The command line: what the script finds by itself, its exit codes and its line of an error."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import (
    LABELS,
    change_manifest,
    decode_by_hand,
    error_of,
    exit_code,
    read_submission,
    run_script,
    save_strips,
    tiny_entry,
    tiny_model,
    write_sample,
)
from oracle import assert_masks, mean_by_hand, threshold_of

from kernel import inference

# --- the script as a process ----------------------------------------------------------------------


def test_the_script_finds_everything_in_kaggles_tree(session_light: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "input" / "datasets" / "me" / "severstal-bundle"
    competition = tmp_path / "input" / "competitions" / "severstal-steel-defect-detection"
    shutil.copytree(session_light, dataset)
    names = ["b.jpg", "a.jpg"]
    images = save_strips(competition / "test_images", names)
    save_strips(competition / "train_images", ["x.jpg"])
    write_sample(competition / "sample_submission.csv", names)
    working = tmp_path / "working"
    working.mkdir()
    ended = run_script(dataset / "inference.py", "--input", tmp_path / "input", cwd=working)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert sorted(path.name for path in working.iterdir()) == ["run.json", "submission.csv"]
    rles = read_submission(working / "submission.csv")
    assert list(rles) == [(name, label) for name in names for label in LABELS]
    for name, image in images.items():
        mean = mean_by_hand(session_light, image)
        for label in LABELS:
            found = decode_by_hand(rles[name, label], (image.shape[0], image.shape[1]))
            assert_masks(found, mean[label - 1], threshold_of(session_light))
    record = json.loads((working / "run.json").read_text())
    non_empty = sum(map(bool, rles.values()))
    assert (record["strips"], record["rows"], record["non_empty"]) == (2, 8, non_empty)
    assert {"import", "load", "decode", "rle", "write"} <= set(record["stages"])
    assert record["networks"]["fpn"]["encoder"] > 0
    last = ended.stdout.splitlines()[-1]
    assert f"8 rows, {non_empty} non-empty masks, 0 strips failed" in last
    assert last.endswith("strips/s")


def test_the_script_ends_with_one_line_and_code_2_on_bad_input(
    session_light: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    script = session_light / "inference.py"
    ended = run_script(script, "--input", tmp_path / "empty", cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "no ensemble.json under" in error_of(ended.stderr)


def test_a_killed_run_leaves_a_complete_submission(session_light: Path, tmp_path: Path) -> None:
    names = [f"{i:03}.jpg" for i in range(400)]
    save_strips(tmp_path / "images", names[:1])
    for name in names[1:]:
        (tmp_path / "images" / name).symlink_to(tmp_path / "images" / names[0])
    output, printed = tmp_path / "submission.csv", tmp_path / "log.txt"
    words = ("--bundle", session_light, "--images", tmp_path / "images")
    command = [sys.executable, *map(str, (session_light / "inference.py", *words))]
    with printed.open("w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file)
        give_up = time.monotonic() + 60
        while "400 images of" not in printed.read_text() and time.monotonic() < give_up:
            time.sleep(0.02)
        time.sleep(0.1)  # some strips on the way
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, printed.read_text()
    assert "400 images of" in printed.read_text()
    assert list(read_submission(output)) == [(name, label) for name in names for label in LABELS]


# --- the command line in this process -------------------------------------------------------------


def test_bundle_and_images_are_taken_by_name(
    session_light: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, output = tmp_path / "some strips", tmp_path / "mine.csv"
    save_strips(images, ["b.jpg", "a.jpg"])
    (images / "a.jpg").write_bytes(b"")
    words = ("--bundle", session_light, "--images", images, "--output", output)
    assert exit_code(inference.main, *words) == 0
    rles = read_submission(output)
    assert list(rles) == [(name, label) for name in ("a.jpg", "b.jpg") for label in LABELS]
    assert not any(rles["a.jpg", label] for label in LABELS)
    assert any(rles["b.jpg", label] for label in LABELS)
    assert "a.jpg stays empty" in caplog.text
    assert list(json.loads((tmp_path / "run.json").read_text())["faults"]) == ["a.jpg"]


def test_strict_makes_a_failed_strip_an_error_but_writes_everything(
    session_light: Path, tmp_path: Path
) -> None:
    save_strips(tmp_path / "images", ["a.jpg", "b.jpg"])
    (tmp_path / "images" / "b.jpg").write_bytes(b"")
    output = tmp_path / "out.csv"
    words = ("--bundle", session_light, "--images", tmp_path / "images", "--output", output)
    assert exit_code(inference.main, *words) == 0
    whole = output.read_bytes()
    assert exit_code(inference.main, *words, "--strict") == 1
    assert output.read_bytes() == whole


def break_sample(_: Path, folder: Path) -> dict[str, Path]:
    (folder / "sample.csv").write_text("Id,Pixels\n1,2\n", encoding="utf-8")
    return {"sample": folder / "sample.csv"}


def break_member(bundle: Path, _: Path) -> dict[str, Path]:
    (bundle / "fpn.safetensors").write_bytes(b"12345678")
    return {}


def change_model(bundle: Path, **changes: object) -> dict[str, Path]:
    model = tiny_model("FPN", presence=False) | changes
    change_manifest(bundle, members=[tiny_entry("fpn", model)])
    return {}


BAD_INPUT: dict[str, tuple[Callable[[Path, Path], dict[str, Path]], str]] = {
    "a wrong header": (break_sample, "header Id,Pixels"),
    "a wrong member": (break_member, "no safetensors file"),
    "an unknown encoder": (lambda b, _: change_model(b, encoder_name="resnet35"), "resnet35"),
    "an unknown architecture": (lambda b, _: change_model(b, arch="Unett"), "Unett"),
    "an unknown argument of the model": (
        lambda b, _: change_model(b, decoder_width=3),
        "decoder_width",
    ),
    "an output folder that is not there": (
        lambda _, folder: {"output": folder / "not-there" / "out.csv"},
        "not-there",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_exit_code_2_and_one_line_for(
    case: str, light_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_strips(tmp_path / "images", ["a.jpg"])
    spoil, message = BAD_INPUT[case]
    options = {
        "bundle": light_bundle,
        "images": tmp_path / "images",
        "output": tmp_path / "out.csv",
    } | spoil(light_bundle, tmp_path)
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    assert exit_code(inference.main, *words) == 2
    assert message in error_of(capsys.readouterr().err)
