"""What comes from files, drawn at random: a value or a ValueError, nothing else.

`FUZZ=20000 pytest tests/kernel/test_fuzz.py` is `make fuzz`; each failure is kept as an example.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import LAYOUTS, draw_image, encode_image, tiny_entry, tiny_model
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kernel.competition import SEVERSTAL
from kernel.images import read_image
from kernel.manifest import load_manifest
from kernel.rle import decode_rle, encode_rle, rle_fault
from kernel.rows import read_rows
from kernel.submission import Submission
from kernel.task import read_sample
from kernel.tta import FLIPS

CASES = settings(
    max_examples=int(os.environ.get("FUZZ", "300")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# --- run lengths ----------------------------------------------------------------------------------


NUMBERS = st.lists(st.integers(-1, 78), max_size=8).map(lambda each: " ".join(map(str, each)))


@CASES
@given(st.text("0123456789 -+.e\n", max_size=40) | NUMBERS)
@example("1 3 8 2")
@example("5 2 1 2")  # decoded, and refused by Kaggle
@example("1 3 4 2")  # as well
def test_a_code_is_decoded_or_refused(code: str) -> None:
    fault = rle_fault(code, 77, SEVERSTAL)
    try:
        mask = decode_rle(code, (7, 11), SEVERSTAL)
    except ValueError:
        assert fault
        return
    numbers = [int(word) for word in code.split()]
    assert mask.sum() <= sum(numbers[1::2])
    assert mask.any() == bool(numbers)
    if not fault:
        assert [int(word) for word in encode_rle(mask, SEVERSTAL).split()] == numbers


# --- images ---------------------------------------------------------------------------------------

FILES = [encode_image(suffix, draw_image(0, (24, 40))) for suffix in (".jpg", ".png", ".bmp")]


@st.composite
def image_files(draw: st.DrawFn) -> bytes:
    """The bytes of an image, some of them changed, cut out or put in."""
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = start + draw(st.integers(0, 40))
        data[start:end] = draw(st.binary(max_size=8))
    return bytes(data)


@CASES
@given(data=image_files())
@example(data=b"")
@example(data=FILES[0])
def test_an_image_is_read_or_refused_by_its_name(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    try:
        image = read_image(path, SEVERSTAL)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert image.dtype == np.uint8 and image.ndim == 2 and image.size > 0


# --- the sample -----------------------------------------------------------------------------------

HEADERS = ["ImageId_ClassId,EncodedPixels", "ImageId,EncodedPixels,ClassId", "ImageId,ClassId", ""]
CELLS = st.text(st.sampled_from("ab_.,\"'\n\r 01239é\x00\ufeff"), max_size=12)


@st.composite
def samples(draw: st.DrawFn) -> bytes:
    """Something like a sample: mostly a known header, lines of odd cells, at times raw bytes."""
    if draw(st.booleans()):
        lines = [draw(st.sampled_from(HEADERS)), *draw(st.lists(CELLS, max_size=6))]
        return "\n".join(lines).encode(draw(st.sampled_from(["utf-8", "utf-16"])))
    return draw(st.sampled_from(HEADERS)).encode() + b"\n" + draw(st.binary(max_size=60))


@CASES
@given(data=samples())
@example(data=b"")
@example(data=b"\x00")
@example(data=b"ImageId,EncodedPixels,ClassId\na.jpg,,99999999999999999999\n")
@example(data=b"ImageId_ClassId,EncodedPixels\na.jpg_\xff1,\n")
@example(data=b"ImageId_ClassId,EncodedPixels\na\xff.jpg_1,\n")
def test_a_sample_is_read_or_refused_by_its_name(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sample.csv"
    path.write_bytes(data)
    try:
        layout, pairs = read_sample(path, SEVERSTAL)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert layout.columns in [known.columns for known in LAYOUTS.values()] or set(
        layout.columns
    ) in [set(known.columns) for known in LAYOUTS.values()]
    assert all(1 <= label <= 4 for _, label in pairs)
    assert len(set(pairs)) == len(pairs)
    Submission(tmp_path / "out.csv", layout, pairs).save()
    assert [(n, c) for n, c, _ in read_rows(tmp_path / "out.csv", SEVERSTAL).rows] == pairs


# --- the manifest ---------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
KEYS = ["format", "classes", "threshold", "min_area", "flips", "image_size", "members", "x"]
MEMBER_KEYS = ["name", "file", "model", "mean", "std", "sha256", "flops", "x"]


def sound_manifest() -> dict[str, Any]:
    members = [tiny_entry("a", tiny_model("FPN")), tiny_entry("b", tiny_model("Unet"))]
    return {"format": 1, "classes": 4, "members": members, "threshold": 0.55}


@CASES
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2),
    member=st.dictionaries(st.sampled_from(MEMBER_KEYS), VALUES, max_size=2),
)
@example(changes={}, member={})
@example(changes={"threshold": float("nan")}, member={})
@example(changes={"flips": [["none"]]}, member={})
@example(changes={}, member={"mean": [float("nan")]})
@example(changes={}, member={"file": ""})
@example(changes={}, member={"file": ".."})
def test_a_manifest_is_read_or_refused_by_its_path(
    changes: dict[str, Any], member: dict[str, Any], tmp_path: Path
) -> None:
    entries = sound_manifest()
    entries["members"][0] |= member
    path = tmp_path / "ensemble.json"
    path.write_text(json.dumps(entries | changes), encoding="utf-8")
    try:
        manifest = load_manifest(tmp_path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    assert 0 < manifest.threshold < 1
    assert manifest.members and set(manifest.flips) <= set(FLIPS)
    for spec in manifest.members:
        assert "/" not in spec.file and spec.file not in ("", ".", "..")
        assert np.isfinite(spec.mean).all() and np.isfinite(spec.std).all()


@CASES
@given(data=st.binary(max_size=80))
@example(data=b"[" * 100_000)
@example(data=b"\xff\xfe{}")
def test_bytes_that_are_no_manifest_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ensemble.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"ensemble\.json"):
        load_manifest(tmp_path)
