"""The dry run's report, which is written as report.json, as a page and on the terminal.

It answers "will this run on Kaggle?" first, and its parts apart: whether the run was clean, and
whether there is time for every pass on Kaggle's machine. This machine decides nothing about Kaggle.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.checks import Check, ProcessResult, is_clean
from evaluation.drawing import AnnotatedStrip
from evaluation.machines import CPU_MACHINE, MACHINES, SLOWEST, Estimate, list_estimates
from evaluation.measured import MIN_GPU_STRIPS, MeasuredRun
from evaluation.page import render_page
from evaluation.projection import Projection, drop_to_fit, list_drops, project, usable_s
from kernel.competition import SEVERSTAL, Competition
from kernel.run_record import RunRecord
from kernel.tta import Half
from training.metrics import Bools

# --- what it says ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cleanness:
    """Whether nothing was wrong in this run."""

    ok: bool
    checks: Sequence[Check]


@dataclass(frozen=True)
class KaggleTime(Estimate):
    """What the scored run would take on one of Kaggle's machines, and whether that is in time."""

    usable_s: float  # what the kernel plans with there
    fits: bool  # it would run every pass in time
    enough: bool  # there were strips enough: others of the same kind would hardly say otherwise
    sure: bool  # and a slower rate than was assumed would not either
    words: str


@dataclass(frozen=True)
class HereTime(Projection):
    """What it would take on this machine, and whether that is in time."""

    usable_s: float  # what the kernel plans with here
    fits: bool  # it would run every pass in time
    words: str


@dataclass(frozen=True)
class RunFacts(ProcessResult):
    """How the kernel's process went, and what its record says of it as a whole."""

    strips: int
    strips_per_s: float
    device: str
    workers: int
    share_of_full_work: float
    gpu_bytes: int  # the most that PyTorch held on one GPU
    non_empty_masks: int


@dataclass(frozen=True)
class StageTime:
    """A stage of the run."""

    stage: str
    seconds: float
    share: float  # of the run's


@dataclass(frozen=True)
class PassWork:
    """How often each half of a pass ran, and its seconds."""

    member: str
    flip: str
    encoders: int
    decoders: int
    encoder_s: float
    decoder_s: float


@dataclass(frozen=True)
class Saving:
    """What dropping a flip or a member would save of the scored run on this machine."""

    without: str
    saves_s: float
    total_s: float  # that are left


@dataclass(frozen=True)
class Report:
    """The report of a run."""

    verdict: str  # the answer in one line
    ready: bool  # the run was clean, and Kaggle's machine runs every pass in time
    clean: Cleanness
    kaggle: KaggleTime  # of the CPU without a GPU, else of the T4s calibrated last, or two
    here: HereTime
    budget_s: float  # what the scored run may take, there and here
    run: RunFacts
    stages: list[StageTime]  # in the order in which they begin
    passes: list[PassWork]
    histogram: dict[str, dict[str, list[int]]]  # half → clean, defective → strips that ran 0, 1 …
    machines: list[KaggleTime]  # all of Kaggle's
    drops: list[Saving]
    drop_to_fit: list[str]  # what to drop, one after another, to run the other passes in time here
    faults: dict[str, str]  # image → why its rows stay empty
    drawn: bool = False  # the strips are synthetic
    dice: dict[str, Any] | None = None  # where a truth is known
    ablation: dict[str, Any] | None = None  # where the user gave one


# --- is there time for it? ------------------------------------------------------------------------


def _interval(low_s: float | None, high_s: float | None) -> str:
    """The interval behind seconds, where there is one that shows."""
    if low_s is None or f"{low_s:,.0f}" == f"{high_s:,.0f}":
        return ""
    return f" ({low_s:,.0f}–{high_s:,.0f} s)"


def time_on_kaggle(
    estimate: Estimate, budget_s: float, competition: Competition = SEVERSTAL
) -> KaggleTime:
    """Say whether the scored run has time for every pass on a machine of Kaggle's."""
    limit_s, low_s, high_s = competition.time_limit_s, estimate.low_s, estimate.high_s
    limit = "the hour" if limit_s == 3600 else "the limit"
    plan_s = usable_s(budget_s, estimate.workers)
    fits = estimate.seconds <= plan_s
    enough = low_s is not None and high_s is not None and not low_s < plan_s < high_s
    known = estimate.calibrated or SLOWEST * estimate.seconds <= plan_s
    words = f"{competition.n_images:,} strips would take {estimate.seconds:,.0f} s"
    words += f"{_interval(low_s, high_s)}; "
    if budget_s == limit_s:
        words += f"the kernel plans with {plan_s:,.0f} s of {limit}'s {budget_s:,.0f} s"
    else:
        words += f"of the budget's {budget_s:,.0f} s it would plan with {plan_s:,.0f} s"
    if not fits:
        words += ", so it would drop passes there to end in time"
    if not enough:
        within = f"{plan_s:,.0f} s lies within the interval"
        why = "so few have no interval" if low_s is None else within
        words += f"; {why}: give more --images to be sure"
    if not known:
        words += f"; the rate is assumed, a network's may be {SLOWEST} times lower, or higher: "
        words += "--calibrate it to be sure"
    if budget_s != limit_s:
        words += (
            f"; the kernel as built plans with the description's time_limit_s, {limit_s:,.0f} s: "
            "to change that set it there and build again"
        )
    sure = enough and known
    return KaggleTime(
        **vars(estimate), usable_s=plan_s, fits=fits, enough=enough, sure=sure, words=words
    )


def time_here(run: MeasuredRun, plan_s: float) -> HereTime:
    """Say whether the scored run would have time for every pass on this machine.

    `plan_s` is what the kernel plans with here.
    """
    projection = project(run)
    total_s, interval = projection.total_s, _interval(projection.low_s, projection.high_s)
    fits = total_s <= plan_s and not run.dropped
    outcome = "which is time for every pass"
    if run.dropped:
        outcome = "with every pass, and in this run passes were dropped; Kaggle's machine decides"
    elif not fits:
        outcome = "so here the kernel would drop passes to end in time; Kaggle's machine decides"
    words = f"{projection.n_images:,} strips would take {total_s:,.0f} s{interval}, {outcome}"
    if run.few_for_gpu:
        words += f"; of so few strips a GPU's start is most: give --images of {MIN_GPU_STRIPS}"
    return HereTime(**vars(projection), usable_s=plan_s, fits=fits, words=words)


def _verdict(clean: bool, kaggle: KaggleTime, run: MeasuredRun) -> str:
    if not clean:
        return "Not ready for Kaggle: the run was not clean"
    seconds = f"{kaggle.seconds:,.0f} s of {kaggle.usable_s:,.0f} s"
    time = f"{kaggle.machine} would take {seconds} ({kaggle.how})"
    empty = not run.record.non_empty
    if kaggle.fits:
        verdict = f"Ready for Kaggle{', but every mask is empty' * empty}: "
        verdict += f"the run was clean, and {time}"
    else:
        verdict = f"Not ready for Kaggle{', and every mask is empty' * empty}: "
        verdict += f"the run was clean, but {time} and drop passes"
    if len(run.late) > run.begun:
        strips = f"{run.begun:,} of {run.record.strips:,} strips"
        verdict += f"; judged by {strips} alone: no time was left here for the others"
    elif not kaggle.enough:
        count = len(run.full_work)
        verdict += f"; {count:,} {'strip is' if count == 1 else 'strips are'} too few to be sure"
    elif not kaggle.sure:
        verdict += f"; the rate is assumed, a network's may be {SLOWEST} times lower"
    return verdict


# --- the numbers ----------------------------------------------------------------------------------

STAGE_NAMES = {  # in the order in which they begin
    "start": "start", "import": "import", "load": "load", "check": "engines' check",
    "decode": "decode (waited for)", "prepare": "prepare",
    **{half.value: f"{half}s" for half in Half},
    "tally": "sums", "rle": "RLE", "write": "write", "validate": "validate",
}  # fmt: skip


def list_stages(record: RunRecord) -> list[StageTime]:
    """List seconds and share of every stage, in the order in which they begin."""
    seconds = record.stages | {half.value: 0.0 for half in Half}
    for halves in record.networks.values():
        for half, half_s in halves.items():
            seconds[half.value] += half_s
    names = [name for name in STAGE_NAMES | seconds if name in seconds]
    rows = [(STAGE_NAMES.get(name, name), seconds[name]) for name in names]
    rows.append(("other", record.seconds - sum(seconds.values())))
    return [StageTime(name, s, s / record.seconds) for name, s in rows]


def _list_passes(run: MeasuredRun) -> list[PassWork]:
    seconds = run.counts * run.half_s / run.record.workers
    return [
        PassWork(each.member, each.flip, *counts, *half_s)
        for each, counts, half_s in zip(
            run.record.passes, run.counts.tolist(), seconds.tolist(), strict=True
        )
    ]


def _histogram(run: MeasuredRun, defective: Bools) -> dict[str, dict[str, list[int]]]:
    """How many strips ran 0, 1, 2 … encoders and decoders; `defective` (strips,) ones apart."""
    groups, length = {"clean": ~defective, "defective": defective}, len(run.record.passes) + 1
    return {
        f"{half}s": {
            name: np.bincount(run.ran[chosen, i], minlength=length).tolist()
            for name, chosen in groups.items()
        }
        for i, half in enumerate(Half)
    }


def _list_savings(run: MeasuredRun, total_s: float) -> list[Saving]:
    drops = list_drops(run, range(len(run.record.passes)))
    return [Saving(drop.name, drop.saves_s, total_s - drop.saves_s) for drop in drops]


def _describe_run(run: MeasuredRun, result: ProcessResult) -> RunFacts:
    record = run.record
    return RunFacts(
        **vars(result),
        strips=record.strips,
        strips_per_s=1 / run.per_strip_s,
        device=record.device,
        workers=record.workers,
        share_of_full_work=record.share,
        gpu_bytes=record.gpu_bytes,
        non_empty_masks=record.non_empty,
    )


def build_report(
    run: MeasuredRun,
    result: ProcessResult,
    checks: Sequence[Check],
    defective: Bools,
    calibration: dict[str, Any],
    budget_s: float | None,
    competition: Competition = SEVERSTAL,
    on_gpu: bool = True,
) -> Report:
    """Build the report of a run.

    `defective` (strips that did not fail,) says which have a mask. More than the competition's
    limit is never allowed, whatever `budget_s` is.
    """
    limit_s = competition.time_limit_s
    budget_s = min(budget_s or limit_s, limit_s)
    estimates = list_estimates(run, calibration)
    machines = [time_on_kaggle(each, budget_s, competition) for each in estimates]
    plan_s = usable_s(budget_s, run.workers)
    gpus = [MACHINES[0].name, *(name for name in calibration if name != CPU_MACHINE)]
    judged = gpus[-1] if on_gpu else CPU_MACHINE
    kaggle = next(machine for machine in machines if machine.machine == judged)
    clean, here = is_clean(checks), time_here(run, plan_s)
    dropped = drop_to_fit(run, here.total_s, plan_s)
    return Report(
        verdict=_verdict(clean, kaggle, run),
        ready=clean and kaggle.fits,
        clean=Cleanness(clean, checks),
        kaggle=kaggle,
        here=here,
        budget_s=budget_s,
        run=_describe_run(run, result),
        stages=list_stages(run.record),
        passes=_list_passes(run),
        histogram=_histogram(run, defective),
        machines=machines,
        drops=_list_savings(run, here.total_s),
        drop_to_fit=[drop.name for drop in dropped],
        faults=run.record.faults,
    )


# --- the page -------------------------------------------------------------------------------------


def sum_by(passes: Iterable[PassWork], key: str) -> dict[str, dict[str, float]]:
    """Sum the rows of passes by "member" or by "flip", with the `total_s` of both halves."""
    sums: dict[str, dict[str, float]] = {}
    for row in map(asdict, passes):
        group = sums.setdefault(row[key], dict.fromkeys(row.keys() - {"member", "flip"}, 0.0))
        for name in group:
            group[name] += row[name]
    for group in sums.values():
        group["total_s"] = group["encoder_s"] + group["decoder_s"]
    return sums


def as_page(report: Report, pictures: list[AnnotatedStrip]) -> str:
    """Return the report as a page."""
    per_class = report.dice["per_class"] if report.dice else {}
    return render_page(
        Path(__file__).with_suffix(".html"),
        pictures,
        report=report,
        run=report.run,
        sums={key: sum_by(report.passes, key) for key in ("member", "flip")},
        named_classes=[(f"class {label}", value) for label, value in per_class.items()],
    )
