"""One experiment: its cycles of the learning rate, its member's entry, and impossible values."""

import argparse
import math
from dataclasses import replace
from typing import Any

import pytest

from training.config import NO_FOLD, Config, check_config, parse_size


def test_each_part_has_a_cycle_of_its_own_and_no_step_stands_still(config: Config) -> None:
    parts = replace(config, crop_steps=200, whole_steps=40).parts
    assert [(part.first, part.end) for part in parts] == [(0, 200), (200, 240)]
    crops, whole = ([part.rate(step) for step in range(part.steps)] for part in parts)
    assert 0.9 < max(crops) <= 1
    assert 0.25 < max(whole) <= 0.3
    for rates in (crops, whole):
        peak = rates.index(max(rates))
        assert 0 < peak < len(rates) / 4
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
        assert 0 < rates[-1] < max(rates) / 50
    assert min(crops + whole) > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_the_manifests_entry_has_a_mean_for_every_channel(channels: int, config: Config) -> None:
    spec = replace(config, channels=channels).spec
    assert spec.model["in_channels"] == channels
    assert (spec.mean, spec.std) == ([0.34] * channels, [0.13] * channels)
    colours = (0.1, 0.2, 0.3)
    assert replace(config, channels=3, mean=colours, std=colours).spec.mean == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "--name 'a/b' cannot name a file"),
        ({"name": ".."}, "--name '..' cannot name a file"),
        ({"folds": 1}, "--folds 1, expected 2 or more"),
        ({"fold": 5}, "--fold 5, expected 0 to 4 or none"),
        ({"crop_steps": -1}, "--crop-steps -1, expected 0 or more"),
        ({"seed": -1}, "--seed -1, expected 0 or more"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0, expected a number above 0"),
        ({"learning_rate": math.nan}, "--learning-rate nan"),
        ({"std": (0.0,)}, "--mean [0.34], --std [0.0]: of values in [0, 1]"),
        ({"mean": (87.0,)}, "--mean [87.0]"),
        ({"mean": (0.1, 0.2)}, "--mean [0.1, 0.2], --std [0.13]: one, or one a channel"),
        ({"moved_share": 1.5}, "--moved-share 1.5, --extra's []: each from 0 to 1"),
        ({"defect_share": -0.1}, "--defect-share -0.1, --moved-share 0.0, --extra's []: each"),
        ({"extra_shares": (0.5, 0.5)}, "--extra's below 1 together"),
        ({"std": (math.nan,)}, "--std [nan]"),
        ({"evenness": math.nan}, "--evenness nan"),
    ],
)
def test_a_value_that_no_experiment_can_have_is_refused(
    change: dict[str, Any], message: str, config: Config
) -> None:
    with pytest.raises(ValueError) as refused:
        check_config(replace(config, **change))
    assert message in str(refused.value)


def test_what_an_experiment_can_be_is_not_refused(config: Config) -> None:
    check_config(config)
    check_config(replace(config, fold=NO_FOLD, crops=0, extra_shares=(0.5, 0.4)))


def test_a_size_that_is_none_is_refused_with_an_example() -> None:
    assert parse_size("64x128") == (64, 128)
    for text in ("big", "64", "64x", "-1x9", "0x64"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text}.*256x1600"):
            parse_size(text)
