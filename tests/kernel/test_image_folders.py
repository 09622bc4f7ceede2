"""Image folders: which files are images, and what those of several folders are called."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import save_strips

from kernel.competition import SEVERSTAL
from kernel.image_folders import image_paths, list_images


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
