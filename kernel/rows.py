"""Rows of a csv: sample, ground truth and submission share two layouts."""

import csv
import io
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kernel.logs import log


def csv_line(cells: Iterable[str]) -> str:
    """One line of a csv, its end included."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


@dataclass(frozen=True)
class Layout:
    """How a csv names an (image, class) pair: 2019 in one column, today in two."""

    columns: tuple[str, ...]

    def line(self, image: str, label: int, rle: str) -> str:
        """One row of the csv; `label` is the class, from 1."""
        cells = {"ImageId_ClassId": f"{image}_{label}", "ImageId": image, "ClassId": str(label)}
        return csv_line(cells.get(column, rle) for column in self.columns)


LAYOUTS = {
    "2019": Layout(("ImageId_ClassId", "EncodedPixels")),
    "today": Layout(("ImageId", "EncodedPixels", "ClassId")),
}


def read_rows(path: Path) -> tuple[Layout, list[tuple[str, int, str]]]:
    """A csv's layout and its rows (image, class, RLE) in its order, in either layout.

    Today's sample names each image once, with class 0.

    Raises:
        ValueError: it is no csv, the header is neither layout's, or a class is no number.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' own errors are ValueErrors that name no file
        raise ValueError(f"{path}: no csv that can be read: {error}") from error
    layout = Layout(tuple(table.columns))
    if set(table.columns) == set(LAYOUTS["2019"].columns):
        images = table["ImageId_ClassId"].str.replace(r"_[^_]*$", "", regex=True)
        labels = table["ImageId_ClassId"].str.replace(r"^.*_", "", regex=True)
    elif set(table.columns) == set(LAYOUTS["today"].columns):
        images, labels = table["ImageId"], table["ClassId"]
    else:
        known = " or ".join(",".join(layout.columns) for layout in LAYOUTS.values())
        raise ValueError(f"{path}: header {','.join(table.columns)}, expected {known}")
    wrong = np.flatnonzero(~labels.str.fullmatch(r"[0-9]{1,9}"))
    if wrong.size:
        cells = ",".join(table.iloc[wrong[0]])
        raise ValueError(f"{path}: line {wrong[0] + 2} names no class: {cells}")
    return layout, list(zip(images, labels.astype(int), table["EncodedPixels"], strict=True))


class Submission:
    """submission.csv: whole from the first second on, the rows of strips to come empty.

    Each save writes all rows beside the file and puts them in its place: a reader, or a kill at any
    moment, finds the old file or the new one, never a part of it.
    """

    SHARE = 0.01  # of the time may go into saving

    def __init__(self, path: Path, layout: Layout, pairs: Iterable[tuple[str, int]]) -> None:
        self.path, self.layout = path, layout
        self.lines = {pair: layout.line(*pair, "") for pair in pairs}
        self.rles: dict[tuple[str, int], str] = {}  # (image, class) with a mask
        self.next_s = 0.0  # time.monotonic() of the next save that keeps within its share
        self.saving = threading.Lock()  # the watchdog saves too

    def put(self, image: str, rles: dict[int, str]) -> None:
        """The masks of one strip, class → RLE; those that no row asks for are left out."""
        for label, rle in rles.items():
            pair = image, label
            if rle and pair in self.lines:
                self.rles[pair] = rle
                self.lines[pair] = self.layout.line(*pair, rle)

    def save(self, empty_rows: bool = True) -> int:
        """Writes every row, or only those with a mask; their number.

        Raises:
            OSError: the folder is missing or read-only, or the disk is full.
        """
        start = time.monotonic()
        rows = self.lines if empty_rows else self.rles.keys() & self.lines
        text = csv_line(self.layout.columns)
        text += "".join([line for pair, line in self.lines.items() if pair in rows])
        part = self.path.with_name(self.path.name + ".part")
        with self.saving:
            part.write_text(text, encoding="utf-8", newline="")
            part.replace(self.path)
        now = time.monotonic()
        self.next_s = now + (now - start) / self.SHARE
        return len(rows)

    def save_soon(self) -> None:
        """Saves, unless too much time went into that lately; a full disk may be empty later."""
        if time.monotonic() < self.next_s:
            return
        try:
            self.save()
        except OSError as error:
            self.next_s = time.monotonic() + 10
            log.warning("cannot write what is done so far, going on: %s", error)


def write_submission(
    path: Path, layout: Layout, pairs: Iterable[tuple[str, int]], rles: dict[tuple[str, int], str]
) -> None:
    """All rows at once, with the masks of `rles`."""
    submission = Submission(path, layout, pairs)
    for (image, label), rle in rles.items():
        submission.put(image, {label: rle})
    submission.save()
