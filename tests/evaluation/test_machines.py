"""What the scored run would take on Kaggle's machines: assumed, or at the rate of a run there."""

import json
from pathlib import Path

import pytest
from run_records import PASSES, TRUNCATED, a_record, a_run, repeat, run_json, strip_work

from evaluation.machines import keep_rate, list_estimates, read_rates
from evaluation.measured import MeasuredRun

STRIPS = 5506


def test_a_run_of_which_a_worker_s_record_is_missing_has_no_rate(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(run_json(strips=6)))
    with pytest.raises(ValueError, match=r"run\.json: of 2 of 6 strips it does not say what ran"):
        keep_rate(tmp_path, tmp_path / "run.json")


def test_a_rate_is_that_of_what_ran(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(repeat(run_json(**TRUNCATED, device="cuda"), 50)))
    keep_rate(tmp_path, tmp_path / "run.json")
    assert read_rates(tmp_path)["one T4"]["rate"] == pytest.approx((200 + 100) / 4 / 3)


def test_what_was_dropped_here_is_in_the_flops_of_kaggle_s_machines() -> None:
    full_flops = 2 * (10 + 20 + 30 + 40) * 2 / 3
    known = {"one T4": {"rate": 1e3, "fixed_s": 8.0, "strips": 9}}
    found = {each.machine: each.seconds for each in list_estimates(a_run(**TRUNCATED), known)}
    assert found["one T4"] == pytest.approx(8 + STRIPS * full_flops / 1e3)
    added = STRIPS * full_flops / (141e9 * 0.5)
    assert found["Kaggle's CPU"] == pytest.approx(8 + STRIPS * 0.5 / 3 + added, abs=1e-9)


def test_the_interval_is_that_of_other_strips_of_the_same_kind() -> None:
    """Of many strips the normal one, by hand; what is not the networks has none."""
    one, two = strip_work([0], []), strip_work([0], [0])  # 10 flops, and 10 + 20
    work = {f"{i}.jpg": one if i % 4 else two for i in range(400)}
    known = {"one T4": {"rate": 1e3, "fixed_s": 8.0, "strips": 9}}
    run = a_run(work=work, strips=400, faults={}, strip_s={})
    half = 1.96 * 20 * (0.25 * 0.75 / 400) ** 0.5  # flops
    for found in list_estimates(run, known):
        flop_s = STRIPS / 1e3
        if found.machine != "one T4":
            flop_s = STRIPS / (2 * 65e12 * 0.135 if found.machine == "2×T4" else 141e9 * 0.5)
        assert found.low_s is not None and found.high_s is not None
        assert (found.seconds - found.low_s) / flop_s == pytest.approx(half, rel=0.15)
        assert (found.high_s - found.seconds) / flop_s == pytest.approx(half, rel=0.15)


def test_of_one_strip_there_is_no_interval() -> None:
    for found in list_estimates(a_run(**TRUNCATED), {}):
        assert (found.low_s, found.high_s) == (None, None)


def test_flops_are_those_of_the_images_size_but_for_a_rate_that_was_measured_by_others() -> None:
    """A run on Kaggle has images of that size too, and flops as the build counted them."""
    known = {"one T4": {"rate": 1e3, "fixed_s": 8.0, "strips": 9}}
    record, beside = a_record(), 0.5 / 4
    run = MeasuredRun(record, STRIPS, {"b": [40 * 30, 40 * 40]})
    flops = 6 * 10 + 4 * 20 + 40 * (5 * 30 + 3 * 40)
    found = {each.machine: each for each in list_estimates(run, known)}
    as_built = {each.machine: each for each in list_estimates(MeasuredRun(record), known)}
    assert found["one T4"] == as_built["one T4"]
    added = STRIPS * flops / 4 / (141e9 * 0.5)
    assert found["Kaggle's CPU"].seconds - 8 - STRIPS * beside == pytest.approx(added, rel=1e-3)


def test_an_assumed_machine_takes_its_flops_and_the_stages_beside_the_networks() -> None:
    # (3 + 3) · 10 + (2 + 2) · 20 + (3 + 2) · 30 + (2 + 1) · 40 flops of four strips
    run = a_run()
    assert run.strip_flops == pytest.approx(410 / 4)
    found = {each.machine: each for each in list_estimates(run, {})}
    one, beside = found["one T4"], 0.5 / 4
    assert one.seconds == pytest.approx(8 + STRIPS * (beside + 410 / 4 / (65e12 * 0.15 * 0.9)))
    assert not one.calibrated
    assert found["2×T4"].seconds - 8 == pytest.approx((one.seconds - 8) / 2)
    workers = list_estimates(a_run(workers=2), {})  # each of them decodes half of the strips
    assert workers[0].seconds - 8 == pytest.approx(one.seconds - 8)


@pytest.mark.parametrize(("device", "tally_s"), [("cpu", 0.0), ("cuda", 4.0)])
def test_a_gpu_is_not_charged_for_the_sums_of_a_cpu(device: str, tally_s: float) -> None:
    more = {"tally": 4.0, "rle": 2.0}
    before, after = a_run(device=device), a_run(device=device, stages=run_json()["stages"] | more)
    for machine, was, found in zip(
        ("2×T4", "one T4", "Kaggle's CPU"),
        list_estimates(before, {}),
        list_estimates(after, {}),
        strict=True,
    ):
        assert was.machine == found.machine == machine
        added = 6.0 if machine == "Kaggle's CPU" else 2.0 + tally_s
        units = 2 if machine == "2×T4" else 1
        assert found.seconds - was.seconds == pytest.approx(added / 4 * STRIPS / units)


@pytest.mark.parametrize(
    ("device", "workers", "machine"),
    [("cuda", 2, "2×T4"), ("cuda", 1, "one T4"), ("cpu", 1, "Kaggle's CPU")],
)
def test_a_run_on_kaggle_replaces_the_assumption_and_is_remembered(
    device: str, workers: int, machine: str, tmp_path: Path
) -> None:
    path = tmp_path / "from_kaggle.json"
    record = repeat(run_json(device=device, workers=workers, seconds=10.0))
    path.write_text(json.dumps(record))
    assert keep_rate(tmp_path, path) == machine
    assert (tmp_path / "calibration.json").is_file()
    for found in list_estimates(a_run(), read_rates(tmp_path)):
        assert found.calibrated == (found.machine == machine)
        if found.calibrated:  # the same flops at the rate of (10 − 8) / 4 seconds a strip
            assert found.seconds == pytest.approx(8 + STRIPS * 0.5)


def test_a_rate_by_other_members_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run_json()))
    keep_rate(tmp_path, path)
    larger = [entry | {"flops": [30, 41]} if entry["member"] == "b" else entry for entry in PASSES]
    for passes, how in (
        (PASSES, "calibrated"), (PASSES[::2], "calibrated"),  # a flip less is as fast
        (PASSES[:2], "calibrated by other members"), (larger, "calibrated by other members"),
    ):  # fmt: skip
        run = a_run(passes=passes, work={"1.jpg": strip_work([0], [], passes=[0])})
        *_, cpu = list_estimates(run, read_rates(tmp_path))
        assert (cpu.how, cpu.calibrated) == (how, True)
        assert ("of 4 strips by other members" in cpu.basis) == (how != "calibrated")


def test_a_run_of_few_strips_on_a_gpu_is_mostly_its_start(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(repeat(run_json(device="cuda"), 24)))
    words = "of 96 strips, of which a GPU's start is most of the seconds; give that of a run of 100"
    with pytest.raises(ValueError, match=words):
        keep_rate(tmp_path, path)
    path.write_text(json.dumps(repeat(run_json(), 24)))
    assert keep_rate(tmp_path, path) == "Kaggle's CPU"


def test_a_second_machine_does_not_forget_the_first_and_the_last_stands_last(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.json"
    for device, known in (
        ("cuda", ["one T4"]),
        ("cpu", ["one T4", "Kaggle's CPU"]),
        ("cuda", ["Kaggle's CPU", "one T4"]),
    ):
        path.write_text(json.dumps(repeat(run_json(device=device))))
        keep_rate(tmp_path, path)
        assert list(read_rates(tmp_path)) == known


def test_a_run_that_was_not_on_kaggle_is_no_measurement_of_its_machine(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run_json(kaggle=False)))
    with pytest.raises(ValueError, match=f"{path}: not of a run on Kaggle"):
        keep_rate(tmp_path, path)
    path.write_text(json.dumps(run_json(kaggle=True)))
    assert keep_rate(tmp_path, path) == "Kaggle's CPU"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"strips": 3}', r"run\.json: not a run\.json of this kernel"),
        (json.dumps(run_json(passes=[["a", "none", 1, 2]])), "not a run.json of this kernel"),
        (json.dumps(run_json(networks={"a": {"middle": 1.0}})), "not a run.json of this kernel"),
        (json.dumps(run_json(work={}, passes=PASSES)), "no strip was predicted"),
    ],
    ids=["another file", "an older kernel's passes", "a third half", "no strip predicted"],
)
def test_a_file_that_has_no_rate_calibrates_nothing(text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=error):
        keep_rate(tmp_path, path)
    assert not (tmp_path / "calibration.json").exists()
