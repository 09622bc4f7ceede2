"""The hour: simulated machines on an injected clock, and real runs with a budget."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel import inference
from kernel.deadline import Deadline
from kernel.early_exit import Tally
from kernel.ensemble import Flight
from kernel.images import Strip
from kernel.manifest import Manifest
from kernel.mounts import Options
from weights import steel

MACHINES = int(os.environ.get("MACHINES", "500"))  # simulated, by each property
FLIPS = ("none", "horizontal", "vertical")

# --- simulated machines ---------------------------------------------------------------------------


@dataclass
class Machine:
    """A clock that runs when a pass does: half of a pass takes its seconds, slower or not."""

    cost_s: dict[str, float]  # member → of its encoder, and of its decoder
    strips: int
    clean: float  # share of strips of which half the encoders run and no decoder
    stall_at: int  # the strip before which everything hangs
    stall_s: float
    slower_from: int  # the strip from which all takes `slower` times as long
    slower: float
    seed: int
    now: float = 100.0

    @property
    def passes(self) -> list[tuple[str, str]]:
        members = sorted(self.cost_s, key=lambda member: self.cost_s[member])
        return list(itertools.product(members, FLIPS))

    def run(self, budget_s: float) -> "Log":
        """All strips under a Deadline, as `Ensemble.fly` uses it, one strip at a time."""
        deadline = Deadline(budget_s, self.now, clock=lambda: self.now)
        rng, log = np.random.default_rng(self.seed), Log(self, deadline, self.now + budget_s)
        deadline.takes_off()
        for strip in range(self.strips):
            if strip == self.stall_at:
                self.now += self.stall_s
            if deadline.over:
                log.plans.append([])
                continue
            before = self.now
            plan = deadline.plan(self.passes, self.strips - strip)
            log.plans.append(plan)
            clean = rng.random() < self.clean
            for number in plan[: math.ceil(len(plan) / 2)] if clean else plan:
                for half in ("encoder",) if clean else ("encoder", "decoder"):
                    if not deadline.over:
                        self.take(deadline, self.passes[number][0], half, strip)
            deadline.landed([self.passes[number] for number in plan])
            log.seconds.append(self.now - before)
        return log

    def take(self, deadline: Deadline, member: str, half: str, strip: int) -> None:
        start = self.now
        self.now += self.cost_s[member] * (self.slower if strip >= self.slower_from else 1)
        deadline.ran(member, half, self.now - start, 1)


@dataclass
class Log:
    machine: Machine
    deadline: Deadline
    end: float  # of the budget

    def __post_init__(self) -> None:
        self.plans: list[list[int]] = []
        self.seconds: list[float] = []


machines = st.builds(
    Machine,
    cost_s=st.dictionaries(
        st.sampled_from(["a", "b", "c", "d", "e"]), st.floats(1e-3, 0.6), min_size=1
    ),
    strips=st.integers(1, 400),
    clean=st.sampled_from([0.0, 0.5, 1.0]),
    stall_at=st.integers(0, 800),
    stall_s=st.floats(0, 300),
    slower_from=st.integers(0, 800),
    slower=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)


@settings(max_examples=3 * MACHINES, deadline=None)
@given(machines, st.floats(60, 3600))
def test_every_strip_has_a_plan_or_stays_empty_and_the_budget_is_never_passed(
    machine: Machine, budget_s: float
) -> None:
    """But for a stall: time that no plan could know of may take all of the reserve and more."""
    log = machine.run(budget_s)
    assert len(log.plans) == machine.strips
    dearest = 2 * max(machine.cost_s.values()) * max(machine.slower, 1)
    stalled = machine.stall_s if machine.stall_at < machine.strips else 0
    assert machine.now <= log.deadline.end + dearest + stalled
    if dearest < Deadline.RESERVE_S and not stalled:
        assert machine.now <= log.end
    assert all(plan == sorted(set(plan)) for plan in log.plans)


@settings(max_examples=MACHINES, deadline=None)
@given(machines)
def test_nothing_is_dropped_where_there_is_time_for_all(machine: Machine) -> None:
    machine.stall_s = 0.0
    slowest = max(machine.slower, 1)
    whole = machine.strips * sum(2 * 3 * cost for cost in machine.cost_s.values()) * slowest
    log = machine.run(2 * whole + 60)  # half of it to spare: a slow-down is no surprise then
    assert all(plan == list(range(len(machine.passes))) for plan in log.plans)


@settings(max_examples=MACHINES, deadline=None)
@given(machines, st.floats(0.2, 0.95))
def test_a_steady_machine_leaves_less_unused_than_a_chunk_of_strips(
    machine: Machine, share: float
) -> None:
    """Passes were dropped, so the time must have been used, but for some strips' worth."""
    machine.stall_s, machine.slower, machine.clean = 0.0, 1.0, 0.0
    machine.strips = max(machine.strips, 50)
    strip_s = sum(2 * 3 * cost for cost in machine.cost_s.values())
    working = share * machine.strips * strip_s
    log = machine.run((working + Deadline.RESERVE_S) / (1 - Deadline.RESERVE))
    if any(len(plan) < len(machine.passes) for plan in log.plans):
        assert log.deadline.end - machine.now <= 2 * strip_s + 1e-6


def test_flips_go_before_members_and_the_dear_before_the_cheap() -> None:
    machine = Machine({"a": 0.1, "b": 0.2}, 100, 0.0, 999, 0, 999, 1, 0)
    passes = machine.passes
    order: list[tuple[str, str]] = []
    for budget_s in np.linspace(400, 20, 200):
        deadline = Deadline(float(budget_s), 0.0, clock=lambda: 0.0)
        for member, cost in machine.cost_s.items():
            deadline.ran(member, "encoder", cost, 1)
            deadline.ran(member, "decoder", cost, 1)
        kept = deadline.plan(passes, 100)
        gone = [passes[number] for number in range(len(passes)) if number not in kept]
        order += [name for name in gone if name not in order]
    assert {order[0], order[1]} == {("b", "horizontal"), ("b", "vertical")}
    assert {order[2], order[3]} == {("a", "horizontal"), ("a", "vertical")}
    assert order[4:] == [("b", "none")]  # the last one stays


def test_passes_come_back_when_the_machine_gets_faster() -> None:
    machine = Machine({"a": 0.1, "b": 0.2}, 300, 0.0, 999, 0, 100, 0.1, 0)
    log = machine.run(180)
    assert any(len(plan) < 6 for plan in log.plans[:100])
    assert log.plans[-1] == list(range(6))
    assert log.deadline.left_out.total() > 0


def test_before_the_first_strip_has_landed_a_plan_is_taken_at_its_passes_seconds() -> None:
    deadline = Deadline(1000, 0.0, clock=lambda: 0.0)
    passes = [("a", flip) for flip in FLIPS]
    deadline.ran("a", "encoder", 2.0, 1)
    deadline.ran("a", "decoder", 1.0, 1)
    assert deadline.whole_s(passes) == 9
    assert len(deadline.plan(passes, int(deadline.end / 9))) == 3
    assert len(deadline.plan(passes, int(deadline.end / 9) + 1)) == 2


def test_time_outside_the_networks_is_reckoned_with() -> None:
    """Half of a strip's time is no pass's: twice as many passes are dropped."""
    now = [0.0]
    deadline = Deadline(1000, 0.0, clock=lambda: now[0])
    passes = [("a", flip) for flip in FLIPS]
    deadline.ran("a", "encoder", 1.0, 1)
    deadline.ran("a", "decoder", 1.0, 1)
    deadline.takes_off()
    now[0] = 12.0  # a strip of three passes, 6 s of them in networks
    deadline.landed(passes)
    left_s = deadline.end - 12.0
    assert len(deadline.plan(passes, int(left_s / 12))) == 3
    assert len(deadline.plan(passes, int(left_s / 12) + 1)) == 2
    assert len(deadline.plan(passes, int(left_s / 8) + 1)) == 1


# --- real runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 strips of 128 × 800 pixels."""
    folder = tmp_path_factory.mktemp("strips")
    for index in range(40):
        rng = np.random.default_rng([5, index])
        image, _ = steel.draw_strip(rng, (4,) if index % 2 else (), size=(128, 800))
        cv2.imwrite(str(folder / f"{index:02}.png"), image)
    return folder


def run_script(bundle: Path, images: Path, out: Path, *options: str) -> dict[str, Any]:
    """The packed script as a process; its run.json, the seconds and the exit code."""
    command = [sys.executable, str(bundle / "dataset" / "inference.py"), "--bundle"]
    command += [str(bundle / "dataset"), "--images", str(images), *options]
    start = time.monotonic()
    done = subprocess.run(
        [*command, "--report", "run.json"], cwd=out, capture_output=True, text=True, check=False
    )
    report = out / "run.json"
    entries = json.loads(report.read_text()) if report.is_file() else {}
    taken = time.monotonic() - start
    return {**entries, "taken": taken, "code": done.returncode, "log": done.stdout + done.stderr}


def test_a_budget_that_is_spent_at_once_ends_with_every_row_empty(
    tiny_bundle: Path, strips: Path, tmp_path: Path
) -> None:
    result = run_script(tiny_bundle, strips, tmp_path, "--budget-s", "1")
    assert result["code"] in (0, 2)  # the watchdog's end, or none of the strips predicted
    lines = (tmp_path / "submission.csv").read_text().splitlines()
    assert len(lines) == 1 + 160
    assert all(line.endswith(",") for line in lines[1:])


def test_strips_for_which_there_is_no_time_are_told_and_keep_their_rows(
    tiny_bundle: Path, strips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, with a clock that jumps to the end after ten strips."""
    landed = Deadline.landed
    seen: list[int] = []

    def jump(deadline: Deadline, passes: Any) -> None:
        seen.append(len(passes))
        landed(deadline, passes)
        if len(seen) == 10:
            deadline.end = deadline.clock()

    monkeypatch.setattr(Deadline, "landed", jump)
    output = tmp_path / "submission.csv"
    options = Options(bundle=tiny_bundle / "dataset", images=strips, output=output)
    report = inference.run(options)
    assert len(report["work"]) == 10
    assert len(report["faults"]) == 30
    assert set(report["faults"].values()) == {"no time was left for it"}
    assert len(output.read_text().splitlines()) == 161


def flown(decoded: Sequence[float], encoded: int) -> Flight:
    """A flight of 15 passes: some decoded with these probabilities, then some only encoded."""
    tally = Tally(15, Manifest([], 1, threshold=0.5), early_exit=True)
    strip, images = Strip("a", np.zeros((2, 2), np.uint8)), torch.zeros(1, 1, 2, 2)
    flight = Flight(strip, images, tally, list(range(15)), (2, 2))
    for _ in range(len(decoded) + encoded):
        flight.encode((torch.ones(1, 1),), np.ones(1))
    for value in decoded:
        flight.decode(torch.full((1, 2, 2), value))
    assert not flight.landed
    return flight


@pytest.mark.parametrize(("second", "on"), [(0.3, True), (0.05, False)])
@pytest.mark.parametrize("encoded", [0, 2])
def test_a_strip_in_flight_at_the_end_keeps_the_mean_of_its_passes(
    encoded: int, second: float, on: bool
) -> None:
    flight = flown([0.9, second], encoded)
    flight.cut()
    assert flight.landed and not flight.fault
    assert flight.tally.masks((2, 2)).all() == on


def test_a_strip_of_which_nothing_is_decoded_at_the_end_stays_empty_and_is_told() -> None:
    flight = flown([], 3)
    flight.cut()
    assert flight.landed
    assert flight.fault == "no time was left for it"


def test_the_watchdog_ends_a_run_that_hangs_with_what_is_done(
    tiny_bundle: Path, strips: Path, tmp_path: Path
) -> None:
    """After 20 strips nothing returns: the process ends in its budget, with exit code 0."""
    hang = tmp_path / "hang.py"
    hang.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(tiny_bundle / 'dataset')!r})\n"
        "import inference as kernel\n"
        "landed, seen = kernel.Deadline.landed, []\n"
        "def hang(deadline, passes):\n"
        "    landed(deadline, passes)\n"
        "    seen.append(passes)\n"
        "    if len(seen) == 20: time.sleep(600)\n"
        "kernel.Deadline.landed = hang\n"
        "kernel.Submission.SHARE = 1e9\n"
        "kernel.main(sys.argv[1:])\n",
        encoding="utf-8",
    )
    arguments = ["--bundle", str(tiny_bundle / "dataset"), "--images", str(strips)]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(hang), *arguments, "--budget-s", "45"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert time.monotonic() - start < 60
    assert done.returncode == 0, done.stderr
    assert "the budget is spent" in done.stdout
    lines = (tmp_path / "submission.csv").read_text().splitlines()
    assert len(lines) == 161
    assert any(not line.endswith(",") for line in lines)
