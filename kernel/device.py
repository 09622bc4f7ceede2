"""The device: which one works, what memory of the host is kept, the copies to and fro."""

import ctypes
import functools
import sys
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from kernel.logs import log


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


def pick_device() -> torch.device:
    """CUDA where it works, else the CPU."""
    cuda = torch.device("cuda")
    return cuda if torch.cuda.is_available() and device_usable(cuda) else torch.device("cpu")


# --- memory of the host ---------------------------------------------------------------------------

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, for what is asked next.

    By itself it gives a pass's hundreds of MB back to the system, and gets the next pass's page by
    page. Other libraries than glibc have no such settings, and stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 2**30)  # bytes; above it a block of its own is mapped
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the most that an int can say


# --- copies ---------------------------------------------------------------------------------------


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # PyTorch's own


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; to a GPU from pinned memory, beside what it computes."""
    if device.type != "cuda":
        return tensor.to(device)
    stream, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copied = tensor.pin_memory().to(device, non_blocking=True)
    current.wait_stream(stream)
    copied.record_stream(current)  # its memory is not given away while it is read
    return copied


def to_host(tensor: Tensor) -> npt.NDArray[Any]:
    """Copy a tensor to the host: the only place where a run waits for its device."""
    return tensor.cpu().numpy()
