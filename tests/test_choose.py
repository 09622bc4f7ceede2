"""Members, flips and settings by evidence: what is compared is what such a bundle would do."""

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from kernel.engines import pick_device
from kernel.ensemble import Ensemble, load_ensemble
from kernel.images import Image, Strip, read_image
from kernel.logs import Stages
from kernel.manifest import Manifest, load_manifest, parse_manifest
from weights import steel
from weights.choose import (
    Evidence,
    Passes,
    best_setting,
    choose,
    gather,
    propose,
    replay,
    run_passes,
    seconds_of_halves,
    variants,
)
from weights.score import dice, draw_truth, read_truth

THRESHOLDS, AREAS = (0.55, 0.65, 0.7), (0, 2000, 5000)


@pytest.fixture(scope="module")
def ensemble(tiny_bundle: Path) -> Ensemble:
    dataset = tiny_bundle / "dataset"
    return load_ensemble(dataset, load_manifest(dataset), pick_device(), Stages())


@pytest.fixture(scope="module")
def strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choose")
    steel.write_competition(folder, train=4, test=0, seed=4, size=(64, 96))
    return folder


@pytest.fixture(scope="module")
def images(strips: Path) -> list[Image]:
    return [read_image(path) for path in sorted((strips / "train_images").iterdir())]


@pytest.fixture(scope="module")
def passes(ensemble: Ensemble, images: list[Image]) -> list[Passes]:
    return [run_passes(ensemble, image) for image in images]


def test_what_is_compared(ensemble: Ensemble) -> None:
    # in the order of the passes: fpn-b is the cheapest, three flips each
    assert variants(ensemble.passes) == {
        "all": [0, 1, 2, 3, 4, 5, 6, 7, 8],
        "only fpn-b": [0, 1, 2],
        "only unet-a": [3, 4, 5],
        "only unet-c": [6, 7, 8],
        "without fpn-b": [3, 4, 5, 6, 7, 8],
        "without unet-a": [0, 1, 2, 6, 7, 8],
        "without unet-c": [0, 1, 2, 3, 4, 5],
        "without none": [1, 2, 4, 5, 7, 8],
        "without horizontal": [0, 2, 3, 5, 6, 8],
        "without vertical": [0, 1, 3, 4, 6, 7],
    }


def test_one_member_with_one_flip_has_nothing_to_compare(ensemble: Ensemble) -> None:
    assert variants(ensemble.passes[:1]) == {"all": [0]}


@pytest.mark.parametrize("threshold", [0.3, 0.55, 0.8])
def test_a_variant_does_what_a_bundle_of_its_members_and_flips_does(
    threshold: float, ensemble: Ensemble, images: list[Image], passes: list[Passes]
) -> None:
    manifest = replace(ensemble.manifest, threshold=threshold)
    spared = 0
    for name, kept in variants(ensemble.passes).items():
        chosen = [ensemble.passes[index] for index in kept]
        flips = tuple(flip for flip in manifest.flips if flip in {flip for _, flip in chosen})
        members = list({member.spec.name: member for member, _ in chosen}.values())
        smaller = replace(manifest, flips=flips)
        bundle = Ensemble(smaller, members, ensemble.device, Stages())
        for image, found in zip(images, passes, strict=True):
            (flight,) = bundle.fly([Strip("", image)])
            tally = replay(found, kept, manifest)
            assert len(tally.gates) == len(flight.tally.gates), name
            assert tally.decoded == flight.tally.decoded, name
            np.testing.assert_array_equal(tally.masks(found.size), flight.tally.masks(found.size))
            spared += len(kept) - tally.decoded
    assert spared > 0 or threshold != 0.8  # the early exit has something to do


def test_the_dice_of_a_setting_is_that_of_the_masks_it_gives(
    ensemble: Ensemble, strips: Path, images: list[Image], passes: list[Passes]
) -> None:
    truth = read_truth(strips / "train.csv")
    names = sorted(path.name for path in (strips / "train_images").iterdir())
    masks = [draw_truth(truth.get(name, {}), 4, (64, 96)) for name in names]
    evidence, kept = Evidence([0, 4, 8]), [0, 4, 8]
    for found, true in zip(passes, masks, strict=True):
        evidence.add(found, true, ensemble.manifest, THRESHOLDS)
    areas = np.stack([true.sum(axis=(1, 2)) for true in masks])
    values = evidence.dice(areas, AREAS)
    expected = np.zeros(values.shape)
    for (i, area), (j, threshold) in itertools.product(enumerate(AREAS), enumerate(THRESHOLDS)):
        for strip, (found, true) in enumerate(zip(passes, masks, strict=True)):
            mean = np.mean([found.probabilities[index].numpy() for index in kept], axis=0)
            mask = mean > threshold
            mask[mask.sum(axis=(1, 2)) < area] = False
            expected[i, j, strip] = dice(mask, true)
    np.testing.assert_allclose(values, expected)
    assert len(np.unique(values.mean(axis=(2, 3)).round(6))) > 4  # settings differ


def counted(areas: list[list[int]], both: list[list[int]]) -> Evidence:
    """One strip, one class, found at each threshold with so many pixels."""
    return Evidence([0], areas=[np.array(areas)], both=[np.array(both)])


def test_the_best_setting_has_the_highest_dice() -> None:
    now = Manifest([], threshold=0.55)
    found = counted([[30], [20], [4]], [[10], [10], [4]])
    best = best_setting(found, np.array([[10]]), (0,), (0.3, 0.5, 0.7), now)
    assert (best.threshold, best.min_area) == (0.5, 0)
    assert best.dice == best.dice_non_empty == pytest.approx(2 * 10 / 30)


def test_of_equal_settings_the_nearest_to_the_bundle_s_is_best() -> None:
    now = Manifest([], threshold=0.55, min_area=64)
    found = counted([[10], [10], [10]], [[10], [10], [10]])
    truth = np.array([[10]])
    best = best_setting(found, truth, (0, 5), (0.3, 0.5, 0.7), now)
    assert (best.threshold, best.min_area) == (0.5, 5)


def test_proposed_is_the_cheapest_that_loses_nothing() -> None:
    rows = [
        {"name": "all", "strip_s": 9.0, "best": {"dice": 0.9}},
        {"name": "only a", "strip_s": 2.0, "best": {"dice": 0.89}},
        {"name": "without a", "strip_s": 5.0, "best": {"dice": 0.9}},
        {"name": "without b", "strip_s": 7.0, "best": {"dice": 0.95}},
    ]
    assert propose(rows)["name"] == "without a"
    assert propose(rows[:2])["name"] == "all"


def test_a_strip_that_cannot_be_read_is_left_out_and_one_without_truth_is_clean(
    ensemble: Ensemble, strips: Path
) -> None:
    folder = strips / "train_images"
    name = min(path.name for path in folder.iterdir())
    evidence, areas = gather(ensemble, folder, [name, "missing.jpg"], {}, THRESHOLDS)
    assert areas.tolist() == [[0, 0, 0, 0]]
    assert all(len(found.done) == 1 for found in evidence.values())


def test_the_seconds_of_a_half_are_those_of_one_strip_and_one_flip(ensemble: Ensemble) -> None:
    stages = Stages()
    stages.seconds |= {f"networks/{m}/encoder": 12.0 for m in ("fpn-b", "unet-a", "unet-c")}
    stages.seconds["networks/fpn-b/decoder"] = 6.0
    timed = Ensemble(ensemble.manifest, ensemble.members, ensemble.device, stages)
    half_s = seconds_of_halves(timed, 2)  # two strips, three flips
    assert half_s[:, 0].tolist() == [2.0] * 9
    assert half_s[:, 1].tolist() == [1.0] * 3 + [0.0] * 6


def test_a_proposal_is_written_and_the_bundle_stays_as_it_was(
    tiny_bundle: Path, strips: Path, tmp_path: Path
) -> None:
    dataset = tiny_bundle / "dataset"
    before = {path.name: path.read_bytes() for path in dataset.iterdir()}
    names = sorted(path.name for path in (strips / "train_images").iterdir())
    truth = read_truth(strips / "train.csv")
    choice = choose(dataset, strips / "train_images", names, truth, tmp_path / "proposal.json")
    assert {path.name: path.read_bytes() for path in dataset.iterdir()} == before
    rows = {row["name"]: row for row in choice["variants"]}
    assert all(row["strip_s"] > 0 for row in rows.values())
    assert rows["all"]["strip_s"] > rows["only fpn-b"]["strip_s"]
    assert np.shape(choice["grid"]) == (len(choice["min_areas"]), len(choice["thresholds"]))
    assert np.max(choice["grid"]) == pytest.approx(rows["all"]["best"]["dice"])
    now = (choice["min_areas"].index(0), choice["thresholds"].index(0.55))
    assert choice["grid"][now[0]][now[1]] == pytest.approx(rows["all"]["dice"], abs=1e-4)
    entries = json.loads((tmp_path / "proposal.json").read_text())
    proposal, packed = parse_manifest(entries, tmp_path), load_manifest(dataset)
    best = rows[choice["proposed"]]["best"]
    assert (proposal.threshold, proposal.min_area) == (best["threshold"], best["min_area"])
    kind, _, name = choice["proposed"].partition(" ")
    expected = [
        member
        for member in packed.members
        if not (kind == "without" and member.name == name)
        and not (kind == "only" and member.name != name)
    ]
    assert proposal.members == expected
    flips = tuple(f for f in packed.flips if not (kind == "without" and f == name))
    same = {"members": packed.members, "threshold": 0.55, "min_area": 0, "flips": flips}
    assert asdict(replace(proposal, **same)) == asdict(replace(packed, flips=flips))
