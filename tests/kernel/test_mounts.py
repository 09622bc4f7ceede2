"""What Kaggle mounts where: the kernel finds bundle, sample and images by what they are."""

import os
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import fail_once, read_submission, save_strips, write_sample

from kernel.competition import SEVERSTAL, Competition
from kernel.images import read_image
from kernel.inference import run
from kernel.kaggle import SCORED_RUN
from kernel.manifest import MANIFEST
from kernel.mounts import SAMPLE, find_images, find_one, find_sample
from kernel.options import Options
from kernel.task import Task, find_task, unpack_images

DATASET = "somebody/severstal-steel-ensemble"
COMPETITION = "severstal-steel-defect-detection"

MOUNTS = {  # where the bundle, the sample and the images lie
    "old": ("severstal-steel-ensemble", COMPETITION, f"{COMPETITION}/test_images"),
    "new": (
        f"datasets/{DATASET}",
        f"competitions/{COMPETITION}",
        f"competitions/{COMPETITION}/test_images",
    ),
    "nested once": ("ensemble/dataset", f"{COMPETITION}/data", f"{COMPETITION}/data/test_images"),
    "nested twice": (
        f"datasets/{DATASET}/versions/3",
        f"competitions/{COMPETITION}/a/b",
        f"competitions/{COMPETITION}/a/b/test_images",
    ),
    "images a folder deeper": (
        "ensemble",
        COMPETITION,
        f"{COMPETITION}/test_images/test_images",
    ),
    "images beside the sample itself": ("ensemble", "steel", "steel"),
    "another slug": ("x", "my-copy-of-severstal", "my-copy-of-severstal/images"),
    "images under a slug of their own": ("ensemble", COMPETITION, "datasets/me/strips/test"),
}


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def mount(root: Path, bundle: str, sample: str, images: str) -> None:
    """The mounts' files, and those of other folders that a hasty search would take."""
    write(root / bundle / MANIFEST, "{}")
    write(root / sample / SAMPLE, "ImageId,EncodedPixels,ClassId\na.jpg,1 1,0\nb.jpg,1 1,0\n")
    for name in ("a.jpg", "b.jpg"):
        write(root / images / name)
    for name in ("x.jpg", "y.jpg", "z.jpg"):
        write(root / sample / "train_images" / name)
    write(root / "datasets" / "else" / "other.csv")


@pytest.mark.parametrize("case", MOUNTS)
def test_everything_is_found_where_kaggle_may_mount_it(case: str, tmp_path: Path) -> None:
    bundle, sample, images = MOUNTS[case]
    mount(tmp_path, bundle, sample, images)
    found = find_one(tmp_path, MANIFEST, "the bundle", "--bundle")
    task = find_task(Options(input=tmp_path), SEVERSTAL)
    assert found == tmp_path / bundle
    assert task.images == tmp_path / images
    assert task.names == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("place", [".", "bundle", "datasets/owner/bundle", "a/b/c/d"])
def test_the_folder_of_a_file_is_found_at_any_depth(place: str, tmp_path: Path) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ensemble.json").touch()
    (tmp_path / "other").mkdir()
    assert find_one(tmp_path, "ensemble.json", "the bundle", "--bundle") == folder


def test_a_bundle_that_cannot_be_read_for_a_moment_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / MANIFEST).touch()
    fail_once(monkeypatch, Path, "read_bytes", tmp_path / "a" / MANIFEST)
    assert find_one(tmp_path, MANIFEST, "the bundle", "--bundle") == tmp_path / "a"


@pytest.mark.parametrize("root", [".", "not-there"])
def test_a_file_that_is_nowhere_says_what_to_add(root: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no ensemble\.json under .*: add the bundle .*--bundle"):
        find_one(tmp_path / root, "ensemble.json", "the bundle", "--bundle")


def test_a_file_found_twice_lists_both_and_asks_to_choose(tmp_path: Path) -> None:
    for place in ("one", "deep/two"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "ensemble.json").write_text(place)
    with pytest.raises(ValueError) as error:
        find_one(tmp_path, "ensemble.json", "the bundle", "--bundle")
    assert str(tmp_path / "one") in str(error.value)
    assert str(tmp_path / "deep" / "two") in str(error.value)
    assert "choose with --bundle" in str(error.value)


def test_one_version_mounted_in_two_places_is_one(tmp_path: Path) -> None:
    for place in ("severstal-steel-ensemble", f"datasets/{DATASET}"):
        write(tmp_path / place / MANIFEST, '{"members": 1}')
    found = find_one(tmp_path, MANIFEST, "the bundle", "--bundle")
    assert found == tmp_path / "datasets" / DATASET


def test_two_versions_at_once_are_both_named_with_the_option(tmp_path: Path) -> None:
    places = [tmp_path / f"datasets/{DATASET}", tmp_path / f"datasets/{DATASET}-v2"]
    for number, place in enumerate(places):
        write(place / MANIFEST, f'{{"members": {number}}}')
    with pytest.raises(ValueError) as error:
        run(Options(input=tmp_path))
    assert str(error.value) == (
        f"more than one {MANIFEST}: {places[0]}, {places[1]}; "
        "remove one from the kernel's sources, or choose with --bundle"
    )


def test_an_empty_tree_says_what_is_missing_and_which_source_to_add(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no ensemble\.json under .* there is nothing: add") as e:
        run(Options(input=tmp_path))
    assert "the dataset that `kaggle datasets create` made" in str(e.value)
    assert "kernel's sources, or give --bundle" in str(e.value)


def test_a_tree_without_the_competition_names_it_and_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "ensemble" / MANIFEST, "{}")
    with pytest.raises(ValueError, match=r"no sample_submission\.csv under .* there is ensemble:"):
        find_task(Options(input=tmp_path), SEVERSTAL)
    with pytest.raises(ValueError, match=f"add the competition {COMPETITION} to the kernel's"):
        find_task(Options(input=tmp_path), SEVERSTAL)


def test_the_images_folder_is_the_one_that_holds_the_samples_images(tmp_path: Path) -> None:
    for name in ("test_images/b.jpg", "test_images/a.jpg", "train_images/x.jpg", "abc/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    found = find_images({"a.jpg", "b.jpg"}, [tmp_path], tmp_path / "not-there", SEVERSTAL)
    assert found == (tmp_path / "test_images", {})


@pytest.mark.parametrize("folders", [[], ["train_images"]])
def test_no_images_beside_the_sample_asks_for_their_folder(
    folders: list[str], tmp_path: Path
) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jpg").touch()
    with pytest.raises(ValueError, match=r"no folder or zip below .* holds the images.*--images"):
        find_images({"a.jpg"}, [tmp_path], tmp_path, SEVERSTAL)


def test_linked_folders_are_searched_and_a_circle_ends(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere"
    save_strips(real / "test_images", ["a.png"])
    write_sample(real / "sample_submission.csv", ["a.png"])
    root = tmp_path / "input"
    root.mkdir()
    (root / "severstal").symlink_to(real)
    (real / "back").symlink_to(root)
    assert find_one(root, "sample_submission.csv", "", "") == root / "severstal"
    task = find_task(Options(input=root), SEVERSTAL)
    assert task.images == root / "severstal" / "test_images"
    assert task.names == ["a.png"]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def mount_test_set(root: Path, *images: str) -> None:
    """A sample of a.jpg and b.jpg, and files below its folder that say where they lie."""
    write(root / COMPETITION / SAMPLE, "ImageId,EncodedPixels,ClassId\na.jpg,1 1,0\nb.jpg,1 1,0\n")
    for image in images:
        write(root / COMPETITION / image, image)


SPREAD = {  # a test set in several folders
    "two folders": ("test/1/a.jpg", "test/2/b.jpg"),
    "a folder an image": ("stage1_test/a/images/a.jpg", "stage1_test/b/images/b.jpg"),
    "most in one, and again in another": ("1/a.jpg", "2/a.jpg", "2/b.jpg", "2/c.jpg"),
}


@pytest.mark.parametrize("case", SPREAD)
def test_images_of_several_folders_are_all_predicted(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount_test_set(tmp_path, *SPREAD[case])
    found = contents(find_task(Options(input=tmp_path), SEVERSTAL).images)
    wanted = {name: [path for path in SPREAD[case] if path.endswith(name)] for name in found}
    assert found.keys() >= {"a.jpg", "b.jpg"}
    assert found == {name: paths[-1] for name, paths in wanted.items()}
    assert ("both hold 1 images" in caplog.text) == ("again" in case)
    assert "stay empty" not in caplog.text


def test_images_that_lie_beside_the_competition_fill_up_those_that_it_has(tmp_path: Path) -> None:
    mount_test_set(tmp_path, "b.jpg")
    for name in ("a.jpg", "b.jpg"):
        write(tmp_path / "datasets" / "me" / name, "another's")
    task = find_task(Options(input=tmp_path), SEVERSTAL)
    assert contents(task.images) == {"a.jpg": "another's", "b.jpg": "b.jpg"}


def test_a_run_that_lacks_images_says_how_many_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount_test_set(tmp_path, "images/a.jpg")
    assert find_task(Options(input=tmp_path), SEVERSTAL).images == tmp_path / COMPETITION / "images"
    [line] = caplog.messages
    said = "holds 1 of the 2 images that the sample names, and no 'b.jpg': the rows of the others"
    assert said in line and "`image_path` says the names" in line


@pytest.mark.parametrize(
    ("right", "other"),
    [("imgs_test", "annotations"), ("my/test/images", "contest"), ("training", "validation")],
)
def test_of_two_folders_that_hold_the_same_names_it_is_the_test_set_and_both_are_named(
    right: str, other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{folder}/{name}.jpg" for folder in (right, other) for name in "ab"]
    mount_test_set(tmp_path, *names)
    root = tmp_path / COMPETITION
    assert find_task(Options(input=tmp_path), SEVERSTAL).images == root / right
    [line] = caplog.messages
    assert line.startswith(f"{root / right} and {root / other} both hold 2 images that the sample")
    assert line.endswith("like 'a.jpg': the first's are taken; name the right folder with --images")


def test_a_missing_test_image_leaves_the_others_to_the_test_set(tmp_path: Path) -> None:
    mount_test_set(tmp_path, "test/a.jpg", "train/a.jpg", "train/b.jpg", "train/c.jpg")
    found = contents(find_task(Options(input=tmp_path), SEVERSTAL).images)
    assert found == {"a.jpg": "test/a.jpg", "b.jpg": "train/b.jpg"}


OTHER_NAMES = ("sample_submission_v2.csv", "sampleSubmission.csv", "stage1_Submission.CSV")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_sample_of_another_name_is_known_by_its_header(
    name: str, zipped: bool, tmp_path: Path
) -> None:
    mount(tmp_path, "ensemble", COMPETITION, f"{COMPETITION}/test")
    sample = (tmp_path / COMPETITION / SAMPLE).rename(tmp_path / COMPETITION / name)
    if zipped:
        write_zip(sample.with_name(f"{name}.zip"), {name: sample.read_text(encoding="utf-8")})
        sample.unlink()
    write(tmp_path / COMPETITION / "train.csv", "ImageId,EncodedPixels,ClassId\nx.jpg,1 1,3\n")
    write(tmp_path / COMPETITION / "a_sample_of_the_metadata.csv", "ImageId,width\n")
    write(tmp_path / "a-copy" / name, sample.read_text(encoding="utf-8") if not zipped else "")
    write(tmp_path / "another" / "my_submission.csv", "ImageId,EncodedPixels\nx.jpg_1,\n")
    assert find_task(Options(input=tmp_path), SEVERSTAL).names == ["a.jpg", "b.jpg"]


def test_of_several_samples_in_the_competitions_folder_none_goes_before_the_usual_name(
    tmp_path: Path,
) -> None:
    mount(tmp_path, "ensemble", COMPETITION, f"{COMPETITION}/test")
    sample = tmp_path / COMPETITION / SAMPLE
    (tmp_path / "mine").mkdir()
    sample.rename(tmp_path / "mine" / SAMPLE)
    for stage, name in (("1", "x.jpg"), ("2", "y.jpg")):
        lines = f"ImageId,EncodedPixels,ClassId\n{name},,1\n"
        write(tmp_path / COMPETITION / f"stage{stage}_sample_submission.csv", lines)
    assert find_task(Options(input=tmp_path), SEVERSTAL).names == ["a.jpg", "b.jpg"]


def test_of_csv_files_that_are_no_sample_all_are_named_and_of_several_samples_too(
    tmp_path: Path,
) -> None:
    for name in ("train.csv", "sample_v2.csv"):
        write(tmp_path / COMPETITION / name, "id,rle\na,\n")
    message = (
        r"the header ImageId_ClassId,.* or .*ClassId: sample_v2\.csv, train\.csv; add the compet"
    )
    with pytest.raises(ValueError, match=message):
        find_task(Options(input=tmp_path), SEVERSTAL)
    for name in ("sample_v2.csv", "sample_v3.csv"):
        write(tmp_path / COMPETITION / name, f"ImageId_ClassId,EncodedPixels\n{name}_1,\n")
    with pytest.raises(ValueError, match=r"sample_v2\.csv, .*sample_v3\.csv; choose with --sample"):
        find_task(Options(input=tmp_path), SEVERSTAL)


@pytest.mark.parametrize("name", [SAMPLE, f"{SAMPLE}.zip", "sample_v2.csv"])
@pytest.mark.parametrize("place", [COMPETITION, f"competitions/{COMPETITION}"])
def test_the_competitions_own_sample_is_taken_where_a_dataset_has_another(
    place: str, name: str, tmp_path: Path
) -> None:
    """In the scored run Kaggle changes the first alone."""
    for folder, image in ((place, "a.jpg"), (f"datasets/me/{COMPETITION}", "x.jpg")):
        write(tmp_path / folder / image)
        sample, rows = tmp_path / folder / name, f"ImageId,EncodedPixels,ClassId\n{image},1 1,0\n"
        if sample.suffix == ".zip":
            write_zip(sample, {SAMPLE: rows})
        else:
            write(sample, rows)
    assert find_task(Options(input=tmp_path), SEVERSTAL).names == ["a.jpg"]


@pytest.mark.parametrize("own", ["competitions/", ""])
def test_where_the_competition_has_its_sample_no_other_folder_is_searched_for_one(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may hang."""
    searched, scandir = list[Path](), os.scandir

    def spied(folder: Path) -> Any:
        searched.append(Path(folder))
        return scandir(folder)

    sample = tmp_path / own / COMPETITION / SAMPLE
    write(sample)
    write(tmp_path / "datasets" / "me" / "ensemble" / MANIFEST)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", spied)
        assert find_sample(tmp_path, SEVERSTAL)[0] == sample
    assert sample.parent in searched
    assert not [folder for folder in searched if folder in (tmp_path, tmp_path / "datasets")]


def test_a_folder_of_the_competitions_name_at_any_depth_is_its_own(tmp_path: Path) -> None:
    for folder, image in ((f"v2/deep/{COMPETITION}", "a.jpg"), ("a-copy", "x.jpg")):
        write(tmp_path / folder / SAMPLE, f"ImageId,EncodedPixels,ClassId\n{image},1 1,0\n")
        write(tmp_path / folder / image)
    write(tmp_path / "datasets" / "me" / COMPETITION / SAMPLE, "")
    assert find_task(Options(input=tmp_path), SEVERSTAL).names == ["a.jpg"]


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("name", [SAMPLE, f"{SAMPLE}.zip", "sample_v2.csv"])
@pytest.mark.parametrize("images", ["test/", "test.zip"])
def test_of_two_samples_the_one_with_images_is_taken_in_the_scored_run_and_before(
    images: str, name: str, scored: bool, tmp_path: Path
) -> None:
    """The competition has another folder name, and a dataset a copy of its public sample."""
    hidden = ["h.jpg", "i.jpg"] if scored else ["a.jpg", "b.jpg"]
    for folder, names in (("steel", hidden), ("a-copy", ["a.jpg", "b.jpg"])):
        lines = "".join(f"{image},1 1,0\n" for image in names)
        sample, text = tmp_path / folder / name, f"ImageId,EncodedPixels,ClassId\n{lines}"
        if sample.suffix == ".zip":
            write_zip(sample, {SAMPLE: text})
        else:
            write(sample, text)
    write(tmp_path / "a-copy" / "example" / "a.jpg", "not the competition's")  # too few
    if images.endswith(".zip"):
        write_zip(tmp_path / "steel" / images, dict.fromkeys(hidden, "own"))
    else:
        for image in hidden:
            write(tmp_path / "steel" / images / image, "own")
    task = unpacked(tmp_path)
    assert task.names == hidden
    assert contents(task.images) == dict.fromkeys(hidden, "own")


def test_samples_that_differ_are_refused_and_equal_ones_named_where_images_do_not_decide(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = tmp_path / "one" / SAMPLE, tmp_path / "two" / SAMPLE
    for sample in (one, two):
        write(sample, "ImageId,EncodedPixels,ClassId\na.jpg,1 1,0\n")
        write(sample.with_name("a.jpg"), sample.parent.name)
    task = find_task(Options(input=tmp_path), SEVERSTAL)
    assert contents(task.images)["a.jpg"] == "one"
    assert f"{one} and {two} are the same sample: the first is taken; remove one" in caplog.text
    write(two, "ImageId,EncodedPixels,ClassId\na.jpg,1 1,0\nb.jpg,1 1,0\n")
    write(two.with_name("b.jpg"))
    with pytest.raises(ValueError) as error:
        find_task(Options(input=tmp_path), SEVERSTAL)
    assert str(error.value) == (
        f"more than one {SAMPLE}: {one}, {two}; "
        "remove one from the kernel's sources, or choose with --sample"
    )


HEADER = "ImageId,EncodedPixels,ClassId\n"
DIFFERING = {  # samples by folder → the folder of the one that is taken
    "the largest": ({"a": "a.jpg,1 1,0\n", "b": "a.jpg,1 1,0\nb.jpg,1 1,0\n"}, "b"),
    "the first of equal size": ({"b": "c.jpg,1 1,0\n", "a": "d.jpg,1 1,0\n"}, "a"),
}


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("header", [HEADER, "Id,Label\n"])
@pytest.mark.parametrize("case", DIFFERING)
def test_of_samples_that_differ_the_scored_run_takes_the_largest_that_fits(
    case: str,
    header: str,
    scored: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Any rows score more than none."""
    monkeypatch.setenv(SCORED_RUN, "1" if scored else "")
    samples, folder = DIFFERING[case]
    for name, rows in samples.items():
        write(tmp_path / name / SAMPLE, header + rows)
    if header == HEADER:
        write(tmp_path / "another" / SAMPLE, "Id,Label\n" + 99 * "a,1\n")
    if not scored:
        with pytest.raises(ValueError, match=f"more than one {SAMPLE}"):
            find_sample(tmp_path, SEVERSTAL)
        return
    taken = tmp_path / folder / SAMPLE
    assert find_sample(tmp_path, SEVERSTAL) == (taken, [taken.parent])
    [error] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert error.startswith(f"more than one {SAMPLE}: ") and error.endswith(f"{taken} is taken")


def test_images_beside_the_sample_go_before_others_of_the_competition(tmp_path: Path) -> None:
    mount_test_set(tmp_path, "stage1/test/a.jpg", "stage1/test/b.jpg")
    (tmp_path / COMPETITION / "stage2").mkdir()
    (tmp_path / COMPETITION / SAMPLE).rename(tmp_path / COMPETITION / "stage2" / SAMPLE)
    for name in ("a.jpg", "b.jpg"):
        write(tmp_path / COMPETITION / "stage2" / "test" / name, "stage 2")
    found = contents(find_task(Options(input=tmp_path), SEVERSTAL).images)
    assert found == {"a.jpg": "stage 2", "b.jpg": "stage 2"}


@pytest.mark.parametrize("scored", [False, True])
def test_of_two_samples_with_images_the_one_that_is_in_no_dataset_is_taken(
    scored: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("datasets/me/all", "steel"):
        name = "h.jpg" if scored and folder == "steel" else "a.jpg"
        write(tmp_path / folder / SAMPLE, f"ImageId,EncodedPixels,ClassId\n{name},1 1,0\n")
        write(tmp_path / folder / name, folder)
    task = find_task(Options(input=tmp_path), SEVERSTAL)
    assert task.images == tmp_path / "steel" and not caplog.messages


def test_a_damaged_zip_of_a_sample_costs_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "ImageId,EncodedPixels,ClassId\na.jpg,1 1,0\n"
    write_zip(tmp_path / "x" / f"{SAMPLE}.zip", {SAMPLE: rows})
    damage(tmp_path / "x" / f"{SAMPLE}.zip", SAMPLE, "header")
    with pytest.raises(ValueError, match=r"csv\.zip: 1 of 1 files cannot be unpacked"):
        find_task(Options(input=tmp_path), SEVERSTAL)
    write(tmp_path / "steel" / SAMPLE, rows)
    write(tmp_path / "steel" / "a.jpg")
    assert find_task(Options(input=tmp_path), SEVERSTAL).names == ["a.jpg"]
    assert "; not taken for the sample" in caplog.text


# --- other suffixes -------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
def test_a_test_set_with_another_suffix_than_the_csvs_names_is_predicted(
    zipped: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a.png", "slice_1.50.png", "c.png", "d.png", "e.png"]
    rows = "".join(f"{name},1 1,0\n" for name in names)
    write(tmp_path / COMPETITION / SAMPLE, f"ImageId,EncodedPixels,ClassId\n{rows}")
    held = ["a.jpeg", "slice_1.50.PNG", "c.bmp", "c.jpg", "d.txt", "x.jpeg"]
    files = {f"test/{file}": file for file in held}
    if zipped:
        write_zip(tmp_path / COMPETITION / "test.zip", files)
    else:
        for place, text in files.items():
            write(tmp_path / COMPETITION / place, text)
    write(tmp_path / COMPETITION / "masks" / "e.jpeg")
    found = contents(unpacked(tmp_path).images)
    assert found == {"a.png": "a.jpeg", "slice_1.50.png": "slice_1.50.PNG"}
    [line] = [line for line in caplog.messages if "another suffix" in line]
    assert ": 2 images have another suffix than the sample" in line
    assert line.endswith("a.jpeg for 'a.png': they are predicted")


def test_beside_its_other_images_a_test_sets_own_suffixes_are_taken_and_no_others(
    tmp_path: Path,
) -> None:
    mount_test_set(tmp_path, "test/a.jpg", "test_masks/b.png")
    found = contents(find_task(Options(input=tmp_path), SEVERSTAL).images)
    assert found == {"a.jpg": "test/a.jpg"}
    write(tmp_path / COMPETITION / "test" / "b.JPG", "test/b.JPG")
    found = contents(find_task(Options(input=tmp_path), SEVERSTAL).images)
    assert found == {"a.jpg": "test/a.jpg", "b.jpg": "test/b.JPG"}


def test_a_stray_image_hides_no_test_set_with_another_suffix(tmp_path: Path) -> None:
    mount_test_set(tmp_path, "train/a.jpg", "test/a.png", "test/b.png")
    found = contents(find_task(Options(input=tmp_path), SEVERSTAL).images)
    assert found == {"a.jpg": "train/a.jpg", "b.jpg": "test/b.png"}


def test_a_file_of_another_suffix_that_is_no_test_sets_is_not_taken(tmp_path: Path) -> None:
    mount_test_set(tmp_path, "train_masks/a.png", "train_masks/test_b.png")
    with pytest.raises(ValueError, match=r"no folder or zip below .* holds the images"):
        find_task(Options(input=tmp_path), SEVERSTAL)


def test_image_path_names_images_with_another_suffix_too(tmp_path: Path) -> None:
    write(tmp_path / SAMPLE, "ImageId,EncodedPixels,ClassId\ncase1_2,1 1,0\n")
    write(tmp_path / "test" / "case1" / "2_266.JPG", "pixels")
    nested = replace(SEVERSTAL, suffix=".png", image_path=r"(case\d+)/(\d+)_.*\.png")
    task = find_task(Options(input=tmp_path), nested)
    assert contents(task.images) == {"case1_2.png": "pixels"}


def test_an_image_that_is_named_with_another_suffix_is_decoded(tmp_path: Path) -> None:
    mount_test_set(tmp_path)
    save_strips(tmp_path / COMPETITION / "test", ["a.png", "b.bmp"])
    images = find_task(Options(input=tmp_path), SEVERSTAL).images
    for name, file in (("a.jpg", "a.png"), ("b.jpg", "b.bmp")):
        read = read_image(images / name, SEVERSTAL)
        stored = read_image(tmp_path / COMPETITION / "test" / file, SEVERSTAL)
        assert read.std() > 0 and (read == stored).all()


# --- zips -----------------------------------------------------------------------------------------


def write_zip(path: Path, files: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def mount_zips(root: Path, sample_too: bool, below: str) -> None:
    """As Kaggle mounts salt and, with the sample zipped too, Carvana."""
    rows = "ImageId,EncodedPixels,ClassId\na.jpg,1 1,0\nb.jpg,1 1,0\n"
    if sample_too:
        write_zip(root / COMPETITION / f"{SAMPLE}.zip", {SAMPLE: rows, f"__MACOSX/._{SAMPLE}": ""})
    else:
        write(root / COMPETITION / SAMPLE, rows)
    test = {f"{below}{name}.jpg": f"pixels of {name}" for name in "abc"}
    write_zip(root / COMPETITION / "test.zip", {below: ""} | test if below else test)
    write_zip(root / COMPETITION / "train.zip", {f"train/{name}.jpg": "" for name in "axyz"})


def unpacked(root: Path, competition: Competition = SEVERSTAL) -> Task:
    return unpack_images(find_task(Options(input=root), competition))


@pytest.mark.parametrize("below", ["", "images/", "test/deeper/"])
@pytest.mark.parametrize("sample_too", [False, True])
def test_a_competition_that_is_mounted_as_zips_is_unpacked(
    sample_too: bool, below: str, tmp_path: Path
) -> None:
    mount_zips(tmp_path, sample_too, below)
    (tmp_path / COMPETITION / "a_damaged_one.zip").write_bytes(b"PK\3\4")
    (tmp_path / COMPETITION / "a_dangling_one.zip").symlink_to("gone.zip")
    task = unpacked(tmp_path)
    assert task.names == ["a.jpg", "b.jpg"]
    assert contents(task.images) == {"a.jpg": "pixels of a", "b.jpg": "pixels of b"}
    again = unpacked(tmp_path).images / "a.jpg"  # by the notebook's last cell
    assert again.samefile(task.images / "a.jpg")


def test_an_image_that_lies_beside_the_zip_of_all_takes_the_place_of_the_one_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount_zips(tmp_path, sample_too=True, below="test/")
    write(tmp_path / COMPETITION / "b.jpg", "a corrected b")
    task = unpacked(tmp_path)
    assert contents(task.images) == {"a.jpg": "pixels of a", "b.jpg": "a corrected b"}
    assert not [record for record in caplog.records if "stay empty" in record.message]


def test_images_of_several_zips_are_all_predicted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount_test_set(tmp_path, "b.jpg")
    names = "abcdefg"
    rows = "".join(f"{name}.jpg,1 1,0\n" for name in names)
    write(tmp_path / COMPETITION / SAMPLE, f"ImageId,EncodedPixels,ClassId\n{rows}")
    for number, held in ((1, "ab"), (2, "cde"), (3, "fg")):
        files = {f"{name}.jpg": f"{name} of {number}" for name in held}
        write_zip(tmp_path / COMPETITION / f"test_{number}.zip", files)
    found = contents(unpacked(tmp_path).images)
    parts = {"a": "a of 1", "b": "b.jpg", "c": "c of 2", "d": "d of 2", "e": "e of 2"}
    parts |= {"f": "f of 3", "g": "g of 3"}
    assert found == {f"{name}.jpg": text for name, text in parts.items()}
    assert not caplog.messages


@pytest.mark.parametrize("sample_too", [False, True])
@pytest.mark.parametrize("place", [COMPETITION, f"competitions/{COMPETITION}", "steel"])
def test_the_competitions_zip_goes_before_a_datasets_loose_copies(
    place: str, sample_too: bool, tmp_path: Path
) -> None:
    mount_zips(tmp_path, sample_too, below="test/")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / COMPETITION).rename(tmp_path / place)
    for name in ("a.jpg", "b.jpg"):
        write(tmp_path / "datasets" / "me" / "small" / name, "128x128")
    task = unpacked(tmp_path)
    assert contents(task.images) == {"a.jpg": "pixels of a", "b.jpg": "pixels of b"}


def test_of_two_zips_of_the_same_images_both_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount_zips(tmp_path, sample_too=False, below="test/")
    hq = tmp_path / COMPETITION / "test_hq.zip"
    write_zip(hq, {f"test_hq/{name}.jpg": f"{name} in high quality" for name in "abc"})
    assert contents(unpacked(tmp_path).images) == {"a.jpg": "pixels of a", "b.jpg": "pixels of b"}
    assert f"test.zip and {hq} both hold 2 images that the sample names" in caplog.text


def test_images_of_a_zip_have_the_names_that_image_path_makes(tmp_path: Path) -> None:
    write(tmp_path / SAMPLE, "ImageId,EncodedPixels,ClassId\ncase1_2,1 1,0\n")
    write_zip(tmp_path / "test.zip", {"test/case1/2_266.png": "pixels", "test/case3/2_266.png": ""})
    nested = replace(SEVERSTAL, suffix=".png", image_path=r"(case\d+)/(\d+)_.*")
    task = unpacked(tmp_path, nested)
    assert [path.name for path in task.images.iterdir()] == ["case1_2.png"]


def test_of_two_images_of_a_name_in_a_zip_the_first_is_taken_and_both_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / SAMPLE, "ImageId,EncodedPixels,ClassId\na.jpg,1 1,0\n")
    write_zip(tmp_path / "all.zip", {"images/a.jpg": "pixels", "masks/a.jpg": "a mask"})
    task = unpacked(tmp_path)
    assert (task.images / "a.jpg").read_text(encoding="utf-8") == "pixels"
    assert "images/a.jpg and masks/a.jpg are both 'a.jpg'" in caplog.text


@pytest.mark.parametrize("size", [10, 200])
def test_a_zip_that_breaks_off_is_named(
    size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount_zips(tmp_path, sample_too=False, below="test/")
    archive = tmp_path / COMPETITION / "test.zip"
    archive.write_bytes(archive.read_bytes()[:size])
    archive.with_name("train.zip").unlink()
    with pytest.raises(ValueError, match="holds the images"):
        unpacked(tmp_path)
    [line] = [line for line in caplog.messages if "whole zip" in line]
    assert line.startswith(f"{archive} is no whole zip, nothing of it is read: ")
    assert line.endswith("; fetch it again, or unpack it")


def test_a_sample_that_its_zip_lacks_is_asked_for(tmp_path: Path) -> None:
    write_zip(tmp_path / f"{SAMPLE}.zip", {"other.csv": ""})
    with pytest.raises(ValueError, match=rf"{SAMPLE}\.zip: no {SAMPLE} in it; give --sample"):
        unpacked(tmp_path)


def test_a_zip_that_has_no_room_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mount_zips(tmp_path, sample_too=False, below="test/")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=50_000_000))
    with pytest.raises(ValueError, match=r"test\.zip: 0\.0 GB to unpack"):
        unpacked(tmp_path)
    write(tmp_path / COMPETITION / "b.jpg", "a loose b")  # which it must not cost
    assert contents(unpacked(tmp_path).images) == {"b.jpg": "a loose b"}
    assert "test.zip: 0.0 GB to unpack" in caplog.text
    assert "1 images cannot be unpacked: loose copies of 0 are taken, the rows of" in caplog.text


def damage(archive: Path, name: str, part: str) -> None:
    """Overwrite a member of a zip: the header before its data, or these."""
    with zipfile.ZipFile(archive) as opened:
        member = opened.getinfo(name)
    data, start = bytearray(archive.read_bytes()), member.header_offset
    if part == "data":
        start += 30 + len(name)
    data[start : start + 8] = b"\xff" * 8
    archive.write_bytes(data)


DAMAGES = {
    "header": ("header", zipfile.ZIP_DEFLATED),
    "deflated": ("data", zipfile.ZIP_DEFLATED),
    "lzma": ("data", zipfile.ZIP_LZMA),
    "bzip2": ("data", zipfile.ZIP_BZIP2),
    "stored": ("data", zipfile.ZIP_STORED),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_image_of_a_zip_costs_its_own_rows_alone(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part, method = DAMAGES[case]
    mount_zips(tmp_path, sample_too=False, below="test/")
    archive = tmp_path / COMPETITION / "test.zip"
    with zipfile.ZipFile(archive, "w", method) as opened:
        for name in "ab":
            opened.writestr(f"test/{name}.jpg", f"pixels of {name}")
    damage(archive, "test/a.jpg", part)
    assert contents(unpacked(tmp_path).images) == {"b.jpg": "pixels of b"}
    assert f"{archive}: 1 of 2 files cannot be unpacked, such as test/a.jpg: " in caplog.text
    assert "; fetch it again, or unpack it" in caplog.text


def test_a_zip_of_damaged_images_is_refused_by_name_and_costs_no_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mount_zips(tmp_path, sample_too=False, below="test/")
    archive = tmp_path / COMPETITION / "test.zip"
    for name in "ab":
        damage(archive, f"test/{name}.jpg", "header")
    with pytest.raises(ValueError, match=r"test\.zip: 2 of 2 files .*; fetch it again, or unpack"):
        unpacked(tmp_path)
    rows = "ImageId,EncodedPixels,ClassId\na.jpg,1 1,0\nb.jpg,1 1,0\nd.jpg,1 1,0\n"
    write(tmp_path / COMPETITION / SAMPLE, rows)
    write_zip(tmp_path / COMPETITION / "test_2.zip", {"d.jpg": "pixels of d"})
    assert contents(unpacked(tmp_path).images) == {"d.jpg": "pixels of d"}
    assert "test.zip: 2 of 2 files cannot be unpacked" in caplog.text
    assert "2 images cannot be unpacked: loose copies of 0 are taken, the rows of" in caplog.text


@pytest.mark.parametrize("damaged", ["a", "ab"])
def test_a_loose_copy_anywhere_stands_in_for_an_image_that_cannot_be_unpacked(
    damaged: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a dataset that was attached because the zip is damaged."""
    mount_zips(tmp_path, sample_too=False, below="test/")
    for name in damaged:
        damage(tmp_path / COMPETITION / "test.zip", f"test/{name}.jpg", "header")
    for name in "ab":
        write(tmp_path / "datasets" / "me" / "unpacked" / f"{name}.jpg", f"copy of {name}")
    expected = {f"{name}.jpg": f"pixels of {name}" for name in "ab"}
    expected |= {f"{name}.jpg": f"copy of {name}" for name in damaged}
    assert contents(unpacked(tmp_path).images) == expected
    assert f"loose copies of {len(damaged)} are taken" in caplog.text


def test_rows_stand_before_images_are_unpacked(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount_zips(tmp_path, sample_too=True, below="test/")
    output = tmp_path / "submission.csv"

    def disk_usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=0 if output.exists() else 10**9)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    options = Options(input=tmp_path, bundle=tiny_bundle / "dataset", output=output)
    with pytest.raises(ValueError, match=r"test\.zip: 0\.0 GB to unpack"):
        run(options)
    assert len(read_submission(output)) == 8
