"""Which images there are at an address, and what a bad one costs."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import save_strips

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[cluster]'")

from cluster.images import ImageSet, find_images


def names_of(address: Path) -> list[str]:
    return list(find_images(str(address)).names)


def test_a_folders_images_are_found_at_any_depth_and_hidden_files_are_none(tmp_path: Path) -> None:
    save_strips(tmp_path, ["b.jpg", "a.PNG", "2024/01/c.jpeg", ".hidden.jpg", ".cache/d.jpg"])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "b.jpg")
    assert names_of(tmp_path) == ["2024/01/c.jpeg", "a.PNG", "b.jpg", "link.jpg"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_list_names_images_beside_it_or_anywhere(suffix: str, tmp_path: Path) -> None:
    images = save_strips(tmp_path, ["in/a.jpg", "elsewhere.png"])
    away = f"file://{tmp_path / 'elsewhere.png'}"
    (tmp_path / "in").mkdir(exist_ok=True)
    table, path = pd.DataFrame({"image": ["a.jpg", away, "a.jpg"], "mill": 1}), tmp_path / "in/list"
    path = path.with_suffix(suffix)
    table.to_csv(path) if suffix == ".csv" else table.to_parquet(path)
    found = find_images(str(path))
    assert list(found.names) == ["a.jpg", away]  # each once
    for name, key in (("a.jpg", "in/a.jpg"), (away, "elsewhere.png")):
        image = found.read(name).image
        assert image is not None
        np.testing.assert_array_equal(image, images[key])


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("nothing", "nothing: cannot be read"),
        ("empty", "empty: holds no image"),
        ("a.txt", "is a file; name its folder"),
        ("other.csv", "has no column 'image', but ['name']"),
        ("broken.parquet", "broken.parquet: cannot be read"),
        ("teapot://strips", "teapot://strips: cannot be read: Protocol not known: teapot"),
    ],
)
def test_an_address_without_images_is_refused(address: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, text in (("a.txt", "a"), ("other.csv", "name\na.jpg\n"), ("broken.parquet", "no")):
        (tmp_path / name).write_text(text)
    where = address if "://" in address else str(tmp_path / address)
    with pytest.raises(ValueError, match=address.partition(":")[0]) as refused:
        find_images(where)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_image_that_is_none_or_missing_is_a_fault_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images = ImageSet(f"file://{tmp_path}", ["bad.jpg", "gone.jpg"])
    bad, gone = images.read("bad.jpg"), images.read("gone.jpg")
    assert (bad.image, gone.image) == (None, None)
    assert bad.fault == f"{tmp_path}/bad.jpg: 8 bytes that are no image"  # the kernel's words
    assert "No such file" in gone.fault
