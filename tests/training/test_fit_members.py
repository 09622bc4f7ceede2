"""Several members side by side: one at a time on each device, and one's failure costs no other.

A stub stands for train.py; the first test alone asks the real one for its options.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import error_of, exit_code

from training import fit_members, train
from training.fit_members import last_line, list_devices, read_jobs, share_cores

ROOT = Path(fit_members.__file__).parents[1]

STUB = """
import json, os, sys, time
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
start = time.time()
print("stub starts", flush=True)
time.sleep(float(words.get("--learning-rate", 0)))
line = [words["--name"], words["--device"], start, time.time(), os.environ["OMP_NUM_THREADS"]]
with Path(words["--runs"], "log.json").open("a") as file:
    file.write(json.dumps(line) + "\\n")
failed = words["--name"] == "bad" or words["--device"] == "cuda:13"
print("error: no such luck" if failed else "done")
sys.exit(2 if failed else 0)
"""

Line = tuple[str, str, float, float, str]  # name, device, start, end, threads
FitAll = Callable[..., tuple[int, list[Line]]]


@pytest.fixture
def members(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a list of members."""

    def write(*lines: str) -> Path:
        path = tmp_path / "members.txt"
        path.write_text("\n".join(["# a comment", "", *lines, ""]), encoding="utf-8")
        return path

    return write


@pytest.fixture
def fit_all(
    members: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> FitAll:
    """Return a function that fits members by a stub: the exit code, and what the stub noted."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB, encoding="utf-8")
    monkeypatch.setattr(fit_members, "SCRIPT", stub)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def fit(names: list[str], devices: list[str], sleep_s: float = 0.0) -> tuple[int, list[Line]]:
        runs = tmp_path / "runs"
        runs.mkdir(exist_ok=True)
        lines = [f"--name {name} --encoder resnet34" for name in names]
        common = ["--data", "d", "--runs", runs, "--learning-rate", sleep_s]
        code = exit_code(fit_members.main, members(*lines), "--devices", *devices, "--", *common)
        log = runs / "log.json"
        text = log.read_text().splitlines() if log.is_file() else []
        return code, [tuple(json.loads(line)) for line in text]

    return fit


def test_the_list_of_the_project_is_read_and_what_is_common_wins() -> None:
    path = Path(fit_members.__file__).parent / "members.txt"
    jobs = read_jobs(path, ["--data", "severstal", "--fold", "none", "--runs", "elsewhere"])
    assert [job.name for job in jobs] == [
        "densenet201", "resnet34", "se_resnet50", "resnet50", "efficientnet-b0",
    ]  # fmt: skip
    args = train.parse_args(jobs[1].options)
    assert (args.encoder, args.arch, args.fold, args.data) == (
        "resnet34", "Unet", -1, Path("severstal"),
    )  # fmt: skip
    assert jobs[1].log == Path("elsewhere/resnet34/train.log")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "members [], expected at least one"),
        (["--name a --encoder e", "--name a --encoder f"], "members ['a', 'a']"),
        (["--name a --encoder e --no-such 1"], "no options of train.py: --name a --encoder e --no"),
        (["--encoder e"], "no options of train.py: --encoder e"),
        (["--name a --encoder 'e"], "No closing quotation"),
    ],
)
def test_a_list_that_is_none_is_refused(
    lines: list[str],
    message: str,
    members: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = members(*lines)
    assert exit_code(fit_members.main, path, "--", "--data", "d") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {path}: ") and message in last


def test_a_list_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(fit_members.main, tmp_path / "gone.txt") == 2
    assert "gone.txt" in capsys.readouterr().err


def test_two_devices_fit_two_members_side_by_side_and_each_one_at_a_time(fit_all: FitAll) -> None:
    code, lines = fit_all(["a", "b", "c", "d"], ["cuda:0", "cuda:1"], sleep_s=0.4)
    assert code == 0
    assert sorted(name for name, *_ in lines) == ["a", "b", "c", "d"]
    for device in ("cuda:0", "cuda:1"):
        spans = sorted((start, end) for _, where, start, end, _ in lines if where == device)
        assert len(spans) == 2 and spans[0][1] <= spans[1][0]
    first, second = sorted((start, end) for _, _, start, end, _ in lines)[:2]
    assert second[0] < first[1]


def test_members_on_the_same_cpu_share_its_cores(fit_all: FitAll) -> None:
    code, lines = fit_all(["a", "b"], ["cpu", "cpu"])
    assert code == 0
    assert [where for _, where, *_ in lines] == ["cpu", "cpu"]
    assert {threads for *_, threads in lines} == {str(max(1, (os.cpu_count() or 1) // 2))}


def test_a_number_of_threads_that_was_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert share_cores(["cpu", "cpu"])["OMP_NUM_THREADS"] == "7"


def test_without_a_gpu_the_cpu_is_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert list_devices(None) == ["cpu"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert list_devices(None) == ["cuda:0", "cuda:1"]
    assert list_devices(["cpu"]) == ["cpu"]


def test_a_device_that_no_member_is_trained_on_is_refused_before_any_starts(
    fit_all: FitAll, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_all(["a"], ["cpu", "mps"]) == (2, [])
    assert error_of(capsys.readouterr().err) == "--devices mps: expected cpu, cuda or cuda:1"


def test_a_member_that_fails_costs_no_other_and_its_last_line_is_shown(
    fit_all: FitAll, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    code, lines = fit_all(["bad", "good"], ["cpu"])
    assert code == 1
    assert [name for name, *_ in lines] == ["bad", "good", "bad"]
    assert "bad failed with exit code 2, and is tried again after the others: error" in caplog.text
    assert "bad failed with exit code 2: error: no such luck" in caplog.text
    assert "good is fitted" in caplog.text
    assert (tmp_path / "runs/good/train.log").read_text() == "stub starts\ndone\n"


def test_a_gpu_that_breaks_takes_no_other_member_and_its_own_is_fitted_elsewhere(
    fit_all: FitAll, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fit_members, "works", lambda device: device != "cuda:13")
    code, lines = fit_all(["a", "b", "c", "d"], ["cuda:0", "cuda:13"])
    assert code == 0
    (failed,) = [name for name, where, *_ in lines if where == "cuda:13"]
    assert sorted(name for name, *_ in lines) == sorted(["a", "b", "c", "d", failed])
    assert "cuda:13 no longer works: it is left out" in caplog.text


def test_the_last_gpu_that_breaks_ends_in_the_members_own_errors(
    fit_all: FitAll, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And not in a wait for ever."""
    monkeypatch.setattr(fit_members, "works", lambda _: False)
    code, lines = fit_all(["a", "b"], ["cuda:13", "cuda:13"])
    assert code == 1
    assert sorted(name for name, *_ in lines) == ["a", "a", "b", "b"]
    assert "a failed with exit code 2: error: no such luck" in caplog.text


@pytest.mark.parametrize(("device", "expected"), [("cpu:0", True), ("cuda:99", False)])
def test_a_device_is_asked_whether_it_runs_anything(device: str, expected: bool) -> None:
    assert fit_members.works(device) is expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\ntwo\n\n", "two"),
        ("", ""),
        (
            "Traceback (most recent call last):\n  File 'a'\nValueError: the first\n\n"
            "During handling of the above exception, another exception occurred:\n\n"
            "Traceback (most recent call last):\n  File 'b'\n    x = 1\n"
            "torch.AcceleratorError: CUDA error: no kernel image is available\n"
            "CUDA kernel errors might be reported asynchronously.\n"
            "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n",
            "torch.AcceleratorError: CUDA error: no kernel image is available",
        ),
        (
            "Traceback (most recent call last):\n  File 'a'\nKeyboardInterrupt\n",
            "KeyboardInterrupt",
        ),
        ("Traceback (most recent call last):\n  File 'a', cut", "  File 'a', cut"),
        (
            "Traceback (most recent call last):\n  File 'a'\nRuntimeError: of the first session\n"
            "2026-11-29 12:00:00,000 INFO going on\nerror: runs/a/crops.ckpt: not saved",
            "error: runs/a/crops.ckpt: not saved",
        ),
    ],
)
def test_of_a_traceback_the_error_is_shown_and_not_its_last_line(
    text: str, shown: str, tmp_path: Path
) -> None:
    (tmp_path / "train.log").write_text(text, encoding="utf-8")
    assert last_line(tmp_path / "train.log") == shown


def test_a_second_run_adds_to_the_log(fit_all: FitAll, tmp_path: Path) -> None:
    for _ in range(2):
        assert fit_all(["good"], ["cpu"])[0] == 0
    assert (tmp_path / "runs/good/train.log").read_text() == "stub starts\ndone\n" * 2


def test_ctrl_c_ends_what_runs_and_starts_nothing_more(
    members: Callable[..., Path], tmp_path: Path
) -> None:
    """In a process of its own: the signal is not this one's, which tests run in."""
    stub, runs = tmp_path / "stub.py", tmp_path / "runs"
    stub.write_text(STUB, encoding="utf-8")
    script = (
        "import sys; from training import fit_members; "
        "fit_members.SCRIPT = sys.argv.pop(1); fit_members.main()"
    )
    listed = members("--name a --encoder resnet34", "--name b --encoder resnet34")
    common = ["--data", "d", "--runs", runs, "--learning-rate", 60]  # seconds that a stub sleeps
    words = [sys.executable, "-c", script, stub, listed, "--devices", "cpu", "--", *common]
    log, second = runs / "a/train.log", runs / "b/train.log"
    process = subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        while not (log.is_file() and log.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
        assert process.returncode == 130 and "interrupted" in printed
        assert time.monotonic() - start < 30
    finally:
        process.kill()
    assert log.read_text() == "stub starts\n" and not (runs / "log.json").exists()
    assert not second.exists() or not second.read_text()


def test_a_device_is_left_out_where_no_process_can_be_started_to_try_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("subprocess.run", start)
    assert not fit_members.works("cuda:0")
