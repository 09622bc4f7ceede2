"""A whole run in this process: the rows that are asked for, with the double loop's masks."""

import errno
import hashlib
import importlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LABELS,
    SMALL,
    STRIPS,
    Grey,
    change_manifest,
    decode_by_hand,
    edit_manifest,
    needs_strips,
    predict,
    random_network,
    read_submission,
    read_table,
    save_strips,
    tiny_entry,
    tiny_model,
    write_sample,
)
from oracle import MARGIN, assert_crosses, assert_masks, mean_by_hand, threshold_of
from PIL import Image as Pillow
from pycocotools import mask as coco
from safetensors.torch import load_file, save_file

BIAS = "segmentation_head.0.bias"


def assert_rows(rles: dict[tuple[str, int], str], bundle: Path, images: dict[str, Grey]) -> None:
    """Every row of these images holds the double loop's mask."""
    for name, image in images.items():
        mean = mean_by_hand(bundle, image)
        for label in LABELS:
            found = decode_by_hand(rles[name, label], (image.shape[0], image.shape[1]))
            assert_masks(found, mean[label - 1], threshold_of(bundle))


def test_the_log_names_the_bundle_by_the_hashes_of_its_settings_and_members(
    built_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = built_bundle / "dataset"
    caplog.set_level(logging.INFO)
    save_strips(tmp_path / "images", ["a.jpg"])
    predict(dataset, tmp_path / "images", tmp_path / "out.csv")
    hashes = {
        path.name.removesuffix(".safetensors"): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in dataset.iterdir()
        if path.suffix == ".safetensors" or path.name in ("ensemble.json", "competition.json")
    }
    assert len(hashes) == 5
    [line] = [line for line in caplog.messages if line.startswith("bundle, by sha256: ")]
    assert dict(each.split() for each in line.partition(": ")[2].split(", ")) == hashes


def test_settings_that_cannot_be_hashed_cost_a_line_of_the_log_alone(
    light_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("kernel.inference.hash_file", fail)
    save_strips(tmp_path / "images", ["a.jpg"])
    record = predict(light_bundle, tmp_path / "images", tmp_path / "out.csv")
    assert record["non_empty"] and not record["faults"]


# --- the rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["two-column", "three-column"])
def test_a_run_writes_every_row_of_the_sample_in_its_order_and_layout(
    layout: str, session_light: Path, tmp_path: Path
) -> None:
    names = ["c.jpg", "a_1.jpg", "b.jpg"]
    images = save_strips(tmp_path / "images", names)
    sample = write_sample(tmp_path / "sample.csv", names, layout)
    record = predict(session_light, tmp_path / "images", tmp_path / "out.csv", sample=sample)
    table = read_table(tmp_path / "out.csv")
    if layout == "two-column":
        assert list(table.columns) == ["ImageId_ClassId", "EncodedPixels"]
        expected = [f"{name}_{label}" for name in names for label in LABELS]
        assert table["ImageId_ClassId"].tolist() == expected
    else:
        assert list(table.columns) == ["ImageId", "EncodedPixels", "ClassId"]
        assert table["ImageId"].tolist() == [name for name in names for _ in LABELS]
        assert table["ClassId"].tolist() == [str(label) for _ in names for label in LABELS]
    rles = read_submission(tmp_path / "out.csv")
    assert any(rles.values())
    assert_rows(rles, session_light, images)
    assert (record["strips"], record["rows"], record["faults"]) == (3, 12, {})


def test_only_the_rows_that_the_sample_asks_for_are_written_and_counted(
    session_light: Path, tmp_path: Path
) -> None:
    save_strips(tmp_path / "images", ["a.jpg"])
    predict(session_light, tmp_path / "images", tmp_path / "whole.csv")
    whole = read_submission(tmp_path / "whole.csv")
    label = next(label for label in LABELS if whole["a.jpg", label])
    assert sum(map(bool, whole.values())) >= 2
    sample = tmp_path / "sample.csv"
    sample.write_text(f"ImageId_ClassId,EncodedPixels\na.jpg_{label},\n", encoding="utf-8")
    record = predict(session_light, tmp_path / "images", tmp_path / "out.csv", sample=sample)
    expected = {("a.jpg", label): whole["a.jpg", label]}
    assert read_submission(tmp_path / "out.csv") == expected
    assert (record["rows"], record["non_empty"]) == (1, 1)


def empty_two_classes(bundle: Path) -> None:
    """Bias classes 2 and 4 of the light bundle off."""
    path = bundle / "fpn.safetensors"
    weights = load_file(path)
    weights[BIAS] = torch.tensor([0.0, -100.0, 0.0, -100.0])
    save_file(weights, path)


@pytest.mark.parametrize("empty_rows", [True, False])
def test_three_columns_may_leave_the_empty_rows_out(
    empty_rows: bool, light_bundle: Path, tmp_path: Path
) -> None:
    empty_two_classes(light_bundle)
    change_manifest(light_bundle, empty_rows=empty_rows)
    save_strips(tmp_path / "images", ["a.jpg", "b.jpg"])
    sample = write_sample(tmp_path / "sample.csv", ["a.jpg", "b.jpg"])
    predict(light_bundle, tmp_path / "images", tmp_path / "out.csv", sample=sample)
    rles = read_submission(tmp_path / "out.csv")
    labels = LABELS if empty_rows else (1, 3)
    assert list(rles) == [(name, label) for name in ("a.jpg", "b.jpg") for label in labels]
    assert all(bool(rle) == (label in (1, 3)) for (_, label), rle in rles.items())


def test_two_columns_keep_their_empty_rows_in_any_case(light_bundle: Path, tmp_path: Path) -> None:
    empty_two_classes(light_bundle)
    change_manifest(light_bundle, empty_rows=False)
    save_strips(tmp_path / "images", ["a.jpg"])
    sample = write_sample(tmp_path / "sample.csv", ["a.jpg"], "two-column")
    predict(light_bundle, tmp_path / "images", tmp_path / "out.csv", sample=sample)
    rles = read_submission(tmp_path / "out.csv")
    assert [label for (_, label), rle in rles.items() if rle] == [1, 3]
    assert len(rles) == 4


def test_strips_of_mixed_sizes_in_batches_get_what_they_get_one_by_one(
    session_light: Path, tmp_path: Path
) -> None:
    sizes = [SMALL, SMALL, (50, 70), (50, 70), SMALL, (50, 70), SMALL, SMALL, SMALL]
    names = [f"{index}.jpg" for index in range(len(sizes))]
    images = save_strips(tmp_path / "images", names, sizes)
    for batch_size in (1, 3):
        output = tmp_path / f"{batch_size}.csv"
        predict(session_light, tmp_path / "images", output, batch_size=batch_size)
        assert_rows(read_submission(output), session_light, images)


@pytest.mark.parametrize(
    ("module", "moment"), [("backends", "load_ensemble"), ("read_ahead", "read_strip")]
)
def test_a_complete_empty_submission_stands_before(
    module: str,
    moment: str,
    session_light: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_strips(tmp_path / "images", ["a.jpg", "b.jpg"])
    found: list[dict[tuple[str, int], str]] = []
    original = getattr(importlib.import_module(f"kernel.{module}"), moment)

    def spied(*arguments: Any, **named: Any) -> Any:
        found.append(read_submission(tmp_path / "out.csv"))
        return original(*arguments, **named)

    monkeypatch.setattr(f"kernel.{module}.{moment}", spied)
    predict(session_light, tmp_path / "images", tmp_path / "out.csv")
    assert found[0] == {(name, label): "" for name in ("a.jpg", "b.jpg") for label in LABELS}
    assert any(read_submission(tmp_path / "out.csv").values())


# --- the real strips ------------------------------------------------------------------------------


def cocos_rle(mask: np.ndarray) -> bytes:
    counts: bytes = coco.encode(np.asfortranarray(mask, np.uint8))["counts"]
    return counts


def cocos_rle_of(rle: str, size: tuple[int, int]) -> bytes:
    """The same code out of `start length` pairs: COCO's counts run off, on, off, …"""
    numbers, counts, end = [int(word) for word in rle.split()], list[int](), 0
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        counts += [start - 1 - end, length]
        end = start - 1 + length
    tail = size[0] * size[1] - end
    counts += [tail] if tail else []
    code: bytes = coco.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]
    return code


def add_gated_member(bundle: Path) -> None:
    model = tiny_model("FPN", channels=3)
    save_file(random_network(model, 2).state_dict(), bundle / "gated.safetensors")
    edit_manifest(bundle, lambda entries: entries["members"].append(tiny_entry("gated", model)))
    change_manifest(bundle, flips=["none", "vertical"])


@needs_strips
def test_the_22_real_strips_give_88_rows_with_the_double_loops_masks(
    light_bundle: Path, tmp_path: Path
) -> None:
    add_gated_member(light_bundle)
    paths = sorted(STRIPS.glob("t*_images/*.jpg"), key=lambda path: path.name)
    assert len(paths) == 22
    (tmp_path / "strips").mkdir()
    for path in paths:
        (tmp_path / "strips" / path.name).symlink_to(path)
    means = []
    for path in paths[:3]:
        with Pillow.open(path) as opened:
            means.append(mean_by_hand(light_bundle, np.asarray(opened.convert("L"))))
    threshold = round(float(np.median(means)), 4)
    change_manifest(light_bundle, threshold=threshold)
    record = predict(light_bundle, tmp_path / "strips", tmp_path / "out.csv")
    assert (record["strips"], record["rows"], record["faults"]) == (22, 88, {})
    rles = read_submission(tmp_path / "out.csv")
    assert list(rles) == [(path.name, label) for path in paths for label in LABELS]
    size = (256, 1600)
    for path, mean in zip(paths, means, strict=False):
        for label in LABELS:
            rle, expected = rles[path.name, label], mean[label - 1] > threshold
            close = np.abs(mean[label - 1] - threshold) <= MARGIN
            assert close.mean() < 0.01
            expected[close] = decode_by_hand(rle, size)[close]
            same = cocos_rle_of(rle, size) == cocos_rle(expected)
            assert same, f"{path.name}, class {label}"  # a diff of such codes would take minutes
    assert_crosses(np.concatenate(means), threshold)
