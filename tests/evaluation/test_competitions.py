"""The whole way for every competition that ships: pack, mount, run, validate, and count by hand."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch
from helpers import (
    SMALL,
    TWO_FLIPS,
    change_manifest,
    draw_described,
    error_of,
    exit_code,
    shrunk,
    write_described,
)
from oracle import TTACH, load_networks
from safetensors import safe_open

import build_kernel
from evaluation import calibrate, dry_run, score, validate
from evaluation.kaggle_tree import make_kaggle_tree
from kernel.competition import SEVERSTAL, Competition
from kernel.images import Mask, Size
from kernel.inference import run
from kernel.options import Options
from kernel.shipped import find_competition, shipped_names
from packing import bundle
from packing.bundle import build
from training import synthetic, train

Pixels = npt.NDArray[Any]
ALSO = {  # what no shipped description has
    "rows-from-0": Competition(
        slug="rows-from-0",
        title="Rows, counted from 0",
        layouts=({"rle": "{mask}", "what": "{class}/{image}", "of": "all"},),
        classes=("a_b", "a", "b+"),
        suffix=".png",
        empty="-1",
        run_order="rows",
        first_index=0,
        channels=3,
        bits=16,
        mask_size=(20, 30),
    ),
    "no-empty-rows": replace(SEVERSTAL, slug="no-empty-rows", empty=None),
}
ALL = [*shipped_names(), *ALSO]


def small(name: str) -> Competition:
    """The competition with images and masks of a few pixels."""
    return shrunk(ALSO.get(name) or find_competition(name))


def resize(planes: Pixels, size: Size) -> Pixels:
    """OpenCV's bilinear resizing of (channels, H, W)."""
    return np.stack([cv2.resize(plane, size[::-1]) for plane in planes.astype(np.float64)])


def mean_by_hand(weights: Path, planes: Pixels, size: Size) -> Pixels:
    """Mean probability (classes, *size) of (channels, H, W) over members and flips."""
    passes = []
    for entry, network in load_networks(weights):
        own = planes
        if entry["model"]["in_channels"] < len(planes):
            own = np.tensordot([0.299, 0.587, 0.114], planes, 1)[None]
        own = resize(own, entry["image_size"] or planes.shape[1:])
        own = (own - np.reshape(entry["mean"], (-1, 1, 1))) / np.reshape(entry["std"], (-1, 1, 1))
        for flip in TWO_FLIPS:
            images = torch.from_numpy(own)[None].float()
            for turn in TTACH[flip]:
                images = turn.apply_aug_image(images, apply=True)
            with torch.no_grad():
                logits, presence = network(images)
            masks = logits.sigmoid() * presence.sigmoid()[..., None, None]
            for turn in TTACH[flip]:
                masks = turn.apply_deaug_mask(masks, apply=True)
            passes.append(resize(masks[0].double().numpy(), size))
    mean: Pixels = np.mean(passes, axis=0)
    return mean


def decode(rle: str, size: Size, competition: Competition) -> Mask:
    """A mask, pixel by pixel."""
    mask = np.zeros(size, np.bool_)
    numbers = [int(word) for word in rle.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        for index in np.arange(start, start + length) - competition.first_index:
            by_rows = competition.run_order == "rows"
            mask[divmod(index, size[1]) if by_rows else divmod(index, size[0])[::-1]] = True
    return mask


LAYOUTS = {  # header, row of image, class and mask: what each competition's own sample shows
    "severstal": ("ImageId,EncodedPixels,ClassId", "{0},{2},{1}"),
    "no-empty-rows": ("ImageId,EncodedPixels,ClassId", "{0},{2},{1}"),
    "clouds": ("Image_Label,EncodedPixels", "{0}_{1},{2}"),
    "salt": ("id,rle_mask", "{0},{2}"),
    "carvana": ("img,rle_mask", "{0},{2}"),
    "uw-madison": ("id,class,predicted", "{0},{1},{2}"),
    "rows-from-0": ("rle,what,of", "{2},{1}/{0},all"),
}


def read_by_hand(name: str, text: str, images: list[str]) -> dict[tuple[str, str], str]:
    """(image, class) → code of every row, all of them asserted to be there once and in order."""
    competition, (header, line) = small(name), LAYOUTS[name]
    first, *rows = text.splitlines()
    assert first == header
    found, rest = {}, iter(rows)
    row = next(rest, "")
    for image in images:
        for label in competition.classes:
            stem = image.removesuffix(competition.suffix)
            before, after = line.format(stem, label, "\0").split("\0")
            named = row.startswith(before) and row.endswith(after)
            assert named or competition.empty is None
            code = row[len(before) : len(row) - len(after)] if named else ""
            found[image, label] = "" if code == competition.empty else code
            row = next(rest, "") if named else row
    assert row == ""
    return found


@pytest.mark.parametrize("name", ALL)
def test_a_description_alone_carries_a_competition_to_a_valid_submission(
    name: str, tmp_path: Path
) -> None:
    competition, images = small(name), tmp_path / "images"
    (tmp_path / "mine.json").write_text(json.dumps(asdict(competition)))
    assert find_competition(str(tmp_path / "mine.json")) == competition
    drawn = draw_described(images, competition)
    size = competition.mask_size or SMALL
    weights = write_described(tmp_path / "weights", competition)
    threshold = np.median([mean_by_hand(weights, planes, size) for planes in drawn.values()])
    change_manifest(weights, threshold=round(float(threshold), 4))

    metadata, _ = build(weights, tmp_path / "dist", "somebody", competition=competition)
    assert metadata.kernel["competition_sources"] == [competition.slug]
    sample = make_kaggle_tree(tmp_path, tmp_path / "dist", images)
    output = tmp_path / "working" / "submission.csv"
    record = run(Options(input=tmp_path / "input", output=output))
    assert (record.faults, record.budget_s) == ({}, competition.time_limit_s)

    every = output.with_name("every.csv")  # without the early exit
    run(Options(input=tmp_path / "input", output=every, early_exit=False))
    assert every.read_bytes() == output.read_bytes()

    rles = read_by_hand(name, output.read_text(), list(drawn))
    for image, planes in drawn.items():
        mean = mean_by_hand(tmp_path / "dist" / "dataset", planes, size)
        for channel, label in enumerate(competition.classes):
            clear = np.abs(mean[channel] - threshold) > 1e-4  # of the threshold and its rounding
            mask = decode(rles[image, label], size, competition)
            np.testing.assert_array_equal(mask[clear], (mean[channel] > threshold)[clear])
            assert clear.mean() > 0.97
    assert sum(map(bool, rles.values())) > 0

    arguments = ("--sample", sample, "--images", images, "--competition", tmp_path / "mine.json")
    assert exit_code(validate.main, output, *arguments) == 0
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join([lines[0], *lines[2:], lines[1]]))  # a row in the wrong place
    assert exit_code(validate.main, output, *arguments) == 1


def test_a_colour_competition_is_drawn_fitted_packed_and_rehearsed_by_its_description(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine, data, weights = tmp_path / "mine.json", tmp_path / "data", tmp_path / "weights"
    mine.write_text(json.dumps(asdict(replace(small("clouds"), classes=("Fish", "Sugar")))))
    described = ("--competition", mine)
    drawn = ("--out", data, "--train", 24, "--test", 2, "--shares", 1, 1, 1, 1, *described)
    assert exit_code(synthetic.main, *drawn) == 0
    assert (data / "train.csv").read_text().startswith("Image_Label,EncodedPixels\n")
    member = ("--name", "one", "--encoder", "tu-test_resnet", "--channels", 3, *described)
    steps = ("--crop-steps", 2, "--whole-steps", 1, "--crops", 1, "--workers", 0, "--fold", "none")
    places = ("--data", data, "--out", weights, "--runs", tmp_path / "runs", "--device", "cpu")
    assert exit_code(train.main, *member, *steps, *places, "--presence-strips", 2) == 0

    with safe_open(weights / "one.safetensors", "pt") as file:
        entry = json.loads(file.metadata()["member"])
    pictures = [np.asarray(PIL.Image.open(path)) for path in (data / "train_images").iterdir()]
    np.testing.assert_allclose(entry["mean"], np.mean(pictures, axis=(0, 1, 2)) / 255, atol=1e-3)
    (weights / "ensemble.json").write_text(json.dumps({"members": [entry]}))
    out = tmp_path / "dist"
    packed = ("--weights", weights, "--out", out, "--owner", "somebody", *described)
    assert exit_code(build_kernel.main, *packed) == 0
    truth = ("--images", data / "test_images", "--ground-truth", data / "test.csv")
    capfd.readouterr()
    code = exit_code(dry_run.main, "--bundle", out, *truth, *described)
    report = json.loads((out / "report" / "report.json").read_text())
    assert code == (0 if report["ready"] else 1)
    assert report["clean"]["ok"]
    assert report["budget_s"] == 32_400
    assert "3,698 strips would take" in report["kaggle"]["words"]
    assert set(report["dice"]["per_class"]) <= {"Fish", "Sugar"}
    assert "== Ready for Kaggle" in capfd.readouterr().out
    other = ("--bundle", out, *truth, "--competition", "salt")
    assert exit_code(dry_run.main, *other) == 2
    assert "was built for understanding_cloud_organization" in capfd.readouterr().err


COMMANDS: dict[str, tuple[Callable[[list[str]], object], str]] = {
    "a score": (score.main, "--bundle BUNDLE/dataset --images IMAGES --truth TRUTH"),
    "a calibration": (calibrate.main, "--bundle BUNDLE/dataset --images IMAGES --shares 0.5"),
    "a dry run": (dry_run.main, "--bundle BUNDLE --images IMAGES"),
    "a fit": (train.main, "--competition salt --data DATA --name a --encoder tu-test_resnet"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_images_of_another_kind_than_the_description_says_are_refused_before_a_run_by(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, words = COMMANDS[case]
    clouds, salt = replace(small("clouds"), suffix=".png"), small("salt")
    build(write_described(tmp_path / "weights", salt), tmp_path / "dist", "me", competition=salt)
    (tmp_path / "data").mkdir()
    draw_described(tmp_path / "data" / "train_images", clouds)
    truth = tmp_path / "data" / "train.csv"
    truth.write_text("id,rle_mask\nimage_0,1 2\n")
    given = {"BUNDLE": "dist", "IMAGES": "data/train_images", "TRUTH": "data/train.csv"}
    for name, path in {**given, "DATA": "data"}.items():
        words = words.replace(name, str(tmp_path / path))
    assert exit_code(main, *words.split()) == 2
    error = error_of(capsys.readouterr().err)
    assert re.search(r"image_\d\.png: in colour, tgs-salt-.* says channels 1: correct it", error)


def test_the_kernel_predicts_images_of_another_kind_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    salt = small("salt")
    build(write_described(tmp_path / "weights", salt), tmp_path / "dist", "me", competition=salt)
    draw_described(tmp_path / "images", replace(small("clouds"), suffix=".png"))
    bundle, output = tmp_path / "dist" / "dataset", tmp_path / "submission.csv"
    record = run(Options(bundle=bundle, images=tmp_path / "images", output=output))
    assert (record.faults, record.rows) == ({}, 3)
    assert re.search(r"image_0\.png: in colour, .* says channels 1.*the run goes on", caplog.text)


@pytest.mark.skipif(not find_spec("openvino"), reason="OpenVINO is not installed")
def test_openvino_takes_colour_and_gives_the_same_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bundle, "OPENVINO_WHEEL", {})  # 59 MB
    competition, found = small("clouds"), {}
    names = list(draw_described(tmp_path / "images", competition))
    weights = write_described(tmp_path / "weights", competition)
    build(weights, tmp_path / "dist", "somebody", openvino=True, competition=competition)
    for plain in (True, False):
        options = Options(bundle=tmp_path / "dist" / "dataset", images=tmp_path / "images")
        output = tmp_path / f"{plain}.csv"
        run(replace(options, output=output, early_exit=False, plain=plain))
        rles = read_by_hand("clouds", output.read_text(), names)
        size = competition.mask_size or SMALL
        found[plain] = np.stack([decode(rle, size, competition) for rle in rles.values()])
    assert not any("PyTorch" in message for message in caplog.messages)  # OpenVINO ran
    assert (found[False] != found[True]).mean() < 0.001
    assert 0.01 < found[True].mean() < 0.99
