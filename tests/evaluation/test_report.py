"""The report: the same numbers as a page, as lines and as JSON, and a page that needs nothing."""

import base64
import json
import re
from dataclasses import asdict, replace
from typing import Any

import cv2
import numpy as np
import pytest
from helpers import Page
from run_records import PASSES, a_record, a_run, strip_work

from evaluation.checks import Check, ProcessResult, check_process, check_record
from evaluation.drawing import AnnotatedStrip
from evaluation.report import Report, as_page, build_report, list_stages
from evaluation.report_text import ablation_table, as_lines
from kernel.files import json_text
from kernel.shipped import find_competition
from kernel.strip_state import TOO_LATE

RESULT = ProcessResult(exit_code=0, seconds=20.0, network_denied=True, peak_bytes=2_500_000_000)
VALID = Check(True, "submission.csv is valid: 12 rows")
DICE = {"dice": 0.91, "dice_non_empty": 0.42, "clean_left_empty": 1.0, "per_class": {"3": 0.37}}
FAST = {"2×T4": {"rate": 1e3, "fixed_s": 8.0, "strips": 9}}  # 102.5 flops a strip: 572 s
SLOW = {"2×T4": {"rate": 1e2, "fixed_s": 8.0, "strips": 9}}  # 5,652 s


def a_report(
    result: ProcessResult = RESULT,
    dice: Any = DICE,
    budget_s: float = 3600,
    ablation: Any = None,
    calibration: Any = FAST,
    answer: Check = VALID,
    on_gpu: bool = True,
    **changes: Any,
) -> Report:
    """The report of `run_json`, whose one fault is gone unless `changes` says otherwise."""
    run = a_run(**{"faults": {}} | changes)
    defective = np.array([False, True, True][: len(run.work)])
    checks = [*check_process(result), *check_record(run.record), answer]
    report = build_report(run, result, checks, defective, calibration, budget_s, on_gpu=on_gpu)
    return replace(report, dice=dice, ablation=ablation)


def a_picture() -> AnnotatedStrip:
    canvas = np.random.default_rng(1).integers(0, 255, (64, 96, 3), np.uint8)
    return AnnotatedStrip("2.jpg", canvas, [3], 0.5)


# --- the page -------------------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself() -> None:
    text = as_page(a_report(), [a_picture()])
    page = Page(text)
    assert page.open == []
    places = [
        a[name] for _, a in page.tags for name in ("src", "href", "srcset", "data") if name in a
    ]
    assert len(places) == 2  # the icon and the picture
    assert all(place.startswith("data:") for place in places)
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert not re.search(r"//|url\(|@import", re.sub(r'src="data:[^"]*"', "", text))


# --- the answer -----------------------------------------------------------------------------------


def test_the_page_begins_with_the_verdict_and_its_parts() -> None:
    report = a_report()
    page = Page(as_page(report, []))
    assert page.said("title") == page.said("h1") == [report.verdict]
    checks = [check.words for check in report.clean.checks]
    assert page.said("li") == [*checks, report.kaggle.words, report.here.words]
    assert page.said("h2")[:3] == ["The run was clean", "On Kaggle's 2×T4", "On this machine"]
    order = [tag for tag, _ in page.tags]
    assert order.index("h1") < order.index("h2")


READY_FOR = "Ready for Kaggle: the run was clean, and 2×T4 would take {} ({})"
READY = READY_FOR.format("572 s of 3,324 s", "calibrated")
FEW = "; 3 strips are too few to be sure"
FEW_WHOLE = "; 1 strip is too few to be sure"  # for which no pass was dropped
TOO_LONG = "Not ready for Kaggle: the run was clean, but 2×T4 would take {} ({}) and drop passes"
NOT_CLEAN = "Not ready for Kaggle: the run was not clean"


DROPPED: dict[str, Any] = {  # all for the first strip; 150 flops a strip with every pass, 115 ran
    "seconds": 10.0,
    "networks": {"a": {"encoder": 0.2, "decoder": 0.1}, "b": {"encoder": 0.2, "decoder": 0.2}},
    "dropped": {"b/vertical": 2},
    "work": {
        "1.jpg": strip_work([0, 1, 2, 3], [0, 1, 2, 3]),
        "2.jpg": strip_work([0, 1, 2], [0, 1, 2], passes=[0, 1, 2]),
        "3.jpg": strip_work([0, 1, 2], [0, 1, 2], passes=[0, 1, 2]),
    },
}


@pytest.mark.parametrize(
    ("changes", "verdict", "ready", "marks"),
    [
        pytest.param({}, READY, True, "✓✓✓✓✓–", id="too long here only"),
        pytest.param({"budget_s": 1e9}, READY, True, "✓✓✓✓✓–", id="too long here for the hour"),
        pytest.param({"seconds": 10.0}, READY, True, "✓✓✓✓✓✓", id="in time here as well"),
        pytest.param(
            {"calibration": {}}, READY_FOR.format("352 s of 3,324 s", "estimated"),
            True, "✓✓✓✓✓–", id="no run on Kaggle is known",
        ),
        pytest.param(
            {"seconds": 10.0, "budget_s": 500.0},
            TOO_LONG.format("572 s of 429 s", "calibrated") + FEW,
            False, "✓✓✓✓✗–", id="beyond the budget there",
        ),
        pytest.param(
            {"seconds": 10.0, "calibration": SLOW},
            TOO_LONG.format("5,652 s of 3,324 s", "calibrated") + FEW,
            False, "✓✓✓✓✗✓", id="too long there only",
        ),
        pytest.param(
            {"seconds": 10.0, "calibration": SLOW, "budget_s": 1e9},
            TOO_LONG.format("5,652 s of 3,324 s", "calibrated") + FEW,
            False, "✓✓✓✓✗✓", id="the hour counts, whatever the budget",
        ),
        pytest.param(
            {"seconds": 10.0, "budget_s": 2900.0},
            READY_FOR.format("572 s of 2,671 s", "calibrated"),
            True, "✓✓✓✓✓–", id="beyond the budget here only",
        ),
        pytest.param({"faults": {"4.jpg": "no image"}}, NOT_CLEAN, False, "✓✓✗✓✓–", id="a fault"),
        pytest.param(
            {"answer": Check(False, "submission.csv is invalid")}, NOT_CLEAN, False, "✓✓✓✗✓–",
            id="Kaggle would refuse the submission",
        ),
        pytest.param(
            DROPPED, READY_FOR.format("834 s of 3,324 s", "calibrated") + FEW_WHOLE, True,
            "✓✓✓–✓––", id="passes were dropped here",
        ),
        pytest.param(
            DROPPED | {"calibration": {"2×T4": FAST["2×T4"] | {"rate": 220.0}}},
            TOO_LONG.format("3,762 s of 3,324 s", "calibrated") + FEW_WHOLE, False, "✓✓✓–✓✗–",
            id="passes were dropped here, and all of them are too long there",
        ),
        pytest.param(
            {"seconds": 10.0, "faults": {"4.jpg": TOO_LATE}},
            READY_FOR.format("760 s of 3,324 s", "calibrated"), True, "✓✓✓–✓✓–",
            id="no time was left here for a strip",
        ),
        pytest.param(
            {"calibration": {"2×T4": FAST["2×T4"] | {"rate": 220.0}}},
            READY_FOR.format("2,573 s of 3,324 s", "calibrated") + FEW, True, "✓✓✓✓––",
            id="in time there, but other strips may not be",
        ),
        pytest.param(
            {"seconds": 10.0, "strips": 8, "faults": dict.fromkeys("4567", TOO_LATE)},
            READY_FOR.format("572 s of 3,324 s", "calibrated"), True, "✓✓✓–✓✓–",
            id="no time was left here for half of the strips",
        ),
        pytest.param(
            {"seconds": 10.0, "strips": 9, "faults": dict.fromkeys("45678", TOO_LATE)},
            READY_FOR.format("572 s of 3,324 s", "calibrated")
            + "; judged by 4 of 9 strips alone: no time was left here for the others",
            True, "✓✓✓–✓✓–", id="no time was left here for most strips",
        ),
        pytest.param(
            {"faults": {"4.jpg": TOO_LATE, "5.jpg": "no image"}}, NOT_CLEAN, False, "✓✓✗–✓✓–",
            id="nor could another be read",
        ),
        pytest.param(
            {"non_empty": 0}, READY.replace(":", ", but every mask is empty:", 1), True, "✓✓✓✓✓–",
            id="every mask is empty",
        ),
        pytest.param(
            {"non_empty": 0, "seconds": 10.0, "budget_s": 500.0},
            TOO_LONG.format("572 s of 429 s", "calibrated").replace(
                ":", ", and every mask is empty:", 1
            ) + FEW,
            False, "✓✓✓✓✗–", id="every mask is empty, and it is too long there",
        ),
        pytest.param(
            {"result": ProcessResult(3, 10.0, True, 1)}, NOT_CLEAN, False, "✗✓✓✓✓–", id="exit code"
        ),
        pytest.param(
            {"result": ProcessResult(0, 10.0, False, 1)}, READY, True, "✓–✓✓✓–",
            id="the network could not be denied",
        ),
    ],
)  # fmt: skip
def test_the_verdict(changes: dict[str, Any], verdict: str, ready: bool, marks: str) -> None:
    report = a_report(**changes)
    assert (report.verdict, report.ready) == (verdict, ready)
    assert report.clean.ok == (verdict != NOT_CLEAN)
    page = Page(as_page(report, []))
    assert "".join(page.said("b")) == marks
    assert ("good" if ready else "bad") in [a.get("class") for t, a in page.tags if t == "header"]
    head = as_lines(report).split("stage")[0]
    assert head.startswith(f"== {verdict}\n")
    said = re.findall(r"^   (ok|NO|–) ", head, re.MULTILINE)
    assert said == [{"✓": "ok", "✗": "NO", "–": "–"}[mark] for mark in marks]


def test_run_kaggle_and_this_machine_are_kept_apart_with_the_hour_beside() -> None:
    report = a_report()
    page, head = Page(as_page(report, [])), as_lines(report).split("stage")[0].splitlines()
    assert report.kaggle.words == (
        "5,506 strips would take 572 s (214–834 s); "
        "the kernel plans with 3,324 s of the hour's 3,600 s"
    )
    assert report.here.words.startswith("5,506 strips would take 16,526 s (")
    assert report.here.words.endswith(
        " s), so here the kernel would drop passes to end in time; Kaggle's machine decides"
    )
    assert [line.strip() for line in head if line.startswith(("   The", "   On"))] == [
        "The run was clean", "On Kaggle's 2×T4, calibrated", "On this machine, projected",
    ]  # fmt: skip
    assert page.said("span")[:2] == ["calibrated", "projected"]
    assert not [a for t, a in page.tags if t == "li" and a.get("class") == "bad"]


def test_the_verdict_is_of_the_gpus_that_were_calibrated_last() -> None:
    slow = {"one T4": {"rate": 1e2, "fixed_s": 8.0, "strips": 9}}
    assert a_report(calibration=FAST | slow).kaggle.machine == "one T4"
    assert a_report(calibration=slow | FAST).kaggle.machine == "2×T4"


def test_the_verdict_is_of_the_cpu_only_where_the_kernel_asks_for_no_gpu() -> None:
    """Whatever was calibrated last: a run there may have fallen to the CPU once."""
    slow = {"rate": 1e2, "fixed_s": 8.0, "strips": 9}
    calibration = FAST | {"Kaggle's CPU": slow}
    assert a_report(calibration=calibration).ready
    assert a_report(calibration={"Kaggle's CPU": slow}).kaggle.machine == "2×T4"
    report = a_report(calibration=calibration, on_gpu=False)
    expected = f"5,652 s of 3,410 s (calibrated) and drop passes{FEW}"
    assert report.verdict.endswith(f"but Kaggle's CPU would take {expected}")
    assert not report.ready
    assert "   On Kaggle's CPU, calibrated\n" in as_lines(report)
    assert "On Kaggle's CPU" in Page(as_page(report, [])).said("h2")


def test_of_one_strip_no_interval_is_named_and_it_is_too_few_to_be_sure() -> None:
    report = a_report(strip_s={"1.jpg": 2.0}, work={"1.jpg": strip_work([0], [])}, strips=1)
    words = report.here.words
    assert words.startswith("5,506 strips would take 66,080 s, so here the kernel would drop")
    assert (report.kaggle.fits, report.kaggle.sure) == (True, False)
    assert report.kaggle.words.endswith("; so few have no interval: give more --images to be sure")
    assert report.verdict.endswith("; 1 strip is too few to be sure")


@pytest.mark.parametrize(
    ("device", "strips", "few"), [("cuda", 99, True), ("cuda", 100, False), ("cpu", 99, False)]
)
def test_of_few_strips_on_a_gpu_its_start_is_named(device: str, strips: int, few: bool) -> None:
    words = a_report(device=device, strips=strips).here.words
    assert words.endswith("; of so few strips a GPU's start is most: give --images of 100") == few


EVERY_PASS = {f"{i}.jpg": strip_work([0, 1, 2, 3], [0, 1, 2, 3]) for i in range(3)}  # 834 s


def test_a_budget_is_named_as_one_that_the_pushed_kernel_does_not_know() -> None:
    drops = ", so it would drop passes there to end in time"
    for budget_s, outcome in ((2000.0, ""), (500.0, drops)):
        kaggle = a_report(budget_s=budget_s, work=EVERY_PASS).kaggle
        assert kaggle.words.endswith(
            f"; of the budget's {budget_s:,.0f} s it would plan with {kaggle.usable_s:,.0f} s"
            f"{outcome}; the kernel as built plans with the description's time_limit_s, 3,600 s: "
            "to change that set it there and build again"
        )
    assert "time_limit_s" not in a_report(budget_s=3600.0).kaggle.words


def test_an_interval_that_the_plan_lies_in_leaves_open_whether_there_is_time() -> None:
    near, far = FAST["2×T4"] | {"rate": 220.0}, FAST["2×T4"]
    for rate, sure in ((near, False), (far, True)):
        kaggle = a_report(calibration={"2×T4": rate}).kaggle
        assert (kaggle.fits, kaggle.sure) == (True, sure)
        said = kaggle.words.endswith(
            "; 3,324 s lies within the interval: give more --images to be sure"
        )
        assert said is not sure


def test_a_rate_that_is_assumed_is_sure_only_far_from_the_limit() -> None:
    """A run there, of the same seconds, is."""
    for flops, fits, sure in ((10**9, True, True), (10**12, True, False), (10**13, False, False)):
        passes = [entry | {"flops": [flops, flops]} for entry in PASSES]
        estimated = a_report(calibration={}, work=EVERY_PASS, passes=passes)
        assert (estimated.kaggle.fits, estimated.kaggle.sure) == (fits, sure)
        words = "; the rate is assumed, a network's may be 5 times lower"
        assert estimated.verdict.endswith(words) is not sure
        said = estimated.kaggle.words.endswith(f"{words}, or higher: --calibrate it to be sure")
        assert said is not sure
        rate = {"rate": 8 * flops * 5506 / estimated.kaggle.seconds, "fixed_s": 0.0, "strips": 9}
        assert a_report(calibration={"2×T4": rate}, work=EVERY_PASS, passes=passes).kaggle.sure


def test_an_interval_without_width_is_not_shown() -> None:
    words = a_report(work=EVERY_PASS).kaggle.words
    assert words.startswith("5,506 strips would take 834 s; the kernel plans")


@pytest.mark.parametrize(
    ("machine", "device", "workers", "plan_s"),
    [
        ("Kaggle's CPU", "cpu", 1, 3410.0),
        ("one T4", "cuda", 1, 3324.5),
        ("2×T4", "cuda", 2, 3324.5),
    ],
)
def test_time_is_enough_up_to_what_the_kernel_plans_with_there(
    machine: str, device: str, workers: int, plan_s: float
) -> None:
    """Here and on Kaggle; 5,506 strips in it, 8 s of it before the first."""
    for more_s, fits in ((-0.001, True), (0.001, False)):
        strip_s = (plan_s - 8) / 5506 + more_s
        here = a_report(device=device, workers=workers, seconds=8 + 4 * strip_s).here
        assert (here.usable_s, here.fits) == (plan_s, fits)
        known = {machine: {"rate": 102.5 / strip_s, "fixed_s": 8.0, "strips": 9}}
        machines = {each.machine: each for each in a_report(calibration=known).machines}
        assert machines[machine].seconds == pytest.approx(8 + 5506 * strip_s)
        assert (machines[machine].usable_s, machines[machine].fits) == (plan_s, fits)


def test_where_passes_were_dropped_there_is_never_time_for_all_here() -> None:
    here = a_report(**DROPPED).here
    assert here.total_s < here.usable_s
    assert not here.fits
    words = "with every pass, and in this run passes were dropped; Kaggle's machine decides"
    assert here.words.endswith(words)


def test_what_was_dropped_is_named() -> None:
    dropped = {"b/vertical": 2, "b/none": 1}
    words = "b/none, b/vertical were dropped for up to 2 strips"
    assert words in as_lines(a_report(dropped=dropped))


# --- the numbers ----------------------------------------------------------------------------------


def test_the_rows_of_the_stages_sum_up_to_the_run() -> None:
    rows = {row.stage: row.seconds for row in list_stages(a_record())}
    assert list(rows)[:4] == ["start", "import", "load", "engines' check"]
    assert rows["encoders"] == pytest.approx(4.5)
    assert rows["decoders"] == pytest.approx(3.2)
    assert rows["start"] == 1
    assert sum(rows.values()) == pytest.approx(20)


def test_a_mean_of_nothing_is_null_in_the_json_and_a_dash_on_the_page() -> None:
    nothing = float("nan")
    report = a_report(dice=DICE | {"dice_non_empty": nothing, "per_class": {}})

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    found = json.loads(json_text(asdict(report)), parse_constant=refuse)
    assert found["dice"] == DICE | {"dice_non_empty": None, "per_class": {}}
    assert found["run"] == asdict(report.run)
    assert "–" in Page(as_page(report, [])).said("span")


def test_a_mean_of_nothing_is_a_dash_on_the_terminal() -> None:
    nothing = {"dice_non_empty": float("nan"), "clean_left_empty": float("nan")}
    row = {"name": "all", "strip_s": 4.25, "best": BEST | {"dice_non_empty": float("nan")}}
    found = ABLATION | {"variants": [row | DICE | nothing], "proposed": "all"}
    lines = as_lines(a_report(dice=DICE | nothing))
    assert "Dice 0.910 over all pairs, – over those with a defect, class 3 0.370; – of" in lines
    (line,) = [line for line in ablation_table(found).splitlines() if line.endswith("← proposed")]
    assert line.split() == [
        "all", "0.9100", "–", "–", "4.250", "0.8750", "–", "0.4", "64", "←", "proposed",
    ]  # fmt: skip


def test_a_bar_is_as_long_as_its_seconds() -> None:
    page = Page(as_page(a_report(dice=None), []))
    # member a 2.1 + 1.2 s, b 2.4 + 2.0; then the flips: 5 + 5 … halves at a's and b's seconds
    encoders, decoders = page.widths("encoder"), page.widths("decoder")
    assert encoders[:2] == pytest.approx([100 * 2.1 / 4.4, 100 * 2.4 / 4.4], abs=0.01)
    assert decoders[:2] == pytest.approx([100 * 1.2 / 4.4, 100 * 2.0 / 4.4], abs=0.01)
    assert encoders[2] + decoders[2] == pytest.approx(100, abs=0.02)  # the longer flip


def test_the_timeline_goes_on_where_the_stage_before_ended() -> None:
    report = a_report(dice=None)
    page = Page(as_page(report, []))
    styles = [a["style"] for tag, a in page.tags if tag == "i" and a.get("class") == "floor"]
    lefts = [float(re.search(r"margin-left: ([\d.]+)%", style)[1]) for style in styles]  # type: ignore[index]
    ends = np.cumsum([100 * row.share for row in report.stages])
    assert len(lefts) == len(report.stages)
    assert lefts == pytest.approx([0, *np.minimum(ends, 99.5)[:-1]], abs=0.01)
    assert ends[-1] == pytest.approx(100)


def test_the_histogram_counts_clean_and_defective_strips_apart() -> None:
    histogram = a_report().histogram
    # encoders 3, 4, 4 and decoders 0, 3, 4, of which the first strip was found clean
    assert histogram["encoders"] == {"clean": [0, 0, 0, 1, 0], "defective": [0, 0, 0, 0, 2]}
    assert histogram["decoders"] == {"clean": [1, 0, 0, 0, 0], "defective": [0, 0, 0, 1, 1]}
    titles = [a["title"] for _, a in Page(as_page(a_report(), [])).tags if "title" in a]
    assert "4 encoders: 0 clean, 2 defective" in titles
    assert "0 decoders: 1 clean, 0 defective" in titles


def test_a_failed_strip_is_named_with_its_reason_whatever_that_holds() -> None:
    text = as_page(a_report(faults={"4.jpg": "<b>no</b> image"}), [])
    assert "4.jpg" in Page(text).said("td")
    assert "<b>no</b> image" in Page(text).said("td")


@pytest.mark.parametrize(
    ("name", "found", "classes"),
    [
        ("clouds", 2, ["class Fish", "class Flower", "class Gravel", "class Sugar"]),
        ("salt", 1, ["class salt"]),
    ],
)
def test_masks_are_called_as_their_classes_are(name: str, found: int, classes: list[str]) -> None:
    competition = find_competition(name)
    picture = replace(a_picture(), classes=[found], competition=competition)
    said = Page(as_page(a_report(dice=None), [picture])).said("span")
    assert [text for text in said if text.startswith("class ")] == [*classes, classes[found - 1]]


def test_the_picture_in_the_page_is_the_one_drawn() -> None:
    page = Page(as_page(a_report(), [a_picture()]))
    (source,) = [a["src"] for tag, a in page.tags if tag == "img"]
    data = np.frombuffer(base64.b64decode(source.partition(",")[2]), np.uint8)
    shown = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert shown is not None
    assert shown.shape == (64, 96, 3)
    smooth = cv2.blur(shown, (8, 8)).astype(int) - cv2.blur(a_picture().canvas, (8, 8))
    assert np.abs(smooth).mean() < 10


def test_the_lines_show_what_the_page_shows() -> None:
    report = a_report(seconds=12.0, budget_s=1000.0, calibration={})
    lines, page = as_lines(report), " ".join(text for _, text in Page(as_page(report, [])).texts)
    for machine in report.machines:
        assert f"{machine.seconds:,.0f}" in lines
        assert f"{machine.seconds:,.0f} s" in page
        assert machine.basis in page
    assert lines.count("  estimated  ") == page.count(" estimated ") - 1 == len(report.machines)
    for drop in report.drops:
        assert f"{drop.saves_s:,.0f}" in lines
        assert f"{drop.saves_s:,.0f}" in page
    assert "; 2 non-empty masks; " in lines
    assert "non-empty masks 2 " in page
    assert "drop vertical, then b." in lines
    assert "drop vertical, then b." in page
    assert "2.50 GB" in lines
    assert "2.50 GB" in page
    assert "0.420" in page


def test_without_a_ground_truth_there_is_no_dice() -> None:
    page = Page(as_page(a_report(dice=None), []))
    assert "Dice" not in " ".join(text for _, text in page.texts)


BEST = {"threshold": 0.4, "min_area": 64, "dice": 0.875, "dice_non_empty": 0.5}
ABLATION = {
    "strips": 12,
    "variants": [
        {"name": "all", "strip_s": 4.25, "best": BEST} | DICE,
        {"name": "without b", "strip_s": 1.75, "best": BEST} | DICE,
    ],
    "thresholds": [0.4, 0.55],
    "min_areas": [0, 64],
    "grid": [[0.8, 0.7], [0.875, 0.6]],
    "now": {"threshold": 0.55, "min_area": 0},
    "proposed": "without b",
}


def test_the_ablation_marks_the_proposal_and_the_bundle_s_own_setting() -> None:
    page = Page(as_page(a_report(ablation=ABLATION), []))
    said = [text for _, text in page.texts]
    assert said[said.index("proposed") - 1] == "without b"
    assert sum(a.get("class") == "chosen" for _, a in page.tags) == 1
    cells = [
        (a["style"], a.get("class") == "now")
        for _, a in page.tags
        if "--heat" in a.get("style", "")
    ]
    heats = [float(re.search(r"--heat: (\d+)%", style)[1]) for style, _ in cells]  # type: ignore[index]
    assert heats == [58, 29, 80, 0]  # of 0.6 to 0.875
    assert [now for _, now in cells] == [False, True, False, False]
    lines = ablation_table(ABLATION).splitlines()
    (line,) = [line for line in lines if line.endswith("← proposed")]
    assert line.split() == [
        "without", "b", "0.9100", "0.4200", "1.0000", "1.750", "0.8750", "0.5000", "0.4", "64",
        "←", "proposed",
    ]  # fmt: skip


def test_a_min_area_a_class_is_a_row_of_the_grid() -> None:
    own = {"min_areas": [64, [0, 600]], "now": {"threshold": 0.4, "min_area": [0, 600]}}
    page = Page(as_page(a_report(ablation=ABLATION | own), []))
    cells = [a.get("class") == "now" for _, a in page.tags if "--heat" in a.get("style", "")]
    assert cells == [False, False, True, False]
    assert "[0, 600]" in [text for _, text in page.texts]
