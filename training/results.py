"""What a fit leaves: a checkpoint, its scores and a row in experiments.csv."""

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernel.checks import read_json
from kernel.ensemble import Ensemble
from kernel.faults import one_line
from kernel.files import replacing, write_json
from kernel.images import Strip
from kernel.logs import log, progress
from kernel.manifest import MANIFEST, Manifest
from kernel.members import in_half, split_network
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from training.config import NO_FOLD, Config
from training.metrics import Scores
from training.strips import Strips

SCORES = "scores.json"  # in RUNS/NAME


def score_held_out(
    network: nn.Module, config: Config, strips: Strips, device: torch.device | None = None
) -> Scores:
    """Score the member alone, gated, without flips, on whole strips, by the kernel's own code.

    A strip on which every pass fails is scored as one without masks, which is what the kernel
    would write. One that cannot be read, or whose truth cannot, is left out, and logged.
    """
    device = device or torch.device("cpu")
    manifest = Manifest([config.spec], config.classes, flips=("none",))
    member = split_network(network, config.spec, device)
    scheduler = Scheduler(Ensemble(manifest, [member], device, Stages()))
    scores = Scores()
    for name in progress(strips.names, "validation", "strip"):
        try:
            image, masks = strips.load(name)
        except (ValueError, OSError) as error:  # after hours of steps, which it must not cost
            log.warning("not scored: %s", one_line(error))
            continue
        (state,) = scheduler.predict_strips([Strip(name, image)])
        if state.fault:
            log.warning("%s counts as an empty answer: %s", name, state.fault)
        scores.add(np.zeros_like(masks) if state.fault else state.masks, masks)
    return scores


def write_checkpoint(network: nn.Module, config: Config, path: Path) -> None:
    """Write the weights in half precision; their header carries the member's own manifest entry.

    Statistics of batch norm that half precision cannot hold stay as they are, as in a build.

    Raises:
        ValueError: a weight is no number, or too large for half precision; names the first.
    """
    weights = {key: in_half(key, value) for key, value in network.state_dict().items()}
    weights = {key: value.cpu().contiguous().clone() for key, value in weights.items()}
    for key, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(
                f"{config.name}: {key} holds NaN, or more than half precision can: no checkpoint "
                f"is written; fit it again {config.steadier}"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"member": json.dumps(asdict(config.spec), sort_keys=True)}
    with replacing(path, follow=False) as part:  # a link may lead to another ensemble's file
        save_file(weights, part, header)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint; nothing of none, or of a damaged one."""
    try:
        return load_file(path)
    except (SafetensorError, OSError):
        return {}


SHIFTED = {  # parts of an SMP network whose output each shift is added to
    "mask_shift": {"encoder", "decoder", "segmentation_head"},
    "gate_shift": {"encoder", "classification_head"},
}


def _outdated_shifts(before: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Return the shifts that belong to the weights of before: those of what is another now."""
    changed = {
        key.split(".")[0]
        for key, value in weights.items()
        if key not in before or not torch.equal(before[key].float(), value.float())
    }
    return [name for name, parts in SHIFTED.items() if parts & changed]


def warn_of_shifts(path: Path, before: Mapping[str, Tensor]) -> None:
    """Warn where the manifest beside a new checkpoint shifts its logits, as another fit needed.

    `before` are the weights that were there before it.
    """
    outdated, manifest = _outdated_shifts(before, read_weights(path)), path.with_name(MANIFEST)
    try:
        entries = [entry for entry in read_json(manifest)["members"] if entry["file"] == path.name]
    except (ValueError, OSError, KeyError, TypeError):
        return  # none is there, or the build will say what is wrong with it
    for entry in entries:
        shifts = [name for name in outdated if np.any(entry.get(name, 0))]
        if shifts:
            log.warning(
                "%s has a %s for %s, of another fit: set it to 0, and calibrate the gates anew, "
                "docs/training.md", manifest, " and a ".join(shifts), path.stem,
            )  # fmt: skip


def write_scores(
    path: Path, config: Config, scores: Scores, fit: Mapping[str, Any] | None = None
) -> None:
    """Write the scores of the held-out strips; null where there was none. A fit's last file.

    `fit` says whose scores they are, beside the fold.
    """
    fold = None if config.fold == NO_FOLD else config.fold
    write_json(path, {"fold": fold, **(fit or {}), "strips": len(scores.dices)} | scores.summary())


def add_experiment(
    path: Path, config: Config, scores: Scores, seconds: float, comment: str
) -> None:
    """Append one row to an experiments.csv; its three figures are empty without held-out strips."""
    summary = scores.summary()
    figures = ("dice", "dice_non_empty", "clean_left_empty")
    row = {
        "name": config.name,
        "fold": "none" if config.fold == NO_FOLD else config.fold,
        "encoder": config.encoder,
        "decoder": config.arch,
        "steps": f"{config.crop_steps}+{config.whole_steps}",
        **{key: summary[key] if scores.dices else "" for key in figures},
        "minutes": round(seconds / 60, 1),
        "comment": comment,
    }
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
