"""The pace of a fit, and the steps that fill some minutes."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from training import fit, pace
from training.batches import Batches
from training.config import Config, Machine, Part
from training.fit import Fit
from training.module import MemberModule
from training.pace import Pace, choose_steps, fill_minutes, measure_pace
from training.states import AtomicCheckpointIO
from training.strips import Strips

PACE = Pace(crop_step=0.5, whole_step=2.0, strip=0.1, state=0.0)


def test_the_steps_fill_19_in_20_seconds_of_what_the_strips_leave(config: Config) -> None:
    config = replace(config, crop_steps=600, whole_steps=150)
    crop, whole = fill_minutes(config, PACE, 1000, 1000, save_every=50)  # 900 s are left
    assert (crop, whole) == (855, 213)  # 427.5 + 426 s of 855
    assert crop * 0.5 + whole * 2 <= 0.95 * 900 < (crop + 1) * 0.5 + (whole + 1) * 2
    only_crops = replace(config, whole_steps=0)
    assert fill_minutes(only_crops, PACE, 1000, 1000, save_every=50) == (1710, 0)
    dear = replace(PACE, state=10.0)  # 0.2 s a step
    assert fill_minutes(only_crops, dear, 1000, 1000, save_every=50) == (int(855 / 0.7), 0)
    crop, whole = fill_minutes(config, dear, 1000, 1000, save_every=50)
    assert crop * 0.7 + whole * 2.2 <= 855 < (crop + 1) * 0.7 + (whole + 1) * 2.2


@pytest.mark.parametrize(("seconds", "strips"), [(-5.0, 0), (100.0, 2000), (3.0, 0)])
def test_minutes_without_a_step_in_them_are_refused(
    seconds: float, strips: int, config: Config
) -> None:
    with pytest.raises(ValueError, match=r"tiny: --minutes leaves .* give more minutes"):
        fill_minutes(replace(config, crop_steps=9, whole_steps=1), PACE, seconds, strips, 50)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A fit's clock, its one number, which moves on when a test moves it."""
    found = [0.0]
    monkeypatch.setattr("training.callbacks.time.perf_counter", lambda: found[0])
    return found


def test_the_pace_is_that_of_the_steps_after_the_first_ones(
    config: Config,
    strips: Strips,
    machine: Machine,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that a step moves on: ten seconds the first ones, then two on crops, three."""
    monkeypatch.setattr(pace, "MEASURED_STEPS", {"cpu": 4})
    taken: list[str] = []
    batch_loss = Batches.__getitem__

    def timed(batches: Any, step: int) -> Any:
        part = "crops" if step < batches.config.crop_steps else "strips"
        taken.append(part)
        late = taken.count(part) > pace.WARM_UP_STEPS + 1  # one is made to count the workers
        clock[0] += {"crops": 2.0, "strips": 3.0}[part] if late else 10.0
        return batch_loss(batches, step)

    monkeypatch.setattr(Batches, "__getitem__", timed)
    found = measure_pace([strips], config, machine)
    assert found == Pace(2.0, 3.0, 6.0, 0.0)
    assert not machine.runs.exists()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_steps_that_use_up_what_was_loaded_beforehand_are_not_measured(
    kind: str,
    config: Config,
    strips: Strips,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of three loader processes makes two batches during the slow first steps."""
    measured = {"cpu": 20, "cuda": 60}[kind]
    part = replace(config, crop_steps=5 + 6 + measured).crop_part

    def take(network: Any, fit: Fit, part: Part, callbacks: list[Any]) -> None:
        seconds = [10.0] * 5 + [1.0] * 6 + [2.0] * (part.steps - 11)
        callbacks[0].ends = list(itertools.accumulate(seconds))

    monkeypatch.setattr(pace, "take_steps", take)
    three = replace(machine, workers=3, device=torch.device(kind))
    assert pace.seconds_a_step(None, Fit(config, [], three, {}), part)[0] == 2
    tried: list[tuple[int, int]] = []

    def measure(network: Any, fit: Fit, part: Part) -> tuple[float, float]:
        tried.append((fit.config.crop_steps, fit.config.whole_steps))
        return 1.0, 1.0

    monkeypatch.setattr(pace, "seconds_a_step", measure)
    monkeypatch.setattr(pace, "retake_from_strips", lambda *_: None)
    monkeypatch.setattr(pace, "seconds_a_load", lambda *_: 0.0)
    measure_pace([strips], config, three)
    assert tried == [(part.steps, part.steps)] * 2


def test_a_state_is_timed_apart_from_the_steps(
    config: Config,
    strips: Strips,
    machine: Machine,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that only a state moves on."""
    monkeypatch.setattr(pace, "MEASURED_STEPS", {"cpu": 2})

    def save(*_: Any, **__: Any) -> None:
        clock[0] += 8.0

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    assert measure_pace([strips], config, machine) == Pace(0.0, 0.0, 0.0, 8.0)


def test_crops_are_timed_on_strips_that_were_read_before_and_whole_strips_on_new_ones(
    config: Config, strips: Strips, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a fit, where each strip has many crops drawn and is hardly taken whole twice."""
    monkeypatch.setattr(pace, "MEASURED_STEPS", {"cpu": 2})
    known: list[set[str]] = []
    take_steps = fit.take_steps

    def watched(network: Any, fit: Fit, *rest: Any) -> None:
        known.extend(set(each.whole) for each in fit.sources)
        take_steps(network, fit, *rest)

    monkeypatch.setattr(pace, "take_steps", watched)
    measure_pace([replace(strips, whole=set())], config, machine)
    assert known == [set(strips.names), set()]


def test_whole_strips_are_timed_with_batch_norm_statistics_of_strips(
    config: Config, strips: Strips, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new network's are 0 and 1: in fp16 a deep one's values overflow with them."""
    monkeypatch.setattr(pace, "MEASURED_STEPS", {"cpu": 2})
    began: list[int] = []
    take_steps = fit.take_steps

    def watched(network: Any, *rest: Any) -> None:
        began.append(int(network.encoder.model.bn1.num_batches_tracked))
        take_steps(network, *rest)

    monkeypatch.setattr(pace, "take_steps", watched)
    measure_pace([strips], config, machine)
    assert began == [
        0,
        pace.PACE_STATISTICS_STRIPS // 2,
    ]  # pairs of strips, the crops' not among them


def test_a_pace_needs_no_loss_that_is_a_number(
    config: Config, strips: Strips, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its network is thrown away; the fit's own may do better."""
    monkeypatch.setattr(pace, "MEASURED_STEPS", {"cpu": 6})  # 11 steps of each part
    batch_loss = MemberModule.batch_loss
    monkeypatch.setattr(MemberModule, "batch_loss", lambda *each: batch_loss(*each) * float("nan"))
    assert measure_pace([strips], config, machine).crop_step > 0


def test_steps_are_chosen_once_and_a_resumed_fit_keeps_them(
    config: Config,
    strips: Strips,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(pace, "measure_pace", lambda *_: PACE)
    chosen = choose_steps(config, [strips], machine, 10.01, 0)
    assert (chosen.crop_steps, chosen.whole_steps) == (285, 213)  # 4 and 3, times 71.25
    assert replace(chosen, crop_steps=4, whole_steps=3) == config
    monkeypatch.setattr(pace, "measure_pace", lambda *_: Pace(1.0, 1.0, 1.0, 0.0))
    assert choose_steps(replace(config, crops=1), [strips], machine, 99, 0).steps == 498
    assert "tiny keeps the steps of its first --minutes, 10.01" in caplog.text
    other = choose_steps(replace(config, arch="FPN"), [strips], machine, 10, 0)
    assert other.steps not in (498, 7)
    saved = json.loads((machine.runs / "tiny" / pace.STEPS).read_text())
    assert saved["asked"]["arch"] == "FPN" and saved["pace"]["whole_step"] == 1.0


def test_steps_with_which_a_state_was_fitted_stay_whatever_is_tried_between(
    config: Config, strips: Strips, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured anew they would be others, and the state of another experiment for good."""
    monkeypatch.setattr(pace, "measure_pace", lambda *_: PACE)
    chosen = choose_steps(config, [strips], machine, 10, 0)
    steps = machine.runs / "tiny" / pace.STEPS
    (steps.parent / "crops.ckpt").write_bytes(b"a state")
    before = steps.read_bytes()
    monkeypatch.setattr(pace, "measure_pace", lambda *_: Pace(1.0, 1.0, 1.0, 0.0))
    with pytest.raises(ValueError, match=r"crops\.ckpt: state of another.*arch Unet, now FPN.*put"):
        choose_steps(replace(config, arch="FPN"), [strips], machine, 10, 0)
    assert steps.read_bytes() == before
    assert choose_steps(config, [strips], machine, 10, 0) == chosen


def test_a_gpu_out_of_memory_is_measured_with_fewer_crops(
    config: Config, strips: Strips, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def measure(sources: Any, config: Config, machine: Machine) -> Pace:
        tried.append(config.crops)
        if config.crops > 2:
            raise torch.OutOfMemoryError
        return PACE

    monkeypatch.setattr(pace, "measure_pace", measure)
    assert choose_steps(replace(config, crops=8), [strips], machine, 10, 0).crops == 8
    assert tried == [8, 4, 2]


def test_a_broken_file_of_steps_is_one_line(
    config: Config, strips: Strips, machine: Machine
) -> None:
    path: Path = machine.runs / "tiny" / pace.STEPS
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"steps\.json: no JSON"):
        choose_steps(config, [strips], machine, 10, 0)
