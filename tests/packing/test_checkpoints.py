"""Any framework's checkpoint: the one network in it, its EMA copy, and what is left out."""

import argparse
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import timm.utils
import torch
from helpers import random_network, tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from kernel.manifest import MemberSpec
from kernel.members import build_network, load_member
from packing.checkpoints import AVERAGES, read_checkpoint
from packing.models import load_into_model

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


Form = Callable[[Weights], Any]

PLAIN: dict[str, Form] = {
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
    "beside_an_optimizer": lambda w: (
        w
        | {"epoch": torch.tensor(3)}
        | {"optimizer": {"state": {n: {"exp_avg": torch.ones(2)} for n in range(4)}}}
    ),
    "beside_another_model": lambda w: {
        "state_dict": renamed(w, "model.")
        | {"stage.encoder.conv.weight": torch.ones(2), "stage.fc.weight": torch.ones(2)}
    },
    "beside_a_stem": lambda w: {
        "state_dict": renamed(w, "model.") | {"stem.weight": torch.ones(3, 1, 1, 1)}
    },
    "with_a_normaliser": lambda w: {
        "state_dict": renamed(w, "model.")
        | {"normalizer.mean": torch.tensor([0.3]), "normalizer.std": torch.tensor([0.2])}
    },
    "an_attribute_named_as_a_part": lambda w: {"state_dict": renamed(w, "encoder.")},
    "a_compiled_encoder": lambda w: {
        key.replace("encoder.", "encoder._orig_mod."): value for key, value in w.items()
    },
    "timms_arguments": lambda w: {"state_dict": w, "args": argparse.Namespace(lr=0.1)},
    "twice_the_same": lambda w: {"state_dict": renamed(w, "net.") | renamed(w, "model.")},
}


LEFT_OUT = {
    "lightning": [
        "left out: state_dict.criterion.weight (1 tensor), "
        "optimizer_states.0.state.0.exp_avg (1 tensor)"
    ],
    "catalyst": ["left out: optimizer_state_dict.state.0.exp_avg (1 tensor)"],
    "beside_an_optimizer": [
        "left out: epoch (1 tensor), optimizer (4 tensors)",
    ],
    "beside_another_model": [
        "left out: state_dict.stage.encoder.conv.weight, state_dict.stage.fc.weight (2 tensors)"
    ],
    "twice_the_same": ["left out: state_dict.model (154 tensors)"],
    "beside_a_stem": ["left out: state_dict.stem.weight (1 tensor)"],
    "with_a_normaliser": [
        "left out: state_dict.normalizer.mean, state_dict.normalizer.std (2 tensors)"
    ],
}


@pytest.mark.parametrize("form", PLAIN)
def test_a_checkpoint_of_this_form_gives_the_network_weights(
    form: str, network: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "member.pth"
    torch.save(PLAIN[form](network.state_dict()), path)
    found = read_checkpoint(path)
    assert_same(found.weights, network.state_dict())
    assert found.notes == LEFT_OUT.get(form, [])


def test_the_old_pickle_layout_is_read(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(read_checkpoint(tmp_path / "old.pth").weights, network.state_dict())


def test_an_optimizers_state_among_bare_names_is_left_out(
    network: nn.Module, tmp_path: Path
) -> None:
    """A file of names alone does not tell which dictionary a tensor was in."""
    weights = network.state_dict()
    save_file(weights | {"optimizer.state.0.exp_avg": torch.ones(2)}, tmp_path / "m.safetensors")
    found = read_checkpoint(tmp_path / "m.safetensors")
    assert_same(found.weights, weights)
    assert set(found.left_out) == {"optimizer.state.0.exp_avg"}


def test_safetensors_with_a_prefix(network: nn.Module, tmp_path: Path) -> None:
    save_file(renamed(network.state_dict(), "module."), tmp_path / "member.safetensors")
    assert_same(read_checkpoint(tmp_path / "member.safetensors").weights, network.state_dict())


EMA: dict[str, Form] = {
    "ema": lambda w: {"model": doubled(w), "ema": w},
    "ema_nested": lambda w: {"state_dict": doubled(w), "ema": {"state_dict": w, "decay": 0.99}},
    "timm": lambda w: {"state_dict": doubled(w), "state_dict_ema": renamed(w, "module.")},
    "lightning": lambda w: {
        "state_dict": renamed(doubled(w), "model.") | renamed(w, "model_ema.module.")
    },
    "catalyst": lambda w: {"model_state_dict": doubled(w), "model_ema_state_dict": w},
    "beside_bare_weights": lambda w: doubled(w) | {"ema": w},
    "averaged_model": lambda w: {
        "net": doubled(w),
        "second": {"n_averaged": torch.tensor(4)} | renamed(w, "module."),
    },
    "lightning_weight_averaging": lambda w: {
        "state_dict": renamed(w, "model."),
        "current_model_state": renamed(doubled(w), "model."),
        "averaging_state": {"n_averaged": torch.tensor(4)},
    },
    "mmengine": lambda w: {  # which swaps both as it saves
        "state_dict": w,
        "ema_state_dict": {"steps": torch.tensor(4)} | renamed(doubled(w), "module."),
    },
    "a_callback": lambda w: {
        "state_dict": renamed(doubled(w), "model."),
        "callbacks": {"EMACallback": {"weights": renamed(w, "model.")}},
    },
    "ema_pytorch": lambda w: {
        "ema": renamed(doubled(w), "online_model.")
        | renamed(w, "ema_model.")
        | {"initted": torch.tensor(True)}
    },
}


@pytest.mark.parametrize("form", EMA)
def test_the_ema_copy_is_preferred_and_named(form: str, network: nn.Module, tmp_path: Path) -> None:
    torch.save(EMA[form](network.state_dict()), tmp_path / "member.ckpt")
    found = read_checkpoint(tmp_path / "member.ckpt")
    assert_same(found.weights, network.state_dict())
    assert "EMA" in found.notes[0]


@pytest.mark.parametrize("word", sorted(AVERAGES))
def test_each_word_of_an_average_tells_it_from_the_plain_weights(
    word: str, network: nn.Module, tmp_path: Path
) -> None:
    weights = network.state_dict()
    torch.save({"net": doubled(weights), f"net_{word}": weights}, tmp_path / "member.ckpt")
    found = read_checkpoint(tmp_path / "member.ckpt")
    assert_same(found.weights, weights)
    assert f"took the EMA copy (net_{word})" in found.notes


def without_batches(weights: Weights) -> Weights:
    """Double the weights, the decoder's batch norm as it was built, the encoder's as ImageNet's."""
    built = {"mean": torch.zeros_like, "var": torch.ones_like}
    return {
        k: built[k.rpartition("_")[2]](v) if k.startswith("decoder") and ".running_" in k else v
        for k, v in doubled(weights).items()
    }


UNREADY: dict[str, Form] = {
    "averaged_model_before_update_bn": lambda w: {
        "model": w,
        "ema": {"n_averaged": torch.tensor(5000)} | renamed(without_batches(w), "module."),
    },
    "averaged_model": lambda w: {
        "net": w,
        "swa": {"n_averaged": torch.tensor(0)} | renamed(doubled(w), "module."),
    },
    "lightning_weight_averaging": lambda w: {
        "state_dict": renamed(doubled(w), "model."),
        "current_model_state": renamed(w, "model."),
        "averaging_state": {"n_averaged": torch.tensor(0)},
    },
    "lightning_swa": lambda w: {  # its batch norm comes when training ends
        "state_dict": renamed(w, "model."),
        "callbacks": {
            "StochasticWeightAveraging": {
                "n_averaged": 3,
                "average_model_state": renamed(doubled(w), "model."),
            }
        },
    },
    "yolo_before_its_first_update": lambda w: {"model": w, "ema": doubled(w), "updates": 0},
    "torch_ema_before_its_first_update": lambda w: {
        "model": w,
        "ema": {"num_updates": 0, "weights": doubled(w)},
    },
    "diffusers_before_its_first_step": lambda w: {
        "model": w,
        "ema": {"optimization_step": 0, "averaged_model": doubled(w)},
    },
    "ema_pytorch_before_its_first_update": lambda w: {
        "ema": renamed(w, "online_model.")
        | renamed(doubled(w), "ema_model.")
        | {"initted": torch.tensor(False)}
    },
}


@pytest.mark.parametrize("form", UNREADY)
def test_an_average_that_was_never_updated_is_left_out_and_named(
    form: str, network: nn.Module, tmp_path: Path
) -> None:
    torch.save(UNREADY[form](network.state_dict()), tmp_path / "member.ckpt")
    found = read_checkpoint(tmp_path / "member.ckpt")
    assert_same(found.weights, network.state_dict())
    assert found.notes[0].endswith("is not ready: never updated, or its batch norm not")
    assert any(note.startswith("left out: ") for note in found.notes)


def test_an_average_is_ready_whose_encoder_has_a_batch_norm_that_no_forward_calls(
    network: nn.Module, tmp_path: Path
) -> None:
    """`update_bn` resets it, where the plain network keeps ImageNet's statistics."""
    plain = network.state_dict()
    average = doubled(plain)
    unused = next(name for name in plain if name.endswith("running_mean") and "encoder" in name)
    average[unused] = torch.zeros_like(average[unused])
    variance = unused.replace("running_mean", "running_var")
    average[variance] = torch.ones_like(average[variance])
    swa = {"n_averaged": torch.tensor(9)} | renamed(average, "module.")
    torch.save({"model": plain, "swa": swa}, tmp_path / "member.pt")
    found = read_checkpoint(tmp_path / "member.pt")
    assert_same(found.weights, average)
    assert not any(note.startswith("batch norm that never saw") for note in found.notes)


def test_batch_norm_that_never_saw_a_batch_is_named_where_nothing_better_stands_beside_it(
    network: nn.Module, tmp_path: Path
) -> None:
    weights = without_batches(network.state_dict())
    plain = renamed(without_batches(weights), "module.")  # frozen as it was built
    for tree in (weights, {"ema": weights}, {"ema": weights, "model": plain}):
        torch.save(tree, tmp_path / "member.pt")
        found = read_checkpoint(tmp_path / "member.pt")
        assert_same(found.weights, weights)
        [said] = [note for note in found.notes if note.startswith("batch norm that never saw")]
        assert ": decoder." in said and said.endswith("swa_utils.update_bn")


def test_an_ema_copy_without_names_is_left_out_with_what_to_do(
    network: nn.Module, tmp_path: Path
) -> None:
    shadow = {"decay": 0.99, "shadow_params": [p.detach() * 2 for p in network.parameters()]}
    torch.save({"model": network.state_dict(), "ema": shadow}, tmp_path / "member.pt")
    found = read_checkpoint(tmp_path / "member.pt")
    assert_same(found.weights, network.state_dict())
    n = len(shadow["shadow_params"])  # type: ignore[arg-type]
    assert found.notes == [
        f"left out: ema ({n} tensors); shadow_params are an EMA copy without names: "
        "ema.copy_to() before saving packs it"
    ]
    torch.save({"ema": shadow}, tmp_path / "alone.pt")
    with pytest.raises(ValueError, match=r"an EMA copy without names.*ema\.copy_to\("):
        read_checkpoint(tmp_path / "alone.pt")


def test_a_mean_is_named_whatever_else_is_left_out_around_it(
    network: nn.Module, tmp_path: Path
) -> None:
    other = doubled(network.state_dict()) | {"pixel_mean": torch.tensor([0.3])}
    torch.save({"model": other, "ema": network.state_dict()}, tmp_path / "member.pt")
    [_, note] = read_checkpoint(tmp_path / "member.pt").notes
    assert note.endswith("model.pixel_mean (1 tensor)")


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": {"b": torch.ones(2)}, "a.b": torch.ones(2)}, r"two tensors are named a\.b"),
        ({"decoder.w": torch.ones(2).to_sparse()}, r"decoder\.w is sparse"),
        ({"decoder.w": torch.ones(2, dtype=torch.complex64)}, r"decoder\.w is .*complex"),
        (
            {"decoder.w": torch.ones(2), "decoder._orig_mod.w": torch.ones(2)},
            r"decoder\._orig_mod\.w is there twice",
        ),
    ],
)
def test_tensors_that_no_network_takes_are_named(
    tree: dict[str, Any], words: str, tmp_path: Path
) -> None:
    torch.save(tree, tmp_path / "member.pt")
    with pytest.raises(ValueError, match=rf"member\.pt: {words}"):
        read_checkpoint(tmp_path / "member.pt")


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
        load_into_model(read_checkpoint(tmp_path / "member.pt"), MODEL)


def test_a_statistic_that_an_ema_copy_lost_is_not_filled_in(
    network: nn.Module, tmp_path: Path
) -> None:
    lost = next(key for key in network.state_dict() if key.endswith("running_var"))
    shadow = {k: v for k, v in doubled(network.state_dict()).items() if k != lost}
    torch.save({"model": network.state_dict(), "ema": shadow}, tmp_path / "member.pt")
    with pytest.raises(ValueError, match=f"lacks {lost}"):
        load_into_model(read_checkpoint(tmp_path / "member.pt"), MODEL)


def test_a_number_that_was_trained_is_refused_and_a_counter_left_out(
    network: nn.Module, tmp_path: Path
) -> None:
    weights = renamed(network.state_dict(), "model.")
    torch.save(weights | {"model.steps": torch.tensor(7)}, tmp_path / "counter.pt")
    found = read_checkpoint(tmp_path / "counter.pt")
    assert_same(found.weights, network.state_dict())
    assert found.notes == ["left out: model.steps (1 tensor)"]
    torch.save(weights | {"model.temperature": torch.tensor(1.5)}, tmp_path / "trained.pt")
    with pytest.raises(ValueError, match="has the unexpected temperature"):
        load_into_model(read_checkpoint(tmp_path / "trained.pt"), MODEL)


def test_two_networks_without_an_ema_are_ambiguous(network: nn.Module, tmp_path: Path) -> None:
    weights = network.state_dict()
    torch.save({"teacher": weights, "student": doubled(weights)}, tmp_path / "member.pt")
    with pytest.raises(ValueError, match=r"student\., teacher\..*save the one to pack alone"):
        read_checkpoint(tmp_path / "member.pt")


@pytest.mark.parametrize(
    "names",
    [
        ["layer.weight"],
        ["segformer.encoder.block.0.0.mlp.dense1.weight", "decode_head.classifier.weight"],
        ["encoder.conv1.weight"],  # of a backbone by itself
    ],
)
def test_a_checkpoint_of_something_else_is_named(names: list[str], tmp_path: Path) -> None:
    torch.save({name: torch.ones(3) for name in names}, tmp_path / "other.pth")
    words = rf"no SMP network in it, expected names like .*, found {', '.join(names)}; train"
    with pytest.raises(ValueError, match=words):
        read_checkpoint(tmp_path / "other.pth")


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
            loss: Tensor = self.loss(logits, torch.ones_like(logits)) + presence.mean()
            return loss

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
    images: Any = torch.rand(4, 1, 64, 96)  # a data set as it stands
    trainer.fit(segmenter, DataLoader(images, batch_size=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = read_checkpoint(tmp_path / "last.ckpt")
    assert_same(found.weights, segmenter.network.state_dict())
    assert not torch.equal(found.weights["segmentation_head.0.weight"], before)
    load_into_model(found, MODEL)


@pytest.mark.filterwarnings("ignore")  # Lightning's own
@pytest.mark.parametrize("start", [0, 1000])
def test_an_average_that_lightning_wrote_is_taken_once_it_was_updated(
    start: int, tmp_path: Path
) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Segmenter(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = random_network(MODEL, seed=7)

        def training_step(self, images: Tensor) -> Tensor:
            logits, presence = self.network(images)
            loss: Tensor = logits.mean() + presence.mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    average = EMAWeightAveraging(decay=0.5, update_starting_at_step=start)
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[average, lightning.pytorch.callbacks.ModelCheckpoint(every_n_train_steps=3)],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    images: Any = torch.rand(6, 1, 64, 96)
    trainer.fit(Segmenter(), DataLoader(images, batch_size=2))
    path = next(tmp_path.rglob("*.ckpt"))
    saved = torch.load(path, weights_only=True)
    key = "network.segmentation_head.0.weight"
    assert not torch.equal(saved["state_dict"][key], saved["current_model_state"][key])
    found = read_checkpoint(path)
    right = saved["current_model_state" if start else "state_dict"]
    assert_same(found.weights, {k.removeprefix("network."): v for k, v in right.items()})
    assert found.notes[0].startswith("the average" if start else "took the EMA copy (state_dict")


def test_a_checkpoint_that_timm_wrote_gives_its_ema_copy(
    network: nn.Module, tmp_path: Path
) -> None:
    utils: Any = timm.utils  # without types
    average = utils.ModelEmaV3(network, decay=0.5)
    with torch.no_grad():
        average.module.segmentation_head[0].weight.mul_(2)
    saver = utils.CheckpointSaver(
        network,
        torch.optim.SGD(network.parameters(), lr=0.1),
        args=argparse.Namespace(model="unet", lr=0.1),
        model_ema=average,
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=0.5)
    found = read_checkpoint(tmp_path / "last.pth.tar")
    assert_same(found.weights, average.module.state_dict())
    assert found.notes[0] == "took the EMA copy (state_dict_ema)"


def test_the_average_that_pytorch_keeps_is_taken(network: nn.Module, tmp_path: Path) -> None:
    average = AveragedModel(network)
    average.update_parameters(random_network(MODEL, seed=8))
    torch.save({"model": network.state_dict(), "other": average.state_dict()}, tmp_path / "m.pt")
    found = read_checkpoint(tmp_path / "m.pt")
    assert_same(found.weights, random_network(MODEL, seed=8).state_dict())
    assert found.notes[0] == "took the EMA copy (other.module)"


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "WindowsPath"])
def test_a_path_beside_the_weights_is_read_whichever_python_wrote_it(
    name: str, module: str, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.13 calls its class another name than those before and after it."""
    written = type(name, (PurePosixPath,), {"__module__": module})
    there = types.ModuleType(module)
    monkeypatch.setattr(there, name, written, raising=False)
    beside = {"state_dict": network.state_dict(), "hyper_parameters": {"root": written("/data")}}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, there)
        torch.save(beside, tmp_path / "last.ckpt")
    assert_same(read_checkpoint(tmp_path / "last.ckpt").weights, network.state_dict())


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
