"""The wheels: pinned to what is in use, cached; test_kaggle.py runs a bundle from them alone."""

import os
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers import ROOT

from packing import wheels
from packing.wheels import OPENVINO_VERSION, WHEELS, fetch_wheels


def test_the_pins_are_the_versions_in_use() -> None:
    pins = dict(name.split("-")[:2] for name in WHEELS)
    assert pins == {name: version(name) for name in ("segmentation_models_pytorch", "timm")}


def test_no_openvino_is_installed_that_is_newer_than_the_bundles() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [extra] = project["optional-dependencies"]["openvino"]
    assert extra.endswith(f",<={OPENVINO_VERSION}")
    oldest = (ROOT / "requirements-oldest.txt").read_text(encoding="utf-8").splitlines()
    assert f"openvino<={OPENVINO_VERSION}" in oldest


def test_cached_wheels_need_no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_wheels()
    monkeypatch.setattr(wheels, "_download", lambda *_: pytest.fail("asked the registry"))
    assert [wheel.name for wheel in fetch_wheels()] == list(WHEELS)


def test_without_cache_and_registry_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "timm-1.0.31-py3-none-any.whl").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"lacks segmentation_models_pytorch==.*timm==.*or copy"):
        fetch_wheels(folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["timm-1.0.31-py3-none-any.whl"]
