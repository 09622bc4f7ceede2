"""Members: the bytes that were packed become the network that was trained, or are refused."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU, fail_once, random_network, read_manifest, tiny_entry, tiny_model
from safetensors.torch import load_file, save_file

from kernel import members
from kernel.engines import compile_member, to_half_precision
from kernel.manifest import MemberSpec, load_manifest
from kernel.members import Member, in_half, load_member, read_entry, split_network

Weights = dict[str, torch.Tensor]


def spec_of(folder: Path, **changes: Any) -> MemberSpec:
    return MemberSpec(**read_manifest(folder)["members"][0] | changes)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_member_whose_bytes_are_those_packed_is_loaded(session_light: Path) -> None:
    path = session_light / "fpn.safetensors"
    capitals = sha256(path).upper()  # as some tools write it
    load_member(session_light, spec_of(session_light, sha256=capitals), CPU)
    found = load_member(session_light, spec_of(session_light, sha256=sha256(path)), CPU)
    weights, expected = found.encoder.network.state_dict(), load_file(path)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert not any(module.training for module in found.encoder.network.modules())


@pytest.mark.parametrize(
    "encoder", ["resnet18", "efficientnet-b0", "mit_b0", "tu-test_resnet", "tu-convnext_atto"]
)
def test_a_member_is_loaded_without_drawing_weights_and_is_the_network_that_was_saved(
    encoder: str, tmp_path: Path
) -> None:
    """Buffers that no checkpoint holds, too."""
    model = tiny_model() | {"encoder_name": encoder}
    network, images = random_network(model, 1), torch.rand(1, 1, 64, 64)
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    before = torch.random.get_rng_state()
    found = load_member(tmp_path, MemberSpec(**tiny_entry("a", model)), CPU).encoder.network
    assert torch.equal(torch.random.get_rng_state(), before)
    expected = dict(network.named_buffers())
    assert all(torch.equal(buffer, expected[name]) for name, buffer in found.named_buffers())
    with torch.inference_mode():
        for mine, theirs in zip(found(images), network(images), strict=True):
            assert torch.equal(mine, theirs)


def test_statistics_alone_that_fp16_cannot_hold_stay_in_fp32() -> None:
    large, small, counter = torch.tensor([7e4]), torch.tensor([0.1]), torch.tensor(70_000)
    for name in ("bn.running_mean", "bn.running_var"):
        assert torch.equal(in_half(name, large), large)
        assert torch.equal(in_half(name, small), small.half())
    assert in_half("bn.weight", large).item() == torch.inf
    assert in_half("bn.num_batches_tracked", counter).item() == 70_000


@pytest.mark.parametrize("header", [None, {}, {"member": "[]"}, {"member": "{"}])
def test_a_checkpoint_whose_header_has_no_members_entry_is_refused_by_its_path(
    header: dict[str, str] | None, tmp_path: Path
) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"weight": torch.zeros(1)}, path, header)
    with pytest.raises(ValueError, match=rf"{path}: no checkpoint of train\.py: "):
        read_entry(path)
    save_file({"weight": torch.zeros(1)}, path, {"member": '{"name": "one"}'})
    assert read_entry(path) == {"name": "one"}


def test_shifts_move_both_heads_logits(dataset: Path) -> None:
    """Against the network's own logits; the gate stays the most that a probability can be."""
    plain = load_member(dataset, spec_of(dataset), CPU)
    shifts = torch.tensor([-0.5, 0, 1, 2.5])
    changes = {"mask_shift": 2, "gate_shift": shifts.tolist()}
    moved = load_member(dataset, spec_of(dataset, **changes), CPU)
    images = torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        masks, presence = plain.encoder.network((images - plain.encoder.mean) / plain.encoder.std)
        gates, *features = moved.encoder(images)
        found = moved.decoder(gates, *features)
    expected = torch.sigmoid(presence + shifts)
    torch.testing.assert_close(gates, expected)
    torch.testing.assert_close(found, torch.sigmoid(masks + 2) * expected[..., None, None])
    assert (found <= gates[..., None, None]).all()


def test_a_mask_shift_is_a_threshold_of_its_own_for_a_pass_without_a_gate(tmp_path: Path) -> None:
    """By the formula of docs/checkpoints.md, wanted thresholds below, at and above the one."""
    model, threshold = tiny_model(presence=False), torch.tensor(0.55)
    network, wanted = random_network(model, seed=2), torch.tensor([0.3, 0.55, 0.7, 0.9])
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    spec = MemberSpec(**tiny_entry("a", model))
    shifts = (threshold.logit() - wanted.logit()).tolist()
    assert [round(shift, 2) for shift in shifts] == [1.05, 0.0, -0.65, -2.0]
    images = torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(0))
    plain, moved = (
        load_member(tmp_path, replace(spec, mask_shift=shift), CPU) for shift in (0.0, shifts)
    )
    with torch.no_grad():
        before, after = (each.decoder(*each.encoder(images)) for each in (plain, moved))
    expected = before > wanted[:, None, None]
    assert torch.equal(after > threshold, expected)
    assert not torch.equal(before > threshold, expected)


ENGINES: dict[str, tuple[Callable[[Member], Member], float]] = {  # and how near it comes
    "plain": (lambda member: member, 1e-6),
    "folded": (lambda member: compile_member(member, CPU), 1e-5),
    "half precision": (
        lambda member: split_network(to_half_precision(member.encoder.network), member.spec, CPU),
        1e-2,
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("presence", [True, False])
def test_a_softmax_is_over_all_outputs_the_background_too(
    presence: bool, engine: str, tmp_path: Path
) -> None:
    """Against exponentials and their sum in fp64; the gate stays the most that one can be."""
    model = tiny_model(presence=presence) | {"classes": 5}
    model |= {"aux_params": {"classes": 5, "pooling": "max"}} if presence else {}
    network = random_network(model, seed=2)
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    entry = tiny_entry("a", model) | {"channels": [2, 1, 4, 3], "softmax": True}
    make, tolerance = ENGINES[engine]
    member = make(load_member(tmp_path, MemberSpec(**entry | {"file": "a.safetensors"}), CPU))
    images = torch.rand(2, 1, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = network((images - entry["mean"][0]) / entry["std"][0])
        gates, *features = member.encoder(images)
        found = member.decoder(gates, *features)
    logits, presences = outputs if presence else (outputs, torch.full((2, 5), torch.inf))
    powers = logits.double().exp()
    shares = (powers / powers.sum(1, keepdim=True))[:, [2, 1, 4, 3]]
    expected = shares * presences.double().sigmoid()[:, [2, 1, 4, 3], None, None]
    assert (shares - logits.double().sigmoid()[:, [2, 1, 4, 3]]).abs().mean() > 0.05
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)
    assert found.dtype == torch.float32 and (found <= gates[..., None, None]).all()


def pad_by_hand(network: Any, version: str, nominal: int) -> None:
    """TensorFlow's "same" of a nominal size, at every convolution as its inputs come."""
    size = nominal
    for layer in network.modules():
        if not hasattr(layer, "static_padding"):
            continue
        kernel, stride = layer.kernel_size[0], layer.stride[0]
        own = nominal if version == "0.6.3" else size
        pixels = max((-(-own // stride) - 1) * stride + kernel - own, 0)
        behind = pixels - pixels // 2
        sides = (behind if version == "0.7.0" else pixels // 2, behind)
        layer.static_padding = torch.nn.Identity()
        layer.register_forward_pre_hook(
            lambda _, inputs, sides=sides: torch.nn.functional.pad(inputs[0], sides * 2)
        )
        size = -(-size // stride)


@pytest.mark.parametrize(
    ("encoder", "nominal", "version", "differs"),
    [
        ("efficientnet-b0", 224, "0.6.3", False),  # no stage has an odd size
        ("efficientnet-b0", 224, "0.7.0", True),
        ("efficientnet-b1", 240, "", False),
        ("efficientnet-b1", 240, "0.6.3", True),
        ("efficientnet-b1", 240, "0.7.0", True),
        ("efficientnet-b3", 300, "0.6.3", True),  # kernels of 3 and of 5
    ],
)
def test_an_efficientnet_is_padded_as_the_library_it_was_trained_with_did(
    encoder: str, nominal: int, version: str, differs: bool, tmp_path: Path
) -> None:
    model = {"arch": "FPN", "encoder_name": encoder, "in_channels": 1, "classes": 4}
    network: Any = random_network(model, seed=2)
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    spec = MemberSpec(**tiny_entry("a", model) | {"efficientnet_pytorch": version})
    images = torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = load_member(tmp_path, spec, CPU).encoder.network(images)
        assert torch.equal(found, network(images)) != differs
        pad_by_hand(network, version, nominal)
        torch.testing.assert_close(found, network(images))


@pytest.mark.parametrize("bias", [1e5, -1e5])
@pytest.mark.parametrize("head", ["classification_head.3", "segmentation_head.0"])
def test_logits_that_fp16_cannot_hold_are_nan_there_and_numbers_in_fp32(
    head: str, bias: float, dataset: Path
) -> None:
    """Its largest number is 65,504; a sigmoid would make 1 or 0 of infinity."""
    plain = load_member(dataset, spec_of(dataset), CPU)
    network = plain.encoder.network
    with torch.inference_mode():
        network.get_submodule(head).bias.fill_(bias)
        images = torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(0))
        assert plain(images).isfinite().all()
        half = split_network(to_half_precision(network), plain.spec, CPU)
        assert half(images).isnan().all()
        assert half.encoder(images)[0].isnan().all() == head.startswith("classification")


def test_a_missing_member_is_named(light_bundle: Path) -> None:
    (light_bundle / "fpn.safetensors").unlink()
    with pytest.raises(ValueError, match=r"fpn\.safetensors: no such file; the bundle is not whol"):
        load_member(light_bundle, spec_of(light_bundle), CPU)


def test_a_file_that_cannot_be_read_is_a_bad_member(
    light_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any other, which `--allow-missing-members` does without."""

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    spec = load_manifest(light_bundle).members[0]
    assert load_member(light_bundle, spec, CPU).spec == spec
    monkeypatch.setattr("kernel.members.load_file", fail)
    with pytest.raises(ValueError, match=rf"{spec.file}: input/output error"):
        load_member(light_bundle, spec, CPU)


def test_a_member_that_cannot_be_read_for_a_moment_is_loaded(
    light_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_manifest(light_bundle).members[0]
    fail_once(monkeypatch, members, "hash_file", light_bundle / spec.file)
    assert load_member(light_bundle, spec, CPU).spec == spec


def test_one_changed_byte_is_noticed(light_bundle: Path) -> None:
    path = light_bundle / "fpn.safetensors"
    packed, data = sha256(path), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"sha256 {sha256(path)[:12]}…, .*{packed[:12]}…"):
        load_member(light_bundle, spec_of(light_bundle, sha256=packed), CPU)


@pytest.mark.parametrize("kept", [0, 5, 2000, -1])
def test_a_truncated_member_is_no_safetensors_file(kept: int, light_bundle: Path) -> None:
    path = light_bundle / "fpn.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"fpn\.safetensors: no safetensors file"):
        load_member(light_bundle, spec_of(light_bundle), CPU)


def without(weights: Weights, key: str) -> Weights:
    return {name: value for name, value in weights.items() if name != key}


BIAS = "segmentation_head.0.bias"
MISFITS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "missing": (lambda w: without(w, BIAS), f"Missing key.*{BIAS}"),
    "unexpected": (lambda w: w | {"head.bias": w[BIAS].clone()}, r"Unexpected key.*head\.bias"),
    "of another shape": (lambda w: w | {BIAS: torch.zeros(7)}, f"size mismatch for {BIAS}"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_the_first_key_is_named_that_is(case: str, light_bundle: Path) -> None:
    change, message = MISFITS[case]
    path = light_bundle / "fpn.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(ValueError, match=rf"fpn\.safetensors: not of the declared.*{message}"):
        load_member(light_bundle, spec_of(light_bundle), CPU)


def test_half_precision_weights_run_in_full_precision(light_bundle: Path) -> None:
    path = light_bundle / "fpn.safetensors"
    halves = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
    save_file(halves, path)
    network = load_member(light_bundle, spec_of(light_bundle), CPU).encoder.network
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    weights = network.state_dict()
    assert all(torch.equal(weights[key], value.to(weights[key])) for key, value in halves.items())
