"""Members with an image_size of their own, and members with more outputs than classes."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import (
    CPU,
    LABELS,
    SMALL,
    change_manifest,
    decode_by_hand,
    draw_image,
    predict,
    predict_masks,
    random_network,
    read_submission,
    save_strips,
    tiny_entry,
    tiny_model,
    write_manifest,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from kernel.competition import SEVERSTAL
from kernel.ensemble import Ensemble
from kernel.ensemble_loading import load_ensemble
from kernel.images import Image
from kernel.manifest import Manifest, MemberSpec, load_manifest
from kernel.members import Member
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from kernel.tta import FLIPS
from packing.bundle import build

LARGE, OWN = (96, 128), (32, 64)  # strips, and what one member was trained for

Probabilities = npt.NDArray[np.float32]


def models() -> dict[str, dict[str, Any]]:
    """A member as strips are, one of another size, one of another size with 6 outputs."""
    return {
        "plain": tiny_model("Unet"),
        "small": tiny_model("FPN"),
        "more": tiny_model("Unet") | {"classes": 6, "aux_params": {"classes": 6, "pooling": "max"}},
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small": {"image_size": list(OWN)},
    "more": {"image_size": [64, 64], "channels": [5, 1, 2, 4]},
}


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    found = {name: random_network(model, i) for i, (name, model) in enumerate(models().items())}
    return {name: network.half().float() for name, network in found.items()}  # as packed


@pytest.fixture(scope="module")
def bundle(networks: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    for name, network in networks.items():
        save_file(network.state_dict(), folder / f"{name}.safetensors")
    entries = [tiny_entry(name, model) | OPTIONS[name] for name, model in models().items()]
    write_manifest(folder, entries, flips=list(FLIPS), image_size=list(LARGE), threshold=0.5)
    build(folder, folder / "dist", owner="somebody", openvino=False)
    return folder / "dist" / "dataset"


def pass_by_hand(network: Any, name: str, image: Image, flip: str) -> Probabilities:
    """(4, H, W) of one pass, written apart from the kernel."""
    pixels = torch.from_numpy(image)[None, None] / 255
    axes = [
        axis
        for axis in (2, 3)
        if flip in {2: ("vertical", "both"), 3: ("horizontal", "both")}[axis]
    ]
    size = OPTIONS[name].get("image_size", image.shape)
    resized = nn.functional.interpolate(pixels, tuple(size), mode="bilinear")
    entry = tiny_entry(name, models()[name])
    with torch.inference_mode():
        masks, presence = network((torch.flip(resized, axes) - entry["mean"][0]) / entry["std"][0])
        found = torch.flip(masks.sigmoid() * presence.sigmoid()[..., None, None], axes)
        found = nn.functional.interpolate(found, image.shape, mode="bilinear")
    channels = OPTIONS[name].get("channels", [0, 1, 2, 3])
    return found[0, channels].numpy()


def test_each_pass_is_that_of_the_network_on_strips_of_its_own_size(
    bundle: Path, networks: dict[str, nn.Module]
) -> None:
    ensemble = load_ensemble(bundle, load_manifest(bundle), CPU, Stages(), None)
    image = draw_image(1, LARGE)
    for pass_id, each in enumerate(ensemble.passes):
        with torch.inference_mode():
            encoded = ensemble.run_encoder(pass_id, ensemble.prepare(image))
            found = ensemble.run_decoder(pass_id, encoded, LARGE)[0]
        expected = pass_by_hand(networks[each.member], each.member, image, each.flip)
        assert expected.std() > 0.01
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert (found <= encoded[0][0, :, None, None]).all()  # the early exit rests on it


def test_engines_are_checked_at_the_size_that_strips_are_resized_to(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = dict[str, Any]()

    def check(engine: Member, plain: Member, *given: Any) -> Member:
        sizes[plain.spec.name] = given[-1]
        return engine

    monkeypatch.setattr("kernel.ensemble_loading.check_engine", check)
    ensemble = load_ensemble(bundle, load_manifest(bundle), CPU, Stages(), draw_image(1, LARGE))
    assert sizes == ensemble.sizes == {"plain": LARGE, "small": OWN, "more": (64, 64)}


def test_resizing_rounds_no_probability_above_its_gate() -> None:
    """The early exit rests on it; here every pixel is at its gate."""

    def encode(images: Tensor) -> tuple[Tensor, ...]:
        return gates, images

    def decode(gates: Tensor, images: Tensor) -> Tensor:
        return gates[..., None, None].expand(-1, -1, *images.shape[-2:]).contiguous()

    spec, rng = MemberSpec("one", "one.st", {}, [0.0], [1.0]), torch.Generator().manual_seed(1)
    gated = replace(spec, model={"aux_params": {"classes": 4}}, image_size=(37, 53))
    ensemble = Ensemble(Manifest([gated]), [Member(gated, encode, decode, 32)], CPU, Stages())
    for size in ((64, 96), (101, 211)):
        for _ in range(50):
            gates = torch.rand(1, 4, generator=rng)
            _, found = ensemble.run_pass(0, torch.zeros(1, 1, *size), size)
            assert found.shape == (1, 4, *size)
            assert (found <= gates[..., None, None]).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_early_exit_changes_no_mask_of_resized_members(bundle: Path, batch_size: int) -> None:
    ensemble = load_ensemble(bundle, load_manifest(bundle), CPU, Stages(), None)
    images = [draw_image(seed, LARGE) for seed in range(5)]
    early, every = (
        predict_masks(Scheduler(ensemble, batch_size, early_exit=exit_), images)
        for exit_ in (True, False)
    )
    np.testing.assert_array_equal(early, every)
    assert 0.02 < early.mean() < 0.98


def test_strips_of_another_size_than_the_members_were_trained_for_are_resized_and_that_is_told(
    light_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_strips(tmp_path / "images", ["a.png"], LARGE)
    found = {}
    for size in (list(SMALL), list(LARGE), None):
        change_manifest(light_bundle, image_size=size)
        caplog.clear()
        predict(light_bundle, tmp_path / "images", tmp_path / "s.csv")
        found[str(size)] = (tmp_path / "s.csv").read_bytes()
        said = "strips are 96×128: fpn sees them resized to 64×96" in caplog.text
        assert said == (size == list(SMALL))
    assert found[str(list(LARGE))] == found["None"] != found[str(list(SMALL))]


def test_a_members_own_image_size_changes_the_submission(
    light_bundle: Path, tmp_path: Path
) -> None:
    save_strips(tmp_path / "images", ["a.png"], SMALL)
    predict(light_bundle, tmp_path / "images", tmp_path / "as_it_is.csv")
    entries = load_manifest(light_bundle)
    change_manifest(
        light_bundle, members=[vars(m) | {"image_size": [32, 64]} for m in entries.members]
    )
    predict(light_bundle, tmp_path / "images", tmp_path / "resized.csv")
    texts = [read_submission(tmp_path / name) for name in ("as_it_is.csv", "resized.csv")]
    assert texts[0].keys() == texts[1].keys() and texts[0] != texts[1]


@pytest.mark.parametrize("usual", [None, SMALL])
def test_images_of_another_size_than_the_others_are_named_and_predicted_as_they_are(
    usual: tuple[int, int] | None,
    light_bundle: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine = asdict(replace(SEVERSTAL, image_size=usual))
    (light_bundle / "competition.json").write_text(json.dumps(mine))
    names = ["a.png", "b.png", "c.png", "d.png"]
    save_strips(tmp_path / "images", names, [SMALL, (32, 96), SMALL, (32, 96)])
    record = predict(light_bundle, tmp_path / "images", tmp_path / "s.csv")
    assert not record["faults"]
    [said] = [line for line in caplog.messages if "32×96" in line]
    assert said.startswith("images of 32×96, others are 64×96: 2, first b.png; predicted as they")
    assert not any("images of 64×96" in line for line in caplog.messages)
    assert not [each for each in caplog.records if each.levelname == "ERROR"]  # all were predicted
    assert not any("a.png" in line or "c.png" in line for line in caplog.messages)
    rows = read_submission(tmp_path / "s.csv")
    for label in LABELS:
        decode_by_hand(rows["b.png", label], (32, 96))
