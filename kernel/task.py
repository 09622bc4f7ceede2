"""The task: the images to predict and the rows to write."""

from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from kernel.competition import Competition
from kernel.faults import one_line, short
from kernel.files import retried
from kernel.image_folders import link_images, list_images, no_images_fault, one_folder
from kernel.logs import log
from kernel.mounts import find_images, find_loose, find_sample
from kernel.options import Options
from kernel.rows import Layout, Row, RowKey, layouts_of, read_rows
from kernel.zips import InZip, unzip


@dataclass(frozen=True)
class Task:
    """The images to predict and the rows to write."""

    images: Path  # the folder of all but the zipped
    layout: Layout
    pairs: list[RowKey]  # of every row, in order
    zipped: dict[str, InZip] = field(default_factory=dict)  # by name, until `unpack_images`
    tops: tuple[Path, ...] = ()  # below which copies of damaged ones may lie loose

    @property
    def names(self) -> list[str]:
        """Every image once, in the order of its first row."""
        return list(dict.fromkeys(name for name, _ in self.pairs if name))

    def shard(self, index: int, count: int) -> "Task":
        """The rows of every `count`-th image from `index`, from 0."""
        return self.only(set(self.names[index::count]))

    def only(self, names: Set[str]) -> "Task":
        """The rows of these images."""
        return replace(self, pairs=[pair for pair in self.pairs if pair[0] in names])

    def without(self, names: Set[str]) -> "Task":
        """The rows of all other images."""
        return replace(self, pairs=[pair for pair in self.pairs if pair[0] not in names])


def expand_rows(rows: Iterable[RowKey], classes: int) -> list[RowKey]:
    """Return (image, class) pairs in order, each once; class 0 stands for all classes."""
    spread = ((n, c) for n, label in rows for c in ([label] if label else range(1, classes + 1)))
    return list(dict.fromkeys(spread))


def choose_layout(competition: Competition, name: str | None) -> Layout | None:
    """Return the layout that was asked for by name; ValueError where there is none of it."""
    layouts = layouts_of(competition)
    if name is not None and name not in layouts:
        raise ValueError(f"--layout {name!r}: {competition.slug} has {', '.join(layouts)}")
    return layouts[name] if name else None


def read_sample(
    sample: Path, competition: Competition, layout: str | None = None
) -> tuple[Layout, list[RowKey]]:
    """Read a sample's layout and (image, class) pairs."""
    asked = choose_layout(competition, layout)
    found, rows = retried(read_rows)(sample, competition)
    pairs = [(name, label) for name, label, _ in rows]
    if found.odd:
        what = "%s: %d rows do not fit the description, such as %s: they stay, with empty masks"
        log.error(what, sample, len(found.odd), short(found.odd[1].strip()))
    if fault := instances_fault(sample, rows, competition):  # every row is written all the same
        log.warning("%s; each is written once", fault)
    chosen = found if asked in (None, found) else replace(asked, odd=found.odd)
    return chosen, expand_rows(pairs, len(competition.classes))


def instances_fault(sample: Path, rows: Iterable[Row], competition: Competition) -> str:
    """Say of which image and class a sample has several rows; nothing where there is none."""
    counts = Counter((name, label) for name, label, _ in rows)
    several = [pair for pair, times in counts.items() if times > 1]
    if not several:
        return ""
    (name, label), more = several[0], len(several) - 1
    others = f", and {more} others have several" if more else ""
    return (
        f"{sample}: {name} has {counts[several[0]]} rows of class {competition.name_of(label)}"
        f"{others}: it scores instances, or is no sample; this pipeline writes one mask of "
        "each class"
    )


def find_task(options: Options, competition: Competition) -> Task:
    """Return the sample's rows, or, where only `--images` is given, every image of that folder.

    A sample that names no image is one that is filled in for the scored run only; its task is
    empty.

    Raises:
        ValueError: nothing to predict is found, or a row names a class the members do not know.
    """
    images, sample = options.images, options.sample
    if images and not images.is_dir():
        raise ValueError(f"{images}: no such folder of images")
    images = images and one_folder(images, competition)
    if images and not sample:
        layout = choose_layout(competition, options.layout)
        layout = layout or list(layouts_of(competition).values())[-1]  # the sample's
        names = list_images(images, competition.suffix)
        pairs = expand_rows([(name, 0) for name in names], len(competition.classes))
        task = Task(images, layout, pairs)
    else:
        if sample:
            homes = [sample.parent]
        else:
            sample, homes = find_sample(options.input, competition)
        layout, pairs = read_sample(sample, competition, options.layout)
        known = {name for name, _ in pairs if name}
        if not known:
            log.warning("%s: names no image: the submission is its header alone", sample)
            return Task(images or sample.parent, layout, [])
        zipped: dict[str, InZip] = {}
        if not images:
            images, zipped = find_images(known, homes, options.input, competition)
        task = Task(images, layout, pairs, zipped, (*homes, options.input))
    if not task.pairs:
        raise ValueError(no_images_fault(task.images, competition.suffix))
    if not options.worker:  # to which all others are other workers'
        others = set(list_images(task.images)) - set(task.names)
        if others:
            log.info("%s: %d images are in no row, %r…", task.images, len(others), min(others))
    return task


def unpack_images(task: Task) -> Task:
    """Return a task whose images all lie in its folder, those of zips unpacked.

    For one that cannot be unpacked a copy is taken that lies loose.

    Raises:
        ValueError, OSError: no zip can be unpacked, and no image, nor a copy of one, lies loose.
    """
    if not task.zipped:
        return task
    folders, faults = [task.images], list[Exception]()
    for archive in sorted({place.archive for place in task.zipped.values()}):
        members = ((name, at.path) for name, at in task.zipped.items() if at.archive == archive)
        try:
            folders.append(unzip(archive, tuple(members)))
        except (ValueError, OSError) as error:
            faults.append(error)
    paths = {path.name: path for folder in folders for path in folder.iterdir()}
    damaged = task.zipped.keys() - paths.keys()
    copies = find_loose(task.tops, damaged, task.layout.competition) if damaged else {}
    paths |= copies
    if not paths:
        raise faults[0]
    for fault in faults:
        log.warning("%s", one_line(fault))
    if damaged:
        log.warning(
            "%d images cannot be unpacked: loose copies of %d are taken%s, the rows of the others "
            "stay empty",
            len(damaged),
            len(copies),
            f", like {min(copies.values())}" if copies else "",
        )
    return replace(task, images=link_images(paths), zipped={})
