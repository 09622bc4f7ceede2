"""The manifest: what a bundle says of itself is read as it stands, or refused by its path."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, tiny_entry, tiny_model, write_manifest

from kernel.faults import MAX_LINE, one_line
from kernel.manifest import Manifest, MemberSpec, load_manifest


def member(**changes: Any) -> dict[str, Any]:
    return tiny_entry("one", tiny_model()) | changes


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in member().items() if name != key}


FAULTS: dict[str, tuple[dict[str, Any], str]] = {  # changes of a sound manifest
    "a later format": ({"format": 2}, "format 2, this kernel reads format 1"),
    "a misspelt field": ({"treshold": 0.5}, "'treshold'; the nearest is threshold"),
    "a misspelt field of a member": (
        {"members": [member(sha="")]},
        "member one: unknown field 'sha'; the nearest is",
    ),
    "a member without a file": ({"members": [without("file")]}, "member one: lacks file"),
    "members that are no list": ({"members": 5}, "members 5, expected a list"),
    "a member that is no object": ({"members": ["one"]}, "member 'one', expected an object"),
    "a member without a name": ({"members": [member(name=" ")]}, "names and files .*text"),
    "two members of one file": (
        {"members": [member(), member(name="two")]},
        "two members share 'one.safetensors'",
    ),
    "classes that are not the competition's": ({"classes": 3}, "classes 3, .* has 4"),
    "a threshold as text": ({"threshold": "0.5"}, "threshold '0.5', expected a number"),
    "a threshold of true": ({"threshold": True}, "threshold True, expected a number"),
    "a negative min_area": ({"min_area": -1}, "min_area -1, expected a whole number from 0"),
    "no flips": ({"flips": []}, r"flips \(\), expected some of"),
    "flips that are no list": ({"flips": "none"}, "flips 'none', expected a list"),
    "a flip twice": ({"flips": ["none", "none"]}, "flips .*each once"),
    "a size of one side": ({"image_size": [256]}, "image_size .*height, width"),
    "empty_rows as text": ({"empty_rows": "no"}, "empty_rows 'no', expected true, false"),
    "a min_area of all pixels": ({"min_area": 409_600}, "min_area 409600, .* from 0 to 409599"),
    "no competition": ({"competition": ""}, "competition '', expected a slug"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_manifest_is_refused_for(case: str, tmp_path: Path) -> None:
    changes, message = FAULTS[case]
    write_manifest(tmp_path, **{"members": [member()], **changes})
    with pytest.raises(ValueError, match=message) as error:
        load_manifest(tmp_path)
    assert str(tmp_path / "ensemble.json") in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '"text"', "null", "{}"])
def test_a_file_that_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"ensemble\.json: (the manifest: lacks members|no JSON)"):
        load_manifest(tmp_path)


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text('{"threshold": 0.5, "threshold": 0.6, "members": []}')
    with pytest.raises(ValueError, match=r"ensemble\.json: no JSON.*'threshold' is there 2 times"):
        load_manifest(tmp_path)


def test_a_manifest_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    write_manifest(tmp_path, [member()])
    path = tmp_path / "ensemble.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_manifest(tmp_path).members == [MemberSpec(**member())]


def test_a_missing_manifest_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file; build the bundle with build_kernel\.py"):
        load_manifest(tmp_path)


def test_a_whole_manifest_is_read_as_it_stands(tmp_path: Path) -> None:
    write_manifest(tmp_path, [member()], threshold=0.3, min_area=7, flips=["both"])
    manifest = load_manifest(tmp_path)
    assert (manifest.threshold, manifest.min_area, manifest.flips) == (0.3, 7, ("both",))
    assert manifest.image_size == SMALL
    assert manifest.members == [MemberSpec(**member())]
    assert manifest.members[0].gated
    assert not MemberSpec("x", "x", tiny_model(presence=False), [0], [1]).gated


# --- one member -----------------------------------------------------------------------------------


def model(**changes: Any) -> dict[str, Any]:
    return tiny_model() | changes


def with_aux(**changes: Any) -> dict[str, Any]:
    return tiny_model() | {"aux_params": tiny_model()["aux_params"] | changes}


MEMBER_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another folder": ({"file": "x/one.safetensors"}, "is not beside the manifest"),
    "a sha256 that is no text": ({"sha256": 5}, "sha256 5, expected 64 hexadecimal digits"),
    "a word for a sha256": ({"sha256": "none"}, "sha256 'none', expected 64 hexadecimal digits"),
    "a size of one side": ({"image_size": [256]}, "image_size .*height, width"),
    "flops of one half": ({"flops": [1]}, "flops .*encoder's and its decoder's"),
    "no flops": ({"flops": [0, 1]}, "flops .*encoder's and its decoder's"),
    "no architecture": ({"model": {"encoder_name": "resnet34"}}, "lacks arch or encoder_name"),
    "an architecture of null": ({"model": model(arch=None)}, "model's arch None, expected text"),
    "an activation": (
        {"model": model(activation="softmax2d")},
        "model's activation 'softmax2d': .*; remove it where .* through a sigmoid, else train it",
    ),
    "an activation of gates": (
        {"model": with_aux(activation="sigmoid")},
        "aux_params's activation 'sigmoid'",
    ),
    "gates of other classes": ({"model": with_aux(classes=5)}, "aux_params's classes 5, .* 4"),
    "other outputs": (
        {"model": tiny_model(presence=False) | {"classes": 5}},
        "say with `channels`",
    ),
    "a channel that is not there": ({"channels": [0, 1, 2, 4]}, "4 different of 0 to 3"),
    "a channel twice": ({"channels": [0, 1, 2, 2]}, "4 different of 0 to 3"),
    "a mean of three channels": ({"mean": [0.3] * 3}, "mean .* for 1 channels"),
    "a mean of NaN": ({"mean": [float("nan")]}, "mean .* for 1 channels"),
    "a mean of 0-255": ({"mean": [87.5]}, r"divide by 255, \[0\.3431\]"),
    "a negative mean": ({"mean": [-0.1]}, "expected a mean from 0, a std above 0"),
    "a std of 0": ({"std": [0.0]}, "expected a mean from 0, a std above 0"),
}


@pytest.mark.parametrize("case", MEMBER_FAULTS)
def test_a_member_is_refused_by_its_name_for(case: str, tmp_path: Path) -> None:
    changes, message = MEMBER_FAULTS[case]
    write_manifest(tmp_path, [member(**changes)])
    with pytest.raises(ValueError, match=rf"ensemble\.json: member one: .*{message}"):
        load_manifest(tmp_path)


def test_a_member_of_other_outputs_says_which_are_the_classes(tmp_path: Path) -> None:
    background = tiny_model(presence=False) | {"classes": 5}
    entry = member(model=background, channels=[1, 2, 3, 4], image_size=[128, 800])
    write_manifest(tmp_path, [entry])
    [found] = load_manifest(tmp_path).members
    assert (found.channels, found.image_size) == ([1, 2, 3, 4], (128, 800))


# --- values that are too long to show -------------------------------------------------------------

LONG = {"a long text": "x" * 1_000_000, "a long list": [7.5] * 10_000}
FIELDS = [("", each.name) for each in fields(Manifest)]
FIELDS += [("member", each.name) for each in fields(MemberSpec)]
FIELDS += [("model", name) for name in ("arch", "classes", "in_channels", "activation")]


@pytest.mark.parametrize("value", LONG)
@pytest.mark.parametrize(("where", "name"), FIELDS)
def test_a_long_value_is_cut_in_the_line_that_refuses_it(
    where: str, name: str, value: str, tmp_path: Path
) -> None:
    changes = {name: LONG[value]}
    entry = {"member": member(**changes), "model": member(model=model(**changes))}.get(where)
    entries: dict[str, Any] = {"members": [entry or member()], **({} if entry else changes)}
    write_manifest(tmp_path, **entries)
    try:
        load_manifest(tmp_path)
    except ValueError as error:
        line = one_line(error)
        assert len(line) < MAX_LINE, line
        assert str(tmp_path) in line and name.removesuffix("s") in line
        assert "xxx" in line or "7.5, " in line
    else:
        assert (where, name, value) in [
            ("", "competition", "a long text"),
            ("model", "arch", "a long text"),  # SMP's to refuse
        ]


@pytest.mark.parametrize(
    "entries", [{"x" * 1_000_000: 1}, {"members": [member(**{"y" * 10**6: 1})]}]
)
def test_a_long_name_of_a_field_is_cut(entries: dict[str, Any], tmp_path: Path) -> None:
    write_manifest(tmp_path, **{"members": [member()], **entries})
    with pytest.raises(ValueError, match=r"unknown field '(xxx|yyy)") as error:
        load_manifest(tmp_path)
    assert len(str(error.value)) < MAX_LINE
