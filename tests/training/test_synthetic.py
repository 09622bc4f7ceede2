"""The synthetic strips: reproducible, labelled right, and statistically like the real ones."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from helpers import decode_by_hand, error_of, exit_code

from kernel.images import Image, Size
from training import defects, synthetic
from training.defects import Look
from training.metrics import Masks
from training.synthetic import Drawing, write_competition

SMALL = (32, 48)


def synthesize(
    seed: int | Sequence[int], classes: Sequence[int] = (), size: Size = (64, 400)
) -> tuple[Image, Masks]:
    return synthetic.synthesize_strip(np.random.default_rng(seed), classes, size)


def written(folder: Path, train: int = 6, test: int = 4, **options: Any) -> Path:
    write_competition(folder, Drawing(3, SMALL), train, test, **options)
    return folder


def images_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def test_strips_that_no_row_would_name_are_not_left_behind(tmp_path: Path) -> None:
    """Strips of a longer run would count as clean ones."""
    before = images_of(written(tmp_path, train=0))
    with pytest.raises(ValueError, match=r"test_images: holds files already; give another --out"):
        written(tmp_path, train=3, test=0)
    assert images_of(tmp_path) == before  # none was drawn


def test_the_same_seed_draws_the_same_bytes(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a"), written(tmp_path / "b")
    assert len(images_of(first)) == 10
    assert images_of(first) == images_of(second)
    for name in ("train.csv", "test.csv", "sample_submission.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_strips_differ_and_none_is_constant() -> None:
    images = [synthesize(seed)[0] for seed in range(12)]
    assert len({image.tobytes() for image in images}) == 12
    assert min(image.std() for image in images) > 2


@pytest.mark.parametrize("size", [(256, 1600), (64, 128), (32, 48), (33, 47), (100, 60)])
@pytest.mark.parametrize("classes", [(), (1,), (2,), (3,), (4,), (1, 3)])
def test_just_the_asked_classes_are_in_the_masks_at_any_size(
    size: Size, classes: tuple[int, ...]
) -> None:
    for seed in range(3):
        image, masks = synthesize(seed, classes, size)
        assert image.shape == size and image.dtype == np.uint8
        assert masks.shape == (4, *size) and masks.dtype == bool
        assert tuple(np.flatnonzero(masks.any((1, 2))) + 1) == classes
        assert not masks.all((1, 2)).any()


def without_gain(look: Look) -> Look:
    """A look that draws the same numbers and shows nothing."""
    return replace(look, gain=lambda *a: np.ones_like(look.gain(*a)))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_defect_changes_the_picture_inside_its_mask_and_only_there(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, masks = synthesize(number, (number,))
    looks = tuple(tuple(map(without_gain, of_class)) for of_class in defects.LOOKS)
    monkeypatch.setattr(defects, "LOOKS", looks)
    clean, same = synthesize(number, (number,))
    changed = np.abs(image.astype(int) - clean) > 3
    assert (masks == same).all()
    assert changed[masks[number - 1]].mean() > 0.4
    assert (
        changed[~cv2.dilate(masks[number - 1].view(np.uint8), np.ones((5, 5))).astype(bool)].mean()
        < 0.01
    )


@pytest.mark.parametrize(("number", "pixels"), [(1, 1900), (2, 3300), (3, 4600), (4, 23000)])
def test_the_median_mask_is_as_large_as_in_the_competition(number: int, pixels: int) -> None:
    areas = [synthesize([seed, number], (number,), (256, 1600))[1].sum() for seed in range(12)]
    assert pixels / 2 < np.median(areas) < pixels * 2


def test_grey_levels_over_a_set_are_those_of_the_real_strips() -> None:
    drawn = [np.random.default_rng([5, seed]) for seed in range(20)]
    images = [
        synthetic.synthesize_strip(rng, synthetic.draw_classes(rng, synthetic.SHARES))[0]
        for rng in drawn
    ]
    assert 0.29 < np.mean(images) / 255 < 0.39  # 0.34 on 22 real strips
    assert 0.10 < np.mean([image.std() for image in images]) / 255 < 0.17  # 0.13
    assert 0.15 < np.mean([(image.mean(0) < 10).mean() > 0.04 for image in images]) < 0.6  # 8 of 22


def test_a_file_is_as_large_as_the_real_ones_and_has_three_channels(tmp_path: Path) -> None:
    write_competition(tmp_path, Drawing(1), train=6)
    for path in (tmp_path / "train_images").iterdir():
        assert 20_000 < path.stat().st_size < 260_000  # real: 31–190 kB
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert image is not None and image.shape == (256, 1600, 3)


@pytest.mark.parametrize("shares", [synthetic.SHARES, (1, 1, 1, 1)])
def test_classes_come_in_the_asked_shares(shares: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    strips = [synthetic.draw_classes(rng, shares) for _ in range(12568)]
    clean = strips.count(())
    counts = np.bincount(np.concatenate([s for s in strips if s]).astype(int), minlength=5)[1:]
    assert abs(clean - 5902) < 200
    assert np.allclose(
        counts / counts.sum(), np.array(shares) / sum(shares), atol=0.04
    )  # a second class is never the first again
    assert 250 < sum(len(s) == 2 for s in strips) < 600


def test_both_layouts_hold_the_same_masks(tmp_path: Path) -> None:
    today = pd.read_csv(written(tmp_path / "a") / "train.csv")
    old = pd.read_csv(
        written(tmp_path / "b", layout="two-column") / "train.csv", keep_default_na=False
    )
    assert list(today) == ["ImageId", "ClassId", "EncodedPixels"]
    assert list(old) == ["ImageId_ClassId", "EncodedPixels"]
    assert len(old) == 4 * 6 and 0 < len(today) < 4 * 6
    runs = {f"{row.ImageId}_{row.ClassId}": row.EncodedPixels for row in today.itertuples()}
    assert runs == {key: run for key, run in old.itertuples(index=False) if run}


def test_the_csv_holds_the_masks_that_were_drawn(tmp_path: Path) -> None:
    truth = pd.read_csv(written(tmp_path) / "test.csv")
    runs = {(row.ImageId, row.ClassId): str(row.EncodedPixels) for row in truth.itertuples()}
    for index in range(4):
        rng = np.random.default_rng([3, synthetic.TEST, index])
        _, masks = synthetic.synthesize_strip(
            rng, synthetic.draw_classes(rng, synthetic.SHARES), SMALL
        )
        for number, mask in enumerate(masks, 1):
            run = runs.pop((synthetic.strip_name(3, synthetic.TEST, index), number), "")
            assert (decode_by_hand(run, SMALL) == mask).all()
    assert not runs


def test_an_unknown_layout_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--layout 2020: \S+ has two-column, three-column"):
        written(tmp_path / "a", layout="2020")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--shares", "0", "0", "1", "0"], "--shares 0 0 1 0: expected none below 0, and two"),
        (["--shares", "-1", "1", "1", "1"], "--shares -1 1 1 1: expected none below 0"),
        (["--jobs", "0"], "--jobs 0: expected 1 or more"),
        (["--test", "-3"], "--test -3: expected 0 or more"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    words: list[str], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(synthetic.main, "--out", tmp_path / "a", *words) == 2
    assert fault in error_of(capsys.readouterr().err)
    assert not (tmp_path / "a").exists()


def test_a_layout_that_another_competition_lacks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", tmp_path / "a", "--competition", "clouds", "--layout", "three-column"]
    assert exit_code(synthetic.main, *words) == 2
    assert "--layout three-column: understanding_cloud" in error_of(capsys.readouterr().err)
    assert not (tmp_path / "a").exists()


def test_the_sample_has_one_row_a_test_strip_in_name_order(tmp_path: Path) -> None:
    folder = written(tmp_path)
    sample = (folder / "sample_submission.csv").read_text().splitlines()
    names = sorted(path.name for path in (folder / "test_images").iterdir())
    assert sample == ["ImageId,EncodedPixels,ClassId"] + [f"{n},1 {32 * 48},0" for n in names]


def test_a_smaller_set_is_part_of_a_larger_one(tmp_path: Path) -> None:
    small, large = written(tmp_path / "a", 3, 2), written(tmp_path / "b", 7, 5)
    assert images_of(small).items() < images_of(large).items()
    rows = set((small / "train.csv").read_text().splitlines())
    assert rows <= set((large / "train.csv").read_text().splitlines())


def test_names_are_nine_hex_digits_and_never_collide() -> None:
    names = {synthetic.strip_name(7, split, i) for split in (0, 1) for i in range(5000)}
    assert len(names) == 10_000
    assert all(len(name) == 13 and int(name[:9], 16) >= 0 for name in names)


def test_shares_change_the_train_strips_alone(tmp_path: Path) -> None:
    natural = written(tmp_path / "a", 20, 6)
    balanced = written(tmp_path / "b", 20, 6, shares=(1, 1, 1, 1))
    assert images_of(natural / "test_images") == images_of(balanced / "test_images")
    assert images_of(natural / "train_images") != images_of(balanced / "train_images")


def test_the_script_writes_in_two_processes_what_the_function_writes_in_one(tmp_path: Path) -> None:
    counts = ["--train", 3, "--test", 2, "--seed", 3, "--jobs", 2, "--shares", *"1111"]
    words = ["--out", tmp_path / "a", *counts, "--size", "32x48", "--layout", "two-column"]
    assert exit_code(synthetic.main, *words) == 0
    written(tmp_path / "b", 3, 2, layout="two-column", shares=(1, 1, 1, 1))
    names = ["sample_submission.csv", "test.csv", "test_images", "train.csv", "train_images"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    assert images_of(tmp_path / "a") == images_of(tmp_path / "b")
    for name in ("sample_submission.csv", "test.csv", "train.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("count", [8, 40, 400])
def test_among_few_strips_that_are_drawn_evenly_the_share_of_defective_ones_is_kept(
    count: int,
) -> None:
    rng = np.random.default_rng(2)
    strips = [synthetic.draw_evenly(rng, synthetic.SHARES, index) for index in range(count)]
    assert sum(map(bool, strips)) == int(count * synthetic.DEFECTIVE)
    assert strips[0] == () and len(set(strips)) > 1


@pytest.mark.parametrize("name", ["train.csv", "sample_submission.csv"])
def test_a_csv_that_is_there_is_not_replaced(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("the competition's own")
    assert exit_code(synthetic.main, "--out", tmp_path, "--train", 1, "--test", 0) == 2
    assert f"{tmp_path / name}: is there already" in error_of(capsys.readouterr().err)
    assert (tmp_path / name).read_text() == "the competition's own"
    assert not (tmp_path / "train_images").exists()
