"""Members that a measurement loads are checked, as those of a run are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import save_strips

from evaluation.loading import load_for_images
from kernel.engines import compile_member
from kernel.manifest import load_manifest
from kernel.members import Decoder


def test_an_engine_that_is_wrong_is_replaced(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By what it gives for the first image that can be read."""

    def compile_wrong(*given: Any) -> Any:
        engine = compile_member(*given)
        return replace(engine, decoder=lambda *parts: engine.decoder(*parts).flip(-1))

    monkeypatch.setattr("kernel.ensemble_loading.compile_member", compile_wrong)
    save_strips(tmp_path, ["b.png"])
    (tmp_path / "a.png").write_bytes(b"torn")
    dataset = tiny_bundle / "dataset"
    names = ["a.png", "b.png"]
    ensemble = load_for_images(dataset, load_manifest(dataset), tmp_path, names)
    assert all(isinstance(member.decoder, Decoder) for member in ensemble.members.values())
    assert "unet-a runs on plain PyTorch, the engine fails: gates and masks are" in caplog.text
