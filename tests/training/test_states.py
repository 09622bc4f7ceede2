"""Saved states: whose they are, and what a kill while saving leaves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from training.config import Config
from training.states import EXPERIMENT, AtomicCheckpointIO, describe_experiment, read_state


def save(path: Path, experiment: dict[str, Any]) -> None:
    state = {EXPERIMENT: experiment, "weights": torch.arange(3)}
    AtomicCheckpointIO().save_checkpoint(state, path)


def test_a_state_of_this_experiment_is_read(config: Config, tmp_path: Path) -> None:
    path, experiment = tmp_path / "runs" / "crops.ckpt", describe_experiment(config, "data", "")
    assert read_state(path, experiment) is None
    save(path, experiment)
    state = read_state(path, describe_experiment(config, "data", ""))
    assert state is not None and state["weights"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"fold": 1}, "fold 0, now 1"),
        ({"arch": "FPN"}, "arch Unet, now FPN"),
        ({"encoder": "resnet34"}, "encoder tu-test_resnet, now resnet34"),
        ({"crop_steps": 9}, "crop_steps 4, now 9"),
        ({"seed": 4}, "seed 3, now 4"),
        ({"crop_size": (64, 64)}, "crop_size [32, 64], now [64, 64]"),
        ({"moved_share": 0.5, "precision": "bf16-mixed"}, "moved_share 0.0, now 0.5; precision"),
    ],
)
def test_another_experiments_state_is_refused_naming_what_differs(
    change: dict[str, Any], shown: str, config: Config, tmp_path: Path
) -> None:
    path = tmp_path / "crops.ckpt"
    save(path, describe_experiment(config, "data", ""))
    with pytest.raises(ValueError, match="state of another experiment") as refused:
        read_state(path, describe_experiment(replace(config, **change), "data", ""))
    assert shown in str(refused.value)
    assert "another --name, or remove the state" in str(refused.value)


def test_other_strips_or_another_start_are_another_experiment(
    config: Config, tmp_path: Path
) -> None:
    path = tmp_path / "crops.ckpt"
    save(path, describe_experiment(config, "data", ""))
    for data, start_from in (("other", ""), ("data", "abc")):
        with pytest.raises(ValueError, match="state of another experiment"):
            read_state(path, describe_experiment(config, data, start_from))


@pytest.mark.parametrize("content", [b"", b"half a state", None])
def test_a_file_that_is_no_state_is_refused(
    content: bytes | None, config: Config, tmp_path: Path
) -> None:
    path = tmp_path / "crops.ckpt"
    if content is None:
        torch.save({"network": {}}, path)  # a checkpoint of something else
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"crops\.ckpt: no saved state, remove it"):
        read_state(path, describe_experiment(config, "data", ""))


def test_a_full_disk_is_one_line_and_leaves_the_old_state(tmp_path: Path) -> None:
    """/dev/full takes no byte, as a disk without room."""
    path = tmp_path / "crops.ckpt"
    (tmp_path / "crops.ckpt.part").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"crops\.ckpt: not saved, \d+ MB free, there is none"):
        save(path, {})
    save(path, {})
    old = path.read_bytes()
    (tmp_path / "crops.ckpt.part").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="the state before it is kept") as refused:
        save(path, {"seed": 1})
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == old
    assert [each.name for each in tmp_path.iterdir()] == ["crops.ckpt"]


def test_a_kill_while_saving_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "crops.ckpt"
    save(path, {})
    old = path.read_bytes()

    class Killed(Exception):
        """What stands for a kill."""

    def dies(state: Any, part: Path) -> None:
        part.write_bytes(b"half a state")
        raise Killed

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(Killed):
        save(path, {"seed": 1})
    assert path.read_bytes() == old
