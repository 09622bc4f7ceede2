"""Fit several members side by side: a process each, one at a time on every device.

A list holds one member a line, the options of train.py that are its own; what stands after `--` is
common to all and wins. With one device the members are fitted one after another. Each writes its
log to RUNS/NAME/train.log; the same command goes on where it was stopped. One that fails is tried
once more after the others.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import torch

from kernel.command import INTERRUPTED, new_parser, run_command, split_line
from kernel.logs import log
from kernel.watchdog import after
from training import train
from training.inputs import read_device

SCRIPT = Path(train.__file__)

EXAMPLE = (
    "  python training/fit_members.py training/members.txt -- --data severstal --crop-steps 6000"
)


GRACE_S = 60.0  # between SIGTERM and SIGKILL, and for a device's answer
CHECK = (
    "import sys, torch; from kernel.device import device_usable; "
    "from kernel.logs import start_log; start_log(); "
    "sys.exit(not device_usable(torch.device(sys.argv[1])))"
)
TRACEBACK = "Traceback (most recent call last)"
ERROR = re.compile(r"[\w.]+(:|$)")  # its line that names the error
LOGGED = re.compile(r"\d{4}-\d\d-\d\d |error: |interrupted")  # what comes after its end


@dataclass(frozen=True)
class Job:
    """One member's command."""

    name: str
    options: list[str]
    log: Path


@dataclass
class Processes:
    """The members that are being fitted; all of them end when one call says so."""

    environment: dict[str, str]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: bool = False

    def start(self, command: list[str], log_path: Path) -> subprocess.Popen[bytes] | None:
        """Start a process whose output goes to `log_path`; None after `stop`."""
        with self.lock, log_path.open("ab") as file:
            if self.stopped:
                return None
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=self.environment
            )
            self.running.append(process)
        return process

    def stop(self) -> None:
        """End what runs, and start nothing more: each keeps its last state."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    after(GRACE_S, process.kill)


def read_jobs(path: Path, common: list[str]) -> list[Job]:
    """Read the list of members.

    Raises:
        ValueError: there is no member, two have one name, or a line is no command of train.py.
    """
    jobs: list[Job] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            options = [*split_line(line), *common]
        except ValueError as error:
            raise ValueError(f"{path}: {error}: {line.strip()}") from error
        if options == common:
            continue
        try:
            args = train.parse_args(options)
        except SystemExit as error:  # argparse has said why
            given = " ".join(options)
            raise ValueError(f"{path}: no options of train.py: {given}") from error
        folder = args.runs / args.name
        jobs.append(Job(args.name, options, folder / "train.log"))
    names = [job.name for job in jobs]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: members {names}, expected at least one, each with its own name")
    return jobs


def list_devices(asked: list[str] | None) -> list[str]:
    """Return the devices that are there, or those that were asked for.

    Raises:
        ValueError: one of those is of a kind that train.py does not train on.
    """
    for name in asked or ():
        read_device(name, "--devices")
    return asked or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def share_cores(devices: list[str]) -> dict[str, str]:
    """Return the environment of a process: where several share the CPU, each with its part of it.

    OMP_NUM_THREADS wins where it is set.
    """
    threads = max(1, (os.cpu_count() or 1) // len(devices))
    return {"OMP_NUM_THREADS": str(threads)} | os.environ


def last_line(path: Path) -> str:
    """Return the last line of a log, or where it ends with a traceback the error's first."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(TRACEBACK)]
    ended = lines[starts[-1] + 1 :] if starts else []
    errors = [line for line in ended if ERROR.match(line)]
    if errors and not any(LOGGED.match(line) for line in ended):
        return errors[0]
    return lines[-1] if lines else ""


def works(device: str) -> bool:
    """Whether a device runs one operation, in a process of its own, as a member's is."""
    if device == "cpu":
        return True
    command = [sys.executable, "-c", CHECK, device]
    with suppress(subprocess.TimeoutExpired, OSError):  # no memory for one more process
        return subprocess.run(command, timeout=GRACE_S, check=False).returncode == 0
    return False


class Devices:
    """The devices that are free. One that runs nothing any more is left out, but for the last."""

    def __init__(self, names: list[str]) -> None:
        self.free: SimpleQueue[str] = SimpleQueue()
        self.left = len(names)
        for name in names:
            self.free.put(name)

    def give_back(self, name: str, failed: bool) -> None:
        """Make a device free again, on which a member failed or did not."""
        if failed and self.left > 1 and not works(name):
            self.left -= 1
            log.error("%s no longer works: it is left out", name)
        else:  # the last one stays whatever it does: each member's log says what it is
            self.free.put(name)


def fit_all(
    jobs: list[Job], devices: list[str], seconds: float = threading.TIMEOUT_MAX
) -> Iterator[tuple[Job, int]]:
    """Fit every member on the first device that is free; yield each with its exit code.

    One that fails is tried once more after the others, and the device that it failed on is left out
    where it runs nothing any more.

    After `seconds` those that run are stopped, each with its last state, and none is started: their
    code is that of an interruption.
    """
    processes, shared = Processes(share_cores(devices)), Devices(devices)

    def fit(job: Job) -> tuple[Job, int]:
        device, code = shared.free.get(), 1
        try:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, str(SCRIPT), *job.options, "--device", device]
            process = processes.start(command, job.log)
            if process:
                log.info("%s starts on %s, its log is %s", job.name, device, job.log)
            code = process.wait() if process else INTERRUPTED
            code = INTERRUPTED if code and processes.stopped else code
            return job, code
        finally:
            shared.give_back(device, code not in (0, INTERRUPTED))

    timer = after(seconds, processes.stop)
    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            waiting, again = {pool.submit(fit, job) for job in jobs}, set[str]()
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for job, code in (future.result() for future in done):
                    if code in (0, INTERRUPTED) or job.name in again:
                        yield job, code
                        continue
                    log.warning("%s failed with exit code %d, and is tried again after the others: "
                                "%s", job.name, code, last_line(job.log))  # fmt: skip
                    again.add(job.name)
                    waiting.add(pool.submit(fit, job))
        finally:
            timer.cancel()
            processes.stop()


def fit_members(args: argparse.Namespace) -> int:
    """Fit every member of the list; 1 where one failed, which costs no other."""
    failed = 0
    for job, code in fit_all(read_jobs(args.members, args.common), list_devices(args.devices)):
        if code:
            failed += 1
            log.error("%s failed with exit code %d: %s", job.name, code, last_line(job.log))
        else:
            log.info("%s is fitted", job.name)
    return 1 if failed else 0


# --- command line ---------------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what follows `--` is common to all members."""
    parser = new_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("members", type=Path, help="the list, like training/members.txt")
    about = "one member at a time on each, like cuda:0 cuda:1 or cpu cpu (default: every GPU)"
    add("--devices", nargs="+", metavar="DEVICE", help=about)
    words = sys.argv[1:] if arguments is None else arguments
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end])
    args.common = words[end + 1 :]
    return args


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    run_command(lambda: fit_members(parse_args(arguments)))


if __name__ == "__main__":
    main()
