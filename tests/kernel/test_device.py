"""The device: what a run on the CPU does with memory that it has freed."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

FAULTS = """
import resource
from pathlib import Path

import torch

from kernel.ensemble import load_ensemble
from kernel.logs import Stages
from kernel.manifest import load_manifest


def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(32 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


bundle = Path({bundle!r})
load_ensemble(bundle, load_manifest(bundle), torch.device("cpu"), Stages())
print(min(faults() for _ in range(5)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_memory_that_a_pass_frees_is_there_for_the_next(session_light: Path) -> None:
    """128 MB are 32,768 pages: by itself each of them is asked of the system every time.

    The least of five counts, for what else is allocated may lie in the way once.
    """
    words = [sys.executable, "-c", FAULTS.format(bundle=str(session_light))]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(found.stdout.split()[-1]) < 1000
