"""Image folders: which images one holds, and images of several side by side."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

from kernel.competition import Competition
from kernel.files import retried
from kernel.images import check_kinds
from kernel.logs import log

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
OTHER_SUFFIXES = {".dcm", ".gif", ".jp2", ".npy", ".webp"}  # of images that are not read


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        log.warning("%s: taken for a file", error)
        return False


@retried
def _list_folder(folder: Path) -> list[tuple[str, bool]]:
    """What a folder holds, and whether each is a folder, by a link or not."""
    with os.scandir(folder) as entries:
        return [(entry.name, _is_folder(entry)) for entry in entries]


def walk_folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder below `top`, linked ones too and each once, with its files' names.

    One that cannot be read is left out, logged.
    """
    seen, left = set[str](), [top]
    while left:
        folder = left.pop()
        if os.path.realpath(folder) in seen:  # a link back up would never end
            continue
        seen.add(os.path.realpath(folder))
        try:
            held = _list_folder(folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            log.warning("%s: the folder is left out", error)
            continue
        below = sorted(name for name, is_folder in held if is_folder and name[0] != ".")
        left += [folder / name for name in reversed(below)]
        yield folder, [name for name, is_folder in held if not is_folder]


@retried
def list_images(folder: Path, suffix: str = "") -> list[str]:
    """Names of the images in a folder, sorted: files with an image's suffix that are not hidden.

    With a competition's `suffix` those that end in it.
    """
    paths = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    names = (path.name for path in paths if not path.name.startswith(".") and path.is_file())
    return sorted(name for name in names if name.endswith(suffix))


NESTED = "say in the description's `image_path` how paths make the csv's names"


def no_images_fault(folder: Path, suffix: str = "", nested: str = NESTED) -> str:
    """Say that a folder has no images, or none with a suffix, and where below it one is.

    `nested` is what to do where images lie in folders of their own.
    """
    if list_images(folder):
        return f"{folder}: no image in it ends in {suffix!r}; correct `suffix`"
    others = list[Path]()
    for below, files in walk_folders(folder):
        others += [below / file for file in files if Path(file).suffix.lower() in OTHER_SUFFIXES]
        names = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        if names:
            return (
                f"{folder}: no images in it; {below / min(names)} is in a folder below: name that, "
                f"or {nested}"
            )
    if others:
        return (
            f"{folder}: no images in it that are read; save {min(others)} and the like as .png; "
            "a competition whose test images are such does not fit"
        )
    return f"{folder}: no images in it; name the folder that has them"


def image_paths(
    folder: Path, competition: Competition, names: Set[str] | None = None
) -> dict[str, Path]:
    """Return name → path of the images below a folder, at any depth; of two of a name the first.

    Both are logged where the name is one of `names`, or, without these, where `image_path` matches:
    other files, as masks beside the images, may have one name in every folder.
    """
    found: dict[str, Path] = {}
    for below, files in walk_folders(folder):
        for path in (below / file for file in sorted(files) if not file.startswith(".")):
            place = path.relative_to(folder).as_posix()
            name = competition.name_of_file(place)
            if path.suffix.lower() not in IMAGE_SUFFIXES or found.setdefault(name, path) == path:
                continue
            wanted = competition.matches_path(place) if names is None else name in names
            if wanted:
                log.warning("%s and %s are both %r: the first is taken", found[name], path, name)
    return found


def link_images(paths: Mapping[str, Path]) -> Path:
    """Return a folder of links to images, under their names, that goes when this process ends.

    Raises:
        ValueError: a name is no file's.
    """
    folder = Path(tempfile.mkdtemp(prefix="images_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, path in paths.items():
        if "/" in name:
            raise ValueError(
                f"{path}: `image_path` calls it {name!r}: a group of its own for each folder, "
                "which _ joins, makes a name"
            )
        (folder / name).symlink_to(path.absolute())
    return folder


def one_folder(folder: Path, competition: Competition) -> Path:
    """Return the folder that has the images below `folder` side by side, under the csv's names.

    It is `folder` itself, but for a competition whose images lie in folders of their own.
    """
    if competition.image_path is None or not folder.is_dir():
        return folder
    paths = image_paths(folder, competition)
    nested = any(competition.matches_path(p.relative_to(folder).as_posix()) for p in paths.values())
    return link_images(paths) if nested or (not list_images(folder) and paths) else folder


def open_images(folder: Path, competition: Competition) -> tuple[Path, list[str]]:
    """Return `one_folder` of a folder, and the names of the competition's images in it, sorted.

    Raises:
        ValueError: there is no such folder or no image in it, or one is of another colour or depth
            than the competition's.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    found = one_folder(folder, competition)
    names = list_images(found, competition.suffix)
    if not names:
        raise ValueError(no_images_fault(found, competition.suffix))
    check_kinds(found, names, competition)
    return found, names
