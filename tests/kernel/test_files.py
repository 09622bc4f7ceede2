"""Files that are written whole or not at all, or read once more; JSON has no NaN."""

import errno
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernel.files import MAX_AGAIN, check_place, json_text, retried, write_json


def test_a_mean_of_nothing_is_null() -> None:
    text = json_text({"dice": math.nan, "per_class": [0.5, math.inf], "name": "Größe"})
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found == {"dice": None, "per_class": [0.5, None], "name": "Größe"}
    assert "Größe" in text and text.endswith("}\n")


def test_a_name_that_is_no_utf_8_is_the_same_when_it_is_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    write_json(tmp_path / "run.json", {name: "Größe"})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {name: "Größe"}


def test_a_write_that_fails_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "scores.json"
    write_json(path, {"strips": 1})
    write = Path.write_text

    def fill_disk(self: Path, text: str, **named: Any) -> int:
        write(self, text[:3], **named)
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"strips": 2})
    assert json.loads(path.read_text()) == {"strips": 1}
    assert [each.name for each in path.parent.iterdir()] == ["scores.json"]  # and no half of one


def test_keys_are_sorted_where_that_is_asked_for() -> None:
    entries = {"b": {"y": 1, "x": 2}, "a": [3]}
    assert list(json.loads(json_text(entries))) == ["b", "a"]
    assert json_text(entries, sort_keys=True) == json_text({"a": [3], "b": {"x": 2, "y": 1}})


def test_a_place_that_nothing_can_be_written_to_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, named in (
        (tmp_path, tmp_path),
        (tmp_path / "file" / "a.json", tmp_path / "file"),
        (Path("/proc/a.json"), "/proc"),  # where nobody makes a file
    ):
        with pytest.raises(OSError, match=str(named)):
            check_place(path)
    for path in (tmp_path / "new" / "a.json", tmp_path / "file", Path(os.devnull)):
        check_place(path)
    assert not list((tmp_path / "new").iterdir())


def test_a_link_stays_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "there.json")
    write_json(tmp_path / "link.json", {"strips": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "there.json").read_text()) == {"strips": 1}
    write_json(Path(os.devnull), {"strips": 1})
    assert not Path(os.devnull).is_file()


# --- read once more -------------------------------------------------------------------------------


Tries = Callable[..., tuple[int, float]]


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> Tries:
    """Reads what fails some times, each after some seconds; returns its calls and all seconds."""
    now = [0.0]

    def wait(seconds: float) -> None:
        now[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=wait)
    monkeypatch.setattr("kernel.files.time", clock)
    monkeypatch.setattr("kernel.files._TRIED_AGAIN", itertools.count())

    def run(error: int, times: int, seconds: float = 0.0) -> tuple[int, float]:
        begun, calls = now[0], itertools.count(1)

        def read() -> tuple[int, float]:
            wait(seconds)
            if (call := next(calls)) <= times:
                raise OSError(error, os.strerror(error), "a.jpg")
            return call, now[0] - begun

        return retried(read)()

    return run


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT])
def test_what_a_network_mount_fails_to_read_for_a_moment_is_read_once_more(
    error: int, tries: Tries
) -> None:
    assert tries(error, 1) == (2, 5.0)
    with pytest.raises(OSError, match=os.strerror(error)):
        tries(error, 2)


@pytest.mark.parametrize("error", [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOMEM])
def test_what_would_fail_again_is_not_read_again(error: int, tries: Tries) -> None:
    with pytest.raises(OSError, match=os.strerror(error)):
        tries(error, 1)


def test_a_read_that_hung_before_it_failed_is_not_tried_again(
    tries: Tries,
) -> None:
    """The second would take as long."""
    assert tries(errno.ETIMEDOUT, 1, 4.0) == (2, 13.0)
    with pytest.raises(OSError, match="timed out"):
        tries(errno.ETIMEDOUT, 1, 6.0)


def test_a_mount_that_is_gone_is_not_waited_for_for_ever(
    tries: Tries,
) -> None:
    for _ in range(MAX_AGAIN):
        assert tries(errno.ENOTCONN, 1) == (2, 5.0)
    with pytest.raises(OSError, match="not connected"):
        tries(errno.ENOTCONN, 1)
