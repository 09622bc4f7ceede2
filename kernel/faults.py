"""What went wrong as one line: a file with its remedy, a value that is not too long."""

import contextlib
import difflib
import os
import reprlib
from pathlib import Path

MAX_LINE = 1000  # characters; what is longer is cut in the middle, its start and remedy stay

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 8

short = _REPR.repr  # a value as Python writes it, cut where it is long


def one_line(error: BaseException) -> str:
    """Return what an error says as one line, its kind where it says nothing."""
    named = isinstance(error, OSError) and error.filename is not None
    text = _file_fault(error) if named else str(error)
    text = " ".join(text.split()) or type(error).__name__
    if len(text) <= MAX_LINE:
        return text
    return f"{text[: MAX_LINE // 2]} … {text[-MAX_LINE // 2 + 3 :]}"


def _file_fault(error: OSError) -> str:
    """Say which file or folder an error of the system is about, and what to do."""
    path = error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file or folder; {_nearest_files(Path(path))}"
    if isinstance(error, IsADirectoryError):
        return f"{path}: a folder, expected a file; name the file in it"
    if isinstance(error, NotADirectoryError):
        return f"{path}: a file stands where a folder is expected; name a folder"
    if isinstance(error, PermissionError):
        return f"{path}: this user may not read or write it; change its permissions or name another"
    return f"{path}: {str(error.strerror).lower()}; correct the path or the option that gives it"


def _nearest_files(path: Path) -> str:
    """What the deepest folder of a path that is there has in the place of the missing name."""
    names, missing = list[str](), path.name
    for folder in path.absolute().parents:
        with contextlib.suppress(OSError):
            names = sorted(each.name for each in folder.iterdir() if each.name[0] != ".")
            break
        missing = folder.name
    close = difflib.get_close_matches(missing, names, n=3, cutoff=0.5) or names[:3]
    has = f"{folder} has {', '.join(close)}" if close else f"{folder} is empty"
    return f"{has}: correct the name or the option that gives it"
