"""The declared model: its options, saved configurations, normalisation, and the weights in it."""

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
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from kernel.manifest import MemberSpec
from kernel.members import build_network
from packing.checkpoints import Checkpoint, read_checkpoint
from packing.members import pack_member
from packing.models import (
    check_config,
    check_layers,
    check_normalisation,
    check_options,
    load_into_model,
    read_model,
    saved_configs,
    with_todays_options,
    without_activation,
)
from packing.old_names import rename_old
from packing.sources import read_sources

MODEL = tiny_model()
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return random_network(MODEL, seed=7)


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_save_pretrained_folder_brings_its_model(network: nn.Module, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path / "member")  # type: ignore[operator]
    found = read_checkpoint(tmp_path / "member")
    assert_same(found.weights, network.state_dict())
    model = read_model(tmp_path / "member")
    assert model["arch"] == "Unet"
    assert {key: model[key] for key in MODEL} == MODEL
    assert not {"encoder_weights", "_model_class"} & set(model)
    load_into_model(found, model)


def test_a_folder_without_an_architecture_asks_for_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"encoder_name": "resnet18"}))
    with pytest.raises(ValueError, match=r"config\.json: names no architecture.*`model`"):
        read_model(tmp_path)


def test_a_sigmoid_is_left_to_the_kernel() -> None:
    model = {"arch": "Unet", "activation": "sigmoid", "aux_params": {"activation": "sigmoid"}}
    assert without_activation(model) == {"arch": "Unet", "aux_params": {}}
    assert model["activation"] == "sigmoid"


def test_an_activation_that_is_no_sigmoid_stays_to_be_refused() -> None:
    model = {"arch": "Unet", "activation": None, "aux_params": {"activation": "softmax"}}
    assert without_activation(model) == {"arch": "Unet", "aux_params": {"activation": "softmax"}}


def test_a_softmax_is_left_to_the_kernel_of_a_member_that_has_one() -> None:
    for activation in ("softmax", "softmax2d"):
        model = {"arch": "Unet", "activation": activation, "aux_params": {"activation": activation}}
        kept = {"arch": "Unet", "aux_params": {"activation": activation}}
        assert without_activation(model, softmax=True) == kept
        check_config(MODEL | {"activation": activation}, MODEL, "here", softmax=True)
    sigmoid = {"arch": "Unet", "activation": "sigmoid"}
    assert without_activation(sigmoid, softmax=True) == sigmoid
    with pytest.raises(ValueError, match=r"activation is None, here says 'sigmoid'"):
        check_config(MODEL | sigmoid, MODEL, "here", softmax=True)


# --- weights -------------------------------------------------------------------------------------


def checkpoint_of(model: dict[str, Any]) -> Checkpoint:
    return Checkpoint(Path("member.pt"), dict(build_network(model).state_dict()), [])


def test_missing_counters_of_batch_norm_are_added(network: nn.Module) -> None:
    weights = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    assert len(weights) < len(network.state_dict())
    fitted = load_into_model(Checkpoint(Path("member.pt"), weights, []), MODEL)
    assert_same(dict(fitted.named_parameters()), dict(network.named_parameters()))
    counters = {k: v for k, v in fitted.state_dict().items() if "num_batches" in k}
    assert fitted.state_dict().keys() == network.state_dict().keys()
    assert counters and not any(counters.values())


def test_a_wrong_encoder_names_file_key_and_encoder() -> None:
    right = {"arch": "FPN", "encoder_name": "resnet18", "in_channels": 1, "classes": 4}
    with pytest.raises(ValueError, match=r"member\.pt: (lacks|has) .*encoder\.layer.*resnet18"):
        load_into_model(checkpoint_of(right), right | {"encoder_name": "resnet50"})


def test_a_wrong_decoder_names_the_architecture() -> None:
    right = {"arch": "FPN", "encoder_name": "resnet18", "in_channels": 1, "classes": 4}
    with pytest.raises(ValueError, match=r"decoder\..*looks like FPN with encoder resnet18"):
        load_into_model(checkpoint_of(right), right | {"arch": "Unet"})


def test_a_wrong_number_of_classes_names_the_shape_and_the_heads() -> None:
    right = {"arch": "FPN", "encoder_name": "resnet18", "in_channels": 1, "classes": 5}
    with pytest.raises(ValueError, match=r"segmentation_head.*\(5, .*compare.*classes"):
        load_into_model(checkpoint_of(right), right | {"classes": 4})


def test_an_undeclared_presence_head_is_told() -> None:
    declared = {k: v for k, v in MODEL.items() if k != "aux_params"}
    with pytest.raises(ValueError, match=r"unexpected classification_head.*a presence head"):
        load_into_model(checkpoint_of(MODEL), declared)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"encoder_name": "resnet43"}, r"unknown encoder 'resnet43'; nearest: .*resnet34"),
        ({"encoder_name": "tu-resnet10tt"}, r"unknown encoder.*tu-resnet10t"),
        ({"encoder_name": "se-resnet50"}, r"unknown encoder.*se_resnet50"),
        ({"encoder_name": "efficientnet_b5"}, r"unknown encoder.*efficientnet-b5"),
        ({"arch": "Unt"}, r"unknown architecture 'Unt'; nearest: unet"),
        ({"decoder_colour": 3}, r"model's 'decoder_colour' is no option of SMP's Unet.*decoder_"),
        ({"encoder_name": "tu-hf-hub:a/b"}, r"encoder 'tu-hf-hub:a/b' is read from another place"),
        ({"encoder_depth": 9}, r"SMP builds no network of .*depth"),
    ],
)
def test_an_unknown_name_gives_the_nearest(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"member\.pt: {words}"):
        load_into_model(Checkpoint(Path("member.pt"), {}, []), MODEL | wrong)


def test_an_undeclared_presence_head_names_the_option() -> None:
    declared = {k: v for k, v in MODEL.items() if k != "aux_params"}
    words = (
        r"classification_head\.3\.weight: a presence head was trained.*aux_params.*\"classes\": 4"
    )
    with pytest.raises(ValueError, match=words):
        load_into_model(checkpoint_of(MODEL), declared)


def test_a_presence_head_of_other_outputs_is_to_be_left_out_and_then_it_packs() -> None:
    trained = checkpoint_of(MODEL | {"aux_params": {"classes": 1, "pooling": "max"}})
    declared = {k: v for k, v in MODEL.items() if k != "aux_params"}
    words = r"a presence head of 1 outputs was trained, model's classes are 4.*without class"
    with pytest.raises(ValueError, match=words):
        load_into_model(trained, declared)
    kept = {k: v for k, v in trained.weights.items() if not k.startswith("classification_head.")}
    load_into_model(replace(trained, weights=kept), declared)


def test_a_layer_in_the_network_that_smp_has_not_is_refused(network: nn.Module) -> None:
    weights = dict(network.state_dict()) | {"stem.weight": torch.ones(3, 1, 1, 1)}
    with pytest.raises(
        ValueError, match=r"unexpected stem\.weight; SMP's Unet has .*would be lost"
    ):
        load_into_model(Checkpoint(Path("member.pt"), weights, []), MODEL)


def test_an_undeclared_attention_names_the_option() -> None:
    declared = tiny_model() | {"decoder_channels": [16] * 5}
    trained = random_network(declared | {"decoder_attention_type": "scse"}, seed=3).state_dict()
    words = (
        r"unexpected .*attention.*: an attention was trained.*\"decoder_attention_type\": \"scse\""
    )
    with pytest.raises(ValueError, match=words):
        load_into_model(Checkpoint(Path("member.pt"), trained, []), declared)


def test_weights_that_are_whole_numbers_are_refused(network: nn.Module) -> None:
    """A program that quantizes leaves such, and their scale elsewhere."""
    weights = dict(network.state_dict())
    name = "segmentation_head.0.weight"
    weights[name] = (weights[name] * 10).to(torch.int8)
    with pytest.raises(ValueError, match=rf"member\.pt: {name} holds torch\.int8, whole numbers"):
        load_into_model(Checkpoint(Path("member.pt"), weights, []), MODEL)


# --- old names ------------------------------------------------------------------------------------


def test_names_that_smp_renamed_are_read_by_its_own_loading() -> None:
    model = {"arch": "FPN", "encoder_name": "tu-resnest14d", "in_channels": 3, "classes": 4}
    trained = random_network(model, seed=3).state_dict()
    old = {key.replace("encoder.model.", "encoder."): value for key, value in trained.items()}
    assert old.keys() != trained.keys()
    found = load_into_model(Checkpoint(Path("member.pt"), old, []), model)
    assert_same(found.state_dict(), trained)


class OldConv(nn.Module):
    """Convolution, batch norm and ReLU as SMP 0.0.x names them."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        conv = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
        self.block = nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.block(images)
        return found


class OldBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.block = nn.Sequential(OldConv(n_in, n_out), OldConv(n_out, n_out))

    def forward(self, images: Tensor, skip: Tensor | None) -> Tensor:
        images = nn.functional.interpolate(images, scale_factor=2, mode="nearest")
        found: Tensor = self.block(images if skip is None else torch.cat([images, skip], 1))
        return found


class OldDecoder(nn.Module):
    """The decoder of a Unet with a resnet18, written as in 2019."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        sizes = ((768, 256), (384, 128), (192, 64), (128, 32), (32, 16))
        for number, size in enumerate(sizes, 1):
            self.add_module(f"layer{number}", OldBlock(*size))
        self.final_conv = nn.Conv2d(16, classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        images, skips = features[-1], [*features[-2:0:-1], None]
        for number, skip in enumerate(skips, 1):
            images = self.get_submodule(f"layer{number}")(images, skip)
        logits: Tensor = self.final_conv(images)
        return logits


def test_a_unet_of_2019_gives_its_logits_under_todays_names() -> None:
    model = {"arch": "Unet", "encoder_name": "resnet18", "in_channels": 3, "classes": 4}
    torch.manual_seed(3)
    encoder: Any = build_network(model).encoder
    old = nn.ModuleDict({"encoder": encoder, "decoder": OldDecoder(4)}).eval()
    for name, buffer in old.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    checkpoint = Checkpoint(Path("member.pt"), dict(old.state_dict()), [])
    found = load_into_model(checkpoint, model).eval()
    assert checkpoint.notes == ["names of SMP 0.0.x (2019), taken as today's"]
    images = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        expected = old["decoder"](old["encoder"](images))
        assert expected.std() > 0.01
        torch.testing.assert_close(found(images), expected, atol=1e-5, rtol=0)


OLD_NAMES = {  # the first weight of each part, as SMP 0.0.3 has it
    "Linknet": {
        "decoder.layer1.block.0.block.0.weight": "decoder.blocks.0.block.0.0.weight",
        "decoder.layer5.block.1.block.0.bias": "decoder.blocks.4.block.1.0.bias",
        "decoder.layer3.block.2.block.1.bias": "decoder.blocks.2.block.2.1.bias",
        "decoder.layer1.block.2.block.0.weight": "decoder.blocks.0.block.2.0.weight",
        "decoder.final_conv.bias": "segmentation_head.0.bias",
    },
    "FPN": {
        "decoder.conv1.weight": "decoder.p5.weight",
        "decoder.p4.skip_conv.weight": "decoder.p4.skip_conv.weight",
        "decoder.s5.block.0.block.0.weight": "decoder.seg_blocks.0.block.0.block.0.weight",
        "decoder.s2.block.0.block.1.bias": "decoder.seg_blocks.3.block.0.block.1.bias",
        "decoder.final_conv.weight": "segmentation_head.0.weight",
    },
    "PSPNet": {
        "decoder.psp.stages.0.pool.1.block.0.weight": "decoder.psp.blocks.0.pool.1.0.weight",
        "decoder.psp.stages.3.pool.1.block.1.bias": "decoder.psp.blocks.3.pool.1.1.bias",
        "decoder.conv.block.0.weight": "decoder.conv.0.weight",
        "decoder.final_conv.weight": "segmentation_head.0.weight",
    },
}


@pytest.mark.parametrize("arch", OLD_NAMES)
def test_names_of_2019_become_todays(arch: str) -> None:
    todays = build_network({"arch": arch, "encoder_name": "resnet18", "classes": 4}).state_dict()
    renamed = rename_old({name: torch.ones(1) for name in OLD_NAMES[arch]})
    assert list(renamed) == list(OLD_NAMES[arch].values())
    assert set(renamed) <= set(todays)


def test_a_checkpoint_of_2019_under_another_architecture_is_told_its_own() -> None:
    model = {"arch": "Unet", "encoder_name": "resnet18", "in_channels": 3, "classes": 4}
    encoder: Any = build_network(model).encoder
    old = nn.ModuleDict({"encoder": encoder, "decoder": OldDecoder(4)}).state_dict()
    words = r"names of SMP 0\.0\.x.*it looks like Unet with encoder resnet18"
    with pytest.raises(ValueError, match=words):
        load_into_model(Checkpoint(Path("member.pt"), dict(old), []), model | {"arch": "FPN"})


def test_the_attention_of_2019_is_named_for_what_it_is() -> None:
    """Its spatial gate had as many channels as the features, today's has one."""
    model = {"arch": "Unet", "encoder_name": "resnet18", "in_channels": 3, "classes": 4}
    encoder: Any = build_network(model).encoder
    old = nn.ModuleDict({"encoder": encoder, "decoder": OldDecoder(4)}).state_dict()
    weights = dict(old) | {"decoder.layer1.attention2.sSE.0.weight": torch.ones(256, 256, 1, 1)}
    words = r"member\.pt: decoder\.layer1.*\(256, 256, 1, 1\): the scse attention of SMP 0\.0\.x.*"
    for declared in (model, model | {"decoder_attention_type": "scse"}):
        with pytest.raises(ValueError, match=words + "train it again"):
            load_into_model(Checkpoint(Path("member.pt"), weights, []), declared)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"decoder_interpolation_mode": "bilinear"},
            r"'decoder_interpolation_mode'.*decoder_inter",
        ),
        ({"interpolation": "bilinear"}, "'interpolation' is no option of SMP's Unet"),
        ({"decoder_atention_type": None}, "'decoder_atention_type'.*decoder_attention_type"),
        ({"psp_use_batchnorm": True}, "'psp_use_batchnorm' is no option of SMP's Unet"),
        ({"arch": "FPN", "decoder_channels": [8]}, "'decoder_channels' is no option of SMP's FPN"),
        (
            {"aux_params": {"classes": 4, "poling": "max"}},
            "aux_params's 'poling'.*nearest: pooling",
        ),
        (
            {"aux_params": {"classes": 4, "in_channels": 3}},
            "aux_params's 'in_channels' is no option",
        ),
        ({"cache_dir": "x"}, "'cache_dir' is no option of SMP's Unet"),  # of timm's loading
        ({"block_args": None}, "'block_args' is no option of SMP's Unet"),  # timm drops None
    ],
)
@pytest.mark.parametrize("encoder", ["resnet18", "tu-test_resnet"])
def test_an_option_that_smp_has_not_is_refused(
    encoder: str, model: dict[str, Any], words: str
) -> None:
    declared = {"arch": "Unet", "encoder_name": encoder, "in_channels": 1, "classes": 4}
    with pytest.raises(ValueError, match=words):
        check_options(declared | model)


def test_options_of_smp_and_of_timms_encoder_pass() -> None:
    model = {"arch": "Unet", "encoder_name": "tu-test_resnet", "encoder_weights": "imagenet"}
    check_options(model | {"decoder_use_norm": "identity", "aux_params": {"classes": 4}})
    check_options(model | {"block_args": {"attn_layer": "se"}, "drop_path_rate": 0.1})
    with pytest.raises(ValueError, match="'block_arg' is no option"):
        check_options(model | {"block_arg": {"attn_layer": "se"}})


def test_options_that_smp_renamed_have_todays_names() -> None:
    old = {"arch": "UNET", "decoder_use_batchnorm": False}
    assert with_todays_options(old) == {"arch": "UNET", "decoder_use_norm": False}
    assert with_todays_options({"arch": "PAN", "upscale_mode": "nearest"}) == {
        "arch": "PAN",
        "decoder_interpolation": "nearest",
    }
    dropped = {"arch": "Unet", "decoder_use_batchnorm": None}
    assert with_todays_options(dropped) == {"arch": "Unet"}
    for dilation, stride in ((True, 16), (False, 32)):
        old = {"arch": "PAN", "encoder_dilation": dilation}
        assert with_todays_options(old) == {"arch": "PAN", "encoder_output_stride": stride}
        check_options(with_todays_options(old | {"encoder_name": "resnet18"}))
    both = old | {"encoder_output_stride": 16}
    assert with_todays_options(both) == both  # and refused
    swallowed = {"arch": "FPN", "decoder_use_batchnorm": False}
    assert with_todays_options(swallowed) == swallowed  # and refused


# --- saved configurations -------------------------------------------------------------------------


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
    ],
)
def test_a_saved_configuration_that_contradicts_the_model_is_refused(
    saved: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=rf"model's {words}; correct `model`"):
        check_config(MODEL | saved, MODEL, "here")


@pytest.mark.parametrize(
    "saved",
    [
        MODEL,
        {"arch": "unet", "activation": "sigmoid", "decoder_channels": (16, 8, 8, 8, 8)},
        {"encoder_weights": "imagenet", "decoder_attention_type": None, "lr": 0.1},
        {"aux_params": {"classes": 4, "pooling": "max", "dropout": 0.2, "activation": None}},
        {"classes": ["pit", "scratch"]},  # another program's word
        {"decoder_use_batchnorm": True},
        {"decoder_use_norm": True},
    ],
)
def test_a_saved_configuration_that_says_the_same_passes(saved: dict[str, Any]) -> None:
    check_config(saved, MODEL, "here")


def deeplab(**changes: Any) -> dict[str, Any]:
    return {"arch": "DeepLabV3", "encoder_name": "resnet18", "classes": 4} | changes


@pytest.mark.parametrize(
    ("saved", "model"),
    [
        (deeplab(upsampling=8), deeplab()),  # the default until SMP 0.4
        (deeplab(upsampling=None), deeplab(upsampling=8)),
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
    check_config(saved, model, "here")


@pytest.mark.parametrize(
    ("saved", "model", "words"),
    [
        (deeplab(upsampling=4), deeplab(), "upsampling is None, here says 4"),
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
        check_config(saved, model, "here")


def test_the_sides_of_a_deeplab_that_leaves_upsampling_out_are_those_it_is_compared_with() -> None:
    for options in ({}, {"encoder_output_stride": 8}, {"encoder_depth": 3}):
        declared = deeplab(**{"encoder_output_stride": 16} | options)
        network: Any = build_network(declared)
        scale = int(network.segmentation_head[1].scale_factor)
        check_config(declared | {"upsampling": scale}, declared, "here")


def test_configurations_are_found_wherever_they_are_saved(network: Any, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path / "folder")
    torch.save(
        {"state_dict": network.state_dict(), "hyper_parameters": {"lr": 1, "model": MODEL}},
        tmp_path / "a.ckpt",
    )
    entry = {"model": MODEL | {"upsampling": 2}, "mean": [0.5]}
    save_file(network.state_dict(), tmp_path / "b.safetensors", {"member": json.dumps(entry)})
    sources = ("folder", "folder/model.safetensors", "a.ckpt", "b.safetensors")
    found = {}
    for name in sources:
        source = tmp_path / name
        [(where, found[name])] = saved_configs(source, read_checkpoint(source)).items()
        assert str(tmp_path) in where
    assert [found[name]["arch"] for name in sources] == ["Unet"] * 4
    assert found["b.safetensors"]["upsampling"] == 2


def test_a_config_of_something_else_beside_the_weights_is_none(
    network: nn.Module, tmp_path: Path
) -> None:
    torch.save(network.state_dict(), tmp_path / "a.pt")
    (tmp_path / "config.json").write_text('{"classes": 7}')
    assert saved_configs(tmp_path / "a.pt", read_checkpoint(tmp_path / "a.pt")) == {}


def test_the_activation_of_a_saved_configuration_is_refused_naming_member_and_option(
    network: Any, tmp_path: Path
) -> None:
    network.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"activation": "softmax2d"}))
    entry = tiny_entry("one", MODEL) | {"file": "m"}
    write_manifest(tmp_path, [{key: value for key, value in entry.items() if key != "model"}])
    with pytest.raises(ValueError, match="member one: model's activation 'softmax2d'"):
        read_sources(tmp_path)
    change_member(tmp_path, softmax=True)
    manifest, [source] = read_sources(tmp_path)
    packed = pack_member(source, manifest.members[0], manifest, tmp_path, openvino=False)
    assert packed.spec.softmax and "activation" not in packed.spec.model


# --- normalisation --------------------------------------------------------------------------------


def with_buffers(**buffers: Any) -> Checkpoint:
    left_out = {name.replace("__", "."): torch.tensor(value) for name, value in buffers.items()}
    return Checkpoint(Path("member.pt"), {}, [], left_out)


RGB = MemberSpec("m", "m.safetensors", {}, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
GREY = MemberSpec("m", "m.safetensors", {}, [0.34], [0.13])


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
        check_normalisation(with_buffers(**buffers), spec)


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
    check_normalisation(with_buffers(**buffers), spec)


ONES = MemberSpec("m", "m.safetensors", {}, [0.485, 0.456, 0.406], [1.0, 1.0, 1.0])


@pytest.mark.parametrize("names", [("pixel_mean", "pixel_std"), ("pixel_std", "pixel_mean")])
def test_a_std_is_of_the_range_of_the_mean_beside_it(names: tuple[str, str]) -> None:
    said = {"pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [1.0, 1.0, 1.0]}
    saved = with_buffers(**{name: said[name] for name in names})
    words = r"pixel_std is \[1\.0, 1\.0, 1\.0\] of 0-255, as what stands beside it, .*divide by 255"
    with pytest.raises(ValueError, match=words + r", \[0\.003922, 0\.003922, 0\.003922\]"):
        check_normalisation(saved, ONES)
    check_normalisation(saved, replace(ONES, std=[1 / 255] * 3))
    check_normalisation(with_buffers(mean=ONES.mean, std=ONES.std), ONES)
    other = with_buffers(net__mean=said["pixel_mean"], norm__std=[1.0, 1.0, 1.0])
    check_normalisation(other, ONES)  # another place


def test_a_mean_of_16_bits_is_held_against_the_manifests() -> None:
    saved = with_buffers(mean=[0.34 * 65_535], std=[0.13 * 65_535])
    check_normalisation(saved, GREY, bits=16)
    check_normalisation(with_buffers(mean=[0.34 * 255], std=[0.13 * 255]), GREY, bits=16)
    with pytest.raises(ValueError, match=r"mean is \[22281\.9.*the manifest's mean is \[0\.34\]"):
        check_normalisation(saved, GREY)


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
        check_normalisation(read_checkpoint(path), GREY)


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
    check_normalisation(read_checkpoint(tmp_path / "member.ckpt"), GREY)


def test_the_mean_in_the_configuration_beside_the_weights_is_held_against_the_manifest(
    network: Any, tmp_path: Path
) -> None:
    network.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mean": 0.5, "std": 0.13}))
    entry = tiny_entry("one", MODEL) | {"file": "m", "mean": [0.34], "std": [0.13]}
    write_manifest(tmp_path, [entry])
    manifest, [source] = read_sources(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: mean is \[0\.5\], the manifest's mean"):
        pack_member(source, manifest.members[0], manifest, tmp_path, openvino=False)


@pytest.mark.parametrize("form", ["header", "hyper_parameters"])
def test_a_mean_that_was_saved_as_a_number_is_held_against_the_manifest(
    form: str, network: nn.Module, tmp_path: Path
) -> None:
    said = {"mean": [0.5], "std": [0.13]}
    path = tmp_path / "member.ckpt"
    if form == "header":
        save_file(network.state_dict(), path, {"member": json.dumps(said)})
    else:
        torch.save({"state_dict": network.state_dict(), form: {"lr": 1} | said}, path)
    words = rf"member\.ckpt's {form}: mean is \[0\.5\], the manifest's mean is \[0\.34\]"
    with pytest.raises(ValueError, match=words):
        check_normalisation(read_checkpoint(path), GREY)


# --- layers around the network --------------------------------------------------------------------


def with_layer(name: str, *shape: int) -> Checkpoint:
    return Checkpoint(Path("member.pt"), {}, [], {name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("name", "shape", "place"),
    [
        ("state_dict.stem.weight", (3, 1, 1, 1), "before its input"),
        ("adapter.2.weight", (3, 16, 3, 3), "before its input"),
        ("input_norm.weight", (3,), "before its input"),
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
        check_layers(with_layer(name, *shape), {"in_channels": 3, "classes": 4})


LAYERS: dict[str, tuple[nn.Module, str]] = {  # around a network of 3 channels and 4 classes
    "batch norm": (nn.BatchNorm2d(3), "before its input"),
    "batch norm that only normalises": (nn.BatchNorm2d(3, affine=False), "before its input"),
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
        check_layers(read_checkpoint(tmp_path / "member.pt"), {"in_channels": 3, "classes": 4})


BESIDE: dict[str, nn.Module] = {  # it does nothing to images or masks
    "a loss with weights": nn.CrossEntropyLoss(torch.ones(4)),
    "a head of another depth": weight_norm(nn.Conv2d(64, 4, 1)),
    "a norm of features": nn.BatchNorm2d(64),
    "one that only normalises": nn.BatchNorm2d(64, affine=False),
}


@pytest.mark.parametrize("layer", BESIDE)
def test_a_layer_in_a_wrapper_that_fits_neither_end_is_named_only(
    layer: str, network: nn.Module, tmp_path: Path
) -> None:
    wrapper = nn.ModuleDict({"net": network, "extra": BESIDE[layer]})
    torch.save(wrapper.state_dict(), tmp_path / "member.pt")
    found = read_checkpoint(tmp_path / "member.pt")
    assert "left out: extra" in found.notes[0]
    check_layers(found, {"in_channels": 3, "classes": 4})


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
    check_layers(with_layer(name, *shape), {"in_channels": 3, "classes": 4})
