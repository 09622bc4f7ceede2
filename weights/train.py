"""Fits one member: an SMP network with a mask head and a presence head, on one grey channel.

It reads the competition's own train.csv (either layout) and train_images, or what steel.py writes
in their likeness. Training has three parts. First crops, most of them around a defect of a class
drawn, teach the mask head, and cell by cell the features that the presence head pools. Then the
batch-norm statistics are taken anew from whole strips and frozen, and whole strips, half of them
clean, teach the presence head what it will be asked: pooled over crops alone it learns another
question (a gate of that kind took a prototype's Dice from 0.83 to 0.03). Last, the heads alone, on
strips that the network has not seen: the presence head is fitted once more, on hundreds of them,
and the mask head's biases are set so that the threshold is where its Dice is best.
"""

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from iterstrat.ml_stratifiers import MultilabelStratifiedKFold
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from kernel.ensemble import Ensemble
from kernel.images import Image, read_image
from kernel.logs import Stages, progress, start_log
from kernel.manifest import Manifest, MemberSpec
from kernel.members import build_network, split
from weights.score import Masks, Scores, dice_of, draw_truth, read_truth

EXPERIMENTS = Path(__file__).parent / "experiments.csv"
GATE_LENIENCE = 4.0  # a gate wrongly shut loses a mask, one wrongly open leaves it to the mask head
LAST_LENIENCE = 8.0  # the same in the last part, where a rare class has its say at last
TETHER = 0.01  # keeps the last part's head near the trained one: few strips have a rare class
LEVELS = torch.arange(-8, 8.1, 0.25)  # of mask logits, among which the last part looks for the best
LEVEL_STRIPS = 60  # of each class, on which it looks
SAVE_EVERY = 50  # steps: a kill costs a minute or two


@dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str
    encoder: str
    arch: str = "FPN"
    fold: int = 0
    folds: int = 5
    crop_steps: int = 600
    whole_steps: int = 150
    crops: int = 4  # a step
    crop_size: tuple[int, int] = (128, 256)
    defect_share: float = 0.6  # of the crops lie on a defect's pixel
    evenness: float = 0.5  # exponent of the classes' counts: 1 as they come, 0 all alike
    learning_rate: float = 3e-4  # at 1e-3 with four crops a step the loss rises again
    mean: float = 0.34  # of grey in [0, 1], measured on the competition's strips
    std: float = 0.13
    classes: int = 4
    seed: int = 0
    bfloat16: bool = False  # a third less time where the CPU has avx512_bf16

    @property
    def steps(self) -> int:
        """Both parts together."""
        return self.crop_steps + self.whole_steps

    @property
    def level(self) -> float:
        """The logit at which the kernel's threshold cuts a mask whose gate is open."""
        threshold = Manifest([self.spec], self.classes).threshold
        return math.log(threshold / (1 - threshold))

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step: one cycle for the crops, a lower one after it.

        On the tail of a single cycle the presence head would meet whole strips without learning.
        """
        crops = step < self.crop_steps
        first, length, peak = (
            (0, self.crop_steps, 1.0) if crops else (self.crop_steps, self.whole_steps, 0.3)
        )
        done = (step - first + 1) / (length + 1)
        return peak * min(done / 0.15, (1 + math.cos(math.pi * done)) / 2)

    @property
    def spec(self) -> MemberSpec:
        """The member's entry in the manifest."""
        model = {
            "arch": self.arch,
            "encoder_name": self.encoder,
            "in_channels": 1,
            "classes": self.classes,
            "aux_params": {"classes": self.classes, "pooling": "max"},
        }
        return MemberSpec(self.name, f"{self.name}.safetensors", model, [self.mean], [self.std])


# --- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strips:
    """Images of a folder with their ground truth."""

    folder: Path
    names: list[str]
    truth: dict[str, dict[int, str]]  # image → class → RLE
    classes: int

    def load(self, name: str) -> tuple[Image, Masks]:
        """One image (H, W) and its masks (classes, H, W)."""
        image = read_image(self.folder / name)
        size = (image.shape[0], image.shape[1])
        return image, draw_truth(self.truth.get(name, {}), self.classes, size)

    def with_class(self, label: int) -> list[str]:
        """The images that have a mask of class `label`."""
        return [name for name in self.names if label in self.truth.get(name, {})]

    def some(self, first: int, last: int) -> "Strips":
        """The images from number `first`, from 0, to before `last`."""
        return replace(self, names=self.names[first:last])

    def some_of_each(self, count: int) -> "Strips":
        """The first `count` images of every class."""
        labels = range(1, self.classes + 1)
        chosen = {name for label in labels for name in self.with_class(label)[:count]}
        return replace(self, names=[name for name in self.names if name in chosen])

    def clean(self) -> list[str]:
        """The images without any mask."""
        return [name for name in self.names if not self.truth.get(name)]


def split_folds(strips: Strips, folds: int, fold: int) -> tuple[Strips, Strips]:
    """Training and validation strips, every class in the same share in each fold."""
    labels = [
        [c in strips.truth.get(name, {}) for c in range(1, strips.classes + 1)]
        for name in strips.names
    ]
    splitter = MultilabelStratifiedKFold(folds, shuffle=True, random_state=0)
    train, held_out = list(splitter.split(strips.names, np.array(labels, int)))[fold]

    def subset(index: Iterable[int]) -> Strips:
        return replace(strips, names=[strips.names[i] for i in index])

    return subset(train), subset(held_out)


def read_strips(data: Path, classes: int) -> Strips:
    """Every image of `data`/train_images with what train.csv says of it.

    Raises:
        ValueError: train.csv names an image that is not there.
    """
    truth = read_truth(data / "train.csv")
    names = sorted(path.name for path in (data / "train_images").iterdir())
    missing = sorted(set(truth) - set(names))
    if missing:
        raise ValueError(f"{data}: train.csv names {missing[0]}, which train_images lacks")
    return Strips(data / "train_images", names, truth, classes)


# --- augmentation: each takes and gives an image (H, W) and masks (classes, H, W) -----------------


def as_grey(values: npt.NDArray[np.floating[Any]]) -> Image:
    """Rounded, 0-255: cut off instead, every image would darken by half a grey level."""
    grey: Image = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return grey


def random_flip(image: Image, masks: Masks, rng: np.random.Generator) -> tuple[Image, Masks]:
    """Turns image and masks round together, along either axis, each with even odds."""
    for axis in (-1, -2):
        if rng.random() < 0.5:
            image, masks = np.flip(image, axis), np.flip(masks, axis)
    return image, masks


def random_brightness(image: Image, masks: Masks, rng: np.random.Generator) -> tuple[Image, Masks]:
    """Another exposure: contrast ±25 %, brightness ±30 of 255."""
    changed = image * rng.uniform(0.75, 1.25) + rng.uniform(-30, 30)
    return as_grey(changed), masks


def random_noise(image: Image, masks: Masks, rng: np.random.Generator) -> tuple[Image, Masks]:
    """Sensor noise with a standard deviation of up to 6 of 255."""
    noise = rng.normal(0, rng.uniform(0, 6), image.shape)
    return as_grey(image + noise), masks


AUGMENTATIONS = (random_flip, random_brightness, random_noise)


# --- batches: step i is always the same batch, so a killed run resumes exactly --------------------


def crop_at(array: npt.NDArray[Any], centre: tuple[int, int], size: tuple[int, int]) -> Any:
    """The window of `size` nearest to `centre` that lies inside the last two axes."""
    tops = [
        min(max(c - s // 2, 0), max(full - s, 0))
        for c, s, full in zip(centre, size, array.shape[-2:], strict=True)
    ]
    return array[..., tops[0] : tops[0] + size[0], tops[1] : tops[1] + size[1]]


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batch of step i: images (B, 1, H, W) in [0, 1] and masks (B, classes, H, W), float."""

    def __init__(self, strips: Strips, config: Config) -> None:
        self.strips, self.config = strips, config
        by_class = [strips.with_class(label) for label in range(1, strips.classes + 1)]
        self.by_class = {label: names for label, names in enumerate(by_class, 1) if names}
        counts = np.array([len(names) for names in self.by_class.values()]) ** config.evenness
        self.odds = counts / counts.sum()
        self.clean = strips.clean() or strips.names

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.config.seed, step])
        if step < self.config.crop_steps:
            pairs = [self.draw_crop(rng) for _ in range(self.config.crops)]
        else:
            pairs = [self.draw_strip(rng, defective=rng.random() < 0.5)[:2]]
        for augment in AUGMENTATIONS:
            pairs = [augment(image, masks, rng) for image, masks in pairs]
        images = np.stack([image for image, _ in pairs])[:, None]
        masks = np.stack([masks for _, masks in pairs])
        return torch.from_numpy(images) / 255, torch.from_numpy(masks).float()

    def draw_strip(
        self, rng: np.random.Generator, defective: bool
    ) -> tuple[Image, Masks, int | None]:
        """A strip with a defect (and the class it was drawn for), or a clean one."""
        if not (defective and self.by_class):
            return *self.strips.load(str(rng.choice(self.clean))), None
        label = int(rng.choice(list(self.by_class), p=self.odds))
        return *self.strips.load(str(rng.choice(self.by_class[label]))), label

    def draw_crop(self, rng: np.random.Generator) -> tuple[Image, Masks]:
        """A window on a defect's pixel, off its centre, or anywhere on any strip."""
        size = self.config.crop_size
        image, masks, label = self.draw_strip(rng, rng.random() < self.config.defect_share)
        if label is None:
            y, x = (int(rng.integers(side)) for side in image.shape)
        else:
            y, x = rng.choice(np.argwhere(masks[label - 1]))
            y, x = (
                int(v + rng.integers(-s // 3, s // 3 + 1))
                for v, s in zip((y, x), size, strict=True)
            )
        return crop_at(image, (y, x), size), crop_at(masks, (y, x), size)


# --- fitting --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """A network's logits for one batch."""

    masks: Tensor  # (B, C, H, W)
    presence: Tensor  # (B, C)
    together: Tensor  # (C,), the presence head asked of the whole batch as if it were one strip
    cells: Tensor  # (B, C, h, w), and of each cell of the deepest features alone

    def float(self) -> "Outputs":
        """The same in single precision, where a loss is computed."""
        return Outputs(*(getattr(self, field.name).float() for field in fields(self)))


def outputs_of(network: Any, images: Tensor) -> Outputs:
    """All logits of normalised images (B, channels, H, W)."""
    features = network.encoder(images)
    masks = network.segmentation_head(network.decoder(features))
    linear = presence_layer(network)
    together = linear(features[-1].amax(dim=(0, 2, 3)))
    cells = F.conv2d(features[-1], linear.weight[:, :, None, None], linear.bias)
    return Outputs(masks, network.classification_head(features[-1]), together, cells)


def loss_of(outputs: Outputs, masks: Tensor) -> Tensor:
    """BCE and soft Dice of the masks (B, C, H, W); BCE of the presence by cell, image and batch.

    One label a crop is too few to teach the deepest features small defects, and a strip has twelve
    times a crop's cells to take the maximum of: hence the cells, and the batch pooled together.
    """
    bce = F.binary_cross_entropy_with_logits
    present = masks.amax(dim=(-2, -1))
    probabilities = torch.sigmoid(outputs.masks)
    both = (probabilities * masks).sum(dim=(0, 2, 3))
    sizes = (probabilities + masks).sum(dim=(0, 2, 3))
    there = present.amax(dim=0) > 0  # an absent class has no overlap to learn from
    soft_dice = ((2 * both + 1) / (sizes + 1))[there]
    overlap = 1 - soft_dice.mean() if there.any() else sizes.new_zeros(())
    cells = F.adaptive_max_pool2d(masks, outputs.cells.shape[-2:])
    lenient = masks.new_tensor(GATE_LENIENCE)  # the weight of a class that is there
    pooled = bce(outputs.presence, present, pos_weight=lenient)
    pooled = pooled + bce(outputs.together, present.amax(dim=0), pos_weight=lenient)
    return 4 * bce(outputs.masks, masks) + overlap + pooled + 2 * bce(outputs.cells, cells)


def freeze_statistics(network: nn.Module) -> None:
    """From here on every batch norm uses its running statistics, as at inference."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@torch.no_grad()
def retake_statistics(network: nn.Module, images: Iterable[Tensor]) -> None:
    """Batch-norm statistics anew from whole strips (1, 1, H, W): their plain mean.

    SMP's EfficientNets average so slowly that after some hundred steps they score nothing.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    for image in images:
        network(image)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


class Fit:
    """A run's whole state: what a checkpoint of it holds and a resumed run goes on from."""

    def __init__(self, config: Config, weights: dict[str, Tensor] | None = None) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.network = build_network(config.spec.model)
        self.network.to(memory_format=torch.channels_last)  # a step takes an eighth less on a CPU
        self.start_from(weights or {})
        self.ema = self.new_average()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=1e-2
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, config.rate)
        self.step = 0
        self.seconds = 0.0

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Takes what fits by name and shape: a whole member's weights, or another's encoder.

        Not the presence head, which its last fit leaves with all gates open for single cells; but
        where no step is to be taken, that fit goes on from it.
        """
        own = self.network.state_dict()
        presence = {k for k in own if k.startswith("classification_head.")}
        wanted = own.keys() - (presence if self.config.steps else set())
        fitting = {k: v for k, v in weights.items() if k in wanted and v.shape == own[k].shape}
        if weights:
            print(f"{self.config.name}: {len(fitting)} of {len(own)} tensors to start from")
        self.network.load_state_dict(own | fitting)

    def new_average(self) -> AveragedModel:
        """An EMA that starts from the network as it stands, batch-norm statistics included."""
        average = get_ema_multi_avg_fn(0.98)  # type: ignore[no-untyped-call]
        return AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)

    def parts(self) -> dict[str, Any]:
        """What has a state_dict."""
        return {
            "network": self.network,
            "ema": self.ema,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }

    def save(self, path: Path) -> None:
        """Writes the state at once; a kill leaves the old file or the new one."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(state | {"step": self.step, "seconds": self.seconds}, part)
        part.replace(path)

    def resume(self, path: Path) -> None:
        """Goes on from a saved state, where there is one."""
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]

    def take_step(self, images: Tensor, masks: Tensor) -> float:
        """One batch through forward, backward and the optimiser; its loss."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # dropout, resumed or not
        self.network.train()
        if self.step >= self.config.crop_steps:
            freeze_statistics(self.network)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bfloat16):
            outputs = outputs_of(self.network, images)
        loss = loss_of(outputs.float(), masks)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.network)
        self.step += 1
        return loss.item()


def whole_strips(strips: Strips, count: int, seed: int) -> Iterator[Tensor]:
    """Some whole strips as the network takes them, (1, 1, H, W), not normalised."""
    names = np.random.default_rng(seed).permutation(strips.names)[:count]
    for name in progress(names, "batch-norm statistics", "strip"):
        yield torch.from_numpy(strips.load(str(name))[0])[None, None] / 255


def fit(config: Config, strips: Strips, state: Path, start_from: Path | None = None) -> Fit:
    """Trains to the last step, from `state` where a killed run left one."""
    run = Fit(config, load_file(start_from) if start_from else None)
    run.resume(state)

    def normalise(images: Tensor) -> Tensor:
        return (images - config.mean) / config.std

    todo = range(run.step, config.steps)
    loader = DataLoader(Batches(strips, config), batch_size=None, sampler=todo, num_workers=1)
    bar = progress(loader, config.name, "step", config.steps, run.step)
    smooth = float("nan")
    for images, masks in bar:
        start = time.perf_counter()
        if run.step == config.crop_steps:
            run.network.load_state_dict(run.ema.module.state_dict())
            retake_statistics(run.network, map(normalise, whole_strips(strips, 24, config.seed)))
            run.ema = run.new_average()
        loss = run.take_step(normalise(images), masks)
        smooth = loss if smooth != smooth else 0.95 * smooth + 0.05 * loss
        run.seconds += time.perf_counter() - start
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
        if run.step % SAVE_EVERY == 0 or run.step == config.steps:
            run.save(state)
    return run


# --- both heads once more -------------------------------------------------------------------------


def presence_layer(network: Any) -> nn.Linear:
    """What the presence head is, behind its pooling: one linear layer."""
    return next(m for m in network.classification_head if isinstance(m, nn.Linear))


def network_input(image: Image, config: Config) -> Tensor:
    """An image (H, W) as the network takes it: (1, 1, H, W), normalised."""
    return (torch.from_numpy(image)[None, None] / 255 - config.mean) / config.std


@torch.inference_mode()
def pooled_features(network: Any, config: Config, strips: Strips) -> tuple[Tensor, Tensor]:
    """Of whole strips: what the presence head sees (N, channels), what is there (N, classes)."""
    network.eval()
    pooled, present = [], []
    for name in progress(strips.names, "presence head", "strip"):
        image, masks = strips.load(name)
        images = network_input(image, config)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            pooled.append(network.encoder(images)[-1].float().amax(dim=(2, 3)))
        present.append(torch.from_numpy(masks.any(axis=(1, 2))).float())
    return torch.cat(pooled), torch.stack(present)


def refit_presence(layer: nn.Linear, pooled: Tensor, present: Tensor) -> None:
    """Fits the presence head anew: logistic regression, tethered to the weights that it has.

    In the steps before, one whole strip at a time, a class of one strip in sixty hardly comes up,
    and its gate stays shut. On kept features all strips are asked at once, to the optimum.
    """
    pooled, present = pooled.clone(), present.clone()  # inference tensors have no gradients
    trained, spread = layer.weight.detach().clone(), pooled.std(dim=0, correction=0)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")
    lenient = pooled.new_tensor(LAST_LENIENCE)

    def loss() -> Tensor:
        optimizer.zero_grad()
        asked = F.binary_cross_entropy_with_logits(layer(pooled), present, pos_weight=lenient)
        total = asked + TETHER * ((layer.weight - trained) * spread).square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]


@torch.inference_mode()
def best_levels(network: Any, config: Config, strips: Strips) -> Tensor:
    """The level (classes,) above which a class's mask logits have the best mean Dice on `strips`.

    Asked of the strips that have the class, for on the others the gate decides. A class that none
    of them has keeps the level at which it is cut as it stands.
    """
    network.eval()
    curves = torch.zeros(config.classes, len(LEVELS))
    for name in progress(strips.names, "mask head", "strip"):
        image, masks = strips.load(name)
        images = network_input(image, config)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            logits = network(images)[0][0].float()
        for label in np.flatnonzero(masks.any(axis=(1, 2))):
            truth = torch.from_numpy(masks[label])
            found = logits[label] > LEVELS[:, None, None]
            both, sizes = (found & truth).sum(dim=(1, 2)), found.sum(dim=(1, 2)) + truth.sum()
            curves[label] += torch.from_numpy(dice_of(both.numpy(), sizes.numpy()))
    asked = curves.amax(dim=1) > 0
    return torch.where(asked, LEVELS[curves.argmax(dim=1)], config.level)


def refit_masks(network: Any, config: Config, strips: Strips) -> None:
    """Moves each class's mask logits so that the kernel's threshold cuts them at their best level.

    Members that are right to keep to what they are sure of when alone miss more than that together:
    the mean of five passes the threshold where most of them do.
    """
    levels = best_levels(network, config, strips)
    print(f"{config.name}: masks are best cut at {[round(float(level), 2) for level in levels]}")
    layers: list[Any] = [m for m in network.segmentation_head.modules() if isinstance(m, nn.Conv2d)]
    layers[-1].bias.data += config.level - levels


# --- results --------------------------------------------------------------------------------------


def validate(network: nn.Module, config: Config, strips: Strips) -> Scores:
    """The member alone, gated, without flips, on whole strips, through the kernel's own code."""
    spec = config.spec
    cpu = torch.device("cpu")
    manifest = Manifest([spec], config.classes, flips=("none",))
    ensemble = Ensemble(manifest, [split(network, spec, cpu)], cpu, Stages())
    scores = Scores()
    for name in progress(strips.names, "validation", "strip"):
        image, masks = strips.load(name)
        scores.add(ensemble([image])[0], masks)
    return scores


def write_checkpoint(network: nn.Module, config: Config, path: Path) -> None:
    """The weights in half precision; their header carries the member's own manifest entry."""
    weights = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    weights = {key: value.contiguous().clone() for key, value in weights.items()}
    save_file(weights, path, {"member": json.dumps(asdict(config.spec), sort_keys=True)})


def note_experiment(config: Config, scores: Scores, seconds: float, comment: str) -> None:
    """Appends one row to experiments.csv, as the 4th place kept their table."""
    summary = scores.summary()
    row = {
        "name": config.name,
        "fold": config.fold,
        "encoder": config.encoder,
        "decoder": config.arch,
        "steps": f"{config.crop_steps}+{config.whole_steps}",
        "dice": summary["dice"],
        "dice_non_empty": summary["dice_non_empty"],
        "clean_left_empty": summary["clean_left_empty"],
        "minutes": round(seconds / 60, 1),
        "comment": comment,
    }
    new = not EXPERIMENTS.exists()
    with EXPERIMENTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


# --- command line ---------------------------------------------------------------------------------

EXAMPLE = """\
  python weights/train.py --data data/steel --name resnet34 --encoder resnet34 --arch Unet --fold 1
"""


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=EXAMPLE + "\n" + (__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train.csv and train_images/")
    add("--name", required=True, help="the member's name, and its file's")
    add("--encoder", required=True, help="any encoder that SMP or tu- names")
    add("--arch", default="FPN", help="any SMP architecture (default FPN)")
    add("--fold", type=int, default=0, help="the fold held out for validation (default 0)")
    add("--folds", type=int, default=5)
    add("--crop-steps", type=int, default=600, help="steps on crops (default 600)")
    add("--whole-steps", type=int, default=150, help="steps on whole strips (default 150)")
    add("--learning-rate", type=float, default=Config.learning_rate, help="its peak (default 3e-4)")
    add("--evenness", type=float, default=Config.evenness, help="1: classes as they come, 0: alike")
    add("--start-from", type=Path, help="a checkpoint whose weights to begin with, all that fit")
    add("--classes", type=int, default=4)
    add("--seed", type=int, default=0)
    add("--bfloat16", action="store_true", help="train in half the bits: faster with avx512_bf16")
    about = "of the held-out fold, for the heads' last fit (default 800)"
    add("--presence-strips", type=int, default=800, help=about)
    add("--validation-strips", type=int, default=100, help="of the others held out (default 100)")
    add("--out", type=Path, default=Path(__file__).parent, help="folder of the checkpoint")
    add("--runs", type=Path, default=Path("runs"), help="states of running fits, to resume from")
    add("--comment", default="", help="for experiments.csv")
    return parser.parse_args(arguments)


def main() -> None:
    """Fits, validates, writes the checkpoint and its row in experiments.csv."""
    start_log()
    args = parse_args()
    config = Config(
        name=args.name, encoder=args.encoder, arch=args.arch, fold=args.fold, folds=args.folds,
        crop_steps=args.crop_steps, whole_steps=args.whole_steps, classes=args.classes,
        seed=args.seed, learning_rate=args.learning_rate, bfloat16=args.bfloat16,
        evenness=args.evenness,
    )  # fmt: skip
    strips = read_strips(args.data, args.classes)
    train, held_out = split_folds(strips, args.folds, args.fold)
    print(f"{config.name}: {len(train.names)} strips to train on, {len(held_out.names)} held out")
    run = fit(config, train, args.runs / f"{args.name}.pt", args.start_from)
    network = run.ema.module
    half, spare = len(held_out.names) // 2, len(held_out.names) - args.validation_strips
    asked = min(args.presence_strips, max(half, spare))
    if asked:
        unseen = held_out.some(0, asked)
        refit_presence(presence_layer(network), *pooled_features(network, config, unseen))
        refit_masks(network, config, unseen.some_of_each(LEVEL_STRIPS))
    write_checkpoint(network, config, args.out / f"{args.name}.safetensors")
    scores = validate(network, config, held_out.some(asked, asked + args.validation_strips))
    note_experiment(config, scores, run.seconds, args.comment)
    print(json.dumps(scores.summary(), indent=2))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
