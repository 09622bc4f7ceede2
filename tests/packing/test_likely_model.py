"""The likely model: a checkpoint under a wrong declaration is told what it is."""

from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch import Tensor

from kernel.members import build_network
from packing.likely_model import likely_model


def weights_of(model: dict[str, Any]) -> dict[str, Tensor]:
    return dict(build_network(model).state_dict())


@pytest.mark.parametrize(
    ("arch", "encoder"),
    [("FPN", "resnet18"), ("Unet", "se_resnext50_32x4d"), ("FPN", "efficientnet-b2")],
)
def test_a_wrong_encoder_is_told_with_the_right_one(arch: str, encoder: str) -> None:
    right = {"arch": arch, "encoder_name": encoder, "in_channels": 1, "classes": 4}
    message = likely_model(weights_of(right), right | {"encoder_name": "resnet50"})
    assert f"it looks like {arch} with encoder {encoder} (100%" in message


@pytest.mark.parametrize("right", [("DeepLabV3Plus", "resnet18"), ("FPN", "densenet201")])
def test_a_declared_decoder_that_takes_few_encoders_does_not_hide_the_right_model(
    right: tuple[str, str],
) -> None:
    arch, encoder = right
    model = {"arch": arch, "encoder_name": encoder, "in_channels": 1, "classes": 4}
    declared = model | {"arch": "DeepLabV3Plus", "encoder_name": "resnet50"}
    message = likely_model(weights_of(model), declared)
    assert f"it looks like {arch} with encoder {encoder} (100%" in message


def test_a_network_of_no_known_encoder_is_not_called_right() -> None:
    weights = {f"encoder.{number}.weight": torch.ones(1) for number in range(9)}
    message = likely_model(weights, tiny_model())
    assert message == "it is none of the usual encoders; correct `model`"


def test_a_right_architecture_is_said_only_of_weights_that_are_nearly_all_its() -> None:
    right = {"arch": "FPN", "encoder_name": "resnet18", "in_channels": 1, "classes": 4}
    weights = weights_of(right)
    for share, words in (
        (0.97, "is right, so compare"),
        (0.7, "none of the usual models is closer"),
    ):
        kept = dict(list(weights.items())[: int(share * len(weights))])
        assert words in likely_model(kept, right)
