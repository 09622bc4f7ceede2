"""The output: whole parts, each image once, and nothing of another bundle."""

import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from helpers import LABELS, LAYOUTS, all_bytes

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[cluster]'")

from cluster.output import ROWS, Output, Totals, write_whole
from kernel.rows import layouts_of
from kernel.shipped import find_competition

RECORD = {"manifest": "abc", "images": "file:///strips"}


def rows_of(*names: str, fault: str = "", rle: str = "1 2") -> pa.Table:
    """Rows of images, with a mask of class 1."""
    rows = [
        {
            "image": name,
            "class": label,
            "rle": rle if label == 1 and not fault else "",
            "pixels": 2 if label == 1 and not fault else 0,
            "fault": fault,
            "seconds": 0.1,
            "share": None if fault else 0.5,
        }
        for name in names
        for label in LABELS
    ]
    return pa.Table.from_pylist(rows, schema=ROWS)


def write(output: Output, *parts: pa.Table) -> Totals:
    """What workers do, one after another."""
    totals = Totals()
    for rows in parts:
        totals.add(output.write_part(rows["image"].unique().to_pylist(), rows))
    return totals


def begin(folder: Path, **changes: str) -> Output:
    output = Output(str(folder))
    output.check(RECORD | changes)
    output.begin(RECORD | changes)
    return output


def test_parts_hold_the_rows_and_add_up(tmp_path: Path) -> None:
    output = begin(tmp_path / "deep" / "out")
    bad = rows_of("c.jpg", fault="no image")
    totals = write(output, rows_of("a.jpg", "b.jpg"), bad)
    assert totals == Totals(images=3, faults=1, masks=2, share=1.0)
    assert output.done() == {"a.jpg", "b.jpg", "c.jpg"}
    parts = sorted((tmp_path / "deep" / "out").glob("part-*.parquet"))
    assert len(parts) == 2
    assert sum(pq.read_table(path).num_rows for path in parts) == 12


def test_a_part_that_is_written_twice_is_there_once(tmp_path: Path) -> None:
    output = begin(tmp_path / "out")
    write(output, rows_of("a.jpg", "b.jpg"))
    before = all_bytes(tmp_path)
    write(output, rows_of("a.jpg", "b.jpg"))
    assert all_bytes(tmp_path) == before


def test_a_write_that_is_killed_leaves_no_part_and_the_next_run_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = begin(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(output.fs, "mv", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(output, rows_of("a.jpg"))
    assert output.done() == set()
    assert len(list((tmp_path / "out").glob("*.tmp"))) == 1
    begin(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["output.json"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    output, path = begin(tmp_path / "out"), tmp_path / "out" / "a"
    path.write_bytes(b"old")
    write_whole(output.fs, str(path), b"new and longer")
    assert path.read_bytes() == b"new and longer"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"manifest": "def"}, "its rows are of the bundle with sha256 abc, not def; give that"),
        ({"images": "file:///other"}, "its rows are of images file:///strips, not file:///other"),
    ],
)
def test_rows_of_another_bundle_or_of_other_images_are_refused(
    changes: dict[str, str], words: str, tmp_path: Path
) -> None:
    write(begin(tmp_path / "out"), rows_of("a.jpg"))
    before = all_bytes(tmp_path)
    with pytest.raises(ValueError, match=words):
        begin(tmp_path / "out", **changes)
    assert all_bytes(tmp_path) == before


def test_a_folder_with_other_things_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other things \(thesis.txt\); name another"):
        begin(tmp_path)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        begin(tmp_path / "thesis.txt")


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (
            "two-column",
            "ImageId_ClassId,EncodedPixels\n"
            "b.jpg_1,5 1\nb.jpg_2,\na.jpg_1,1 2\na.jpg_2,\nlost.jpg_1,\nlost.jpg_2,\n",
        ),
        (
            "three-column",
            "ImageId,EncodedPixels,ClassId\n"
            "b.jpg,5 1,1\nb.jpg,,2\na.jpg,1 2,1\na.jpg,,2\nlost.jpg,,1\nlost.jpg,,2\n",
        ),
    ],
    ids=["two-column", "three-column"],
)
def test_the_submission_has_the_samples_rows_in_its_order(
    layout: str, expected: str, tmp_path: Path
) -> None:
    output = begin(tmp_path / "out")
    write(output, rows_of("2024/b.jpg", rle="5 1"), rows_of("a.jpg", "unasked.jpg"))
    pairs = [(name, label) for name in ("b.jpg", "a.jpg", "lost.jpg") for label in (1, 2)]
    images = ["2024/b.jpg", "a.jpg", "unasked.jpg"]
    address = output.write_submission(LAYOUTS[layout], pairs, images, empty_rows=True)
    assert Path(address.removeprefix("file://")).read_text() == expected


def test_rows_of_an_image_that_is_not_asked_for_now_are_no_rows_of_its_namesake(
    tmp_path: Path,
) -> None:
    """An earlier list's, or of an image that lay in another folder then."""
    output, pairs = begin(tmp_path / "out"), [("x.jpg", label) for label in LABELS]
    write(output, rows_of("march/x.jpg", rle="9 9"))
    write(output, rows_of("april/x.jpg", fault="no image"))
    output.write_submission(LAYOUTS["two-column"], pairs, ["april/x.jpg"], empty_rows=True)
    assert "9 9" not in (tmp_path / "out" / "submission.csv").read_text()


@pytest.mark.parametrize("folder", ["{tmp_path}/masks[v2]*?", "memory://masks[v2]*?"])
def test_an_address_with_signs_of_a_pattern_is_taken_as_it_stands(
    folder: str, tmp_path: Path
) -> None:
    output = Output(folder.format(tmp_path=tmp_path))
    output.fs.makedirs(output.path, exist_ok=True)
    output.fs.touch(f"{output.path}/output.json.{uuid.uuid4().hex}.tmp")  # a killed run's
    output.begin(RECORD)
    write(output, rows_of("a.jpg"))
    assert output.done() == {"a.jpg"}
    assert len(output.fs.ls(output.path, detail=False)) == 2  # the record and one part


class StoreError(Exception):
    """Like gcsfs's own, which is no OSError."""


@pytest.mark.parametrize(
    ("fails", "call", "what"),
    [
        ("ls", lambda output: output.done(), "read"),
        ("open", lambda output: output.done(), "read"),
        ("open", lambda output: output.totals(), "read"),
        ("open", lambda output: output.faults(9), "read"),
        ("open", lambda output: output.masks(9), "read"),
        ("cat_file", lambda output: output.check(RECORD), "read"),
        ("rm_file", lambda output: output.begin(RECORD), "written"),
        ("cp_file", lambda output: write(output, rows_of("b.jpg")), "written"),
    ],
)
def test_whatever_a_store_raises_is_one_line_with_the_address(
    fails: str, call: Callable[[Output], object], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StoreError("503\nbackend")

    output = Output(f"memory://{uuid.uuid4().hex}")
    output.begin(RECORD)
    write(output, rows_of("a.jpg"))
    output.fs.touch(f"{output.path}/output.json.{uuid.uuid4().hex}.tmp")  # a killed run's
    monkeypatch.setattr(MemoryFileSystem, fails, fail)
    with pytest.raises(ValueError, match=f"^{output.address}: cannot be {what}: 503 backend$"):
        call(output)


class Keys(MemoryFileSystem):  # type: ignore[misc] # fsspec has no types
    """An object store whose user may list, read and put keys below mill/masks, nothing else."""

    protocol = "az"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("az://").rstrip("/")

    def refuse(self, *_: object, **__: object) -> None:
        """Have no right to it."""
        raise PermissionError("403")

    makedirs = mkdir = mv = cp_file = rm_file = refuse

    def exists(self, path: str, **_: object) -> bool:
        """Whether it is there."""
        if not path.startswith("mill/masks"):
            self.refuse()
        return bool(super().exists(path))


def test_an_object_store_needs_no_right_but_to_the_keys_of_the_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(_registry, "az", Keys)
    output = Output("az://mill/masks")
    for name in ("a.jpg", "b.jpg"):  # a run, and the one that goes on
        output.check(RECORD)
        output.begin(RECORD)
        write(output, rows_of(name))
    assert output.done() == {"a.jpg", "b.jpg"}
    assert len(output.fs.ls("mill/masks", detail=False)) == 3


def test_the_record_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every store replaces a file."""
    output = begin(tmp_path / "out")
    monkeypatch.setattr(output.fs, "mv", lambda *_: pytest.fail("a second time"))
    begin(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "[1]", "rows"])
def test_another_programs_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "output.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"its output\.json was not written by such a run; name an"
    ):
        begin(tmp_path)


def test_a_run_that_was_killed_in_its_first_write_can_begin_again(tmp_path: Path) -> None:
    (tmp_path / f"output.json.{uuid.uuid4().hex}.tmp").touch()
    begin(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["output.json"]


def test_somebody_elses_tmp_files_are_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.tmp").touch()
    with pytest.raises(ValueError, match=r"holds other things \(thesis\.tmp\)"):
        begin(tmp_path)
    assert (tmp_path / "thesis.tmp").exists()


def test_the_submission_names_nested_images_as_the_csv_does(tmp_path: Path) -> None:
    competition, output = find_competition("uw-madison"), begin(tmp_path / "out")
    image = "case1/case1_day2/scans/slice_0003_266_266_1.50_1.50.png"
    write(output, rows_of(image, rle="5 2"))
    layout = layouts_of(competition)["three-column-2"]
    output.write_submission(layout, [("case1_day2_slice_0003.png", 1)], [image], empty_rows=True)
    written = (tmp_path / "out" / "submission.csv").read_text()
    assert written == "id,class,predicted\ncase1_day2_slice_0003,large_bowel,5 2\n"
