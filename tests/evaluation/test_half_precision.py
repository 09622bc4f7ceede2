"""fp16 on the CPU: what is measured is rounding, which is about what fp16 itself does."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import CPU, draw_image, save_strips

from evaluation import half_precision
from evaluation.half_precision import Changes, round_member
from kernel.engines import TOLERANCES, compile_member, differences, to_half_precision
from kernel.images import image_to_tensor
from kernel.manifest import load_manifest
from kernel.members import load_member, split_network


def test_fp16_moves_what_a_member_gives_by_less_than_the_check_allows(tiny_bundle: Path) -> None:
    dataset, images = tiny_bundle / "dataset", image_to_tensor(draw_image(1))
    for spec in load_manifest(dataset).members:
        plain = load_member(dataset, spec, CPU)
        apart = differences(plain, round_member(plain), images)
        assert [each > 1e-6 for each in apart] == [spec.gated, True, spec.gated, True]
        assert all(each < most for each, most in zip(apart, TOLERANCES, strict=True))


def test_rounding_every_layer_does_about_what_half_precision_does(tiny_bundle: Path) -> None:
    dataset, images = tiny_bundle / "dataset", image_to_tensor(draw_image(1))
    spec = load_manifest(dataset).members[0]
    plain = load_member(dataset, spec, CPU)
    network = to_half_precision(compile_member(plain, CPU).encoder.network)
    half = split_network(network, spec, CPU)
    found, expected = (differences(plain, each, images)[1] for each in (round_member(plain), half))
    assert 0.5 < found / expected < 2


def test_what_changed_is_counted_by_pixel_and_by_pair() -> None:
    exact = np.zeros((4, 4, 5), np.bool_)
    exact[1, :2] = True
    rounded = exact.copy()
    rounded[1, 1, 0] = False
    changes = Changes()
    changes.add(exact, rounded)
    changes.add(exact, exact)
    found = changes.summary()
    assert found["pixels_changed"] == pytest.approx(1 / 80 / 2)
    assert found["pairs_changed"] == 1 / 8
    assert found["dice_against_fp32"] == pytest.approx((7 + 2 * 9 / 19) / 8)


def test_the_command_writes_what_it_found(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_strips(tmp_path / "strips", ["a.png", "b.png", "c.png"])
    words = ["--bundle", tiny_bundle / "dataset", "--images", tmp_path / "strips", "--strips", 2]
    half_precision.main([*map(str, words), "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["strips"] == 2
    assert found["changes"].keys() == {"unet-a", "fpn-b", "unet-c", "ensemble"}
    assert 0 < found["changes"]["ensemble"]["pixels_changed"] < 0.05
    for apart in found["largest_mean_difference"].values():
        assert all(each < most for each, most in zip(apart, TOLERANCES, strict=True))
    printed = capsys.readouterr().out
    assert f"| ensemble | {found['changes']['ensemble']['pixels_changed']:.4%} |" in printed
