"""Ablation: which members, flips, threshold and min_area are worth their cost, by ground truth.

It compares all passes, each member alone, all but each member and all but each flip. What is chosen
on some strips looks better on them than it is: confirm it on others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.inputs import load_for_images
from evaluation.recorded import RecordedPasses, half_seconds, run_each
from kernel.checks import read_json
from kernel.ensemble import Ensemble
from kernel.files import write_json
from kernel.logs import log
from kernel.manifest import MANIFEST, Manifest, load_manifest, source_entry
from kernel.tta import Half, Pass
from training.ground_truth import Truth, decode_scored_masks
from training.metrics import Floats, Ints, Masks, Scores, dice_of

THRESHOLDS = tuple(round(0.30 + 0.05 * step, 2) for step in range(11))  # to 0.80
AREAS = (0, 64, 128, 256, 512, 1024, 2048)  # pixels
MinArea = int | list[int]  # pixels, one number for all classes or one a class

# --- variants -------------------------------------------------------------------------------------


def list_variants(passes: Sequence[Pass]) -> dict[str, list[int]]:
    """List name → pass ids: all of them, one member alone, all but one member, all but one flip."""
    variants = {"all": list(range(len(passes)))}
    members = list(dict.fromkeys(each.member for each in passes))
    flips = list(dict.fromkeys(each.flip for each in passes))
    if len(members) > 1:
        for name in members:
            variants[f"only {name}"] = [i for i, p in enumerate(passes) if p.member == name]
        for name in members:
            variants[f"without {name}"] = [i for i, p in enumerate(passes) if p.member != name]
    if len(flips) > 1:
        for name in flips:
            variants[f"without flip {name}"] = [i for i, p in enumerate(passes) if p.flip != name]
    return variants


@dataclass
class AblationStats:
    """What one variant finds on all strips so far; nothing in it is as large as a mask."""

    pass_ids: list[int]
    scores: Scores = field(default_factory=Scores)  # with the manifest's threshold and min_area
    encoders: list[int] = field(default_factory=list)  # ids of the passes that ran, of all strips
    decoders: list[int] = field(default_factory=list)
    areas: list[Ints] = field(default_factory=list)  # (thresholds, classes), pixels found
    both: list[Ints] = field(default_factory=list)  # (thresholds, classes), of them true

    def add(self, recorded: RecordedPasses, truth: Masks, thresholds: Sequence[float]) -> None:
        """Add one strip, all passes recorded, with its true masks (classes, H, W)."""
        state, mean = recorded.replay(self.pass_ids), recorded.mean(self.pass_ids)
        self.scores.add(state.masks, truth)
        self.encoders += state.ran[Half.ENCODER]
        self.decoders += state.ran[Half.DECODER]
        masks = [(mean > threshold).cpu().numpy() for threshold in thresholds]
        self.areas.append(np.stack([found.sum(axis=(-2, -1)) for found in masks]))
        self.both.append(np.stack([(found & truth).sum(axis=(-2, -1)) for found in masks]))

    def seconds(self, half_s: Floats) -> float:
        """Return the seconds of all strips, given those of each half of each pass, (passes, 2)."""
        return float(half_s[self.encoders, 0].sum() + half_s[self.decoders, 1].sum())

    def dice(self, truth: Ints, min_areas: Sequence[MinArea]) -> Floats:
        """Return Dice (min_areas, thresholds, strips, classes); `truth` is (strips, classes)."""
        areas, both = np.stack(self.areas, axis=1), np.stack(self.both, axis=1)
        large = [areas >= np.array(min_area) for min_area in min_areas]
        return np.stack([dice_of(both * kept, areas * kept + truth) for kept in large])


# --- the proposal ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A threshold and a min_area, and the mean Dice with them."""

    threshold: float
    min_area: MinArea
    dice: float
    dice_non_empty: float  # over the pairs that have a mask; NaN where none has


def list_min_areas(manifest: Manifest) -> list[MinArea]:
    """List what is compared: numbers for all classes, and the manifest's, also one a class."""
    now = manifest.min_area
    return [*AREAS, now] if isinstance(now, list) else sorted({*AREAS, now})


def best_setting(
    stats: AblationStats,
    truth: Ints,
    min_areas: Sequence[MinArea],
    thresholds: Sequence[float],
    now: Manifest,
) -> Setting:
    """Return the setting of the highest mean Dice; of equals the nearest to the manifest's."""
    values = stats.dice(truth, min_areas)
    mean, non_empty = values.mean(axis=(2, 3)), values[..., truth > 0]
    mean_non_empty = non_empty.mean(axis=2) if non_empty.size else np.full(mean.shape, np.nan)
    settings = [
        Setting(threshold, min_area, float(mean[row, column]), float(mean_non_empty[row, column]))
        for row, min_area in enumerate(min_areas)
        for column, threshold in enumerate(thresholds)
    ]

    def rank(setting: Setting) -> tuple[float, float, int]:
        distance = np.abs(np.subtract(setting.min_area, now.min_area)).max()
        return round(-setting.dice, 9), abs(setting.threshold - now.threshold), int(distance)

    return min(settings, key=rank)


def propose(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the cheapest variant that at its best setting scores no less than all passes."""
    least = rows[0]["best"]["dice"] - 1e-9
    return min((row for row in rows if row["best"]["dice"] >= least), key=lambda r: r["strip_s"])


def write_proposal(
    bundle: Path, members: set[str], flips: set[str], best: dict[str, Any], path: Path
) -> None:
    """Write the bundle's ensemble.json with only these members and flips, at this setting.

    Without what a build adds for its own files: the hash of another file is refused.
    """
    entries = read_json(bundle / MANIFEST)
    kept = [entry for entry in entries["members"] if entry["name"] in members]
    entries["members"] = [source_entry(entry) for entry in kept]
    entries["flips"] = [flip for flip in load_manifest(bundle).flips if flip in flips]
    entries |= {key: best[key] for key in ("threshold", "min_area")}
    write_json(path, entries)


# --- the ablation ---------------------------------------------------------------------------------


def collect_stats(
    ensemble: Ensemble,
    images: Path,
    names: Sequence[str],
    truth: Truth,
    thresholds: Sequence[float],
) -> tuple[dict[str, AblationStats], Ints]:
    """Run every pass for the strips that can be read; return each variant's statistics.

    And the true areas (strips, classes) in pixels; a strip that `truth` does not name is clean.
    """
    variants = list_variants(ensemble.passes)
    stats = {name: AblationStats(pass_ids) for name, pass_ids in variants.items()}
    paths, competition, areas = [images / n for n in names], ensemble.manifest.competition, []
    for recorded, _ in run_each(ensemble, paths, "every pass", RecordedPasses.record_all):
        masks = decode_scored_masks(truth, recorded.name, recorded.size, competition)
        areas.append(masks.sum(axis=(-2, -1)))
        for each in stats.values():
            each.add(recorded, masks, thresholds)
    return stats, np.array(areas, np.int64).reshape(-1, ensemble.manifest.classes)


def ablate(
    bundle: Path,
    images: Path,
    names: Sequence[str],
    truth: Truth,
    proposal: Path,
) -> dict[str, Any] | None:
    """Run every pass for the strips `names` and compare the variants; write the `proposal`.

    None, and no proposal, where no strip could be compared.
    """
    manifest = load_manifest(bundle)
    ensemble = load_for_images(bundle, manifest, images, names)
    thresholds = sorted({*THRESHOLDS, manifest.threshold})
    min_areas = list_min_areas(manifest)
    stats, areas = collect_stats(ensemble, images, names, truth, thresholds)
    if not len(areas):
        log.warning("no strip ran through every pass: nothing is compared")
        return None
    half_s, rows = half_seconds(ensemble, len(areas)), []
    for name, each in stats.items():
        best = best_setting(each, areas, min_areas, thresholds, manifest)
        row = {"name": name, "strip_s": each.seconds(half_s) / len(areas), "best": vars(best)}
        rows.append(row | each.scores.summary())
    chosen = propose(rows)
    kept = [ensemble.passes[pass_id] for pass_id in stats[chosen["name"]].pass_ids]
    members, flips = {each.member for each in kept}, {each.flip for each in kept}
    write_proposal(bundle, members, flips, chosen["best"], proposal)
    return {
        "strips": len(areas),
        "variants": rows,
        "thresholds": thresholds,
        "min_areas": min_areas,
        "grid": stats["all"].dice(areas, min_areas).mean(axis=(2, 3)).tolist(),
        "now": {"threshold": manifest.threshold, "min_area": manifest.min_area},
        "proposed": chosen["name"],
    }
