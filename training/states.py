"""Saved states: what a killed run goes on from, and what must not be mixed up."""

import contextlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from kernel.files import replacing
from kernel.members import hash_file
from training.config import Config

EXPERIMENT = "experiment"  # the state's entry that names what it is a state of


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a state beside the old one and then replaces it: a kill leaves one of the two.

    Lightning's own goes through the folder for temporary files, from which a move onto another
    disk is a copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write the state at once.

        Raises:
            ValueError: the disk is full or takes no file; the state before it stays.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(path) as part:
                torch.save(checkpoint, part)
        except (OSError, RuntimeError) as error:  # PyTorch's writer raises the second
            kept = "the state before it is kept" if path.is_file() else "there is none before it"
            free = shutil.disk_usage(path.parent).free >> 20
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{path}: not saved, {free} MB free, {kept}: {reason}") from error


def describe_experiment(config: Config, data: str, start_from: str) -> dict[str, Any]:
    """Return what two runs must share for one to go on from the other's state.

    `data` and `start_from` are hashes, and so is a teacher. The number of crops may shrink on the
    way.
    """
    teacher = hash_file(Path(config.teacher)) if config.teacher else ""
    described = asdict(config) | {"data": data, "start_from": start_from, "teacher": teacher}
    described = {k: v for k, v in described.items() if v or k != "teacher"}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in described.items()}


def crops_of(folder: Path) -> int:
    """Return the crops a step of a run that may go on; 0 where none was begun."""
    for path in sorted(folder.glob("*.ckpt")):
        with contextlib.suppress(Exception):  # a broken one is refused where it is read
            return int(torch.load(path, map_location="cpu", weights_only=True)["crops"])
    return 0


def read_state(path: Path, experiment: dict[str, Any]) -> dict[str, Any] | None:
    """Read a state of this experiment, on the CPU; None where there is none.

    Raises:
        ValueError: the file is broken, or of another experiment.
    """
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved = state[EXPERIMENT]
    except Exception as error:  # a zip's, a pickle's or a KeyError: no state in any case
        raise ValueError(f"{path}: no saved state, remove it: {error!r:.200}") from error
    if fault := other_experiment(saved, experiment):
        raise ValueError(f"{path}: {fault}")
    return state


def other_experiment(saved: dict[str, Any], experiment: dict[str, Any]) -> str:
    """Say what makes a state one of another experiment; nothing where it is of this one."""
    differing = [key for key in saved | experiment if saved.get(key) != experiment.get(key)]
    shown = "; ".join(f"{key} {saved.get(key)}, now {experiment.get(key)}" for key in differing)
    advice = "put that back, give this experiment another --name, or remove the state"
    return f"state of another experiment ({shown}): {advice}" if differing else ""
