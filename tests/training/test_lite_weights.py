"""EfficientNet-Lite0's weights as a start: the first layers give what Lite's own would."""

from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from helpers import error_of, exit_code
from safetensors.torch import load_file
from torch import Tensor, nn

from training import lite_weights

MEAN, STD = 0.34, 0.13  # of the members' input


def encoder_for(channels: int) -> nn.Module:
    encoder: nn.Module = smp.encoders.get_encoder(
        "efficientnet-b0", in_channels=channels, weights=None
    )
    return encoder.eval()


def drawn_weights(path: Path) -> nn.Module:
    """An encoder for three channels, its weights drawn, in a file as the package has it."""
    torch.manual_seed(3)
    network = encoder_for(3)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.1)
    weights = {key: value for key, value in network.state_dict().items() if "_se_" not in key}
    torch.save(weights | {"_fc.weight": torch.zeros(10, 1280)}, path)
    return network


def first_layers(network: nn.Module, images: Tensor) -> Tensor:
    """The first convolution and batch norm, without the border, where padding is zero."""
    convolution, norm = network.get_submodule("_conv_stem"), network.get_submodule("_bn0")
    found: Tensor = norm(convolution(images))
    return found[..., 2:-2, 2:-2]


def test_grey_gives_what_the_three_channels_gave(tmp_path: Path) -> None:
    theirs, ours = drawn_weights(tmp_path / "lite.pth"), encoder_for(1)
    options = ["--weights", tmp_path / "lite.pth", "--out", tmp_path / "new" / "start"]
    assert exit_code(lite_weights.main, *options) == 0
    start = load_file(tmp_path / "new" / "start")
    loaded = {key.removeprefix("encoder."): value for key, value in start.items()}
    state = ours.state_dict()
    assert loaded.keys() <= state.keys()
    assert all("_se_" in key or "num_batches" in key for key in state.keys() - loaded.keys())
    ours.load_state_dict(state | loaded)

    grey = torch.rand(1, 1, 32, 48)
    expected = first_layers(theirs, ((255 * grey - 127) / 128).expand(1, 3, -1, -1))
    found = first_layers(ours, (grey - MEAN) / STD)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for key, value in theirs.state_dict().items():
        if "_blocks" in key and "_se_" not in key and "num_batches" not in key:
            assert torch.equal(loaded[key], value)
    assert all(value.min() >= 3 for key, value in loaded.items() if "_se_expand.bias" in key)


@pytest.mark.parametrize("change", ["another", "missing"])
def test_weights_of_another_network_are_one_line(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn_weights(tmp_path / "lite.pth")
    weights = torch.load(tmp_path / "lite.pth", weights_only=True)
    expected = "other.pth: _blocks.3._project_conv.weight is missing, expected (40, "
    if change == "missing":
        del weights["_blocks.3._project_conv.weight"]
    else:
        weights["_conv_stem.weight"] = torch.zeros(64, 3, 7, 7)
        expected = (
            "_conv_stem.weight has (64, 1, 7, 7), expected (32, 1, 3, 3); give efficientnet-lite0-"
        )
        weights["_bn0.running_mean"] = torch.zeros(64)
    torch.save(weights, tmp_path / "other.pth")
    options = ["--weights", tmp_path / "other.pth", "--out", tmp_path / "start"]
    assert exit_code(lite_weights.main, *options) == 2
    assert expected in error_of(capsys.readouterr().err)
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 a zip that was cut off"])
def test_a_file_that_is_no_checkpoint_is_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lite.pth"
    path.write_bytes(content)
    assert exit_code(lite_weights.main, "--weights", path, "--out", tmp_path / "start") == 2
    line = error_of(capsys.readouterr().err)
    assert line.startswith(f"{path}: no checkpoint of PyTorch; give efficientnet-lite0-")
