"""Learning curves: a resumed part is one curve."""

from pathlib import Path

import numpy as np
import PIL.Image

from training.curves import draw_curves, read_losses


def write_metrics(folder: Path, version: int, losses: dict[int, float]) -> None:
    """A metrics.csv as Lightning writes it."""
    rows = [f"0,0.1,{loss},{step}\n" for step, loss in losses.items()]
    path = folder / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text("epoch,learning_rate,loss,step\n" + "".join(rows))


def test_steps_taken_again_count_once_and_the_later_counts(tmp_path: Path) -> None:
    write_metrics(tmp_path, 2, {1: 5.0, 2: 4.0})
    write_metrics(tmp_path, 10, {2: 3.0, 3: 2.0})  # after version_2, not before
    write_metrics(tmp_path, 0, {0: 9.0, 1: 8.0})
    assert read_losses(tmp_path).to_dict() == {0: 9.0, 1: 5.0, 2: 3.0, 3: 2.0}


def test_a_file_that_a_kill_left_empty_is_passed_over(tmp_path: Path) -> None:
    write_metrics(tmp_path, 0, {0: 9.0})
    (tmp_path / "version_1").mkdir()
    (tmp_path / "version_1" / "metrics.csv").touch()
    assert read_losses(tmp_path).to_dict() == {0: 9.0}


def test_members_that_have_begun_or_not_are_drawn(tmp_path: Path) -> None:
    pictures = []
    for losses in ({}, {0: 9.0, 1: 1.0, 2: 2.0}):
        runs = tmp_path / str(len(losses))
        if losses:
            write_metrics(runs / "a" / "crops", 0, losses)
        draw_curves(runs, ["a", "b"], tmp_path / "curves.png")
        pictures.append(np.array(PIL.Image.open(tmp_path / "curves.png")))
    assert pictures[0].shape == (500, 1200, 4)
    assert (pictures[0] != pictures[1]).any(axis=2).mean() > 0.001
