"""The validator: what it refuses, what it warns of, and that it never costs a submission."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers import (
    LAYOUTS,
    STRIPS,
    exit_code,
    needs_strips,
    read_submission,
    save_image,
    save_strips,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from kernel import inference
from kernel.competition import SEVERSTAL, Competition
from kernel.images import Mask
from kernel.outcome import Outcome
from kernel.rle import decode_rle
from kernel.rows import SPREADSHEET_CELL, read_rows
from kernel.run_context import RunContext
from kernel.task import Task
from kernel.validator import (
    Findings,
    MaskStats,
    check_image,
    check_submission,
    class_table,
    first_few,
    mask_stats,
    unlikely_areas,
    unlikely_counts,
    unlikely_masks,
)

IMAGE_SIZE = SEVERSTAL.image_size or (0, 0)

Masks = dict[tuple[str, int], Mask]
PAIRS = [(name, label) for name in ("b.jpg", "a.jpg") for label in (1, 2, 3, 4)]
Rows = list[tuple[str, int, str]]


def csv_of(rows: Rows, layout: str) -> str:
    if layout == "two-column":
        return "\n".join(
            ["ImageId_ClassId,EncodedPixels", *(f"{n}_{c},{r}" for n, c, r in rows), ""]
        )
    return "\n".join(["ImageId,EncodedPixels,ClassId", *(f"{n},{r},{c}" for n, c, r in rows), ""])


def check(
    folder: Path, rows: Rows, layout: str = "two-column", pairs: list[tuple[str, int]] = PAIRS
) -> Findings:
    path = folder / "submission.csv"
    path.write_text(csv_of(rows, layout), encoding="utf-8")
    return check_submission(path, LAYOUTS[layout].columns, pairs, SEVERSTAL)


def filled(rles: dict[tuple[str, int], str], pairs: list[tuple[str, int]] = PAIRS) -> Rows:
    return [(name, label, rles.get((name, label), "")) for name, label in pairs]


GOOD = filled({("b.jpg", 1): "1 3 5 2", ("a.jpg", 4): "409600 1"})


# --- the rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_good_submission_has_no_errors(layout: str, tmp_path: Path) -> None:
    findings = check(tmp_path, GOOD, layout)
    assert findings.errors == []
    assert findings.lines()[-1] == "valid"


def test_a_mask_as_long_as_a_spreadsheets_cell_is_whole_where_none_saved_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel's own csv, at the end of its run."""
    runs = [[start, 1] for start in range(1, 80000, 20)]
    while len(rle := " ".join(f"{start} {length}" for start, length in runs)) > SPREADSHEET_CELL:
        runs.pop()
    for run in runs[: SPREADSHEET_CELL - len(rle)]:
        run[1] = 10
    rle = " ".join(f"{start} {length}" for start, length in runs)
    assert len(rle) == SPREADSHEET_CELL
    findings = check(tmp_path, filled({("a.jpg", 1): rle}))
    assert "where spreadsheets cut a cell off" in findings.errors[0]
    save_image(tmp_path / "a.jpg", np.full(IMAGE_SIZE, 99, np.uint8))
    task = Task(tmp_path, LAYOUTS["two-column"], PAIRS)
    caplog.set_level("INFO")
    inference.log_findings(tmp_path / "submission.csv", task, 60)
    assert caplog.messages[-1] == "valid"


def test_the_three_column_layout_may_leave_out_all_rows_of_empty_masks(tmp_path: Path) -> None:
    sparse = [row for row in GOOD if row[2]]
    assert check(tmp_path, sparse, "three-column").errors == []
    assert "row b.jpg, class 2 is missing" in check(tmp_path, sparse, "two-column").errors


def test_the_three_column_layout_may_not_leave_out_some_of_them(tmp_path: Path) -> None:
    lost = [row for row in GOOD if row[:2] != ("a.jpg", 2)]
    assert check(tmp_path, lost, "three-column").errors == ["row a.jpg, class 2 is missing"]


@given(st.permutations(range(len(PAIRS))), st.sampled_from(sorted(LAYOUTS)))
@settings(derandomize=True, max_examples=40)
def test_only_the_samples_order_passes(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], layout: str
) -> None:
    findings = check(tmp_path_factory.mktemp("rows"), [GOOD[i] for i in order], layout)
    if order == sorted(order):
        assert findings.errors == []
    else:
        assert ["keep the sample's order" in error for error in findings.errors] == [True]


@given(st.lists(st.integers(0, len(PAIRS)), min_size=1))
@settings(derandomize=True, max_examples=60)
def test_only_every_row_once_passes(
    tmp_path_factory: pytest.TempPathFactory, picked: list[int]
) -> None:
    rows = [*GOOD, ("stranger.jpg", 1, "")]
    findings = check(tmp_path_factory.mktemp("rows"), [rows[i] for i in sorted(picked)])
    errors = " ".join(findings.errors)
    assert ("is missing" in errors) == (not set(range(len(PAIRS))) <= set(picked))
    assert ("times" in errors) == (len(set(picked)) < len(picked))
    assert ("stranger.jpg, class 1 is not in the sample" in errors) == (len(PAIRS) in picked)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Id,Pixels\n", "header Id,Pixels, expected"),
        ("EncodedPixels,ImageId_ClassId\n", "header EncodedPixels,ImageId_ClassId, not ImageId_"),
        ("ImageId,EncodedPixels,ClassId\n", "header ImageId,EncodedPixels,ClassId, not ImageId_"),
        ("ImageId_ClassId,EncodedPixels\na.jpg_x,\n", "line 2: names no class"),
        (",ImageId_ClassId,EncodedPixels\n", "header ,ImageId_ClassId,EncodedPixels, not Image"),
        ("ImageId_ClassId, EncodedPixels\n", "header ImageId_ClassId, EncodedPixels, not Image"),
        ("", "line 1: the file is empty, expected"),
    ],
)
def test_another_header_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    path.write_text(text)
    errors = check_submission(path, LAYOUTS["two-column"].columns, PAIRS, SEVERSTAL).errors
    assert words in errors[0]


def test_a_class_zero_row_of_the_sample_is_no_answer(tmp_path: Path) -> None:
    findings = check(tmp_path, [*GOOD, ("a.jpg", 0, "1 409600")], "three-column")
    assert findings.errors == ["row a.jpg, class 0 is not in the sample"]


def test_a_malformed_code_is_reported_with_its_row(tmp_path: Path) -> None:
    findings = check(tmp_path, filled({("b.jpg", 3): "5 0", ("a.jpg", 1): "1 1"}))
    assert findings.errors == ["row b.jpg, class 3: run 5 0 has no pixel"]
    assert findings.lines()[-1].startswith("INVALID")


def test_a_thousand_faults_of_a_kind_are_a_few_lines(tmp_path: Path) -> None:
    pairs = [(f"{i}.jpg", label) for i in range(250) for label in (1, 2, 3, 4)]
    findings = check(tmp_path, filled(dict.fromkeys(pairs, "0 1"), pairs), pairs=pairs)
    assert findings.errors[3:] == ["… and 997 more like this"]


def test_each_mask_is_held_against_its_own_image(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((4, 6), 99, np.uint8))
    cv2.imwrite(str(tmp_path / "b.png"), np.full((5, 6), 99, np.uint8))
    (tmp_path / "torn.png").write_bytes(b"torn")
    pairs = [("a.png", 1), ("b.png", 1), ("torn.png", 1)]
    path = tmp_path / "submission.csv"
    path.write_text(csv_of(filled(dict.fromkeys(pairs, "25 6"), pairs), "two-column"))
    errors = check_submission(
        path, LAYOUTS["two-column"].columns, pairs, SEVERSTAL, tmp_path
    ).errors
    assert errors[0] == "row a.png, class 1: run 25 6 leaves an image of 24 pixels"
    assert errors[1].startswith("torn.png has a mask, but cannot be read")
    assert len(errors) == 2


LEAVES_USUAL = "leaves an image of 409600 pixels, the usual 256×1600: give --images with this image"


def test_only_where_the_size_is_assumed_is_it_said_to_be() -> None:
    small = replace(SEVERSTAL, mask_size=(8, 3))  # of every mask
    for rle, competition, fault in (
        ("409600 2", SEVERSTAL, f"run 409600 2 {LEAVES_USUAL}"),
        ("24 2", small, "run 24 2 leaves an image of 24 pixels"),
        ("5 0", SEVERSTAL, "run 5 0 has no pixel"),
    ):
        faults, _ = check_image(None, "a.png", {1: rle}, competition)
        assert faults == [f"row a.png, class 1: {fault}"]


def test_a_submission_of_a_sample_without_rows_is_not_said_to_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    for pairs, warned in (([], False), ([("a.png", 1)], True)):
        path.write_text(csv_of(filled({}, pairs), "two-column"))
        found = check_submission(path, LAYOUTS["two-column"].columns, pairs, SEVERSTAL)
        assert found.errors == []
        assert any("did the run fail?" in line for line in found.warnings) == warned


def test_the_mask_of_an_image_that_is_not_there_is_held_against_the_usual_size(
    tmp_path: Path,
) -> None:
    """And what is seen on the other images is judged by them."""
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((4, 6), np.uint8))
    pairs, path = [("a.png", 1), ("gone.png", 1)], tmp_path / "submission.csv"
    for run, errors in {
        "1 6": [],
        "409600 2": [f"row gone.png, class 1: run 409600 2 {LEAVES_USUAL}"],
    }.items():
        rles = {("a.png", 1): "1 6", ("gone.png", 1): run}
        path.write_text(csv_of(filled(rles, pairs), "two-column"))
        found = check_submission(path, LAYOUTS["two-column"].columns, pairs, SEVERSTAL, tmp_path)
        assert found.errors == errors
        assert found.warnings[0] == (
            f"1 images with a mask are not in {tmp_path}, such as 'gone.png': "
            "their masks are not checked against them"
        )
        mirrored = [line for line in found.warnings if "are the masks mirrored" in line]
        assert len(mirrored) == (0 if errors else 1)


# --- what the masks look like ---------------------------------------------------------------------


def rle_of(mask: Mask) -> str:
    """COCO's own run lengths, off, on, off, …, as `start length` pairs."""
    code = coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
    counts, numbers, index = list[int](), list[int](), 0
    while index < len(code):  # COCO's variable-length numbers, each against the one two before
        number, shift, more = 0, 0, True
        while more:
            bits = ord(code[index]) - 48
            number |= (bits & 31) << shift
            more, shift, index = bool(bits & 32), shift + 5, index + 1
            if not more and bits & 16:
                number |= -1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
    end = 0
    for off, on in zip(counts[::2], counts[1::2], strict=False):
        numbers += [end + off + 1, on]
        end += off + on
    return " ".join(map(str, numbers))


def row_major(mask: Mask) -> Mask:
    """What Kaggle sees of a mask that was written along the rows."""
    return mask.ravel().reshape(mask.shape[::-1]).T


def counted_from_zero(mask: Mask) -> Mask:
    """What Kaggle sees of a mask whose pixels were counted from 0, but for a mask on the first."""
    return np.roll(mask.T.ravel(), -1).reshape(mask.shape[::-1]).T


def mirrored(mask: Mask) -> Mask:
    return mask[:, ::-1]


SPOILT: dict[str, tuple[Callable[[Mask], Mask], str]] = {
    "along the rows": (row_major, "thin pieces"),
    "from zero": (counted_from_zero, "counts pixels from 1; was 0 taken"),
    "mirrored": (mirrored, "mirrored"),
}


def check_masks(folder: Path, drawn: Masks, names: list[str], images: Path) -> Findings:
    pairs = [(name, label) for name in names for label in (1, 2, 3, 4)]
    rows = filled({pair: rle_of(mask) for pair, mask in drawn.items()}, pairs)
    path = folder / "submission.csv"
    path.write_text(csv_of(rows, "two-column"), encoding="utf-8")
    return check_submission(path, LAYOUTS["two-column"].columns, pairs, SEVERSTAL, images)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Masks]:
    """Eight strips whose right third is black, and a scratch on each, half of them from the top."""
    folder, rng = tmp_path_factory.mktemp("few"), np.random.default_rng(5)
    drawn = {}
    for i in range(8):
        image = rng.integers(60, 120, IMAGE_SIZE, np.uint8)
        image[:, 1000:] = 3
        cv2.imwrite(str(folder / f"{i}.png"), image)
        mask = np.zeros(IMAGE_SIZE, bool)
        top = 0 if i % 2 else 40
        mask[top : top + 60 + i, 10 * i : 10 * i + 80] = True
        drawn[f"{i}.png", i % 4 + 1] = mask
    return folder, drawn


def test_sound_masks_raise_no_warning_and_are_counted(
    few: tuple[Path, Masks], tmp_path: Path
) -> None:
    folder, drawn = few
    findings = check_masks(tmp_path, drawn, [name for name, _ in drawn], folder)
    assert findings.errors == findings.warnings == []
    assert findings.table[1].split() == ["1", "2", "25.0%", "7.1%", f"{62 * 80:,}", "px"]
    assert findings.table[3].split()[3] == "41.0%"


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_masks_raise_their_own_warning(
    case: str, few: tuple[Path, Masks], tmp_path: Path
) -> None:
    (folder, drawn), (spoil, words) = few, SPOILT[case]
    spoilt = {pair: spoil(mask) for pair, mask in drawn.items()}
    findings = check_masks(tmp_path, spoilt, [name for name, _ in drawn], folder)
    assert findings.errors == []
    assert any(words in warning for warning in findings.warnings)


def real_masks() -> Masks:
    rows = read_rows(STRIPS / "train.csv", SEVERSTAL).rows
    return {
        (name, label): decode_rle(rle, IMAGE_SIZE, SEVERSTAL) for name, label, rle in rows if rle
    }


def real_names() -> list[str]:
    return sorted(path.name for path in (STRIPS / "train_images").iterdir())


@needs_strips
def test_the_masks_of_the_real_strips_raise_no_warning(tmp_path: Path) -> None:
    findings = check_masks(tmp_path, real_masks(), real_names(), STRIPS / "train_images")
    assert findings.errors == findings.warnings == []
    assert [line.split()[1] for line in findings.table[1:]] == ["4", "3", "6", "1"]


@needs_strips
@pytest.mark.parametrize("case", SPOILT)
def test_the_masks_of_the_real_strips_spoilt_raise_a_warning(case: str, tmp_path: Path) -> None:
    spoil, words = SPOILT[case]
    spoilt = {pair: spoil(mask) for pair, mask in real_masks().items()}
    findings = check_masks(tmp_path, spoilt, real_names(), STRIPS / "train_images")
    assert findings.errors == []
    assert any(words in warning for warning in findings.warnings)


def test_an_empty_submission_is_valid_with_a_warning(tmp_path: Path) -> None:
    findings = check(tmp_path, filled({}))
    assert findings.errors == []
    assert "all masks are empty" in findings.warnings[0]


@pytest.mark.parametrize(("images", "reported"), [(250, False), (300, True)])
def test_a_class_is_missed_once_five_images_should_have_it(
    images: int, reported: bool, tmp_path: Path
) -> None:
    pairs = [(f"{i}.jpg", label) for i in range(images) for label in (1, 2, 3, 4)]
    shares = {1: 0.07, 2: 0.0, 3: 0.41, 4: 0.06}
    rles = {(n, c): "1 9 257 9" for n, c in pairs if int(n[:-4]) < images * shares[c]}
    warnings = check(tmp_path, filled(rles, pairs), pairs=pairs).warnings
    assert any("class 2 is missing" in warning for warning in warnings) == reported
    assert not any(f"class {c} is" in warning for warning in warnings for c in (1, 3, 4))
    rles |= {(n, 4): "1 9 257 9" for n, c in pairs}
    warnings = check(tmp_path, filled(rles, pairs), pairs=pairs).warnings
    assert any(f"class 4 is on {images} images" in warning for warning in warnings)


# --- measurements and verdicts, to the number -----------------------------------------------------

ODD = Competition(
    classes=("a", "Gravel"),
    n_training_images=100,
    images_with_class=(50, 50),
    median_areas=(800, 800),
)


def stats_of(label: int, area: int = 800, **changes: Any) -> MaskStats:
    return replace(MaskStats(label, area, 1.0, 0.0, 0, 0), **changes)


@pytest.mark.parametrize("run_order", ["columns", "rows"])
def test_a_mask_is_measured_as_it_is_by_hand(run_order: str) -> None:
    down = run_order == "columns"
    competition = Competition(run_order=run_order, first_index=int(down))
    rle = "1 2 8 2 12 1" if down else "0 2 7 2 11 1"  # from the first line, over from the last,
    black = np.zeros((4, 3), bool)  # and on the last alone
    black[3, 2] = True  # under one of its five pixels
    shape, outside = ((4, 3), black) if down else ((3, 4), black.T)
    found = mask_stats(2, rle, shape, outside, competition)
    assert found == MaskStats(2, 5, 0.2, 0.2, 1, 1)
    assert np.isnan(mask_stats(2, rle, shape, None, competition).black)


def test_the_table_has_the_counts_shares_and_medians_of_an_own_count() -> None:
    masks = [stats_of(1, 1000), stats_of(1, 3001), stats_of(1, 2001), *[stats_of(2, 9)] * 1200]
    widths = (6, 7, 7, 9, 12)

    def line(*cells: str) -> str:
        return " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))

    head = line("class", "masks", "share", "training", "median area")
    one, two = line("a", "3", "0.1%", "50.0%", "2,001 px"), "9 px"
    assert class_table(masks, [1, 2], 2400, ODD) == [
        head, one, line("Gravel", "1,200", "50.0%", "50.0%", two),
    ]  # fmt: skip
    unknown = replace(ODD, n_training_images=None, images_with_class=None)
    assert class_table([], [2], 8, unknown) == [head, line("Gravel", "0", "0.0%", "?", "-")]
    assert class_table([], [], 8, SEVERSTAL)[0] == head[1:]  # as wide as the widest name


def test_a_few_faults_stand_and_the_others_are_counted() -> None:
    faults = [str(number) for number in range(1234)]
    assert first_few(faults[:3]) == ["0", "1", "2"]
    assert first_few(faults[:4]) == ["0", "1", "2", "… and 1 more like this"]
    assert first_few(faults) == ["0", "1", "2", "… and 1,231 more like this"]
    assert first_few([]) == []


def test_a_report_is_table_errors_warnings_and_the_verdict() -> None:
    report = Findings(["e"], ["w"], ["t"])
    invalid = "INVALID: Kaggle would refuse it"
    assert report.lines() == ["t", "error: e", "warning: w", invalid]
    assert replace(report, errors=[]).lines() == ["t", "warning: w", "valid"]


@pytest.mark.parametrize(
    ("images", "found", "said"),
    [
        (16, 2, None),
        (16, 1, "class a is on 1 images; training's share would be 8 of 16"),
        (16, 0, "class a is missing; training's share would be 8 of 16"),
        (16, 32, None),
        (16, 33, "class a is on 33 images; training's share would be 8 of 16"),
        (10, 0, "class a is missing; training's share would be 5 of 10"),
        (9, 0, None),  # fewer than five are expected
        (4000, 400, "class a is on 400 images; training's share would be 2,000 of 4,000"),
    ],
)
def test_a_class_is_unlikely_beyond_four_times_more_or_less(
    images: int, found: int, said: str | None
) -> None:
    masks = [stats_of(1)] * found + [stats_of(2)] * (images // 2)
    assert list(unlikely_counts(masks, images, ODD)) == ([said] if said else [])
    assert not list(unlikely_counts(masks, images, replace(ODD, n_training_images=None)))


def test_masks_that_are_all_empty_are_told_with_their_score_where_it_is_known() -> None:
    all_empty = "all masks are empty, which scores 0.856: did the run fail?"
    assert list(unlikely_counts([], 99, SEVERSTAL)) == [all_empty]
    assert list(unlikely_counts([], 99, ODD)) == ["all masks are empty: did the run fail?"]


@pytest.mark.parametrize(("area", "odd"), [(99, True), (100, False), (6400, False), (6401, True)])
def test_areas_are_unlikely_beyond_eight_times_more_or_less(area: int, odd: bool) -> None:
    masks = [stats_of(1, 1), *[stats_of(1, area)] * 3, stats_of(1, 9999), stats_of(2)]
    said = f"class a's median mask has {area:,} px, in training 800"
    assert list(unlikely_areas(masks, ODD)) == ([said] if odd else [])
    assert not list(unlikely_areas(masks[1:], ODD))  # four are too few


@pytest.mark.parametrize(("label", "area"), [(1, 3_500), (2, 2_900), (3, 11_800), (4, 24_900)])
def test_areas_of_severstals_own_masks_are_known(label: int, area: int) -> None:
    assert not list(unlikely_areas([stats_of(label, area)] * 5, SEVERSTAL))
    [said] = unlikely_areas([stats_of(label, area // 10)] * 5, SEVERSTAL)
    assert said == f"class {label}'s median mask has {area // 10:,} px, in training {area:,}"


THIN = "above 90 % in real ones; is the RLE written along the"
ACROSS = replace(ODD, run_order="rows", first_index=0)
SIGNS: dict[str, tuple[dict[str, Any], Competition, str | None]] = {
    "joined": ({"joined": 0.6}, ODD, None),
    "thin": (
        {"joined": 0.59},
        ODD,
        "masks fall into thin pieces: 59% of the median mask's pixels go on to the right, "
        f"{THIN} rows, or is it noise?",
    ),
    "thin along the rows": (
        {"joined": 0.5},
        ACROSS,
        "masks fall into thin pieces: 50% of the median mask's pixels go on below, "
        f"{THIN} columns, or is it noise?",
    ),
    "a little on black": ({"black": 0.05}, ODD, None),
    "on black": (
        {"black": 0.06},
        ODD,
        "6% of a mask lies on black, beside the steel: are the masks mirrored?",
    ),
    "without images": ({"black": float("nan")}, ODD, None),
    "as many in the first row": ({"first_row": 5, "last_row": 5}, ODD, None),
    "few in the last row": ({"last_row": 4}, ODD, None),
    "in the last row": (
        {"first_row": 4, "last_row": 5},
        ODD,
        "5 runs go over from the last row and 4 start in the first: this competition counts "
        "pixels from 1; was 0 taken?",
    ),
    "in the last column": (
        {"last_row": 6},
        ACROSS,
        "6 runs go over from the last column and 0 start in the first: this competition counts "
        "pixels from 0; was 1 taken?",
    ),
}


@pytest.mark.parametrize("case", SIGNS)
def test_a_sign_of_spoilt_masks_starts_at_its_bound(case: str) -> None:
    changes, competition, said = SIGNS[case]
    found = list(unlikely_masks([stats_of(1, **changes)], competition))
    assert found == ([said] if said else [])
    assert not list(unlikely_masks([], competition))


def test_what_is_black_beside_the_steel_is_darker_than_12(tmp_path: Path) -> None:
    """Only where images have such a place, and masks their image's size."""
    image = np.full((4, 6), 99, np.uint8)
    image[0], image[1] = 11, 12
    cv2.imwrite(str(tmp_path / "a.png"), image)
    light, small = replace(SEVERSTAL, dark_outside=False), replace(SEVERSTAL, mask_size=(8, 3))
    for competition, expected in ((SEVERSTAL, 0.5), (light, None), (small, None)):
        words, [stats] = check_image(tmp_path, "a.png", {3: "1 2"}, competition)
        assert not words
        assert stats.label == 3 and stats.area == 2
        assert np.isnan(stats.black) if expected is None else stats.black == expected
    assert check_image(None, "a.png", {1: "5 1"}, Competition()) == ([], [])  # of no known size


# --- the end of a run -----------------------------------------------------------------------------


@pytest.fixture
def arguments(tiny_bundle: Path, tmp_path: Path) -> list[object]:
    """The command line of a run over one strip."""
    save_strips(tmp_path / "strips", ["a.png"])
    paths = ("--bundle", tiny_bundle / "dataset", "--images", tmp_path / "strips")
    return [*paths, "--output", tmp_path / "submission.csv"]


def test_a_run_ends_with_the_validators_lines(
    arguments: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert exit_code(inference.main, *arguments) == 0
    assert caplog.messages[-2] == "valid"
    assert any("median area" in line for line in caplog.messages)


@pytest.mark.parametrize(("left_s", "read"), [(1.9, False), (2.1, True)])
def test_a_submission_is_checked_only_where_there_is_time(
    left_s: float, read: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a hundred images it may take two seconds."""
    reads = list[Path]()

    def check(path: Path, *_: Any, **__: Any) -> Findings:
        reads.append(path)
        raise ValueError("looked at")

    monkeypatch.setattr("kernel.inference.check_submission", check)
    pairs = [(f"{index}.png", 1) for index in range(100)]
    inference.log_findings(Path("out.csv"), Task(Path(), LAYOUTS["two-column"], pairs), left_s)
    assert reads == [Path("out.csv")] * read
    late = "the submission is written, but no time is left to check it"
    assert (caplog.messages == [late]) != read


def test_the_seconds_that_the_watchdog_takes_are_none_for_a_check(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A check that ran into them would end the run as if it hung."""
    monkeypatch.setattr("kernel.inference.predict", lambda *_: Outcome())
    monkeypatch.setattr("kernel.inference.watchdog", lambda *_: nullcontext())
    monkeypatch.setattr(RunContext, "until_watchdog_s", lambda _: 0.0)
    assert exit_code(inference.main, *arguments) == 0
    assert "no time is left to check it" in caplog.text


@pytest.mark.parametrize("fault", [ValueError("a fault"), MemoryError(), None], ids=repr)
def test_a_validator_that_fails_costs_no_submission(
    fault: Exception | None,
    arguments: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: Any, **__: Any) -> Findings:
        assert fault
        raise fault

    monkeypatch.setattr("kernel.inference.check_submission", fails if fault else None)
    assert exit_code(inference.main, *arguments) == 0
    assert len(read_submission(tmp_path / "submission.csv")) == 4
    assert "the submission is written, but was not checked" in caplog.text
