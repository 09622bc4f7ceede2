"""Pseudo-labels: what an ensemble is sure of, by sums done by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import SMALL, error_of, exit_code

from evaluation import pseudo_labels
from evaluation.pseudo_labels import label_strip
from training.strips import read_strips

MIN_AREA = 4


def recorded(*passes: tuple[float, float, int]) -> Any:
    """Passes of one class: a presence logit, a mask logit, and on how many of 10 pixels it is."""
    encoded, probabilities = {}, {}
    for index, (presence, mask, pixels) in enumerate(passes):
        gate = torch.sigmoid(torch.tensor([[presence]]))
        logits = torch.full((1, 1, 1, 10), -9.0)
        logits[..., :pixels] = mask
        encoded[index] = (gate,)
        probabilities[index] = torch.sigmoid(logits) * gate[..., None, None]
    manifest = SimpleNamespace(threshold=0.55)
    return SimpleNamespace(encoded=encoded, probabilities=probabilities, manifest=manifest)


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        pytest.param([(0, 4, 6)], 6, id="sigmoid(2) = 0.88: there"),
        pytest.param([(-9, 4, 6)], 0, id="sigmoid(-6) even when wide: not there"),
        pytest.param([(-2, 4, 6)], None, id="0.5 with the first shift, 0.73 with the second"),
        pytest.param([(9, 4, 3)], 0, id="smaller than the area: not there"),
        pytest.param([(9, 0.1, 6)], 0, id="a mask of 0.52 stays under the threshold"),
        pytest.param([(-9, 4, 6), (9, 4, 6)], 0, id="one of two passes is not enough"),
        pytest.param([(0, 4, 6), (9, 4, 10)], 6, id="0.49 where one of two finds nothing"),
    ],
)
def test_a_class_is_there_not_there_or_unsure(
    passes: list[tuple[float, float, int]], expected: int | None
) -> None:
    masks = label_strip(recorded(*passes), (2.0, 3.0), MIN_AREA)
    assert (None if masks is None else int(masks.sum())) == expected


def test_under_a_low_threshold_what_is_there_has_a_mask() -> None:
    strip = recorded((9, -0.2, 6))  # masks of 0.45
    strip.manifest.threshold = 0.3
    masks = label_strip(strip, (2.0, 3.0), MIN_AREA)
    assert masks is not None and masks.sum() == 6


def test_what_it_writes_is_read_as_a_training_set(
    dataset: Path, labelled_strips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = labelled_strips / "test_images"
    options = ["--bundle", dataset, "--images", images, "--out", tmp_path / "pseudo"]
    sure = ["--gate-shifts", 50, 50, "--min-area", 1]
    assert exit_code(pseudo_labels.main, *options, *sure) == 0
    strips = read_strips(tmp_path / "pseudo")
    assert strips.names == sorted(path.name for path in images.iterdir())
    assert any(strips.truth.values())
    for name in strips.names:
        image, masks = strips.load(name)
        assert masks.shape == (4, *SMALL) and image.shape == SMALL
        original = (images / name).read_bytes()
        assert (tmp_path / "pseudo" / "train_images" / name).read_bytes() == original
    assert f"{len(strips.names)} strips" in capsys.readouterr().out


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
