"""Projection of a run to the scored run on this machine, and with passes dropped."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from evaluation.measured import MeasuredRun, spread_of_mean
from kernel.deadline import margin_s, planned_s, worker_budget_s

# --- this machine ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """The projected seconds of the scored run on this machine, with every pass."""

    fixed_s: float  # once
    strip_s: float  # for each strip
    total_s: float  # for all strips of the scored run
    low_s: float | None  # with `high_s`: 95 % interval of `total_s` over other strips of the same
    high_s: float | None  # kind; None: of one strip there is none
    n_images: int


def usable_s(budget_s: float, workers: int = 0) -> float:
    """Return the seconds of a budget that the kernel plans with; the rest is its reserve.

    Workers have less: each ends by itself before the run's watchdog would.
    """
    if workers:
        budget_s = worker_budget_s(budget_s - margin_s(budget_s))
    return planned_s(budget_s)


def project(run: MeasuredRun) -> Projection:
    """Project to the scored run on this machine, with a bootstrap interval over the strips."""
    mean_s = run.per_strip_s + run.per_strip_dropped_s
    total_s = run.fixed_s + run.n_images * mean_s
    spread = spread_of_mean(run.strip_s / run.record.workers)
    if spread is None:
        return Projection(run.fixed_s, mean_s, total_s, None, None, run.n_images)
    low_s, high_s = (total_s + run.n_images * offset for offset in spread)
    return Projection(run.fixed_s, mean_s, total_s, low_s, high_s, run.n_images)


# --- what could be dropped ------------------------------------------------------------------------


def _kept_that_run(planned: Sequence[int], ran: Sequence[int], kept: Collection[int]) -> list[int]:
    """Return which of the passes `kept` would run one half for a strip that ran it for `ran`.

    They are the same share of the strip's passes, those that ran first; all of `ran` if all are
    kept, whatever gave NaN or was skipped.
    """
    left = [pass_id for pass_id in planned if pass_id in kept]
    left.sort(key=lambda pass_id: pass_id not in ran)
    return left[: math.ceil(len(ran) * len(left) / len(planned))]


def estimate_s(run: MeasuredRun, kept: Collection[int]) -> float:
    """Estimate the scored run's seconds in the networks, with only the passes `kept`.

    Every strip is assumed to be decided after the same share of its passes as those strips of the
    run for which no pass was dropped.
    """
    half_s, seconds = run.half_s, 0.0
    for work, strips in Counter(run.full_work).items():
        for column, ran in enumerate((work.encoders, work.decoders)):
            pass_ids = _kept_that_run(work.passes, ran, kept)
            seconds += strips * float(half_s[pass_ids, column].sum())
    return seconds * run.strips_per_full_strip / run.record.workers * run.n_images


@dataclass(frozen=True)
class Drop:
    """A flip or a member that could be dropped."""

    name: str
    saves_s: float  # of the scored run, on this machine
    kept: list[int]  # ids of the passes that are left


def list_drops(run: MeasuredRun, among: Sequence[int]) -> list[Drop]:
    """List what dropping each flip and each member of the passes `among` saves, the most first.

    Flips come before members: a flip less costs less of the score. The first flip stays, and so
    does a member that is alone.
    """
    found, full_s, passes = list[Drop](), estimate_s(run, among), run.record.passes
    for part in ("flip", "member"):
        names = list(dict.fromkeys(getattr(passes[pass_id], part) for pass_id in among))
        drops = []
        for name in names[1:] if part == "flip" or len(names) == 1 else names:
            kept = [pass_id for pass_id in among if getattr(passes[pass_id], part) != name]
            drops.append(Drop(name, full_s - estimate_s(run, kept), kept))
        found += sorted(drops, key=lambda drop: -drop.saves_s)
    return found


def drop_to_fit(run: MeasuredRun, total_s: float, budget_s: float) -> list[Drop]:
    """List what to drop, one after another, so that a run of `total_s` fits `budget_s`.

    Empty where it fits as it is, or where one member under one flip is still too much.
    """
    kept, dropped = list(range(len(run.record.passes))), list[Drop]()
    while total_s > budget_s:
        possible = list_drops(run, kept)
        if not possible:
            return []
        dropped.append(possible[0])
        total_s, kept = total_s - possible[0].saves_s, possible[0].kept
    return dropped
