"""The ensemble: its masks are those of a plain double loop over members and flips."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, SMALL, change_manifest, draw_image, predict_masks
from oracle import (
    Grey,
    Probabilities,
    assert_crosses,
    assert_masks,
    halve_masks,
    load_networks,
    mean_by_hand,
    pass_by_hand,
    threshold_of,
)
from torch import Tensor

from kernel.ensemble import Ensemble
from kernel.ensemble_loading import load_ensemble
from kernel.images import Image, Size, size_of
from kernel.manifest import Manifest, MemberSpec, load_manifest
from kernel.members import Member
from kernel.scheduling import Scheduler
from kernel.stages import Stages


@pytest.fixture(scope="module")
def halved(session_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three tiny members at a threshold that their mean crosses both ways."""
    folder = tmp_path_factory.mktemp("halved") / "weights"
    halve_masks(Path(shutil.copytree(session_weights, folder)))
    change_manifest(folder, image_size=None)  # strips of many sizes, none resized
    return folder


@pytest.fixture
def bundle(halved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(halved, tmp_path / "weights"))


@pytest.fixture(scope="module")
def ensemble(halved: Path) -> Ensemble:
    return ensemble_of(halved)


def ensemble_of(folder: Path) -> Ensemble:
    return load_ensemble(folder, load_manifest(folder), CPU, Stages(), None)


def masks_of(ensemble: Ensemble, *images: Image) -> np.ndarray:
    """(B, classes, H, W)."""
    return predict_masks(Scheduler(ensemble), images)


def each_pass(ensemble: Ensemble, image: Grey) -> list[tuple[str, str, Probabilities]]:
    """Member, flip and probabilities (classes, H, W) of every pass."""
    found = []
    with torch.inference_mode():
        for pass_id, each in enumerate(ensemble.passes):
            encoded = ensemble.run_encoder(pass_id, ensemble.prepare(image))
            probabilities = ensemble.run_decoder(pass_id, encoded, size_of(image))[0].numpy()
            found.append((each.member, each.flip, probabilities))
    return found


@pytest.mark.parametrize("size", [SMALL, (50, 70), (33, 129), (64, 64), (45, 31)], ids=str)
def test_the_masks_are_those_of_a_double_loop(size: tuple[int, int], bundle: Path) -> None:
    change_manifest(bundle, flips=["none", "horizontal", "vertical", "both"])
    image = draw_image(3, size)
    mean, threshold = mean_by_hand(bundle, image), threshold_of(bundle)
    assert_crosses(mean, threshold)
    found = masks_of(ensemble_of(bundle), image)
    assert found.shape == (1, 4, *size)
    assert_masks(found[0], mean, threshold)


def test_each_pass_is_that_of_the_double_loop_in_the_manifests_order(
    ensemble: Ensemble, halved: Path
) -> None:
    image = draw_image(4)
    found = each_pass(ensemble, image)
    flips = ("none", "horizontal", "vertical")
    expected = [(entry, net, flip) for entry, net in load_networks(halved) for flip in flips]
    assert len(found) == len(expected) == 9
    for (member, name, probabilities), (entry, network, flip) in zip(found, expected, strict=True):
        assert (member, name) == (entry["name"], flip)
        by_hand = pass_by_hand(entry, network, image / 255, flip)
        np.testing.assert_allclose(probabilities, by_hand, atol=1e-5)


@pytest.mark.parametrize("fault", [ValueError("no"), AssertionError(), TypeError("no")])
def test_a_member_that_does_not_compile_runs_plain_and_is_named(
    fault: Exception,
    halved: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr("kernel.ensemble_loading.compile_member", fail)
    image = draw_image(4)
    mean, threshold = mean_by_hand(halved, image), threshold_of(halved)
    assert_masks(masks_of(ensemble_of(halved), image)[0], mean, threshold)
    assert "unet-a runs on plain PyTorch, it does not compile" in caplog.text


def test_a_member_is_tried_in_one_piece_at_a_few_sizes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine compiles each anew; of those beyond what it keeps whole ones cost more."""

    def encode(images: Tensor) -> tuple[Tensor, ...]:
        return torch.ones(len(images), 4), images

    def whole(images: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(images.shape[-1])
        return torch.ones(len(images), 4), images.expand(-1, 4, -1, -1)

    seen = list[int]()
    monkeypatch.setattr("kernel.ensemble.MAX_CACHED_SHAPES", 2)
    spec = MemberSpec("one", "one.safetensors", {}, [0.0], [1.0])
    member = Member(spec, encode, lambda _, x: x.expand(-1, 4, -1, -1), 32, whole=whole)
    ensemble = Ensemble(Manifest([spec]), [member], CPU, Stages())
    for width in (64, 96, 128, 64, 128):
        ensemble.run_pass(0, torch.rand(1, 1, 32, width), (32, width))
    assert seen == [64, 96, 64]


@pytest.mark.parametrize("size", [(32, 64), None], ids=["resized to one", "as it is"])
def test_a_member_is_tried_in_one_piece_at_each_size_that_it_sees(
    size: Size | None, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine is compiled for each: here the second one gives other bits in one piece."""

    def encode(images: Tensor) -> tuple[Tensor, ...]:
        ran.append("encoder")
        return torch.ones(len(images), 4), images

    def decode(_: Tensor, images: Tensor) -> Tensor:
        return images.expand(-1, 4, -1, -1) / 2

    def whole(images: Tensor) -> tuple[Tensor, Tensor]:
        gates = torch.ones(len(images), 4)
        return gates, decode(gates, images) + (1e-6 if images.shape[-1] == 96 else 0)

    ran = list[str]()
    spec = MemberSpec("one", "one.safetensors", {}, [0.0], [1.0], image_size=size)
    member = Member(spec, encode, decode, 32, whole=whole)
    ensemble = Ensemble(Manifest([spec]), [member], CPU, Stages())
    for width in (64, 64, 96, 96):
        images = torch.rand(1, 1, 32, width, generator=torch.Generator().manual_seed(width))
        _, found = ensemble.run_pass(0, images, (32, width))
        assert size or torch.equal(found, images.expand(-1, 4, -1, -1) / 2)
    assert len(ran) == (1 if size else 3)
    assert ("one runs in two halves, not in one piece: its bits" in caplog.text) == (size is None)


def test_a_member_that_another_thread_finds_to_differ_runs_in_halves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its trial ends while this one is on its way to the same member."""
    shape_of = Ensemble._shape_of

    def end_trial(ensemble: Ensemble, name: str, images: Tensor) -> tuple[int, int, int]:
        shape = shape_of(ensemble, name, images)
        ensemble.members[name] = replace(member, whole=None)
        ensemble.tried[name].add(shape)
        return shape

    spec = MemberSpec("one", "one.safetensors", {}, [0.0], [1.0])
    member = Member(
        spec,
        lambda images: (torch.ones(len(images), 4), images),
        lambda _, images: images.expand(-1, 4, -1, -1),
        32,
        whole=lambda _: pytest.fail("in one piece"),
    )
    ensemble = Ensemble(Manifest([spec]), [member], CPU, Stages())
    monkeypatch.setattr(Ensemble, "_shape_of", end_trial)
    images = torch.rand(1, 1, 32, 64)
    _, found = ensemble.run_pass(0, images, (32, 64))
    assert torch.equal(found, images.expand(-1, 4, -1, -1))


@pytest.mark.parametrize(("device", "plain"), [("cuda", False), ("cuda", True), ("cpu", False)])
def test_cudnn_tries_its_algorithms_where_a_gpu_runs_an_engine_that_is_checked(
    device: str,
    plain: bool,
    ensemble: Ensemble,
    halved: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not in the check, whose shape never comes again, nor where an engine broke the GPU."""
    seen = list[bool]()

    def load(*_: object, **__: object) -> dict[str, Member]:
        seen.append(torch.backends.cudnn.benchmark)
        return ensemble.members

    before = device == "cpu"  # a GPU's ensemble may go on beside this one
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    monkeypatch.setattr("kernel.ensemble_loading.load_members", load)
    manifest, on = load_manifest(halved), torch.device(device)
    load_ensemble(halved, manifest, on, Stages(), image=None, plain=plain)
    assert seen == [before]
    assert torch.backends.cudnn.benchmark == (not plain)


def test_a_gate_never_raises_a_probability(ensemble: Ensemble) -> None:
    """The three members are one with a gate, one more, and one without: both kinds are mixed."""
    members = [ensemble.members[name] for name in ("unet-a", "fpn-b", "unet-c")]
    assert [m.spec.gated for m in members] == [True, True, False]
    assert [m.encoder.mean.shape[1] for m in members] == [1, 1, 3]
    grey = torch.from_numpy(draw_image(5))[None, None] / 255
    for gated in members[:2]:
        with torch.inference_mode():
            normalised = (grey - gated.encoder.mean) / gated.encoder.std
            logits, presence = gated.encoder.network(normalised)
            found = gated(grey)
        assert (found <= presence.sigmoid()[:, :, None, None] + 1e-6).all()
        assert (found <= logits.sigmoid() + 1e-6).all()


def test_images_that_come_together_get_what_they_get_alone(
    ensemble: Ensemble, halved: Path
) -> None:
    images = [draw_image(seed, (40, 72)) for seed in range(3)]
    for image, found in zip(images, masks_of(ensemble, *images), strict=True):
        mean, threshold = mean_by_hand(halved, image), threshold_of(halved)
        assert_masks(found, mean, threshold)
        assert_masks(masks_of(ensemble, image)[0], mean, threshold)


def test_small_masks_are_emptied_class_by_class(ensemble: Ensemble, bundle: Path) -> None:
    image = draw_image(6)
    whole = masks_of(ensemble, image)[0]
    areas = sorted(whole.sum(axis=(-2, -1)).tolist())
    assert areas[0] < areas[2]
    for least in (areas[2], areas[2] + 1):  # a mask of exactly min_area stays
        change_manifest(bundle, min_area=least)
        found = masks_of(ensemble_of(bundle), image)[0]
        for mask, before in zip(found, whole, strict=True):
            expected = before if before.sum() >= least else np.zeros_like(before)
            np.testing.assert_array_equal(mask, expected)


def test_each_class_has_a_min_area_of_its_own(ensemble: Ensemble, bundle: Path) -> None:
    image = draw_image(6)
    whole = masks_of(ensemble, image)[0]
    areas = whole.sum(axis=(-2, -1))
    assert areas[1:3].all()
    change_manifest(bundle, min_area=[0, int(areas[1]), int(areas[2]) + 1, 0])
    found = masks_of(ensemble_of(bundle), image)[0]
    np.testing.assert_array_equal(found[[0, 1, 3]], whole[[0, 1, 3]])
    assert not found[2].any()
