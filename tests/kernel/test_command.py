"""The boundary of every command: one line and an exit code for whatever ends it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, error_of

from kernel.command import run_command


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def code_of(error: BaseException | None, code: int = 0) -> int:
    """The exit code of a command that raises, or returns `code`."""

    def main() -> int:
        if error:
            raise error
        return code

    try:
        run_command(main)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.mark.parametrize("code", [0, 1])
def test_what_a_command_returns_is_its_exit_code(
    code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(None, code) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ValueError("a\n  b"), OSError("a b")])
def test_bad_input_is_code_2_and_one_line_on_stderr(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(error) == 2
    out, err = capsys.readouterr()
    assert (out, error_of(err)) == ("", "a b")


def test_what_is_no_bad_input_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        code_of(KeyError("a bug"))


def test_a_reader_that_has_gone_is_no_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(BrokenPipeError()) == 1
    assert capsys.readouterr().err == ""


SIGNALLED = """
import os, sys, time
from kernel.command import run_command

def main():
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(1)  # ended at once by the signal
    return 0

run_command(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_code_130_and_one_line_even_where_the_shell_ignores_it(
    number: signal.Signals,
) -> None:
    ignoring = 'trap "" INT TERM; exec "$0" -c "$1" "$2"'
    done = subprocess.run(
        ["sh", "-c", ignoring, sys.executable, SIGNALLED, str(int(number))],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_interrupt_may_say_what_it_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(KeyboardInterrupt("out.csv is whole")) == 130
    assert capsys.readouterr().err == "interrupted: out.csv is whole\n"


CLOSED = """
import os, sys
from kernel.command import run_command

def main():
    with open(sys.argv[1], "w") as file:
        os.write(1, b"as a library prints, and no part of the file")
        file.write("the file")
    raise ValueError("a name: \\udce4")

run_command(main)
"""


def test_a_closed_stdout_and_a_name_that_is_no_utf_8_cost_nothing(tmp_path: Path) -> None:
    """The next file that is opened gets the number of stdout, and would get what is printed."""
    (tmp_path / "script.py").write_text(CLOSED, encoding="utf-8")
    shell = 'exec "$0" script.py out.txt >&-'
    done = subprocess.run(
        ["sh", "-c", shell, sys.executable],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert error_of(done.stderr) == "a name: \\udce4"
    assert (tmp_path / "out.txt").read_text() == "the file"
