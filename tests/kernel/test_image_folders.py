"""Image folders: which files are images, and what those of several folders are called."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import fail_once, save_strips

from kernel.competition import SEVERSTAL
from kernel.image_folders import image_paths, list_images, walk_folders


def test_only_images_that_are_not_hidden_are_listed(tmp_path: Path) -> None:
    images = tmp_path / "images"
    save_strips(images, ["a.png", "b.png"])
    (images / ".DS_Store").write_bytes(b"\0")
    (images / "._a.png").write_bytes(b"\0")
    (images / ".ipynb_checkpoints").mkdir()
    (images / "notes.txt").write_text("")
    (images / "folder.png").mkdir()
    assert list_images(images) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("names", "logged"), [(None, ["a_0.png"]), ({"0.png"}, ["0.png"]), ({"b_0.png"}, [])]
)
def test_of_files_of_one_name_only_wanted_images_are_logged(
    names: set[str] | None, logged: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Masks beside the images have one name in every folder."""
    for place in ("a/images", "a/labels", "b/images", "b/labels", "copy/a/images"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "0.png").touch()
    nested = replace(SEVERSTAL, image_path=r"([^/]+)/images/(\d+)\.png", suffix=".png")
    found = image_paths(tmp_path, nested, names)
    folders = {name: path.parent.relative_to(tmp_path).as_posix() for name, path in found.items()}
    assert folders == {"a_0.png": "a/images", "0.png": "a/labels", "b_0.png": "b/images"}
    said = [f" are both {name!r}: the first is taken" for name in logged]
    assert len(caplog.messages) == len(said)
    assert all(map(str.endswith, caplog.messages, said))


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    """Two folders of one image each, one that is hidden, and links: back up, and to nothing."""
    save_strips(tmp_path / "input" / "a" / "deep", ["1.png"])
    save_strips(tmp_path / "input" / "b", ["2.png"])
    save_strips(tmp_path / "input" / ".hidden", ["3.png"])
    (tmp_path / "input" / "b" / "up").symlink_to(tmp_path / "input")
    (tmp_path / "input" / "b" / "gone").symlink_to(tmp_path / "gone")
    return tmp_path / "input"


def walked(top: Path) -> dict[str, list[str]]:
    """Folder → its files, in the order in which they come."""
    return {
        folder.relative_to(top).as_posix(): sorted(files) for folder, files in walk_folders(top)
    }


ALL_FOLDERS = {".": [], "a": [], "a/deep": ["1.png"], "b": ["2.png", "gone"]}


@pytest.mark.parametrize("fails", [".", "a", "a/deep", "b"])
def test_a_folder_that_cannot_be_read_for_a_moment_is_not_lost(
    fails: str, mounts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(monkeypatch, os, "scandir", mounts / fails)
    found = walked(mounts)
    assert found == ALL_FOLDERS and list(found) == list(ALL_FOLDERS)


def test_a_folder_that_cannot_be_read_is_left_out_and_named(
    mounts: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_once(monkeypatch, os, "scandir", mounts / "a", times=2)
    assert walked(mounts) == {".": [], "b": ["2.png", "gone"]}
    assert caplog.messages[-1].endswith(f"{str(mounts / 'a')!r}: the folder is left out")


def test_a_folder_that_is_not_there_has_no_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert not list(walk_folders(tmp_path / "gone")) and not list(walk_folders(tmp_path / "file"))
    assert not caplog.messages


def test_images_that_cannot_be_listed_for_a_moment_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_strips(tmp_path, ["a.png", "b.png"])
    fail_once(monkeypatch, Path, "is_file", tmp_path / "b.png")
    assert list_images(tmp_path) == ["a.png", "b.png"]
