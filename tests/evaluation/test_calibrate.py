"""Calibration: what a shift finds is what the kernel finds with shifted checkpoints."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    LABELS,
    SMALL,
    change_manifest,
    decode_by_hand,
    error_of,
    exit_code,
    predict,
    read_manifest,
    read_submission,
)
from safetensors.torch import load_file

from evaluation import calibrate
from evaluation.calibrate import (
    GATE_SHIFTS,
    MASK_SHIFTS,
    MIN_AREAS,
    ShiftCounts,
    best_position,
    count_strips,
)
from kernel.checks import read_json
from kernel.device import pick_device
from kernel.ensemble import load_ensemble
from kernel.logs import Stages
from kernel.manifest import MANIFEST, load_manifest
from training.heads import shift_checkpoint


def masks_of(dataset: Path, labelled_strips: Path) -> ShiftCounts:
    ensemble = load_ensemble(dataset, load_manifest(dataset), pick_device(), Stages())
    return count_strips(ensemble, labelled_strips / "test_images", labelled_strips / "test.csv")


def shift_bundle(
    dataset: Path, mask_shift: float, gate_shift: float, names: Sequence[str] = ()
) -> None:
    entries = read_manifest(dataset)
    for member in entries["members"]:
        if names and member["name"] not in names:
            continue
        path = dataset / member["file"]
        shift_checkpoint(path, path, mask_shift, gate_shift)
        member["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    change_manifest(dataset, members=entries["members"])


def test_a_pair_of_shifts_finds_what_the_shifted_checkpoints_find(
    dataset: Path, labelled_strips: Path
) -> None:
    row, column = MASK_SHIFTS.index(1), GATE_SHIFTS.index(2)
    found = masks_of(dataset, labelled_strips)
    zero = MASK_SHIFTS.index(0), GATE_SHIFTS.index(0)
    before = found.dice()[zero]
    shift_bundle(dataset, 1, 2)
    shifted = masks_of(dataset, labelled_strips)
    for counted, expected in zip(found.areas, shifted.areas, strict=True):
        assert counted[row, column].sum() > 0
        np.testing.assert_allclose(counted[row, column], expected[zero], rtol=0.01, atol=3)
    assert not np.allclose(found.dice()[row, column], before)  # the shifts do something


def test_members_that_are_not_named_keep_their_logits(
    dataset: Path, labelled_strips: Path, tmp_path: Path
) -> None:
    """The same as a bundle in which the checkpoints of the named ones alone are shifted."""
    entries = read_manifest(dataset)["members"]
    first = entries[0]["name"]
    ensemble = load_ensemble(dataset, load_manifest(dataset), pick_device(), Stages())
    folder = labelled_strips / "test_images", labelled_strips / "test.csv"
    found = count_strips(ensemble, *folder, [first])
    everyone = count_strips(ensemble, *folder)
    row, column = MASK_SHIFTS.index(1), GATE_SHIFTS.index(2)
    assert not np.array_equal(found.areas, everyone.areas)
    shift_bundle(dataset, 1, 2, [first])
    zero = MASK_SHIFTS.index(0), GATE_SHIFTS.index(0)
    for counted, expected in zip(
        found.areas, masks_of(dataset, labelled_strips).areas, strict=True
    ):
        np.testing.assert_allclose(counted[row, column], expected[zero], rtol=0.01, atol=3)


def test_without_shifts_the_counts_are_the_kernels(dataset: Path, labelled_strips: Path) -> None:
    """Of the submission that the kernel itself writes."""
    predict(dataset, labelled_strips / "test_images", dataset / "submission.csv")
    rows = read_submission(dataset / "submission.csv")
    names = sorted({name for name, _ in rows})
    expected = [[decode_by_hand(rows[n, c], SMALL).sum() for c in LABELS] for n in names]
    found = [
        each[MASK_SHIFTS.index(0), GATE_SHIFTS.index(0)]
        for each in masks_of(dataset, labelled_strips).areas
    ]
    np.testing.assert_allclose(found, expected, atol=2)
    assert np.sum(expected) > 0


def test_a_mask_below_the_area_counts_as_an_empty_one() -> None:
    """Two strips of one class: 700 pixels of 1,000 found, and 700 found where nothing is."""
    found, shape = ShiftCounts(), (len(MASK_SHIFTS), len(GATE_SHIFTS), 1)
    found.areas, found.both = [np.full(shape, 700)] * 2, [np.full(shape, 700), np.full(shape, 0)]
    found.truth = [np.array([1000]), np.array([0])]
    dice = found.dice()
    assert dice.shape == (*shape[:2], len(MIN_AREAS), 2, 1)
    for position, area in enumerate(MIN_AREAS):
        expected = [1400 / 1700, 0] if area <= 700 else [0, 1]
        np.testing.assert_allclose(dice[0, 0, position, :, 0], expected)


def test_the_best_is_that_of_a_plateau_and_not_of_a_spike() -> None:
    dice = np.zeros((len(MASK_SHIFTS), len(GATE_SHIFTS), len(MIN_AREAS), 2, 4))
    dice[1, 1, 1] = 1  # alone
    dice[6:9, 4:7, 3:6] = 0.8
    assert best_position(dice) == (7, 5, 4)


def test_shifted_checkpoints_keep_all_but_two_biases(session_weights: Path, tmp_path: Path) -> None:
    source = session_weights / "unet-a.safetensors"
    shift_checkpoint(source, tmp_path / "new" / "a.safetensors", 0.5, -1.5)
    before, after = load_file(source), load_file(tmp_path / "new" / "a.safetensors")
    changed = {key: (after[key] - before[key]).float() for key in before}
    moved = {key: float(value.mean()) for key, value in changed.items() if value.any()}
    assert moved == pytest.approx(
        {"segmentation_head.0.bias": 0.5, "classification_head.3.bias": -1.5}, abs=1e-2
    )


def test_the_command_prints_what_it_chose_and_writes_what_it_prints(
    dataset: Path,
    session_weights: Path,
    labelled_strips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [
        "--bundle",
        dataset,
        "--images",
        labelled_strips / "test_images",
        "--truth",
        labelled_strips / "test.csv",
    ]
    written = ["--weights", session_weights, "--write", tmp_path / "out"]
    assert exit_code(calibrate.main, *options, *written) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    assert found["calibrated"]["dice"] >= found["as it is"]["dice"] - 0.05
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "ensemble.json",
        *(p.name for p in session_weights.glob("*.safetensors")),
    }
    entries = [read_json(folder / MANIFEST) for folder in (session_weights, tmp_path / "out")]
    assert entries[1] == entries[0] | {"min_area": found["min_area"]}
    key = "segmentation_head.0.bias"
    before = load_file(session_weights / "unet-a.safetensors")[key]
    after = load_file(tmp_path / "out" / "unet-a.safetensors")[key]
    assert (after - before).float().mean() == pytest.approx(found["mask_shift"], abs=0.02)


def test_a_checkpoint_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--take", 1, 1, 0, "--weights", tmp_path, "--write", tmp_path / "out"]
    assert exit_code(calibrate.main, *options) == 2
    assert "ensemble.json: no such file" in error_of(capsys.readouterr().err)
    (tmp_path / MANIFEST).write_text("{}")
    (tmp_path / "a.safetensors").write_text("no weights")
    assert exit_code(calibrate.main, *options) == 2
    assert "a.safetensors" in error_of(capsys.readouterr().err)


def test_a_member_that_is_not_there_is_one_line_and_the_others_keep_their_bytes(
    session_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--take", 1, 1, 64, "--weights", session_weights, "--write", tmp_path / "out"]
    assert exit_code(calibrate.main, *options, "--members", "nobody") == 2
    assert "--members nobody: there are " in error_of(capsys.readouterr().err)
    assert exit_code(calibrate.main, *options, "--members", "unet-a") == 0
    for path in session_weights.glob("*.safetensors"):
        same = (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        assert same == (path.stem != "unet-a")
