"""Rows as a competition names them. How a csv is read: test_csv.py."""

from dataclasses import replace

from kernel.competition import SEVERSTAL
from kernel.rows import LAYOUTS, layouts_of, masks_by_image


def test_an_image_has_the_masks_of_its_rows_and_none_of_an_empty_one() -> None:
    rows = [("a.jpg", 2, "1 1"), ("b.jpg", 1, ""), ("a.jpg", 1, "3 2"), ("a.jpg", 3, "")]
    assert masks_by_image(rows) == {"a.jpg": {2: "1 1", 1: "3 2"}}


def test_layouts_are_named_by_the_number_of_their_columns() -> None:
    named = tuple(dict.fromkeys(map(str, range(count)), "{mask}") for count in (2, 6, 7, 2, 2))
    expected = ["two-column", "six-column", "7-column", "two-column-4", "two-column-5"]
    assert list(layouts_of(replace(SEVERSTAL, layouts=named))) == expected


def test_a_suffix_and_an_empty_token_are_the_competitions() -> None:
    own = replace(SEVERSTAL, suffix=".tif", empty="-1")
    assert LAYOUTS["three-column"].line("a.tif", 3, "1 2") == "a.tif,1 2,3\n"
    assert layouts_of(own)["three-column"].line("a.tif", 3, "") == "a,-1,3\n"
    assert layouts_of(replace(own, empty=None))["two-column"].line("a.tif", 1, "") == "a_1,\n"
