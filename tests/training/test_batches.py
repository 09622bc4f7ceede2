"""Batches: where crops lie, how often each class and folder is drawn, and their order."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CLASSES, LABELS, SMALL, draw_image

from kernel.competition import SEVERSTAL
from training.batches import Batches, StripSampler, crop_at, pad_to_size
from training.config import Config
from training.strips import Strips

CROP = (32, 64)


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
    image = draw_image(0)
    masks = np.stack([image < 80, image > 170])
    top, left = corner
    window = (slice(top, top + 32), slice(left, left + 64))
    np.testing.assert_array_equal(crop_at(image, centre, CROP), image[window])
    np.testing.assert_array_equal(crop_at(masks, centre, CROP), masks[:, *window])


def test_a_crop_wider_than_the_image_is_the_image() -> None:
    image = draw_image(0)
    np.testing.assert_array_equal(crop_at(image, (5, 5), (100, 200)), image)


def test_padding_repeats_the_last_row_and_column_of_the_last_two_axes() -> None:
    array = np.arange(12).reshape(2, 2, 3)
    padded = pad_to_size(array, (3, 5))
    assert padded.shape == (2, 3, 5)
    np.testing.assert_array_equal(padded[:, :2, :3], array)
    assert padded[0].tolist() == [[0, 1, 2, 2, 2], [3, 4, 5, 5, 5], [3, 4, 5, 5, 5]]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_asked_share_of_crops_lies_on_a_defective_strip(
    share: float, strips: Strips, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[bool] = []
    sample_strip = StripSampler.sample_strip

    def counted(sampler: StripSampler, rng: np.random.Generator, defective: bool) -> Any:
        drawn.append(defective)
        return sample_strip(sampler, rng, defective)

    monkeypatch.setattr(StripSampler, "sample_strip", counted)
    config = replace(config, defect_share=share, crop_steps=60, crops=2)
    batches = Batches([strips], config)
    there = [batches[step][1].any(dim=-1).any(dim=-1).any(dim=-1).tolist() for step in range(60)]
    assert np.mean(drawn) == pytest.approx(share, abs=0.1 if 0 < share < 1 else 0)
    assert drawn == [each for pair in there for each in pair]


def test_a_crop_holds_a_pixel_of_the_class_that_was_drawn_off_its_centre(
    strips: Strips, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[int] = []
    sample_strip = StripSampler.sample_strip

    def noted(sampler: StripSampler, rng: np.random.Generator, defective: bool) -> Any:
        image, masks, label = sample_strip(sampler, rng, defective)
        one_pixel = np.zeros_like(masks)
        row, column = np.argwhere(masks[label - 1])[0]  # type: ignore[operator]
        one_pixel[label - 1, row, column] = True  # type: ignore[operator]
        labels.append(label or 0)
        return image, one_pixel, label

    monkeypatch.setattr(StripSampler, "sample_strip", noted)
    sampler, rng = StripSampler(strips, replace(config, defect_share=1.0)), np.random.default_rng(0)
    places = []
    for _ in range(80):
        image, masks = sampler.sample_crop(rng)
        [(channel, *place)] = np.argwhere(masks).tolist()
        assert (image.shape, channel + 1) == (CROP, labels[-1])
        places.append(place)
    rows, columns = np.ptp(places, axis=0)
    assert set(labels) == set(LABELS) and rows > 10 and columns > 20


def test_rare_classes_are_drawn_oftener_than_they_are_and_common_ones_still_more(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {1: 1, 2: 4, 3: 9, 4: 16}  # strips; their roots are 1, 2, 3 and 4
    truth = {f"{label}-{i}.jpg": {label: "1 1"} for label, n in counts.items() for i in range(n)}
    monkeypatch.setattr(Strips, "load", lambda _, name: (name, None))
    whole = Strips(Path("nowhere"), list(truth), truth, SEVERSTAL)

    def shares(evenness: float) -> list[float]:
        sampler = StripSampler(whole, replace(config, evenness=evenness))
        rng = np.random.default_rng(0)
        drawn: list[Any] = [sampler.sample_strip(rng, defective=True) for _ in range(1000)]
        assert all(name.startswith(f"{label}-") for name, _, label in drawn)
        return [float(np.mean([label == wanted for _, _, label in drawn])) for wanted in counts]

    assert shares(0.5) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.04)
    assert shares(0.0) == pytest.approx([0.25] * 4, abs=0.04)
    assert shares(1.0) == pytest.approx([1 / 30, 4 / 30, 9 / 30, 16 / 30], abs=0.04)


def test_batches_have_the_shapes_types_and_range_of_a_networks_input(
    strips: Strips, config: Config
) -> None:
    batches = Batches([strips], config)
    assert len(batches) == 7
    for step in range(7):
        images, masks = batches[step]
        size = CROP if step < 4 else SMALL
        count = 2 if step < 4 else 1
        assert (images.shape, masks.shape) == ((count, 1, *size), (count, CLASSES, *size))
        assert (images.dtype, masks.dtype) == (torch.float32, torch.bool)
        assert 0 <= images.min() < images.max() <= 1


def test_step_i_is_always_the_same_batch_and_no_other_steps(strips: Strips, config: Config) -> None:
    first, again = Batches([strips], config), Batches([strips], config)
    for step in reversed(range(7)):
        for tensor, same in zip(first[step], again[step], strict=True):
            assert torch.equal(tensor, same)
    images = [first[step][0].numpy().tobytes() for step in range(7)]
    assert len(set(images)) == 7
    other = Batches([strips], replace(config, seed=4))
    assert all(other[step][0].numpy().tobytes() != images[step] for step in range(7))


def test_a_strip_that_cannot_be_read_costs_a_draw_and_step_i_stays_the_same_batch(
    strips: Strips, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, torn = Path(shutil.copytree(strips.folder, tmp_path / "torn")), strips.with_class(3)[0]
    (folder / torn).write_bytes(b"torn")
    config = replace(config, crop_steps=0, whole_steps=80)
    damaged = replace(strips, folder=folder, whole=set())
    whole, first, again = (Batches([each], config) for each in (strips, damaged, damaged))
    redrawn = 0
    for step in range(80):
        caplog.clear()
        image, masks = first[step]
        left_out = f"left out: {folder / torn}: " in caplog.text
        assert torch.equal(image, whole[step][0]) != left_out
        assert all(map(torch.equal, (image, masks), again[step]))
        redrawn += left_out
    assert 0 < redrawn < 40


def test_strips_of_which_none_can_be_read_end_the_draws(strips: Strips, config: Config) -> None:
    gone = Batches([replace(strips, folder=Path("gone"))], config)
    with pytest.raises(FileNotFoundError, match="gone"):
        gone[0]


def test_about_half_of_the_whole_strips_are_clean(strips: Strips, config: Config) -> None:
    batches = Batches([strips], replace(config, crop_steps=0, whole_steps=80))
    defective = [bool(batches[step][1].any()) for step in range(80)]
    assert 25 <= sum(defective) <= 55


def test_strips_without_any_clean_one_still_give_batches(strips: Strips, config: Config) -> None:
    defective = sorted(set(strips.names) - set(strips.clean()))
    batches = Batches([replace(strips, names=defective)], replace(config, defect_share=0.0))
    assert batches[0][0].shape == (2, 1, *CROP)


def test_clean_strips_alone_still_give_batches(strips: Strips, config: Config) -> None:
    batches = Batches([replace(strips, names=strips.clean())], replace(config, defect_share=1.0))
    assert batches[0][0].shape == (2, 1, *CROP)
    assert not batches[0][1].any()


def test_each_folder_is_drawn_from_in_its_share(strips: Strips, config: Config) -> None:
    sources = [replace(strips, folder=Path(name)) for name in ("own", "first", "second")]
    batches = Batches(sources, replace(config, extra_shares=(0.3, 0.2)))
    rng = np.random.default_rng(0)
    drawn = [batches.sampler(rng).strips.folder.name for _ in range(1000)]
    shares = [np.mean([name == wanted for name in drawn]) for wanted in ("own", "first", "second")]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.04)


def test_crops_of_images_of_several_sizes_are_padded_to_the_largest(config: Config) -> None:
    class Mixed(Strips):
        def load(self, name: str) -> Any:
            size = (20, 40) if name == "small" else SMALL
            return draw_image(0, size), np.zeros((CLASSES, *size), np.bool_)

    mixed = Mixed(Path("nowhere"), ["small", "large"], {}, SEVERSTAL)
    batches = Batches([mixed], replace(config, crops=8))
    images, masks = batches[0]
    assert (images.shape, masks.shape) == ((8, 1, *CROP), (8, CLASSES, *CROP))


@pytest.mark.parametrize("method", ["seamless", "paste"])
def test_moved_defects_keep_the_class_that_was_drawn(
    method: str, strips: Strips, config: Config
) -> None:
    still = StripSampler(strips, config)
    moving = StripSampler(strips, replace(config, moved_share=1.0, moved_method=method))
    own = {masks.tobytes() for masks in (strips.load(name)[1] for name in strips.names)}
    moved = 0
    for seed in range(40):
        image, masks, label = moving.sample_strip(np.random.default_rng(seed), True)
        assert label is not None and masks[label - 1].any()
        assert label == still.sample_strip(np.random.default_rng(seed), True)[2]
        assert (image.shape, masks.shape) == (SMALL, (CLASSES, *SMALL))
        moved += masks.tobytes() not in own
    assert moved > 10
