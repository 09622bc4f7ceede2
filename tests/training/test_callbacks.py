"""Beside the steps: a loss that is no number ends them, the bar averages those that are."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from training.callbacks import ProgressBar, StopOnNonFinite
from training.config import Config


@pytest.mark.parametrize(("precision", "most"), [("32", 1), ("bf16-mixed", 1), ("16-mixed", 10)])
def test_a_loss_that_is_no_number_ends_a_run_when_no_scaler_mends_it(
    precision: str, most: int, config: Config
) -> None:
    """As often as `most`, and one less before a loss that is one."""
    trainer: Any = SimpleNamespace(global_step=0)
    stop = StopOnNonFinite(replace(config, precision=precision), config.crop_part)

    def see(loss: float) -> None:
        trainer.global_step += 1
        stop.on_train_batch_end(trainer, None, {"loss": loss}, None, 0)  # type: ignore[arg-type]

    lost = [float("nan"), float("inf")] * 5
    for loss in [2.0, *lost[: most - 1], 2.0, *lost[: most - 1]]:
        see(loss)
    assert trainer.global_step == 2 * most
    with pytest.raises(ValueError, match=rf"at step {2 * most + 1} of its crops: fit it anew"):
        see(float("nan"))


def test_a_scale_that_leaves_no_gradient_ends_a_run_of_16_mixed(config: Config) -> None:
    """Losses lost now and then, each of which halves it, and never ten in a row."""
    scales = iter([1.0, 0.5])
    scaler = SimpleNamespace(get_scale=lambda: next(scales))
    plugin, mixed = SimpleNamespace(scaler=scaler), replace(config, precision="16-mixed")
    trainer: Any = SimpleNamespace(global_step=1, precision_plugin=plugin)
    stop = StopOnNonFinite(mixed, config.crop_part)

    def see(loss: float) -> None:
        stop.on_train_batch_end(trainer, None, {"loss": loss}, None, 0)  # type: ignore[arg-type]

    see(float("nan"))
    see(1.0)
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        see(float("nan"))


def test_the_bar_averages_the_losses_that_are_numbers(config: Config) -> None:
    bar, trainer = ProgressBar(config, config.crop_part), SimpleNamespace(global_step=0)
    bar.on_train_start(trainer, None)  # type: ignore[arg-type]
    for loss in (float("nan"), 2.0, float("inf"), 4.0):
        bar.on_train_batch_end(trainer, None, {"loss": loss}, None, 0)  # type: ignore[arg-type]
    assert bar.smooth == pytest.approx(2.1) and bar.bar.n == 4
    bar.on_train_end(trainer, None)  # type: ignore[arg-type]
