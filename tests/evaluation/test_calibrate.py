"""Calibration without labels: mean gates meet the classes' shares, in the kernel's own run too."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import change_manifest, change_member, error_of, exit_code, read_manifest, save_strips
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evaluation import calibrate
from evaluation.calibrate import add_shifts, check_weights, find_shifts, gate_logits, shift_to_mean
from kernel.checks import read_json
from kernel.competition import SEVERSTAL
from kernel.device import pick_device
from kernel.ensemble import Ensemble
from kernel.ensemble_loading import load_ensemble
from kernel.images import read_image
from kernel.manifest import MANIFEST, load_manifest
from kernel.stages import Stages

SHARES = [0.1, 0.2, 0.4, 0.6]


def ensemble_of(dataset: Path) -> Ensemble:
    return load_ensemble(dataset, load_manifest(dataset), pick_device(), Stages(), None)


# --- shifts ---------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-9, 9), min_size=1, max_size=8).map(torch.tensor),
    st.floats(0.01, 0.99),
)
def test_the_shifted_mean_is_the_one_asked_for(logits: torch.Tensor, mean: float) -> None:
    shifted = torch.sigmoid(logits + shift_to_mean(logits, mean)).mean().item()
    assert shifted == pytest.approx(mean, abs=2e-3)  # of a shift of two decimals


def test_a_mean_that_no_shift_reaches_ends_the_search_at_its_border() -> None:
    assert shift_to_mean(torch.zeros(3), 0.0) == pytest.approx(-calibrate.MAX_SHIFT, abs=0.01)


def test_each_member_and_class_has_its_own_shift() -> None:
    logits = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    found = find_shifts({"shut": logits - 4, "open": logits + torch.tensor([1, 2])}, [0.3, 0.6])
    apart = [b - a for a, b in zip(found["open"], found["shut"], strict=True)]
    assert apart == pytest.approx([5, 6], abs=0.02)
    assert found["shut"][1] > found["shut"][0]


# --- the command ----------------------------------------------------------------------------------


def test_the_kernels_gates_have_the_shares_once_the_shifts_are_in_its_manifest(
    dataset: Path, labelled_strips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On top of shifts that were there; a member without a presence head keeps its entry."""
    before = read_manifest(dataset)["members"]
    [gated, *_] = [member for member in before if member["model"].get("aux_params")]
    gated["gate_shift"] = 1.5
    change_manifest(dataset, members=before)
    images, written = labelled_strips / "test_images", dataset / "new.json"
    options = ["--bundle", dataset, "--images", images, "--weights", dataset]
    assert exit_code(calibrate.main, *options, "--shares", *SHARES, "--write", written) == 0
    found = json.loads(capsys.readouterr().out)["gate_shift"]
    after = read_json(written)["members"]
    change_manifest(dataset, members=after)
    ensemble = ensemble_of(dataset)
    strips = [ensemble.prepare(read_image(path, SEVERSTAL)) for path in sorted(images.iterdir())]
    for old, new in zip(before, after, strict=True):
        if old["name"] not in found:
            assert new == old
            continue
        gates = [
            ensemble.run_encoder(i, strip)[0]
            for i, each in enumerate(ensemble.passes)
            for strip in strips
            if (each.member, each.flip) == (old["name"], "none")
        ]
        assert torch.cat(gates).mean(dim=0).tolist() == pytest.approx(SHARES, abs=3e-3)
        assert {**new, "gate_shift": 0} == {**old, "gate_shift": 0}


def test_checkpoints_of_any_form_are_calibrated_and_a_torn_image_left_out(
    dataset: Path, labelled_strips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An entry may have its checkpoint in a folder, and leave its model to `save_pretrained`."""
    weights, images = tmp_path / "weights", tmp_path / "images"
    entries = read_manifest(dataset)["members"]
    for entry in entries:
        pretrained = weights / entry["name"]
        pretrained.mkdir(parents=True)
        shutil.copyfile(dataset / entry["file"], pretrained / "model.safetensors")
        config = entry["model"] | {"_model_class": entry["model"].pop("arch")}
        (pretrained / "config.json").write_text(json.dumps(config))
    own = [{k: e[k] for k in ("name", "mean", "std")} | {"file": e["name"]} for e in entries]
    (weights / MANIFEST).write_text(json.dumps({"members": own}))
    shutil.copytree(labelled_strips / "test_images", images)
    (images / "0torn.jpg").write_bytes(b"torn")
    options = ["--bundle", dataset, "--images", images, "--shares", *SHARES]
    write = ["--weights", weights, "--write", weights / MANIFEST]
    assert exit_code(calibrate.main, *options, *write) == 0
    assert "left out: " in caplog.text and "0torn.jpg" in caplog.text
    after = read_manifest(weights)["members"]
    assert any("gate_shift" in entry for entry in after)
    assert [{k: v for k, v in entry.items() if k != "gate_shift"} for entry in after] == own


def test_shares_are_counted_in_a_training_set(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, data = ["a.png", "b.png", "c.png", "d.png", "e.png"], tmp_path / "data"
    save_strips(data / "train_images", names)
    classes = {"a.png": [1, 2, 3, 4], "b.png": [3, 4], "c.png": [3], "e.png": [3, 4]}
    rows = [f"{name},{label},1 9\n" for name, labels in classes.items() for label in labels]
    (data / "train.csv").write_text("ImageId,ClassId,EncodedPixels\n" + "".join(rows))
    options = ["--bundle", dataset, "--images", data / "train_images", "--data", data]
    assert exit_code(calibrate.main, *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shares"] == [0.2, 0.2, 0.8, 0.6]
    (data / "train.csv").write_text("ImageId,ClassId,EncodedPixels\n" + "".join(rows[1:]))
    assert exit_code(calibrate.main, *options) == 2
    assert "a class without an image cannot be calibrated" in error_of(capsys.readouterr().err)


def test_gates_are_those_of_the_gated_members(dataset: Path, labelled_strips: Path) -> None:
    manifest = load_manifest(dataset)
    found = gate_logits(ensemble_of(dataset), list((labelled_strips / "test_images").iterdir()))
    assert set(found) == {spec.name for spec in manifest.members if spec.gated}
    assert add_shifts(read_manifest(dataset), manifest, {}) == read_manifest(dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shares", 0.1, 0.2], "shares [0.1, 0.2]: expected 4, each above 0"),
        (["--shares", 0.1, 0.2, 0.3, 0], "shares [0.1, 0.2, 0.3, 0.0]: expected 4, each above 0"),
        (["--shares", 0.1, 0.2, 0.3, "nan"], "expected 4, each above 0 and below 1"),
        (["--data", "gone"], "gone/train.csv: no such file"),
        (["--shares", *SHARES, "--images", "gone"], "gone: no such folder"),
        (["--shares", *SHARES, "--weights", "gone", "--write", "x"], "gone/ensemble.json: no such"),
        (["--shares", *SHARES, "--write", "."], ".: a folder, expected a file"),
    ],
)
def test_bad_input_is_one_line_before_the_work(
    options: list[object],
    message: str,
    dataset: Path,
    labelled_strips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate, "load_for_images", None)
    words = ["--bundle", dataset, "--images", labelled_strips / "test_images", *options]
    assert exit_code(calibrate.main, *words) == 2
    assert message in error_of(capsys.readouterr().err)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "mean": (lambda folder: change_member(folder, mean=[0.5]), "mean of unet-a: [0.5], the bundle"),
    "channels": (
        lambda folder: change_member(folder, channels=[3, 2, 1, 0]),
        "channels of unet-a: [3, 2, 1, 0], the bundle has None",
    ),
    "shifts that would be added twice": (
        lambda folder: change_member(folder, gate_shift=[1, 1, 1, 1]),
        "gate_shift of unet-a: [1, 1, 1, 1], the bundle has 0.0",
    ),
    "a member's image_size": (
        lambda folder: change_member(folder, image_size=[32, 64]),
        "image_size of unet-a: (32, 64), the bundle has None",
    ),
    "image_size": (
        lambda folder: change_manifest(folder, image_size=[32, 64]),
        "image_size: (32, 64), the bundle has None",
    ),
    "the first flip": (
        lambda folder: change_manifest(folder, flips=["vertical", "none"]),
        "the first flip: 'vertical', the bundle has 'none'",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_gates_of_other_settings_than_the_weights_have_now_are_not_written(
    case: str, dataset: Path, tmp_path: Path
) -> None:
    weights = Path(shutil.copytree(dataset, tmp_path / "weights"))
    manifest = load_manifest(dataset)
    change_manifest(weights, flips=[*manifest.flips, "both"], threshold=0.4, min_area=9)
    check_weights(dataset, manifest, weights)  # by which no gate is moved
    change, words = CHANGES[case]
    change(weights)
    with pytest.raises(ValueError, match=re.escape(f"{weights / MANIFEST}: {words}")):
        check_weights(dataset, manifest, weights)


def test_where_no_member_has_a_presence_head_there_is_nothing_to_calibrate(
    light_bundle: Path, labelled_strips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = labelled_strips / "test_images"
    options = ["--bundle", light_bundle, "--images", images, "--shares", *SHARES]
    assert exit_code(calibrate.main, *options) == 2
    assert "no member has a presence head" in error_of(capsys.readouterr().err)


def test_a_member_that_was_fitted_again_is_to_be_built_first(
    dataset: Path, labelled_strips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path(shutil.copytree(dataset, tmp_path / "weights"))
    change_manifest(weights, members=[
        {key: value for key, value in member.items() if key != "sha256"}
        for member in read_manifest(weights)["members"][::-1]  # whatever their order
    ])  # fmt: skip
    check_weights(dataset, load_manifest(dataset), weights)
    path = weights / read_manifest(weights)["members"][1]["file"]
    save_file({key: value * 2 for key, value in load_file(path).items()}, path)
    options = ["--bundle", dataset, "--images", labelled_strips / "test_images"]
    write = ["--weights", weights, "--write", tmp_path / "new.json"]
    assert exit_code(calibrate.main, *options, "--shares", *SHARES, *write) == 2
    assert f"{path}: is not what {dataset / path.name} holds" in error_of(capsys.readouterr().err)
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize("gates", [[float("nan"), 0.0, 0.0], [-25.0, -25.0, -25.0]])
def test_gates_that_no_shift_opens_are_an_error(gates: list[float]) -> None:
    logits = {"fine": torch.randn(3, 1), "stuck": torch.tensor(gates)[:, None]}
    with pytest.raises(ValueError, match="stuck, class 1: no shift of up to 20 logits"):
        find_shifts(logits, [0.3])
