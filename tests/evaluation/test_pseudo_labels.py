"""Pseudo-labels: what an ensemble is sure of, by sums done by hand."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import SMALL, draw_described, error_of, exit_code, shrunk, write_described

from evaluation import pseudo_labels
from evaluation.pseudo_labels import label_strip
from kernel.competition import SEVERSTAL
from kernel.shipped import find_competition
from packing.bundle import build
from training.folds import write_strips
from training.ground_truth import read_truth
from training.strips import Strips, read_strips

MIN_AREA = 20  # and less than 2 are next to nothing
SURE = ("--gate-shifts", 50, 50, "--min-area", 1)  # every gate open, and any mask counts


def recorded(*passes: tuple[float, float, int]) -> Any:
    """Passes of one class: a presence logit, a mask logit, and on how many of 50 pixels it is."""
    encoded, probabilities = {}, {}
    for index, (presence, mask, pixels) in enumerate(passes):
        gate = torch.sigmoid(torch.tensor([[presence]]))
        logits = torch.full((1, 1, 1, 50), -9.0)
        logits[..., :pixels] = mask
        encoded[index] = (gate,)
        probabilities[index] = torch.sigmoid(logits) * gate[..., None, None]
    manifest = SimpleNamespace(threshold=0.55)
    return SimpleNamespace(encoded=encoded, probabilities=probabilities, manifest=manifest)


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        pytest.param([(0, 4, 30)], 30, id="sigmoid(2) = 0.88: there"),
        pytest.param([(-9, 4, 30)], 0, id="sigmoid(-6) even when wide: not there"),
        pytest.param([(-2, 4, 30)], None, id="0.5 with the first shift, 0.73 with the second"),
        pytest.param([(-2, 4, 2)], None, id="and a few pixels then are not nothing"),
        pytest.param([(9, 4, 20)], 20, id="as large as the area: there"),
        pytest.param([(9, 4, 19)], None, id="a small defect with open gates: unsure"),
        pytest.param([(9, 4, 2)], None, id="a tenth of the area: unsure"),
        pytest.param([(9, 4, 1)], 0, id="next to nothing: not there"),
        pytest.param([(9, 0.1, 30)], 0, id="a mask of 0.52 stays under the threshold"),
        pytest.param([(-9, 4, 30), (9, 4, 30)], 0, id="one of two passes is not enough"),
        pytest.param([(0, 4, 30), (9, 4, 50)], 30, id="0.49 where one of two finds nothing"),
    ],
)
def test_a_class_is_there_not_there_or_unsure(
    passes: list[tuple[float, float, int]], expected: int | None
) -> None:
    masks = label_strip(recorded(*passes), (2.0, 3.0), MIN_AREA)
    assert (None if masks is None else int(masks.sum())) == expected


def test_under_the_smallest_area_one_pixel_is_there_and_none_is_not() -> None:
    found = [label_strip(recorded((9, 4, pixels)), (2.0, 3.0), 1) for pixels in (0, 1)]
    assert [None if masks is None else int(masks.sum()) for masks in found] == [0, 1]


def test_of_a_strip_that_gives_nan_nothing_is_sure() -> None:
    strip = recorded((9, 4, 30), (9, 4, 30))
    assert label_strip(strip, (2.0, 3.0), MIN_AREA) is not None
    strip.probabilities[1][..., 0] = float("nan")
    assert label_strip(strip, (2.0, 3.0), MIN_AREA) is None


def test_under_a_low_threshold_what_is_there_has_a_mask() -> None:
    strip = recorded((9, -0.2, 30))  # masks of 0.45
    strip.manifest.threshold = 0.3
    masks = label_strip(strip, (2.0, 3.0), MIN_AREA)
    assert masks is not None and masks.sum() == 30


def test_what_it_writes_is_read_as_a_training_set(
    dataset: Path, labelled_strips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = labelled_strips / "test_images"
    options = ["--bundle", dataset, "--images", images, "--out", tmp_path / "pseudo"]
    assert exit_code(pseudo_labels.main, *options, *SURE) == 0
    strips = read_strips(tmp_path / "pseudo", SEVERSTAL)
    assert strips.names == sorted(path.name for path in images.iterdir())
    assert any(strips.truth.values())
    for name in strips.names:
        image, masks = strips.load(name)
        assert masks.shape == (4, *SMALL) and image.shape == SMALL
        original = (images / name).read_bytes()
        assert (tmp_path / "pseudo" / "train_images" / name).read_bytes() == original
    assert f"{len(strips.names)} strips" in capsys.readouterr().out


def test_a_strip_whose_name_is_no_utf_8_is_labelled(
    dataset: Path, labelled_strips: Path, tmp_path: Path
) -> None:
    name, images = os.fsdecode(b"caf\xe9.jpg"), labelled_strips / "test_images"
    (tmp_path / "images").mkdir()
    shutil.copy(min(images.iterdir()), tmp_path / "images" / name)
    options = ["--bundle", dataset, "--images", tmp_path / "images", "--out", tmp_path / "pseudo"]
    assert exit_code(pseudo_labels.main, *options, *SURE) == 0
    strips = read_strips(tmp_path / "pseudo", SEVERSTAL)
    assert strips.names == [name] and strips.truth[name]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    dataset: Path,
    labelled_strips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(pseudo_labels, "load_for_images", None)
    options = ["--bundle", dataset, "--images", labelled_strips / "test_images"]
    assert exit_code(pseudo_labels.main, *options, "--out", tmp_path / "file" / "pseudo") == 2
    assert str(tmp_path / "file") in error_of(capsys.readouterr().err)


def test_labels_are_there_when_the_copies_of_the_strips_do_not_fit(
    labelled_strips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.folds.shutil.copyfile", full)
    folder, rle = labelled_strips / "test_images", "1 3"
    name = min(path.name for path in folder.iterdir())
    with pytest.raises(OSError, match="No space left"):
        write_strips(Strips(folder, [name], {name: {2: rle}}, SEVERSTAL), tmp_path / "out")
    assert read_truth(tmp_path / "out" / "train.csv", SEVERSTAL) == {name: {2: rle}}


def test_what_is_labelled_before_ctrl_c_is_written(
    dataset: Path,
    labelled_strips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    labelled: list[Any] = []

    def stop_at_the_second(*strip: Any) -> Any:
        if labelled:
            raise KeyboardInterrupt
        labelled.append(strip)
        return label_strip(*strip)

    monkeypatch.setattr(pseudo_labels, "label_strip", stop_at_the_second)
    images, out = labelled_strips / "test_images", tmp_path / "pseudo"
    options = ["--bundle", dataset, "--images", images, "--out", out]
    assert exit_code(pseudo_labels.main, *options, *SURE) == 130
    assert read_strips(out, SEVERSTAL).names == sorted(path.name for path in images.iterdir())[:1]
    assert "interrupted: the 1 strips that are labelled are written" in caplog.text


def test_masks_to_train_on_have_the_images_size_whatever_is_scored(tmp_path: Path) -> None:
    """clouds' masks are scored at a quarter of the images' sides."""
    clouds = shrunk(find_competition("clouds"))
    build(write_described(tmp_path / "weights", clouds), tmp_path / "dist", "me",
          competition=clouds)  # fmt: skip
    drawn, out = draw_described(tmp_path / "images", clouds), tmp_path / "pseudo"
    options = ["--bundle", tmp_path / "dist" / "dataset", "--images", tmp_path / "images"]
    assert exit_code(pseudo_labels.main, *options, "--out", out, *SURE) == 0
    assert clouds.mask_size != SMALL
    strips = read_strips(out, clouds)
    masks = [strips.load(name)[1] for name in drawn]
    assert any(mask[:, SMALL[0] // 2 :, SMALL[1] // 2 :].any() for mask in masks)


def test_where_no_class_is_sure_nothing_is_written(
    dataset: Path, labelled_strips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = labelled_strips / "test_images"
    options = ["--bundle", dataset, "--images", images, "--out", tmp_path / "pseudo"]
    shut = ["--gate-shifts", -50, -50]
    assert exit_code(pseudo_labels.main, *options, *shut) == 2
    assert "of no strip is it sure that a class is there (2 are clean)" in capsys.readouterr().err
    assert not (tmp_path / "pseudo").exists()


def test_options_that_make_no_sense_are_one_line(
    dataset: Path, labelled_strips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--bundle", dataset, "--images", labelled_strips / "test_images"]
    assert exit_code(pseudo_labels.main, *options, "--out", tmp_path) == 2
    assert "is there already" in error_of(capsys.readouterr().err)
    new = ["--out", tmp_path / "new", "--gate-shifts", 3, 2]
    assert exit_code(pseudo_labels.main, *options, *new) == 2
    assert "--gate-shifts 3 2" in error_of(capsys.readouterr().err)
    new = ["--out", tmp_path / "new", "--min-area", 0]
    assert exit_code(pseudo_labels.main, *options, *new) == 2
    assert "--min-area 0: expected 1 pixel or more" in error_of(capsys.readouterr().err)
    assert not (tmp_path / "new").exists()
