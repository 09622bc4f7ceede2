"""The engines: each gives what plain PyTorch gives, and where one does not it is not used."""

import platform
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, random_network, tiny_model
from torch import Tensor, nn

from kernel.engines import (
    check_engine,
    compile_member,
    fold_batch_norm,
    highest_contrast_crop,
)
from kernel.ensemble_loading import load_ensemble
from kernel.manifest import MemberSpec, load_manifest
from kernel.members import Member, load_member, use_wheels
from kernel.stages import Stages


def specs_of(dataset: Path) -> list[MemberSpec]:
    return load_manifest(dataset).members


def greys(seed: int, batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 1, height, width, generator=torch.Generator().manual_seed(seed))


def answers(member: Member, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        gates, *features = member.encoder(images)
        return gates, member.decoder(gates, *features)


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


def test_a_norm_without_statistics_of_its_own_stays() -> None:
    norm = {"type": "batchnorm", "track_running_stats": False}
    network: Any = random_network(tiny_model() | {"decoder_use_norm": norm}, seed=1)
    images = greys(0, 2, 64, 96)
    with torch.no_grad():
        before = network(images)
        fold_batch_norm(network)
        after = network(images)
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.decoder.modules())
    for found, expected in zip(after, before, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)


def test_on_the_cpu_without_openvino_members_run_folded(dataset: Path) -> None:
    for spec in specs_of(dataset):
        plain = load_member(dataset, spec, CPU)
        engine = compile_member(plain, CPU)
        counts = [
            sum(type(module) is nn.BatchNorm2d for module in member.encoder.modules())
            for member in (engine, plain)
        ]
        assert counts[0] < counts[1] / 2
        images = greys(1, 1, 64, 96)
        for found, expected in zip(answers(engine, images), answers(plain, images), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- the check at the start -----------------------------------------------------------------------


def test_fp32_is_no_tf32(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    load_ensemble(dataset, load_manifest(dataset), CPU, Stages(), None, plain=True)
    assert not torch.backends.cudnn.allow_tf32


@pytest.fixture
def plain(dataset: Path) -> Member:
    return load_member(dataset, specs_of(dataset)[0], CPU)


def fails(*_: Any) -> Any:
    raise RuntimeError("no kernel image is available")


ENGINES: dict[str, Any] = {
    "other gates": lambda p: replace(p, encoder=lambda x: (p.encoder(x)[0] / 2, *p.encoder(x)[1:])),
    "other masks": lambda p: replace(p, decoder=lambda *parts: p.decoder(*parts).flip(-1)),
    "masks of NaN": lambda p: replace(p, decoder=lambda *parts: p.decoder(*parts) * torch.nan),
    "masks of another shape": lambda p: replace(p, decoder=lambda *parts: p.decoder(*parts)[:, :1]),
    "an encoder that fails": lambda p: replace(p, encoder=fails),
    "a decoder that fails": lambda p: replace(p, decoder=fails),
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
    shut = replace(plain, encoder=lambda x: (plain.encoder(x)[0] * 0, *plain.encoder(x)[1:]))
    wrong = replace(shut, decoder=lambda *parts: plain.decoder(*parts).flip(-1))
    images = greys(6, 1, 64, 96)
    assert torch.equal(shut(images), wrong(images))
    assert check_engine(wrong, shut, GREY, CPU) is shut


FAINT: dict[str, Any] = {  # all probabilities near 0, as on a clean strip
    "gates": lambda p, by: replace(
        p, encoder=lambda x: (p.encoder(x)[0] * 1e-4 * by, *p.encoder(x)[1:])
    ),
    "masks": lambda p, by: replace(p, decoder=lambda *parts: p.decoder(*parts) * 1e-4 * by),
}


@pytest.mark.parametrize(("by", "kept"), [(0, False), (0.5, False), (1.05, True)])
@pytest.mark.parametrize("which", FAINT)
def test_where_all_is_near_0_what_differs_shows(
    which: str, by: float, kept: bool, plain: Member
) -> None:
    faint, engine = FAINT[which](plain, 1), FAINT[which](plain, by)
    assert check_engine(engine, faint, GREY, CPU) is (engine if kept else faint)


def test_an_engine_that_agrees_within_rounding_is_kept(
    plain: Member, caplog: pytest.LogCaptureFixture
) -> None:
    close = replace(
        plain,
        encoder=lambda x: (plain.encoder(x)[0] * (1 - 2e-3), *plain.encoder(x)[1:]),
        decoder=lambda *parts: plain.decoder(*parts) + 1e-4,
    )
    assert check_engine(close, plain, GREY, CPU) is close
    assert not caplog.text


def test_the_engine_of_a_member_that_takes_one_size_alone_is_checked_at_it(
    plain: Member, caplog: pytest.LogCaptureFixture
) -> None:
    """As DPT and Swin do; by its crop PyTorch itself would fail."""

    def encode(images: Tensor) -> Any:
        assert images.shape[-2:] == (32, 64), "Input height doesn't match model"
        return plain.encoder(images)

    fixed = replace(plain, encoder=encode)
    close = replace(fixed, decoder=lambda *parts: plain.decoder(*parts) + 1e-4)
    wrong = replace(fixed, decoder=lambda *parts: plain.decoder(*parts).flip(-1))
    assert check_engine(close, fixed, GREY, CPU, (32, 64)) is close
    assert not caplog.text
    assert check_engine(wrong, fixed, GREY, CPU, (32, 64)) is fixed
    assert check_engine(close, fixed, GREY, CPU) is fixed


def test_an_engine_is_checked_where_most_is_to_be_seen() -> None:
    image = np.full((256, 1600), 30, np.uint8)
    image[:, 900:1000] = GREY[0, :1]
    image[100, 900:1000] = 255
    np.testing.assert_array_equal(highest_contrast_crop(image), image[:, 800:1200])
    np.testing.assert_array_equal(highest_contrast_crop(GREY), GREY)  # too narrow for parts


# --- the bundle's wheels --------------------------------------------------------------------------


def write_wheel(folder: Path, tag: str, module: str) -> None:
    with zipfile.ZipFile(folder / f"{module}-1.0-{tag}.whl", "w") as archive:
        archive.writestr(f"{module}/__init__.py", "PLACE = __file__\n")


def test_compiled_wheels_are_unpacked_where_they_are_for_this_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = "cp{}{}".format(*sys.version_info), "cp27"
    write_wheel(tmp_path, f"{mine}-{mine}-manylinux_2_28_{platform.machine()}", "compiled_here")
    write_wheel(tmp_path, f"{other}-{other}-manylinux_2_28_x86_64", "compiled_elsewhere")
    write_wheel(tmp_path, f"{mine}-{mine}-manylinux_2_28_riscv64", "of_another_machine")
    write_wheel(tmp_path, "py3-none-any", "pure_python")
    torn = f"torn-1.0-{mine}-{mine}-manylinux_2_28_{platform.machine()}.whl"
    (tmp_path / torn).write_bytes(b"PK\x03\x04")  # costs no other
    monkeypatch.setattr(sys, "path", list(sys.path))
    use_wheels(tmp_path)
    import compiled_here  # type: ignore[import-not-found]
    import pure_python  # type: ignore[import-not-found]

    assert Path(compiled_here.PLACE).is_file()
    assert ".whl" in pure_python.PLACE
    with pytest.raises(ModuleNotFoundError):
        import compiled_elsewhere  # type: ignore[import-not-found]  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        import of_another_machine  # type: ignore[import-not-found]  # noqa: F401
