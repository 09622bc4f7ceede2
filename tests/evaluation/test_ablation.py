"""Ablation: each variant is compared as a bundle of its members and flips would do."""

import itertools
import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, SMALL, change_manifest

from evaluation.ablation import (
    AblationStats,
    MinArea,
    ablate,
    best_setting,
    collect_stats,
    list_variants,
    propose,
)
from evaluation.recorded import RecordedPasses, half_seconds
from kernel.competition import SEVERSTAL
from kernel.ensemble import Ensemble
from kernel.ensemble_loading import load_ensemble
from kernel.images import Image, Strip, read_image
from kernel.manifest import Manifest, load_manifest, parse_manifest
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from kernel.tta import Half
from training.ground_truth import decode_masks, read_truth
from training.metrics import dice
from training.synthetic import Drawing, write_competition

THRESHOLDS = (0.55, 0.65, 0.7)
AREAS: tuple[MinArea, ...] = (0, 2000, 5000, [0, 2000, 5000, 2000])


@pytest.fixture(scope="module")
def ensemble(tiny_bundle: Path) -> Ensemble:
    dataset = tiny_bundle / "dataset"
    return load_ensemble(dataset, load_manifest(dataset), CPU, Stages(), None)


@pytest.fixture(scope="module")
def strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    write_competition(folder, Drawing(4, SMALL), train=4)
    return folder


@pytest.fixture(scope="module")
def images(strips: Path) -> list[Image]:
    return [read_image(path, SEVERSTAL) for path in sorted((strips / "train_images").iterdir())]


@pytest.fixture(scope="module")
def recorded(ensemble: Ensemble, images: list[Image]) -> list[RecordedPasses]:
    """Every pass of every strip."""
    everything = [RecordedPasses(ensemble, image) for image in images]
    for each in everything:
        for pass_id in range(len(ensemble.passes)):
            each.record(pass_id)
    return everything


# --- variants -------------------------------------------------------------------------------------


def test_what_is_compared(ensemble: Ensemble) -> None:
    # in the order of the passes: fpn-b is the cheapest, three flips each
    assert list_variants(ensemble.passes) == {
        "all": [0, 1, 2, 3, 4, 5, 6, 7, 8],
        "only fpn-b": [0, 1, 2],
        "only unet-a": [3, 4, 5],
        "only unet-c": [6, 7, 8],
        "without fpn-b": [3, 4, 5, 6, 7, 8],
        "without unet-a": [0, 1, 2, 6, 7, 8],
        "without unet-c": [0, 1, 2, 3, 4, 5],
        "without flip none": [1, 2, 4, 5, 7, 8],
        "without flip horizontal": [0, 2, 3, 5, 6, 8],
        "without flip vertical": [0, 1, 3, 4, 6, 7],
    }


def test_one_member_with_one_flip_has_nothing_to_compare(ensemble: Ensemble) -> None:
    assert list_variants(ensemble.passes[:1]) == {"all": [0]}


@pytest.mark.parametrize("threshold", [0.3, 0.55, 0.8])
def test_a_variant_does_what_a_bundle_of_its_members_and_flips_does(
    threshold: float,
    ensemble: Ensemble,
    recorded: list[RecordedPasses],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ensemble, "manifest", replace(ensemble.manifest, threshold=threshold))
    spared = 0
    for name, pass_ids in list_variants(ensemble.passes).items():
        kept = [ensemble.passes[pass_id] for pass_id in pass_ids]
        flips = tuple(f for f in ensemble.manifest.flips if f in {each.flip for each in kept})
        members = [ensemble.members[name] for name in dict.fromkeys(p.member for p in kept)]
        smaller = replace(ensemble.manifest, flips=flips)
        bundle = Scheduler(Ensemble(smaller, members, CPU, Stages()))
        for each in recorded:
            monkeypatch.setattr(each, "manifest", ensemble.manifest)
            (expected,) = bundle.predict_strips([Strip("", each.image)])
            state = each.replay(pass_ids)
            for half in Half:
                ran = [pass_ids[index] for index in expected.ran[half]]
                assert state.ran[half] == ran, name
            np.testing.assert_array_equal(state.masks, expected.masks)
            spared += len(pass_ids) - state.tally.decoded
    assert spared > 0 or threshold != 0.8  # the early exit has something to do


def test_a_pass_that_was_not_recorded_runs_when_it_is_asked_for(
    ensemble: Ensemble, images: list[Image], recorded: list[RecordedPasses]
) -> None:
    fresh = RecordedPasses(ensemble, images[0])
    fresh.record(4)
    everything = range(len(ensemble.passes))
    assert list(fresh.probabilities) == [4]
    expected, state = recorded[0].replay(everything), fresh.replay(everything)
    np.testing.assert_array_equal(state.masks, expected.masks)
    assert state.ran == expected.ran
    assert expected.masks.any()


@pytest.mark.parametrize("kind", ["one", "all"])
def test_passes_that_gave_nan_are_left_out_as_the_kernel_does(
    kind: str, ensemble: Ensemble, images: list[Image], caplog: pytest.LogCaptureFixture
) -> None:
    """Of all of them the answer is empty, as the kernel's rows are."""
    broken, everything = RecordedPasses(ensemble, images[0], "a.jpg"), range(len(ensemble.passes))
    for pass_id in everything:
        broken.record(pass_id)
    for pass_id in everything if kind == "all" else [4]:
        broken.probabilities[pass_id] = broken.probabilities[pass_id] * float("nan")
    found, mean = broken.replay(everything).masks, broken.mean(everything)
    assert mean.isfinite().all()
    np.testing.assert_array_equal(found, (mean > ensemble.manifest.threshold).numpy())
    assert found.any() == (kind == "one")
    assert ("a.jpg counts as an empty answer: every pass gave NaN" in caplog.text) == (
        kind == "all"
    )


# --- settings -------------------------------------------------------------------------------------


def test_the_dice_of_a_setting_is_that_of_the_masks_it_gives(
    strips: Path, recorded: list[RecordedPasses]
) -> None:
    truth = read_truth(strips / "train.csv", SEVERSTAL)
    names = sorted(path.name for path in (strips / "train_images").iterdir())
    masks = [decode_masks(truth, name, SMALL, SEVERSTAL) for name in names]
    stats, kept = AblationStats([0, 4, 8]), [0, 4, 8]
    for found, true in zip(recorded, masks, strict=True):
        stats.add(found, true, THRESHOLDS)
    areas = np.stack([true.sum(axis=(1, 2)) for true in masks])
    values = stats.dice(areas, AREAS)
    expected = np.zeros(values.shape)
    for (i, area), (j, threshold) in itertools.product(enumerate(AREAS), enumerate(THRESHOLDS)):
        for strip, (found, true) in enumerate(zip(recorded, masks, strict=True)):
            mean = np.mean([found.probabilities[index][0].numpy() for index in kept], axis=0)
            mask = mean > threshold
            mask[mask.sum(axis=(1, 2)) < area] = False
            expected[i, j, strip] = dice(mask, true)
    np.testing.assert_allclose(values, expected)
    assert len(np.unique(values.mean(axis=(2, 3)).round(6))) > 4  # settings differ


def counted(areas: list[list[int]], both: list[list[int]]) -> AblationStats:
    """One strip, one class, found at each threshold with so many pixels."""
    return AblationStats([0], areas=[np.array(areas)], both=[np.array(both)])


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


def test_numbers_of_the_classes_are_one_setting_and_rank_by_the_class_farthest_off() -> None:
    now = Manifest([], threshold=0.55, min_area=[64, 900])
    found = AblationStats([0], areas=[np.array([[10, 10]])], both=[np.array([[0, 10]])])
    truth = np.array([[0, 10]])
    areas: tuple[MinArea, ...] = (0, 64, 900, [64, 5])
    best = best_setting(found, truth, areas, (0.55,), now)
    assert (best.min_area, best.dice) == ([64, 5], 1.0)
    nothing = AblationStats([0], areas=[np.array([[10, 10]])], both=[np.array([[0, 0]])])
    clean, areas = np.array([[0, 0]]), (64, 512, 900)
    assert best_setting(nothing, clean, areas, (0.55,), now).min_area == 512
    assert best_setting(nothing, clean, (*areas, [64, 900]), (0.55,), now).min_area == [64, 900]


def test_proposed_is_the_cheapest_that_loses_nothing() -> None:
    rows = [
        {"name": "all", "strip_s": 9.0, "best": {"dice": 0.9}},
        {"name": "only a", "strip_s": 2.0, "best": {"dice": 0.89}},
        {"name": "without a", "strip_s": 5.0, "best": {"dice": 0.9}},
        {"name": "without b", "strip_s": 7.0, "best": {"dice": 0.95}},
    ]
    assert propose(rows)["name"] == "without a"
    assert propose(rows[:2])["name"] == "all"


# --- the ablation ---------------------------------------------------------------------------------


def test_a_strip_without_truth_is_clean(ensemble: Ensemble, strips: Path) -> None:
    folder = strips / "train_images"
    name = min(path.name for path in folder.iterdir())
    stats, areas = collect_stats(ensemble, folder, [name], {}, THRESHOLDS)
    assert areas.tolist() == [[0, 0, 0, 0]]
    assert all(len(each.areas) == 1 for each in stats.values())


def test_where_no_strip_can_be_compared_nothing_is_proposed(
    tiny_bundle: Path, strips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RecordedPasses, "record", record)
    folder, proposal = strips / "train_images", tmp_path / "proposal.json"
    names = sorted(path.name for path in folder.iterdir())
    assert ablate(tiny_bundle / "dataset", folder, names, {}, proposal) is None
    assert not proposal.exists()


def test_the_seconds_of_a_half_are_those_of_one_strip_and_one_flip(ensemble: Ensemble) -> None:
    stages = Stages()
    stages.networks |= {(m, Half.ENCODER): 12.0 for m in ("fpn-b", "unet-a", "unet-c")}
    stages.networks["fpn-b", Half.DECODER] = 6.0
    timed = Ensemble(ensemble.manifest, list(ensemble.members.values()), CPU, stages)
    half_s = half_seconds(timed, 2)  # two strips, three flips
    assert half_s[:, 0].tolist() == [2.0] * 9
    assert half_s[:, 1].tolist() == [1.0] * 3 + [0.0] * 6


def test_where_networks_are_only_queued_their_seconds_are_waited_for(
    ensemble: Ensemble, strips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; none is here: what stands for it takes its time when it is waited for."""
    stages = Stages()
    queued = Ensemble(ensemble.manifest, list(ensemble.members.values()), CPU, stages)
    queued.is_async = True
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: time.sleep(0.02))
    path = min((strips / "train_images").iterdir())
    recorded = RecordedPasses(queued, read_image(path, SEVERSTAL))
    recorded.record_all()
    before = dict(stages.networks)
    recorded.replay(range(9))
    assert stages.networks == before
    assert len(stages.networks) == 6
    assert all(seconds > 3 * 0.02 for seconds in stages.networks.values())  # of three flips


def test_the_seconds_of_a_variant_are_those_of_the_halves_that_it_ran() -> None:
    stats = AblationStats([0, 1], encoders=[0, 1, 0], decoders=[1])  # two strips
    assert stats.seconds(np.array([[1.0, 10.0], [2.0, 20.0]])) == 1 + 2 + 1 + 20


def test_a_proposal_is_written_and_the_bundle_stays_as_it_was(
    tiny_bundle: Path, strips: Path, tmp_path: Path
) -> None:
    dataset = tiny_bundle / "dataset"
    before = {path.name: path.read_bytes() for path in dataset.iterdir()}
    names = sorted(path.name for path in (strips / "train_images").iterdir())
    truth = read_truth(strips / "train.csv", SEVERSTAL)
    ablation = ablate(dataset, strips / "train_images", names, truth, tmp_path / "proposal.json")
    assert ablation
    assert {path.name: path.read_bytes() for path in dataset.iterdir()} == before
    rows = {row["name"]: row for row in ablation["variants"]}
    assert all(row["strip_s"] > 0 for row in rows.values())
    assert rows["all"]["strip_s"] > rows["only fpn-b"]["strip_s"]
    assert np.shape(ablation["grid"]) == (len(ablation["min_areas"]), len(ablation["thresholds"]))
    assert np.max(ablation["grid"]) == pytest.approx(rows["all"]["best"]["dice"])
    now = (ablation["min_areas"].index(0), ablation["thresholds"].index(0.55))
    assert ablation["grid"][now[0]][now[1]] == pytest.approx(rows["all"]["dice"], abs=1e-4)
    entries = json.loads((tmp_path / "proposal.json").read_text())
    proposal, packed = parse_manifest(entries, tmp_path, SEVERSTAL), load_manifest(dataset)
    best = rows[ablation["proposed"]]["best"]
    assert (proposal.threshold, proposal.min_area) == (best["threshold"], best["min_area"])
    kind, _, name = ablation["proposed"].rpartition(" ")
    assert not {"sha256", "flops"} & {key for entry in entries["members"] for key in entry}
    sources = [replace(member, sha256="", flops=[1, 1]) for member in packed.members]
    expected = [
        member
        for member in sources
        if not (kind == "without" and member.name == name)
        and not (kind == "only" and member.name != name)
    ]
    assert proposal.members == expected
    flips = tuple(f for f in packed.flips if not (kind == "without flip" and f == name))
    same = replace(proposal, members=packed.members, threshold=0.55, min_area=0, flips=packed.flips)
    assert proposal.flips == flips
    assert asdict(same) == asdict(packed)


def test_a_bundle_with_a_min_area_a_class_is_compared_with_numbers_for_all(
    session_weights: Path, strips: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(session_weights, tmp_path / "bundle"))
    own = [0, 600, 10, 2000]
    change_manifest(bundle, min_area=own)
    names = sorted(path.name for path in (strips / "train_images").iterdir())
    truth = read_truth(strips / "train.csv", SEVERSTAL)
    ablation = ablate(bundle, strips / "train_images", names, truth, tmp_path / "proposal.json")
    assert ablation
    assert ablation["min_areas"] == [0, 64, 128, 256, 512, 1024, 2048, own]
    assert ablation["now"] == {"threshold": 0.55, "min_area": own}
    column = ablation["thresholds"].index(0.55)
    assert ablation["grid"][-1][column] == pytest.approx(ablation["variants"][0]["dice"], abs=1e-4)
