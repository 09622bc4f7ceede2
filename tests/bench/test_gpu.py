"""What `make gpu` measures, on the CPU with tiny members: a GPU gives other figures only."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch

from kernel.ensemble import Ensemble
from kernel.manifest import Manifest, load_manifest
from kernel.members import load_member
from kernel.stages import Stages
from kernel.tta import Pass

CPU = torch.device("cpu")


def test_members_without_their_checkpoint_get_seeded_random_weights(
    session_weights: Path, tmp_path: Path
) -> None:
    shutil.copy(session_weights / "ensemble.json", tmp_path)
    shutil.copy(session_weights / "unet-a.safetensors", tmp_path)
    bundles = [tmp_path / name for name in ("first", "second")]
    for bundle in bundles:
        bundle.mkdir()
        manifest, shipped = gpu.write_bundle(tmp_path, bundle)
        assert not shipped
        assert min(min(spec.flops) for spec in manifest.members) > 1e6
    images = torch.rand(1, 1, 64, 96)
    for spec in load_manifest(bundles[0]).members:
        found = [load_member(bundle, spec, CPU)(images) for bundle in bundles]
        assert torch.equal(found[0], found[1])
        assert found[0].std() > 0


def test_all_sections_end_in_one_file_and_a_table(
    session_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu, "COMPILER", "eager")
    monkeypatch.setattr(gpu, "run_tests", lambda: {"exit_code": 0, "last_lines": ["4 passed"]})
    out = tmp_path / "gpu.json"
    words: list[Any] = ["--weights", session_weights, "--device", "cpu", "--out", out]
    gpu.main([*map(str, words), "--batch", "2", "--batches", "1", "2", "--strips", "3"])
    found = json.loads(out.read_text())
    sections = ["tests", "strips", "members", "batches", "compiler"]
    assert [name for name in found if name in sections] == sections
    assert all("left_out" not in found[section] for section in sections), found
    assert found["weights"] == "shipped"
    assert found["batches"].keys() == {"1", "2"}
    assert all(0 < row["share_of_peak"] < 1 for row in found["batches"].values())
    assert found["strips"]["pixels_that_differ"] == 0
    assert found["strips"]["every pass"]["share_of_flops"] == 1
    assert found["members"].keys() == {"unet-a", "fpn-b", "unet-c"}
    printed = capsys.readouterr().out
    assert (
        f"every pass: strips_a_second {found['strips']['every pass']['strips_a_second']:.4g}"
        in (printed)
    )


@pytest.mark.parametrize(
    ("error", "rows"),
    [
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), ["1", "2"]),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), ["1", "2"]),
        (RuntimeError("no kernel image is available"), None),
    ],
    ids=str,
)
def test_the_sweep_ends_at_the_batch_that_memory_is_too_small_for(
    error: Exception, rows: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = Ensemble(Manifest([]), [], CPU, Stages())
    ensemble.passes = [Pass("a", "none", (1, 1))]

    def run_pass(pass_id: int, images: torch.Tensor, size: Any) -> None:
        if len(images) > 2:
            raise error

    monkeypatch.setattr(ensemble, "run_pass", run_pass)
    if rows:
        assert list(gpu.sweep_batches(ensemble, 1.0, (8, 8), (1, 2, 4, 8))) == rows
        return
    with pytest.raises(RuntimeError, match="no kernel image"):
        gpu.sweep_batches(ensemble, 1.0, (8, 8), (1, 2, 4, 8))


def test_a_section_that_fails_or_comes_too_late_is_named() -> None:
    def fails() -> None:
        raise RuntimeError("no kernel image is available")

    assert "no kernel image" in gpu.run_section("strips", fails, 10)["left_out"]
    assert gpu.run_section("strips", fails, 0) == {"left_out": "no time was left"}


def test_the_gpus_tests_are_found_and_their_end_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all((gpu.ROOT / path).is_file() for path in gpu.TESTS)

    def ended(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert list(gpu.TESTS) == command[-2:]
        return subprocess.CompletedProcess(command, 1, "one\ntwo\n1 failed in 2 s\n", "")

    monkeypatch.setattr(subprocess, "run", ended)
    assert gpu.run_tests() == {"exit_code": 1, "last_lines": ["one", "two", "1 failed in 2 s"]}


def test_without_cuda_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "pick_device", lambda: CPU)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert "no CUDA device works here" in capsys.readouterr().err


def test_a_device_of_no_such_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "tpu"])
    assert ended.value.code == 2
    assert "--device: invalid choice: 'tpu'" in capsys.readouterr().err
