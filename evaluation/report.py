"""The dry run's report: one dict, which is written as report.json, as a page and on the terminal.

It answers "will this run on Kaggle?" first, and its parts apart:

- `verdict`, `ready`: the answer in one line and as a bool: the run was clean, and Kaggle's machine
  runs every pass in time.
- `clean`: whether nothing was wrong in this run, as `ok`, and its `checks`, each `ok` true, false,
  or null where it decides nothing.
- `kaggle`: what the scored run would take on Kaggle's machine, the one that was calibrated last or
  else two T4: `seconds`, `calibrated` by a run there or else estimated, `how` in words, `fits`: the
  kernel would run every pass in time.
- `here`: the same of this machine, measured and projected. It decides nothing about Kaggle.
- `budget_s`: what both may take; `usable_s` of it the kernel plans with, there and here.

Then the numbers: `run`, `stages`, `passes`, `histogram`, `machines`, `drops`, `drop_to_fit`,
`faults`, and, where a ground truth is known, `dice` and `ablation`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.checks import Check, ProcessResult, is_clean
from evaluation.drawing import AnnotatedStrip
from evaluation.machines import MACHINES, Estimate, list_estimates
from evaluation.measured import MIN_GPU_STRIPS, MeasuredRun
from evaluation.page import render_page
from evaluation.projection import drop_to_fit, list_drops, project, usable_s
from kernel.competition import SEVERSTAL, Competition
from kernel.run_record import RunRecord
from kernel.tta import Half
from training.metrics import Bools

# --- is there time for it? ------------------------------------------------------------------------


def time_on_kaggle(
    estimate: Estimate, budget_s: float, competition: Competition = SEVERSTAL
) -> dict[str, Any]:
    """Say whether the scored run has time for every pass on a machine of Kaggle's."""
    limit_s = competition.time_limit_s
    limit = "the hour" if limit_s == 3600 else "the limit"
    budget = limit if budget_s == limit_s else "the budget"
    plan_s = usable_s(budget_s, estimate.workers)
    fits = estimate.seconds <= plan_s
    words = (
        f"{competition.n_images:,} strips would take {estimate.seconds:,.0f} s; "
        f"the kernel plans with {plan_s:,.0f} s of {budget}'s {budget_s:,.0f} s"
    )
    if not fits:
        words += ", so it would drop passes there to end in time"
    return asdict(estimate) | {"usable_s": plan_s, "fits": fits, "words": words}


def time_here(run: MeasuredRun, plan_s: float) -> dict[str, Any]:
    """Say whether the scored run would have time for every pass on this machine.

    `plan_s` is what the kernel plans with here.
    """
    projection = project(run)
    total_s, interval = projection.total_s, ""
    if projection.low_s is not None:
        interval = f" ({projection.low_s:,.0f}–{projection.high_s:,.0f} s)"
    fits = total_s <= plan_s and not run.dropped
    outcome = "which is time for every pass"
    if run.dropped:
        outcome = "with every pass, and in this run passes were dropped; Kaggle's machine decides"
    elif not fits:
        outcome = "so here the kernel would drop passes to end in time; Kaggle's machine decides"
    words = f"{projection.n_images:,} strips would take {total_s:,.0f} s{interval}, {outcome}"
    if run.few_for_gpu:
        words += f"; of so few strips a GPU's start is most: give --images of {MIN_GPU_STRIPS}"
    more = {"total_s": total_s, "usable_s": plan_s, "fits": fits, "words": words}
    return asdict(projection) | more


def _verdict(clean: bool, kaggle: dict[str, Any], budget_s: float) -> str:
    if not clean:
        return "Not ready for Kaggle: the run was not clean"
    seconds = f"{kaggle['seconds']:,.0f} s of {budget_s:,.0f} s"
    time = f"{kaggle['machine']} would take {seconds} ({kaggle['how']})"
    if kaggle["fits"]:
        return f"Ready for Kaggle: the run was clean, and {time}"
    return f"Not ready for Kaggle: the run was clean, but {time} and drop passes"


# --- the numbers ----------------------------------------------------------------------------------

STAGE_NAMES = {  # in the order in which they begin
    "start": "start", "import": "import", "load": "load", "check": "engines' check",
    "decode": "decode (waited for)", "prepare": "prepare",
    **{half.value: f"{half}s" for half in Half},
    "tally": "sums", "rle": "RLE", "write": "write", "validate": "validate",
}  # fmt: skip


def list_stages(record: RunRecord) -> list[dict[str, Any]]:
    """List seconds and share of every stage, in the order in which they begin."""
    seconds = record.stages | {half.value: 0.0 for half in Half}
    for halves in record.networks.values():
        for half, half_s in halves.items():
            seconds[half.value] += half_s
    names = [name for name in STAGE_NAMES | seconds if name in seconds]
    rows = [(STAGE_NAMES.get(name, name), seconds[name]) for name in names]
    rows.append(("other", record.seconds - sum(seconds.values())))
    return [{"stage": name, "seconds": s, "share": s / record.seconds} for name, s in rows]


def _list_passes(run: MeasuredRun) -> list[dict[str, Any]]:
    """How often each half of each pass ran, and the seconds of it."""
    seconds = run.counts * run.half_s / run.record.workers
    return [
        {"member": each.member, "flip": each.flip}
        | {f"{half}s": int(run.counts[row, i]) for i, half in enumerate(Half)}
        | {f"{half}_s": float(seconds[row, i]) for i, half in enumerate(Half)}
        for row, each in enumerate(run.record.passes)
    ]


def _histogram(run: MeasuredRun, defective: Bools) -> dict[str, Any]:
    """How many strips ran 0, 1, 2 … encoders and decoders; `defective` (strips,) ones apart."""
    groups, length = {"clean": ~defective, "defective": defective}, len(run.record.passes) + 1
    return {
        f"{half}s": {
            name: np.bincount(run.ran[chosen, i], minlength=length).tolist()
            for name, chosen in groups.items()
        }
        for i, half in enumerate(Half)
    }


def _list_drops(run: MeasuredRun, total_s: float) -> list[dict[str, Any]]:
    return [
        {"without": drop.name, "saves_s": drop.saves_s, "total_s": total_s - drop.saves_s}
        for drop in list_drops(run, range(len(run.record.passes)))
    ]


def _describe_run(run: MeasuredRun) -> dict[str, Any]:
    record = run.record
    return {
        "strips": record.strips,
        "strips_per_s": 1 / run.per_strip_s,
        "device": record.device,
        "workers": record.workers,
        "share_of_full_work": record.share,
        "gpu_bytes": record.gpu_bytes,
        "non_empty_masks": record.non_empty,
    }


def build_report(
    run: MeasuredRun,
    result: ProcessResult,
    checks: Sequence[Check],
    defective: Bools,
    calibration: dict[str, Any],
    budget_s: float | None,
    competition: Competition = SEVERSTAL,
) -> dict[str, Any]:
    """Build the report of a run.

    `defective` (strips that did not fail,) says which have a mask. More than the competition's
    limit is never allowed, whatever `budget_s` is.
    """
    limit_s = competition.time_limit_s
    budget_s = min(budget_s or limit_s, limit_s)
    estimates = list_estimates(run, calibration)
    machines = [time_on_kaggle(each, budget_s, competition) for each in estimates]
    plan_s = usable_s(budget_s, run.workers)
    judged = next(reversed(calibration), MACHINES[0].name)
    kaggle = next(machine for machine in machines if machine["machine"] == judged)
    clean, here = is_clean(checks), time_here(run, plan_s)
    dropped = drop_to_fit(run, here["total_s"], plan_s)
    return {
        "verdict": _verdict(clean, kaggle, budget_s),
        "ready": clean and kaggle["fits"],
        "clean": {"ok": clean, "checks": [asdict(check) for check in checks]},
        "kaggle": kaggle,
        "here": here,
        "budget_s": budget_s,
        "run": asdict(result) | _describe_run(run),
        "stages": list_stages(run.record),
        "passes": _list_passes(run),
        "histogram": _histogram(run, defective),
        "machines": machines,
        "drops": _list_drops(run, here["total_s"]),
        "drop_to_fit": [drop.name for drop in dropped],
        "faults": run.record.faults,
        "dice": None,
        "ablation": None,
    }


# --- the page -------------------------------------------------------------------------------------


def sum_by(passes: Iterable[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Sum the rows of passes by "member" or by "flip", with the `total_s` of both halves."""
    sums: dict[str, dict[str, float]] = {}
    for row in passes:
        group = sums.setdefault(row[key], dict.fromkeys(row.keys() - {"member", "flip"}, 0.0))
        for name in group:
            group[name] += row[name]
    for group in sums.values():
        group["total_s"] = group["encoder_s"] + group["decoder_s"]
    return sums


def as_page(report: dict[str, Any], pictures: list[AnnotatedStrip]) -> str:
    """Return the report as a page."""
    per_class = report["dice"]["per_class"] if report["dice"] else {}
    return render_page(
        Path(__file__).with_suffix(".html"),
        pictures,
        report=report,
        run=report["run"],
        sums={key: sum_by(report["passes"], key) for key in ("member", "flip")},
        named_classes=[(f"class {label}", value) for label, value in per_class.items()],
    )
