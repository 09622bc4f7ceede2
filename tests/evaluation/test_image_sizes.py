"""The images' size: the usual one, the flops at it, and what members make of it."""

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import SMALL, change_manifest, save_strips, tiny_model

from evaluation.image_sizes import check_sizes, count_again, usual_size
from kernel.competition import SEVERSTAL, Competition
from kernel.manifest import Manifest, MemberSpec, load_manifest


def test_the_usual_size_is_that_of_most_images(tmp_path: Path) -> None:
    names = ["a.jpg", "b.png", "c.png"]
    save_strips(tmp_path, names)
    cv2.imwrite(str(tmp_path / "b.png"), np.zeros((5, 7, 3), np.uint16))
    assert usual_size(tmp_path, names) == SMALL
    assert usual_size(tmp_path, ["b.png"]) == (5, 7)
    assert usual_size(tmp_path, []) is None


def test_flops_at_a_size_are_those_that_a_build_counts_there(
    built_bundle: Path, tmp_path: Path
) -> None:
    """The built members had 64×96 as their size."""
    dataset = Path(shutil.copytree(built_bundle / "dataset", tmp_path / "dataset"))
    counted = {spec.name: spec.flops for spec in load_manifest(dataset).members}
    assert count_again(load_manifest(dataset), (128, 96)) == {}
    change_manifest(dataset, image_size=None)
    manifest = load_manifest(dataset)
    assert count_again(manifest, SMALL) == counted
    assert count_again(manifest, SEVERSTAL.image_size or SMALL) == {}
    first, *others = manifest.members
    own = replace(manifest, members=[replace(first, image_size=(32, 64)), *others])
    assert set(count_again(own, SMALL)) == {spec.name for spec in others}


def test_a_member_that_does_not_take_the_size_keeps_the_builds_flops(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("PAN", presence=False)  # whose pyramid pools 64×96 to nothing
    spec = MemberSpec("rigid", "rigid.safetensors", model, [0.5], [0.5])
    assert count_again(Manifest([spec]), SMALL) == {}
    [said] = caplog.messages
    assert said.startswith("rigid: its flops at 64×96 cannot be counted, those of the build stay: ")


def a_manifest(
    *sizes: tuple[int, int] | None, image_size: tuple[int, int] | None = None
) -> Manifest:
    members = [
        MemberSpec(f"m{i}", f"m{i}.safetensors", {}, [0.5], [0.5], image_size=size)
        for i, size in enumerate(sizes)
    ]
    return Manifest(members, image_size=image_size, competition=Competition(slug="mine"))


CROPS = (
    "images are resized from 256×1600 to 256×400, out of proportion: for a member trained on crops "
    "of full-size images remove image_size, and build again"
)
COUNTED = (
    "most images are 256×1600, the build counted flops at 256×256: they were counted again; if "
    "Kaggle's images are like these, set image_size in the description, and build again"
)


@pytest.mark.parametrize(
    ("manifest", "counted_again", "words"),
    [
        (a_manifest(None, None, image_size=(256, 400)), [], [CROPS]),
        (a_manifest(None, (256, 400), (256, 400)), [], [CROPS]),
        (a_manifest((128, 800), (256, 1568), None), [], []),  # 1568: within 5 %
        (a_manifest((256, 400), None), ["m1"], [CROPS, COUNTED]),
    ],
    ids=["all members", "two members", "in proportion", "and flops of another size"],
)
def test_sizes_that_are_to_be_looked_at_are_named(
    manifest: Manifest, counted_again: list[str], words: list[str]
) -> None:
    checks = check_sizes(manifest, (256, 1600), counted_again)
    assert [check.words for check in checks] == words
    assert all(check.ok is None for check in checks)
