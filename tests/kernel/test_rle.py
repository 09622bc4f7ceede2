"""Run-length code: pycocotools, whose runs are column-major too, is the independent oracle."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco

from kernel.competition import SEVERSTAL
from kernel.images import Mask, Size
from kernel.rle import decode_rle, encode_rle, is_empty_mark, join_rles, rle_fault

repeatable = settings(derandomize=True, max_examples=150)


def drawn_masks() -> st.SearchStrategy[Mask]:
    """Masks from 1×1 to 24×24, scattered and almost empty or almost full."""
    sizes = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24)
    scattered = arrays(np.bool_, sizes)
    sparse = arrays(np.bool_, sizes, elements=st.just(True), fill=st.just(False))
    return st.one_of(scattered, sparse, sparse.map(np.logical_not))


def mask_with(size: tuple[int, int], *pixels: tuple[int, int]) -> Mask:
    mask = np.zeros(size, np.bool_)
    for row, column in pixels:
        mask[row, column] = True
    return mask


BORDER_CASES = {
    "empty": mask_with((5, 7)),
    "full": ~mask_with((5, 7)),
    "one pixel": mask_with((5, 7), (2, 3)),
    "first pixel": mask_with((5, 7), (0, 0)),
    "last pixel": mask_with((5, 7), (4, 6)),
    "last column": mask_with((5, 7), *((row, 6) for row in range(5))),
    "one image pixel, on": mask_with((1, 1), (0, 0)),
    "one image pixel, off": mask_with((1, 1)),
    "one row": mask_with((1, 9), (0, 2), (0, 3), (0, 8)),
    "one column": mask_with((9, 1), (2, 0), (3, 0), (8, 0)),
    "foot of a column and head of the next": mask_with((5, 7), (4, 2), (0, 3)),
}


def size_of(mask: Mask) -> Size:
    return mask.shape[0], mask.shape[1]


def numbers(rle: str) -> list[int]:
    return [int(word) for word in rle.split()]


def runs(rle: str) -> list[tuple[int, int]]:
    listed = numbers(rle)
    return list(zip(listed[::2], listed[1::2], strict=True))


def counts_of(rle: str, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's uncompressed counts of `start length` pairs: off, on, off, … from the first pixel."""
    counts, end = [], 0  # pixels before the run
    for start, length in runs(rle):
        counts += [start - 1 - end, length]
        end = start - 1 + length
    tail = size[0] * size[1] - end
    return {"size": list(size), "counts": counts + ([tail] if tail else [])}


def assert_cocos_code(mask: Mask) -> None:
    expected = coco.encode(np.asfortranarray(mask, np.uint8))
    size = size_of(mask)
    found = coco.frPyObjects(counts_of(encode_rle(mask, SEVERSTAL), size), *size)
    same = found["counts"] == expected["counts"]
    assert same, f"{encode_rle(mask, SEVERSTAL)[:80]} is not {expected}"[:200]


# --- both ways ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BORDER_CASES)
def test_the_code_is_pycocotools_at_the_borders(case: str) -> None:
    assert_cocos_code(BORDER_CASES[case])


@repeatable
@given(mask=drawn_masks())
def test_the_code_is_pycocotools(mask: Mask) -> None:
    assert_cocos_code(mask)


# pycocotools 2.0 answers numpy 2 with a warning of its own
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@repeatable
@given(mask=drawn_masks())
def test_a_code_decodes_to_the_mask_that_pycocotools_decodes(mask: Mask) -> None:
    rle, size = encode_rle(mask, SEVERSTAL), size_of(mask)
    expected = coco.decode(coco.frPyObjects(counts_of(rle, size), *size))
    np.testing.assert_array_equal(decode_rle(rle, size, SEVERSTAL), expected.astype(bool))


@repeatable
@given(mask=drawn_masks())
@example(mask=BORDER_CASES["empty"])
@example(mask=BORDER_CASES["last pixel"])
@example(mask=BORDER_CASES["one row"])
@example(mask=BORDER_CASES["one column"])
def test_decoding_what_was_encoded_gives_the_mask_back(mask: Mask) -> None:
    found = decode_rle(encode_rle(mask, SEVERSTAL), size_of(mask), SEVERSTAL)
    assert found.dtype == np.bool_
    np.testing.assert_array_equal(found, mask)


@repeatable
@given(mask=drawn_masks())
@example(mask=BORDER_CASES["foot of a column and head of the next"])
def test_runs_are_sorted_and_do_not_touch(mask: Mask) -> None:
    listed = runs(encode_rle(mask, SEVERSTAL))
    assert all(length >= 1 for _, length in listed)
    ends = [start + length for start, length in listed]
    assert all(end < start for end, (start, _) in zip(ends, listed[1:], strict=False))
    assert sum(length for _, length in listed) == mask.sum()


def test_a_mask_of_a_real_strips_size_is_pycocotools() -> None:
    mask = np.random.default_rng(0).random((256, 1600)) < 0.3
    assert 0 < mask.mean() < 1
    assert_cocos_code(mask)
    np.testing.assert_array_equal(
        decode_rle(encode_rle(mask, SEVERSTAL), size_of(mask), SEVERSTAL), mask
    )


def test_pixels_are_counted_from_one_down_the_columns() -> None:
    # (H, W) = (3, 4): pixel 1 is the top left, 2 the one below it, 4 the head of column two
    assert encode_rle(mask_with((3, 4), (0, 0), (1, 0)), SEVERSTAL) == "1 2"
    assert encode_rle(mask_with((3, 4), (0, 1)), SEVERSTAL) == "4 1"
    assert encode_rle(mask_with((3, 4), (2, 0), (0, 1)), SEVERSTAL) == "3 2"


def test_the_competitions_own_sample_row_is_the_full_strip() -> None:
    assert encode_rle(np.ones((256, 1600), np.bool_), SEVERSTAL) == "1 409600"


def test_an_empty_mask_is_an_empty_string_both_ways() -> None:
    assert encode_rle(np.zeros((4, 6), np.bool_), SEVERSTAL) == ""
    assert not decode_rle("", (4, 6), SEVERSTAL).any()
    assert decode_rle("", (4, 6), SEVERSTAL).shape == (4, 6)


def test_a_mask_that_is_a_view_is_encoded_as_it_looks() -> None:
    mask = np.random.default_rng(1).random((10, 14)) < 0.5
    view = mask[::2, ::-1]
    assert encode_rle(view, SEVERSTAL) == encode_rle(view.copy(), SEVERSTAL)


# --- codes that are refused -----------------------------------------------------------------------

UNDECODABLE = {
    "an odd count": "1 2 5",
    "a start of zero": "0 2",
    "a negative start": "-3 2",
    "a length of zero": "3 0",
    "a negative length": "3 -1",
    "a run past the last pixel": "24 2",
    "a start past the last pixel": "25 1",
    "a run longer than the image": "1 25",
    "a second run past the last pixel": "1 2 20 9",
    "a word": "1 two",
    "a fraction": "1 2.5",
    "a comma": "1,2",
    "a number that no integer holds": "99999999999999999999 1",
    "a sum that wraps round": "9223372036854775807 9223372036854775807",
}


@pytest.mark.parametrize("case", UNDECODABLE)
def test_decoding_refuses(case: str) -> None:
    with pytest.raises(ValueError):
        decode_rle(UNDECODABLE[case], (4, 6), SEVERSTAL)


def test_a_refused_run_is_named() -> None:
    with pytest.raises(ValueError, match=r"run 24 2 .*24 pixels"):
        decode_rle("1 3 24 2", (4, 6), SEVERSTAL)


def test_the_last_pixel_alone_is_no_malformed_run() -> None:
    np.testing.assert_array_equal(decode_rle("24 1", (4, 6), SEVERSTAL), mask_with((4, 6), (3, 5)))


# --- what Kaggle refuses --------------------------------------------------------------------------


def canonical(pixels: set[int]) -> str:
    """The one well-formed code of a set of pixels, counted from 1, built run by run."""
    starts = sorted(pixel for pixel in pixels if pixel - 1 not in pixels)
    ends = sorted(pixel for pixel in pixels if pixel + 1 not in pixels)
    return " ".join(f"{s} {e - s + 1}" for s, e in zip(starts, ends, strict=True))


@settings(repeatable, max_examples=300)
@given(st.lists(st.integers(-1, 26), max_size=8))
def test_a_code_is_well_formed_just_where_it_is_the_one_code_of_its_pixels(
    words: list[int],
) -> None:
    pairs = list(zip(words[::2], words[1::2], strict=False))
    pixels = {pixel for start, length in pairs for pixel in range(start, start + length)}
    rle = " ".join(map(str, words))
    good = canonical(pixels) == rle and pixels <= set(range(1, 25))
    assert (rle_fault(rle, 24, SEVERSTAL) is None) == good


@settings(repeatable, max_examples=300)
@given(st.sets(st.integers(1, 24)))
def test_every_set_of_pixels_has_a_code_that_passes(pixels: set[int]) -> None:
    assert rle_fault(canonical(pixels), 24, SEVERSTAL) is None
    mask = decode_rle(canonical(pixels), (4, 6), SEVERSTAL)
    assert {int(i) + 1 for i in np.flatnonzero(mask.T.ravel())} == pixels


ILL_FORMED = {
    "a word": ("1 two", "'two' is no number"),
    "a fraction": ("1 2.5", "'2.5' is no number"),
    "a comma": ("1,2", "'1,2' is no number"),
    "an odd count": ("1 2 5", "3 numbers, expected pairs"),
    "pixel zero": ("0 2", "0-indexed"),
    "a negative start": ("-4 2", "before pixel 1"),
    "a length of zero": ("3 0", "has no pixel"),
    "a negative length": ("3 -1", "has no pixel"),
    "unsorted runs": ("9 2 1 2", "overlaps or comes before the run that ends at 10"),
    "an overlap": ("1 4 3 4", "overlaps or comes before the run that ends at 4"),
    "starts from the run before": ("9 2 4 2", "or make the starts of a relative code absolute"),
    "touching runs": ("1 4 5 2", "touches the run that ends at 4"),
    "one pixel too many": ("24 2", "leaves an image of 24 pixels"),
    "a number that no integer holds": ("99999999999999999999 1", "leaves an image"),
    "a number of more digits than Python reads": (f"{'9' * 5000} 1", "4300 digits"),
}


@pytest.mark.parametrize("case", ILL_FORMED)
def test_an_ill_formed_code_is_refused_by_what_is_wrong(case: str) -> None:
    rle, words = ILL_FORMED[case]
    assert words in str(rle_fault(rle, 24, SEVERSTAL))


@pytest.mark.parametrize("cell", ["", " ", "-1", " -1 ", "1 0", "0 0", "1 0 5 0", "1 00"])
def test_a_cell_without_a_pixel_stands_for_an_empty_mask(cell: str) -> None:
    assert is_empty_mark(cell)


@pytest.mark.parametrize("cell", ["1 1", "0 1", "1 10", "1 0 5 1", "0 1.0 eNoLTDA="])
def test_a_cell_with_a_pixel_or_of_another_code_stands_for_no_empty_mask(cell: str) -> None:
    assert not is_empty_mark(cell)


@repeatable
@given(masks=st.lists(arrays(np.bool_, (4, 6)), min_size=1, max_size=4))
def test_joined_codes_are_those_of_the_union(masks: list[Mask]) -> None:
    joined = join_rles(encode_rle(mask, SEVERSTAL) for mask in masks)
    assert joined == encode_rle(np.logical_or.reduce(masks), SEVERSTAL)
