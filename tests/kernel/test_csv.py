"""The csv reader beside pandas', and what it refuses that pandas lets pass."""

import gzip
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.rle import decode_rle, encode_rle, join_rles
from kernel.rows import read_rows

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
NAMES |= st.sampled_from(
    ["a,b.jpg", 'a"b.jpg', "a\nb.jpg", "NA", "nan", "1e5", "a_1.jpg", " x.jpg "]
)
RLES = st.sampled_from(["", "1 3", "5 2 9 4", "nan", "1 409600"])
ROWS = st.lists(st.tuples(NAMES, st.integers(0, 4), RLES), max_size=8)


@settings(max_examples=300, deadline=None)
@given(
    ROWS,
    st.sampled_from(["two-column", "three-column"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["utf-8", "utf-8-sig"]),
)
def test_what_pandas_writes_is_read_as_pandas_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, int, str]],
    layout: str,
    index: bool,
    gz: bool,
    line_end: str,
    encoding: str,
) -> None:
    path = tmp_path_factory.getbasetemp() / ("rows.csv.gz" if gz else "rows.csv")
    table = pd.DataFrame(rows, columns=["ImageId", "ClassId", "EncodedPixels"])
    if layout == "two-column":
        table["ImageId_ClassId"] = table.ImageId.astype(str) + "_" + table.ClassId.astype(str)
        table = table[["ImageId_ClassId", "EncodedPixels"]]
    table.to_csv(path, index=index, lineterminator=line_end, encoding=encoding)
    read = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    found_layout, found = read_rows(path)
    assert len(found_layout.columns) == (2 if layout == "two-column" else 3)
    assert found == rows
    assert [rle for *_, rle in found] == list(read["EncodedPixels"])


HEAD = "ImageId,ClassId,EncodedPixels\n"
REFUSED = {
    "a cell more than the header": (f"{HEAD}a.jpg,1,1 3\nb.jpg,1,1 3,7\n", "line 3: 4 cells"),
    "a cell less": (f"{HEAD}a.jpg,1\n", "line 2: 2 cells, the header has 3"),
    "a column twice": ("ImageId,ClassId,ClassId\na,1,1\n", "line 1: header"),
    "no name": (f"{HEAD},1,1 3\n", "line 2: names no image"),
    "a class with a point": (f"{HEAD}a.jpg,1.0,1 3\n", "line 2: names no class"),
    "a quote that never ends": (f'{HEAD}"a.jpg,1,1 3\n', "unexpected end of data"),
    "an empty file": ("", "header , expected ImageId_ClassId"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_csv_is_refused_with_its_line_for(case: str, tmp_path: Path) -> None:
    text, message = REFUSED[case]
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"rows\.csv: .*{message}"):
        read_rows(tmp_path / "rows.csv")


def test_a_gz_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "rows.csv.gz").write_text(HEAD)
    with pytest.raises(ValueError, match=r"rows\.csv\.gz: "):
        read_rows(tmp_path / "rows.csv.gz")
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(f"{HEAD}a.jpg,1,1 3\n".encode())[:-9])
    with pytest.raises(ValueError, match=r"rows\.csv\.gz: "):
        read_rows(tmp_path / "rows.csv.gz")


def test_bytes_that_are_no_utf_8_are_kept(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(HEAD.encode() + b"\xe4.jpg,1,1 3\n")
    [(name, label, rle)] = read_rows(tmp_path / "rows.csv")[1]
    assert (name.encode(errors="surrogateescape"), label, rle) == (b"\xe4.jpg", 1, "1 3")


def test_what_a_caller_objects_to_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"{HEAD}a.jpg,1,1 3\n\nb.jpg,4,1 3\n")
    with pytest.raises(ValueError, match=r"rows\.csv: line 4: class 4"):
        read_rows(tmp_path / "rows.csv", lambda row: f"class {row[1]}" if row[1] > 3 else None)


@given(st.lists(st.lists(st.booleans(), min_size=24, max_size=24), min_size=1, max_size=4))
def test_joined_codes_are_those_of_the_union(masks: list[list[bool]]) -> None:
    import numpy as np

    arrays = [np.array(mask).reshape(4, 6) for mask in masks]
    joined = join_rles(map(encode_rle, arrays))
    assert joined == encode_rle(np.logical_or.reduce(arrays))
    np.testing.assert_array_equal(decode_rle(joined, (4, 6)), np.logical_or.reduce(arrays))
