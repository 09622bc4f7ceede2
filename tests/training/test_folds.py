"""Folds: every class in the same share in each, and the command that writes one out."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import CLASSES, LABELS, draw_image, error_of, exit_code, save_image

from kernel.competition import SEVERSTAL
from kernel.shipped import find_competition
from training import folds
from training.config import NO_FOLD
from training.folds import split_folds, write_strips
from training.strips import Strips, read_strips

SALT = find_competition("salt")


def many_strips(count: int = 600) -> Strips:
    """Names with classes in the competition's shares; no image is read."""
    rng = np.random.default_rng(1)
    shares = (0.07, 0.02, 0.41, 0.06)
    truth = {}
    for index in range(count):
        there = rng.random(CLASSES) < shares
        truth[f"{index:04}.jpg"] = {label: "1 1" for label in LABELS if there[label - 1]}
    return Strips(Path("nowhere"), list(truth), truth, SEVERSTAL)


def test_folds_are_disjoint_and_cover_every_strip() -> None:
    whole = many_strips()
    held_out: list[str] = []
    for fold in range(5):
        training, validation = split_folds(whole, 5, fold)
        assert not set(training.names) & set(validation.names)
        assert sorted(training.names + validation.names) == whole.names
        held_out += validation.names
    assert sorted(held_out) == whole.names


def test_every_class_has_the_same_share_in_every_fold() -> None:
    whole = many_strips()
    for fold in range(5):
        validation = split_folds(whole, 5, fold)[1]
        assert abs(len(validation.names) - 120) <= 6
        for label in LABELS:
            assert abs(len(validation.with_class(label)) - len(whole.with_class(label)) / 5) <= 1.5


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_strips_of_one_class_are_split_too(share: float) -> None:
    """As salt's, of which some have it, and carvana's, which all do."""
    there = np.random.default_rng(1).random(200) < share
    truth = {f"{index:04}.png": {1: "1 1"} if has else {} for index, has in enumerate(there)}
    whole = Strips(Path("nowhere"), list(truth), truth, SALT)
    held_out: list[str] = []
    for fold in range(5):
        validation = split_folds(whole, 5, fold)[1]
        assert len(validation.names) == 40
        assert abs(len(validation.with_class(1)) - len(whole.with_class(1)) / 5) <= 1
        held_out += validation.names
    assert sorted(held_out) == whole.names


def test_folds_are_the_same_on_every_call() -> None:
    first, again = (split_folds(many_strips(), 5, 2)[1].names for _ in range(2))
    assert first == again
    assert first != split_folds(many_strips(), 5, 3)[1].names


def test_without_a_fold_every_strip_is_trained_on() -> None:
    training, validation = split_folds(many_strips(), 5, NO_FOLD)
    assert training.names == many_strips().names
    assert not validation.names


def test_without_the_stratifier_its_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "iterstrat.ml_stratifiers", None)
    with pytest.raises(SystemExit) as ended:
        split_folds(many_strips(), 5, 2)
    assert ended.value.code == 2
    line = error_of(capsys.readouterr().err)
    assert "iterstrat.ml_stratifiers" in line and line.endswith("; pip install -e '.[training]'")
    assert not split_folds(many_strips(), 5, NO_FOLD)[1].names


def test_fewer_strips_than_folds_are_refused() -> None:
    with pytest.raises(ValueError, match="nowhere: 4 strips for 5 folds"):
        split_folds(many_strips(4), 5, 0)


# --- command line ---------------------------------------------------------------------------------


def run_folds(data: Path, out: Path, *options: object) -> int:
    return exit_code(folds.main, "--data", data, "--out", out, *options)


def test_the_command_writes_both_parts_with_their_truth(
    steel: Path, strips: Strips, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "split"
    assert run_folds(steel, out, "--folds", 3, "--fold", 1) == 0
    parts = [read_strips(out / name, SEVERSTAL) for name in ("train", "held_out")]
    expected = split_folds(strips, 3, 1)
    assert [len(part.names) for part in parts] == [16, 8]
    for part, whole in zip(parts, expected, strict=True):
        assert part.names == sorted(whole.names)
        for name in part.names:
            image, masks = part.load(name)
            np.testing.assert_array_equal(image, strips.load(name)[0])
            np.testing.assert_array_equal(masks, strips.load(name)[1])
    header, *rows = (out / "train" / "train.csv").read_text().splitlines()
    assert header == "ImageId,ClassId,EncodedPixels"  # as the competition's
    assert rows and all(row.split(",")[2] for row in rows)
    assert (out / "held_out.txt").read_text().split() == parts[1].names
    assert f"{out / 'train'}: 16 strips, " in capsys.readouterr().out


def test_clean_strips_have_rows_where_the_competitions_truth_has_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_image(tmp_path / "train_images" / f"{name}.png", draw_image(0))
    whole = Strips(tmp_path / "train_images", ["a.png", "b.png"], {"a.png": {1: "1 2"}}, SALT)
    write_strips(whole, tmp_path / "out")
    assert (tmp_path / "out" / "train.csv").read_text() == "id,rle_mask\na,1 2\nb,\n"
    found = read_strips(tmp_path / "out", SALT)
    assert (found.names, found.clean()) == (whole.names, ["b.png"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fold", 7], "--fold 7 of --folds 5: expected 0 to folds - 1"),
        (["--fold", -1], "--fold -1 of --folds 5"),
        (["--folds", 1], "--fold 0 of --folds 1"),
        (["--folds", 25], "24 strips for 25 folds"),
    ],
)
def test_folds_that_are_none_are_refused_in_one_line(
    options: Sequence[object],
    message: str,
    steel: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_folds(steel, tmp_path / "split", *options) == 2
    assert message in error_of(capsys.readouterr().err)
    assert not (tmp_path / "split").exists()


def test_a_folder_that_is_there_is_not_written_into(
    steel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_folds(steel, tmp_path) == 2
    assert (
        error_of(capsys.readouterr().err)
        == f"{tmp_path}: is there already; give another --out, or remove it"
    )
    assert not list(tmp_path.iterdir())
