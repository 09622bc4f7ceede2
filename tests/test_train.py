"""The fit script: augmentations, folds, batches, statistics, resuming, and what it writes."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kernel.manifest import MemberSpec
from kernel.members import build_network, load_member
from weights import steel, train
from weights.score import Scores, dice

SIZE = (64, 96)
CROP = (32, 64)
CONFIG = train.Config(
    "tiny", "tu-test_resnet", "Unet", crop_steps=4, whole_steps=3, crops=2, crop_size=CROP, seed=3
)


def steel_folder(folder: Path, layout: str = "today") -> Path:
    even = (1.0, 1.0, 1.0, 1.0)
    steel.write_competition(folder, 24, 0, 5, layout=layout, shares=even, size=SIZE)
    return folder


@pytest.fixture(scope="module")
def strips(tmp_path_factory: pytest.TempPathFactory) -> train.Strips:
    """24 tiny synthetic strips with all four classes, and clean ones."""
    read = train.read_strips(steel_folder(tmp_path_factory.mktemp("steel")), 4)
    assert len(read.names) == 24
    assert all(read.with_class(label) for label in (1, 2, 3, 4))
    assert read.clean()
    return read


def drawn_pair(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image that is no mirror of itself, with the masks of its darkest and brightest pixels."""
    image = np.random.default_rng(seed).integers(60, 190, SIZE, dtype=np.uint8)
    return image, np.stack([image < 80, image > 170])


# --- reading --------------------------------------------------------------------------------------


def test_both_layouts_of_train_csv_give_the_same_strips(tmp_path: Path) -> None:
    today = train.read_strips(steel_folder(tmp_path / "today", "today"), 4)
    of_2019 = train.read_strips(steel_folder(tmp_path / "2019", "2019"), 4)
    assert today.names == of_2019.names
    assert today.clean() == of_2019.clean()
    for label in (1, 2, 3, 4):
        assert today.with_class(label) == of_2019.with_class(label)
    for name in today.names:
        (image, masks), (other_image, other_masks) = today.load(name), of_2019.load(name)
        np.testing.assert_array_equal(image, other_image)
        np.testing.assert_array_equal(masks, other_masks)
        assert (image.shape, masks.shape) == (SIZE, (4, *SIZE))
        assert masks.any() == (name not in today.clean())


def test_a_truth_of_images_that_are_not_there_is_refused(tmp_path: Path) -> None:
    folder = steel_folder(tmp_path)
    with (folder / "train.csv").open("a") as file:
        file.write("gone.jpg,1,1 2\n")
    with pytest.raises(ValueError, match=r"names gone\.jpg, which train_images lacks"):
        train.read_strips(folder, 4)


# --- folds ----------------------------------------------------------------------------------------


def many_strips(count: int = 600) -> train.Strips:
    """Names with classes in the competition's shares; no image is read."""
    rng = np.random.default_rng(1)
    shares = (0.07, 0.02, 0.41, 0.06)
    truth = {}
    for index in range(count):
        there = rng.random(4) < shares
        truth[f"{index:04}.jpg"] = {label: "1 1" for label in (1, 2, 3, 4) if there[label - 1]}
    return train.Strips(Path("nowhere"), list(truth), truth, 4)


def test_folds_are_disjoint_and_cover_every_strip() -> None:
    whole = many_strips()
    held_out: list[str] = []
    for fold in range(5):
        training, validation = train.split_folds(whole, 5, fold)
        assert not set(training.names) & set(validation.names)
        assert sorted(training.names + validation.names) == whole.names
        held_out += validation.names
    assert sorted(held_out) == whole.names


def test_every_class_has_the_same_share_in_every_fold() -> None:
    whole = many_strips()
    for fold in range(5):
        validation = train.split_folds(whole, 5, fold)[1]
        assert abs(len(validation.names) - 120) <= 6
        for label in (1, 2, 3, 4):
            assert abs(len(validation.with_class(label)) - len(whole.with_class(label)) / 5) <= 1.5


def test_folds_are_the_same_on_every_call() -> None:
    first, again = (train.split_folds(many_strips(), 5, 2)[1].names for _ in range(2))
    assert first == again
    assert first != train.split_folds(many_strips(), 5, 3)[1].names


# --- augmentations --------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", train.AUGMENTATIONS)
def test_the_same_seed_augments_the_same_way_and_another_does_not(
    augment: Callable[..., Any],
) -> None:
    def images(seed: int) -> list[bytes]:
        rng = np.random.default_rng(seed)
        return [augment(*drawn_pair(), rng)[0].tobytes() for _ in range(4)]

    assert images(0) == images(0)
    assert images(0) != images(1)


@pytest.mark.parametrize("augment", train.AUGMENTATIONS)
def test_an_augmentation_keeps_types_and_shapes_and_its_inputs(augment: Callable[..., Any]) -> None:
    image, masks = drawn_pair()
    for seed in range(8):
        changed, moved = augment(image, masks, np.random.default_rng(seed))
        assert (changed.shape, changed.dtype) == (SIZE, np.uint8)
        assert (moved.shape, moved.dtype) == ((2, *SIZE), np.bool_)
    np.testing.assert_array_equal(image, drawn_pair()[0])
    np.testing.assert_array_equal(masks, drawn_pair()[1])


def test_a_flip_turns_image_and_masks_together_along_each_axis_and_both() -> None:
    image, masks = drawn_pair()
    ways = {
        "none": image,
        "left and right": np.fliplr(image),
        "up and down": np.flipud(image),
        "both": np.rot90(image, 2),
    }
    seen = []
    for seed in range(60):
        changed, moved = train.random_flip(image, masks, np.random.default_rng(seed))
        seen.append(next(way for way, turned in ways.items() if np.array_equal(turned, changed)))
        np.testing.assert_array_equal(moved, np.stack([changed < 80, changed > 170]))
    assert set(seen) == set(ways)
    assert all(5 <= seen.count(way) <= 28 for way in ways)  # about a quarter each


@pytest.mark.parametrize("augment", [train.random_brightness, train.random_noise])
def test_an_exposure_changes_the_image_and_not_the_masks(augment: Callable[..., Any]) -> None:
    image, masks = drawn_pair()
    for seed in range(12):
        changed, moved = augment(image, masks, np.random.default_rng(seed))
        assert not np.array_equal(changed, image)
        np.testing.assert_array_equal(moved, masks)


@pytest.mark.parametrize("augment", [train.random_brightness, train.random_noise])
def test_an_exposure_stays_between_black_and_white(augment: Callable[..., Any]) -> None:
    """Out of range, uint8 wraps round: black would turn white."""
    image = np.zeros(SIZE, np.uint8)
    image[:, SIZE[1] // 2 :] = 255
    for seed in range(12):
        changed, _ = augment(image, drawn_pair()[1], np.random.default_rng(seed))
        assert changed[:, : SIZE[1] // 2].max() <= 60
        assert changed[:, SIZE[1] // 2 :].min() >= 150


def test_brightness_is_one_straight_line_for_the_whole_image() -> None:
    image, masks = drawn_pair()
    slopes, shifts = [], []
    for seed in range(40):
        changed, _ = train.random_brightness(image, masks, np.random.default_rng(seed))
        inner = (changed > 0) & (changed < 255)
        slope, shift = np.polyfit(image[inner], changed[inner], 1)
        assert np.abs(slope * image + shift - changed)[inner].max() <= 1.5
        slopes.append(slope)
        shifts.append(changed[inner].mean() - slope * image[inner].mean())
    assert 0.74 < min(slopes) < 0.85 < 1.15 < max(slopes) < 1.26
    assert -31.5 < min(shifts) < -15 < 15 < max(shifts) < 31.5


def test_noise_is_as_strong_as_it_says_and_shifts_nothing() -> None:
    image = np.full((200, 200), 120, np.uint8)
    deviations, means = [], []
    for seed in range(30):
        changed, _ = train.random_noise(image, image[None] > 0, np.random.default_rng(seed))
        deviations.append(changed.std())
        means.append(changed.mean())
    assert min(deviations) < 1.5 < 4.5 < max(deviations) < 6.4
    assert abs(np.mean(means) - 120) < 0.1


# --- crops and batches ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("centre", "corner"),
    [
        ((30, 50), (14, 18)),
        ((0, 0), (0, 0)),
        ((63, 95), (32, 32)),
        ((-40, 400), (0, 32)),
    ],
)
def test_a_crop_is_the_window_nearest_to_its_centre(
    centre: tuple[int, int], corner: tuple[int, int]
) -> None:
    image, masks = drawn_pair()
    top, left = corner
    window = (slice(top, top + 32), slice(left, left + 64))
    np.testing.assert_array_equal(train.crop_at(image, centre, CROP), image[window])
    np.testing.assert_array_equal(train.crop_at(masks, centre, CROP), masks[:, *window])


def test_a_crop_wider_than_the_image_is_the_image() -> None:
    image, _ = drawn_pair()
    np.testing.assert_array_equal(train.crop_at(image, (5, 5), (100, 200)), image)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_asked_share_of_crops_lies_on_a_defective_strip(
    share: float, strips: train.Strips, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where it is decided; a crop off its defect's centre may miss it."""
    drawn: list[bool] = []
    draw_strip = train.Batches.draw_strip

    def counted(batches: train.Batches, rng: np.random.Generator, defective: bool) -> Any:
        drawn.append(defective)
        return draw_strip(batches, rng, defective)

    monkeypatch.setattr(train.Batches, "draw_strip", counted)
    config = replace(CONFIG, defect_share=share, crop_steps=100, crops=2)
    batches = train.Batches(strips, config)
    there = [(batches[step][1].amax(dim=(1, 2, 3)) > 0).tolist() for step in range(100)]
    assert np.mean(drawn) == pytest.approx(share, abs=0.1 if 0 < share < 1 else 0)
    assert np.mean(there) <= share + 0.1
    assert np.mean(there) >= share * 0.75  # most of them show the defect itself


def test_rare_classes_are_drawn_oftener_than_they_are_and_common_ones_still_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = {1: 1, 2: 4, 3: 9, 4: 16}  # strips; their roots are 1, 2, 3 and 4
    truth = {f"{label}-{i}.jpg": {label: "1 1"} for label, n in counts.items() for i in range(n)}
    monkeypatch.setattr(train.Strips, "load", lambda _, name: (name, None))
    batches = train.Batches(train.Strips(Path("nowhere"), list(truth), truth, 4), CONFIG)
    rng = np.random.default_rng(0)
    drawn = [batches.draw_strip(rng, defective=True) for _ in range(1000)]
    assert all(name.startswith(f"{label}-") for name, _, label in drawn)
    shares = [np.mean([label == wanted for _, _, label in drawn]) for wanted in counts]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.04)


def test_batches_have_the_shapes_types_and_range_of_a_networks_input(strips: train.Strips) -> None:
    batches = train.Batches(strips, CONFIG)
    assert len(batches) == 7
    for step in range(7):
        images, masks = batches[step]
        size = CROP if step < 4 else SIZE
        count = 2 if step < 4 else 1
        assert (images.shape, masks.shape) == ((count, 1, *size), (count, 4, *size))
        assert images.dtype == masks.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1
        assert set(masks.unique().tolist()) <= {0.0, 1.0}


def test_step_i_is_always_the_same_batch_and_no_other_steps(strips: train.Strips) -> None:
    first, again = train.Batches(strips, CONFIG), train.Batches(strips, CONFIG)
    for step in reversed(range(7)):
        for tensor, same in zip(first[step], again[step], strict=True):
            assert torch.equal(tensor, same)
    images = [first[step][0].numpy().tobytes() for step in range(7)]
    assert len(set(images)) == 7
    other = train.Batches(strips, replace(CONFIG, seed=4))
    assert all(other[step][0].numpy().tobytes() != images[step] for step in range(7))


def test_about_half_of_the_whole_strips_are_clean(strips: train.Strips) -> None:
    batches = train.Batches(strips, replace(CONFIG, crop_steps=0, whole_steps=80))
    defective = [bool(batches[step][1].any()) for step in range(80)]
    assert 25 <= sum(defective) <= 55


def test_strips_without_any_clean_one_still_give_batches(strips: train.Strips) -> None:
    defective = sorted(set(strips.names) - set(strips.clean()))
    batches = train.Batches(replace(strips, names=defective), replace(CONFIG, defect_share=0.0))
    assert batches[0][0].shape == (2, 1, *CROP)


# --- loss -----------------------------------------------------------------------------------------


def target(seed: int = 0) -> Tensor:
    """Masks (2, 3, 16, 24); class 3 is absent."""
    masks = (torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(seed)) < 0.3).float()
    masks[:, 2] = 0
    assert 0.1 < masks.mean() < 0.3
    return masks


def answer(masks: Tensor, sure: float) -> train.Outputs:
    """Logits that are right where `sure` is above 0, and wrong below it; cells of 8 × 8 pixels."""
    cells = masks.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).amax(dim=(-3, -1))
    presence = masks.amax(dim=(-2, -1))
    right = (masks, presence, presence.amax(dim=0), cells)
    return train.Outputs(*(sure * (2 * answers - 1) for answers in right))


def test_the_loss_falls_from_wrong_to_unsure_to_right() -> None:
    masks = target()
    losses = [float(train.loss_of(answer(masks, sure), masks)) for sure in (-4, 0, 4, 12)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.02 < losses[1]


@pytest.mark.parametrize("head", ["masks", "presence", "together", "cells"])
def test_each_head_has_its_share_in_the_loss(head: str) -> None:
    masks = target()
    right, wrong = answer(masks, 6), answer(masks, -6)
    half_wrong = replace(right, **{head: getattr(wrong, head)})
    assert train.loss_of(half_wrong, masks) > train.loss_of(right, masks) + 1


def test_the_loss_of_a_clean_strip_is_finite_and_asks_for_nothing() -> None:
    masks = torch.zeros(1, 3, 16, 24)
    outputs = answer(masks, 2.0)
    logits = [outputs.masks, outputs.presence, outputs.together, outputs.cells]
    for tensor in logits:
        tensor.requires_grad_()
    loss = train.loss_of(outputs, masks)
    loss.backward()
    assert torch.isfinite(loss)
    assert all((tensor.grad > 0).all() for tensor in logits)  # down with every one


def test_an_absent_class_adds_nothing_to_the_overlap() -> None:
    masks = target()
    outputs = answer(masks, 6)
    two = train.Outputs(
        outputs.masks[:, :2], outputs.presence[:, :2], outputs.together[:2], outputs.cells[:, :2]
    )
    alone, beside = train.loss_of(two, masks[:, :2]), train.loss_of(outputs, masks)
    assert float(beside) == pytest.approx(float(alone), abs=0.01)


def test_a_cell_asks_for_what_lies_in_it() -> None:
    masks = torch.zeros(1, 1, 16, 24)
    masks[0, 0, 9, 17] = 1  # one pixel, in the last of 2 × 3 cells

    def loss(cell: int) -> float:
        cells = torch.full((1, 1, 6), -8.0)
        cells[..., cell] = 8
        outputs = replace(answer(masks, 8), cells=cells.view(1, 1, 2, 3))
        return float(train.loss_of(outputs, masks))

    assert min(range(6), key=loss) == 5


def test_each_part_has_a_cycle_of_its_own_and_no_step_stands_still() -> None:
    config = replace(CONFIG, crop_steps=200, whole_steps=40)
    rates = [config.rate(step) for step in range(config.steps)]
    crops, whole = rates[:200], rates[200:]
    assert 0.9 < max(crops) <= 1
    assert 0.25 < max(whole) <= 0.3
    for part in (crops, whole):
        peak = part.index(max(part))
        assert 0 < peak < len(part) / 4
        assert part[: peak + 1] == sorted(part[: peak + 1])
        assert part[peak:] == sorted(part[peak:], reverse=True)
        assert 0 < part[-1] < max(part) / 50
    assert min(rates) > 0


@pytest.mark.parametrize("arch", ["Unet", "FPN"])
def test_the_trained_outputs_are_those_of_the_whole_network(arch: str) -> None:
    network = train.Fit(replace(CONFIG, arch=arch)).network.eval()
    images = torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        masks, presence = network(images)
        outputs = train.outputs_of(network, images)
        deepest = network.encoder(images)[-1]  # (2, channels, 2, 3)
        one = deepest[:, :, 1:2, 2:3]  # a pool over one cell is that cell
        cell = network.classification_head(one)
        batch = network.classification_head(torch.cat(list(deepest), dim=-1)[None])
    assert torch.equal(outputs.masks, masks)
    assert torch.equal(outputs.presence, presence)
    assert torch.allclose(outputs.together, batch[0], atol=1e-5)
    assert outputs.cells.shape == (2, 4, 2, 3)
    assert torch.allclose(outputs.cells[:, :, 1, 2], cell, atol=1e-5)


# --- batch-norm statistics ------------------------------------------------------------------------


def conv_and_norm() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=0.01), nn.Dropout(0.5))
    network(torch.rand(2, 1, 8, 8))  # statistics of something else, to be forgotten
    return network


def strips_drawn(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(1, 1, 10, 14, generator=generator) * (i + 1) for i in range(count)]


def test_retaken_statistics_are_the_plain_mean_over_the_strips() -> None:
    network, images = conv_and_norm(), strips_drawn()
    with torch.no_grad():
        features = [network[0](image)[0].flatten(1) for image in images]  # (3, pixels)
    train.retake_statistics(network, images)
    mean = torch.stack([f.mean(dim=1) for f in features]).mean(dim=0)
    variance = torch.stack([f.var(dim=1) for f in features]).mean(dim=0)
    norm = network[1]
    assert norm.running_mean.tolist() == pytest.approx(mean.tolist(), rel=1e-4)
    assert norm.running_var.tolist() == pytest.approx(variance.tolist(), rel=1e-4)


def test_retaking_leaves_the_weights_the_momentum_and_an_evaluated_network() -> None:
    network, untouched = conv_and_norm(), conv_and_norm()
    train.retake_statistics(network, strips_drawn())
    for found, expected in zip(network.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert network[1].momentum == 0.01
    assert not any(module.training for module in network.modules())


def test_frozen_statistics_stay_while_the_rest_trains() -> None:
    network = conv_and_norm().train()
    before = network[1].running_mean.clone()
    train.freeze_statistics(network)
    network(strips_drawn()[0])
    assert torch.equal(network[1].running_mean, before)
    assert network[1].weight.requires_grad
    assert network[2].training


def test_unfrozen_statistics_move() -> None:
    network = conv_and_norm().train()
    before = network[1].running_mean.clone()
    network(strips_drawn()[0])
    assert not torch.equal(network[1].running_mean, before)


# --- fitting --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return train.Fit(CONFIG).network.eval()


class Killed(Exception):
    """What stands for a kill."""


def weights_of(run: train.Fit) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.ema.module.state_dict().items()}


def killed_fit(
    config: train.Config,
    strips: train.Strips,
    state: Path,
    at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fits until step `at` is about to be taken; a state was saved after every second step."""
    take_step = train.Fit.take_step

    def dies(run: train.Fit, images: Tensor, masks: Tensor) -> float:
        if run.step == at:
            raise Killed
        return take_step(run, images, masks)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Fit, "take_step", dies)
        train.fit(config, strips, state)
    assert state.is_file()


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker process, a state every second step, batch-norm statistics from two strips."""
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    monkeypatch.setattr(
        train, "DataLoader", lambda *a, **named: DataLoader(*a, **named | {"num_workers": 0})
    )
    whole_strips = train.whole_strips
    monkeypatch.setattr(train, "whole_strips", lambda s, _, seed: whole_strips(s, 2, seed))


@pytest.mark.parametrize("at", [3, 4, 5], ids=["on crops", "between the parts", "on whole strips"])
@pytest.mark.parametrize("arch", ["Unet", "FPN"])
def test_a_fit_killed_and_resumed_ends_as_one_that_was_not(
    arch: str, at: int, strips: train.Strips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Presence head and FPN drop features at random: what is drawn must not depend on a kill."""
    quick(monkeypatch)
    config = replace(CONFIG, arch=arch)
    whole = weights_of(train.fit(config, strips, tmp_path / "whole.pt"))
    killed_fit(config, strips, tmp_path / "killed.pt", at, monkeypatch)
    resumed = train.fit(config, strips, tmp_path / "killed.pt")
    assert resumed.step == config.steps
    found = weights_of(resumed)
    assert found.keys() == whole.keys()
    differing = [name for name in whole if not torch.equal(found[name], whole[name])]
    assert not differing, f"{len(differing)} of {len(whole)} tensors differ, first {differing[:1]}"


def test_a_fit_trains_with_its_worker_process(strips: train.Strips, tmp_path: Path) -> None:
    config = replace(CONFIG, crop_steps=1, whole_steps=1)
    before = train.Fit(config).network.state_dict()
    run = train.fit(config, strips, tmp_path / "runs" / "tiny.pt")
    assert run.step == 2
    assert run.seconds > 0
    after = run.ema.module.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in after.values())


def test_a_fit_goes_on_from_a_checkpoint(network: nn.Module, tmp_path: Path) -> None:
    train.write_checkpoint(network, CONFIG, tmp_path / "first.safetensors")
    weights = load_file(tmp_path / "first.safetensors")
    found = train.Fit(replace(CONFIG, seed=8), weights).network.state_dict()
    drawn = train.Fit(replace(CONFIG, seed=8)).network.state_dict()
    taken = {name for name in found if torch.equal(found[name], weights[name].to(found[name]))}
    anew = {name for name in found if name.startswith("classification_head.")}
    assert anew and all(torch.equal(found[name], drawn[name]) for name in anew)
    assert taken >= found.keys() - anew
    assert any(not torch.equal(found[name], drawn[name]) for name in taken)
    still = replace(CONFIG, seed=8, crop_steps=0, whole_steps=0)  # only that head's fit goes on
    whole = train.Fit(still, weights).network.state_dict()
    assert all(torch.equal(whole[name], value.to(whole[name])) for name, value in weights.items())


def test_a_fit_takes_another_architectures_encoder(network: nn.Module) -> None:
    weights = network.state_dict()
    found = train.Fit(replace(CONFIG, arch="FPN", seed=8), weights).network.state_dict()
    encoder = [name for name in weights if name.startswith("encoder.")]
    assert encoder
    assert all(torch.equal(found[name], weights[name]) for name in encoder)


def test_a_finished_fit_is_not_trained_again(
    strips: train.Strips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    config = replace(CONFIG, crop_steps=1, whole_steps=1)
    first = weights_of(train.fit(config, strips, tmp_path / "tiny.pt"))
    again = weights_of(train.fit(config, strips, tmp_path / "tiny.pt"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_kill_while_saving_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, path = train.Fit(replace(CONFIG, crop_steps=1)), tmp_path / "tiny.pt"
    run.save(path)
    old = path.read_bytes()

    def dies(state: Any, part: Path) -> None:
        part.write_bytes(b"half a state")
        raise Killed

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(Killed):
        run.save(path)
    assert path.read_bytes() == old


def test_the_statistics_are_frozen_in_the_second_part_only(strips: train.Strips) -> None:
    run = train.Fit(replace(CONFIG, crop_steps=1, whole_steps=1))
    batches = train.Batches(strips, run.config)
    norm = next(m for m in run.network.modules() if isinstance(m, nn.BatchNorm2d))
    moved = []
    for step in range(2):
        before = norm.running_mean.clone()
        run.take_step(*batches[step])
        moved.append(not torch.equal(before, norm.running_mean))
    assert moved == [True, False]


# --- both heads once more -------------------------------------------------------------------------


def test_the_presence_layer_on_pooled_features_is_the_networks_presence(
    network: nn.Module, strips: train.Strips
) -> None:
    some = strips.some(1, 4)
    pooled, present = train.pooled_features(network, CONFIG, some)
    assert some.names == strips.names[1:4]
    for row, name in enumerate(some.names):
        image, masks = some.load(name)
        grey = torch.from_numpy(image / 255).float()[None, None]
        with torch.inference_mode():
            _, presence = network((grey - CONFIG.mean) / CONFIG.std)
            found = train.presence_layer(network)(pooled[row])
        assert torch.allclose(found, presence[0], atol=1e-4)
        assert present[row].bool().tolist() == masks.any(axis=(1, 2)).tolist()
    assert pooled.std() > 0


def refit_example() -> tuple[nn.Linear, Tensor, Tensor]:
    """A head that shuts every gate; features of which one tells a class of one strip in thirty."""
    draw = torch.Generator().manual_seed(4)
    pooled = torch.rand(300, 6, generator=draw) * torch.tensor([1, 1, 1, 1, 10, 0.1])
    present = torch.zeros(300, 2)
    present[::30, 0] = 1
    present[::2, 1] = 1
    pooled[:, 2] += present[:, 0]
    layer = nn.Linear(6, 2)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, -4)
    return layer, pooled, present


def test_the_refitted_presence_opens_the_gate_of_a_rare_class() -> None:
    layer, pooled, present = refit_example()
    train.refit_presence(layer, pooled, present)
    gates = layer(pooled).sigmoid()[:, 0]
    assert gates[present[:, 0] > 0].mean() > 0.7
    assert gates[present[:, 0] == 0].mean() < 0.1


def test_the_refitted_presence_is_the_tethered_optimum() -> None:
    """scipy's own optimiser of the same sum, written apart, finds the same weights."""
    layer, pooled, present = refit_example()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(5))
    trained = layer.weight.detach().double().numpy()
    train.refit_presence(layer, pooled, present)
    features, labels = pooled.double().numpy(), present.numpy()

    def objective(flat: np.ndarray) -> float:
        weight, bias = flat[:12].reshape(2, 6), flat[12:]
        logits = features @ weight.T + bias
        losses = 8 * labels * np.logaddexp(0, -logits) + (1 - labels) * np.logaddexp(0, logits)
        return losses.mean() + 0.01 * (((weight - trained) * features.std(axis=0)) ** 2).sum()

    best = minimize(objective, np.zeros(14), method="BFGS")
    found = np.concatenate([layer.weight.detach().numpy().ravel(), layer.bias.detach().numpy()])
    assert objective(found) < best.fun + 1e-4  # in single precision


def mask_logits(network: nn.Module, image: np.ndarray) -> np.ndarray:
    grey = torch.from_numpy(image / 255).float()[None, None]
    with torch.inference_mode():
        logits: Tensor = network.eval()((grey - CONFIG.mean) / CONFIG.std)[0][0]
    return logits.numpy()


def dices_at(network: nn.Module, strips: train.Strips, levels: list[float]) -> np.ndarray:
    """Mean Dice (levels, classes) of what is there, cut at levels, with the competition's Dice."""
    dices = []
    for name in strips.names:
        image, masks = strips.load(name)
        logits, there = mask_logits(network, image), masks.any(axis=(1, 2))
        dices.append([np.where(there, dice(logits > level, masks), np.nan) for level in levels])
    return np.nanmean(dices, axis=0)


@pytest.mark.parametrize("arch", ["Unet", "FPN"])
def test_the_refitted_masks_are_cut_where_they_score_most(arch: str, strips: train.Strips) -> None:
    """Against every level tried, one strip after another."""
    config = replace(CONFIG, arch=arch)
    torch.manual_seed(7)
    network = build_network(config.spec.model)
    levels = train.LEVELS.tolist()
    tried = dices_at(network, strips, levels)
    found = train.best_levels(network, config, strips)
    image, _ = drawn_pair()
    before = mask_logits(network, image)
    train.refit_masks(network, config, strips)
    moved = mask_logits(network, image) - before
    assert np.ptp(tried, axis=0).min() > 0.01  # the level matters
    for label, level in enumerate(found.tolist()):
        assert tried[levels.index(level), label] == pytest.approx(tried[:, label].max(), abs=1e-5)
        assert np.allclose(moved[label], config.level - level, atol=1e-4)
    now = dices_at(network, strips, [config.level])[0]
    assert now == pytest.approx(tried.max(axis=0), abs=0.01)


def test_a_class_that_no_strip_has_keeps_its_level(
    network: nn.Module, strips: train.Strips
) -> None:
    cut = 1 / (1 + np.exp(-CONFIG.level))
    assert cut == pytest.approx(0.55)  # the competition's recipe
    without = replace(strips, names=[n for n in strips.names if 2 not in strips.truth.get(n, {})])
    found = train.best_levels(network, CONFIG, without)
    assert found[1] == torch.tensor(CONFIG.level)
    assert all(found[i] in train.LEVELS for i in (0, 2, 3))


def test_of_each_class_some_strips_are_chosen(strips: train.Strips) -> None:
    chosen = strips.some_of_each(2)
    for label in (1, 2, 3, 4):
        assert chosen.with_class(label)[:2] == strips.with_class(label)[:2]
    assert len(chosen.names) <= 8 < len(strips.names)


# --- results --------------------------------------------------------------------------------------


def test_the_checkpoint_is_loaded_by_the_kernel(network: nn.Module, tmp_path: Path) -> None:
    train.write_checkpoint(network, CONFIG, tmp_path / "tiny.safetensors")
    member = load_member(tmp_path, CONFIG.spec, torch.device("cpu"))
    images = torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, presence = network((images - CONFIG.mean) / CONFIG.std)
        found = member(images)
    expected = logits.sigmoid() * presence.sigmoid()[:, :, None, None]
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < 0.02  # fp16 on disk


def test_the_checkpoints_header_holds_its_manifest_entry_and_its_weights_are_halves(
    network: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.safetensors"
    train.write_checkpoint(network, CONFIG, path)
    data = path.read_bytes()  # 8 bytes: the header's length; then JSON
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    entry = json.loads(header.pop("__metadata__")["member"])
    assert MemberSpec(**entry) == CONFIG.spec
    assert entry["model"]["encoder_name"] == "tu-test_resnet"
    assert {tensor["dtype"] for tensor in header.values()} == {"F16", "I64"}


def test_validation_scores_the_gated_member_on_whole_strips(
    network: nn.Module, strips: train.Strips
) -> None:
    some = replace(strips, names=strips.names[:3])
    scores = train.validate(network, CONFIG, some)
    expected = Scores()
    for name in some.names:
        image, masks = some.load(name)
        grey = torch.from_numpy(image / 255).float()[None, None]
        with torch.inference_mode():
            logits, presence = network((grey - CONFIG.mean) / CONFIG.std)
        gated = logits.sigmoid() * presence.sigmoid()[:, :, None, None]
        expected.add((gated[0] > 0.55).numpy(), masks)
    assert scores.summary() == expected.summary()
    assert len(scores.all_pairs) == 12


def test_each_experiment_adds_its_row_under_one_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "experiments.csv"
    monkeypatch.setattr(train, "EXPERIMENTS", path)
    scores = Scores()
    mask = np.zeros((1, 4, 4), np.bool_)
    mask[0, 0, 0] = True
    scores.add(mask, mask)
    scores.add(~mask, mask & False)
    for comment in ("first try", 'a comma, and "quotes"'):
        train.note_experiment(CONFIG, scores, 90, comment)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("comment") for row in rows] == ["first try", 'a comma, and "quotes"']
    expected = {
        "name": "tiny", "fold": "0", "encoder": "tu-test_resnet", "decoder": "Unet", "steps": "4+3",
        "dice": "0.5", "dice_non_empty": "1.0", "clean_left_empty": "0.0", "minutes": "1.5",
    }  # fmt: skip
    assert rows == [expected, expected]


def test_the_script_fits_validates_and_leaves_checkpoint_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch)
    steel_folder(tmp_path / "data", "2019")
    monkeypatch.setattr(train, "EXPERIMENTS", tmp_path / "experiments.csv")
    arguments = SimpleNamespace(
        data=tmp_path / "data", name="mine", encoder="tu-test_resnet", arch="Unet", fold=1, folds=3,
        crop_steps=1, whole_steps=1, classes=4, seed=0, validation_strips=2, out=tmp_path,
        runs=tmp_path / "runs", comment="smoke",
    )  # fmt: skip
    words = [w for k, v in vars(arguments).items() for w in (f"--{k.replace('_', '-')}", str(v))]
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    train.main()
    printed = capsys.readouterr().out
    assert "mine: 16 strips to train on, 8 held out" in printed
    spec = train.Config("mine", "tu-test_resnet", "Unet").spec
    assert load_member(tmp_path, spec, torch.device("cpu")).spec.gated
    assert "mine,1,tu-test_resnet,Unet,1+1," in (tmp_path / "experiments.csv").read_text()
