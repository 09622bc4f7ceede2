"""The command: a whole build by the script, and bad input as one line and an exit code."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ROOT,
    all_bytes,
    edit_manifest,
    error_of,
    exit_code,
    random_network,
    run_script,
    tiny_entry,
    tiny_model,
    write_manifest,
)
from safetensors.torch import load_file

from build_kernel import main
from packing.wheels import WHEELS

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No user of the Kaggle client."""
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "nobody"))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))


def test_the_script_builds_a_flat_bundle_and_says_what_is_next(
    session_weights: Path, built_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dist"
    paths = ("--weights", session_weights, "--out", out)
    # beside the fixture's build: another process, another order of sets and hashes
    done = run_script(ROOT / "build_kernel.py", *paths, "--owner", "somebody", PYTHONHASHSEED="2")
    assert done.returncode == 0, done.stderr
    members = {"unet-a.safetensors", "fpn-b.safetensors", "unet-c.safetensors"}
    files = {
        "inference.py",
        "ensemble.json",
        "competition.json",
        "dataset-metadata.json",
        *members,
        *WHEELS,
    }
    assert {path.name for path in (out / "dataset").iterdir()} == files
    assert {path.name for path in (out / "kernel").iterdir()} == {
        "inference.py",
        "kernel-metadata.json",
    }
    assert all_bytes(out) == all_bytes(built_bundle)
    assert done.stdout.startswith(f"The members of {session_weights}:\n")
    _, _, told = done.stdout.partition("Next, for somebody:\n")
    assert told.startswith(f"  python evaluation/dry_run.py --bundle {out}\n")
    assert f"kaggle datasets create -p {out / 'dataset'}" in told
    assert f"kaggle kernels push -p {out / 'kernel'}" in done.stdout
    assert "-k somebody/severstal-steel-ensemble-submission -v VERSION" in done.stdout
    assert "still your-kaggle-name" not in done.stdout
    assert "430,296" in done.stdout  # parameters of the first member
    assert "a multiply-add counts as 2" in done.stdout


def test_an_ema_copy_of_lightning_in_a_subfolder_is_packed_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_network(tiny_model(), seed=5).state_dict()
    (tmp_path / "runs").mkdir()
    checkpoint = {"state_dict": {f"model.{k}": v * 2 for k, v in weights.items()}, "ema": weights}
    torch.save(checkpoint, tmp_path / "runs/last.ckpt")
    write_manifest(tmp_path, [tiny_entry("mine", tiny_model()) | {"file": "runs/last.ckpt"}])
    main(["--weights", str(tmp_path), "--out", str(tmp_path / "dist")])
    out = capsys.readouterr().out
    assert "took the EMA copy" in out
    assert "The owner is still your-kaggle-name" in out
    packed = load_file(tmp_path / "dist/dataset/mine.safetensors")
    key = "segmentation_head.0.weight"
    assert torch.equal(packed[key], weights[key].half())


def test_help_opens_with_a_real_command_line_a_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(main, "--help") == 0
    usage = capsys.readouterr().out.split("\n\n")[0]
    lines = [line.removeprefix("usage: ").split() for line in usage.splitlines()]
    assert all(words[:2] == ["python", "build_kernel.py"] for words in lines)
    assert [words[2] for words in lines] == ["--owner", "--fit", "--new-competition"]


# --- bad input: one clear line, exit code 2 -------------------------------------------------------


def second_member(**changes: Any) -> Edit:
    return lambda entries: entries["members"][1].update(changes)


def second_model(**changes: Any) -> Edit:
    return lambda entries: entries["members"][1]["model"].update(changes)


BAD: dict[str, tuple[Edit, str]] = {
    "a checkpoint that is not there": (
        second_member(file="gone.pt"),
        r"member fpn-b: .*gone\.pt: no such checkpoint; .*correct `file`",
    ),
    "a file above the folder": (
        second_member(file="../weights/../x.pt"),
        r"member fpn-b: file '\.\./weights/\.\./x\.pt' leaves .*weights; copy it there",
    ),
    "an absolute file": (second_member(file="/etc/passwd"), r"'/etc/passwd' leaves"),
    "a changed byte": (second_member(sha256="0" * 64), r"fpn-b\.safetensors: sha256 .*000000"),
    "a hash that is no text": (second_member(sha256=5), "member fpn-b: sha256 5, expected 64 "),
    "a file that is no text": (second_member(file=5), r"ensemble\.json: .*5.*expected text"),
    "a member that is no object": (
        lambda entries: entries["members"].append("fpn"),
        r"ensemble\.json: member 'fpn', expected an object",
    ),
    "members that are no list": (
        lambda entries: entries.update(members=None),
        r"ensemble\.json: members None, expected a list",
    ),
    "width before height": (
        lambda entries: entries.update(image_size=[1600, 256]),
        r"ensemble\.json: image_size \[1600, 256\]: .*\[256, 1600\], \[height, width\]: write",
    ),
    "a member's width before height": (
        second_member(image_size=[1600, 256]),
        r"member fpn-b: image_size \[1600, 256\]: the images of severstal",
    ),
    "an image of no machine": (
        lambda entries: entries.update(image_size=[256000, 1600000]),
        r"image_size \(256000, 1600000\), expected \[height, width\], whole numbers.* to 65,535",
    ),
    "a number of 400 digits": (
        second_member(std=[10**400]),
        r"std \[1000.*expected as many numbers as",
    ),
    "a name that no file has": (second_member(name="a\0b"), r"names and files .*a file's name may"),
    "a name that is no text": (
        second_member(name="a\ud800"),
        r"names and files .*a file's name may",
    ),
    "a slug in capitals": (
        lambda entries: entries.update(competition="Severstal-Steel-Defect-Detection"),
        r"slug 'Severstal-Steel-Defect-Detection', expected letters, digits, - and _",
    ),
    "an address": (
        lambda entries: entries.update(competition="https://www.kaggle.com/c/severstal"),
        r"slug 'https.*expected letters",
    ),
    "another competition without its description": (
        lambda entries: entries.update(competition="understanding_cloud_organization"),
        "competition understanding_cloud_organization has a description: give --competition clouds",
    ),
    "a softmax": (
        second_model(activation="softmax2d"),
        "member fpn-b: model's activation 'softmax2d'",
    ),
    "two names of one packed file": (
        lambda entries: [entries["members"][i].update(name=n) for i, n in ((0, "a b"), (1, "a-b"))],
        r"ensemble\.json: two members share .*a-b\.safetensors",
    ),
    "another architecture": (
        second_member(model=tiny_model("Unet")),
        r"fpn-b\.safetensors: .*decoder.*looks like FPN",
    ),
    "an architecture that SMP lacks": (
        second_model(arch="FPM"),
        "unknown architecture 'FPM'; the nearest is fpn",
    ),
    "an encoder that SMP lacks": (
        second_model(encoder_name="densnet201"),
        "unknown encoder.*densenet201",
    ),
    "a member without mean": (
        lambda entries: entries["members"][1].pop("mean"),
        r"ensemble\.json: member fpn-b: lacks mean",
    ),
    "no members": (
        lambda entries: entries.pop("members"),
        r"ensemble\.json: the manifest: lacks members",
    ),
    "a rule of the manifest": (
        lambda entries: entries.update(flips=["diagonal"]),
        r"ensemble\.json: flips .*diagonal",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(
    case: str, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, words = BAD[case]
    edit_manifest(tiny_weights, edit)
    assert exit_code(main, "--weights", tiny_weights, "--out", tmp_path / "dist") == 2
    assert re.search(words, error_of(capsys.readouterr().err))
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--resume: needs --fit; leave it out with a bundle"),
        (["--hours", 0], "--hours: needs --fit; leave it out with a bundle"),
        (["--members", "mine.txt"], "--members: needs --fit; leave it out with a bundle"),
        (["--images", "folder"], "--images: needs --new-competition; leave it out with a bundle"),
        (["--new-competition", "a.csv", "--notebook"], "--notebook: leave it out"),
        (["--new-competition", "a.csv", "--fit"], "--fit: leave it out with --new-competition"),
    ],
)
def test_an_option_that_would_not_be_read_is_refused(
    options: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(main, "--owner", "me", "--out", tmp_path / "dist", *options) == 2
    assert message in error_of(capsys.readouterr().err)
    assert not (tmp_path / "dist").exists()


def test_the_commands_that_come_next_can_be_pasted(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my out"
    assert exit_code(main, "--weights", tiny_weights, "--out", out, "--owner", "me") == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("  kaggle ")]
    kernel = "me/severstal-steel-ensemble-submission"
    assert commands[0] == ["kaggle", "datasets", "create", "-p", str(out / "dataset")]
    assert commands[3] == ["kaggle", "kernels", "status", kernel]


def test_a_missing_weights_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ("--weights", tmp_path / "nowhere", "--out", tmp_path / "dist")
    assert exit_code(main, *paths) == 2
    line = error_of(capsys.readouterr().err)
    assert line.startswith(f"{tmp_path / 'nowhere/ensemble.json'}: no such file; ")
    assert "--weights" in line
