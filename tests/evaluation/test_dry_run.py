"""The dry run: what it leaves, how a run is judged, and what it refuses before one."""

import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers import (
    ROOT,
    Page,
    all_bytes,
    decode_by_hand,
    error_of,
    exit_code,
    may_deny_network,
    read_table,
    run_script,
    save_strips,
    write_sample,
)
from run_records import PASSES, a_record, repeat, run_json, strip_work

from evaluation import dry_run
from evaluation.checks import Check, ProcessResult
from evaluation.recorded import RecordedPasses
from kernel.competition import SEVERSTAL
from kernel.contact_sheet import BAR, GAP
from kernel.files import write_json
from kernel.image_folders import list_images
from kernel.inference import run_options
from kernel.manifest import Manifest, MemberSpec, load_manifest
from kernel.options import Options
from kernel.rows import SPREADSHEET_CELL
from packing.metadata import PLACEHOLDER, read_metadata
from packing.notebook import build_notebook
from packing.paths import DATASET_METADATA, KERNEL_METADATA, NOTEBOOK, SCRIPT
from packing.wheels import OPENVINO_WHEEL, WHEELS, fetch_wheels
from training.synthetic import Drawing, write_competition


@pytest.fixture(scope="module")
def strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tiny strips in the competition's layout, with test.csv."""
    folder = tmp_path_factory.mktemp("strips") / "steel"
    write_competition(folder, Drawing(4, (64, 96)), test=3)
    return folder


@dataclass(frozen=True)
class DryRun:
    """A dry run that has ended, and its bundle."""

    bundle: Path
    done: subprocess.CompletedProcess[str]

    @property
    def report(self) -> dict[str, Any]:
        """What report.json holds."""
        report: dict[str, Any] = json.loads((self.bundle / "report" / "report.json").read_text())
        return report


@pytest.fixture(scope="module")
def rehearsed(built_bundle: Path, strips: Path, tmp_path_factory: pytest.TempPathFactory) -> DryRun:
    """The real command line, as its own process, with every option that needs a path."""
    bundle = tmp_path_factory.mktemp("rehearsed") / "dist"
    shutil.copytree(built_bundle, bundle)
    passes = [entry | {"flops": [10**12, 10**12]} for entry in PASSES]  # a fast machine
    from_kaggle = repeat(run_json(device="cuda", workers=2, passes=passes))
    (bundle / "from_kaggle.json").write_text(json.dumps(from_kaggle))
    done = run_script(
        ROOT / "evaluation" / "dry_run.py",
        *("--bundle", bundle.name, "--images", strips / "test_images"),
        *("--ground-truth", strips / "test.csv", "--calibrate", bundle / "from_kaggle.json"),
        cwd=bundle.parent,
    )
    return DryRun(bundle, done)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny bundle, of this test's own; that it has no wheels counts for nothing."""
    monkeypatch.setattr("evaluation.checks.WHEELS", {})
    return Path(shutil.copytree(tiny_bundle, tmp_path / "dist"))


def run_here(root: Path, *_: Any, **__: Any) -> ProcessResult:
    """Run the kernel as `run_kernel` does, in this process, where all is imported already."""
    with contextlib.chdir(root / "working"):
        code = run_options(Options(input=root / "input"))
    return ProcessResult(code, 25.0, False, 1)


# --- what it leaves -------------------------------------------------------------------------------


def test_a_dry_run_leaves_submission_picture_and_report(rehearsed: DryRun, strips: Path) -> None:
    bundle, done = rehearsed.bundle, rehearsed.done
    assert done.returncode == 0, done.stderr
    rows = read_table(bundle / "report" / "submission.csv")
    names = sorted(path.name for path in (strips / "test_images").iterdir())
    assert list(rows["ImageId"]) == [name for name in names for _ in range(4)]
    assert list(rows["ClassId"]) == ["1", "2", "3", "4"] * 3
    stages = ("start", "import", "load", "decode", "encoders", "decoders", "sums", "RLE", "write")
    for row in stages:
        assert f"   {row} " in done.stdout
    for row in ("unet-a", "fpn-b", "unet-c", "none", "horizontal", "vertical"):
        assert f"   {row} " in done.stdout
    assert "5,506 strips would take" in done.stdout
    report = rehearsed.report
    assert report["run"]["exit_code"] == 0
    assert report["run"]["network_denied"] == may_deny_network()
    assert 50e6 < report["run"]["peak_bytes"] < 50e9  # PyTorch alone is more than the one
    run = json.loads((bundle / "report" / "run.json").read_text())
    assert report["run"]["seconds"] > run["seconds"]
    seconds = {row["stage"]: row["seconds"] for row in report["stages"]}
    assert seconds["start"] == pytest.approx(report["run"]["seconds"] - run["seconds"])
    assert min(seconds.values()) >= 0
    assert sum(row["encoders"] for row in report["passes"]) == sum(
        len(work["encoders"]) for work in run["work"].values()
    )
    assert 0 < report["dice"]["dice"] < 1


def test_the_report_on_the_terminal_begins_and_ends_with_the_verdict(rehearsed: DryRun) -> None:
    report, stdout = rehearsed.report, rehearsed.done.stdout
    page = (rehearsed.bundle / "report" / "index.html").read_text()
    assert report["verdict"].startswith("Ready for Kaggle: the run was clean, and 2×T4 would take")
    assert report["budget_s"] == 3600
    assert f"\n\n== {report['verdict']}\n\n   The run was clean\n" in stdout
    assert stdout.endswith(f"\n\n== {report['verdict']}\n")
    assert f"<h1>{report['verdict']}</h1>" in page
    assert page.count("data:image/jpeg;base64,") == 3
    assert "dist/report/index.html" in stdout


def test_a_calibration_counts_at_once_and_stays(
    rehearsed: DryRun,
) -> None:
    bundle = rehearsed.bundle
    report = rehearsed.report
    calibrated = {machine["machine"]: machine["calibrated"] for machine in report["machines"]}
    assert calibrated == {"2×T4": True, "one T4": False, "Kaggle's CPU": False}
    assert list(json.loads((bundle / "calibration.json").read_text())) == ["2×T4"]


def test_the_ground_truth_leads_to_a_proposal_and_changes_nothing_of_the_user_s(
    rehearsed: DryRun, built_bundle: Path
) -> None:
    bundle, done = rehearsed.bundle, rehearsed.done
    proposal = load_manifest(bundle / "report")
    report = rehearsed.report
    rows = {row["name"]: row for row in report["ablation"]["variants"]}
    assert proposal.threshold == rows[report["ablation"]["proposed"]]["best"]["threshold"]
    assert rows["all"]["dice"] == report["dice"]["dice"]  # every pass gives what the kernel gave
    assert "← proposed" in done.stdout
    for folder in ("dataset", "kernel"):
        assert all_bytes(bundle / folder) == all_bytes(built_bundle / folder)


def test_the_picture_colours_just_the_masks_of_the_submission(
    rehearsed: DryRun, strips: Path
) -> None:
    bundle = rehearsed.bundle
    sheet = cv2.imread(str(bundle / "report" / "contact_sheet.png"))
    assert sheet is not None
    rows = read_table(bundle / "report" / "submission.csv")
    assert len(rows[rows.EncodedPixels != ""]) > 0
    for index, (_, group) in enumerate(rows.groupby("ImageId", sort=True)):
        found = np.any([decode_by_hand(rle, (64, 96)) for rle in group.EncodedPixels], axis=0)
        top = index * (BAR + 64 + GAP) + BAR
        drawn = sheet[top : top + 64, :96].astype(int)
        coloured = np.ptp(drawn, axis=2) > 0
        outlined = (drawn == 255).all(axis=2) | coloured  # outlines of the truth lie over masks
        assert (found & ~outlined).sum() == 0
        if not has_truth(strips, str(group.ImageId.iloc[0])):
            np.testing.assert_array_equal(coloured, found)


def has_truth(strips: Path, name: str) -> bool:
    """Whether a strip has any ground truth, and so outlines in the picture."""
    return name in (strips / "test.csv").read_text()


# --- how it is judged -----------------------------------------------------------------------------


def test_a_mask_as_long_as_a_spreadsheets_cell_is_in_the_report(tmp_path: Path) -> None:
    save_strips(tmp_path / "images", ["a.jpg"])
    run = dry_run.DryRun(tmp_path, Manifest([]), tmp_path / "images", None, None, False)
    run.out.mkdir()
    rows = f"ImageId,EncodedPixels,ClassId\na.jpg,{'1 3'.ljust(SPREADSHEET_CELL)},1\n"
    (run.out / "submission.csv").write_text(rows)
    record = a_record(work={"a.jpg": strip_work([0], [0])}, faults={})
    report = dry_run._report_on(run, record, ProcessResult(0, 20.0, True, 1), [])
    assert report.histogram["encoders"]["defective"] == [0, 1, 0, 0, 0]


def test_a_bundle_with_openvino_is_run_without_it_too(
    bundle: Path, strips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its halves are left out of that run, whose log is shown only where it fails."""
    for name in ("unet-a.encoder.xml", "unet-a.encoder.bin", "unet-a.reference"):
        (bundle / "dataset" / name).write_text("torn", encoding="utf-8")
    images = strips / "test_images"
    name = list_images(images)[0]
    good = dry_run.check_on_pytorch(tmp_path / "good", bundle, images, name)
    assert good.ok and "on PyTorch" in good.words
    assert not list((tmp_path / "good").rglob("unet-a.encoder.*"))
    assert "training  median area" not in capfd.readouterr().out
    [sample] = (tmp_path / "good").rglob("sample_submission.csv")
    assert len(read_table(sample)) == 1
    with (bundle / "dataset" / "unet-a.safetensors").open("ab") as file:
        file.write(b" ")
    bad = dry_run.check_on_pytorch(tmp_path / "bad", bundle, images, name)
    assert bad.ok is False
    assert bad.words == "without OpenVINO, as where there is a GPU, it ended with exit code 2"
    assert "changed after it was hashed" in capfd.readouterr().out


def test_a_run_without_openvino_that_this_machine_has_no_memory_for_decides_nothing(
    tiny_bundle: Path, strips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = ProcessResult(-9, 1.0, True, 1)
    monkeypatch.setattr(dry_run, "run_kernel", lambda *_, **__: killed)
    images = strips / "test_images"
    check = dry_run.check_on_pytorch(tmp_path, tiny_bundle, images, list_images(images)[0])
    assert check.ok is None
    assert "it was ended by signal 9, as by a system that is short of memory" in check.words


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (run_json(faults={}), "the members load on PyTorch, too, as where there is a GPU"),
        (
            run_json(),
            "without OpenVINO, as where there is a GPU, strips that failed: 1; the first: 4.jpg",
        ),
        (None, "without OpenVINO, as where there is a GPU, the kernel left no run.json: a pass"),
    ],
    ids=["clean", "a strip that fails", "a run that its watchdog ended"],
)
def test_a_run_without_openvino_is_judged_by_its_record_too(
    record: dict[str, Any] | None,
    words: str,
    tiny_bundle: Path,
    strips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its exit code is 0 whatever became of the image."""

    def leave_record(root: Path, *_: Any, **__: Any) -> ProcessResult:
        if record:
            (root / "working" / "run.json").write_text(json.dumps(record))
        return ProcessResult(0, 1.0, True, 1)

    monkeypatch.setattr(dry_run, "run_kernel", leave_record)
    images = strips / "test_images"
    check = dry_run.check_on_pytorch(tmp_path, tiny_bundle, images, list_images(images)[0])
    assert check.words.startswith(words)
    assert check.ok is (record is not None and not record["faults"])


def concluded(folder: Path) -> tuple[dry_run.DryRun, Path, Path]:
    """A bundle that ran on four strips, its sample, and the folder with its answer."""
    names = [f"{index}.jpg" for index in range(1, 5)]
    save_strips(folder / "test_images", names)
    sample = write_sample(folder / "sample.csv", names, "three-column")
    run = dry_run.DryRun(folder, Manifest([]), folder / "test_images", None, None, False)
    working = folder / "working"
    for each in (run.dataset, run.out, working):
        each.mkdir()
    for wheel in fetch_wheels():
        shutil.copy(wheel, run.dataset)
    metadata = read_metadata("somebody", Manifest([]))
    (folder / "kernel").mkdir()
    write_json(run.dataset / DATASET_METADATA.name, metadata.dataset)
    write_json(folder / "kernel" / KERNEL_METADATA.name, metadata.kernel)
    answer = f"{sample.read_text().splitlines()[0]}\n1.jpg,1 3,1\n"
    (working / "submission.csv").write_text(answer)
    return run, sample, working


@pytest.mark.parametrize(
    ("changes", "openvino", "rehearsed_too"),
    [({}, True, True), ({}, False, False), ({"device": "cuda"}, True, False)],
    ids=["OpenVINO ran them", "PyTorch ran them", "a GPU ran them"],
)
def test_where_openvino_ran_the_members_pytorch_is_rehearsed_and_decides_too(
    changes: dict[str, Any],
    openvino: bool,
    rehearsed_too: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def check_on_pytorch(_: Path, __: Path, ___: Path, name: str) -> Check:
        tried.append(name)
        return Check(False, "a member does not load")

    tried = list[str]()
    monkeypatch.setattr(dry_run, "check_on_pytorch", check_on_pytorch)
    monkeypatch.setattr("evaluation.checks.OPENVINO_WHEEL", {})
    run, sample, working = concluded(tmp_path)
    if openvino:
        (run.dataset / "unet-a.encoder.xml").write_text("torn")
    record = run_json(faults={}, **changes)
    (working / "run.json").write_text(json.dumps(record))
    code = dry_run._conclude(run, working, ProcessResult(0, 25.0, True, 1), sample)
    assert (tried, code) == ((["1.jpg"], 1) if rehearsed_too else ([], 0))
    assert ("NO  a member does not load" in capsys.readouterr().out) == rehearsed_too


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"enable_gpu": False, "machine_shape": ""}, 0,
         "–   enable_gpu is false: judged on Kaggle's CPU"),
        ({"enable_gpu": False, "machine_shape": "None"}, 0,
         "–   enable_gpu is false: judged on Kaggle's CPU"),
        ({"enable_gpu": False}, 0,
         "–   enable_gpu is false, but machine_shape overrides it: for Kaggle's CPU empty both"),
        ({"enable_gpu": False, "machine_shape": "NvidiaTeslaP100"}, 1,
         "NO  {}: machine_shape 'NvidiaTeslaP100' is not 'NvidiaTeslaT4'; write "
         '"machine_shape": "NvidiaTeslaT4"'),
        ({"enable_internet": True}, 1,
         'NO  {}: enable_internet True is not False; write "enable_internet": false'),
        ({"id": f"{PLACEHOLDER}/severstal-steel-ensemble-submission"}, 0,
         f"–   the owner is still {PLACEHOLDER}: build again with --owner NAME"),
        ({"id": "another/severstal-steel-ensemble-submission"}, 0,
         "–   the dataset is somebody's, the kernel another's, who needs access to it"),
    ],
    ids=[
        "a GPU that was switched off", "as it is pulled", "a GPU that was not", "another GPU",
        "the internet", "nobody's yet", "another's",
    ],
)  # fmt: skip
def test_the_kernel_s_metadata_is_rehearsed_too(
    changes: dict[str, Any],
    code: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, sample, working = concluded(tmp_path)
    path = tmp_path / "kernel" / KERNEL_METADATA.name
    write_json(path, json.loads(path.read_text()) | changes)
    (working / "run.json").write_text(json.dumps(run_json(faults={})))
    assert dry_run._conclude(run, working, ProcessResult(0, 25.0, True, 1), sample) == code
    printed = capsys.readouterr().out
    assert f"   {words.format(path)}\n" in printed
    report = json.loads((run.out / "report.json").read_text(encoding="utf-8"))
    on_cpu = changes.get("machine_shape") in ("", "None")
    judged = "Kaggle's CPU" if on_cpu else "2×T4"
    assert report["kaggle"]["machine"] == judged


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"title": "abc"}, "title 'abc' has 3 characters"), ({"licenses": ["CC0-1.0"]}, "")],
)
def test_the_dataset_s_metadata_is_rehearsed_too(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, sample, working = concluded(tmp_path)
    path = run.dataset / DATASET_METADATA.name
    write_json(path, json.loads(path.read_text()) | changes)
    (working / "run.json").write_text(json.dumps(run_json(faults={})))
    assert dry_run._conclude(run, working, ProcessResult(0, 25.0, True, 1), sample) == 1
    assert f"   NO  {path}: {words}" in capsys.readouterr().out


def test_a_dataset_without_a_whole_wheel_is_not_ready(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here the kernel finds what is installed: it ran."""
    run, sample, working = concluded(tmp_path)
    gone, torn = WHEELS
    [openvino] = OPENVINO_WHEEL
    (run.dataset / "unet-a.encoder.xml").touch()
    (run.dataset / gone).unlink()
    (run.dataset / torn).write_bytes((run.dataset / torn).read_bytes()[:-1])
    (working / "run.json").write_text(json.dumps(run_json(faults={}, device="cuda")))
    assert dry_run._conclude(run, working, ProcessResult(0, 25.0, True, 1), sample) == 1
    assert f"NO  {run.dataset} lacks {gone}, {torn}, {openvino}, or" in capsys.readouterr().out


def test_flops_of_another_size_are_counted_again_and_odd_proportions_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, sample, working = concluded(tmp_path)
    (working / "run.json").write_text(json.dumps(run_json(faults={})))
    a, b = (MemberSpec(name, f"{name}.safetensors", {}, [0.5], [0.5]) for name in "ab")
    run = replace(run, manifest=Manifest([a, replace(b, image_size=(64, 24))]))
    counts = {"a": [0, 0]}, {"a": [10**13, 10**13]}
    seconds = []
    for counted in counts:
        monkeypatch.setattr(dry_run, "count_again", lambda *given, to=counted: given and to)
        assert dry_run._conclude(run, working, ProcessResult(0, 25.0, True, 1), sample) in (0, 1)
        report = json.loads((run.out / "report.json").read_text())
        seconds.append(report["machines"][1]["seconds"])
    # a's halves ran 6 and 4 times for 4 strips; 0.5 of this size's flops a second
    assert seconds[1] - seconds[0] == pytest.approx(5506 * 10 / 4 * 10**13 / (65e12 * 0.15 * 0.9))
    out = capsys.readouterr().out
    assert "   –   images are resized from 64×96 to 64×24, out of proportion: for a member" in out
    assert "   –   most images are 64×96, the build counted flops at 256×1600: they were" in out


def test_the_seconds_that_only_the_process_had_are_its_start(tmp_path: Path) -> None:
    run, sample, working = concluded(tmp_path)
    (working / "run.json").write_text(json.dumps(run_json(faults={}, seconds=20.0)))
    assert dry_run._conclude(run, working, ProcessResult(0, 25.0, True, 1), sample) == 0
    report = json.loads((run.out / "report.json").read_text())
    assert report["stages"][0] == {"stage": "start", "seconds": 5.0, "share": 0.2}


def test_an_ablation_is_kept_from_the_next_dry_run(tmp_path: Path) -> None:
    run, *_ = concluded(tmp_path)
    for name in ("report.json", "ensemble.json"):
        (run.out / name).write_text("of the ablation")
    for _ in range(2):  # the second run finds a report that has none
        dry_run._clear(run)
        assert not list(run.out.iterdir())
        before = all_bytes(tmp_path / "report-before")
        assert sorted(map(str, before)) == ["ensemble.json", "report.json"]
        (run.out / "report.json").write_text("of a run without one")


def test_strips_that_were_drawn_are_called_that_and_propose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_run, "ablate", lambda *_: pytest.fail("there is no truth of a user's"))
    run, sample, working = concluded(tmp_path)
    (working / "run.json").write_text(json.dumps(run_json(faults={})))
    for drawn in (True, False):
        run = replace(run, drawn=drawn, truth={} if drawn else None)
        assert dry_run._conclude(run, working, ProcessResult(0, 25.0, True, 1), sample) == 0
        out = capsys.readouterr().out
        assert ("–   these 4 strips were drawn: real ones differ in Dice" in out) == drawn
        assert ("Dice of drawn strips" in out) == drawn
        assert json.loads((run.out / "report.json").read_text())["drawn"] is drawn
        page = Page((run.out / "index.html").read_text())
        assert ("mean Dice, drawn strips" in page.said("dt")) == drawn


@pytest.mark.parametrize("drawn", [True, False])
def test_the_size_of_strips_that_are_drawn_without_one_says_nothing(
    drawn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_run, "count_again", lambda *_: {})
    run, sample, working = concluded(tmp_path)
    (working / "run.json").write_text(json.dumps(run_json(faults={})))
    member = MemberSpec("a", "a.safetensors", {}, [0.5], [0.5], image_size=(64, 24))
    other = replace(SEVERSTAL, image_size=None)
    run = replace(run, manifest=Manifest([member], competition=other), drawn=drawn)
    assert dry_run._conclude(run, working, ProcessResult(0, 25.0, True, 1), sample) == 0
    out = capsys.readouterr().out
    assert ("out of proportion" in out) is not drawn
    assert ("differ in size (the description has no image_size), Dice" in out) is drawn


@pytest.mark.parametrize("given", [True, False])
def test_strips_are_drawn_where_none_are_given(
    given: bool, bundle: Path, strips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = list[dry_run.DryRun]()
    monkeypatch.setattr(dry_run, "run_kernel", lambda *_: ProcessResult(0, 25.0, True, 1))
    monkeypatch.setattr(dry_run, "_conclude", lambda run, *_: runs.append(run))
    options = ["--images", strips / "test_images"] if given else ["--strips", 1]
    assert exit_code(dry_run.main, "--bundle", bundle, *options) == 0
    assert [run.drawn for run in runs] == [not given]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--bundle", "nowhere"], "nowhere/dataset/ensemble.json: no such file; build the bundle"),
        (["--bundle", "."], ".: the dataset of a bundle; name the folder above it"),
        (["--ground-truth", "test.csv"], "--ground-truth needs the --images that it is of"),
        (["--images", "nowhere"], "nowhere: no such folder of images"),
        (["--images", "."], ".: no images in it; name the folder that has them"),
        (["--calibrate", "ensemble.json"], "ensemble.json: not a run.json of this kernel"),
        (["--strips", "0"], "--strips 0: expected 1 or more"),
        (["--budget-s", "-5"], "--budget-s -5: expected seconds above 0"),
        (["--budget-s", "nan"], "--budget-s nan: expected seconds above 0"),
        (["--budget-s", "inf"], "--budget-s inf: expected seconds above 0"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    arguments: list[str], error: str, bundle: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(bundle / "dataset")
    monkeypatch.setattr(dry_run, "run_kernel", lambda *_: pytest.fail("it ran"))
    assert exit_code(dry_run.main, "--bundle", bundle, *arguments) == 2
    assert error_of(capsys.readouterr().err).startswith(error)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ("NAME,1,900000 5\n", "{}: the masks of NAME: run 900000 5 leaves an image"),
        ("", "{}: no row below its header; name the csv that has the masks"),
    ],
    ids=["a mask that leaves its image", "no row: every strip would count as clean"],
)
def test_a_ground_truth_that_is_none_is_refused_before_anything_runs(
    row: str,
    error: str,
    bundle: Path,
    strips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(dry_run, "run_kernel", lambda *_: pytest.fail("it ran"))
    images, truth = strips / "test_images", tmp_path / "truth.csv"
    name = min(path.name for path in images.iterdir())
    truth.write_text(f"ImageId,ClassId,EncodedPixels\n{row}".replace("NAME", name))
    given = ("--images", images, "--ground-truth", truth)
    assert exit_code(dry_run.main, "--bundle", bundle, *given) == 2
    line = error_of(capsys.readouterr().err)
    assert line.startswith(error.format(truth).replace("NAME", name))


def test_a_sample_beside_the_images_that_the_description_does_not_fit_is_refused(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The kernel gets one that is written as the description says."""
    monkeypatch.setattr(dry_run, "_run_bundle", lambda *_: 0)
    save_strips(tmp_path / "test_images", ["a.jpg"])
    given = ("--bundle", bundle, "--images", tmp_path / "test_images")
    sample = write_sample(tmp_path / "sample_submission.csv", ["a.jpg"], "three-column")
    assert exit_code(dry_run.main, *given) == 0
    sample.write_text("id,rle\na.jpg,\n")
    assert exit_code(dry_run.main, *given) == 2
    assert error_of(capsys.readouterr().err).startswith(f"{sample}: line 1: header id,rle, ")


def test_on_windows_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    script = runpy.run_path(str(ROOT / "evaluation" / "dry_run.py"))
    monkeypatch.setattr(sys, "platform", "win32")
    assert exit_code(script["main"]) == 2
    assert error_of(capsys.readouterr().err).endswith("run it in WSL")


def test_metadata_without_an_id_is_one_line(
    bundle: Path, strips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "dataset" / "dataset-metadata.json").write_text("{}")
    images = strips / "test_images"
    assert exit_code(dry_run.main, "--bundle", bundle, "--images", images) == 2
    assert "dataset-metadata.json: lacks id; build the bundle" in error_of(capsys.readouterr().err)


# --- runs that are not clean ----------------------------------------------------------------------


def test_a_kernel_that_fails_is_not_ready(
    bundle: Path, strips: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    member = next((bundle / "dataset").glob("*.safetensors"))
    member.write_bytes(member.read_bytes()[:-1] + b"\0\0")
    (bundle / "report").mkdir()
    (bundle / "report" / "report.json").write_text("of an earlier run")
    images = strips / "test_images"
    assert exit_code(dry_run.main, "--bundle", bundle, "--images", images) == 1
    captured = capfd.readouterr()
    assert f"{member.name}: sha256" in captured.err
    assert "== Not ready for Kaggle: the kernel ended with exit code 2" in captured.out
    assert "Traceback" not in captured.err + captured.out
    assert not list((bundle / "report").iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--layout two-column"], 1, "Not ready for Kaggle: the kernel ended with exit code 2"),
        (["--layout", "two-column"], 0, "its header is ImageId_ClassId,EncodedPixels, as --layout"),
    ],
    ids=["one word", "two words"],
)
def test_a_notebook_is_run_with_the_arguments_in_it(
    arguments: list[str], code: int, words: str, bundle: Path, strips: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    script = bundle / "kernel" / SCRIPT.name
    text = json.dumps(build_notebook(script.read_text(encoding="utf-8")))
    given = json.dumps(json.dumps(arguments))[1:-1]
    notebook = text.replace("ARGUMENTS: list[str] = []", f"ARGUMENTS: list[str] = {given}")
    script.unlink()
    (bundle / "kernel" / NOTEBOOK).write_text(notebook, encoding="utf-8")
    path = bundle / "kernel" / KERNEL_METADATA.name
    entries = {"code_file": NOTEBOOK, "kernel_type": "notebook"}
    write_json(path, json.loads(path.read_text()) | entries)
    images = strips / "test_images"
    assert exit_code(dry_run.main, "--bundle", bundle, "--images", images) == code
    assert words in capfd.readouterr().out


def test_a_run_that_its_watchdog_ended_is_not_ready(
    bundle: Path,
    strips: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It leaves a valid submission and exit code 0, and no run.json, as a full disk does."""

    def hang(root: Path, *_: Any) -> ProcessResult:
        result = run_here(root)
        (root / "working" / "run.json").unlink()
        return result

    monkeypatch.setattr(dry_run, "run_kernel", hang)
    assert exit_code(dry_run.main, "--bundle", bundle, "--images", strips / "test_images") == 1
    captured = capfd.readouterr()
    why = "a pass hung until its watchdog ended it, or the disk was full; see its lines above"
    assert f"== Not ready for Kaggle: the kernel left no run.json: {why}" in captured.out
    assert "Traceback" not in captured.err


def test_a_dry_run_of_strips_that_are_all_broken_is_a_report_of_that(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dry_run, "run_kernel", run_here)
    images = tmp_path / "broken"
    images.mkdir()
    for name in ("1.jpg", "2.jpg"):
        (images / name).write_bytes(b"")
    truth = tmp_path / "train.csv"
    truth.write_text("ImageId,ClassId,EncodedPixels\n1.jpg,1,1 2\n")
    options = ("--images", images, "--ground-truth", truth, "--budget-s", 1200)
    assert exit_code(dry_run.main, "--bundle", bundle, *options) == 1
    out = capfd.readouterr().out
    assert "none of 2 strips could be predicted" in caplog.text
    assert "== Not ready for Kaggle: the run was not clean" in out
    report = json.loads((bundle / "report" / "report.json").read_text())
    assert list(report["faults"]) == ["1.jpg", "2.jpg"]
    assert report["budget_s"] == 1200
    assert report["clean"]["ok"] is report["ready"] is False


def test_report_and_verdict_are_there_when_the_ablation_is_interrupted(
    bundle: Path,
    strips: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dry_run, "run_kernel", run_here)
    monkeypatch.setattr(dry_run, "ablate", interrupt)
    options = ("--images", strips / "test_images", "--ground-truth", strips / "test.csv")
    assert exit_code(dry_run.main, "--bundle", bundle, *options) == 130
    report = json.loads((bundle / "report" / "report.json").read_text())
    assert report["clean"]["ok"] and report["ablation"] is None
    out = capsys.readouterr().out
    assert f"== {report['verdict']}\n" in out and str(bundle / "report" / "index.html") in out
    assert "<h1>" in (bundle / "report" / "index.html").read_text()


def test_a_name_that_is_no_utf_8_costs_no_verdict(
    bundle: Path, strips: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, odd = tmp_path / "images", [os.fsdecode(b) for b in (b"caf\xe9.jpg", b"torn\xe9.jpg")]
    images.mkdir()
    shutil.copy(min((strips / "test_images").iterdir()), images / odd[0])
    (images / odd[1]).touch()
    assert exit_code(dry_run.main, "--bundle", bundle, "--images", images) == 1
    assert "== Not ready for Kaggle: the run was not clean" in capfd.readouterr().out
    report = json.loads((bundle / "report" / "report.json").read_text(encoding="utf-8"))
    assert list(report["faults"]) == odd[1:]
    page = (bundle / "report" / "index.html").read_text(encoding="utf-8")
    assert r"<span>caf\udce9.jpg</span>" in page and r"<td>torn\udce9.jpg</td>" in page


def test_an_ablation_that_the_networks_fail_in_costs_no_verdict(
    bundle: Path,
    strips: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The kernel survives it: it has smaller batches, plain PyTorch and the CPU to go to."""

    def fail(_: RecordedPasses) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(dry_run, "run_kernel", run_here)
    monkeypatch.setattr(RecordedPasses, "record_all", fail)
    options = ("--images", strips / "test_images", "--ground-truth", strips / "test.csv")
    assert exit_code(dry_run.main, "--bundle", bundle, *options) == 0
    captured = capfd.readouterr()
    assert "== Ready for Kaggle: the run was clean" in captured.out
    assert "is the proposal" not in captured.out
    assert not (bundle / "report" / "ensemble.json").exists()


def test_a_submission_that_kaggle_would_refuse_is_not_ready(
    bundle: Path,
    strips: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def turn_round(root: Path, *_: Any) -> ProcessResult:
        result, path = run_here(root), root / "working" / "submission.csv"
        header, *rows = path.read_text().splitlines()
        path.write_text("\n".join([header, *rows[::-1], ""]))
        return result

    monkeypatch.setattr(dry_run, "run_kernel", turn_round)
    images = strips / "test_images"
    assert exit_code(dry_run.main, "--bundle", bundle, "--images", images) == 1
    out = capfd.readouterr().out
    assert "== Not ready for Kaggle: submission.csv is invalid: row " in out
    assert "order" in out.partition("== Not ready")[2]
