"""A race on one machine: the packed ensemble against the ways in which others run the same members.

    python bench/race.py --bundle dist --strips 8 --rounds 5 --real severstal/test_images

Every candidate gets the same strips, half of them clean, and takes its turn in every round;
medians count, and their ratios. Each runs in a process of its own, for they set up their process as
they like; the others idle meanwhile. The others run in their best mode: of the ways that an engine
has (streams, threads, layouts) the quickest on this machine. With `--real` they race a second time,
on real strips drawn with `--seed`. Writes results.json, chart.png and table.md beside this file.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
import torch
from candidates import EAGER, EARLY, EVERY, Candidate, candidates, encode
from processes import measure_processes, process_lines
from strips import write_strips

from evaluation.inputs import sample_strips
from kernel.command import new_parser, run_command
from kernel.competition import SEVERSTAL
from kernel.files import write_json
from kernel.images import read_image
from kernel.logs import progress
from kernel.manifest import load_manifest
from training.metrics import Masks, dice

HERE = Path(__file__).parent


# --- the race -------------------------------------------------------------------------------------


def agreement(found: dict[str, Masks], reference: dict[str, Masks]) -> float:
    """Mean Dice over all (strip, class) pairs."""
    return float(np.mean([dice(found[name], masks) for name, masks in reference.items()]))


def mean_share(shares: dict[str, float], clean: Sequence[Path]) -> dict[str, float]:
    """Share of all flops that early exit runs, over the clean strips and over all."""
    of_clean = {"clean": float(np.mean([shares[path.name] for path in clean]))} if clean else {}
    return of_clean | {"all": float(np.mean(list(shares.values())))}


def race(runners: list[Candidate], paths: list[Path], rounds: int) -> dict[str, Any]:
    """Seconds a strip of every candidate in every round, what they found, and their shares."""
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in runners}
    found: dict[str, dict[str, Masks]] = {}
    shares: dict[str, dict[str, float]] = {}
    for candidate in runners:
        candidate.run(paths[:2])  # compiled and warm: a clean strip, and one that is not
    bar = progress(range(rounds * len(runners)), "race", "turn")
    for _ in range(rounds):
        for candidate in runners:
            name = candidate.name
            taken, (found[name], shares[name]) = candidate.run(paths)
            seconds[name].append(taken / len(paths))
            bar.update()
    bar.close()
    return {"seconds": seconds, "found": found, "shares": shares}


def rle_ms(masks: Iterable[Masks]) -> float:
    """Median milliseconds for the codes of one strip's masks."""
    taken = []
    for strip in masks:
        start = time.perf_counter()
        encode(strip)
        taken.append(1000 * (time.perf_counter() - start))
    return median(taken)


def summarise(result: dict[str, Any], paths: list[Path], clean: list[Path]) -> dict[str, Any]:
    """Seconds and masks of a race, side by side."""
    seconds = {name: median(turns) for name, turns in result["seconds"].items()}
    found = result["found"]
    best = min(taken for name, taken in seconds.items() if name not in (EAGER, EVERY, EARLY))
    return {
        "strips": len(paths),
        "seconds_a_strip": seconds,
        "turns": result["seconds"],
        "share_of_flops": mean_share(result["shares"][EARLY], clean),
        "same_masks_with_and_without": all(
            np.array_equal(found[EARLY][name], masks) for name, masks in found[EVERY].items()
        ),
        "dice_against_eager": {
            name: agreement(masks, found[EAGER]) for name, masks in found.items()
        },
        "times_faster_than_eager": seconds[EAGER] / seconds[EARLY],
        "times_faster_than_best_peer": best / seconds[EARLY],
        "every_pass_against_best_peer": best / seconds[EVERY],
        "rle_ms_a_strip": rle_ms(found[EARLY].values()),
    }


def measure_race(dataset: Path, paths: list[Path], rounds: int, real: list[Path]) -> dict[str, Any]:
    """What all candidates must run for, in turns; of the drawn strips every other one is clean."""
    manifest = load_manifest(dataset)
    runners = candidates(dataset, read_image(paths[0], SEVERSTAL))
    result = race(runners, paths, rounds)
    flops = len(manifest.flips) * sum(sum(spec.flops) for spec in manifest.members)
    results = {
        "members": [spec.name for spec in manifest.members],
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "gigaflops_a_strip": flops / 1e9,
        **summarise(result, paths, paths[::2]),
    }
    if real:
        results["real"] = summarise(race(runners, real, rounds), real, [])
    for candidate in runners:
        candidate.process.shutdown()
    return results


# --- what is written ------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """The table for the README."""
    seconds = results["seconds_a_strip"]
    lines = ["| way | seconds a strip | times (a) | Dice against (a) |", "|---|---|---|---|"]
    for name, value in seconds.items():
        agreed = results["dice_against_eager"][name]
        lines.append(f"| {name} | {value:.2f} | {seconds[EAGER] / value:.2f} | {agreed:.5f} |")
    share = results["share_of_flops"]
    lines += [
        "",
        f"Members: {', '.join(results['members'])}. {results['strips']} strips, half clean, "
        f"medians of {results['rounds']} rounds, {results['threads']} threads.",
        f"Early exit ran {share['clean']:.0%} of the flops on clean strips, {share['all']:.0%} "
        f"over all; same masks with and without: {results['same_masks_with_and_without']}.",
        f"Early exit is {results['times_faster_than_best_peer']:.2f} times as fast as the best of "
        f"(b) to (d), every pass {results['every_pass_against_best_peer']:.2f} times.",
        *real_lines(results),
        f"RLE of a strip: {results['rle_ms_a_strip']:.2f} ms.",
        *process_lines(results),
    ]
    return "\n".join(lines) + "\n"


def real_lines(results: dict[str, Any]) -> list[str]:
    """What the table says of the race on real strips, if there was one."""
    if "real" not in results:
        return []
    real = results["real"]
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in real["seconds_a_strip"].items())
    return [
        f"On {real['strips']} real strips, seconds a strip: {seconds}. Early exit ran "
        f"{real['share_of_flops']['all']:.0%} of the flops, {real['times_faster_than_eager']:.2f} "
        f"times as fast as (a), {real['times_faster_than_best_peer']:.2f} times as fast as the "
        f"best of the others; same masks with and without: {real['same_masks_with_and_without']}."
    ]


def draw_chart(results: dict[str, Any], path: Path) -> None:
    """Bars of seconds a strip."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, values = zip(*results["seconds_a_strip"].items(), strict=True)
    colours = ["#2b7bba" if name in (EVERY, EARLY) else "#b0b7bf" for name in names]
    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, fmt="%.2f s", padding=4)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds a strip, {len(results['members'])} members × 3 flips, half clean")
    axes.set_xlim(0, 1.1 * max(values))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Write everything that was measured, as JSON, as a table and as a chart."""
    write_json(folder / "results.json", results)
    (folder / "table.md").write_text(table(results), encoding="utf-8")
    draw_chart(results, folder / "chart.png")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("dist"), help="what build_kernel wrote")
    parser.add_argument("--strips", type=int, default=8, help="half of them clean")
    parser.add_argument("--rounds", type=int, default=5)
    about = "a folder of real strips: as many are drawn, for a second race"
    parser.add_argument("--real", type=Path, help=about)
    parser.add_argument("--seed", type=int, default=2020, help="of that draw")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the three files")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> int:
    """Run the race and write its three files."""
    args.out.mkdir(parents=True, exist_ok=True)
    dataset = args.bundle.resolve() / "dataset"
    load_manifest(dataset)  # refused before an hour's work
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_strips(Path(scratch) / "strips", args.strips)
        real = sample_strips(args.real, args.strips, args.seed) if args.real else []
        results = measure_race(dataset, paths, args.rounds, real)
        write_results(results, args.out)  # what a quarter of an hour measured
        results |= measure_processes(dataset, paths, Path(scratch))
    write_results(results, args.out)
    print(table(results))
    return 0


def main() -> None:
    """Run the command line."""
    run_command(lambda: measure(parse_args()))


if __name__ == "__main__":
    main()
