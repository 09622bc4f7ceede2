"""The bundle: what a build leaves in the folder, and what it leaves alone."""

import errno
import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CPU,
    ROOT,
    all_bytes,
    edit_manifest,
    random_network,
    read_manifest,
    tiny_entry,
    tiny_model,
    write_manifest,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kernel.competition import COMPETITION, SEVERSTAL, Competition
from kernel.manifest import MemberSpec, load_manifest
from kernel.members import load_member
from packing import bundle, metadata
from packing.bundle import build, check_out
from packing.fit_kernel import check_fit
from packing.joining import join_modules
from packing.members import PackedMember
from packing.paths import SCRIPT
from packing.sources import read_sources


def test_script_and_metadata_are_the_projects(tiny_bundle: Path) -> None:
    for folder in ("dataset", "kernel"):
        packed = tiny_bundle / folder / "inference.py"
        assert packed.read_text(encoding="utf-8") == join_modules(SCRIPT)
    kernel = json.loads((tiny_bundle / "kernel/kernel-metadata.json").read_text(encoding="utf-8"))
    assert kernel["dataset_sources"] == ["somebody/severstal-steel-ensemble"]


def test_members_are_fp16_hashed_and_self_describing(
    session_weights: Path, tiny_bundle: Path
) -> None:
    manifest = load_manifest(tiny_bundle / "dataset")
    assert [member.name for member in manifest.members] == ["unet-a", "fpn-b", "unet-c"]
    for spec in manifest.members:
        path = tiny_bundle / "dataset" / spec.file
        assert spec.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        source, packed = load_file(session_weights / spec.file), load_file(path)
        assert packed.keys() == source.keys()
        for key, value in source.items():
            expected = value.half() if value.is_floating_point() else value
            assert torch.equal(packed[key], expected)
        with safe_open(path, "pt") as file:
            entry = json.loads(file.metadata()["member"])
        assert entry["model"] == spec.model
        assert (entry["name"], entry["mean"]) == (spec.name, spec.mean)


def test_the_kernel_loads_what_was_built_and_it_predicts_as_before(tiny_bundle: Path) -> None:
    images = torch.rand(2, 1, 64, 96, generator=torch.Generator().manual_seed(3))
    for number, spec in enumerate(load_manifest(tiny_bundle / "dataset").members):
        member = load_member(tiny_bundle / "dataset", spec, CPU)
        network = random_network(spec.model, seed=number)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (spec.mean, spec.std))
        with torch.inference_mode():
            outputs = network((images.expand(-1, len(spec.mean), -1, -1) - mean) / std)
            found = member(images)
        logits, presence = outputs if spec.gated else (outputs, torch.full((2, 4), torch.inf))
        expected = logits.sigmoid() * presence.sigmoid()[:, :, None, None]
        assert expected.std() > 0.02
        assert (found - expected).abs().max() < 0.02


def test_a_save_pretrained_folder_needs_no_model_in_the_manifest(tmp_path: Path) -> None:
    network: Any = random_network(tiny_model(), seed=5)
    network.save_pretrained(tmp_path / "runs" / "mine")
    entry = tiny_entry("mine", tiny_model()) | {"file": "runs/mine"}
    write_manifest(tmp_path, [{k: v for k, v in entry.items() if k != "model"}])
    build(tmp_path, tmp_path / "dist", None)
    spec = load_manifest(tmp_path / "dist/dataset").members[0]
    assert spec.file == "mine.safetensors"
    assert spec.model.items() >= tiny_model().items()


def test_metadata_is_checked_before_anything_is_written(
    session_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dataset-metadata.json"
    path.write_text(json.dumps({"id": "me/steel-members", "title": "tiny", "licenses": []}))
    monkeypatch.setattr(metadata, "DATASET_METADATA", path)
    monkeypatch.setattr(bundle, "fetch_wheels", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match="title 'tiny' has 4 characters"):
        build(session_weights, tmp_path / "dist", None)
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize("described", ["by the option", "beside the checkpoints"])
def test_a_manifest_that_a_build_writes_is_of_its_competition(
    described: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise ValueError("read")

    entry = {"member": json.dumps(tiny_entry("one", tiny_model()))}
    save_file(random_network(tiny_model(), 3).state_dict(), tmp_path / "one.safetensors", entry)
    mine: Competition | None = Competition(slug="mine", bits=16)
    if described == "beside the checkpoints":
        (tmp_path / "competition.json").write_text('{"slug": "mine", "bits": 16}')
        mine = None
    monkeypatch.setattr(bundle, "read_metadata", stop)
    with pytest.raises(ValueError, match="read"):
        build(tmp_path, tmp_path / "dist", None, competition=mine)
    assert read_manifest(tmp_path)["competition"] == "mine"
    assert read_sources(tmp_path)[0].competition == Competition(slug="mine", bits=16)


def test_a_competition_of_instances_is_refused_where_only_its_description_names_it(
    tiny_weights: Path, tmp_path: Path
) -> None:
    weights = Path(shutil.copytree(tiny_weights, tmp_path / "airbus"))
    described = asdict(replace(SEVERSTAL, slug="airbus-ship-detection"))
    (weights / COMPETITION).write_text(json.dumps(described), encoding="utf-8")
    edit_manifest(weights, lambda entries: entries.update(competition="airbus-ship-detection"))
    with pytest.raises(ValueError, match=r"competition airbus-ship-detection: scores instances"):
        build(weights, tmp_path / "dist", "someone")


def test_a_build_says_which_checkpoints_beside_the_manifest_it_does_not_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is fitted and built; its manifest is proposed. Then another is fitted."""
    said = f"not in {tmp_path / 'ensemble.json'}, so not packed: mine.pth"
    monkeypatch.setattr(bundle, "read_metadata", lambda *_: 1 / 0)
    (tmp_path / "mine.pth").touch()
    for name, line in (("one", said), ("two", f"{said}, two.safetensors")):
        header = {"member": json.dumps(tiny_entry(name, tiny_model()))}
        save_file({"weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors", header)
        with pytest.raises(ZeroDivisionError):
            build(tmp_path, tmp_path / "dist", None)
        assert capsys.readouterr().out.splitlines()[-1] == line


def test_a_build_says_which_members_a_fit_on_kaggle_did_not_finish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever else is amiss: where none is finished, there is no manifest either."""
    (tmp_path / "out_of_fold.json").write_text('{"one": null, "two": null}')
    with pytest.raises(ValueError, match=r"ensemble\.json: no such file"):
        build(tmp_path, tmp_path / "dist", None)
    [said] = capsys.readouterr().out.splitlines()
    path = tmp_path / "out_of_fold.json"
    assert said == f"{path}: not finished, so not packed: one, two; go on with --fit --resume"


@pytest.mark.parametrize(
    ("here", "fits"),
    [("2026.4.1", True), ("2026.4.1-22982", True), ("2025.0.0", True), ("2026.10.0", False)],
)
def test_an_openvino_that_is_newer_than_the_bundles_is_refused(
    here: str, fits: bool, session_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise ValueError("past it")

    monkeypatch.setattr("packing.wheels.find_spec", lambda _: True)
    monkeypatch.setattr("packing.wheels.version", lambda _: here)
    monkeypatch.setattr(bundle, "read_sources", stop)
    words = "past it" if fits else rf"OpenVINO {here} is .*; pip install openvino==2026\.4\.1"
    with pytest.raises(ValueError, match=words):
        build(session_weights, tmp_path / "dist", "somebody", openvino=True)


def test_what_the_kernel_would_refuse_stops_the_build(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack(source: Path, spec: MemberSpec, *_: object) -> PackedMember:
        return PackedMember(replace(spec, flops=[1, 0]), 0, 0, [])

    monkeypatch.setattr(bundle, "pack_member", pack)
    with pytest.raises(ValueError, match=r"member unet-a: flops \[1, 0\], expected its encoder's"):
        build(tiny_weights, tmp_path / "dist", None)
    assert not (tmp_path / "dist").exists()


# --- in the place of another ----------------------------------------------------------------------


@pytest.fixture
def built(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that stands where the next build goes."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "dist"))


def test_a_failed_build_leaves_the_previous_one_whole(built: Path, tiny_weights: Path) -> None:
    before = all_bytes(built)
    weights = load_file(tiny_weights / "unet-c.safetensors")
    weights["segmentation_head.0.bias"][0] = torch.nan  # the last member: others are staged by then
    save_file(weights, tiny_weights / "unet-c.safetensors")
    with pytest.raises(ValueError, match="NaN"):
        build(tiny_weights, built, "another")
    assert all_bytes(built) == before
    assert {path.name for path in built.parent.iterdir()} == {"dist", "weights"}


@pytest.mark.parametrize("fault", [OSError("in use"), KeyboardInterrupt("in use")])
def test_a_bundle_that_cannot_be_put_in_place_leaves_the_previous_one(
    fault: BaseException, built: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = all_bytes(built), Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "bundle":
            raise fault
        return rename(path, target)

    edit_manifest(tiny_weights, lambda entries: entries["members"].pop())
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(type(fault), match="in use"):
        build(tiny_weights, built, None)
    assert all_bytes(built) == before
    assert {path.name for path in built.parent.iterdir()} == {"dist", "weights"}


def test_a_second_build_replaces_all_but_the_calibration_and_the_fit_kernel(
    built: Path, tiny_weights: Path
) -> None:
    (built / "fit").mkdir()
    (built / "fit" / "fit.py").write_text("FILES")
    (built / "calibration.json").write_text("{}")
    edit_manifest(tiny_weights, lambda entries: entries["members"].pop())
    build(tiny_weights, built, None)
    left = {"calibration.json", "dataset", "fit", "kernel"}
    assert {path.name for path in built.iterdir()} == left
    assert (built / "fit" / "fit.py").read_text() == "FILES"
    assert (built / "dataset/fpn-b.safetensors").exists()
    assert not (built / "dataset/unet-c.safetensors").exists()
    assert {path.name for path in built.parent.iterdir()} == {"dist", "weights"}


def test_the_report_of_a_dry_run_outlives_the_builds_after_it_as_one_of_before(
    built: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its proposal may be hours of work."""
    for proposal in ("first", "second"):
        (built / "report").mkdir(exist_ok=True)
        for name in ("report.json", "ensemble.json"):
            (built / "report" / name).write_text(proposal)
        for _ in range(2):
            build(tiny_weights, built, None)
            assert not (built / "report").exists()
            (built / "report").mkdir()  # of a run that fails
            assert (built / "report-before" / "ensemble.json").read_text() == proposal
    (built / "report" / "report.json").touch()  # of a quick run, without a proposal
    said = f"{built / 'report'}: of a run without an ablation, not kept; report-before stays"
    assert said not in capsys.readouterr().out
    build(tiny_weights, built, None)
    assert said in capsys.readouterr().out
    assert (built / "report-before" / "ensemble.json").read_text() == proposal


def test_a_folder_that_holds_more_than_a_bundle_is_not_swapped_away(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(
        ValueError, match=r"holds other things than a bundle \(thesis\.txt\).*--out"
    ):
        check_out(tmp_path)


@pytest.mark.parametrize("left", [".DS_Store", "Thumbs.db"])
def test_what_a_system_leaves_in_a_folder_is_no_reason_to_refuse_it(left: str, built: Path) -> None:
    (built / left).touch()
    check_out(built)


def test_what_is_called_fit_and_is_none_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "fit").write_text("my results")
    with pytest.raises(ValueError, match="fit: is a file; choose another --out"):
        check_out(tmp_path / "fit")
    with pytest.raises(ValueError, match="fit: is a file; choose another --out"):
        check_fit(tmp_path / "fit")
    (tmp_path / "fit").unlink()
    (tmp_path / "fit").mkdir()
    for name in ("fit.py", ".DS_Store"):
        (tmp_path / "fit" / name).touch()
    check_fit(tmp_path / "fit")
    for name in (".git", "results.csv"):
        (tmp_path / "fit" / name).touch()
        with pytest.raises(ValueError, match=rf"other things than a fit kernel \({name}\)"):
            check_fit(tmp_path / "fit")
        (tmp_path / "fit" / name).unlink()


def test_the_folder_one_is_in_is_not_replaced(
    built: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(built / "dataset")
    with pytest.raises(ValueError, match="dist: you are in this folder, which is replaced"):
        build(tiny_weights, built, None)
    check_fit(built / "fit")
    (built / "fit").mkdir()
    monkeypatch.chdir(built / "fit")
    with pytest.raises(ValueError, match="fit: you are in this folder, which is replaced"):
        check_fit(built / "fit")


def test_a_full_disk_names_the_folder_and_leaves_the_previous_bundle(
    built: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = all_bytes(built)
    monkeypatch.setattr(shutil, "copyfile", fill)
    with pytest.raises(ValueError, match=rf"{built.parent}: No space left on device: make room"):
        build(tiny_weights, built, None)
    assert all_bytes(built) == before


def test_folders_that_only_bear_a_bundles_names_are_not_swapped_away(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "kernel").mkdir()
    with pytest.raises(ValueError, match="holds other things than a bundle"):
        check_out(tmp_path)


def test_checkpoints_in_a_folder_of_a_bundles_name_are_not_swapped_away(
    tiny_weights: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "kaggle"
    shutil.copytree(tiny_weights, mine / "dataset")
    before = all_bytes(mine)
    with pytest.raises(ValueError, match=r"holds other things than a bundle \(dataset\)"):
        build(mine / "dataset", mine, None)
    assert all_bytes(mine) == before


@pytest.mark.parametrize("place", ["the dataset", "a link to it", "a checkpoint in it"])
def test_what_is_packed_does_not_lie_where_the_bundle_goes(
    place: str, built: Path, tiny_weights: Path
) -> None:
    before, weights = all_bytes(built), built / "dataset"
    if place == "a link to it":
        weights = built.parent / "link"
        weights.symlink_to(built / "dataset")
    if place == "a checkpoint in it":
        weights = built.parent
        entry = tiny_entry("mine", tiny_model()) | {"file": "dist/dataset/unet-a.safetensors"}
        write_manifest(weights, [entry])
    words = rf"{weights}.*: lies in {built}, which is replaced; choose another --out"
    with pytest.raises(ValueError, match=words):
        build(weights, built, None)
    assert all_bytes(built) == before


def test_a_link_to_itself_is_no_place_for_a_bundle(tiny_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "dist").symlink_to("dist")
    with pytest.raises(ValueError, match="dist: a link to itself; choose another --out"):
        build(tiny_weights, tmp_path / "dist", "somebody")


def test_the_project_folder_is_not_swapped_away() -> None:
    with pytest.raises(ValueError, match="holds other things than a bundle"):
        check_out(ROOT)
