"""What came with the weights: configurations, a normalisation and layers that the entry fits."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import change_member, random_network, tiny_entry, tiny_model, write_manifest
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from kernel.manifest import MemberSpec
from kernel.members import build_network
from packing.agreement import check_source
from packing.checkpoints import Checkpoint, read_checkpoint
from packing.members import pack_member
from packing.sources import read_sources

MODEL = tiny_model()
PATH = Path("member.pt")
RGB = MemberSpec(
    "m", "m.safetensors", MODEL | {"in_channels": 3}, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
)
GREY = MemberSpec("m", "m.safetensors", MODEL, [0.34], [0.13])


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return random_network(MODEL, seed=7)


def hold(saved: dict[str, Any], model: dict[str, Any], softmax: bool = False) -> None:
    """Hold a configuration that lies in a checkpoint against a member of a model."""
    config = {"encoder_name": model["encoder_name"]} | saved
    checkpoint = Checkpoint(PATH, {}, [], configs={"here": config})
    check_source(PATH, checkpoint, replace(GREY, model=model, softmax=softmax), 8)


# --- saved configurations -------------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    """Change what `save_pretrained` wrote of a network."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (
            {"decoder_interpolation": "bilinear"},
            r"decoder_interpolation is 'nearest', .*'bilinear'",
        ),
        ({"activation": "softmax2d"}, r"activation is None, here says 'softmax2d'"),
        ({"arch": "FPN"}, r"arch is 'unet', here says 'fpn'"),
        ({"encoder_name": "resnet18"}, r"encoder_name is 'tu-test_resnet', here says 'resnet18'"),
        ({"classes": 5}, r"classes is 4, here says 5"),
        ({"decoder_use_batchnorm": False}, r"decoder_use_norm is 'batchnorm', here says False"),
        ({"aux_params": {"classes": 4, "pooling": "avg"}}, r"aux_params is .*'max'.*'avg'.*"),
        ({"aux_params": None}, r"aux_params is .*here says None"),
        ({"aux_params": False}, r"aux_params is .*here says None"),
        ({"arch": "unet_r18", "decoder_use_batchnorm": False}, r"decoder_use_norm is .*False"),
        ({"_model_class": "Unet2", "arch": "Unet2"}, r"arch is 'unet', here says 'unet2'"),
        ({"encoder_depth": "4"}, r"encoder_depth is 5, here says 4"),
        ({"decoder_channels": ["16", "8", "8", "8", "16"]}, r"decoder_channels is .*8, 16\]"),
        ({"decoder_attention_type": "scse"}, r"decoder_attention_type is None, here says 'scse'"),
        ({"decoder_interpolation": "none"}, r"decoder_interpolation is .*here says 'none'"),
        ({"decoder_use_norm": False}, r"decoder_use_norm is 'batchnorm', here says False"),
    ],
)
def test_a_saved_configuration_that_contradicts_the_model_is_refused(
    saved: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=rf"model's {words}; correct `model`"):
        hold(MODEL | saved, MODEL)


@pytest.mark.parametrize(
    "saved",
    [
        MODEL,
        {"arch": "unet", "activation": "sigmoid", "decoder_channels": (16, 8, 8, 8, 8)},
        {"encoder_weights": "imagenet", "decoder_attention_type": None, "lr": 0.1},
        {"aux_params": {"classes": 4, "pooling": "max", "dropout": 0.5, "activation": None}},
        {"classes": ["pit", "scratch"]},  # another program's word
        {"decoder_use_batchnorm": True},
        {"decoder_use_norm": True},
        {"arch": "unet_resnet18", "decoder_use_batchnorm": True},  # a name of one's own
        {"arch": None},
        {"activation": "none", "decoder_attention_type": "None"},
        {"activation": "", "decoder_attention_type": ""},
        {"activation": False, "decoder_attention_type": False},
        {"encoder_depth": "5", "decoder_channels": ["16", "8", "8", "8", "8"]},
        {"aux_params": {"classes": "4", "pooling": "max", "activation": "none"}},
        {"classes": "3"},  # perhaps the class's name
    ],
)
def test_a_saved_configuration_that_says_the_same_passes(saved: dict[str, Any]) -> None:
    hold(saved, MODEL)


@pytest.mark.parametrize("said", [False, "none", "None", ""])
def test_no_presence_head_in_another_programs_words_is_none(said: Any) -> None:
    hold({"aux_params": said}, tiny_model(presence=False))
    with pytest.raises(ValueError, match=r"model's aux_params is .*here says None; correct"):
        hold({"aux_params": said}, MODEL)


def test_of_a_member_with_a_softmax_it_is_a_softmax_that_agrees() -> None:
    for activation in ("softmax", "softmax2d", "identity", None):
        hold(MODEL | {"activation": activation}, MODEL, softmax=True)
    with pytest.raises(ValueError, match=r"activation is None, here says 'sigmoid'"):
        hold(MODEL | {"activation": "sigmoid"}, MODEL, softmax=True)


def deeplab(**changes: Any) -> dict[str, Any]:
    return {"arch": "DeepLabV3", "encoder_name": "resnet18", "classes": 4} | changes


@pytest.mark.parametrize(
    ("saved", "model"),
    [
        (deeplab(upsampling=8), deeplab()),  # the default until SMP 0.4
        (deeplab(upsampling=None), deeplab(upsampling=8)),
        (deeplab(decoder_aspp_dropout=0.1), deeplab()),  # nothing at prediction
        (MODEL | {"decoder_use_batchnorm": False}, MODEL | {"decoder_use_norm": "identity"}),
        (
            {"arch": "PAN", "encoder_name": "resnet18", "encoder_dilation": False},
            {"arch": "PAN", "encoder_name": "resnet18", "encoder_output_stride": 32},
        ),
    ],
)
def test_another_word_for_the_same_option_contradicts_nothing(
    saved: dict[str, Any], model: dict[str, Any]
) -> None:
    hold(saved, model)


@pytest.mark.parametrize(
    ("saved", "model", "words"),
    [
        (deeplab(upsampling=4), deeplab(), "upsampling is None, here says 4"),
        (deeplab(upsampling=False), deeplab(), "upsampling is None, here says False"),  # SMP: none
        (
            deeplab(upsampling=8),
            deeplab(encoder_output_stride=16),
            "upsampling is None, here says 8",
        ),
        (
            {"encoder_dilation": False},
            {"arch": "PAN", "encoder_name": "resnet18"},
            "encoder_output_stride is 16, here says 32",
        ),
    ],
)
def test_an_old_word_for_another_option_is_refused(
    saved: dict[str, Any], model: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=f"model's {words}; correct"):
        hold(saved, model)


def test_the_sides_of_a_deeplab_that_leaves_upsampling_out_are_those_it_is_compared_with() -> None:
    for options in ({}, {"encoder_output_stride": 8}, {"encoder_depth": 3}):
        declared = deeplab(**{"encoder_output_stride": 16} | options)
        network: Any = build_network(declared)
        scale = int(network.segmentation_head[1].scale_factor)
        hold(declared | {"upsampling": scale}, declared)


def test_configurations_are_found_wherever_they_are_saved(network: Any, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path / "folder")
    torch.save(
        {"state_dict": network.state_dict(), "hyper_parameters": {"lr": 1, "model": MODEL}},
        tmp_path / "a.ckpt",
    )
    entry = {"model": MODEL, "mean": [0.5]}
    save_file(network.state_dict(), tmp_path / "b.safetensors", {"member": json.dumps(entry)})
    other = replace(GREY, mean=[0.5], model=MODEL | {"arch": "FPN"})
    for name in ("folder", "folder/model.safetensors", "a.ckpt", "b.safetensors"):
        source = tmp_path / name
        with pytest.raises(ValueError, match=rf"arch is 'fpn', {tmp_path}/.+ says 'unet'"):
            check_source(source, read_checkpoint(source), other, 8)
        check_source(source, read_checkpoint(source), replace(other, model=MODEL), 8)


@pytest.mark.parametrize(
    ("key", "saved", "declared"),
    [
        ("softmax", True, False),
        ("channels", [1, 2, 3, 4], None),
        ("channels", [1, 2, 3, 4], [0, 1, 2, 3]),
        ("efficientnet_pytorch", "0.6.3", ""),
    ],
)
def test_what_a_header_says_of_the_weights_is_said_by_the_entry_too(
    key: str, saved: Any, declared: Any, network: nn.Module, tmp_path: Path
) -> None:
    entry = tiny_entry("m", MODEL) | {key: saved, "mask_shift": 1.5}
    path = tmp_path / "m.safetensors"
    save_file(network.state_dict(), path, {"member": json.dumps(entry)})
    own = MemberSpec(**entry | {"mask_shift": 0.0})  # which is calibrated
    check_source(path, read_checkpoint(path), own, 8)
    if key == "channels":  # all of them in order, as where nothing is said
        in_order = tiny_entry("m", MODEL) | {key: list(range(MODEL["classes"]))}
        save_file(
            network.state_dict(), tmp_path / "all.safetensors", {"member": json.dumps(in_order)}
        )
        found = read_checkpoint(tmp_path / "all.safetensors")
        check_source(tmp_path / "all.safetensors", found, replace(own, channels=None), 8)
    with pytest.raises(ValueError, match=rf"{key} is .*m\.safetensors's header says .*correct it"):
        check_source(path, read_checkpoint(path), replace(own, **{key: declared}), 8)
    del entry[key]  # as one was packed that did not know
    save_file(network.state_dict(), path, {"member": json.dumps(entry)})
    check_source(path, read_checkpoint(path), own, 8)


def test_a_config_of_something_else_beside_the_weights_is_none(
    network: nn.Module, tmp_path: Path
) -> None:
    torch.save(network.state_dict(), tmp_path / "a.pt")
    (tmp_path / "config.json").write_text('{"classes": 7}')
    check_source(tmp_path / "a.pt", read_checkpoint(tmp_path / "a.pt"), GREY, 8)


def test_the_activation_of_a_saved_configuration_is_refused_naming_member_and_option(
    network: Any, tmp_path: Path
) -> None:
    network.save_pretrained(tmp_path / "m")
    change_config(tmp_path / "m", activation="softmax2d")
    entry = tiny_entry("one", MODEL) | {"file": "m"}
    write_manifest(tmp_path, [{key: value for key, value in entry.items() if key != "model"}])
    with pytest.raises(ValueError, match="member one: model's activation 'softmax2d'"):
        read_sources(tmp_path)
    change_member(tmp_path, softmax=True)
    manifest, [source] = read_sources(tmp_path)
    packed = pack_member(source, manifest.members[0], manifest, tmp_path, openvino=False)
    assert packed.spec.softmax and "activation" not in packed.spec.model


@pytest.mark.parametrize(
    ("classes", "changes", "noted"),
    [
        (5, {"channels": [1, 2, 3, 4]}, "outputs [0] are not among `channels`: trained with "),
        (6, {"channels": [4, 3, 2, 1]}, "outputs [0, 5] are not among `channels`: "),
        (5, {"channels": [1, 2, 3, 4], "softmax": True}, ""),
        (4, {"channels": [3, 2, 1, 0]}, ""),
        (4, {}, ""),
    ],
)
def test_outputs_that_are_no_class_are_asked_about_where_no_softmax_is_declared(
    classes: int, changes: dict[str, Any], noted: str
) -> None:
    checkpoint = Checkpoint(PATH, {}, [])
    model = tiny_model(presence=False) | {"classes": classes}
    check_source(PATH, checkpoint, replace(GREY, model=model, **changes), 8)
    assert [note[: len(noted)] for note in checkpoint.notes] == [noted] * bool(noted)
    assert all('"softmax": true' in note for note in checkpoint.notes)


# --- normalisation --------------------------------------------------------------------------------


def with_buffers(**buffers: Any) -> Checkpoint:
    left_out = {name.replace("__", "."): torch.tensor(value) for name, value in buffers.items()}
    return Checkpoint(PATH, {}, [], left_out)


@pytest.mark.parametrize(
    ("spec", "buffers", "words"),
    [
        (GREY, {"norm__mean": [0.5]}, r"norm\.mean is \[0\.5\], the manifest's mean is \[0\.34\]"),
        (GREY, {"pixel_std": [[[[0.2]]]]}, r"pixel_std is \[0\.2\], the manifest's std"),
        (GREY, {"a__image_mean": 0.5}, r"a\.image_mean is \[0\.5\]"),
        (GREY, {"mean": [0.485, 0.456, 0.406]}, r"mean is \[0\.485, 0\.456"),
        (RGB, {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [1.0, 1.0, 1.0]}, "pixel_std"),
        (RGB, {"mean": [0.406, 0.456, 0.485]}, r"mean is \[0\.406"),  # blue first
        (GREY, {"means": [128]}, r"means is \[128\]"),
    ],
)
def test_a_mean_or_std_in_the_file_that_is_not_the_manifests_is_refused(
    spec: MemberSpec, buffers: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=rf"member\.pt: {words}"):
        check_source(PATH, with_buffers(**buffers), spec, 8)


@pytest.mark.parametrize(
    ("spec", "buffers"),
    [
        (RGB, {"mean": [[[0.485]], [[0.456]], [[0.406]]], "std": [0.229, 0.224, 0.225]}),
        (RGB, {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.395, 57.12, 57.375]}),
        (RGB, {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [0.229, 0.224, 0.225]}),
        (GREY, {"mean": [0.34, 0.34, 0.34]}),
        (GREY, {"bn__running_mean": [5.0], "criterion__mean": [7.0], "class_means": [1.0] * 4}),
    ],
)
def test_what_agrees_with_the_manifest_or_normalises_no_images_passes(
    spec: MemberSpec, buffers: dict[str, Any]
) -> None:
    check_source(PATH, with_buffers(**buffers), spec, 8)


ONES = replace(RGB, std=[1.0, 1.0, 1.0])


@pytest.mark.parametrize("names", [("pixel_mean", "pixel_std"), ("pixel_std", "pixel_mean")])
def test_a_std_is_of_the_range_of_the_mean_beside_it(names: tuple[str, str]) -> None:
    said = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [1.0, 1.0, 1.0]}
    saved = with_buffers(**{name: said[name] for name in names})
    words = r"pixel_std is \[1\.0, 1\.0, 1\.0\] of 0-255, as what stands beside it, .*divide by 255"
    with pytest.raises(ValueError, match=words + r", \[0\.003922, 0\.003922, 0\.003922\]"):
        check_source(PATH, saved, ONES, 8)
    check_source(PATH, saved, replace(ONES, std=[1 / 255] * 3), 8)
    check_source(PATH, with_buffers(mean=ONES.mean, std=ONES.std), ONES, 8)
    other = with_buffers(net__mean=said["pixel_mean"], norm__std=[1.0, 1.0, 1.0])
    check_source(PATH, other, ONES, 8)  # another place


def test_a_mean_may_differ_by_what_bfloat16_rounds_it_and_no_more() -> None:
    mean = torch.tensor(RGB.mean)
    check_source(PATH, with_buffers(mean=mean.bfloat16().tolist()), RGB, 8)
    with pytest.raises(ValueError, match="the manifest's mean"):
        check_source(PATH, with_buffers(mean=(mean * 1.01).tolist()), RGB, 8)


def test_a_mean_of_16_bits_is_held_against_the_manifests() -> None:
    saved = with_buffers(mean=[0.34 * 65_535], std=[0.13 * 65_535])
    check_source(PATH, saved, GREY, 16)
    check_source(PATH, with_buffers(mean=[0.34 * 255], std=[0.13 * 255]), GREY, 16)
    with pytest.raises(ValueError, match=r"mean is \[22281\.9.*the manifest's mean is \[0\.34\]"):
        check_source(PATH, saved, GREY, 8)


def shaped(values: list[float], *shape: int) -> Any:
    return np.reshape(values, shape).tolist()


def test_buffers_as_smps_examples_register_them_are_asked_about() -> None:
    """They normalise pixels of 0-255 with a mean and std of [0, 1]."""
    buffers = {"mean": shaped(RGB.mean, 1, 3, 1, 1), "std": shaped(RGB.std, 1, 3, 1, 1)}
    saved = with_buffers(**buffers)
    check_source(PATH, saved, RGB, 8)
    [note] = saved.notes
    assert note.startswith("std, as the entry's std: trained on pixels of 0-255, ")
    assert note.endswith("Then divide the entry's mean and std by 255")
    divided = replace(RGB, mean=[m / 255 for m in RGB.mean], std=[s / 255 for s in RGB.std])
    other = with_buffers(mean=shaped(RGB.mean, 3, 1, 1), std=shaped(RGB.std, 3, 1, 1))
    for saved, spec in ((with_buffers(**buffers), divided), (other, RGB)):
        check_source(PATH, saved, spec, 8)
        assert saved.notes == []


SAID = {
    "a tuple": ({"mean": (0.5,), "std": (0.13,)}, "mean"),
    "an array": ({"mean": np.array([0.5]), "std": np.array([0.13])}, "mean"),
    "two numbers": ({"mean": 0.34, "std": 0.5}, "std"),
    "two of NumPy": ({"mean": np.float32(0.5), "std": np.float64(0.13)}, "mean"),
    "a list alone": ({"mean": [0.5]}, "mean"),
    "another name": ({"image_mean": (0.5,), "image_std": (0.13,)}, "image_mean"),
    "albumentations' of 0-255": ({"normalize": {"mean": (100.0,), "std": (33.0,)}}, "mean"),
    "ImageNet's": ({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}, "mean"),
    "arguments": (argparse.Namespace(mean=(0.5,), lr=1), "mean"),
}


@pytest.mark.parametrize("said", SAID)
def test_a_mean_or_std_in_any_form_that_is_not_the_manifests_is_refused(
    said: str, network: nn.Module, tmp_path: Path
) -> None:
    form, name = SAID[said]
    path = tmp_path / "member.ckpt"
    torch.save({"state_dict": network.state_dict(), "hyper_parameters": form}, path)
    with pytest.raises(ValueError, match=rf"hyper_parameters.*[ .]{name} is \[.*the manifest's"):
        check_source(path, read_checkpoint(path), GREY, 8)


@pytest.mark.parametrize(
    "form",
    [
        {"mean": (0.34,), "std": np.array([0.13])},
        {"mean": 86.7, "std": 33.15},
        {"dice_mean": 0.91},  # a score's, by itself
        {"metrics": {"mean": 0.91, "std": 0.02}},
        {"cv": {"mean": 0.91, "std": 0.02}},  # of five folds
        {"dice_mean": 0.91, "dice_std": 0.02, "mean_iou": 0.8},
        {"mean": [0.34], "std": [0.13], "noise_std": 0.05, "init_std": 0.02},
        {"history": {"iou_mean": [0.8, 0.81, 0.82]}, "mean_area": [100, 200, 300]},
        {"mean": "0.5", "std": None, "means": [[0.1, "a"]]},
        {"mean": [0.1] * 5},
    ],
)
def test_what_agrees_or_is_no_normalisation_is_taken(
    form: dict[str, Any], network: nn.Module, tmp_path: Path
) -> None:
    torch.save({"state_dict": network.state_dict(), "said": form}, tmp_path / "member.ckpt")
    check_source(tmp_path / "member.ckpt", read_checkpoint(tmp_path / "member.ckpt"), GREY, 8)


def normalize(mean: Any, std: Any, name: str = "Normalize") -> dict[str, Any]:
    """What albumentations writes of it, among others, in its `save_pretrained`."""
    options = {"p": 1.0, "mean": mean, "std": std, "max_pixel_value": 255.0}
    transforms = [
        {"__class_fullname__": "Resize", "height": 64, "width": 400},
        {"__class_fullname__": name, **options},
    ]
    compose = {"__class_fullname__": "Compose", "p": 1.0, "transforms": transforms}
    return {"__version__": "1.4.10", "transform": compose}


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), r"mean is \[0\.485, 0\.456"),
        (normalize([0.34], [0.2]), r"std is \[0\.2\]"),
        (normalize(0.5, 0.13), r"mean is \[0\.5\]"),
        (
            normalize([0.5], [0.13], "albumentations.augmentations.transforms.Normalize"),
            r"mean is \[0\.5\]",
        ),
        (normalize([0.34], [0.13]), ""),
        (normalize(0.34, 0.13), ""),
        (normalize([0.5], [0.2], "GaussNoise"), ""),
        ([], ""),
    ],
)
@pytest.mark.parametrize("key", ["eval", "train"])
def test_the_mean_of_the_transforms_saved_beside_the_weights_is_held_against_the_manifest(
    key: str, saved: Any, words: str, tmp_path: Path
) -> None:
    (tmp_path / f"albumentations_config_{key}.json").write_text(json.dumps(saved))
    checkpoint = Checkpoint(tmp_path / "model.safetensors", {}, [])
    (tmp_path / "albumentations_config_other.json").write_text("{")  # which says nothing
    if not words:
        check_source(tmp_path, checkpoint, GREY, 8)
        return
    words = rf"albumentations_config_{key}\.json's Normalize: {words}.*the manifest's"
    with pytest.raises(ValueError, match=words):
        check_source(tmp_path, checkpoint, GREY, 8)


def test_the_mean_in_the_configuration_beside_the_weights_is_held_against_the_manifest(
    network: Any, tmp_path: Path
) -> None:
    network.save_pretrained(tmp_path / "m")
    change_config(tmp_path / "m", mean=0.5, std=0.13)
    entry = tiny_entry("one", MODEL) | {"file": "m", "mean": [0.34], "std": [0.13]}
    write_manifest(tmp_path, [entry])
    manifest, [source] = read_sources(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: mean is \[0\.5\], the manifest's mean"):
        pack_member(source, manifest.members[0], manifest, tmp_path, openvino=False)


def test_the_mean_in_a_files_header_is_held_against_the_manifest(
    network: nn.Module, tmp_path: Path
) -> None:
    path, said = tmp_path / "member.safetensors", {"mean": [0.5], "std": [0.13]}
    save_file(network.state_dict(), path, {"member": json.dumps(said)})
    words = r"member\.safetensors's header: mean is \[0\.5\], the manifest's mean is \[0\.34\]"
    with pytest.raises(ValueError, match=words):
        check_source(path, read_checkpoint(path), GREY, 8)


# --- layers around the network --------------------------------------------------------------------


def with_layer(name: str, *shape: int) -> Checkpoint:
    return Checkpoint(PATH, {}, [], {name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("name", "shape", "place"),
    [
        ("state_dict.stem.weight", (3, 1, 1, 1), "before its input"),
        ("stem.weight_v", (3, 1, 1, 1), "before its input"),
        ("stem.weight_orig", (3, 1, 1, 1), "before its input"),
        ("stem.parametrizations.weight.original", (3, 1, 1, 1), "before its input"),
        ("stem.parametrizations.weight.original1", (3, 1, 1, 1), "before its input"),
        ("net.refine.weight", (8, 4, 3, 3), "behind its masks"),
        ("refine.weight", (4, 1, 3, 3), "behind its masks"),
        ("refine.weight", (4, 2, 3, 3), "behind its masks"),
    ],
)
def test_a_layer_around_the_network_is_refused(
    name: str, shape: tuple[int, ...], place: str
) -> None:
    words = rf"member\.pt: {name}, as .*outside the network that fits {place}: .*train without it"
    with pytest.raises(ValueError, match=words):
        check_source(PATH, with_layer(name, *shape), RGB, 8)


def test_a_chain_of_layers_before_the_input_is_refused() -> None:
    chain = {
        "adapter.0.weight": torch.ones(16, 3, 3, 3),
        "adapter.2.weight": torch.ones(3, 16, 3, 3),
    }
    with pytest.raises(ValueError, match=r"adapter\.2\.weight, as .* fits before its input"):
        check_source(PATH, Checkpoint(PATH, {}, [], chain), RGB, 8)


LAYERS: dict[str, tuple[nn.Module, str]] = {  # around a network of 3 channels and 4 classes
    "batch norm": (nn.BatchNorm2d(3), "before its input"),
    "batch norm that only normalises": (nn.BatchNorm2d(3, affine=False), "before its input"),
    "instance norm": (nn.InstanceNorm2d(3, affine=True), "before its input"),
    "batch norm of masks": (nn.BatchNorm2d(4), "behind its masks"),
    "batch norm that only normalises masks": (nn.BatchNorm2d(4, affine=False), "behind its masks"),
    "group norm of masks": (nn.GroupNorm(2, 4), "behind its masks"),
    "a convolution of each mask": (nn.Conv2d(4, 4, 3, groups=4), "behind its masks"),
    "weight norm": (weight_norm(nn.Conv2d(3, 3, 1)), "before its input"),
    "spectral norm": (spectral_norm(nn.Conv2d(3, 3, 3)), "before its input"),
    "spectral norm of old": (nn.utils.spectral_norm(nn.Conv2d(3, 3, 3)), "before its input"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_in_a_wrapper_is_refused(layer: str, network: nn.Module, tmp_path: Path) -> None:
    module, place = LAYERS[layer]
    wrapper = nn.ModuleDict({"net": network, "extra": module})
    torch.save(wrapper.state_dict(), tmp_path / "member.pt")
    with pytest.raises(ValueError, match=rf"extra\..*outside the network that fits {place}: "):
        check_source(PATH, read_checkpoint(tmp_path / "member.pt"), RGB, 8)


BESIDE: dict[str, nn.Module] = {  # it does nothing to images or masks
    "a loss with weights": nn.CrossEntropyLoss(torch.ones(4)),
    "a head of another depth": weight_norm(nn.Conv2d(64, 4, 1)),
    "a norm of features": nn.BatchNorm2d(64),
    "one that only normalises": nn.BatchNorm2d(64, affine=False),
    "a head that reads features": nn.Linear(64, 1),
    "one of three classes": nn.Linear(64, 3),
    "an activation": nn.PReLU(),
    "one a channel": nn.PReLU(3),
}


@pytest.mark.parametrize("spec", [GREY, RGB], ids=["grey", "RGB"])
@pytest.mark.parametrize("layer", BESIDE)
def test_a_layer_in_a_wrapper_that_fits_neither_end_is_named_only(
    layer: str, spec: MemberSpec, network: nn.Module, tmp_path: Path
) -> None:
    wrapper = nn.ModuleDict({"net": network, "extra": BESIDE[layer]})
    torch.save(wrapper.state_dict(), tmp_path / "member.pt")
    found = read_checkpoint(tmp_path / "member.pt")
    assert "left out: extra" in found.notes[0]
    check_source(PATH, found, spec, 8)


@pytest.mark.parametrize("spec", [GREY, RGB], ids=["grey", "RGB"])
def test_trained_layers_that_the_masks_may_have_gone_through_are_noted_once(
    spec: MemberSpec, network: nn.Module, tmp_path: Path
) -> None:
    extra: dict[str, nn.Module] = {
        "attention": nn.ModuleList([nn.Conv2d(64, 64, 1), nn.Conv2d(32, 32, 1)]),
        "norm": nn.BatchNorm2d(64),
        "edge": nn.Sequential(nn.Conv2d(16, 1, 1)),  # a head of as many outputs as grey channels
        "aux": nn.Conv2d(64, 3, 1),  # or as RGB
        "head": nn.Linear(64, 1),
        "loss": nn.CrossEntropyLoss(torch.ones(4)),
        "ce": nn.CrossEntropyLoss(torch.ones(4)),
        "act": nn.PReLU(),
    }
    wrapper = nn.ModuleDict({"net": network, **extra})
    torch.save(wrapper.state_dict(), tmp_path / "member.pt")
    found = read_checkpoint(tmp_path / "member.pt")
    check_source(PATH, found, spec, 8)
    assert found.notes[1:] == [
        "trained, yet left out: attention, norm, edge, and 2 more; if these are heads of their "
        "own, all is well; if the masks went through them, this member is wrong"
    ]


def test_a_trained_layer_at_the_files_top_is_noted_by_its_own_name() -> None:
    found = with_layer("weight", 64, 64, 1, 1)
    check_source(PATH, found, RGB, 8)
    [note] = found.notes
    assert note.startswith("trained, yet left out: weight; ")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("classifier.weight", (4, 512)),  # it reads features
        ("aux.parametrizations.weight.original0", (4, 1, 1, 1)),  # lengths of weight norm
        ("ce.weight", (4,)),  # a loss's
        ("second.conv1.weight", (64, 1, 7, 7)),
        ("metrics.running_var", (4,)),
        ("second.conv1.weight", (64, 3, 7, 7)),  # a second model
        ("criterion.weight", (3,)),
        ("optimizer.state.0.exp_avg", (3, 1, 1, 1)),
        ("ema.module.encoder.conv1.weight", (3, 1, 1, 1)),  # another copy's
    ],
)
def test_what_does_not_stand_around_the_network_is_named_only(
    name: str, shape: tuple[int, ...]
) -> None:
    check_source(PATH, with_layer(name, *shape), RGB, 8)
