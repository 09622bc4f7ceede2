"""Strips: the images of a folder with their ground truth."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from kernel.competition import Competition
from kernel.faults import one_line
from kernel.image_folders import open_images
from kernel.images import Image, read_image, size_of
from kernel.logs import log
from training.ground_truth import (
    Truth,
    check_names,
    decode_masks,
    read_truth,
    warn_of_unlikely_masks,
)
from training.metrics import Masks

Pair = tuple[Image, Masks]  # an image, and its masks (classes, H, W)
T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Strips:
    """Images of a folder with their ground truth."""

    folder: Path
    names: list[str]
    truth: Truth
    competition: Competition
    whole: set[str] = field(default_factory=set, compare=False)  # images that were read already

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.competition.classes)

    def load(self, name: str) -> Pair:
        """Return one image (H, W) and its masks (classes, H, W)."""
        image = read_image(self.folder / name, self.competition, known_whole=name in self.whole)
        self.whole.add(name)
        return image, decode_masks(self.truth, name, size_of(image), self.competition)

    def with_class(self, label: int) -> list[str]:
        """Return the images that have a mask of class `label`."""
        return [name for name in self.names if label in self.truth.get(name, {})]

    def some(self, first: int, last: int) -> "Strips":
        """Return the images from number `first`, from 0, to before `last`."""
        return replace(self, names=self.names[first:last])

    def clean(self) -> list[str]:
        """Return the images without any mask."""
        return [name for name in self.names if not self.truth.get(name)]

    def fingerprint(self) -> str:
        """Return a hash of the names, the files' sizes and the ground truth."""
        digest = hashlib.sha256()
        for name in self.names:
            size = (self.folder / name).stat().st_size
            digest.update(f"{name} {size} {sorted(self.truth.get(name, {}).items())}\n".encode())
        return digest.hexdigest()


def load_each(items: Iterable[T], load: Callable[[T], U], what: str) -> Iterator[U]:
    """Yield what `load` makes of each item, an image, that can be read; log the others.

    Raises:
        ValueError: none can; names `what` they are for.
    """
    read = left_out = 0
    for item in items:
        try:
            loaded = load(item)
        except (ValueError, OSError) as error:  # after hours of steps, which it must not cost
            log.warning("left out: %s", one_line(error))
            left_out += 1
        else:
            read += 1
            yield loaded
    if not read:
        raise ValueError(f"{what}: none of {left_out} images can be read")


def read_each(paths: Iterable[Path], what: str, competition: Competition) -> Iterator[Image]:
    """Yield the images that can be read, as `load_each`."""
    return load_each(paths, lambda path: read_image(path, competition), what)


def read_strips(data: Path, competition: Competition) -> Strips:
    """Read what train.csv says of every image of `data`/train_images; log masks that look odd.

    Raises:
        ValueError: train.csv is missing, cannot be read, or names an image that is not there; or an
            image is of another colour or depth than the competition's.
    """
    path = data / "train.csv"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --data is a folder with train.csv, train_images/")
    truth = read_truth(path, competition)
    folder, names = open_images(data / "train_images", competition)
    check_names(truth, names, path, folder)
    missing = sorted(set(truth) - set(names))
    if missing:
        others = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"{data}: train.csv names {missing[0]}{others}, which train_images lacks")
    warn_of_unlikely_masks(truth, names, path, folder, competition)
    return Strips(folder, names, truth, competition)


def check_classes(sources: Sequence[Strips]) -> None:
    """Raise ValueError where no strip to train on has a class, or none is there at all."""
    if not any(strips.names for strips in sources):
        raise ValueError(f"{sources[0].folder}: this fold leaves no strip to train on")
    for label in range(1, sources[0].classes + 1):
        if not any(strips.with_class(label) for strips in sources):
            folder, name = sources[0].folder, sources[0].competition.name_of(label)
            raise ValueError(
                f"{folder}: no strip to train on has class {name}: take another --fold or none, "
                "add strips with --extra, or see --competition"
            )
