"""A random network in random wrappings: it is packed as it was trained, or refused in one line.

`FUZZ=20000 pytest tests/packing/test_wrappings.py` draws 5,000 cases.
"""

import argparse
import copy
import functools
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from helpers import CPU, random_network, tiny_model, write_manifest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import kernel.members
import packing.likely_model
import packing.members
import packing.models
from kernel.members import build_network, load_member
from packing.checkpoints import SMP_PREFIXES
from packing.members import PackedMember, pack_member
from packing.sources import read_sources

CASES = settings(
    max_examples=int(os.environ.get("FUZZ", "600")) // 4,
    phases=[
        Phase.explicit,
        Phase.reuse,
        Phase.generate,
    ],  # a case says what was drawn: no shrinking
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SIZE = (32, 64)
IMAGES = torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(1))
Weights = dict[str, Tensor]

# --- what was trained -----------------------------------------------------------------------------

MODELS: tuple[dict[str, Any], ...] = (
    tiny_model("Unet"),
    tiny_model("FPN", presence=False),
    tiny_model("Unet", channels=3) | {"aux_params": {"classes": 4, "pooling": "avg"}},
    tiny_model("Unet", presence=False)
    | {"decoder_interpolation": "bilinear", "decoder_attention_type": "scse"}
    | {"decoder_channels": [16] * 5},  # an attention's least
    tiny_model("FPN", channels=3) | {"decoder_merge_policy": "cat"},
    tiny_model("Unet") | {"classes": 6, "aux_params": {"classes": 6, "pooling": "max"}},
    tiny_model("Linknet", presence=False),
)
CHANNELS = {5: [5, 1, 2, 4]}  # of the model with more outputs than classes


@functools.cache
def trained(which: int, seed: int) -> Weights:
    return {k: v.detach() for k, v in random_network(MODELS[which], seed).state_dict().items()}


@functools.cache
def network_of(which: int) -> nn.Module:
    network: nn.Module = smp.create_model(encoder_weights=None, **MODELS[which])
    return network.eval()


def through_smp(which: int, weights: Weights, mean: list[float], std: list[float]) -> Tensor:
    """Probabilities (2, 4, 32, 64) of the network itself, with its user's own preprocessing."""
    network = network_of(which)
    network.load_state_dict({k: v.half().float() for k, v in weights.items()})  # as packed
    grey = (IMAGES * 255).numpy()
    images = np.repeat(grey, MODELS[which]["in_channels"], axis=1) / 255
    images = (images - np.reshape(mean, (1, -1, 1, 1))) / np.reshape(std, (1, -1, 1, 1))
    with torch.inference_mode():
        outputs = network(torch.from_numpy(images).float())
    logits, presence = outputs if "aux_params" in MODELS[which] else (outputs, None)
    probabilities = logits.sigmoid()
    if presence is not None:
        probabilities *= presence.sigmoid()[:, :, None, None]
    found: Tensor = probabilities[:, CHANNELS.get(which, [0, 1, 2, 3])]
    return found


# --- a case ---------------------------------------------------------------------------------------


@dataclass
class Case:
    """A member's file and entry, and what is right for it."""

    which: int  # of MODELS
    weights: Weights  # the right ones
    mean: list[float]
    std: list[float]
    entry: dict[str, Any]
    tree: Any = None
    sound: bool = True  # to be packed; else it may be refused
    left_out: list[str] = field(default_factory=list)  # words that the notes hold
    drawn: list[str] = field(default_factory=list)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # Hypothesis would print tensors
        printer.text(f"Case({self.which}, {', '.join(self.drawn)}, {self.entry['model']})")

    def draws(self, what: object, sound: bool = True) -> None:
        """Note what was drawn, and whether it may be refused for that."""
        self.drawn.append(str(what))
        self.sound &= sound
        event(str(what))


def renamed(weights: Weights, prefix: str) -> Weights:
    return {prefix + key: value for key, value in weights.items()}


def in_parts(weights: Weights) -> dict[str, Weights]:
    parts: dict[str, Weights] = {}
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts


NESTINGS: dict[str, Callable[[Weights], Any]] = {
    "bare": lambda w: w,
    "ordered": lambda w: OrderedDict(w),
    "lightning": lambda w: {"state_dict": w, "epoch": 3, "callbacks": {"EarlyStopping": {"n": 1}}},
    "catalyst": lambda w: {"model_state_dict": w, "epoch_metrics": {"dice": np.float64(0.5)}},
    "deeper": lambda w: {"state": {"model": w}, "args": argparse.Namespace(lr=0.1)},
    "in a list": lambda w: {"models": [w]},
}
PREFIXES = (
    "", "module.", "model.", "model.module.", "_orig_mod.", "model._orig_mod.", "segmenter.",
    "encoder.", "decoder.", "a.net.",
)  # fmt: skip
ONE, NONE = torch.tensor(4), torch.tensor(0)

# (right, other) → a file of both; the word of what is left out
AVERAGES: dict[str, tuple[Callable[[Weights, Weights], Any], str]] = {
    "ema": (lambda a, b: {"model": b, "ema": a}, "model"),
    "timm": (lambda a, b: {"state_dict": b, "state_dict_ema": renamed(a, "module.")}, "state_dict"),
    "ema_state_dict": (
        lambda a, b: {"state_dict": b, "ema_state_dict": renamed(a, "module.")},
        "state_dict",
    ),
    "mmengine": (  # which swaps both as it saves
        lambda a, b: {"state_dict": a, "ema_state_dict": {"steps": ONE} | renamed(b, "module.")},
        "ema_state_dict",
    ),
    "catalyst": (lambda a, b: {"model_state_dict": b, "model_ema_state_dict": a}, "model_state"),
    "attribute": (
        lambda a, b: {"state_dict": renamed(b, "net.") | renamed(a, "net_ema.module.")},
        "state_dict.net",
    ),
    "averaged model": (
        lambda a, b: {"net": b, "swa": {"n_averaged": ONE} | renamed(a, "module.")},
        "swa.n_averaged",
    ),
    "averaged, no word for it": (
        lambda a, b: {"net": b, "second": {"n_averaged": ONE} | renamed(a, "module.")},
        "second.n_averaged",
    ),
    "averaged, never updated": (
        lambda a, b: {"net": a, "swa": {"n_averaged": NONE} | renamed(b, "module.")},
        "swa",
    ),
    "WeightAveraging": (
        lambda a, b: {
            "state_dict": a,
            "current_model_state": b,
            "averaging_state": {"n_averaged": ONE},
        },
        "current_model_state",
    ),
    "WeightAveraging, never updated": (
        lambda a, b: {
            "state_dict": b,
            "current_model_state": a,
            "averaging_state": {"n_averaged": NONE},
        },
        "state_dict",
    ),
    "StochasticWeightAveraging": (
        lambda a, b: {
            "state_dict": a,
            "callbacks": {"StochasticWeightAveraging": {"average_model_state": b}},
        },
        "callbacks",
    ),
    "a callback": (
        lambda a, b: {"state_dict": b, "callbacks": {"EMACallback": {"weights": a}}},
        "state_dict",
    ),
    "ema_pytorch": (
        lambda a, b: {
            "ema": renamed(b, "online_model.")
            | renamed(a, "ema_model.")
            | {"initted": torch.tensor(True)}
        },
        "ema.online_model",
    ),
    "a list": (
        lambda a, b: {"model": a, "ema": {"decay": 0.9, "shadow_params": list(b.values())}},
        "shadow_params",
    ),
    "two teachers": (lambda a, b: {"first": a, "second": b}, ""),  # refused
    "another network": (
        lambda a, b: {"model": a, "stage": {"encoder.w": torch.ones(2), "fc.w": torch.ones(2)}},
        "stage",
    ),
}


def cast(dtype: torch.dtype) -> Callable[[Weights], Weights]:
    return lambda w: {k: v.to(dtype) if v.is_floating_point() else v for k, v in w.items()}


def views_of_one_tensor(w: Weights) -> Weights:
    flat = torch.cat([v.float().flatten() for v in w.values()])
    ends = np.cumsum([v.numel() for v in w.values()]).tolist()
    return {
        key: flat[end - value.numel() : end].view(value.shape)
        for (key, value), end in zip(w.items(), ends, strict=True)
    }


def channels_last(w: Weights) -> Weights:
    last = torch.channels_last
    return {k: v.contiguous(memory_format=last) if v.ndim == 4 else v for k, v in w.items()}


# The same weights as frameworks, casts and memory layouts leave them.
FORMS: dict[str, Callable[[Weights], Weights]] = {
    "as they are": lambda w: dict(w),
    "half": cast(torch.float16),
    "double": cast(torch.float64),
    "bfloat16": cast(torch.bfloat16),
    "views of one tensor": views_of_one_tensor,
    "channels last": channels_last,
    "parameters": lambda w: {
        k: nn.Parameter(v) if v.is_floating_point() else v for k, v in w.items()
    },
    "without counters": lambda w: {k: v for k, v in w.items() if "num_batches" not in k},
}


# --- faults: what must not change the answer ------------------------------------------------------


def drop(weights: Weights, key: str) -> None:
    del weights[key]


def misname(weights: Weights, key: str) -> None:
    weights[key + "s"] = weights.pop(key)


def reshape(weights: Weights, key: str) -> None:
    weights[key] = weights[key][None]


def spoil(weights: Weights, key: str) -> None:
    weights[key] = torch.full_like(weights[key], torch.nan)


def exceed(weights: Weights, key: str) -> None:
    weights[key] = torch.full(weights[key].shape, 1e6)  # what half precision does not hold


def add_layer(weights: Weights, key: str) -> None:
    weights["stem.weight"] = torch.ones(3, 1, 1, 1)


DAMAGE = (drop, misname, reshape, spoil, exceed, add_layer)

ENTRY_FAULTS: tuple[dict[str, Any], ...] = (
    {"activation": "softmax2d"},
    {"activation": "tanh"},
    {"decoder_interpolations": "bilinear"},
    {"colour": None},
    {"encoder_depht": 5},
    {"arch": "FPM"},
    {"arch": "MAnet"},
    {"classes": 5},
    {"encoder_name": "resnet18"},
    {"encoder_name": "tu-test_resnets"},
    {"aux_params": {"classes": 4, "poling": "max"}},
    {"aux_params": {"classes": 4, "activation": "softmax"}},
)
ENTRY_SYNONYMS: tuple[dict[str, Any], ...] = (
    {"activation": "sigmoid"},
    {"activation": "identity"},
    {"encoder_weights": "imagenet"},
)


# --- drawing --------------------------------------------------------------------------------------


def one_in(n: int, draw: st.DrawFn) -> bool:
    return draw(st.integers(0, n - 1)) == n // 2  # not at an end, which Hypothesis likes to draw


def draw_weights(draw: st.DrawFn, case: Case) -> Weights:
    """The right weights in some form; at times damaged."""
    form = draw(st.sampled_from(list(FORMS)))
    case.draws(form)
    weights = FORMS[form](case.weights)
    case.weights |= {k: v.detach().float() for k, v in weights.items()}
    if one_in(8, draw):
        floating = [key for key, value in weights.items() if value.is_floating_point()]
        damage = draw(st.sampled_from(DAMAGE))
        case.draws(damage.__name__, sound=False)
        if damage is exceed:  # statistics that half precision does not hold stay in fp32
            floating = [key for key in floating if "running_" not in key]
        damage(weights, draw(st.sampled_from(floating)))
    return weights


def wrap(draw: st.DrawFn, case: Case, weights: Weights) -> Any:
    """Put weights under a prefix, into dictionaries, and beside another network."""
    prefix = draw(st.sampled_from(PREFIXES))
    weights = renamed(weights, prefix)
    case.draws(f"prefix {prefix}")
    if draw(st.booleans()):
        nested: Any = weights if prefix else draw(st.sampled_from([weights, in_parts(weights)]))
        nesting = draw(st.sampled_from(list(NESTINGS)))
        case.draws(nesting)
        return NESTINGS[nesting](nested)
    name = draw(st.sampled_from(list(AVERAGES)))
    make, word = AVERAGES[name]
    case.draws(name, sound=word != "")
    case.left_out.append(word)
    return make(weights, renamed(trained(case.which, 1), prefix))


def add_normalisation(draw: st.DrawFn, case: Case, place: dict[str, Any]) -> None:
    """Buffers of mean and std that say what the manifest says, or something else."""
    name = draw(st.sampled_from(["normalizer.mean", "pixel_mean", "norm.img_mean"]))
    scale = draw(st.sampled_from([1, 255]))
    place[name] = torch.tensor(case.mean) * scale
    place[name.replace("mean", "std")] = torch.tensor(case.std).view(1, -1, 1, 1) * scale
    case.left_out.append(name)
    if one_in(4, draw):
        place[name] = place[name] + 0.1 * scale
        case.mean = [value + 0.1 for value in case.mean]
        case.draws("another mean", sound=False)


def add_extras(draw: st.DrawFn, case: Case) -> None:
    """What frameworks keep beside a network: in its dictionary, or beside that."""
    top: dict[str, Any] = case.tree
    dictionaries = [v for k, v in top.items() if isinstance(v, dict) and k not in SMP_PREFIXES]
    inner = [each for each in dictionaries if any(isinstance(v, Tensor) for v in each.values())]
    place = draw(st.sampled_from([top, *inner]))
    alone = place is top or not case.left_out  # else it is left out with the other network
    if draw(st.booleans()):
        place["criterion.pos_weight"] = torch.ones(4, 1, 1)
        case.left_out += ["criterion.pos_weight"] * alone
    if draw(st.booleans()):
        top["optimizer"] = {"state": {n: {"exp_avg": torch.ones(2)} for n in range(4)}}
        case.left_out.append("optimizer (4 tensors)")
    if draw(st.booleans()):
        place["global_step"] = torch.tensor(3)
        case.left_out += ["global_step"] * alone
    if one_in(3, draw):
        add_normalisation(draw, case, place)
    if one_in(4, draw):
        top["hyper_parameters"] = {"lr": 0.1, "model": draw_config(draw, case)}


def draw_config(draw: st.DrawFn, case: Case) -> dict[str, Any]:
    """A saved configuration: what was trained; at times the manifest says something else."""
    model = MODELS[case.which]
    if "decoder_interpolation" in model and draw(st.booleans()):
        case.entry["model"].pop("decoder_interpolation")  # no tensor tells
        case.draws("another interpolation", sound=False)
    if "aux_params" in model and draw(st.booleans()):
        other = {"max": "avg", "avg": "max"}[model["aux_params"]["pooling"]]
        case.entry["model"]["aux_params"]["pooling"] = other
        case.draws("another pooling", sound=False)
    return copy.deepcopy(model)


def change_entry(draw: st.DrawFn, case: Case) -> None:
    """What may be wrong in the manifest, or said otherwise."""
    model = case.entry["model"]
    if one_in(6, draw):
        fault = draw(st.sampled_from(ENTRY_FAULTS))
        model |= fault
        case.draws(fault, sound=False)
    elif one_in(4, draw):
        model |= draw(st.sampled_from(ENTRY_SYNONYMS))
        case.draws("another word for it")
    elif one_in(4, draw) and model["arch"] in ("Unet", "Linknet"):
        model["decoder_use_batchnorm"] = True  # the name of decoder_use_norm until SMP 0.4
    if "aux_params" in model and one_in(10, draw):
        del model["aux_params"]
        case.draws("no aux_params", sound=False)
    if one_in(10, draw):
        case.entry["mean"] = [value * 255 for value in case.mean]
        case.draws("a mean of 0-255", sound=False)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    which = draw(st.integers(0, len(MODELS) - 1))
    n = MODELS[which]["in_channels"]
    mean, std = [0.31, 0.35, 0.4][:n], [0.21, 0.14, 0.3][:n]
    entry = {"name": "m", "mean": mean, "std": std, "model": copy.deepcopy(MODELS[which])}
    entry |= {"channels": CHANNELS[which]} if which in CHANNELS else {}
    case = Case(which, dict(trained(which, 0)), mean, std, entry)
    case.tree = wrap(draw, case, draw_weights(draw, case))
    add_extras(draw, case)
    change_entry(draw, case)
    return case


# --- writing --------------------------------------------------------------------------------------


def flat_tensors(node: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield prefix.removesuffix("."), node.detach().clone().contiguous()
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from flat_tensors(value, f"{prefix}{key}.")


def save_zip(tree: Any, folder: Path) -> str:
    torch.save(tree, folder / "m.pth")
    return "m.pth"


def save_old(tree: Any, folder: Path) -> str:
    torch.save(tree, folder / "m.ckpt", _use_new_zipfile_serialization=False)
    return "m.ckpt"


def save_protocol_4(tree: Any, folder: Path) -> str:
    torch.save(tree, folder / "m.pth", pickle_protocol=4)
    return "m.pth"


def save_folder(tree: Any, folder: Path) -> str:
    (folder / "m").mkdir()
    torch.save(tree, folder / "m" / "pytorch_model.bin")
    return "m"


def save_safetensors(tree: Any, folder: Path) -> str:
    save_file(dict(flat_tensors(tree)), folder / "m.pth")
    return "m.pth"


FILES = (save_zip, save_zip, save_old, save_folder, save_protocol_4, save_safetensors)


def holds_lists_or_words(case: Case) -> bool:
    """Whether a file of named tensors alone would lose what says that the manifest is wrong."""
    lists = {"models", "args", "hyper_parameters", "ema", "callbacks"}
    return bool(lists & set(case.tree))


def pack(case: Case, save: Callable[[Any, Path], str], folder: Path) -> PackedMember:
    """The member as a build packs it."""
    case.entry["file"] = save(case.tree, folder)
    write_manifest(folder, [case.entry], image_size=SIZE)
    manifest, [source] = read_sources(folder)
    (folder / "dataset").mkdir()
    return pack_member(source, manifest.members[0], manifest, folder / "dataset", False)


# --- the property ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def build_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network is built once and emptied; what takes long and says no more is left out."""

    @functools.cache
    def built(model: str) -> nn.Module:
        return build_network(json.loads(model))

    def emptied(model: dict[str, Any]) -> nn.Module:
        network = built(json.dumps(model))
        for value in network.state_dict().values():
            value.fill_(torch.nan if value.is_floating_point() else 0)
        return network

    monkeypatch.setattr(kernel.members, "build_network", emptied)
    monkeypatch.setattr(packing.models, "build_network", emptied)
    monkeypatch.setattr(packing.likely_model, "build_network", emptied)
    monkeypatch.setattr(
        packing.likely_model, "ENCODERS", ()
    )  # of the message that names the likely one
    monkeypatch.setattr(packing.members, "count_flops", lambda *_: [1, 1])


@CASES
@given(case=cases(), save=st.sampled_from(FILES))
def test_a_wrapped_network_is_packed_as_it_was_trained_or_refused_in_one_line(
    case: Case, save: Callable[[Any, Path], str]
) -> None:
    if save is save_safetensors and holds_lists_or_words(case):
        save = save_zip
    sound = case.sound and save is not save_protocol_4
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            packed = pack(case, save, folder)
        except ValueError as error:
            assert not sound, error
            assert "\n" not in str(error) and "weights_only" not in str(error)
            assert "member m" in str(error) or str(folder) in str(error)
            event("refused")
            return
        with torch.inference_mode():
            found = load_member(folder / "dataset", packed.spec, CPU)(IMAGES)
    event("packed")
    expected = through_smp(case.which, case.weights, case.mean, case.std)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert all(word in " ".join(packed.notes) for word in case.left_out), packed.notes


def test_the_networks_of_the_cases_differ_from_one_another() -> None:
    for which, model in enumerate(MODELS):
        n = model["in_channels"]
        first, second = (
            through_smp(which, trained(which, s), [0.3] * n, [0.2] * n) for s in (0, 1)
        )
        moved = through_smp(which, trained(which, 0), [0.4] * n, [0.2] * n)
        assert (first - second).abs().max() > 0.05
        assert (first - moved).abs().max() > 1e-3
