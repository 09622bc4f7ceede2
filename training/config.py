"""One experiment, which decides what its weights will be, and the machine, which does not."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from kernel.competition import SEVERSTAL
from kernel.manifest import MemberSpec


def parse_size(text: str) -> tuple[int, int]:
    """A size like 256x1600, height × width in pixels."""
    height, times, width = text.partition("x")
    if not (times and height.isdecimal() and width.isdecimal() and int(height) * int(width)):
        raise argparse.ArgumentTypeError(f"size is {text!r}, expected HEIGHTxWIDTH like 256x1600")
    return int(height), int(width)


PRECISIONS = ("32", "16-mixed", "bf16-mixed")
NO_FOLD = -1  # nothing is held out


@dataclass(frozen=True)
class Part:
    """A stretch of steps with a cycle of the learning rate of its own."""

    name: str
    first: int  # its first step
    steps: int
    peak: float  # share of the learning rate
    frozen: bool  # batch-norm statistics stay as they are

    @property
    def end(self) -> int:
        """The step after its last one."""
        return self.first + self.steps

    def rate(self, step: int) -> float:
        """Return the share of the learning rate at step `step` of this part, from 0."""
        done = (step + 1) / (self.steps + 1)
        return self.peak * min(done / 0.15, (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str
    encoder: str
    arch: str = "FPN"
    encoder_weights: str = ""  # what SMP downloads, "imagenet"; empty: drawn at random
    teacher: str = ""  # a member's checkpoint, whose masks are learnt beside the truth
    channels: int = 1  # of the network's input, 1 or 3, whatever the images have
    fold: int = 0  # NO_FOLD: every strip is trained on
    folds: int = 5
    crop_steps: int = 600
    whole_steps: int = 150
    crops: int = 4  # a step; 0: as many as fit into the GPU's memory
    crop_size: tuple[int, int] = (128, 256)
    defect_share: float = 0.6  # of the crops lie on a defect's pixel
    moved_share: float = 0.0  # of the defects are moved to another strip
    moved_method: str = "seamless"  # or "paste"
    extra_shares: tuple[float, ...] = ()  # of the draws that come from each further folder
    evenness: float = 0.5  # exponent of the classes' counts: 1 as they come, 0 all alike
    learning_rate: float = 3e-4  # at 1e-3 with four crops a step the loss rises again
    mean: tuple[float, ...] = (0.34,)  # of values in [0, 1], one or one a channel, RGB;
    std: tuple[float, ...] = (0.13,)  # these were measured on the competition's strips
    classes: int = len(SEVERSTAL.classes)
    seed: int = 0
    precision: str = "32"  # one of PRECISIONS

    @property
    def steadier(self) -> str:
        """What to try where numbers grow too large."""
        if self.precision == "16-mixed":
            return "with --precision 32, or bf16-mixed (no T4 has it), or a lower --learning-rate"
        return "with a lower --learning-rate"

    @property
    def steps(self) -> int:
        """Steps of both parts together."""
        return self.crop_steps + self.whole_steps

    @property
    def crop_part(self) -> Part:
        """The steps on crops."""
        return Part("crops", 0, self.crop_steps, 1.0, frozen=False)

    @property
    def whole_part(self) -> Part:
        """The steps on whole strips: on the tail of the crops' cycle they would teach nothing."""
        return Part("strips", self.crop_steps, self.whole_steps, 0.3, frozen=True)

    @property
    def parts(self) -> tuple[Part, Part]:
        """Both, in their order."""
        return self.crop_part, self.whole_part

    @property
    def spec(self) -> MemberSpec:
        """The member's entry in the manifest."""
        model = {
            "arch": self.arch,
            "encoder_name": self.encoder,
            "in_channels": self.channels,
            "classes": self.classes,
            "aux_params": {"classes": self.classes, "pooling": "max"},
        }
        mean, std = (
            list(each) * (self.channels if len(each) == 1 else 1) for each in (self.mean, self.std)
        )
        return MemberSpec(self.name, f"{self.name}.safetensors", model, mean, std)


@dataclass(frozen=True)
class Machine:
    """Where a run takes place; nothing here changes what its weights will be."""

    device: torch.device
    workers: int
    save_every: int  # steps between two states
    runs: Path  # folder of states and logs

    def folder(self, config: Config) -> Path:
        """Return the folder of an experiment's states and logs."""
        return self.runs / config.name


def check_config(config: Config) -> None:
    """Raise ValueError for the first value that the options allow and no experiment can have."""
    if Path(config.name).name != config.name or config.name in ("", ".", ".."):
        raise ValueError(f"--name {config.name!r} cannot name a file")
    if config.folds < 2:
        raise ValueError(f"--folds {config.folds}, expected 2 or more")
    if config.fold >= config.folds:
        raise ValueError(f"--fold {config.fold}, expected 0 to {config.folds - 1} or none")
    if not math.isfinite(config.evenness):
        raise ValueError(f"--evenness {config.evenness}, expected a number like 0.5")
    steps = {"--crop-steps": config.crop_steps, "--whole-steps": config.whole_steps}
    for option, value in (steps | {"--seed": config.seed}).items():
        if value < 0:
            raise ValueError(f"{option} {value}, expected 0 or more")
    if not (math.isfinite(config.learning_rate) and config.learning_rate > 0):
        raise ValueError(f"--learning-rate {config.learning_rate}, expected a number above 0")
    given = f"--mean {list(config.mean)}, --std {list(config.std)}"
    if {len(config.mean), len(config.std)} - {1, config.channels}:
        raise ValueError(f"{given}: one, or one a channel")
    if not all(0 <= mean <= 1 for mean in config.mean) or not all(std > 0 for std in config.std):
        raise ValueError(f"{given}: of values in [0, 1]")
    shares = (config.moved_share, config.defect_share, *config.extra_shares)
    if not all(0 <= share <= 1 for share in shares) or sum(config.extra_shares) >= 1:
        given = f"--defect-share {config.defect_share}, --moved-share {config.moved_share}"
        given += f", --extra's {list(config.extra_shares)}"
        raise ValueError(f"{given}: each from 0 to 1, --extra's below 1 together")
