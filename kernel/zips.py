"""Zips, as some old competitions are mounted."""

import atexit
import functools
import posixpath
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Set
from pathlib import Path

from kernel.logs import log, progress

SPARE_BYTES = 100_000_000  # of disk, beside what is unpacked

Loose = tuple[tuple[str, Path], ...]  # name and path of images that lie beside a zip of others


@functools.cache
def unzip(archive: Path, members: tuple[tuple[str, str], ...], loose: Loose = ()) -> Path:
    """Return a folder of files of a zip, (name, path in it), that goes when this process ends.

    Links to `loose` images lie beside them.

    Raises:
        ValueError: the zip is damaged or of an unknown kind, or the disk has no room for them.
    """
    folder = Path(tempfile.mkdtemp(prefix="unzipped_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            needed = sum(opened.getinfo(path).file_size for _, path in members)
            free = shutil.disk_usage(folder).free
            if needed + SPARE_BYTES > free:
                raise ValueError(
                    f"{archive}: {needed / 1e9:.1f} GB to unpack, {free / 1e9:.1f} free in {folder}"
                )
            for name, path in progress(members, f"unpacking {archive.name}", "file"):
                with opened.open(path) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
            for name, place in loose:
                (folder / name).symlink_to(place.absolute())
    except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:  # encrypted, another method
        raise ValueError(f"{archive}: {error}; fetch it again, or unpack it") from error
    return folder


def list_zip(
    archive: Path, names: Set[str], name_of: Callable[[str], str]
) -> tuple[tuple[str, str], ...]:
    """List those of some files that a zip holds, (name, path in it); of two the first.

    `name_of` makes a name of a path.
    """
    found: dict[str, str] = {}
    try:
        with zipfile.ZipFile(archive) as opened:
            paths = [path for path in opened.namelist() if not path.endswith("/")]
    except (zipfile.BadZipFile, OSError) as error:
        log.warning("%s is no whole zip: %s", archive, error)
        return ()
    for path in paths:
        name = name_of(path)
        if name in names and found.setdefault(name, path) != path:
            log.warning(
                "%s: %s and %s are both %r: the first is taken", archive, found[name], path, name
            )
    return tuple(found.items())


def unzip_csv(archive: Path) -> Path | None:
    """Unpack the csv that a zip is named after; None where it is not in it.

    Raises:
        ValueError: as `unzip`.
    """
    held = list_zip(archive, {archive.stem}, posixpath.basename)
    return unzip(archive, held) / archive.stem if held else None
