"""The output: parts of rows in Parquet, each whole or not there, and what they are of."""

import hashlib
import json
import platform
import posixpath
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
from fsspec.core import url_to_fs

from cluster.images import absolute, at_address, is_local
from kernel.files import json_text
from kernel.rows import Layout, RowKey
from kernel.submission import Submission

RECORD = "output.json"  # what the parts are of
HALF = re.compile(r".+\.[0-9a-f]{32}\.tmp")  # what `write_whole` writes beside a file's place
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}
ROWS = pa.schema(
    {
        "image": pa.string(),
        "class": pa.int32(),  # from 1
        "rle": pa.large_string(),
        "pixels": pa.int64(),  # of the mask
        "fault": pa.string(),  # why the masks are empty; else ""
        "seconds": pa.float64(),  # since the image before
        "share": pa.float64(),  # of the passes' work that ran
    }
)
FIRST_CLASS = pyarrow.dataset.field("class") == 1  # a row an image
MASK = pyarrow.dataset.field("pixels") > 0

T = TypeVar("T")


def move(fs: Any, path: str, place: str) -> None:
    """Move a file, at once where its file system can; both paths are taken as they stand."""
    if type(fs).mv is not fsspec.AbstractFileSystem.mv:
        fs.mv(path, place)
        return
    fs.cp_file(path, place)  # fsspec's own `mv` takes [v2] in a path for a pattern
    fs.rm_file(path)


def is_object_store(fs: Any) -> bool:
    """Whether a file system has keys alone: no folders, and no file before all of it is there."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}
    return not protocols.isdisjoint(OBJECT_STORES)


def write_whole(fs: Any, path: str, data: bytes) -> None:
    """Write a file so that a reader finds all of it or nothing: beside its place, then there."""
    if is_object_store(fs):
        fs.pipe_file(path, data)
        return
    beside = f"{path}.{uuid.uuid4().hex}.tmp"
    with fs.open(beside, "wb") as file:
        file.write(data)
    move(fs, beside, path)


def fault_rows(names: Iterable[str], classes: int, fault: str) -> pa.Table:
    """Return rows of images that could not be predicted: every class, without a mask."""
    empty = {"rle": "", "pixels": 0, "fault": fault}
    rows = [{"image": name, "class": c, **empty} for name in names for c in range(1, classes + 1)]
    return pa.Table.from_pylist(rows, schema=ROWS)


@dataclass
class Totals:
    """Counts of images and of what was found in them."""

    images: int = 0
    faults: int = 0
    masks: int = 0  # that are not empty
    share: float = 0.0  # the images' sum

    @property
    def mean_share(self) -> float:
        """The mean over the images that could be predicted."""
        return self.share / max(self.images - self.faults, 1)

    def add(self, other: "Totals") -> None:
        """Add those of other images."""
        self.images += other.images
        self.faults += other.faults
        self.masks += other.masks
        self.share += other.share

    @classmethod
    def of(cls, rows: pa.Table) -> "Totals":
        """Those of a part's rows."""
        first = rows.filter(FIRST_CLASS)
        faults = np.asarray(first["fault"]) != ""
        share = np.asarray(first["share"].drop_null()).sum()
        masks = int(np.count_nonzero(np.asarray(rows["pixels"])))
        return cls(first.num_rows, int(faults.sum()), masks, float(share))


class Output:
    """A folder of parts, at any address that fsspec knows."""

    def __init__(self, address: str) -> None:
        self.address = absolute(address).rstrip("/")
        self.fs, self.path = url_to_fs(self.address)

    def check(self, record: dict[str, str]) -> None:
        """Raise ValueError where the folder holds other things than parts of what `record` says."""
        self.fs.invalidate_cache()
        there = [name for name in self._list() if not HALF.fullmatch(name)]
        if RECORD not in there:
            if there:
                raise ValueError(
                    f"{self.address}: holds other things ({there[0]}); name another folder"
                )
            return
        found = self._read_record()
        for key, value in record.items():
            if found.get(key) != value:
                what = "the bundle with sha256" if key == "manifest" else key
                raise ValueError(
                    f"{self.address}: its rows are of {what} {found.get(key)}, not {value}; "
                    "give that one, or name another folder"
                )

    def _read_record(self) -> dict[str, Any]:
        with at_address(self.address):
            text = self.fs.cat_file(posixpath.join(self.path, RECORD))
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f"{self.address}: its {RECORD} was not written by such a run; name another folder"
            )
        return found

    def begin(self, record: dict[str, str]) -> None:
        """Make the folder, or go on in it; what a run that was killed left half written goes."""
        there = self._list()
        with at_address(self.address, "written"):
            for name in there:
                if HALF.fullmatch(name):
                    self.fs.rm_file(posixpath.join(self.path, name))
            if not is_object_store(self.fs):  # which would make a bucket of a typo
                self.fs.makedirs(self.path, exist_ok=True)
        if RECORD not in there:  # not every store replaces a file
            self._write(RECORD, json_text(record, sort_keys=True).encode())

    def check_shared(self) -> None:
        """Raise ValueError where this machine does not see the folder that `begin` made."""
        if is_local(self.fs) and not self.fs.exists(posixpath.join(self.path, RECORD)):
            raise ValueError(
                f"{self.address}: {platform.node()} does not see what the run wrote there: name a "
                "folder that all machines share"
            )

    def _list(self) -> list[str]:
        """What the folder holds, by name."""
        with at_address(self.address):
            if self.fs.isfile(self.path):
                raise ValueError("is a file; name a folder")
            found = self.fs.ls(self.path, detail=False) if self.fs.exists(self.path) else []
        own = self.path.strip("/")
        names = (posixpath.basename(each.rstrip("/")) for each in found if each.strip("/") != own)
        return sorted(names)

    def _write(self, name: str, data: bytes) -> None:
        with at_address(self.address, "written"):
            write_whole(self.fs, posixpath.join(self.path, name), data)

    def _read(self, take: Callable[[Any], T]) -> T:
        """Return what `take` makes of all rows so far, a dataset of pyarrow's."""
        self.fs.invalidate_cache()
        parts = [
            posixpath.join(self.path, name)
            for name in self._list()  # a glob would take [v2] in the address for a set
            if name.startswith("part-") and name.endswith(".parquet")
        ]
        with at_address(self.address):
            return take(
                pyarrow.dataset.dataset(parts, schema=ROWS, filesystem=self.fs, format="parquet")
            )

    def write_part(self, names: Iterable[str], rows: pa.Table) -> Totals:
        """Write the rows of a part's images as one file; those that were left out have none.

        It is named after all of the part's: a second try takes the place of the first.
        """
        asked = hashlib.sha256("\n".join(names).encode())
        name = f"part-{asked.hexdigest()[:24]}.parquet"
        data = pa.BufferOutputStream()
        pyarrow.parquet.write_table(rows, data, compression="zstd")
        self._write(name, data.getvalue().to_pybytes())
        return Totals.of(rows)

    def done(self) -> set[str]:
        """The images that have their rows."""
        found = self._read(lambda rows: rows.to_table(columns=["image"], filter=FIRST_CLASS))
        return set(found["image"].to_pylist())

    def totals(self) -> Totals:
        """Those of all rows, a batch of them at a time."""

        def add_up(rows: Any) -> Totals:
            totals = Totals()
            for batch in rows.to_batches(columns=["class", "pixels", "fault", "share"]):
                totals.add(Totals.of(pa.table(batch)))
            return totals

        return self._read(add_up)

    def faults(self, most: int) -> dict[str, str]:
        """Image → why its rows are empty, of the first that have a fault."""
        rule = FIRST_CLASS & (pyarrow.dataset.field("fault") != "")
        columns = ["image", "fault"]
        found = self._read(lambda rows: rows.head(most, columns=columns, filter=rule))
        return dict(zip(found["image"].to_pylist(), found["fault"].to_pylist(), strict=True))

    def masks(self, most: int) -> list[dict[str, Any]]:
        """The first rows whose mask is not empty: image, class, rle."""
        columns = ["image", "class", "rle"]
        found = self._read(lambda rows: rows.head(most, columns=columns, filter=MASK))
        return list(found.to_pylist())

    def write_submission(
        self,
        layout: Layout,
        pairs: Iterable[RowKey],
        images: Iterable[str],
        empty_rows: bool,
    ) -> str:
        """Write submission.csv beside the parts, as the kernel does; return its address.

        Of rows that are of none of the `images`, an earlier list's, it takes no mask.
        """
        columns = ["image", "class", "rle"]
        found = self._read(lambda rows: rows.to_table(columns=columns, filter=MASK))
        wanted = set(images)
        with tempfile.TemporaryDirectory() as scratch:
            submission = Submission(Path(scratch, "submission.csv"), layout, pairs)
            for row in found.to_pylist():
                if row["image"] not in wanted:
                    continue
                name = layout.competition.name_of_file(row["image"])
                submission.set_masks(name, {row["class"]: row["rle"]})
            submission.save(empty_rows)
            self._write(submission.path.name, submission.path.read_bytes())
        return f"{self.address}/{submission.path.name}"
