"""Rows of a csv: sample, ground truth and submission, in the layouts of a competition."""

import csv
import difflib
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kernel.competition import SLOT, Competition
from kernel.faults import short
from kernel.files import retried
from kernel.kaggle import is_scored_run
from kernel.shipped import find_competition, shipped_names

RowKey = tuple[str, int]  # image, class


def csv_line(cells: Iterable[str]) -> str:
    """Return one line of a csv, its end included."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


@dataclass(frozen=True)
class Layout:
    """One of a competition's layouts, its columns in the order of a header."""

    cells: dict[str, str]  # column → template
    competition: Competition
    header: tuple[str, ...] = field(default=(), compare=False)  # as the file has it
    # Row → column → its cell, where that is not the template's; class 0 stands for all classes.
    own: dict[RowKey, dict[str, str]] = field(default_factory=dict, compare=False)
    # Number, from 1, → line of each row that does not fit, without its mask; such a row has no
    # image, and its number in the place of a class.
    odd: dict[int, str] = field(default_factory=dict, compare=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns; `header` is the file's own line, an index and blanks too."""
        return tuple(self.cells)

    @property
    def may_omit_empty(self) -> bool:
        """Whether rows of empty masks may be left out: where a sample does not name them."""
        named_apart = "{class}" in self.cells.values()
        competition = self.competition
        return competition.empty is None or (competition.any_class is not None and named_apart)

    def line(self, image: str, label: int, rle: str) -> str:
        """Return one row of the csv; `label` is the class, from 1."""
        if not image:
            return self.odd[label]
        competition = self.competition
        values = {
            "image": image.removesuffix(competition.suffix),
            "class": competition.name_of(label),
            "mask": rle or competition.empty or "",
        }
        filled = {
            column: SLOT.sub(lambda slot: values[slot[1]], template)
            for column, template in self.cells.items()
        }
        own = self.own.get((image, label)) or self.own.get((image, 0), {})
        return csv_line((filled | own).values())


NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def layouts_of(competition: Competition) -> dict[str, Layout]:
    """Return a competition's layouts, each named by the number of its columns."""
    named = dict[str, Layout]()
    for cells in competition.layouts:
        count = len(cells)
        name = f"{NUMBERS[count] if count < len(NUMBERS) else count}-column"
        name = f"{name}-{len(named) + 1}" if name in named else name
        named[name] = Layout(cells, competition)
    return named


SPREADSHEET_CELL = 32_767  # characters; Excel cuts off the rest
NO_CSV = {  # first bytes, as they are kept, → what to do
    "\udcff\udcfe": "text in UTF-16, save it as csv in UTF-8",
    "PK\x03\x04": "a zip or a workbook, unpack it or save it as csv",
    "\x1f\udc8b": "compressed by gzip, name it .csv.gz",
}

Row = tuple[str, int, str]  # image, class, RLE
RowCheck = Callable[[Row], str | None]  # what is wrong with a row


def masks_by_image(rows: Iterable[Row]) -> dict[str, dict[int, str]]:
    """Return image → class → RLE of the rows that have a mask."""
    masks: dict[str, dict[int, str]] = {}
    for image, label, rle in rows:
        if rle:
            masks.setdefault(image, {})[label] = rle
    return masks


class Table(NamedTuple):
    """What a csv holds."""

    layout: Layout
    rows: list[Row]  # in the file's order


def read_rows(
    path: Path,
    competition: Competition,
    check: RowCheck = lambda _: None,
    from_kernel: bool = False,
) -> Table:
    """Read a csv in any layout of a competition, .gz or not.

    An image is named as its file is, suffix and all. A row for every class of its image has class
    0. An index column is ignored. Bytes that are not UTF-8 are kept as they are. A mask of
    `SPREADSHEET_CELL` characters is what a spreadsheet has left of a longer one, but in a file
    `from_kernel`, which none has saved. A cell of a template without a slot may be any: the layout
    keeps the row's own. In the scored run a row that does not fit stays, as one without image,
    where another fits.

    Raises:
        ValueError: it is no csv, the header is no layout's, a row has another number of cells or
            no class, or a mask that was cut off, or `check` objects; names the line.
    """
    try:
        return _read_table(path, competition, check, from_kernel)
    except ValueError:
        if not is_scored_run():
            raise
        table = _read_table(path, competition, check, from_kernel, keep_odd=True)
        if not any(image for image, _, _ in table.rows):
            raise
        return table


def _read_table(
    path: Path,
    competition: Competition,
    check: RowCheck,
    from_kernel: bool,
    keep_odd: bool = False,
) -> Table:
    with read_lines(path) as lines:
        layout, parse = _parse_header(next(lines, []), competition, from_kernel)
        n_index, rows = len(layout.header) - len(layout.columns), list[Row]()
        for cells in lines:
            try:
                row = parse(cells)
                if fault := check(row):
                    raise ValueError(fault)
            except ValueError:
                if not keep_odd:
                    raise
                row = "", len(layout.odd) + 1, ""
                layout.odd[row[1]] = line_without_mask(cells[n_index:], layout.columns, competition)
            rows.append(row)
    return Table(layout, rows)


def line_without_mask(cells: Iterable[str], header: Iterable[str], competition: Competition) -> str:
    """Return a line of a csv, empty in the columns that hold the mask in any layout."""
    named = {
        name for each in competition.layouts for name, cell in each.items() if cell == "{mask}"
    }
    columns = itertools.chain(header, itertools.repeat(""))  # of cells beyond it, too
    empty = competition.empty or ""
    pairs = zip(cells, columns, strict=False)
    return csv_line(empty if column.strip() in named else cell for cell, column in pairs)


def fits_header(path: Path, competition: Competition) -> bool:
    """Whether a file is a csv with the header of one of a competition's layouts."""

    @retried
    def parse() -> None:
        with read_lines(path) as lines:
            _parse_header(next(lines, []), competition)

    try:
        parse()
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def read_lines(path: Path) -> Iterator[Iterator[list[str]]]:
    """The cells of a csv's lines, .gz or not, empty ones left out; errors inside name the line.

    Raises:
        ValueError: it is no csv, or what a ValueError inside says.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    csv.field_size_limit(2**31 - 1)  # a mask of noise is long
    with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            yield filter(None, lines)
        except (csv.Error, ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: line {max(lines.line_num, 1)}: {error}") from error


def _parse_header(
    header: list[str], competition: Competition, from_kernel: bool = False
) -> tuple[Layout, Callable[[list[str]], Row]]:
    """The layout of a header, and what makes a row of a line's cells."""
    columns = [cell.strip() for cell in header]
    has_index = columns[:1] in ([""], ["Unnamed: 0"])  # as pandas writes one
    named = columns[1:] if has_index else columns
    known = [each for each in competition.layouts if sorted(each) == sorted(named)]
    if not known:
        raise ValueError(_header_fault(header, competition))
    cells = {column: known[0][column] for column in named}
    layout = Layout(cells, competition, tuple(header))
    empty = (competition.empty or "").strip()
    patterns = {column: _pattern(template, competition) for column, template in known[0].items()}
    class_columns = [column for column, template in known[0].items() if template == "{class}"]

    def parse(cells: list[str]) -> Row:
        if len(cells) != len(header):
            raise ValueError(
                f"{len(cells)} cells, the header has {len(header)}: {_short_line(cells)}"
            )
        row, values = dict(zip(columns, cells, strict=True)), {"class": competition.classes[0]}
        own = dict[str, str]()
        for column, pattern in patterns.items():
            match = pattern.fullmatch(row[column])
            if not match and not pattern.groups:
                own[column] = row[column]
                continue
            if not match:
                raise ValueError(_cell_fault(row[column], known[0][column], cells, competition))
            values |= match.groupdict()
        if not values["image"]:
            raise ValueError(f"names no image: {_short_line(cells)}")
        rle = "" if values["mask"].strip() == empty else values["mask"]
        if len(rle) == SPREADSHEET_CELL and not from_kernel:
            raise ValueError(
                f"a mask of {len(rle)} characters, where spreadsheets cut a cell off: take the "
                f"file that no spreadsheet has saved: {_short_line(cells)}"
            )
        image, label = values["image"] + competition.suffix, competition.class_of(values["class"])
        for column in class_columns if label else ():  # 0 stands for all
            if row[column] != values["class"]:  # blanks around it
                own[column] = row[column]
        if own:
            layout.own[image, label] = own
        return image, label, rle

    return layout, parse


def _pattern(template: str, competition: Competition) -> re.Pattern[str]:
    """What the cells of a template look like, each slot a group."""
    names = [*competition.classes, competition.any_class or competition.classes[0]]
    names.sort(key=len, reverse=True)  # of two that a cell begins with, the longer
    slots = {name: f"(?P<{name}>.*)" for name in ("image", "mask")}
    blanks = r"\s*" if template == "{class}" else ""  # of the image's name they may be a part
    slots["class"] = f"{blanks}(?P<class>{'|'.join(map(re.escape, names))}){blanks}"
    parts = SLOT.split(template)  # literal, slot, literal, …
    text = [slots[part] if i % 2 else re.escape(part) for i, part in enumerate(parts)]
    return re.compile("".join(text), re.DOTALL)


def no_csv_fault(header: list[str]) -> str:
    """Why what was read as a header is of no csv; nothing where it may be one."""
    text = ",".join(header)
    known = [fault for start, fault in NO_CSV.items() if text.startswith(start)]
    if known:
        return f"no csv: {known[0]}"
    return "" if text.replace("\t", "").isprintable() else "no csv: bytes that are no text"


def _header_fault(header: list[str], competition: Competition) -> str:
    """What a header that fits no layout has instead."""
    text = ",".join(header)
    expected = " or ".join(",".join(layout) for layout in competition.layouts)
    if not header:
        return f"the file is empty, expected {expected}"
    if fault := no_csv_fault(header):
        return f"{fault}, expected {expected}"
    separator = next((each for each in ";\t|" if each in text), "")
    remedy = f": save the file with commas in the place of {separator!r}" if separator else ""
    remedy = remedy or f"; {_nearest_description(header, competition)}"
    return f"header {_short_line(header)}, expected {expected}{remedy}"


def _nearest_description(header: list[str], competition: Competition) -> str:
    """Which description that ships has a header, or one like it; else how one is made."""
    others = [(name, find_competition(name)) for name in shipped_names()]
    headers = {
        ",".join(sorted(layout)): name
        for name, other in others
        for layout in other.layouts
        if other.slug != competition.slug
    }
    columns = ",".join(sorted(cell.strip() for cell in header))
    if columns in headers:
        return f"it fits --competition {headers[columns]}"
    close = difflib.get_close_matches(columns[:200], headers, n=1, cutoff=0.7)
    nearest = f"the nearest that ships is {headers[close[0]]}; " if close else ""
    return f"{nearest}build_kernel.py --new-competition proposes a description for it"


def _cell_fault(cell: str, template: str, cells: list[str], competition: Competition) -> str:
    """What a cell that does not fit its template lacks."""
    if "{class}" not in template:
        return f"{short(cell)} does not fit {template!r}: {_short_line(cells)}"
    wanted = ", ".join(competition.classes)
    return f"names no class: {_short_line(cells)}; expected one of {wanted} as in {template!r}"


def _short_line(cells: list[str]) -> str:
    text = ",".join(cells)
    return text if len(text) <= 60 else f"{text[:60]}…"
