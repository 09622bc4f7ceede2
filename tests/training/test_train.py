"""The command line of a fit: what it leaves, what it goes on from, and what it refuses."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CPU,
    SMALL,
    draw_image,
    edit_manifest,
    error_of,
    exit_code,
    save_image,
    tiny_entry,
    write_manifest,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernel.competition import SEVERSTAL
from kernel.images import image_to_tensor, read_image
from kernel.members import build_network, load_member
from training import fit, inputs, pace, train
from training.config import Config
from training.inputs import read_config
from training.module import MemberModule
from training.states import crops_of
from training.strips import Strips
from training.teacher import presence_probabilities

SPEC = Config("mine", "tu-test_resnet", "Unet").spec


@pytest.fixture(scope="module", autouse=True)
def few_statistics() -> Any:
    """Batch-norm statistics from two strips."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "STATISTICS_STRIPS", 2)
        yield


def run_train(data: Path, folder: Path, *options: object) -> int:
    """Fit in this process, one step a part; options that come later win."""
    words = [
        "--data", data, "--name", "mine", "--encoder", "tu-test_resnet", "--arch", "Unet",
        "--fold", 1, "--folds", 3, "--crop-steps", 1, "--whole-steps", 1, "--crops", 2,
        "--workers", 0, "--device", "cpu", "--validation-strips", 2, "--presence-strips", 4,
        "--out", folder, "--runs", folder / "runs", "--comment", "smoke",
    ]  # fmt: skip
    return exit_code(train.main, *words, *options)


@pytest.fixture(scope="module")
def fitted(steel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a whole fit left, for reading only."""
    folder = tmp_path_factory.mktemp("fitted")
    assert run_train(steel, folder) == 0
    return folder


@pytest.fixture
def again(fitted: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(fitted, tmp_path / "again"))


# --- what it leaves -------------------------------------------------------------------------------


def test_a_fit_leaves_checkpoint_states_and_row(fitted: Path) -> None:
    assert load_member(fitted, SPEC, CPU).spec.gated
    [header, row] = (fitted / "experiments.csv").read_text().splitlines()
    assert header.startswith("name,fold,encoder,decoder,steps,dice,")
    assert row.startswith("mine,1,tu-test_resnet,Unet,1+1,") and row.endswith(",smoke")
    assert {path.name for path in (fitted / "runs/mine").iterdir()} == {
        "crops", "crops.ckpt", "scores.json", "strips", "strips.ckpt",
    }  # fmt: skip


def test_both_layouts_train_the_same_member(
    fitted: Path,
    steel_in_two_columns: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    assert run_train(steel_in_two_columns, tmp_path) == 0
    assert "mine: 16 strips to train on, 8 held out, on cpu in 32" in caplog.text
    assert '"dice_non_empty"' in capsys.readouterr().out
    name = "mine.safetensors"
    assert (tmp_path / name).read_bytes() == (fitted / name).read_bytes()


def test_a_finished_fit_is_not_trained_again(
    again: Path, steel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (again / "mine.safetensors").read_bytes()
    monkeypatch.setattr(MemberModule, "training_step", None)
    assert run_train(steel, again) == 0
    assert (again / "mine.safetensors").read_bytes() == before
    assert len((again / "experiments.csv").read_text().splitlines()) == 3


def test_a_fit_does_not_write_over_the_shipped_members_unless_it_is_asked_to() -> None:
    words = ["--data", "d", "--name", "n", "--encoder", "e"]
    assert train.parse_args(words).out == Path("my_weights")


def test_a_member_that_is_fitted_anew_under_the_shifts_of_another_fit_is_told(
    again: Path, steel: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shifts = {"mask_shift": 1.5, "gate_shift": [0, -8.53, 0, 0]}
    others = [tiny_entry(name, SPEC.model) | shifts for name in ("mine", "other")]
    others[1] |= {"file": "run/last.pt", "model": None}  # as the build takes it
    write_manifest(again, others)
    assert run_train(steel, again) == 0
    assert "of another fit" not in caplog.text  # it is the same
    assert run_train(steel, again, "--heads-on", "none") == 0
    [line] = [line for line in caplog.messages if "of another fit" in line]
    assert "ensemble.json has a mask_shift and a gate_shift for mine, of another fit" in line
    edit_manifest(again, lambda entries: entries["members"][0].update(mask_shift=0, gate_shift=0))
    caplog.clear()
    assert run_train(steel, again) == 0
    assert "of another fit" not in caplog.text


def test_three_channels_without_a_fold_with_a_further_folder_and_unlabelled_strips(
    steel: Path,
    steel_in_two_columns: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """200 × 200, which is no multiple of the encoder's stride, among the unlabelled."""
    caplog.set_level(logging.INFO)
    folder = tmp_path / "unlabelled"
    for seed in range(2):
        save_image(folder / f"{seed}.png", draw_image(seed, (200, 200)))
    options = ["--channels", 3, "--fold", "none", "--extra", f"{steel_in_two_columns}=0.5"]
    options += ["--unlabelled", folder, "--moved-share", 1, "--moved-method", "paste"]
    assert run_train(steel, tmp_path, *options) == 0
    assert "mine: 24 + 24 strips to train on, 0 held out" in caplog.text
    spec = replace(Config("mine", "tu-test_resnet", "Unet"), channels=3).spec
    assert load_member(tmp_path, spec, CPU).spec.model["in_channels"] == 3
    assert "mine,none,tu-test_resnet,Unet,1+1,,,," in (tmp_path / "experiments.csv").read_text()


def test_a_fit_by_the_minutes_takes_the_steps_that_its_pace_allows(
    steel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of 20 s is kept back, and what 4 strips twice and 2 once take: 1 s each."""
    monkeypatch.setattr(pace, "measure_pace", lambda *_: pace.Pace(2.0, 1.0, 1.0, 0.0))
    assert run_train(steel, tmp_path, "--minutes", 20.5 / 60) == 0
    assert "mine,1,tu-test_resnet,Unet,3+3," in (tmp_path / "experiments.csv").read_text()
    scores = json.loads((tmp_path / "runs/mine/scores.json").read_text())
    assert (scores["fold"], scores["strips"]) == (1, 2)
    assert 0 <= scores["dice"] <= 1 and "per_class" in scores


def test_a_fit_starts_from_a_checkpoint(
    fitted: Path, steel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    start = fitted / "mine.safetensors"
    options = ["--start-from", start, "--crop-steps", 0, "--whole-steps", 0, "--heads-on", "none"]
    assert run_train(steel, tmp_path, *options) == 0
    count = sum(not key.endswith("num_batches_tracked") for key in load_file(start))
    assert f"mine starts from {count} of {count} tensors" in caplog.text
    found, expected = load_file(tmp_path / "mine.safetensors"), load_file(start)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_member_takes_over_its_teachers_gates_on_unlabelled_strips(
    fitted: Path, steel: Path, tmp_path: Path
) -> None:
    """Nothing else of it changes, and its gates come nearer to the teacher's."""
    start, unlabelled = fitted / "mine.safetensors", steel / "train_images"
    weights = load_file(start)
    weights["classification_head.3.bias"] += 2
    (tmp_path / "wiser").mkdir()
    with safe_open(start, "pt") as file:
        save_file(weights, tmp_path / "wiser" / "mine.safetensors", file.metadata())
    teacher = tmp_path / "wiser" / "mine.safetensors"
    options = ["--start-from", start, "--crop-steps", 0, "--whole-steps", 0, "--heads-on", "none",
               "--teacher", teacher, "--unlabelled", unlabelled, "--taught-gates"]  # fmt: skip
    assert run_train(steel, tmp_path, *options) == 0
    found, before = load_file(tmp_path / "mine.safetensors"), load_file(start)
    changed = {key for key in before if not torch.equal(found[key], before[key])}
    assert changed == {"classification_head.3.weight", "classification_head.3.bias"}
    gates = []
    for folder in (fitted, tmp_path, tmp_path / "wiser"):
        member = load_member(folder, SPEC, CPU)
        image = image_to_tensor(read_image(next(unlabelled.iterdir()), SEVERSTAL))
        gates.append(presence_probabilities(member, image))
    own, taught, wanted = gates
    assert (taught - wanted).abs().mean() < 0.3 * (own - wanted).abs().mean()


def test_a_checkpoint_of_which_nothing_fits_is_one_line(
    steel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"conv1.weight": torch.zeros(2, 1, 3, 3)}, tmp_path / "timm.safetensors")
    assert run_train(steel, tmp_path, "--start-from", tmp_path / "timm.safetensors") == 2
    assert "no tensor of it fits" in error_of(capsys.readouterr().err)
    assert not (tmp_path / "mine.safetensors").exists()


# --- what it goes on from -------------------------------------------------------------------------


def test_another_experiments_state_is_refused(
    again: Path, steel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (again / "mine.safetensors").read_bytes()
    assert run_train(steel, again, "--fold", 2) == 2
    message = error_of(capsys.readouterr().err)
    assert "crops.ckpt: state of another experiment (fold 1, now 2)" in message
    assert (again / "mine.safetensors").read_bytes() == before


def test_a_state_of_other_strips_is_refused(
    again: Path, steel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(steel, tmp_path / "data"))
    with (data / "train.csv").open("a") as file:
        file.write(f"{min((data / 'train_images').iterdir()).name},4,1 1\n")
    assert run_train(data, again) == 2
    assert "state of another experiment (data " in error_of(capsys.readouterr().err)


def test_a_state_with_other_unlabelled_strips_is_refused(
    again: Path, steel: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batch-norm statistics come from them."""
    assert run_train(steel, again, "--unlabelled", steel / "train_images") == 2
    assert "state of another experiment (data " in error_of(capsys.readouterr().err)


def test_automatic_crops_of_a_fit_that_goes_on_are_its_own(
    again: Path,
    steel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another program may hold some of the GPU's memory this time."""
    assert crops_of(again / "runs" / "mine") == 2
    assert crops_of(tmp_path) == 0
    monkeypatch.setattr(train, "find_crops", None)
    monkeypatch.setattr(inputs, "read_config", lambda *asked: replace(read_config(*asked), crops=0))
    assert run_train(steel, again) == 2  # of another number than was asked for at first
    assert "state of another experiment (crops 2, now 0)" in error_of(capsys.readouterr().err)


def test_a_fit_that_goes_on_needs_no_download_any_more(
    again: Path, steel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = build_network(SPEC.model)
    monkeypatch.setattr("segmentation_models_pytorch.create_model", None)
    monkeypatch.setattr("training.module.build_network", lambda _: network)
    words = ["--encoder-weights", "imagenet"]
    assert run_train(steel, again, *words) == 2
    found = error_of(capsys.readouterr().err)
    assert "state of another experiment (encoder_weights , now imagenet)" in found


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["--start-from", "FITTED", "--fold", 2, "--folds", 3], ["--start-from"]),
        (["--teacher", "FITTED", "--fold", 1, "--folds", 4], ["--teacher"]),
        (["--start-from", "FITTED", "--teacher", "FITTED", "--fold", 1, "--folds", 3], []),
        (["--start-from", "FITTED", "--fold", "none"], []),
        (["--start-from", "OTHER", "--fold", 2, "--folds", 3], []),
    ],
)
def test_weights_that_were_fitted_on_strips_that_are_held_out_now_are_told(
    options: list[object],
    warned: list[str],
    again: Path,
    steel: Path,
    strips: Strips,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The scores of such a fit are too good."""
    (again / "runs" / "torn").mkdir()
    (again / "runs" / "torn" / "scores.json").write_text("{")
    save_file({"a": torch.zeros(1)}, again / "other.safetensors")
    files = {"FITTED": again / "mine.safetensors", "OTHER": again / "other.safetensors"}
    words = ["--data", steel, "--name", "n", "--encoder", "e", "--runs", again / "runs"]
    words += [files.get(str(word), word) for word in options]
    args = train.parse_args(list(map(str, words)))
    config = Config("n", "e", fold=args.fold, folds=args.folds)
    for data in (strips.fingerprint(), "of other strips"):
        caplog.clear()
        inputs.warn_of_known_strips(args, config, data)
        told = [message.split()[0] for message in caplog.messages]
        assert told == (warned if data == strips.fingerprint() else [])


def test_a_fit_tells_so_before_its_first_step(
    again: Path, steel: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = again / "mine.safetensors"
    options = ["--start-from", start, "--fold", 2]
    assert run_train(steel, again, *options) == 2  # the states are of fold 1
    assert f"--start-from {start}: was fitted on strips that are held out now" in caplog.text


# --- what it refuses ------------------------------------------------------------------------------


NO_STEPS = ("--crop-steps", 0, "--whole-steps", 0, "--heads-on", "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "FPN"], "without steps it has to be this network, and it has no decoder."),
        (["--channels", 3], "it has no encoder."),
        (["--mean", 0.5], "was fitted with {'mean': [0.34], 'std': [0.13]}, this fit has {'mean'"),
    ],
)
def test_a_member_that_takes_no_steps_is_not_replaced_by_a_half_drawn_one(
    options: list[object],
    message: str,
    again: Path,
    steel: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = again / "mine.safetensors"
    before, runs = path.read_bytes(), ("--runs", again / "other runs")
    assert run_train(steel, again, *runs, *NO_STEPS, "--start-from", path, *options) == 2
    assert message in error_of(capsys.readouterr().err)
    assert path.read_bytes() == before
    assert run_train(steel, again, *runs, *NO_STEPS, "--start-from", path) == 0


def test_held_out_strips_are_in_no_further_folder(
    steel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(steel, tmp_path, "--extra", f"{steel}=0.5") == 2
    assert "holds 8 held-out strips, like " in error_of(capsys.readouterr().err)


def test_a_last_fit_on_strips_that_were_trained_on_is_told(
    steel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen, batch_loss = set[tuple[int, ...]](), MemberModule.batch_loss

    def seen_sizes(module: MemberModule, images: Tensor, masks: Tensor) -> Tensor:
        seen.add(tuple(images.shape[-2:]))
        return batch_loss(module, images, masks)

    monkeypatch.setattr(MemberModule, "batch_loss", seen_sizes)
    assert run_train(steel, tmp_path, "--heads-on", steel, "--crop-size", "32x48") == 0
    assert seen == {(32, 48), SMALL}
    assert f"--heads-on {steel}: 16 of its strips, " in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fold", 7], "--fold 7, expected 0 to 2 or none"),
        (["--encoder", "resnet35"], "resnet35"),
        (["--arch", "Unetz"], "Unetz"),
        (["--data", "gone"], "gone/train.csv: no such file; --data is a folder with"),
        (["--start-from", "old.pth"], "--start-from old.pth: no safetensors file"),
        (["--start-from", "gone.safetensors"], "--start-from gone.safetensors"),
        (["--teacher", "old.pth"], "--teacher old.pth: no checkpoint of train.py"),
        (["--unlabelled", "gone"], "gone: no such folder"),
        (["--fold", "none", "--heads-on", "held-out"], "--fold none holds no strip out"),
        (["--extra", "gone=0.5"], "gone/train.csv: no such file"),
        (["--heads-on", "gone"], "gone/train.csv: no such file"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--device", "tpu9"], "--device tpu9: expected cpu, cuda or cuda:1"),
        (["--device", "mps"], "--device mps: expected cpu, cuda or cuda:1"),
        (["--crops", "auto"], "--crops auto needs a GPU"),
        (["--precision", "16-mixed"], "--precision 16-mixed needs a GPU"),
        (["--minutes", -1], "--minutes -1.0, expected a number above 0"),
        (["--minutes", "nan"], "--minutes nan, expected a number above 0"),
        (["--save-every", 0], "--save-every 0, expected 1 or more"),
        (["--taught-gates"], "--taught-gates needs a --teacher with a presence head, and"),
        (["--present-weight", 0], "--present-weight 0.0, expected a number above 0"),
        (["--presence-strips", -1], "--presence-strips -1, expected 0 or more"),
    ],
)
def test_bad_input_ends_in_one_line(
    options: Sequence[object],
    message: str,
    steel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({}, "old.pth")
    assert run_train(steel, tmp_path, *options) == 2
    assert message in error_of(capsys.readouterr().err)
    assert not list(tmp_path.glob("*.safetensors")) and not Path("experiments.csv").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--fold", "-1"), ("--fold", "one"), ("--crops", "0"), ("--extra", "a"), ("--extra", "a=b"),
     ("--extra", "=0.5"), ("--precision", "64")],
)  # fmt: skip
def test_an_option_that_says_nothing_is_refused_by_the_parser(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "d", "--name", "n", "--encoder", "e", f"{option}={value}"]
    assert exit_code(train.main, *words) == 2
    assert f"argument {option}: " in capsys.readouterr().err
