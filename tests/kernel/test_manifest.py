"""The manifest: what a bundle says of itself is read as it stands, or refused by its path."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, fail_once, tiny_entry, tiny_model, write_manifest

from kernel.competition import SEVERSTAL
from kernel.faults import MAX_LINE, one_line
from kernel.images import Size
from kernel.manifest import Manifest, MemberSpec, load_manifest, manifest_entries, source_entry


def member(**changes: Any) -> dict[str, Any]:
    return tiny_entry("one", tiny_model()) | changes


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in member().items() if name != key}


ALL_FLIPS = "['none', 'horizontal', 'vertical', 'both']"
FIELDS = "members, classes, threshold, min_area, flips, image_size, empty_rows, competition, format"
AREA = "expected a whole number from 0 to 409599, or a list of 4, one a class"
SIDES = "expected [height, width], whole numbers from 1 to 65,535"
FAULTS: dict[str, tuple[dict[str, Any], str]] = {  # changes of a sound manifest
    "a later format": ({"format": 2}, "format 2, this kernel reads format 1"),
    "a misspelt field": (
        {"treshold": 0.5},
        "the manifest: unknown field 'treshold'; the nearest is threshold",
    ),
    "a field in capitals": (
        {"THRESHOLD": 0.5},
        "the manifest: unknown field 'THRESHOLD'; the nearest is threshold",
    ),
    "a field like no other": (
        {"xyz": 1},
        f"the manifest: unknown field 'xyz'; known are {FIELDS}",
    ),
    "a misspelt field of a member": (
        {"members": [member(sha="")]},
        "member one: unknown field 'sha'; the nearest is sha256",
    ),
    "a member without a file": ({"members": [without("file")]}, "member one: lacks file"),
    "no members": ({"members": []}, "no members; list them under `members`"),
    "members that are no list": ({"members": 5}, "members 5, expected a list"),
    "a member that is no object": ({"members": ["one"]}, "member 'one', expected an object"),
    "a member without a name": (
        {"members": [member(name=" ")]},
        "names and files [' '], expected text of at most 100 characters",
    ),
    "flops that are no list": (
        {"members": [member(flops=5)]},
        "member one: flops 5, expected two numbers",
    ),
    "two members of one name": (
        {"members": [member(), member(file="two")]},
        "two members named 'one'; rename one",
    ),
    "two members of one file": (
        {"members": [member(), member(name="two")]},
        "two members share 'one.safetensors'; rename one",
    ),
    "two files of one name where case is ignored": (
        {"members": [member(), member(name="two", file="One.safetensors")]},
        "two members share 'one.safetensors' and 'One.safetensors'; rename one",
    ),
    "two files of one name in other bytes": (
        {"members": [member(file="é"), member(name="two", file="e\u0301")]},
        "two members share 'é' and 'e\u0301'; rename one",
    ),
    "classes as text": ({"classes": "4"}, "classes '4', expected a whole number"),
    "classes that are not the competition's": (
        {"classes": 3},
        "classes 3, the competition has 4; a member with other outputs says with `channels` which "
        "of them are the classes, in order",
    ),
    "a threshold as text": (
        {"threshold": "0.5"},
        "threshold '0.5', expected a number between 0 and 1",
    ),
    "a threshold of true": (
        {"threshold": True},
        "threshold True, expected a number between 0 and 1",
    ),
    "a threshold of 0": ({"threshold": 0}, "threshold 0, expected a number between 0 and 1"),
    "a threshold of 1": ({"threshold": 1}, "threshold 1, expected a number between 0 and 1"),
    "a threshold a class": (
        {"threshold": [0.5, 0.6]},
        "threshold [0.5, 0.6], expected a number between 0 and 1, one for all classes; to move a "
        "single class set its mask_shift, as docs/checkpoints.md says",
    ),
    "a min_area for two of four classes": ({"min_area": [9, 99]}, f"min_area [9, 99], {AREA}"),
    "a min_area for no class": ({"min_area": []}, f"min_area [], {AREA}"),
    "a negative min_area": ({"min_area": -1}, f"min_area -1, {AREA}"),
    "a negative min_area of a class": (
        {"min_area": [9, 9, -1, 9]},
        f"min_area [9, 9, -1, 9], {AREA}",
    ),
    "a min_area as text": ({"min_area": "9"}, f"min_area '9', {AREA}"),
    "a min_area of a class as text": (
        {"min_area": [9, "9", 9, 9]},
        f"min_area [9, '9', 9, 9], {AREA}",
    ),
    "a min_area of a class that is no whole number": (
        {"min_area": [9, 9, 9, 9.5]},
        f"min_area [9, 9, 9, 9.5], {AREA}",
    ),
    "a min_area of true": ({"min_area": True}, f"min_area True, {AREA}"),
    "a min_area of all pixels": ({"min_area": 409_600}, f"min_area 409600, {AREA}"),
    "a min_area of all pixels of a class": (
        {"min_area": [0, 409_600, 0, 0]},
        f"min_area [0, 409600, 0, 0], {AREA}",
    ),
    "no flips": ({"flips": []}, f"flips (), expected some of {ALL_FLIPS}"),
    "flips that are no list": ({"flips": "none"}, f"flips 'none', expected a list of {ALL_FLIPS}"),
    "flips that are no text": (
        {"flips": ["none", 1]},
        f"flips ('none', 1), expected some of {ALL_FLIPS}",
    ),
    "a flip twice": (
        {"flips": ["none", "none"]},
        f"flips ['none', 'none'], expected some of {ALL_FLIPS}, each once",
    ),
    "an unknown flip": (
        {"flips": ["none", "up"]},
        f"flips ['none', 'up'], expected some of {ALL_FLIPS}, each once",
    ),
    "a size of one side": ({"image_size": [256]}, f"image_size (256,), {SIDES}"),
    "a size of no rows": ({"image_size": [0, 9]}, f"image_size (0, 9), {SIDES}"),
    "empty_rows as text": ({"empty_rows": "no"}, "empty_rows 'no', expected true, false"),
    "no competition": ({"competition": ""}, "competition '', expected a slug"),
    "the name of Severstal's description": (
        {"competition": "severstal"},
        "competition severstal is a name for --competition; its slug is "
        "severstal-steel-defect-detection: write that",
    ),
    "the name of another's": (
        {"competition": "clouds"},
        "competition clouds is a name for --competition; its slug is "
        "understanding_cloud_organization: write that",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_manifest_is_refused_for(case: str, tmp_path: Path) -> None:
    changes, message = FAULTS[case]
    write_manifest(tmp_path, **{"members": [member()], **changes})
    with pytest.raises(ValueError) as error:
        load_manifest(tmp_path)
    assert str(error.value) == f"{tmp_path / 'ensemble.json'}: {message}"


def test_values_at_the_edge_of_a_rule_are_read(tmp_path: Path) -> None:
    edge = member(mean=[0.0], std=[1.0], flops=[1, 1], sha256="aB" * 32, image_size=[1, 1])
    changes = {"threshold": 0.001, "min_area": 409_599, "image_size": [1, 9]}
    write_manifest(tmp_path, [edge], flips=["both"], **changes)
    assert load_manifest(tmp_path).min_area == 409_599
    write_manifest(tmp_path, [edge], min_area=[0, 600, 1000, 409_599])
    assert load_manifest(tmp_path).min_areas == [0, 600, 1000, 409_599]


@pytest.mark.parametrize(
    ("images", "size", "fits"),
    [
        ((256, 1600), (1600, 256), False),
        ((256, 1600), (800, 128), False),  # half, as OpenCV has it
        ((256, 1600), (800, 120), True),  # 6 % from it: meant so
        ((1400, 2100), (525, 350), False),
        ((1400, 2100), (544, 352), False),  # of multiples of 32
        ((1400, 2100), (350, 525), True),
        ((1400, 2100), (512, 512), True),
        ((101, 101), (101, 101), True),
        ((100, 104), (104, 104), True),
        ((1000, 1024), (544, 512), True),
        ((1000, 1024), (512, 500), False),
        ((1918, 1280), (640, 960), False),  # images that are high
    ],
)
def test_a_size_in_the_proportion_of_the_images_the_other_way_round_is_refused(
    images: Size, size: Size, fits: bool, tmp_path: Path
) -> None:
    described = json.dumps({"slug": "mine", "image_size": images})
    (tmp_path / "competition.json").write_text(described)
    path = tmp_path / "ensemble.json"
    for entries in (
        {"members": [member()], "image_size": size},
        {"members": [member(image_size=size)]},
    ):
        path.write_text(json.dumps(entries))
        if fits:
            load_manifest(tmp_path)
            continue
        height, width = size
        words = rf"the images of mine are .*, \[height, width\]: write \[{width}, {height}\]"
        with pytest.raises(ValueError, match=words):
            load_manifest(tmp_path)


def test_what_a_manifest_leaves_out_is_its_competitions(tmp_path: Path) -> None:
    path = tmp_path / "ensemble.json"
    path.write_text(json.dumps({"members": [member()]}))
    assert load_manifest(tmp_path) == Manifest(
        [MemberSpec(**member())], 4, 0.55, 0, ("none", "horizontal", "vertical"), None, True
    )
    (tmp_path / "competition.json").write_text('{"slug": "mine", "classes": ["a", "b"]}')
    two = tiny_model() | {"classes": 2, "aux_params": {"classes": 2}}
    path.write_text(json.dumps({"members": [member(model=two)], "min_area": 10**9}))
    manifest = load_manifest(tmp_path)  # images of no known size: an area of any
    assert (manifest.classes, manifest.competition.slug) == (2, "mine")
    path.write_text(json.dumps({"members": [member(model=two)], "competition": "yours"}))
    with pytest.raises(ValueError) as error:
        load_manifest(tmp_path)
    said = "competition 'yours', its description is of 'mine': make them agree"
    assert str(error.value) == f"{path}: {said}"


def test_a_bundle_for_a_copy_of_severstal_keeps_its_slug(tmp_path: Path) -> None:
    write_manifest(tmp_path, [member()], competition="my-copy")
    manifest = load_manifest(tmp_path)
    assert manifest.competition == replace(SEVERSTAL, slug="my-copy")
    assert manifest_entries(manifest)["competition"] == "my-copy"


def test_an_entry_to_build_of_lacks_what_a_build_fills_in_and_what_is_nothing() -> None:
    own = member(mask_shift=1.5, gate_shift=[0.0, -1.0, 0.0, 0.0], channels=[0, 1, 2, 3])
    spec = MemberSpec(**own, sha256="0" * 64, flops=[5, 7])
    assert source_entry(asdict(spec)) == own
    assert source_entry({"flops": [5, 7], "unknown": 1}) == {}


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


def test_a_manifest_that_cannot_be_read_for_a_moment_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(tmp_path, [member()])
    fail_once(monkeypatch, Path, "read_text", tmp_path / "ensemble.json")
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
    assert manifest.min_areas == [7, 7, 7, 7]
    assert not MemberSpec("x", "x", tiny_model(presence=False), [0], [1]).gated


# --- one member -----------------------------------------------------------------------------------


def model(**changes: Any) -> dict[str, Any]:
    return tiny_model() | changes


PLAIN = tiny_model(presence=False)


def no_model(key: str) -> dict[str, Any]:
    return {name: value for name, value in PLAIN.items() if name != key}


def with_aux(**changes: Any) -> dict[str, Any]:
    return tiny_model() | {"aux_params": tiny_model()["aux_params"] | changes}


GIVES_LOGITS = (
    ", so a packed network gives logits; remove it where the network was trained through that, "
    "else train it so"
)
OR_SOFTMAX = ', or a softmax where the member says "softmax": true'
OTHER_OUTPUTS = (
    ", expected 4; with other outputs say with `channels` which are the classes, like "
    '"channels": [1, 2, 3, 4], and where they were trained through one softmax (cross-entropy) '
    '"softmax": true'
)
HALVES = "expected its encoder's and its decoder's"
MEMBER_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another folder": (
        {"file": "x/one.safetensors"},
        "file 'x/one.safetensors' is not beside the manifest",
    ),
    "the folder above": ({"file": ".."}, "file '..' is not beside the manifest"),
    "a sha256 that is no text": (
        {"sha256": 5},
        "sha256 5, expected 64 hexadecimal digits, or none",
    ),
    "a word for a sha256": (
        {"sha256": "none"},
        "sha256 'none', expected 64 hexadecimal digits, or none",
    ),
    "a size of one side": ({"image_size": [256]}, f"image_size (256,), {SIDES}"),
    "flops of one half": ({"flops": [1]}, f"flops [1], {HALVES}"),
    "no flops": ({"flops": [0, 1]}, f"flops [0, 1], {HALVES}"),
    "flops that are no number": ({"flops": [1, True]}, f"flops [1, True], {HALVES}"),
    "a model that is none": ({"model": "Unet"}, "model 'Unet' lacks arch or encoder_name"),
    "no architecture": (
        {"model": {"encoder_name": "resnet34"}},
        "model {'encoder_name': 'resnet34'} lacks arch or encoder_name",
    ),
    "an architecture of null": ({"model": model(arch=None)}, "model's arch None, expected text"),
    "an encoder of 5": ({"model": model(encoder_name=5)}, "model's encoder_name 5, expected text"),
    "gates that are a list": (
        {"model": model(aux_params=[4])},
        "model's aux_params [4], expected an object or null",
    ),
    "no outputs": ({"model": model(classes=0)}, "model's classes 0, expected a whole number"),
    "no inputs": (
        {"model": model(in_channels=0)},
        "model's in_channels 0, expected a whole number",
    ),
    "inputs that are text": (
        {"model": model(in_channels="1")},
        "model's in_channels '1', expected a whole number",
    ),
    "gates of no number": (
        {"model": with_aux(classes=4.0)},
        "aux_params's classes 4.0, expected a whole number",
    ),
    "an activation": (
        {"model": model(activation="softmax2d")},
        f"model's activation 'softmax2d': the kernel applies the sigmoid{OR_SOFTMAX}{GIVES_LOGITS}",
    ),
    "an activation of gates": (
        {"model": with_aux(activation="sigmoid")},
        f"aux_params's activation 'sigmoid': the kernel applies the sigmoid{GIVES_LOGITS}",
    ),
    "gates of other classes": (
        {"model": with_aux(classes=5)},
        "aux_params's classes 5, the model's are 4: such a head gates no masks; leave aux_params "
        "out and save the network without classification_head.*",
    ),
    "other outputs": ({"model": PLAIN | {"classes": 5}}, f"model's classes 5{OTHER_OUTPUTS}"),
    "a network of one class": (
        {"model": PLAIN | {"classes": 1}},
        "model's classes 1, expected 4: a member predicts all classes, one of fewer is not packed",
    ),
    "channels of a network of fewer": (
        {"model": PLAIN | {"classes": 3}, "channels": [0, 1, 2, 3]},
        "model's classes 3, expected 4: a member predicts all classes, one of fewer is not packed",
    ),
    "SMP's one output": (
        {"model": no_model("classes")},
        "model's classes 1 where it says nothing, expected 4: a member predicts all classes, one "
        "of fewer is not packed",
    ),
    "a channel that is not there": (
        {"channels": [0, 1, 2, 4]},
        "channels [0, 1, 2, 4], expected 4 different of 0 to 3",
    ),
    "a channel below 0": (
        {"channels": [-1, 1, 2, 3]},
        "channels [-1, 1, 2, 3], expected 4 different of 0 to 3",
    ),
    "a channel twice": (
        {"channels": [0, 1, 2, 2]},
        "channels [0, 1, 2, 2], expected 4 different of 0 to 3",
    ),
    "channels of three classes": (
        {"channels": [0, 1, 2]},
        "channels [0, 1, 2], expected 4 different of 0 to 3",
    ),
    "a softmax in words": ({"softmax": "yes"}, "softmax 'yes', expected true, false"),
    "a softmax that is shifted": (
        {"softmax": True, "mask_shift": [0, 0, 1.5, 0]},
        "mask_shift [0, 0, 1.5, 0] shifts no softmax: set it to 0",
    ),
    "a mean of three channels": (
        {"mean": [0.3] * 3},
        "mean [0.3, 0.3, 0.3], expected as many numbers as model's in_channels: 1",
    ),
    "a mean of two channels": (
        {"model": model(in_channels=2), "mean": [0.3, 0.3]},
        "model's in_channels 2, expected 1 or 3",
    ),
    "a mean of one where SMP takes three": (
        {"model": no_model("in_channels")},
        "mean [0.3], expected as many numbers as model's in_channels: 3 where it says nothing",
    ),
    "a mean of NaN": (
        {"mean": [float("nan")]},
        "mean [nan], expected as many numbers as model's in_channels: 1",
    ),
    "a std that is a number": (
        {"std": 0.2},
        "std 0.2, expected as many numbers as model's in_channels: 1",
    ),
    "a mean of 0-255": (
        {"mean": [87.5]},
        "mean [87.5] of grey in 0-255, expected of [0, 1]: divide by 255, mean [0.3431]",
    ),
    "a dark std of 0-255": (
        {"std": [1.5]},
        "std [1.5] of grey in 0-255, expected of [0, 1]: divide by 255, std [0.005882]",
    ),
    "a mean of 0-255 beside a std of 1": (
        {"mean": [123.675], "std": [1]},
        "mean [123.675], std [1] of grey in 0-255, expected of [0, 1]: divide by 255, "
        "mean [0.485], std [0.003922]",
    ),
    "a negative mean": (
        {"mean": [-0.1]},
        "mean [-0.1], std [0.2]: expected a mean from 0, a std above 0",
    ),
    "a std of 0": ({"std": [0.0]}, "mean [0.3], std [0.0]: expected a mean from 0, a std above 0"),
    "a shift that is text": (
        {"mask_shift": "1"},
        "mask_shift '1', expected a number of logits, or 4",
    ),
    "a shift of NaN": (
        {"gate_shift": [0, 0, 0, float("nan")]},
        "gate_shift [0, 0, 0, nan], expected a number of logits, or 4",
    ),
    "a shift in a list": ({"mask_shift": [1]}, "mask_shift [1], expected a number of logits, or 4"),
    "shifts of three classes": (
        {"gate_shift": [0, 0, 0]},
        "gate_shift [0, 0, 0], expected a number of logits, or 4",
    ),
    "a shift of no gate": (
        {"model": tiny_model(presence=False), "gate_shift": 0.5},
        "gate_shift 0.5: without aux_params there is no presence head",
    ),
    "a padding of today": (
        {"model": model(encoder_name="efficientnet-b1"), "efficientnet_pytorch": "0.7.1"},
        "efficientnet_pytorch '0.7.1', expected 0.6.3 or 0.7.0, as text",
    ),
    "a padding of timm's": (
        {"model": model(encoder_name="timm-efficientnet-b1"), "efficientnet_pytorch": "0.6.3"},
        "efficientnet_pytorch 0.6.3: encoder 'timm-efficientnet-b1' is not of that library, "
        "efficientnet-b0 to -b7 are: leave it out",
    ),
}


@pytest.mark.parametrize("case", MEMBER_FAULTS)
def test_a_member_is_refused_by_its_name_for(case: str, tmp_path: Path) -> None:
    changes, message = MEMBER_FAULTS[case]
    write_manifest(tmp_path, [member(**changes)])
    with pytest.raises(ValueError) as error:
        load_manifest(tmp_path)
    assert str(error.value) == f"{tmp_path / 'ensemble.json'}: member one: {message}"


def test_a_member_of_other_outputs_says_which_are_the_classes(tmp_path: Path) -> None:
    entry = member(model=PLAIN | {"classes": 5}, channels=[1, 2, 3, 4], image_size=[128, 800])
    write_manifest(tmp_path, [entry])
    [found] = load_manifest(tmp_path).members
    assert (found.channels, found.image_size) == ([1, 2, 3, 4], (128, 800))


@pytest.mark.parametrize(("mean", "std", "white"), [(13_107, 655.35, 65_535), (51, 2.55, 255)])
def test_a_mean_beside_16_bits_is_to_be_divided_by_what_it_is_of(
    mean: float, std: float, white: int, tmp_path: Path
) -> None:
    """ImageNet's stays of 0-255, whatever the images hold."""
    (tmp_path / "competition.json").write_text('{"slug": "mine", "bits": 16}')
    deep = member(mean=[mean], std=[std])
    (tmp_path / "ensemble.json").write_text(json.dumps({"members": [deep]}))
    with pytest.raises(ValueError, match=rf"divide by {white}, mean \[0\.2\], std \[0\.01\]"):
        load_manifest(tmp_path)


def test_a_softmax_of_one_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "competition.json").write_text('{"slug": "mine", "classes": ["a"]}')
    one = member(model=PLAIN | {"classes": 1}, softmax=True)
    (tmp_path / "ensemble.json").write_text(json.dumps({"members": [one]}))
    with pytest.raises(ValueError, match=r"member one: softmax over model's classes 1 is 1 every"):
        load_manifest(tmp_path)


# --- values that are too long to show -------------------------------------------------------------

LONG = {"a long text": "x" * 1_000_000, "a long list": [7.5] * 10_000}
LONG_FIELDS = [("", each.name) for each in fields(Manifest)]
LONG_FIELDS += [("member", each.name) for each in fields(MemberSpec)]
LONG_FIELDS += [("model", name) for name in ("arch", "classes", "in_channels", "activation")]


@pytest.mark.parametrize("value", LONG)
@pytest.mark.parametrize(("where", "name"), LONG_FIELDS)
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
