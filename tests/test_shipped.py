"""The checkpoints in weights/, packed and run as a user would run them."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from build_kernel import build
from kernel.ensemble import load_ensemble
from kernel.logs import Stages
from kernel.manifest import load_manifest
from weights import steel
from weights.score import dice

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shipped") / "dist"
    build(ROOT / "weights", out, owner="somebody")
    return out / "dataset"


def test_every_shipped_member_is_grey_gated_half_precision_and_below_60_mb(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    for spec in manifest.members:
        assert spec.gated
        assert spec.model["in_channels"] == 1
        assert (ROOT / "weights" / spec.file).stat().st_size < 60e6
        assert spec.name in (ROOT / "weights" / "experiments.csv").read_text(encoding="utf-8")


def test_packing_a_shipped_checkpoint_changes_no_weight(bundle: Path) -> None:
    from safetensors.torch import load_file

    for spec in load_manifest(bundle).members:
        packed, shipped = load_file(bundle / spec.file), load_file(ROOT / "weights" / spec.file)
        assert packed.keys() == shipped.keys()
        assert all(torch.equal(packed[key], shipped[key]) for key in packed)


def test_the_shipped_ensemble_covers_a_rolled_in_patch(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    ensemble = load_ensemble(bundle, manifest, torch.device("cpu"), Stages())
    scores = []
    for seed in range(3):
        image, truth = steel.draw_strip(np.random.default_rng([99, seed]), classes=[4])
        scores.append(dice(ensemble([image])[0], truth)[3])
    assert np.mean(scores) > 0.5, scores  # a wrong normalisation or weight gives 0


def test_the_early_exit_writes_the_bytes_of_every_pass_and_runs_less(
    bundle: Path, tmp_path: Path
) -> None:
    """The real script, the real members: a clean strip, a scratched one, one with a patch."""
    images = tmp_path / "images"
    images.mkdir()
    for seed, classes in enumerate([(), (3,), (4,)]):
        image, _ = steel.draw_strip(np.random.default_rng([98, seed]), classes)
        cv2.imwrite(str(images / f"{seed}.png"), image)
    command = [sys.executable, bundle / "inference.py", "--bundle", bundle, "--images", images]
    for way in ("early", "--no-early-exit"):
        options = ["--output", tmp_path / f"{way}.csv", "--report", tmp_path / f"{way}.json"]
        options += [way] if way.startswith("--") else []
        subprocess.run([*command, *options], check=True, capture_output=True, timeout=600)
    early, full = (tmp_path / f"{way}.csv" for way in ("early", "--no-early-exit"))
    assert early.read_bytes() == full.read_bytes()
    assert b" " in early.read_bytes()  # a mask, not three empty strips
    work = json.loads((tmp_path / "early.json").read_text())["work"]
    assert work["0.png"]["decoders"] == 0
    assert work["0.png"]["share"] < 0.5
    assert max(w["decoders"] for w in work.values()) > 0


def test_the_manifest_beside_the_checkpoints_names_just_those_that_are_there() -> None:
    entries = json.loads((ROOT / "weights" / "ensemble.json").read_text(encoding="utf-8"))
    named = {member["file"] for member in entries["members"]}
    assert named == {path.name for path in (ROOT / "weights").glob("*.safetensors")}
