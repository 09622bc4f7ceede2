"""A manifest's entry, held against all that came with its weights."""

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kernel.faults import short
from kernel.manifest import MemberSpec
from packing.checkpoints import MAX_LISTED, Checkpoint, is_outside_layer, is_plain
from packing.models import (
    FITTING,
    architectures,
    class_of,
    config_of,
    head_options,
    options_of,
    with_todays_options,
)
from packing.names import PLACES, normalisation_of, said_of_images, words_of

NORMS = {True: "batchnorm", False: "identity"}  # decoder_use_norm, in other words

# --- saved configurations -------------------------------------------------------------------------

MAY_BE_NONE = ("activation", "aux_params", "decoder_attention_type")  # SMP: None; others: "none"


def _in_smps_words(key: str, value: Any) -> Any:
    """An option in SMP's words, where another program says "none", "" or False, or "5"."""
    if isinstance(value, list | tuple):
        return [_in_smps_words(key, each) for each in value]
    if key in MAY_BE_NONE and (value is False or str(value).lower() in ("none", "")):
        return None
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _comparable(
    model: Mapping[str, Any], known: Mapping[str, Any], softmax: bool = False
) -> dict[str, Any]:
    """What a `model` says of the known options, in one spelling, but for dropout, training's."""
    renamed = with_todays_options(dict(model))
    said = {
        key: _in_smps_words(key, value)
        for key, value in renamed.items()
        if key in known and not key.endswith("dropout")
    }
    said |= {"arch": str(said["arch"]).lower()} if "arch" in said else {}
    if said.get("activation") in FITTING[softmax]:
        said["activation"] = None
    if isinstance(said.get("aux_params"), Mapping):
        said["aux_params"] = _comparable(head_options() | said["aux_params"], head_options())
    # a tuple is a list
    plain: dict[str, Any] = json.loads(json.dumps(said, default=str, skipkeys=True))
    return plain


def _meaning(key: str, value: Any, model: Mapping[str, Any]) -> Any:
    """What an option of a whole `model` does, where SMP knows two words for it."""
    if key == "decoder_use_norm" and isinstance(value, bool):
        return NORMS[value]
    if (model["arch"], key, value) == ("deeplabv3", "upsampling", None):
        depth = model["encoder_depth"]
        return 2**depth if depth <= 3 else model["encoder_output_stride"]
    return value


def _check_config(
    config: Mapping[str, Any], model: dict[str, Any], where: str, softmax: bool
) -> None:
    """Raise ValueError where a configuration saved with the weights contradicts `model`.

    An option that `model` leaves out has SMP's default; the activation fits a member's `softmax`.
    An `arch` that SMP does not know is another program's word; `_model_class` is SMP's own.
    """
    options = options_of(class_of(model))
    if "_model_class" not in config and str(config.get("arch")).lower() not in architectures():
        config = {key: value for key, value in config.items() if key != "arch"}
    known = {key: value for key, value in options.items() if key != "encoder_weights"}
    declared = _comparable(known | model, known | {"arch": None})
    found = _comparable({"arch": model["arch"], **config}, declared, softmax)
    for key, saved in found.items():
        if key in ("classes", "in_channels") and not isinstance(config[key], int):
            continue  # another program's word, such as the classes' names; the weights' shapes tell
        if _meaning(key, saved, declared) != _meaning(key, declared[key], declared):
            raise ValueError(
                f"model's {key} is {short(declared[key])}, {where} says {short(saved)}; correct "
                "`model`, or take that configuration away if it is not of these weights"
            )


def _saved_configs(source: Path, checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """Return every configuration of a network that came with the weights: where → `model`."""
    configs: dict[str, Mapping[str, Any]] = {
        where: config for where, config in checkpoint.configs.items() if "encoder_name" in config
    }
    path = config_of(source)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return configs
    if isinstance(config, dict) and {"_model_class", "encoder_name"} & set(config):
        arch = {"arch": config["_model_class"]} if "_model_class" in config else {}
        configs[str(path)] = config | arch
    return configs


HEADER = ("softmax", "channels", "efficientnet_pytorch")  # what the weights were trained for


def _check_header(checkpoint: Checkpoint, spec: MemberSpec) -> None:
    """Raise ValueError where the entry contradicts the header that train.py or a build wrote.

    What the header leaves out the entry may add. Shifts are not compared: they are calibrated.
    """
    for key in HEADER:
        saved, declared = checkpoint.header.get(key), getattr(spec, key)
        in_order = list(range(spec.model.get("classes", 1))) if key == "channels" else declared
        if saved and saved != (declared or in_order):
            raise ValueError(
                f"{key} is {short(declared)}, {checkpoint.path}'s header says {short(saved)}; "
                "correct it, or save the weights without that header if it is not of them"
            )


OLD_PADDING = re.compile("efficientnet-b[1-7]")  # encoders that SMP before 0.3 padded otherwise


def _note_padding(
    checkpoint: Checkpoint, spec: MemberSpec, configs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Note that an EfficientNet may be of an SMP that padded otherwise, where nothing tells.

    `save_pretrained` writes `_model_class` since SMP 0.3, and train.py a header.
    """
    encoder = spec.model["encoder_name"]
    told = checkpoint.header or any("_model_class" in config for config in configs.values())
    if OLD_PADDING.fullmatch(encoder) and not spec.efficientnet_pytorch and not told:
        checkpoint.notes.append(
            f"{encoder}: trained with SMP before 0.3? Then its padding was another; write "
            '"efficientnet_pytorch": "0.6.3" in the entry'
        )


def _note_softmax(checkpoint: Checkpoint, spec: MemberSpec) -> None:
    """Note outputs that are no class, as of a background, without a softmax: no tensor tells."""
    outputs = spec.model.get("classes", 1)  # SMP's default
    if spec.channels and len(spec.channels) < outputs and not spec.softmax:
        others = sorted({*range(outputs)} - {*spec.channels})
        checkpoint.notes.append(
            f"outputs {others} are not among `channels`: trained with cross-entropy, as with a "
            'background? Then write "softmax": true in the entry: without it its masks are wrong'
        )


# --- normalisation --------------------------------------------------------------------------------


def _fitting_scales(found: list[float], declared: list[float], bits: int) -> set[int]:
    """At which numbers are the declared ones, 1 for those of [0, 1]; bfloat16 keeps 8 bits."""
    n = max(len(found), len(declared))
    pairs = list(zip(found * (n // len(found)), declared * (n // len(declared)), strict=True))
    return {
        scale
        for scale in (1, 255, 2**bits - 1)
        if all(abs(a - scale * b) <= 5e-3 * abs(scale * b) + 1e-6 for a, b in pairs)
    }


def _numbers(found: object) -> list[float]:
    """The numbers of a list, a tuple, an array or one number; none of what is something else."""
    if isinstance(found, list | tuple):
        parts = [_numbers(each) for each in found]
        return [number for part in parts for number in part] if all(parts) else []
    if isinstance(found, np.ndarray | np.generic):
        return _numbers(found.tolist())
    return [found] if type(found) in (int, float) else []  # type: ignore[list-item]


def _normalisations(
    checkpoint: Checkpoint, configs: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str, list[float]]]:
    """Each mean and std that came with the weights: where, which of both, its numbers.

    A number by itself may be a score's mean; with its std, where options stand, it is of images.
    """
    for name, tensor in checkpoint.left_out.items():
        kind = normalisation_of(name)
        if kind and is_plain(tensor):
            yield f"{checkpoint.path}: {name}", kind, tensor.flatten().tolist()
    for where, config in configs.items():
        kinds = {key: kind for key in config if (kind := said_of_images(str(key)))}
        place = words_of(re.split(r"[./ ]", where)[-1])
        both = len({*kinds.values()}) == 2 and place <= PLACES
        for key, kind in kinds.items():
            if both or isinstance(config[key], list | tuple | np.ndarray):
                yield f"{where}: {key}", kind, _numbers(config[key])


def _named_normalize(transform: object) -> Iterator[Mapping[str, Any]]:
    """Each `Normalize` in a transform that albumentations wrote, a list of transforms or one."""
    if isinstance(transform, list):
        for each in transform:
            yield from _named_normalize(each)
    if isinstance(transform, dict):
        if str(transform.get("__class_fullname__")).rpartition(".")[2] == "Normalize":
            yield transform
        yield from _named_normalize(list(transform.values()))


def _saved_transforms(source: Path) -> dict[str, Mapping[str, Any]]:
    """Return every `Normalize` in albumentations' files beside the weights: where → options."""
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted(config_of(source).parent.glob("albumentations_config_*.json")):
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found |= {f"{path}'s Normalize": options for options in _named_normalize(saved)}
    return found


def _check_normalisation(
    checkpoint: Checkpoint,
    spec: MemberSpec,
    configs: Mapping[str, Mapping[str, Any]],
    bits: int,
) -> None:
    """Hold the manifest's mean and std against every one that came with the weights.

    `configs` are further ones than the checkpoint's own; `bits` are of the competition's images.

    Raises:
        ValueError: another one; names it and both values.
    """
    declared = {"mean": spec.mean, "std": spec.std}
    every = {**checkpoint.configs, **configs}
    places: dict[str, list[tuple[str, str, list[float], set[int]]]] = {}
    for where, kind, found in _normalisations(checkpoint, every):
        if len(found) not in (1, 3):
            continue
        scales = _fitting_scales(found, declared[kind], bits)
        if not scales:
            raise ValueError(
                f"{where} is {[round(each, 4) for each in found]}, the manifest's {kind} is "
                f"{declared[kind]}; write what it was trained with, or save it without that"
            )
        place = re.sub("(?i)mean|std", "", where)
        places.setdefault(place, []).append((where, kind, found, scales))
    for said in places.values():  # a std of 1 beside a mean of 0-255 is of 0-255 too
        fitting = [scales for *_, scales in said]
        if set.intersection(*fitting):
            continue
        scale = max(set.union(*fitting))
        where, kind, found, _ = next(each for each in said if scale not in each[-1])
        if max(found) < 1:  # of [0, 1] beyond doubt
            continue
        raise ValueError(
            f"{where} is {[round(each, 4) for each in found]} of 0-{scale}, as what stands beside "
            f"it, the manifest's {kind} is {declared[kind]}; divide by {scale}, "
            f"{[float(f'{each / scale:.4g}') for each in found]}"
        )


AS_IMAGES = ((1, 1, 1, 1), (1, 3, 1, 1))  # shapes of a number a channel, beside (B, C, H, W)


def _note_range(checkpoint: Checkpoint, spec: MemberSpec, bits: int) -> None:
    """Note a std that agrees, in the form in which SMP's Lightning examples register it.

    They take it, of [0, 1], from pixels of 0-255 (SMP's issue 1224), and no tensor tells.
    """
    for name, tensor in checkpoint.left_out.items():
        if normalisation_of(name) != "std" or tuple(tensor.shape) not in AS_IMAGES:
            continue
        if is_plain(tensor) and 1 in _fitting_scales(tensor.flatten().tolist(), spec.std, bits):
            most = 2**bits - 1
            checkpoint.notes.append(
                f"{name}, as the entry's std: trained on pixels of 0-{most}, as by SMP's Lightning "
                f"examples? Then divide the entry's mean and std by {most}"
            )
            return


# --- layers around the network --------------------------------------------------------------------

NARROWEST = 16  # channels of a feature of SMP's decoders; what takes fewer takes an image or masks


def _is_norm(name: str, weight: Tensor, others: Container[str]) -> bool:
    """A norm's weight has a bias or a mean beside it, which a loss's or an activation's has not."""
    beside = (f"{name.rpartition('.')[0]}.{each}" for each in ("bias", "running_mean"))
    return weight.ndim == 1 and any(each in others for each in beside)


def _place_of(weight: Tensor, takes_image: bool, channels: int, classes: int) -> str:
    """Where a convolution, in groups too, or a norm fits the network; nothing for other layers.

    A convolution stands before the input only where one `takes_image`: a head has few outputs too.
    """
    before = behind = False
    if weight.ndim == 4:
        out, taken = weight.shape[:2]
        before = takes_image and out == channels
        behind = taken == classes or (out == classes and classes % taken == 0)
    elif weight.ndim == 1:
        before, behind = (len(weight) == size for size in (channels, classes))
    return "before its input" if before else "behind its masks" if behind else ""


def _listed(layers: Iterable[str]) -> str:
    """The modules that layers' weights belong to, a list of them once: `attention, edge.conv`."""
    modules = (name.rpartition(".")[0] or name for name in layers)
    names = list(dict.fromkeys(re.split(r"\.\d+(?:\.|$)", each)[0] for each in modules))
    more = [f"and {len(names) - MAX_LISTED} more"] if len(names) > MAX_LISTED else []
    return ", ".join(names[:MAX_LISTED] + more)


def _check_layers(checkpoint: Checkpoint, model: Mapping[str, Any]) -> None:
    """Refuse a trained layer outside the network that fits before its input or behind its masks.

    A stem, or a layer that refines the masks, changes the answer, and the kernel has none. Others
    are noted: whether they are heads or stand between encoder and decoder no tensor tells.

    Raises:
        ValueError: the first such layer, by its name.
    """
    channels, classes = model.get("in_channels", 3), model.get("classes", 1)  # SMP's defaults
    layers = {
        name: weight
        for name, weight in checkpoint.left_out.items()
        if is_outside_layer(name)
        and (weight.ndim > 1 or _is_norm(name, weight, checkpoint.left_out))
    }
    takes_image = any(each.ndim == 4 and each.shape[1] < NARROWEST for each in layers.values())
    for name, weight in layers.items():
        place = _place_of(weight, takes_image, channels, classes)
        if place:
            raise ValueError(
                f"{checkpoint.path}: {name}, as {tuple(weight.shape)}, is a layer outside the "
                f"network that fits {place}: what it does would be lost; train without it, or save "
                "the network alone where its output does not need it: "
                "torch.save(network.state_dict(), 'member.pt')"
            )
    if layers:
        checkpoint.notes.append(
            f"trained, yet left out: {_listed(layers)}; if these are heads of their own, all is "
            "well; if the masks went through them, this member is wrong"
        )


# --- all of it ------------------------------------------------------------------------------------


def check_source(source: Path, checkpoint: Checkpoint, spec: MemberSpec, bits: int) -> None:
    """Hold a member's entry against all that came with its weights; note what nothing tells.

    `source` is its file or folder, `bits` are of the competition's images.

    Raises:
        ValueError: a saved configuration, header or normalisation contradicts the entry, or a
            trained layer would be lost; names it.
    """
    configs = _saved_configs(source, checkpoint)
    for where, config in configs.items():
        _check_config(config, spec.model, where, spec.softmax)
    _check_header(checkpoint, spec)
    _check_normalisation(checkpoint, spec, configs | _saved_transforms(source), bits)
    _note_range(checkpoint, spec, bits)
    _check_layers(checkpoint, spec.model)
    _note_padding(checkpoint, spec, configs)
    _note_softmax(checkpoint, spec)
