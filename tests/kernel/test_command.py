"""The boundary of every command: one line and an exit code for whatever ends it."""

import importlib
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import ROOT, error_of, exit_code, save_strips, write_sample

import build_kernel
from evaluation import calibrate, score, validate
from kernel import inference
from kernel.command import needs, run_command, split_line
from kernel.faults import MAX_LINE, one_line
from kernel.kaggle import SCORED_RUN
from training import folds, train


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


CHILD = """
import signal, sys
from kernel.command import end_with_parent
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("interrupted", flush=True)))
signal.alarm(30)  # it is no orphan for ever
end_with_parent()
print("ready", flush=True)
signal.pause()
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell a process no such thing")
def test_a_process_is_interrupted_when_its_parent_is_killed() -> None:
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout and parent.stdout.readline() == "ready\n"
        parent.kill()
        assert parent.stdout.read() == "interrupted\n"


def test_a_missing_extra_ends_with_one_line_that_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended, needs("training"):
        importlib.import_module("no_such_module")
    assert ended.value.code == 2
    line = "No module named 'no_such_module'; pip install -e '.[training]'"
    assert error_of(capsys.readouterr().err) == line
    with needs("training"):
        importlib.import_module("json")


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


COMMANDS: dict[str, tuple[Callable[[list[str]], object], str]] = {  # with what they are given
    "the kernel": (inference.main, "--bundle BUNDLE --images IMAGES --sample FILE"),
    "a fit kernel": (build_kernel.main, "--fit --members FILE"),
    "a description": (build_kernel.main, "--new-competition FILE --images IMAGES --out m.json"),
    "the validator": (validate.main, "FILE --sample SAMPLE"),
    "the validator's sample": (validate.main, "SAMPLE --sample FILE"),
    "a score": (score.main, "--bundle BUNDLE --images IMAGES --truth FILE"),
    "a calibration": (calibrate.main, "--bundle BUNDLE --images IMAGES --data FILE"),
    "a bundle to calibrate": (calibrate.main, "--bundle FILE --images IMAGES --data IMAGES"),
    "a fit": (train.main, "--data FILE --name a --encoder tu-test_resnet"),
    "folds": (folds.main, "--data FILE --out new"),
}


@pytest.mark.parametrize("kind", ["missing", "a folder", "in no folder"])
@pytest.mark.parametrize("case", COMMANDS)
def test_a_file_that_is_not_there_is_named_with_what_to_do(
    case: str, kind: str, session_light: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, words = COMMANDS[case]
    save_strips(tmp_path / "images", ["a.jpg"])
    sample = write_sample(tmp_path / "sample.csv", ["a.jpg"])
    (tmp_path / "empty").mkdir()
    path = {"missing": "sampel.csv", "a folder": "images", "in no folder": "gone/sample.csv"}[kind]
    given = {
        "BUNDLE": session_light,
        "IMAGES": tmp_path / "images",
        "SAMPLE": sample,
        "EMPTY": tmp_path / "empty",
        "FILE": tmp_path / path,
    }
    assert exit_code(main, *(given.get(word, word) for word in words.split())) != 0
    out, err = capsys.readouterr()
    [line] = [each for each in (out + err).splitlines() if each.startswith("error: ")]
    assert "Errno" not in line and " None" not in line
    assert str(given["EMPTY" if "EMPTY" in words else "FILE"]) in line
    assert re.search("; |name |expected ", line)
    if "no such file or folder" in line:
        assert ("has sample.csv" if kind == "missing" else f"{tmp_path} has ") in line


FAULTS = {
    "no right to it": (PermissionError(13, "Permission denied", "/a/b"), "change its permissions"),
    "a file as folder": (NotADirectoryError(20, "Not a directory", "/a/b"), "name a folder"),
    "a long name": (OSError(36, "File name too long", "/a/b"), "file name too long; correct the"),
    "a link to itself": (OSError(40, "Too many levels", "/a/b"), "too many levels"),
    "no name at all": (OSError(28, "No space left on device"), "No space left on device"),
    "nothing said": (ValueError(), "ValueError"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_of_the_system_is_one_line_with_the_file_and_the_remedy(case: str) -> None:
    error, said = FAULTS[case]
    line = one_line(error)
    assert said in line
    assert line.startswith("/a/b: ") or case in ("no name at all", "nothing said")


@pytest.mark.parametrize("text", ["x" * 1_000_000, "\nx" * 500_000])
def test_a_long_line_keeps_its_start_and_its_remedy(text: str) -> None:
    line = one_line(ValueError(f"ensemble.json: name {text}; shorten it"))
    assert len(line) <= MAX_LINE and "\n" not in line
    assert line.startswith("ensemble.json: name x") and line.endswith("x; shorten it")


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


@pytest.mark.parametrize(("before", "code"), [(signal.SIG_DFL, 130), (signal.SIG_IGN, 0)])
def test_a_terminal_that_closes_interrupts_unless_nohup_was_asked_for(
    before: signal.Handlers, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(int(signal.SIGHUP))],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, before),
        check=False,
    )
    assert done.returncode == code


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


SAID = """
from kernel.command import run_command

run_command(lambda: print("a line") or 0)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="other systems have no such device")
@pytest.mark.parametrize(("scored", "code"), [("", 2), ("1", 0)])
def test_a_full_disk_below_stdout_is_one_line_but_fails_no_scored_run(
    scored: str, code: int
) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", SAID],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", SCORED_RUN: scored},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == code, done.stderr
    if scored:
        assert done.stderr == ""
    else:
        assert "stdout: [Errno 28] No space left on device" in error_of(done.stderr)


LOGGED = """
import logging, sys
logging.basicConfig(level=logging.INFO, handlers=[logging.FileHandler(sys.argv[1])])
from kernel.command import run_command
from kernel.logs import log
run_command(lambda: log.info("a line") or 0)
"""


def test_a_line_is_on_stdout_once_where_the_image_has_all_logs_go_to_a_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOGGED, str(tmp_path / "kaggle.log")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"[-\d]+ [\d:,]+ INFO a line\n", done.stdout)
    assert (tmp_path / "kaggle.log").read_text() == ""


class FileOfTests(logging.FileHandler):
    """As pytest's own."""


def test_a_command_takes_no_handler_of_the_tests_away(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [logging.NullHandler(), FileOfTests(os.devnull, delay=True)]
    monkeypatch.setattr(logging.getLogger(), "handlers", list(given))
    assert code_of(None) == 0
    assert logging.getLogger().handlers == given


def test_a_backslash_in_a_list_stands_for_itself() -> None:
    line = r"--name a --start-from C:\w\a.safetensors --comment 'two words'  # was D:\old"
    expected = ["--name", "a", "--start-from", r"C:\w\a.safetensors", "--comment", "two words"]
    assert split_line(line) == expected
