"""Zips, as some old competitions are mounted."""

import atexit
import functools
import posixpath
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Set
from pathlib import Path
from typing import NamedTuple

from kernel.faults import one_line
from kernel.logs import log, progress

SPARE_BYTES = 100_000_000  # of disk, beside what is unpacked


class InZip(NamedTuple):
    """A file in a zip."""

    archive: Path
    path: str  # in it

    def __str__(self) -> str:
        return f"{self.archive}/{self.path}"


@functools.cache  # once, for the notebook's last cell too
def unzip(archive: Path, members: tuple[tuple[str, str], ...]) -> Path:
    """Return a folder of files of a zip, (name, path in it), that goes when this process ends.

    A file that is damaged, or of an unknown kind, is left out, logged.

    Raises:
        ValueError: all are damaged, or the disk has no room for them.
        OSError: the zip is gone.
    """
    folder = Path(tempfile.mkdtemp(prefix="unzipped_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    faults = dict[str, str]()
    with zipfile.ZipFile(archive) as opened:
        needed = sum(opened.getinfo(path).file_size for _, path in members)
        free = shutil.disk_usage(folder).free
        if needed + SPARE_BYTES > free:
            raise ValueError(
                f"{archive}: {needed / 1e9:.1f} GB to unpack, {free / 1e9:.1f} free in {folder}"
            )
        for name, path in progress(members, f"unpacking {archive.name}", "file"):
            try:
                with opened.open(path) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
            except Exception as error:  # one bad file must not cost the others
                (folder / name).unlink(missing_ok=True)  # what came out of it
                faults[path] = one_line(error)
    if faults:
        path, fault = next(iter(faults.items()))
        text = (
            f"{archive}: {len(faults)} of {len(members)} files cannot be unpacked, such as {path}: "
            f"{fault}; fetch it again, or unpack it"
        )
        if len(faults) == len(members):
            raise ValueError(text)
        log.warning("%s", text)
    return folder


@functools.cache  # a damaged one is logged once
def paths_in_zip(archive: Path) -> tuple[str, ...]:
    """Return the paths of a zip's files; none, logged, of one that is damaged."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return tuple(path for path in opened.namelist() if not path.endswith("/"))
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError) as error:
        log.warning(
            "%s is no whole zip, nothing of it is read: %s; fetch it again, or unpack it",
            archive,
            one_line(error),
        )
        return ()


def list_zip(archive: Path, names: Set[str], name_of: Callable[[str], str]) -> dict[str, str]:
    """Return those of some files that a zip holds, name → path in it; of two the first.

    `name_of` makes a name of a path.
    """
    found: dict[str, str] = {}
    for path in paths_in_zip(archive):
        name = name_of(path)
        if name in names and found.setdefault(name, path) != path:
            log.warning(
                "%s: %s and %s are both %r: the first is taken", archive, found[name], path, name
            )
    return found


def unzip_csv(archive: Path) -> Path | None:
    """Unpack the csv that a zip is named after; None where it is not in it.

    Raises:
        ValueError, OSError: as `unzip`.
    """
    held = list_zip(archive, {archive.stem}, posixpath.basename)
    return unzip(archive, tuple(held.items())) / archive.stem if held else None
