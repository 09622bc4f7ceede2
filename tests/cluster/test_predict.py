"""The command: one run on one node that is started here, and what is refused before any work.

Runs on several nodes are in test_nodes.py.
"""

import itertools
import json
import os
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from helpers import (
    LABELS,
    ROOT,
    SMALL,
    Page,
    all_bytes,
    change_manifest,
    draw_image,
    error_of,
    exit_code,
    predict,
    run_script,
    save_image,
    save_strips,
    write_sample,
)

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[cluster]'")

import ray
from ray.data import DataContext
from ray.exceptions import AuthenticationError, RayError, UserCodeException

from cluster.engine import Workers, connect, predict_parts
from cluster.images import ImageSet, NotFetched
from cluster.output import Output, Totals, fault_rows
from cluster.predict import check_store, first_image, main, why_stopped
from cluster.worker import Worker
from kernel.competition import SEVERSTAL, load_competition
from kernel.images import read_image
from kernel.shipped import find_competition
from training import competition_files

NAMES = [f"{index:02}.jpg" for index in range(10)]
BAD = NAMES[4]
MASKS = (SMALL[0] // 4, SMALL[1] // 4)  # (H, W), smaller than their images as clouds' are


def options_of(folder: Path) -> list[str]:
    named = {"bundle": "dataset", "images": "images", "output": "out", "submission": "sample.csv"}
    return [word for key, value in named.items() for word in (f"--{key}", str(folder / value))]


def lay(folder: Path, bundle: Path, names: list[str]) -> None:
    """What the options name: the bundle, some strips and their sample."""
    shutil.copytree(bundle, folder / "dataset")
    save_strips(folder / "images", names)
    write_sample(folder / "sample.csv", names)


def replace_ray(monkeypatch: pytest.MonkeyPatch, predict_parts: Callable[..., object]) -> None:
    """Have a function stand for one worker on Ray."""
    monkeypatch.setattr("cluster.predict.connect", lambda _: None)
    monkeypatch.setattr("cluster.predict.plan_workers", lambda *_: Workers(1, 0, 1))
    monkeypatch.setattr("cluster.predict.warn_if_busy", lambda _: None)
    monkeypatch.setattr("cluster.predict.predict_parts", predict_parts)


@dataclass(frozen=True)
class Run:
    """What the command left, and what the kernel wrote for the same images."""

    folder: Path
    process: subprocess.CompletedProcess[str]
    kernel: bytes


@pytest.fixture(scope="module")
def done(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten colour images, one broken, in parts of three: the one worker takes every processor."""
    folder = tmp_path_factory.mktemp("cluster")
    shutil.copytree(tiny_bundle / "dataset", folder / "dataset")
    clouds = replace(find_competition("clouds"), image_size=SMALL, mask_size=MASKS)
    (folder / "dataset" / "competition.json").write_text(json.dumps(asdict(clouds)))
    change_manifest(folder / "dataset", competition=clouds.slug)
    for seed, name in enumerate(NAMES):
        planes = [draw_image(3 * seed + channel) for channel in range(3)]
        save_image(folder / "images" / name, np.dstack(planes))
    (folder / "images" / BAD).write_bytes(b"no image")
    sample = folder / "sample.csv"
    competition_files.write_sample(sample, sorted(NAMES, reverse=True), clouds, SMALL)
    predict(folder / "dataset", folder / "images", folder / "kernel.csv", sample=sample)
    words = [*options_of(folder), "--address", "local", "--images-per-part", "3"]
    words += ["--report", str(folder / "page.html")]
    process = run_script(ROOT / "cluster" / "predict.py", *words)
    assert process.returncode == 0, process.stdout + process.stderr
    return Run(folder, process, (folder / "kernel.csv").read_bytes())


def test_the_submission_is_the_kernels_to_the_byte(done: Run) -> None:
    assert (done.folder / "out" / "submission.csv").read_bytes() == done.kernel
    assert done.kernel.count(b"\n") == 1 + len(LABELS) * len(NAMES)


def test_masks_are_as_large_as_the_competition_says_and_see_colour(done: Run) -> None:
    rows = pd.concat(map(pd.read_parquet, (done.folder / "out").glob("part-*.parquet")))
    assert 0 < rows["pixels"].max() <= MASKS[0] * MASKS[1]
    grey = replace(load_competition(done.folder / "dataset"), channels=1)
    described = done.folder / "dataset" / "competition.json"
    before = described.read_bytes()
    described.write_text(json.dumps(asdict(grey)))
    options = {"sample": done.folder / "sample.csv"}
    predict(done.folder / "dataset", done.folder / "images", done.folder / "grey.csv", **options)
    described.write_bytes(before)
    assert (done.folder / "grey.csv").read_bytes() != done.kernel


def test_the_report_shows_the_images_that_have_a_mask(done: Run) -> None:
    page = Page((done.folder / "page.html").read_text())
    assert page.said("h1") == ["10 images have their rows; 1 of them could not be predicted"]
    rows = pd.concat(map(pd.read_parquet, (done.folder / "out").glob("part-*.parquet")))
    shown = [found["alt"].split()[0] for tag, found in page.tags if tag == "img"]
    assert sorted(shown) == sorted(set(rows[rows["pixels"] > 0]["image"]))
    assert page.said("td")[0] == BAD


def test_every_row_is_there_once_and_the_bad_image_is_named(done: Run) -> None:
    parts = list((done.folder / "out").glob("part-*.parquet"))
    rows = pd.concat(map(pd.read_parquet, parts))
    assert len(parts) == 4
    columns = ["image", "class", "rle", "pixels", "fault", "seconds", "share"]
    assert list(rows.columns) == columns
    pairs = list(zip(rows["image"], rows["class"], strict=True))
    assert sorted(pairs) == [(name, label) for name in NAMES for label in LABELS]
    faults = rows[rows["fault"] != ""]
    assert set(faults["image"]) == {BAD} and len(faults) == len(LABELS)
    assert not faults["rle"].any() and faults["share"].isna().all()
    assert rows[rows["fault"] == ""]["share"].between(0.01, 1).all()


def test_the_summary_says_what_was_done(done: Run) -> None:
    (line,) = [line for line in done.process.stdout.splitlines() if "images/s" in line]
    for words in ("10 images in", "1 faults", "% of the full work", "1 workers of"):
        assert words in line, line


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_cluster_with_gpus_writes_the_kernels_rows_however_long_a_part_takes(
    session_light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is declared to Ray; where CUDA is absent its worker runs on the CPU.

    There the memory that one pass frees is the next one's, in Ray's own thread, too.
    """

    class Counting(Worker):  # in this function: it is pickled whole
        def __call__(self, part: pa.Table) -> pa.Table:
            for _ in range(2):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                torch.ones(50_000_000)  # 200 MB, 48,828 pages
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            (tmp_path / "faults").write_text(str(faults))
            return super().__call__(part)

    monkeypatch.setattr("cluster.engine.Worker", Counting)
    lay(tmp_path, session_light, NAMES)
    sample, output = tmp_path / "sample.csv", tmp_path / "kernel.csv"
    predict(tmp_path / "dataset", tmp_path / "images", output, sample=sample)
    for name, text in {
        "USAGE_STATS_ENABLED": "0",
        "worker_niceness": "0",
        "AUTH_MODE": "disabled",
    }.items():
        monkeypatch.setenv(f"RAY_{name}", text)  # none that is set on the way stays
    monkeypatch.setattr(ray, "init", partial(ray.init, num_cpus=1, num_gpus=1))
    # A worker starts in more than a second:
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 1)
    words = [*options_of(tmp_path), "--address", "local", "--images-per-part", "3"]
    try:
        assert exit_code(main, *words) == 0
    finally:
        ray.shutdown()
    if not torch.cuda.is_available():
        assert int((tmp_path / "faults").read_text()) < 10_000
    parts = [pd.read_parquet(path) for path in (tmp_path / "out").glob("part-*.parquet")]
    assert sorted(part["image"].nunique() for part in parts) == [1, 3, 3, 3]
    assert (tmp_path / "out" / "submission.csv").read_bytes() == (
        tmp_path / "kernel.csv"
    ).read_bytes()


def test_a_run_with_nothing_left_to_do_changes_nothing(
    done: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cluster.predict.connect", lambda _: pytest.fail("needs no Ray"))
    before = all_bytes(done.folder / "out")
    assert exit_code(main, *options_of(done.folder)) == 0
    assert all_bytes(done.folder / "out") == before


def test_images_that_came_later_and_are_all_bad_have_their_rows_too(
    session_light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are checked on the first image of all, not of those that are left."""
    lay(tmp_path, session_light, ["a.jpg", "b.jpg"])
    (tmp_path / "images" / "b.jpg").write_bytes(b"torn")
    asked = list[Any]()

    def stop(rest: ImageSet, _: int, __: object, constructor: dict[str, Any], *___: object) -> None:
        asked.extend([rest.names, constructor["image"]])
        raise RuntimeError("far enough")

    replace_ray(monkeypatch, stop)
    monkeypatch.setattr("cluster.output.Output.done", lambda _: {"a.jpg"})
    assert exit_code(main, *options_of(tmp_path)) == 2
    assert asked[0] == ["b.jpg"]
    np.testing.assert_array_equal(asked[1], read_image(tmp_path / "images" / "a.jpg", SEVERSTAL))


@pytest.mark.parametrize("deadly", [{"b.jpg"}, {"a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"}])
def test_an_image_at_which_every_worker_dies_is_looked_for_and_stays_empty(
    deadly: set[str],
    session_light: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where all are such it is the workers' fault, and the run can be started again."""
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    lay(tmp_path, session_light, names)
    calls = list[object]()

    def predict_parts(rest: ImageSet, per_part: int, *given: Any) -> Totals:
        calls.append((list(rest.names), per_part))
        totals = Totals()
        for start in range(0, len(rest.names), per_part):
            part = rest.names[start : start + per_part]
            if deadly.isdisjoint(part):
                totals.add(given[-1].write_part(part, fault_rows(part, len(LABELS), "")))
        return totals

    replace_ray(monkeypatch, predict_parts)
    monkeypatch.setattr("cluster.predict.connect_anew", lambda _: calls.append("anew"))
    words = [*options_of(tmp_path), "--images-per-part", "2"]
    all_dead = len(deadly) == len(names)
    assert exit_code(main, *words) == (2 if all_dead else 0)
    assert calls == [(names, 2), "anew", (names if all_dead else names[:2], 1)]
    output = Output(str(tmp_path / "out"))
    fault = "it failed in its part and alone: the log says why"
    assert output.done() == (set() if all_dead else set(names))
    assert output.faults(9) == ({} if all_dead else {"b.jpg": fault})
    assert (f"b.jpg stays empty: {fault}" in caplog.messages) == (not all_dead)
    error = "5 images have no rows, such as 'a.jpg': start the run again" if all_dead else ""
    assert error in capsys.readouterr().err


def test_a_folder_that_the_machines_do_not_share_stops_the_run(
    session_light: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two folders stand for those of one name on two machines."""
    lay(tmp_path, session_light, NAMES)
    there = Output(str(tmp_path / "there"))
    there.begin({})

    def predict_parts(asked: ImageSet, per_part: int, *given: Any) -> Totals:
        totals, machines = Totals(), itertools.cycle([given[-1], there])
        for start in range(0, len(asked.names), per_part):
            part = asked.names[start : start + per_part]
            rows = fault_rows(part, len(LABELS), "")
            totals.add(next(machines).write_part(part, rows))
        return totals

    replace_ray(monkeypatch, predict_parts)
    monkeypatch.setattr("cluster.predict.connect_anew", lambda _: None)
    assert exit_code(main, *options_of(tmp_path), "--images-per-part", "3") == 2
    words = "out: the rows of 4 images were written by other machines and are not seen here: name a"
    assert words in error_of(capsys.readouterr().err)
    assert Output(str(tmp_path / "out")).faults(9) == {}


@pytest.mark.parametrize(
    ("given", "lost", "done", "away"),
    [
        ("", ["a", "b"], [], True),
        ("", ["a"], ["c"], True),
        ("c", ["a", "b"], ["c"], False),  # these alone cannot be read
        ("b", ["a", "b"], [], False),
        ("", ["gone"], ["a"], False),
        ("", ["a"], ["gone"], False),  # the store says so
        ("", ["a"], [], False),  # nothing tells
        ("http://there/c", ["http://away/a"], ["http://there/c", "http://away/b"], True),
        ("http://there/c", ["http://away/a"], ["http://there/c"], False),
    ],
)
def test_lost_images_are_not_tried_alone_while_their_store_is_away(
    given: str, lost: list[str], done: list[str], away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As faults they would never be tried again."""

    def load(_: object, name: str) -> None:
        fault = FileNotFoundError() if name == "gone" else PermissionError()
        if name != given:
            raise NotFetched("no such host") from fault
        raise ValueError("no image")

    monkeypatch.setattr(ImageSet, "load", load)
    images = ImageSet("memory://strips", [], "memory://strips")
    if not away:
        return check_store(images, lost, done)
    with pytest.raises(RuntimeError, match=r"a and others .* cannot be fetched: no such host; st"):
        check_store(images, lost, done)


def test_a_readable_image_is_looked_for_in_all_of_the_list(tmp_path: Path) -> None:
    """One folder of broken files at its start stops no run."""
    names = [f"{index:03}.jpg" for index in range(250)]
    strips = save_strips(tmp_path, names[150:])
    images = ImageSet(f"file://{tmp_path}", names, f"file://{tmp_path}")
    np.testing.assert_array_equal(first_image(images), strips["150.jpg"])
    np.testing.assert_array_equal(
        first_image(replace(images, names=names[200:])), strips["200.jpg"]
    )


@pytest.mark.parametrize(("patience_s", "tried"), [(60, 100), (-1, 1)])
def test_a_store_that_lets_each_image_wait_is_not_tried_a_hundred_times(
    patience_s: int, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.predict.FIRST_S", patience_s)
    images = ImageSet("memory://away", [f"{index}.jpg" for index in range(200)], "memory://away")
    with pytest.raises(ValueError, match=f"none of {tried} images that were tried can be read"):
        first_image(images)


@pytest.mark.parametrize(
    ("written", "passed"),
    [
        ([], ""),
        (
            ["01.jpg", "03.jpg"],
            "; 2 images have no rows that others behind them have: '00.jpg', '02.jpg'",
        ),
    ],
)
def test_more_parts_than_a_run_may_lose_stop_it_and_say_why(
    written: list[str],
    passed: str,
    session_light: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lay(tmp_path, session_light, NAMES)

    def give_up(asked: ImageSet, *given: Any) -> None:
        for name in written:
            given[-1].write_part([name], fault_rows([name], len(LABELS), ""))
        said = "none of the 16 images of a part can be fetched:\nno such host"
        raise UserCodeException(
            f"{said}\nFailed to apply UDF transform after 1/1 attempts"
        )  # Ray's

    replace_ray(monkeypatch, give_up)
    assert exit_code(main, *options_of(tmp_path)) == 2
    assert error_of(capsys.readouterr().err) == (
        f"the run stopped: none of the 16 images of a part can be fetched: no such host{passed}; "
        "start it again to continue, or leave out the images that are missing or end their "
        "workers: --images-per-part 1 finds them"
    )


def test_why_a_run_stopped_is_said_where_its_output_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: object) -> None:
        raise ValueError("cannot be read")

    monkeypatch.setattr(Output, "done", away)
    error = UserCodeException("no right to write")
    assert why_stopped(error, NAMES, Output(str(tmp_path))) == "no right to write"


def test_what_a_worker_refuses_at_its_start_is_what_the_run_ends_with(
    session_light: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ray has it behind a traceback, and no image is to blame."""
    refusal = "ValueError: file:///out: mill-2 does not see what the run wrote there"

    def predict_parts(*_: object) -> Totals:
        raise RayError(
            "The actor died because of an error raised in its creation task, ray::MapWorker\n"
            f"  File worker.py, line 106, in __init__\n{refusal}\n"
        )

    lay(tmp_path, session_light, NAMES[:1])
    replace_ray(monkeypatch, predict_parts)
    assert exit_code(main, *options_of(tmp_path)) == 2
    assert error_of(capsys.readouterr().err).endswith(f"the run stopped: {refusal}")


def test_a_signal_is_answered_beside_ray_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    ignore = lambda *_, **__: signal.signal(signal.SIGTERM, signal.SIG_IGN)  # noqa: E731
    monkeypatch.setattr("ray.init", ignore)
    before = signal.getsignal(signal.SIGTERM)
    try:
        connect("local")
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
def test_parts_are_handed_over_without_a_task_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tens of thousands of tasks would run before the first image is read."""
    parts, totals = list[list[str]](), Totals(images=4, masks=1, share=0.5)

    def put(part: Any) -> ray.ObjectRef[Any]:
        parts.append(part["image"].to_pylist())
        return ray.ObjectRef.from_random()

    monkeypatch.setattr("ray.put", put)
    no_task = lambda *_, **__: pytest.fail("a task")  # noqa: E731
    monkeypatch.setattr("ray.remote_function.RemoteFunction._remote", no_task)
    monkeypatch.setattr("ray.data.Dataset.iter_rows", lambda _: iter([asdict(totals)] * 2))
    images, one = ImageSet("memory://mill", NAMES, "memory://mill"), Workers(1, cpus=1)
    found = predict_parts(images, 4, one, {}, Output(str(tmp_path)))
    assert found == Totals(images=8, masks=2, share=1.0)
    assert parts == [NAMES[:4], NAMES[4:8], NAMES[8:]]


def test_a_cluster_that_wants_a_token_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def refuse(*_: object, **__: object) -> None:
        raise AuthenticationError("no authentication token was found")

    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(ValueError, match="--address auto: no cluster answers: no authentication"):
        connect("auto")


# --- refused before any work ----------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


REFUSED: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no images": (
        lambda folder: shutil.rmtree(folder / "images"),
        [],
        "images: cannot be read: [Errno 2] No such file",
    ),
    "not one that can be read": (
        lambda folder: [path.write_bytes(b"no") for path in (folder / "images").iterdir()],
        [],
        "images: none of 2 images that were tried can be read",
    ),
    "a member is missing": (
        lambda folder: (folder / "dataset" / "fpn.safetensors").unlink(),
        [],
        "fpn.safetensors: no such file; the bundle is not whole",
    ),
    "a member changed": (
        lambda folder: change_manifest(
            folder / "dataset",
            members=[{**read_member(folder), "sha256": "0" * 64}],
        ),
        [],
        "the manifest says 000000000000",
    ),
    "no bundle": (
        lambda folder: (folder / "dataset" / "ensemble.json").unlink(),
        [],
        "ensemble.json: no such file",
    ),
    "an output with other things": (
        lambda folder: save_strips(folder / "out", ["thesis.jpg"]),
        [],
        "out: holds other things (thesis.jpg); name another",
    ),
    "a page in the place of a folder": (
        lambda _: None,
        ["--report", os.sep],
        f"{os.sep}: a folder, expected a file; name the file in it",
    ),
    "two images of a name": (
        lambda folder: save_strips(folder / "images" / "2024", ["b.jpg"]),
        [],
        "images: 2024/b.jpg and b.jpg are both 'b.jpg' in a submission: rename one",
    ),
    "a page in a store": (
        lambda _: None,
        ["--report", "s3://mill/page.html"],
        "--report s3://mill/page.html: expected a file on this machine",
    ),
    "no sample": (lambda folder: (folder / "sample.csv").unlink(), [], "sample.csv"),
    "a sample of other images": (
        lambda folder: write_sample(folder / "sample.csv", ["c.jpg", "d.jpg"]),
        [],
        "--submission: none of its 2 images, like 'c.jpg', is in file://",
    ),
    "no cluster answers": (
        lambda _: None,
        ["--address", f"127.0.0.1:{free_port()}"],
        "no cluster answers: [Errno 111] Connection refused",
    ),
    "no worker": (lambda _: None, ["--workers", "0"], "--workers 0: expected 1 or more"),
    "GPUs and threads": (lambda _: None, ["--gpus", "1", "--workers", "2"], "one worker a GPU"),
}


def test_without_ray_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray.exceptions", None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "cluster" / "predict.py"))
    assert ended.value.code == 2
    assert error_of(capsys.readouterr().err).endswith("; pip install -e '.[cluster]'")


def read_member(folder: Path) -> dict[str, object]:
    from helpers import read_manifest

    member: dict[str, object] = read_manifest(folder / "dataset")["members"][0]
    return member


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_refuses(
    case: str, session_light: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, options, words = REFUSED[case]
    lay(tmp_path, session_light, ["a.jpg", "b.jpg"])
    spoil(tmp_path)
    before = all_bytes(tmp_path)
    assert exit_code(main, *options_of(tmp_path), *options) == 2
    assert words in error_of(capsys.readouterr().err)
    assert all_bytes(tmp_path) == before


# --- workers --------------------------------------------------------------------------------------


def node(**resources: float) -> dict[str, object]:
    return {"Alive": True, "Resources": resources}


DEAD: dict[str, object] = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}


@pytest.mark.parametrize(
    ("nodes", "asked", "planned"),
    [
        ([node(CPU=2)], (None, None, None), (1, 0, 2)),
        ([node(CPU=2)], (None, 2, None), (2, 0, 1)),
        ([node(CPU=2)], (None, None, 1), (2, 0, 1)),
        ([node(CPU=8), node(CPU=4), node(memory=1), DEAD], (None, None, None), (3, 0, 4)),
        ([node(CPU=8), node(CPU=8)], (None, 4, None), (4, 0, 4)),
        ([node(CPU=2), node(CPU=64), node(CPU=64)], (None, None, None), (2, 0, 64)),
        ([node(CPU=1), node(CPU=16)], (None, None, None), (1, 0, 16)),
        ([node(CPU=64), *[node(CPU=16)] * 40], (None, None, None), (44, 0, 16)),
        ([node(CPU=2), node(CPU=64), node(CPU=64)], (None, 2, None), (2, 0, 64)),
        ([node(CPU=3), node(CPU=4)], (None, None, None), (2, 0, 3)),
        ([node(CPU=16, GPU=4), node(CPU=16, GPU=4), DEAD], (None, None, None), (8, 1, 4)),
        ([node(CPU=16, GPU=4)], (3, None, None), (3, 1, 4)),
        ([node(CPU=16, GPU=4)], (0, None, None), (1, 0, 16)),
        ([node(CPU=16, GPU=4)], (None, None, 8), (2, 0, 8)),
    ],
)
def test_workers_are_one_a_gpu_or_one_a_machine_or_as_asked(
    nodes: list[dict[str, object]],
    asked: tuple[int | None, int | None, int | None],
    planned: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cluster.engine import Workers, plan_workers

    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert plan_workers(*asked) == Workers(*planned)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ((8, None, None), "--gpus 8: the cluster has 4: give fewer, or leave it out"),
        ((None, 3, 8), "--workers 3 of 8 threads: the cluster's machines have .16. processors"),
        ((None, None, 32), "--cpus-per-worker 32: .* have .16. processors, room for 0 workers: g"),
        ((None, 17, None), "--workers 17 of 1 threads"),
    ],
)
def test_more_than_the_cluster_has_is_refused(
    asked: tuple[int | None, int | None, int | None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.engine import plan_workers

    monkeypatch.setattr("ray.nodes", lambda: [node(CPU=16, GPU=4), DEAD])
    with pytest.raises(ValueError, match=words):
        plan_workers(*asked)


@pytest.mark.parametrize(
    ("workers", "free", "words"),
    [
        (Workers(4, gpus=1, cpus=4), {"GPU": 1.0}, "1 of the 4 GPUs that 4 workers of a GPU each "),
        (Workers(2, cpus=4), {}, "0 of the 8 CPUs that 2 workers of 4 threads each need are free"),
        (Workers(4, gpus=1, cpus=4), {"GPU": 4.0}, ""),  # their threads are not asked of Ray
        (Workers(2, cpus=4), {"CPU": 8.0, "GPU": 1.0}, ""),
    ],
)
def test_workers_that_wait_for_other_jobs_are_said(
    workers: Workers,
    free: dict[str, float],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from cluster.engine import warn_if_busy

    monkeypatch.setattr("ray.available_resources", lambda: free)
    warn_if_busy(workers)
    assert words in caplog.text and bool(caplog.text) == bool(words)
