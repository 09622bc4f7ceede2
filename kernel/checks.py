"""Checks of what JSON files hold: each names the field, the value and what was expected."""

import difflib
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from kernel.faults import one_line, short
from kernel.files import retried

MAX_KNOWN = 24  # words of a list in a message
MAX_SIDE = 65_535  # pixels, the most of a JPEG


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    name, times = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 0)
    if times > 1:
        raise ValueError(f"{short(name)} is there {times} times")
    return dict(pairs)


@retried
def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise ValueError where the file is missing, or a name in it is twice."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        entries = json.loads(text, object_pairs_hook=_object_of)
    except FileNotFoundError as error:
        raise ValueError(one_line(error)) from None
    except (ValueError, RecursionError) as error:  # not JSON, not even UTF-8, or nested too deep
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: no JSON object, found a {type(entries).__name__}")
    return entries


def check_fields(entries: dict[str, Any], kind: type, where: str) -> None:
    """Raise ValueError for a field that a dataclass does not have, or one that it needs."""
    known = {each.name: each for each in fields(kind)}
    for key in entries:
        if key not in known:
            raise ValueError(f"{where}: unknown field {short(key)}; {nearest_of(key, known)}")
    for name, each in known.items():
        if each.default is MISSING and each.default_factory is MISSING and name not in entries:
            raise ValueError(f"{where}: lacks {name}")


def nearest_of(word: str, known: Iterable[str], most: int = 1) -> str:
    """Say which known words, `most` of them, are nearest to one, or list what is known."""
    known = list(known)
    close = difflib.get_close_matches(word.lower(), known, n=most)
    if close:
        return f"the nearest {'is' if len(close) == 1 else 'are'} {', '.join(close)}"
    more = ", …" if len(known) > MAX_KNOWN else ""
    return f"known are {', '.join(known[:MAX_KNOWN])}{more}"


def expect(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError unless a field's value is what was expected."""
    if not holds:
        raise ValueError(f"{name} {short(value)}, expected {expected}")


def is_whole(value: object, least: int | None = None) -> bool:
    """Whether a value is a whole number, which True is not, from `least` on."""
    return type(value) is int and (least is None or value >= least)


def is_number(value: object) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def is_text(value: object) -> bool:
    """Whether a value is text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def check_size(value: object, name: str = "image_size") -> None:
    """Raise ValueError unless a value is the (height, width) of something, or None."""
    sides = value if isinstance(value, tuple) else ()
    fits = len(sides) == 2 and all(is_whole(side, 1) and side <= MAX_SIDE for side in sides)
    expect(
        fits or value is None, name, value, f"[height, width], whole numbers from 1 to {MAX_SIDE:,}"
    )


def with_tuples(entries: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the entries with the lists among the fields `names` as tuples."""
    lists = {name for name in names if isinstance(entries.get(name), list)}
    return entries | {name: tuple(entries[name]) for name in lists}
