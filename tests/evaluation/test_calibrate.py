"""Calibration: what a shift finds is what the kernel finds with the shifts in its manifest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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

from evaluation import calibrate
from evaluation.calibrate import (
    GATE_SCALES,
    GATE_SHIFTS,
    MASK_SHIFTS,
    MIN_AREAS,
    Counts,
    Levels,
    add_found,
    best_position,
    count_strips,
    find_levels,
    level_gates,
    shift_to_mean,
)
from kernel.checks import read_json
from kernel.device import pick_device
from kernel.ensemble import Ensemble, load_ensemble
from kernel.logs import Stages
from kernel.manifest import MANIFEST, load_manifest
from kernel.mounts import list_images


def ensemble_of(dataset: Path) -> Ensemble:
    return load_ensemble(dataset, load_manifest(dataset), pick_device(), Stages())


def count(dataset: Path, labelled: Path) -> tuple[list[Levels], Counts]:
    return count_strips(ensemble_of(dataset), labelled / "test_images", labelled / "test.csv")


def move_bundle(dataset: Path, mask_shift: float, scale: float, gate_shifts: Levels) -> None:
    entries = read_manifest(dataset)["members"]
    for member in entries:
        member["mask_shift"] = mask_shift
        if member["name"] in gate_shifts:
            member |= {"gate_scale": scale, "gate_shift": gate_shifts[member["name"]]}
    change_manifest(dataset, members=entries)


# --- levels ---------------------------------------------------------------------------------------


def test_every_members_gates_are_brought_to_one_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 3, generator=draw) * 2 + torch.tensor([-4, -4, 1, 1])[:, None]
    shifts = level_gates(logits, ["shut", "shut", "open", "open"])
    assert shifts["shut"] > 0 > shifts["open"]
    moved = (
        logits + torch.tensor([shifts[name] for name in ("shut", "shut", "open", "open")])[:, None]
    )
    means = torch.sigmoid(moved).mean(dim=(0, 2))
    for pair in (means[:2], means[2:]):
        assert pair.mean().item() == pytest.approx(torch.sigmoid(logits).mean().item(), abs=2e-3)
    assert level_gates(logits[:, :1], ["alone"]) == {"alone": 0.0}


def test_a_mean_that_no_shift_reaches_ends_the_search_at_its_border() -> None:
    assert shift_to_mean(torch.zeros(3), 0.0) == pytest.approx(-calibrate.WIDEST, abs=0.01)


def test_a_level_is_the_same_however_wide_the_gates_stood_before(
    dataset: Path, labelled_strips: Path
) -> None:
    """One member's gates moved by 2 take a level that is 2 less, but for the common mean."""
    images = labelled_strips / "test_images"
    names = list_images(images)
    gated = [m.name for m in load_manifest(dataset).members if m.gated]
    assert len(gated) >= 2
    at = GATE_SCALES.index(1)
    before = find_levels(ensemble_of(dataset), images, names)[at]
    move_bundle(dataset, 0, 1, {gated[0]: 2.0})
    after = find_levels(ensemble_of(dataset), images, names)[at]
    assert list(before) == gated
    apart = [levels[gated[0]] - levels[gated[1]] for levels in (before, after)]
    assert apart[1] == pytest.approx(apart[0] - 2, abs=0.5)


# --- what a shift finds ---------------------------------------------------------------------------


def test_a_setting_finds_what_the_manifest_with_it_finds(
    dataset: Path, labelled_strips: Path
) -> None:
    at = MASK_SHIFTS.index(1), GATE_SCALES.index(0.5), GATE_SHIFTS.index(2)
    move_bundle(dataset, 0, 1, {"unet-a": 1.5})  # of another level than the others
    levels, found = count(dataset, labelled_strips)
    assert any(levels[at[1]].values())
    taken: dict[str, Any] = {"mask_shift": 1, "gate_scale": 0.5, "gate_shift": 2, "min_area": 0}
    taken["levels"] = levels[at[1]]
    entries = add_found(read_manifest(dataset), load_manifest(dataset), taken)
    change_manifest(dataset, members=entries["members"])
    _, moved = count(dataset, labelled_strips)
    assert any(each[at].sum() for each in found.areas)
    dice = found.dice()[*at, MIN_AREAS.index(0)]
    np.testing.assert_allclose(dice, np.stack(moved.as_it_is), atol=0.02)
    assert not np.allclose(found.as_it_is, moved.as_it_is)  # the setting does something


def test_without_shifts_the_counts_are_the_kernels(dataset: Path, labelled_strips: Path) -> None:
    """Of the submission that the kernel itself writes, by the overlap with its own masks."""
    predict(dataset, labelled_strips / "test_images", dataset / "submission.csv")
    rows = read_submission(dataset / "submission.csv")
    names = sorted({name for name, _ in rows})
    areas = [[decode_by_hand(rows[n, c], SMALL).sum() for c in LABELS] for n in names]
    assert np.sum(areas) > 0
    _, found = count(dataset, labelled_strips)
    empty = np.array(areas) == 0
    absent = np.stack(found.truth) == 0
    np.testing.assert_array_equal(np.stack(found.as_it_is)[absent] == 1, empty[absent])


def test_a_mask_below_the_area_counts_as_an_empty_one() -> None:
    """Two strips of one class: 700 pixels of 1,000 found, and 700 found where nothing is."""
    found, shape = Counts(), (len(MASK_SHIFTS), len(GATE_SCALES), len(GATE_SHIFTS), 1)
    found.areas, found.both = [np.full(shape, 700)] * 2, [np.full(shape, 700), np.full(shape, 0)]
    found.truth = [np.array([1000]), np.array([0])]
    dice = found.dice()
    assert dice.shape == (*shape[:3], len(MIN_AREAS), 2, 1)
    for position, area in enumerate(MIN_AREAS):
        expected = [1400 / 1700, 0] if area <= 700 else [0, 1]
        np.testing.assert_allclose(dice[0, 0, 0, position, :, 0], expected)


def test_the_best_is_that_of_a_plateau_and_not_of_a_spike() -> None:
    grid = len(MASK_SHIFTS), len(GATE_SCALES), len(GATE_SHIFTS), len(MIN_AREAS)
    dice = np.zeros((*grid, 2, 4))
    dice[1, 1, 1, 1] = 1  # alone
    dice[6:9, 2:5, 4:7, 3:6] = 0.8
    assert best_position(dice) == (7, 3, 5, 4)


# --- the command ----------------------------------------------------------------------------------


def options_of(dataset: Path, labelled: Path) -> list[object]:
    images, truth = labelled / "test_images", labelled / "test.csv"
    return ["--bundle", dataset, "--images", images, "--truth", truth]


def test_the_command_prints_what_it_chose_and_writes_what_it_prints(
    dataset: Path,
    session_weights: Path,
    labelled_strips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = tmp_path / "new" / "ensemble.json"
    options = [*options_of(dataset, labelled_strips), "--weights", session_weights]
    assert exit_code(calibrate.main, *options, "--write", written) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    assert found["calibrated"]["dice"] >= found["as it is"]["dice"] - 0.05
    before, after = read_json(session_weights / MANIFEST), read_json(written)
    assert after["min_area"] == found["min_area"]
    for old, new in zip(before["members"], after["members"], strict=True):
        level = found["levels"].get(old["name"])
        moved = {"mask_shift": found["mask_shift"]}
        if level is not None:
            moved["gate_scale"] = found["gate_scale"]
            moved["gate_shift"] = pytest.approx(level + found["gate_shift"], abs=0.01)
        assert new == old | moved
    # and nothing is added twice: the bundle is of what was there before
    after["members"][0]["mask_shift"] += 1
    written.write_text(json.dumps(after))
    again = ["--weights", written.parent, "--write", written]
    assert exit_code(calibrate.main, *options, *again) == 2
    assert "the bundle has" in error_of(capsys.readouterr().err)


def test_what_is_found_comes_on_top_of_what_is_there(dataset: Path) -> None:
    """Both ways of a presence logit through it: twice, and by the one that is written."""
    move_bundle(dataset, 0.5, 0.7, {"unet-a": -1.0})
    manifest = load_manifest(dataset)
    found = {"mask_shift": 1.0, "gate_scale": 0.5, "gate_shift": 0.5, "min_area": 7}
    written = add_found(read_manifest(dataset), manifest, found | {"levels": {"unet-a": 0.25}})
    [entry] = [each for each in written["members"] if each["name"] == "unet-a"]
    assert (entry["mask_shift"], written["min_area"]) == (1.5, 7)
    for logit in (-3.0, 0.0, 4.0):
        twice = 0.5 * (0.7 * logit - 1.0) + 0.25 + 0.5
        assert entry["gate_scale"] * logit + entry["gate_shift"] == pytest.approx(twice)


def test_another_ensembles_manifest_is_refused_before_the_work(
    dataset: Path,
    labelled_strips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(calibrate, "load_ensemble", None)
    options = [*options_of(dataset, labelled_strips), "--weights", tmp_path, "--write", tmp_path]
    assert exit_code(calibrate.main, *options) == 2
    assert "ensemble.json: no such file" in error_of(capsys.readouterr().err)
    (tmp_path / MANIFEST).write_text("{}")
    assert exit_code(calibrate.main, *options) == 2
    assert "ensemble.json: " in error_of(capsys.readouterr().err)
