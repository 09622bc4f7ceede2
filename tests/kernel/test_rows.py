"""Rows of a csv: read as pandas reads them, refused where it lets them pass, and written."""

import gzip
import os
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from helpers import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.competition import SEVERSTAL
from kernel.kaggle import SCORED_RUN
from kernel.rows import layouts_of, masks_by_image, read_rows

# --- how a csv is read ----------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
NAMES |= st.sampled_from(
    ["a,b.jpg", 'a"b.jpg', "a\nb.jpg", "NA", "nan", "1e5", "a_1.jpg", " x.jpg "]
)
RLES = st.sampled_from(["", "1 3", "5 2 9 4", "nan", "1 409600"])
ROWS = st.lists(st.tuples(NAMES, st.integers(0, 4), RLES), max_size=8)


@settings(max_examples=int(os.environ.get("FUZZ", "300")))
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
    found_layout, found = read_rows(path, SEVERSTAL)
    assert len(found_layout.columns) == (2 if layout == "two-column" else 3)
    assert found == rows
    assert [rle for *_, rle in found] == list(read["EncodedPixels"])


@pytest.mark.parametrize(
    ("header", "line", "expected"),
    [
        ("ImageId_ClassId,EncodedPixels", "b.jpg_2,1 3", ("b.jpg", 2, "1 3")),
        ("EncodedPixels,ImageId_ClassId", "1 3,b.jpg_2", ("b.jpg", 2, "1 3")),
        ("ImageId,EncodedPixels,ClassId", "b.jpg,1 3,0", ("b.jpg", 0, "1 3")),
        ("ImageId,ClassId,EncodedPixels", "b.jpg,2,1 3", ("b.jpg", 2, "1 3")),
        ("ImageId,ClassId,EncodedPixels", " b.jpg, 2 ,1 3", (" b.jpg", 2, "1 3")),
        ("ImageId_ClassId,EncodedPixels", "a_b_1.jpg_4,", ("a_b_1.jpg", 4, "")),
        ("ImageId,EncodedPixels,ClassId", '"NA",,"3"', ("NA", 3, "")),
    ],
)
def test_a_csv_gives_its_rows_and_keeps_its_columns(
    header: str, line: str, expected: tuple[str, int, str], tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"\n{header}\n{line}\n", encoding="utf-8")
    layout, rows = read_rows(path, SEVERSTAL)
    assert ",".join(layout.columns) == header
    assert rows == [expected]


def test_a_class_is_written_as_its_row_has_it(tmp_path: Path) -> None:
    path = tmp_path / "sample.csv"
    path.write_text("ImageId,EncodedPixels,ClassId\na.jpg,, 2\nb.jpg,,2\nc.jpg,, 0\n")
    layout, _ = read_rows(path, SEVERSTAL)
    lines = [layout.line(name, 2, "1 3") for name in ("a.jpg", "b.jpg", "c.jpg")]
    assert lines == ["a.jpg,1 3, 2\n", "b.jpg,1 3,2\n", "c.jpg,1 3,2\n"]


@pytest.mark.parametrize("empty", ["-1", " -1", "1 0"])
def test_an_empty_mask_is_known_with_blanks_around_it(empty: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"{HEAD}a.jpg,1,{empty}\nb.jpg,1, {empty.strip()} \n")
    _, rows = read_rows(tmp_path / "rows.csv", replace(SEVERSTAL, empty=empty))
    assert rows == [("a.jpg", 1, ""), ("b.jpg", 1, "")]


HEAD = "ImageId,ClassId,EncodedPixels\n"
PAIRS = "ImageId_ClassId,EncodedPixels\n"
EXPECTED = "expected ImageId_ClassId,EncodedPixels or ImageId,EncodedPixels,ClassId"
REFUSED = {  # text → what is said
    "a cell more than the header": (f"{HEAD}a.jpg,1,1 3\nb.jpg,1,1 3,7\n", "line 3: 4 cells"),
    "a cell less": (f"{HEAD}a.jpg,1\n", "line 2: 2 cells, the header has 3: a.jpg"),
    "a comma at the end": (f"{PAIRS}a.jpg_1,1 3,\n", "line 2: 3 cells, the header has 2"),
    "another header": ("Id,EncodedPixels\na,\n", f"line 1: header Id,EncodedPixels, {EXPECTED}"),
    "no column of classes": ("ImageId,EncodedPixels\na,\n", "line 1: header ImageId,Enc"),
    "a column twice": ("ImageId,ClassId,ClassId\na,1,1\n", "line 1: header"),
    "no name": (f"{HEAD},1,1 3\n", "line 2: names no image"),
    "no class": (f"{HEAD}a.jpg,,1 3\n", "line 2: names no class"),
    "no class in the pair": (f"{PAIRS}a.jpg_1,\nb.jpg,\n", "line 3: names no class: b.jpg"),
    "a class that is a word": (f"{PAIRS}a.jpg_x,\n", "line 2: names no class: a.jpg_x"),
    "a class below 0": (f"{HEAD}a.jpg,-1,1 3\n", "line 2: names no class"),
    "a class with a point": (f"{HEAD}a.jpg,1.0,1 3\n", "line 2: names no class"),
    "a quote that never ends": (f'{HEAD}"a.jpg,1,1 3\n', "unexpected end of data"),
    "nothing": ("", f"line 1: the file is empty, {EXPECTED}"),
    "line ends alone": ("\n\n", "line 2: the file is empty"),
    "semicolons": (
        HEAD.replace(",", ";"),
        "ClassId: save the file with commas in the place of ';'",
    ),
    "tabs": (HEAD.replace(",", "\t"), r"commas in the place of '\t'"),
    "a cell that a spreadsheet cut": (
        f"{HEAD}a.jpg,1,{'1 3 ' * 9000}\n"[: len(HEAD) + 8 + 32_767] + "\n",
        "line 2: a mask of 32767 characters, where spreadsheets cut a cell off",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_csv_is_refused_with_its_line_for(case: str, tmp_path: Path) -> None:
    text, message = REFUSED[case]
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"rows\.csv: .*{re.escape(message)}"):
        read_rows(tmp_path / "rows.csv", SEVERSTAL)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HEAD.encode("utf-16"), "line 1: no csv: text in UTF-16, save it as csv in UTF-8"),
        (b"PK\x03\x04\x14\0\0\0", "line 1: no csv: a zip or a workbook, unpack it"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "line 1: no csv: bytes that are no text, expected Im"),
        (gzip.compress(HEAD.encode()), r"line \d: no csv: compressed by gzip, name it \.csv\.gz"),
    ],
    ids=["UTF-16", "a workbook", "a JPEG", "gzip"],  # its bytes hold the time
)
def test_a_file_of_another_format_is_named_for_what_it_is(
    data: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_bytes(data)
    with pytest.raises(ValueError, match=rf"rows\.csv: {message}"):
        read_rows(tmp_path / "rows.csv", SEVERSTAL)


def test_a_gz_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "rows.csv.gz").write_text(HEAD)
    with pytest.raises(ValueError, match=r"rows\.csv\.gz: "):
        read_rows(tmp_path / "rows.csv.gz", SEVERSTAL)
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(f"{HEAD}a.jpg,1,1 3\n".encode())[:-9])
    with pytest.raises(ValueError, match=r"rows\.csv\.gz: "):
        read_rows(tmp_path / "rows.csv.gz", SEVERSTAL)


def test_bytes_that_are_no_utf_8_are_kept(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(HEAD.encode() + b"\xe4.jpg,1,1 3\n")
    [(name, label, rle)] = read_rows(tmp_path / "rows.csv", SEVERSTAL).rows
    assert (name.encode(errors="surrogateescape"), label, rle) == (b"\xe4.jpg", 1, "1 3")


def test_what_a_caller_objects_to_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"{HEAD}a.jpg,1,1 3\n\nb.jpg,4,1 3\n")
    with pytest.raises(ValueError, match=r"rows\.csv: line 4: class 4"):
        read_rows(
            tmp_path / "rows.csv", SEVERSTAL, lambda row: f"class {row[1]}" if row[1] > 3 else None
        )


@pytest.mark.parametrize("length", [32_766, 32_767, 32_768])
def test_only_a_mask_of_a_spreadsheets_cell_is_taken_for_cut(length: int, tmp_path: Path) -> None:
    path, rle = tmp_path / "rows.csv", "1" * length
    path.write_text(f"{HEAD}a.jpg,1,{rle}\n")
    if length != 32_767:
        assert read_rows(path, SEVERSTAL).rows == [("a.jpg", 1, rle)]
        return
    with pytest.raises(ValueError) as error:
        read_rows(path, SEVERSTAL)
    assert str(error.value) == (
        f"{path}: line 2: a mask of 32767 characters, where spreadsheets cut a cell off: "
        f"take the file that no spreadsheet has saved: a.jpg,1,{'1' * 52}…"
    )


@pytest.mark.parametrize("more", [0, 1])
def test_a_line_of_more_than_60_characters_is_named_by_its_start(more: int, tmp_path: Path) -> None:
    path, line = tmp_path / "rows.csv", f"{'a' * (58 + more)},1"
    path.write_text(f"{HEAD}{line}\n")
    with pytest.raises(ValueError) as error:
        read_rows(path, SEVERSTAL)
    shown = f"{line[:60]}…" if more else line
    assert str(error.value) == f"{path}: line 2: 2 cells, the header has 3: {shown}"


@pytest.mark.parametrize("index", ["", "Unnamed: 0", " "])
def test_an_index_is_a_first_column_of_no_name(index: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{index}, ImageId,EncodedPixels ,ClassId\n7,a.jpg,1 3,2\n")
    layout, rows = read_rows(path, SEVERSTAL)
    assert rows == [("a.jpg", 2, "1 3")]
    assert layout.columns == ("ImageId", "EncodedPixels", "ClassId")
    path.write_text(f"ImageId,EncodedPixels,ClassId,{index}\na.jpg,1 3,2,7\n")
    with pytest.raises(ValueError, match=f"line 1: header ImageId,EncodedPixels,ClassId,{index}, "):
        read_rows(path, SEVERSTAL)


@pytest.mark.parametrize("index", ["", "0,"])
def test_in_the_scored_run_a_row_that_does_not_fit_is_one_without_image(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, header = tmp_path / "rows.csv", index and ","
    path.write_text(
        f"{header}ImageId,EncodedPixels,ClassId\n{index}a.jpg,1 2,3\n{index}b.jpg,1 2,0.0\n"
        f"{index}c.jpg,1 2,3,4\n"
    )
    with pytest.raises(ValueError, match="line 3: names no class"):
        read_rows(path, SEVERSTAL)
    monkeypatch.setenv(SCORED_RUN, "1")
    layout, rows = read_rows(path, SEVERSTAL)
    assert rows == [("a.jpg", 3, "1 2"), ("", 1, ""), ("", 2, "")]
    assert [layout.line(*row) for row in rows] == ["a.jpg,1 2,3\n", "b.jpg,,0.0\n", "c.jpg,,3,4\n"]


def test_a_header_of_bars_is_told_how_to_be_saved(tmp_path: Path) -> None:
    path, header = tmp_path / "rows.csv", "ImageId|ClassId|EncodedPixels"
    path.write_text(header)
    with pytest.raises(ValueError) as error:
        read_rows(path, SEVERSTAL)
    remedy = "save the file with commas in the place of '|'"
    assert str(error.value) == f"{path}: line 1: header {header}, {EXPECTED}: {remedy}"


@given(data=st.data())
def test_a_damaged_archive_is_an_error_that_names_it(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Or it is read: not every bit of an archive counts."""
    whole = gzip.compress(b"ImageId_ClassId,EncodedPixels\n" + b"a.jpg_1,3 4\n" * 99, mtime=0)
    place, value = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.csv.gz"
    path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
    try:
        read_rows(path, SEVERSTAL)
    except ValueError as error:
        assert str(error).startswith(f"{path}: line ")


# --- what rows hold, and how one is written -------------------------------------------------------


def test_an_image_has_the_masks_of_its_rows_and_none_of_an_empty_one() -> None:
    rows = [("a.jpg", 2, "1 1"), ("b.jpg", 1, ""), ("a.jpg", 1, "3 2"), ("a.jpg", 3, "")]
    assert masks_by_image(rows) == {"a.jpg": {2: "1 1", 1: "3 2"}}


def test_layouts_are_named_by_the_number_of_their_columns() -> None:
    named = tuple(dict.fromkeys(map(str, range(count)), "{mask}") for count in (2, 6, 7, 2, 2))
    expected = ["two-column", "six-column", "7-column", "two-column-4", "two-column-5"]
    assert list(layouts_of(replace(SEVERSTAL, layouts=named))) == expected


def test_a_suffix_and_an_empty_token_are_the_competitions() -> None:
    own = replace(SEVERSTAL, suffix=".tif", empty="-1")
    assert LAYOUTS["three-column"].line("a.tif", 3, "1 2") == "a.tif,1 2,3\n"
    assert layouts_of(own)["three-column"].line("a.tif", 3, "") == "a,-1,3\n"
    assert layouts_of(replace(own, empty=None))["two-column"].line("a.tif", 1, "") == "a_1,\n"
