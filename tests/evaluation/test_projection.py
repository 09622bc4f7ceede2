"""What a run's seconds become for 5,506 strips: here, on Kaggle, and with less to do."""

import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CPU, LAYOUTS, predict, save_strips
from run_records import TRUNCATED, a_run, run_json, strip_work
from torch import Tensor

from evaluation.machines import list_estimates
from evaluation.measured import MeasuredRun
from evaluation.projection import drop_to_fit, estimate_s, list_drops, project, usable_s
from kernel.deadline import Deadline
from kernel.ensemble import Ensemble
from kernel.ensemble_loading import load_ensemble
from kernel.images import Size
from kernel.manifest import Manifest, load_manifest
from kernel.options import Options, parse_options
from kernel.run_context import RunContext
from kernel.run_record import parse_run_record
from kernel.stages import Stages
from kernel.strip_state import TOO_LATE
from kernel.submission import Submission
from kernel.task import Task
from kernel.tta import Half, Pass
from kernel.worker import start_worker

STRIPS = 5506
ALL = [0, 1, 2, 3]

# --- this machine ---------------------------------------------------------------------------------


def test_start_up_is_paid_once_and_every_strip_again() -> None:
    projection = project(a_run())
    assert projection.fixed_s == 8
    assert projection.strip_s == 3
    assert projection.total_s == 8 + STRIPS * 3


def test_the_interval_is_that_of_the_mean_of_so_many_strips() -> None:
    rng = np.random.default_rng(5)
    seconds = rng.gamma(2, 1, size=400)
    names = [f"{index}.jpg" for index in range(400)]
    run = a_run(
        strips=400,
        seconds=8 + float(seconds.sum()),
        strip_s=dict(zip(names, seconds.tolist(), strict=True)),
        work=dict.fromkeys(names, strip_work(ALL, ALL)),
    )
    projection = project(run)
    half = 1.96 * seconds.std() / 400**0.5 * STRIPS
    assert projection.total_s == pytest.approx(8 + STRIPS * seconds.mean())
    assert projection.low_s == pytest.approx(projection.total_s - half, abs=0.15 * half)
    assert projection.high_s == pytest.approx(projection.total_s + half, abs=0.15 * half)


def test_of_one_strip_there_is_no_interval() -> None:
    projection = project(a_run(strips=1, strip_s={"1.jpg": 2.0}))
    assert (projection.low_s, projection.high_s) == (None, None)
    assert projection.strip_s == 12


def test_strips_that_came_too_late_took_no_seconds() -> None:
    late = [f"{index}.jpg" for index in range(10, 16)]
    faults = run_json()["faults"] | dict.fromkeys(late, TOO_LATE)
    strip_s = run_json()["strip_s"] | dict.fromkeys(late, 1e-6)
    cut, run = a_run(strips=10, faults=faults, strip_s=strip_s), a_run()
    assert project(cut) == project(run)
    assert list_estimates(cut, {}) == list_estimates(run, {})
    assert list_drops(cut, ALL) == list_drops(run, ALL)


def test_two_workers_share_the_strips() -> None:
    """Their seconds for a strip are twice the wall's, and the projection is the wall's."""
    one, two = a_run(), a_run(strip_s={"1.jpg": 4.0, "2.jpg": 8.0, "3.jpg": 10.0}, workers=2)
    assert project(one) == project(two)
    assert estimate_s(one, ALL) == pytest.approx(estimate_s(two, ALL))


def test_the_kernel_plans_with_as_many_seconds_of_a_budget_as_its_deadline() -> None:
    assert usable_s(3600) == Deadline(3600, start=0).end == 3410


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_plan_with_less_each_by_a_budget_of_its_own(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = list[list[str]]()
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command))
    monkeypatch.setattr(RunContext, "left_s", lambda context: context.budget_s)
    task = Task(Path("strips"), LAYOUTS["two-column"], [("a.jpg", 1)])
    submission = Submission(Path("out.csv"), task.layout, task.pairs)
    context = RunContext(Options(budget_s=3600), Path(), Manifest([]), submission, Stages(), 0)
    start_worker(context, task, tmp_path, 1, workers, "0")
    budget_s = parse_options(commands[0][2:]).budget_s
    assert budget_s
    assert usable_s(3600, workers) == Deadline(budget_s, start=0).end == 3324.5


# --- what ran -------------------------------------------------------------------------------------


def test_every_half_of_every_pass_is_counted() -> None:
    # encoders 3, 4, 4 and decoders 0, 3, 4 of four passes
    assert a_run().counts.tolist() == [[3, 2], [3, 2], [3, 2], [2, 1]]


def test_the_seconds_of_one_half_are_those_of_its_member_by_its_count() -> None:
    expected = [[2.1 / 6, 1.2 / 4]] * 2 + [[2.4 / 5, 2.0 / 3]] * 2
    np.testing.assert_allclose(a_run().half_s, expected)


def test_keeping_all_passes_takes_the_seconds_that_the_networks_took() -> None:
    assert estimate_s(a_run(), ALL) == pytest.approx(7.7 / 4 * STRIPS)


def test_dropping_a_member_keeps_the_same_share_of_the_other_s_passes() -> None:
    # encoders 3, 4, 4 of four become 2, 2, 2 of two; decoders 0, 3, 4 become 0, 2, 2
    expected = (6 * 0.35 + 4 * 0.3) / 4 * STRIPS
    assert estimate_s(a_run(), [0, 1]) == pytest.approx(expected)
    half_way = a_run(work={"1.jpg": strip_work([0, 1], [])}, strips=1)  # two of four: one of two
    assert estimate_s(half_way, [0, 1]) == pytest.approx(2.1 / 2 * STRIPS)


def test_a_strip_whose_flip_was_dropped_is_charged_what_ran() -> None:
    run = a_run(
        work={
            "1.jpg": strip_work([0, 2], [0], passes=[0, 2]),  # both members without the flip
            "2.jpg": strip_work(ALL, ALL),
        },
        strips=2,
    )
    assert run.counts.tolist() == [[2, 2], [1, 1], [2, 1], [1, 1]]
    np.testing.assert_allclose(run.half_s[:, 0], [2.1 / 3, 2.1 / 3, 2.4 / 3, 2.4 / 3])
    np.testing.assert_allclose(run.half_s[:, 1], [1.2 / 3, 1.2 / 3, 2.0 / 2, 2.0 / 2])
    # with the flip and without it, by the second strip alone: its four of each, and half of them
    assert estimate_s(run, ALL) == pytest.approx(2 * (0.7 + 0.8 + 0.4 + 1.0) * STRIPS)
    assert estimate_s(run, [0, 2]) == pytest.approx((0.7 + 0.8 + 0.4 + 1.0) * STRIPS)


def test_what_was_dropped_here_is_in_the_seconds_of_every_pass() -> None:
    run = a_run(**TRUNCATED)
    # a pass takes 0.7 + 0.4 s of a, 0.8 + 2 / 3 s of b; of three strips in time two could be read
    full_s = 2 * (0.7 + 0.4 + 0.8 + 2 / 3) * 2 / 3
    assert run.dropped and not a_run().dropped
    assert estimate_s(run, ALL) == pytest.approx(full_s * STRIPS)
    assert project(run).strip_s == pytest.approx((12 - 7.7) / 3 + full_s)
    assert project(a_run()).strip_s == 3
    for workers in (1, 2):
        shared = a_run(**TRUNCATED, workers=workers)
        assert estimate_s(shared, ALL) == pytest.approx(full_s * STRIPS)
        assert project(shared).strip_s == pytest.approx((12 - 7.7) / 3 + full_s)


def test_a_pass_that_gave_nan_is_charged_for_the_halves_that_ran() -> None:
    # pass 0 gave NaN in its encoder: its decoder never ran, and those of the others did
    run = a_run(work={"1.jpg": strip_work(ALL, [1, 2, 3])}, strips=1)
    assert run.counts.tolist() == [[1, 0], [1, 1], [1, 1], [1, 1]]
    np.testing.assert_allclose(run.half_s[:, 1], [1.2, 1.2, 1.0, 1.0])
    assert estimate_s(run, ALL) == pytest.approx(7.7 * STRIPS)
    # member b alone: the same share, ⌈4 · 2 / 4⌉ encoders and ⌈3 · 2 / 4⌉ decoders
    assert estimate_s(run, [2, 3]) == pytest.approx((2 * 1.2 + 2 * 1.0) * STRIPS)


def test_a_pass_that_never_ran_costs_nothing() -> None:
    run = a_run(
        work={"1.jpg": strip_work([0, 1], [0, 1], passes=[0, 1])},
        networks={"a": {"encoder": 2.1, "decoder": 1.2}},
    )
    assert run.half_s[2:].tolist() == [[0, 0], [0, 0]]
    assert {drop.name: drop.saves_s for drop in list_drops(run, ALL)}["b"] == 0


# --- what could be dropped ------------------------------------------------------------------------


def test_flips_are_dropped_first_and_the_most_expensive_first() -> None:
    found = list_drops(a_run(), ALL)
    assert [drop.name for drop in found] == ["vertical", "b", "a"]
    assert found[1].saves_s == pytest.approx(estimate_s(a_run(), ALL) - estimate_s(a_run(), [0, 1]))
    assert [drop.name for drop in list_drops(a_run(), [0, 2])] == ["b", "a"]  # a flip stays
    assert list_drops(a_run(), [0]) == []


def test_what_is_dropped_to_fit_is_as_much_as_the_budget_asks() -> None:
    run, total_s = a_run(), project(a_run()).total_s
    (flip, *_) = list_drops(run, ALL)
    assert drop_to_fit(run, total_s, total_s) == []
    assert [drop.name for drop in drop_to_fit(run, total_s, total_s - 1)] == ["vertical"]
    found = drop_to_fit(run, total_s, total_s - flip.saves_s - 1)
    assert [drop.name for drop in found] == ["vertical", "b"]


def test_nothing_is_proposed_where_one_pass_alone_is_too_much() -> None:
    assert drop_to_fit(a_run(), project(a_run()).total_s, 1) == []


# --- what the kernel records ----------------------------------------------------------------------


class Calls:
    """Which halves of which passes really ran, counted beside the kernel's own record."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nan_of: tuple[Half, int] | None) -> None:
        self.ran: Counter[tuple[int, Half]] = Counter()
        run_encoder, run_decoder = Ensemble.run_encoder, Ensemble.run_decoder

        def encoder(self_: Ensemble, pass_id: int, images: Tensor) -> tuple[Tensor, ...]:
            self.ran[pass_id, Half.ENCODER] += 1
            gates, *features = run_encoder(self_, pass_id, images)
            spoilt = gates * float("nan") if nan_of == (Half.ENCODER, pass_id) else gates
            return spoilt, *features

        def decoder(self_: Ensemble, pass_id: int, encoded: Sequence[Tensor], size: Size) -> Tensor:
            self.ran[pass_id, Half.DECODER] += 1
            probabilities = run_decoder(self_, pass_id, encoded, size)
            return probabilities * float("nan" if nan_of == (Half.DECODER, pass_id) else 1)

        monkeypatch.setattr(Ensemble, "run_encoder", encoder)
        monkeypatch.setattr(Ensemble, "run_decoder", decoder)

    def check(self, record: dict[str, Any]) -> MeasuredRun:
        """The run that `record` is of, and what ran is charged: no more and no less."""
        run = MeasuredRun(parse_run_record(record, Path("run.json")))
        passes = range(len(run.record.passes))
        counts = [[self.ran[i, half] for half in Half] for i in passes]
        assert run.counts.tolist() == counts
        seconds = sum(s for halves in record["networks"].values() for s in halves.values())
        assert estimate_s(run, passes) == pytest.approx(
            (seconds / record["strips"] + run.per_strip_dropped_s) * STRIPS
        )
        if not record["dropped"]:
            assert run.per_strip_dropped_s == pytest.approx(0)
        return run


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    save_strips(folder, ["1.png", "2.png"])
    return folder


def test_a_run_names_its_passes_in_the_order_in_which_they_run(
    tiny_bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, None)
    record = predict(tiny_bundle / "dataset", images, tmp_path / "out.csv")
    ensemble = load_ensemble(
        tiny_bundle / "dataset", load_manifest(tiny_bundle / "dataset"), CPU, Stages(), None
    )
    specs = [(p.member, p.flip, *ensemble.members[p.member].spec.flops) for p in ensemble.passes]
    assert [(p["member"], p["flip"], *p["flops"]) for p in record["passes"]] == specs
    assert calls.check(record).record.passes == ensemble.passes
    assert len(ensemble.passes) == 9
    assert 0 < sum(record["strip_s"].values()) < record["seconds"]
    assert record["strip_s"].keys() == record["work"].keys()


def test_a_missing_member_is_never_charged(
    dataset: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dataset / "fpn-b.safetensors").unlink()  # the cheapest: the first of all passes
    calls = Calls(monkeypatch, None)
    record = predict(dataset, images, tmp_path / "out.csv", allow_missing_members=True)
    run = calls.check(record)
    assert {each.member for each in run.record.passes} == {"unet-a", "unet-c"}
    assert {drop.name for drop in list_drops(run, range(6))} == {
        "horizontal", "vertical", "unet-a", "unet-c",
    }  # fmt: skip


def test_a_flip_that_the_deadline_dropped_is_not_charged(
    tiny_bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, None)

    def without_horizontal(self: Deadline, passes: Sequence[Pass]) -> list[int]:
        all_kept = self.strips_left == 2
        kept = [i for i, each in enumerate(passes) if each.flip != "horizontal" or all_kept]
        self.dropped.update(str(each) for i, each in enumerate(passes) if i not in kept)
        return kept

    monkeypatch.setattr(Deadline, "select_passes", without_horizontal)
    record = predict(tiny_bundle / "dataset", images, tmp_path / "out.csv", early_exit=False)
    run = calls.check(record)
    passes = run.record.passes
    flips = {each.flip: run.counts[i].tolist() for i, each in enumerate(passes)}
    assert flips == {"none": [2, 2], "horizontal": [1, 1], "vertical": [2, 2]}
    horizontal = [each.flip == "horizontal" for each in passes]
    assert run.per_strip_dropped_s == pytest.approx(run.half_s[horizontal].sum() / 2)


@pytest.mark.parametrize("half", Half)
def test_a_pass_of_nan_is_charged_for_what_ran(
    half: Half, tiny_bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, nan_of=(half, 1))
    record = predict(tiny_bundle / "dataset", images, tmp_path / "out.csv", early_exit=False)
    run = calls.check(record)
    assert (run.counts == 2).all()
