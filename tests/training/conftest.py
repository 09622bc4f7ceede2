"""Fixtures of the training tests: tiny synthetic strips, one experiment and its network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL

from kernel.competition import SEVERSTAL
from training.config import Config, Machine
from training.module import new_network
from training.strips import Strips, read_strips
from training.synthetic import Drawing, write_competition

MakeSteel = Callable[..., Path]


@pytest.fixture(scope="session")
def make_steel() -> MakeSteel:
    """Return a function that writes 24 tiny strips, all classes alike, into a folder."""

    def make(folder: Path, layout: str = "three-column", count: int = 24) -> Path:
        even = (1.0, 1.0, 1.0, 1.0)
        write_competition(folder, Drawing(5, SMALL), count, layout=layout, shares=even)
        return folder

    return make


@pytest.fixture(scope="session")
def steel(tmp_path_factory: pytest.TempPathFactory, make_steel: MakeSteel) -> Path:
    """A folder of 24 tiny strips, for reading only."""
    return make_steel(tmp_path_factory.mktemp("steel"))


@pytest.fixture(scope="session")
def steel_in_two_columns(tmp_path_factory: pytest.TempPathFactory, make_steel: MakeSteel) -> Path:
    """The same strips, their train.csv as it was in 2019."""
    return make_steel(tmp_path_factory.mktemp("steel-2019"), "two-column")


@pytest.fixture(scope="session")
def strips(steel: Path) -> Strips:
    """24 tiny synthetic strips with all four classes, and clean ones."""
    read = read_strips(steel, SEVERSTAL)
    assert len(read.names) == 24
    assert all(read.with_class(label) for label in (1, 2, 3, 4))
    assert read.clean()
    return read


@pytest.fixture(scope="session")
def config() -> Config:
    """A tiny experiment: 4 steps on 2 crops, 3 on whole strips."""
    return Config(
        "tiny",
        "tu-test_resnet",
        "Unet",
        crop_steps=4,
        whole_steps=3,
        crops=2,
        crop_size=(32, 64),
        seed=3,
    )


@pytest.fixture
def network(config: Config) -> Any:
    """The experiment's network before its first step."""
    return new_network(config).eval()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """This CPU, no loader process, a state every second step."""
    return Machine(torch.device("cpu"), 0, 2, tmp_path / "runs")
