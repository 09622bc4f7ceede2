"""Fitting: Lightning's loop against a plain one, resuming, and what can end a run."""

import functools
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import draw_image, error_of, save_image
from torch import Tensor, nn

from kernel.competition import SEVERSTAL
from training import fit
from training.batch_norm import freeze_statistics
from training.batches import Batches
from training.config import Config, Machine
from training.fit import Fit, fit_network, fit_within_memory
from training.module import MemberModule, new_network
from training.states import describe_experiment
from training.strips import Strips


class Killed(Exception):
    """What stands for a kill."""


def new_fit(config: Config, strips: Strips, machine: Machine) -> Fit:
    return Fit(config, [strips], machine, describe_experiment(config, "data", ""))


def fitted(config: Config, strips: Strips, machine: Machine) -> dict[str, Tensor]:
    """The weights of a whole fit, with batch-norm statistics from two strips."""
    network, seconds = fit_network(new_fit(config, strips, machine), [strips.some(0, 2)])
    assert seconds > 0 or not config.steps
    return {name: value.clone() for name, value in network.state_dict().items()}


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Within, a fit dies before it takes step `step`."""
    take_step = MemberModule.training_step

    def dies(module: MemberModule, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if module.part.first + module.global_step == step:
            raise Killed
        return take_step(module, batch, index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MemberModule, "training_step", dies)
        yield


def first_norm(network: nn.Module) -> nn.BatchNorm2d:
    return next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


# --- the loop -------------------------------------------------------------------------------------


def plain_part(network: Any, config: Config, strips: Strips, part_index: int) -> None:
    """One part's steps written out: AdamW, clipping, a cycle of the rate, EMA of everything."""
    part = config.parts[part_index]
    module, batches = MemberModule(network, config, part), Batches([strips], config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.01)
    average = {name: value.clone() for name, value in network.state_dict().items()}
    for step in range(part.steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * part.rate(step)
        torch.manual_seed(config.seed * 1_000_003 + part.first + step)
        network.train()
        if part_index:
            freeze_statistics(network)
        optimizer.zero_grad()
        module.batch_loss(*batches[part.first + step]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        for name, value in network.state_dict().items():
            if step == 0:
                average[name] = value.clone()
            elif value.is_floating_point():
                average[name] = average[name].lerp(value, 1 - 0.98)  # AdamW enlarges a last bit
    network.load_state_dict(average)


@pytest.mark.parametrize("arch", ["Unet", "FPN"])
def test_both_parts_are_those_of_a_plain_loop(
    arch: str, config: Config, strips: Strips, machine: Machine
) -> None:
    config = replace(config, arch=arch)
    found = fitted(config, strips, machine)
    network = new_network(config)
    network.to(memory_format=torch.channels_last)
    plain_part(network, config, strips, 0)
    fit.retake_from_strips(network, new_fit(config, strips, machine), [strips.some(0, 2)])
    plain_part(network, config, strips, 1)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(found[name], value, atol=1e-6), name


def test_in_a_job_of_slurm_a_fit_is_one_process(
    config: Config, strips: Strips, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would else refuse the tasks that sbatch --ntasks asks for."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "fit")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    assert fitted(replace(config, crop_steps=1, whole_steps=0), strips, machine)


def test_without_lightning_its_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(fit.__file__))
    assert ended.value.code == 2
    line = error_of(capsys.readouterr().err)
    assert "lightning" in line and line.endswith("; pip install -e '.[training]'")


@pytest.fixture(scope="module")
def whole_fit(
    config: Config, strips: Strips, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Tensor]]:
    """Return a function that gives the weights of a fit that nothing stops, once a network."""

    @functools.cache
    def fit_once(arch: str) -> dict[str, Tensor]:
        machine = Machine(torch.device("cpu"), 0, 2, tmp_path_factory.mktemp("whole"))
        return fitted(replace(config, arch=arch), strips, machine)

    return fit_once


@pytest.mark.parametrize(
    ("arch", "at"),
    [("Unet", 1), ("FPN", 3), ("Unet", 4), ("Unet", 5), ("FPN", 6)],
    ids=["at once", "on crops", "between", "on strips", "on the last strip"],
)
def test_a_fit_killed_and_resumed_ends_bit_for_bit_as_one_that_was_not(
    arch: str,
    at: int,
    whole_fit: Callable[[str], dict[str, Tensor]],
    config: Config,
    strips: Strips,
    machine: Machine,
) -> None:
    """Presence head and FPN drop features at random: what is drawn must not depend on a kill."""
    config = replace(config, arch=arch)
    with killed_at(at):
        fitted(config, strips, machine)
    assert (machine.runs / "tiny" / "crops.ckpt").is_file() == (at > 1)
    later = replace(machine, save_every=5)  # a resumed run keeps to its state's epochs
    assert not differing(fitted(config, strips, later), whole_fit(arch))


def test_the_average_of_what_does_not_move_is_it_to_the_last_bit(
    config: Config, strips: Strips, machine: Machine
) -> None:
    """Of frozen statistics 0.98 and 0.02 times the same number would be a bit more, or less."""
    network = new_network(config)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean)  # type: ignore[arg-type]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    part = replace(config, whole_steps=4).whole_part
    fit.take_steps(network, new_fit(config, strips, machine), part, [])
    moved = differing(network.state_dict(), before)
    assert moved and not [key for key in moved if key.endswith(("running_mean", "running_var"))]


# --- what can end a run, and what it leaves -------------------------------------------------------


def fit_it(config: Config, strips: Strips, machine: Machine) -> dict[str, Tensor]:
    """The weights after the first part alone."""
    return fitted(replace(config, whole_steps=0), strips, machine)


def test_a_loss_that_is_no_number_ends_the_run_and_the_earlier_state_stays(
    config: Config, strips: Strips, machine: Machine
) -> None:
    batch_loss, seen = MemberModule.batch_loss, []

    def diverging(module: MemberModule, images: Tensor, masks: Tensor) -> Tensor:
        seen.append(module.global_step)
        return batch_loss(module, images, masks) * (float("nan") if seen[-1] == 2 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemberModule, "batch_loss", diverging)
        message = (
            "tiny: the loss is nan at step 3 of its crops: fit it anew with a lower --learning-rate"
        )
        with pytest.raises(ValueError, match=message):
            fit_it(config, strips, machine)
    assert seen == [0, 1, 2]
    path = machine.runs / "tiny" / "crops.ckpt"
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 2
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
    found = fit_it(config, strips, machine)
    assert all(torch.isfinite(value).all() for value in found.values())


def test_ctrl_c_says_what_is_kept(config: Config, strips: Strips, machine: Machine) -> None:
    take_step = MemberModule.training_step

    def interrupted(module: MemberModule, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if module.global_step == 3:
            raise KeyboardInterrupt
        return take_step(module, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemberModule, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"crops\.ckpt is kept; the same command goes"):
            fit_it(config, strips, machine)
    assert torch.load(machine.runs / "tiny/crops.ckpt", weights_only=True)["global_step"] == 2


def test_a_loader_process_makes_the_same_batches_and_its_error_is_one_line(
    config: Config, strips: Strips, machine: Machine, tmp_path: Path
) -> None:
    beside = replace(machine, workers=1, runs=tmp_path / "beside")
    assert not differing(fit_it(config, strips, beside), fit_it(config, strips, machine))
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in strips.names:
        (folder / name).write_bytes(b"x")
    broken, names = replace(strips, folder=folder), "|".join(strips.names)
    for workers in (0, 1):
        elsewhere = replace(machine, workers=workers, runs=tmp_path / f"broken-{workers}")
        with pytest.raises(ValueError, match=rf"^\S+/({names}): 1 bytes that are no image$"):
            fit_it(config, broken, elsewhere)


LOADER_ERRORS = {  # what PyTorch raises for a loader process → the line
    "its own error": (
        ValueError(
            "Caught ValueError in DataLoader worker\nTraceback:\nValueError: a.jpg: damaged"
        ),
        "^a.jpg: damaged$",
    ),
    "its end": (
        RuntimeError("DataLoader worker (pid 7) exited unexpectedly"),
        "^the loader processes failed, try --workers 0: DataLoader worker",
    ),
}


@pytest.mark.parametrize("case", LOADER_ERRORS)
def test_an_error_of_a_loader_process_is_one_line_with_what_to_do(
    case: str, tmp_path: Path
) -> None:
    error, line = LOADER_ERRORS[case]
    with pytest.raises(ValueError, match=line), fit.one_line_errors(tmp_path / "crops.ckpt"):
        raise error
    with pytest.raises(RuntimeError, match="a fault of ours"), fit.one_line_errors(tmp_path):
        raise RuntimeError("a fault of ours")


@pytest.mark.parametrize(("free", "expected"), [(10**9, 4), (10**6, 0)])
def test_loader_processes_that_shared_memory_does_not_hold_are_left_out(
    free: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four processes with two batches ahead of 1.6 MB each may need some 25 MB."""
    monkeypatch.setattr(fit, "SHM", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    images = torch.zeros(4, 1, 128, 256)
    batch = images, torch.zeros(4, 4, 128, 256, dtype=torch.bool)
    assert fit.count_workers(4, batch) == expected
    monkeypatch.setattr(fit, "SHM", tmp_path / "not linux")
    assert fit.count_workers(4, batch) == 4


def test_out_of_memory_halves_the_crops_down_to_one(config: Config) -> None:
    """On a CPU: the error is raised by hand."""
    tried: list[int] = []

    def fits(most: int) -> Callable[[Config], str]:
        def run(tried_config: Config) -> str:
            tried.append(tried_config.crops)
            if tried_config.crops > most:
                raise torch.OutOfMemoryError
            return "fitted"

        return run

    config = replace(config, crops=16)
    assert fit.fit_within_memory(fits(5), config) == "fitted"
    assert tried == [16, 8, 4]
    with pytest.raises(ValueError, match="out of memory with one crop or strip a step"):
        fit.fit_within_memory(fits(0), config)
    assert tried[3:] == [16, 8, 4, 2, 1]


def test_a_gpu_that_breaks_down_costs_a_fit_no_crops(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN and cuBLAS say of it what they say where memory is too small."""
    monkeypatch.setattr(fit, "device_usable", lambda _: False)
    tried = list[int]()

    def run(tried_config: Config) -> None:
        tried.append(tried_config.crops)
        raise RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")

    with pytest.raises(RuntimeError, match="INTERNAL_ERROR"):
        fit_within_memory(run, replace(config, crops=16))
    assert tried == [16]


def test_a_state_with_fewer_crops_goes_on_with_them(
    config: Config, strips: Strips, machine: Machine
) -> None:
    """After an out-of-memory error; the experiment's own number stands in its description."""
    whole = new_fit(replace(config, whole_steps=0), strips, machine)
    fewer = replace(whole, config=replace(whole.config, crops=1))
    seen, batch_loss = list[int](), MemberModule.batch_loss

    def counted(module: MemberModule, images: Tensor, masks: Tensor) -> Tensor:
        seen.append(len(images))
        return batch_loss(module, images, masks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemberModule, "batch_loss", counted)
        with killed_at(3):
            fit_network(fewer, [strips.some(0, 1)])
        fit_network(whole, [strips.some(0, 1)])
    assert seen == [1] * 5  # steps 1 to 3, then 3 and 4 once more


def test_statistics_of_strips_of_several_sizes_are_taken(
    config: Config, strips: Strips, machine: Machine, tmp_path: Path
) -> None:
    names = [f"{i}.png" for i in range(3)]
    for seed, (name, size) in enumerate(zip(names, ((64, 96), (200, 200), (64, 96)), strict=True)):
        save_image(tmp_path / name, draw_image(seed, size))
    mixed, tried = Strips(tmp_path, names, {}, SEVERSTAL), new_fit(config, strips, machine)
    network = new_network(config)
    before = first_norm(network).running_mean.clone()  # type: ignore[union-attr]
    fit.retake_from_strips(network, tried, [mixed])
    after = first_norm(network).running_mean
    assert after is not None and torch.isfinite(after).all() and not torch.equal(before, after)
    fit.retake_from_strips(network, tried, [mixed.some(0, 1)])
    assert not torch.equal(after, before)


def test_statistics_come_from_the_strips_that_can_be_read(
    config: Config,
    strips: Strips,
    machine: Machine,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "torn.png").write_bytes(b"torn")
    whole, torn = strips.some(0, 2), Strips(tmp_path, ["torn.png"], {}, SEVERSTAL)
    found, expected = new_network(config), new_network(config)
    tried = new_fit(config, strips, machine)
    fit.retake_from_strips(found, tried, [whole, torn])
    fit.retake_from_strips(expected, tried, [whole])
    mean, by_hand = first_norm(found).running_mean, first_norm(expected).running_mean
    assert mean is not None and by_hand is not None and torch.allclose(mean, by_hand, atol=1e-5)
    assert "left out: " in caplog.text and "torn.png" in caplog.text
    with pytest.raises(ValueError, match="batch-norm statistics: none of 1 images can be read"):
        fit.retake_from_strips(found, tried, [torn])


def test_a_fit_of_crops_alone_ends_with_the_statistics_of_strips(
    config: Config, strips: Strips, machine: Machine
) -> None:
    """Those of crops, most of them on defects, are of no strip."""
    crops, some = new_fit(replace(config, whole_steps=0), strips, machine), [strips.some(0, 2)]
    network, _ = fit_network(crops, some)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    fit.retake_from_strips(network, crops, some)
    for name, value in network.state_dict().items():
        assert torch.allclose(value.float(), before[name].float(), atol=1e-6), name


def test_memory_that_does_not_hold_a_strip_is_not_asked_for_again_and_again(
    config: Config, strips: Strips, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer crops would not mend it."""
    batch_loss, tried = MemberModule.batch_loss, list[int]()

    def hungry(module: MemberModule, images: Tensor, masks: Tensor) -> Tensor:
        if module.part.name == "strips":
            tried.append(len(images))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return batch_loss(module, images, masks)

    monkeypatch.setattr(MemberModule, "batch_loss", hungry)
    whole = new_fit(config, strips, machine)
    with pytest.raises(ValueError, match=r"out of memory .*, take a smaller --encoder"):
        fit_within_memory(
            lambda tried: fit_network(replace(whole, config=tried), [strips.some(0, 2)]),
            replace(config, crops=8),
        )
    assert len(tried) == 1
