"""A new competition: what a sample file and a few images show, and what they do not."""

import csv
import gzip
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import draw_image, error_of, exit_code

import build_kernel
from kernel.image_folders import open_images
from kernel.shipped import find_competition, shipped_names
from packing.new_competition import propose

CLOUDS = ("Fish", "Flower", "Gravel", "Sugar")
ORGANS = ("large_bowel", "small_bowel", "stomach")
SAMPLES = {
    "severstal": "ImageId,EncodedPixels,ClassId\n{0}.jpg,1 409600,0\n{1}.jpg,1 409600,0\n",
    "clouds": "Image_Label,EncodedPixels\n"
    + "".join(f"{{{i}}}.jpg_{c},1 1\n" for i in (0, 1) for c in CLOUDS),
    "salt": "id,rle_mask\n{0},1 1\n{1},1 1\n",
    "carvana": "img,rle_mask\n{0}.jpg,1 1\n{1}.jpg,1 1\n",
    "uw-madison": "id,class,predicted\n"
    + "".join(f"{{{i}}},{c},\n" for i in (0, 1) for c in ORGANS),
}


def draw(folder: Path, name: str) -> tuple[Path, Path]:
    """A sample of two images of a shipped competition, of which the folder has the first."""
    competition = find_competition(name)
    images, sample = folder / "images", folder / "a-new-one" / "sample_submission.csv"
    images.mkdir()
    sample.parent.mkdir()
    grey = draw_image(0)
    image = grey.astype(np.uint16) * 99 if competition.bits == 16 else grey
    if competition.channels == 3:
        image = np.dstack([draw_image(seed) for seed in range(3)])
    cv2.imwrite(str(images / f"a_1{competition.suffix or '.jpg'}"), image)
    sample.write_text(SAMPLES[name].format("a_1", "b_2"))
    return sample, images


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_and_an_image_show_what_a_shipped_description_says(
    name: str, tmp_path: Path
) -> None:
    shipped, proposal = find_competition(name), propose(*draw(tmp_path, name))
    found = proposal.competition
    assert found.layouts == shipped.layouts[-1:]
    for field in ("suffix", "empty", "channels", "bits", "any_class"):
        assert getattr(found, field) == getattr(shipped, field), field
    assert (found.slug, found.image_size, found.n_images) == ("a-new-one", (64, 96), 2)
    unsure = " ".join(proposal.unsure)
    if found.any_class is None and len(shipped.classes) > 1:
        assert found.classes == shipped.classes
        assert f"classes: {', '.join(shipped.classes)}, as the column " in unsure
    else:
        assert "classes: " in unsure
    assert all(f"{name}: " in unsure for name in ("run_order", "first_index", "starts"))
    assert "mask_size" in unsure and "no class" not in unsure


def test_every_shipped_competition_is_proposed_here() -> None:
    assert shipped_names() == sorted(SAMPLES)


def test_the_command_writes_a_description_that_is_read_and_never_writes_over_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample, images = draw(tmp_path, "clouds")
    out = tmp_path / "mine.json"
    arguments = ("--new-competition", sample, "--images", images, "--out", out)
    assert exit_code(build_kernel.main, *arguments) == 0
    printed = capsys.readouterr().out
    assert "run_order: down the columns" in printed
    assert find_competition(str(out)).classes == CLOUDS
    assert exit_code(build_kernel.main, *arguments) == 2
    assert "is there already" in error_of(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "asked"),
    [("train.csv", True), ("sample_submission.csv.gz", False), ("stage1_Sample.csv", False)],
)
def test_the_header_of_what_is_no_sample_may_be_another(
    name: str, asked: bool, tmp_path: Path
) -> None:
    sample, images = draw(tmp_path, "salt")
    text = sample.read_bytes()
    given = sample.with_name(name)
    sample.unlink()
    given.write_bytes(gzip.compress(text) if given.suffix == ".gz" else text)
    asks = [line for line in propose(given, images).unsure if line.startswith("layouts: ")]
    words = f"layouts: {name}'s alone; where the sample has another header, add one for it, last: "
    assert asks == [f"{words}the last is written"] * asked


@pytest.mark.parametrize(("header", "asked"), [("id,predicted", True), ("id,rle_mask", False)])
def test_a_sample_without_rows_beside_it_shows_the_header(
    header: str, asked: bool, tmp_path: Path
) -> None:
    sample, images = draw(tmp_path, "salt")
    train = sample.rename(sample.with_name("train.csv"))
    sample.write_text(f"{header}\n")
    unsure = propose(train, images).unsure
    assert any(line.startswith("layouts: train.csv's alone") for line in unsure) == asked


def test_images_in_folders_of_their_own_are_copied_for_the_proposal(tmp_path: Path) -> None:
    """Neither the folder above them nor their own will do, and what is asked for does."""
    sample, images = draw(tmp_path, "uw-madison")
    nested = tmp_path / "nested" / "case123" / "scans"
    nested.mkdir(parents=True)
    (images / "a_1.png").rename(nested / "slice_0001_266_266_1.50_1.50.png")
    way = (
        "where folders are part of the csv's names, copy a few images into one folder, each under "
        "its name in the csv, propose with that, and add `image_path` "
        "(competitions/uw-madison.json has it)"
    )
    for folder in (tmp_path / "nested", nested):
        with pytest.raises(ValueError) as error:
            propose(sample, folder)
        assert str(error.value).endswith(way)
    (nested / "slice_0001_266_266_1.50_1.50.png").rename(images / "a_1.png")
    assert propose(sample, images).competition.suffix == ".png"


def test_of_two_images_that_a_cell_may_name_it_is_the_longer_one(tmp_path: Path) -> None:
    sample, images = draw(tmp_path, "salt")
    for name in ("case1.png", "case1_2.png"):
        cv2.imwrite(str(images / name), draw_image(0))
    sample.write_text("id,rle\n" + "".join(
        f"{image}_{organ},1 1\n" for image in ("case1", "case1_2") for organ in ("bowel", "liver")
    ))  # fmt: skip
    assert propose(sample, images).competition.classes == ("bowel", "liver")


def test_the_slug_keeps_what_an_address_may_have(tmp_path: Path) -> None:
    sample, images = draw(tmp_path, "clouds")
    folder = sample.parent.rename(tmp_path / "understanding_cloud_organization")
    assert propose(folder / sample.name, images).competition.slug == folder.name


@pytest.mark.parametrize("mark", ["1 0", " -1", "-"])
def test_a_mask_without_a_pixel_is_the_empty_one(mark: str, tmp_path: Path) -> None:
    sample, images = draw(tmp_path, "salt")
    sample.write_text(f"id,rle\na_1,{mark}\nb_2,1 2\n")
    proposal = propose(sample, images)
    assert proposal.competition.empty == mark.strip()
    assert not [line for line in proposal.unsure if line.startswith("empty")]


def test_of_two_marks_of_an_empty_mask_the_other_is_no_wrong_code(tmp_path: Path) -> None:
    sample, images = draw(tmp_path, "salt")
    sample.write_text("id,rle\na_1,\nb_2,-1\n")
    assert propose(sample, images).competition.empty == ""


def test_a_run_from_0_shows_the_first_index(tmp_path: Path) -> None:
    sample, images = draw(tmp_path, "salt")
    sample.write_text("id,rle\na_1,5 1\nb_2,0 1\n")
    proposal = propose(sample, images)
    assert proposal.competition.first_index == 0
    assert not [line for line in proposal.unsure if "first_index" in line]


def test_a_column_of_something_else_is_asked_for(tmp_path: Path) -> None:
    sample, images = draw(tmp_path, "salt")
    sample.write_text("id,height,rle\na_1,512,1 1\nb_2,512,1 1\n")
    unsure = propose(sample, images).unsure
    assert "column height: no class, each row's cell is kept, like '512'" in unsure


OTHER_COLUMNS = {  # csv → its layout, the classes
    "figures of each image": (
        "id,organ,height,note,rle\na_1,lung,512,,1 1\nb_2,lung,300,,1 1\nc_3,skin,512,,1 1\n",
        {"id": "{image}", "organ": "{class}", "height": "512", "note": "-", "rle": "{mask}"},
        ("lung", "skin"),
    ),
    "figures before the class": (
        "id,height,class,rle\na_1,512,1,1 1\na_1,512,2,1 1\nb_2,300,1,1 1\nb_2,300,2,1 1\n",
        {"id": "{image}", "height": "512", "class": "{class}", "rle": "{mask}"},
        ("1", "2"),
    ),
    "figures beside a class in the image's cell": (
        "id,height,rle\na_1_x,512,1 1\na_1_y,512,1 1\nb_2_x,300,1 1\nb_2_y,300,1 1\n",
        {"id": "{image}_{class}", "height": "512", "rle": "{mask}"},
        ("x", "y"),
    ),
    "a number of the row": (
        "row,id,rle\n0,a_1,1 1\n1,b_2,1 1\n",
        {"row": "0", "id": "{image}", "rle": "{mask}"},
        ("mask",),
    ),
    "one image": (
        "id,kind,rle\na_1,x,\na_1,y,\n",
        {"id": "{image}", "kind": "{class}", "rle": "{mask}"},
        ("x", "y"),
    ),
}


@pytest.mark.parametrize("case", OTHER_COLUMNS)
def test_columns_beside_the_classes_are_kept_as_they_are(case: str, tmp_path: Path) -> None:
    sample, images = draw(tmp_path, "salt")
    text, layout, classes = OTHER_COLUMNS[case]
    sample.write_text(text)
    found = propose(sample, images).competition
    assert list(found.layouts[0].items()) == list(layout.items())
    assert found.classes == classes


def test_a_table_as_pandas_writes_it_and_with_a_long_mask_is_read(tmp_path: Path) -> None:
    """Python's reader takes no cell above 131,072 characters unless it is told to."""
    csv.field_size_limit(131_072)  # another test may have raised it
    sample, images = draw(tmp_path, "salt")
    mask = " ".join(f"{start} 1" for start in range(1, 60_000, 2))
    text = f",id, rle_mask\n0,a_1,{mask}\n1,b_2,1 1\n"
    sample.with_suffix(".csv.gz").write_bytes(gzip.compress(text.encode()))
    for path in (sample, sample.with_suffix(".csv.gz")):
        sample.write_text(text)
        assert propose(path, images).competition.layouts == (
            {"id": "{image}", "rle_mask": "{mask}"},
        )


@pytest.mark.parametrize("side", [8_000, 40_000])
def test_images_that_the_kernel_does_not_decode_are_named(side: int, tmp_path: Path) -> None:
    sample, images = draw(tmp_path, "salt")
    huge = bytearray(cv2.imencode(".png", draw_image(0))[1].tobytes())
    huge[16:24] = side.to_bytes(4, "big") * 2  # its width and height
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    (images / "huge.png").write_bytes(huge)
    proposal = propose(sample, images)
    assert proposal.competition.image_size == (64, 96)
    [line] = [line for line in proposal.unsure if line.startswith("images: ")]
    assert line.startswith("images: 1 of those looked at cannot be read, huge.png: ")
    assert "pixels" in line and line.endswith("; the rows of such stay empty")
    (images / "a_1.png").write_bytes(huge)
    with pytest.raises(ValueError, match=r"none of its images is read, like a_1\.png: .* pixels"):
        propose(sample, images)


@pytest.mark.parametrize(
    ("other", "kinds"),
    [
        (np.dstack([draw_image(seed) for seed in range(3)]), "grey"),
        (draw_image(0).astype(np.uint16) * 99, "of 8 bits"),
        (np.dstack([draw_image(seed) for seed in range(3)]) * np.uint16(257), "grey or of 8"),
        (np.dstack([draw_image(0)] * 3), ""),  # grey, stored in three channels
    ],
)
def test_images_of_several_kinds_are_named(other: np.ndarray, kinds: str, tmp_path: Path) -> None:
    sample, images = draw(tmp_path, "salt")
    cv2.imwrite(str(images / "b_2.png"), other)
    proposal = propose(sample, images)
    lines = [line for line in proposal.unsure if line.startswith("channels, bits: ")]
    assert bool(lines) is bool(kinds)
    assert all(f"some images are {kinds}" in line for line in lines)
    for competition in (proposal.competition, replace(proposal.competition, channels=1, bits=8)):
        if kinds:  # what the line says: neither will do
            with pytest.raises(ValueError, match="correct it there, or save the images so"):
                open_images(images, competition)
        else:
            open_images(images, competition)


def test_images_of_other_values_than_the_kernel_reads_are_named(tmp_path: Path) -> None:
    sample, images = draw(tmp_path, "salt")
    cv2.imwrite(str(images / "float.tiff"), draw_image(0).astype(np.float32))
    said = "images: 1 of those looked at cannot be read, float.tiff: pixels are float32; the rows "
    assert any(line.startswith(said) for line in propose(sample, images).unsure)
    (images / "a_1.png").unlink()
    (images / "float.tiff").rename(images / "a_1.tiff")
    with pytest.raises(ValueError, match=r"is read, like a_1\.tiff: pixels are float32"):
        propose(sample, images)


def test_a_competition_of_images_that_are_not_read_does_not_fit(tmp_path: Path) -> None:
    sample, images = draw(tmp_path, "salt")
    (images / "a_1.png").rename(images / "a_1.dcm")
    with pytest.raises(ValueError, match=r"whose test images are such does not fit"):
        propose(sample, images)


def test_a_sample_in_the_folder_of_a_competition_of_instances_is_refused(tmp_path: Path) -> None:
    sample, images = draw(tmp_path, "salt")
    folder = sample.parent.rename(tmp_path / "Airbus Ship Detection")
    with pytest.raises(ValueError, match=r"slug airbus-.*, as its folder is named: scores inst"):
        propose(folder / sample.name, images)


def test_a_sample_in_the_folder_of_a_competition_of_relative_codes_is_refused(
    tmp_path: Path,
) -> None:
    sample, images = draw(tmp_path, "salt")
    sample.write_text("ImageId,EncodedPixels\na_1,-1\nb_2,-1\n")
    folder = sample.parent.rename(tmp_path / "siim-acr-pneumothorax-segmentation")
    with pytest.raises(ValueError, match=r"slug siim-acr-.*: reads relative codes, each start "):
        propose(folder / sample.name, images)


def test_the_only_column_of_codes_holds_the_masks_whatever_its_name(tmp_path: Path) -> None:
    sample, images = draw(tmp_path, "salt")
    sample.write_text("Id,width,Expected\na_1_0,64,1 5\na_1_1,64,\nb_2_0,64,3 2 9 1\nb_2_1,64,\n")
    proposal = propose(sample, images)
    assert proposal.competition.layouts == (
        {"Id": "{image}_{class}", "width": "64", "Expected": "{mask}"},
    )
    assert proposal.competition.classes == ("0", "1")
    assert "column Expected: the masks, as its cells are run-length codes" in proposal.unsure
    sample.write_text("Id,size,Expected\na_1_0,64 96,1 5\n")
    with pytest.raises(ValueError, match=r"no column is named like a mask .*, and 2 hold run-len"):
        propose(sample, images)


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "no column of masks": ("id,x\na_1,0.5\n", "line 1: id,x: no column is named like a mask"),
    "no image of the folder": ("id,rle\nc_3,1 1\n", "line 2: c_3,1 1 names no image"),
    "another number of cells": ("id,rle\na_1,1 1,2\n", "line 2: 3 cells, not 2"),
    "several rows of an image": ("id,rle\na_1,1 1\na_1,5 1\n", "a_1.png has 2 rows of class mask"),
    "text of UTF-16": ("id,rle\na_1,1 1\n".encode("utf-16"), "line 1: no csv: text in UTF-16"),
    "a quote that stays open": ('id,rle\na_1,"1 1\n', "line 2: unexpected end of data"),
    "boxes": ("id,rle\na_1,0.5 0 0 9 9\n", "line 2: '0.5' is no number: no run-length code"),
    "a code in base64": (
        "id,rle\na_1,1 1\nb_2,0 1.0 eNoLTDAw\n",
        "line 3: '1.0' is no number: no run-length code, and no other is written",
    ),
    "a relative code": (
        "id,rle\na_1,-1\nb_2,387620 23 996 33 986 43\n",
        "line 3: start 996 behind 387620: a relative code, which is not written, or runs that are "
        "not sorted",
    ),
    "several rows of relative codes": (
        "id,rle\na_1,387620 23 996 33\na_1,7620 23 96 33\n",
        "line 2: start 996 behind 387620: a relative code",
    ),
    "no rows": ("id,rle\n", "line 1: 'id,rle': no header and rows"),
    "a row of its own kind": (
        "id,rle\na_1_x,1 1\na_1_y,1 1\nb_2,1 1\n",
        "line 4: names no class: b_2,1 1; expected one of x, y",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_sample_is_refused_with_its_line_for(case: str, tmp_path: Path) -> None:
    text, message = REFUSED[case]
    sample, images = draw(tmp_path, "salt")
    sample.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        propose(sample, images)
    assert message in str(error.value)
    assert str(sample) in str(error.value)
