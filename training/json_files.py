"""JSON files of figures."""

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def to_json(entries: Any) -> str:
    """Return entries as a JSON text.

    NaN, a mean of nothing, which JSON does not have, is null; bytes of a name that are no UTF-8 are
    escaped.
    """
    plain = json.loads(json.dumps(entries), parse_constant=lambda _: None)
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace").decode()


def check_place(path: Path) -> None:
    """Try the folder that a file is to be written to after long work; make it where it lacks.

    Raises:
        OSError: nothing can be written there, or the path is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        return  # a device, which `write_json` writes to
    folder = Path(os.path.realpath(path)).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_json(path: Path, entries: Any) -> None:
    """Write `to_json` of entries; a kill leaves the file that was there."""
    if path.exists() and not path.is_file():  # a device is not to be replaced
        path.write_text(to_json(entries), encoding="utf-8")
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(to_json(entries), encoding="utf-8")
    part.replace(path)
