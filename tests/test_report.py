"""The report: the same numbers as a page, as lines and as JSON, and a page that needs nothing."""

import base64
import json
import re
from html.parser import HTMLParser
from typing import Any

import cv2
import numpy as np
import pytest
from test_projection import a_run, told

from kernel.contact_sheet import draw_strip
from kernel.drawing import Drawn
from kernel.report import Ended, as_json, as_lines, as_page, check_run, tell

ENDED = Ended(exit_code=0, seconds=20.0, network_denied=True, peak_bytes=2_500_000_000)
DICE = {"dice": 0.91, "dice_non_empty": 0.42, "clean_left_empty": 1.0, "per_class": {"3": 0.37}}


def a_report(
    ended: Ended = ENDED,
    dice: Any = DICE,
    budget_s: float = 3600,
    choice: Any = None,
    **changes: Any,
) -> dict[str, Any]:
    more = {"share": 0.6, "gpu_bytes": 0, "non_empty": 2}
    defective = np.array([False, True, True])
    run = told(**changes) | more
    checks = check_run(ended, run)
    report = tell(a_run(**changes), run, ended, checks, defective, {}, budget_s)
    return report | {"dice": dice, "choice": choice}


def a_picture() -> Drawn:
    canvas = np.random.default_rng(1).integers(0, 255, (64, 96, 3), np.uint8)
    return Drawn("2.jpg", canvas, [3], 0.5)


class Page(HTMLParser):
    """Every tag with its attributes, in order, and the text under each tag's name and class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag  # a tag that is never closed, or twice

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], " ".join(data.split())))

    def said(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def widths(self, kind: str) -> list[float]:
        """Per cent, of the bars of a class."""
        styles = [a.get("style", "") for tag, a in self.tags if tag == "i" and kind in a.values()]
        return [float(re.search(r"width: ([\d.]+)%", style)[1]) for style in styles]  # type: ignore[index]


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


def test_the_page_begins_with_the_verdict_and_its_checks() -> None:
    report = a_report()
    page = Page(as_page(report, []))
    assert page.said("title") == page.said("h1") == [report["verdict"]]
    assert page.said("li") == [check["words"] for check in report["checks"]]
    order = [tag for tag, _ in page.tags]
    assert order.index("h1") < order.index("h2")


TOO_LONG = "A clean run, but too long here: passes would be left out"


@pytest.mark.parametrize(
    ("changes", "verdict", "ready", "mark"),
    [
        pytest.param({"faults": {}}, TOO_LONG, False, "✗", id="too long"),
        pytest.param(
            {"faults": {}, "budget_s": 1e9}, TOO_LONG, False, "✗",
            id="the hour counts, whatever the budget",
        ),
        pytest.param(
            {"faults": {}, "seconds": 10.0}, "Ready, and in time here", True, "✓", id="in time"
        ),
        pytest.param(
            {"faults": {}, "seconds": 10.0, "budget_s": 2000.0}, TOO_LONG,
            False, "✗", id="in time, beyond the budget",
        ),
        pytest.param(
            {"seconds": 10.0}, "Not ready: the run was not clean", False, "✗", id="a strip failed"
        ),
        pytest.param(
            {"faults": {}, "seconds": 10.0, "left_out": {"b/vertical": 2}},
            "Not ready: the run was not clean", False, "✗", id="passes were left out",
        ),
        pytest.param(
            {"faults": {}, "seconds": 10.0, "ended": Ended(3, 10.0, True, 1)},
            "Not ready: the run was not clean", False, "✗", id="exit code",
        ),
        pytest.param(
            {"faults": {}, "seconds": 10.0, "ended": Ended(0, 10.0, False, 1)},
            "Ready, and in time here", True, "?", id="the network could not be denied",
        ),
    ],
)  # fmt: skip
def test_the_verdict(changes: dict[str, Any], verdict: str, ready: bool, mark: str) -> None:
    report = a_report(**changes)
    assert (report["verdict"], report["ready"]) == (verdict, ready)
    assert as_lines(report).startswith(f"== {verdict}\n")
    page = Page(as_page(report, []))
    assert mark in page.said("b")
    assert ("good" if ready else "bad") in [a.get("class") for t, a in page.tags if t == "header"]


def test_what_was_left_out_is_named() -> None:
    left_out = {"b/vertical": 2, "b/none": 1}
    words = "up to 2 strips went without b/none, b/vertical"
    assert words in as_lines(a_report(faults={}, left_out=left_out))


def test_a_mean_of_nothing_is_null_in_the_json_and_a_dash_on_the_page() -> None:
    nothing = float("nan")
    report = a_report(dice=DICE | {"dice_non_empty": nothing, "per_class": {}})

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    found = json.loads(as_json(report), parse_constant=refuse)
    assert found["dice"] == DICE | {"dice_non_empty": None, "per_class": {}}
    assert found["run"] == report["run"]
    assert "–" in Page(as_page(report, [])).said("span")


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
    ends = np.cumsum([100 * row["share"] for row in report["stages"]])
    assert len(lefts) == len(report["stages"])
    assert lefts == pytest.approx([0, *np.minimum(ends, 99.5)[:-1]], abs=0.01)
    assert ends[-1] == pytest.approx(100)


def test_the_histogram_counts_clean_and_defective_strips_apart() -> None:
    histogram = a_report()["histogram"]
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


def test_the_picture_in_the_page_is_the_one_drawn() -> None:
    page = Page(as_page(a_report(), [a_picture()]))
    (source,) = [a["src"] for tag, a in page.tags if tag == "img"]
    data = np.frombuffer(base64.b64decode(source.partition(",")[2]), np.uint8)
    shown = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert shown is not None
    assert shown.shape == (64, 96, 3)
    smooth = cv2.blur(shown, (8, 8)).astype(int) - cv2.blur(a_picture().canvas, (8, 8))
    assert np.abs(smooth).mean() < 10


def test_masks_are_coloured_by_class_and_the_truth_is_outlined() -> None:
    image = np.full((64, 96), 100, np.uint8)
    masks = np.zeros((4, 64, 96), np.bool_)
    for label in range(4):
        masks[label, 8:24, 4 + 24 * label : 16 + 24 * label] = True
    canvas = draw_strip(image, masks).astype(int)
    inside = [tuple(canvas[16, 10 + 24 * label]) for label in range(4)]
    assert len(set(inside)) == 4
    assert all(np.ptp(colour) > 20 for colour in inside)
    assert (canvas[40:] == 100).all()
    outlined = draw_strip(image, np.zeros_like(masks), masks).astype(int)
    assert np.ptp(outlined[8, 10]) > 20  # the edge
    assert (outlined[16, 10] == 100).all()  # not the inside


def test_the_lines_show_what_the_page_shows() -> None:
    report = a_report(budget_s=1000)
    lines, page = as_lines(report), " ".join(text for _, text in Page(as_page(report, [])).texts)
    for machine in report["machines"]:
        assert f"{machine['seconds']:,.0f}" in lines
        assert f"{machine['seconds']:,.0f} s" in page
        assert machine["basis"] in page
    assert lines.count("ESTIMATE") == len(report["machines"])
    for drop in report["drops"]:
        assert f"{drop['saves_s']:,.0f}" in lines
        assert f"{drop['saves_s']:,.0f}" in page
    assert "drop vertical, then b." in lines
    assert "drop vertical, then b." in page
    assert "2.50 GB" in lines
    assert "2.50 GB" in page
    assert "0.420" in page


def test_without_a_ground_truth_there_is_no_dice() -> None:
    page = Page(as_page(a_report(dice=None), []))
    assert "Dice" not in " ".join(text for _, text in page.texts)


BEST = {"threshold": 0.4, "min_area": 64, "dice": 0.875, "dice_non_empty": 0.5}
CHOICE = {
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


def test_the_choice_marks_the_proposal_and_the_bundle_s_own_setting() -> None:
    report = a_report(choice=CHOICE)
    page = Page(as_page(report, []))
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
    (line,) = [line for line in as_lines(report).splitlines() if line.endswith("← proposed")]
    assert line.split() == [
        "without", "b", "0.9100", "0.4200", "1.0000", "1.750", "0.8750", "0.5000", "0.4", "64",
        "←", "proposed",
    ]  # fmt: skip
