"""The device: what memory is free, and what a run on the CPU does with what it has freed."""

import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CPU, ROOT

from kernel.device import free_memory, gpu_supported

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


def after_loading(bundle: Path, then: str) -> int:
    """What some lines print in a process that has loaded an ensemble."""
    words = [sys.executable, "-c", FAULTS.format(bundle=str(bundle), then=then)]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(found.stdout.split()[-1])


@glibc_only
def test_memory_that_a_pass_frees_is_there_for_the_next(session_light: Path) -> None:
    """128 MiB are 32,768 pages: by itself each of them is asked of the system every time."""
    assert after_loading(session_light, LEAST) < 1000


@glibc_only
def test_memory_that_a_thread_frees_is_there_for_another(session_light: Path) -> None:
    """32 MiB, 8,192 pages: a new thread with a heap of its own would ask for them."""
    lines = "[faults(128), faults(128)]\nprint(ThreadPoolExecutor(1).submit(faults, 32).result())"
    assert after_loading(session_light, lines) < 1000


@glibc_only
def test_what_lasts_lies_apart_and_after_it_memory_is_kept_again(session_light: Path) -> None:
    apart = f"with lasting_memory():\n    {LEAST}"
    assert after_loading(session_light, apart) > 10_000
    assert after_loading(session_light, f"{apart}\n{LEAST}") < 1000


@pytest.mark.parametrize(
    ("capability", "built_for", "supported"),
    [
        ((7, 5), ["sm_70", "sm_75", "sm_90"], True),
        ((8, 9), ["sm_75", "sm_86", "sm_90a", "sm_120", "compute_120"], True),
        ((6, 0), ["sm_70", "sm_75", "sm_120", "compute_120"], False),
        ((9, 0), ["gfx90a"], False),
        (RuntimeError("no driver"), ["sm_70"], False),
        (AssertionError("Torch not compiled with CUDA enabled"), [], False),
        (torch.cuda.DeferredCudaCallError("CUDA call failed lazily"), ["sm_70"], False),
        ((7, 5), ["sm_next"], False),
    ],
)
def test_a_gpu_is_supported_where_pytorch_has_code_for_one_no_newer(
    capability: tuple[int, int] | Exception,
    built_for: list[str],
    supported: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def capability_of() -> tuple[int, int]:
        if isinstance(capability, Exception):
            raise capability
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability_of)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    assert gpu_supported() == supported


def test_what_pytorch_holds_unused_of_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (100 + index, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    assert free_memory(torch.device("cuda")) == 130
    assert free_memory(torch.device("cuda:1")) == 131
    assert free_memory(CPU) == math.inf
