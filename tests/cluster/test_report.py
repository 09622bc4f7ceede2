"""The page of a run: counts of all rows, the run's rate, and masks where the images can be read."""

import base64
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from helpers import LABELS, SMALL, Page, save_strips

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[cluster]'")

from cluster.engine import Workers
from cluster.images import ImageSet
from cluster.output import ROWS, Output, Totals
from cluster.report import MAX_FAULTS, Run, write_page
from kernel.contact_sheet import COLOURS, MAX_STRIPS

WHOLE = f"1 {SMALL[0] * SMALL[1]}"
RUN = Run(Totals(images=10, faults=1, masks=3, share=4.5), Workers(2, cpus=1), 4.0)


def output_of(folder: Path, masks: dict[str, int], faults: dict[str, str]) -> Output:
    """Rows of images: the class of the one mask, of all pixels, or 0; or why there is none."""
    output = Output(str(folder))
    output.begin({})
    for name in masks | faults:
        rows = [
            {
                "image": name,
                "class": label,
                "rle": WHOLE if masks.get(name) == label else "",
                "pixels": SMALL[0] * SMALL[1] if masks.get(name) == label else 0,
                "fault": faults.get(name, ""),
                "seconds": 0.1,
                "share": None if name in faults else 0.25,
            }
            for label in LABELS
        ]
        output.write_part([name], pa.Table.from_pylist(rows, schema=ROWS))
    return output


def page_of(folder: Path, output: Output, run: Run | None = RUN) -> Page:
    write_page(
        folder / "page.html",
        output,
        ImageSet(f"file://{folder}/images", [], f"file://{folder}/images"),
        run,
    )
    return Page((folder / "page.html").read_text())


def values_of(page: Page) -> dict[str, str]:
    return dict(zip(page.said("dt"), page.said("dd"), strict=True))


def picture_of(attributes: dict[str, str]) -> Any:
    data = base64.b64decode(attributes["src"].partition("base64,")[2])
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def test_the_page_says_what_the_output_holds_and_how_fast_the_run_was(tmp_path: Path) -> None:
    masks, faults = {"a.jpg": 3, "b.jpg": 0}, {"<c>.jpg": "no <b>image</b>"}
    page = page_of(tmp_path, output_of(tmp_path / "out", masks, faults))
    assert page.said("title") == page.said("h1")
    assert page.said("h1") == ["3 images have their rows; 1 of them could not be predicted"]
    assert values_of(page) == {
        "images": "3",
        "faults": "1",
        "non-empty masks": "1",
        "of all work ran": "25 %",
        "images in this run": "10",
        "seconds": "4.0",
        "images a second": "2.50",
        "ran on": "2 workers of 1 threads each",
    }
    assert page.said("td") == ["<c>.jpg", "no <b>image</b>"]


def test_the_page_shows_masks_of_the_images_that_can_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = save_strips(tmp_path / "images", ["a.png", "clean.png", "shrunk.png"])
    save_strips(tmp_path / "images", ["shrunk.png"], (32, 32))
    masks = {"a.png": 2, "clean.png": 0, "shrunk.png": 1, "gone.png": 1}
    page = page_of(tmp_path, output_of(tmp_path / "out", masks, {}))
    [attributes] = [found for tag, found in page.tags if tag == "img"]
    assert attributes["alt"] == "a.png   found: class 2"
    expected = 0.55 * images["a.png"][..., None] + 0.45 * np.array(COLOURS[1])
    assert np.abs(picture_of(attributes) - expected).mean() < 8  # a JPEG
    assert {record.getMessage().split()[0] for record in caplog.records} == {
        "shrunk.png",
        "gone.png",
    }


def test_few_of_many_masks_and_faults_are_shown(tmp_path: Path) -> None:
    names = [f"{index:03}.png" for index in range(MAX_STRIPS + 3)]
    save_strips(tmp_path / "images", names)
    faults = {f"{index}.jpg": "no image" for index in range(MAX_FAULTS + 1)}
    page = page_of(tmp_path, output_of(tmp_path / "out", dict.fromkeys(names, 1), faults))
    assert sum(tag == "img" for tag, _ in page.tags) == MAX_STRIPS
    assert len(page.said("td")) == 2 * MAX_FAULTS
    assert values_of(page)["faults"] == str(MAX_FAULTS + 1)


def test_a_run_with_nothing_left_to_do_has_no_rate_and_the_page_needs_nothing_else(
    tmp_path: Path,
) -> None:
    page = page_of(tmp_path, output_of(tmp_path / "out", {"a.jpg": 0}, {}), None)
    assert "images a second" not in values_of(page)
    assert "Every image had its rows already." in page.said("p")
    assert "No image that has a mask can be shown." in page.said("p")
    text = (tmp_path / "page.html").read_text()
    assert page.open == [] and not re.search(r"//|url\(|@import", text.replace("file:///", ""))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]
