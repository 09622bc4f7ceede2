"""What happens beside a fit's steps: what ends them, and what is timed, shown and saved of them."""

import math
import time
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from kernel.logs import log, progress
from training.config import Config, Part

MAX_NONFINITE_STEPS = 10  # in a row: the scaler of 16-mixed leaves out a step of such a loss


def loss_scale(trainer: L.Trainer) -> float:
    """What 16-mixed multiplies a loss by, halved at each step that is left out; else 1."""
    scaler = getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
    return float(scaler.get_scale()) if scaler else 1.0


class StopOnNonFinite(Callback):
    """Ends a run whose loss is no number, in 16-mixed once the scaler does not mend it."""

    def __init__(self, config: Config, part: Part) -> None:
        self.config, self.part = config, part
        self.max_nonfinite_steps = MAX_NONFINITE_STEPS if config.precision == "16-mixed" else 1
        self.nonfinite_steps = 0  # in a row

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Check the loss.

        Raises:
            ValueError: it is no number, in 16-mixed so often that the scaler does not mend it, or
                that its scale leaves no gradient; the weights of the last state are numbers.
        """
        loss, step = float(outputs["loss"]), trainer.global_step
        self.nonfinite_steps = 0 if math.isfinite(loss) else self.nonfinite_steps + 1
        if not self.nonfinite_steps:
            return
        log.warning("%s: the loss is %s at step %d", self.config.name, loss, step)
        scale_exhausted = loss_scale(trainer) < 1
        if self.nonfinite_steps >= self.max_nonfinite_steps or scale_exhausted:
            raise ValueError(f"{self.config.name}: the loss is {loss} at step {step} of its "
                             f"{self.part.name}: fit it anew {self.config.steadier}")  # fmt: skip


class StepTimer(Callback):
    """Takes the time of steps, their loading left out; a resumed run goes on counting."""

    def __init__(self) -> None:
        self.seconds, self.start = 0.0, 0.0
        self.ends: list[float] = []  # when each step ended
        self.saved = 0.0  # when the state after the last one was written

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Stop the clock."""
        float(outputs["loss"])  # waits for the GPU
        self.ends.append(time.perf_counter())
        self.seconds += self.ends[-1] - self.start

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Note when the last state was written."""
        self.saved = time.perf_counter()

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the seconds into the state."""
        checkpoint["seconds"] = self.seconds

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from the state's."""
        self.seconds = checkpoint["seconds"]


class ProgressBar(Callback):
    """Shows how many steps are taken, and the moving average of their loss."""

    def __init__(self, config: Config, part: Part) -> None:
        self.what, self.steps = f"{config.name}, {part.name}", part.steps
        self.smooth = float("nan")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Open the bar."""
        self.bar: tqdm[int] = progress([], self.what, "step", self.steps, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Show one more step; a loss that is no number is not averaged."""
        loss = float(outputs["loss"])
        if math.isfinite(loss):
            self.smooth = loss if np.isnan(self.smooth) else 0.95 * self.smooth + 0.05 * loss
        self.bar.set_postfix(loss=f"{self.smooth:.3f}", refresh=False)
        self.bar.update()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Close the bar."""
        self.bar.close()


class StateEntries(Callback):
    """Writes into each state what it is a state of, and what a resumed run must keep."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self.entries = entries

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the entries."""
        checkpoint.update(self.entries)
