"""Dice and its means against cases counted by hand."""

import itertools
import math

import numpy as np
import pytest

from training.metrics import Masks, Scores, dice

SIZE = (4, 6)


def masks(*pixels: int) -> Masks:
    """Masks (classes, H, W): the first so many pixels, row by row, of each class."""
    drawn = np.zeros((len(pixels), SIZE[0] * SIZE[1]), np.bool_)
    for mask, count in zip(drawn, pixels, strict=True):
        mask[:count] = True
    return drawn.reshape(-1, *SIZE)


@pytest.mark.parametrize(
    ("found", "truth", "expected"),
    [
        pytest.param(0, 0, 1.0, id="both empty"),
        pytest.param(5, 0, 0.0, id="something where nothing is"),
        pytest.param(0, 5, 0.0, id="nothing where something is"),
        pytest.param(24, 24, 1.0, id="both full"),
        pytest.param(4, 4, 1.0, id="the same"),
        pytest.param(2, 6, 0.5, id="a third of it: 2·2 / (2 + 6)"),
        pytest.param(6, 2, 0.5, id="three times it: 2·2 / (6 + 2)"),
    ],
)
def test_dice_of_a_pair(found: int, truth: int, expected: float) -> None:
    assert dice(masks(found), masks(truth)) == [pytest.approx(expected)]


def test_dice_of_masks_that_do_not_meet_is_zero() -> None:
    truth = masks(6)
    assert dice(np.flip(truth, axis=(-2, -1)), truth) == [0.0]


def test_dice_keeps_the_classes_apart() -> None:
    assert dice(masks(0, 2, 4, 3), masks(0, 6, 4, 0)) == pytest.approx([1.0, 0.5, 1.0, 0.0])


def test_dice_counts_more_pixels_than_a_byte_holds() -> None:
    wide = np.ones((1, 256, 1600), np.bool_)
    half = wide.copy()
    half[..., 800:] = False
    assert dice(half, wide) == [pytest.approx(2 / 3)]


@pytest.fixture
def three_strips() -> Scores:
    """A defective strip, a clean one left empty, a clean one with a false alarm."""
    scores = Scores()
    scores.add(masks(2, 0, 0), masks(6, 4, 0))  # Dice 0.5, 0, 1
    scores.add(masks(0, 0, 0), masks(0, 0, 0))  # Dice 1, 1, 1
    scores.add(masks(0, 0, 1), masks(0, 0, 0))  # Dice 1, 1, 0
    return scores


def test_the_mean_over_all_pairs(three_strips: Scores) -> None:
    assert three_strips.summary()["dice"] == pytest.approx(6.5 / 9, abs=1e-4)


def test_the_mean_over_the_pairs_that_have_a_mask(three_strips: Scores) -> None:
    assert three_strips.summary()["dice_non_empty"] == 0.25


def test_the_share_of_clean_strips_left_empty(three_strips: Scores) -> None:
    assert three_strips.summary()["clean_left_empty"] == 0.5


def test_the_means_per_class_know_only_the_classes_that_occur(three_strips: Scores) -> None:
    assert three_strips.summary()["per_class"] == {"1": 0.5, "2": 0.0}


def test_the_mean_over_non_empty_pairs_weighs_pairs_and_not_classes() -> None:
    scores = Scores()
    scores.add(masks(4, 0), masks(4, 4))  # 1 and 0
    scores.add(masks(4, 0), masks(4, 0))  # 1
    assert scores.summary()["dice_non_empty"] == pytest.approx(2 / 3, abs=1e-4)


def test_predicting_nothing_scores_the_empty_pairs_only() -> None:
    scores = Scores()
    scores.add(masks(0, 0, 0, 0), masks(0, 0, 5, 0))
    scores.add(masks(0, 0, 0, 0), masks(0, 0, 0, 0))
    summary = scores.summary()
    assert (summary["dice"], summary["dice_non_empty"]) == (7 / 8, 0.0)
    assert summary["clean_left_empty"] == 1.0


def test_a_mean_of_nothing_is_no_number() -> None:
    summary = Scores().summary()
    means = [summary[key] for key in ("dice", "dice_non_empty", "clean_left_empty")]
    assert all(isinstance(mean, float) and math.isnan(mean) for mean in means)


def test_the_intervals_are_those_of_strips_drawn_again_and_again(three_strips: Scores) -> None:
    """Of three strips all 27 draws can be listed: percentiles of the figure over them."""
    dices, clean = [1.5 / 3, 3 / 3, 2 / 3], {1: 1.0, 2: 0.0}
    draws = list(itertools.product(range(3), repeat=3))
    means = [np.mean([dices[i] for i in draw]) for draw in draws]
    kept = [[clean[i] for i in draw if i in clean] for draw in draws]
    shares = [np.mean(values) for values in kept if values]
    found = three_strips.intervals()
    for key, values in (("dice", means), ("clean_left_empty", shares)):
        ends = np.percentile(values, [2.5, 97.5], method="inverted_cdf")  # a value, none between
        assert found[key] == pytest.approx(ends.tolist(), abs=1e-4)
    assert found["dice_non_empty"] == [0.25, 0.25]  # one strip has the two pairs: no spread


def test_an_interval_of_what_no_strip_tells_is_left_out() -> None:
    scores = Scores()
    scores.add(masks(0, 2), masks(0, 2))
    assert set(scores.intervals()) == {"dice", "dice_non_empty"}
