"""Competitions: a description is read or refused by its field, and is all that a layout takes."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, draw_image, save_image
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.competition import (
    SEVERSTAL,
    Competition,
    check_competition,
    load_competition,
    parse_competition,
)
from kernel.images import Mask, Size
from kernel.options import Options
from kernel.rle import decode_rle, encode_rle, rle_fault
from kernel.rows import Layout, RowKey, layouts_of, read_rows
from kernel.shipped import find_competition, shipped_names
from kernel.submission import Submission
from kernel.task import find_task, read_sample
from kernel.validator import check_submission

# --- random descriptions --------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs"]), min_size=1, max_size=6)
SEPARATORS = st.sampled_from(["_", "-", "__", " ", ".", "|", "/"])


@st.composite
def competitions(draw: st.DrawFn) -> Competition:
    """A description that no competition may have had."""
    classes = tuple(draw(st.lists(NAMES.filter(str.strip), min_size=1, max_size=4, unique=True)))
    separator, apart = draw(SEPARATORS), draw(st.booleans())
    joined = draw(st.sampled_from(["{image}%s{class}", "{class}%s{image}"])) % separator
    cells = {"an image": "{image}", "class": "{class}"} if apart else {"pair": joined}
    if len(classes) == 1 and draw(st.booleans()):
        cells = {"an image": "{image}"}
    cells["mask"] = "{mask}"
    layout = {name: cells[name] for name in draw(st.permutations(list(cells)))}
    if draw(st.booleans()):
        layout["height"] = "7 px"  # the same in every row
    found = Competition(
        slug="a-competition",
        layouts=(layout,),
        classes=classes,
        suffix=draw(st.sampled_from(["", ".png", ".jpg"])),
        empty=draw(st.sampled_from(["", "-", "-1", "empty", None])),
        run_order=draw(st.sampled_from(["columns", "rows"])),
        first_index=draw(st.sampled_from([0, 1])),
        image_size=(5, 7),
    )
    check_competition(found)
    return found


MASKS = st.lists(st.booleans(), min_size=35, max_size=35).map(lambda each: np.reshape(each, (5, 7)))


def decode_apart(rle: str, size: Size, competition: Competition) -> Mask:
    """The mask of a code, pixel by pixel, apart from the kernel."""
    mask = np.zeros(size, np.bool_)
    numbers = [int(word) for word in rle.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        for index in range(
            start - competition.first_index, start - competition.first_index + length
        ):
            if competition.run_order == "rows":
                mask[index // size[1], index % size[1]] = True
            else:
                mask[index % size[0], index // size[0]] = True
    return mask


@settings(max_examples=150)
@given(MASKS, st.sampled_from(["columns", "rows"]), st.sampled_from([0, 1]))
def test_a_mask_comes_back_from_its_code_in_any_order_and_index(
    mask: Mask, order: str, first: int
) -> None:
    competition = Competition(run_order=order, first_index=first)
    code = encode_rle(mask, competition)
    assert rle_fault(code, mask.size, competition) is None
    np.testing.assert_array_equal(decode_apart(code, mask.shape, competition), mask)
    np.testing.assert_array_equal(decode_rle(code, mask.shape, competition), mask)


def write_masks(path: Path, layout: Layout, pairs: list[RowKey], rles: dict[RowKey, str]) -> None:
    """A submission with these masks."""
    submission = Submission(path, layout, pairs)
    for (image, label), rle in rles.items():
        submission.set_masks(image, {label: rle})
    submission.save()


@settings(max_examples=150)
@given(competitions(), st.data())
def test_masks_come_back_from_the_csv_of_any_description_and_are_valid(
    tmp_path_factory: pytest.TempPathFactory, competition: Competition, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    names = data.draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    names = [name + competition.suffix for name in names]
    labels = range(1, len(competition.classes) + 1)
    pairs = [(name, label) for name in names for label in labels]
    masks = {pair: data.draw(MASKS) for pair in pairs}
    [layout] = layouts_of(competition).values()
    rles = {pair: encode_rle(mask, competition) for pair, mask in masks.items()}
    write_masks(folder / "s.csv", layout, pairs, rles)
    found_layout, rows = read_rows(folder / "s.csv", competition)
    assert found_layout == layout
    found = {(name, label): decode_rle(rle, (5, 7), competition) for name, label, rle in rows}
    expected = {
        pair: mask for pair, mask in masks.items() if competition.empty is not None or mask.any()
    }
    assert list(found) == list(expected)
    for pair, mask in expected.items():
        np.testing.assert_array_equal(found[pair], mask)
    findings = check_submission(folder / "s.csv", layout.columns, pairs, competition)
    assert findings.errors == []


def test_an_empty_mask_has_its_token_or_no_row(tmp_path: Path) -> None:
    pairs = [("a.png", 1), ("b.png", 1)]
    for empty, expected in (("-1", "id,rle\na,1 2\nb,-1\n"), (None, "id,rle\na,1 2\n")):
        competition = Competition(
            layouts=({"id": "{image}", "rle": "{mask}"},),
            classes=("x",),
            suffix=".png",
            empty=empty,
        )
        [layout] = layouts_of(competition).values()
        write_masks(tmp_path / "s.csv", layout, pairs, {("a.png", 1): "1 2"})
        assert (tmp_path / "s.csv").read_text() == expected


def test_rows_of_empty_masks_may_be_missing_only_where_a_sample_does_not_name_them() -> None:
    omit = {name: layout.may_omit_empty for name, layout in layouts_of(SEVERSTAL).items()}
    assert omit == {"two-column": False, "three-column": True}
    organs, _ = layouts_of(find_competition("uw-madison")).values()
    assert not organs.may_omit_empty


# --- the descriptions that ship -------------------------------------------------------------------

SAMPLES = {  # the first lines of the competition's own sample, and the first row's meaning
    "severstal": ("ImageId,EncodedPixels,ClassId\n0000f269f.jpg,1 409600,0\n", "0000f269f.jpg", 4),
    "clouds": ("Image_Label,EncodedPixels\n002f507.jpg_Fish,1 1\n", "002f507.jpg", 1),
    "salt": ("id,rle_mask\n3e06571ef3,1 1\n", "3e06571ef3.png", 1),
    "carvana": ("img,rle_mask\n0004d4463b50_01.jpg,1 1\n", "0004d4463b50_01.jpg", 1),
    "uw-madison": (
        "id,class,predicted\ncase123_day20_slice_0001,large_bowel,1 1 5 1\n",
        "case123_day20_slice_0001.png",
        1,
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_sample_of_a_shipped_competition_is_understood(name: str, tmp_path: Path) -> None:
    text, image, rows = SAMPLES[name]
    (tmp_path / "sample.csv").write_text(text)
    _, pairs = read_sample(tmp_path / "sample.csv", find_competition(name))
    assert pairs == [(image, label) for label in range(1, rows + 1)]


def test_every_shipped_description_has_a_sample_here_and_severstals_is_the_default() -> None:
    assert shipped_names() == sorted(SAMPLES)
    assert find_competition("severstal") == find_competition(None) == SEVERSTAL
    written = [json.dumps(asdict(find_competition(name))) for name in ("severstal", None)]
    assert written[0] == written[1]  # so that both give the same bundle


# --- bad descriptions -----------------------------------------------------------------------------

ONE = [{"id": "{image}", "rle": "{mask}"}]
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt field": ({"clases": ["a"]}, "unknown field 'clases'; the nearest is classes"),
    "a slug of words": ({"slug": "My Competition"}, "slug 'My Competition', expected"),
    "no title": ({"title": ""}, "title '', expected text"),
    "classes as text": ({"classes": "Fish"}, "classes 'Fish', expected a list of names"),
    "classes as numbers": ({"classes": [1, 2]}, r"classes \(1, 2\), expected a list of names"),
    "a class twice": ({"classes": ["a", "a"]}, "classes .*each name once"),
    "any_class among them": ({"any_class": "1"}, "classes .*any_class not among them"),
    "no layouts": ({"layouts": []}, r"layouts \(\), expected a list of objects"),
    "a layout as text": ({"layouts": ["id,rle"]}, "layout 'id,rle', expected column: template"),
    "no class in a layout": ({"layouts": ONE}, "layout .*several classes"),
    "no mask": ({"layouts": [{"a": "{image}_{class}"}]}, "{mask} alone in one"),
    "a mask in a text": ({"layouts": [{"a": "{image}_{class}", "b": "x{mask}"}]}, "alone in one"),
    "a misspelt slot": ({"layouts": [{"a": "{images}", "b": "{mask}"}]}, "layout '{images}'"),
    "a path without groups": ({"image_path": "scans/.*"}, "image_path 'scans/.*', expected a regu"),
    "a path that is no regex": ({"image_path": "(a"}, "image_path .*unterminated subpattern"),
    "a path as a number": ({"image_path": 7}, "image_path 7, expected a regular expression"),
    "no separator": ({"layouts": [{"a": "{image}{class}", "b": "{mask}"}]}, "a separator"),
    "a class that ends as another": (
        {"layouts": [{"a": "{image}_{class}", "b": "{mask}"}], "classes": ["bowel", "large_bowel"]},
        "classes 'large_bowel', expected no class that is read as 'bowel' and a part of the image",
    ),
    "a class that ends as any_class": (
        {"layouts": [{"a": "{image}_{class}", "b": "{mask}"}], "classes": ["my_any"]}
        | {"any_class": "any"},
        "classes 'my_any', expected no class that is read as 'any' and a part",
    ),
    "another order": ({"run_order": "column"}, "run_order 'column', expected columns or rows"),
    "a first index of 2": ({"first_index": 2}, "first_index 2, expected 1 or 0"),
    "a first index of true": ({"first_index": True}, "first_index True, expected 1 or 0"),
    "two channels": ({"channels": 2}, "channels 2, expected 1 or 3"),
    "twelve bits": ({"bits": 12}, "bits 12, expected 8 or 16"),
    "a mask size of one side": ({"mask_size": [350]}, "mask_size .*height, width"),
    "a mask size of text": ({"mask_size": "350x525"}, "mask_size '350x525', expected"),
    "no images": ({"n_images": 0}, "n_images 0, expected a whole number"),
    "a limit of 0": ({"time_limit_s": 0}, "time_limit_s 0, expected seconds above 0"),
    "an empty token that is a number": ({"empty": -1}, "empty -1, expected text"),
    "counts of two classes": ({"images_with_class": [1, 2]}, "images_with_class .*4 whole numbers"),
    "counts of no total": ({"images_with_class": [1, 2, 3, 4]}, "n_training_images None"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_description_is_refused_for(case: str, tmp_path: Path) -> None:
    changes, message = FAULTS[case]
    (tmp_path / "competition.json").write_text(json.dumps({"slug": "mine"} | changes))
    with pytest.raises(ValueError, match=message) as error:
        load_competition(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "competition.json"))


def test_a_description_without_a_slug_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mine\.json: lacks slug, the competition's name in its"):
        parse_competition({"classes": ["a"]}, Path("mine.json"))


def test_classes_that_only_look_alike_or_stand_apart_are_taken() -> None:
    """Another separator, or a column of their own: nothing is read as another class's."""
    for template, names in (
        ("{image} {class}", ("bowel", "large_bowel")),
        ("{class}_{image}", ("sport", "sport_car")),
        ("{image}_{class}", ("bowel", "bowel_large")),
    ):
        layouts = ({"a": template, "b": "{mask}"},)
        check_competition(Competition(classes=names, layouts=layouts))
    apart = ({"i": "{image}", "c": "{class}", "b": "{mask}"},)
    check_competition(Competition(classes=("bowel", "large_bowel"), layouts=apart))


@pytest.mark.parametrize("names", [("sport", "sport_car"), ("sport_car", "sport")])
def test_of_two_classes_that_a_cell_begins_with_it_is_of_the_longer(
    names: tuple[str, str], tmp_path: Path
) -> None:
    layouts = ({"id": "{class}_{image}", "rle": "{mask}"},)
    competition = Competition(classes=names, layouts=layouts)
    (tmp_path / "a.csv").write_text("id,rle\nsport_car_1.jpg,\nsport_1.jpg,\n")
    _, rows = read_rows(tmp_path / "a.csv", competition)
    found = [(name, names[label - 1]) for name, label, _ in rows]
    assert found == [("1.jpg", "sport_car"), ("1.jpg", "sport")]


def test_a_folder_without_a_description_is_severstals(tmp_path: Path) -> None:
    assert load_competition(tmp_path) == SEVERSTAL


def test_a_row_that_no_template_fits_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    clouds = find_competition("clouds")
    path = tmp_path / "s.csv"
    path.write_text("Image_Label,EncodedPixels\na.jpg_Fish,\na.jpg_Fisch,1 2\n")
    expected = r"line 3: names no class: a\.jpg_Fisch,1 2; expected one of Fish, Flower, Gravel"
    with pytest.raises(ValueError, match=expected):
        read_rows(path, clouds)
    path.write_text("Image_Label,rle\na.jpg_Fish,\n")
    with pytest.raises(ValueError, match=r"line 1: header .*expected Image_Label,EncodedPixels"):
        read_rows(path, clouds)


def test_a_field_that_is_left_out_is_severstals() -> None:
    found = parse_competition({"slug": "mine"}, Path("competition.json"))
    assert found.layouts == SEVERSTAL.layouts
    # what was counted there is not known here
    assert found.images_with_class is found.median_areas is None


def test_the_schema_has_every_field_with_its_default_and_the_shipped_ones_keep_to_it() -> None:
    jsonschema: Any = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "docs" / "competition.schema.json").read_text(encoding="utf-8"))
    defaults = {name: field["default"] for name, field in schema["properties"].items()}
    assert defaults == json.loads(json.dumps(asdict(Competition())))
    for path in sorted((ROOT / "competitions").glob("*.json")):
        jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), schema)
    for faulty in ({"slug": "mine", "clases": []}, {}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(faulty, schema)


def test_a_suffix_that_no_image_has_is_what_the_message_speaks_of(tmp_path: Path) -> None:
    save_image(tmp_path / "input" / "images" / "a.tif", draw_image(0))
    sample = tmp_path / "input" / "sample_submission.csv"
    sample.write_text("id,rle_mask\na,\n")
    salt = find_competition("salt")
    with pytest.raises(ValueError, match=r"such as 'a\.dcm'; .* or correct `suffix`"):
        find_task(Options(input=tmp_path), replace(salt, suffix=".dcm"))
    task = find_task(Options(input=tmp_path), replace(salt, suffix=".tif"))
    assert (task.images, task.names) == (sample.parent / "images", ["a.tif"])
