"""submission.csv, while a run fills it."""

import threading
import time
from collections.abc import Iterable
from pathlib import Path

from kernel.files import write_text
from kernel.logs import log
from kernel.rows import Layout, RowKey, csv_line


class Submission:
    """submission.csv: complete from the first second on, the rows of strips to come empty.

    That of a worker, which is not `whole`, has the rows of the images that are done. Each save
    writes all rows beside the file and then replaces it: a reader, or a kill at any moment, finds
    the old file or the new one, never a part of one.
    """

    MAX_SAVING_SHARE = 0.01  # of the time

    def __init__(
        self, path: Path, layout: Layout, pairs: Iterable[RowKey], whole: bool = True
    ) -> None:
        self.path, self.layout, self.whole = path, layout, whole
        self.done = set[str]()  # images whose masks are set
        self.lines = {pair: layout.line(*pair, "") for pair in pairs}
        self.masked = set[RowKey]()  # rows with a mask
        self.n_rows = 0  # of the file
        self.next_s = 0.0  # time.monotonic() of the next save within that share
        self.saving = threading.Lock()  # the watchdog saves too

    def set_masks(self, image: str, rles: dict[int, str]) -> None:
        """Set the masks of one strip, class → RLE; a mask that no row asks for is ignored."""
        for label, rle in rles.items():
            pair = image, label
            if rle and pair in self.lines:
                self.masked.add(pair)
                self.lines[pair] = self.layout.line(*pair, rle)
        self.done.add(image)  # last, for the watchdog may save at any moment

    def save(self, empty_rows: bool = True) -> None:
        """Write every row, or only those with a mask.

        Raises:
            OSError: the folder is missing or read-only, or the disk is full.
        """
        start = time.monotonic()
        empty_rows = empty_rows and self.layout.competition.empty is not None
        rows = self.lines if empty_rows else self.masked.copy()
        if not self.whole:
            rows = {pair for pair in self.lines if pair[0] in self.done}
        text = csv_line(self.layout.columns)
        text += "".join([line for pair, line in self.lines.items() if pair in rows])
        with self.saving:
            write_text(self.path, text)
            self.n_rows = len(rows)
        now = time.monotonic()
        self.next_s = now + (now - start) / self.MAX_SAVING_SHARE

    def save_throttled(self) -> None:
        """Save, unless too much time went into that lately; a full disk may have room later."""
        if time.monotonic() < self.next_s:
            return
        try:
            self.save()
        except OSError as error:
            self.next_s = time.monotonic() + 10
            log.warning("cannot save the rows so far, going on: %s", error)
