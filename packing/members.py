"""One member into the bundle: its checkpoint checked, halved, written, tried and counted."""

import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kernel.engines import import_openvino, load_checked_openvino, openvino_files
from kernel.faults import one_line
from kernel.images import pad_to_multiple
from kernel.manifest import BUILT_FIELDS, Manifest, MemberSpec, described_size
from kernel.members import Member, build_network, in_half, load_member, split_network
from kernel.reference import Reference, answers, entry_of, reference_file, write_reference
from kernel.stages import Stages
from packing.agreement import check_source
from packing.checkpoints import read_checkpoint
from packing.models import load_into_model

CPU = torch.device("cpu")


@dataclass(frozen=True)
class PackedMember:
    """A member in the bundle, and what a build prints about it."""

    spec: MemberSpec
    n_parameters: int
    n_bytes: int
    notes: list[str]


def to_half(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return copies: floating tensors in fp16, the others (batch norm's counters) as they are.

    Statistics of batch norm that fp16 cannot hold stay in fp32.

    Raises:
        ValueError: a weight is NaN or infinite, or becomes infinite in fp16.
    """
    half = {key: in_half(key, value) for key, value in weights.items()}
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{path}: {key} holds NaN or infinite values; take an earlier checkpoint"
            )
        if not torch.isfinite(half[key]).all():
            largest = value.abs().max().item()
            raise ValueError(f"{path}: {key} reaches {largest:.3g}, above fp16's 65504; retrain it")
    # copies: safetensors takes no two tensors that share memory
    return {key: value.contiguous().clone() for key, value in half.items()}


@contextmanager
def _explained(path: Path, fault: str, remedy: str) -> Iterator[None]:
    """Say in one line what failed, whatever a network raises."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: {fault}: {one_line(error)}; {remedy}") from error


def size_of_trial(spec: MemberSpec, manifest: Manifest) -> tuple[int, int]:
    """Return the (H, W) that a member sees: its own, or the competition's images', if known."""
    return spec.image_size or manifest.image_size or manifest.competition.image_size or (256, 256)


def check_probabilities(member: Member, manifest: Manifest, path: Path) -> None:
    """Run one random image of the size that the member sees.

    Raises:
        ValueError: the network fails on it, or gives another shape or NaN.
    """
    height, width = size_of_trial(member.spec, manifest)
    channels, seeded = manifest.competition.channels, torch.Generator().manual_seed(0)
    with (
        _explained(path, f"fails on an image of {height}×{width}", "correct model or image_size"),
        torch.inference_mode(),
    ):
        images = torch.rand(1, channels, height, width, generator=seeded)
        images = pad_to_multiple(images, member.stride)
        probabilities = member(images)
    found, expected = tuple(probabilities.shape), (1, manifest.classes, *images.shape[-2:])
    if found != expected:
        raise ValueError(f"{path}: gives probabilities {found}, expected {expected}; correct model")
    if not torch.isfinite(probabilities).all():
        raise ValueError(f"{path}: gives NaN for a random image in fp16; retrain it")


def count_flops(member: Member, size: tuple[int, int]) -> list[int]:
    """Return the FLOPs of encoder and decoder for one image (H, W), a multiply-add as 2.

    Each is 1 at the least: the decoder of a network in one piece (DPT) has none that count. The
    member's weights are dropped: on the meta device there is no arithmetic.
    """
    encoder, decoder = member.encoder.to("meta"), member.decoder.to("meta")
    images = pad_to_multiple(torch.empty(1, 1, *size, device="meta"), member.stride)
    with torch.no_grad():
        with FlopCounterMode(display=False) as first:
            encoded = encoder(images)
        with FlopCounterMode(display=False) as second:
            decoder(*encoded)
    return [max(int(each.get_total_flops()), 1) for each in (first, second)]


def flops_of(spec: MemberSpec, size: tuple[int, int]) -> list[int]:
    """Return `count_flops` of a member whose weights are not there."""
    return count_flops(split_network(build_network(spec.model), spec, CPU), size)


def _noise(member: Member, channels: int, rows: int, columns: int) -> Tensor:
    """A seeded image of so many strides, (1, channels, H, W)."""
    size = rows * member.stride, columns * member.stride
    return torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0))


def pack_openvino(member: Member, folder: Path, channels: int = 1) -> int:
    """Write both halves as OpenVINO reads them, for any image size and batch; return their bytes.

    In fp32, twice the checkpoint's bytes: batch norm is folded here, and rounded to fp16 once more
    the weights move 0.1 % of a mask's pixels.
    """
    openvino = import_openvino()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # OpenVINO traces in a way that PyTorch calls deprecated
        images = _noise(member, channels, 2, 3)
        encoded = member.encoder(images)
        decoder = openvino.convert_model(member.decoder, example_input=encoded)
        encoder = openvino.convert_model(member.encoder, example_input=images)
    for parameter, result in zip(decoder.get_parameters(), encoder.get_results(), strict=True):
        if not parameter.output(0).get_target_inputs():  # a level that this decoder does not read
            decoder.remove_parameter(parameter)
            encoder.remove_result(result)
    paths = [folder / name for name in openvino_files(member.spec.file)]
    for half, path in zip((encoder, decoder), paths, strict=True):
        half.set_friendly_name(path.stem)  # OpenVINO's own names count what this process has made
        for number, node in enumerate(half.get_ordered_ops()):
            node.set_friendly_name(f"{node.get_type_name()}_{number}")
        openvino.save_model(half, path, compress_to_fp16=False)
    return sum(path.stat().st_size + path.with_suffix(".bin").stat().st_size for path in paths)


def pack_reference(member: Member, folder: Path, channels: int = 1) -> int:
    """Write what a member of plain PyTorch gives for a seeded image; return the bytes.

    Raises:
        ValueError: the member that OpenVINO loads from `folder` gives something else.
    """
    path, threads = folder / reference_file(member.spec.file), torch.get_num_threads()
    images = _noise(member, channels, 4, 8)
    torch.set_num_threads(1)  # more add up in another order: on every build the same bytes
    found = answers(member, images)
    torch.set_num_threads(threads)
    write_reference(Reference(images, *found, member.stride, entry_of(member.spec)), path)
    load_checked_openvino(folder, member.spec, channels, Stages())
    return path.stat().st_size


def _write_member(folder: Path, spec: MemberSpec, network: nn.Module, path: Path) -> MemberSpec:
    """Write a network's weights in fp16, its entry in their header; the entry with the hash."""
    entry = {k: v for k, v in asdict(spec).items() if k not in BUILT_FIELDS}  # known later
    header = {"member": json.dumps(entry, sort_keys=True)}  # one key: several have no fixed order
    data = save(to_half(network.state_dict(), path), header)
    (folder / spec.file).write_bytes(data)
    return replace(spec, sha256=hashlib.sha256(data).hexdigest())


def _check_statistics(network: nn.Module, path: Path) -> None:
    """Refuse batch norm without running statistics: a mask would depend on the batch's others."""
    for name, norm in network.named_modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is None:
            raise ValueError(
                f"{path}: {name} is batch norm without running statistics, so a strip's masks "
                "depend on the strips beside it: train it with track_running_stats"
            )


def _notes_of_images(spec: MemberSpec, manifest: Manifest) -> list[str]:
    """What the images are made into for a member, where it may not be what it was trained on."""
    notes, competition = list[str](), manifest.competition
    if competition.channels == 1 and len(spec.mean) == 3:
        notes.append(
            "its three channels get the same grey: right where it was trained so, wrong for one of "
            "neighbouring slices (2.5D)"
        )
    if competition.bits == 16 and not any(spec.mean) and set(spec.std) == {1}:
        notes.append(
            "mean 0 and std 1: it gets pixels divided by 65,535, wrong where it was trained on "
            "images divided by their own maximum; train it with fixed numbers"
        )
    height, width = spec.image_size or manifest.image_size or (0, 0)
    rows, columns = described_size(competition) or (0, 0)
    if not math.isclose(height * columns, width * rows, rel_tol=0.05):
        notes.append(
            f"images of {rows}×{columns} are squeezed to image_size {[height, width]}: right where "
            "it was trained so; for a member trained on crops of them leave image_size out"
        )
    return notes


def _pack(
    source: Path, spec: MemberSpec, manifest: Manifest, folder: Path, openvino: bool
) -> PackedMember:
    channels, checkpoint = manifest.competition.channels, read_checkpoint(source)
    check_source(source, checkpoint, spec, manifest.competition.bits)
    checkpoint.notes.extend(_notes_of_images(spec, manifest))
    network = load_into_model(checkpoint, spec.model)
    _check_statistics(network, checkpoint.path)
    spec = _write_member(folder, spec, network, checkpoint.path)
    member = load_member(folder, spec, CPU)
    check_probabilities(member, manifest, checkpoint.path)
    n_parameters = sum(weight.numel() for weight in member.encoder.network.parameters())
    n_bytes = (folder / spec.file).stat().st_size
    if openvino:
        with _explained(checkpoint.path, "OpenVINO cannot run it", "build without --openvino"):
            n_bytes += pack_openvino(member, folder, channels)
            n_bytes += pack_reference(member, folder, channels)
    with _explained(checkpoint.path, "its FLOPs cannot be counted", "correct model"):
        spec = replace(spec, flops=count_flops(member, size_of_trial(spec, manifest)))
    return PackedMember(spec, n_parameters, n_bytes, checkpoint.notes)


def pack_member(
    source: Path, spec: MemberSpec, manifest: Manifest, folder: Path, openvino: bool
) -> PackedMember:
    """Check a checkpoint, write it as fp16 safetensors and load that as the kernel will.

    Raises:
        ValueError: the checkpoint is unsafe, not of the declared model, contradicts the manifest,
            or gives no probabilities; names the member.
    """
    try:
        return _pack(source, spec, manifest, folder, openvino)
    except ValueError as error:
        raise ValueError(f"member {spec.name}: {' '.join(str(error).splitlines())}") from error
