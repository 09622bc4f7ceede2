"""The heads' last fit, against scipy's optimum and against every bias tried."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CLASSES, LABELS, SMALL, draw_image
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.special import expit  # type: ignore[import-untyped]
from torch import Tensor, nn

from kernel.images import Image
from training import heads
from training.batches import Batches
from training.config import Config
from training.heads import (
    LOGIT_GRID,
    MASK_LEVEL,
    SampledPairs,
    StripPairs,
    best_logit_thresholds,
    calibrate_mask_bias,
    mask_lifts,
    pooled_features,
    refit_heads,
    refit_presence,
)
from training.losses import presence_layer
from training.metrics import dice
from training.module import MemberModule, new_network
from training.strips import Strips


def module_of(network: Any, config: Config) -> MemberModule:
    return MemberModule(network, config, config.whole_part).eval()


# --- presence head --------------------------------------------------------------------------------


def test_the_presence_layer_on_pooled_features_is_the_networks_presence(
    network: Any, config: Config, strips: Strips
) -> None:
    some = strips.some(1, 4)
    pooled, present = pooled_features(module_of(network, config), StripPairs(some))
    assert some.names == strips.names[1:4]
    for row, name in enumerate(some.names):
        image, masks = some.load(name)
        grey = torch.from_numpy(image / 255).float()[None, None]
        with torch.inference_mode():
            _, presence = network((grey - config.mean[0]) / config.std[0])
            found = presence_layer(network)(pooled[row])
        assert torch.allclose(found, presence[0], atol=1e-4)
        assert present[row].bool().tolist() == masks.any(axis=(1, 2)).tolist()
    assert pooled.std() > 0


def test_a_strip_that_cannot_be_read_is_left_out_of_the_last_fit(
    network: Any, config: Config, strips: Strips, caplog: pytest.LogCaptureFixture
) -> None:
    named = replace(strips, names=[strips.names[0], "gone.png", strips.names[1]])
    module = module_of(network, config)
    found = pooled_features(module, StripPairs(named))
    expected = pooled_features(module, StripPairs(strips.some(0, 2)))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert "left out: " in caplog.text and "gone.png" in caplog.text
    with pytest.raises(ValueError, match="presence head: none of 1 images can be read"):
        pooled_features(module, StripPairs(replace(strips, names=["gone.png"])))


def refit_example() -> tuple[nn.Linear, Tensor, Tensor]:
    """A head that shuts every gate; features of which one tells a class of one strip in thirty."""
    draw = torch.Generator().manual_seed(4)
    pooled = torch.rand(300, 6, generator=draw) * torch.tensor([1, 1, 1, 1, 10, 0.1])
    present = torch.zeros(300, 2)
    present[::30, 0] = 1
    present[::2, 1] = 1
    pooled[:, 2] += present[:, 0]
    layer = nn.Linear(6, 2)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, -4)
    return layer, pooled, present


def test_the_refitted_presence_opens_the_gate_of_a_rare_class() -> None:
    layer, pooled, present = refit_example()
    refit_presence(layer, pooled, present)
    gates = layer(pooled).sigmoid()[:, 0]
    assert gates[present[:, 0] > 0].mean() > 0.7
    assert gates[present[:, 0] == 0].mean() < 0.1


@pytest.mark.parametrize("present_weight", [8.0, 2.0])
def test_the_refitted_presence_is_the_tethered_optimum(present_weight: float) -> None:
    """scipy's own optimiser of the same sum, written apart, finds the same weights."""
    layer, pooled, present = refit_example()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(5))
    trained = layer.weight.detach().double().numpy()
    refit_presence(layer, pooled, present, present_weight)
    features, labels = pooled.double().numpy(), present.numpy()

    def objective(flat: Any) -> float:
        weight, bias = flat[:12].reshape(2, 6), flat[12:]
        logits = features @ weight.T + bias
        there = present_weight * labels * np.logaddexp(0, -logits)
        losses = there + (1 - labels) * np.logaddexp(0, logits)
        tether = (((weight - trained) * features.std(axis=0)) ** 2).sum()
        return float(losses.mean() + 0.01 * tether)

    best = minimize(objective, np.zeros(14), method="BFGS")
    found = np.concatenate([layer.weight.detach().numpy().ravel(), layer.bias.detach().numpy()])
    assert objective(found) < best.fun + 1e-4  # in single precision


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_class_that_all_strips_have_or_none_keeps_its_gate(
    label: float, caplog: pytest.LogCaptureFixture
) -> None:
    layer, pooled, present = refit_example()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(5))
    present[:, 0] = label
    before = layer(pooled).detach()
    refit_presence(layer, pooled, present)
    after = layer(pooled).detach()
    assert torch.allclose(after[:, 0], before[:, 0], atol=1e-4)
    assert not torch.allclose(after[:, 1], before[:, 1], atol=1)
    assert "gates of class [1] stay" in caplog.text


# --- mask head ------------------------------------------------------------------------------------


def with_gates(network: Any, strips: Strips, config: Config, mean: float, spread: float) -> Any:
    """The network with presence logits that have this mean and standard deviation on the strips."""
    layer = presence_layer(network)
    pooled, _ = pooled_features(module_of(network, config), StripPairs(strips))
    with torch.inference_mode():
        drawn = pooled.clone() @ layer.weight.T
        layer.weight.mul_(spread / drawn.std(dim=0, correction=0)[:, None])
        layer.bias.add_(mean - layer(pooled).mean(dim=0))
    return network


def logits_of(network: Any, image: Image, config: Config) -> tuple[Any, Any]:
    """Mask logits (classes, H, W) and presence logits (classes, 1, 1), in double precision."""
    grey = torch.from_numpy(image / 255).float()[None, None]
    with torch.inference_mode():
        masks, presence = network.eval()((grey - config.mean[0]) / config.std[0])
    return masks[0].double().numpy(), presence[0, :, None, None].double().numpy()


def dices_with(network: Any, config: Config, strips: Strips, biases: list[float]) -> Any:
    """Mean Dice (biases, classes) of what is there and whose gate is open, by the competition's.

    What is scored is the kernel's product of mask and gate over its threshold.
    """
    dices, threshold = [], expit(MASK_LEVEL)
    for name in strips.names:
        image, truth = strips.load(name)
        masks, presence = logits_of(network, image, config)
        gates = expit(presence)
        asked = truth.any(axis=(1, 2)) & (gates[:, 0, 0] > threshold)
        found = [expit(masks + bias) * gates > threshold for bias in biases]
        dices.append([np.where(asked, dice(each, truth), np.nan) for each in found])
    return np.nanmean(dices, axis=0)


@pytest.mark.parametrize("arch", ["Unet", "FPN"])
def test_the_refitted_masks_are_cut_where_their_product_with_the_gates_scores_most(
    arch: str, config: Config, strips: Strips
) -> None:
    """Against every bias tried, one strip after another; some gates shut, some open by half."""
    config = replace(config, arch=arch)
    network = with_gates(new_network(replace(config, seed=7)), strips, config, 0.7, 0.7)
    module, pairs, levels = module_of(network, config), StripPairs(strips), LOGIT_GRID.tolist()
    tried = dices_with(network, config, strips, [MASK_LEVEL - level for level in levels])
    found, dices = best_logit_thresholds(module, pairs)
    image = draw_image(0)
    before, _ = logits_of(network, image, config)
    calibrate_mask_bias(module, pairs)
    moved = logits_of(network, image, config)[0] - before
    assert np.ptp(tried, axis=0).min() > 0.01  # the level matters
    for label, level in enumerate(found.tolist()):
        assert tried[levels.index(level), label] == pytest.approx(tried[:, label].max(), abs=1e-4)
        assert np.allclose(moved[label], MASK_LEVEL - level, atol=1e-4)
    assert dices.numpy() == pytest.approx(tried.max(axis=0), abs=1e-4)
    now = dices_with(network, config, strips, [0.0])[0]
    assert now == pytest.approx(tried.max(axis=0), abs=0.01)


def test_the_level_is_where_the_kernels_threshold_cuts() -> None:
    assert expit(MASK_LEVEL) == pytest.approx(0.55)  # the competition's recipe


@pytest.mark.parametrize("gate", [0.56, 0.8, 1.0])
def test_a_gate_lifts_the_logit_from_which_the_kernels_product_is_over_its_threshold(
    gate: float,
) -> None:
    logit = MASK_LEVEL + float(mask_lifts(torch.tensor([gate]))[0])
    assert expit(logit) * gate == pytest.approx(0.55, abs=1e-5)  # the competition's recipe


@pytest.mark.parametrize("gate", [0.0, 0.3, 0.55])
def test_a_gate_that_is_not_above_the_threshold_shuts_every_mask(gate: float) -> None:
    assert mask_lifts(torch.tensor([gate])).tolist() == [math.inf]


def test_a_class_whose_gates_are_shut_keeps_its_level(
    network: Any, config: Config, strips: Strips
) -> None:
    with_gates(network, strips, config, 9, 0.1)
    with torch.no_grad():
        presence_layer(network).bias[1] -= 18
    found, dices = best_logit_thresholds(module_of(network, config), StripPairs(strips))
    assert found[1] == torch.tensor(MASK_LEVEL)
    assert dices.gt(0).tolist() == [True, False, True, True]


def test_a_class_that_no_strip_has_keeps_its_level(
    network: Any, config: Config, strips: Strips
) -> None:
    without = replace(strips, names=[n for n in strips.names if 2 not in strips.truth.get(n, {})])
    with_gates(network, strips, config, 9, 0.1)
    found, dices = best_logit_thresholds(module_of(network, config), StripPairs(without))
    assert found[1] == torch.tensor(MASK_LEVEL)
    assert dices[1] == 0
    assert all(found[i] in LOGIT_GRID for i in (0, 2, 3))


def test_a_class_that_no_level_finds_keeps_its_level(
    network: Any, config: Config, strips: Strips
) -> None:
    module = module_of(with_gates(network, strips, config, 9, 0.1), config)
    (bias,) = (p for k, p in network.segmentation_head.named_parameters() if k.endswith("bias"))
    with torch.no_grad():
        bias[1] = -100
    found, dices = best_logit_thresholds(module, StripPairs(strips))
    assert found[1] == torch.tensor(MASK_LEVEL)
    assert dices[1] == 0


def test_of_each_class_some_strips_are_asked(
    network: Any, config: Config, strips: Strips, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.heads.GRID_STRIPS", 2)
    with_gates(network, strips, config, 30, 0.1)  # wide open
    module, levels = module_of(network, config), LOGIT_GRID.tolist()
    found, dices = best_logit_thresholds(module, StripPairs(strips))
    for label in LABELS:
        tried = np.zeros(len(levels))
        for image, masks in map(strips.load, strips.with_class(label)[:2]):
            logits, truth = logits_of(network, image, config)[0][label - 1], masks[label - 1]
            tried += [dice((logits > level)[None], truth[None])[0] / 2 for level in levels]
        assert tried[levels.index(float(found[label - 1]))] == pytest.approx(tried.max(), abs=1e-5)
        assert float(dices[label - 1]) == pytest.approx(tried.max(), abs=1e-5)


def test_both_heads_are_refitted_and_nothing_else(
    network: Any, config: Config, strips: Strips
) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    refit_heads(module_of(network, config), StripPairs(strips.some(0, 8)))
    after = network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in changed} == {
        "classification_head",
        "segmentation_head",
    }
    assert sum(name.startswith("segmentation_head") for name in changed) == 1  # the bias


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_the_last_fit_is_one_of_single_precision_whatever_the_steps_took(
    precision: str, config: Config, strips: Strips
) -> None:
    """In half precision one overflow leaves a head of NaN."""
    found, pairs = [], StripPairs(strips.some(0, 8))
    for tried in (config, replace(config, precision=precision)):
        module = module_of(with_gates(new_network(config), strips, config, 9, 0.1), tried)
        pooled, _ = pooled_features(module, pairs)
        found.append((pooled, best_logit_thresholds(module, pairs)[1]))
    for single, mixed in zip(*found, strict=True):
        assert torch.equal(single, mixed)


def test_masks_are_set_for_the_gates_that_a_teacher_leaves(
    network: Any, config: Config, strips: Strips, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under gates that are shut no level finds anything, and each class keeps its own."""

    def shut(module: MemberModule, _: Strips) -> None:
        presence_layer(module.network).bias.data.fill_(-99)

    monkeypatch.setattr(heads, "refit_taught_gates", shut)
    (bias,) = (p for k, p in network.segmentation_head.named_parameters() if k.endswith("bias"))
    before, some = bias.detach().clone(), strips.some(0, 8)
    refit_heads(module_of(network, config), StripPairs(some), taught_on=some)
    assert torch.equal(bias, before)


# --- strips to fit them on ------------------------------------------------------------------------


def test_sampled_pairs_are_whole_strips_always_the_same_flipped_together(
    strips: Strips, config: Config
) -> None:
    pairs = SampledPairs(Batches([strips], config), 30)
    assert len(pairs) == 30
    flipped = 0
    whole = {strips.load(name)[0].tobytes(): name for name in strips.names}
    for index in range(30):
        image, masks = pairs[index]
        again = pairs[index]
        assert (image.shape, masks.shape) == (SMALL, (CLASSES, *SMALL))
        assert (image == again[0]).all() and (masks == again[1]).all()
        axes: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-1, -2))
        back = [(np.flip(image, a), np.flip(masks, a)) for a in axes]
        [(name, expected)] = [(whole[i.tobytes()], m) for i, m in back if i.tobytes() in whole]
        np.testing.assert_array_equal(expected, strips.load(name)[1])
        flipped += image.tobytes() not in whole
    assert 10 < flipped < 30
