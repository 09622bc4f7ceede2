"""The competition: what is one competition's alone, and stands in `competition.json`."""

import itertools
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel.checks import (
    check_fields,
    check_size,
    expect,
    is_number,
    is_text,
    is_whole,
    read_json,
    with_tuples,
)

COMPETITION = "competition.json"  # beside ensemble.json
SLOT = re.compile(r"\{(image|class|mask)\}")  # what a cell's template is filled in with
BRACES = re.compile(r"\{(?!(?:image|class|mask)\}).*")  # what looks like one and is none


@dataclass(frozen=True)
class Competition:
    """A competition's description; its defaults are Severstal's, but for what was counted there.

    A layout is one way in which the csv may be written: column → template of its cells, in which
    {image}, {class} and {mask} are filled in. The last is the sample's.
    """

    slug: str = "severstal-steel-defect-detection"  # kaggle.com/c/SLUG
    title: str = "Severstal: Steel Defect Detection"
    layouts: tuple[dict[str, str], ...] = (  # of 2019 and of today
        {"ImageId_ClassId": "{image}_{class}", "EncodedPixels": "{mask}"},
        {"ImageId": "{image}", "EncodedPixels": "{mask}", "ClassId": "{class}"},
    )
    classes: tuple[str, ...] = ("1", "2", "3", "4")  # as the csv names them, in channel order
    any_class: str | None = None  # stands in a sample's row for every class of its image
    suffix: str = ""  # of image files, that the csv's names lack
    image_path: str | None = None  # how images that lie in folders of their own are named, a regex
    empty: str | None = ""  # in the row of an empty mask; None: such rows are left out
    run_order: str = "columns"  # pixels are counted down the columns, or along the "rows"
    first_index: int = 1  # number of the first pixel
    channels: int = 1  # of the images: grey, or 3: RGB
    bits: int = 8  # of a pixel's channel, 8 or 16
    image_size: tuple[int, int] | None = None  # (H, W) of most images
    mask_size: tuple[int, int] | None = None  # (H, W) of the csv's masks; None: their image's
    n_images: int = 5506  # of the scored run
    time_limit_s: float = 3600.0  # of the scored run
    # What the validator compares with; None is not known.
    n_training_images: int | None = None
    images_with_class: tuple[int, ...] | None = None  # of the training images, class by class
    median_areas: tuple[int, ...] | None = None  # pixels of a training mask, class by class
    empty_score: float | None = None  # of a submission without any mask
    dark_outside: bool = False  # black pixels lie beside what is photographed

    def class_of(self, name: str) -> int:
        """Return the number, from 1, of a class's name; 0 for `any_class`."""
        return 0 if name == self.any_class else self.classes.index(name) + 1

    def name_of(self, label: int) -> str:
        """Return the name of a class, from 1; of 0, `any_class`."""
        return self.classes[label - 1] if label else str(self.any_class)

    def name_of_file(self, path: str) -> str:
        """Return what an image is called whose file lies at a path below the images' folder.

        Where the path matches `image_path`, the regex's groups joined by _, and the suffix; else as
        the file.
        """
        match = self.matches_path(path)
        if not match:
            return posixpath.basename(path)
        return "_".join(filter(None, match.groups())) + self.suffix

    def matches_path(self, path: str) -> re.Match[str] | None:
        """Return the match of `image_path` with the path of a file below the images' folder."""
        return re.fullmatch(f"(?:.*/)?(?:{self.image_path})", path) if self.image_path else None

    def size_of_mask(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the (H, W) of the csv's masks of an image of a size."""
        return self.mask_size or image_size


IMAGE_SIZE = (256, 1600)  # (H, W) of a strip

SEVERSTAL = Competition(
    any_class="0",
    image_size=IMAGE_SIZE,
    n_training_images=12_568,
    images_with_class=(897, 247, 5150, 801),
    median_areas=(3_500, 2_900, 11_800, 24_900),  # by the masks of 3,705 training images
    empty_score=0.856,
    dark_outside=True,
)

# --- rules ----------------------------------------------------------------------------------------


CHOICES: dict[str, tuple[object, ...]] = {
    "run_order": ("columns", "rows"),
    "first_index": (1, 0),
    "channels": (1, 3),
    "bits": (8, 16),
    "dark_outside": (False, True),
}


def check_competition(competition: Competition) -> None:
    """Raise ValueError for the first rule that is broken, naming the field and the value."""
    slug = competition.slug
    fits = is_text(slug) and bool(re.fullmatch("[a-z0-9][a-z0-9_-]*", slug))
    expect(fits, "slug", slug, "letters, digits, - and _, as in the address")
    expect(is_text(competition.title), "title", competition.title, "text")
    _check_classes(competition)
    _check_layouts(competition)
    for name in ("suffix", "empty", "any_class"):
        value = getattr(competition, name)
        optional = value is None and name != "suffix"
        expect(optional or isinstance(value, str), name, value, "text")
    _check_image_path(competition.image_path)
    for name, allowed in CHOICES.items():
        value = getattr(competition, name)
        fits = value in allowed and type(value) is type(allowed[0])
        expect(fits, name, value, " or ".join(map(str, allowed)))
    for name in ("image_size", "mask_size"):
        check_size(getattr(competition, name), name)
    expect(is_whole(competition.n_images, 1), "n_images", competition.n_images, "a whole number")
    seconds = competition.time_limit_s
    expect(is_number(seconds) and seconds > 0, "time_limit_s", seconds, "seconds above 0")
    _check_counts(competition)


def _check_classes(competition: Competition) -> None:
    names = competition.classes
    fits = isinstance(names, tuple) and bool(names) and all(map(is_text, names))
    expect(fits, "classes", names, 'a list of names like ["Fish", "Flower"]')
    fits = len(set(names)) == len(names) and competition.any_class not in names
    expect(fits, "classes", names, "each name once, and any_class not among them")


def _check_layouts(competition: Competition) -> None:
    layouts = competition.layouts
    fits = isinstance(layouts, tuple) and bool(layouts)
    expect(fits, "layouts", layouts, 'a list of objects like {"id": "{image}", "rle": "{mask}"}')
    for layout in layouts:
        cells = list(layout.values()) if isinstance(layout, dict) else []
        expect(bool(cells) and all(map(is_text, cells)), "layout", layout, "column: template")
        unknown = next((word for cell in cells for word in BRACES.findall(cell)), None)
        expect(unknown is None, "layout", unknown, "{image}, {class} or {mask} in a cell")
        slots = Counter(slot for cell in cells for slot in SLOT.findall(cell))
        fits = slots["image"] == slots["mask"] == 1 and "{mask}" in cells
        expect(fits, "layout", layout, "{image} in one cell, and {mask} alone in one")
        lone = len(competition.classes) == 1
        fits = slots["class"] == 1 or (lone and not slots["class"])
        expect(fits, "layout", layout, "{class} in one cell: there are several classes")
        fits = not any("{image}{class}" in cell or "{class}{image}" in cell for cell in cells)
        expect(fits, "layout", layout, "a separator between {image} and {class}")
        for cell in cells:
            _check_joined(cell, [*competition.classes, *filter(None, [competition.any_class])])


def _check_joined(cell: str, names: Sequence[str]) -> None:
    """A class that ends as another, after the separator, would be read as that and a longer image.

    One that begins as another is not: the longer is tried first.
    """
    for sign in re.findall(r"\{image\}([^{]+)\{class\}", cell):
        for name, other in itertools.permutations(names, 2):
            expected = f"no class that is read as {name!r} and a part of the image's name"
            expect(not other.endswith(sign + name), "classes", other, expected)


def _check_image_path(pattern: object) -> None:
    expected = r'a regular expression with groups, like "(case\\d+)/(slice_\\d+)\\.png"'
    try:
        fits = pattern is None or (isinstance(pattern, str) and re.compile(pattern).groups > 0)
    except re.error as error:
        expected, fits = f"{expected}: {error}", False
    expect(fits, "image_path", pattern, expected)


def _check_counts(competition: Competition) -> None:
    images, classes = competition.n_training_images, len(competition.classes)
    expect(images is None or is_whole(images, 1), "n_training_images", images, "a whole number")
    for name in ("images_with_class", "median_areas"):
        counts = getattr(competition, name)
        fits = isinstance(counts, tuple) and len(counts) == classes
        fits = fits and all(is_whole(count, 0) for count in counts)
        expect(fits or counts is None, name, counts, f"{classes} whole numbers, one a class")
    lacks = competition.images_with_class is not None and images is None
    expect(not lacks, "n_training_images", images, "their number: images_with_class is given")
    score = competition.empty_score
    expect(score is None or is_number(score), "empty_score", score, "a number")


# --- reading --------------------------------------------------------------------------------------


def parse_competition(entries: dict[str, Any], path: Path) -> Competition:
    """Return the description in the JSON object of the file `path`.

    Raises:
        ValueError: a field is unknown or of another type, `slug` is missing, or a rule is broken.
    """
    sequences = ("classes", "image_size", "images_with_class", "layouts", "mask_size",
                 "median_areas")  # fmt: skip
    try:
        check_fields(entries, Competition, "the description")
        if "slug" not in entries:  # its default is the competition that the kernel would mount
            raise ValueError("lacks slug, the competition's name in its address")
        competition = Competition(**with_tuples(entries, sequences))
        check_competition(competition)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return competition


def load_competition(folder: Path) -> Competition:
    """Return a bundle's description, Severstal's where it has none; ValueError for a bad one."""
    path = folder / COMPETITION
    return parse_competition(read_json(path), path) if path.is_file() else SEVERSTAL
