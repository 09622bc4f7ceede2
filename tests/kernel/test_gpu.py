"""On a CUDA machine: batches, processes, memory and the early exit change next to nothing.

`make gpu` runs them; elsewhere they are skipped. A GPU's libraries promise no bits, so masks may
differ in a few pixels where another batch or another process rounds apart.
"""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from helpers import (
    CLASSES,
    SMALL,
    decode_by_hand,
    predict,
    read_submission,
    save_strips,
)
from oracle import mean_by_hand, threshold_of
from torch import Tensor

from kernel.ensemble import Ensemble

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

NAMES = [f"{index}.png" for index in range(10)]
FEW = 1e-3  # share of pixels


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strips")
    save_strips(folder, NAMES)
    return folder


def masks_of(bundle: Path, images: Path, output: Path, **options: Any) -> np.ndarray:
    """Masks (strips, classes, H, W) that a run writes; it runs on the GPU, and no strip fails.

    In this process, unless told otherwise: patches and logs reach no other.
    """
    record = predict(bundle / "dataset", images, output, **{"workers": 1} | options)
    assert not record["faults"]
    assert record["device"] == "cuda"
    rows = read_submission(output)
    masks = [decode_by_hand(rle, SMALL) for rle in rows.values()]
    return np.array(masks).reshape(len(NAMES), CLASSES, *SMALL)


@pytest.fixture(scope="module")
def batched(tiny_bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the defaults give."""
    return masks_of(tiny_bundle, images, tmp_path_factory.mktemp("batched") / "out.csv")


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert 0.02 < expected.mean() < 0.98
    assert np.mean(found != expected) < FEW


def test_the_masks_are_those_that_plain_pytorch_has_on_the_cpu(
    tiny_bundle: Path, images: Path, batched: np.ndarray
) -> None:
    dataset, threshold = tiny_bundle / "dataset", threshold_of(tiny_bundle / "dataset")
    greys = [cv2.imread(str(images / name), cv2.IMREAD_GRAYSCALE) for name in NAMES]
    expected = np.stack([mean_by_hand(dataset, np.asarray(grey)) > threshold for grey in greys])
    assert_close(batched, expected)


def test_every_member_runs_in_fp16_and_none_on_plain_pytorch(
    tiny_bundle: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masks_of(tiny_bundle, images, tmp_path / "out.csv")
    assert "runs on plain PyTorch" not in caplog.text


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 1}, {"early_exit": False}, {"workers": 2}],
    ids=["one by one", "every pass", "two processes"],
)
def test_the_masks_are_those_of_the_defaults(
    options: dict[str, Any],
    tiny_bundle: Path,
    images: Path,
    batched: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # two processes share the first GPU
    assert_close(masks_of(tiny_bundle, images, tmp_path / "out.csv", **options), batched)


def test_a_gpu_that_is_full_gets_smaller_batches(
    tiny_bundle: Path,
    images: Path,
    batched: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_encoder = Ensemble.run_encoder

    def hungry(ensemble: Ensemble, pass_id: int, batch: Tensor) -> tuple[Tensor, ...]:
        if len(batch) > 2:
            torch.empty(2**46, device=batch.device)  # 281 TB
        return run_encoder(ensemble, pass_id, batch)

    monkeypatch.setattr(Ensemble, "run_encoder", hungry)
    assert_close(masks_of(tiny_bundle, images, tmp_path / "out.csv", batch_size=8), batched)
    assert "out of memory: 2 strips of " in caplog.text
