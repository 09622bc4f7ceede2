"""The device: how many GPUs, what memory is free, what a run on the CPU does with what it freed."""

import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CPU, ROOT

from kernel.device import count_gpus, free_memory

FAULTS = """
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kernel.device import lasting_memory
from kernel.ensemble_loading import load_ensemble
from kernel.stages import Stages
from kernel.manifest import load_manifest


def faults(mib: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mib << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


bundle = Path({bundle!r})
load_ensemble(bundle, load_manifest(bundle), torch.device("cpu"), Stages(), None)
{then}
"""

LEAST = (
    "print(min(faults(128) for _ in range(5)))"  # what else is allocated may lie in the way once
)

glibc_only = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc has these settings"
)


def after_loading(bundle: Path, *then: str) -> list[int]:
    """What some lines print, a number each, in a process that has loaded an ensemble."""
    words = [sys.executable, "-c", FAULTS.format(bundle=str(bundle), then="\n".join(then))]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return [int(line) for line in found.stdout.split()[-len(then) :]]


@glibc_only
def test_what_lasts_lies_apart_and_memory_that_a_pass_frees_is_there_for_the_next(
    session_light: Path,
) -> None:
    """128 MiB are 32,768 pages: by itself each of them is asked of the system every time."""
    apart = f"with lasting_memory():\n    {LEAST}"
    lasting, freed = after_loading(session_light, apart, LEAST)
    assert lasting > 10_000 and freed < 1000


@glibc_only
def test_memory_that_a_thread_frees_is_there_for_another(session_light: Path) -> None:
    """32 MiB, 8,192 pages: a new thread with a heap of its own would ask for them."""
    lines = "[faults(128), faults(128)]\nprint(ThreadPoolExecutor(1).submit(faults, 32).result())"
    [found] = after_loading(session_light, lines)
    assert found < 1000


HEAPS = """
import ctypes
from threading import Barrier, Thread

from kernel import inference

libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p


def run(*_: object) -> int:
    both = Barrier(3)
    for _ in range(2):
        Thread(target=lambda: (libc.malloc(1000), both.wait())).start()
    both.wait()
    file = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
    libc.malloc_info(0, file)
    libc.fclose(file)
    return 0


inference.run_options = run
inference.main([])
"""


@glibc_only
def test_a_run_has_one_heap_before_its_first_thread() -> None:
    """Those that threads take before it is limited would keep what they free."""
    words = [sys.executable, "-c", HEAPS]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.count("<heap nr=") == 1


def nvidia_smi(folder: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the command be a shell's one line."""
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("line", ["", "exit 9"], ids=["as it should", "with an error"])
def test_the_gpus_are_those_that_pytorch_names_where_the_driver_answers(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, line, monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert count_gpus.__wrapped__() == 2


def test_the_gpus_are_those_that_pytorch_names_where_no_driver_can_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert count_gpus.__wrapped__() == 2


def test_a_driver_that_hangs_is_left_to_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What asked it would hang, too."""
    nvidia_smi(tmp_path, "exec sleep 60", monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("hangs"))
    monkeypatch.setattr("kernel.device.DRIVER_S", 0.1)
    assert count_gpus.__wrapped__() == 1


def test_what_pytorch_holds_unused_of_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (100 + index, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    assert free_memory(torch.device("cuda")) == 130
    assert free_memory(torch.device("cuda:1")) == 131
    assert free_memory(CPU) == math.inf
