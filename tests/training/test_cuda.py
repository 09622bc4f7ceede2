"""A step on a GPU, without one: the five shipped networks on tensors that hold no numbers.

Fake CUDA tensors run forward, loss, scaler, clipping and optimiser in 16-mixed, and refuse to meet
a tensor of the CPU. PyTorch's backward wants a real CUDA context even for them, so the backward
runs on meta tensors, which refuse the same, at the precision that they have.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from training import fit_members, train
from training.config import Config
from training.fit import CLIP_NORM, find_crops
from training.fit_members import read_jobs
from training.module import MemberModule, new_network

MEMBERS = Path(fit_members.__file__).with_name("members.txt")
JOBS = {job.name: train.parse_args(job.options) for job in read_jobs(MEMBERS, ["--data", "d"])}
WHOLE = (1, 256, 1600)  # strips a step, (H, W)


@pytest.fixture(autouse=True)
def autocast_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch turns 16-mixed off where it sees no GPU."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)


def module_of(name: str, channels: int, part: int) -> MemberModule:
    """A shipped member before a step of one part, drawn on the CPU."""
    args = JOBS[name]
    config = Config(name, args.encoder, args.arch, channels=channels, precision="16-mixed")
    return MemberModule(new_network(config), config, config.parts[part]).train()


def move(module: nn.Module, device: str) -> None:
    """Replace parameters and buffers by tensors without numbers, strides kept."""
    for each in module.modules():
        stores: list[dict[str, Any]] = [each._parameters, each._buffers]
        for store in stores:
            for name, old in store.items():
                if old is None:
                    continue
                new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)
                store[name] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new


def batch_of(module: MemberModule, device: str) -> tuple[Tensor, Tensor]:
    """Images (B, 1, H, W) and masks of the module's part at their full size."""
    config = module.config
    crops = module.part.name == "crops"
    count, height, width = (config.crops, *config.crop_size) if crops else WHOLE
    images = torch.empty(count, 1, height, width, device=device)
    return images, torch.empty(count, config.classes, height, width, device=device).bool()


class Devices(TorchDispatchMode):  # type: ignore[no-untyped-call] # PyTorch's own
    """Notes where the tensors of every operation lie, numbers of one element left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # PyTorch's own
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_leaves((args, kwargs, result))
        self.seen |= {t.device.type for t in flat if isinstance(t, Tensor) and t.ndim}
        return result


def take_fake_step(module: MemberModule) -> set[str]:
    """One step in 16-mixed on fake CUDA tensors; the kinds of device seen up to its loss.

    The gradients are put in by hand.
    """
    with FakeTensorMode():
        move(module, "cuda")
        optimizer = module.configure_optimizers()["optimizer"]
        scaler = torch.amp.GradScaler("cuda")
        with module.autocast(), Devices() as devices:
            loss = module.batch_loss(*batch_of(module, "cuda"))
        assert scaler.scale(loss).device.type == "cuda" and loss.requires_grad
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
        optimizer.step()
        seen: set[str] = devices.seen
    return seen


def take_meta_step(module: MemberModule) -> None:
    """One step on meta tensors, backward too."""
    move(module, "meta")
    optimizer = module.configure_optimizers()["optimizer"]
    module.batch_loss(*batch_of(module, "meta")).backward()  # type: ignore[no-untyped-call]
    first, *others = [p.grad for p in module.parameters()]
    assert first is not None and {g.device.type for g in others if g is not None} == {"meta"}
    nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
    optimizer.step()


each_step = pytest.mark.parametrize(  # grey crops of every member, whole strips in colour of one
    ("name", "part", "channels"), [*((name, 0, 1) for name in JOBS), ("resnet34", 1, 3)]
)


@each_step
def test_a_step_in_16_mixed_keeps_every_tensor_on_the_gpu(
    name: str, part: int, channels: int
) -> None:
    assert take_fake_step(module_of(name, channels, part)) == {"cuda"}


@each_step
def test_a_step_back_reaches_the_first_weight_and_meets_no_tensor_of_the_cpu(
    name: str, part: int, channels: int
) -> None:
    take_meta_step(module_of(name, channels, part))


@pytest.fixture
def stray(config: Config) -> Iterator[MemberModule]:
    """A tiny module whose loss takes a tensor of the CPU."""
    config = replace(config, precision="16-mixed")
    module = MemberModule(new_network(config), config, config.crop_part).train()
    prepare = module.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "prepare", lambda images: prepare(images) * torch.ones(32, 64))
        yield module


def test_a_tensor_of_the_cpu_is_noticed(stray: MemberModule) -> None:
    with pytest.raises(RuntimeError, match="devices"):
        take_fake_step(stray)
    with pytest.raises(RuntimeError, match="device"):
        take_meta_step(stray)


def test_a_member_follows_the_network_that_comes_from_a_gpu() -> None:
    """The heads' last fit wraps a network that alone was moved."""
    config = Config("small", "resnet18", precision="16-mixed")
    module = MemberModule(new_network(config).to("meta"), config, config.whole_part)
    images = torch.zeros(1, 1, 64, 96, device="meta")
    assert module.mean.device.type == module.std.device.type == "meta"
    assert module(images).masks.device.type == "meta"


def test_crops_are_counted_on_the_device_of_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemberModule, "autocast", lambda _: nullcontext())  # meta has none
    config = Config("small", "resnet18", crop_size=(64, 64))
    assert find_crops(config, torch.device("meta"), most=2) == 2
