"""The engines: each gives what plain PyTorch gives, and where one does not it is not used.

`make test` runs this file in a process of its own: after OpenVINO's work, training in the same
process ended in a segmentation fault. Nothing but these tests does both.
"""

import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import random_network, tiny_model, write_tiny_weights
from torch import nn

import build_kernel
from kernel import inference
from kernel.engines import (
    SHAPES,
    OpenVino,
    check_engine,
    fastest,
    fold_batch_norm,
    liveliest,
    openvino_files,
)
from kernel.manifest import MemberSpec, load_manifest
from kernel.members import Encoder, Member, load_member, split, use_wheels
from kernel.mounts import Options

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny members packed with OpenVINO's halves, without its wheel of 59 MB."""
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("openvino")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_kernel, "OPENVINO_WHEEL", {})
        build_kernel.build(write_tiny_weights(folder / "w"), folder / "a", "somebody", True)
        build_kernel.build(folder / "w", folder / "b", "somebody", True)
    return folder


@pytest.fixture
def dataset(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the packed dataset, to be broken."""
    return Path(shutil.copytree(bundle / "a" / "dataset", tmp_path / "dataset"))


def specs_of(dataset: Path) -> list[MemberSpec]:
    return load_manifest(dataset).members


def greys(seed: int, batch: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, 1, height, width, generator=torch.Generator().manual_seed(seed))


def engine_of(dataset: Path, spec: MemberSpec) -> Member:
    return fastest(load_member(dataset, spec, CPU), dataset, CPU)


def answers(member: Member, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        gates, *features = member.encode(images)
        return gates, member.decode(gates, *features)


# --- batch norm folded ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "left"),  # the share of norms that follow no convolution, or are more than a norm
    [("tu-test_resnet", 0.1), ("efficientnet-b0", 0), ("densenet121", 0.6), ("tu-regnety_002", 1)],
)
@pytest.mark.parametrize("arch", ["FPN", "Unet"])
def test_folding_leaves_the_answers_and_takes_the_norms(
    encoder: str, left: float, arch: str
) -> None:
    network = random_network(tiny_model(arch) | {"encoder_name": encoder}, seed=1)
    images = greys(0, 2, 64, 96)
    with torch.no_grad():
        before = network(images)
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
        fold_batch_norm(network)
        after = network(images)
    assert norms > 0
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) <= left * norms
    for found, expected in zip(after, before, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)


def test_on_the_cpu_without_openvino_members_run_folded(dataset: Path) -> None:
    for path in dataset.glob("*.xml"):
        path.unlink()
    for spec in specs_of(dataset):
        plain = load_member(dataset, spec, CPU)
        engine = fastest(plain, dataset, CPU)
        counts = [
            sum(type(module) is nn.BatchNorm2d for module in member.encode.modules())
            for member in (engine, plain)
        ]
        assert counts[0] < counts[1] / 2
        images = greys(1, 1, 64, 96)
        for found, expected in zip(answers(engine, images), answers(plain, images), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- OpenVINO -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 64, 96), (2, 64, 96), (1, 256, 320), (3, 32, 64)], ids=str)
def test_openvino_gives_what_plain_pytorch_gives(
    shape: tuple[int, int, int], dataset: Path
) -> None:
    for spec in specs_of(dataset):
        plain = load_member(dataset, spec, CPU)
        engine = fastest(plain, dataset, CPU)
        assert isinstance(engine.encode, OpenVino)
        assert engine.stride == plain.stride
        images = greys(2, *shape)
        found, expected = answers(engine, images), answers(plain, images)
        assert expected[1].std() > 0.01
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def test_only_the_features_that_a_decoder_reads_leave_the_encoder(dataset: Path) -> None:
    counts = {
        spec.model["arch"]: len(engine_of(dataset, spec).encode(greys(3, 1, 64, 96)))
        for spec in specs_of(dataset)
    }
    assert counts == {"Unet": 1 + 6, "FPN": 1 + 4}  # gates, and the levels from the image down


def test_what_an_engine_gave_stays_when_it_runs_again(dataset: Path) -> None:
    engine = engine_of(dataset, specs_of(dataset)[0])
    first = engine.encode(greys(4, 1, 64, 96))
    copies = [tensor.clone() for tensor in first]
    engine.encode(greys(5, 1, 64, 96))
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


def test_engines_that_meet_many_sizes_keep_few_of_them_ready(dataset: Path) -> None:
    spec = specs_of(dataset)[0]
    plain, engine = load_member(dataset, spec, CPU), engine_of(dataset, spec)
    sizes = [(32 * side, 64) for side in range(1, SHAPES + 2)]
    for size in [*sizes, sizes[0]]:  # the first once more, when it was put away
        images = greys(7, 1, *size)
        for mine, theirs in zip(answers(engine, images), answers(plain, images), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert [len(half.requests) for half in (engine.encode, engine.decode)] == [SHAPES, SHAPES]


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def test_an_engine_that_rests_gives_memory_back_and_then_the_same_bits(dataset: Path) -> None:
    engine, images = engine_of(dataset, specs_of(dataset)[0]), greys(9, 1, 1024, 2048)
    before = answers(engine, images)
    working = resident_mb()
    assert len(engine.rests) == 2
    for rest in engine.rests:
        rest()
    assert working - resident_mb() > images.nbytes / 2**20
    after = answers(engine, images)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_an_openvino_that_cannot_rest_is_not_used(dataset: Path, plain: Member) -> None:
    engine = replace(engine_of(dataset, specs_of(dataset)[0]), rests=(fails,))
    assert check_engine(engine, plain, GREY, CPU) is plain


def test_after_the_check_nothing_stays_compiled_for_its_part_of_a_strip(dataset: Path) -> None:
    spec = specs_of(dataset)[0]
    plain, engine = load_member(dataset, spec, CPU), engine_of(dataset, spec)
    assert check_engine(engine, plain, GREY, CPU) is engine
    assert not engine.encode.requests
    assert not engine.decode.requests


@torch.inference_mode()
def test_openvino_takes_tensors_that_lie_turned_in_memory(dataset: Path) -> None:
    engine = engine_of(dataset, specs_of(dataset)[0])
    images = greys(8, 1, 96, 64).transpose(-1, -2)
    assert not images.is_contiguous()
    assert torch.equal(engine(images), engine(images.contiguous()))


def test_two_builds_with_openvino_are_the_same_bytes(bundle: Path) -> None:
    first = {p.name: p.read_bytes() for p in (bundle / "a" / "dataset").iterdir()}
    second = {p.name: p.read_bytes() for p in (bundle / "b" / "dataset").iterdir()}
    assert sum(name.endswith(".bin") for name in first) == 6
    assert first == second


@pytest.mark.parametrize("how", ["torn", "not installed"])
def test_where_openvino_fails_pytorch_runs_and_the_log_says_so(
    how: str, dataset: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = specs_of(dataset)[0]
    if how == "torn":
        (dataset / openvino_files(spec.file)[0]).write_text("<net", encoding="utf-8")
    else:
        monkeypatch.setitem(sys.modules, "openvino", None)
    engine = engine_of(dataset, spec)
    assert isinstance(engine.encode, Encoder)
    assert "unet-a runs on PyTorch, not on OpenVINO" in caplog.text


def test_openvino_that_is_not_installed_stops_the_build_with_the_remedy(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_kernel, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"--openvino: not installed here; pip install"):
        build_kernel.build(tiny_weights, tmp_path / "dist", "somebody", openvino=True)
    assert not (tmp_path / "dist").exists()


# --- the check at the start -----------------------------------------------------------------------


@pytest.fixture
def plain(dataset: Path) -> Member:
    return load_member(dataset, specs_of(dataset)[0], CPU)


def fails(*_: Any) -> Any:
    raise RuntimeError("no kernel image is available")


ENGINES: dict[str, Any] = {
    "other gates": lambda p: replace(p, encode=lambda x: (p.encode(x)[0] / 2, *p.encode(x)[1:])),
    "other masks": lambda p: replace(p, decode=lambda *parts: p.decode(*parts).flip(-1)),
    "masks of NaN": lambda p: replace(p, decode=lambda *parts: p.decode(*parts) * torch.nan),
    "masks of another shape": lambda p: replace(p, decode=lambda *parts: p.decode(*parts)[:, :1]),
    "an encoder that fails": lambda p: replace(p, encode=fails),
    "a decoder that fails": lambda p: replace(p, decode=fails),
}


GREY = np.random.default_rng(6).integers(0, 255, (64, 96), np.uint8)


@pytest.mark.parametrize("case", ENGINES)
def test_an_engine_is_replaced_and_named_for(
    case: str, plain: Member, caplog: pytest.LogCaptureFixture
) -> None:
    assert check_engine(ENGINES[case](plain), plain, GREY, CPU) is plain
    assert "unet-a runs on plain PyTorch, the engine fails" in caplog.text


@torch.inference_mode()
def test_wrong_masks_show_behind_a_shut_gate(plain: Member) -> None:
    shut = replace(plain, encode=lambda x: (plain.encode(x)[0] * 0, *plain.encode(x)[1:]))
    wrong = replace(shut, decode=lambda *parts: plain.decode(*parts).flip(-1))
    images = greys(6, 1, 64, 96)
    assert torch.equal(shut(images), wrong(images))
    assert check_engine(wrong, shut, GREY, CPU) is shut


def test_an_engine_that_agrees_within_rounding_is_kept(
    plain: Member, caplog: pytest.LogCaptureFixture
) -> None:
    close = replace(plain, decode=lambda *parts: plain.decode(*parts) + 1e-4)
    assert check_engine(close, plain, GREY, CPU) is close
    assert not caplog.text


def test_an_engine_is_checked_where_most_is_to_be_seen() -> None:
    image = np.full((256, 1600), 30, np.uint8)
    image[:, 900:1000] = GREY[0, :1]
    image[100, 900:1000] = 255
    np.testing.assert_array_equal(liveliest(image), image[:, 800:1200])
    np.testing.assert_array_equal(liveliest(GREY), GREY)  # too narrow for parts


def test_a_run_with_a_wrong_engine_writes_the_masks_of_plain_pytorch(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another member's halves lie where this one's should be."""
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(2):
        grey = np.random.default_rng(seed).integers(0, 255, (64, 96), np.uint8)
        cv2.imwrite(str(images / f"{seed}.png"), grey)
    (images / "0 broken.png").write_bytes(b"")  # the first in order is not the one to check on

    def submission(name: str) -> bytes:
        output = tmp_path / name
        inference.run(Options(bundle=dataset, images=images, output=output))
        return output.read_bytes()

    expected = submission("right.csv")
    assert "plain PyTorch" not in caplog.text
    wrong = next(spec for spec in specs_of(dataset) if spec.name == "fpn-b")
    model = tiny_model("FPN")
    other = split(random_network(model, seed=9), wrong, CPU)
    build_kernel.pack_openvino(other, dataset)
    assert submission("wrong.csv") == expected
    assert "fpn-b runs on plain PyTorch" in caplog.text


# --- the bundle's wheels --------------------------------------------------------------------------


def write_wheel(folder: Path, tag: str, module: str) -> None:
    with zipfile.ZipFile(folder / f"{module}-1.0-{tag}.whl", "w") as archive:
        archive.writestr(f"{module}/__init__.py", "PLACE = __file__\n")


def test_compiled_wheels_are_unpacked_where_they_are_for_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = "cp{}{}".format(*sys.version_info), "cp27"
    write_wheel(tmp_path, f"{mine}-{mine}-manylinux_2_28_x86_64", "compiled_here")
    write_wheel(tmp_path, f"{other}-{other}-manylinux_2_28_x86_64", "compiled_elsewhere")
    write_wheel(tmp_path, "py3-none-any", "pure_python")
    monkeypatch.setattr(sys, "path", list(sys.path))
    use_wheels(tmp_path)
    import compiled_here  # type: ignore[import-not-found]
    import pure_python  # type: ignore[import-not-found]

    assert Path(compiled_here.PLACE).is_file()
    assert ".whl" in pure_python.PLACE
    with pytest.raises(ModuleNotFoundError):
        import compiled_elsewhere  # type: ignore[import-not-found]  # noqa: F401
