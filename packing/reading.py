"""A checkpoint's file → what it holds, read without running its code; what is none is named."""

import argparse
import difflib
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from kernel.members import read_entry

PRETRAINED_FILES = ("model.safetensors", "pytorch_model.bin")  # of save_pretrained, new and old
SHARD = re.compile(r"(?:pytorch_)?model-\d{5}-of-(?!00001\b)\d{5}\.")  # one file of several
SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
SAVE_WEIGHTS = (
    "where it was trained, save the weights alone: torch.save(network.state_dict(), 'member.pt')"
)

SEVERAL_FILES = (
    "weights in several files; save them in one, save_pretrained(..., max_shard_size='100GB')"
)

# Beside the weights: numpy's numbers and arrays, under numpy 2's names and numpy 1's, timm's
# arguments, and paths, under the names that Python 3.13 gives them and those before.
SCALAR, ARRAY = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
PLAIN_DATA: list[Any] = [argparse.Namespace, np.dtype, np.ndarray]
PLAIN_DATA += [
    (PurePath, f"{module}.{name}")
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
]
PLAIN_DATA += [SCALAR, (SCALAR, "numpy.core.multiarray.scalar")]
PLAIN_DATA += [ARRAY, (ARRAY, "numpy.core.multiarray._reconstruct")]
PLAIN_DATA += [type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "u1", "u4", "?")]

# What a file is by its first bytes, and what to do.
MAGIC = {
    b"version https://git-lfs": "a git LFS pointer, not the file: run git lfs pull",
    b"\x1f\x8b": "compressed by gzip: unpack it, and name what comes out in `file`",
    b"BZh": "compressed by bzip2: unpack it, and name what comes out in `file`",
    b"\xfd7zXZ": "compressed by xz: unpack it, and name what comes out in `file`",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it, and name what comes out in `file`",
    b"7z\xbc\xaf": "a 7z archive: unpack it, and name what comes out in `file`",
    b"Rar!": "a rar archive: unpack it, and name what comes out in `file`",
    b"\x89HDF": f"HDF5, as Keras saves: {SAVE_WEIGHTS}",
    b"\x93NUMPY": f"an array of numpy: {SAVE_WEIGHTS}",
    b"\0" * 64: "zeros where a checkpoint begins: the copy failed, copy it once more",
}


# --- which file -----------------------------------------------------------------------------------


def weights_file(path: Path) -> Path:
    """Return the file that holds the weights: `path`, or inside a `save_pretrained` folder."""
    if not path.is_dir():
        return path
    found = [path / name for name in PRETRAINED_FILES if (path / name).is_file()]
    return found[0] if found else path / PRETRAINED_FILES[0]


def no_such_checkpoint(path: Path) -> str:
    """Say that a file is missing, and which checkpoint beside it is meant."""
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    names = [each.name for each in beside if each.suffix in SUFFIXES and each.is_file()]
    same = [name for name in names if Path(name).stem in (path.name, path.stem)]
    close = same or difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    nearest = f"beside it: {', '.join(close or names[:3])}; " if names else ""
    if (path.parent / "data.pkl").is_file():
        return f"{path.parent}: a checkpoint that was unpacked: copy the file itself once more"
    index = {f"{name}.index.json" for name in PRETRAINED_FILES}
    parts = any(each.name in index or SHARD.match(each.name) for each in beside)
    if parts and path.name in PRETRAINED_FILES:
        return f"{path.parent}: {SEVERAL_FILES}"
    return f"{path}: no such checkpoint; {nearest}copy it there, train it or correct `file`"


# --- what it is -----------------------------------------------------------------------------------


def _looks_like_safetensors(head: bytes) -> bool:
    """Eight bytes with the header's length, then the header's JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def _text_fault(head: bytes) -> str:
    """What a text is that stands where a checkpoint belongs; nothing where it is no text."""
    try:
        text = head[:256].decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return ""
    if not text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
        return ""
    if text.startswith("<"):
        return "a web page, not the file: download it once more, signed in where that is asked"
    return f"a text that begins {text[:40]!r}: copy the checkpoint there"


def _zip_fault(path: Path) -> str:
    """What a zip is that torch.save did not write; nothing for one that it wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return ""  # cut short: PyTorch says so
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "a TorchScript program: torch.save(torch.jit.load(path).state_dict(), 'member.pt') "
            "makes a checkpoint of it"
        )
    if any(name.count("/") == 1 and name.endswith("/data.pkl") for name in names):
        return ""
    if any(name.endswith("archive_format") for name in names):
        return f"a program of torch.export: {SAVE_WEIGHTS}"
    if any(name.endswith((".npy", ".h5")) for name in names):
        return f"a zip of {', '.join(names[:3])}, which is no file of PyTorch: {SAVE_WEIGHTS}"
    return f"a zip of {', '.join(names[:3])}: unpack it, and name the checkpoint in `file`"


def _kind_fault(path: Path, head: bytes) -> str:
    """What a file is that is no checkpoint of PyTorch; nothing where it may be one."""
    if not head.strip():
        return "an empty file: copy it once more"
    known = [fault for magic, fault in MAGIC.items() if head.startswith(magic)]
    if known:
        return known[0]
    if head.startswith(b"PK\x03\x04"):
        return _zip_fault(path)
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it, and name the checkpoint in `file`"
    if head.startswith(b"\x80"):  # a pickle
        return ""
    return _text_fault(head) or f"no file of torch.save or safetensors: {SAVE_WEIGHTS}"


# --- what a refused pickle is ---------------------------------------------------------------------

NETWORK = re.compile(r"segmentation_models_pytorch\.|torch\.nn\.(?!parameter)|torch\.fx\.")


def _pickle_fault(refusal: str) -> str:
    """Why PyTorch's safe reader refuses a pickle, by its words, and what to do."""
    found = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", refusal)
    if not found:
        return (
            "no checkpoint that can be read, saved with another pickle_protocol than torch.save's "
            f"own, or damaged; {SAVE_WEIGHTS}"
        )
    name = found[1]
    what = "a whole network, pickled" if NETWORK.match(name) else "no plain state_dict"
    return f"refused, it is {what}, and unpickling it could run code ({name}); {SAVE_WEIGHTS}"


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """What a checkpoint's file holds."""

    tree: object  # nested dictionaries and lists with tensors in them
    member: dict[str, Any]  # the entry of a manifest in a safetensors header, as training writes it


def read_header(path: Path) -> dict[str, Any]:
    """Return the entry of a manifest in a safetensors header; nothing of a file that has none."""
    try:
        return read_entry(path)
    except ValueError:
        return {}


def _read_safetensors(path: Path) -> Content:
    return Content(load_file(path), read_header(path))


def _read_pickle(path: Path) -> Content:
    with (
        warnings.catch_warnings(),
        torch.serialization.safe_globals(PLAIN_DATA),
        path.open("rb") as file,  # by its name PyTorch would take another reader
    ):
        warnings.simplefilter("ignore")  # of protocols: an error says it in words
        return Content(torch.load(file, map_location="cpu", weights_only=True), {})


def read_content(path: Path) -> Content:
    """Read a .safetensors, .pt, .pth, .ckpt or .bin file by its content, whatever its suffix.

    Raises:
        ValueError: it is missing, damaged, no checkpoint, or could run code; says which.
    """
    if SHARD.match(path.name):
        raise ValueError(f"{path}: {SEVERAL_FILES}")
    try:
        with path.open("rb") as file:
            head = file.read(512)
        if _looks_like_safetensors(head):
            return _read_safetensors(path)
        fault = _kind_fault(path, head)
        if not fault:
            return _read_pickle(path)
    except FileNotFoundError:
        raise ValueError(no_such_checkpoint(path)) from None
    except pickle.UnpicklingError as error:
        fault = _pickle_fault(str(error))
    except Exception as error:  # a damaged file raises whatever it likes
        reason = re.split(r"\n|\. ", str(error))[0] or repr(error)  # PyTorch guesses on and on
        reason = "" if "weights_only" in reason else f": {reason}"  # no advice to run its code
        fault = f"no checkpoint that can be read{reason}; copy it once more"
        if "magic number" in reason:
            fault = f"a pickle that torch.save did not write: {SAVE_WEIGHTS}"
    raise ValueError(f"{path}: {fault}")
