"""What synthetic strips take from real ones: their masks, and clean ones to lie on."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import decode_by_hand, draw_image, error_of, exit_code, save_image

from kernel.competition import SEVERSTAL
from kernel.rle import encode_rle
from training.real_parts import (
    RealParts,
    draw_background,
    draw_outline,
    find_backgrounds,
    read_outlines,
)
from training.synthetic import main, synthesize_strip

SMALL = (32, 48)
FULL = (256, 1600)


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A folder like the competition's: four masks, one of each class, and two clean strips."""
    folder, rows = tmp_path / "real", ["ImageId,ClassId,EncodedPixels"]
    for label in (1, 2, 3, 4):
        mask = np.zeros(FULL, np.bool_)
        mask[20 : 20 + 40 * label, 300 * label : 300 * label + 50] = True
        rows.append(f"{label}.png,{label},{encode_rle(mask, SEVERSTAL)}")
    for seed, name in enumerate(("1.png", "clean-a.png", "clean-b.png")):
        image = draw_image(seed, FULL)
        save_image(folder / "train_images" / name, np.clip(image, 60, 200).astype(np.uint8))
    (folder / "train_images" / "Thumbs.db").write_bytes(b"no image")
    (folder / "train.csv").write_text("\n".join([*rows, ""]), encoding="utf-8")
    return folder


def all_flips(array: np.ndarray) -> list[np.ndarray]:
    return [array[::down, ::right] for down in (1, -1) for right in (1, -1)]


def test_a_given_mask_is_a_strips_mask_flipped_or_not(real: Path) -> None:
    parts = RealParts(read_outlines(real / "train.csv"))
    assert {label: len(rles) for label, rles in parts.outlines.items()} == dict.fromkeys(
        (1, 2, 3, 4), 1
    )
    flips_seen = 0
    for label in (1, 2, 3, 4):
        given = all_flips(decode_by_hand(parts.outlines[label][0], FULL))
        taken = 0
        for seed in range(3):
            rng = np.random.default_rng(seed)
            _, masks = synthesize_strip(rng, (label,), FULL, parts)
            assert np.flatnonzero(masks.any((1, 2))).tolist() == [label - 1]
            same = [index for index, flip in enumerate(given) if (flip == masks[label - 1]).all()]
            taken += bool(same)
            flips_seen += any(same)
        assert taken  # one that would lie beside the steel is drawn instead
    assert flips_seen


def test_a_given_mask_keeps_to_the_steel_at_least_nine_tenths_of_it(real: Path) -> None:
    parts = RealParts(read_outlines(real / "train.csv"))
    steel = np.zeros(FULL, np.bool_)
    assert draw_outline(np.random.default_rng(0), 1, steel, parts) is None
    steel[:, :800] = True
    given = all_flips(decode_by_hand(parts.outlines[1][0], FULL))
    for seed in range(8):
        mask = draw_outline(np.random.default_rng(seed), 1, steel, parts)
        assert mask is not None and any((mask == flip).all() for flip in given)
        assert not mask[:, 800:].any()


def test_outside_its_masks_a_strip_is_the_given_background(real: Path) -> None:
    backgrounds = find_backgrounds(real / "train_images", real / "train.csv")
    assert [path.name for path in backgrounds] == ["clean-a.png", "clean-b.png"]
    outlines = read_outlines(real / "train.csv")
    parts = RealParts(outlines, backgrounds)
    clean = [
        flip
        for path in backgrounds
        for flip in all_flips(np.asarray(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)))
    ]
    for seed, label in enumerate((1, 2, 3, 4)):
        rng = np.random.default_rng(seed)
        image, masks = synthesize_strip(rng, (label,), FULL, parts)
        near = cv2.dilate(masks[label - 1].astype(np.uint8), np.ones((21, 21))).astype(bool)
        [under] = [flip for flip in clean if (flip[~near] == image[~near]).all()]
        assert (image != under)[masks[label - 1]].mean() > 0.2


def test_a_share_of_the_strips_lies_on_a_background(real: Path) -> None:
    backgrounds = find_backgrounds(real / "train_images", real / "train.csv")
    counts = []
    for share in (0.0, 0.5, 1.0):
        parts = RealParts({}, backgrounds, share)
        rngs = map(np.random.default_rng, range(40))
        drawn = [draw_background(rng, SMALL, parts) for rng in rngs]
        counts.append(sum(background is not None for background in drawn))
    assert counts[0] == 0 and 10 < counts[1] < 30 and counts[2] == 40


def test_clean_strips_are_those_of_a_list_and_of_a_truth_those_it_does_not_name(
    real: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "clean.txt"
    listed.write_text("clean-b.png\nelsewhere.png\n", encoding="utf-8")
    found = find_backgrounds(real / "train_images", listed)
    assert [path.name for path in found] == ["clean-b.png"]


def test_names_left_out_give_no_mask(real: Path) -> None:
    assert sorted(read_outlines(real / "train.csv", frozenset({"2.png"}))) == [1, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backgrounds", "real/train_images"], "--backgrounds needs --clean-list"),
        (["--masks", "nowhere.csv"], "nowhere.csv"),
        (["--masks", "outside.csv"], "outside.csv: mask of class 1 of a.jpg: run 409600 2 leaves"),
        (["--masks", "salt.csv", "--competition", "salt"], "; real parts are taken from Severstal"),
        (["--backgrounds", "real/train_images", "--clean-list", "salt.csv"], "; real parts are"),
        (["--masks", "real/train.csv", "--leave-out", "real/train.csv"], "train.csv: no mask"),
        (["--backgrounds", "gone", "--clean-list", "real/train.csv"], "gone"),
        (["--backgrounds", "real/train_images", "--clean-list", "none.txt"], "no clean strip by"),
    ],
)
def test_real_parts_that_are_none_end_in_one_line(
    options: list[str],
    message: str,
    real: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    outside = "ImageId,ClassId,EncodedPixels\na.jpg,1,409600 2\n"
    Path("outside.csv").write_text(outside, encoding="utf-8")
    Path("salt.csv").write_text("id,rle_mask\na,1 2\n", encoding="utf-8")
    Path("none.txt").write_text("elsewhere.png\n", encoding="utf-8")
    words = ["--out", "out", "--train", 1, "--test", 0, *options]
    assert exit_code(main, *words) == 2
    assert message in error_of(capsys.readouterr().err)
    assert not Path("out").exists()
