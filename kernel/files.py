"""Files that are written whole or not at all, or read once more; and JSON."""

import contextlib
import errno
import functools
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from kernel.logs import log

P = ParamSpec("P")
R = TypeVar("R")

# Of a network mount that fails for a moment:
TRANSIENT = {errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT}
AGAIN_S = 5.0  # after which a read that failed so is tried once more
SLOW_S = 5.0  # what took longer hung, and would again
MAX_AGAIN = 60  # such reads of a process: a mount that is gone would take the run's time
_TRIED_AGAIN = itertools.count()


def retried(read: Callable[P, R]) -> Callable[P, R]:
    """Return a function that reads, once more where a network mount fails for a moment."""

    @functools.wraps(read)
    def read_again(*args: P.args, **kwargs: P.kwargs) -> R:
        begun = time.monotonic()
        try:
            return read(*args, **kwargs)
        except OSError as error:
            slow = time.monotonic() - begun > SLOW_S
            if error.errno not in TRANSIENT or slow or next(_TRIED_AGAIN) >= MAX_AGAIN:
                raise
            log.warning("%s: read once more in %.0f s", error, AGAIN_S)
        time.sleep(AGAIN_S)
        return read(*args, **kwargs)

    return read_again


@contextmanager
def replacing(path: Path, follow: bool = True) -> Iterator[Path]:
    """A place beside `path` to write to: moved there in the end, removed where the block fails.

    A reader, or a kill at any moment, finds the old file or the new one. A link stays and its
    target is replaced, or without `follow` the link itself. A device is written to as it is.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path)) if follow else path
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is what counts
            part.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all; bytes of a name that are no UTF-8 stay what they are."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def json_text(entries: Any, sort_keys: bool = False) -> str:
    """Return entries as a JSON text.

    NaN, a mean of nothing, which JSON does not have, is null; bytes of a name that are no UTF-8 are
    escaped.
    """
    plain = json.loads(json.dumps(entries), parse_constant=lambda _: None)
    text = json.dumps(plain, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace").decode()


def write_json(path: Path, entries: Any, sort_keys: bool = False) -> None:
    """Write `json_text` of entries whole or not at all; make its folder where it lacks."""
    Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json_text(entries, sort_keys))


def check_place(path: Path) -> None:
    """Try the folder that a file is to be written to after long work; make it where it lacks.

    Raises:
        OSError: nothing can be written there, or the path is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        return  # a device, which is written to as it is
    folder = Path(os.path.realpath(path)).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
