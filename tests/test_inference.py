"""The kernel: what it reads, what it refuses, and its masks against loops written apart from it."""

import hashlib
import importlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import segmentation_models_pytorch as smp
import torch
import ttach
from conftest import kernel_script, random_network, tiny_entry, tiny_model, write_manifest
from PIL import Image as Pillow
from pycocotools import mask as coco
from safetensors.torch import load_file, save_file
from torch import nn

from kernel import inference
from kernel.engines import pad_to_multiple, pick_device
from kernel.ensemble import Ensemble, load_ensemble
from kernel.images import read_image
from kernel.logs import Stages
from kernel.manifest import FLIPS, Manifest, MemberSpec, load_manifest
from kernel.members import Member, load_member, split
from kernel.mounts import Options, find_images, find_one, find_task, read_sample
from kernel.rows import LAYOUTS, read_rows, write_submission

ROOT = Path(__file__).resolve().parents[1]
STRIPS = ROOT.parent / "shared" / "strips"
SMALL = (64, 96)
FOUR = (1, 2, 3, 4)
CPU = torch.device("cpu")
MARGIN = 1e-6  # of the threshold: where two orders of summing may round apart


# --- what the tests are made of -------------------------------------------------------------------


def drawn_image(seed: int, size: tuple[int, int] = SMALL) -> np.ndarray:
    """Smooth blotches over noise, asserted not constant."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (4, 5)).astype(np.float32)
    image = cv2.resize(coarse, size[::-1]) + rng.normal(0, 20, size)
    image = np.clip(image, 0, 255).astype(np.uint8)
    assert image.std() > 20
    return image


def save_image(path: Path, image: np.ndarray) -> None:
    """PNG, which keeps every pixel, whatever the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", image)[1].tobytes())


def save_strips(folder: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    images = {name: drawn_image(seed, size) for seed, (name, size) in enumerate(sizes.items())}
    for name, image in images.items():
        save_image(folder / name, image)
    return images


def alike(*names: str) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(names, SMALL)


def sample_text(names: list[str], layout: str) -> str:
    if layout == "2019":
        lines = [f"{name}_{label},1 6144" for name in names for label in FOUR]
        return "\n".join(["ImageId_ClassId,EncodedPixels", *lines, ""])
    return "\n".join(["ImageId,EncodedPixels,ClassId", *(f"{n},1 6144,0" for n in names), ""])


def write_sample(path: Path, names: list[str], layout: str = "today") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(sample_text(names, layout), encoding="utf-8")
    return path


def read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def submitted(path: Path) -> dict[tuple[str, int], str]:
    """The RLE of every (image, class) of a submission, read apart from the kernel's reader."""
    table = read_csv(path)
    if "ClassId" in table:
        keys = list(zip(table["ImageId"], map(int, table["ClassId"]), strict=True))
    else:
        keys = [(cell[:-2], int(cell[-1])) for cell in table["ImageId_ClassId"]]
    assert len(keys) == len(set(keys))
    return dict(zip(keys, table["EncodedPixels"], strict=True))


def changed_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "ensemble.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


@pytest.fixture
def bundle(tiny_weights: Path) -> Path:
    """The three tiny members at a threshold that their mean crosses both ways."""
    return halved(tiny_weights)


@pytest.fixture
def light(tmp_path: Path) -> Path:
    """A bundle of one member and no flip, for tests of all but the networks."""
    folder = tmp_path / "light"
    folder.mkdir()
    model = tiny_model("FPN", presence=False)
    save_file(random_network(model, 1).state_dict(), folder / "fpn.safetensors")
    write_manifest(folder, [tiny_entry("fpn", model)], flips=["none"])
    return halved(folder)


def predict(bundle: Path, output: Path, **options: Any) -> dict[str, Any]:
    return inference.run(Options(bundle=bundle, output=output, **options))


def ensemble_of(folder: Path) -> Ensemble:
    return load_ensemble(folder, load_manifest(folder), CPU, Stages())


def each_pass(ensemble: Ensemble, image: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """Member, flip and probabilities (classes, H, W) of every pass."""
    found = []
    with torch.inference_mode():
        for index, (member, flip) in enumerate(ensemble.passes):
            encoded = ensemble.encode(index, ensemble.prepare(image))
            probabilities = ensemble.decode(index, encoded)[
                0, :, : image.shape[0], : image.shape[1]
            ]
            found.append((member.spec.name, flip, probabilities.numpy()))
    return found


def script(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """The real script as its own process, its working directory `folder`."""
    return subprocess.run(
        [sys.executable, kernel_script(), *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


# --- the oracle: members and flips in a plain double loop -----------------------------------------

TTACH = {
    "none": [],
    "horizontal": [ttach.HorizontalFlip()],
    "vertical": [ttach.VerticalFlip()],
    "both": [ttach.HorizontalFlip(), ttach.VerticalFlip()],
}


def oracle_pass(entry: dict[str, Any], network: nn.Module, grey: np.ndarray, flip: str) -> Any:
    """One member under one flip, ttach doing the turning: (classes, H, W)."""
    channels = [(grey - m) / s for m, s in zip(entry["mean"], entry["std"], strict=True)]
    images = torch.from_numpy(np.stack(channels)[None]).float()
    for transform in TTACH[flip]:
        images = transform.apply_aug_image(images, apply=True)
    with torch.no_grad():
        outputs = network(images)
    if isinstance(outputs, tuple):
        logits, presence = outputs
        gates = [1 / (1 + np.exp(-float(number))) for number in presence[0]]
        probabilities = torch.stack(
            [m.sigmoid() * g for m, g in zip(logits[0], gates, strict=True)]
        )
    else:
        probabilities = outputs[0].sigmoid()
    probabilities = probabilities[None]
    for transform in reversed(TTACH[flip]):
        probabilities = transform.apply_deaug_mask(probabilities, apply=True)
    return probabilities[0].double().numpy()


def oracle_networks(folder: Path) -> list[tuple[dict[str, Any], nn.Module]]:
    """Each member's entry with its network, made and loaded by SMP and torch alone."""
    made = []
    for entry in json.loads((folder / "ensemble.json").read_text())["members"]:
        network = smp.create_model(encoder_weights=None, **entry["model"])
        network.load_state_dict(load_file(folder / entry["file"]))
        made.append((entry, network.eval()))
    return made


def oracle(folder: Path, image: np.ndarray, multiple: int = 32) -> np.ndarray:
    """Mean probability (classes, H, W) of one image over members × flips, summed in float64."""
    height, width = image.shape
    grey = np.pad(image / 255, ((0, -height % multiple), (0, -width % multiple)), mode="edge")
    flips = json.loads((folder / "ensemble.json").read_text())["flips"]
    passes = []
    for entry, network in oracle_networks(folder):
        for flip in flips:
            passes.append(oracle_pass(entry, network, grey, flip))
    return np.mean(passes, axis=0)[:, :height, :width]


def assert_masks(found: np.ndarray, mean: np.ndarray, threshold: float) -> None:
    clear = np.abs(mean - threshold) > MARGIN
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], (mean > threshold)[clear])


def assert_telling(mean: np.ndarray, threshold: float) -> None:
    """Masks that are neither all empty nor all full, or nothing would be tested."""
    assert 0.02 < (mean > threshold).mean() < 0.98


def halved(folder: Path) -> Path:
    """The bundle with the threshold at the median of what it gives, so that masks are half full."""
    mean = oracle(folder, drawn_image(0))
    changed_manifest(folder, threshold=round(float(np.median(mean)), 4))
    return folder


def threshold_of(folder: Path) -> float:
    return float(json.loads((folder / "ensemble.json").read_text())["threshold"])


# --- images ---------------------------------------------------------------------------------------


def test_a_grey_png_is_read_as_it_is(tmp_path: Path) -> None:
    image = drawn_image(0)
    save_image(tmp_path / "grey.png", image)
    found = read_image(tmp_path / "grey.png")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, image)


def test_a_three_channel_jpeg_is_read_as_grey(tmp_path: Path) -> None:
    path = tmp_path / "strip.jpg"
    cv2.imwrite(str(path), cv2.merge([drawn_image(0)] * 3))
    found = read_image(path)
    assert (found.shape, found.dtype) == (SMALL, np.uint8)
    with Pillow.open(path) as opened:
        assert opened.mode == "RGB"
        assert np.abs(found - np.asarray(opened.convert("L"), int)).max() <= 1


def test_a_coloured_png_becomes_its_luminance(tmp_path: Path) -> None:
    colours = np.zeros((2, 3, 3), np.uint8)
    colours[:, 0, 2], colours[:, 1, 1], colours[:, 2, 0] = 200, 200, 200  # BGR: red, green, blue
    save_image(tmp_path / "colours.png", colours)
    found = read_image(tmp_path / "colours.png")
    assert np.abs(found - np.array([60.0, 117.0, 23.0])).max() <= 1  # 0.299, 0.587, 0.114 of 200


def test_a_16_bit_png_keeps_its_scale(tmp_path: Path) -> None:
    deep = np.array([[0, 0x4000, 0x8000, 0xFF00]], np.uint16)
    save_image(tmp_path / "deep.png", deep)
    found = read_image(tmp_path / "deep.png")
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - [[0, 64, 128, 255]]).max() <= 1


@pytest.mark.parametrize("name", ["a strip.png", "Stahl-Bänder_№1.png", "鋼.png"])
def test_a_name_with_spaces_and_foreign_letters_is_read(name: str, tmp_path: Path) -> None:
    save_image(tmp_path / name, drawn_image(0))
    np.testing.assert_array_equal(read_image(tmp_path / name), drawn_image(0))


@pytest.mark.parametrize("data", [b"", b"no image at all, only text", b"\xff\xd8\xff\xe0"])
def test_bytes_that_are_no_image_are_refused_by_name(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad\.jpg: {len(data)} bytes that are no image"):
        read_image(path)


def test_a_missing_image_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "gone.jpg")


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        read_image(tmp_path)


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "line", "expected"),
    [
        ("ImageId_ClassId,EncodedPixels", "b.jpg_2,1 3", ("b.jpg", 2, "1 3")),
        ("EncodedPixels,ImageId_ClassId", "1 3,b.jpg_2", ("b.jpg", 2, "1 3")),
        ("ImageId,EncodedPixels,ClassId", "b.jpg,1 3,0", ("b.jpg", 0, "1 3")),
        ("ImageId,ClassId,EncodedPixels", "b.jpg,2,1 3", ("b.jpg", 2, "1 3")),
        ("ImageId_ClassId,EncodedPixels", "a_b_1.jpg_4,", ("a_b_1.jpg", 4, "")),
        ("ImageId,EncodedPixels,ClassId", "NA,,3", ("NA", 3, "")),
    ],
)
def test_a_csv_gives_its_rows_and_keeps_its_columns(
    header: str, line: str, expected: tuple[str, int, str], tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\n{line}\n", encoding="utf-8")
    layout, rows = read_rows(path)
    assert ",".join(layout.columns) == header
    assert rows == [expected]


def test_a_csv_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfImageId,EncodedPixels,ClassId\r\na.jpg,1 3,0\r\n")
    assert read_rows(path)[1] == [("a.jpg", 0, "1 3")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Id,EncodedPixels\na,\n", "header Id,EncodedPixels, expected ImageId_ClassId,Encoded"),
        ("ImageId,EncodedPixels\na,\n", "header ImageId,EncodedPixels, expected"),
        ("ImageId_ClassId,EncodedPixels\na.jpg_1,\nb.jpg,\n", "line 3 names no class: b.jpg"),
        ("ImageId_ClassId,EncodedPixels\na.jpg_x,\n", "line 2 names no class: a.jpg_x"),
        ("ImageId,EncodedPixels,ClassId\na.jpg,1 3,\n", "line 2 names no class"),
        ("ImageId,EncodedPixels,ClassId\na.jpg,1 3,-1\n", "line 2 names no class"),
        ("ImageId,EncodedPixels,ClassId\na.jpg,1 3,1.0\n", "line 2 names no class"),
        ("ImageId,EncodedPixels,ClassId\na.jpg,1 3\n", "line 2 names no class"),
        ("ImageId_ClassId,EncodedPixels\na.jpg_1,1 3,\n", "line 2"),
        ("", ""),
        ("ImageId,EncodedPixels,ClassId\na.jpg,1 3,1\nb.jpg,1 3,1,5,6\n", ""),
    ],
)
def test_a_csv_that_is_no_sample_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"rows\.csv: .*{message}"):
        read_rows(path)


def test_class_0_stands_for_every_class_of_its_image(tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "sample.csv", ["b.jpg", "a.jpg"])
    layout, pairs = read_sample(sample, None, 4)
    assert layout == LAYOUTS["today"]
    assert pairs == [(name, label) for name in ("b.jpg", "a.jpg") for label in FOUR]


def test_rows_named_twice_are_written_once_where_they_came_first(tmp_path: Path) -> None:
    sample = tmp_path / "sample.csv"
    lines = ["ImageId,EncodedPixels,ClassId", "a.jpg,,2", "b.jpg,,1", "a.jpg,,0", "a.jpg,,2", ""]
    sample.write_text("\n".join(lines), encoding="utf-8")
    pairs = read_sample(sample, None, 3)[1]
    assert pairs == [("a.jpg", 2), ("b.jpg", 1), ("a.jpg", 1), ("a.jpg", 3)]


def test_a_class_above_the_members_is_refused_with_its_row(tmp_path: Path) -> None:
    sample = tmp_path / "sample.csv"
    sample.write_text("ImageId_ClassId,EncodedPixels\na.jpg_4,\na.jpg_5,\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"\('a\.jpg', 5\) names a class above the members' 4"):
        read_sample(sample, None, 4)


def test_a_layout_that_is_asked_for_wins_over_the_samples(tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "sample.csv", ["a.jpg"], "2019")
    assert read_sample(sample, "today", 4)[0] == LAYOUTS["today"]


def test_writing_leaves_no_part_behind_and_keeps_every_row_in_order(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    path.write_text("an old file", encoding="utf-8")
    pairs = [("b.jpg", 2), ("a.jpg", 1)]
    write_submission(path, LAYOUTS["2019"], pairs, {("a.jpg", 1): "3 4"})
    assert path.read_bytes() == b"ImageId_ClassId,EncodedPixels\nb.jpg_2,\na.jpg_1,3 4\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["submission.csv"]


def test_a_submission_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    path.write_text("an old file", encoding="utf-8")

    def broken() -> Any:
        yield "a.jpg", 1
        raise OSError("no space left")

    with pytest.raises(OSError):
        write_submission(path, LAYOUTS["2019"], broken(), {})
    assert path.read_text(encoding="utf-8") == "an old file"


def test_a_reader_meets_only_whole_submissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "submission.csv"
    path.write_text("an old file", encoding="utf-8")
    seen = []
    write_text = Path.write_text

    def spied(written: Path, *arguments: Any, **named: Any) -> None:
        write_text(written, *arguments, **named)
        seen.append(path.read_text(encoding="utf-8"))

    monkeypatch.setattr(Path, "write_text", spied)
    write_submission(path, LAYOUTS["2019"], [("a.jpg", 1)], {})
    assert seen == ["an old file"]


# --- finding what is mounted ----------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "bundle", "datasets/owner/bundle", "a/b/c/d"])
def test_the_folder_of_a_file_is_found_at_any_depth(place: str, tmp_path: Path) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ensemble.json").touch()
    (tmp_path / "other").mkdir()
    found = find_one(tmp_path, "ensemble.json", "the bundle", "--bundle")
    assert found == folder.resolve() or found == folder


@pytest.mark.parametrize("root", [".", "not-there"])
def test_a_file_that_is_nowhere_says_what_to_add(root: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no ensemble\.json under .*: add the bundle .*--bundle"):
        find_one(tmp_path / root, "ensemble.json", "the bundle", "--bundle")


def test_a_file_found_twice_lists_both_and_asks_to_choose(tmp_path: Path) -> None:
    for place in ("one", "deep/two"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "ensemble.json").write_text(place)
    with pytest.raises(ValueError) as error:
        find_one(tmp_path, "ensemble.json", "the bundle", "--bundle")
    assert str(tmp_path / "one") in str(error.value)
    assert str(tmp_path / "deep" / "two") in str(error.value)
    assert "choose with --bundle" in str(error.value)


def test_the_images_folder_is_the_one_that_holds_the_samples_images(tmp_path: Path) -> None:
    for name in ("test_images/b.jpg", "test_images/a.jpg", "train_images/x.jpg", "abc/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    sample = tmp_path / "sample_submission.csv"
    found = find_images(sample, {"a.jpg", "b.jpg"}, tmp_path / "not-there")
    assert found == tmp_path / "test_images"


@pytest.mark.parametrize("folders", [[], ["train_images"]])
def test_no_images_beside_the_sample_asks_for_their_folder(
    folders: list[str], tmp_path: Path
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jpg").touch()
    with pytest.raises(ValueError, match=r"no folder below .* holds the images.*--images"):
        find_images(tmp_path / "sample_submission.csv", {"a.jpg"}, tmp_path)


def test_without_a_sample_every_image_of_the_folder_is_a_task_in_name_order(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.png", "C.JPG", "notes.txt", "train.csv"):
        (tmp_path / name).touch()
    task = find_task(Options(images=tmp_path), 2)
    assert task.layout == LAYOUTS["2019"]
    assert task.pairs == [(n, label) for n in ("C.JPG", "a.png", "b.jpg") for label in (1, 2)]
    assert task.names == ["C.JPG", "a.png", "b.jpg"]


@pytest.mark.parametrize("layout", ["2019", "today"])
def test_a_sample_without_rows_names_no_image(layout: str, tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "sample_submission.csv", [], layout)
    with pytest.raises(ValueError, match="names no image"):
        find_task(Options(images=tmp_path, sample=sample), 4)


def test_a_folder_without_images_names_no_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path.name}: names no image"):
        find_task(Options(images=tmp_path), 4)


def test_a_folder_of_images_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone: no such folder of images"):
        find_task(Options(images=tmp_path / "gone"), 4)


# --- the manifest ---------------------------------------------------------------------------------


def member(**changes: Any) -> dict[str, Any]:
    return tiny_entry("one", tiny_model()) | changes


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a later format": ({"format": 2}, "format 2, this kernel reads format 1"),
    "an unknown key": ({"treshold": 0.5}, "not a manifest: .*treshold"),
    "an unknown key of a member": ({"members": [member(sha="")]}, "not a manifest: .*sha"),
    "a member without a file": (
        {"members": [{key: value for key, value in member().items() if key != "file"}]},
        "not a manifest: .*file",
    ),
    "members that are no list": ({"members": 5}, "not a manifest"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_manifest_is_refused_for(case: str, tmp_path: Path) -> None:
    changes, message = FAULTS[case]
    write_manifest(tmp_path, **{"members": [member()], **changes})
    with pytest.raises(ValueError, match=message) as error:
        load_manifest(tmp_path)
    assert str(tmp_path / "ensemble.json") in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "null", "{}"])
def test_a_file_that_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"ensemble\.json: (not a manifest|no JSON)"):
        load_manifest(tmp_path)


def test_a_missing_manifest_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file; build the bundle with build_kernel\.py"):
        load_manifest(tmp_path)


def test_a_whole_manifest_is_read_as_it_stands(tmp_path: Path) -> None:
    write_manifest(tmp_path, [member()], threshold=0.3, min_area=7, flips=["both"])
    manifest = load_manifest(tmp_path)
    assert (manifest.threshold, manifest.min_area, manifest.flips) == (0.3, 7, ("both",))
    assert manifest.image_size == SMALL
    assert manifest.members == [MemberSpec(**member())]
    assert manifest.members[0].gated
    assert not MemberSpec("x", "x", tiny_model(presence=False), [0], [1]).gated


# --- members --------------------------------------------------------------------------------------


def spec_of(folder: Path, **changes: Any) -> MemberSpec:
    entry = json.loads((folder / "ensemble.json").read_text())["members"][0]
    return MemberSpec(**entry | changes)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_member_whose_bytes_are_those_packed_is_loaded(light: Path) -> None:
    path = light / "fpn.safetensors"
    found = load_member(light, spec_of(light, sha256=sha256(path)), CPU)
    weights, expected = found.encode.network.state_dict(), load_file(path)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert not any(module.training for module in found.encode.network.modules())


def test_a_missing_member_is_named(light: Path) -> None:
    (light / "fpn.safetensors").unlink()
    with pytest.raises(ValueError, match=r"fpn\.safetensors: no such file; the bundle is not whol"):
        load_member(light, spec_of(light), CPU)


def test_one_changed_byte_is_noticed(light: Path) -> None:
    path = light / "fpn.safetensors"
    packed, data = sha256(path), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"sha256 {sha256(path)[:12]}…, .*{packed[:12]}…"):
        load_member(light, spec_of(light, sha256=packed), CPU)


@pytest.mark.parametrize("kept", [0, 5, 2000, -1])
def test_a_truncated_member_is_no_safetensors_file(kept: int, light: Path) -> None:
    path = light / "fpn.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"fpn\.safetensors: no safetensors file"):
        load_member(light, spec_of(light), CPU)


def without(weights: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if name != key}


BIAS = "segmentation_head.0.bias"
MISFITS: dict[str, tuple[Callable[..., Any], str]] = {
    "missing": (lambda w: without(w, BIAS), f"Missing key.*{BIAS}"),
    "unexpected": (lambda w: w | {"head.bias": w[BIAS].clone()}, r"Unexpected key.*head\.bias"),
    "of another shape": (lambda w: w | {BIAS: torch.zeros(7)}, f"size mismatch for {BIAS}"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_the_first_key_is_named_that_is(case: str, light: Path) -> None:
    change, message = MISFITS[case]
    path = light / "fpn.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(ValueError, match=rf"fpn\.safetensors: not of the declared.*{message}"):
        load_member(light, spec_of(light), CPU)


def test_half_precision_weights_run_in_full_precision(light: Path) -> None:
    path = light / "fpn.safetensors"
    halves = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
    save_file(halves, path)
    network = load_member(light, spec_of(light), CPU).encode.network
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    weights = network.state_dict()
    assert all(torch.equal(weights[key], value.to(weights[key])) for key, value in halves.items())


def test_a_gpu_that_fails_its_first_operation_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fails)
    assert pick_device() == CPU
    assert "no kernel image is available" in caplog.text


# --- the ensemble against the double loop ---------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, (50, 70), (33, 129), (64, 64), (45, 31)], ids=str)
def test_the_masks_are_those_of_a_double_loop(size: tuple[int, int], bundle: Path) -> None:
    changed_manifest(bundle, flips=["none", "horizontal", "vertical", "both"])
    image = drawn_image(3, size)
    mean, threshold = oracle(bundle, image), threshold_of(bundle)
    assert_telling(mean, threshold)
    found = ensemble_of(bundle)([image])
    assert found.shape == (1, 4, *size)
    assert_masks(found[0], mean, threshold)


def test_each_pass_is_that_of_the_double_loop_in_the_manifests_order(bundle: Path) -> None:
    image = drawn_image(4)
    found = each_pass(ensemble_of(bundle), image)
    flips = ("none", "horizontal", "vertical")
    expected = [(entry, net, flip) for entry, net in oracle_networks(bundle) for flip in flips]
    assert len(found) == len(expected) == 9
    for (made, name, probabilities), (entry, network, flip) in zip(found, expected, strict=True):
        assert (made, name) == (entry["name"], flip)
        by_hand = oracle_pass(entry, network, image / 255, flip)
        np.testing.assert_allclose(probabilities, by_hand, atol=1e-5)


def test_a_gate_never_raises_a_probability(bundle: Path) -> None:
    """The three members are one with a gate, one more, and one without: both kinds are mixed."""
    members = [member for member, flip in ensemble_of(bundle).passes if flip == "none"]
    assert [m.spec.gated for m in members] == [True, True, False]
    assert [m.encode.mean.shape[1] for m in members] == [1, 1, 3]
    grey = torch.from_numpy(drawn_image(5))[None, None] / 255
    for gated in members[:2]:
        with torch.inference_mode():
            normalised = (grey - gated.encode.mean) / gated.encode.std
            logits, presence = gated.encode.network(normalised)
            found = gated(grey)
        assert (found <= presence.sigmoid()[:, :, None, None] + 1e-6).all()
        assert (found <= logits.sigmoid() + 1e-6).all()


def test_images_in_a_batch_get_what_they_get_alone(bundle: Path) -> None:
    images = [drawn_image(seed, (40, 72)) for seed in range(3)]
    ensemble = ensemble_of(bundle)
    for image, found in zip(images, ensemble(images), strict=True):
        mean, threshold = oracle(bundle, image), threshold_of(bundle)
        assert_masks(found, mean, threshold)
        assert_masks(ensemble([image])[0], mean, threshold)


def test_small_masks_are_emptied_class_by_class(bundle: Path) -> None:
    image = drawn_image(6)
    whole = ensemble_of(bundle)([image])[0]
    areas = sorted(whole.sum(axis=(-2, -1)).tolist())
    assert areas[0] < areas[2]
    for least in (areas[2], areas[2] + 1):  # a mask of exactly min_area stays
        changed_manifest(bundle, min_area=least)
        found = ensemble_of(bundle)([image])[0]
        for mask, before in zip(found, whole, strict=True):
            expected = before if before.sum() >= least else np.zeros_like(before)
            np.testing.assert_array_equal(mask, expected)


class Ramp(nn.Module):
    """A stub that knows where it is: logits are grey times a number that no two places share."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.encoder = SimpleNamespace(output_stride=stride)

    @staticmethod
    def weights(size: tuple[int, int]) -> np.ndarray:
        return np.linspace(-6, 6, size[0] * size[1]).reshape(size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        ramp = torch.from_numpy(self.weights(images.shape[-2:])).to(images)
        return torch.cat([images * ramp, images * ramp**2 - 1], dim=1)


def ramp_ensemble(flips: tuple[str, ...], stride: int = 1) -> Ensemble:
    spec = MemberSpec("ramp", "ramp", {"classes": 2, "in_channels": 1}, [0.0], [1.0])
    stub = split(Ramp(stride), spec, CPU)
    manifest = Manifest([spec], classes=2, flips=flips)
    return Ensemble(manifest, [stub], CPU, Stages())


TURNED = {  # by numpy's own names
    "none": lambda a: a,
    "horizontal": np.fliplr,
    "vertical": np.flipud,
    "both": lambda a: np.flipud(np.fliplr(a)),
}


def ramp_by_hand(image: np.ndarray, flip: str) -> np.ndarray:
    """(2, H, W): turn, ask the stub, turn back."""
    turn = TURNED[flip]
    turned = turn(image / 255)
    ramp = Ramp.weights(turned.shape)
    logits = (turned * ramp, turned * ramp**2 - 1)
    return np.stack([turn(1 / (1 + np.exp(-values))) for values in logits])


@pytest.mark.parametrize("flip", FLIPS)
def test_a_flip_turns_the_image_and_turns_the_answer_back(flip: str) -> None:
    image = drawn_image(7, (6, 10))
    [(_, name, found)] = each_pass(ramp_ensemble((flip,)), image)
    assert name == flip
    np.testing.assert_allclose(found, ramp_by_hand(image, flip), atol=1e-5)


def test_no_two_flips_of_the_stub_agree() -> None:
    image = drawn_image(7, (6, 10))
    answers = [ramp_by_hand(image, flip) for flip in FLIPS]
    for index, answer in enumerate(answers):
        for other in answers[index + 1 :]:
            assert np.abs(answer - other).max() > 0.1
            assert ((answer > 0.55) != (other > 0.55)).any()


def test_the_mean_runs_over_every_flip() -> None:
    image = drawn_image(7, (6, 10))
    mean = np.mean([ramp_by_hand(image, flip) for flip in FLIPS], axis=0)
    assert_telling(mean, 0.55)
    assert_masks(ramp_ensemble(tuple(FLIPS))([image])[0], mean, 0.55)


def test_an_image_is_padded_with_its_own_border_and_cut_back() -> None:
    image = drawn_image(8, (6, 10))
    [(_, _, found)] = each_pass(ramp_ensemble(("both",), stride=8), image)
    padded = np.pad(image, ((0, 2), (0, 6)), mode="edge")
    expected = ramp_by_hand(padded, "both")[:, :6, :10]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_image_that_fits_is_not_padded() -> None:
    images = torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pad_to_multiple(images, 32), images)


# --- a whole run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["2019", "today"])
def test_a_run_writes_every_row_of_the_sample_in_its_order_and_layout(
    layout: str, light: Path, tmp_path: Path
) -> None:
    names = ["c.jpg", "a_1.jpg", "b.jpg"]
    images = save_strips(tmp_path / "images", alike(*names))
    sample = write_sample(tmp_path / "sample.csv", names, layout)
    report = predict(light, tmp_path / "out.csv", images=tmp_path / "images", sample=sample)
    table = read_csv(tmp_path / "out.csv")
    if layout == "2019":
        assert list(table.columns) == ["ImageId_ClassId", "EncodedPixels"]
        expected = [f"{name}_{label}" for name in names for label in FOUR]
        assert table["ImageId_ClassId"].tolist() == expected
    else:
        assert list(table.columns) == ["ImageId", "EncodedPixels", "ClassId"]
        assert table["ImageId"].tolist() == [name for name in names for _ in FOUR]
        assert table["ClassId"].tolist() == [str(label) for _ in names for label in FOUR]
    rles = submitted(tmp_path / "out.csv")
    assert any(rles.values())
    for name, image in images.items():
        mean = oracle(light, image)
        for label in FOUR:
            assert_masks(decoded(rles[name, label], SMALL), mean[label - 1], threshold_of(light))
    assert (report["strips"], report["rows"], report["faults"]) == (3, 12, {})


def decoded(rle: str, size: tuple[int, int]) -> np.ndarray:
    """An independent decoder: pixel by pixel, down the columns."""
    pixels = np.zeros(size[0] * size[1], bool)
    numbers = [int(word) for word in rle.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        pixels[start - 1 : start - 1 + length] = True
    return pixels.reshape(size, order="F")


def test_only_the_rows_that_the_sample_asks_for_are_written_and_counted(
    light: Path, tmp_path: Path
) -> None:
    image = save_strips(tmp_path / "images", alike("a.jpg"))["a.jpg"]
    masks = ensemble_of(light)([image])[0]
    assert masks.any(axis=(-2, -1)).sum() >= 2
    label = int(np.argmax(masks.any(axis=(-2, -1)))) + 1
    sample = tmp_path / "sample.csv"
    sample.write_text(f"ImageId_ClassId,EncodedPixels\na.jpg_{label},\n", encoding="utf-8")
    report = predict(light, tmp_path / "out.csv", images=tmp_path / "images", sample=sample)
    assert list(submitted(tmp_path / "out.csv")) == [("a.jpg", label)]
    assert (report["rows"], report["non_empty"]) == (1, 1)


def half_empty(bundle: Path) -> None:
    """Biases classes 2 and 4 of the light bundle off."""
    path = bundle / "fpn.safetensors"
    weights = load_file(path)
    weights[BIAS] = torch.tensor([0.0, -100.0, 0.0, -100.0])
    save_file(weights, path)


@pytest.mark.parametrize("empty_rows", [True, False])
def test_todays_layout_may_leave_the_empty_rows_out(
    empty_rows: bool, light: Path, tmp_path: Path
) -> None:
    half_empty(light)
    changed_manifest(light, empty_rows=empty_rows)
    save_strips(tmp_path / "images", alike("a.jpg", "b.jpg"))
    sample = write_sample(tmp_path / "sample.csv", ["a.jpg", "b.jpg"])
    predict(light, tmp_path / "out.csv", images=tmp_path / "images", sample=sample)
    rles = submitted(tmp_path / "out.csv")
    labels = FOUR if empty_rows else (1, 3)
    assert list(rles) == [(name, label) for name in ("a.jpg", "b.jpg") for label in labels]
    assert all(bool(rle) == (label in (1, 3)) for (_, label), rle in rles.items())


def test_the_2019_layout_keeps_its_empty_rows_in_any_case(light: Path, tmp_path: Path) -> None:
    half_empty(light)
    changed_manifest(light, empty_rows=False)
    save_strips(tmp_path / "images", alike("a.jpg"))
    predict(light, tmp_path / "out.csv", images=tmp_path / "images")
    assert len(submitted(tmp_path / "out.csv")) == 4


def test_strips_of_mixed_sizes_in_batches_get_what_they_get_one_by_one(
    light: Path, tmp_path: Path
) -> None:
    sizes = [SMALL, SMALL, (50, 70), (50, 70), SMALL, (50, 70), SMALL, SMALL, SMALL]
    images = save_strips(tmp_path / "images", {f"{i}.jpg": s for i, s in enumerate(sizes)})
    for batch_size in (1, 3):
        output = tmp_path / f"{batch_size}.csv"
        predict(light, output, images=tmp_path / "images", batch_size=batch_size)
        rles = submitted(output)
        for name, image in images.items():
            mean = oracle(light, image)
            for label in FOUR:
                found = decoded(rles[name, label], image.shape)
                assert_masks(found, mean[label - 1], threshold_of(light))


def spoil(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if how == "zero bytes" else b"text, not an image")


REASONS = {
    "missing": "No such file",
    "zero bytes": "0 bytes that are no image",
    "text": "18 bytes that are no image",
}


@pytest.mark.parametrize("how", REASONS)
def test_a_strip_that_cannot_be_read_costs_only_its_own_rows(
    how: str, light: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    save_strips(tmp_path / "images", alike(*names))
    sample = write_sample(tmp_path / "sample.csv", names)
    options = ["--bundle", light, "--images", tmp_path / "images", "--sample", sample]
    inference.main([*map(str, options), "--output", str(tmp_path / "whole.csv")])
    expected = submitted(tmp_path / "whole.csv")
    assert all(any(expected[name, label] for label in FOUR) for name in names)

    spoil(tmp_path / "images" / "b.jpg", how)
    caplog.clear()
    outputs = ["--output", tmp_path / "out.csv", "--report", tmp_path / "run.json"]
    inference.main([*map(str, options + outputs)])  # no exit code but 0
    expected |= {("b.jpg", label): "" for label in FOUR}
    assert submitted(tmp_path / "out.csv") == expected
    report = json.loads((tmp_path / "run.json").read_text())
    assert list(report["faults"]) == ["b.jpg"]
    assert REASONS[how] in report["faults"]["b.jpg"]
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "b.jpg stays empty" in warned[0]
    assert REASONS[how] in warned[0]


def white_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loaded network dies of a batch that holds an all-white strip."""

    def refuse(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if (inputs[0].flatten(1).std(dim=1) == 0).any():
            raise RuntimeError("out of memory, said the network")

    def load(*arguments: Any) -> Member:
        loaded = load_member(*arguments)
        loaded.encode.network.encoder.register_forward_pre_hook(refuse)
        return loaded

    monkeypatch.setattr("kernel.ensemble.load_member", load)


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_strip_that_the_networks_cannot_take_costs_only_its_own_rows(
    place: int, light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i}.jpg" for i in range(5)]
    images = save_strips(tmp_path / "images", alike(*names))
    white = names[place]
    save_image(tmp_path / "images" / white, np.full(SMALL, 255, np.uint8))
    white_is_refused(monkeypatch)
    report = predict(light, tmp_path / "out.csv", images=tmp_path / "images", batch_size=5)
    assert list(report["faults"]) == [white]
    assert "out of memory, said the network" in report["faults"][white]
    rles = submitted(tmp_path / "out.csv")
    assert not any(rles[white, label] for label in FOUR)
    for name in names:
        mean = oracle(light, images[name])
        for label in FOUR if name != white else ():
            assert_masks(decoded(rles[name, label], SMALL), mean[label - 1], threshold_of(light))


@pytest.mark.parametrize(
    ("module", "moment"), [("predict", "load_ensemble"), ("images", "read_image")]
)
def test_a_complete_empty_submission_stands_before(
    module: str, moment: str, light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_strips(tmp_path / "images", alike("a.jpg", "b.jpg"))
    found: list[dict[tuple[str, int], str]] = []
    original = getattr(importlib.import_module(f"kernel.{module}"), moment)

    def spied(*arguments: Any, **named: Any) -> Any:
        found.append(submitted(tmp_path / "out.csv"))
        return original(*arguments, **named)

    monkeypatch.setattr(f"kernel.{module}.{moment}", spied)
    predict(light, tmp_path / "out.csv", images=tmp_path / "images")
    assert found[0] == {(name, label): "" for name in ("a.jpg", "b.jpg") for label in FOUR}
    assert any(submitted(tmp_path / "out.csv").values())


# --- the real script as a process -----------------------------------------------------------------

TREES = {  # where Kaggle mounts the bundle and the competition
    "old": ("severstal-bundle", "severstal-steel-defect-detection"),
    "new": ("datasets/me/severstal-bundle", "competitions/severstal-steel-defect-detection"),
}


@pytest.mark.parametrize("style", TREES)
def test_the_script_finds_everything_in_kaggles_tree(
    style: str, light: Path, tmp_path: Path
) -> None:
    dataset, competition = (tmp_path / "input" / place for place in TREES[style])
    shutil.copytree(light, dataset)
    names = ["b.jpg", "a.jpg"]
    images = save_strips(competition / "test_images", alike(*names))
    save_strips(competition / "train_images", alike("x.jpg"))
    write_sample(competition / "sample_submission.csv", names)
    working = tmp_path / "working"
    working.mkdir()
    ended = script("--input", tmp_path / "input", "--report", "run.json", folder=working)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert sorted(path.name for path in working.iterdir()) == ["run.json", "submission.csv"]
    rles = submitted(working / "submission.csv")
    assert list(rles) == [(name, label) for name in names for label in FOUR]
    for name, image in images.items():
        mean = oracle(light, image)
        for label in FOUR:
            assert_masks(decoded(rles[name, label], SMALL), mean[label - 1], threshold_of(light))
    report = json.loads((working / "run.json").read_text())
    non_empty = sum(map(bool, rles.values()))
    assert (report["strips"], report["rows"], report["non_empty"]) == (2, 8, non_empty)
    stages = {"import", "load", "decode", "rle", "write", "networks/fpn/encoder"}
    assert stages <= set(report["stages"])
    last = ended.stdout.splitlines()[-1]
    assert f"8 rows, {non_empty} non-empty masks, 0 strips failed" in last
    assert last.endswith("strips/s")


def test_the_script_takes_bundle_and_images_by_name(light: Path, tmp_path: Path) -> None:
    images = tmp_path / "some strips"
    save_strips(images, alike("b.jpg", "a.jpg"))
    (images / "a.jpg").write_bytes(b"")
    ended = script("--bundle", light, "--images", images, "--output", "mine.csv", folder=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rles = submitted(tmp_path / "mine.csv")
    assert list(rles) == [(name, label) for name in ("a.jpg", "b.jpg") for label in FOUR]
    assert not any(rles["a.jpg", label] for label in FOUR)
    assert any(rles["b.jpg", label] for label in FOUR)
    assert "a.jpg stays empty" in ended.stdout


def test_the_script_ends_with_one_line_and_code_2_on_bad_input(light: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = script("--input", tmp_path / "empty", folder=tmp_path)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stdout + ended.stderr
    assert len((ended.stdout + ended.stderr).splitlines()) == 1
    assert "no ensemble.json under" in ended.stdout


def break_sample(light: Path, folder: Path) -> dict[str, Path]:
    (folder / "sample.csv").write_text("Id,Pixels\n1,2\n", encoding="utf-8")
    return {"sample": folder / "sample.csv"}


def break_manifest(light: Path, folder: Path) -> dict[str, Path]:
    changed_manifest(light, format=2)
    return {}


def break_member(light: Path, folder: Path) -> dict[str, Path]:
    (light / "fpn.safetensors").write_bytes(b"12345678")
    return {}


def name_unknown_encoder(light: Path, folder: Path) -> dict[str, Path]:
    entry = tiny_entry("fpn", tiny_model("FPN", presence=False) | {"encoder_name": "resnet35"})
    changed_manifest(light, members=[entry])
    return {}


def name_unknown_architecture(light: Path, folder: Path) -> dict[str, Path]:
    entry = tiny_entry("fpn", tiny_model("FPN", presence=False) | {"arch": "Unett"})
    changed_manifest(light, members=[entry])
    return {}


def name_unknown_argument(light: Path, folder: Path) -> dict[str, Path]:
    entry = tiny_entry("fpn", tiny_model("FPN", presence=False) | {"decoder_width": 3})
    changed_manifest(light, members=[entry])
    return {}


def name_missing_output_folder(light: Path, folder: Path) -> dict[str, Path]:
    return {"output": folder / "not-there" / "out.csv"}


BAD_INPUT: dict[str, tuple[Callable[..., dict[str, Path]], str]] = {
    "a wrong header": (break_sample, "header Id,Pixels"),
    "a wrong manifest": (break_manifest, "format 2"),
    "a wrong member": (break_member, "no safetensors file"),
    "an unknown encoder": (name_unknown_encoder, "resnet35"),
    "an unknown architecture": (name_unknown_architecture, "(?i)unett"),
    "an unknown argument of the model": (name_unknown_argument, "decoder_width"),
    "an output folder that is not there": (name_missing_output_folder, "not-there"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_exit_code_2_and_one_line_for(
    case: str, light: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_strips(tmp_path / "images", alike("a.jpg"))
    spoil_it, message = BAD_INPUT[case]
    options = {
        "bundle": light,
        "images": tmp_path / "images",
        "output": tmp_path / "out.csv",
    } | spoil_it(light, tmp_path)
    with pytest.raises(SystemExit) as ended:
        inference.main(
            [word for key, value in options.items() for word in (f"--{key}", str(value))]
        )
    assert ended.value.code == 2
    [error] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(error.getMessage().splitlines()) == 1
    assert re.search(message, error.getMessage())


def test_a_killed_run_leaves_a_complete_submission(light: Path, tmp_path: Path) -> None:
    names = [f"{i:03}.jpg" for i in range(400)]
    save_image(tmp_path / "images" / names[0], drawn_image(0))
    for name in names[1:]:
        (tmp_path / "images" / name).symlink_to(tmp_path / "images" / names[0])
    output, printed = tmp_path / "submission.csv", tmp_path / "log.txt"
    command = [sys.executable, kernel_script(), "--bundle", light, "--images", tmp_path / "images"]
    with printed.open("w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file)
        give_up = time.monotonic() + 60
        while "400 images of" not in printed.read_text() and time.monotonic() < give_up:
            time.sleep(0.02)
        time.sleep(0.1)  # some strips on the way
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, printed.read_text()
    assert "400 images of" in printed.read_text()
    assert list(submitted(output)) == [(name, label) for name in names for label in FOUR]


# --- the real strips ------------------------------------------------------------------------------


def cocos_rle(mask: np.ndarray) -> bytes:
    return coco.encode(np.asfortranarray(mask, np.uint8))["counts"]


def cocos_rle_of(rle: str, size: tuple[int, int]) -> bytes:
    """The same code out of `start length` pairs: COCO's counts run off, on, off, …"""
    numbers, counts, end = [int(word) for word in rle.split()], [], 0
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        counts += [start - 1 - end, length]
        end = start - 1 + length
    tail = size[0] * size[1] - end
    counts += [tail] if tail else []
    return coco.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]


@pytest.mark.skipif(not STRIPS.is_dir(), reason=f"the 22 real strips are not in {STRIPS}")
def test_the_22_real_strips_give_88_rows_with_the_double_loops_masks(
    light: Path, tmp_path: Path
) -> None:
    gated = tiny_model("FPN", channels=3)
    save_file(random_network(gated, 2).state_dict(), light / "gated.safetensors")
    entries = json.loads((light / "ensemble.json").read_text())["members"]
    entries.append(tiny_entry("gated", gated))
    changed_manifest(light, members=entries, flips=["none", "vertical"])
    paths = sorted(STRIPS.glob("t*_images/*.jpg"), key=lambda path: path.name)
    assert len(paths) == 22
    (tmp_path / "strips").mkdir()
    for path in paths:
        (tmp_path / "strips" / path.name).symlink_to(path)
    means = []
    for path in paths[:3]:
        with Pillow.open(path) as opened:
            means.append(oracle(light, np.asarray(opened.convert("L"))))
    threshold = round(float(np.median(means)), 4)
    changed_manifest(light, threshold=threshold)
    report = predict(light, tmp_path / "out.csv", images=tmp_path / "strips")
    assert (report["strips"], report["rows"], report["faults"]) == (22, 88, {})
    rles = submitted(tmp_path / "out.csv")
    assert list(rles) == [(path.name, label) for path in paths for label in FOUR]
    size = (256, 1600)
    for path, mean in zip(paths, means, strict=False):
        for label in FOUR:
            rle, expected = rles[path.name, label], mean[label - 1] > threshold
            close = np.abs(mean[label - 1] - threshold) <= MARGIN
            assert close.mean() < 0.01
            expected[close] = decoded(rle, size)[close]
            same = cocos_rle_of(rle, size) == cocos_rle(expected)
            assert same, f"{path.name}, class {label}"  # a diff of such codes would take minutes
    assert_telling(np.concatenate(means), threshold)
