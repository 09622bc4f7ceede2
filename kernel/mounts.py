"""Mounts: finding the bundle, the sample and its images."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path, PurePosixPath

from kernel.competition import Competition
from kernel.faults import one_line
from kernel.files import retried
from kernel.image_folders import IMAGE_SUFFIXES, image_paths, link_images, walk_folders
from kernel.kaggle import is_scored_run
from kernel.logs import log
from kernel.rows import fits_header, read_rows
from kernel.zips import InZip, list_zip, paths_in_zip, unzip_csv

SAMPLE = "sample_submission.csv"
CSV = re.compile(r"\.csv(\.zip)?$", re.IGNORECASE)
SHOWN_CSVS = 6  # names in a message
DATASETS = "datasets"  # the folder below which Kaggle mounts these
TEST_SET = re.compile("(?<![a-z])test")  # in the path of a test set's images


def folders_with(root: Path, name: str) -> list[Path]:
    """Return every folder under `root`, at any depth, that holds the file `name`, sorted.

    Linked folders are searched too.
    """
    return sorted(folder for folder, files in walk_folders(root) if name in files)


def find_one(root: Path, name: str, what: str, option: str) -> Path:
    """Find the one folder under `root` that holds the file `name`; identical copies count as one.

    Raises:
        ValueError: there is none, or two differ; the message says what to add or to name.
    """
    folders = folders_with(root, name)
    if not folders:
        raise ValueError(_none_fault(root, name, what, option))
    texts = {retried((each / name).read_bytes)(): each for each in folders[::-1]}
    found = sorted(texts.values())
    if len(found) > 1:
        raise ValueError(_several_fault(found, name, option))
    return found[0]


def _none_fault(root: Path, name: str, what: str, option: str) -> str:
    there = ", ".join(sorted(path.name for path in root.glob("*"))) or "nothing"
    return (
        f"no {name} under {root}, where there is {there}: add {what} to the kernel's sources, "
        f"or give {option}"
    )


def _several_fault(found: Iterable[Path], name: str, option: str) -> str:
    listed = ", ".join(map(str, found))
    return (
        f"more than one {name}: {listed}; remove one from the kernel's sources, "
        f"or choose with {option}"
    )


# --- images ---------------------------------------------------------------------------------------

Place = Path | InZip  # of an image


def find_images(
    names: Set[str], homes: Sequence[Path], root: Path, competition: Competition
) -> tuple[Path, dict[str, InZip]]:
    """Find a sample's images: a folder of those that lie loose, and name → place of zipped ones.

    They are looked for below `homes`, the sample's folder and its competition's, then below `root`.
    Where some are zipped, or lie in several folders or under other names than the csv's, the folder
    is a new one, of links.

    Raises:
        ValueError: there is none of them.
    """
    found = _find_below((*homes, root), names, competition)
    missing = names - found.keys()
    if missing == names:
        raise ValueError(
            f"no folder or zip below {homes[0]} or {root} holds the images that the sample names, "
            f"such as {min(names, default='')!r}; name theirs with --images, or correct `suffix`; "
            "of images in folders of their own `image_path` says the names (docs/competitions.md)"
        )
    if missing:
        log.warning(
            "%s: holds %d of the %d images that the sample names, and no %r: the rows of the "
            "others stay empty; of images in folders of their own `image_path` says the names",
            root,
            len(found),
            len(names),
            min(missing),
        )
    loose = {name: place for name, place in found.items() if isinstance(place, Path)}
    zipped = {name: place for name, place in found.items() if isinstance(place, InZip)}
    folders = {path.parent for path in loose.values()}
    as_named = all(path.name == name for name, path in loose.items())
    whole = len(folders) == 1 and as_named and not zipped
    return folders.pop() if whole else link_images(loose), zipped


def find_loose(tops: Iterable[Path], names: Set[str], competition: Competition) -> dict[str, Path]:
    """Return name → path of those of some images that lie loose below folders, the first's."""
    found: dict[str, Path] = {}
    for top in tops:
        found |= _find_loose(top, names - found.keys(), competition)
    return found


def _find_below(
    tops: Sequence[Path], names: Set[str], competition: Competition
) -> dict[str, Place]:
    """Name → place of some images below folders, of one that is in several the first's.

    In each a loose image goes before a zipped one, which may be damaged. Those that are nowhere are
    looked for under other suffixes: in the test sets that hold others of them, or where none does
    in any.
    """
    steps = [(find, top) for top in tops for find in (_find_loose, _find_zipped)]
    found: dict[str, Place] = {}
    for find, top in steps:
        if missing := names - found.keys():
            found |= find(top, missing, competition)
    homes = {Path(str(place)).parent for place in found.values()}
    for top in tops:
        if missing := names - found.keys():
            tests = {home for home in homes if _is_test_set(home, top)}
            found |= _find_other_suffix(top, missing, competition, tests)
    return found


def _find_loose(top: Path, names: Set[str], competition: Competition) -> dict[str, Path]:
    """Those of some images that lie loose, each from the first of `_rank`."""
    if competition.image_path:
        paths = image_paths(top, competition, names)
        return {name: paths[name] for name in paths.keys() & names}
    held = _rank(top, {folder: names & set(files) for folder, files in walk_folders(top)})
    return {name: folder / name for folder in reversed(held) for name in held[folder]}


def _find_zipped(top: Path, names: Set[str], competition: Competition) -> dict[str, Place]:
    """Those of some images that are in zips, each from the first of `_rank`."""
    zips = [path for path in _list_files(top) if path.suffix == ".zip"]
    listed = {archive: list_zip(archive, names, competition.name_of_file) for archive in zips}
    held = _rank(top, {archive: found.keys() for archive, found in listed.items()})
    return {name: InZip(each, listed[each][name]) for each in reversed(held) for name in held[each]}


def _find_other_suffix(
    top: Path, names: Set[str], competition: Competition, tests: Set[Path]
) -> dict[str, Place]:
    """Those with another suffix in `tests`, or in any test set; of several files of a stem, none.

    Of files elsewhere one may be a mask.
    """
    suffixes = {PurePosixPath(name).suffix for name in names}
    suffixes = {suffix for suffix in suffixes if suffix.lower() in IMAGE_SUFFIXES}
    places: dict[str, list[Place]] = {}
    for path, place in _list_contents(top):
        for suffix in suffixes if path.suffix.lower() in IMAGE_SUFFIXES else ():
            name = competition.name_of_file(str(path.with_suffix(suffix)))
            home = Path(str(place)).parent
            if name in names and (home in tests if tests else _is_test_set(home, top)):
                places.setdefault(name, []).append(place)
    found = {name: each[0] for name, each in places.items() if len(each) == 1}
    if found:
        log.warning(
            "%s: %d images have another suffix than the sample and the description say, such as %s "
            "for %r: they are predicted",
            top,
            len(found),
            found[min(found)],
            min(found),
        )
    return found


def _list_files(top: Path) -> Iterator[Path]:
    for below, files in walk_folders(top):
        yield from (below / file for file in files)


def _list_contents(top: Path) -> Iterator[tuple[PurePosixPath, Place]]:
    """Every file below a folder, then what is in it if it is a zip: a path there, and its place."""
    for file in _list_files(top):
        yield PurePosixPath(file.relative_to(top).as_posix()), file
        for path in paths_in_zip(file) if file.suffix == ".zip" else ():
            yield PurePosixPath(path), InZip(file, path)


def _is_test_set(place: Path | str, top: Path) -> bool:
    """Whether a folder or zip is a test set's, by its path below `top`."""
    return bool(TEST_SET.search(str(place).removeprefix(str(top)).lower()))


def _rank(top: Path, held: Mapping[Path, Set[str]]) -> dict[Path, Set[str]]:
    """Sort places: test sets first, then by how many of a sample's images they hold."""

    def order(place: Path) -> tuple[bool, int, Path]:
        return not _is_test_set(place, top), -len(held[place]), place

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


# --- the sample -----------------------------------------------------------------------------------


def find_sample(root: Path, competition: Competition) -> tuple[Path, list[Path]]:
    """Find the sample under `root`, unpacked, and the folders whose images go before others'.

    The competition's own sample goes before a copy: for the scored run Kaggle changes the
    competition's files, not those of a dataset that holds copies of them.

    Raises:
        ValueError: there is none, or two differ; the message says what to add or to name.
    """
    for top in itertools.chain(_own_folders(root, competition.slug), [root]):
        if found := _sample_below(top, root, competition):
            place, sample = found
            return sample, [place.parent, *({top} - {place.parent, root})]
    what = f"the competition {competition.slug}"
    if seen := _list_csvs(root):
        names = ", ".join(sorted({path.name for path in seen})[:SHOWN_CSVS])
        header = " or ".join(",".join(layout) for layout in competition.layouts)
        raise ValueError(
            f"no {SAMPLE} under {root}, and no csv there is called one and has the header {header}:"
            f" {names}; add {what} to the kernel's sources, or give --sample"
        )
    raise ValueError(_none_fault(root, SAMPLE, what, "--sample"))


def _own_folders(root: Path, slug: str) -> Iterator[Path]:
    """Where Kaggle mounts a competition, then other folders of its name that are in no dataset.

    Only for these is all of `root` searched: a dataset on a slow disk holds up no sample.
    """
    usual = [root / "competitions" / slug, root / slug]
    yield from usual
    named = {folder for folder, _ in walk_folders(root) if folder.name == slug}
    others = {folder for folder in named if root / DATASETS not in folder.parents}
    yield from sorted(others.difference(usual), key=lambda folder: (len(folder.parts), folder))


def _sample_below(top: Path, root: Path, competition: Competition) -> tuple[Path, Path] | None:
    """The sample below a folder, where it lies and unpacked; None where there is none.

    Where none has the usual name, it is the csv that is called a sample, or a submission, and has
    the competition's header; of several none, if one elsewhere below `root` has the usual name.
    """
    csvs = _list_csvs(top)
    if usual := [path for path in csvs if path.name in (SAMPLE, f"{SAMPLE}.zip")]:
        samples = _unpack_csvs(usual)
        if not samples:
            raise ValueError(f"{usual[0]}: no {SAMPLE} in it; give --sample")
        if chosen := _choose_sample(samples, root, competition):
            return chosen
        raise ValueError(_several_fault(samples, SAMPLE, "--sample"))
    for word in ("sample", "submission"):
        named = _unpack_csvs(path for path in csvs if word in path.name.lower())
        fitting = {place: csv for place, csv in named.items() if fits_header(csv, competition)}
        if _differ(fitting.values()) and folders_with(root, SAMPLE):
            return None
        if chosen := _choose_sample(fitting, root, competition):
            return chosen
        if fitting:
            listed = ", ".join(map(str, fitting))
            raise ValueError(f"more than one csv may be the sample: {listed}; choose with --sample")
    return None


def _list_csvs(root: Path) -> list[Path]:
    """Every csv below a folder, zipped or not, sorted; not the zip beside one."""
    csvs = {path for path in _list_files(root) if CSV.search(path.name)}
    return sorted(
        path for path in csvs if path.suffix != ".zip" or path.with_suffix("") not in csvs
    )


def _unpack_csvs(paths: Iterable[Path]) -> dict[Path, Path]:
    """Unpack csv files, place → csv; those that are not in their zip are left out.

    Raises:
        ValueError, OSError: as `unzip`, where that leaves none.
    """
    unpacked, faults = dict[Path, Path](), list[Exception]()
    for path in paths:
        try:
            if csv := unzip_csv(path) if path.suffix == ".zip" else path:
                unpacked[path] = csv
        except (ValueError, OSError) as error:
            faults.append(error)
    if faults and not unpacked:
        raise faults[0]
    for fault in faults:
        log.warning("%s; not taken for the sample", one_line(fault))
    return unpacked


def _differ(csvs: Iterable[Path]) -> bool:
    return len({retried(csv.read_bytes)() for csv in csvs}) > 1


def _choose_sample(
    samples: Mapping[Path, Path], root: Path, competition: Competition
) -> tuple[Path, Path] | None:
    """Choose the sample, of place → csv, that has images beside or below it; copies count as one.

    Of several one that is in no dataset goes first, of identical copies too: in the scored run they
    may differ, and the choice must be the same. Where those that are left differ: None, but in the
    scored run the largest that has the competition's header, for any rows score more than none.
    """
    if len(samples) > 1:
        kept = {p: csv for p, csv in samples.items() if _has_images(p.parent, csv, competition)}
        samples = kept or samples
        kept = {p: csv for p, csv in samples.items() if root / DATASETS not in p.parents}
        if 0 < len(kept) < len(samples):
            log.info(
                "%s is taken for the sample, not %s", min(kept), min(samples.keys() - kept.keys())
            )
        samples = kept or samples
    if _differ(samples.values()) and is_scored_run():
        fitting = {p: csv for p, csv in samples.items() if fits_header(csv, competition)} or samples
        largest = max(sorted(fitting), key=lambda place: fitting[place].stat().st_size)
        log.error("%s; %s is taken", _several_fault(samples, SAMPLE, "--sample"), largest)
        samples = {largest: samples[largest]}
    if not samples or _differ(samples.values()):
        return None
    chosen, *others = sorted(samples)
    if others:
        log.warning(
            "%s and %s are the same sample: the first is taken; remove one from the kernel's "
            "sources, or choose with --sample: in the scored run they may differ",
            chosen,
            others[0],
        )
    return chosen, samples[chosen]


def _has_images(folder: Path, sample: Path, competition: Competition) -> bool:
    """Whether most of the images that a sample names lie in a folder or below it."""
    try:
        names = {name for name, _, _ in read_rows(sample, competition).rows if name}
    except ValueError:  # another competition's
        return False
    return 2 * len(_find_below([folder], names, competition)) > len(names)
