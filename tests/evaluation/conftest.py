"""Labelled strips that several files score."""

from pathlib import Path

import pytest
from helpers import SMALL

from training.synthetic import Drawing, write_competition


@pytest.fixture(scope="session")
def labelled_strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny strips in test_images of the competition's layout, and their truth in test.csv."""
    folder = tmp_path_factory.mktemp("strips")
    write_competition(folder, Drawing(4, SMALL), test=2)
    return folder
