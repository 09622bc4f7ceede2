"""Images: any file of a strip becomes the same grey pixels, or is refused by its name."""

import contextlib
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import SMALL, draw_image, encode_image, fail_once, save_image

from kernel.competition import SEVERSTAL, Competition
from kernel.images import (
    _check_whole,
    check_kinds,
    image_to_tensor,
    pad_to_multiple,
    read_image,
    read_strip,
)

# --- what is read ---------------------------------------------------------------------------------


def test_a_grey_png_is_read_as_it_is(tmp_path: Path) -> None:
    image = draw_image(0)
    save_image(tmp_path / "grey.png", image)
    found = read_image(tmp_path / "grey.png", SEVERSTAL)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, image)


def test_a_three_channel_jpeg_is_read_as_grey(tmp_path: Path) -> None:
    path = tmp_path / "strip.jpg"
    cv2.imwrite(str(path), cv2.merge([draw_image(0)] * 3))
    found = read_image(path, SEVERSTAL)
    assert found.shape == SMALL
    assert found.dtype == np.uint8
    with PIL.Image.open(path) as opened:
        assert opened.mode == "RGB"
        assert np.abs(found - np.asarray(opened.convert("L"), int)).max() <= 1


def test_a_coloured_png_becomes_its_luminance(tmp_path: Path) -> None:
    colours = np.zeros((2, 3, 3), np.uint8)
    colours[:, 0, 2], colours[:, 1, 1], colours[:, 2, 0] = 200, 200, 200  # BGR: red, green, blue
    save_image(tmp_path / "colours.png", colours)
    found = read_image(tmp_path / "colours.png", SEVERSTAL)
    assert np.abs(found - np.array([60.0, 117.0, 23.0])).max() <= 1  # 0.299, 0.587, 0.114 of 200


SMOOTH = cv2.GaussianBlur(draw_image(9), (0, 0), 4)
ODD: dict[str, tuple[Callable[[Path], object], int]] = {  # and by how much a grey may differ
    "PNG named .jpg": (lambda path: save_image(path, SMOOTH), 0),
    "BMP named .jpg": (lambda path: path.write_bytes(encode_image(".bmp", SMOOTH)), 0),
    "RGBA": (lambda path: save_image(path, cv2.cvtColor(SMOOTH, cv2.COLOR_GRAY2BGRA)), 1),
    "CMYK": (lambda path: PIL.Image.fromarray(SMOOTH).convert("CMYK").save(path, "JPEG"), 6),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_file_has_the_greys_of_the_plain_one(case: str, tmp_path: Path) -> None:
    write, tolerance = ODD[case]
    write(tmp_path / "odd.jpg")
    found = read_image(tmp_path / "odd.jpg", SEVERSTAL)
    assert found.dtype == np.uint8
    assert SMOOTH.std() > 20
    assert np.abs(found.astype(int) - SMOOTH).max() <= tolerance


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colours_beside_an_alpha_channel_are_those_that_are_stored(
    suffix: str, channels: int, tmp_path: Path
) -> None:
    stored = np.dstack([SMOOTH, SMOOTH.T[:64, :64].repeat(2, 1)[:, :96], 255 - SMOOTH, SMOOTH // 2])
    path = tmp_path / f"a{suffix}"
    PIL.Image.fromarray(stored).save(path)
    found = read_image(path, replace(SEVERSTAL, channels=channels))
    plain = PIL.Image.fromarray(stored[..., :3])
    expected = np.asarray(plain if channels == 3 else plain.convert("L"), int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (channels == 1)


@pytest.mark.parametrize("name", ["a strip.png", "Stahl-Bänder_№1.png", "鋼.png"])
def test_a_name_with_spaces_and_foreign_letters_is_read(name: str, tmp_path: Path) -> None:
    save_image(tmp_path / name, draw_image(0))
    np.testing.assert_array_equal(read_image(tmp_path / name, SEVERSTAL), draw_image(0))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_stored_pixels_are_read_whatever_exif_says(orientation: int, tmp_path: Path) -> None:
    picture = PIL.Image.fromarray(draw_image(2))
    exif = picture.getexif()
    exif[0x112] = orientation
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    stored = np.asarray(PIL.Image.open(tmp_path / "a.jpg"))
    image = read_image(tmp_path / "a.jpg", SEVERSTAL)
    assert image.shape == (64, 96)
    np.testing.assert_array_equal(image, stored)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"no image at all, only text", b"\xff\xd8\xff\xe0"])
def test_bytes_that_are_no_image_are_refused_by_name(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"bad\.jpg: {len(data)} bytes that are no image"):
        read_image(path, SEVERSTAL)


def test_a_missing_image_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "gone.jpg", SEVERSTAL)


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        read_image(tmp_path, SEVERSTAL)


def test_a_huge_image_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 × 20,000 in 50 kB: decoded it would be 400 MB."""
    PIL.Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="400000000 pixels"):
        read_image(tmp_path / "huge.png", SEVERSTAL)


def test_a_strip_that_cannot_be_read_carries_the_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"")
    strip = read_strip(tmp_path, "bad.jpg", SEVERSTAL)
    assert (strip.name, strip.image) == ("bad.jpg", None)
    assert "0 bytes that are no image" in strip.fault


def test_a_decoder_that_runs_out_of_memory_leaves_a_reason_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object) -> None:
        raise MemoryError

    (tmp_path / "a.jpg").touch()
    monkeypatch.setattr("kernel.images.decode_image", decode)
    assert read_strip(tmp_path, "a.jpg", SEVERSTAL).fault == "MemoryError()"


def test_two_files_are_decoded_at_once_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are read at once: large ones would take the memory."""
    three = threading.Barrier(3)

    def decode(*_: object) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            three.wait(timeout=0.3)
            raise MemoryError("three at once")

    monkeypatch.setattr("kernel.images.decode_image", decode)
    names = [f"{number}.jpg" for number in range(6)]
    for name in names:
        (tmp_path / name).touch()
    with ThreadPoolExecutor(len(names)) as pool:
        strips = pool.map(lambda name: read_strip(tmp_path, name, SEVERSTAL), names)
    assert not any(strip.fault for strip in strips)


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_other_files_that_break_off_are_refused_whatever_opencv_makes_of_them(suffix: str) -> None:
    """Some versions of OpenCV refuse them, others fill them up."""
    data = encode_image(suffix, draw_image(1))
    _check_whole(data, False)
    with pytest.raises(ValueError, match="damaged: image file is truncated"):
        _check_whole(data[: len(data) // 2], False)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_png_that_breaks_off_is_refused(share: float, tmp_path: Path) -> None:
    data = encode_image(".png", draw_image(1))
    (tmp_path / "a.jpg").write_bytes(data)
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", SEVERSTAL), draw_image(1))
    (tmp_path / "a.jpg").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"a\.jpg: "):
        read_image(tmp_path / "a.jpg", SEVERSTAL)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_tiff_that_is_to_be_shown_turned_is_refused(orientation: int, tmp_path: Path) -> None:
    pixels = PIL.Image.fromarray(draw_image(1))
    pixels.save(tmp_path / "a.jpg", "TIFF", tiffinfo={0x112: orientation})
    if orientation == 1:
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", SEVERSTAL), draw_image(1))
        return
    with pytest.raises(ValueError, match=r"a\.jpg: a TIFF that is to be shown turned"):
        read_image(tmp_path / "a.jpg", SEVERSTAL)


def test_a_tiff_of_16_bits_whose_colours_lie_apart_is_refused(tmp_path: Path) -> None:
    shades = np.dstack([draw_image(seed) for seed in range(3)]).astype(np.uint16) * 257
    data, together = encode_image(".tif", shades), struct.pack("<HHIHH", 284, 3, 1, 1, 0)
    (tmp_path / "a.tif").write_bytes(data)
    colour = replace(SEVERSTAL, channels=3, bits=16)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", colour)[..., ::-1], shades)
    assert data.count(together) == 1
    apart = data.replace(together, struct.pack("<HHIHH", 284, 3, 1, 2, 0))
    (tmp_path / "a.tif").write_bytes(apart)
    with pytest.raises(ValueError, match=r"a\.tif: a TIFF of 16 bits whose colours lie apart"):
        read_image(tmp_path / "a.tif", colour)


# --- padding --------------------------------------------------------------------------------------


def test_an_image_that_fits_is_not_padded() -> None:
    images = torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pad_to_multiple(images, 32), images)


def test_padding_repeats_the_last_row_and_column() -> None:
    image = draw_image(8, (6, 10))
    padded = pad_to_multiple(torch.from_numpy(image)[None, None].float(), 8)
    expected = np.pad(image, ((0, 2), (0, 6)), mode="edge")
    np.testing.assert_array_equal(padded[0, 0].numpy(), expected)


# --- colour and depth -----------------------------------------------------------------------------

RGB = Competition(channels=3)
DEEP = Competition(bits=16)


def test_a_colour_competitions_images_are_rgb_in_that_order(tmp_path: Path) -> None:
    planes = [draw_image(seed, (8, 12)) for seed in range(3)]
    rgb = np.dstack(planes)
    PIL.Image.fromarray(rgb).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", RGB), rgb)
    tensor = image_to_tensor(read_image(tmp_path / "a.png", RGB))
    assert tensor.shape == (1, 3, 8, 12)
    np.testing.assert_array_equal(tensor[0].numpy(), np.float32(np.stack(planes)) / np.float32(255))


def test_16_bits_are_scaled_by_their_type_and_not_by_what_they_hold(tmp_path: Path) -> None:
    deep = draw_image(0, (8, 12)).astype(np.uint16) * 7
    PIL.Image.fromarray(deep).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", DEEP)
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, deep)
    tensor = image_to_tensor(image)
    np.testing.assert_allclose(tensor[0, 0].numpy(), deep / 65535, rtol=1e-6)


GREY = draw_image(0, (8, 12))
COLOURS = np.dstack([draw_image(seed, (8, 12)) for seed in range(3)])
TINTED = np.dstack([GREY, np.clip(GREY, 8, 255) - 8, GREY])  # as a JPEG may
DEEP_GREY = GREY.astype(np.uint16) * 257
KINDS: dict[str, tuple[np.ndarray, Competition, str]] = {
    "grey": (GREY, Competition(), ""),
    "grey in three channels": (np.dstack([GREY] * 3), Competition(), ""),
    "grey, with a mask of what is opaque": (
        np.dstack([GREY, GREY, GREY, np.full_like(GREY, 255)]),
        Competition(),
        "",
    ),
    "all but grey": (TINTED, Competition(), ""),
    "colour": (COLOURS, RGB, ""),
    "a colour file without colours": (np.dstack([GREY] * 3), RGB, ""),
    "16 bits": (DEEP_GREY, DEEP, ""),
    "16 bits in colour": (COLOURS.astype(np.uint16) * 257, Competition(channels=3, bits=16), ""),
    "colour for grey": (COLOURS, Competition(), "in colour, .* says channels 1"),
    "grey for colour": (GREY, RGB, "grey, .* says channels 3"),
    "16 bits for 8": (DEEP_GREY, Competition(), "of 16 bits, .* says bits 8"),
    "8 bits for 16": (GREY, DEEP, "of 8 bits, .* says bits 16"),
    "floats for 8": (GREY.astype(np.float32), Competition(), "of float32, .* says bits 8"),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_look_at_the_images_tells_another_colour_or_depth(case: str, tmp_path: Path) -> None:
    image, competition, fault = KINDS[case]
    names = [f"{number:02}.tif" for number in range(40)]
    for name in names[:-2]:
        cv2.imwrite(str(tmp_path / name), image)
    (tmp_path / names[-1]).write_text("no image: the run names it")
    if fault:
        with pytest.raises(ValueError, match=rf"00\.tif: {fault}: correct it there"):
            check_kinds(tmp_path, names, competition)
    else:
        check_kinds(tmp_path, names, competition)


@pytest.mark.parametrize(
    ("competition", "words"),
    [(RGB, "a.png is grey, its competition.json says channels 3"), (DEEP, "of 8 bits, its comp")],
)
def test_another_colour_or_depth_than_said_is_named_once_and_read_all_the_same(
    competition: Competition,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("kernel.images._LOGGED", set())
    grey = draw_image(0, (8, 12))
    for name in ("a.png", "b.png"):
        save_image(tmp_path / name, grey)
        tensor = image_to_tensor(read_image(tmp_path / name, competition))
        np.testing.assert_allclose(tensor[0, -1].numpy(), grey / 255, rtol=1e-6)
    [message] = caplog.messages
    assert words in message


def test_a_colour_jpeg_that_is_cut_is_refused(tmp_path: Path) -> None:
    data = encode_image(".jpg", np.dstack([draw_image(seed) for seed in range(3)]))
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    with pytest.raises(ValueError, match=r"a\.jpg: a JPEG"):
        read_image(tmp_path / "a.jpg", RGB)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_16_bits_where_the_competition_has_8_are_refused_whatever_their_values(
    bits: int, tmp_path: Path
) -> None:
    save_image(tmp_path / "a.png", draw_image(3).astype(np.uint16) << (bits - 8))
    strip = read_strip(tmp_path, "a.png", SEVERSTAL)
    assert strip.image is None
    told = 'a.png: of 16 bits, its competition.json says bits 8: write "bits": 16 there'
    assert strip.fault == f"{tmp_path}/{told}"


def test_a_strip_that_cannot_be_read_for_a_moment_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_image(tmp_path / "a.png", draw_image(0))
    fail_once(monkeypatch, Path, "read_bytes", tmp_path / "a.png")
    strip = read_strip(tmp_path, "a.png", SEVERSTAL)
    assert strip.image is not None and not strip.fault
