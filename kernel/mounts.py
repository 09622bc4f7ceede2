"""Mounts: finding the bundle, the sample and its images."""

import atexit
import functools
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path

from kernel.competition import SEVERSTAL, Competition
from kernel.images import check_kinds
from kernel.logs import log, progress
from kernel.rows import fits_header

SAMPLE = "sample_submission.csv"
SPARE_BYTES = 100_000_000  # of disk, beside what is unpacked
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
OTHER_SUFFIXES = {".dcm", ".gif", ".jp2", ".npy", ".webp"}  # of images that are not read
CSV = re.compile(r"\.csv(\.zip)?$", re.IGNORECASE)
SHOWN_CSVS = 6  # names in a message
TEST_SET = re.compile("(?<![a-z])test")  # in the path of a test set's images

Loose = tuple[tuple[str, Path], ...]  # name and path of images that lie beside a zip of others


def find_folders(root: Path, name: str) -> list[Path]:
    """Find the folders under `root`, at any depth, that hold the file `name`; copies count as one.

    Linked folders are searched too.
    """
    folders = folders_with(root, name)[::-1]
    return sorted({(folder / name).read_bytes(): folder for folder in folders}.values())


def folders_with(root: Path, name: str) -> list[Path]:
    """Return every folder under `root`, at any depth, that holds the file `name`, sorted."""
    return sorted(folder for folder, files in _walk(root) if name in files)


def find_one(root: Path, name: str, what: str, option: str) -> Path:
    """Find the one folder that `find_folders` finds.

    Raises:
        ValueError: there is none, or two differ; the message says what to add or to name.
    """
    found = find_folders(root, name)
    if not found:
        there = ", ".join(sorted(path.name for path in root.glob("*"))) or "nothing"
        raise ValueError(
            f"no {name} under {root}, where there is {there}: add {what} to the kernel's sources, "
            f"or give {option}"
        )
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise ValueError(
            f"more than one {name}: {listed}; remove one from the kernel's sources, "
            f"or choose with {option}"
        )
    return found[0]


def _walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below `top`, linked ones too and each once, with the names of its files."""
    seen = set[str]()
    for folder, folders, files in os.walk(top, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()  # a link back up would never end
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder), files


def list_images(folder: Path, suffix: str = "") -> list[str]:
    """Names of the images in a folder, sorted: files with an image's suffix that are not hidden.

    With a competition's `suffix` those that end in it.
    """
    paths = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    names = (path.name for path in paths if not path.name.startswith(".") and path.is_file())
    return sorted(name for name in names if name.endswith(suffix))


def no_images_fault(folder: Path, suffix: str = "") -> str:
    """Say that a folder has no images, or none with a suffix, and where below it one is."""
    if list_images(folder):
        return f"{folder}: no image in it ends in {suffix!r}; correct `suffix`"
    others = list[Path]()
    for below, files in _walk(folder):
        others += [below / file for file in files if Path(file).suffix.lower() in OTHER_SUFFIXES]
        names = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        if names:
            return (
                f"{folder}: no images in it; {below / min(names)} is in a folder below: name that, "
                "or say in the description's `image_path` how paths make the csv's names"
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
    for below, files in _walk(folder):
        for path in (below / file for file in sorted(files) if not file.startswith(".")):
            place = path.relative_to(folder).as_posix()
            name = competition.name_of_file(place)
            if path.suffix.lower() not in IMAGE_SUFFIXES or found.setdefault(name, path) == path:
                continue
            if competition.matches_path(place) if names is None else name in names:
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


def find_images(
    sample: Path, names: set[str], root: Path, competition: Competition = SEVERSTAL
) -> tuple[Path, Loose]:
    """Find a sample's images: a folder of them, or a zip and those that lie loose.

    Each is looked for below the sample's own folder, then below `root`, then in the zip there that
    holds most: a loose one may replace a damaged one of a zip. Where they lie in several folders,
    or under other names than the csv's, the folder is a new one, of links.

    Raises:
        ValueError: there is none of them.
    """
    found: dict[str, Path] = {}
    for top in (sample.parent, root):
        if len(found) < len(names):
            found = _find_loose(top, names, competition) | found
    missing = names - found.keys()
    zips = _list_zips(root, missing, competition) if missing else {}
    archive, zipped = next(iter(zips.items()), (None, frozenset[str]()))
    missing -= zipped
    if missing == names:
        raise ValueError(
            f"no folder below {sample.parent} or {root} holds the images of {sample.name}, such as "
            f"{min(names, default='')!r}; name theirs with --images, or correct `suffix`; of "
            "images in folders of their own `image_path` says the names (docs/competitions.md)"
        )
    if missing:
        log.warning(
            "%s: holds %d of the %d images that %s names, and no %r: the rows of the others stay "
            "empty; of images in folders of their own `image_path` says the names",
            *(root, len(names) - len(missing), len(names), sample.name, min(missing)),
        )
    if archive:
        return archive, tuple(sorted(found.items()))
    folders = {path.parent for path in found.values()}
    one = len(folders) == 1 and not competition.image_path
    return folders.pop() if one else link_images(found), ()


def _find_loose(top: Path, names: set[str], competition: Competition) -> dict[str, Path]:
    """Name → path of a sample's images below a folder, each from the folder that holds most."""
    if competition.image_path:
        paths = image_paths(top, competition, names)
        return {name: paths[name] for name in paths.keys() & names}
    held = _most_first({folder: names.intersection(files) for folder, files in _walk(top)})
    return {name: folder / name for folder in reversed(held) for name in held[folder]}


def _list_zips(root: Path, names: Set[str], competition: Competition) -> dict[Path, Set[str]]:
    """The zips below a folder that hold some of a sample's images, and which; most first."""
    zips = [below / file for below, files in _walk(root) for file in files if file.endswith(".zip")]
    return _most_first({each: dict(list_zip(each, names, competition)).keys() for each in zips})


def _most_first(held: Mapping[Path, Set[str]]) -> dict[Path, Set[str]]:
    """Sort places by how many of a sample's images they hold; of equals a test set is first."""

    def order(place: Path) -> tuple[int, int, Path]:
        return -len(held[place]), -len(TEST_SET.findall(str(place).lower())), place

    ranked = sorted(filter(held.get, held), key=order)
    if len(ranked) > 1 and (both := held[ranked[0]] & held[ranked[1]]):
        log.warning(
            "%s and %s both hold %d images that the sample names, like %r: the first's are taken; "
            "name the right folder with --images",
            *(*ranked[:2], len(both), min(both)),
        )
    return {place: held[place] for place in ranked}


# --- zips, as some old competitions are mounted ---------------------------------------------------


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
    archive: Path, names: Set[str], competition: Competition
) -> tuple[tuple[str, str], ...]:
    """List those of a sample's images that a zip holds, (name, path in it); of two the first."""
    found: dict[str, str] = {}
    try:
        with zipfile.ZipFile(archive) as opened:
            paths = [path for path in opened.namelist() if not path.endswith("/")]
    except (zipfile.BadZipFile, OSError) as error:
        log.warning("%s is no whole zip: %s", archive, error)
        return ()
    for path in paths:
        name = competition.name_of_file(path)
        if name in names and found.setdefault(name, path) != path:
            log.warning(
                "%s: %s and %s are both %r: the first is taken", archive, found[name], path, name
            )
    return tuple(found.items())


def find_sample(root: Path, competition: Competition) -> Path:
    """Find the sample under `root`, or unpack the zip of it; the competition's own before a copy.

    For the scored run Kaggle changes the competition's own files, not those of a dataset that holds
    copies of them.

    Raises:
        ValueError: there is none, or two differ; the message says what to add or to name.
    """
    what = f"the competition {competition.slug}"
    for top in (root / "competitions" / competition.slug, root / competition.slug, root):
        if sample := _sample_below(top, what, competition):
            return sample
    if seen := _list_csvs(root):
        names = ", ".join(sorted({path.name for path in seen})[:SHOWN_CSVS])
        header = " or ".join(",".join(layout) for layout in competition.layouts)
        raise ValueError(
            f"no {SAMPLE} under {root}, and no csv there is called one and has the header {header}:"
            f" {names}; add {what} to the kernel's sources, or give --sample"
        )
    return find_one(root, SAMPLE, what, "--sample") / SAMPLE


def _sample_below(top: Path, what: str, competition: Competition) -> Path | None:
    """The sample below a folder, None where there is none.

    Where none has the usual name, it is the csv that is called a sample, or a submission, and has
    the competition's header.
    """
    zipped = f"{SAMPLE}.zip"
    if folders_with(top, SAMPLE):
        return find_one(top, SAMPLE, what, "--sample") / SAMPLE
    if folders_with(top, zipped):
        archive = find_one(top, zipped, what, "--sample") / zipped
        if sample := _unzip_csv(archive):
            return sample
        raise ValueError(f"{archive}: no {SAMPLE} in it; give --sample")
    for word in ("sample", "submission"):
        named = sorted(path for path in _list_csvs(top) if word in path.name.lower())
        fitting = _fitting(named, competition)
        if len(fitting) > 1:
            listed = ", ".join(map(str, fitting))
            raise ValueError(f"more than one csv may be the sample: {listed}; choose with --sample")
        if fitting:
            return fitting[0]
    return None


def _list_csvs(root: Path) -> list[Path]:
    """Every csv below a folder, zipped or not."""
    return [below / file for below, files in _walk(root) for file in files if CSV.search(file)]


def _fitting(paths: Iterable[Path], competition: Competition) -> list[Path]:
    """Those of some csv files, unpacked, that have a competition's header; copies count as one."""
    opened = [_unzip_csv(path) if path.suffix == ".zip" else path for path in paths]
    fitting = (path for path in opened if path and fits_header(path, competition))
    return sorted({path.read_bytes(): path for path in fitting}.values())


def _unzip_csv(archive: Path) -> Path | None:
    """Unpack the csv that a zip is named after; None where it is not in it."""
    held = list_zip(archive, {archive.stem}, SEVERSTAL)
    return unzip(archive, held) / archive.stem if held else None
