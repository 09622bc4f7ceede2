"""A worker, called here as Ray Data calls it: the kernel's masks, whatever the parts are."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
    save_image,
    save_strips,
)
from safetensors.torch import load_file, save_file

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[cluster]'")

from ray.exceptions import UserCodeException

from cluster.images import ImageSet
from cluster.output import Output
from cluster.worker import (
    FOLDERS,
    Worker,
    make_folder,
    manifest_hash,
    read_strips,
    unpack_strips,
)
from kernel.competition import SEVERSTAL, Competition
from kernel.device import DeviceLost
from kernel.images import read_image

NAMES = [f"{index}.jpg" for index in range(7)]


@pytest.fixture(autouse=True)
def threads_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker says in its process's environment how many threads it has."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def part_of(folder: Path, names: list[str], competition: Competition = SEVERSTAL) -> pa.Table:
    """A part's strips, as the tasks beside the workers read them."""
    return read_strips(
        pa.table({"image": names}),
        ImageSet(f"file://{folder}", [], f"file://{folder}", competition),
    )


def make_worker(bundle: Path, images: Path, batch_size: int = 0, early_exit: bool = True) -> Worker:
    image = read_image(images / NAMES[0], SEVERSTAL)
    return Worker(str(bundle), manifest_hash(bundle), image, batch_size, early_exit, cpus=1)


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
        part = worker(part_of(folder, names))
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
    rows = make_worker(session_light, tmp_path)(part_of(tmp_path, NAMES[:2])).to_pylist()
    areas = [int(decode_by_hand(row["rle"], SMALL).sum()) for row in rows]
    assert [row["pixels"] for row in rows] == areas
    assert max(areas) > 0


def test_every_pass_gives_the_same_rows_as_the_early_exit(dataset: Path, tmp_path: Path) -> None:
    change_manifest(dataset, threshold=0.95)  # most pixels are surely off before the end
    save_strips(tmp_path / "images", NAMES)
    part = part_of(tmp_path / "images", NAMES)
    early, every = (
        make_worker(dataset, tmp_path / "images", early_exit=early)(part) for early in (True, False)
    )
    assert rles_of(early) == rles_of(every)
    assert set(every["share"].to_pylist()) == {1.0}
    assert min(early["share"].to_pylist()) < 1


@pytest.mark.parametrize(("cpus", "device"), [(0, "meta"), (2, "cpu")])
def test_only_a_worker_without_processors_of_its_own_takes_the_gpu(
    cpus: int, device: str, session_light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that share a machine's processors would all take its first one."""
    devices = list[torch.device]()
    monkeypatch.setattr("cluster.worker.pick_device", lambda: torch.device("meta"))
    monkeypatch.setattr(Worker, "_load", lambda _, device: devices.append(device))
    save_strips(tmp_path, NAMES[:1])
    image, sha256 = read_image(tmp_path / NAMES[0], SEVERSTAL), manifest_hash(session_light)
    Worker(str(session_light), sha256, image, 0, True, cpus)
    assert devices == [torch.device(device)]


def test_a_device_that_is_lost_half_way_costs_no_image(
    session_light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_strips(tmp_path, NAMES)
    worker, part = make_worker(session_light, tmp_path), part_of(tmp_path, NAMES)
    expected = rles_of(worker(part))
    run_encoder, calls = worker.scheduler.source.run_encoder, list[int]()

    def lose(pass_id: int, images: Any) -> Any:
        calls.append(pass_id)
        if len(calls) == 4:
            raise DeviceLost("cuda fails")
        return run_encoder(pass_id, images)

    monkeypatch.setattr(worker.scheduler.source, "run_encoder", lose)
    monkeypatch.setattr("kernel.scheduling.device_usable", lambda _: False)
    assert rles_of(worker(part)) == expected
    assert len(calls) == 4
    assert worker.scheduler.source.device == CPU  # loaded anew


def test_what_the_networks_fail_on_runs_again_on_plain_pytorch(
    session_light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the kernel; an image that could not be read does not."""
    save_strips(tmp_path, NAMES)
    (tmp_path / NAMES[3]).write_bytes(b"no image")
    worker, part = make_worker(session_light, tmp_path), part_of(tmp_path, NAMES)
    expected = rles_of(worker(part))
    run_encoder, calls = worker.scheduler.source.run_encoder, list[int]()

    def fail(pass_id: int, images: Any) -> Any:
        calls.append(pass_id)
        if len(calls) in (2, 5):
            raise RuntimeError("no kernel image is available")
        return run_encoder(pass_id, images)

    monkeypatch.setattr(worker.scheduler.source, "run_encoder", fail)
    assert "plain" not in vars(worker)  # loaded where it is needed
    rows = worker(part)
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
    worker, part = make_worker(session_light, tmp_path), part_of(tmp_path, NAMES)
    expected = rles_of(worker(part))
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
    rows = worker(part)
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
    change(light_bundle)
    with pytest.raises(ValueError, match="is not the bundle this run began with"):
        Worker(str(light_bundle), sha256, image, 0, True, 1)


def test_a_bundle_elsewhere_is_copied_here(light_bundle: Path, tmp_path: Path) -> None:
    import fsspec

    save_strips(tmp_path, NAMES[:1])
    store = fsspec.filesystem("memory")
    store.put(str(light_bundle), "/mill/bundle", recursive=True)
    image = read_image(tmp_path / NAMES[0], SEVERSTAL)
    worker = Worker("memory://mill/bundle", manifest_hash(light_bundle), image, 0, True, 1)
    rows = rles_of(worker(part_of(tmp_path, NAMES[:1])))
    assert rows == rles_of(make_worker(light_bundle, tmp_path)(part_of(tmp_path, NAMES[:1])))


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


def test_a_part_of_which_nothing_can_be_fetched_fails_and_an_image_alone_says_why(
    tmp_path: Path,
) -> None:
    """The store is away, or this machine lacks a folder that others have."""
    with pytest.raises(UserCodeException, match=r"none of the 7 images .* fetched: .*no such file"):
        part_of(tmp_path, NAMES)
    assert "no such file" in part_of(tmp_path, NAMES[:1])["fault"][0].as_py()
    (tmp_path / NAMES[2]).write_bytes(b"no image")  # but it is there
    faults = part_of(tmp_path, NAMES)["fault"].to_pylist()
    assert ["no such file" in fault for fault in faults] == [name != NAMES[2] for name in NAMES]


def test_what_a_store_does_not_give_has_no_rows_and_its_part_keeps_its_name(
    session_light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a fault it would never be tried again; read again, the part may have others left out."""
    save_strips(tmp_path, NAMES)
    throttled, output = set[str](), Output(str(tmp_path / "out"))
    output.fs.makedirs(output.path)

    def fetch(_: object, path: str) -> bytes:
        name = Path(path).name
        if name in throttled:
            raise PermissionError("ExpiredToken") if name == NAMES[1] else OSError("SlowDown")
        if name == NAMES[2]:
            raise FileNotFoundError(name)
        return (tmp_path / name).read_bytes()

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fetch)
    images, worker = ImageSet("memory://mill", [], "memory://mill"), None
    for lost in ({NAMES[1], NAMES[4]}, {NAMES[0]}, set[str]()):
        throttled.clear()
        throttled.update(lost)
        strips = read_strips(pa.table({"image": NAMES}), images)
        worker = worker or make_worker(session_light, tmp_path)
        assert output.write_part(worker(strips)).images == len(NAMES) - len(lost)
        (part,) = (tmp_path / "out").glob("part-*.parquet")  # in the place of the one before
        rows = pq.read_table(part).to_pylist()
        assert [row["image"] for row in rows] == [
            name for name in NAMES if name not in lost for _ in LABELS
        ]
        assert {row["image"] for row in rows if row["fault"] != ""} == {NAMES[2]}
    throttled.add(NAMES[0])
    alone = read_strips(pa.table({"image": NAMES[:1]}), images)
    assert alone["fault"].to_pylist() == ["SlowDown"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [8, 16])
def test_an_image_reaches_the_worker_as_the_kernel_reads_it(
    channels: int, bits: int, tmp_path: Path
) -> None:
    images, sizes = dict[str, Any](), (SMALL, (50, 70))
    for seed, (name, size) in enumerate(zip(NAMES, sizes, strict=False)):
        image: Any = np.dstack([draw_image(3 * seed + plane, size) for plane in range(channels)])
        images[name] = (
            image.squeeze().astype(np.uint16) * 200 + 7 if bits == 16 else image.squeeze()
        )
        save_image(tmp_path / name, images[name][..., ::-1] if channels == 3 else images[name])
    competition = replace(SEVERSTAL, channels=channels, bits=bits)
    strips = list(unpack_strips(part_of(tmp_path, list(images), competition)))
    assert [strip.name for strip in strips] == list(images)
    for strip in strips:
        assert strip.image is not None and strip.image.flags.writeable
        assert strip.image.dtype == images[strip.name].dtype
        np.testing.assert_array_equal(strip.image, images[strip.name])
