"""Strips for a measurement: the same with the same seed."""

from pathlib import Path

import pytest
from helpers import save_strips

from evaluation.strips import sample_strips


def test_strips_are_drawn_with_a_seed(tmp_path: Path) -> None:
    save_strips(tmp_path, [f"{index}.jpg" for index in range(9)])
    drawn = [sample_strips(tmp_path, 4, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(paths)) == 4 for paths in drawn)
    assert len(sample_strips(tmp_path, 20, 1)) == 9


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_strip_is_an_error(count: int, tmp_path: Path) -> None:
    save_strips(tmp_path, ["1.jpg", "2.jpg"])
    with pytest.raises(ValueError, match=f"--strips {count}: expected 1 or more"):
        sample_strips(tmp_path, count, 1)


def test_a_folder_without_strips_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no images in it; name the folder"):
        sample_strips(tmp_path, 4, 1)
