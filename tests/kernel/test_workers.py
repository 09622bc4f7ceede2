"""Several processes: the same submission as one, also where one of them dies."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers import LAYOUTS, predict, read_submission, save_strips, write_sample
from run_records import a_record

from kernel import inference
from kernel.deadline import Deadline, margin_s
from kernel.device import GPU_LOST, count_gpus
from kernel.manifest import Manifest
from kernel.mounts import SAMPLE
from kernel.options import LAST, Options, parse_options
from kernel.outcome import Outcome
from kernel.rows import read_rows
from kernel.run_context import RunContext
from kernel.run_record import write_run_record
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from kernel.submission import Submission
from kernel.task import Task
from kernel.tta import Half
from kernel.worker import WorkerProcess, start_worker
from kernel.workers import (
    Plan,
    Round,
    _kill_stalled,
    _read_round,
    gpus_of,
    predict_by_workers,
    run_workers,
)

NAMES = [f"{index}.png" for index in range(5)]


@pytest.fixture(autouse=True)
def gpus_are_counted() -> None:
    """Before a test starts something else in the place of nvidia-smi; the count is kept."""
    count_gpus()


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Path:
    return tiny_bundle / "dataset"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five strips, one of them broken."""
    folder = tmp_path_factory.mktemp("strips")
    save_strips(folder, NAMES)
    (folder / "3.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def alone(
    bundle: Path, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, dict[str, Any]]:
    """The submission and the run record of one process."""
    output = tmp_path_factory.mktemp("alone") / "submission.csv"
    record = predict(bundle, images, output)
    assert output.read_bytes().count(b"\n") == 1 + 5 * 4
    assert record["non_empty"] > 0
    assert record["workers"] == 1
    return output.read_bytes(), record


def kill_workers(monkeypatch: pytest.MonkeyPatch, killed: Sequence[str]) -> list[str]:
    """Kill the workers that write these files as they start; return the files of all."""
    starts = list[str]()

    def start(*args: Any) -> WorkerProcess:
        worker = start_worker(*args)
        starts.append(worker.csv.name)
        if worker.csv.name in killed:
            worker.process.kill()
        return worker

    monkeypatch.setattr("kernel.workers.start_worker", start)
    return starts


def test_two_workers_write_what_one_process_writes(
    bundle: Path,
    images: Path,
    alone: tuple[bytes, dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected, record_alone = alone
    record = predict(bundle, images, tmp_path / "submission.csv", workers=2)
    assert (tmp_path / "submission.csv").read_bytes() == expected
    assert record["workers"] == 2
    assert "ended with exit code" not in caplog.text
    for key in ("strips", "rows", "non_empty", "passes", "work", "device", "share"):
        assert record[key] == record_alone[key], key
    assert list(record["faults"]) == list(record_alone["faults"]) == ["3.png"]
    for key in ("stages", "networks"):
        assert record[key].keys() == record_alone[key].keys(), key


def test_a_worker_that_is_killed_costs_no_row(
    bundle: Path,
    images: Path,
    alone: tuple[bytes, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected, record_alone = alone

    starts = kill_workers(monkeypatch, ["2.csv"])
    record = predict(bundle, images, tmp_path / "submission.csv", workers=2)
    what = "worker 2 ended with exit code -9: the 2 images that it leaves run in another"
    assert what in caplog.messages
    assert starts == ["1.csv", "2.csv", "2-again.csv"]
    assert (tmp_path / "submission.csv").read_bytes() == expected
    for key in ("strips", "passes", "work", "faults"):
        assert record[key] == record_alone[key], key


def test_what_kills_the_process_of_the_one_gpu_costs_no_row(
    bundle: Path,
    images: Path,
    alone: tuple[bytes, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first process would be the end of the run. No GPU here: its worker runs on the CPU."""
    monkeypatch.setattr("kernel.run_context.count_gpus", lambda: 1)
    monkeypatch.setattr("kernel.workers.gpus_of", lambda count: [""] * count)
    monkeypatch.setattr("kernel.inference.predict_here", lambda *_: pytest.fail("in this process"))
    starts = kill_workers(monkeypatch, ["1.csv"])
    record = predict(bundle, images, tmp_path / "submission.csv")
    assert starts == ["1.csv", "1-again.csv"]
    assert (tmp_path / "submission.csv").read_bytes() == alone[0]
    assert record["workers"] == 1 and record["work"] == alone[1]["work"]


def test_workers_share_the_rows_of_the_sample_and_not_the_folder(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the sample's order, which is not the folder's, and without an image that it lacks."""
    mounted = tmp_path / "input" / "severstal"
    write_sample(mounted / SAMPLE, ["4.png", "2.png", "1.png", "0.png"])
    (mounted / "test_images").symlink_to(images)
    predict(bundle, None, tmp_path / "alone.csv", input=tmp_path / "input")
    kill_workers(monkeypatch, ["2.csv"])
    shared = tmp_path / "shared.csv"
    record = predict(bundle, None, shared, input=tmp_path / "input", workers=2)
    assert sorted(record["work"]) == ["0.png", "1.png", "2.png", "4.png"]
    assert not record["faults"]
    assert shared.read_bytes() == (tmp_path / "alone.csv").read_bytes()


# --- workers that die again and again -------------------------------------------------------------


def start_instead(monkeypatch: pytest.MonkeyPatch, script: Path, **environment: object) -> None:
    """Have workers run another script, with their own options."""
    popen, own = subprocess.Popen, {key: str(value) for key, value in environment.items()}

    def start(command: list[str], env: dict[str, str], process_group: int) -> Any:
        command = [command[0], str(script), *command[2:]]
        return popen(command, env=env | own, process_group=process_group)

    monkeypatch.setattr(subprocess, "Popen", start)


DEADLY = """
import os, sys, time
sys.dont_write_bytecode = True
sys.path.insert(0, os.environ["BUNDLE"])
import inference as kernel
admit, decode, decoded = kernel.Scheduler._admit, kernel.read_strip, []

def die(name, place):
    if (name, place) == (os.environ["KILLER"], os.environ["PLACE"]):
        time.sleep(0.5)  # what goes ahead is ahead by then
        os.abort()  # as a segmentation fault in a library

def deadly_admit(scheduler, strip, *others):
    with open(os.environ["ADMITTED"], "a") as file:
        file.write(f"{strip.name}\\n")
    die(strip.name, "networks")
    return admit(scheduler, strip, *others)

def deadly_decode(folder, name, *rules):
    die(name, "decoder")
    if name in decoded:  # the first time is for the check of the engines
        die(name, "decoder, the second time")
    decoded.append(name)
    return decode(folder, name, *rules)

kernel.Scheduler._admit, kernel.read_strip = deadly_admit, deadly_decode
kernel.Submission.MAX_SAVING_SHARE = 1e9  # each strip is saved as soon as it is done
kernel.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("killer", "place"),
    [("0.png", "decoder"), ("0.png", "decoder, the second time"), ("2.png", "networks")],
)
def test_an_image_that_kills_every_process_costs_its_own_rows(
    killer: str,
    place: str,
    bundle: Path,
    images: Path,
    alone: tuple[bytes, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is an image that is done predicted once more. Decoding goes ahead of the networks."""
    script, admitted = tmp_path / "deadly.py", tmp_path / "admitted"
    script.write_text(DEADLY, encoding="utf-8")
    start_instead(monkeypatch, script, BUNDLE=bundle, ADMITTED=admitted, KILLER=killer, PLACE=place)
    record = predict(bundle, images, tmp_path / "submission.csv", workers=2)
    assert record["faults"].keys() == {killer, "3.png"}
    assert record["faults"][killer] == "worker 1 of 1 ended with exit code -6"
    if place == "networks":
        # at first, in the one that follows, and alone
        assert Counter(admitted.read_text().split()) == dict.fromkeys(NAMES, 1) | {killer: 3}
    expected = read_submission_of(alone[0], tmp_path / "alone.csv")
    assert any(rle for (name, _), rle in expected.items() if name == killer)
    expected |= {pair: "" for pair in expected if pair[0] == killer}
    assert read_submission(tmp_path / "submission.csv") == expected


LOST = """
import os, pathlib, sys
sys.dont_write_bytecode = True
sys.path.insert(0, os.environ["BUNDLE"])
import inference as kernel

def lose(device, context, task, *_, **plain):
    next(kernel.note_names(task.names, context.options.last_image))  # it has begun
    raise kernel.DeviceLost("cuda fails: launch failure")

if pathlib.Path(sys.argv[sys.argv.index("--output") + 1]).name in os.environ["LOSE"].split():
    kernel.predict_on = lose
kernel.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("gpus", "lose", "logged"),
    [
        (["", ""], "1.csv 2.csv", "worker 1 ended with exit code 3: the 3 images that it leaves"),
        (["7", ""], "", "worker 1 of 2 ended with exit code 3"),  # no such GPU: then on the other
    ],
)
def test_workers_that_lose_their_gpus_are_followed_by_new_ones(
    gpus: list[str],
    lose: str,
    logged: str,
    bundle: Path,
    images: Path,
    alone: tuple[bytes, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another process may have the GPU again; and the first one touches none."""
    script = tmp_path / "lost.py"
    script.write_text(LOST, encoding="utf-8")
    start_instead(monkeypatch, script, BUNDLE=bundle, LOSE=lose)
    monkeypatch.setattr("kernel.workers.gpus_of", lambda count: gpus[:count])
    monkeypatch.setattr("kernel.workers.predict_here", lambda *_: pytest.fail("in this process"))
    record = predict(bundle, images, tmp_path / "submission.csv", workers=2)
    assert logged in caplog.text
    assert (tmp_path / "submission.csv").read_bytes() == alone[0]
    assert list(record["faults"]) == ["3.png"]


def test_gpus_of_which_none_runs_anything_cost_one_worker_each(
    bundle: Path,
    images: Path,
    alone: tuple[bytes, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of a driver that is too old for PyTorch; here there are no such GPUs."""
    monkeypatch.setattr("kernel.workers.gpus_of", lambda count: ["7", "8"][:count])
    starts = kill_workers(monkeypatch, [])
    record = predict(bundle, images, tmp_path / "submission.csv", workers=2)
    assert starts == ["1.csv", "2.csv"]
    assert (tmp_path / "submission.csv").read_bytes() == alone[0]
    assert record["workers"] == 1 and record["work"] == alone[1]["work"]


@pytest.mark.parametrize(
    ("ends", "gpu", "plain"),
    [
        ("os._exit(3)", "0", True),
        ("os.abort()", "0", True),
        ("os.abort()", "", False),
        ("os.kill(os.getpid(), 9)", "0", False),
    ],
)
def test_where_a_gpu_is_lost_the_next_worker_runs_no_engine(
    ends: str, gpu: str, plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What broke the GPU would break it again."""
    popen, commands = subprocess.Popen, list[list[str]]()

    def start(command: list[str], **_: object) -> Any:
        commands.append(command)
        parse_options(command[2:]).output.with_suffix(LAST).write_text("a.jpg", encoding="utf-8")
        return popen([sys.executable, "-c", f"import os; {ends}"])

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr("kernel.workers.COLLECT_S", 0.01)
    task = Task(Path("strips"), LAYOUTS["two-column"], [("a.jpg", 1)])
    submission = Submission(tmp_path / "s.csv", task.layout, task.pairs)
    begin = time.monotonic()
    run = RunContext(Options(), Path("x"), Manifest([]), submission, Stages(), begin)
    run_workers(run, task, [gpu], again=True)
    assert [parse_options(words[2:]).plain for words in commands] == [False, plain]


def read_submission_of(data: bytes, path: Path) -> dict[tuple[str, int], str]:
    """The rows of a submission's bytes."""
    path.write_bytes(data)
    return read_submission(path)


def test_workers_that_all_refuse_their_bundle_are_the_error_of_one_process(
    bundle: Path, images: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    (broken / "unet-a.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"unet-a\.safetensors"):
        predict(broken, images, tmp_path / "submission.csv", workers=2)


def test_what_a_worker_wrote_before_it_died_without_a_record_stands(
    bundle: Path,
    images: Path,
    alone: tuple[bytes, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has done all of its images, and its record is torn: none of them is lost or repeated."""
    starts = list[int]()

    def torn(*args: Any) -> WorkerProcess:
        worker = start_worker(*args)
        starts.append(worker.number)
        if worker.number == 1:
            assert worker.process.wait() == 0
            worker.record.write_text('{"torn', encoding="utf-8")
        return worker

    monkeypatch.setattr("kernel.workers.start_worker", torn)
    record = predict(bundle, images, tmp_path / "submission.csv", workers=2)
    assert (tmp_path / "submission.csv").read_bytes() == alone[0]
    assert starts == [1, 2]
    assert list(record["faults"]) == ["3.png"]
    assert list(record["work"]) == ["1.png"]


def ended() -> subprocess.Popen[bytes]:
    """A process that runs no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process


def test_a_mask_of_as_many_characters_as_a_spreadsheets_cell_comes_from_a_worker(
    tmp_path: Path,
) -> None:
    """Elsewhere such a mask is taken for one that a spreadsheet has cut off."""
    rle = "1" * 32_767
    made = Submission(tmp_path / "1.csv", LAYOUTS["two-column"], [("a.jpg", 1)], whole=False)
    made.set_masks("a.jpg", {1: rle})
    made.save()
    taken = Submission(tmp_path / "out.csv", LAYOUTS["two-column"], [("a.jpg", 1), ("b.jpg", 1)])
    worker = WorkerProcess(1, "", Task(Path(), made.layout, [("a.jpg", 1)]), made.path, ended())
    worker.collect(taken)
    assert taken.lines["a.jpg", 1] == f"a.jpg_1,{rle}\n" and taken.masked == {("a.jpg", 1)}
    assert taken.done == {"a.jpg"}


def test_what_a_worker_has_not_written_again_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of half a million rows that would take a core."""
    path, reads = tmp_path / "1.csv", list[Path]()
    task = Task(Path(), LAYOUTS["two-column"], [("a.jpg", 1), ("b.jpg", 1)])
    made = Submission(path, task.layout, task.pairs, whole=False)
    taken = Submission(tmp_path / "out.csv", task.layout, task.pairs)

    def read(path: Path, *rules: Any, **options: Any) -> Any:
        reads.append(path)
        return read_rows(path, *rules, **options)

    monkeypatch.setattr("kernel.worker.read_rows", read)
    worker = WorkerProcess(1, "", task, path, ended())
    worker.collect(taken)
    for done in ("a.jpg", "b.jpg"):
        made.set_masks(done, {1: "1 1"})
        made.save()
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))  # whatever the disk's clock counts
        for _ in range(3):
            worker.collect(taken)
        assert done in taken.done
    assert reads == [path, path]


# --- when no more workers are started ------------------------------------------------------------


def rounds_of(
    given: Sequence[Round],
    submission: Submission,
    monkeypatch: pytest.MonkeyPatch,
    count: int = 2,
) -> tuple[Outcome, list[Sequence[str]]]:
    """The outcome of rounds that give this, the last of them again and again; and their GPUs."""
    calls = list[Sequence[str]]()

    def run_workers(context: RunContext, task: Task, gpus: Sequence[str], again: bool) -> Round:
        assert again == (not calls)
        calls.append(gpus)
        return given[min(len(calls), len(given)) - 1]

    monkeypatch.setattr("kernel.workers.run_workers", run_workers)
    monkeypatch.setattr("kernel.workers.gpus_of", lambda count: ["0", "1"][:count])
    task = Task(Path("strips"), submission.layout, [(name, 1) for name in NAMES])
    context = RunContext(Options(), Path(), Manifest([]), submission, Stages(), time.monotonic())
    return predict_by_workers(context, task, count), calls


DIES = Round(exit_codes={1: -11})


@pytest.mark.parametrize(
    ("count", "lost", "began", "here"),
    [(1, 1, "", True), (1, 1, "1.png", False), (2, 1, "", False), (2, 2, "", True)],
)
def test_where_no_gpu_runs_anything_the_first_process_does(
    count: int, lost: int, began: str, here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It picks the CPU, with as many strips at once as was asked for."""
    outcome, submission = Outcome(), Submission(tmp_path / "s.csv", LAYOUTS["two-column"], [])
    monkeypatch.setattr("kernel.workers.predict_here", lambda *_: outcome)
    codes = dict.fromkeys(range(1, lost + 1), GPU_LOST)
    given = [
        Round(exit_codes=codes, image_at_death=began, lost={"0"}),
        replace(DIES, lost={"0", "1"}),
    ]
    found, calls = rounds_of(given, submission, monkeypatch, count)
    assert (found is outcome, len(calls) == 1) == (here, here)


@pytest.mark.parametrize("worker", [False, True])
def test_a_worker_alone_ends_with_its_parent(
    worker: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[bool]()
    monkeypatch.setattr(inference, "end_with_parent", lambda: told.append(True))
    with pytest.raises(ValueError, match="gone"):
        inference.run_options(Options(bundle=tmp_path / "gone", worker=worker))
    assert told == [True] * worker


@pytest.mark.parametrize(
    ("gpus", "taken"), [(["1"], ["0.png", "2.png", "1.png"]), ([], ["1.png"])], ids=["GPU", "CPU"]
)
def test_images_at_which_workers_died_come_last_on_a_gpu_and_alone_on_the_cpu(
    gpus: list[str], taken: list[str]
) -> None:
    """One that hangs the next worker too has the others behind it."""
    task = Task(Path("strips"), LAYOUTS["two-column"], [(name, 1) for name in NAMES[:3]])
    lost = {"0", "1"} - set(gpus)
    found = replace(DIES, suspects={"1.png", "4.png"}, lost=lost)
    plan = Plan(task, ["0", "1"], ["0", "1"], first=True).next(found, task, grew=False)
    assert plan and (plan.task.names, plan.gpus) == (taken, gpus)


@pytest.mark.parametrize(
    ("last", "working", "rounds"),
    [
        ("", "", [["0", "1"], ["1"], [""]]),
        ("4.png", "", [["0", "1"], ["1"], [""], [""], [""]]),
        ("4.png", "1", [["0", "1"], ["1"], [""], ["1"], [""], ["1"], [""]]),
    ],
    ids=["before the first image", "each time", "each time, and one GPU has done an image"],
)
def test_workers_that_give_nothing_are_not_started_for_ever(
    last: str,
    working: str,
    rounds: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On all GPUs, on those that are not lost, then on the CPU."""
    submission = Submission(tmp_path / "s.csv", LAYOUTS["two-column"], [])
    submission.done.add("4.png")
    first = replace(DIES, image_at_death=last, gpus=set(working), lost={"0"})
    given = [first, replace(first, lost={"1"})]
    outcome, calls = rounds_of(given, submission, monkeypatch)
    assert calls == rounds
    reason = "worker 1 of 1 ended with exit code -11"
    assert outcome.faults == dict.fromkeys(NAMES[:4], reason)


@pytest.mark.parametrize(
    ("killers", "expected"),
    [
        ({"0": NAMES, "1": []}, [("01", NAMES), ("1", NAMES[1:])]),  # a GPU that breaks each time
        (
            {"0": ["2.png"], "1": ["2.png"]},  # an image that kills on GPUs alone
            [
                ("01", NAMES),
                ("1", ["1.png", "3.png", "4.png", "2.png"]),
                ("", ["2.png"]),
                ("01", NAMES[3:]),
            ],
        ),
    ],
)
def test_what_a_gpu_leaves_runs_on_the_others_and_only_suspects_on_the_cpu(
    killers: dict[str, list[str]],
    expected: list[tuple[str, list[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of workers that do one image before the round in which one crashes ends."""
    submission = Submission(tmp_path / "s.csv", LAYOUTS["two-column"], [])
    calls = list[tuple[str, list[str]]]()

    def run_workers(context: RunContext, task: Task, gpus: Sequence[str], again: bool) -> Round:
        calls.append(("".join(gpus), task.names))
        dies = {gpu: name for gpu in gpus for name in task.names if name in killers.get(gpu, [])}
        if not dies:
            submission.done.update(task.names)
            return Round(gpus=set(gpus))
        gpu, killer = next(iter(dies.items()))
        submission.done.update(task.names[: min(task.names.index(killer), 1)])
        return Round(exit_codes={1: 3}, suspects={killer}, gpus=set("01"), lost={gpu})

    monkeypatch.setattr("kernel.workers.run_workers", run_workers)
    monkeypatch.setattr("kernel.workers.gpus_of", lambda count: ["0", "1"][:count])
    task = Task(Path("strips"), submission.layout, [(name, 1) for name in NAMES])
    context = RunContext(Options(), Path(), Manifest([]), submission, Stages(), time.monotonic())
    assert not predict_by_workers(context, task, 2).faults
    assert calls == expected and submission.done == set(NAMES)


@pytest.mark.parametrize(
    ("code", "reason"),
    [(-9, "worker 1 of 2 ended with exit code -9"), (0, "no time was left for it")],
    ids=["killed", "ended by its watchdog"],
)
def test_no_worker_is_started_when_time_is_over(
    code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Deadline, "over", True)
    submission = Submission(tmp_path / "s.csv", LAYOUTS["two-column"], [])
    submission.done.add("4.png")
    dies = replace(DIES, exit_codes={1: code})
    outcome, calls = rounds_of([dies], submission, monkeypatch)
    assert len(calls) == 1 and outcome.faults == dict.fromkeys(NAMES[:4], reason)


@pytest.mark.parametrize("code", [1, 2])
def test_what_every_worker_refuses_is_refused_in_this_process(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback of Python's too, as that of a library that cannot be imported."""
    monkeypatch.setattr("kernel.workers.predict_here", lambda *_: Outcome({"a.jpg": "here"}))
    submission = Submission(tmp_path / "s.csv", LAYOUTS["two-column"], [])
    refused = replace(DIES, exit_codes={1: code, 2: code})
    outcome, calls = rounds_of([refused], submission, monkeypatch)
    assert len(calls) == 1 and outcome.faults == {"a.jpg": "here"}


@pytest.mark.parametrize(
    ("code", "done", "here"), [(3, set(), True), (3, {"4.png"}, False), (-11, set(), False)]
)
def test_what_the_cpu_refuses_where_the_gpus_gave_nothing_is_refused_in_this_process(
    code: int, done: set[str], here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that cannot be imported looks like a lost GPU there."""
    monkeypatch.setattr("kernel.workers.predict_here", lambda *_: Outcome({"a.jpg": "here"}))
    submission = Submission(tmp_path / "s.csv", LAYOUTS["two-column"], [])
    submission.done |= done
    lost = replace(DIES, exit_codes={1: 3, 2: code}, image_at_death="0.png", lost={"0", "1"})
    outcome, calls = rounds_of([lost, replace(DIES, exit_codes={1: 2})], submission, monkeypatch)
    assert calls[:2] == [["0", "1"], [""]]
    assert (outcome.faults == {"a.jpg": "here"}) == here


@pytest.mark.parametrize("done", [{"4.png"}, set()], ids=["one image", "nothing"])
def test_a_later_worker_that_cannot_be_started_costs_what_is_left_alone(
    done: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What killed the first ones would kill this process, too."""
    monkeypatch.setattr("kernel.workers.predict_here", lambda *_: pytest.fail("in this process"))
    submission = Submission(tmp_path / "s.csv", LAYOUTS["two-column"], [])
    submission.done |= done
    rounds = iter([DIES])

    def run_workers(*_: object) -> Round:
        for each in rounds:
            return each
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("kernel.workers.run_workers", lambda *args, again: run_workers())
    task = Task(Path("strips"), submission.layout, [(name, 1) for name in NAMES])
    context = RunContext(Options(), Path(), Manifest([]), submission, Stages(), time.monotonic())
    faults = predict_by_workers(context, task, 2).faults
    assert faults.keys() == set(NAMES) - done
    assert "Resource temporarily unavailable" in faults["0.png"]


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_there_is_a_process_a_gpu_unless_told_otherwise(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("initialises CUDA"))
    monkeypatch.setattr("kernel.run_context.count_gpus", count_gpus.__wrapped__)
    submission = Submission(tmp_path / "s.csv", LAYOUTS["two-column"], [])
    task = Task(Path("strips"), submission.layout, [(name, 1) for name in NAMES])

    def count(options: Options, task: Task = task) -> int:
        """So many processes beside the first."""
        context = RunContext(options, Path(), Manifest([]), submission, Stages(), 0.0)
        return context.n_workers(task)

    assert count(Options()) == gpus
    assert count(Options(workers=1)) == 0
    assert count(Options(workers=3)) == 3
    assert count(Options(workers=3, worker=True)) == 0
    assert count(Options(workers=3), replace(task, pairs=task.pairs[:2])) == 2
    assert count(Options(workers=3), replace(task, pairs=task.pairs[:1])) == min(gpus, 1)
    assert count(Options(), replace(task, pairs=[])) == 0


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, ["0", "1", "0"]), ("2,5", ["2", "5", "2"]), ("", ["", "", ""]), ("3", ["3"] * 3)],
)
def test_a_worker_takes_a_gpu_of_those_that_are_visible(
    visible: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that are there, where there are more workers than that."""
    monkeypatch.setattr("kernel.workers.count_gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_of(3) == expected


# --- what a worker is started with ----------------------------------------------------------------


def started(
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
    left_s: float = 100,
    gpu: str = "1",
    count: int = 3,
) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of the second of three workers."""
    calls = list[tuple[list[str], dict[str, str]]]()
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **_: calls.append((command, env)))
    bundle, manifest = Path("bundle"), Manifest([])
    task = Task(Path("strips"), LAYOUTS["two-column"], [("a.jpg", 1)])
    submission = Submission(Path("out.csv"), task.layout, task.pairs)
    budget_s = options.budget_s or 100
    start, options = time.monotonic() + left_s - budget_s, replace(options, budget_s=budget_s)
    context = RunContext(options, bundle, manifest, submission, Stages(), start)
    with tempfile.TemporaryDirectory() as scratch:
        start_worker(context, task, Path(scratch), 2, count, gpu)
    return calls[0]


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(
            sample=Path("s.csv"),
            batch_size=3,
            early_exit=False,
            plain=True,
            allow_missing_members=True,
        ),
        Options(input=Path("in"), layout="two-column", workers=3, strict=True),
    ],
    ids=["defaults", "all changed", "those of the first process alone"],
)
def test_a_worker_gets_the_options_of_its_run(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, _, *words), environment = started(options, monkeypatch)
    found = parse_options(words)
    assert found.budget_s and 60 < found.budget_s <= 67  # its watchdog comes first
    expected = replace(
        options,
        bundle=Path("bundle").absolute(),
        images=Path("strips").absolute(),
        sample=found.output.with_name("2.sample"),
        worker=True,
        input=Options.input,
        layout=None,
        workers=0,
        strict=False,
        output=found.output.with_name("2.csv"),
        report=found.output.with_name("2.json"),
        budget_s=found.budget_s,
    )
    assert found == expected
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["OMP_NUM_THREADS"] == str(max((os.cpu_count() or 1) // 3, 1))


def test_on_the_cpu_a_worker_has_one_strip_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is known at which image it dies. Not beside others, nor on a GPU."""
    options = Options(batch_size=8)
    for gpu, count, expected in (("", 1, 1), ("", 2, 8), ("0", 1, 8)):
        (_, _, *words), environment = started(options, monkeypatch, gpu=gpu, count=count)
        found = parse_options(words)
        assert found.batch_size == expected
        assert environment["CUDA_VISIBLE_DEVICES"] == gpu


@pytest.mark.parametrize("left_s", [3590.0, 1800.0, 430.0, 200.0, 95.0])
def test_a_worker_that_hangs_ends_before_the_first_process_however_late_it_began(
    left_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, _, *words), _ = started(Options(budget_s=3600), monkeypatch, left_s)
    budget_s = parse_options(words).budget_s
    assert budget_s
    assert budget_s - margin_s(budget_s) < left_s - margin_s(3600)
    assert Deadline(budget_s, 0.0).end < left_s - margin_s(3600)


# --- the end of an interrupted run ----------------------------------------------------------------

LAST_WORDS = """
import pathlib, signal, sys, time
folder, number = pathlib.Path(sys.argv[1]), sys.argv[2]
def end(*_):
    time.sleep(1)  # the pass that it is in
    rows = f"ImageId_ClassId,EncodedPixels\\n{number}.png_1,1 {number}\\n"
    (folder / f"{number}.csv").write_text(rows)
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
(folder / f"{number}.ready").touch()
time.sleep(60)
"""


DEAF = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1], f"{sys.argv[2]}.ready").touch()
time.sleep(60)
"""


def interrupted(
    code: str, bundle: Path, images: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> list[int | None]:
    """Exit codes of two workers that run this code, once a run is interrupted under them."""
    workers = list[subprocess.Popen[bytes]]()

    def start(command: list[str], **_: object) -> Any:
        output = Path(command[command.index("--output") + 1])
        words = [sys.executable, "-c", code, str(output.parent), output.stem]
        workers.append(popen(words))
        return workers[-1]

    def interrupt(worker: WorkerProcess, submission: Submission) -> None:
        while len(list(worker.csv.parent.glob("*.ready"))) < 2:
            time.sleep(0.05)
        monkeypatch.setattr(WorkerProcess, "collect", collect)
        raise KeyboardInterrupt

    popen, collect = subprocess.Popen, WorkerProcess.collect
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(WorkerProcess, "collect", interrupt)
    with pytest.raises(KeyboardInterrupt):
        predict(bundle, images, output, workers=2)
    return [worker.poll() for worker in workers]


def test_a_worker_that_hears_no_signal_is_killed(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernel.workers.ENDING_S", 0.2)
    assert interrupted(DEAF, bundle, images, tmp_path / "out.csv", monkeypatch) == [-9, -9]


def test_where_a_worker_cannot_be_started_all_images_run_here_and_no_other_is_left_behind(
    bundle: Path,
    images: Path,
    alone: tuple[bytes, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    workers = list[subprocess.Popen[bytes]]()

    def start(command: list[str], **_: object) -> Any:
        if workers:
            raise OSError(12, "Cannot allocate memory")
        workers.append(popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return workers[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    predict(bundle, images, tmp_path / "submission.csv", workers=2)
    assert workers[0].poll() == -15
    assert (tmp_path / "submission.csv").read_bytes() == alone[0]
    assert "Cannot allocate memory; running all images in this process" in caplog.text


def test_what_workers_do_in_their_last_second_stands_too(
    bundle: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run waits for its workers' end before it collects for the last time."""
    codes = interrupted(LAST_WORDS, bundle, images, tmp_path / "submission.csv", monkeypatch)
    assert codes == [130, 130]
    rows = read_submission(tmp_path / "submission.csv")
    found = {pair: rle for pair, rle in rows.items() if rle}
    assert found == {("1.png", 1): "1 1", ("2.png", 1): "1 2"}


def test_a_worker_that_hangs_is_killed_before_the_hour_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own watchdog does not end it: it hangs before or after that, and hears no signal."""

    def start(command: list[str], **_: object) -> Any:
        worker = popen([sys.executable, "-c", DEAF, str(tmp_path), "1"])
        while not (tmp_path / "1.ready").exists():
            time.sleep(0.05)
        return worker

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    task = Task(Path("strips"), LAYOUTS["two-column"], [("a.jpg", 1)])
    submission = Submission(tmp_path / "s.csv", task.layout, task.pairs)
    options, begin = Options(budget_s=100), time.monotonic() - 94  # 3 s until the watchdog
    context = RunContext(options, Path("bundle"), Manifest([]), submission, Stages(), begin)
    found = run_workers(context, task, [""], again=True)
    assert found.exit_codes == {1: -9} and not found.gpus
    assert context.left_s() > 0


# --- workers that hang ----------------------------------------------------------------------------


def looks_every(
    seconds: float, monkeypatch: pytest.MonkeyPatch, then: Callable[[], object] = lambda: None
) -> None:
    """Let so many seconds pass between two looks at the workers, which take none here."""
    passed = [0.0]

    def wait(_: float) -> None:
        passed[0] += seconds
        assert passed[0] < 100 * seconds, "is never killed"
        then()

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0])
    monkeypatch.setattr("kernel.worker.time", clock)
    monkeypatch.setattr("kernel.workers.time", SimpleNamespace(sleep=wait))


class Hangs:
    """A process that does nothing until it is killed."""

    def __init__(self) -> None:
        self.returncode: int | None = None

    def kill(self) -> None:
        self.returncode = -9

    def terminate(self) -> None:
        self.returncode = self.returncode or -15

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        return self.returncode


def note(worker: WorkerProcess, name: str) -> None:
    """Write what a worker does that begins an image."""
    worker.csv.with_suffix(".last").write_text(name, encoding="utf-8")


@pytest.mark.parametrize("lives", [False, True])
def test_a_worker_is_killed_when_it_has_shown_no_sign_of_life_for_15_minutes(
    lives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another has done its own images: what this one leaves goes to that one's GPU."""
    workers, looks = list[WorkerProcess](), itertools.count(1)

    def start(
        _: object, shard: Task, folder: Path, number: int, count: int, gpu: str
    ) -> WorkerProcess:
        process: Any = ended() if number == 1 else Hangs()
        workers.append(WorkerProcess(number, gpu, shard, folder / f"{number}.csv", process))
        if number == 1:
            write_run_record(workers[0].record, a_record())
        else:
            note(workers[1], "b.jpg")
        return workers[-1]

    def show() -> None:
        if lives:
            note(workers[1], "b.jpg")
            os.utime(workers[1].csv.with_suffix(".last"), (0, look := next(looks)))
            if look == 5:
                workers[1].process.terminate()  # at last

    monkeypatch.setattr("kernel.workers.start_worker", start)
    looks_every(400, monkeypatch, show)
    task = Task(Path("strips"), LAYOUTS["two-column"], [("a.jpg", 1), ("b.jpg", 1)])
    submission = Submission(tmp_path / "s.csv", task.layout, task.pairs)
    begin = time.monotonic()
    run = RunContext(Options(), Path("x"), Manifest([]), submission, Stages(), begin)
    found = run_workers(run, task, ["0", "1"], again=not lives)
    assert len(workers) == 2 and found.exit_codes[2] == (-15 if lives else -9)
    assert found.lost == {"1"} and workers[1].stalled != lives


@pytest.mark.parametrize(("begun", "minutes"), [(False, 5), (True, 15)])
def test_a_worker_that_hangs_before_its_first_image_is_killed_sooner(
    begun: bool, minutes: int, tmp_path: Path
) -> None:
    """There it imports and starts the GPU; an image may take long to read or to predict."""
    task, process = Task(Path(), LAYOUTS["two-column"], [("a.jpg", 1)]), cast(Any, Hangs())
    worker = WorkerProcess(1, "0", task, tmp_path / "1.csv", process)
    if begun:
        note(worker, "a.jpg")
    worker.collect(Submission(tmp_path / "s.csv", task.layout, task.pairs))
    for more_s, killed in ((60 * minutes - 30, False), (60, True)):
        worker.seen_s -= more_s
        _kill_stalled([worker])
        assert worker.stalled == killed


@pytest.mark.parametrize("gpus", [["0"], ["0", "1"]])
def test_gpus_that_hang_before_an_image_are_tried_once_more(gpus: list[str]) -> None:
    """It may have been the disk, and no image made them hang; then all run on the CPU."""
    task = Task(Path("strips"), LAYOUTS["two-column"], [(name, 1) for name in NAMES])
    hung = Round([], dict.fromkeys(range(len(gpus)), -9), lost=set(gpus), stalled=set(gpus))
    again = Plan(task, gpus, gpus, first=True).next(hung, task, grew=False)
    assert again and (again.gpus, again.task.names) == (gpus, NAMES)
    on_cpu = again.next(hung, task, grew=False)
    assert on_cpu and on_cpu.rescue and on_cpu.task.names == NAMES


ALL = ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize(
    ("gives", "hangs", "expected"),
    [
        (["a.jpg"], 1, [("0", ALL), ("", ["b.jpg"]), ("0", ["c.jpg"])]),
        ([], 1, [("0", ALL), ("", ["a.jpg"]), ("0", ["b.jpg", "c.jpg"])]),
        ([], 2, [("0", ALL), ("", ["a.jpg"]), ("0", ALL[1:]), ("", ["b.jpg"]), ("", ["c.jpg"])]),
    ],
)
def test_what_hangs_the_only_gpu_runs_on_the_cpu_and_the_rest_on_that_gpu(
    gives: list[str],
    hangs: int,
    expected: list[tuple[str, list[str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No other worker outlives the one that hangs: without a kill the hour would be over.

    A GPU that has given nothing yet may have waited for the disk: once more it is tried.
    """
    runs = list[tuple[str, list[str]]]()

    def start(
        _: object, task: Task, folder: Path, number: int, count: int, gpu: str
    ) -> WorkerProcess:
        hung = bool(gpu) and [device for device, _ in runs].count(gpu) < hangs
        process: Any = Hangs() if hung else ended()
        runs.append((gpu, task.names))
        worker = WorkerProcess(number, gpu, task, folder / f"{len(runs)}.csv", process)
        made = Submission(worker.csv, task.layout, task.pairs, whole=False)
        for name in gives if hung else task.names:
            made.set_masks(name, {1: "1 1"})
        made.save()
        if not hung:
            write_run_record(worker.record, a_record())
        note(worker, next(name for name in task.names if not hung or name not in gives))
        return worker

    monkeypatch.setattr("kernel.workers.start_worker", start)
    monkeypatch.setattr("kernel.workers.gpus_of", lambda count: ["0"])
    looks_every(500, monkeypatch)
    task = Task(Path("strips"), LAYOUTS["two-column"], [(name, 1) for name in ALL])
    submission = Submission(tmp_path / "s.csv", task.layout, task.pairs)
    begin = time.monotonic()
    run = RunContext(Options(), Path("x"), Manifest([]), submission, Stages(), begin)
    predict_by_workers(run, task, 1)
    assert runs == expected
    assert submission.done == set(ALL)


def test_a_save_that_takes_long_is_no_hang_of_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks at its files a worker may have done anything."""
    order = list[str]()
    monkeypatch.setattr("kernel.workers._collect", lambda *_: order.append("look"))
    monkeypatch.setattr("kernel.workers._kill_stalled", lambda _: order.append("kill"))
    monkeypatch.setattr("kernel.workers.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(Submission, "save_throttled", lambda _: order.append("save"))
    task = Task(Path("strips"), LAYOUTS["two-column"], [("a.jpg", 1)])
    worker = WorkerProcess(1, "", task, tmp_path / "1.csv", ended())
    write_run_record(worker.record, a_record())
    monkeypatch.setattr("kernel.workers.start_worker", lambda *_: worker)
    submission = Submission(tmp_path / "s.csv", task.layout, task.pairs)
    begin = time.monotonic()
    run = RunContext(Options(), Path("x"), Manifest([]), submission, Stages(), begin)
    run_workers(run, task, [""], again=True)
    assert order[:3] == ["look", "kill", "save"]


def test_a_round_whose_files_cannot_be_removed_is_one_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, **_: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    task = Task(Path("strips"), LAYOUTS["two-column"], [("a.jpg", 1)])
    worker = WorkerProcess(1, "", task, tmp_path / "1.csv", ended())
    write_run_record(worker.record, a_record())
    monkeypatch.setattr("kernel.workers.start_worker", lambda *_: worker)
    monkeypatch.setattr("kernel.workers.COLLECT_S", 0.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    submission = Submission(tmp_path / "s.csv", task.layout, task.pairs)
    run = RunContext(Options(), Path("x"), Manifest([]), submission, Stages(), time.monotonic())
    with monkeypatch.context() as disk:
        disk.setattr(os, "rmdir", refuse)
        found = run_workers(run, task, [""], again=True)
    assert len(found.records) == 1 and not found.exit_codes


@pytest.mark.parametrize("shift_s", [-3600, 0, 3600])
def test_a_clock_that_is_set_makes_no_worker_hang(shift_s: float, tmp_path: Path) -> None:
    """What counts is when a change was seen, not the time that a file has."""
    task, process = Task(Path(), LAYOUTS["two-column"], [("a.jpg", 1)]), ended()
    worker = WorkerProcess(1, "0", task, tmp_path / "1.csv", process)
    submission = Submission(tmp_path / "s.csv", task.layout, task.pairs)
    for shown in range(2):
        note(worker, "a.jpg")
        written = time.time() + shift_s + shown
        os.utime(tmp_path / "1.last", (written, written))
        worker.collect(submission)
        assert 0 <= worker.idle_s() < 300
        worker.seen_s -= 700
        worker.collect(submission)
        assert worker.idle_s() >= 700


def test_a_worker_shows_a_sign_of_life_with_each_step(
    session_light: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large image may take an hour, one step of it does not."""
    last, written, run_step = tmp_path / "1.last", list[int](), Scheduler._run_step

    def run_and_look(*given: Any) -> None:
        os.utime(last, ns=(0, 0))
        run_step(*given)
        written.append(last.stat().st_mtime_ns)

    monkeypatch.setattr(Scheduler, "_run_step", run_and_look)
    predict(session_light, images, tmp_path / "1.csv", worker=True)
    assert len(written) > len(NAMES) and all(written)
    assert last.read_text(encoding="utf-8") == NAMES[-1]


def test_a_sign_of_life_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "gone" / "1.last")
    with stages("load"):
        pass
    assert stages.seconds.keys() == {"load"}


class Stuck:
    """A process that a kill does not end, for the system waits for its device."""

    returncode = None

    def __init__(self) -> None:
        self.polls = 0

    def kill(self) -> None:
        """No more than `terminate`."""

    terminate = kill

    def poll(self) -> None:
        self.polls += 1
        assert self.polls < 100, "waits for its end"

    def wait(self, timeout: float | None = None) -> None:
        assert timeout, "waits for its end"
        raise subprocess.TimeoutExpired("worker", timeout)


def test_a_worker_that_no_kill_ends_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves goes to the other's GPU, the image that it was at behind the others."""

    def start(
        _: object, shard: Task, folder: Path, number: int, count: int, gpu: str
    ) -> WorkerProcess:
        process: Any = ended() if number == 1 else Stuck()
        worker = WorkerProcess(number, gpu, shard, folder / f"{number}.csv", process)
        note(worker, shard.names[0])
        if number == 1:
            write_run_record(worker.record, a_record())
        return worker

    monkeypatch.setattr("kernel.workers.start_worker", start)
    looks_every(320, monkeypatch)
    task = Task(Path("strips"), LAYOUTS["two-column"], [("a.jpg", 1), ("b.jpg", 1)])
    submission = Submission(tmp_path / "s.csv", task.layout, task.pairs)
    begin = time.monotonic()
    run = RunContext(Options(), Path("x"), Manifest([]), submission, Stages(), begin)
    found = run_workers(run, task, ["0", "1"], again=True)
    assert (found.exit_codes, found.lost, found.suspects) == ({2: -9}, {"1"}, {"b.jpg"})


# --- the end of a round ---------------------------------------------------------------------------

WORKS = """
import pathlib, signal, sys, time
output = pathlib.Path(sys.argv[1])
output.write_text("ImageId_ClassId,EncodedPixels\\nb.jpg_1,1 1\\n")
time.sleep(60)
"""


@pytest.mark.parametrize(("dies", "code"), [("os.abort()", -6), ("os._exit(2)", 2)])
def test_a_round_ends_where_what_a_worker_leaves_has_no_other(
    dies: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one plans its time for its own images alone: the next round for all.

    What one refuses where the other has done an image is its own fault, as a read that fails once.
    """
    starts = list[str]()

    def start(command: list[str], **_: object) -> Any:
        output = Path(command[command.index("--output") + 1])
        starts.append(output.name)
        if output.name != "2.csv":
            output.with_suffix(".last").write_text("a.jpg", encoding="utf-8")
            return popen([sys.executable, "-c", f"import os; {dies}"])
        worker = popen([sys.executable, "-c", WORKS, str(output)])
        while not output.exists():
            time.sleep(0.05)
        return worker

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    task = Task(Path("strips"), LAYOUTS["two-column"], [(f"{name}.jpg", 1) for name in "abcd"])
    submission = Submission(tmp_path / "s.csv", task.layout, task.pairs)
    context = RunContext(
        Options(budget_s=3600), Path("x"), Manifest([]), submission, Stages(), time.monotonic()
    )
    found = run_workers(context, task, ["0", "1"], again=True)
    assert starts == ["1.csv", "2.csv", "1-again.csv"]
    assert next(iter(found.exit_codes.items())) == (1, code) and found.exit_codes[2] == -15
    assert found.gpus == {"1"} and submission.done == {"b.jpg"}
    assert found.lost == {"0"} and found.suspects == {"a.jpg"}


def test_on_workers_that_all_refuse_no_other_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen, starts = subprocess.Popen, list[str]()

    def start(command: list[str], **_: object) -> Any:
        starts.append(Path(command[command.index("--output") + 1]).name)
        return popen([sys.executable, "-c", "import os; os._exit(2)"])

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr("kernel.workers.COLLECT_S", 0.01)
    task = Task(Path("strips"), LAYOUTS["two-column"], [("a.jpg", 1), ("b.jpg", 1)])
    submission = Submission(tmp_path / "s.csv", task.layout, task.pairs)
    begin = time.monotonic()
    run = RunContext(Options(), Path("x"), Manifest([]), submission, Stages(), begin)
    found = run_workers(run, task, ["0", "1"], again=True)
    assert found.exit_codes == {1: 2, 2: 2} and found.refused
    assert starts == ["1.csv", "2.csv"]


def test_a_gpu_is_lost_only_where_the_last_worker_on_it_died_by_itself(tmp_path: Path) -> None:
    """One that was interrupted may have gone on."""
    task, process = Task(Path(), LAYOUTS["two-column"], [("a.jpg", 1)]), ended()
    first = WorkerProcess(1, "0", task, tmp_path / "1.csv", process, ended_unasked=True)
    again = WorkerProcess(1, "0", task, tmp_path / "1-again.csv", process, is_replacement=True)
    assert _read_round(set(), [first, again]).lost == set()
    again.ended_unasked = True
    assert _read_round(set(), [first, again]).lost == {"0"}


def test_seconds_of_workers_that_run_at_once_are_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = a_record(stages={"load": 2.0})
    given = Round(records=[record, record])
    monkeypatch.setattr("kernel.workers.run_workers", lambda *_, **__: given)
    submission = Submission(tmp_path / "s.csv", LAYOUTS["two-column"], [])
    submission.done.update(NAMES)
    task = Task(Path("strips"), submission.layout, [(name, 1) for name in NAMES])
    begin = time.monotonic()
    context = RunContext(Options(), Path(), Manifest([]), submission, Stages(), begin)
    predict_by_workers(context, task, 2)
    assert context.stages.seconds == {"load": 2.0}
    assert context.stages.networks["a", Half.ENCODER] == pytest.approx(2.1)
