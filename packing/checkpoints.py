"""Any training framework's checkpoint → one network's weights, under the names that SMP gives them.

Read top to bottom: file → tensors → the one network in it → what of the file is left out.
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packing.names import TRAINING, normalisation_of, said_of_images, words_of
from packing.reading import Content, read_content, weights_file

SMP_PREFIXES = ("encoder", "decoder", "segmentation_head", "classification_head")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norm
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
AVERAGES = {"ema", "average", "averaged", "averaging", "avg", "shadow", "swa", "polyak"}
UPDATES = (
    "n_averaged",
    "num_updates",
    "optimization_step",
    "initted",
    "updates",
)  # 0: the network it began as
LAYER = re.compile(  # a layer's weight, also under weight or spectral norm, or a batch norm without
    r"(.*\.)?(weight|weight_v|weight_orig|parametrizations\.weight\.original1?|running_var)"
)
MAX_LISTED = 3  # tensors of one group by name


@dataclass(frozen=True)
class Checkpoint:
    """One network's weights out of a file, and what was chosen or left out on the way."""

    path: Path  # the file that holds the weights
    weights: dict[str, Tensor]  # by SMP's names: encoder.…, decoder.…, segmentation_head.…
    notes: list[str]
    left_out: dict[str, Tensor] = field(default_factory=dict)  # by their names in the file
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # where → what it says
    header: dict[str, Any] = field(default_factory=dict)  # the entry that a fit or a build wrote


# --- tensors --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tree:
    """A file's nested dictionaries, flat: dotted names such as `state_dict.model.encoder.…`."""

    tensors: dict[str, Tensor]
    homes: dict[str, str]  # a tensor's name → the prefix of the dictionary that holds it
    numbers: dict[str, float]  # plain numbers, and tensors of one element
    configs: dict[str, dict[str, Any]]  # dictionaries that name an encoder, a mean or a std


def _walk(node: object, prefix: str = "", home: str = "") -> Iterator[tuple[str, object, str]]:
    """Every dictionary and leaf of nested dictionaries and lists: dotted name, value, home."""
    if isinstance(node, argparse.Namespace):  # timm's arguments
        node = vars(node)
    if isinstance(node, np.ndarray) and node.dtype.kind in "fiu":
        node = torch.as_tensor(node)
    if isinstance(node, Mapping):
        yield prefix.removesuffix("."), node, home
        for key, value in node.items():
            yield from _walk(value, f"{prefix}{key}.", prefix)
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _walk(value, f"{prefix}{number}.", prefix)
    else:
        yield prefix.removesuffix("."), node, home


def _flatten(content: Content, path: Path) -> _Tree:
    tree = _Tree({}, {}, {}, {})
    for name, value, home in (*_walk(content.tree), *_walk(content.member, "header.")):
        if isinstance(value, Tensor):
            if name in tree.tensors:
                raise ValueError(f"{path}: two tensors are named {name}; save the weights alone")
            tree.tensors[name], tree.homes[name] = value, home
        if isinstance(value, Mapping) and (
            "encoder_name" in value or any(said_of_images(f"{name}.{key}") for key in value)
        ):
            tree.configs[name] = {str(key): item for key, item in value.items()}
        if isinstance(value, Tensor) and value.numel() == 1 and is_plain(value):
            value = value.item()
        if isinstance(value, bool | int | float):
            tree.numbers[name] = value
    return tree


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has its numbers in it, one by one, and they are real."""
    special = tensor.is_meta or tensor.is_quantized or tensor.is_complex()
    return not special and tensor.layout == torch.strided


# --- networks -------------------------------------------------------------------------------------

Names = dict[str, str]  # SMP's name of a tensor → its name in the file


def _prefixes(name: str) -> Iterator[tuple[str, str]]:
    """(prefix, part) for every part of SMP's that a dotted name goes through."""
    parts = name.split(".")
    for number, part in enumerate(parts[:-1]):
        if part in SMP_PREFIXES:
            yield "".join(f"{each}." for each in parts[:number]), part


def _find_networks(tree: _Tree, path: Path) -> dict[str, Names]:
    """SMP networks by the wrapper's prefix: `state_dict.module.`, `model.`, `ema.`, or none.

    A prefix has encoder and segmentation head; where none has both, it is the first that has any
    but an encoder alone, which other libraries' networks have too. A tensor belongs to the longest
    prefix that it starts with, so that what stands beside the network (a loss's weights, a counter)
    is left out and what stands in it is kept.
    """
    parts: dict[str, set[str]] = {}
    for name in tree.tensors:
        for prefix, part in _prefixes(name):
            parts.setdefault(prefix, set()).add(part)
    firsts = [found[0][0] for name in tree.tensors if (found := list(_prefixes(name)))]
    firsts = [prefix for prefix in firsts if parts[prefix] != {"encoder"}]
    whole = [prefix for prefix, has in parts.items() if {"encoder", "segmentation_head"} <= has]
    networks: dict[str, Names] = {prefix: {} for prefix in whole or firsts}
    for name, tensor in tree.tensors.items():
        owner = max((p for p in networks if name.startswith(p)), key=len, default=None)
        if owner is None or not _enters(name.removeprefix(owner), tensor, tree.homes[name], owner):
            continue
        inner = WRAPPERS.sub("", name.removeprefix(owner))
        if inner in networks[owner]:
            raise ValueError(f"{path}: {name} is there twice; save the weights alone")
        networks[owner][inner] = name
    return networks


def _enters(name: str, tensor: Tensor, home: str, owner: str) -> bool:
    """Whether a tensor below a network's prefix is the network's; if unknown, loading refuses it.

    What is not: another dictionary's (an optimizer's state), a loss's, a counter, a normalisation.
    """
    if name.split(".")[0] in SMP_PREFIXES:
        return True
    beside = (
        len(home) > len(owner) or bool(words_of(name) & TRAINING) or normalisation_of(name) != ""
    )
    counts = tensor.numel() == 1 and not tensor.is_floating_point()
    return not beside and not counts


def is_outside_layer(name: str) -> bool:
    """Return whether a tensor's name is that of a layer's weight in no network, nor in a loss."""
    return (
        LAYER.fullmatch(name) is not None
        and not list(_prefixes(name))
        and not words_of(name) & TRAINING
    )


# --- choosing -------------------------------------------------------------------------------------


def _ancestors(prefix: str) -> list[str]:
    """`a.b.` → ``, `a.`, `a.b.`."""
    return ["", *(prefix[: match.end()] for match in re.finditer(r"\.", prefix))]


def _own_ancestors(prefix: str, networks: Mapping[str, object]) -> list[str]:
    """Those prefixes above a network that are not above every other network of the file."""
    others = [_ancestors(other) for other in networks if other != prefix]
    shared = set.intersection(*map(set, others)) if others else set()
    return [ancestor for ancestor in _ancestors(prefix) if ancestor not in shared]


def _is_average(prefix: str, networks: Mapping[str, object], tree: _Tree) -> bool:
    """Whether a network is an average over the training steps: by its name, or by a counter."""
    # Lightning's WeightAveraging and mmengine's EMAHook put the average in the plain weights' place
    swapped = any(other.startswith("current_model_state.") for other in networks)
    if swapped or "ema_state_dict.steps" in tree.numbers:
        return prefix.startswith("state_dict.")
    own = _own_ancestors(prefix, networks)
    named = any(words_of(each.split(".")[-2]) & AVERAGES for each in own if each)
    return named or any(f"{each}n_averaged" in tree.numbers for each in own)


def _norms(weights: Mapping[str, Tensor]) -> dict[str, bool]:
    """Batch norms by name: whether they never saw a batch, with mean 0 and variance 1 as built."""
    found = dict[str, bool]()
    for name, mean in weights.items():
        home, _, part = name.rpartition(".")
        variance = weights.get(f"{home}.running_var")
        if part != "running_mean" or variance is None:
            continue
        if is_plain(mean) and is_plain(variance):
            found[home] = not mean.any() and bool((variance == 1).all())
    return found


def _without_batches(norms: Mapping[str, bool]) -> list[str]:
    """Batch norms that should have seen a batch and never did: a decoder's, or all of them.

    An encoder may hold some that no forward calls, like EfficientNet's `_bn1`.
    """
    never = [name for name, unseen in norms.items() if unseen]
    return never if len(never) == len(norms) else [n for n in never if n.startswith("decoder.")]


def _never_counted(prefix: str, tree: _Tree) -> bool:
    """Whether the counter of an average says that it is the network that training began with."""
    homes = [*_ancestors(prefix), "averaging_state."]
    return 0 in [tree.numbers.get(f"{home}{counter}") for home in homes for counter in UPDATES]


def _is_unready(
    average: str, plain: Iterable[str], networks: dict[str, Names], tree: _Tree
) -> bool:
    """Whether an average is still what training began with: its weights, or its batch norm.

    Its batch norm is where a plain network beside it has seen batches. Lightning's
    StochasticWeightAveraging gives its average the statistics when training ends.
    """
    own, *others = (
        _norms({name: tree.tensors[key] for name, key in networks[prefix].items()})
        for prefix in (average, *plain)
    )
    behind = any(each.get(name) is False for name in _without_batches(own) for each in others)
    return behind or _never_counted(average, tree) or "average_model_state." in average


def _same(first: Names, second: Names, tree: _Tree) -> bool:
    """Whether two networks of a file are one, under two names."""
    pairs = [
        (tree.tensors[own], tree.tensors[second.get(name, own)]) for name, own in first.items()
    ]
    plain = all(is_plain(tensor) for pair in pairs for tensor in pair)
    return first.keys() == second.keys() and plain and all(torch.equal(a, b) for a, b in pairs)


def _no_network(tree: _Tree, path: Path) -> str:
    names = ", ".join(list(tree.tensors)[:2]) or "no tensor"
    if any("shadow_params" in name for name in tree.tensors):
        return (
            f"{path}: an EMA copy without names ({names}); where it was trained, "
            "ema.copy_to(network.parameters()), then torch.save(network.state_dict(), 'member.pt')"
        )
    return (
        f"{path}: no SMP network in it, expected names like encoder.conv1.weight and "
        f"segmentation_head.0.weight, found {names}; train the member with "
        "segmentation_models_pytorch"
    )


@dataclass(frozen=True)
class _Choice:
    prefix: str  # of the network to pack
    average: bool  # whether it is an EMA copy
    notes: list[str]


def _choose_network(networks: dict[str, Names], tree: _Tree, path: Path) -> _Choice:
    """The EMA copy where there is one that is ready, else the only other network."""
    if not networks:
        raise ValueError(_no_network(tree, path))
    averages = [p for p in networks if _is_average(p, networks, tree)]
    plain = [p for p in networks if p not in averages]
    unready = [p for p in averages if _is_unready(p, plain, networks, tree)]
    ready = [p for p in averages if p not in unready]
    candidates = ready or plain or unready
    chosen, *others = candidates
    if not all(_same(networks[chosen], networks[other], tree) for other in others):
        listed = ", ".join(prefix or "the top" for prefix in sorted(candidates))
        raise ValueError(f"{path}: several networks ({listed}); save the one to pack alone")
    notes = [f"took the EMA copy ({chosen.removesuffix('.')})"] if chosen in ready else []
    if unready:
        listed = ", ".join(prefix.removesuffix(".") for prefix in unready)
        notes.append(f"the average ({listed}) is not ready: never updated, or its batch norm not")
    return _Choice(chosen, chosen in ready, notes)


# --- what is left out -----------------------------------------------------------------------------


def _group_of(name: str, chosen: str) -> str:
    """The part of a tensor's name up to where it leaves the chosen network's."""
    parts, own = name.split("."), chosen.split(".")
    shared = 0
    while shared < min(len(parts), len(own)) - 1 and parts[shared] == own[shared]:
        shared += 1
    return ".".join(parts[: shared + 1])


def _left_out_note(left_out: dict[str, Tensor], chosen: str) -> str:
    """`left out: normalizer.mean, normalizer.std (2 tensors), optimizer (60 tensors)`."""
    groups: dict[str, list[str]] = {}
    for name in left_out:
        # a mean and its std are named, whatever else is left out around them
        normalises = normalisation_of(name)
        group = f"{name.rpartition('.')[0]}." if normalises else _group_of(name, chosen)
        groups.setdefault(group, []).append(name)
    listed = []
    for group, names in groups.items():
        what = ", ".join(names) if len(names) <= MAX_LISTED else group
        listed.append(f"{what} ({len(names)} tensor{'s' if len(names) > 1 else ''})")
    note = f"left out: {', '.join(listed)}"
    if any("shadow_params" in name for name in left_out):
        note += (
            "; shadow_params are an EMA copy without names: ema.copy_to() before saving packs it"
        )
    return note


def _add_statistics(weights: Names, networks: dict[str, Names]) -> list[str]:
    """Give an EMA copy of parameters the statistics of the one network beside it; the note.

    One that has some of its own and lacks others is damaged: loading it says so.
    """
    if any(name.endswith(("running_mean", "running_var")) for name in weights):
        return []
    plain = next(iter(networks.values())) if len(networks) == 1 else {}
    lacking = {k: v for k, v in plain.items() if k.endswith(STATISTICS) and k not in weights}
    weights |= lacking
    return [f"{len(lacking)} batch-norm statistics from the plain weights"] if lacking else []


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a `save_pretrained` folder, a state_dict, Lightning, Catalyst, timm or safetensors.

    An EMA copy that holds parameters only takes batch norm's statistics from the plain weights.

    Raises:
        ValueError: it cannot be read safely, or holds no network or more than one.
    """
    path = weights_file(path)
    content = read_content(path)
    try:
        tree = _flatten(content, path)
    except RecursionError:
        raise ValueError(f"{path}: nested too deep; save the weights alone") from None
    networks = _find_networks(tree, path)
    choice = _choose_network(networks, tree, path)
    names, notes = networks.pop(choice.prefix), choice.notes
    if choice.average:
        notes += _add_statistics(names, networks)
    weights = {name: tree.tensors[own] for name, own in names.items()}
    for name, tensor in weights.items():
        if not is_plain(tensor):
            raise ValueError(f"{path}: {name} is sparse, quantized, complex or empty; save floats")
    if unseen := _without_batches(_norms(weights)):
        more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
        notes.append(
            f"batch norm that never saw a batch: {unseen[0]}{more}; an average is to be saved "
            "after torch.optim.swa_utils.update_bn"
        )
    taken = set(names.values())
    left_out = {name: tensor for name, tensor in tree.tensors.items() if name not in taken}
    if left_out:
        notes.append(_left_out_note(left_out, choice.prefix))
    configs = {f"{path}'s {where or 'content'}": each for where, each in tree.configs.items()}
    return Checkpoint(path, weights, notes, left_out, configs, tree.configs.get("header", {}))
