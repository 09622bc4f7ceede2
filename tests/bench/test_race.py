"""The race: every candidate finds the same masks, and what is written says what was measured."""

import functools
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import candidates
import cv2
import numpy as np
import processes
import pytest
import race
import strips
import torch
from helpers import SMALL, change_manifest, save_strips
from torch import Tensor

from kernel.competition import SEVERSTAL
from kernel.images import read_image
from kernel.manifest import load_manifest


def test_a_small_race_ends_with_its_three_files(
    session_light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three exports and three processes are its seconds: one member is enough."""
    pytest.importorskip("onnxruntime", reason="make bench installs the peers")
    monkeypatch.setattr(processes, "N_SCORED_IMAGES", 6)
    monkeypatch.setattr(processes, "STARTS", 1)
    monkeypatch.setattr(processes, "LONG_RUN", 3)
    save_strips(tmp_path / "real", ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    dataset = Path(shutil.copytree(session_light, tmp_path / "dist" / "dataset"))
    change_manifest(dataset, flips=["none", "horizontal", "vertical"])  # as public kernels
    small = functools.partial(strips.draw_strip, size=SMALL)
    monkeypatch.setattr(strips, "draw_strip", small)
    command = ["race.py", "--bundle", str(dataset.parent), "--out", str(tmp_path / "out")]
    real = ["--real", str(tmp_path / "real")]
    monkeypatch.setattr(sys, "argv", [*command, "--strips", "2", "--rounds", "2", *real])
    race.main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["same_masks_with_and_without"] is True
    for part in (results, results["real"]):
        assert part["strips"] == 2
        assert len(part["seconds_a_strip"]) == 6
        assert all(len(turns) == 2 for turns in part["turns"].values())
        assert min(part["dice_against_eager"].values()) > 0.999
    flops = sum(sum(spec.flops) for spec in load_manifest(dataset).members)
    assert results["gigaflops_a_strip"] == pytest.approx(3 * flops / 1e9)
    assert 0 < results["outside_networks"] < 1
    assert 0.1 < results["peak_gib_stub"] < 5  # GiB; PyTorch alone is a third
    table = (tmp_path / "out" / "table.md").read_text()
    for name, seconds in results["seconds_a_strip"].items():
        assert f"| {name} | {seconds:.2f} |" in table
    assert "On 2 real strips, seconds a strip: (a) eager" in table
    chart = cv2.imread(str(tmp_path / "out" / "chart.png"))
    assert chart is not None and np.asarray(chart).std() > 10


def test_the_quickest_of_an_engines_ways_is_taken() -> None:
    def takes(seconds: float) -> candidates.Infer:
        def infer(images: Sequence[Tensor]) -> list[Tensor]:
            time.sleep(seconds)
            return list(images)

        return infer

    ways = [takes(0.05), takes(0.0), takes(0.1)]
    assert candidates.quickest(ways, [torch.zeros(1)]) is ways[1]


def test_the_way_of_public_kernels_finds_the_kernels_own_masks(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """Flips by ttach, batches of two with one left over, masks that are neither empty nor full."""
    dataset = tiny_bundle / "dataset"
    paths = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        coarse = cv2.resize(rng.uniform(0, 255, (4, 5)).astype(np.float32), (96, 64))
        paths.append(tmp_path / f"{seed}.png")
        cv2.imwrite(str(paths[-1]), coarse.astype(np.uint8))
    found, _ = candidates.as_public_kernels(dataset)(paths)
    image = read_image(paths[0], SEVERSTAL)
    expected, shares = candidates.ours(dataset, image, early_exit=True)(paths)
    assert (
        shares.keys() == expected.keys() and 0 < min(shares.values()) <= max(shares.values()) <= 1
    )
    assert 0.01 < np.mean([masks.mean() for masks in expected.values()]) < 0.99
    assert found.keys() == expected.keys()
    assert race.agreement(found, expected) > 0.999
