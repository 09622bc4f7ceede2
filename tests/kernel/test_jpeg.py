"""Damaged JPEGs: refused, or read with every pixel right, and never a third outcome."""

import io
import os
import re
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.competition import SEVERSTAL
from kernel.images import read_strip
from kernel.jpeg import walk_markers

KINDS = {
    "baseline": [],
    "progressive": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
    "restart markers": [cv2.IMWRITE_JPEG_RST_INTERVAL, 7],
    "optimized": [cv2.IMWRITE_JPEG_OPTIMIZE, 1],
}
FUZZ = int(os.environ.get("FUZZ", "300"))
EOI = b"\xff\xd9"


def grey(seed: int, size: tuple[int, int] = (64, 96), margin: int = 0) -> np.ndarray:
    """Smooth noise, with `margin` black columns at the right, as beside the steel."""
    noise = np.random.default_rng(seed).integers(0, 255, size, np.uint8)
    image = cv2.normalize(
        cv2.GaussianBlur(noise, (0, 0), 2), np.empty(size), 20, 235, cv2.NORM_MINMAX
    )
    image[:, size[1] - margin :] = 0
    return image.astype(np.uint8)


def jpeg(kind: str, colours: int, seed: int = 0, margin: int = 0) -> bytes:
    image = grey(seed, margin=margin)
    pixels = cv2.merge([image] * 3) if colours == 3 else image
    return cv2.imencode(".jpg", pixels, KINDS[kind])[1].tobytes()


def pixels_of(data: bytes) -> np.ndarray:
    """The grey pixels of a whole file, as OpenCV gives them."""
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert decoded is not None
    return decoded


def read(data: bytes, folder: Path) -> np.ndarray | str:
    """The image, or why it was refused."""
    (folder / "a.jpg").write_bytes(data)
    strip = read_strip(folder, "a.jpg", SEVERSTAL)
    return strip.fault if strip.image is None else strip.image


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [0, 1, 3, 1021, 1023, 2048, 65536])
def test_bytes_after_the_end_of_a_jpeg_are_no_damage(
    kind: str, colours: int, padding: int, tmp_path: Path
) -> None:
    data = jpeg(kind, colours)
    np.testing.assert_array_equal(read(data + b"\0" * padding, tmp_path), pixels_of(data))


@pytest.mark.parametrize("kind", KINDS)
def test_a_black_margin_is_no_damage(kind: str, tmp_path: Path) -> None:
    """Where data are missing the last block is flat, and so is it beside the steel."""
    data = jpeg(kind, 3, margin=40)
    image = read(data, tmp_path)
    np.testing.assert_array_equal(image, pixels_of(data))
    assert np.ptp(pixels_of(data)[-8:, -8:]) == 0


jpegs = st.builds(
    jpeg,
    st.sampled_from(list(KINDS)),
    st.sampled_from([1, 3]),
    st.integers(0, 50),
    st.sampled_from([0, 40]),
)


@settings(max_examples=FUZZ)
@given(jpegs, st.floats(0, 1), st.booleans())
def test_a_jpeg_that_is_cut_is_refused_or_loses_no_pixel(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, place: float, closed: bool
) -> None:
    cut = data[: int(place * (len(data) - 2))]
    found = read(cut + EOI if closed else cut, tmp_path_factory.getbasetemp())
    if isinstance(found, str):
        return
    assert closed  # without an end marker it is cut
    np.testing.assert_array_equal(found, pixels_of(data))


def test_a_hole_in_a_baseline_jpeg_is_refused(tmp_path: Path) -> None:
    """Nearly always: where all that follows the hole came out black or white, it is not seen."""
    rng, seen = np.random.default_rng(0), 0
    for seed in range(100):
        data = jpeg("baseline", 1 + 2 * (seed % 2), seed)
        start, length = int(rng.uniform(0.3, 0.9) * len(data)), int(rng.integers(200, 400))
        seen += isinstance(read(data[:start] + data[start + length :], tmp_path), str)
    assert seen >= 97


@settings(max_examples=FUZZ)
@given(jpegs, st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20))
def test_what_pillow_cannot_decode_is_refused_too(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, changes: list[tuple[float, int]]
) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * (len(data) - 1))] = value
    found = read(bytes(damaged), tmp_path_factory.getbasetemp())
    try:
        PIL.Image.open(io.BytesIO(bytes(damaged))).load()
    except (OSError, SyntaxError, ValueError):
        assert isinstance(found, str)


def with_height(data: bytes, height: int) -> bytes:
    """The file with another height in its frame header (ITU T.81, B.2.2)."""
    place = min(data.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data) + 5
    return data[:place] + height.to_bytes(2) + data[place + 2 :]


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("height", [8, 16])
def test_a_header_of_fewer_rows_than_the_data_have_is_refused(
    kind: str, colours: int, height: int, tmp_path: Path
) -> None:
    """It decodes to an image of the upper rows alone, whose run lengths fit no mask."""
    found = read(with_height(jpeg(kind, colours), height), tmp_path)
    assert re.search(
        f"header gives {height} rows and whose data have more|damaged or cut", str(found)
    )


@settings(max_examples=FUZZ)
@given(
    st.sampled_from(list(KINDS)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from(["noise", "smooth", "flat"]),
    st.sampled_from([0x411111, 0x111111, 0x221111, 0x211111, 0]),
    st.integers(5, 100),
    st.integers(0, 99),
)
def test_a_whole_jpeg_of_another_size_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    size: tuple[int, int],
    content: str,
    sampling: int,
    quality: int,
    seed: int,
) -> None:
    image = {"noise": grey(seed, size), "smooth": grey(seed, size) // 9}.get(content)
    image = np.full(size, seed, np.uint8) if image is None else image
    colour = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling] if sampling else []
    pixels = cv2.merge([image, image.T.reshape(size), image]) if sampling else image
    options = [*KINDS[kind], *colour, cv2.IMWRITE_JPEG_QUALITY, quality]
    data = cv2.imencode(".jpg", pixels, options)[1].tobytes()
    np.testing.assert_array_equal(read(data, tmp_path_factory.getbasetemp()), pixels_of(data))


def test_a_missing_restart_interval_is_refused(tmp_path: Path) -> None:
    data = jpeg("restart markers", 1)
    _, ends = walk_markers(data)
    assert len(ends) > 8
    fault = read(data[: ends[2]] + data[ends[3] :], tmp_path)
    assert "damaged or cut" in str(fault)


def test_a_progressive_jpeg_that_lacks_its_last_scans_is_refused(tmp_path: Path) -> None:
    """Each scan that is there is whole: a decoder gives a picture that is only less sharp."""
    data = jpeg("progressive", 1)
    scans = [found.start() for found in re.finditer(b"\xff\xda", data)]
    assert len(scans) > 3
    for scan in scans[1:]:
        assert "damaged or cut" in str(read(data[:scan] + EOI, tmp_path))


@pytest.mark.parametrize("frame", [0xC3, 0xC9, 0xCA])
def test_a_jpeg_of_another_kind_is_named_as_that(frame: int) -> None:
    """Lossless and arithmetic: decoders have them or not, and their data end otherwise."""
    data = jpeg("baseline", 1).replace(b"\xff\xc0", bytes([0xFF, frame]), 1)
    with pytest.raises(ValueError, match=f"frame {frame:X}"):
        walk_markers(data)
