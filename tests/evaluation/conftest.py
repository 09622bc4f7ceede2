"""Labelled strips that several files score."""

from pathlib import Path

import pytest
from helpers import SMALL

from training import synthetic


@pytest.fixture(scope="session")
def labelled_strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny strips in test_images of the competition's layout, and their truth in test.csv."""
    folder = tmp_path_factory.mktemp("strips")
    synthetic.write_competition(folder, train=0, test=2, seed=4, size=SMALL)
    return folder
