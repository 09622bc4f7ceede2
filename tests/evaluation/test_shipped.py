"""The checkpoints in weights/, packed and run as a user would run them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    change_manifest,
    decode_by_hand,
    edit_manifest,
    predict,
    read_submission,
    run_script,
    save_image,
)
from safetensors.torch import load_file

from kernel.images import Image
from kernel.manifest import load_manifest
from packing.bundle import build
from training import synthetic
from training.metrics import Masks, dice

WIDTH = 128  # pixels of a strip's 1600: a twelfth of the time, and any size takes the same way


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shipped") / "dist"
    build(ROOT / "weights", out, owner="somebody")
    change_manifest(out / "dataset", image_size=None)  # cut strips are not to be resized
    return out / "dataset"


def test_every_shipped_member_is_grey_gated_half_precision_and_below_60_mb(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert len(manifest.members) == 5
    for spec in manifest.members:
        assert spec.gated
        assert spec.model["in_channels"] == 1
        shipped = ROOT / "weights" / spec.file
        assert shipped.stat().st_size < 60e6
        floats = {w.dtype for w in load_file(shipped).values() if w.is_floating_point()}
        assert floats == {torch.float16}
        assert spec.name in (ROOT / "weights" / "experiments.csv").read_text(encoding="utf-8")


def test_packing_a_shipped_checkpoint_changes_no_weight(bundle: Path) -> None:
    for spec in load_manifest(bundle).members:
        packed, shipped = load_file(bundle / spec.file), load_file(ROOT / "weights" / spec.file)
        assert packed.keys() == shipped.keys()
        assert all(torch.equal(packed[key], shipped[key]) for key in packed)


def cut_to_defect(image: Image, truth: Masks) -> tuple[Image, Masks]:
    """The `WIDTH` columns with most of a strip's defects."""
    sums = truth.any(axis=(0, 1)).cumsum()
    first = int(np.argmax(sums[WIDTH:] - sums[:-WIDTH]))
    part = slice(first, first + WIDTH)
    return image[:, part], truth[..., part]


@pytest.fixture(scope="module")
def strips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Masks]]:
    """A clean strip, a scratched one, three with a patch, cut; and their true masks."""
    folder, truths = tmp_path_factory.mktemp("strips"), {}
    kinds = {"clean": (98, 0, ()), "scratch": (98, 1, (3,))}
    kinds |= {f"patch{seed}": (99, seed, (4,)) for seed in range(3)}
    for name, (*seed, classes) in kinds.items():
        drawn = synthetic.synthesize_strip(np.random.default_rng(seed), classes)
        image, truths[f"{name}.png"] = cut_to_defect(*drawn)
        save_image(folder / f"{name}.png", image)
    return folder, truths


@pytest.fixture(scope="module")
def early(
    bundle: Path, strips: tuple[Path, dict[str, Masks]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The submission of the real script, as a process, and its run record."""
    folder = tmp_path_factory.mktemp("early")
    options = ("--bundle", bundle, "--images", strips[0])
    done = run_script(bundle / "inference.py", *options, cwd=folder, timeout_s=900)
    assert done.returncode == 0, done.stderr
    return folder / "submission.csv", json.loads((folder / "run.json").read_text())


def test_the_shipped_ensemble_covers_a_rolled_in_patch(
    bundle: Path, strips: tuple[Path, dict[str, Masks]], tmp_path: Path
) -> None:
    """With every gate open: they are fitted to real strips, and may be shut on drawn ones."""
    opened = Path(shutil.copytree(bundle, tmp_path / "dataset"))
    edit_manifest(opened, lambda manifest: [m.update(gate_shift=30) for m in manifest["members"]])
    images = shutil.ignore_patterns("clean.png", "scratch.png")
    patches = Path(shutil.copytree(strips[0], tmp_path / "patches", ignore=images))
    predict(opened, patches, tmp_path / "submission.csv")
    scores = []
    for (name, label), rle in read_submission(tmp_path / "submission.csv").items():
        if label == 4:
            truth = strips[1][name]
            scores.append(dice(decode_by_hand(rle, truth.shape[1:])[None], truth[3:])[0])
    assert len(scores) == 3
    assert min(scores) > 0.5, scores


def test_the_early_exit_writes_the_bytes_of_every_pass_and_runs_less(
    bundle: Path,
    early: tuple[Path, dict[str, Any]],
    strips: tuple[Path, dict[str, Masks]],
    tmp_path: Path,
) -> None:
    record = predict(bundle, strips[0], tmp_path / "full.csv", early_exit=False)
    assert record["share"] == 1
    assert early[0].read_bytes() == (tmp_path / "full.csv").read_bytes()
    assert b" " in early[0].read_bytes()  # a mask, not five empty strips
    work = early[1]["work"]
    assert len(work["clean.png"]["decoders"]) < 15
    assert work["clean.png"]["share"] < 0.75, work
    assert max(len(each["decoders"]) for each in work.values()) > 0


def test_the_manifest_beside_the_checkpoints_names_just_those_that_are_there() -> None:
    entries = json.loads((ROOT / "weights" / "ensemble.json").read_text(encoding="utf-8"))
    named = {member["file"] for member in entries["members"]}
    assert named == {path.name for path in (ROOT / "weights").glob("*.safetensors")}
