"""How the cost grows: with members, flips, the image's size and the share of clean strips.

Every pass of the bundle's members under all four flips runs once a strip; the early exit is then
replayed with the first of them. Members beyond the bundle's are its first ones again: they agree
with themselves, so their share of the work is a little low.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from evaluation.inputs import add_bundle_options, add_sample_options, load_for_images, sample_strips
from evaluation.recorded import RecordedPasses, half_seconds, run_each
from kernel.command import new_parser, run_command
from kernel.competition import IMAGE_SIZE
from kernel.ensemble import Ensemble
from kernel.files import check_place, write_json
from kernel.images import Size
from kernel.manifest import MemberSpec, load_manifest
from kernel.tta import FLIPS, Half
from packing.members import flops_of
from training.metrics import Floats

MOST_MEMBERS = 9
SIZES = ((128, 800), (256, 800), (256, 1600), (512, 1600), (512, 3200))

Choice = tuple[str, int]  # members or flips, and how many

# --- what is compared -----------------------------------------------------------------------------


def choose(ensemble: Ensemble, n_members: int, flips: Sequence[str]) -> list[int]:
    """Ids of the passes of the first members under these flips, in the order in which they run.

    Past the last member the first ones come again.
    """
    names = [spec.name for spec in ensemble.manifest.members]
    wanted = [names[index % len(names)] for index in range(n_members)]
    passes = [(i, each.member) for i, each in enumerate(ensemble.passes) if each.flip in flips]
    return [i for i, member in passes for _ in range(wanted.count(member))]


def list_choices(ensemble: Ensemble, flips: Sequence[str]) -> dict[Choice, list[int]]:
    """Pass ids: 1 to 9 members or more under these flips, and all under 1 to 4 flips."""
    members, every = len(ensemble.manifest.members), list(FLIPS)
    most = max(MOST_MEMBERS, members)
    choices = {("members", n): choose(ensemble, n, flips) for n in range(1, most + 1)}
    return choices | {("flips", n): choose(ensemble, members, every[:n]) for n in range(1, 5)}


# --- replayed -------------------------------------------------------------------------------------


@dataclass
class Replays:
    """What the early exit ran with each choice, strip by strip."""

    choices: dict[Choice, list[int]]
    ran: dict[Choice, list[dict[Half, list[int]]]] = field(default_factory=dict)
    clean: list[bool] = field(default_factory=list)  # whether all of the bundle's find nothing
    size: Size = IMAGE_SIZE  # of the strips

    def add(self, recorded: RecordedPasses, usual: Choice) -> None:
        """Add one strip, all its passes recorded; `usual` is what the manifest runs."""
        self.size = recorded.size
        for choice, pass_ids in self.choices.items():
            state = recorded.replay(pass_ids)
            self.ran.setdefault(choice, []).append(state.ran)
            if choice == usual:
                self.clean.append(not state.masks.any())

    def costs(self, choice: Choice, halves: Floats) -> tuple[Floats, Floats]:
        """Costs of each strip (strips, 2), and of every pass (2,); `halves` (passes, halves, 2)."""
        every = halves[self.choices[choice]].sum(axis=(0, 1))
        ran = [
            sum((halves[ran[half], i].sum(axis=0) for i, half in enumerate(Half)), np.zeros(2))
            for ran in self.ran[choice]
        ]
        return np.array(ran), every


def half_costs(ensemble: Ensemble, strips: int) -> Floats:
    """Flops and measured seconds of every pass's halves, (passes, halves, 2)."""
    flops = np.array([each.flops for each in ensemble.passes], np.float64)
    return np.stack([flops, half_seconds(ensemble, strips)], axis=-1)


def record_strips(ensemble: Ensemble, paths: Sequence[Path], flips: Sequence[str]) -> Replays:
    """Run every pass of every strip once, and replay all choices; `ensemble` has all flips.

    Raises:
        ValueError: no strip can be read and run.
    """
    replays = Replays(list_choices(ensemble, flips))
    usual = ("members", len(ensemble.manifest.members))
    for recorded, _ in run_each(ensemble, paths, "growth", RecordedPasses.record_all):
        replays.add(recorded, usual)
    if not replays.clean:
        raise ValueError(f"{paths[0].parent}: no strip could be run, as the lines above say")
    return replays


# --- the four growths -----------------------------------------------------------------------------


def as_row(ran: Floats, every: Floats) -> dict[str, float]:
    """Mean costs of a strip (flops, seconds), of what ran and of every pass."""
    return {
        "gigaflops": float(ran[0] / 1e9),
        "gigaflops_of_every_pass": float(every[0] / 1e9),
        "share": float(ran[0] / every[0]),
        "seconds": float(ran[1]),
        "seconds_of_every_pass": float(every[1]),
    }


def flops_at(specs: Sequence[MemberSpec], size: Size) -> int:
    """Flops of one pass of each member at a size or its own, counted without arithmetic."""
    return sum(sum(flops_of(spec, spec.image_size or size)) for spec in specs)


def summarise(replays: Replays, ensemble: Ensemble, sizes: Sequence[Size]) -> dict[str, Any]:
    """Return the rows of all four growths."""
    halves, specs = half_costs(ensemble, len(replays.clean)), ensemble.manifest.members
    costs = {choice: replays.costs(choice, halves) for choice in replays.choices}
    rows = {choice: as_row(ran.mean(axis=0), every) for choice, (ran, every) in costs.items()}
    ran, every = costs["members", len(specs)]
    clean = np.array(replays.clean)
    results: dict[str, Any] = {"strips": len(clean), "clean": int(clean.sum())}
    for kind in ("members", "flips"):
        results[kind] = {str(n): row for (name, n), row in rows.items() if name == kind}
    base = flops_at(specs, ensemble.manifest.image_size or replays.size)
    results["image_size"] = {}
    for height, width in sizes:
        factor = flops_at(specs, (height, width)) / base
        results["image_size"][f"{height}×{width}"] = as_row(
            ran.mean(axis=0) * factor, every * factor
        )
    if 0 < clean.sum() < len(clean):
        of_clean, of_others = ran[clean].mean(axis=0), ran[~clean].mean(axis=0)
        shares = [step / 4 for step in range(5)]
        mixed = {f"{share:.0%}": share * of_clean + (1 - share) * of_others for share in shares}
        results["clean_share"] = {name: as_row(mean, every) for name, mean in mixed.items()}
    return results


# --- what is written ------------------------------------------------------------------------------

TITLES = {
    "members": "members",
    "flips": "flips",
    "image_size": "image size",
    "clean_share": "share of clean strips",
}


def table(results: dict[str, Any]) -> str:
    """The results for a reader."""
    lines = [
        "| | | Tflop a strip, early exit | every pass | share | seconds, early exit | every pass |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in TITLES:
        for name, row in results.get(kind, {}).items():
            lines.append(
                f"| {TITLES[kind]} | {name} | {row['gigaflops'] / 1e3:.2f} "
                f"| {row['gigaflops_of_every_pass'] / 1e3:.2f} | {row['share']:.0%} "
                f"| {row['seconds']:.2f} | {row['seconds_of_every_pass']:.2f} |"
            )
    lines.append(f"\n{results['strips']} strips, {results['clean']} of them found clean.")
    return "\n".join(lines)


def draw_plot(results: dict[str, Any], path: Path) -> None:
    """Work a strip over each of the four, with the early exit and with every pass."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in TITLES if kind in results]
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(3 * len(kinds), 3), layout="constrained")
    for axis, kind in zip(np.atleast_1d(axes), kinds, strict=True):
        names, rows = list(results[kind]), list(results[kind].values())
        for key, label, colour in (
            ("gigaflops_of_every_pass", "every pass", "#b0b7bf"),
            ("gigaflops", "early exit", "#2b7bba"),
        ):
            axis.plot([row[key] / 1e3 for row in rows], "o-", color=colour, label=label)
        axis.set_xticks(range(len(names)), names)
        axis.set_xlabel(TITLES[kind])
        axis.set_ylim(0, 1.1 * max(row["gigaflops_of_every_pass"] / 1e3 for row in rows))
        axis.tick_params(axis="x", labelrotation=45 if kind == "image_size" else 0)
        axis.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(axes)[0].set_ylabel("Tflop a strip")
    np.atleast_1d(axes)[0].legend(frameon=False)
    figure.savefig(path, dpi=100)


EXAMPLE = "  python evaluation/growth.py --images severstal/test_images --strips 8"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, EXAMPLE)
    add_bundle_options(parser)
    add_sample_options(parser)
    about = "a .png of it is drawn beside it"
    parser.add_argument("--out", type=Path, default=Path("growth.json"), help=about)
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Record the strips that are drawn, replay them, and write what was found."""
    manifest = load_manifest(args.bundle)
    paths = sample_strips(args.images, args.strips, args.seed, manifest.competition)
    check_place(args.out)
    all_flips = replace(manifest, flips=tuple(FLIPS))
    names = [path.name for path in paths]
    ensemble = load_for_images(args.bundle, all_flips, paths[0].parent, names)
    results = summarise(record_strips(ensemble, paths, manifest.flips), ensemble, SIZES)
    write_json(args.out, results)
    draw_plot(results, args.out.with_suffix(".png"))
    print(table(results))
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: run(parse_args(arguments)))


if __name__ == "__main__":
    main()
