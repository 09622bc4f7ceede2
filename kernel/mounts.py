"""Mounts: finding the bundle, the sample and its images."""

import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

from kernel.competition import Competition
from kernel.image_folders import image_paths, link_images, walk_folders
from kernel.logs import log
from kernel.rows import fits_header
from kernel.zips import Loose, list_zip, unzip_csv

SAMPLE = "sample_submission.csv"
CSV = re.compile(r"\.csv(\.zip)?$", re.IGNORECASE)
SHOWN_CSVS = 6  # names in a message
TEST_SET = re.compile("(?<![a-z])test")  # in the path of a test set's images


def find_folders(root: Path, name: str) -> list[Path]:
    """Find the folders under `root`, at any depth, that hold the file `name`; copies count as one.

    Linked folders are searched too.
    """
    folders = folders_with(root, name)[::-1]
    return sorted({(folder / name).read_bytes(): folder for folder in folders}.values())


def folders_with(root: Path, name: str) -> list[Path]:
    """Return every folder under `root`, at any depth, that holds the file `name`, sorted."""
    return sorted(folder for folder, files in walk_folders(root) if name in files)


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


# --- the sample -----------------------------------------------------------------------------------


def find_sample(root: Path, competition: Competition) -> Path:
    """Find the sample under `root`, or unpack the zip of it; the competition's own before a copy.

    For the scored run Kaggle changes the competition's own files, not those of a dataset that holds
    copies of them.

    Raises:
        ValueError: there is none, or two differ; the message says what to add or to name.
    """
    what = f"the competition {competition.slug}"
    for top in (root / "competitions" / competition.slug, root / competition.slug, root):
        if sample := _sample_below(top, root, what, competition):
            return sample
    if seen := _list_csvs(root):
        names = ", ".join(sorted({path.name for path in seen})[:SHOWN_CSVS])
        header = " or ".join(",".join(layout) for layout in competition.layouts)
        raise ValueError(
            f"no {SAMPLE} under {root}, and no csv there is called one and has the header {header}:"
            f" {names}; add {what} to the kernel's sources, or give --sample"
        )
    return find_one(root, SAMPLE, what, "--sample") / SAMPLE


def _sample_below(top: Path, root: Path, what: str, competition: Competition) -> Path | None:
    """The sample below a folder, None where there is none.

    Where none has the usual name, it is the csv that is called a sample, or a submission, and has
    the competition's header; of several none, if one elsewhere below `root` has the usual name.
    """
    zipped = f"{SAMPLE}.zip"
    if folders_with(top, SAMPLE):
        return find_one(top, SAMPLE, what, "--sample") / SAMPLE
    if folders_with(top, zipped):
        archive = find_one(top, zipped, what, "--sample") / zipped
        if sample := unzip_csv(archive):
            return sample
        raise ValueError(f"{archive}: no {SAMPLE} in it; give --sample")
    for word in ("sample", "submission"):
        named = sorted(path for path in _list_csvs(top) if word in path.name.lower())
        fitting = _fitting(named, competition)
        if len(fitting) > 1 and folders_with(root, SAMPLE):
            return None
        if len(fitting) > 1:
            listed = ", ".join(map(str, fitting))
            raise ValueError(f"more than one csv may be the sample: {listed}; choose with --sample")
        if fitting:
            return fitting[0]
    return None


def _list_csvs(root: Path) -> list[Path]:
    """Every csv below a folder, zipped or not."""
    return [
        below / file for below, files in walk_folders(root) for file in files if CSV.search(file)
    ]


def _fitting(paths: Iterable[Path], competition: Competition) -> list[Path]:
    """Those of some csv files, unpacked, that have a competition's header; copies count as one."""
    opened = [unzip_csv(path) if path.suffix == ".zip" else path for path in paths]
    fitting = (path for path in opened if path and fits_header(path, competition))
    return sorted({path.read_bytes(): path for path in fitting}.values())


# --- its images -----------------------------------------------------------------------------------


def find_images(
    sample: Path, names: set[str], root: Path, competition: Competition
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
            root,
            len(names) - len(missing),
            len(names),
            sample.name,
            min(missing),
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
    held = _most_first({folder: names.intersection(files) for folder, files in walk_folders(top)})
    return {name: folder / name for folder in reversed(held) for name in held[folder]}


def _list_zips(root: Path, names: Set[str], competition: Competition) -> dict[Path, Set[str]]:
    """The zips below a folder that hold some of a sample's images, and which; most first."""
    zips = [
        below / file
        for below, files in walk_folders(root)
        for file in files
        if file.endswith(".zip")
    ]
    return _most_first(
        {each: dict(list_zip(each, names, competition.name_of_file)).keys() for each in zips}
    )


def _most_first(held: Mapping[Path, Set[str]]) -> dict[Path, Set[str]]:
    """Sort places by how many of a sample's images they hold; of equals a test set is first."""

    def order(place: Path) -> tuple[int, int, Path]:
        return -len(held[place]), -len(TEST_SET.findall(str(place).lower())), place

    ranked = sorted(filter(held.get, held), key=order)
    if len(ranked) > 1 and (both := held[ranked[0]] & held[ranked[1]]):
        log.warning(
            "%s and %s both hold %d images that the sample names, like %r: the first's are taken; "
            "name the right folder with --images",
            ranked[0],
            ranked[1],
            len(both),
            min(both),
        )
    return {place: held[place] for place in ranked}
