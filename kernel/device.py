"""The device: which one works, how many GPUs there are, what memory is kept, host copies."""

import ctypes
import functools
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from kernel.logs import log

GPU_LOST = 3  # exit code of a worker whose GPU runs nothing any more


class DeviceLost(RuntimeError):
    """The GPU runs nothing any more."""


def device_usable(device: torch.device) -> bool:
    """Whether one real operation runs; Kaggle's P100 is available and fails its first."""
    try:
        half = torch.float16 if device.type == "cuda" else torch.float32
        ones = torch.ones(1, 1, 8, 8, device=device, dtype=half)
        torch.nn.functional.conv2d(ones, ones[:, :, :3, :3]).sum().item()
    except Exception as error:  # a failed device must not cost the submission
        log.warning("%s fails one small convolution: %s", device, error)
        return False
    return True


# Of an error that is no OutOfMemoryError: the CPU's, cuDNN's, those of cuDNN's benchmark where no
# algorithm has room, and of cuDNN and cuBLAS where they have none to begin with. Of a GPU that is
# broken they may say the same: where one strip alone fails the device is tried.
NO_MEMORY = (
    "out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED",
    "unable to find an engine", "STATUS_NOT_INITIALIZED", "STATUS_INTERNAL_ERROR",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small for what raised this error, a GPU's or the host's."""
    text = str(error)
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)
    )


def pick_device() -> torch.device:
    """CUDA where it works, else the CPU."""
    cuda = torch.device("cuda")
    return cuda if torch.cuda.is_available() and device_usable(cuda) else torch.device("cpu")


def free_memory(device: torch.device) -> float:
    """Return the bytes of a GPU that are free, in PyTorch's cache too; a CPU's have no bound."""
    if device.type != "cuda":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    index = device.index or 0  # PyTorch 2.3 takes no device without one
    return torch.cuda.mem_get_info(index)[0] + cached


# --- how many GPUs --------------------------------------------------------------------------------

DRIVER_S = 30.0  # that NVIDIA's driver may take to answer: what takes longer hangs


@functools.cache
def count_gpus() -> int:
    """Return how many GPUs there are; whether PyTorch can use them a worker finds out.

    CUDA is not initialised. A driver that hangs would hold whatever asks it, even beyond a kill: so
    another process asks first.
    """
    try:
        quiet = subprocess.DEVNULL
        look = subprocess.Popen(["nvidia-smi", "-L"], stdout=quiet, stderr=quiet)
    except OSError:  # there is no such command, as on AMD's GPUs
        return torch.cuda.device_count()
    try:
        look.wait(DRIVER_S)
    except subprocess.TimeoutExpired:
        log.warning("nvidia-smi does not answer in %.0f s: the first GPU is tried", DRIVER_S)
        look.kill()
        with suppress(subprocess.TimeoutExpired):  # it is stuck in the system
            look.wait(1)
        return 1
    return torch.cuda.device_count()


# --- memory of the host ---------------------------------------------------------------------------

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt
# A block of more bytes is mapped alone, and given back to the system when it is freed:
MAPPED_BY_DEFAULT, MAPPED_AT_MOST = 2**17, 2**30  # glibc's own; so that a pass's memory is kept


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc: others have no such settings, and stay as they are."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None


def share_freed_memory() -> None:
    """Have threads to come allocate from one heap: what one frees, the others can use.

    Heaps of threads before stay in use, and after a few of these it changes nothing.
    """
    if glibc := _glibc():
        glibc.mallopt(M_ARENA_MAX, 1)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed from here on, for what is asked next.

    What is free already goes back first. By itself glibc gives a pass's hundreds of MB back to the
    system, and gets the next pass's page by page.
    """
    if glibc := _glibc():
        glibc.malloc_trim(0)
        glibc.mallopt(M_MMAP_THRESHOLD, MAPPED_AT_MOST)
        glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the most that an int can say


@contextmanager
def lasting_memory() -> Iterator[None]:
    """Allocate what stays for good apart from what comes and goes, and give its scraps back.

    Among what a pass frees it would leave holes that fit no other pass.
    """
    glibc = _glibc()
    if glibc:
        glibc.mallopt(M_MMAP_THRESHOLD, MAPPED_BY_DEFAULT)
    try:
        yield
    finally:
        if glibc:
            glibc.mallopt(M_MMAP_THRESHOLD, MAPPED_AT_MOST)
            glibc.malloc_trim(0)


# --- the copy to the host -------------------------------------------------------------------------


def to_host(tensor: Tensor) -> npt.NDArray[Any]:
    """Copy a tensor to the host: the only place where a run waits for its device."""
    return tensor.cpu().numpy()
