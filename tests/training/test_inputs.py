"""What a fit begins with: which strips, on which device, under which mean."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SMALL, draw_image, save_image
from safetensors.torch import save_file

from kernel.competition import SEVERSTAL
from training import inputs, train
from training.config import Config
from training.heads import SampledPairs, StripPairs
from training.strips import Strips

# --- which strips the heads' last fit sees --------------------------------------------------------


def choose(
    strips: Strips, config: Config, *options: object
) -> tuple[StripPairs | SampledPairs, Strips]:
    words = ["--data", "d", "--name", "n", "--encoder", "e", *map(str, options)]
    pairs, scored = inputs.choose_head_pairs(train.parse_args(words), config, [strips], strips)
    assert isinstance(pairs, StripPairs | SampledPairs)
    return pairs, scored


@pytest.mark.parametrize(("to_score", "expected"), [(4, 20), (12, 12), (100, 12)])
def test_held_out_strips_are_fitted_on_or_scored_never_both(
    to_score: int, expected: int, strips: Strips, config: Config
) -> None:
    pairs, scored = choose(strips, config, "--validation-strips", to_score)
    assert isinstance(pairs, StripPairs)
    assert len(pairs) == expected
    assert not set(pairs.strips.names) & set(scored.names)
    assert len(scored.names) == min(to_score, 24 - expected)
    few, _ = choose(strips, config, "--presence-strips", 3)
    assert len(few) == 3


def test_the_heads_last_fit_takes_the_strips_it_is_given(
    strips: Strips, steel: Path, config: Config
) -> None:
    drawn, scored = choose(strips, config, "--heads-on", "train", "--presence-strips", 5)
    assert isinstance(drawn, SampledPairs) and len(drawn) == 5 and len(scored.names) == 24
    assert isinstance(choose(strips, replace(config, fold=-1))[0], SampledPairs)
    own, _ = choose(strips, config, "--heads-on", steel, "--presence-strips", 7)
    assert isinstance(own, StripPairs) and own.strips.names == strips.names[:7]
    assert len(choose(strips, config, "--heads-on", "none")[0]) == 0


def test_held_out_strips_of_a_folder_that_the_heads_are_fitted_on_are_not_scored(
    strips: Strips, steel: Path, tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of the same name that are other images are scored."""
    caplog.set_level(logging.INFO)
    pairs, scored = choose(strips, config, "--heads-on", steel, "--presence-strips", 7)
    assert isinstance(pairs, StripPairs) and pairs.strips.names == strips.names[:7]
    assert scored.names == strips.names[7:]
    assert "7 held-out strips are fitted on and so not scored; 17 are left" in caplog.text
    _, scored = choose(strips, config, "--heads-on", steel, "--validation-strips", 4)
    assert scored.names == []  # all of them were fitted on
    others = Path(shutil.copytree(steel, tmp_path / "others"))
    for name in strips.names[:5]:
        save_image(others / "train_images" / name, draw_image(1))
    _, scored = choose(strips, config, "--heads-on", others, "--presence-strips", 7)
    assert scored.names == strips.names[:5] + strips.names[7:]


def test_the_heads_last_fit_draws_nothing_from_further_folders(
    strips: Strips, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    further, config = replace(strips, folder=Path("gone")), replace(config, extra_shares=(0.9,))
    words = ["--data", "d", "--name", "n", "--encoder", "e", "--heads-on", "train"]
    pairs, _ = inputs.choose_head_pairs(train.parse_args(words), config, [strips, further], strips)
    assert len([pairs[index] for index in range(10)]) == 10
    assert "left out" not in caplog.text


def test_batch_norm_statistics_are_of_the_own_strips_and_the_unlabelled_ones(
    strips: Strips, steel: Path, tmp_path: Path
) -> None:
    save_image(tmp_path / "unlabelled.png", draw_image(0))
    words = ["--data", steel, "--name", "n", "--encoder", "e", "--device", "cpu", "--fold", "none",
             "--extra", f"{steel}=0.5", "--unlabelled", tmp_path]  # fmt: skip
    _, found = inputs.read_inputs(train.parse_args(list(map(str, words))))
    assert [each.names for each in found.statistics] == [strips.names, ["unlabelled.png"]]


# --- the experiment -------------------------------------------------------------------------------


def test_the_experiment_is_what_the_options_say(strips: Strips) -> None:
    words = ["--data", "d", "--name", "n", "--encoder", "e", "--arch", "Unet", "--channels", "3",
             "--fold", "none", "--folds", "3", "--crop-steps", "7", "--whole-steps", "6", "--seed",
             "9", "--crops", "2", "--crop-size", "32x64", "--defect-share", "0.25", "--evenness",
             "1", "--moved-share", "0.5", "--moved-method", "paste", "--extra", "a=0.3", "b=0.2",
             "--learning-rate", "0.1", "--mean", "0.4", "--std", "0.2", "--precision", "bf16-mixed",
             "--encoder-weights", "imagenet"]  # fmt: skip
    found = inputs.read_config(train.parse_args(words), torch.device("cpu"), strips)
    expected = Config(
        "n", "e", "Unet", channels=3, fold=-1, folds=3, crop_steps=7, whole_steps=6, seed=9,
        crops=2, crop_size=(32, 64), defect_share=0.25, evenness=1.0, moved_share=0.5,
        moved_method="paste", extra_shares=(0.3, 0.2), learning_rate=0.1, mean=(0.4,), std=(0.2,),
        precision="bf16-mixed", encoder_weights="imagenet",
    )  # fmt: skip
    assert found == expected


# --- the weights to start from --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ({"mean": [0.5], "std": [0.13]}, r"fitted with {'mean': \[0\.5\], .*: give its --mean and"),
        (
            {"efficientnet_pytorch": "0.6.3"},
            r"with {'efficientnet_pytorch': '0\.6\.3'}, .*give steps",
        ),
        ({"softmax": True, "channels": [1, 2, 3, 4]}, r"with {'softmax': True, 'channels': \[1, 2"),
    ],
)
def test_a_member_that_was_trained_otherwise_is_told_and_refused_where_no_step_adapts_it(
    said: dict[str, Any],
    shown: str,
    config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, still = tmp_path / "a.safetensors", replace(config, crop_steps=0, whole_steps=0)
    save_file({"weight": torch.zeros(1)}, path, {"member": json.dumps(said)})
    with pytest.raises(ValueError, match=f"--start-from {path}: was .*{shown}"):
        inputs.read_start(path, still)
    assert not caplog.messages
    assert set(inputs.read_start(path, config)[0]) == {"weight"}
    [told] = caplog.messages
    assert told.startswith(f"--start-from {path}: was ") and str(min(said)) in told
    unsaid = {"mean": [0.34], "softmax": False, "channels": None, "efficientnet_pytorch": ""}
    save_file({"weight": torch.zeros(1)}, path, {"member": json.dumps(unsaid)})
    inputs.read_start(path, still)
    same = {"channels": list(range(config.classes))}
    save_file({"weight": torch.zeros(1)}, path, {"member": json.dumps(same)})
    inputs.read_start(path, still)


# --- the machine and the mean ---------------------------------------------------------------------


def test_states_are_saved_less_often_on_a_gpu_unless_it_is_asked_for() -> None:
    words = ["--data", "d", "--name", "n", "--encoder", "e"]
    found = [
        inputs.read_machine(train.parse_args([*words, *more]), torch.device(kind)).save_every
        for kind in ("cpu", "cuda")
        for more in ([], ["--save-every", "7"])
    ]
    assert found == [50, 7, 500, 7]


def test_a_gpu_that_runs_nothing_is_refused_before_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kaggle's P100 is there, and PyTorch has no code for it."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(inputs, "device_usable", lambda device: device.type == "cpu")
    with pytest.raises(ValueError, match=r"cuda:0: PyTorch cannot run on this GPU.* choose a T4"):
        inputs.choose_device("cuda:0")


def test_a_mean_is_measured_of_the_images_that_can_be_read(tmp_path: Path) -> None:
    for name, value in (("a.png", 51), ("b.png", 153)):
        save_image(tmp_path / name, np.full(SMALL, value, np.uint8))
    (tmp_path / "torn.png").write_bytes(b"torn")
    strips = Strips(tmp_path, ["a.png", "torn.png", "b.png"], {}, SEVERSTAL)
    assert inputs.measure_normalisation(strips, 1) == ((0.4,), (0.2,))
    torn = replace(strips, names=["torn.png"])
    with pytest.raises(ValueError, match=f"{tmp_path}: none of 1 images can be read"):
        inputs.measure_normalisation(torn, 1)
