"""Projection of a run to the scored run: on this machine, on Kaggle's, and with passes dropped.

This machine's seconds are measured. Kaggle's are estimated from counted flops and the assumptions
in `MACHINES`, until `keep_rate` has read the run.json of a real run there.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernel.budget import margin_s, planned_s, worker_budget_s
from kernel.checks import read_json
from kernel.competition import SEVERSTAL
from kernel.run_record import RunRecord, read_run_record
from kernel.strip_state import TOO_LATE, StripWork
from kernel.tta import Half
from packing.bundle import CALIBRATION, LAST_REPORT, REPORT
from training.json_files import write_json
from training.metrics import Floats, Ints

FIXED_STAGES = {"start", "import", "load", "check"}  # paid once, however many the strips
DEVICE_STAGES = {"prepare", "tally"}  # on the networks' device; on a GPU next to nothing

# --- a run, by its run.json -----------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredRun:
    """A run's record, and what it says of the seconds of another."""

    record: RunRecord
    n_images: int = SEVERSTAL.n_images  # of the scored run

    @property
    def work(self) -> Collection[StripWork]:
        """What ran for the strips that did not fail."""
        return self.record.work.values()

    @property
    def late(self) -> set[str]:
        """Strips that no time was left for."""
        return {name for name, fault in self.record.faults.items() if fault == TOO_LATE}

    @property
    def strip_s(self) -> Floats:
        """Seconds since the strip before, (strips that were not late,)."""
        late, strip_s = self.late, self.record.strip_s
        return np.array([seconds for name, seconds in strip_s.items() if name not in late])

    @property
    def fixed_s(self) -> float:
        """Seconds that do not grow with the strips."""
        return sum(self.record.stages.get(stage, 0.0) for stage in FIXED_STAGES)

    @property
    def begun(self) -> int:
        """Strips that time was left for: what the seconds went to. One at the least."""
        return max(self.record.strips - len(self.late), 1)

    @property
    def per_strip_s(self) -> float:
        """Seconds that each strip adds."""
        return (self.record.seconds - self.fixed_s) / self.begun

    def beside_s(self, on_gpu: bool) -> float:
        """Return a worker's seconds for each strip in the stages beside the networks.

        `on_gpu`: as on a machine with a GPU.
        """
        stages, workers = self.record.stages, self.record.workers
        moved = DEVICE_STAGES if on_gpu and self.record.device == "cpu" else set()
        growing = stages.keys() - FIXED_STAGES - moved
        return sum(stages[stage] for stage in growing) * workers / self.begun

    @property
    def flops(self) -> Floats:
        """Flops of each half of each pass, (passes, 2)."""
        return np.array([each.flops for each in self.record.passes], np.float64).reshape(-1, 2)

    @property
    def counts(self) -> Ints:
        """How many strips each half of each pass ran for, (passes, 2)."""
        return self._count(self.work)

    def _count(self, works: Iterable[StripWork]) -> Ints:
        counts = np.zeros((len(self.record.passes), 2), np.int64)
        for work in works:
            counts[list(work.encoders), 0] += 1
            counts[list(work.decoders), 1] += 1
        return counts

    @property
    def full_work(self) -> list[StripWork]:
        """The work of strips for which no pass was dropped: at least the first ones."""
        most = max((len(work.passes) for work in self.work), default=0)
        return [work for work in self.work if len(work.passes) == most]

    @property
    def dropped(self) -> bool:
        """Whether passes or whole strips were dropped for the run to end in time."""
        return bool(self.late) or len(self.full_work) < len(self.work)

    @property
    def full_share(self) -> float:
        """How many strips one of the `full_work` stands for among as many with all passes."""
        return len(self.work) / self.begun / max(len(self.full_work), 1)

    @property
    def full_counts(self) -> Floats:
        """How often each half of each pass runs for a strip if none is dropped, (passes, 2)."""
        return self._count(self.full_work).astype(np.float64) * self.full_share

    @property
    def ran(self) -> Ints:
        """How many encoders and decoders ran for each strip, (strips that did not fail, 2)."""
        ran = [(len(work.encoders), len(work.decoders)) for work in self.work]
        return np.array(ran, np.int64).reshape(-1, 2)

    @property
    def half_s(self) -> Floats:
        """A worker's seconds for each half of each pass for one strip, (passes, 2); 0 if none ran.

        A member's flips are assumed to cost the same.
        """
        passes, networks, counts = self.record.passes, self.record.networks, self.counts
        half_s = np.zeros((len(passes), 2))
        for member in {each.member for each in passes}:
            rows = [index for index, each in enumerate(passes) if each.member == member]
            for column, half in enumerate(Half):
                seconds = networks.get(member, {}).get(half, 0.0) * self.record.workers
                half_s[rows, column] = seconds / max(counts[rows, column].sum(), 1)
        return half_s

    @property
    def strip_flops(self) -> float:
        """Mean flops of a strip, of what ran."""
        return float((self.counts * self.flops).sum() / self.begun)

    @property
    def full_flops(self) -> float:
        """Mean flops of a strip if no pass is dropped."""
        return float((self.full_counts * self.flops).sum())

    @property
    def dropped_s(self) -> float:
        """Seconds that each strip would add in the networks if no pass were dropped."""
        fewer = self.full_counts - self.counts / self.begun
        return float((fewer * self.half_s).sum()) / self.record.workers


# --- this machine ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """The projected seconds of the scored run on this machine, with every pass."""

    fixed_s: float  # once
    strip_s: float  # for each strip
    low_s: float | None  # with `high_s`: 95 % interval of `total_s` over other strips of the same
    high_s: float | None  # kind; None: of one strip there is none
    n_images: int

    @property
    def total_s(self) -> float:
        """Seconds for all strips of the scored run."""
        return self.fixed_s + self.n_images * self.strip_s


def usable_s(budget_s: float, workers: int = 1) -> float:
    """Return the seconds of a budget that the kernel plans with; the rest is its reserve.

    Several workers have less: each ends by itself before the run's watchdog would.
    """
    if workers > 1:
        budget_s = worker_budget_s(budget_s - margin_s(budget_s))
    return planned_s(budget_s)


def project(run: MeasuredRun, resamples: int = 2000) -> Projection:
    """Project to the scored run on this machine, with a bootstrap interval over the strips."""
    mean_s = run.per_strip_s + run.dropped_s
    if run.strip_s.size < 2:
        return Projection(run.fixed_s, mean_s, None, None, run.n_images)
    strip_s, rng = run.strip_s / run.record.workers, np.random.default_rng(0)
    drawn = [rng.choice(strip_s, strip_s.size).mean() for _ in range(resamples)]
    low, high = np.quantile(drawn, (0.025, 0.975)) - strip_s.mean()
    total_s = run.fixed_s + run.n_images * mean_s
    low_s, high_s = (float(total_s + run.n_images * offset) for offset in (low, high))
    return Projection(run.fixed_s, mean_s, low_s, high_s, run.n_images)


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
    return seconds * run.full_share / run.record.workers * run.n_images


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


# --- Kaggle's machines ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What is assumed of a machine until a run on it has calibrated its rate."""

    name: str
    gpu: bool
    units: int  # GPUs, or processors, that share the strips
    peak: float  # FLOP/s of each
    attained: float  # share of the peak
    source: str

    @property
    def workers(self) -> int:
        """The kernel's processes there: one a GPU."""
        return self.units if self.gpu else 1


T4 = (
    "65 TFLOP/s fp16 in NVIDIA's data sheet; attained: ResNet-50 in PyTorch's mixed precision, "
    "1,190 images/s of 8.2 GFLOP (NVIDIA DeepLearningExamples, resnet50v1.5, inference on T4)"
)
MACHINES = (
    Machine("2×T4", True, 2, 65e12, 0.15, T4),
    Machine("one T4", True, 1, 65e12, 0.15, T4),
    Machine(
        "P100", True, 1, 18.7e12, 0.2,
        "18.7 TFLOP/s fp16 in NVIDIA's data sheet (PCIe), the attained share is a guess; history: "
        "today's PyTorch has no code for it",
    ),
    Machine(
        "Kaggle's CPU", False, 1, 141e9, 0.5,
        "2 cores of 2.2 GHz, each two AVX2 multiply-adds a cycle; the attained share is a guess",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """The scored run on one of Kaggle's machines."""

    machine: str
    workers: int  # that share the strips
    seconds: float
    calibrated: bool  # by the rate of a run there; else estimated from assumptions
    basis: str  # where the rate comes from


def _estimate_assumed(machine: Machine, run: MeasuredRun) -> Estimate:
    """Estimate from a machine's assumptions; the stages beside the networks take what they do here.

    What no stage counts is left out: most of it is memory that the CPU's engine gives back.
    """
    strip_s = run.full_flops / (machine.peak * machine.attained) + run.beside_s(machine.gpu)
    seconds = run.fixed_s + run.n_images * strip_s / machine.units
    basis = f"{machine.units} × {machine.peak / 1e12:g} TFLOP/s × {machine.attained:.0%}: "
    return Estimate(machine.name, machine.workers, seconds, False, basis + machine.source)


def _machine_of(record: RunRecord) -> str:
    """Return the name in `MACHINES` of the machine that a run on Kaggle had."""
    if not record.device.startswith("cuda"):
        return "Kaggle's CPU"
    return "2×T4" if record.workers > 1 else "one T4"


def keep_rate(bundle: Path, path: Path) -> str:
    """Keep the rate of a run on Kaggle, its run.json at `path`, in the bundle's folder.

    Return the machine's name, by which the report judges from then on.

    Raises:
        ValueError: the file is no run.json, or not of a whole run there in which strips were
            predicted.
    """
    record = read_run_record(path)
    run = MeasuredRun(record)
    reports = [(bundle / name).resolve() for name in (REPORT, LAST_REPORT)]
    own = path.resolve().parent in reports  # the dry run's, of any kernel
    if own or not record.kaggle:
        raise ValueError(f"{path}: not of a run on Kaggle; give the run.json of its output")
    if not run.counts.any():
        raise ValueError(f"{path}: no strip was predicted in this run, so it has no rate")
    unknown = record.strips - len(record.work) - len(record.faults)
    if unknown > 0:
        raise ValueError(
            f"{path}: of {unknown} of {record.strips} strips it does not say what ran, for a "
            "worker died, so it has no rate; give another run's"
        )
    rate = run.strip_flops / run.per_strip_s  # FLOP/s, with all that is not the networks
    machine, known = _machine_of(record), read_rates(bundle)
    known.pop(machine, None)  # the last one stands last
    known[machine] = {"rate": rate, "fixed_s": run.fixed_s, "strips": record.strips}
    write_json(bundle / CALIBRATION, known)
    return machine


def read_rates(bundle: Path) -> dict[str, Any]:
    """Read what `keep_rate` kept, by machine, the last one last; empty before."""
    path = bundle / CALIBRATION
    return read_json(path) if path.is_file() else {}


def list_estimates(run: MeasuredRun, calibration: dict[str, Any]) -> list[Estimate]:
    """Estimate the scored run on each of `MACHINES`, by its calibrated rate where there is one."""
    found = []
    for machine in MACHINES:
        estimate, known = _estimate_assumed(machine, run), calibration.get(machine.name)
        if known:
            seconds = known["fixed_s"] + run.n_images * run.full_flops / known["rate"]
            basis = f"{known['rate'] / 1e9:,.0f} GFLOP/s in a run of {known['strips']} strips"
            estimate = Estimate(machine.name, machine.workers, seconds, True, basis)
        found.append(estimate)
    return found
