"""What went wrong as one line: a file with its remedy, a value that is not too long."""

import contextlib
import difflib
import reprlib
from pathlib import Path

MAX_LINE = 1000  # characters; what is longer is cut in the middle, its start and remedy stay

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 8

short = _REPR.repr  # a value as Python writes it, cut where it is long


def one_line(error: BaseException) -> str:
    """Return what an error says as one line, its kind where it says nothing."""
    file = error.filename if isinstance(error, OSError) else None
    text = str(error) if file is None else _file_fault(error, str(file))
    text = " ".join(text.split()) or type(error).__name__
    if len(text) <= MAX_LINE:
        return text
    return f"{text[: MAX_LINE // 2]} … {text[-MAX_LINE // 2 + 3 :]}"


def _file_fault(error: BaseException, path: str) -> str:
    """Say what is wrong with a file or folder by an error of the system, and what to do."""
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file or folder; {_nearest_files(Path(path))}"
    if isinstance(error, IsADirectoryError):
        return f"{path}: a folder, expected a file; name the file in it"
    if isinstance(error, NotADirectoryError):
        return f"{path}: a file stands where a folder is expected; name a folder"
    if isinstance(error, PermissionError):
        return f"{path}: this user may not read or write it; change its permissions or name another"
    fault = str(getattr(error, "strerror", error)).lower()
    return f"{path}: {fault}; correct the path or the option that gives it"


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
