"""The declared `model`: held against SMP and saved configurations, built, and given its weights."""

import difflib
import inspect
import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kernel.faults import one_line, short
from kernel.manifest import MemberSpec
from kernel.members import build_network
from packing.checkpoints import (
    PLACES,
    Checkpoint,
    is_outside_layer,
    is_plain,
    normalisation_of,
    said_of_images,
    words_of,
)
from packing.likely_model import likely_model
from packing.old_names import rename_old, widen_head
from packing.reading import weights_file

FITTING = {  # a member's `softmax` → activations of a network that is packed as giving logits
    False: (None, "identity", "sigmoid"),
    True: (None, "identity", "softmax", "softmax2d"),
}

# Options that SMP renamed and still reads: old name → its name today, and whose it was.
UNETS = ("unet", "unetplusplus", "manet", "linknet")
RENAMED_OPTIONS = {
    "decoder_use_batchnorm": ("decoder_use_norm", UNETS),
    "psp_use_batchnorm": ("decoder_use_norm", ("pspnet",)),
    "upscale_mode": ("decoder_interpolation", ("pan",)),
}
STRIDES = {True: 16, False: 32}  # of SMP 0.1's PAN: encoder_dilation → encoder_output_stride
NORMS = {True: "batchnorm", False: "identity"}  # decoder_use_norm, in other words

# --- what `model` says ----------------------------------------------------------------------------


def _config_of(source: Path) -> Path:
    """Where `save_pretrained` puts the configuration of a member's file or folder."""
    return weights_file(source).parent / "config.json"


def read_model(source: Path) -> dict[str, Any]:
    """Return `smp.create_model`'s keyword arguments, from the config.json of `save_pretrained`.

    Raises:
        ValueError: the config is missing, no JSON, or names no architecture.
    """
    path = _config_of(source)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model = {"arch": config["_model_class"], **config}
    except FileNotFoundError:
        raise ValueError(
            f"lacks `model`, and no {path.name} lies beside {weights_file(source)}; write in "
            "`model` what smp.create_model was called with"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: names no architecture ({error!r}); the manifest's entry needs `model`"
        ) from error
    return {k: v for k, v in model.items() if not k.startswith("_") and k != "encoder_weights"}


def without_activation(model: Any, softmax: bool = False) -> Any:
    """Return the same model giving logits: what follows is the kernel's, twice would be wrong.

    Another activation stays, for the manifest's rules to refuse.
    """
    if not isinstance(model, dict):
        return model
    kept = {k: v for k, v in model.items() if k != "activation" or v not in FITTING[softmax]}
    return kept | {k: without_activation(v) for k, v in kept.items() if k == "aux_params"}


def with_todays_options(model: Any) -> Any:
    """Return the same model with options that SMP renamed under the names that they have today."""
    if not isinstance(model, dict):
        return model
    renamed = dict(model)
    for old, (new, architectures) in RENAMED_OPTIONS.items():
        if old in renamed and str(model.get("arch")).lower() in architectures:
            value = renamed.pop(old)
            renamed |= {} if value is None else {new: value}  # as SMP does: None changes nothing
    alone = isinstance(model.get("encoder_dilation"), bool) and "encoder_output_stride" not in model
    if alone and str(model.get("arch")).lower() == "pan":
        renamed["encoder_output_stride"] = STRIDES[renamed.pop("encoder_dilation")]
    return renamed


# --- held against SMP -----------------------------------------------------------------------------


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known names that are like a name, or the first that there are."""
    known = list(known)
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known[:12])}, …"


def _options_of(kind: Any) -> dict[str, Any]:
    """A class's options → their defaults; SMP's classes swallow all others."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    named = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    return {each.name: each.default for each in named if each.name != "self"}


def _class_of(model: Mapping[str, Any]) -> Any:
    import segmentation_models_pytorch as smp

    known, arch = smp.MODEL_ARCHITECTURES_MAPPING, str(model["arch"])
    if arch.lower() not in known:
        raise ValueError(f"unknown architecture {short(arch)}; {nearest(arch, sorted(known))}")
    return known[arch.lower()]


def _head_options() -> dict[str, Any]:
    from segmentation_models_pytorch.base import ClassificationHead

    return {k: v for k, v in _options_of(ClassificationHead).items() if k != "in_channels"}


def check_options(model: dict[str, Any]) -> None:
    """Raise ValueError for an option that SMP's class does not have, naming the nearest.

    For a `tu-` encoder other options are timm's, where timm refuses what it does not know.
    """
    kind = _class_of(model)
    known = [*_options_of(kind), "arch"]
    others = {key: value for key, value in model.items() if key not in known}
    if others and not _timm_takes(model, others):
        key = next(iter(others))
        raise ValueError(
            f"model's {short(key)} is no option of SMP's {kind.__name__}, which would drop it "
            f"unsaid; {nearest(key, known)}; correct or remove it"
        )
    head = _head_options()
    for key in model.get("aux_params") or {}:
        if key not in head:
            raise ValueError(
                f"aux_params's {short(key)} is no option of SMP's ClassificationHead; "
                f"{nearest(key, head)}; correct or remove it"
            )


def _timm_takes(model: dict[str, Any], options: dict[str, Any]) -> bool:
    """Whether timm's encoder has these options: it does not build with one that it lacks."""
    import timm

    loader = inspect.signature(timm.create_model).parameters  # a path, a cache: not the network's
    if not str(model["encoder_name"]).startswith("tu-") or loader.keys() & options.keys():
        return False
    return None not in options.values() and _builds(model)  # timm drops None unseen


def _builds(model: dict[str, Any]) -> bool:
    try:
        build_network(model)
    except Exception:  # a network raises whatever it likes
        return False
    return True


def _build_declared(model: dict[str, Any]) -> nn.Module:
    """The untrained network of a manifest's entry; an error names the nearest that SMP knows."""
    import segmentation_models_pytorch as smp
    import timm

    check_options(model)
    encoder = str(model["encoder_name"])
    if ":" in encoder:
        raise ValueError(
            f"encoder {short(encoder)} is read from another place, which Kaggle's machine has not; "
            "name a model of timm's own, tu-NAME"
        )
    try:
        return build_network(model)
    except Exception as error:  # a network raises whatever it likes
        encoders = [*smp.encoders.get_encoder_names(), *(f"tu-{n}" for n in timm.list_models())]
        fault = one_line(error)
        renamed = smp.encoders.is_equivalent_to_timm_universal(encoder)
        if encoder.split(".")[0] not in encoders and not renamed:
            fault = f"unknown encoder {short(encoder)}; {nearest(encoder, encoders)}"
        raise ValueError(fault) from error


# --- held against saved configurations ------------------------------------------------------------


def _comparable(
    model: Mapping[str, Any], known: Mapping[str, Any], softmax: bool = False
) -> dict[str, Any]:
    """What a `model` says of the known options, in one spelling."""
    renamed = with_todays_options(dict(model))
    said = {key: value for key, value in renamed.items() if key in known}
    said |= {"arch": str(said["arch"]).lower()} if "arch" in said else {}
    if said.get("activation") in FITTING[softmax]:
        said["activation"] = None
    if isinstance(said.get("aux_params"), Mapping):
        said["aux_params"] = _comparable(_head_options() | said["aux_params"], _head_options())
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


def check_config(
    config: Mapping[str, Any], model: dict[str, Any], where: str, softmax: bool = False
) -> None:
    """Raise ValueError where a configuration saved with the weights contradicts `model`.

    An option that `model` leaves out has SMP's default; the activation fits a member's `softmax`.
    """
    options = _options_of(_class_of(model))
    known = {key: value for key, value in options.items() if key != "encoder_weights"}
    declared = _comparable(known | model, known | {"arch": None})
    found = _comparable({"arch": model["arch"], **config}, declared, softmax)
    for key, saved in found.items():
        if key in ("classes", "in_channels") and not isinstance(saved, int):
            continue  # another program's word, such as the classes' names; the weights' shapes tell
        if _meaning(key, saved, declared) != _meaning(key, declared[key], declared):
            raise ValueError(
                f"model's {key} is {short(declared[key])}, {where} says {short(saved)}; correct "
                "`model`, or take that configuration away if it is not of these weights"
            )


def saved_configs(source: Path, checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """Return every configuration of a network that came with the weights: where → `model`."""
    configs: dict[str, Mapping[str, Any]] = {
        where: config for where, config in checkpoint.configs.items() if "encoder_name" in config
    }
    path = _config_of(source)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return configs
    if isinstance(config, dict) and {"_model_class", "encoder_name"} & set(config):
        arch = {"arch": config["_model_class"]} if "_model_class" in config else {}
        configs[str(path)] = config | arch
    return configs


OLD_PADDING = re.compile("efficientnet-b[1-7]")  # encoders that SMP before 0.3 padded otherwise


def note_padding(
    checkpoint: Checkpoint, spec: MemberSpec, configs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Note that an EfficientNet may be of an SMP that padded otherwise, where nothing tells.

    `save_pretrained` writes `_model_class` since SMP 0.3, and train.py a header.
    """
    encoder, new = spec.model["encoder_name"], f"{checkpoint.path}'s header.model"
    told = new in configs or any("_model_class" in config for config in configs.values())
    if OLD_PADDING.fullmatch(encoder) and not spec.efficientnet_pytorch and not told:
        checkpoint.notes.append(
            f"{encoder}: trained with SMP before 0.3? Then its padding was another; write "
            '"efficientnet_pytorch": "0.6.3" in the entry'
        )


# --- held against the manifest's normalisation ----------------------------------------------------


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


def _said_of_images(
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


def check_normalisation(
    checkpoint: Checkpoint,
    spec: MemberSpec,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    bits: int = 8,
) -> None:
    """Hold the manifest's mean and std against every one that came with the weights.

    `configs` are further ones than the checkpoint's own; `bits` are of the competition's images.

    Raises:
        ValueError: another one; names it and both values.
    """
    declared = {"mean": spec.mean, "std": spec.std}
    every = {**checkpoint.configs, **(configs or {})}
    places: dict[str, list[tuple[str, str, list[float], set[int]]]] = {}
    for where, kind, found in _said_of_images(checkpoint, every):
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


# --- layers around the network --------------------------------------------------------------------


def _fits_behind(name: str, weight: Tensor, others: Container[str], classes: int) -> bool:
    """Whether a layer takes masks: a convolution, in groups too, or a norm, which is no loss's."""
    if weight.ndim == 4:
        out, taken = weight.shape[:2]
        return taken == classes or (out == classes and classes % taken == 0)
    beside = (f"{name.rpartition('.')[0]}.{each}" for each in ("bias", "running_mean"))
    return weight.shape == (classes,) and any(each in others for each in beside)


def check_layers(checkpoint: Checkpoint, model: Mapping[str, Any]) -> None:
    """Refuse a trained layer outside the network that fits before its input or behind its masks.

    A stem, or a layer that refines the masks, changes the answer, and the kernel has none. Others
    are named in the build's table.

    Raises:
        ValueError: the first such layer, by its name.
    """
    channels, classes = model.get("in_channels", 3), model.get("classes", 1)  # SMP's defaults
    for name, weight in checkpoint.left_out.items():
        before = weight.shape[:1] == (channels,)
        behind = _fits_behind(name, weight, checkpoint.left_out, classes)
        if is_outside_layer(name) and (before or behind):
            raise ValueError(
                f"{checkpoint.path}: {name}, as {tuple(weight.shape)}, is a layer outside the "
                f"network that fits {'before its input' if before else 'behind its masks'}: what "
                "it does would be lost; train without it, or save the network alone where its "
                "output does not need it: torch.save(network.state_dict(), 'member.pt')"
            )


# --- weights --------------------------------------------------------------------------------------


def _differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """In words, every key that is missing, unexpected or of another shape."""
    missing = [f"lacks {key}" for key in wanted if key not in found]
    unexpected = [f"has the unexpected {key}" for key in found if key not in wanted]
    reshaped = [
        f"has {key} as {tuple(found[key].shape)}, expected {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    return missing + unexpected + reshaped


def _fault(weights: dict[str, Tensor], wanted: Mapping[str, Tensor], model: dict[str, Any]) -> str:
    """Why weights do not fit the declared model, and what to do."""
    faults = _differences(weights, wanted) or ["does not load"]
    head = [key for key in weights if key.startswith("classification_head.")]
    unexpected = [key for key in weights if key not in wanted]
    if len(unexpected) < len(faults):
        return (
            f"{faults[0]}; {len(faults)} keys differ from the declared model; "
            f"{likely_model(weights, model)}"
        )
    if unexpected == head:
        classes = weights[head[-1]].shape[0] if weights[head[-1]].ndim else "?"
        outputs = model.get("classes", 1)  # SMP's default
        if classes != outputs:
            return (
                f"{faults[0]}: a presence head of {classes} outputs was trained, model's classes "
                f"are {outputs}: it gates no masks; save the network without classification_head.*"
            )
        return (
            f"{faults[0]}: a presence head was trained, and model declares none; write "
            f'"aux_params": {{"classes": {classes}, "pooling": "avg" or "max"}} as it was trained, '
            "or save the network without it"
        )
    if all(".attention.cSE." in key or ".attention.sSE." in key for key in unexpected):
        return (
            f"{faults[0]}: an attention was trained, and model declares none; write "
            '"decoder_attention_type": "scse"'
        )
    return (
        f"{faults[0]}; SMP's {model['arch']} has all its weights there and no layer of that "
        f"name ({len(faults)} in all): what it does would be lost; train without it, or save "
        "the network without it where its output does not need it"
    )


def load_into_model(checkpoint: Checkpoint, model: dict[str, Any]) -> nn.Module:
    """Return the declared network with the checkpoint's weights in it.

    Old names become today's: those of SMP 0.0.x here, later ones by SMP's own loading. Counters of
    batch norm that old or EMA checkpoints lack are added as zero: nothing reads them.

    Raises:
        ValueError: SMP builds no such model, or a key is missing, unexpected or of another shape;
            names the likely model.
    """
    path, weights = checkpoint.path, checkpoint.weights
    try:
        network = _build_declared(model)
        renamed = rename_old(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    wanted = network.state_dict()
    old = "names of SMP 0.0.x (2019), taken as today's" if renamed.keys() != weights.keys() else ""
    if old:
        widen_head(renamed, wanted)
        checkpoint.notes.append(old)
    for key, value in wanted.items():
        if key.endswith("num_batches_tracked"):
            renamed.setdefault(key, torch.zeros_like(value))
        found = renamed.get(key, value)
        if value.is_floating_point() and not found.is_floating_point():
            raise ValueError(f"{path}: {key} holds {found.dtype}, whole numbers; save floats")
    try:
        network.load_state_dict(renamed, strict=True)  # renames in place what SMP renamed
    except RuntimeError as error:
        fault = _fault(renamed, wanted, model)
        fault = f"{old}: {fault}" if old else fault
        raise ValueError(f"{path}: {fault}") from error
    return network
