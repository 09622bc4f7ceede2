"""Batch-norm statistics: taken anew from whole strips, then frozen."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def freeze_statistics(network: nn.Module) -> None:
    """From here on every batch norm uses its running statistics, as at inference."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@torch.no_grad()
def retake_statistics(network: nn.Module, images: Iterable[Tensor]) -> None:
    """Take batch-norm statistics anew from batches (B, channels, H, W): their plain mean.

    SMP's EfficientNets average so slowly that after some hundred steps they score nothing.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    for image in images:
        network(image)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
