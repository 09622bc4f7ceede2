"""The deadline: simulated machines on an injected clock, and a real run whose time is over."""

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import predict, read_submission, save_strips
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.deadline import RESERVE, RESERVE_S, Deadline
from kernel.images import Strip, read_strip
from kernel.tta import Half, Pass, list_passes

MACHINES = int(os.environ.get("MACHINES", "500"))  # simulated, by each property
FLIPS = ("none", "horizontal", "vertical")


def select(deadline: Deadline, passes: Sequence[Pass], strips: int) -> list[int]:
    """The passes of the next of so many strips that are left."""
    deadline.strips_left = strips
    return deadline.select_passes(passes)


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

    @functools.cached_property
    def passes(self) -> list[Pass]:
        members = sorted(self.cost_s, key=lambda member: self.cost_s[member])
        return list_passes([(member, (1, 1)) for member in members], FLIPS)

    def run(self, budget_s: float) -> "Log":
        """All strips under a Deadline, as `Scheduler` uses it, one strip at a time."""
        deadline = Deadline(budget_s, self.now, clock=lambda: self.now)
        rng, log = np.random.default_rng(self.seed), Log(self, deadline, self.now + budget_s)
        deadline.start_strips(self.strips)
        for strip in range(self.strips):
            if strip == self.stall_at:
                self.now += self.stall_s
            if deadline.over:
                log.plans.append([])
                continue
            before = self.now
            plan = deadline.select_passes(self.passes)
            log.plans.append(plan)
            clean = rng.random() < self.clean
            for number in plan[: math.ceil(len(plan) / 2)] if clean else plan:
                for half in (Half.ENCODER,) if clean else Half:
                    if not deadline.over:
                        self.take(deadline, self.passes[number].member, half, strip)
            deadline.strips_done([[self.passes[number] for number in plan]])
            log.seconds.append(self.now - before)
        return log

    def take(self, deadline: Deadline, member: str, half: Half, strip: int) -> None:
        start = self.now
        self.now += self.cost_s[member] * (self.slower if strip >= self.slower_from else 1)
        deadline.half_done(member, half, self.now - start, 1)


@dataclass
class Log:
    machine: Machine
    deadline: Deadline
    end: float  # of the budget
    plans: list[list[int]] = field(default_factory=list)  # pass ids of each strip
    seconds: list[float] = field(default_factory=list)  # of each strip


machines = st.builds(
    Machine,
    cost_s=st.dictionaries(
        st.sampled_from(["a", "b", "c", "d", "e"]), st.floats(1e-3, 0.6), min_size=1
    ),
    strips=st.integers(1, 120),
    clean=st.sampled_from([0.0, 0.5, 1.0]),
    stall_at=st.integers(0, 240),
    stall_s=st.floats(0, 300),
    slower_from=st.integers(0, 240),
    slower=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)


@settings(max_examples=3 * MACHINES)
@given(machines, st.floats(60, 3600))
def test_every_strip_has_passes_or_stays_empty_and_the_budget_is_never_passed(
    machine: Machine, budget_s: float
) -> None:
    """But for a stall: time that no plan could know of may take all of the reserve and more."""
    log = machine.run(budget_s)
    assert len(log.plans) == machine.strips
    slowest_pass_s = 2 * max(machine.cost_s.values()) * max(machine.slower, 1)
    stalled = machine.stall_s if machine.stall_at < machine.strips else 0
    assert machine.now <= log.deadline.end + slowest_pass_s + stalled
    if slowest_pass_s < RESERVE_S and not stalled:
        assert machine.now <= log.end
    assert all(plan == sorted(set(plan)) for plan in log.plans)


@settings(max_examples=MACHINES)
@given(machines)
def test_nothing_is_dropped_where_there_is_time_for_all(machine: Machine) -> None:
    machine.stall_s = 0.0
    slowest = max(machine.slower, 1)
    whole = machine.strips * sum(2 * 3 * cost for cost in machine.cost_s.values()) * slowest
    log = machine.run(2 * whole + 60)  # half of it to spare: a slow-down is no surprise then
    assert all(plan == list(range(len(machine.passes))) for plan in log.plans)


@settings(max_examples=MACHINES)
@given(machines, st.floats(0.2, 0.95))
def test_a_steady_machine_leaves_less_unused_than_a_chunk_of_strips(
    machine: Machine, share: float
) -> None:
    """Passes were dropped, so the time must have been used, but for some strips' worth."""
    machine.stall_s, machine.slower, machine.clean = 0.0, 1.0, 0.0
    machine.strips = max(machine.strips, 50)
    strip_s = sum(2 * 3 * cost for cost in machine.cost_s.values())
    working = share * machine.strips * strip_s
    log = machine.run((working + RESERVE_S) / (1 - RESERVE))
    if any(len(plan) < len(machine.passes) for plan in log.plans):
        assert log.deadline.end - machine.now <= 2 * strip_s + 1e-6


def test_flips_are_dropped_before_members_and_the_expensive_before_the_cheap() -> None:
    machine = Machine({"a": 0.1, "b": 0.2}, 100, 0.0, 999, 0, 999, 1, 0)
    passes = machine.passes
    order: list[str] = []
    for budget_s in np.linspace(400, 20, 200):
        deadline = Deadline(float(budget_s), 0.0, clock=lambda: 0.0)
        for member, cost in machine.cost_s.items():
            deadline.half_done(member, Half.ENCODER, cost, 1)
            deadline.half_done(member, Half.DECODER, cost, 1)
        kept = select(deadline, passes, 100)
        dropped = [str(passes[number]) for number in range(len(passes)) if number not in kept]
        assert deadline.dropped == dict.fromkeys(dropped, 1)
        order += [name for name in dropped if name not in order]
    assert {order[0], order[1]} == {"b/horizontal", "b/vertical"}
    assert {order[2], order[3]} == {"a/horizontal", "a/vertical"}
    assert order[4:] == ["b/none"]  # the last one stays


def test_passes_come_back_when_the_machine_gets_faster() -> None:
    machine = Machine({"a": 0.1, "b": 0.2}, 300, 0.0, 999, 0, 100, 0.1, 0)
    log = machine.run(180)
    assert any(len(plan) < 6 for plan in log.plans[:100])
    assert log.plans[-1] == list(range(6))
    assert log.deadline.dropped.total() > 0


def test_before_the_first_strip_is_done_a_strip_is_expected_to_take_its_passes_seconds() -> None:
    deadline = Deadline(1000, 0.0, clock=lambda: 0.0)
    passes = list_passes([("a", (1, 1))], FLIPS)
    deadline.half_done("a", Half.ENCODER, 2.0, 1)
    deadline.half_done("a", Half.DECODER, 1.0, 1)
    assert deadline.full_s(passes) == 9
    assert len(select(deadline, passes, int(deadline.end / 9))) == 3
    assert len(select(deadline, passes, int(deadline.end / 9) + 1)) == 2


def test_time_outside_the_networks_counts() -> None:
    """Half of a strip's time is no pass's: twice as many passes are dropped."""
    now = [0.0]
    deadline = Deadline(1000, 0.0, clock=lambda: now[0])
    passes = list_passes([("a", (1, 1))], FLIPS)
    deadline.half_done("a", Half.ENCODER, 5.0, 1)
    deadline.half_done("a", Half.DECODER, 5.0, 1)
    deadline.start_strips()
    now[0] = 60.0  # a strip of three passes, 30 s of them in networks
    deadline.strips_done([passes])
    left_s = deadline.end - 60.0
    assert len(select(deadline, passes, int(left_s / 60))) == 3
    assert len(select(deadline, passes, int(left_s / 60) + 1)) == 2
    assert len(select(deadline, passes, int(left_s / 40) + 1)) == 1


def test_strips_that_end_together_count_alike() -> None:
    """Eight of 3 s each: a plan for as many as there is time for drops nothing."""
    now = [0.0]
    deadline = Deadline(1000, 0.0, clock=lambda: now[0])
    passes = list_passes([("a", (1, 1))], FLIPS)
    for half in Half:
        deadline.half_done("a", half, 8 * 0.5, 8)
    deadline.start_strips()
    for _ in range(4):
        now[0] += 8 * 3.0
        deadline.strips_done([passes] * 8)
    strips = int((deadline.end - now[0]) / 3.0)
    assert len(select(deadline, passes, strips)) == 3
    assert len(select(deadline, passes, strips + 1)) == 2


@pytest.mark.parametrize("warm_up", [0.0, Deadline.WARM_UP])
@pytest.mark.parametrize(("strips", "strip_s"), [(2753, 0.096), (1375, 2.16)])
def test_a_gpu_that_warms_up_loses_no_pass(
    strips: int, strip_s: float, warm_up: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first strip takes 96 s; the others take minutes, or nearly all of the hour."""
    monkeypatch.setattr(Deadline, "WARM_UP", warm_up)
    machine = Machine(dict.fromkeys("ab", 8.0), strips, 0.0, 9999, 0, 1, strip_s / 96, 0)
    log = machine.run(3600)
    assert log.seconds[0] == 96
    assert bool(log.deadline.dropped) == (not warm_up)


def test_a_steady_machine_that_has_time_for_a_pass_of_each_strip_leaves_none_empty() -> None:
    """All passes of the strips before the first is dropped take no more than a few per cent."""
    log = Machine({"a": 0.1}, 300, 0.0, 9999, 0, 9999, 1, 0).run(86)
    assert len(log.plans[0]) == 3 and min(map(len, log.plans)) == 1


# --- a real run -----------------------------------------------------------------------------------


def test_strips_for_which_there_is_no_time_are_named_and_keep_their_rows(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a clock that jumps to the end after ten strips."""
    strips_done, seen = Deadline.strips_done, list[int]()

    def jump(deadline: Deadline, plans: Sequence[Sequence[Pass]]) -> None:
        seen.append(len(plans))
        strips_done(deadline, plans)
        if len(seen) == 10:
            deadline.end = deadline.clock()

    monkeypatch.setattr(Deadline, "strips_done", jump)
    names, decoded = [f"{index:02}.png" for index in range(40)], list[str]()

    def decode(folder: Path, name: str, *rules: Any) -> Strip:
        decoded.append(name)
        return read_strip(folder, name, *rules)

    monkeypatch.setattr("kernel.read_ahead.read_strip", decode)
    save_strips(tmp_path / "strips", names)
    output = tmp_path / "submission.csv"
    record = predict(tiny_bundle / "dataset", tmp_path / "strips", output)
    assert len(decoded) < 20  # what is left is not read: of half a million it would take minutes
    assert "30 images stay empty: no time was left for it" in caplog.messages
    assert list(record["work"]) == names[:10]
    assert record["faults"] == dict.fromkeys(names[10:], "no time was left for it")
    rows = read_submission(output)
    assert len(rows) == 160
    assert {name for (name, _), rle in rows.items() if rle} <= set(names[:10])
    assert any(rows.values())
