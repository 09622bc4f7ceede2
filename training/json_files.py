"""JSON files of figures."""

import json
import os
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
