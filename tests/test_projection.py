"""The hour: what a run's seconds become for 5,506 strips, on other machines and with less to do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernel.ensemble import Ensemble
from kernel.logs import Stages
from kernel.manifest import load_manifest
from kernel.projection import (
    MACHINES,
    Run,
    assume,
    calibrate,
    drop_to_fit,
    drops,
    estimates,
    kept_s,
    project,
    read_calibration,
    read_run,
)
from kernel.report import check_time, stage_rows

STRIPS = 5506


def told(**changes: Any) -> dict[str, Any]:
    """A run.json: two members, two flips, a clean strip, one half-way, a full one, and a fault."""
    return {
        "seconds": 20.0,
        "strips": 4,
        "stages": {
            "start": 1.0, "import": 2.0, "load": 3.0, "check": 2.0, "decode": 0.5,
            "networks/a/encoder": 2.1, "networks/a/decoder": 1.2,
            "networks/b/encoder": 2.4, "networks/b/decoder": 2.0,
        },
        "passes": [["a", "none", 10, 20], ["a", "vertical", 10, 20],
                   ["b", "none", 30, 40], ["b", "vertical", 30, 40]],
        "work": {
            "1.jpg": {"encoders": 3, "decoders": 0, "share": 0.25},
            "2.jpg": {"encoders": 4, "decoders": 3, "share": 0.8},
            "3.jpg": {"encoders": 4, "decoders": 4, "share": 1.0},
        },
        "strip_s": {"1.jpg": 2.0, "2.jpg": 4.0, "3.jpg": 5.0},
        "faults": {"4.jpg": "no image"},
        "left_out": {},
        "device": "cpu",
        "workers": 1,
    } | changes  # fmt: skip


def a_run(**changes: Any) -> Run:
    return read_run(told(**changes), Path("run.json"))


def test_start_up_is_paid_once_and_every_strip_again() -> None:
    projection = project(a_run())
    assert projection.once_s == 8
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
        work={name: {"encoders": 4, "decoders": 4} for name in names},
    )
    projection = project(run)
    half = 1.96 * seconds.std() / 400**0.5 * STRIPS
    assert projection.total_s == pytest.approx(8 + STRIPS * seconds.mean())
    assert projection.low_s == pytest.approx(projection.total_s - half, abs=0.15 * half)
    assert projection.high_s == pytest.approx(projection.total_s + half, abs=0.15 * half)


def test_two_workers_share_the_strips() -> None:
    """Their seconds for a strip are twice the wall's, and the projection is the wall's."""
    one, two = a_run(), a_run(strip_s={"1.jpg": 4.0, "2.jpg": 8.0, "3.jpg": 10.0}, workers=2)
    assert project(one) == project(two)
    assert kept_s(one, [0, 1, 2, 3]) == pytest.approx(kept_s(two, [0, 1, 2, 3]))


def test_every_half_of_every_pass_is_counted() -> None:
    # encoders 3, 4, 4 and decoders 0, 3, 4 of four passes
    assert a_run().counts.tolist() == [[3, 2], [3, 2], [3, 2], [2, 1]]


def test_the_seconds_of_one_half_are_those_of_its_member_by_its_count() -> None:
    expected = [[2.1 / 6, 1.2 / 4]] * 2 + [[2.4 / 5, 2.0 / 3]] * 2
    np.testing.assert_allclose(a_run().half_s, expected)


def test_keeping_all_passes_takes_the_seconds_that_the_networks_took() -> None:
    assert kept_s(a_run(), [0, 1, 2, 3]) == pytest.approx(7.7 / 4 * STRIPS)


def test_a_member_less_leaves_the_same_share_of_the_other_s_passes() -> None:
    # encoders 3, 4, 4 of four become 2, 2, 2 of two; decoders 0, 3, 4 become 0, 2, 2
    expected = (6 * 0.35 + 4 * 0.3) / 4 * STRIPS
    assert kept_s(a_run(), [0, 1]) == pytest.approx(expected)


def test_what_could_be_dropped_flips_first_and_dearest_first() -> None:
    found = drops(a_run(), [0, 1, 2, 3])
    assert [drop.name for drop in found] == ["vertical", "b", "a"]
    assert found[1].saves_s == pytest.approx(
        kept_s(a_run(), [0, 1, 2, 3]) - kept_s(a_run(), [0, 1])
    )
    assert [drop.name for drop in drops(a_run(), [0, 2])] == ["b", "a"]  # the last flip stays
    assert drops(a_run(), [0]) == []


def test_dropping_goes_on_until_the_budget_fits() -> None:
    run = a_run()
    whole = project(run).total_s
    assert drop_to_fit(run, whole, whole) == []
    assert [drop.name for drop in drop_to_fit(run, whole, whole - 1)] == ["vertical"]
    assert [drop.name for drop in drop_to_fit(run, whole, 0)] == ["vertical", "b"]  # one is left


def test_the_verdict_follows_the_budget() -> None:
    projection = project(a_run())
    assert check_time(projection, projection.total_s + 1).ok
    assert not check_time(projection, projection.total_s - 1).ok


def test_the_rows_of_the_stages_sum_up_to_the_run() -> None:
    rows = {row["stage"]: row["seconds"] for row in stage_rows(a_run())}
    assert rows["encoders"] == pytest.approx(4.5)
    assert rows["decoders"] == pytest.approx(3.2)
    assert rows["start"] == 1
    assert sum(rows.values()) == pytest.approx(20)


def test_an_assumed_machine_takes_its_flops_and_what_is_not_the_networks() -> None:
    # (3 + 3) · 10 + (2 + 2) · 20 + (3 + 2) · 30 + (2 + 1) · 40 flops of four strips
    t4 = next(machine for machine in MACHINES if machine.name == "one T4")
    run = a_run()
    assert run.strip_flops == pytest.approx(410 / 4)
    found = assume(t4, run)
    beside = 3 - 7.7 / 4
    assert found.seconds == pytest.approx(8 + STRIPS * (beside + 410 / 4 / (65e12 * 0.15)))
    assert not found.measured
    both = assume(next(machine for machine in MACHINES if machine.name == "2×T4"), run)
    assert both.seconds - 8 == pytest.approx((found.seconds - 8) / 2)


@pytest.mark.parametrize(
    ("device", "workers", "machine"),
    [("cuda", 2, "2×T4"), ("cuda", 1, "one T4"), ("cpu", 1, "Kaggle's CPU")],
)
def test_a_real_run_replaces_the_assumption_and_is_remembered(
    device: str, workers: int, machine: str, tmp_path: Path
) -> None:
    path = tmp_path / "from_kaggle.json"
    path.write_text(json.dumps(told(device=device, workers=workers, seconds=10.0)))
    assert calibrate(tmp_path, path) == machine
    assert (tmp_path / "calibration.json").is_file()
    for found in estimates(a_run(), read_calibration(tmp_path)):
        assert found.measured == (found.machine == machine)
        if found.measured:  # the same flops at the rate of (10 − 8) / 4 seconds a strip
            assert found.seconds == pytest.approx(8 + STRIPS * 0.5)


def test_a_second_machine_does_not_forget_the_first(tmp_path: Path) -> None:
    for device in ("cuda", "cpu"):
        path = tmp_path / "run.json"
        path.write_text(json.dumps(told(device=device)))
        calibrate(tmp_path, path)
    assert sorted(read_calibration(tmp_path)) == ["Kaggle's CPU", "one T4"]


def test_another_file_calibrates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"strips": 3}')
    with pytest.raises(ValueError, match=r"run\.json: not a run\.json of this kernel"):
        calibrate(tmp_path, path)
    assert not (tmp_path / "calibration.json").exists()


def test_a_run_names_its_passes_in_the_order_in_which_they_run(tiny_bundle: Path) -> None:
    from kernel.engines import pick_device
    from kernel.ensemble import load_ensemble
    from kernel.inference import run
    from kernel.mounts import Options
    from weights import steel

    images = tiny_bundle.parent / "one"
    steel.write_competition(images, train=0, test=1, seed=3, size=(64, 96))
    dataset = tiny_bundle / "dataset"
    report = run(
        Options(
            bundle=dataset, images=images / "test_images", output=tiny_bundle.parent / "out.csv"
        )
    )
    ensemble = load_ensemble(dataset, load_manifest(dataset), pick_device(), Stages())
    assert isinstance(ensemble, Ensemble)
    expected = [[m.spec.name, flip, *m.spec.flops] for m, flip in ensemble.passes]
    assert report["passes"] == expected
    assert 0 < sum(report["strip_s"].values()) < report["seconds"]
    assert report["strip_s"].keys() == report["work"].keys()
