import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_network, tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kernel.manifest import MemberSpec
from kernel.members import build_network, load_member
from weights.checkpoints import (
    Checkpoint,
    fit,
    likely_model,
    read_checkpoint,
    read_model,
    without_activation,
)

MODEL = tiny_model()
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return random_network(MODEL, seed=7)


def renamed(weights: Weights, prefix: str) -> Weights:
    return {prefix + key: value for key, value in weights.items()}


def doubled(weights: Weights) -> Weights:
    return {k: v * 2 if v.is_floating_point() else v for k, v in weights.items()}


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


PLAIN = {
    "bare": lambda w: w,
    "ordered": lambda w: OrderedDict(w),
    "data_parallel": lambda w: renamed(w, "module."),
    "lightning": lambda w: {
        "state_dict": renamed(w, "model.") | {"criterion.weight": torch.ones(3)},
        "epoch": 3,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    },
    "lightning_of_data_parallel": lambda w: {"state_dict": renamed(w, "model.module.")},
    "compiled": lambda w: {"state_dict": renamed(w, "model._orig_mod.")},
    "any_attribute": lambda w: {"state_dict": renamed(w, "segmenter.")},
    "catalyst": lambda w: {
        "model_state_dict": w,
        "criterion_state_dict": {},
        "epoch_metrics": {"train": {"loss": np.float64(0.25), "dice": np.float32(0.5)}},
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
    },
}


@pytest.mark.parametrize("form", PLAIN)
def test_a_checkpoint_of_this_form_gives_the_network_weights(
    form: str, network: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "member.pth"
    torch.save(PLAIN[form](network.state_dict()), path)
    found = read_checkpoint(path)
    assert_same(found.weights, network.state_dict())
    assert found.notes == []


def test_the_old_pickle_layout_is_read(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(read_checkpoint(tmp_path / "old.pth").weights, network.state_dict())


def test_safetensors_with_a_prefix(network: nn.Module, tmp_path: Path) -> None:
    save_file(renamed(network.state_dict(), "module."), tmp_path / "member.safetensors")
    assert_same(read_checkpoint(tmp_path / "member.safetensors").weights, network.state_dict())


EMA = {
    "ema": lambda w: {"model": doubled(w), "ema": w},
    "ema_nested": lambda w: {"state_dict": doubled(w), "ema": {"state_dict": w, "decay": 0.99}},
    "timm": lambda w: {"state_dict": doubled(w), "state_dict_ema": renamed(w, "module.")},
    "lightning": lambda w: {
        "state_dict": renamed(doubled(w), "model.") | renamed(w, "model_ema.module.")
    },
    "catalyst": lambda w: {"model_state_dict": doubled(w), "model_ema_state_dict": w},
    "beside_bare_weights": lambda w: doubled(w) | {"ema": w},
}


@pytest.mark.parametrize("form", EMA)
def test_the_ema_copy_is_preferred_and_named(form: str, network: nn.Module, tmp_path: Path) -> None:
    torch.save(EMA[form](network.state_dict()), tmp_path / "member.ckpt")
    found = read_checkpoint(tmp_path / "member.ckpt")
    assert_same(found.weights, network.state_dict())
    assert "EMA" in found.notes[0]


def test_an_ema_of_parameters_takes_statistics_from_the_plain_weights(
    network: nn.Module, tmp_path: Path
) -> None:
    shadow = {k: v.detach() * 3 for k, v in network.named_parameters()}
    torch.save({"model": network.state_dict(), "ema": shadow}, tmp_path / "member.pt")
    found = read_checkpoint(tmp_path / "member.pt")
    assert_same(found.weights, network.state_dict() | shadow)
    assert any("statistics from the plain weights" in note for note in found.notes)


def test_parameters_an_ema_copy_lacks_are_not_filled_in(network: nn.Module, tmp_path: Path) -> None:
    shadow = {k: v for k, v in network.state_dict().items() if k != "segmentation_head.0.bias"}
    torch.save({"model": network.state_dict(), "ema": shadow}, tmp_path / "member.pt")
    with pytest.raises(ValueError, match=r"lacks segmentation_head\.0\.bias"):
        fit(read_checkpoint(tmp_path / "member.pt"), MODEL)


def test_two_networks_without_an_ema_are_ambiguous(network: nn.Module, tmp_path: Path) -> None:
    weights = network.state_dict()
    torch.save({"teacher": weights, "student": weights}, tmp_path / "member.pt")
    with pytest.raises(ValueError, match=r"student\., teacher\..*save the one to pack alone"):
        read_checkpoint(tmp_path / "member.pt")


def test_a_save_pretrained_folder_brings_its_model(network: nn.Module, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path / "member")  # type: ignore[operator]
    found = read_checkpoint(tmp_path / "member")
    assert_same(found.weights, network.state_dict())
    model = read_model(tmp_path / "member")
    assert model["arch"] == "Unet"
    assert {key: model[key] for key in MODEL} == MODEL
    assert not {"encoder_weights", "_model_class"} & set(model)
    fit(found, model)


def test_a_folder_without_an_architecture_asks_for_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"encoder_name": "resnet18"}))
    with pytest.raises(ValueError, match=r"config\.json: tells no architecture.*`model`"):
        read_model(tmp_path)


def test_activations_are_left_to_the_kernel() -> None:
    model = {"arch": "Unet", "activation": "sigmoid", "aux_params": {"activation": "sigmoid"}}
    assert without_activation(model) == {"arch": "Unet", "aux_params": {}}
    assert model["activation"] == "sigmoid"


# --- what is refused ----------------------------------------------------------------------------


class Bomb:
    """A pickle that makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.mark, "it ran")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(
    zipped: bool, network: nn.Module, tmp_path: Path
) -> None:
    path, mark = tmp_path / "bomb.pth", tmp_path / "ran"
    bomb = {"state_dict": network.state_dict(), "callbacks": Bomb(mark)}
    torch.save(bomb, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bomb\.pth: refused.*could run code.*state_dict\(\)"):
        read_checkpoint(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the bomb is live: only the reader kept it from going off
    assert mark.exists()


def test_a_whole_pickled_network_is_refused_with_the_remedy(
    network: nn.Module, tmp_path: Path
) -> None:
    torch.save(network, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"refused.*torch\.save\(network\.state_dict\(\)"):
        read_checkpoint(tmp_path / "whole.pt")


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": Path("x")}, protocol=2))
    with pytest.raises(ValueError, match=r"plain\.pkl: refused"):
        read_checkpoint(tmp_path / "plain.pkl")


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_a_cut_file_is_named(name: str, network: nn.Module, tmp_path: Path) -> None:
    whole, path = tmp_path / f"whole{Path(name).suffix}", tmp_path / name
    (torch.save if path.suffix == ".pth" else save_file)(network.state_dict(), whole)
    path.write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=rf"{name}: no checkpoint that can be read"):
        read_checkpoint(path)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match=r"empty\.pth: no checkpoint that can be read"):
        read_checkpoint(tmp_path / "empty.pth")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.pth: no such checkpoint"):
        read_checkpoint(tmp_path / "absent.pth")


def test_a_checkpoint_of_something_else_is_named(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no SMP network in it, expected names like"):
        read_checkpoint(tmp_path / "other.pth")


# --- the declared model -------------------------------------------------------------------------


def checkpoint_of(model: dict[str, Any]) -> Checkpoint:
    return Checkpoint(Path("member.pt"), dict(build_network(model).state_dict()), [])


def test_missing_counters_of_batch_norm_are_added(network: nn.Module) -> None:
    weights = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    assert len(weights) < len(network.state_dict())
    fitted = fit(Checkpoint(Path("member.pt"), weights, []), MODEL)
    assert_same(dict(fitted.named_parameters()), dict(network.named_parameters()))
    assert weights.keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    ("arch", "encoder"),
    [("FPN", "resnet18"), ("Unet", "se_resnext50_32x4d"), ("FPN", "efficientnet-b2")],
)
def test_a_wrong_encoder_is_told_with_the_right_one(arch: str, encoder: str) -> None:
    right = {"arch": arch, "encoder_name": encoder, "in_channels": 1, "classes": 4}
    message = likely_model(checkpoint_of(right).weights, right | {"encoder_name": "resnet50"})
    assert f"it looks like {arch} with encoder {encoder} (100%" in message


def test_a_wrong_encoder_names_file_key_and_encoder() -> None:
    right = {"arch": "FPN", "encoder_name": "resnet18", "in_channels": 1, "classes": 4}
    with pytest.raises(ValueError, match=r"member\.pt: (lacks|has) .*encoder\.layer.*resnet18"):
        fit(checkpoint_of(right), right | {"encoder_name": "resnet50"})


def test_a_wrong_decoder_names_the_architecture() -> None:
    right = {"arch": "FPN", "encoder_name": "resnet18", "in_channels": 1, "classes": 4}
    with pytest.raises(ValueError, match=r"decoder\..*looks like FPN with encoder resnet18"):
        fit(checkpoint_of(right), right | {"arch": "Unet"})


def test_a_wrong_number_of_classes_names_the_shape_and_the_heads() -> None:
    right = {"arch": "FPN", "encoder_name": "resnet18", "in_channels": 1, "classes": 5}
    with pytest.raises(ValueError, match=r"segmentation_head.*\(5, .*compare.*classes"):
        fit(checkpoint_of(right), right | {"classes": 4})


def test_an_undeclared_presence_head_is_told() -> None:
    declared = {k: v for k, v in MODEL.items() if k != "aux_params"}
    with pytest.raises(ValueError, match=r"unexpected classification_head.*a presence head"):
        fit(checkpoint_of(MODEL), declared)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"encoder_name": "resnet43"}, r"unknown encoder 'resnet43'; nearest: .*resnet34"),
        ({"encoder_name": "tu-resnet10tt"}, r"unknown encoder.*tu-resnet10t"),
        ({"encoder_name": "se-resnet50"}, r"unknown encoder.*se_resnet50"),
        ({"encoder_name": "efficientnet_b5"}, r"unknown encoder.*efficientnet-b5"),
        ({"arch": "Unt"}, r"unknown architecture 'Unt'; nearest: unet"),
        ({"decoder_colour": 3}, r"SMP cannot build .*decoder_colour"),
    ],
)
def test_an_unknown_name_gives_the_nearest(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"member\.pt: {words}"):
        fit(Checkpoint(Path("member.pt"), {}, []), MODEL | wrong)


# --- the recipe's encoders and the frameworks' own checkpoints ------------------------------------

RECIPE = (
    *("densenet201", "efficientnet-b5", "resnet34"),
    *("se_resnet50", "se_resnext50_32x4d", "resnet50"),
)


@pytest.mark.parametrize("arch", ["FPN", "Unet"])
@pytest.mark.parametrize("encoder", RECIPE)
def test_a_member_of_the_recipe_is_loaded_and_predicts_as_its_network(
    encoder: str, arch: str, tmp_path: Path
) -> None:
    model = {"arch": arch, "encoder_name": encoder, "in_channels": 1, "classes": 4}
    model["aux_params"] = {"classes": 4, "pooling": "max"}
    torch.manual_seed(3)
    trained = build_network(model)
    torch.save(nn.DataParallel(trained).state_dict(), tmp_path / "trained.pth")
    found = read_checkpoint(tmp_path / "trained.pth")
    save_file(found.weights, tmp_path / "m.safetensors")
    spec = MemberSpec("m", "m.safetensors", model, [0.34], [0.13])
    images = torch.rand(1, 1, 64, 96)
    with torch.inference_mode():
        logits, presence = trained((images - 0.34) / 0.13)
        probabilities = load_member(tmp_path, spec, torch.device("cpu"))(images)
    expected = logits.sigmoid() * presence.sigmoid()[:, :, None, None]
    assert expected.std() > 1e-4
    torch.testing.assert_close(probabilities, expected)


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of loaders, loggers and devices
def test_a_checkpoint_that_lightning_wrote_gives_the_trained_weights(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

    class Segmenter(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, model: dict[str, Any]) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.network = build_network(model)
            self.loss = nn.BCEWithLogitsLoss(pos_weight=torch.ones(4, 1, 1))

        def training_step(self, images: Tensor) -> Tensor:
            logits, presence = self.network(images)
            return self.loss(logits, torch.ones_like(logits)) + presence.mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    segmenter = Segmenter(MODEL)
    before = segmenter.network.state_dict()["segmentation_head.0.weight"].clone()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        **quiet,
    )
    trainer.fit(segmenter, DataLoader(torch.rand(4, 1, 64, 96), batch_size=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = read_checkpoint(tmp_path / "last.ckpt")
    assert_same(found.weights, segmenter.network.state_dict())
    assert not torch.equal(found.weights["segmentation_head.0.weight"], before)
    fit(found, MODEL)


@pytest.mark.filterwarnings("ignore")  # Catalyst's own, of what it cannot import
def test_a_checkpoint_that_catalyst_wrote_gives_the_weights(
    network: nn.Module, tmp_path: Path
) -> None:
    catalyst = pytest.importorskip("catalyst.utils", reason="Catalyst is not installed")
    packed = catalyst.pack_checkpoint(
        model=nn.DataParallel(network),
        optimizer=torch.optim.AdamW(network.parameters()),
        epoch_metrics={"valid": {"dice": np.float32(0.5)}},
    )
    catalyst.save_checkpoint(packed, tmp_path / "best.pth")
    assert_same(read_checkpoint(tmp_path / "best.pth").weights, network.state_dict())
