"""Tasks: the images to predict, and the rows that are to be written."""

from pathlib import Path

import pytest
from helpers import LABELS, LAYOUTS, fail_once, write_sample

from kernel import task
from kernel.competition import SEVERSTAL, Competition
from kernel.image_folders import list_images
from kernel.kaggle import SCORED_RUN
from kernel.mounts import SAMPLE
from kernel.options import Options
from kernel.task import Task, find_task, read_sample

# --- the sample's rows ----------------------------------------------------------------------------


def test_class_0_stands_for_every_class_of_its_image(tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "sample.csv", ["b.jpg", "a.jpg"])
    layout, pairs = read_sample(sample, SEVERSTAL)
    assert layout == LAYOUTS["three-column"]
    assert pairs == [(name, label) for name in ("b.jpg", "a.jpg") for label in LABELS]


def test_rows_named_twice_are_written_once_where_they_came_first(tmp_path: Path) -> None:
    sample = tmp_path / "sample.csv"
    lines = ["ImageId,EncodedPixels,ClassId", "a.jpg,,2", "b.jpg,,1", "a.jpg,,0", "a.jpg,,2", ""]
    sample.write_text("\n".join(lines), encoding="utf-8")
    pairs = read_sample(sample, Competition(classes=("1", "2", "3"), any_class="0"))[1]
    assert pairs == [("a.jpg", 2), ("b.jpg", 1), ("a.jpg", 1), ("a.jpg", 3)]


def test_a_class_that_the_competition_lacks_is_refused_with_its_line(tmp_path: Path) -> None:
    sample = tmp_path / "sample.csv"
    sample.write_text("ImageId_ClassId,EncodedPixels\na.jpg_4,\na.jpg_5,\n", encoding="utf-8")
    with pytest.raises(
        ValueError,
        match=r"sample\.csv: line 3: names no class: a\.jpg_5,; expected one of 1, 2, 3, 4",
    ):
        read_sample(sample, SEVERSTAL)


def test_a_layout_that_is_asked_for_wins_over_the_samples(tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "sample.csv", ["a.jpg"], "two-column")
    assert read_sample(sample, SEVERSTAL, "three-column")[0] == LAYOUTS["three-column"]


def test_rows_that_do_not_fit_go_into_any_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = tmp_path / "sample.csv"
    sample.write_text("ImageId,EncodedPixels,ClassId\na.jpg,1 2,4\n,1 2,\n", encoding="utf-8")
    monkeypatch.setenv(SCORED_RUN, "1")
    layout, pairs = read_sample(sample, SEVERSTAL, "two-column")
    assert [layout.line(*pair, "") for pair in pairs] == ["a.jpg_4,\n", ",,\n"]
    assert Task(tmp_path, layout, pairs).names == ["a.jpg"]


def test_a_sample_that_cannot_be_read_for_a_moment_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = write_sample(tmp_path / "sample.csv", ["a.jpg"], "two-column")
    fail_once(monkeypatch, task, "read_rows", sample)
    assert read_sample(sample, SEVERSTAL)[1] == [("a.jpg", label) for label in LABELS]


# --- the task -------------------------------------------------------------------------------------


def test_without_a_sample_every_image_of_the_folder_is_a_task_in_name_order(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.png", "C.JPG", "notes.txt", "train.csv"):
        (tmp_path / name).touch()
    task = find_task(Options(images=tmp_path), Competition(classes=("1", "2")))
    assert task.layout.columns == LAYOUTS["three-column"].columns  # today's sample's
    assert task.pairs == [(n, label) for n in ("C.JPG", "a.png", "b.jpg") for label in (1, 2)]
    assert task.names == ["C.JPG", "a.png", "b.jpg"]


@pytest.mark.parametrize("worker", [True, False])
def test_only_the_first_process_looks_at_every_image_to_say_which_are_in_no_row(
    worker: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of Kaggle's is on a network."""
    listed = list[Path]()

    def spied(folder: Path, suffix: str = "") -> list[str]:
        listed.append(folder)
        return list_images(folder, suffix)

    (tmp_path / "a.jpg").touch()
    sample = write_sample(tmp_path / SAMPLE, ["a.jpg"])
    monkeypatch.setattr("kernel.task.list_images", spied)
    find_task(Options(images=tmp_path, sample=sample, worker=worker), SEVERSTAL)
    assert listed == ([] if worker else [tmp_path])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_without_rows_is_an_empty_task_and_that_is_said(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sample = write_sample(tmp_path / SAMPLE, [], layout)
    for options in (Options(images=tmp_path, sample=sample), Options(input=tmp_path)):
        task = find_task(options, SEVERSTAL)
        assert (task.pairs, task.layout) == ([], LAYOUTS[layout])
    assert f"{sample}: names no image: the submission is its header" in caplog.text


def test_a_folder_without_images_says_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path.name}: no images in it; name the folder"):
        find_task(Options(images=tmp_path), SEVERSTAL)
    scans = tmp_path / "case1" / "scans"
    scans.mkdir(parents=True)
    (scans / "slice_2.png").touch()
    with pytest.raises(
        ValueError, match=r"case1/scans/slice_2\.png is in a folder below: name tha"
    ):
        find_task(Options(images=tmp_path), SEVERSTAL)
    with pytest.raises(
        ValueError, match=r"scans: no image in it ends in '\.tif'; correct `suffix`"
    ):
        find_task(Options(images=scans), Competition(suffix=".tif"))


@pytest.mark.parametrize("name", ["a.dcm", "case1/scans/b.DCM"])
def test_a_folder_of_images_that_are_not_read_names_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"no images in it that are read; save .*{name} and the"):
        find_task(Options(images=tmp_path), SEVERSTAL)


def test_a_folder_of_images_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gone: no such folder of images"):
        find_task(Options(images=tmp_path / "gone"), SEVERSTAL)


def test_shards_hold_every_image_once() -> None:
    pairs = [(f"{number}.jpg", label) for number in range(7) for label in (1, 2)]
    task = Task(Path(), LAYOUTS["two-column"], pairs)
    shards = [task.shard(index, 3) for index in range(3)]
    assert [len(shard.names) for shard in shards] == [3, 2, 2]
    assert sorted(pair for shard in shards for pair in shard.pairs) == sorted(pairs)
