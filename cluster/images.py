"""Images: which there are at an address, and their bytes from wherever they lie."""

import contextlib
import functools
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from fsspec.core import url_to_fs

from kernel.competition import SEVERSTAL, Competition
from kernel.image_folders import IMAGE_SUFFIXES
from kernel.images import Image, Strip, decode_image
from kernel.logs import log

COLUMN = "image"  # of a list
LOST = "lost+found"  # a file system's own folder, which may not be read
AS_TEXT = pyarrow.csv.ConvertOptions(column_types={COLUMN: pa.string()}, strings_can_be_null=True)
READERS: dict[str, Callable[..., pa.Table]] = {
    ".parquet": pyarrow.parquet.read_table,
    ".csv": functools.partial(pyarrow.csv.read_csv, convert_options=AS_TEXT),
}

T = TypeVar("T")


class NotFetched(OSError):
    """An image's bytes cannot be had: it is missing, or its store cannot be reached."""

    @property
    def missing(self) -> bool:
        """Whether the store says that; any other error may be the store's own fault."""
        return isinstance(self.__cause__, FileNotFoundError)


def is_local(fs: Any) -> bool:
    """Whether a file system is that of this machine."""
    return isinstance(fs, fsspec.get_filesystem_class("file"))


def store_of(name: str) -> str:
    """Return what an image's own address says of its store, such as s3://mill; else ""."""
    return "/".join(name.split("/", 3)[:3]) if "://" in name else ""


@contextlib.contextmanager
def at_address(address: str, what: str = "read") -> Iterator[None]:
    """Raise ValueError for whatever is raised inside: each store raises its own."""
    try:
        yield
    except Exception as error:  # no bucket, no right, no package
        reason = " ".join(str(error).split()) or repr(error)
        raise ValueError(f"{address}: cannot be {what}: {reason}") from error


def reach(address: str, look: Callable[[Any, str], T]) -> T:
    """Return what `look` finds with the file system of an address and the path on it.

    Raises:
        ValueError: nothing is there, no right to it, or no package for such an address.
    """
    with at_address(address):
        return look(*url_to_fs(address))


def absolute(address: str) -> str:
    """Return an address that means the same on every machine: file://… of what is here.

    Any other is returned as given: its path alone would not say on which server it is.
    """

    def name(fs: Any, path: str) -> str:
        return str(fs.unstrip_protocol(path)) if is_local(fs) else address

    return reach(address, name)


@dataclass(frozen=True)
class ImageSet:
    """Images below one address, or with addresses of their own."""

    root: str  # absolute; names are below it
    names: Sequence[str]  # each once
    address: str  # absolute, of the folder or of the list
    competition: Competition = SEVERSTAL  # says how they are read

    def load(self, name: str) -> Image:
        """Return one image.

        Raises:
            NotFetched: its bytes cannot be had.
            ValueError: they are no image.
        """
        try:
            fs, path = url_to_fs(self.root)
            path = posixpath.join(path, name)
            if "://" in name:
                fs, path = url_to_fs(name)
            data = fs.cat_file(path)
        except FileNotFoundError as error:  # some stores' message is the path alone
            raise NotFetched(f"{path}: no such file") from error
        except Exception as error:  # each store raises its own
            raise NotFetched(str(error) or repr(error)) from error
        return decode_image(data, path, self.competition)

    def read(self, name: str) -> Strip:
        """Read one image; a bad one costs its own rows, never the run.

        Raises:
            NotFetched: its bytes cannot be had, which may be its store's fault.
        """
        try:
            return Strip(name, self.load(name))
        except NotFetched:
            raise
        except Exception as error:  # one bad strip must not cost the run
            return Strip(name, None, str(error) or repr(error))


def find_images(address: str, competition: Competition = SEVERSTAL) -> ImageSet:
    """Return the images below a folder, at any depth, or those that a list names.

    A list is a .csv or .parquet with a column `image`: addresses, or paths beside the list.

    Raises:
        ValueError: nothing is there, or no image.
    """
    address = absolute(address)
    suffix = posixpath.splitext(address)[1].lower()
    if suffix in READERS:
        root, names = posixpath.dirname(address), _read_list(address, READERS[suffix])
    else:
        root, names = address.rstrip("/"), reach(address, _list_folder)
    if not names:
        raise ValueError(f"{address}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    names = list(dict.fromkeys(names))
    for name in names:
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"{address}: {name!r} is not UTF-8, as the rows are: rename it")
    return ImageSet(root, names, address.rstrip("/"), competition)


def _list_folder(fs: Any, path: str) -> list[str]:
    """Names below a folder of the files with an image's suffix; hidden ones are none."""
    if not fs.isdir(path):
        fs.info(path)  # says why there is nothing
        raise ValueError("is a file; name its folder, or a list that ends in .csv or .parquet")
    names = list[str]()
    for found in _walk(path) if is_local(fs) else fs.find(path):
        name = posixpath.relpath(found, path)
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden or posixpath.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
            continue
        if posixpath.join(path, name) != found:  # a//b or a/./b, which an object store may hold
            raise ValueError(f"{found!r} would have the name of {name!r}: rename it")
        names.append(name)
    return sorted(names)


def _walk(top: str) -> Iterator[str]:
    """Every file below a folder here, in linked folders too and each of them once.

    fsspec's own walk leaves linked folders out, and those that may not be read.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    seen = set[str]()
    for folder, folders, files in os.walk(top, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()  # a link back up would never end
            continue
        seen.add(real)
        shown = (name for name in folders if not name.startswith(".") and name != LOST)
        # Linked ones last: an image's name is that in its own folder.
        folders[:] = sorted(shown, key=lambda name: (Path(folder, name).is_symlink(), name))
        yield from (posixpath.join(folder, name) for name in files)


def _read_list(address: str, reader: Callable[..., pa.Table]) -> list[str]:
    def read(fs: Any, path: str) -> pa.ChunkedArray:
        with fs.open(path, "rb") as file:
            table = reader(file)
        if table.column_names.count(COLUMN) != 1:
            raise ValueError(f"expected one column {COLUMN!r}, found {table.column_names}")
        return table[COLUMN].cast(pa.string())

    given: list[str | None] = reach(address, read).to_pylist()
    names = [name for name in given if name]
    if len(names) < len(given):
        log.warning("%s: %d rows name no image", address, len(given) - len(names))
    return names


def open_local(address: str, folder: str) -> str:
    """Return the path of a folder here: its own, or that of a copy made in `folder`."""

    def copy(fs: Any, path: str) -> str:
        if is_local(fs):
            return path
        files = fs.find(path)  # given one by one: `get` takes [v2] in a folder's path for a pattern
        names = [posixpath.relpath(file, path) for file in files]
        if not names or any(name.startswith("..") for name in names):
            raise ValueError("expected a folder of files")
        fs.get(files, [posixpath.join(folder, name) for name in names])
        return folder

    return reach(address, copy)
