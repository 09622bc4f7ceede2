"""Scores of a bundle: each member alone and without flips, and all of them as the kernel runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    LABELS,
    SMALL,
    change_manifest,
    decode_by_hand,
    error_of,
    exit_code,
    predict,
    read_manifest,
    read_submission,
)

from evaluation import score
from evaluation.recorded import RecordedPasses
from kernel.competition import SEVERSTAL
from kernel.ensemble_loading import load_ensemble
from kernel.images import read_image
from kernel.manifest import load_manifest
from kernel.stages import Stages
from training.ground_truth import decode_masks, read_truth
from training.metrics import Masks, Scores


def scores_of_a_submission(dataset: Path, labelled_strips: Path, folder: Path) -> dict[str, object]:
    """What the kernel's own submission of these strips scores."""
    folder.mkdir()
    predict(dataset, labelled_strips / "test_images", folder / "submission.csv")
    rows, truth = (
        read_submission(folder / "submission.csv"),
        read_truth(labelled_strips / "test.csv", SEVERSTAL),
    )
    scores = Scores()
    for name in sorted({name for name, _ in rows}):
        found: Masks = np.stack([decode_by_hand(rows[name, label], SMALL) for label in LABELS])
        assert found.any()
        scores.add(found, decode_masks(truth, name, SMALL, SEVERSTAL))
    return scores.summary() | {"intervals": scores.intervals()}


def test_the_ensemble_and_each_member_score_what_their_submissions_do(
    dataset: Path, labelled_strips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A member alone is a bundle of that member without flips."""
    out = tmp_path / "scores.json"
    options = (
        "--images",
        labelled_strips / "test_images",
        "--truth",
        labelled_strips / "test.csv",
        "--out",
        out,
    )
    assert exit_code(score.main, "--bundle", dataset, *options) == 0
    scores = json.loads(out.read_text())
    assert capsys.readouterr().out.strip().endswith(out.read_text().strip())
    assert set(scores) == {"ensemble", "fpn-b", "unet-a", "unet-c"}
    assert scores["ensemble"] == scores_of_a_submission(
        dataset, labelled_strips, tmp_path / "ensemble"
    )
    for entry in read_manifest(dataset)["members"]:
        change_manifest(dataset, members=[entry], flips=["none"])
        expected = scores_of_a_submission(dataset, labelled_strips, tmp_path / entry["name"])
        assert scores[entry["name"]] == expected


def test_a_member_alone_is_under_the_first_flip_of_the_bundle(
    dataset: Path, labelled_strips: Path
) -> None:
    change_manifest(dataset, flips=["vertical", "horizontal"])
    ensemble = load_ensemble(dataset, load_manifest(dataset), CPU, Stages(), None)
    path = next(labelled_strips.glob("test_images/*"))
    recorded = RecordedPasses(ensemble, read_image(path, SEVERSTAL))
    found = score.predict_strip(recorded)
    assert set(found) == {"ensemble", "fpn-b", "unet-a", "unet-c"}
    for pass_id, each in enumerate(ensemble.passes):
        same = np.array_equal(found[each.member], recorded.replay([pass_id]).masks)
        assert same == (each.flip == "vertical")


def test_where_no_strip_can_be_scored_it_says_so(
    dataset: Path,
    labelled_strips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def record(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RecordedPasses, "record", record)
    images, out = labelled_strips / "test_images", tmp_path / "scores.json"
    options = ("--images", images, "--truth", labelled_strips / "test.csv", "--out", out)
    assert exit_code(score.main, "--bundle", dataset, *options) == 2
    error = error_of(capsys.readouterr().err)
    assert error == f"{images}: no strip could be scored, as the lines above say"


def test_a_strip_that_one_member_fails_on_is_left_out_of_all(
    dataset: Path, labelled_strips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = labelled_strips / "test_images", tmp_path / "scores.json"
    first = min(path.name for path in images.iterdir())
    entries = read_manifest(dataset)["members"]
    change_manifest(dataset, members=entries[:2], flips=["none"])

    def record(recorded: RecordedPasses, pass_id: int) -> None:
        if pass_id == 1 and recorded.name == first:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        original(recorded, pass_id)

    def new_scores() -> Scores:
        counted.append(Scores())
        return counted[-1]

    original, counted = RecordedPasses.record, list[Scores]()
    monkeypatch.setattr(RecordedPasses, "record", record)
    monkeypatch.setattr(score, "Scores", new_scores)
    options = ("--images", images, "--truth", labelled_strips / "test.csv", "--out", out)
    assert exit_code(score.main, "--bundle", dataset, *options) == 0
    assert [len(each.dices) for each in counted] == [1] * 3


def test_an_image_that_cannot_be_read_is_named_and_left_out(
    dataset: Path, labelled_strips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first one, whose pixels would be what engines are checked on."""
    images = Path(shutil.copytree(labelled_strips / "test_images", tmp_path / "images"))
    out, truth = tmp_path / "scores.json", labelled_strips / "test.csv"
    options = ["--bundle", dataset, "--truth", truth, "--out", out, "--images"]
    assert exit_code(score.main, *options, images) == 0
    expected = out.read_text()
    (images / "0torn.jpg").write_bytes(b"torn")
    assert exit_code(score.main, *options, images) == 0
    assert out.read_text() == expected
    assert f"0torn.jpg is left out: {images / '0torn.jpg'}: 4 bytes" in caplog.text


def test_a_mask_that_leaves_its_image_is_refused_before_the_work(
    labelled_strips: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(score, "load_for_images", None)
    images, truth = labelled_strips / "test_images", tmp_path / "test.csv"
    last = max(path.name for path in images.iterdir())
    truth.write_text(f"ImageId,ClassId,EncodedPixels\n{last},1,900000 5\n")
    options = ("--images", images, "--truth", truth, "--out", tmp_path / "scores.json")
    assert exit_code(score.main, "--bundle", dataset, *options) == 2
    error = error_of(capsys.readouterr().err)
    assert error.startswith(f"{truth}: the masks of {last}: run 900000 5 leaves an image")


def test_a_ground_truth_that_is_missing_is_one_line_and_code_2(
    dataset: Path, labelled_strips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--images", labelled_strips / "test_images", "--truth", tmp_path / "no.csv")
    assert exit_code(score.main, "--bundle", dataset, *options) == 2
    assert "no.csv" in error_of(capsys.readouterr().err)
