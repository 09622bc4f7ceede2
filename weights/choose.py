"""Which members, flips, threshold and min_area are worth it, by evidence from ground truth.

One step a run: it measures the ensemble, each member alone, each member less and each flip less.
What is chosen on some strips looks better on them than it is: confirm it on others.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernel.early_exit import Tally
from kernel.engines import pick_device
from kernel.ensemble import Ensemble, Flight, load_ensemble
from kernel.images import Image, Strip, read_image
from kernel.logs import Stages, progress
from kernel.manifest import MANIFEST, Manifest, load_manifest, read_json
from kernel.members import Member
from kernel.projection import HALVES, Floats, Ints, passes_s
from weights.score import Masks, Scores, dice_of, draw_truth

THRESHOLDS = tuple(round(0.30 + 0.05 * step, 2) for step in range(11))  # to 0.80
AREAS = (0, 64, 128, 256, 512, 1024, 2048)  # pixels

# --- what is compared -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """Every pass of one image, run to its end."""

    size: tuple[int, int]  # of the image
    gates: list[npt.NDArray[np.float64]]  # (classes,) of each pass
    probabilities: list[Tensor]  # (classes, H, W) of each pass

    def tally(self, kept: Iterable[int], manifest: Manifest) -> Tally:
        """The sum of some of them."""
        chosen = [self.probabilities[index] for index in kept]
        tally = Tally(len(chosen), manifest, early_exit=False)
        for probabilities in chosen:
            tally.decode(probabilities)
        return tally


@torch.inference_mode()
def run_passes(ensemble: Ensemble, image: Image) -> Passes:
    """One image through every pass: some hundred MB, so keep no two of them."""
    size, images = (image.shape[0], image.shape[1]), ensemble.prepare(image)
    passes = Passes(size, [], [])
    for index in range(len(ensemble.passes)):
        encoded = ensemble.encode(index, images)
        passes.gates.append(encoded[0][0].cpu().double().numpy())
        passes.probabilities.append(ensemble.decode(index, encoded)[0, :, : size[0], : size[1]])
    return passes


def variants(passes: Sequence[tuple[Member, str]]) -> dict[str, list[int]]:
    """Name → passes: all of them, one member alone, one member or one flip less."""
    found = {"all": list(range(len(passes)))}
    members = list(dict.fromkeys(member.spec.name for member, _ in passes))
    flips = list(dict.fromkeys(flip for _, flip in passes))
    for name in members if len(members) > 1 else ():
        found[f"only {name}"] = [i for i, (m, _) in enumerate(passes) if m.spec.name == name]
    for name in members if len(members) > 1 else ():
        found[f"without {name}"] = [i for i, (m, _) in enumerate(passes) if m.spec.name != name]
    for name in flips if len(flips) > 1 else ():
        found[f"without {name}"] = [i for i, (_, flip) in enumerate(passes) if flip != name]
    return found


def replay(passes: Passes, kept: Sequence[int], manifest: Manifest) -> Tally:
    """What the kernel would do with one image if only the passes `kept` were in the bundle."""
    tally = Tally(len(kept), manifest, early_exit=True)
    flight = Flight(Strip("", None), torch.empty(0), tally, list(kept), passes.size)
    while not flight.landed:
        half, number = flight.step
        if half == "encode":
            flight.encode((), passes.gates[number])
        else:
            flight.decode(passes.probabilities[number])
    return tally


@dataclass
class Evidence:
    """What some of the passes find on all strips so far; nothing of it is as large as a mask."""

    kept: list[int]
    scores: Scores = field(default_factory=Scores)  # with the manifest's threshold and min_area
    done: list[tuple[int, int]] = field(default_factory=list)  # encoders and decoders run
    areas: list[Ints] = field(default_factory=list)  # (thresholds, classes), pixels found
    both: list[Ints] = field(default_factory=list)  # (thresholds, classes), of them true

    def add(
        self, passes: Passes, truth: Masks, manifest: Manifest, thresholds: Sequence[float]
    ) -> None:
        """One strip, whose true masks (classes, H, W) are known."""
        tally = replay(passes, self.kept, manifest)
        self.scores.add(tally.masks(passes.size), truth)
        self.done.append((len(tally.gates), tally.decoded))
        whole = passes.tally(self.kept, replace(manifest, min_area=0))
        areas, both = [], []
        for threshold in thresholds:
            whole.threshold = threshold
            masks = whole.masks(passes.size)
            areas.append(masks.sum(axis=(-2, -1)))
            both.append((masks & truth).sum(axis=(-2, -1)))
        self.areas.append(np.stack(areas))
        self.both.append(np.stack(both))

    def dice(self, truth: Ints, min_areas: Sequence[int]) -> Floats:
        """Dice (min_areas, thresholds, strips, classes); `truth` (strips, classes) in pixels."""
        areas, both = np.stack(self.areas, axis=1), np.stack(self.both, axis=1)
        large = [areas >= min_area for min_area in min_areas]
        return np.stack([dice_of(both * kept, areas * kept + truth) for kept in large])


# --- the choice -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A threshold and a min_area, and the mean Dice that they give."""

    threshold: float
    min_area: int
    dice: float
    dice_non_empty: float  # over the pairs that have a mask; NaN where none has


def best_setting(
    found: Evidence,
    truth: Ints,
    min_areas: Sequence[int],
    thresholds: Sequence[float],
    now: Manifest,
) -> Setting:
    """The setting of the highest mean Dice; of equals the one nearest to the manifest's."""
    values = found.dice(truth, min_areas)
    every, some = values.mean(axis=(2, 3)), values[..., truth > 0]
    non_empty = some.mean(axis=2) if some.size else np.full(every.shape, np.nan)
    settings = [
        Setting(threshold, min_area, float(every[row, column]), float(non_empty[row, column]))
        for row, min_area in enumerate(min_areas)
        for column, threshold in enumerate(thresholds)
    ]

    def better(setting: Setting) -> tuple[float, float, int]:
        apart = abs(setting.threshold - now.threshold), abs(setting.min_area - now.min_area)
        return (round(-setting.dice, 9), *apart)

    return min(settings, key=better)


def propose(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The cheapest variant that at its best setting scores no less than all passes at theirs."""
    least = rows[0]["best"]["dice"] - 1e-9
    return min((row for row in rows if row["best"]["dice"] >= least), key=lambda r: r["strip_s"])


def write_proposal(
    bundle: Path, members: set[str], flips: set[str], best: dict[str, Any], path: Path
) -> None:
    """The bundle's ensemble.json with these members and flips at this setting, into `path`."""
    entries = read_json(bundle / MANIFEST)
    entries["members"] = [m for m in entries["members"] if m["name"] in members]
    entries["flips"] = [flip for flip in load_manifest(bundle).flips if flip in flips]
    entries |= {key: best[key] for key in ("threshold", "min_area")}
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def gather(
    ensemble: Ensemble,
    images: Path,
    names: Sequence[str],
    truth: dict[str, dict[int, str]],
    thresholds: Sequence[float],
) -> tuple[dict[str, Evidence], Ints]:
    """Every variant's evidence from the strips that can be read, and the true areas.

    The latter are (strips, classes), pixels; a strip that `truth` does not name is clean.
    """
    evidence = {name: Evidence(kept) for name, kept in variants(ensemble.passes).items()}
    areas = []
    for name in progress(names, "every pass", "strip"):
        try:
            image = read_image(images / name)
        except (ValueError, OSError):
            continue  # the kernel's log has named it
        passes = run_passes(ensemble, image)
        masks = draw_truth(truth.get(name, {}), ensemble.manifest.classes, passes.size)
        areas.append(masks.sum(axis=(-2, -1)))
        for found in evidence.values():
            found.add(passes, masks, ensemble.manifest, thresholds)
    return evidence, np.stack(areas)


def seconds_of_halves(ensemble: Ensemble, strips: int) -> Floats:
    """Mean seconds of each half of each pass, (passes, 2), after `strips` ran through them all."""
    stages, flips = ensemble.stages.seconds, len(ensemble.manifest.flips)
    halves = [
        [stages[f"networks/{member.spec.name}/{half}"] for half in HALVES]
        for member, _ in ensemble.passes
    ]
    return np.array(halves) / strips / flips


def choose(
    bundle: Path,
    images: Path,
    names: Sequence[str],
    truth: dict[str, dict[int, str]],
    proposal: Path,
) -> dict[str, Any]:
    """Runs every pass for the strips `names`, compares, and writes the file `proposal`."""
    manifest = load_manifest(bundle)
    ensemble = load_ensemble(bundle, manifest, pick_device(), Stages())
    thresholds = sorted({*THRESHOLDS, manifest.threshold})
    min_areas = sorted({*AREAS, manifest.min_area})
    evidence, areas = gather(ensemble, images, names, truth, thresholds)
    half_s, rows = seconds_of_halves(ensemble, len(areas)), []
    for name, found in evidence.items():
        best = best_setting(found, areas, min_areas, thresholds, manifest)
        strip_s = float(passes_s(half_s, found.kept, np.array(found.done)).mean())
        row = {"name": name, "strip_s": strip_s, "best": vars(best)}
        rows.append(row | found.scores.summary())
    chosen = propose(rows)
    kept = [ensemble.passes[index] for index in evidence[chosen["name"]].kept]
    members, flips = {member.spec.name for member, _ in kept}, {flip for _, flip in kept}
    write_proposal(bundle, members, flips, chosen["best"], proposal)
    return {
        "strips": len(areas),
        "variants": rows,
        "thresholds": thresholds,
        "min_areas": min_areas,
        "grid": evidence["all"].dice(areas, min_areas).mean(axis=(2, 3)).tolist(),
        "now": {"threshold": manifest.threshold, "min_area": manifest.min_area},
        "proposed": chosen["name"],
    }
