"""What a fit leaves: a checkpoint the kernel loads, its scores, and its row in experiments.csv."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, SMALL, tiny_entry, write_manifest
from safetensors.torch import load_file

from kernel.manifest import MemberSpec
from kernel.members import load_member
from training.config import NO_FOLD, Config
from training.metrics import Scores
from training.module import new_network
from training.results import (
    add_experiment,
    read_weights,
    score_held_out,
    warn_of_shifts,
    write_checkpoint,
    write_scores,
)
from training.strips import Strips


@pytest.mark.parametrize("channels", [1, 3])
def test_the_checkpoint_is_loaded_by_the_kernel(
    channels: int, config: Config, tmp_path: Path
) -> None:
    config = replace(config, channels=channels)
    network = new_network(config).eval()
    write_checkpoint(network, config, tmp_path / "tiny.safetensors")
    member = load_member(tmp_path, config.spec, CPU)
    images = torch.rand(1, 1, *SMALL, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        inputs = ((images - config.mean[0]) / config.std[0]).expand(-1, channels, -1, -1)
        logits, presence = network(inputs)
        found = member(images)
    expected = logits.sigmoid() * presence.sigmoid()[:, :, None, None]
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < 0.02  # fp16 on disk


def test_the_checkpoints_header_holds_its_manifest_entry_and_its_weights_are_halves(
    network: Any, config: Config, tmp_path: Path
) -> None:
    path = tmp_path / "new folder" / "tiny.safetensors"
    write_checkpoint(network, config, path)
    data = path.read_bytes()  # 8 bytes: the header's length; then JSON
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    entry = json.loads(header.pop("__metadata__")["member"])
    assert MemberSpec(**entry) == config.spec
    assert entry["model"]["encoder_name"] == "tu-test_resnet"
    assert {tensor["dtype"] for tensor in header.values()} == {"F16", "I64"}
    assert [each.name for each in path.parent.iterdir()] == ["tiny.safetensors"]


def test_a_link_in_the_checkpoints_place_goes_and_what_it_leads_to_stays(
    network: Any, config: Config, tmp_path: Path
) -> None:
    (tmp_path / "shipped.safetensors").write_text("another ensemble's")
    (tmp_path / "tiny.safetensors").symlink_to("shipped.safetensors")
    write_checkpoint(network, config, tmp_path / "tiny.safetensors")
    assert (tmp_path / "shipped.safetensors").read_text() == "another ensemble's"
    assert not (tmp_path / "tiny.safetensors").is_symlink()
    load_member(tmp_path, config.spec, CPU)


def test_a_checkpoint_that_cannot_be_written_leaves_what_was_there(
    network: Any, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "tiny.safetensors").symlink_to("elsewhere.safetensors")
    monkeypatch.setattr("training.results.save_file", full)
    with pytest.raises(OSError):
        write_checkpoint(network, config, tmp_path / "tiny.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]
    assert (tmp_path / "tiny.safetensors").is_symlink()


def test_validation_scores_the_gated_member_on_whole_strips(
    network: Any, config: Config, strips: Strips
) -> None:
    some = replace(strips, names=strips.names[:3])
    scores = score_held_out(network, config, some)
    expected = Scores()
    for name in some.names:
        image, masks = some.load(name)
        grey = torch.from_numpy(image / 255).float()[None, None]
        with torch.inference_mode():
            logits, presence = network((grey - config.mean[0]) / config.std[0])
        gated = logits.sigmoid() * presence.sigmoid()[:, :, None, None]
        expected.add((gated[0] > 0.55).numpy(), masks)
    assert scores.summary() == expected.summary()
    assert sum(map(len, scores.dices)) == 12


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_weights_that_no_half_can_hold_are_not_written(
    value: float, network: Any, config: Config, tmp_path: Path
) -> None:
    with torch.no_grad():
        network.segmentation_head[0].bias[1] = value
    with pytest.raises(ValueError, match=r"tiny: segmentation_head\.0\.bias holds NaN, or more"):
        write_checkpoint(network, config, tmp_path / "tiny.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_batch_norm_statistics_that_no_half_can_hold_stay_as_they_are(
    name: str, network: Any, config: Config, tmp_path: Path
) -> None:
    """As in a build: GPU hours are lost with a checkpoint that is not written."""
    getattr(network.encoder.model.bn1, name)[0] = 1e5
    write_checkpoint(network, config, tmp_path / "tiny.safetensors")
    weights = load_file(tmp_path / "tiny.safetensors")
    held = f"encoder.model.bn1.{name}"
    assert torch.equal(weights[held], network.state_dict()[held])
    assert {key for key, value in weights.items() if value.dtype == torch.float32} == {held}
    load_member(tmp_path, config.spec, CPU)
    getattr(network.encoder.model.bn1, name)[0] = float("nan")
    with pytest.raises(ValueError, match=f"bn1.{name} holds NaN"):
        write_checkpoint(network, config, tmp_path / "tiny.safetensors")


@pytest.mark.parametrize(
    ("changed", "outdated"),
    [
        ("classification_head.3.bias", "a gate_shift for"),
        ("segmentation_head.0.bias", "a mask_shift for"),
        ("encoder.model.bn1.bias", "a mask_shift and a gate_shift for"),
        (None, ""),
    ],
)
def test_only_a_shift_of_what_another_fit_changed_is_told(
    changed: str | None,
    outdated: str,
    network: Any,
    config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Gates that are taught anew leave the masks as they were, and their shift belongs to them."""
    path, shifts = tmp_path / "tiny.safetensors", {"mask_shift": 1.5, "gate_shift": [0, -8.5, 0, 0]}
    write_checkpoint(network, config, path)
    write_manifest(tmp_path, [tiny_entry("tiny", config.spec.model) | shifts])
    before = read_weights(path)
    if changed:
        network.state_dict()[changed] += 1
    write_checkpoint(network, config, path)
    warn_of_shifts(path, before)
    assert [outdated in message for message in caplog.messages] == [True] * bool(changed)
    assert ("mask_shift" in caplog.text) == ("mask_shift" in outdated)
    caplog.clear()
    path.write_bytes(b"torn")
    torn = read_weights(path)
    assert torn == read_weights(tmp_path / "gone") == {}
    write_checkpoint(network, config, path)
    warn_of_shifts(path, torn)
    assert "has a mask_shift and a gate_shift for tiny, of another fit" in caplog.text


def test_a_strip_that_it_cannot_answer_counts_as_an_empty_answer(
    network: Any, config: Config, strips: Strips, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad():
        network.segmentation_head[0].bias[:] = float("nan")
    [clean], [defective] = strips.clean()[:1], strips.with_class(1)[:1]
    scores = score_held_out(network, config, replace(strips, names=[clean, defective]))
    assert scores.empty == [True, True] and scores.dices[0] == [1.0] * 4
    assert scores.summary()["dice_non_empty"] == 0
    assert f"{defective} counts as an empty answer: every pass gave NaN" in caplog.text


def test_a_strip_that_cannot_be_read_costs_no_validation(
    network: Any, config: Config, strips: Strips, caplog: pytest.LogCaptureFixture
) -> None:
    """After hours of steps, which would be lost with it."""
    named = replace(strips, names=[strips.names[0], "gone.png", strips.names[1]])
    expected = score_held_out(network, config, replace(strips, names=strips.names[:2]))
    assert score_held_out(network, config, named).dices == expected.dices
    assert "not scored: " in caplog.text and "gone.png" in caplog.text


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_experiment_adds_its_row_under_one_header(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "experiments.csv"
    scores = Scores()
    mask = np.zeros((1, 4, 4), np.bool_)
    mask[0, 0, 0] = True
    scores.add(mask, mask)
    scores.add(~mask, mask & False)
    for comment in ("first try", 'a comma, and "quotes"'):
        add_experiment(path, config, scores, 90, comment)
    rows = read_rows(path)
    assert [row.pop("comment") for row in rows] == ["first try", 'a comma, and "quotes"']
    expected = {
        "name": "tiny", "fold": "0", "encoder": "tu-test_resnet", "decoder": "Unet", "steps": "4+3",
        "dice": "0.5", "dice_non_empty": "1.0", "clean_left_empty": "0.0", "minutes": "1.5",
    }  # fmt: skip
    assert rows == [expected, expected]


def test_scores_of_no_strip_are_null(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "scores.json"
    write_scores(path, replace(config, fold=NO_FOLD), Scores())
    found = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert (found.pop("strips"), found.pop("per_class")) == (0, {})
    assert set(found.values()) == {None} and "fold" in found


def test_without_a_fold_the_figures_stay_empty(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "experiments.csv"
    add_experiment(path, replace(config, fold=NO_FOLD), Scores(), 60, "")
    [row] = read_rows(path)
    assert row["fold"] == "none"
    assert [row[key] for key in ("dice", "dice_non_empty", "clean_left_empty")] == [""] * 3
