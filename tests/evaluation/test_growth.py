"""The cost's growth: replayed choices cost what the kernel itself would run."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import CPU, save_strips

from evaluation import growth
from evaluation.growth import choose, list_choices
from kernel.ensemble import Ensemble
from kernel.ensemble_loading import load_ensemble
from kernel.images import Strip
from kernel.manifest import MemberSpec, load_manifest
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from kernel.tta import FLIPS, Half


@pytest.fixture(scope="module")
def ensemble(tiny_bundle: Path) -> Ensemble:
    """The three tiny members under all four flips."""
    dataset = tiny_bundle / "dataset"
    manifest = replace(load_manifest(dataset), flips=tuple(FLIPS))
    return load_ensemble(dataset, manifest, CPU, Stages(), None)


def test_members_past_the_last_are_the_first_ones_again(ensemble: Ensemble) -> None:
    assert [str(ensemble.passes[i]) for i in choose(ensemble, 4, ["none", "vertical"])] == [
        "fpn-b/none", "fpn-b/vertical", "unet-a/none", "unet-a/none", "unet-a/vertical",
        "unet-a/vertical", "unet-c/none", "unet-c/vertical",
    ]  # fmt: skip
    choices = list_choices(ensemble, ["none", "horizontal", "vertical"])
    assert len(choices["members", 9]) == 27
    assert len(choices["flips", 4]) == len(set(choices["flips", 4])) == 12
    assert choices["members", 3] == choices["flips", 3]


def test_a_bundle_of_more_members_is_among_what_is_compared(
    ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "MOST_MEMBERS", 2)
    assert list_choices(ensemble, ["none"])["members", 3] == choose(ensemble, 3, ["none"])


def test_members_of_a_size_of_their_own_cost_the_same_whatever_a_strips(ensemble: Ensemble) -> None:
    own, other = ensemble.manifest.members[:2]
    own = replace(own, image_size=(64, 96))
    at = {size: growth.flops_at([own, other], size) for size in ((64, 96), (128, 96))}
    assert at[128, 96] - at[64, 96] == pytest.approx(growth.flops_at([other], (64, 96)), rel=0.01)


def test_a_network_that_computes_while_it_is_built_is_counted() -> None:
    """As MiT does its rates of drop path, of which the meta device holds no values."""
    model = {"arch": "Unet", "encoder_name": "mit_b0", "in_channels": 3, "classes": 4}
    spec = MemberSpec("m", "m.safetensors", model, [0.5] * 3, [0.5] * 3)
    assert growth.flops_at([spec], (128, 96)) > growth.flops_at([spec], (64, 96)) > 1e6


def test_a_replay_costs_what_the_kernel_runs(ensemble: Ensemble, tmp_path: Path) -> None:
    images = save_strips(tmp_path, ["a.png", "b.png"])
    replays = growth.record_strips(ensemble, [tmp_path / name for name in images], ["none"])
    choice = ("flips", 2)
    costs, every = replays.costs(choice, growth.half_costs(ensemble, 2))
    scheduler = Scheduler(ensemble, pass_ids=replays.choices[choice])
    for (name, image), found in zip(images.items(), costs, strict=True):
        (state,) = scheduler.predict_strips([Strip(name, image)])
        flops = [each.flops for each in ensemble.passes]
        ran = sum(flops[i][index] for index, half in enumerate(Half) for i in state.ran[half])
        assert found[0] == ran <= every[0]
        assert found[1] > 0


def test_where_no_strip_can_be_run_it_says_so(ensemble: Ensemble, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match="no strip could be run, as the lines above say"):
        growth.record_strips(ensemble, [tmp_path / "a.png"], ["none"])


def test_the_command_writes_its_figures_and_a_plot(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_strips(tmp_path / "strips", ["a.png", "b.png", "c.png"])
    monkeypatch.setattr(growth, "SIZES", ((64, 96), (128, 96)))
    out = tmp_path / "growth.json"
    words = ["--bundle", tiny_bundle / "dataset", "--images", tmp_path / "strips", "--out", out]
    growth.main([*map(str, words), "--strips", "2"])
    found = json.loads(out.read_text())
    assert found["strips"] == 2
    members = [row["gigaflops_of_every_pass"] for row in found["members"].values()]
    assert members[5] == pytest.approx(2 * members[2])
    assert members[8] == pytest.approx(3 * members[2])
    sizes = found["image_size"]
    assert sizes["64×96"] == pytest.approx(found["members"]["3"])
    assert sizes["128×96"]["gigaflops"] == pytest.approx(2 * sizes["64×96"]["gigaflops"], rel=0.01)
    assert all(0 < row["share"] <= 1 for row in found["flips"].values())
    plot = cv2.imread(str(out.with_suffix(".png")))
    assert plot is not None and np.asarray(plot).std() > 10


def test_costs_are_mixed_by_the_share_of_clean_strips(ensemble: Ensemble) -> None:
    choices = {("members", 3): [0, 1, 2]}
    clean, other = ({Half.ENCODER: [0], Half.DECODER: list[int](decoded)} for decoded in ([], [0]))
    replays = growth.Replays(choices, {("members", 3): [clean, other, other]}, [True, False, False])
    ensemble.stages.networks.update({(p.member, h): 1.0 for p in ensemble.passes for h in Half})
    mixed = growth.summarise(replays, ensemble, [])["clean_share"]
    encoder, decoder = (flops / 1e9 for flops in ensemble.passes[0].flops)
    assert mixed["100%"]["gigaflops"] == pytest.approx(encoder)
    assert mixed["0%"]["gigaflops"] == pytest.approx(encoder + decoder)
    assert mixed["25%"]["gigaflops"] == pytest.approx(encoder + 0.75 * decoder)
