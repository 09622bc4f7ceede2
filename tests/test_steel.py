"""The synthetic strips: reproducible, labelled right, and statistically like the real ones."""

import argparse
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from weights import steel

ROOT = Path(__file__).parents[1]
SMALL = (32, 48)


def strip(seed, classes=(), size=(64, 400)):
    return steel.draw_strip(np.random.default_rng(seed), classes, size)


def decoded(run, size):
    """An independent decoder: pixel by pixel, down the columns."""
    mask = np.zeros(size, bool)
    numbers = [int(number) for number in run.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        for pixel in range(start - 1, start - 1 + length):
            mask[pixel % size[0], pixel // size[0]] = True
    return mask


def written(folder, train=6, test=4, **options):
    steel.write_competition(folder, train, test, 3, size=SMALL, **options)
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def test_the_same_seed_draws_the_same_bytes(tmp_path):
    first, second = written(tmp_path / "a"), written(tmp_path / "b")
    assert len(files(first)) == 10
    assert files(first) == files(second)
    for name in ("train.csv", "test.csv", "sample_submission.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_strips_differ_and_none_is_constant():
    images = [strip(seed)[0] for seed in range(12)]
    assert len({image.tobytes() for image in images}) == 12
    assert min(image.std() for image in images) > 2


@pytest.mark.parametrize("size", [(256, 1600), (64, 128), (32, 48), (33, 47), (100, 60)])
@pytest.mark.parametrize("classes", [(), (1,), (2,), (3,), (4,), (1, 3)])
def test_just_the_asked_classes_are_in_the_masks_at_any_size(size, classes):
    for seed in range(3):
        image, masks = strip(seed, classes, size)
        assert image.shape == size and image.dtype == np.uint8
        assert masks.shape == (4, *size) and masks.dtype == bool
        assert tuple(np.flatnonzero(masks.any((1, 2))) + 1) == classes
        assert not masks.all((1, 2)).any()


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_defect_changes_the_picture_inside_its_mask_and_only_there(number, monkeypatch):
    image, masks = strip(number, (number,))
    blank = tuple(lambda *a, f=f: (f(*a)[0], np.ones(a[1], np.float32)) for f in steel.DEFECTS)
    monkeypatch.setattr(steel, "DEFECTS", blank)
    clean, same = strip(number, (number,))
    changed = np.abs(image.astype(int) - clean) > 3
    assert (masks == same).all()
    assert changed[masks[number - 1]].mean() > 0.4
    assert (
        changed[~cv2.dilate(masks[number - 1].view(np.uint8), np.ones((5, 5))).astype(bool)].mean()
        < 0.01
    )


@pytest.mark.parametrize(("number", "pixels"), [(1, 1900), (2, 3300), (3, 4600), (4, 23000)])
def test_the_median_mask_is_as_large_as_in_the_competition(number, pixels):
    areas = [strip([seed, number], (number,), (256, 1600))[1].sum() for seed in range(20)]
    assert pixels / 2 < np.median(areas) < pixels * 2


def test_grey_levels_over_a_set_are_those_of_the_real_strips():
    drawn = [np.random.default_rng([5, seed]) for seed in range(30)]
    images = [steel.draw_strip(rng, steel.draw_classes(rng, steel.SHARES))[0] for rng in drawn]
    assert 0.29 < np.mean(images) / 255 < 0.39  # 0.34 on 22 real strips
    assert 0.10 < np.mean([image.std() for image in images]) / 255 < 0.17  # 0.13
    assert 0.15 < np.mean([(image.mean(0) < 10).mean() > 0.04 for image in images]) < 0.6  # 8 of 22


def test_a_file_is_as_large_as_the_real_ones_and_has_three_channels(tmp_path):
    steel.write_competition(tmp_path, 6, 0, 1)
    for path in (tmp_path / "train_images").iterdir():
        assert 20_000 < path.stat().st_size < 260_000  # real: 31–190 kB
        assert cv2.imread(str(path), cv2.IMREAD_UNCHANGED).shape == (256, 1600, 3)


@pytest.mark.parametrize("shares", [steel.SHARES, (1, 1, 1, 1)])
def test_classes_come_in_the_asked_shares(shares):
    rng = np.random.default_rng(0)
    strips = [steel.draw_classes(rng, shares) for _ in range(12568)]
    clean = strips.count(())
    counts = np.bincount(np.concatenate([s for s in strips if s]).astype(int), minlength=5)[1:]
    assert abs(clean - 5902) < 200
    assert np.allclose(
        counts / counts.sum(), np.array(shares) / sum(shares), atol=0.04
    )  # a second class is never the first again
    assert 250 < sum(len(s) == 2 for s in strips) < 600


def test_both_layouts_hold_the_same_masks(tmp_path):
    today = pd.read_csv(written(tmp_path / "a") / "train.csv")
    old = pd.read_csv(written(tmp_path / "b", layout="2019") / "train.csv", keep_default_na=False)
    assert list(today) == ["ImageId", "ClassId", "EncodedPixels"]
    assert list(old) == ["ImageId_ClassId", "EncodedPixels"]
    assert len(old) == 4 * 6 and 0 < len(today) < 4 * 6
    runs = {f"{row.ImageId}_{row.ClassId}": row.EncodedPixels for row in today.itertuples()}
    assert runs == {key: run for key, run in old.itertuples(index=False) if run}


def test_the_csv_holds_the_masks_that_were_drawn(tmp_path):
    truth = pd.read_csv(written(tmp_path) / "test.csv")
    runs = {(row.ImageId, row.ClassId): row.EncodedPixels for row in truth.itertuples()}
    for index in range(4):
        rng = np.random.default_rng([3, steel.TEST, index])
        _, masks = steel.draw_strip(rng, steel.draw_classes(rng, steel.SHARES), SMALL)
        for number, mask in enumerate(masks, 1):
            run = runs.pop((steel.strip_name(3, steel.TEST, index), number), "")
            assert (decoded(run, SMALL) == mask).all()
    assert not runs


def test_an_unknown_layout_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="2020"):
        written(tmp_path / "a", layout="2020")
    assert not (tmp_path / "a").exists()


def test_the_sample_has_one_row_a_test_strip_in_name_order(tmp_path):
    folder = written(tmp_path)
    sample = (folder / "sample_submission.csv").read_text().splitlines()
    names = sorted(path.name for path in (folder / "test_images").iterdir())
    assert sample == ["ImageId,EncodedPixels,ClassId"] + [f"{n},1 {32 * 48},0" for n in names]


def test_a_smaller_set_is_part_of_a_larger_one(tmp_path):
    small, large = written(tmp_path / "a", 3, 2), written(tmp_path / "b", 7, 5)
    assert files(small).items() < files(large).items()
    rows = set((small / "train.csv").read_text().splitlines())
    assert rows <= set((large / "train.csv").read_text().splitlines())


def test_names_are_nine_hex_digits_and_never_collide():
    names = {steel.strip_name(7, split, i) for split in (0, 1) for i in range(5000)}
    assert len(names) == 10_000
    assert all(len(name) == 13 and int(name[:9], 16) >= 0 for name in names)


def test_shares_change_the_train_strips_alone(tmp_path):
    natural = written(tmp_path / "a", 20, 6)
    balanced = written(tmp_path / "b", 20, 6, shares=(1, 1, 1, 1))
    assert files(natural / "test_images") == files(balanced / "test_images")
    assert files(natural / "train_images") != files(balanced / "train_images")


def test_the_script_writes_in_two_processes_what_the_function_writes_in_one(tmp_path):
    command = [sys.executable, ROOT / "weights/steel.py", "--out", tmp_path / "a"]
    counts = ["--train", "3", "--test", "2", "--seed", "3", "--jobs", "2", "--shares", *"1111"]
    subprocess.run([*command, *counts, "--size", "32x48", "--layout", "2019"], check=True)
    written(tmp_path / "b", 3, 2, layout="2019", shares=(1, 1, 1, 1))
    names = ["sample_submission.csv", "test.csv", "test_images", "train.csv", "train_images"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for name in ("sample_submission.csv", "test.csv", "train.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_size_that_is_none_is_refused_with_an_example():
    assert steel.parse_size("64x128") == (64, 128)
    for text in ("big", "64", "64x", "-1x9"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text}.*256x1600"):
            steel.parse_size(text)


@pytest.mark.parametrize("count", [8, 40, 400])
def test_among_few_strips_that_are_drawn_evenly_the_share_of_defective_ones_is_kept(
    count: int,
) -> None:
    rng = np.random.default_rng(2)
    strips = [steel.draw_evenly(rng, steel.SHARES, index) for index in range(count)]
    assert sum(map(bool, strips)) == int(count * steel.DEFECTIVE)
    assert strips[0] == () and len(set(strips)) > 1
