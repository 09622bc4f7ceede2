"""The source manifest: each rule that it may break, and where its checkpoints must lie."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_manifest, tiny_entry, tiny_model, write_manifest
from safetensors.torch import save_file

from kernel.competition import SEVERSTAL
from kernel.manifest import Manifest, parse_manifest
from packing.sources import left_out, propose_manifest, read_sources, unfinished


def member(**changes: Any) -> dict[str, Any]:
    return tiny_entry("one", tiny_model()) | changes


def model(**changes: Any) -> dict[str, Any]:
    return tiny_model() | changes


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no members": ({"members": []}, "no members"),
    "a name that all have together": (
        {"members": [member(name="ensemble")]},
        "name 'ensemble' is what reports call all members together; choose another",
    ),
    "one name twice": (
        {"members": [member(), member(file="b.safetensors")]},
        "two members named .*one",
    ),
    "one file twice": (
        {"members": [member(), member(name="two")]},
        r"two members share .*one\.safetensors",
    ),
    "no classes": ({"classes": 0}, "classes 0, the competition has 4"),
    "a threshold of nought": ({"threshold": 0}, "threshold 0, expected a number between 0 and 1"),
    "a threshold of one": ({"threshold": 1.0}, "threshold 1.0, expected a number between 0 and 1"),
    "a negative area": ({"min_area": -1}, "min_area -1, expected a whole number from 0"),
    "no flips": ({"flips": []}, r"flips \(\), expected some of .*none"),
    "an unknown flip": (
        {"flips": ["none", "diagonal"]},
        "flips .*diagonal.*expected some of .*both",
    ),
    "flips as one word": ({"flips": "none"}, "flips 'none', expected a list of"),
    "a flip named twice": (
        {"flips": ["none", "vertical", "none"]},
        "flips .*expected some of .*each once",
    ),
    "a file elsewhere": (
        {"members": [member(file="../one.safetensors")]},
        "member one: file '../one.safetensors' is not beside the manifest",
    ),
    "a model without encoder": (
        {"members": [member(model={"arch": "Unet", "in_channels": 1, "classes": 4})]},
        "member one: model .* lacks arch or encoder_name",
    ),
    "a model of other classes": (
        {"members": [member(model=model(classes=3, aux_params=None))]},
        "member one: model's classes 3, expected 4",
    ),
    "a presence head of other classes": (
        {"members": [member(model=model(aux_params={"classes": 5}))]},
        "member one: aux_params's classes 5, the model's are 4",
    ),
    "two means for one channel": (
        {"members": [member(mean=[0.1, 0.2])]},
        r"member one: mean \[0.1, 0.2\], expected as many numbers as model's in_channels: 1",
    ),
    "three means for one channel": (
        {"members": [member(mean=[0.3] * 3)]},
        "member one: mean .*, expected as many numbers as model's in_channels: 1",
    ),
    "no std": ({"members": [member(std=[])]}, r"member one: std \[\], expected as many"),
    "two channels": (
        {"members": [member(model=model(in_channels=2), mean=[0, 0], std=[1, 1])]},
        "member one: model's in_channels 2, expected 1 or 3",
    ),
    "a std of nought": (
        {"members": [member(std=[0.0])]},
        r"std \[0.0\]: expected .* a std above 0",
    ),
    "a threshold in words": ({"threshold": "0.55"}, "threshold '0.55', expected a number"),
    "a model that is no object": (
        {"members": [member(model=None)]},
        "model None lacks arch or encoder_name",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_source_manifest_is_refused_for(case: str, tmp_path: Path) -> None:
    changes, message = FAULTS[case]
    write_manifest(tmp_path, **{"members": [member()], **changes})
    path = tmp_path / "ensemble.json"
    with pytest.raises(ValueError, match=message) as error:
        parse_manifest(read_manifest(tmp_path), path, SEVERSTAL)
    assert str(path) in str(error.value)


def test_a_folder_without_weights_names_the_file_that_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}")
    write_manifest(tmp_path, [member(file="one")])
    words = r"member one: .*one/model\.safetensors: no such checkpoint; .*correct `file`"
    with pytest.raises(ValueError, match=words):
        read_sources(tmp_path)


def test_packed_files_are_named_in_ascii_which_no_upload_changes_and_apart(tmp_path: Path) -> None:
    names = ["große Maske-1.5", "grobe Maske-1.5", "grove Maske-1.5", "模型一", "模型二"]
    names.append("ö" * 88)  # as long as a name may be for its file's
    write_manifest(tmp_path, [member(name=name, file=f"{i}.pt") for i, name in enumerate(names)])
    for index in range(len(names)):
        (tmp_path / f"{index}.pt").touch()
    specs = read_sources(tmp_path)[0].members
    assert [spec.name for spec in specs] == names
    files = [spec.file for spec in specs]
    assert files[1:3] == ["grobe-Maske-1.5.safetensors", "grove-Maske-1.5.safetensors"]
    assert all(file.isascii() for file in files)
    assert len(set(files)) == len(names)


def test_an_entry_without_a_model_is_named_with_the_file_that_has_no_config_beside_it(
    tmp_path: Path,
) -> None:
    write_manifest(tmp_path, [{k: v for k, v in member(file="one.pt").items() if k != "model"}])
    (tmp_path / "one.pt").touch()
    with pytest.raises(ValueError) as error:
        read_sources(tmp_path)
    said = f"member one: lacks `model`, and no config.json lies beside {tmp_path / 'one.pt'}; write"
    assert str(error.value).startswith(said)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"member one: .*config\.json: names no architecture"):
        read_sources(tmp_path)


def test_checkpoints_that_say_what_they_are_get_a_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `training/train.py` writes them; others in the folder are no members."""
    entries = [member(name=name, file=f"{name}.safetensors") for name in ("two", "one")]
    for entry in entries:
        unsaid = {"sha256": "", "image_size": None, "softmax": False, "mask_shift": 0.0}
        header = {"member": json.dumps(entry | unsaid)}
        save_file({"weight": torch.zeros(1)}, tmp_path / entry["file"], header)
    (tmp_path / "one.safetensors").rename(tmp_path / "1.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    path = tmp_path / "ensemble.json"
    propose_manifest(path, SEVERSTAL)
    manifest, sources = read_sources(tmp_path)
    assert sources == [tmp_path / "1.safetensors", tmp_path / "two.safetensors"]
    assert [spec.name for spec in manifest.members] == ["one", "two"]
    assert json.loads(path.read_text())["members"][1] == entries[0]
    assert replace(manifest, members=[]) == Manifest([])
    assert "was not there; written of what 1.safetensors, two.safe" in capsys.readouterr().out
    for name in ("1.safetensors", "two.safetensors", path.name):
        (tmp_path / name).unlink()
    propose_manifest(path, SEVERSTAL)
    assert not path.exists()


def write_packed(folder: Path, **changes: Any) -> None:
    """A checkpoint with its entry in its header."""
    header = {"member": json.dumps(member(**changes))}
    save_file({"weight": torch.zeros(1)}, folder / "one.safetensors", header)


def test_a_proposed_manifest_keeps_what_a_packed_member_adds_to_its_logits(tmp_path: Path) -> None:
    shifts = {"mask_shift": 1.5, "gate_shift": [0.0, -1.0, 0.5, 2.0]}
    write_packed(tmp_path, **shifts)
    propose_manifest(tmp_path / "ensemble.json", SEVERSTAL)
    [spec] = read_sources(tmp_path)[0].members
    assert {name: getattr(spec, name) for name in shifts} == shifts
    write_packed(tmp_path, softmax=True)
    propose_manifest(tmp_path / "ensemble.json", SEVERSTAL)
    assert read_sources(tmp_path)[0].members[0].softmax


def test_a_manifest_that_was_proposed_for_another_competition_stays_its(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = {"classes": 2, "aux_params": {"classes": 2, "pooling": "max"}}
    write_packed(tmp_path, model=model(**two))
    mine = replace(
        SEVERSTAL,
        slug="mine",
        classes=("a", "b"),
        bits=16,
        n_training_images=None,
        images_with_class=None,
        median_areas=None,
    )
    propose_manifest(tmp_path / "ensemble.json", mine)
    assert read_manifest(tmp_path)["competition"] == "mine"
    assert "of themselves, competition.json beside it: look" in capsys.readouterr().out
    assert read_sources(tmp_path)[0].competition == mine  # without the option
    read_sources(tmp_path, mine)
    assert not capsys.readouterr().out
    read_sources(tmp_path, replace(mine, run_order="rows"))
    assert "competition.json: says otherwise than --competition" in capsys.readouterr().out
    (tmp_path / "ensemble.json").unlink()
    propose_manifest(tmp_path / "ensemble.json", replace(mine, slug="other"))
    with pytest.raises(ValueError, match="competition 'other', its description is of 'mine'"):
        read_sources(tmp_path)  # what stands there stays


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    outside, folder = tmp_path / "one.safetensors", tmp_path / "weights"
    outside.touch()
    folder.mkdir()
    (folder / outside.name).symlink_to(outside)
    write_manifest(folder, [member()])
    with pytest.raises(ValueError, match=r"member one: file 'one\.safetensors' leaves .*weights"):
        read_sources(folder)


def test_a_link_to_itself_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").symlink_to("one.safetensors")
    write_manifest(tmp_path, [member()])
    with pytest.raises(ValueError, match=r"member one: .*one\.safetensors: no such checkpoint"):
        read_sources(tmp_path)


def test_one_checkpoint_under_two_names_is_refused_unless_something_else_differs(
    tmp_path: Path,
) -> None:
    (tmp_path / "one.safetensors").touch()
    (tmp_path / "link.safetensors").symlink_to("one.safetensors")
    two = member(name="two", file="link.safetensors")
    write_manifest(tmp_path, [member(), two])
    path = tmp_path / "one.safetensors"
    with pytest.raises(ValueError, match=f"members one and two are the same: {path}; leave one"):
        read_sources(tmp_path)
    write_manifest(tmp_path, [member(), two | {"image_size": [128, 192]}])
    assert len(read_sources(tmp_path)[1]) == 2


def test_checkpoints_in_the_folder_that_are_no_members_are_left_out(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors", "mine.pth", "notes.txt", "run/best.ckpt",
                 "saved/model.safetensors", "other/model.safetensors"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link.pt").symlink_to("one.safetensors")
    write_manifest(tmp_path, [member(), member(name="saved", file="saved")])
    _, sources = read_sources(tmp_path)
    assert left_out(tmp_path, sources) == ["mine.pth", "other", "two.safetensors"]


def test_members_that_a_fit_on_kaggle_left_unfinished_are_known_by_its_record(
    tmp_path: Path,
) -> None:
    """One whose checkpoint is there was fitted elsewhere; a record that is none says nothing."""
    assert unfinished(tmp_path) == []
    scores = {"fold": 0, "dice": None}
    record = {"one": scores, "two": None, "three": None, "four": None}
    (tmp_path / "out_of_fold.json").write_text(json.dumps(record))
    (tmp_path / "three.safetensors").touch()
    assert unfinished(tmp_path) == ["two", "four"]
    (tmp_path / "out_of_fold.json").write_text("{")
    assert unfinished(tmp_path) == []
    assert unfinished(tmp_path / "three.safetensors") == []  # a file in the place of the folder


def test_a_name_becomes_a_flat_file_and_the_source_stays_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "last.pt").touch()
    name = "fold 0/best (EMA)"
    entry = member(name=name, file="runs/last.pt", model=model(activation="sigmoid"))
    write_manifest(tmp_path, [entry])
    manifest, sources = read_sources(tmp_path)
    assert sources == [tmp_path / "runs" / "last.pt"]
    [spec] = manifest.members
    assert (spec.name, spec.file) == (name, "fold-0-best-EMA-.safetensors")
    assert spec.model == tiny_model()  # the sigmoid is the kernel's
