"""Fixtures that several test files share: networks are built once a session, and then copied."""

import gc
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import change_manifest, write_light_bundle, write_tiny_weights
from hypothesis import settings
from oracle import halve_masks

from packing.bundle import build

torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None)  # however busy it is
settings.load_profile("any machine")
CHILD = Path(__file__).parent / "child"  # for every process that a test starts
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHILD), os.environ.get("PYTHONPATH")]))


def pytest_collection_finish() -> None:
    """Keep what was imported, half a million objects, out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_process_of_a_mutant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant of `make mutants` lives in this process: a test that starts one tells nothing."""
    if "MUTANT_UNDER_TEST" in os.environ:
        popen = subprocess.Popen
        monkeypatch.setattr(popen, "__init__", lambda *_, **__: pytest.skip("another process"))


# --- the three tiny members: checkpoints and the bundle of them -----------------------------------


@pytest.fixture(scope="session")
def session_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `weights` folder of three tiny members; a test that changes it takes `tiny_weights`."""
    return write_tiny_weights(tmp_path_factory.mktemp("tiny") / "weights")


@pytest.fixture
def tiny_weights(session_weights: Path, tmp_path: Path) -> Path:
    """A `weights` folder of this test's own."""
    return Path(shutil.copytree(session_weights, tmp_path / "weights"))


@pytest.fixture(scope="session")
def built_bundle(session_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three tiny members as build_kernel.py packs them."""
    folder = tmp_path_factory.mktemp("bundle") / "dist"
    build(session_weights, folder, owner="somebody")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(built_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same, resizing no strip; a test that changes it takes `dataset`.

    It has no wheels: a process takes a third longer to start where it imports from them.
    """
    folder = tmp_path_factory.mktemp("tiny") / "dist"
    shutil.copytree(built_bundle, folder, ignore=shutil.ignore_patterns("*.whl"))
    change_manifest(folder / "dataset", image_size=None)
    before = sorted(folder.rglob("*"))
    yield folder
    assert sorted(folder.rglob("*")) == before  # other tests compare it with what was sent


@pytest.fixture
def dataset(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny bundle's dataset folder, of this test's own."""
    return Path(shutil.copytree(tiny_bundle / "dataset", tmp_path / "dataset"))


# --- one member under no flip, for tests of all but the networks ----------------------------------


@pytest.fixture(scope="session")
def session_light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of one member; a test that changes it takes `light_bundle`."""
    return halve_masks(write_light_bundle(tmp_path_factory.mktemp("light") / "bundle"))


@pytest.fixture
def light_bundle(session_light: Path, tmp_path: Path) -> Path:
    """A bundle of one member, of this test's own; half of each mask is on."""
    return Path(shutil.copytree(session_light, tmp_path / "light"))
