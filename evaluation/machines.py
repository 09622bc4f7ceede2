"""Kaggle's machines: what the scored run would take on each.

Estimated from counted flops and the assumptions in `MACHINES`, until `keep_rate` has read the
run.json of a real run there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.measured import MIN_GPU_STRIPS, MeasuredRun, spread_of_mean
from kernel.checks import read_json
from kernel.files import write_json
from kernel.run_record import RunRecord, read_run_record
from packing.paths import CALIBRATION
from training.metrics import Floats


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
        """The kernel's processes there beside the first: one a GPU."""
        return self.units if self.gpu else 0


T4 = (
    "65 TFLOP/s fp16 in NVIDIA's data sheet; attained: ResNet-50 in PyTorch's mixed precision, "
    "1,190 images/s of 8.2 GFLOP (NVIDIA DeepLearningExamples, resnet50v1.5, inference on T4)"
)
# How many times slower than the assumed rate a network may be: on an RTX 3090 ResNet-34 attains 48
# TFLOP/s, ResNet-50 31, DenseNet-121 17 and EfficientNet-B0 to B2 7 (timm's
# results/benchmark-infer-amp-nhwc-pt240-cu124-rtx3090.csv). Assumed of a T4 and of the CPU, too.
SLOWEST = 5
# Of the flops that a GPU runs, those that strips need: the rest pads partial batches, and no run on
# the CPU has any. Assumed: a simulated T4 came to 0.95, a card of 8 GB to 0.81 (docs/speed.md).
GPU_FILL = 0.9
CPU_MACHINE = "Kaggle's CPU"
MACHINES = (
    Machine("2×T4", True, 2, 65e12, 0.15, T4),
    Machine("one T4", True, 1, 65e12, 0.15, T4),
    Machine(
        CPU_MACHINE, False, 1, 141e9, 0.5,
        "2 cores of 2.2 GHz, each two AVX2 multiply-adds a cycle; the attained share is a guess",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """The scored run on one of Kaggle's machines."""

    machine: str
    workers: int  # that share the strips
    seconds: float
    low_s: float | None  # with `high_s`: 95 % interval of `seconds` over other strips of the same
    high_s: float | None  # kind, at the same rate; None: of one strip there is none
    calibrated: bool  # by the rate of a run there; else estimated from assumptions
    how: str  # that in words
    basis: str  # where the rate comes from


Seconds = tuple[float, float | None, float | None]  # with their interval


def _seconds(other_s: float, flops: Floats, flop_s: float) -> Seconds:
    """Seconds of which `other_s` are not the networks'; `flops` (strips,), each for `flop_s`."""
    seconds = other_s + float(flops.sum()) / max(flops.size, 1) * flop_s
    spread = spread_of_mean(flops)
    if spread is None:
        return seconds, None, None
    return seconds, seconds + spread[0] * flop_s, seconds + spread[1] * flop_s


def _estimate_assumed(machine: Machine, run: MeasuredRun) -> Estimate:
    """Estimate from a machine's assumptions; the stages beside the networks take what they do here.

    What no stage counts is left out: most of it is memory that the CPU's engine gives back.
    """
    images = run.n_images / machine.units  # for each
    other_s = run.fixed_s + images * run.beside_s(machine.gpu)
    fill = GPU_FILL if machine.gpu else 1
    flop_s = images / (machine.peak * machine.attained * fill)
    seconds = _seconds(other_s, run.full_flops(run.flops_here), flop_s)
    basis = f"{machine.units} × {machine.peak / 1e12:g} TFLOP/s × {machine.attained:.0%}"
    basis += f", {1 - fill:.0%} of it for padding: " if machine.gpu else ": "
    basis += machine.source
    return Estimate(machine.name, machine.workers, *seconds, False, "estimated", basis)


def _machine_of(record: RunRecord) -> str:
    """Return the name in `MACHINES` of the machine that a run on Kaggle had."""
    if not record.device.startswith("cuda"):
        return CPU_MACHINE
    return "2×T4" if record.workers > 1 else "one T4"


def _members_of(record: RunRecord) -> list[list[Any]]:
    """Name and the flops of both halves of each member: a rate is measured by them."""
    return [list(each) for each in sorted({(each.member, *each.flops) for each in record.passes})]


def keep_rate(bundle: Path, path: Path) -> str:
    """Keep the rate of a run on Kaggle, its run.json at `path`, in the bundle's folder.

    Return the machine's name.

    Raises:
        ValueError: the file is no run.json, or not of a whole run there in which strips were
            predicted, on a GPU many.
    """
    record = read_run_record(path)
    run = MeasuredRun(record)
    if not record.kaggle:
        raise ValueError(f"{path}: not of a run on Kaggle; give the run.json of its output")
    if not run.counts.any():
        raise ValueError(f"{path}: no strip was predicted in this run, so it has no rate")
    unknown = record.strips - len(record.work) - len(record.faults)
    if unknown > 0:
        raise ValueError(
            f"{path}: of {unknown} of {record.strips} strips it does not say what ran, for a "
            "worker died, so it has no rate; give another run's"
        )
    if run.few_for_gpu:
        raise ValueError(
            f"{path}: of {run.begun} strips, of which a GPU's start is most of the seconds; give "
            f"that of a run of {MIN_GPU_STRIPS} or more, or leave the estimate where there is none"
        )
    rate = run.strip_flops / run.per_strip_s  # FLOP/s, with all that is not the networks
    machine, known = _machine_of(record), read_rates(bundle)
    known.pop(machine, None)  # the last one stands last
    known[machine] = {
        "rate": rate,
        "fixed_s": run.fixed_s,
        "strips": record.strips,
        "members": _members_of(record),
    }
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
            flop_s = run.n_images / known["rate"]
            seconds = _seconds(known["fixed_s"], run.full_flops(run.flops), flop_s)
            how, basis = "calibrated", f"{known['rate'] / 1e9:,.0f} GFLOP/s"
            basis += f" in a run of {known['strips']} strips"
            members = _members_of(run.record)
            if known.get("members", members) != members:
                how += " by other members"
                basis += " by other members: calibrate it with a run of these"
            estimate = Estimate(machine.name, machine.workers, *seconds, True, how, basis)
        found.append(estimate)
    return found
