"""Learning curves: the losses that Lightning logged, as one picture."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kernel.command import needs

with needs("training"):
    from matplotlib.figure import Figure

PARTS = ("crops", "strips")


def read_losses(folder: Path) -> pd.Series:
    """Return step → loss of one part; of a step taken again after a kill the later one.

    `folder` holds a metrics.csv for every time that the part was begun or resumed.
    """
    paths = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:]))
    begun = [path for path in paths if path.stat().st_size]  # a kill may leave an empty one
    tables = [pd.read_csv(path, usecols=["step", "loss"]).set_index("step") for path in begun]
    if not tables:
        return pd.Series(dtype=float)
    losses = pd.concat(tables)["loss"]
    return losses[~losses.index.duplicated(keep="last")].sort_index()


def draw_curves(runs: Path, names: Sequence[str], path: Path) -> None:
    """Draw each member's loss in both parts, smoothed over a fiftieth of its steps."""
    figure = Figure((12, 5), layout="constrained")
    for part, axes in zip(PARTS, figure.subplots(1, len(PARTS)), strict=True):
        for name in names:
            losses = read_losses(runs / name / part)
            smooth = losses.rolling(max(len(losses) // 50, 1), min_periods=1).mean()
            axes.plot(smooth.index, smooth, label=name)
        axes.set(title=f"loss on {part}", xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
