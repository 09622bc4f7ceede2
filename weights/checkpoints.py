"""Any training framework's checkpoint → one member's weights, under the names that SMP gives them.

Read top to bottom: file → tensors → the one network in it → does it fit its declared model?
"""

import difflib
import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kernel.members import build_network

PARTS = "encoder|decoder|segmentation_head|classification_head"  # what an SMP network is made of
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # batch norm's statistics

# Metrics beside the weights: numpy's numbers, under numpy 2's name and numpy 1's. Plain data.
SCALAR = np.float64(0).__reduce__()[0]
NUMPY_NUMBERS: list[Any] = [np.dtype, SCALAR, (SCALAR, "numpy.core.multiarray.scalar")]
NUMPY_NUMBERS += [type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8", "?")]

# Tried against a checkpoint that does not fit: this project's five and the most common others.
ENCODERS = (
    "resnet18", "resnet34", "resnet50", "se_resnet50", "se_resnext50_32x4d", "densenet201",
    *(f"efficientnet-b{i}" for i in range(6)),
)  # fmt: skip
ARCHITECTURES = ("FPN", "Unet")

# --- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """One network's weights out of a file, and what was chosen or left out on the way."""

    path: Path  # the file that holds the weights
    weights: dict[str, Tensor]  # by SMP's names: encoder.…, decoder.…, segmentation_head.…
    notes: list[str]


def weights_file(path: Path) -> Path:
    """The file that holds the weights: the path itself, or inside a `save_pretrained` folder."""
    return path / "model.safetensors" if path.is_dir() else path


def read_model(folder: Path) -> dict[str, Any]:
    """`smp.create_model`'s keyword arguments, from the config.json that `save_pretrained` writes.

    Raises:
        ValueError: the config is missing, no JSON, or names no architecture.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model = {"arch": config["_model_class"], **config}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: tells no architecture ({error!r}); the manifest's entry needs `model`"
        ) from error
    return {k: v for k, v in model.items() if not k.startswith("_") and k != "encoder_weights"}


def without_activation(model: dict[str, Any]) -> dict[str, Any]:
    """The same model giving logits: the sigmoids are the kernel's, twice would be wrong."""
    kept = {k: v for k, v in model.items() if k != "activation"}
    if kept.get("aux_params"):
        kept["aux_params"] = without_activation(kept["aux_params"])
    return kept


def read_tensors(path: Path) -> object:
    """Whatever a .safetensors, .pt, .pth or .ckpt file holds, read without running its code.

    Raises:
        ValueError: the file is missing or damaged, or only code that it brings could read it.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; copy it there or correct `file`") from None
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(path, str(error))) from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path}: no checkpoint that can be read: {reason}") from error


def refusal(path: Path, reason: str) -> str:
    """What to tell about a pickle that holds more than tensors."""
    name = re.search(r"GLOBAL ([\w.]+)", reason)
    return (
        f"{path}: refused, it is no plain state_dict and unpickling it could run code"
        f"{f' ({name[1]})' if name else ''}; where it was trained, save the weights alone: "
        "torch.save(network.state_dict(), 'member.pt')"
    )


def flatten(node: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dictionaries under its dotted name: `state_dict.model.encoder.…`."""
    if isinstance(node, Tensor):
        yield prefix.removesuffix("."), node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from flatten(value, f"{prefix}{key}.")


# --- choosing -----------------------------------------------------------------------------------


def find_networks(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """SMP networks by the wrapper's prefix: `state_dict.module.`, `model.`, `ema.`, or none.

    A tensor belongs to the longest prefix that it starts with, so that what stands beside the
    network (a loss's weights, a counter) is left out and what stands in it is kept.
    """
    matches = (re.match(rf"(|.*?\.)(?:{PARTS})\.", name) for name in tensors)
    prefixes = {match[1] for match in matches if match}
    networks: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    for name, tensor in tensors.items():
        owner = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
        if owner is not None:
            networks[owner][name.removeprefix(owner)] = tensor
    return networks


def is_ema(prefix: str) -> bool:
    """Whether a prefix names an average of the weights over the training steps."""
    return not {"ema", "averaged", "shadow"}.isdisjoint(re.split(r"[._]", prefix))


def choose_network(networks: dict[str, dict[str, Tensor]], path: Path) -> str:
    """The prefix of the network to pack: the EMA copy where there is one.

    Raises:
        ValueError: there is no network, or there are several and nothing says which.
    """
    candidates = [p for p in networks if is_ema(p)] or list(networks)
    if not candidates:
        raise ValueError(f"{path}: no SMP network in it, expected names like encoder.conv1.weight")
    if len(candidates) > 1:
        listed = ", ".join(prefix or "the top" for prefix in sorted(candidates))
        raise ValueError(f"{path}: several networks ({listed}); save the one to pack alone")
    return candidates[0]


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a `save_pretrained` folder, a state_dict, Lightning, Catalyst, timm or safetensors.

    An EMA copy that holds parameters only takes batch norm's statistics from the plain weights.

    Raises:
        ValueError: it cannot be read safely, or holds no network or more than one.
    """
    path = weights_file(path)
    networks = find_networks(dict(flatten(read_tensors(path))))
    chosen = choose_network(networks, path)
    weights, notes = networks.pop(chosen), []
    if is_ema(chosen):
        notes.append(f"took the EMA copy ({chosen.removesuffix('.')})")
    if is_ema(chosen) and len(networks) == 1:
        plain = next(iter(networks.values()))
        lacking = {k: v for k, v in plain.items() if k.endswith(BUFFERS) and k not in weights}
        weights |= lacking
        notes += [f"{len(lacking)} batch-norm statistics from the plain weights"] * bool(lacking)
    return Checkpoint(path, weights, notes)


# --- fitting ------------------------------------------------------------------------------------


def nearest(name: str, known: list[str]) -> str:
    """The known names that look like this one, for an error message."""
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known[:12])}, …"


def build_declared(model: dict[str, Any], where: str) -> nn.Module:
    """The untrained network of a manifest's entry.

    Raises:
        ValueError: SMP knows no such architecture or encoder (the nearest are named) or option.
    """
    import segmentation_models_pytorch as smp
    import timm

    architectures = sorted(smp.MODEL_ARCHITECTURES_MAPPING)
    encoders = [*smp.encoders.get_encoder_names(), *(f"tu-{n}" for n in timm.list_models())]
    arch, encoder = model["arch"], model["encoder_name"]
    try:
        return build_network(model)
    except Exception as error:  # SMP and timm raise whatever they like for a wrong argument
        if arch.lower() not in architectures:
            fault = f"unknown architecture {arch!r}; {nearest(arch, architectures)}"
        elif encoder.split(".")[0] not in encoders:
            fault = f"unknown encoder {encoder!r}; {nearest(encoder, encoders)}"
        else:
            fault = f"SMP cannot build {model}: {error}"
        raise ValueError(f"{where}: {fault}") from error


def load_weights(network: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Loads strictly, in the network's own precision.

    Raises:
        ValueError: a key is missing, unexpected or of another shape; the first is named.
    """
    wanted = network.state_dict()
    faults = [f"lacks {key}" for key in wanted if key not in weights]
    faults += [f"has the unexpected {key}" for key in weights if key not in wanted]
    faults += [
        f"has {key} as {tuple(weights[key].shape)}, expected {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if faults:
        raise ValueError(f"{path}: {faults[0]}; {len(faults)} keys differ from the declared model")
    network.load_state_dict(weights, strict=True)


def fit(checkpoint: Checkpoint, model: dict[str, Any]) -> nn.Module:
    """The declared network with the checkpoint's weights in it.

    Counters of batch norm that old or EMA checkpoints lack are added as zero: nothing reads them.

    Raises:
        ValueError: a key is missing, unexpected or of another shape; names the likely model.
    """
    network = build_declared(model, str(checkpoint.path))
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            checkpoint.weights.setdefault(key, torch.zeros_like(value))
    try:
        load_weights(network, checkpoint.weights, checkpoint.path)
    except ValueError as error:
        raise ValueError(f"{error}; {likely_model(checkpoint.weights, model)}") from None
    return network


def likeness(weights: dict[str, Tensor], model: dict[str, Any]) -> float:
    """Share of names, and of names with their shapes, that a checkpoint and a model both have."""
    with torch.device("meta"):  # shapes only: no memory, no time
        wanted = build_network(model).state_dict()
    sides = [set(side) | {(k, v.shape) for k, v in side.items()} for side in (weights, wanted)]
    return len(sides[0] & sides[1]) / len(sides[0] | sides[1])


def best_fit(
    weights: dict[str, Tensor], models: list[dict[str, Any]]
) -> tuple[float, dict[str, Any]]:
    """The model that has most in common with a checkpoint, the first of equals, and its share."""
    shares = [likeness(weights, model) for model in models]
    return max(shares), models[shares.index(max(shares))]


def likely_model(weights: dict[str, Tensor], declared: dict[str, Any]) -> str:
    """Which encoder and architecture a checkpoint looks like, in words."""
    heads = {k: v for k, v in declared.items() if k in ("in_channels", "classes", "aux_params")}
    plain = {"arch": declared["arch"], "encoder_name": declared["encoder_name"]} | heads
    encoders = [plain | {"encoder_name": encoder} for encoder in ENCODERS]
    share, best = best_fit(weights, [declared, plain, *encoders])
    decoders = [plain | {"encoder_name": best["encoder_name"], "arch": a} for a in ARCHITECTURES]
    share, best = best_fit(weights, [best, *decoders])
    likely = f"{best['arch']} with encoder {best['encoder_name']} ({share:.0%} alike)"
    if best is declared:
        presence = any(name.startswith("classification_head") for name in weights)
        return (
            f"{likely} is right, so compare in_channels, classes and aux_params: "
            f"the file has {'a' if presence else 'no'} presence head"
        )
    return f"it looks like {likely}" if share > 0.5 else "it is none of the usual encoders"
