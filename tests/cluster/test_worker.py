"""A worker, called here as Ray Data calls it: the kernel's masks, whatever the parts are."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from helpers import (
    CPU,
    LABELS,
    ROOT,
    SMALL,
    change_manifest,
    decode_by_hand,
    draw_image,
    predict,
    read_manifest,
    read_submission,
    save_strips,
)
from safetensors.torch import load_file, save_file

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[cluster]'")

from ray.exceptions import UserCodeException

from cluster.images import ImageSet
from cluster.output import Output
from cluster.worker import FOLDERS, READERS, Worker, make_folder, manifest_hash
from kernel.competition import SEVERSTAL
from kernel.device import DeviceLost
from kernel.images import Image, read_image

NAMES = [f"{index}.jpg" for index in range(7)]


@pytest.fixture(autouse=True)
def threads_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker says in its process's environment how many threads it has."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def make_worker(
    bundle: Path,
    images: Path | ImageSet,
    batch_size: int = 0,
    early_exit: bool = True,
    output: Path | None = None,
    image: Image | None = None,
) -> Worker:
    """A worker of images in a folder, or elsewhere; it is checked on the first, or on `image`."""
    if isinstance(images, Path):
        image = image if image is not None else read_image(images / NAMES[0], SEVERSTAL)
        images = ImageSet(f"file://{images}", [], f"file://{images}")
    assert image is not None
    given = str(bundle), manifest_hash(bundle), image, batch_size, early_exit
    return Worker(images, begin_at(output or bundle.parent / "out"), *given, cpus=1)


def begin_at(folder: Path) -> Output:
    """An output as the driver leaves it to the workers."""
    output = Output(str(folder))
    output.begin({})
    return output


def rles_of(rows: pa.Table) -> dict[tuple[str, int], str]:
    found = {(row["image"], row["class"]): row["rle"] for row in rows.to_pylist()}
    assert len(found) == rows.num_rows
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_are_the_kernels_with_a_bad_image_among_them(
    batch_size: int, dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    save_strips(folder, NAMES, [SMALL, SMALL, (50, 70), SMALL, (50, 70), SMALL, SMALL])
    (folder / "3.jpg").write_bytes(b"no image")
    record = predict(dataset, folder, tmp_path / "out.csv", batch_size=batch_size)
    expected = read_submission(tmp_path / "out.csv")
    assert any(expected.values()) and not all(expected.values())
    worker, rows = make_worker(dataset, folder, batch_size), list[dict[str, Any]]()
    for names in (NAMES[:4], NAMES[4:]):
        part = worker.predict(names)
        assert part["image"].to_pylist() == [name for name in names for _ in LABELS]
        rows += part.to_pylist()
    assert {(row["image"], row["class"]): row["rle"] for row in rows} == expected
    assert {row["image"]: row["fault"] for row in rows if row["fault"]} == record["faults"]
    shares = {row["image"]: row["share"] for row in rows}
    assert shares == {name: work["share"] for name, work in record["work"].items()} | {
        "3.jpg": None
    }
    assert all(row["seconds"] > 0 for row in rows)


def test_pixels_are_those_of_the_mask(session_light: Path, tmp_path: Path) -> None:
    save_strips(tmp_path, NAMES[:2])
    rows = make_worker(session_light, tmp_path).predict(NAMES[:2]).to_pylist()
    areas = [int(decode_by_hand(row["rle"], SMALL).sum()) for row in rows]
    assert [row["pixels"] for row in rows] == areas
    assert max(areas) > 0


def test_every_pass_gives_the_same_rows_as_the_early_exit(dataset: Path, tmp_path: Path) -> None:
    change_manifest(dataset, threshold=0.95)  # most pixels are surely off before the end
    save_strips(tmp_path / "images", NAMES)
    early, every = (
        make_worker(dataset, tmp_path / "images", early_exit=early).predict(NAMES)
        for early in (True, False)
    )
    assert rles_of(early) == rles_of(every)
    assert set(every["share"].to_pylist()) == {1.0}
    assert min(early["share"].to_pylist()) < 1


@pytest.mark.parametrize(("gpu", "device"), [(True, "meta"), (False, "cpu")])
def test_only_a_worker_of_a_gpu_takes_one_and_each_has_its_threads(
    gpu: bool, device: str, session_light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that share a machine's processors would all take its first one."""
    threads = list[int]()
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    devices = list[torch.device]()
    monkeypatch.setattr("cluster.worker.pick_device", lambda: torch.device("meta"))
    monkeypatch.setattr(Worker, "_load", lambda _, device: devices.append(device))
    save_strips(tmp_path, NAMES[:1])
    image, sha256 = read_image(tmp_path / NAMES[0], SEVERSTAL), manifest_hash(session_light)
    images, output = ImageSet("memory://mill", [], "memory://mill"), begin_at(tmp_path)
    Worker(images, output, str(session_light), sha256, image, 0, True, 3, gpu)
    assert (threads, os.environ["OMP_NUM_THREADS"]) == ([3], "3")
    assert devices == [torch.device(device)]


def test_a_device_that_is_lost_half_way_costs_no_image(
    session_light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_strips(tmp_path, NAMES)
    worker = make_worker(session_light, tmp_path)
    expected = rles_of(worker.predict(NAMES))
    run_encoder, calls = worker.scheduler.source.run_encoder, list[int]()

    def lose(pass_id: int, images: Any) -> Any:
        calls.append(pass_id)
        if len(calls) == 4:
            raise DeviceLost("cuda fails")
        return run_encoder(pass_id, images)

    monkeypatch.setattr(worker.scheduler.source, "run_encoder", lose)
    monkeypatch.setattr("kernel.scheduling.device_usable", lambda _: False)
    assert rles_of(worker.predict(NAMES)) == expected
    assert len(calls) == 4
    assert worker.scheduler.source.device == CPU  # loaded anew


def test_what_the_networks_fail_on_runs_again_on_plain_pytorch(
    session_light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the kernel; an image that could not be read does not."""
    save_strips(tmp_path, NAMES)
    (tmp_path / NAMES[3]).write_bytes(b"no image")
    worker = make_worker(session_light, tmp_path)
    expected = rles_of(worker.predict(NAMES))
    run_encoder, calls = worker.scheduler.source.run_encoder, list[int]()

    def fail(pass_id: int, images: Any) -> Any:
        calls.append(pass_id)
        if len(calls) in (2, 5):
            raise RuntimeError("no kernel image is available")
        return run_encoder(pass_id, images)

    monkeypatch.setattr(worker.scheduler.source, "run_encoder", fail)
    assert "plain" not in vars(worker)  # loaded where it is needed
    rows = worker.predict(NAMES)
    assert rles_of(rows) == expected
    assert {row["image"] for row in rows.to_pylist() if row["fault"]} == {NAMES[3]}
    assert worker.plain.source.device == CPU


def test_where_plain_pytorch_fails_too_the_first_fault_stands(
    session_light: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As for want of memory for a second ensemble: no other image's rows are lost with it."""
    save_strips(tmp_path, NAMES)
    worker = make_worker(session_light, tmp_path)
    expected = rles_of(worker.predict(NAMES))
    run_encoder = worker.scheduler.source.run_encoder

    def fail(pass_id: int, images: Any) -> Any:
        calls.append(pass_id)
        if len(calls) == 2:
            raise RuntimeError("no kernel image is available")
        return run_encoder(pass_id, images)

    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryError

    calls = list[int]()
    monkeypatch.setattr(worker.scheduler.source, "run_encoder", fail)
    monkeypatch.setattr(worker, "_load", refuse)
    rows = worker.predict(NAMES)
    assert "plain PyTorch fails, too: MemoryError()" in caplog.text
    failed = {row["image"] for row in rows.to_pylist() if row["fault"]}
    assert len(failed) == 1
    assert rles_of(rows) == {
        pair: "" if pair[0] in failed else rle for pair, rle in expected.items()
    }


def describe(bundle: Path) -> None:
    (bundle / "competition.json").write_text((ROOT / "competitions" / "severstal.json").read_text())


def fit_again(bundle: Path) -> None:
    """Other weights in a file of which the manifest gives no hash."""
    path = bundle / read_manifest(bundle)["members"][0]["file"]
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "change", [lambda bundle: change_manifest(bundle, threshold=0.7), describe, fit_again]
)
def test_a_bundle_that_changed_under_way_is_refused(
    change: Callable[[Path], object], light_bundle: Path, tmp_path: Path
) -> None:
    save_strips(tmp_path, NAMES[:1])
    image, sha256 = read_image(tmp_path / NAMES[0], SEVERSTAL), manifest_hash(light_bundle)
    images, output = ImageSet("memory://mill", [], "memory://mill"), begin_at(tmp_path)
    change(light_bundle)
    with pytest.raises(ValueError, match="it is not the bundle this run began with"):
        Worker(images, output, str(light_bundle), sha256, image, 0, True, 1)


def test_an_output_that_a_worker_does_not_see_is_refused(
    session_light: Path, tmp_path: Path
) -> None:
    """A folder that is there on each machine, but another one on this."""
    save_strips(tmp_path, NAMES[:1])
    image, sha256 = read_image(tmp_path / NAMES[0], SEVERSTAL), manifest_hash(session_light)
    images, output = ImageSet("memory://mill", [], "memory://mill"), Output(str(tmp_path))
    with pytest.raises(ValueError, match="does not see what the run wrote there: name a folder"):
        Worker(images, output, str(session_light), sha256, image, 0, True, 1)


def test_a_bundle_elsewhere_is_copied_here(light_bundle: Path, tmp_path: Path) -> None:
    import fsspec

    save_strips(tmp_path, NAMES[:1])
    store = fsspec.filesystem("memory")
    store.put(str(light_bundle), "/mill/bundle", recursive=True)
    here = make_worker(light_bundle, tmp_path)
    image, sha256 = read_image(tmp_path / NAMES[0], SEVERSTAL), manifest_hash(light_bundle)
    worker = Worker(here.images, here.output, "memory://mill/bundle", sha256, image, 0, True, 1)
    assert rles_of(worker.predict(NAMES[:1])) == rles_of(here.predict(NAMES[:1]))


def test_folders_of_workers_that_were_killed_go_with_the_next_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, another = tmp_path / f"{FOLDERS}killed", tmp_path / "another-program"
    for folder in (killed, another):
        (folder / "bundle").mkdir(parents=True)
        (folder / "lock").touch()  # that nobody holds
    alive = [make_folder(), make_folder()]
    assert sorted(tmp_path.iterdir()) == sorted([*alive, another])


def faults_of(rows: pa.Table) -> dict[str, str]:
    return {row["image"]: row["fault"] for row in rows.to_pylist()}


def test_a_part_of_which_nothing_can_be_fetched_fails_and_the_last_try_says_why(
    session_light: Path, tmp_path: Path
) -> None:
    """The store is away, or this machine lacks a folder that others have."""
    worker = make_worker(session_light, tmp_path, image=draw_image(0))
    for part in (NAMES, NAMES[:1]):
        words = rf"none of the {len(part)} images .* fetched: .*no such file"
        with pytest.raises(UserCodeException, match=words):
            worker.predict(part)
    worker.last_try = True
    assert "no such file" in faults_of(worker.predict(NAMES[:1]))[NAMES[0]]
    worker.last_try = False
    (tmp_path / NAMES[2]).write_bytes(b"no image")  # but it is there
    faults = faults_of(worker.predict(NAMES))
    assert list(faults) == NAMES
    assert ["no such file" in fault for fault in faults.values()] == [
        name != NAMES[2] for name in NAMES
    ]


def test_what_a_store_does_not_give_has_no_rows_and_its_part_keeps_its_name(
    session_light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a fault it would never be tried again; read again, the part may have others left out."""
    save_strips(tmp_path, NAMES)
    throttled, out = set[str](), tmp_path / "out"

    def fetch(_: object, path: str) -> bytes:
        name = Path(path).name
        if name in throttled:
            raise PermissionError("ExpiredToken") if name == NAMES[1] else OSError("SlowDown")
        if name == NAMES[2]:
            raise FileNotFoundError(name)
        return (tmp_path / name).read_bytes()

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fetch)
    images, part = ImageSet("memory://mill", [], "memory://mill"), pa.table({"image": NAMES})
    worker = make_worker(session_light, images, image=draw_image(0), output=out)
    for lost in ({NAMES[1], NAMES[4]}, {NAMES[0]}, set[str]()):
        throttled.clear()
        throttled.update(lost)
        (totals,) = worker(part).to_pylist()
        assert (totals["images"], totals["faults"]) == (len(NAMES) - len(lost), 1)
        (written,) = out.glob("part-*.parquet")  # in the place of the one before
        rows = pq.read_table(written)
        assert rows["image"].to_pylist() == [
            name for name in NAMES if name not in lost for _ in LABELS
        ]
        assert [name for name, fault in faults_of(rows).items() if fault] == [NAMES[2]]
    throttled.add(NAMES[0])
    worker.last_try = True
    assert faults_of(worker.predict(NAMES[:1])) == {NAMES[0]: "SlowDown"}


def test_few_images_are_read_ahead(
    session_light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part may be larger than the memory."""
    save_strips(tmp_path, NAMES[:1])
    names, begun = [f"{index}.jpg" for index in range(40)], list[str]()

    def fetch(_: object, path: str) -> bytes:
        begun.append(path)
        return (tmp_path / NAMES[0]).read_bytes()

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fetch)
    worker = make_worker(
        session_light, ImageSet("memory://mill", [], "memory://mill"), image=draw_image(0)
    )
    ahead, run_strips = list[int](), worker.scheduler.predict_strips

    def count(strips: Any) -> Any:
        for done, state in enumerate(run_strips(strips), 1):
            ahead.append(len(begun) - done)
            yield state

    monkeypatch.setattr(worker.scheduler, "predict_strips", count)
    assert list(faults_of(worker.predict(names))) == names
    assert len(begun) == len(names) and max(ahead) == READERS
