"""The rehearsal: the tree it lays, what it reports, and the whole path without SMP or a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import site_without_smp
from test_projection import told

from kernel import dry_run
from kernel.contact_sheet import BAR, GAP
from kernel.manifest import load_manifest
from kernel.validate import decode_rle
from weights import steel

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny strips in the competition's layout, with test.csv."""
    folder = tmp_path_factory.mktemp("strips") / "steel"
    steel.write_competition(folder, train=0, test=3, seed=4, size=(64, 96))
    return folder


def rehearse(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command line, as its own process."""
    command = [sys.executable, str(ROOT / "kernel" / "dry_run.py"), "--bundle", bundle.name]
    return subprocess.run(
        [*command, *arguments], cwd=bundle.parent, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def rehearsed(
    tiny_bundle: Path, strips: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    bundle = tmp_path_factory.mktemp("rehearsed") / "dist"
    shutil.copytree(tiny_bundle, bundle)
    (bundle / "from_kaggle.json").write_text(json.dumps(told(device="cuda", workers=2)))
    options = {
        "--images": strips / "test_images",
        "--ground-truth": strips / "test.csv",
        "--calibrate": bundle / "from_kaggle.json",
        "--budget-s": 1,
    }
    return bundle, rehearse(bundle, *(str(word) for option in options.items() for word in option))


def test_a_rehearsal_leaves_submission_picture_and_report(
    rehearsed: tuple[Path, subprocess.CompletedProcess[str]], strips: Path
) -> None:
    bundle, ended = rehearsed
    assert ended.returncode == 0, ended.stderr
    rows = pd.read_csv(bundle / "report" / "submission.csv", dtype=str, keep_default_na=False)
    names = sorted(path.name for path in (strips / "test_images").iterdir())
    assert list(rows["ImageId"]) == [name for name in names for _ in range(4)]
    assert list(rows["ClassId"]) == ["1", "2", "3", "4"] * 3
    for row in (
        "start",
        "import",
        "load",
        "decode",
        "encoders",
        "decoders",
        "sums",
        "RLE",
        "write",
    ):
        assert f"   {row} " in ended.stdout
    for row in ("unet-a", "fpn-b", "unet-c", "none", "horizontal", "vertical"):
        assert f"   {row} " in ended.stdout
    assert "5,506 strips would take" in ended.stdout
    report = json.loads((bundle / "report" / "report.json").read_text())
    assert report["run"]["exit_code"] == 0
    assert report["run"]["network_denied"] == bool(dry_run.without_network())
    assert 50e6 < report["run"]["peak_bytes"] < 50e9  # PyTorch alone is more than the one
    run = json.loads((bundle / "report" / "run.json").read_text())
    assert report["run"]["seconds"] > run["seconds"]
    assert sum(row["share"] for row in report["stages"]) == pytest.approx(1)
    assert sum(row["encoders"] for row in report["passes"]) == sum(
        work["encoders"] for work in run["work"].values()
    )
    assert 0 < report["dice"]["dice"] < 1


def test_the_terminal_begins_with_the_verdict_and_ends_with_the_page(
    rehearsed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    bundle, ended = rehearsed
    report = json.loads((bundle / "report" / "report.json").read_text())
    page = (bundle / "report" / "index.html").read_text()
    assert (
        report["verdict"] == "A clean run, but too long here: passes would be left out"
    )  # the budget is one second
    assert f"\n== {report['verdict']}\n" in ended.stdout
    assert f"<h1>{report['verdict']}</h1>" in page
    assert page.count("data:image/jpeg;base64,") == 3
    assert "dist/report/index.html" in ended.stdout


def test_a_calibration_counts_at_once_and_stays(
    rehearsed: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    bundle, _ = rehearsed
    report = json.loads((bundle / "report" / "report.json").read_text())
    measured = {machine["machine"]: machine["measured"] for machine in report["machines"]}
    assert measured == {"2×T4": True, "one T4": False, "P100": False, "Kaggle's CPU": False}
    assert list(json.loads((bundle / "calibration.json").read_text())) == ["2×T4"]


def test_the_ground_truth_leads_to_a_proposal_and_changes_nothing_of_the_user_s(
    rehearsed: tuple[Path, subprocess.CompletedProcess[str]], tiny_bundle: Path
) -> None:
    bundle, ended = rehearsed
    proposal = load_manifest(bundle / "report")
    report = json.loads((bundle / "report" / "report.json").read_text())
    rows = {row["name"]: row for row in report["choice"]["variants"]}
    assert proposal.threshold == rows[report["choice"]["proposed"]]["best"]["threshold"]
    assert rows["all"]["dice"] == report["dice"]["dice"]  # every pass gives what the kernel gave
    assert "← proposed" in ended.stdout
    for folder in ("dataset", "kernel"):
        for path in (tiny_bundle / folder).iterdir():
            assert (bundle / folder / path.name).read_bytes() == path.read_bytes()


def test_the_picture_colours_just_the_masks_of_the_submission(
    rehearsed: tuple[Path, subprocess.CompletedProcess[str]], strips: Path
) -> None:
    bundle, _ = rehearsed
    sheet = cv2.imread(str(bundle / "report" / "contact_sheet.png"))
    assert sheet is not None
    rows = pd.read_csv(bundle / "report" / "submission.csv", keep_default_na=False)
    assert len(rows[rows.EncodedPixels != ""]) > 0
    for index, (_, group) in enumerate(rows.groupby("ImageId", sort=True)):
        found = np.any([decode_rle(rle, (64, 96)) for rle in group.EncodedPixels], axis=0)
        top = index * (BAR + 64 + GAP) + BAR
        drawn = sheet[top : top + 64, :96].astype(int)
        coloured = np.ptp(drawn, axis=2) > 0
        outlined = (drawn == 255).all(axis=2) | coloured  # outlines of the truth lie over masks
        assert (found & ~outlined).sum() == 0
        if not steel_truth(strips, str(group.ImageId.iloc[0])):
            np.testing.assert_array_equal(coloured, found)


def steel_truth(strips: Path, name: str) -> bool:
    """Whether a strip has any ground truth, and so outlines in the picture."""
    return name in (strips / "test.csv").read_text()


def test_the_tree_has_the_mounts_that_kaggle_makes(
    tiny_bundle: Path, strips: Path, tmp_path: Path
) -> None:
    dry_run.lay_tree(tmp_path, tiny_bundle, strips / "test_images")
    competition = tmp_path / "input" / "competitions" / "severstal-steel-defect-detection"
    slug = json.loads((tiny_bundle / "dataset" / "dataset-metadata.json").read_text())["id"]
    assert (tmp_path / "input" / "datasets" / slug / "ensemble.json").is_file()
    sample = (competition / "sample_submission.csv").read_text().splitlines()
    assert sample[0] == "ImageId,EncodedPixels,ClassId"
    assert len(sample) == 4
    assert all(line.endswith(",1 6144,0") for line in sample[1:])
    assert len(list((competition / "test_images").iterdir())) == 3


def test_a_bundle_that_is_not_built_is_told_with_the_remedy(tmp_path: Path) -> None:
    ended = rehearse(tmp_path / "nowhere")
    assert ended.returncode != 0
    assert "build_kernel.py" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_ground_truth_of_no_strips_is_told(tiny_bundle: Path, strips: Path) -> None:
    ended = rehearse(tiny_bundle, "--ground-truth", str(strips / "test.csv"))
    assert ended.returncode != 0
    assert "--ground-truth needs the --images" in ended.stderr


def test_a_kernel_that_fails_fails_the_rehearsal(
    tiny_bundle: Path, strips: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "dist"
    shutil.copytree(tiny_bundle, bundle)
    member = next((bundle / "dataset").glob("*.safetensors"))
    member.write_bytes(member.read_bytes()[:-1] + b"\0\0")
    ended = rehearse(bundle, "--images", str(strips / "test_images"))
    assert ended.returncode != 0
    assert f"{member.name}: sha256" in ended.stdout
    assert "exit code 2" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_rehearsal_of_strips_that_are_all_broken_is_a_report_of_that(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    images, bundle = tmp_path / "broken", tmp_path / "dist"
    images.mkdir()
    for name in ("1.jpg", "2.jpg"):
        (images / name).write_bytes(b"")
    shutil.copytree(tiny_bundle, bundle)
    ended = rehearse(bundle, "--images", str(images))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "not one of 2 strips could be predicted" in ended.stdout
    assert "== Not ready" in ended.stdout
    report = json.loads((bundle / "report" / "report.json").read_text())
    assert list(report["faults"]) == ["1.jpg", "2.jpg"]


def test_a_submission_that_kaggle_would_refuse_fails_the_rehearsal(
    tiny_bundle: Path, strips: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "dist"
    shutil.copytree(tiny_bundle, bundle)
    kernel = bundle / "kernel" / "inference.py"
    code = kernel.read_text()
    in_order = "for pair in pairs}"
    assert code.count(in_order) == 1
    kernel.write_text(code.replace(in_order, "for pair in list(pairs)[::-1]}"))
    ended = rehearse(bundle, "--images", str(strips / "test_images"))
    assert ended.returncode != 0
    assert "submission.csv is invalid: row (" in ended.stderr and "order" in ended.stderr


def test_the_whole_path_runs_without_smp_and_without_a_network(
    tiny_bundle: Path, strips: Path, tmp_path: Path
) -> None:
    deny = dry_run.without_network()
    if not deny:
        pytest.skip("this system does not allow a process to give up its network")
    dry_run.lay_tree(tmp_path, tiny_bundle, strips / "test_images")
    python = [getattr(sys, "_base_executable", sys.executable), "-S"]
    bare = {"PYTHONPATH": str(site_without_smp(tmp_path / "site")), "PATH": os.environ["PATH"]}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*deny, *python, *arguments],
            env=bare, cwd=tmp_path / "working", capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert "No module named" in run("-c", "import segmentation_models_pytorch").stderr
    assert "No module named" in run("-c", "import timm").stderr
    reach = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    assert "unreachable" in run("-c", reach).stderr
    kernel = str(tiny_bundle / "kernel" / "inference.py")
    ended = run(kernel, "--input", str(tmp_path / "input"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = pd.read_csv(tmp_path / "working" / "submission.csv", keep_default_na=False)
    assert len(rows) == 12
    assert (rows.EncodedPixels != "").any()
