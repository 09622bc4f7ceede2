"""Which images there are at an address, and what a bad one costs."""

import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.utils import infer_storage_options
from helpers import save_strips

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[cluster]'")

from cluster.images import ImageSet, NotFetched, find_images, open_local
from cluster.output import Output


def names_of(address: Path) -> list[str]:
    return list(find_images(str(address)).names)


def test_a_folders_images_are_found_at_any_depth_and_hidden_files_are_none(tmp_path: Path) -> None:
    save_strips(tmp_path, ["b.jpg", "a.PNG", "2024/01/c.jpeg", ".hidden.jpg", ".cache/d.jpg"])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "b.jpg")
    assert names_of(tmp_path) == ["2024/01/c.jpeg", "a.PNG", "b.jpg", "link.jpg"]


def test_images_in_linked_folders_are_found_and_each_folder_is_listed_once(tmp_path: Path) -> None:
    save_strips(tmp_path, ["mill/a.jpg", "disk/01/b.jpg"])
    (tmp_path / "mill" / "2024").symlink_to(tmp_path / "disk")
    (tmp_path / "mill" / "2024" / "up").symlink_to(tmp_path / "mill")
    save_strips(tmp_path, ["mill/run/c.jpg", "mill/lost+found/d.jpg"])  # the second a disk's own
    (tmp_path / "mill" / "latest").symlink_to("run")
    found = find_images(str(tmp_path / "mill"))
    assert list(found.names) == ["2024/01/b.jpg", "a.jpg", "run/c.jpg"]
    assert found.read("2024/01/b.jpg").image is not None


def test_a_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read any: what the system says of another user's stands in for it."""
    save_strips(tmp_path, ["a.jpg", "secret/b.jpg"])
    scandir = os.scandir

    def refuse(path: str | int) -> Any:  # pytest clears up by descriptors
        if str(path).endswith("/secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot be read: .*Permission denied: '.*/secret'"):
        find_images(str(tmp_path))


@pytest.mark.parametrize("key", ["strips//a.jpg", "strips/./a.jpg"])
def test_keys_that_are_no_paths_are_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images would have one name, or one a name under which nothing is found."""
    monkeypatch.setattr(MemoryFileSystem, "isdir", lambda *_: True)
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_: ["/strips/a.jpg", f"/{key}"])
    with pytest.raises(ValueError, match=rf"'/{key}' would have the name of 'a.jpg': rename it"):
        find_images("memory://strips")


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


def test_a_lists_names_are_text_whatever_they_look_like(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "list.csv").write_text("image,mill\n000001,1\n12e4,2\n,3\n")
    assert names_of(tmp_path / "list.csv") == ["000001", "12e4"]
    assert "list.csv: 1 rows name no image" in caplog.text


def test_what_a_set_is_of_is_its_folder_or_its_list(tmp_path: Path) -> None:
    """Two lists of one folder are two sets: an output has rows of one of them."""
    save_strips(tmp_path, ["a.jpg"])
    for name in ("march.csv", "april.csv"):
        (tmp_path / name).write_text("image\na.jpg\n")
    found = [find_images(str(tmp_path / name)) for name in ("", "march.csv", "april.csv")]
    assert [each.root for each in found] == [f"file://{tmp_path}"] * 3
    assert [each.address for each in found] == [
        f"file://{tmp_path}", f"file://{tmp_path}/march.csv", f"file://{tmp_path}/april.csv",
    ]  # fmt: skip


class OfServers(MemoryFileSystem):  # type: ignore[misc] # fsspec has no types
    """Its addresses name a server, as hdfs://, sftp:// and smb:// do."""

    protocol = "served"

    def __init__(self, host: str = "the default", **options: Any) -> None:
        super().__init__(**options)
        self.host = host

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(infer_storage_options(path)["path"]))

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        return {"host": infer_storage_options(path)["host"]}


def test_an_address_keeps_its_server() -> None:
    fsspec.register_implementation("served", OfServers, clobber=True)
    OfServers().pipe("/served/2024/a.png", b"")
    found = find_images("served://nn2:8020/served/")
    assert list(found.names) == ["2024/a.png"]
    assert found.root == found.address == "served://nn2:8020/served"
    output = Output("served://nn2:8020/served/masks/")
    assert (output.address, output.fs.host) == ("served://nn2:8020/served/masks", "nn2")


@pytest.mark.parametrize("folder", ["copied", "copied[v2]*?"])
def test_a_folder_elsewhere_is_copied_whole(folder: str, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe({f"/{folder}/a": b"1", f"/{folder}/deep/b": b"2"})
    copied = Path(open_local(f"memory://{folder}", str(tmp_path / "copy")))
    assert (copied / "a").read_bytes() + (copied / "deep" / "b").read_bytes() == b"12"
    with pytest.raises(ValueError, match="memory://nothing: cannot be read: expected a folder"):
        open_local("memory://nothing", str(tmp_path))


def test_a_name_that_is_no_text_is_refused_and_shown(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"'caf\\udce9\.jpg' is not UTF-8.*: rename it"):
        find_images(str(tmp_path))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("nothing", "nothing: cannot be read"),
        ("empty", "empty: holds no image"),
        ("a.txt", "is a file; name its folder"),
        ("other.csv", "other.csv: cannot be read: expected one column 'image', found ['name']"),
        ("twice.csv", "expected one column 'image', found ['image', 'image']"),
        ("latin.csv", "latin.csv: cannot be read: "),
        ("structs.parquet", "structs.parquet: cannot be read: Unsupported cast from struct"),
        ("broken.parquet", "broken.parquet: cannot be read"),
        ("teapot://strips", "teapot://strips: cannot be read: Protocol not known: teapot"),
    ],
)
def test_an_address_without_images_is_refused(address: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, text in (("a.txt", "a"), ("other.csv", "name\na.jpg\n"), ("broken.parquet", "no")):
        (tmp_path / name).write_text(text)
    (tmp_path / "twice.csv").write_text("image,image\na.jpg,b.jpg\n")
    (tmp_path / "latin.csv").write_bytes(b"image\ncaf\xe9.jpg\n")
    pd.DataFrame({"image": [{"path": "a.jpg"}]}).to_parquet(tmp_path / "structs.parquet")
    where = address if "://" in address else str(tmp_path / address)
    with pytest.raises(ValueError, match=address.partition(":")[0]) as refused:
        find_images(where)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_image_that_is_none_is_told_from_one_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images = ImageSet(f"file://{tmp_path}", ["bad.jpg", "gone.jpg"], f"file://{tmp_path}")
    bad = images.read("bad.jpg")
    assert bad.image is None
    assert bad.fault == f"{tmp_path}/bad.jpg: 8 bytes that are no image"  # the kernel's words
    for name, words in (
        ("gone.jpg", f"{tmp_path}/gone.jpg: no such file"),
        ("memory://mill/gone.jpg", "/mill/gone.jpg: no such file"),  # says no more than where
        ("teapot://gone.jpg", "Protocol not known: teapot"),
    ):
        with pytest.raises(NotFetched) as refused:
            images.read(name)
        assert str(refused.value) == words
