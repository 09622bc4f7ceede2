"""The options of train.py, by group."""

import argparse
from pathlib import Path

from kernel.shipped import add_competition_option
from training.config import NO_FOLD, PRECISIONS, Config, parse_size
from training.heads import PRESENT_WEIGHT
from training.moved_defects import METHODS

SAVE_EVERY = {"cpu": 50, "cuda": 500}  # steps


def parse_fold(text: str) -> int:
    """Return a fold's number, `NO_FOLD` for "none"."""
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"fold is {text!r}, expected a number or none")
    return NO_FOLD if text == "none" else int(text)


def parse_crops(text: str) -> int:
    """Return the crops per step, 0 for "auto"."""
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


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add what is trained on."""
    group = parser.add_argument_group("strips")
    add_competition_option(group)
    add = group.add_argument
    add("--data", type=Path, required=True, help="folder with train.csv and train_images/")
    about = "another such folder and the share of draws taken from it; never held out"
    add("--extra", type=parse_extra, nargs="+", default=[], metavar="FOLDER=SHARE", help=about)
    about = "folder of unlabelled strips, for the batch-norm statistics and --taught-gates"
    add("--unlabelled", type=Path, help=about)
    about = "the fold held out for validation, or none (default 0)"
    add("--fold", type=parse_fold, default=Config.fold, help=about)
    add("--folds", type=int, default=Config.folds, help="number of folds (default %(default)s)")
    about = "share of the crops that lie on a defect (default %(default)s)"
    add("--defect-share", type=float, default=Config.defect_share, help=about)
    about = "share of the defects that are moved to another strip (default %(default)s)"
    add("--moved-share", type=float, default=Config.moved_share, help=about)
    about = "how they are put there: blended in, or copied as they are (default %(default)s)"
    add("--moved-method", choices=METHODS, default=Config.moved_method, help=about)
    about = "1: draw classes as often as they occur, 0: all equally often (default %(default)s)"
    add("--evenness", type=float, default=Config.evenness, help=about)


def _add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add what is trained, and how."""
    add = parser.add_argument_group("network and steps").add_argument
    add("--name", required=True, help="name of the member and its file")
    add("--encoder", required=True, help="an SMP encoder, or tu-NAME for one of timm's")
    about = "an SMP architecture with SMP's own forward(), such as Unet (default %(default)s)"
    add("--arch", default=Config.arch, help=about)
    about = "pretrained weights that SMP downloads for the encoder, such as imagenet (default none)"
    add("--encoder-weights", default=Config.encoder_weights, metavar="NAME", help=about)
    about = "checkpoint to start from: every tensor that fits is loaded"
    add("--start-from", type=Path, help=about)
    about = "a member fitted by train.py, whose masks are learnt beside the truth (distillation)"
    add("--teacher", type=Path, help=about)
    about = "input channels of the network (default %(default)s)"
    add("--channels", type=int, choices=(1, 3), default=Config.channels, help=about)
    about = (
        "mean of the values in [0, 1], one, or one per channel in RGB order (default: Severstal's "
        "0.34, else measured)"
    )
    add("--mean", type=float, nargs="+", help=about)
    about = "their standard deviation, likewise (default: Severstal's 0.13, else measured)"
    add("--std", type=float, nargs="+", help=about)
    about = "steps on crops (default %(default)s)"
    add("--crop-steps", type=int, default=Config.crop_steps, help=about)
    about = "steps on whole strips (default %(default)s)"
    add("--whole-steps", type=int, default=Config.whole_steps, help=about)
    about = "scale both step counts so that the fit takes this many minutes at the measured speed"
    add("--minutes", type=float, default=0.0, help=about)
    about = "crops per step; auto: as many as fit into the GPU's memory, up to 64 (default 4)"
    add("--crops", type=parse_crops, default=Config.crops, help=about)
    about = "HEIGHTxWIDTH of a crop in pixels (default 128x256)"
    add("--crop-size", type=parse_size, default=Config.crop_size, help=about)
    about = "peak learning rate (default 3e-4)"
    add("--learning-rate", type=float, default=Config.learning_rate, help=about)
    about = "seed of the first weights, the draws and dropout (default %(default)s)"
    add("--seed", type=int, default=Config.seed, help=about)


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add where it is trained."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    about = "default: 16-mixed on a GPU, else 32; bf16-mixed is faster on a CPU with avx512_bf16"
    add("--precision", choices=PRECISIONS, help=about)
    about = "processes that load strips (default: up to 8 on a GPU, else 1)"
    add("--workers", type=int, help=about)
    about = (
        "steps between saved states; on a GPU saving one takes as long as many steps (default: "
        "{cuda} on a GPU, {cpu} on the CPU)"
    )
    add("--save-every", type=int, help=about.format(**SAVE_EVERY))


def _add_result_options(parser: argparse.ArgumentParser) -> None:
    """Add the last part, and what is left behind."""
    add = parser.add_argument_group("last fit of the heads, and results").add_argument
    about = (
        "strips of the last fit: held-out, from the fold; train, from --data, drawn as for "
        "training; a folder like --data; or none to skip it (default: held-out, train without a "
        "fold)"
    )
    add("--heads-on", metavar="STRIPS", help=about)
    about = "use at most this many strips for it (default %(default)s)"
    add("--presence-strips", type=int, default=800, help=about)
    about = (
        "weight of a class that is present, in the presence head's last fit (default %(default)s): "
        "1 leaves more clean strips empty"
    )
    add("--present-weight", type=float, default=PRESENT_WEIGHT, help=about)
    about = (
        "afterwards fit the presence head to the gates of --teacher on the --unlabelled strips, "
        "whose truth neither has seen"
    )
    add("--taught-gates", action="store_true", help=about)
    about = "score at most this many held-out strips (default %(default)s)"
    add("--validation-strips", type=int, default=100, help=about)
    about = "folder for the checkpoint and experiments.csv (default %(default)s)"
    add("--out", type=Path, default=Path("my_weights"), help=about)
    about = "folder for the states to resume from (default %(default)s)"
    add("--runs", type=Path, default=Path("runs"), help=about)
    add("--comment", default="", help="text for its column in experiments.csv")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all of them."""
    _add_data_options(parser)
    _add_network_options(parser)
    _add_machine_options(parser)
    _add_result_options(parser)
