"""The GPU's path on a machine without one: PyTorch's fake tensors have a device and a type alone.

What needs a number (`item`), a real GPU or tensors of two devices in one operation raises there.
"""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import (
    CPU,
    DPT,
    ROOT,
    SMALL,
    draw_image,
    predict_masks,
    random_network,
    tiny_entry,
    tiny_model,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from kernel.device import DeviceLost
from kernel.early_exit import Tally
from kernel.engines import compile_member
from kernel.ensemble import Ensemble
from kernel.images import Strip
from kernel.manifest import Manifest, MemberSpec, load_manifest
from kernel.members import Member, build_network, split_network
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from kernel.strip_state import DECODE, ENCODE, WHOLE, Step, StripState
from kernel.tta import FLIPS

pytestmark = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.8",
    reason="fake CUDA tensors ask an old PyTorch for a driver",
)
CUDA = torch.device("cuda", 0)
SIZE = (50, 90)  # padded to the members' stride
BATCH = 4

SHIPPED = {spec.name: spec for spec in load_manifest(ROOT / "weights").members}
OTHERS = {
    "three channels": tiny_model("Unet", channels=3),
    "no presence head": tiny_model("FPN", presence=False),
    "a network in one piece": DPT,
}
SPECS = SHIPPED | {name: MemberSpec(**tiny_entry(name, model)) for name, model in OTHERS.items()}


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call] # PyTorch's own
    """Counts operations; raises where one takes a tensor of the GPU and gives one of the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Counter[str]()
        self.sigmoids = set[tuple[torch.dtype, torch.Size]]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen[str(func)] += 1
        if func is torch.ops.aten.sigmoid.default:
            self.sigmoids.add((args[0].dtype, args[0].shape))
        given = func(*args, **(kwargs or {}))
        devices = {each.device.type for each in args if isinstance(each, Tensor)}
        if "cuda" in devices and isinstance(given, Tensor) and given.device.type == "cpu":
            raise AssertionError(f"{func} copies to the host")
        return given


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """A GPU of fake tensors; a network moves to it with all its weights."""
    mode, move = FakeTensorMode(), nn.Module.to

    def to(module: nn.Module, *to_what: Any, **named: Any) -> nn.Module:
        if CUDA not in to_what:
            return move(module, *to_what, **named)
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    tensors[name] = None if tensor is None else fake(tensor)
        return module

    def fake(tensor: Tensor) -> Any:
        shape, stride = tensor.shape, tensor.stride()
        with mode:
            made = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=CUDA)
        return nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**34))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    return mode


def member_of(spec: MemberSpec) -> Member:
    """A member as the GPU runs it, of a network without numbers."""
    with torch.device("meta"):
        network = build_network(spec.model)
    plain = split_network(network, spec, torch.device("meta"))
    return compile_member(plain, CUDA)


@pytest.mark.parametrize("name", SPECS)
@torch.inference_mode()
def test_both_halves_run_in_fp16_on_the_gpu_and_give_fp32(name: str, gpu: FakeTensorMode) -> None:
    member = member_of(SPECS[name])
    weights = {(weight.device, weight.dtype) for weight in member.encoder.network.parameters()}
    assert weights == {(CUDA, torch.float16)}
    assert not torch.backends.cudnn.benchmark  # before the check
    with gpu, Watch() as watch:
        gates, *features = member.encoder(torch.rand(BATCH, 1, 64, 96, device=CUDA))
        probabilities = member.decoder(gates, *features)
    for tensor, dtype, shape in (
        (gates, torch.float32, (BATCH, 4)),
        (probabilities, torch.float32, (BATCH, 4, 64, 96)),
    ):
        assert isinstance(tensor, FakeTensor)
        assert (tensor.device, tensor.dtype, tensor.shape) == (CUDA, dtype, shape)
        assert tensor.is_contiguous()
    assert (torch.float32, probabilities.shape) in watch.sigmoids
    assert {feature.device for feature in features} == {CUDA}
    assert {feature.dtype for feature in features} == {torch.float16}
    if not member.encoder.monolithic:
        images = features[1:]  # the first is the input, of one channel or as it was
        assert all(each.is_contiguous(memory_format=torch.channels_last) for each in images)


def test_without_tensor_cores_a_member_runs_in_fp32(
    gpu: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 0))
    network = member_of(SPECS["three channels"]).encoder.network
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.decoder.modules())


@torch.inference_mode()
def test_a_stray_tensor_of_the_cpu_is_an_error_there(gpu: FakeTensorMode) -> None:
    member = member_of(SPECS["three channels"])
    with gpu, pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
        member.encoder.std = torch.ones(1, 3, 1, 1)
        member.encoder(torch.rand(1, 1, 64, 96, device=CUDA))


# --- a whole run ----------------------------------------------------------------------------------


class Host:
    """What comes to the host: drawn in its place, for a fake tensor holds no numbers."""

    def __init__(self) -> None:
        self.copies = Counter[str]()
        self.rng = np.random.default_rng(0)

    def __call__(self, tensor: Tensor) -> npt.NDArray[Any]:
        assert tensor.device == CUDA
        if tensor.dtype == torch.bool:
            self.copies["masks"] += 1
            return np.zeros(tensor.shape, np.bool_)
        assert (tensor.dtype, tensor.shape[1:]) == (torch.float64, (4, 4))
        self.copies["bounds"] += 1
        found = np.empty(tensor.shape)
        found[:, 0] = self.rng.choice([0.02, 0.9], (len(tensor), 1), p=[0.1, 0.9])  # gates
        found[:, 1] = self.rng.uniform(0, 12, (len(tensor), 1))  # the highest sum
        found[:, 2] = 9  # pixels that may be on, and those that are
        found[:, 3] = self.rng.choice([9, 1], (len(tensor), 1), p=[0.1, 0.9])
        return found


def ensemble_of(members: list[Member]) -> Ensemble:
    flips, size = tuple(FLIPS), (64, 64)  # strips are resized to it, and probabilities back
    manifest = Manifest([member.spec for member in members], flips=flips, image_size=size)
    return Ensemble(manifest, members, CUDA, Stages())


@pytest.fixture
def host(gpu: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr("kernel.scheduling.to_host", host)
    monkeypatch.setattr(
        "kernel.ensemble.image_to_tensor",
        lambda image, device: torch.rand(1, 1, *image.shape, device=device),
    )
    return host


def run_strips(
    gpu: FakeTensorMode, count: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> Counter[Step]:
    """The steps that a run of so many strips takes, each for a batch."""
    steps, launch = Counter[Step](), Scheduler._launch

    def counted(self: Scheduler, step: Step, pass_id: int, states: list[StripState]) -> Tensor:
        steps[step] += 1
        return launch(self, step, pass_id, states)

    monkeypatch.setattr(Scheduler, "_launch", counted)
    ensemble = ensemble_of([member_of(SPECS[name]) for name in OTHERS])
    strips = [Strip(str(number), np.zeros(SIZE, np.uint8)) for number in range(count)]
    with gpu, Watch():
        states = list(Scheduler(ensemble, batch_size).predict_strips(strips, count))
    assert [state.fault for state in states] == [""] * count
    assert all(hasattr(state, "masks") for state in states)
    counted_s = ensemble.stages.networks  # by whoever waits for the GPU
    assert ensemble.is_async
    assert {member for member, _ in counted_s} == set(ensemble.members)
    assert all(seconds > 0 for seconds in counted_s.values())
    return steps


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (9, 4)])
def test_the_host_waits_for_the_gpu_once_a_batch_and_step(
    count: int,
    batch_size: int,
    gpu: FakeTensorMode,
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = run_strips(gpu, count, batch_size, monkeypatch)
    assert host.copies["bounds"] == sum(steps.values())
    assert host.copies["masks"] <= count  # those of strips that end together come together
    if batch_size > 1:
        assert host.copies["masks"] and steps.keys() == {ENCODE, DECODE, WHOLE}


@pytest.mark.parametrize(
    ("stray", "error"), [("item", "_local_scalar_dense"), ("cpu", "copies to the host")]
)
def test_another_wait_for_the_gpu_is_found(
    stray: str,
    error: str,
    gpu: FakeTensorMode,
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch = Tally.launch

    def waiting(self: Tally, *given: Tensor | None) -> Tensor:
        found = launch(self, *given)
        getattr(found.sum(), stray)()
        return found

    monkeypatch.setattr(Tally, "launch", waiting)
    with pytest.raises(DeviceLost, match=error):
        run_strips(gpu, 1, 1, monkeypatch)


def test_no_strip_reads_a_number_of_its_own() -> None:
    """On the CPU, with numbers: `item`, `int` and `bool` of a tensor are counted."""
    networks = [random_network(model, seed) for seed, model in enumerate(list(OTHERS.values())[:2])]
    specs = [SPECS[name] for name in list(OTHERS)[:2]]
    members = [split_network(*each, CPU) for each in zip(networks, specs, strict=True)]
    manifest = Manifest(specs, threshold=0.45)
    scheduler = Scheduler(Ensemble(manifest, members, CPU, Stages()), BATCH)
    with Watch() as watch:
        masks = predict_masks(scheduler, [draw_image(seed, SMALL) for seed in range(6)])
    assert masks.any() and not masks.all()
    assert watch.seen["aten.conv2d.default"] > 0
    assert not watch.seen.keys() & {"aten._local_scalar_dense.default", "aten.item.default"}
