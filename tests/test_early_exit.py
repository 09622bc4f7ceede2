"""The early exit: the same masks as every pass, proven on drawn probabilities and on real runs."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import random_network, tiny_entry, tiny_model, write_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from build_kernel import build
from kernel.early_exit import Tally
from kernel.ensemble import Ensemble, Flight, load_ensemble
from kernel.images import Strip
from kernel.logs import Stages
from kernel.manifest import Manifest, MemberSpec, load_manifest

CPU = torch.device("cpu")
SIZE = (3, 5)
CLASSES = 3


# --- drawn passes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What every pass says of one image, and how it is to be read."""

    gates: np.ndarray  # (passes, classes), float32
    probabilities: np.ndarray  # (passes, classes, H, W), float32, none above its gate
    manifest: Manifest

    @property
    def passes(self) -> int:
        return len(self.gates)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Passes that agree, doubt or differ; thresholds that their sums meet exactly among them."""
    passes = draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sharpness = draw(st.sampled_from([0.05, 0.5, 3.0]))  # below 1: near 0 and 1; above: near 1/2
    clean = draw(st.sampled_from([0.0, 0.5, 0.95]))
    gates = rng.beta(sharpness, sharpness, (passes, CLASSES))
    gates = np.where(rng.random(CLASSES) < clean, gates * 0.2, gates)
    gates = np.where(rng.random((passes, 1)) < draw(st.sampled_from([0.0, 0.4])), 1.0, gates)
    shape = rng.beta(sharpness, sharpness, (CLASSES, *SIZE))
    doubt = draw(st.sampled_from([0.0, 0.1, 1.0]))
    masks = (1 - doubt) * shape + doubt * rng.random((passes, CLASSES, *SIZE))
    digits = draw(st.sampled_from([1, 2, 7]))  # few: sums that lie on the threshold
    gates = np.round(gates, digits).astype(np.float32)
    probabilities = gates[:, :, None, None] * np.round(masks, digits).astype(np.float32)
    threshold = draw(st.sampled_from([0.05, 0.3, 0.5, 0.55, 0.8, 0.95]) | st.floats(0.01, 0.99))
    if draw(st.booleans()):  # the threshold is a pixel's own mean
        mean = np.float64(probabilities.astype(np.float64).mean(axis=0).flat[0])
        threshold = float(np.clip(mean, 0.01, 0.99))
    min_area = draw(st.sampled_from([0, 1, 2, 8, 15, 16]))
    members = [MemberSpec("a", "a", {}, [0.0], [1.0])]
    manifest = Manifest(members, CLASSES, threshold, min_area, ("none",), SIZE)
    return Case(gates, probabilities.astype(np.float32), manifest)


def every_pass(case: Case) -> np.ndarray:
    """Brute force in torch's float32, in the order of the passes, written apart from Tally."""
    total = torch.zeros(CLASSES, *SIZE)
    for probabilities in case.probabilities:
        total = total + torch.from_numpy(probabilities)
    masks = (total / case.passes > case.manifest.threshold).numpy()
    for mask in masks:
        if mask.sum() < case.manifest.min_area:
            mask[:] = False
    return masks


def played(case: Case, decode_first: Callable[[Tally], bool]) -> Tally:
    """A tally to its end; where both halves are possible `decode_first` chooses."""
    tally = Tally(case.passes, case.manifest, early_exit=True)
    while tally.open:
        encoded = len(tally.gates)
        if encoded == case.passes or (tally.decoded < encoded and decode_first(tally)):
            tally.decode(torch.from_numpy(case.probabilities[tally.decoded]))
        else:
            tally.encode(case.gates[encoded].astype(np.float64))
    return tally


@settings(max_examples=400, deadline=None)
@given(cases())
def test_a_tally_ends_with_the_masks_of_every_pass(case: Case) -> None:
    tally = played(case, lambda tally: not tally.looks_clean)
    np.testing.assert_array_equal(tally.masks(SIZE), every_pass(case))


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_no_order_of_encoding_and_decoding_changes_a_mask(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tally = played(case, lambda _: bool(rng.random() < 0.5))
    np.testing.assert_array_equal(tally.masks(SIZE), every_pass(case))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_a_class_is_closed_only_when_no_other_rest_could_change_it(case: Case) -> None:
    """The rest of the passes is replaced by its extremes, all 0 and all at their bounds."""
    tally = Tally(case.passes, case.manifest, early_exit=True)
    for index in range(case.passes):
        tally.encode(case.gates[index].astype(np.float64))
        closed = sorted(set(range(CLASSES)) - set(tally.open))
        lowest, highest = case.probabilities.copy(), case.probabilities.copy()
        lowest[tally.decoded :] = 0
        highest[tally.decoded : index + 1] = case.gates[tally.decoded : index + 1, :, None, None]
        highest[index + 1 :] = 1
        extremes = [every_pass(replace(case, probabilities=p)) for p in (lowest, highest)]
        np.testing.assert_array_equal(extremes[0][closed], extremes[1][closed])
        if not tally.open:
            break
        tally.decode(torch.from_numpy(case.probabilities[index]))


def test_without_the_early_exit_every_pass_is_decoded() -> None:
    manifest = Manifest([], CLASSES, 0.55)
    tally = Tally(4, manifest, early_exit=False)
    for _ in range(4):
        assert tally.open == [0, 1, 2]
        tally.encode(np.zeros(CLASSES))
        assert not tally.looks_clean
        tally.decode(torch.zeros(CLASSES, *SIZE))
    assert not tally.open


def alone(gate: float, passes: int = 15, threshold: float = 0.55) -> int:
    """Encoders until an image of such gates is proven empty."""
    tally = Tally(passes, Manifest([], 1, threshold), early_exit=True)
    while tally.open:
        tally.encode(np.array([gate]))
    assert tally.total is None
    return len(tally.gates)


@pytest.mark.parametrize(("gate", "encoders"), [(0.0, 7), (0.03, 7), (0.05, 8), (0.3, 10)])
def test_a_clean_image_of_15_passes_needs_so_many_encoders(gate: float, encoders: int) -> None:
    assert alone(gate) == encoders  # n with n·gate + 15 - n ≤ 8.25
    assert encoders * gate + 15 - encoders <= 8.25 < (encoders - 1) * gate + 16 - encoders


@pytest.mark.parametrize("side", [-1, 0, 1])
def test_a_sum_at_the_thresholds_edge_is_left_to_the_last_pass(side: int) -> None:
    """Two passes of 0.5 ± a rounding: off by the bound would be a guess."""
    edge = np.float32(0.5) if side == 0 else np.nextafter(np.float32(0.5), np.float32(side))
    manifest = Manifest([], 1, 0.5)
    tally = Tally(2, manifest, early_exit=True)
    for _ in range(2):
        tally.encode(np.array([float(edge)]))
        tally.decode(torch.full((1, 1, 1), float(edge)))
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
                tally.encode(np.ones(1))
                tally.decode(torch.full((1, 1, 1), step))
        assert not tally.masks((1, 1)).any(), (passes, threshold, total)


def test_a_mask_that_cannot_reach_min_area_closes_its_class() -> None:
    """One pixel of 15 may still be on, the class needs two: nothing more is run."""
    probabilities = torch.zeros(1, *SIZE)
    probabilities[0, 1, 2] = 1
    tallies = [Tally(3, Manifest([], 1, 0.5, area), True) for area in (1, 2)]
    for tally in tallies:
        for _ in range(2):
            tally.encode(np.ones(1))
            if tally.open:
                tally.decode(probabilities)
    assert [tally.open for tally in tallies] == [[], []]
    tallies[0].decode(probabilities)
    assert [int(tally.masks(SIZE).sum()) for tally in tallies] == [1, 0]


# --- through networks -----------------------------------------------------------------------------


def blotches(seed: int, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.uniform(0, 255, (4, 5)).astype(np.float32), size[::-1])
    return np.clip(image + rng.normal(0, 20, size), 0, 255).astype(np.uint8)


def open_for_some(network: Any, spec: dict[str, Any], seed: int) -> None:
    """Draws the presence head anew so that it says yes to some images and no to others."""
    images = torch.from_numpy(np.stack([blotches(seed) for seed in range(20)]))[:, None] / 255
    with torch.no_grad():
        features = network.encoder((images - spec["mean"][0]) / spec["std"][0])[-1]
        pooled = features.amax(dim=(-2, -1))  # (20, channels)
        linear = network.classification_head[3]
        torch.manual_seed(seed % 2)  # some members agree
        weight = torch.randn(linear.weight.shape) / (pooled.std(dim=0) + 1e-3)
        logits = pooled @ weight.T
        linear.weight.copy_(weight * 4 / logits.std(dim=0)[:, None])
        linear.bias.copy_(-4 * logits.mean(dim=0) / logits.std(dim=0) - 3)


def doubting(folder: Path) -> Path:
    """Five members: gates that open for some images and classes and stay shut for others."""
    folder.mkdir()
    models = [tiny_model(arch) for arch in ("Unet", "FPN", "Unet", "FPN")]
    models.append(tiny_model("Unet", channels=3, presence=False))
    entries = [tiny_entry(f"m{seed}", model) for seed, model in enumerate(models)]
    for seed, (model, entry) in enumerate(zip(models, entries, strict=True)):
        network = random_network(model, seed)
        if "aux_params" in model:
            open_for_some(network, entry, seed)
        save_file(network.state_dict(), folder / entry["file"])
    write_manifest(folder, entries, threshold=0.45)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doubting")
    build(doubting(folder / "weights"), folder / "dist", owner="somebody")
    return folder / "dist" / "dataset"


def ensemble_of(bundle: Path, **options: Any) -> Ensemble:
    manifest = load_manifest(bundle)
    return load_ensemble(bundle, manifest, CPU, Stages(), **options)


def landed(ensemble: Ensemble, images: list[np.ndarray]) -> dict[str, Flight]:
    strips = [Strip(str(index), image) for index, image in enumerate(images)]
    return {flight.strip.name: flight for flight in ensemble.fly(strips)}


def test_passes_run_cheapest_member_first(bundle: Path) -> None:
    flops = [sum(member.spec.flops) for member, _ in ensemble_of(bundle).passes]
    assert flops == sorted(flops)
    assert flops[0] < flops[-1]


def test_a_member_rests_when_the_turn_of_another_comes(bundle: Path) -> None:
    rested: list[str] = []
    members = [
        replace(member, rests=(partial(rested.append, member.spec.name),))
        for member in ensemble_of(bundle).members
    ]
    ensemble = Ensemble(load_manifest(bundle), members, CPU, Stages(), early_exit=False)
    landed(ensemble, [blotches(0), blotches(1)])
    in_order = [member.spec.name for member in members]
    assert rested == [*in_order, *in_order][:-1]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_masks_of_networks_are_the_same_and_take_less_work(
    bundle: Path, batch_size: int
) -> None:
    sizes = [(64, 96), (40, 70)]
    images = [blotches(seed, sizes[seed % 2]) for seed in range(14)]
    early = landed(ensemble_of(bundle, batch_size=batch_size), images)
    full = landed(ensemble_of(bundle, batch_size=batch_size, early_exit=False), images)
    assert early.keys() == full.keys() == {str(index) for index in range(14)}
    ensemble = ensemble_of(bundle)
    shares = []
    for name, flight in early.items():
        masks = flight.tally.masks(flight.size)
        np.testing.assert_array_equal(masks, full[name].tally.masks(flight.size))
        assert ensemble.work(full[name]) == {
            "passes": 15,
            "encoders": 15,
            "decoders": 15,
            "share": 1.0,
        }
        shares.append(ensemble.work(flight)["share"])
    assert min(shares) < 0.5 < 0.9 < max(shares)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_pass_gives_an_image_the_same_bits_whatever_shares_its_batch(
    bundle: Path, batch_size: int
) -> None:
    ensemble = ensemble_of(bundle)
    image, *others = [ensemble.prepare(blotches(seed)) for seed in range(8)]
    seen = []
    for place in range(batch_size):
        batch = others[place : place + batch_size]
        batch[place] = image
        with torch.inference_mode():
            for index in range(len(ensemble.passes)):
                probabilities = ensemble.decode(index, ensemble.encode(index, torch.cat(batch)))
                seen.append((index, probabilities[place].numpy().tobytes()))
    assert len(seen) == batch_size * len(ensemble.passes)
    assert len(set(seen)) == len(ensemble.passes)  # one answer a pass


def test_strips_share_batches_and_partial_ones_are_filled_up(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, flights = list[int](), list[int]()
    encode, encode_flights = Ensemble.encode, Ensemble.encode_flights

    def spied(self: Ensemble, index: int, images: torch.Tensor) -> Any:
        sizes.append(len(images))
        return encode(self, index, images)

    def counted(self: Ensemble, index: int, group: list[Flight]) -> None:
        flights.append(len(group))
        encode_flights(self, index, group)

    monkeypatch.setattr(Ensemble, "encode", spied)
    monkeypatch.setattr(Ensemble, "encode_flights", counted)
    landed(ensemble_of(bundle, batch_size=4), [blotches(seed) for seed in range(32)])
    assert set(sizes) == {4}
    assert 1 <= min(flights) < 4 == max(flights)
    assert np.mean(flights) > 2.8  # strips on different ways are regrouped


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = [blotches(seed) for seed in range(9)]
    expected = landed(ensemble_of(bundle), images)
    run, sizes = Ensemble.decode, list[int]()

    def hungry(self: Ensemble, index: int, encoded: Any) -> Any:
        sizes.append(len(encoded[0]))
        if len(encoded[0]) > 2:  # a batch of 8 fails, one of 4 fails, one of 2 goes
            raise torch.cuda.OutOfMemoryError("out of memory, said the device")
        return run(self, index, encoded)

    monkeypatch.setattr(Ensemble, "decode", hungry)
    found = landed(ensemble_of(bundle, batch_size=8), images)
    assert found.keys() == expected.keys()
    for name, flight in found.items():
        assert not flight.fault
        np.testing.assert_array_equal(
            flight.tally.masks(flight.size), expected[name].tally.masks(flight.size)
        )
    assert max(sizes) > 2
    assert sorted(size for size in sizes if size > 2) == [4, 8]  # then it is small enough for good
    assert "strips at a time from here on" in caplog.text


# --- as a process ---------------------------------------------------------------------------------


def submission(bundle: Path, images: Path, folder: Path, *options: str) -> tuple[bytes, Any]:
    folder.mkdir()
    command = [sys.executable, str(bundle / "inference.py"), "--bundle", str(bundle)]
    command += ["--images", str(images), "--report", "run.json", *options]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((folder / "run.json").read_text())
    return (folder / "submission.csv").read_bytes(), report


def test_both_ways_write_the_same_bytes_and_run_json_tells_the_work(
    bundle: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(6):
        cv2.imwrite(str(images / f"{seed}.png"), blotches(seed + 8))
    early, told = submission(bundle, images, tmp_path / "early")
    full, told_full = submission(bundle, images, tmp_path / "full", "--no-early-exit")
    assert early == full
    assert told_full["share"] == 1
    assert (told["device"], told["workers"]) == ("cpu", 1)
    assert {"decode", "prepare", "tally", "rle", "write"} <= set(told["stages"])
    assert told["share"] < 1
    assert set(told["work"]) == {f"{seed}.png" for seed in range(6)}
    for work in told["work"].values():
        assert 0 < work["decoders"] <= work["encoders"] <= 15 or work["decoders"] == 0
        assert 0 < work["share"] <= 1
    assert told["non_empty"] == told_full["non_empty"] > 0


def test_masks_of_no_decoder_are_bool_and_empty() -> None:
    masks = Tally(3, Manifest([], 2), early_exit=True).masks((2, 3))
    assert masks.dtype == np.bool_ and masks.shape == (2, 2, 3) and not masks.any()


def test_a_class_that_was_proven_is_open_again_when_a_pass_is_left_out() -> None:
    """Three passes at 0.45: the first class is off by 0.2 + 0.1 + 1 ≤ 1.35, with two it is not."""
    tally = Tally(3, Manifest([], 2, threshold=0.45), early_exit=True)
    for gates in ([0.2, 1.0], [0.1, 1.0]):
        tally.encode(np.array(gates))
    tally.decode(torch.tensor([0.2, 1.0])[:, None, None])
    assert tally.open == [1]
    tally.leave_out(encoded=True)
    tally.encode(np.array([1.0, 0.1]))
    assert tally.open == [0]  # the second is on by 1.0 > 0.9
    tally.decode(torch.tensor([0.9, 0.05])[:, None, None])
    assert tally.masks((1, 1)).ravel().tolist() == [True, True]
