"""Images in folders of their own, as uw-madison's: the same answer as with all of them in one."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import draw_described, error_of, exit_code, shrunk, write_described
from hypothesis import given
from hypothesis import strategies as st

from cluster.images import find_images as find_set
from evaluation import dry_run, score, validate
from kernel.competition import SEVERSTAL, Competition
from kernel.image_folders import one_folder
from kernel.inference import main, run
from kernel.mounts import SAMPLE
from kernel.options import Options
from kernel.shipped import find_competition
from kernel.task import find_task
from packing.bundle import build
from training.strips import read_strips

UW_MADISON = shrunk(find_competition("uw-madison"))
PATHS = {  # the csv's name → the file below train/ or test/
    "case12_day0_slice_0001": "case12/case12_day0/scans/slice_0001_266_266_1.50_1.50.png",
    "case12_day0_slice_0144": "case12/case12_day0/scans/slice_0144_266_266_1.50_1.50.png",
    "case123_day20_slice_0001": "case123/case123_day20/scans/slice_0001_360_310_1.50_1.50.png",
}


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """A bundle, a competition with a nested test set, and the same images side by side."""
    build(write_described(tmp_path / "weights", UW_MADISON), tmp_path / "dist", "me",
          competition=UW_MADISON)  # fmt: skip
    drawn, flat = draw_described(tmp_path / "drawn", UW_MADISON), tmp_path / "flat"
    flat.mkdir()
    for file, (name, path) in zip(drawn, PATHS.items(), strict=True):
        target = tmp_path / "input" / "uw" / "test" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "drawn" / file, target)
        shutil.copy(tmp_path / "drawn" / file, flat / f"{name}.png")
    rows = [f"{name},{label},\n" for name in PATHS for label in UW_MADISON.classes]
    (tmp_path / "input" / "uw" / SAMPLE).write_text("id,class,predicted\n" + "".join(rows))
    return tmp_path


def test_the_scored_run_and_its_validator_find_them(mounted: Path) -> None:
    bundle, sample = mounted / "dist" / "dataset", mounted / "input" / "uw" / SAMPLE
    nested, flat = mounted / "nested.csv", mounted / "flat.csv"
    record = run(Options(input=mounted / "input", bundle=bundle, output=nested))
    run(Options(images=mounted / "flat", sample=sample, bundle=bundle, output=flat))
    assert (record.faults, record.strips) == ({}, 3)
    assert nested.read_bytes() == flat.read_bytes()
    assert record.non_empty > 0
    (mounted / "mine.json").write_text(json.dumps(asdict(UW_MADISON)))
    images = mounted / "input" / "uw" / "test"
    named = ("--competition", mounted / "mine.json", "--sample", sample, "--images", images)
    assert exit_code(validate.main, nested, *named) == 0


def test_the_rehearsal_and_scores_take_the_nested_folder(
    mounted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, truth = mounted / "input" / "uw" / "test", mounted / "truth.csv"
    first = next(iter(PATHS))
    truth.write_text(f"id,class,segmentation\n{first},stomach,1 9\n")  # as train.csv names it
    given = ("--images", images, "--ground-truth", truth)
    exit_code(dry_run.main, "--bundle", mounted / "dist", *given)
    report = json.loads((mounted / "dist" / "report" / "report.json").read_text())
    assert report["clean"]["ok"]
    lines = (mounted / "dist" / "report" / "submission.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1::3]] == sorted(PATHS)
    found = {}
    for folder in (images, mounted / "flat"):
        words: tuple[str | Path, ...] = (
            "--images",
            folder,
            "--truth",
            truth,
            "--out",
            mounted / "scores.json",
        )
        assert exit_code(score.main, "--bundle", mounted / "dist" / "dataset", *words) == 0
        found[folder] = (mounted / "scores.json").read_text()
    assert found[images] == found[mounted / "flat"]
    capsys.readouterr()
    (mounted / "input" / "uw" / "empty").mkdir()
    words = ("--bundle", mounted / "dist", "--images", mounted / "input" / "uw" / "empty")
    assert exit_code(dry_run.main, *words) == 2
    assert "empty: no images in it" in error_of(capsys.readouterr().err)


def test_a_fit_reads_them_with_the_mask_column_that_train_csv_has(mounted: Path) -> None:
    data = mounted / "data"
    shutil.copytree(mounted / "input" / "uw" / "test", data / "train_images")
    first = next(iter(PATHS))
    (data / "train.csv").write_text(f"id,class,segmentation\n{first},small_bowel,1 9\n")
    strips = read_strips(data, UW_MADISON)
    assert strips.names == [f"{name}.png" for name in sorted(PATHS)]
    _, masks = strips.load(f"{first}.png")
    assert [mask.sum() for mask in masks] == [0, 9, 0]


def test_a_sample_that_is_filled_in_for_the_scored_run_only_gives_its_header(
    mounted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (mounted / "input" / "uw" / SAMPLE).write_text("id,class,predicted\n")
    bundle, output = mounted / "dist" / "dataset", mounted / "submission.csv"
    words = ("--input", mounted / "input", "--bundle", bundle, "--output", output)
    assert exit_code(main, *words) == 0
    assert output.read_text() == "id,class,predicted\n"
    assert "names no image: the submission is its header alone" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_of_two_files_of_one_name_the_first_is_taken_and_both_are_named(
    mounted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = mounted / "input" / "uw" / "test" / "case12" / "case12_day0" / "scans"
    (folder / "slice_0001_300_300_1.50_1.50.png").write_bytes(b"another")
    task = find_task(Options(input=mounted / "input"), UW_MADISON)
    assert (task.images / "case12_day0_slice_0001.png").read_bytes() != b"another"
    said = r"slice_0001_266_266_1\.50_1\.50\.png and .*slice_0001_300_300_1.* are both 'case12_day0"
    assert re.search(said, caplog.text)


def test_without_a_sample_the_rows_are_the_samples(mounted: Path) -> None:
    task = find_task(Options(images=mounted / "input" / "uw" / "test"), UW_MADISON)
    assert task.layout.columns == ("id", "class", "predicted")
    assert task.names == [f"{name}.png" for name in sorted(PATHS)]


def test_links_are_made_only_where_images_are_nested(tmp_path: Path) -> None:
    assert one_folder(tmp_path / "gone", UW_MADISON) == tmp_path / "gone"
    assert one_folder(tmp_path, UW_MADISON) == tmp_path  # nothing below it
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.png").touch()
    assert one_folder(tmp_path, SEVERSTAL) == tmp_path
    linked = one_folder(tmp_path, UW_MADISON)
    assert [path.name for path in linked.iterdir()] == ["x.png"]
    assert one_folder(linked, UW_MADISON) == linked  # a worker's, in which all lie side by side


def test_a_picture_above_the_folders_does_not_hide_what_is_in_them(mounted: Path) -> None:
    test = mounted / "input" / "uw" / "test"
    shutil.copy(next((mounted / "flat").iterdir()), test / "overview.png")
    found = {path.name for path in one_folder(test, UW_MADISON).iterdir()}
    assert found == {*(f"{name}.png" for name in PATHS), "overview.png"}


def test_a_path_that_makes_a_name_with_a_folder_in_it_is_refused(mounted: Path) -> None:
    pattern = r"(case\d+/case\d+_day\d+)/scans/(slice_\d+)_.*\.png"
    whole = replace(UW_MADISON, image_path=pattern)
    with pytest.raises(ValueError, match="image_path` calls it 'case12/case12_day0_slice_0001"):
        one_folder(mounted / "input" / "uw" / "test", whole)


def test_the_cluster_calls_them_as_the_csv_does(mounted: Path) -> None:
    found = find_set(str(mounted / "input" / "uw" / "test"), UW_MADISON)
    names = {UW_MADISON.name_of_file(name) for name in found.names}
    assert names == {f"{name}.png" for name in PATHS}


PART = st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True)


@given(st.lists(PART, min_size=1, max_size=3), PART, st.lists(PART, max_size=3))
def test_the_groups_of_a_path_make_the_name(
    folders: list[str], stem: str, above: list[str]
) -> None:
    pattern = "/".join(["([a-z0-9]+)"] * (len(folders) + 1)) + r"\.tif"
    competition = Competition(suffix=".tif", image_path=pattern)
    path = "/".join([*above, *folders, f"{stem}.tif"])
    assert competition.name_of_file(path) == "_".join([*folders, stem]) + ".tif"
    assert competition.name_of_file(path + "f") == f"{stem}.tiff"  # the whole path has to match
    assert replace(competition, image_path=None).name_of_file(path) == f"{stem}.tif"
