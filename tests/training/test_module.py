"""The network in Lightning's form: what it starts from, its sizes and its channels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSES, SMALL, draw_image
from safetensors.torch import load_file
from torch.nn import functional as F

from kernel.images import image_to_tensor
from training.config import Config
from training.module import MemberModule, load_into_network, new_network
from training.results import write_checkpoint


def test_a_fit_goes_on_from_a_checkpoint(network: Any, config: Config, tmp_path: Path) -> None:
    write_checkpoint(network, config, tmp_path / "first.safetensors")
    weights = load_file(tmp_path / "first.safetensors")
    drawn = new_network(replace(config, seed=8)).state_dict()
    going_on = new_network(replace(config, seed=8))
    lacking = load_into_network(going_on, weights, presence=False)
    found = going_on.state_dict()
    taken = {name for name in found if torch.equal(found[name], weights[name].to(found[name]))}
    anew = {name for name in found if name.startswith("classification_head.")}
    assert anew and all(torch.equal(found[name], drawn[name]) for name in anew)
    assert taken >= found.keys() - anew and set(lacking) == anew
    assert any(not torch.equal(found[name], drawn[name]) for name in taken)
    whole = new_network(replace(config, seed=8))
    assert load_into_network(whole, weights, presence=True) == []
    own = whole.state_dict()
    assert all(torch.equal(own[name], value.to(own[name])) for name, value in weights.items())


def test_a_fit_takes_another_architectures_encoder(network: Any, config: Config) -> None:
    weights = network.state_dict()
    other = new_network(replace(config, arch="FPN", seed=8))
    load_into_network(other, weights, presence=False)
    found = other.state_dict()
    encoder = [name for name in weights if name.startswith("encoder.")]
    assert encoder
    assert all(torch.equal(found[name], weights[name]) for name in encoder)


def test_the_same_seed_draws_the_same_network_and_another_does_not(config: Config) -> None:
    first, again, other = (new_network(replace(config, seed=s)).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "resnet35"}, "SMP builds no network of .*resnet35"),
        ({"arch": "Unetz"}, "SMP builds no network of .*Unetz"),
        ({"arch": "PAN", "encoder": "resnet18"}, None),
        ({"encoder_weights": "no-such-set"}, "--encoder-weights no-such-set of tu-test_resnet"),
    ],
)
def test_a_network_that_smp_does_not_build_is_refused(
    change: dict[str, Any], message: str | None, config: Config
) -> None:
    changed = replace(config, **change)
    if message is None:
        assert new_network(changed).classification_head is not None
        return
    with pytest.raises(ValueError, match=message):
        new_network(changed)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [SMALL, (200, 200), (33, 47)])
def test_an_image_of_any_size_is_padded_and_its_masks_are_cut_back(
    size: tuple[int, int], channels: int, config: Config
) -> None:
    config = replace(config, channels=channels)
    network = new_network(config)
    module = MemberModule(network, config, config.whole_part).eval()
    images = image_to_tensor(draw_image(0, size))
    padding = (0, -size[1] % 32, 0, -size[0] % 32)
    padded = F.pad(images, padding, mode="replicate").expand(-1, channels, -1, -1)
    with torch.no_grad():
        outputs = module(images)
        masks, presence = network((padded - config.mean[0]) / config.std[0])
    assert outputs.masks.shape == (1, CLASSES, *size)
    assert torch.allclose(outputs.masks, masks[..., : size[0], : size[1]], atol=1e-5)
    assert torch.allclose(outputs.presence, presence, atol=1e-5)
    truth = torch.zeros(1, CLASSES, *size, dtype=torch.bool)
    truth[:, 1, -2:, -2:] = True
    loss = module.train().batch_loss(images.repeat(2, 1, 1, 1), truth.repeat(2, 1, 1, 1))
    assert torch.isfinite(loss)
