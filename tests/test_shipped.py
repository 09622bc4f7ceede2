"""The checkpoints in weights/, packed and run as a user would run them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from build_kernel import build
from kernel.inference import Stages, load_ensemble, load_manifest
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


def test_the_manifest_beside_the_checkpoints_names_just_those_that_are_there() -> None:
    entries = json.loads((ROOT / "weights" / "ensemble.json").read_text(encoding="utf-8"))
    named = {member["file"] for member in entries["members"]}
    assert named == {path.name for path in (ROOT / "weights").glob("*.safetensors")}
