"""The declared model: its options, and the weights in it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_network, tiny_model
from torch import Tensor, nn

from kernel.members import build_network
from packing.checkpoints import Checkpoint, read_checkpoint
from packing.models import (
    check_options,
    load_into_model,
    read_model,
    with_todays_options,
    without_activation,
)
from packing.old_names import rename_old

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
    sigmoid = {"arch": "Unet", "activation": "sigmoid"}
    assert without_activation(sigmoid, softmax=True) == sigmoid


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


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"encoder_name": "resnet43"}, r"unknown encoder 'resnet43'; the nearest are .*resnet34"),
        ({"encoder_name": "tu-resnet10tt"}, r"unknown encoder.*tu-resnet10t"),
        ({"encoder_name": "se-resnet50"}, r"unknown encoder.*se_resnet50"),
        ({"encoder_name": "efficientnet_b5"}, r"unknown encoder.*efficientnet-b5"),
        ({"arch": "Unt"}, r"unknown architecture 'Unt'; the nearest are unet"),
        ({"decoder_colour": 3}, r"model's 'decoder_colour' is no option of SMP's Unet.*decoder_"),
        ({"encoder_name": "tu-hf-hub:a/b"}, r"encoder 'tu-hf-hub:a/b' is read from another place"),
        ({"encoder_name": "~~~"}, r"unknown encoder '~~~'; known are resnet18, .*, …$"),
        ({"encoder_depth": 9}, r"SMP builds no network of .*depth"),
    ],
)
def test_an_unknown_name_gives_the_nearest(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"member\.pt: {words}"):
        load_into_model(Checkpoint(Path("member.pt"), {}, []), MODEL | wrong)


def test_an_undeclared_presence_head_names_the_option() -> None:
    declared = {k: v for k, v in MODEL.items() if k != "aux_params"}
    words = (
        r"unexpected classification_head\.3\.weight: a presence head was trained.*aux_params.*"
        r"\"classes\": 4"
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


def test_an_attention_and_a_presence_head_are_asked_for_one_after_the_other() -> None:
    declared = tiny_model(presence=False) | {"decoder_channels": [16] * 5}
    attended = declared | {"decoder_attention_type": "scse"}
    trained = attended | {"aux_params": {"classes": 4, "pooling": "max"}}
    weights = random_network(trained, seed=3).state_dict()
    checkpoint = Checkpoint(Path("member.pt"), dict(reversed(weights.items())), [])
    with pytest.raises(ValueError, match=r"unexpected decoder\.\S+: an attention was trained"):
        load_into_model(checkpoint, declared)
    with pytest.raises(ValueError, match="a presence head was trained"):
        load_into_model(checkpoint, attended)
    load_into_model(checkpoint, trained)


def test_weights_that_are_whole_numbers_are_refused(network: nn.Module) -> None:
    """A program that quantizes leaves such, and their scale elsewhere."""
    weights = dict(network.state_dict())
    name = "segmentation_head.0.weight"
    weights[name] = (weights[name] * 10).to(torch.int8)
    with pytest.raises(ValueError, match=rf"member\.pt: {name} holds torch\.int8, whole numbers"):
        load_into_model(Checkpoint(Path("member.pt"), weights, []), MODEL)


# --- old names ------------------------------------------------------------------------------------


BARE_NOTE = "names of timm's own encoder or of a bare head, taken as today's SMP's"


@pytest.mark.parametrize(
    ("encoder", "notes"),
    [("tu-resnest14d", [BARE_NOTE]), ("tu-gernet_s", [])],
    ids=["timm's names", "names that SMP's own loading renames"],
)
def test_an_encoder_from_before_smps_tu_has_its_names_of_today(
    encoder: str, notes: list[str]
) -> None:
    model = {"arch": "FPN", "encoder_name": encoder, "in_channels": 3, "classes": 4}
    trained = random_network(model, seed=3).state_dict()
    renamed = {"encoder.model.": "encoder.", "encoder.stages_": "encoder.stages."}
    old = dict(trained)
    for today, before in renamed.items():
        old = {key.replace(today, before): value for key, value in old.items()}
    assert old.keys() != trained.keys()
    checkpoint = Checkpoint(Path("member.pt"), old, [])
    assert_same(dict(load_into_model(checkpoint, model).state_dict()), trained)
    assert checkpoint.notes == notes


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


def test_the_upernet_of_smp_0_4_is_named_for_what_it_is() -> None:
    model = {"arch": "UPerNet", "encoder_name": "resnet18", "in_channels": 3, "classes": 4}
    stage = {"decoder.fpn_stages.0.skip_conv.0.weight": torch.ones(256, 256, 1, 1)}
    weights = dict(build_network(model).state_dict()) | stage
    words = r"member\.pt: decoder\.fpn_stages\.0.*: the UPerNet of SMP 0\.4, .*train it again"
    with pytest.raises(ValueError, match=words):
        load_into_model(Checkpoint(Path("member.pt"), weights, []), model)


# --- parts put together by hand -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_a_timm_encoder_and_a_convolution_as_head_give_their_logits(size: int) -> None:
    model = tiny_model(presence=False)
    parts: Any = random_network(model, seed=3)
    head = nn.Conv2d(8, 4, size, padding=size // 2)
    mine = {"encoder": parts.encoder.model, "decoder": parts.decoder, "segmentation_head": head}
    weights = dict(nn.ModuleDict(mine).state_dict())
    checkpoint = Checkpoint(Path("member.pt"), weights, [])
    found = load_into_model(checkpoint, model).eval()
    assert checkpoint.notes == [BARE_NOTE]
    images = torch.rand(1, 1, 64, 96)
    with torch.inference_mode():
        expected = head(parts.decoder([images, *parts.encoder.model(images)]))
        assert expected.std() > 0.01
        torch.testing.assert_close(found(images), expected, atol=1e-5, rtol=0)
    more = weights | {"encoder.last.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"SMP's: has the unexpected encoder\.last\.weight; SMP's"):
        load_into_model(Checkpoint(Path("member.pt"), more, []), model)


@pytest.mark.parametrize("arch", ["FPN", "DeepLabV3Plus"])
def test_a_convolution_as_head_is_refused_where_smps_enlarges_too(arch: str) -> None:
    """A network that is put together by hand may enlarge in another way, and no tensor tells."""
    model = tiny_model(arch, presence=False)
    theirs = random_network(model, seed=3).state_dict()
    bare = {name.replace("_head.0.", "_head."): tensor for name, tensor in theirs.items()}
    words = rf"member\.pt: segmentation_head\.weight: .* SMP's {arch} enlarges .* if this network "
    with pytest.raises(ValueError, match=words + r"does the same, save .*_head\.0\.weight and "):
        load_into_model(Checkpoint(Path("member.pt"), bare, []), model)
    load_into_model(checkpoint_of(model), model)
    as_large = model | {"upsampling": 1}
    load_into_model(Checkpoint(Path("member.pt"), bare, []), as_large)


def test_another_encoder_keeps_its_names() -> None:
    right = {"arch": "Unet", "encoder_name": "resnet18", "in_channels": 1, "classes": 4}
    declared = right | {"encoder_name": "tu-resnet50"}
    with pytest.raises(ValueError, match=r"^member\.pt: lacks encoder\.model.*encoder resnet18"):
        load_into_model(checkpoint_of(right), declared)


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
            "aux_params's 'poling'.*the nearest is pooling",
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
