"""The declared `model`: read, held against SMP, built, and given its weights."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernel.checks import nearest_of
from kernel.faults import one_line, short
from kernel.members import build_network
from packing.checkpoints import Checkpoint
from packing.likely_model import likely_model
from packing.old_names import rename_bare, rename_old, widen_head
from packing.reading import weights_file

NEAREST = 3  # names that a message gives
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

# --- what `model` says ----------------------------------------------------------------------------


def config_of(source: Path) -> Path:
    """Return where `save_pretrained` puts the configuration of a member's file or folder."""
    return weights_file(source).parent / "config.json"


def read_model(source: Path) -> dict[str, Any]:
    """Return `smp.create_model`'s keyword arguments, from the config.json of `save_pretrained`.

    Raises:
        ValueError: the config is missing, no JSON, or names no architecture.
    """
    path = config_of(source)
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


def options_of(kind: Any) -> dict[str, Any]:
    """Return a class's options → their defaults; SMP's classes swallow all others."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    named = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    return {each.name: each.default for each in named if each.name != "self"}


def architectures() -> Mapping[str, Any]:
    """Return SMP's architectures: name in small letters → class."""
    import segmentation_models_pytorch as smp

    known: dict[str, Any] = smp.MODEL_ARCHITECTURES_MAPPING
    return known


def class_of(model: Mapping[str, Any]) -> Any:
    """Return SMP's class of a model; ValueError where it has no such architecture."""
    known, arch = architectures(), str(model["arch"])
    if arch.lower() not in known:
        raise ValueError(
            f"unknown architecture {short(arch)}; {nearest_of(arch, sorted(known), NEAREST)}"
        )
    return known[arch.lower()]


def head_options() -> dict[str, Any]:
    """Return the options of a presence head → their defaults."""
    from segmentation_models_pytorch.base import ClassificationHead

    return {k: v for k, v in options_of(ClassificationHead).items() if k != "in_channels"}


def check_options(model: dict[str, Any]) -> None:
    """Raise ValueError for an option that SMP's class does not have, naming the nearest.

    For a `tu-` encoder other options are timm's, where timm refuses what it does not know.
    """
    kind = class_of(model)
    known = [*options_of(kind), "arch"]
    others = {key: value for key, value in model.items() if key not in known}
    if others and not _timm_takes(model, others):
        key = next(iter(others))
        raise ValueError(
            f"model's {short(key)} is no option of SMP's {kind.__name__}, which would drop it "
            f"unsaid; {nearest_of(key, known, NEAREST)}; correct or remove it"
        )
    head = head_options()
    for key in model.get("aux_params") or {}:
        if key not in head:
            raise ValueError(
                f"aux_params's {short(key)} is no option of SMP's ClassificationHead; "
                f"{nearest_of(key, head, NEAREST)}; correct or remove it"
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
            fault = f"unknown encoder {short(encoder)}; {nearest_of(encoder, encoders, NEAREST)}"
        raise ValueError(fault) from error


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
    others = [key for key in unexpected if key not in head]  # it is asked for next
    if others and all(".attention.cSE." in k or ".attention.sSE." in k for k in others):
        return (
            f"has the unexpected {others[0]}: an attention was trained, and model declares none; "
            'write "decoder_attention_type": "scse"'
        )
    return (
        f"{faults[0]}; SMP's {model['arch']} has all its weights there and no layer of that "
        f"name ({len(faults)} in all): what it does would be lost; train without it, or save "
        "the network without it where its output does not need it"
    )


def load_into_model(checkpoint: Checkpoint, model: dict[str, Any]) -> nn.Module:
    """Return the declared network with the checkpoint's weights in it.

    Other names become today's: those of SMP 0.0.x and of a bare encoder or head here, others by
    SMP's own loading. Counters of batch norm that old or EMA checkpoints lack are added as zero:
    nothing reads them.

    Raises:
        ValueError: SMP builds no such model, its head does more than a bare one, or a key is
            missing, unexpected or of another shape; names the likely model.
    """
    path, weights = checkpoint.path, checkpoint.weights
    try:
        network = _build_declared(model)
        todays = rename_old(weights)
        renamed = rename_bare(todays, network)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    wanted, notes = network.state_dict(), []
    if todays.keys() != weights.keys():
        notes.append("names of SMP 0.0.x (2019), taken as today's")
    if renamed.keys() != todays.keys():
        notes.append("names of timm's own encoder or of a bare head, taken as today's SMP's")
    if notes:
        widen_head(renamed, wanted)
    checkpoint.notes.extend(notes)
    for key, value in wanted.items():
        if key.endswith("num_batches_tracked"):
            renamed.setdefault(key, torch.zeros_like(value))
        found = renamed.get(key, value)
        if value.is_floating_point() and not found.is_floating_point():
            raise ValueError(f"{path}: {key} holds {found.dtype}, whole numbers; save floats")
    try:
        network.load_state_dict(renamed, strict=True)  # renames in place what SMP renamed
    except RuntimeError as error:
        fault = ": ".join([*notes, _fault(renamed, wanted, model)])
        raise ValueError(f"{path}: {fault}") from error
    return network
