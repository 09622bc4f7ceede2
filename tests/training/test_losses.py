"""The loss: what each head is asked, and what padding and absent classes add to it."""

from dataclasses import fields, replace

import pytest
import torch
from helpers import CLASSES, SMALL
from torch import Tensor
from torch.nn import functional as F

from training.config import Config
from training.losses import Outputs, member_loss, run_network
from training.module import new_network


def target(seed: int = 0) -> Tensor:
    """Masks (2, 3, 16, 24); class 3 is absent."""
    masks = (torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(seed)) < 0.3).float()
    masks[:, 2] = 0
    assert 0.1 < masks.mean() < 0.3
    return masks


def answer(masks: Tensor, sure: float) -> Outputs:
    """Logits that are right where `sure` is above 0, and wrong below it; cells of 8 × 8 pixels."""
    cells = F.max_pool2d(masks, 8)
    presence = masks.amax(dim=(-2, -1))
    right = (masks, presence, presence.amax(dim=0, keepdim=True), cells)
    return Outputs(*(sure * (2 * answers - 1) for answers in right))


def test_the_loss_falls_from_wrong_to_unsure_to_right() -> None:
    masks = target()
    losses = [float(member_loss(answer(masks, sure), masks)) for sure in (-4, 0, 4, 12)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.02 < losses[1]


@pytest.mark.parametrize("head", ["masks", "presence", "together", "cells"])
def test_each_head_has_its_share_in_the_loss(head: str) -> None:
    masks = target()
    right, wrong = answer(masks, 6), answer(masks, -6)
    half_wrong = replace(right, **{head: getattr(wrong, head)})
    assert member_loss(half_wrong, masks) > member_loss(right, masks) + 1


def test_the_loss_of_a_clean_strip_is_finite_and_asks_for_nothing() -> None:
    masks = torch.zeros(1, 3, 16, 24)
    outputs = answer(masks, 2.0)
    logits = [outputs.masks, outputs.presence, outputs.together, outputs.cells]
    for tensor in logits:
        tensor.requires_grad_()
    loss = member_loss(outputs, masks)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    for tensor in logits:
        assert tensor.grad is not None
        assert (tensor.grad > 0).all()  # down with every one


def test_an_absent_class_adds_nothing_to_the_overlap() -> None:
    masks = target()
    outputs = answer(masks, 6)
    two = Outputs(*(getattr(outputs, field.name)[:, :2] for field in fields(outputs)))
    alone, beside = member_loss(two, masks[:, :2]), member_loss(outputs, masks)
    assert float(beside) == pytest.approx(float(alone), abs=0.01)


def test_a_cell_asks_for_what_lies_in_it() -> None:
    masks = torch.zeros(1, 1, 16, 24)
    masks[0, 0, 9, 17] = 1  # one pixel, in the last of 2 × 3 cells

    def loss(cell: int) -> float:
        cells = torch.full((1, 1, 6), -8.0)
        cells[..., cell] = 8
        outputs = replace(answer(masks, 8), cells=cells.view(1, 1, 2, 3))
        return float(member_loss(outputs, masks))

    assert min(range(6), key=loss) == 5


def test_padding_counts_for_no_mask() -> None:
    masks = target()
    padded = F.pad(masks, (0, 8, 0, 8))
    outputs = answer(padded, 4)
    own = replace(outputs, masks=outputs.masks[..., :16, :24])
    beside = padded.clone()
    beside[..., 18:, 26:] = 1  # only the cells may see it
    cells = answer(beside, 4).cells
    found = member_loss(replace(own, cells=cells), beside)
    assert float(found) == pytest.approx(float(member_loss(own, padded)), abs=1e-5)


@pytest.mark.parametrize("arch", ["Unet", "FPN"])
def test_the_trained_outputs_are_those_of_the_whole_network(arch: str, config: Config) -> None:
    network = new_network(replace(config, arch=arch)).eval()
    images = torch.rand(2, 1, *SMALL, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        masks, presence = network(images)
        outputs = run_network(network, images)
        deepest = network.encoder(images)[-1]  # (2, channels, 2, 3)
        one = deepest[:, :, 1:2, 2:3]  # a pool over one cell is that cell
        cell = network.classification_head(one)
        batch = network.classification_head(torch.cat(list(deepest), dim=-1)[None])
    assert torch.equal(outputs.masks, masks)
    assert torch.equal(outputs.presence, presence)
    assert torch.allclose(outputs.together, batch, atol=1e-5)
    assert outputs.cells.shape == (2, CLASSES, 2, 3)
    assert torch.allclose(outputs.cells[:, :, 1, 2], cell, atol=1e-5)


GROUPS = {
    1: [[0]],
    2: [[0, 1]],
    4: [[0, 1, 2, 3]],
    6: [[*range(6)]],
    8: [[*range(4)], [*range(4, 8)]],
}


@pytest.mark.parametrize("count", GROUPS)
def test_crops_are_asked_together_by_fours(count: int, config: Config) -> None:
    """Written out one group and one class after another, each group as one wide strip."""
    network = new_network(config).eval()
    images = torch.rand(count, 1, *SMALL, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(count, CLASSES, *SMALL)
    for index in range(count):
        masks[index, index // 4, 3, 5] = 1  # a class that no other group has

    def loss_of(logit: Tensor, there: bool) -> Tensor:
        return 4 * F.softplus(-logit) if there else F.softplus(logit)

    with torch.no_grad():
        outputs, losses = run_network(network, images), list[Tensor]()
        features = network.encoder(images)[-1]
        for group in GROUPS[count]:
            strip = torch.cat([features[index] for index in group], dim=-1)[None]
            for label, logit in enumerate(network.classification_head(strip)[0]):
                there = any(bool(masks[index, label].any()) for index in group)
                losses.append(loss_of(logit, there) - loss_of(torch.tensor(0.0), there))
        unsure = replace(outputs, together=torch.zeros_like(outputs.together))
        share = member_loss(outputs, masks) - member_loss(unsure, masks)
    assert float(share) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
