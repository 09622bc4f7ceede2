"""Fit one member: an SMP network with a mask head and a presence head.

It reads the competition's own train.csv (either layout) and train_images, or what synthetic.py
writes in their likeness. A fit has three parts:

1. Crops. Windows of the strips, most of them around a defect of a class that is drawn, teach the
   mask head, and cell by cell the features that the presence head pools.
2. Whole strips. The batch-norm statistics are taken anew from whole strips and frozen; then whole
   strips, half of them clean, teach the presence head what it will be asked on Kaggle. Pooled over
   crops alone it learns another question: a gate of that kind took a prototype's Dice from 0.83
   to 0.03.
3. The heads alone, on strips that the network has not seen: the presence head is fitted once more,
   on hundreds of them, and the mask head's biases are set so that the kernel's threshold cuts each
   class where its Dice is best.

RUNS/NAME keeps the states and the losses of parts 1 and 2. The same command goes on from the last
state, and ends with the same weights as if it had not been stopped, on a CPU bit for bit.
"""

import argparse
import hashlib
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kernel.checks import read_json
from kernel.command import new_parser, run_command
from kernel.competition import Competition
from kernel.device import device_usable, pick_device
from kernel.files import json_text
from kernel.images import image_to_tensor
from kernel.logs import log
from kernel.members import hash_file, read_entry, to_channels
from kernel.mounts import open_images
from training.batches import Batches
from training.config import (
    NO_FOLD,
    PRECISIONS,
    Config,
    add_competition_options,
    check_config,
    parse_size,
    read_competition,
)
from training.fit import Machine, find_crops, fit_network, fit_within_memory
from training.folds import split_folds
from training.heads import PRESENT_WEIGHT, Pairs, SampledPairs, StripPairs, refit_heads
from training.module import MemberModule
from training.moved_defects import METHODS
from training.pace import choose_steps
from training.results import (
    SCORES,
    add_experiment,
    validate,
    warn_of_shifts,
    write_checkpoint,
    write_scores,
)
from training.states import crops_of, describe_experiment
from training.strips import Strips, check_classes, read_each, read_strips
from training.teacher import read_teacher

SAVE_EVERY = {"cpu": 50, "cuda": 500}  # steps

EXAMPLE = (
    "  python training/train.py --data data/steel --name resnet34 --encoder resnet34 --arch Unet "
    "--fold 1"
)


# --- command line ---------------------------------------------------------------------------------


def parse_fold(text: str) -> int:
    """Return a fold's number, `NO_FOLD` for "none"."""
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"fold is {text!r}, expected a number or none")
    return NO_FOLD if text == "none" else int(text)


def parse_crops(text: str) -> int:
    """Return the crops a step, 0 for "auto"."""
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"crops are {text!r}, expected a number or auto")
    return 0 if text == "auto" else int(text)


def parse_extra(text: str) -> tuple[Path, float]:
    """Return a folder and the share of the draws that come from it."""
    folder, _, share = text.rpartition("=")
    try:
        return Path(folder or "?"), float(share if folder else "?")
    except ValueError:
        message = f"extra is {text!r}, expected FOLDER=SHARE like data/steel=0.5"
        raise argparse.ArgumentTypeError(message) from None


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add what is trained on."""
    group = parser.add_argument_group("strips")
    add_competition_options(group)
    add = group.add_argument
    add("--data", type=Path, required=True, help="folder with train.csv and train_images/")
    about = "a further folder like it and the share of the draws that come from it; never held out"
    add("--extra", type=parse_extra, nargs="+", default=[], metavar="FOLDER=SHARE", help=about)
    about = "folder of strips without truth, for the batch-norm statistics and --taught-gates"
    add("--unlabelled", type=Path, help=about)
    about = "the fold held out for validation, or none (default 0)"
    add("--fold", type=parse_fold, default=Config.fold, help=about)
    add("--folds", type=int, default=Config.folds, help="default %(default)s")
    about = "share of the defects that are moved to another strip (default %(default)s)"
    add("--moved-share", type=float, default=Config.moved_share, help=about)
    about = "how they are moved (default %(default)s)"
    add("--moved-method", choices=METHODS, default=Config.moved_method, help=about)
    about = "1: classes as they come, 0: alike (default %(default)s)"
    add("--evenness", type=float, default=Config.evenness, help=about)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add what is trained, and how."""
    add = parser.add_argument_group("network and steps").add_argument
    add("--name", required=True, help="the member's name, and its file's")
    add("--encoder", required=True, help="any encoder that SMP or tu- names")
    add(
        "--arch",
        default=Config.arch,
        help="of SMP, with its forward, like Unet (default %(default)s)",
    )
    about = "weights that SMP downloads for the encoder, like imagenet (default: none)"
    add("--encoder-weights", default=Config.encoder_weights, metavar="NAME", help=about)
    about = "a checkpoint whose weights to begin with, all that fit"
    add("--start-from", type=Path, help=about)
    about = "a member that train.py wrote, whose masks are learnt beside the truth (distillation)"
    add("--teacher", type=Path, help=about)
    about = "of the network's input (default %(default)s)"
    add("--channels", type=int, choices=(1, 3), default=Config.channels, help=about)
    about = (
        "of values in [0, 1], one or one a channel, RGB (default: Severstal's 0.34, else measured)"
    )
    add("--mean", type=float, nargs="+", help=about)
    add("--std", type=float, nargs="+", help="likewise (default: Severstal's 0.13, else measured)")
    about = "steps on crops (default %(default)s)"
    add("--crop-steps", type=int, default=Config.crop_steps, help=about)
    about = "steps on whole strips (default %(default)s)"
    add("--whole-steps", type=int, default=Config.whole_steps, help=about)
    about = (
        "scale both numbers of steps by one factor so that the fit takes so long, by its own pace"
    )
    add("--minutes", type=float, default=0.0, help=about)
    about = "crops a step; auto: as many as fit into the GPU's memory, up to 64 (default 4)"
    add("--crops", type=parse_crops, default=Config.crops, help=about)
    about = "HEIGHTxWIDTH of a crop in pixels (default 128x256)"
    add("--crop-size", type=parse_size, default=Config.crop_size, help=about)
    add("--learning-rate", type=float, default=Config.learning_rate, help="its peak (default 3e-4)")
    add("--seed", type=int, default=Config.seed)


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add where it is trained."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    about = "default: 16-mixed on a GPU, else 32; bf16-mixed pays on a CPU with avx512_bf16"
    add("--precision", choices=PRECISIONS, help=about)
    about = "processes that load strips (default: up to 8 on a GPU, else 1)"
    add("--workers", type=int, help=about)
    about = (
        "steps between two states, each of many steps' time on a GPU (default: {cuda}, CPU {cpu})"
    )
    add("--save-every", type=int, help=about.format(**SAVE_EVERY))


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Add the last part, and what is left behind."""
    add = parser.add_argument_group("heads' last fit and results").add_argument
    about = (
        "strips of the last fit: held-out, of the fold; train, of --data, drawn as for training; "
        "a folder like --data; none, without it (default: held-out, train without a fold)"
    )
    add("--heads-on", metavar="STRIPS", help=about)
    about = "strips of the last fit, at most (default %(default)s)"
    add("--presence-strips", type=int, default=800, help=about)
    about = (
        "weight of a class that is there in the presence head's last fit (default %(default)s): "
        "1 keeps more clean strips empty"
    )
    add("--present-weight", type=float, default=PRESENT_WEIGHT, help=about)
    about = (
        "then fit the presence head to the gates of --teacher on the --unlabelled strips, whose "
        "truth neither has seen"
    )
    add("--taught-gates", action="store_true", help=about)
    about = "held-out strips that are scored, at most (default %(default)s)"
    add("--validation-strips", type=int, default=100, help=about)
    about = "folder of checkpoint and experiments.csv (default %(default)s)"
    add("--out", type=Path, default=Path("my_weights"), help=about)
    about = "folder of the states to resume from (default %(default)s)"
    add("--runs", type=Path, default=Path("runs"), help=about)
    add("--comment", default="", help="for experiments.csv")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    # A list's lines are searched for options, by their whole names:
    parser = new_parser(__doc__, EXAMPLE, allow_abbrev=False)
    add_data_options(parser)
    add_network_options(parser)
    add_machine_options(parser)
    add_result_options(parser)
    return parser.parse_args(arguments)


# --- what was asked -------------------------------------------------------------------------------


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
        raise ValueError(f"--device {asked}: {torch.cuda.device_count()} GPUs are here")
    if device.type == "cuda" and not device_usable(device):
        raise ValueError(
            f"--device {asked}: it runs nothing, as Kaggle's P100 with its PyTorch: choose T4 or L4"
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


def check_options(args: argparse.Namespace, config: Config, rules: Competition, cuda: bool) -> None:
    """Raise ValueError for the first option that does not fit the experiment or the machine."""
    gated = bool(config.teacher) and read_teacher(Path(config.teacher), config.classes).spec.gated
    if args.taught_gates and not (gated and args.unlabelled):
        raise ValueError("--taught-gates needs a --teacher with a presence head, and --unlabelled")
    if config.moved_share and (rules.channels, rules.bits) != (1, 8):
        raise ValueError("--moved-share: defects are moved between grey images of 8 bits alone")
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
    config = Config(
        name=args.name, encoder=args.encoder, arch=args.arch, fold=args.fold, folds=args.folds,
        crop_steps=args.crop_steps, whole_steps=args.whole_steps, crop_size=args.crop_size,
        classes=strips.classes, seed=args.seed,
        learning_rate=args.learning_rate, precision=precision,
        evenness=args.evenness, encoder_weights=args.encoder_weights, channels=args.channels,
        teacher=str(args.teacher or ""),
        mean=mean, std=std, crops=args.crops, moved_share=args.moved_share,
        moved_method=args.moved_method, extra_shares=tuple(share for _, share in args.extra),
    )  # fmt: skip
    check_config(config)
    check_options(args, config, strips.competition, cuda)
    return config


def read_machine(args: argparse.Namespace, device: torch.device) -> Machine:
    """Return where the run takes place."""
    workers = min(8, os.cpu_count() or 1) if device.type == "cuda" else 1
    workers = workers if args.workers is None else max(args.workers, 0)
    save_every = args.save_every or SAVE_EVERY[device.type]
    return Machine(device, workers, save_every, args.runs)


def read_start(path: Path | None, config: Config) -> tuple[dict[str, Tensor], str]:
    """Return the weights to start from and their file's hash; nothing of no file.

    Raises:
        ValueError: it is no safetensors file, or without steps one of another mean or std.
    """
    if path is None:
        return {}, ""
    try:
        weights = load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"--start-from {path}: no safetensors file: {error}") from error
    entry, own = dict[str, Any](), {"mean": config.spec.mean, "std": config.spec.std}
    with suppress(ValueError):  # a file of another program's has none
        entry = read_entry(path)
    given = {key: entry[key] for key in own if key in entry}
    if any(set(given[key]) != set(own[key]) for key in given):  # of one channel or three
        fault = f"--start-from {path}: was fitted with {given}, this fit has {own}"
        if not config.steps:
            raise ValueError(f"{fault}: give its --mean and --std")
        log.warning("%s", fault)
    return weights, hash_file(path)


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
    others = _read_others(Path(asked), sources, held_out.competition)
    return StripPairs(others.some(0, most)), scored


def check_held_out(held_out: Strips, extras: Sequence[Strips]) -> None:
    """Raise ValueError where a further folder holds held-out strips; names the first."""
    for extra in extras:
        leaked = [
            name
            for name in set(held_out.names).intersection(extra.names)
            if (held_out.folder / name).read_bytes() == (extra.folder / name).read_bytes()
        ]
        if leaked:
            raise ValueError(
                f"--extra {extra.folder}: holds {len(leaked)} held-out strips, like {min(leaked)}: "
                "what is scored would have been trained on; leave them out there, or give --fold "
                "none"
            )


# --- the fit --------------------------------------------------------------------------------------


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
    def statistics(self) -> list[Path]:
        """The images from which batch-norm statistics are taken."""
        strips = (self.sources[0], *self.unlabelled)
        return [each.folder / name for each in strips for name in each.names]


def read_inputs(args: argparse.Namespace) -> tuple[Config, Inputs]:
    """Read and check what the command line names; the experiment's crops and steps as asked for.

    Raises:
        ValueError: something is missing, is no such thing, or does not fit the rest.
    """
    device, competition = choose_device(args.device), read_competition(args)
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


def choose_crops_and_steps(
    args: argparse.Namespace, config: Config, inputs: Inputs
) -> tuple[Config, int]:
    """Return the experiment with the steps that its minutes hold, and the crops a step."""
    machine = inputs.machine
    crops = config.crops or crops_of(machine.folder(config)) or find_crops(config, machine.device)
    if not args.minutes:
        return config, crops
    strips = 2 * len(inputs.pairs) + len(inputs.scored.names)
    strips += len(inputs.unlabelled[0].names) if args.taught_gates else 0
    fitted = replace(config, crops=crops)
    chosen = choose_steps(fitted, inputs.sources, machine, args.minutes, strips)
    return replace(chosen, crops=config.crops), crops


def train(args: argparse.Namespace) -> int:
    """Fit, write the checkpoint, validate, and add a row to experiments.csv."""
    config, inputs = read_inputs(args)
    config, crops = choose_crops_and_steps(args, config, inputs)
    experiment = describe_experiment(config, inputs.data, inputs.start_from)
    sources, machine, statistics = inputs.sources, inputs.machine, inputs.statistics
    network, seconds = fit_within_memory(
        lambda fitted: fit_network(
            sources, fitted, machine, experiment, statistics, inputs.weights
        ),
        replace(config, crops=crops),
    )
    module = MemberModule(network, config, config.parts[1])
    taught_on = inputs.unlabelled[0] if args.taught_gates else None
    refit_heads(module, inputs.pairs, args.present_weight, taught_on)
    checkpoint = args.out / f"{config.name}.safetensors"
    before = hash_file(checkpoint) if checkpoint.is_file() else ""
    write_checkpoint(network, config, checkpoint)
    log.info("%s: written", checkpoint)
    sha256 = hash_file(checkpoint)
    scores = validate(network, config, inputs.scored, machine.device)
    add_experiment(args.out / "experiments.csv", config, scores, seconds, args.comment)
    fit = {"folds": config.folds, "data": inputs.hashes[0], "sha256": sha256}
    write_scores(machine.folder(config) / SCORES, config, scores, fit)
    print(json_text(scores.summary()), end="")
    if sha256 != before:
        warn_of_shifts(checkpoint)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: train(parse_args(arguments)))


if __name__ == "__main__":
    main()
