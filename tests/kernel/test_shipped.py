"""Descriptions by name: what does not ship, and what does not fit."""

import json
from pathlib import Path

import pytest

from kernel.shipped import find_competition


def test_a_name_that_does_not_ship_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"cloud: neither a file nor .* the nearest is clouds"):
        find_competition("cloud")


def test_a_competition_of_instances_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"airbus: scores instances.*one mask of each class"):
        find_competition("airbus")
    mine = tmp_path / "mine.json"
    for slug, unit in (
        ("data-science-bowl-2018", "a row a nucleus"),
        ("recodai-luc-scientific-image-forgery-detection", "a code a copied region"),
    ):
        mine.write_text(json.dumps({"slug": slug}))
        with pytest.raises(ValueError, match=rf"{mine}: slug {slug}: scores instances, {unit}"):
            find_competition(str(mine))


def test_a_competition_that_reads_relative_codes_is_refused_with_the_reason(
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{"slug": "siim-acr-pneumothorax-segmentation"}')
    for asked in ("siim", str(mine)):
        with pytest.raises(ValueError, match=rf"{asked}: .*relative codes.*writes absolute starts"):
            find_competition(asked)
