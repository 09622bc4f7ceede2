"""What is this file? Which encoder and architecture a checkpoint of another model looks like."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernel.members import build_network

# Tried against a checkpoint of another model: this project's five and the most common others.
ENCODERS = (
    "resnet18", "resnet34", "resnet50", "se_resnet50", "se_resnext50_32x4d", "densenet201",
    "efficientnet-b0", "efficientnet-b1", "efficientnet-b2", "efficientnet-b3", "efficientnet-b4",
    "efficientnet-b5",
)  # fmt: skip
ARCHITECTURES = ("FPN", "Unet")
LIKELY, RIGHT = 0.5, 0.9  # shares of names and shapes that a checkpoint and a model have in common


def _traits(weights: Mapping[str, Tensor]) -> frozenset[object]:
    """Names, and names with their shapes: what a checkpoint and a model have in common."""
    return frozenset(weights) | {(key, value.shape) for key, value in weights.items()}


def _likeness(found: frozenset[object], wanted: frozenset[object]) -> float:
    return len(found & wanted) / max(len(found | wanted), 1)


def _model_traits(model: dict[str, Any]) -> frozenset[object]:
    for device in ("meta", "cpu"):  # shapes only: no memory, no time; some encoders compute there
        try:
            with torch.device(device):
                return _traits(build_network(model).state_dict())
        except Exception:  # SMP does not combine every decoder with every encoder
            continue
    return frozenset()


@functools.cache
def _encoder_traits(encoder: str, in_channels: int) -> frozenset[object]:
    """Those of an encoder under an FPN, which takes any."""
    model = {"arch": "FPN", "encoder_name": encoder, "in_channels": in_channels}
    return _encoder_part(_model_traits(model))


def _encoder_part(traits: frozenset[object]) -> frozenset[object]:
    names = ((trait, trait[0] if isinstance(trait, tuple) else trait) for trait in traits)
    return frozenset(trait for trait, name in names if str(name).startswith("encoder."))


def likely_model(weights: dict[str, Tensor], declared: dict[str, Any]) -> str:
    """Say which encoder and architecture a checkpoint looks like."""
    found, in_channels = _traits(weights), declared.get("in_channels", 3)  # SMP's default
    own = _encoder_part(found)
    encoders = (declared["encoder_name"], *ENCODERS)
    encoder = max(encoders, key=lambda name: _likeness(own, _encoder_traits(name, in_channels)))
    heads = {k: v for k, v in declared.items() if k in ("in_channels", "classes", "aux_params")}
    architectures = (declared["arch"], *ARCHITECTURES)
    plain = [{"arch": arch, "encoder_name": encoder} | heads for arch in architectures]
    models = [declared, *plain]
    shares = [_likeness(found, _model_traits(model)) for model in models]
    share = max(shares)
    best = models[shares.index(share)]  # the first of equals
    if share <= LIKELY:
        return "it is none of the usual encoders; correct `model`"
    likely = f"{best['arch']} with encoder {best['encoder_name']} ({share:.0%} alike)"
    if best is not declared:
        return f"it looks like {likely}; correct `model`"
    if share < RIGHT:
        return f"none of the usual models is closer than {likely}: correct `model` and its options"
    presence = "a" if any(name.startswith("classification_head") for name in weights) else "no"
    return (
        f"{likely} is right, so compare in_channels, classes and aux_params: "
        f"the file has {presence} presence head"
    )
