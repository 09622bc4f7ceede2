"""Batch-norm statistics: retaken from whole strips, and frozen."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.batch_norm import freeze_statistics, retake_statistics


def conv_and_norm() -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=0.01), nn.Dropout(0.5))
    network(torch.rand(2, 1, 8, 8))  # statistics of something else, to be forgotten
    return network


def strips_drawn(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(1, 1, 10, 14, generator=generator) * (i + 1) for i in range(count)]


def test_retaken_statistics_are_the_plain_mean_over_the_strips() -> None:
    network, images = conv_and_norm(), strips_drawn()
    with torch.no_grad():
        features = [network[0](image)[0].flatten(1) for image in images]  # (3, pixels)
    retake_statistics(network, images)
    mean = torch.stack([f.mean(dim=1) for f in features]).mean(dim=0)
    variance = torch.stack([f.var(dim=1) for f in features]).mean(dim=0)
    norm = network[1]
    assert norm.running_mean.tolist() == pytest.approx(mean.tolist(), rel=1e-4)
    assert norm.running_var.tolist() == pytest.approx(variance.tolist(), rel=1e-4)


def test_retaking_leaves_the_weights_the_momentum_and_an_evaluated_network() -> None:
    network, untouched = conv_and_norm(), conv_and_norm()
    retake_statistics(network, strips_drawn())
    for found, expected in zip(network.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert network[1].momentum == 0.01
    assert not any(module.training for module in network.modules())


def test_frozen_statistics_stay_while_the_rest_trains() -> None:
    network = conv_and_norm().train()
    before = network[1].running_mean.clone()
    freeze_statistics(network)
    network(strips_drawn()[0])
    assert torch.equal(network[1].running_mean, before)
    assert network[1].weight.requires_grad
    assert network[2].training


def test_unfrozen_statistics_move() -> None:
    network = conv_and_norm().train()
    before = network[1].running_mean.clone()
    network(strips_drawn()[0])
    assert not torch.equal(network[1].running_mean, before)
