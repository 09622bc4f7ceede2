"""The early exit: a tally ends with the masks of every pass, proven by brute force.

And the threshold: which pixels of a mean are on.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.competition import Competition
from kernel.early_exit import Tally, apply_threshold, drop_small_masks
from kernel.manifest import Manifest, MemberSpec

Floats = npt.NDArray[np.float32]
Masks = npt.NDArray[np.bool_]  # (classes, H, W)

SIZE = (3, 5)
CLASSES = 3


# --- drawn passes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What every pass says of one image, and how it is to be read."""

    gates: Floats  # (passes, classes)
    probabilities: Floats  # (passes, classes, H, W), none above its gate
    manifest: Manifest

    @property
    def n_passes(self) -> int:
        return len(self.gates)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Passes that agree, doubt or differ; thresholds that their sums meet exactly among them."""
    n_passes = draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sharpness = draw(st.sampled_from([0.05, 0.5, 3.0]))  # below 1: near 0 and 1; above: near 1/2
    clean = draw(st.sampled_from([0.0, 0.5, 0.95]))
    drawn = rng.beta(sharpness, sharpness, (n_passes, CLASSES))
    drawn = np.where(rng.random(CLASSES) < clean, drawn * 0.2, drawn)
    drawn = np.where(rng.random((n_passes, 1)) < draw(st.sampled_from([0.0, 0.4])), 1.0, drawn)
    shape = rng.beta(sharpness, sharpness, (CLASSES, *SIZE))
    doubt = draw(st.sampled_from([0.0, 0.1, 1.0]))
    masks = (1 - doubt) * shape + doubt * rng.random((n_passes, CLASSES, *SIZE))
    digits = draw(st.sampled_from([1, 2, 7]))  # few: sums that lie on the threshold
    gates: Floats = np.round(drawn, digits).astype(np.float32)
    probabilities = gates[:, :, None, None] * np.round(masks, digits).astype(np.float32)
    threshold = draw(st.sampled_from([0.05, 0.3, 0.5, 0.55, 0.8, 0.95]) | st.floats(0.01, 0.99))
    if draw(st.booleans()):  # the threshold is a pixel's own mean
        mean = np.float64(probabilities.astype(np.float64).mean(axis=0).flat[0])
        threshold = float(np.clip(mean, 0.01, 0.99))
    least = st.sampled_from([0, 1, 2, 8, 15, 16])
    min_area = draw(least | st.lists(least, min_size=CLASSES, max_size=CLASSES))  # one, or one each
    members = [MemberSpec("a", "a", {}, [0.0], [1.0])]
    manifest = Manifest(members, CLASSES, threshold, min_area, ("none",), SIZE)
    return Case(gates, probabilities, manifest)


def add_gates(tally: Tally, gates: npt.ArrayLike) -> bool:
    """One more pass is encoded; whether it counts."""
    given = torch.from_numpy(np.asarray(gates, np.float32))
    return tally.settle(tally.launch(given, None).numpy())


def add_probabilities(tally: Tally, probabilities: npt.ArrayLike) -> bool:
    """The oldest pass that is encoded is decoded; whether it counts."""
    given = torch.from_numpy(np.asarray(probabilities, np.float32))
    return tally.settle(tally.launch(None, given).numpy())


def add_pass(tally: Tally, gates: npt.ArrayLike, probabilities: npt.ArrayLike) -> bool:
    """One more pass runs in one piece; whether it counts."""
    given = [torch.from_numpy(np.asarray(each, np.float32)) for each in (gates, probabilities)]
    return tally.settle(tally.launch(given[0], given[1]).numpy())


def every_pass(case: Case) -> Masks:
    """Brute force in torch's float32, in the order of the passes, written apart from Tally."""
    total = torch.zeros(CLASSES, *SIZE)
    for probabilities in case.probabilities:
        total = total + torch.from_numpy(probabilities)
    masks: Masks = (total / case.n_passes > case.manifest.threshold).numpy()
    least: int | list[int] = case.manifest.min_area
    for mask, area in zip(masks, np.broadcast_to(least, CLASSES), strict=True):
        if mask.sum() < area:
            mask[:] = False
    return masks


def play(
    case: Case,
    decode_first: Callable[[Tally], bool],
    in_one_piece: Callable[[Tally], bool] = lambda _: False,
    *,
    early_exit: bool = True,
) -> Tally:
    """A tally to its end; where both halves are possible `decode_first` chooses.

    Where no pass waits to be decoded, `in_one_piece` chooses whether both halves run together.
    """
    tally = Tally(case.n_passes, case.manifest, early_exit)
    while tally.open:
        encoded = len(tally.gates)
        if encoded == case.n_passes or (tally.decoded < encoded and decode_first(tally)):
            add_probabilities(tally, case.probabilities[tally.decoded])
        elif tally.decoded == encoded and in_one_piece(tally):
            add_pass(tally, case.gates[encoded], case.probabilities[encoded])
        else:
            add_gates(tally, case.gates[encoded])
    return tally


@settings(max_examples=400)
@given(cases())
def test_a_tally_ends_with_the_masks_of_every_pass(case: Case) -> None:
    tally = play(case, *[lambda tally: not tally.may_be_clean] * 2)
    np.testing.assert_array_equal(tally.masks(SIZE).numpy(), every_pass(case))


@settings(max_examples=400)
@given(cases())
def test_the_masks_are_the_same_bits_with_and_without_the_early_exit(case: Case) -> None:
    early = play(case, lambda tally: not tally.may_be_clean)
    late = play(case, lambda tally: not tally.may_be_clean, early_exit=False)
    assert late.decoded == case.n_passes
    assert torch.equal(early.masks(SIZE), late.masks(SIZE))


@settings(max_examples=200)
@given(cases(), st.integers(0, 2**32 - 1))
def test_no_order_of_encoding_and_decoding_changes_a_mask(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tally = play(case, *[lambda _: bool(rng.random() < 0.5)] * 2)
    np.testing.assert_array_equal(tally.masks(SIZE).numpy(), every_pass(case))


@settings(max_examples=200)
@given(cases())
def test_a_class_is_closed_only_when_no_other_rest_could_change_it(case: Case) -> None:
    """The rest of the passes is replaced by its extremes, all 0 and all at their bounds."""
    tally = Tally(case.n_passes, case.manifest, early_exit=True)
    for index in range(case.n_passes):
        add_gates(tally, case.gates[index])
        closed = sorted(set(range(CLASSES)) - set(tally.open))
        lowest, highest = case.probabilities.copy(), case.probabilities.copy()
        lowest[tally.decoded :] = 0
        highest[tally.decoded : index + 1] = case.gates[tally.decoded : index + 1, :, None, None]
        highest[index + 1 :] = 1
        extremes = [every_pass(replace(case, probabilities=p)) for p in (lowest, highest)]
        np.testing.assert_array_equal(extremes[0][closed], extremes[1][closed])
        if not tally.open:
            break
        add_probabilities(tally, case.probabilities[index])


@settings(max_examples=200)
@given(cases(), st.integers(0, 2**32 - 1))
def test_where_passes_are_dropped_the_masks_are_those_of_the_others(case: Case, seed: int) -> None:
    """At random, passes give NaN: some at their encoder, some at their decoder."""
    rng = np.random.default_rng(seed)
    lost = rng.choice(["no", "encoder", "decoder"], case.n_passes, p=[0.6, 0.2, 0.2])
    tally, counted = Tally(case.n_passes, case.manifest, early_exit=True), list[int]()
    coming, waiting = list(range(case.n_passes)), list[int]()  # not encoded; not decoded
    while tally.open:
        if waiting and (not coming or rng.random() < 0.5):
            index = waiting.pop(0)
            if lost[index] == "decoder":
                assert not add_probabilities(tally, np.full((CLASSES, *SIZE), np.nan))
            else:
                add_probabilities(tally, case.probabilities[index])
                counted.append(index)
        else:
            index = coming.pop(0)
            if lost[index] == "encoder":
                assert not add_gates(tally, np.full(CLASSES, np.nan))
            else:
                add_gates(tally, case.gates[index])
                waiting.append(index)
    rest = [*counted, *waiting, *coming]  # any of the last two may still be lost, or none
    assert tally.n_passes == len(rest)
    if rest:
        left = replace(case, gates=case.gates[rest], probabilities=case.probabilities[rest])
        np.testing.assert_array_equal(tally.masks(SIZE).numpy(), every_pass(left))


@settings(max_examples=200)
@given(cases(), st.integers(0, 2**32 - 1))
def test_gates_that_are_released_and_come_again_change_no_mask(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tally = Tally(case.n_passes, case.manifest, early_exit=True)
    while tally.open:
        encoded = len(tally.gates)
        if rng.random() < 0.2:
            tally.release_gates()
            assert len(tally.gates) == tally.decoded and not tally.bounds
        elif tally.decoded < encoded and (encoded == case.n_passes or rng.random() < 0.5):
            add_probabilities(tally, case.probabilities[tally.decoded])
        else:
            add_gates(tally, case.gates[encoded])
    np.testing.assert_array_equal(tally.masks(SIZE).numpy(), every_pass(case))


@settings(max_examples=200)
@given(cases(), st.integers(1, 20), st.integers(0, 5))
def test_a_tally_that_is_ended_early_has_the_masks_of_its_decoded_passes(
    case: Case, decoded: int, ahead: int
) -> None:
    tally = Tally(case.n_passes, case.manifest, early_exit=True)
    for index in range(min(decoded, case.n_passes)):
        while len(tally.gates) < min(index + 1 + ahead, case.n_passes):
            add_gates(tally, case.gates[len(tally.gates)])
        add_probabilities(tally, case.probabilities[index])
    done = slice(tally.decoded)
    tally.finalize()
    assert not tally.open
    first = replace(case, gates=case.gates[done], probabilities=case.probabilities[done])
    np.testing.assert_array_equal(tally.masks(SIZE).numpy(), every_pass(first))


def test_without_the_early_exit_every_pass_is_decoded() -> None:
    manifest = Manifest([], CLASSES, 0.55)
    tally = Tally(4, manifest, early_exit=False)
    for _ in range(4):
        assert tally.open == [0, 1, 2]
        add_gates(tally, np.zeros(CLASSES))
        assert not tally.may_be_clean
        add_probabilities(tally, torch.zeros(CLASSES, *SIZE))
    assert not tally.open


def encoders_alone(gate: float, n_passes: int = 15, threshold: float = 0.55) -> int:
    """Encoders until an image of such gates is proven empty."""
    tally = Tally(n_passes, Manifest([], 1, threshold), early_exit=True)
    while tally.open:
        add_gates(tally, [gate])
    assert tally.total is None
    return len(tally.gates)


@pytest.mark.parametrize(("gate", "encoders"), [(0.0, 7), (0.03, 7), (0.05, 8), (0.3, 10)])
def test_a_clean_image_of_15_passes_needs_so_many_encoders(gate: float, encoders: int) -> None:
    assert encoders_alone(gate) == encoders  # n with n·gate + 15 - n ≤ 8.25
    assert encoders * gate + 15 - encoders <= 8.25 < (encoders - 1) * gate + 16 - encoders


@pytest.mark.parametrize("side", [-1, 0, 1])
def test_a_sum_at_the_thresholds_edge_is_left_to_the_last_pass(side: int) -> None:
    """Two passes of 0.5 ± a rounding: off by the bound would be a guess."""
    edge = np.float32(0.5) if side == 0 else np.nextafter(np.float32(0.5), np.float32(side))
    manifest = Manifest([], 1, 0.5)
    tally = Tally(2, manifest, early_exit=True)
    for _ in range(2):
        add_gates(tally, [float(edge)])
    for _ in range(2):
        assert tally.open == [0]  # whichever side it seems to be on
        add_probabilities(tally, torch.full((1, 1, 1), float(edge)))
    assert tally.decoded == 2
    assert bool(tally.masks((1, 1))[0, 0, 0]) == (float(edge) > 0.5)


def sums_that_round_below_the_threshold() -> list[tuple[int, float, np.float32]]:
    """Passes, threshold and a sum above their product whose mean is, in fp32, not above it."""
    found = []
    for passes in range(3, 40):
        for threshold in np.linspace(0.5, 0.9, 41):
            total = np.nextafter(np.float32(passes * threshold), np.float32(np.inf))
            mean = torch.tensor(total) / passes
            if float(total) > passes * threshold and not bool(mean > float(threshold)):
                found.append((passes, float(threshold), total))
    return found


def test_a_sum_above_the_bound_by_a_rounding_is_not_surely_on() -> None:
    cases = sums_that_round_below_the_threshold()
    assert len(cases) > 20
    for passes, threshold, total in cases:
        whole = int(total)
        steps = [1.0] * whole + [float(total) - whole] + [0.0] * (passes - whole - 1)
        tally = Tally(passes, Manifest([], 1, threshold), early_exit=True)
        for step in steps:
            if tally.open:
                add_gates(tally, np.ones(1))
                add_probabilities(tally, torch.full((1, 1, 1), step))
        assert not tally.masks((1, 1)).any(), (passes, threshold, total)


def test_a_mask_that_cannot_reach_min_area_closes_its_class() -> None:
    """One pixel of 15 may still be on, the class needs two: nothing more is run."""
    probabilities = torch.zeros(1, *SIZE)
    probabilities[0, 1, 2] = 1
    tallies = [Tally(3, Manifest([], 1, 0.5, area), True) for area in (1, 2)]
    for tally in tallies:
        for _ in range(2):
            add_gates(tally, np.ones(1))
            if tally.open:
                add_probabilities(tally, probabilities)
    assert [tally.open for tally in tallies] == [[], []]
    add_pass(tallies[0], np.ones(1), probabilities)
    assert [int(tally.masks(SIZE).sum()) for tally in tallies] == [1, 0]


def test_a_class_is_held_against_its_own_min_area() -> None:
    """In each class one pixel of 15 may still be on: the second needs two, and closes."""
    probabilities = torch.zeros(2, *SIZE)
    probabilities[:, 1, 2] = 0.5
    for areas, still_open in (([1, 2], [0]), ([2, 1], [1]), ([0, 0], [0, 1])):
        tally = Tally(3, Manifest([], 2, 0.5, areas), early_exit=True)
        for _ in range(2):
            add_pass(tally, np.ones(2), probabilities)
        assert tally.open == still_open
        add_pass(tally, np.ones(2), torch.ones(2, *SIZE) * (probabilities > 0))
        assert tally.masks(SIZE).sum(dim=(-2, -1)).tolist() == [area < 2 for area in areas]


def test_masks_of_no_decoder_are_bool_and_empty() -> None:
    masks = Tally(3, Manifest([], 2), early_exit=True).masks((2, 3))
    assert masks.dtype == torch.bool and masks.shape == (2, 2, 3) and not masks.any()


def test_a_class_that_was_proven_is_open_again_when_a_pass_is_dropped() -> None:
    """Three passes at 0.45: the first class is off by 0.2 + 0.1 + 1 ≤ 1.35, with two it is not."""
    tally = Tally(3, Manifest([], 2, threshold=0.45), early_exit=True)
    for gates in ([0.2, 1.0], [0.1, 1.0]):
        add_gates(tally, gates)
    add_probabilities(tally, torch.tensor([0.2, 1.0])[:, None, None])
    assert tally.open == [1]
    assert not add_probabilities(tally, np.full((2, 1, 1), np.nan))
    assert tally.open == [0, 1]
    add_gates(tally, [1.0, 0.1])
    assert tally.open == [0]  # the second is on by 1.0 > 0.9
    add_probabilities(tally, torch.tensor([0.9, 0.05])[:, None, None])
    assert tally.masks((1, 1)).ravel().tolist() == [True, True]


def test_masks_that_gates_alone_prove_empty_have_the_competitions_size() -> None:
    for mask_size, expected in ((None, SIZE), ((2, 4), (2, 4))):
        tally = Tally(1, Manifest([], competition=Competition(mask_size=mask_size)), True)
        add_gates(tally, [0.0] * 4)
        assert not tally.open
        assert tally.masks(SIZE).shape == (4, *expected)


# --- the threshold --------------------------------------------------------------------------------


def test_a_pixel_is_on_only_above_the_threshold() -> None:
    half = np.float32(0.5)
    below, above = (float(np.nextafter(half, np.float32(side))) for side in (0, 1))
    mean = torch.tensor([[[0.0, below, 0.5, above, 1.0]]])
    assert apply_threshold(mean, 0.5, [0]).tolist() == [[[False, False, False, True, True]]]


@pytest.mark.parametrize(
    ("min_areas", "kept"),
    [
        ([0, 0, 0], [2, 3, 0]),
        ([3, 3, 3], [0, 3, 0]),
        ([4, 4, 4], [0, 0, 0]),
        ([2, 4, 0], [2, 0, 0]),
        ([3, 3, 0], [0, 3, 0]),
    ],
)
def test_a_class_of_fewer_pixels_than_its_min_area_is_emptied(
    min_areas: list[int], kept: list[int]
) -> None:
    mean = torch.zeros(3, 2, 4)
    mean[0, 0, :2] = mean[1, 1, 1:] = 1.0
    masks = apply_threshold(mean, 0.5, min_areas)
    assert masks.dtype == torch.bool
    assert masks.sum(dim=(-2, -1)).tolist() == kept
    assert torch.equal(drop_small_masks(mean > 0.5, min_areas), masks)
    assert not (masks & (mean == 0)).any()
