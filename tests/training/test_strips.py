"""Strips: which files of a folder count, and the masks that belong to them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import CLASSES, LABELS, SMALL, draw_image, save_image

from kernel import images
from kernel.competition import SEVERSTAL
from kernel.rle import encode_rle
from training.ground_truth import check_masks
from training.strips import Strips, check_classes, read_each, read_strips


def write_data(folder: Path, rows: str, names: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    for seed, name in enumerate(names):
        save_image(folder / "train_images" / name, draw_image(seed))
    (folder / "train.csv").write_text(f"ImageId,ClassId,EncodedPixels\n{rows}", encoding="utf-8")
    return folder


def test_both_layouts_of_train_csv_give_the_same_strips(
    strips: Strips, steel_in_two_columns: Path
) -> None:
    of_2019 = read_strips(steel_in_two_columns, SEVERSTAL)
    assert strips.names == of_2019.names
    assert strips.clean() == of_2019.clean()
    for label in LABELS:
        assert strips.with_class(label) == of_2019.with_class(label)
    for name in strips.names:
        (image, masks), (other_image, other_masks) = strips.load(name), of_2019.load(name)
        np.testing.assert_array_equal(image, other_image)
        np.testing.assert_array_equal(masks, other_masks)
        assert (image.shape, masks.shape) == (SMALL, (CLASSES, *SMALL))
        assert masks.any() == (name not in strips.clean())


def test_of_some_images_those_that_can_be_read_come_in_their_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [draw_image(seed) for seed in (0, 1)]
    paths = [tmp_path / name for name in ("a.png", "torn.png", "gone.png", "b.png")]
    for path, image in zip(paths[::3], images, strict=True):
        save_image(path, image)
    paths[1].write_bytes(b"torn")
    for found, image in zip(read_each(paths, "a mean", SEVERSTAL), images, strict=True):
        np.testing.assert_array_equal(found, image)
    assert [f"left out: {path}: " in caplog.text for path in paths] == [False, True, True, False]
    with pytest.raises(ValueError, match="a mean: none of 2 images can be read"):
        next(read_each(paths[1:3], "a mean", SEVERSTAL))


def test_a_file_is_looked_through_for_missing_data_once(
    strips: Strips, monkeypatch: pytest.MonkeyPatch
) -> None:
    strips, looked = replace(strips, whole=set()), list[int]()
    monkeypatch.setattr(images, "_check_whole", lambda data, _: looked.append(len(data)))
    (first, masks), again = strips.load(strips.names[0]), strips.some(0, 2).load(strips.names[0])
    assert len(looked) == 1
    np.testing.assert_array_equal(first, again[0])
    np.testing.assert_array_equal(masks, again[1])
    strips.load(strips.names[1])
    assert len(looked) == 2


def test_a_truth_of_images_that_are_not_there_is_refused(tmp_path: Path) -> None:
    data = write_data(tmp_path, "a.png,1,1 2\ngone.jpg,1,1 2\nlost.jpg,1,1 2\n")
    with pytest.raises(ValueError, match=r"names gone\.jpg and 1 more, which train_images lacks"):
        read_strips(data, SEVERSTAL)


def test_a_truth_of_other_names_is_refused_with_one_of_each(tmp_path: Path) -> None:
    data = write_data(tmp_path, "a.jpg,1,1 2\n")
    with pytest.raises(ValueError, match=r"it names 'a\.jpg', the folder has 'a\.png'"):
        read_strips(data, SEVERSTAL)


def test_masks_that_the_description_reads_in_the_other_order_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = replace(SEVERSTAL, run_order="rows", mask_size=(16, 24))  # of a submission's masks
    mask = np.zeros(SMALL, bool)
    mask[10:40, 20:70] = True
    code = encode_rle(mask, rows)
    data = write_data(tmp_path, f"a.png,1,{code}\nb.png,2,{code}\n")
    for competition in (rows, replace(rows, run_order="columns")):
        assert not caplog.messages
        strips = read_strips(data, competition)
        check_masks(strips.truth, strips.names, data / "train.csv", strips.folder, competition)
    assert len(caplog.messages) == 2
    for line in caplog.messages:
        assert line.startswith(f"{data / 'train.csv'}, read as {rows.slug}'s description says: ")
        assert "is the RLE written along the rows" in line


def test_only_images_are_strips(tmp_path: Path) -> None:
    data = write_data(tmp_path, "a.png,1,1 2\n", ("a.png", "b.JPG"))
    for stray in (".DS_Store", "._a.png", "Thumbs.db", "notes.txt"):
        (data / "train_images" / stray).write_bytes(b"x")
    (data / "train_images" / ".ipynb_checkpoints").mkdir()
    (data / "train_images" / "folder.png").mkdir()
    strips = read_strips(data, SEVERSTAL)
    assert strips.names == ["a.png", "b.JPG"]
    assert strips.clean() == ["b.JPG"]


def test_images_of_another_suffix_than_the_competitions_are_no_strips(tmp_path: Path) -> None:
    """Else they would be clean ones, of names that no csv can have."""
    data = write_data(tmp_path, "a,1,1 2\nb,2,1 2\n", ("a.png", "b.png", "preview.jpg"))
    strips = read_strips(data, replace(SEVERSTAL, suffix=".png"))
    assert (strips.names, strips.clean()) == (["a.png", "b.png"], [])


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_images_is_refused(there: bool, tmp_path: Path) -> None:
    data = write_data(tmp_path, "a.png,1,1 2\n", ())
    folder = data / "train_images"
    if there:
        folder.mkdir()
        (folder / "Thumbs.db").write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{folder}: {'no images' if there else 'no such folder'}"):
        read_strips(data, SEVERSTAL)


def test_data_without_a_train_csv_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.csv: no such file; --data is a folder with"):
        read_strips(tmp_path, SEVERSTAL)


def test_a_mask_larger_than_its_image_names_the_strip(tmp_path: Path) -> None:
    strips = read_strips(write_data(tmp_path, f"a.png,2,{64 * 96} 2\n"), SEVERSTAL)
    with pytest.raises(ValueError, match=r"a\.png: run 6144 2 leaves an image of 6144 pixels"):
        strips.load("a.png")
    assert not strips.load("b.png")[1].any()


def test_an_image_that_is_none_names_the_strip(tmp_path: Path) -> None:
    strips = read_strips(write_data(tmp_path, "a.png,2,1 2\n"), SEVERSTAL)
    (strips.folder / "b.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"b\.png: 1 bytes that are no image"):
        strips.load("b.png")


def test_another_truth_or_another_file_is_another_fingerprint(tmp_path: Path) -> None:
    strips = read_strips(write_data(tmp_path, "a.png,2,1 2\n"), SEVERSTAL)
    first = strips.fingerprint()
    assert read_strips(tmp_path, SEVERSTAL).fingerprint() == first
    other = read_strips(write_data(tmp_path, "a.png,2,1 3\n"), SEVERSTAL).fingerprint()
    save_image(tmp_path / "train_images" / "b.png", draw_image(7, (60, 96)))
    assert len({first, other, read_strips(tmp_path, SEVERSTAL).fingerprint()}) == 3


def test_a_class_that_no_source_has_is_refused() -> None:
    truth = {f"{label}.jpg": {label: "1 1"} for label in LABELS}
    whole = Strips(Path("nowhere"), list(truth), truth, SEVERSTAL)
    three = replace(whole, names=[name for name in whole.names if name != "2.jpg"])
    check_classes([three, whole])
    with pytest.raises(ValueError, match="no strip to train on has class 2: take another --fold"):
        check_classes([three, three])
    with pytest.raises(ValueError, match="leaves no strip to train on"):
        check_classes([replace(whole, names=[])])
