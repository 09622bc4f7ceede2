"""What a run's seconds say about the scored run: here, on Kaggle's machines, and with less to do.

This machine's seconds are measured. Kaggle's are an estimate from counted flops and the assumptions
in `MACHINES`, until `calibrate` has read the run.json of a real run there.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kernel.manifest import read_json

SCORED_STRIPS = 5506  # of the scored run
HOUR_S = 3600  # Kaggle's
HALVES = ("encoder", "decoder")  # of a pass
ONCE = ("start", "import", "load", "check")  # stages that are paid once, however many the strips
CALIBRATION = "calibration.json"  # in the bundle's folder

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# --- a run, read back from its run.json -----------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run did and what it took."""

    seconds: float  # in all
    strips: int
    stages: dict[str, float]  # seconds; of several workers their mean
    passes: list[tuple[str, str]]  # (member, flip) in the order in which they run
    flops: Floats  # (passes, 2), of an encoder and a decoder
    done: Ints  # (strips that did not fail, 2), encoders and decoders run
    strip_s: Floats  # (strips,), seconds since the one before
    device: str
    workers: int

    @property
    def once_s(self) -> float:
        """Seconds that do not grow with the strips."""
        return sum(self.stages.get(stage, 0.0) for stage in ONCE)

    @property
    def each_s(self) -> float:
        """Seconds that each strip adds."""
        return (self.seconds - self.once_s) / self.strips

    @property
    def counts(self) -> Ints:
        """How many strips each half of each pass ran for, (passes, 2)."""
        index = np.arange(len(self.passes))[:, None]
        return np.stack([(index < half).sum(axis=1) for half in self.done.T], axis=1)

    @property
    def half_s(self) -> Floats:
        """A worker's seconds for each half of each pass for one strip, (passes, 2); 0 if none ran.

        A member's flips are taken to cost the same.
        """
        counts, half_s = self.counts, np.zeros(self.flops.shape)
        for member in {member for member, _ in self.passes}:
            rows = [index for index, (name, _) in enumerate(self.passes) if name == member]
            for half, name in enumerate(HALVES):
                seconds = self.stages.get(f"networks/{member}/{name}", 0.0) * self.workers
                half_s[rows, half] = seconds / max(counts[rows, half].sum(), 1)
        return half_s

    @property
    def strip_flops(self) -> float:
        """Flops that a strip took, in the mean."""
        return float((self.counts * self.flops).sum() / self.strips)

    @property
    def networks_s(self) -> float:
        """Seconds that each strip spent in the networks."""
        stages = self.stages.items()
        return (
            sum(seconds for name, seconds in stages if name.startswith("networks/")) / self.strips
        )


def read_run(report: dict[str, Any], path: Path) -> Run:
    """The run that a run.json tells of.

    Raises:
        ValueError: the file `path` is no run.json of this kernel.
    """
    try:
        passes = report["passes"]
        return Run(
            seconds=report["seconds"],
            strips=report["strips"],
            stages=report["stages"],
            passes=[(member, flip) for member, flip, *_ in passes],
            flops=np.array([flops for _, _, *flops in passes], np.float64),
            done=np.array(
                [(work["encoders"], work["decoders"]) for work in report["work"].values()], np.int64
            ).reshape(-1, 2),
            strip_s=np.array(list(report["strip_s"].values())),
            device=report["device"],
            workers=report["workers"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a run.json of this kernel: {error!r}") from error


# --- this machine ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """A run taken to the scored run's strips, in seconds."""

    once_s: float
    strip_s: float
    low_s: float  # with `high_s` 95 % of the totals that as many other strips would have given
    high_s: float

    @property
    def total_s(self) -> float:
        """For the scored run's strips."""
        return self.once_s + SCORED_STRIPS * self.strip_s


def project(run: Run, resamples: int = 2000) -> Projection:
    """The scored run on the machine of `run`, with a bootstrap interval over its strips."""
    strip_s, rng = run.strip_s / run.workers, np.random.default_rng(0)
    drawn = [rng.choice(strip_s, strip_s.size).mean() for _ in range(resamples)]
    low, high = np.quantile(drawn, (0.025, 0.975)) - strip_s.mean()
    total_s = run.once_s + SCORED_STRIPS * run.each_s
    interval = (float(total_s + SCORED_STRIPS * apart) for apart in (low, high))
    return Projection(run.once_s, run.each_s, *interval)


# --- what could be dropped ------------------------------------------------------------------------


def passes_s(half_s: Floats, kept: Sequence[int], done: Ints) -> Floats:
    """Seconds of each strip, (strips,), whose first encoders and decoders of `kept` were `done`.

    `half_s` (passes, 2) are the seconds of each half, `done` (strips, 2) how many of each ran.
    """
    first = np.vstack([np.zeros(2), half_s[list(kept)].cumsum(axis=0)])  # of the first n passes
    seconds: Floats = first[done[:, 0], 0] + first[done[:, 1], 1]
    return seconds


def kept_s(run: Run, kept: list[int]) -> float:
    """Seconds in the networks for the scored run, with only the passes `kept`.

    An estimate: every strip is taken to be decided after the same share of the passes as before.
    """
    fewer = -(-run.done * len(kept) // len(run.passes))  # rounded up
    seconds = passes_s(run.half_s, kept, fewer).sum() / run.workers
    return float(seconds / run.strips * SCORED_STRIPS)


@dataclass(frozen=True)
class Drop:
    """One flip or one member less."""

    name: str
    saves_s: float  # of the scored run
    kept: list[int]  # the passes that are left


def drops(run: Run, among: list[int]) -> list[Drop]:
    """What each flip and each member of the passes `among` would save, dearest first.

    Flips come before members: a flip less costs less of the score. The first flip stays, and so
    does a member that is alone.
    """
    found, whole_s = [], kept_s(run, among)
    for part in (1, 0):
        names = list(dict.fromkeys(run.passes[index][part] for index in among))
        saved = []
        for name in names[1:] if part or len(names) == 1 else names:
            kept = [index for index in among if run.passes[index][part] != name]
            saved.append(Drop(name, whole_s - kept_s(run, kept), kept))
        found += sorted(saved, key=lambda drop: -drop.saves_s)
    return found


def drop_to_fit(run: Run, total_s: float, budget_s: float) -> list[Drop]:
    """What to drop, one after another, until `total_s` fits the budget or nothing is left."""
    kept, dropped = list(range(len(run.passes))), list[Drop]()
    while total_s > budget_s and (possible := drops(run, kept)):
        dropped.append(possible[0])
        total_s, kept = total_s - possible[0].saves_s, possible[0].kept
    return dropped


# --- Kaggle's machines ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What is assumed of a machine that this project has not run on."""

    name: str
    units: int  # GPUs, or processors, that strips are dealt out to
    peak: float  # FLOP/s of each
    attained: float  # share of the peak
    source: str


T4 = (
    "65 TFLOP/s fp16 in NVIDIA's data sheet; attained: ResNet-50 in PyTorch's mixed precision, "
    "1,190 images/s of 8.2 GFLOP (NVIDIA DeepLearningExamples, resnet50v1.5, inference on T4)"
)
MACHINES = (
    Machine("2×T4", 2, 65e12, 0.15, T4),
    Machine("one T4", 1, 65e12, 0.15, T4),
    Machine(
        "P100", 1, 18.7e12, 0.2,
        "18.7 TFLOP/s fp16 in NVIDIA's data sheet (PCIe), the attained share is a guess; history: "
        "today's PyTorch has no code for it",
    ),
    Machine(
        "Kaggle's CPU", 1, 141e9, 0.5,
        "2 cores of 2.2 GHz, each two AVX2 multiply-adds a cycle; the attained share is a guess",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """The scored run on one of Kaggle's machines."""

    machine: str
    seconds: float
    measured: bool  # at the rate of a real run there; else an assumption
    basis: str  # where the rate comes from

    @property
    def fits(self) -> bool:
        """Whether it ends within the hour."""
        return self.seconds <= HOUR_S


def assume(machine: Machine, run: Run) -> Estimate:
    """The scored run on `machine` by its assumptions; all but the networks takes what it took here.

    What is not the networks runs in as many processes as the machine has units.
    """
    beside_s = max(run.each_s - run.networks_s, 0.0) * run.workers
    network_s = run.strip_flops / (machine.peak * machine.attained)
    seconds = run.once_s + SCORED_STRIPS * (network_s + beside_s) / machine.units
    basis = f"{machine.units} × {machine.peak / 1e12:g} TFLOP/s × {machine.attained:.0%}: "
    return Estimate(machine.name, seconds, measured=False, basis=basis + machine.source)


def machine_of(run: Run) -> str:
    """Which of `MACHINES` a run on Kaggle had."""
    if not run.device.startswith("cuda"):
        return "Kaggle's CPU"
    return "2×T4" if run.workers > 1 else "one T4"


def calibrate(bundle: Path, path: Path) -> str:
    """Remembers in the bundle's folder the rate of the run.json `path` of a real run on Kaggle.

    Returns which machine it was. Raises ValueError where the file is no run.json, or of a run in
    which no strip went through the networks.
    """
    run = read_run(read_json(path), path)
    if not run.done.any():
        raise ValueError(f"{path}: no strip was predicted in this run, so that it tells no rate")
    rate = run.strip_flops / run.each_s  # with all that is not the networks
    known = read_calibration(bundle)
    known[machine_of(run)] = {"rate": rate, "once_s": run.once_s, "strips": run.strips}
    text = json.dumps(known, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (bundle / CALIBRATION).write_text(text, encoding="utf-8")
    return machine_of(run)


def read_calibration(bundle: Path) -> dict[str, Any]:
    """The measured rates by machine, FLOP/s, as `calibrate` left them; empty before."""
    path = bundle / CALIBRATION
    return read_json(path) if path.is_file() else {}


def estimates(run: Run, calibration: dict[str, Any]) -> list[Estimate]:
    """Kaggle's machines, each at its measured rate where one is known."""
    found = []
    for machine in MACHINES:
        estimate, measured = assume(machine, run), calibration.get(machine.name)
        if measured:
            seconds = measured["once_s"] + SCORED_STRIPS * run.strip_flops / measured["rate"]
            basis = f"{measured['rate'] / 1e9:,.0f} GFLOP/s in a run of {measured['strips']} strips"
            estimate = Estimate(machine.name, seconds, measured=True, basis=basis)
        found.append(estimate)
    return found
