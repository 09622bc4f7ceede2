"""Pace: what a step takes on this machine, and how many fit into the minutes that there are."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kernel.checks import read_json
from kernel.files import write_json
from kernel.logs import log
from training.batches import Batches
from training.callbacks import ProgressBar, StepTimer
from training.config import Config, Machine, Part
from training.fit import Fit, fit_within_memory, retake_from_strips, take_steps
from training.module import new_network
from training.states import other_experiment
from training.strips import Strips

STEPS = "steps.json"  # what was chosen, in RUNS/NAME
WARM_UP_STEPS = 5  # not measured: cuDNN tries its algorithms, loader processes start
PREFETCHED = 2  # batches that each loader process makes beforehand, by PyTorch's default
MEASURED_STEPS = {"cpu": 20, "cuda": 60}
PACE_STATISTICS_STRIPS = 4  # enough to keep a deep network in fp16's range
USED_SHARE = 0.95  # of the minutes: a machine has slower hours


@dataclass(frozen=True)
class Pace:
    """Seconds by the clock, loading included."""

    crop_step: float
    whole_step: float
    strip: float  # in the heads' last fit and the validation, which load nothing beside
    state: float  # that is saved


def _warm_up_steps(machine: Machine) -> int:
    """Return how many steps are not measured: the slow first ones, then as many as were loaded."""
    return WARM_UP_STEPS + PREFETCHED * machine.workers


def seconds_a_step(network: Any, fit: Fit, part: Part) -> tuple[float, float]:
    """Measure a step of one part as the fit itself takes it, and the state after the last one."""
    timer = StepTimer()
    callbacks = [timer, ProgressBar(fit.config, part)]  # no StopOnNonFinite: all is thrown away
    take_steps(network, fit, part, callbacks)
    ends = timer.ends[_warm_up_steps(fit.machine) - 1 :]
    return (ends[-1] - ends[0]) / (len(ends) - 1), timer.saved - ends[-1]


def seconds_a_load(sources: Sequence[Strips], config: Config) -> float:
    """Measure the loading of one whole strip in this process."""
    batches, start = Batches(sources, config), time.perf_counter()
    for step in range(config.whole_part.first, config.whole_part.end):
        batches[step]
    return (time.perf_counter() - start) / config.whole_steps


def measure_pace(sources: Sequence[Strips], config: Config, machine: Machine) -> Pace:
    """Take some steps of both parts with a network that is thrown away.

    Between them its batch-norm statistics are taken from strips, as in the fit: with those of a new
    network, frozen, a deep one's values grow beyond half precision, and its loss is no number.
    A fit draws many crops of each strip, and hardly a whole one twice: for the crops all strips
    count as read before, without the checks of a first read.
    """
    count = _warm_up_steps(machine) + MEASURED_STEPS[machine.device.type]
    tried = replace(config, crop_steps=count, whole_steps=count, encoder_weights="")
    known = [replace(each, whole=set(each.names)) for each in sources]
    with tempfile.TemporaryDirectory() as folder:
        apart = replace(machine, save_every=count, runs=Path(folder))
        network, fit = new_network(tried), Fit(tried, sources, apart, experiment={})
        crop_step, _ = seconds_a_step(network, replace(fit, sources=known), tried.crop_part)
        retake_from_strips(network, fit, [sources[0].some(0, PACE_STATISTICS_STRIPS)])
        whole_step, state = seconds_a_step(network, fit, tried.whole_part)
    return Pace(crop_step, whole_step, whole_step + seconds_a_load(sources, tried), state)


def fill_minutes(
    config: Config, pace: Pace, seconds: float, n_strips: int, save_every: int
) -> tuple[int, int]:
    """Return both step counts, scaled by one factor so that they fill `seconds`.

    `n_strips` are those of the heads' last fit and the validation, a pass each; a state is saved
    every `save_every` steps.

    Raises:
        ValueError: no time is left for one step of each part.
    """
    left = USED_SHARE * (seconds - n_strips * pace.strip)
    asked = config.crop_steps * pace.crop_step + config.whole_steps * pace.whole_step
    asked += config.steps * pace.state / save_every
    crop, whole = (int(n * left / asked) for n in (config.crop_steps, config.whole_steps))
    if crop < min(config.crop_steps, 1) or whole < min(config.whole_steps, 1):
        raise ValueError(
            f"{config.name}: --minutes leaves {seconds:.0f} s, of which {n_strips} strips of the "
            f"last fit and the validation take {n_strips * pace.strip:.0f} s and a step "
            f"{pace.crop_step:.2f} s on crops, {pace.whole_step:.2f} s on strips: give more "
            "minutes, or fewer --presence-strips or --validation-strips"
        )
    return crop, whole


def choose_steps(
    config: Config, sources: Sequence[Strips], machine: Machine, minutes: float, n_strips: int
) -> Config:
    """Return the experiment with as many steps as its minutes hold; a resumed one keeps them.

    Raises:
        ValueError: no time is left for one step, the file of the steps is broken, or a state beside
            it is of another experiment.
    """
    path, own = machine.folder(config) / STEPS, asdict(replace(config, crops=0, teacher=""))
    asked = json.loads(json.dumps(own))  # tuples as JSON has them
    saved = read_json(path) if path.is_file() else {}
    known = saved.get("asked", {})
    if known != asked:
        states = sorted(path.parent.glob("*.ckpt"))
        if saved and states:  # which go on with their own steps, not with new ones
            raise ValueError(f"{states[0]}: {other_experiment(known, asked)}")
        start = time.perf_counter()
        pace = fit_within_memory(lambda tried: measure_pace(sources, tried, machine), config)
        seconds = 60 * minutes - (time.perf_counter() - start)
        crop, whole = fill_minutes(config, pace, seconds, n_strips, machine.save_every)
        saved = {
            "asked": asked,
            "minutes": minutes,
            "crop_steps": crop,
            "whole_steps": whole,
            "pace": asdict(pace),
        }
        write_json(path, saved)
    elif saved["minutes"] != minutes:
        log.warning("%s keeps the steps of its first --minutes, %g: for others give another --name",
                    config.name, saved["minutes"])  # fmt: skip
    log.info("%s: %d + %d steps, by a pace of %s s", config.name, saved["crop_steps"],
             saved["whole_steps"], saved["pace"])  # fmt: skip
    return replace(config, crop_steps=saved["crop_steps"], whole_steps=saved["whole_steps"])
