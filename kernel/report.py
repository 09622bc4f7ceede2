"""What the dry run tells: one dict, which is report.json, a page and the terminal's lines."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kernel.contact_sheet import COLOURS
from kernel.drawing import Drawn
from kernel.projection import (
    HALVES,
    HOUR_S,
    SCORED_STRIPS,
    Projection,
    Run,
    drop_to_fit,
    drops,
    estimates,
    project,
)

# --- the verdict ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One thing that a submission must pass."""

    ok: bool | None  # None: it could not be tried
    words: str


@dataclass(frozen=True)
class Ended:
    """How the kernel's process went, seen from outside."""

    exit_code: int
    seconds: float
    network_denied: bool
    peak_bytes: int  # the most memory that one of its processes held


def check_time(projection: Projection, budget_s: float) -> Check:
    """Whether the scored run would end in time on this machine."""
    ok = projection.total_s <= budget_s
    what = "the hour" if budget_s == HOUR_S else "the budget"
    return Check(
        ok,
        f"{SCORED_STRIPS:,} strips would take {projection.total_s:,.0f} s here "
        f"({projection.low_s:,.0f}–{projection.high_s:,.0f} s) of {what}'s {budget_s:,.0f} s",
    )


def check_run(ended: Ended, told: dict[str, Any]) -> list[Check]:
    """What the process itself showed, and its run.json."""
    network = "the network was denied"
    if not ended.network_denied:
        network = "the network was NOT denied: this system does not allow it"
    faults, left_out = told["faults"], told["left_out"]
    failed = f"{len(faults)} strips failed" if faults else "no strip failed"
    checks = [
        Check(ended.exit_code == 0, f"the kernel ended with exit code {ended.exit_code}"),
        Check(ended.network_denied or None, network),
        Check(not faults, failed),
    ]
    if left_out:
        passes = ", ".join(sorted(left_out))
        words = f"to end in time, up to {max(left_out.values())} strips went without {passes}"
        checks.append(Check(False, f"{words}: all that follows is of a run with less to do"))
    return checks


def passed(checks: list[Check]) -> bool:
    """Whether none failed."""
    return all(check.ok is not False for check in checks)


def verdict(clean_run: list[Check], in_time: list[Check]) -> str:
    """What the checks come to, in one line."""
    if not passed(clean_run):
        return "Not ready: the run was not clean"
    if passed(in_time):
        return "Ready, and in time here"
    return "A clean run, but too long here: passes would be left out"


# --- the numbers ----------------------------------------------------------------------------------


def stage_rows(run: Run) -> list[dict[str, Any]]:
    """Seconds and share of every stage, in the order in which they begin."""
    stages = dict(run.stages)
    networks = {half: 0.0 for half in HALVES}
    for name in [name for name in stages if name.startswith("networks/")]:
        networks[name.rpartition("/")[2]] += stages.pop(name)
    said = {
        "start": "start", "import": "import", "load": "load", "check": "engines' check",
        "decode": "decode (waited for)", "prepare": "prepare", **{h: f"{h}s" for h in HALVES},
        "tally": "sums", "rle": "RLE", "write": "write",
    }  # fmt: skip
    seconds = stages | networks
    rows = [
        (said.get(name, name), seconds[name]) for name in {**said, **seconds} if name in seconds
    ]
    rows.append(("other", run.seconds - sum(seconds.values())))
    return [{"stage": name, "seconds": s, "share": s / run.seconds} for name, s in rows]


def pass_rows(run: Run) -> list[dict[str, Any]]:
    """How often each half of each pass ran, and the seconds of it."""
    seconds = run.counts * run.half_s / run.workers
    return [
        {"member": member, "flip": flip}
        | {f"{half}s": int(run.counts[row, i]) for i, half in enumerate(HALVES)}
        | {f"{half}_s": float(seconds[row, i]) for i, half in enumerate(HALVES)}
        for row, (member, flip) in enumerate(run.passes)
    ]


def histogram(run: Run, defective: npt.NDArray[np.bool_]) -> dict[str, dict[str, list[int]]]:
    """How many strips ran 0, 1, 2 … encoders and decoders; `defective` (strips,) ones apart."""
    most = len(run.passes) + 1
    groups = {"clean": ~defective, "defective": defective}
    return {
        f"{half}s": {
            name: np.bincount(run.done[chosen, i], minlength=most).tolist()
            for name, chosen in groups.items()
        }
        for i, half in enumerate(HALVES)
    }


def drop_rows(run: Run, total_s: float) -> list[dict[str, Any]]:
    """What each flip and each member less would save, and the seconds then."""
    whole = list(range(len(run.passes)))
    return [
        {"without": drop.name, "saves_s": drop.saves_s, "total_s": total_s - drop.saves_s}
        for drop in drops(run, whole)
    ]


def tell(
    run: Run,
    told: dict[str, Any],
    ended: Ended,
    clean_run: list[Check],
    defective: npt.NDArray[np.bool_],
    calibration: dict[str, Any],
    budget_s: float,
) -> dict[str, Any]:
    """The report of a run: `told` is its run.json; `defective` (strips,) is in that order.

    `clean_run` is what was checked besides the time.
    """
    projection = project(run)
    limits = sorted({float(HOUR_S), budget_s}, reverse=True)
    in_time = [check_time(projection, limit) for limit in limits]
    checks = clean_run + in_time
    return {
        "verdict": verdict(clean_run, in_time),
        "ready": passed(checks),
        "checks": [asdict(check) for check in checks],
        "run": {
            **asdict(ended),
            "strips": run.strips,
            "strips_per_s": 1 / run.each_s,
            "device": run.device,
            "workers": run.workers,
            "share_of_full_work": told["share"],
            "gpu_bytes": told["gpu_bytes"],
            "non_empty_masks": told["non_empty"],
        },
        "stages": stage_rows(run),
        "passes": pass_rows(run),
        "histogram": histogram(run, defective),
        "projection": asdict(projection) | {"total_s": projection.total_s, "budget_s": budget_s},
        "machines": [asdict(found) | {"fits": found.fits} for found in estimates(run, calibration)],
        "drops": drop_rows(run, projection.total_s),
        "drop_to_fit": [drop.name for drop in drop_to_fit(run, projection.total_s, budget_s)],
        "faults": told["faults"],
    }


def as_json(report: dict[str, Any]) -> str:
    """The report as JSON, which has no NaN: a mean of nothing is null."""
    plain = json.loads(json.dumps(report), parse_constant=lambda _: None)
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# --- the terminal ---------------------------------------------------------------------------------


def columns(heads: str, rows: Iterable[tuple[str, ...]]) -> str:
    """A table: the first column to the left, the others to the right, two spaces apart."""
    table = [tuple(heads.split("|")), *rows]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = (
        [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in table
    )
    return "\n".join("   " + "  ".join(line).rstrip() for line in lines)


def by(rows: list[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Rows of passes summed over all with the same `key`, and both halves' `total_s`."""
    sums: dict[str, dict[str, float]] = {}
    for row in rows:
        group = sums.setdefault(row[key], dict.fromkeys(row.keys() - {"member", "flip"}, 0.0))
        for name in group:
            group[name] += row[name]
    return {
        name: group | {"total_s": group["encoder_s"] + group["decoder_s"]}
        for name, group in sums.items()
    }


def choice_lines(choice: dict[str, Any]) -> str:
    """The evidence for other members, flips and settings."""
    rows = [
        (
            found["name"],
            *(f"{found[key]:.4f}" for key in ("dice", "dice_non_empty", "clean_left_empty")),
            f"{found['strip_s']:.3f}",
            *(f"{found['best'][key]:.4f}" for key in ("dice", "dice_non_empty")),
            f"{found['best']['threshold']:g}",
            str(found["best"]["min_area"]),
            "← proposed" if found["name"] == choice["proposed"] else "",
        )
        for found in choice["variants"]
    ]
    heads = f"of {choice['strips']} strips|Dice|non-empty|clean|s/strip"
    heads += "|at best|non-empty|threshold|min_area|"
    return columns(heads, rows)


def dice_line(dice: dict[str, Any]) -> str:
    """The Dice over all pairs, over those with a defect and of each class."""
    classes = "".join(f", class {label} {value:.3f}" for label, value in dice["per_class"].items())
    return (
        f"   Dice {dice['dice']:.3f} over all pairs, {dice['dice_non_empty']:.3f} over those "
        f"with a defect{classes}; {dice['clean_left_empty']:.1%} of the clean strips left empty"
    )


def as_lines(report: dict[str, Any]) -> str:
    """The report for the terminal, the verdict first."""
    run, fits = report["run"], report["drop_to_fit"]
    marks = {True: "ok", False: "NO", None: "?"}
    checks = [f"   {marks[check['ok']]:<4}{check['words']}" for check in report["checks"]]
    parts = ["\n".join([f"== {report['verdict']}", *checks])]
    seconds = ((r["stage"], f"{r['seconds']:.2f}", f"{r['share']:.1%}") for r in report["stages"])
    parts.append(columns("stage|seconds|share", seconds))
    for key in ("member", "flip"):
        rows = by(report["passes"], key).items()
        cells = (
            (name, f"{r['encoders']:.0f}", f"{r['encoder_s']:.2f}",
             f"{r['decoders']:.0f}", f"{r['decoder_s']:.2f}")
            for name, r in rows
        )  # fmt: skip
        parts.append(columns(f"{key}|encoders|seconds|decoders|seconds", cells))
    parts.append(
        f"   {run['strips_per_s']:.2f} strips/s on {run['device']}, {run['workers']} process(es);"
        f" {run['share_of_full_work']:.0%} of the full work ran;"
        f" {run['peak_bytes'] / 1e9:.2f} GB of memory, {run['gpu_bytes'] / 1e9:.2f} GB of a GPU's"
    )
    machines = (
        (m["machine"], f"{m['seconds']:,.0f}", "measured" if m["measured"] else "ESTIMATE",
         "fits" if m["fits"] else "TOO LONG")
        for m in report["machines"]
    )  # fmt: skip
    parts.append(columns("on Kaggle|seconds||", machines))
    saved = (
        (d["without"], f"{d['saves_s']:,.0f}", f"{d['total_s']:,.0f}") for d in report["drops"]
    )
    parts.append(columns("without|saves s|leaves s", saved))
    if fits:
        parts.append(f"   To fit here, drop {', then '.join(fits)}.")
    if report["dice"]:
        parts.append(dice_line(report["dice"]))
    if report["choice"]:
        parts.append(choice_lines(report["choice"]))
    return "\n\n".join(parts)


# --- the page -------------------------------------------------------------------------------------


def as_page(report: dict[str, Any], pictures: list[Drawn]) -> str:
    """The report as one HTML page that needs nothing but itself."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["zip"] = zip
    per_class = report["dice"]["per_class"] if report["dice"] else {}
    return environment.get_template("report.html").render(
        report=report,
        run=report["run"],
        sums={key: by(report["passes"], key) for key in ("member", "flip")},
        named_classes=[(f"class {label}", value) for label, value in per_class.items()],
        pictures=pictures,
        colours=[f"rgb({red}, {green}, {blue})" for blue, green, red in COLOURS],
    )
