"""Several processes: the same submission as one, also where one of them dies."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import kernel_script

from kernel.mounts import Task
from kernel.rows import LAYOUTS


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(5):
        grey = np.random.default_rng(seed).integers(0, 255, (64, 96), np.uint8)
        cv2.imwrite(str(folder / f"{seed}.png"), cv2.GaussianBlur(grey, (0, 0), 4))
    (folder / "3.png").write_bytes(b"")
    return folder


def ran(
    bundle: Path, images: Path, folder: Path, *options: str, **environment: str
) -> tuple[bytes, dict[str, Any], str]:
    """The script as a process: its submission, its report, its log."""
    folder.mkdir()
    command = [
        sys.executable,
        str(kernel_script()),
        "--bundle",
        str(bundle),
        "--images",
        str(images),
    ]
    ended = subprocess.run(
        [*command, "--report", "run.json", *options],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((folder / "run.json").read_text())
    return (folder / "submission.csv").read_bytes(), report, ended.stdout


def test_two_workers_write_what_one_process_writes(
    tiny_bundle: Path, images: Path, tmp_path: Path
) -> None:
    one, told, _ = ran(tiny_bundle / "dataset", images, tmp_path / "one")
    two, told_two, log = ran(tiny_bundle / "dataset", images, tmp_path / "two", "--workers", "2")
    assert one == two
    assert one.count(b"\n") == 1 + 5 * 4
    assert told["non_empty"] > 0
    assert (told["workers"], told_two["workers"]) == (1, 2)
    for key in ("strips", "rows", "non_empty", "work", "device", "share"):
        assert told_two[key] == told[key]
    assert list(told["faults"]) == list(told_two["faults"]) == ["3.png"]
    assert "3.png stays empty" in log
    assert told_two["stages"].keys() == told["stages"].keys()


DIES = """
import os, sys
if "--shard" in sys.argv and sys.argv[sys.argv.index("--shard") + 1] == "2/2":
    os.kill(os.getpid(), 9)
"""


def test_a_worker_that_dies_costs_no_row(tiny_bundle: Path, images: Path, tmp_path: Path) -> None:
    whole, _, _ = ran(tiny_bundle / "dataset", images, tmp_path / "one")
    (tmp_path / "sitecustomize.py").write_text(DIES, encoding="utf-8")
    found, report, log = ran(
        *(tiny_bundle / "dataset", images, tmp_path / "two", "--workers", "2"),
        PYTHONPATH=str(tmp_path),
    )
    assert found == whole
    assert "worker 2 of 2 ended with exit code -9: its 2 images run here" in log
    assert report["strips"] == 5


def test_shards_hold_every_image_once() -> None:
    pairs = [(f"{number}.jpg", label) for number in range(7) for label in (1, 2)]
    task = Task(Path(), LAYOUTS["2019"], pairs)
    shards = [task.shard(index, 3) for index in range(3)]
    assert [len(shard.names) for shard in shards] == [3, 2, 2]
    assert sorted(pair for shard in shards for pair in shard.pairs) == sorted(pairs)
