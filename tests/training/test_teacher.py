"""A teacher: what it gives, how it is learnt from, and what is no teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSES, draw_image
from safetensors.torch import save_file
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from kernel.images import image_to_tensor
from training.config import Config
from training.losses import MASK_WEIGHT, TEMPERATURE, taught_loss
from training.module import MemberModule, new_network
from training.results import write_checkpoint
from training.states import describe_experiment
from training.teacher import mask_probabilities, read_teacher


@pytest.fixture
def teacher(config: Config, tmp_path: Path) -> Path:
    """The checkpoint of another network, of three channels and with a name of its own."""
    other = replace(config, name="other", channels=3, seed=5, mean=(0.5,), std=(0.25,))
    path = tmp_path / "renamed.safetensors"
    write_checkpoint(new_network(other), other, path)
    return path


@pytest.mark.parametrize("size", [(64, 96), (200, 200), (33, 47)])
def test_a_teachers_masks_are_its_networks_with_the_gates_open(
    size: tuple[int, int], config: Config, tmp_path: Path
) -> None:
    network = new_network(config)
    write_checkpoint(network, config, tmp_path / "it.safetensors")
    images = torch.cat([image_to_tensor(draw_image(seed, size)) for seed in range(2)])
    found = mask_probabilities(read_teacher(tmp_path / "it.safetensors", CLASSES), images)
    module = MemberModule(network.half().float(), config, config.whole_part).eval()
    with torch.no_grad():
        expected = torch.sigmoid(module(images).masks)
    assert found.shape == (2, CLASSES, *size)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_loss_is_the_softened_divergence_and_least_where_both_agree() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, generator=draw, requires_grad=True)
    taught = torch.rand(2, 3, 8, 8, generator=draw)
    soft = Bernoulli(logits=torch.logit(taught) / TEMPERATURE)
    own: Tensor = soft.entropy()  # type: ignore[no-untyped-call]
    apart = kl_divergence(soft, Bernoulli(logits=logits / TEMPERATURE)) + own
    loss = taught_loss(logits, taught)
    assert loss.item() == pytest.approx(TEMPERATURE**2 * apart.mean().item(), rel=1e-4)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert ((logits.grad > 0) == (torch.sigmoid(logits) > taught)).all()  # towards the teacher
    sure = torch.tensor([0.0, 1.0])
    assert torch.isfinite(taught_loss(torch.zeros(2), sure))


def test_a_step_learns_from_truth_and_teacher_and_keeps_no_part_of_it(
    teacher: Path, config: Config
) -> None:
    taught = replace(config, teacher=str(teacher))
    plain, module = (
        MemberModule(new_network(each), each, each.crop_part) for each in (config, taught)
    )
    images = image_to_tensor(draw_image(0, (64, 96)))
    masks = torch.zeros(1, CLASSES, 64, 96, dtype=torch.bool)
    masks[:, 0, :20, :30] = True
    expected = mask_probabilities(read_teacher(teacher, CLASSES), images)
    with torch.no_grad():
        extra = module.batch_loss(images, masks) - plain.batch_loss(images, masks)
        own = taught_loss(module(images).masks, expected)
    assert float(extra) == pytest.approx(MASK_WEIGHT * float(own), rel=1e-3)
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert len(list(module.parameters())) == len(list(plain.parameters()))


def test_another_teacher_is_another_experiment_wherever_it_lies(
    teacher: Path, config: Config, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere" / "moved.safetensors"
    moved.parent.mkdir()
    moved.write_bytes(teacher.read_bytes())
    first, again, none = (
        describe_experiment(replace(config, teacher=str(path)), "data", "")
        for path in (teacher, moved, "")
    )
    assert first == again and "teacher" not in none
    save_file({"a": torch.zeros(1)}, moved)
    changed = describe_experiment(replace(config, teacher=str(moved)), "data", "")
    assert changed["teacher"] != first["teacher"]


def no_header(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path)


def other_weights(path: Path) -> None:
    config = Config("x", "tu-test_resnet", "Unet", classes=CLASSES)
    write_checkpoint(new_network(replace(config, arch="FPN")), config, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no checkpoint of train.py: .*[Nn]o such file"),
        (lambda path: path.write_bytes(b"weights"), "no checkpoint of train.py: "),
        (no_header, "no checkpoint of train.py: "),
        (other_weights, "not of the declared model"),
    ],
)
def test_what_is_no_teacher_is_refused_by_name(write: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    write(path)
    with pytest.raises(ValueError, match=f"--teacher {path}: {message}"):
        read_teacher(path, CLASSES)


def test_a_teacher_of_other_classes_is_refused(teacher: Path) -> None:
    with pytest.raises(ValueError, match=f"{teacher.name}: {CLASSES} classes, expected 7"):
        read_teacher(teacher, 7)
