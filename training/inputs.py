"""What a fit begins with: its experiment, strips and weights, read and checked before the fit."""

import argparse
import hashlib
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kernel.checks import read_json
from kernel.competition import Competition
from kernel.device import device_usable, pick_device
from kernel.image_folders import open_images
from kernel.images import image_to_tensor
from kernel.logs import log
from kernel.members import hash_file, read_entry, to_channels
from kernel.shipped import find_competition
from training.batches import Batches
from training.config import NO_FOLD, Config, Machine, check_config
from training.folds import split_folds
from training.heads import Pairs, SampledPairs, StripPairs
from training.moved_defects import check_movable
from training.options import SAVE_EVERY
from training.results import SCORES
from training.strips import Strips, check_classes, read_each, read_strips
from training.teacher import read_teacher


def read_device(name: str, option: str = "--device") -> torch.device:
    """Return a device by its name; raise ValueError for a kind that this does not train on."""
    with suppress(RuntimeError):  # PyTorch knows none of that name
        device = torch.device(name)
        if device.type in ("cpu", "cuda"):
            return device
    raise ValueError(f"{option} {name}: expected cpu, cuda or cuda:1")


def choose_device(asked: str | None) -> torch.device:
    """Return the device to train on; raise ValueError for one that is not there."""
    if asked is None:
        return pick_device()
    device = read_device(asked)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"--device {asked}: PyTorch finds {count} GPUs here; name one, or cpu")
    if device.type == "cuda" and not device_usable(device):
        raise ValueError(
            f"--device {asked}: PyTorch cannot run on this GPU (nor on Kaggle's P100): choose a "
            "T4 or L4"
        )
    return device


Values = tuple[float, ...]  # one, or one a channel


def measure_normalisation(strips: Strips, channels: int, most: int = 64) -> tuple[Values, Values]:
    """Return mean and std of each channel of some images, as a network of `channels` sees them.

    Raises:
        ValueError: no image can be read.
    """
    step, sums = max(len(strips.names) // most, 1), []
    paths = [strips.folder / name for name in strips.names[::step]]
    for image in read_each(paths, str(strips.folder), strips.competition):
        planes = to_channels(image_to_tensor(image), channels)[0].double()
        sums.append(torch.stack([planes.mean(dim=(1, 2)), planes.square().mean(dim=(1, 2))]))
    mean, square = torch.stack(sums).mean(dim=0)
    std = (square - mean**2).clamp_min(1e-8).sqrt()
    return tuple(round(float(v), 4) for v in mean), tuple(round(float(v), 4) for v in std)


def choose_normalisation(args: argparse.Namespace, strips: Strips) -> tuple[Values, Values]:
    """Return the mean and std that were asked for, else Severstal's, else what is measured.

    Raises:
        ValueError: --mean comes without --std, or they have different lengths.
    """
    mean, std = args.mean, args.std
    if args.competition is None:
        mean, std = mean or Config.mean, std or Config.std
    if mean is None and std is None:
        found = measure_normalisation(strips, args.channels)
        log.info("mean and std of the images: %s", found)
        return found
    if not mean or not std or len(mean) != len(std):
        raise ValueError(f"--mean {mean}, --std {std}: give both, of one length")
    return tuple(mean), tuple(std)


def check_options(
    args: argparse.Namespace, config: Config, competition: Competition, cuda: bool
) -> None:
    """Raise ValueError for the first option that does not fit the experiment or the machine."""
    gated = bool(config.teacher) and read_teacher(Path(config.teacher), config.classes).spec.gated
    if args.taught_gates and not (gated and args.unlabelled):
        raise ValueError("--taught-gates needs a --teacher with a presence head, and --unlabelled")
    if config.moved_share:
        check_movable(competition, "--moved-share")
    if not config.crops and not cuda:
        raise ValueError("--crops auto needs a GPU, whose memory it fills")
    if args.minutes and not (0 < args.minutes < math.inf and config.steps):
        raise ValueError(f"--minutes {args.minutes}, expected a number above 0, and steps to scale")
    if not args.present_weight > 0:
        raise ValueError(f"--present-weight {args.present_weight}, expected a number above 0")
    for option, least in (("save-every", 1), ("presence-strips", 0), ("validation-strips", 0)):
        value = getattr(args, option.replace("-", "_"))
        if value is not None and value < least:
            raise ValueError(f"--{option} {value}, expected {least} or more")


def read_config(args: argparse.Namespace, device: torch.device, strips: Strips) -> Config:
    """Return the experiment that the command line describes, for strips to train on.

    Raises:
        ValueError: a value that no experiment can have.
    """
    cuda = device.type == "cuda"
    precision = args.precision or ("16-mixed" if cuda else "32")
    if precision == "16-mixed" and not cuda:
        raise ValueError("--precision 16-mixed needs a GPU; on a CPU 32 or bf16-mixed")
    mean, std = choose_normalisation(args, strips)
    given = {each.name: vars(args)[each.name] for each in fields(Config) if each.name in args}
    derived: dict[str, Any] = {
        "classes": strips.classes,
        "extra_shares": tuple(share for _, share in args.extra),
        "mean": mean,
        "precision": precision,
        "std": std,
        "teacher": str(args.teacher or ""),
    }
    config = Config(**given | derived)
    check_config(config)
    check_options(args, config, strips.competition, cuda)
    return config


def read_machine(args: argparse.Namespace, device: torch.device) -> Machine:
    """Return where the run takes place."""
    workers = min(8, os.cpu_count() or 1) if device.type == "cuda" else 1
    workers = workers if args.workers is None else max(args.workers, 0)
    save_every = args.save_every or SAVE_EVERY[device.type]
    return Machine(device, workers, save_every, args.runs)


NOT_FITTED = ("softmax", "channels", "efficientnet_pytorch")  # of a packed member, of no fit here


def _check_start(entry: dict[str, Any], config: Config, path: Path) -> None:
    """Log where a member to start from was trained otherwise than this fit trains.

    `entry` is what its header says.

    Raises:
        ValueError: it was, and no step adapts the network.
    """
    own = {"mean": config.spec.mean, "std": config.spec.std}
    given = {key: entry[key] for key in own if key in entry}
    lacking = {key: entry[key] for key in NOT_FITTED if entry.get(key)}
    if lacking.get("channels") == list(range(config.classes)):  # as without
        del lacking["channels"]
    faults = list[tuple[str, str]]()
    if any(set(given[key]) != set(own[key]) for key in given):  # of one channel or three
        faults.append((f"was fitted with {given}, this fit has {own}", "give its --mean and --std"))
    if lacking:
        faults.append((f"was trained with {lacking}, without which this fit goes on", "give steps"))
    for fault, remedy in faults:
        if not config.steps:
            raise ValueError(f"--start-from {path}: {fault}: {remedy}")
        log.warning("--start-from %s: %s", path, fault)


def read_start(path: Path | None, config: Config) -> tuple[dict[str, Tensor], str]:
    """Return the weights to start from and their file's hash; nothing of no file.

    Raises:
        ValueError: it is no safetensors file, or as `_check_start` raises.
    """
    if path is None:
        return {}, ""
    try:
        weights = load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"--start-from {path}: no safetensors file: {error}") from error
    entry = dict[str, Any]()
    with suppress(ValueError):  # a file of another program's has none
        entry = read_entry(path)
    _check_start(entry, config, path)
    return weights, hash_file(path)


def _common_names(one: Strips, other: Strips) -> set[str]:
    """The names of the strips that two folders share: of one name, and byte for byte the same."""
    return {
        name
        for name in set(one.names).intersection(other.names)
        if (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
    }


def _read_others(folder: Path, sources: Sequence[Strips], competition: Competition) -> Strips:
    """Read the strips of --heads-on's folder; log those that are trained on too."""
    strips = read_strips(folder, competition)
    known = {name for each in sources for name in each.names}.intersection(strips.names)
    if known:
        log.warning(
            "--heads-on %s: %d of its strips, %s, are trained on too: they look easier than "
            "others, and gates will be too sure", folder, len(known), min(known),
        )  # fmt: skip
    return strips


def choose_head_pairs(
    args: argparse.Namespace, config: Config, sources: Sequence[Strips], held_out: Strips
) -> tuple[Pairs, Strips]:
    """Return the strips of the heads' last fit, and of those held out the ones left to score."""
    asked = args.heads_on or ("train" if config.fold == NO_FOLD else "held-out")
    most, to_score = args.presence_strips, args.validation_strips
    if asked == "held-out":
        if not held_out.names:
            raise ValueError("--heads-on held-out: --fold none holds no strip out; try train")
        half, spare = len(held_out.names) // 2, len(held_out.names) - to_score
        count = min(most, max(half, spare))
        return StripPairs(held_out.some(0, count)), held_out.some(count, count + to_score)
    scored = held_out.some(0, to_score)
    if asked == "none":
        return StripPairs(held_out.some(0, 0)), scored
    if asked == "train":  # of --data alone: Kaggle asks of no drawn strip, nor of pseudo-labels
        own = Batches(sources[:1], replace(config, extra_shares=()))
        return SampledPairs(own, most), scored
    used = _read_others(Path(asked), sources, held_out.competition).some(0, most)
    known = _common_names(held_out, used)
    left = replace(held_out, names=[name for name in held_out.names if name not in known])
    if known:
        say = log.info if left.names else log.warning
        say("--heads-on %s: %d held-out strips are fitted on and so not scored; %d are left",
            asked, len(known), len(left.names))  # fmt: skip
    return StripPairs(used), left.some(0, to_score)


def check_held_out(held_out: Strips, extras: Sequence[Strips]) -> None:
    """Raise ValueError where a further folder holds held-out strips; names the first."""
    for extra in extras:
        leaked = _common_names(held_out, extra)
        if leaked:
            raise ValueError(
                f"--extra {extra.folder}: holds {len(leaked)} held-out strips, like {min(leaked)}: "
                "what is scored would have been trained on; leave them out there, or give --fold "
                "none"
            )


def warn_of_known_strips(args: argparse.Namespace, config: Config, data: str) -> None:
    """Log where --start-from or --teacher was fitted on strips of `data` that are held out now.

    What a fit was of stands among --runs; of other files nothing is known.
    """
    if config.fold == NO_FOLD:
        return
    fits = list[dict[str, Any]]()
    for path in sorted(args.runs.glob(f"*/{SCORES}")):
        with suppress(ValueError):  # a damaged one says nothing
            fits.append(read_json(path))
    for option, given in (("--start-from", args.start_from), ("--teacher", args.teacher)):
        known = {"sha256": hash_file(given), "data": data} if given else {}
        same = [fit for fit in fits if known and known.items() <= fit.items()]
        if any((fit["fold"], fit["folds"]) != (config.fold, config.folds) for fit in same):
            log.warning(
                "%s %s: was fitted on strips that are held out now, so the scores will be too "
                "good; give what was fitted with this --fold and --folds", option, given,
            )  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What a fit reads beside its experiment."""

    machine: Machine
    sources: list[Strips]  # to train on: those of --data, then of each --extra
    pairs: Pairs  # of the heads' last fit
    scored: Strips  # held out, for the validation
    unlabelled: list[Strips]  # none, or those of --unlabelled
    hashes: list[str]  # of the strips of --data, held out or not, then of each other folder's
    weights: dict[str, Tensor]  # to start from, or none
    start_from: str  # hash of their file

    @property
    def data(self) -> str:
        """One hash of all strips."""
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()

    @property
    def statistics(self) -> list[Strips]:
        """Those from which batch-norm statistics are taken."""
        return [self.sources[0], *self.unlabelled]


def read_inputs(args: argparse.Namespace) -> tuple[Config, Inputs]:
    """Read and check what the command line names; the experiment's crops and steps as asked for.

    Raises:
        ValueError: something is missing, is no such thing, or does not fit the rest.
    """
    device, competition = choose_device(args.device), find_competition(args.competition)
    own = read_strips(args.data, competition)
    config, machine = read_config(args, device, own), read_machine(args, device)
    train_strips, held_out = split_folds(own, config.folds, config.fold)
    extras = [read_strips(path, competition) for path, _ in args.extra]
    sources = [train_strips, *extras]
    check_classes(sources)
    check_held_out(held_out, extras)
    counts = " + ".join(str(len(strips.names)) for strips in sources)
    log.info("%s: %s strips to train on, %d held out, on %s in %s", config.name, counts,
             len(held_out.names), device, config.precision)  # fmt: skip
    pairs, scored = choose_head_pairs(args, config, sources, held_out)
    weights, start_from = read_start(args.start_from, config)
    unlabelled = list[Strips]()
    if args.unlabelled:
        folder, names = open_images(args.unlabelled, competition)
        unlabelled = [Strips(folder, names, {}, competition)]
    hashes = [each.fingerprint() for each in (own, *extras, *unlabelled)]
    warn_of_known_strips(args, config, hashes[0])
    return config, Inputs(machine, sources, pairs, scored, unlabelled, hashes, weights, start_from)
