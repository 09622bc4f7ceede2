"""The log; progress: a bar where somebody watches, lines where nobody does, none if short."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tqdm
from helpers import ROOT, run_script

from kernel.logs import progress


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What tqdm is asked for; its intervals are cut to hundredths, so that a test can wait."""
    real, known = tqdm.tqdm, dict[str, Any]()

    def hasty(*arguments: Any, **options: Any) -> Any:
        known.update(options)
        for name in ("mininterval", "maxinterval", "delay"):
            options[name] = options.get(name, 0.1) / 100
        return real(*arguments, **options)

    monkeypatch.setattr("kernel.logs.tqdm", hasty)
    return known


def test_in_a_log_progress_is_whole_lines_with_rate_and_remaining_time(
    asked: dict[str, Any], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    with progress(["a"] * 8, "strips", "strip") as bar:
        for _ in range(8):
            time.sleep(0.1)
            bar.update()
    lines = caplog.messages
    assert 2 <= len(lines) <= 8  # 0.8 seconds or more, one line in 0.3
    assert all(line.startswith("strips: ") and " of 8, " in line for line in lines)
    assert all(line.endswith(" left") and "strip/s" in line for line in lines)
    assert lines[-1].startswith("strips: 8 of 8")
    assert not any({"\r", "\n"} & set(line) for line in lines)
    assert capfd.readouterr().err == ""
    assert (asked["mininterval"], asked["delay"]) == (30, 2)


def test_what_is_short_shows_nothing(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    assert list(progress(map(str, range(3)), "strips", "strip", 3)) == ["0", "1", "2"]
    assert not caplog.messages
    assert capfd.readouterr().err == ""


def test_in_a_terminal_progress_is_a_bar(
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in progress(range(4), "strips", "strip"):
        time.sleep(0.05)
    assert "\rstrips: 100%|" in capsys.readouterr().err
    assert not caplog.messages
    assert asked["delay"] == 2


# --- where the log goes ---------------------------------------------------------------------------

PRINTS = """
import sys
from kernel.command import run_command
from kernel.logs import log
def main():
    for _ in range(20000):
        log.info("mean → 0.55 × \\udce4")
        {also}
    open("done", "w").close()
    return 0
run_command(main)
"""


@pytest.mark.parametrize("also", ["pass", "print('×')"])
def test_a_terminal_of_ascii_alone_stops_nothing(also: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PRINTS.format(also=also).replace("20000", "2"), encoding="utf-8")
    done = run_script(script, cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2192" in done.stdout


@pytest.mark.parametrize("shell", ["{run} | head -n 1", "{run} >&-"])
def test_a_log_that_nobody_reads_any_more_stops_no_run(shell: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PRINTS.format(also="pass"), encoding="utf-8")
    command = shell.format(run=f"PYTHONPATH={ROOT} {sys.executable} {script}")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert (tmp_path / "done").exists()
