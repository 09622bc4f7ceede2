"""A measurement's strips are the same with the same seed; its members are checked as a run's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import save_strips

from evaluation.inputs import load_for_images, sample_strips
from kernel.engines import compile_member
from kernel.manifest import load_manifest
from kernel.members import Decoder


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
