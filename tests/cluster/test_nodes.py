"""Several nodes on this machine, and what dies half-way: every row is there once, the same bytes.

`make test-cluster` runs these: minutes. S3 is moto's, on loopback.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import LABELS, ROOT, predict, save_strips, write_sample

pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[cluster]'")

import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayError

from cluster import engine
from cluster.images import ImageSet, find_images
from cluster.output import Output, fault_rows
from cluster.worker import PartState, Worker
from kernel.images import Strip

pytestmark = [
    pytest.mark.nodes,
    pytest.mark.filterwarnings("ignore"),  # Ray's own, of the processes that it leaves
]

N_STRIPS, PER_PART = 200, 5
TIMEOUT_S = 400


@dataclass(frozen=True)
class Job:
    """200 strips, three of them broken, and the submission that the kernel makes of them."""

    folder: Path
    kernel: bytes


@pytest.fixture(scope="module")
def job(session_light: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    names = [f"{index:03}.jpg" for index in range(N_STRIPS)]
    save_strips(folder / "images", names)
    for name in names[7::70]:
        (folder / "images" / name).write_bytes(b"no image")
    shutil.copytree(session_light, folder / "dataset")
    sample = write_sample(folder / "sample.csv", names)
    predict(folder / "dataset", folder / "images", folder / "kernel.csv", sample=sample)
    return Job(folder, (folder / "kernel.csv").read_bytes())


@contextlib.contextmanager
def cluster_of(nodes: int) -> Iterator[Cluster]:
    """Nodes of one processor each on this machine."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_worker_niceness", "0")  # other work on this machine goes on
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("OMP_NUM_THREADS", "1")
        patched.setenv("RAY_gcs_server_port_wait_time_s", "60")  # not that of who joins
        head = {"num_cpus": 1, "object_store_memory": 200_000_000}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(nodes - 1):
                cluster.add_node(num_cpus=1, object_store_memory=200_000_000)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            cluster.shutdown()  # type: ignore[no-untyped-call] # Ray gives it no type


def start(cluster: Cluster, job: Job, out: Path) -> subprocess.Popen[str]:
    """The command as a process, for one worker a node."""
    named = {"bundle": "dataset", "images": "images", "submission": "sample.csv"}
    command = [sys.executable, str(ROOT / "cluster" / "predict.py")]
    command += [
        word for key, value in named.items() for word in (f"--{key}", str(job.folder / value))
    ]
    command += [
        "--output",
        str(out),
        "--address",
        cluster.address,
        "--images-per-part",
        str(PER_PART),
    ]
    with (out.parent / "log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True)


def parts_of(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"))


def wait_for_parts(process: subprocess.Popen[str], out: Path, count: int = 4) -> None:
    """Until so many parts are written: the run is under way, and far from its end."""
    start = time.monotonic()
    while len(parts_of(out)) < count:
        assert process.poll() is None, (out.parent / "log").read_text()
        assert time.monotonic() - start < TIMEOUT_S
        time.sleep(0.02)
    assert len(parts_of(out)) < N_STRIPS // PER_PART


def assert_whole(process: subprocess.Popen[str], job: Job, out: Path) -> None:
    """The run ends well: every row once, and the kernel's bytes."""
    assert process.wait(TIMEOUT_S) == 0, (out.parent / "log").read_text()[-5000:]
    rows = pd.concat(map(pd.read_parquet, parts_of(out)))
    times = Counter(zip(rows["image"], rows["class"], strict=True))
    assert len(times) == N_STRIPS * len(LABELS)
    assert set(times.values()) == {1}
    assert rows[rows["fault"] != ""]["image"].nunique() == 3
    assert (out / "submission.csv").read_bytes() == job.kernel


def kill_worker(cluster: Cluster) -> None:
    """Kill one process of a worker, on whichever node of this cluster."""
    nodes = [cluster.head_node, *cluster.worker_nodes]
    raylets = {node.all_processes["raylet"][0].process.pid for node in nodes}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            parent = int(status.read_text().partition("PPid:")[2].split()[0])
            command = status.with_name("cmdline").read_bytes()
            if parent in raylets and command.startswith(b"ray::MapWorker"):
                subprocess.run(["kill", "-9", status.parent.name], check=True)
                return
    raise AssertionError("no worker is running")


def remove_node(cluster: Cluster) -> None:
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)


@pytest.mark.parametrize("nodes", [2, 3])
def test_several_nodes_write_what_one_machine_does(nodes: int, job: Job, tmp_path: Path) -> None:
    with cluster_of(nodes) as cluster:
        assert_whole(start(cluster, job, tmp_path / "out"), job, tmp_path / "out")
    assert f"{nodes} workers of 1 threads" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("strike", [kill_worker, remove_node])
def test_what_dies_half_way_is_made_up_for(
    strike: Callable[[Cluster], None], job: Job, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with cluster_of(3) as cluster:
        process = start(cluster, job, out)
        wait_for_parts(process, out)
        strike(cluster)
        assert_whole(process, job, out)


def test_parts_at_which_every_worker_dies_are_left_out_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself would start worker after worker for them."""

    class Mortal(Worker):  # in this function: it is pickled whole
        def __init__(self, output: Output, **_: Any) -> None:
            self.output = output

        def predict(self, names: Sequence[str]) -> Any:
            if "05.jpg" in names:
                os._exit(1)
            return fault_rows(names, len(LABELS), "")

    names = [f"{index:02}.jpg" for index in range(20)]
    save_strips(tmp_path / "images", names)
    monkeypatch.setattr(engine, "Worker", Mortal)
    output = Output(str(tmp_path / "out"))
    output.begin({})
    with cluster_of(1) as cluster:
        engine.connect(cluster.address)
        try:
            images, one = find_images(str(tmp_path / "images")), engine.Workers(1, cpus=1)
            totals = engine.predict_parts(images, 2, one, {}, output)
            engine.connect_anew(cluster.address)
            alone = replace(images, names=["04.jpg"]), replace(images, names=["05.jpg"])
            again = [engine.predict_parts(each, 1, one, {}, output) for each in alone]
        finally:
            ray.shutdown()
    assert [each.images for each in (totals, *again)] == [18, 1, 0]
    assert output.done() == set(names) - {"05.jpg"}


def test_a_store_that_is_away_for_more_than_eight_parts_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stub(Worker):  # in this function: it is pickled whole
        scheduler: Any = None

        def __init__(self, images: ImageSet, output: Output, **_: Any) -> None:
            self.images, self.output, self.last_try = images, output, False
            self.readers = ThreadPoolExecutor(1)

        def _predict(self, _: Any, strips: Iterator[Strip], part: PartState) -> None:
            for strip in strips:
                part.rows[strip.name] = fault_rows([strip.name], len(LABELS), "").to_pylist()

    names = [f"{index:02}.jpg" for index in range(40)]
    save_strips(tmp_path / "images", names)
    monkeypatch.setattr(engine, "Worker", Stub)
    output, one = Output(str(tmp_path / "out")), engine.Workers(1, cpus=1)
    output.begin({})
    images = find_images(str(tmp_path / "images"))
    for name in names[:16]:
        (tmp_path / "images" / name).unlink()
    with cluster_of(1) as cluster:
        engine.connect(cluster.address)
        try:
            assert engine.predict_parts(images, 2, one, {}, output).images == 24
            engine.connect_anew(cluster.address)  # a worker of the first run may still be there
            for name in names[16:18]:
                (tmp_path / "images" / name).unlink()
            with pytest.raises(RayError) as stopped:
                engine.predict_parts(images, 2, one, {}, output)
        finally:
            ray.shutdown()
    said = str(getattr(stopped.value, "cause", ""))
    assert "none of the 2 images of a part can be fetched: " in said


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGKILL, -signal.SIGKILL, ""), (signal.SIGTERM, 130, "interrupted\n")],
    ids=["SIGKILL", "SIGTERM"],
)
def test_a_driver_that_is_killed_goes_on_where_it_stood(
    number: int, code: int, said: str, job: Job, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with cluster_of(2) as cluster:
        process = start(cluster, job, out)
        wait_for_parts(process, out)
        process.send_signal(number)
        assert process.wait(TIMEOUT_S) == code
        assert said in (tmp_path / "log").read_text()
        time.sleep(5)  # Ray ends the killed driver's workers
        before = {path: path.stat().st_mtime_ns for path in parts_of(out)}
        assert 4 <= len(before) < N_STRIPS // PER_PART
        assert_whole(start(cluster, job, out), job, out)
    after = {path: path.stat().st_mtime_ns for path in parts_of(out)}
    assert before.items() <= after.items()  # none was written again


def test_what_listens_and_is_no_ray_is_one_line_within_a_minute_or_two() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        code = f"from cluster.engine import connect; connect({address!r})"
        command = [sys.executable, "-c", code]
        process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert f"ValueError: --address {address}: no cluster answers: " in process.stderr


# --- S3 -------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket `mill` of moto's server, where s3:// leads in this process and those it starts."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: make test-cluster does it")
    pytest.importorskip("moto", reason="moto is not installed: make test-cluster does it")
    pytest.importorskip("flask", reason="moto's server is not installed: make test-cluster does it")
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = s3fs.S3FileSystem(skip_instance_cache=True)
    store.makedirs("mill", exist_ok=True)  # moto keeps it from test to test
    yield store
    server.stop()


def run_on_s3(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "cluster" / "predict.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_bundle_images_and_rows_may_lie_on_s3(bucket: Any, job: Job, tmp_path: Path) -> None:
    for name in ("dataset", "images"):
        bucket.put(str(job.folder / name), f"mill/{name}", recursive=True)
    sample = str(job.folder / "sample.csv")
    named = {"bundle": "dataset", "images": "images", "output": "out"}
    options = [word for key, name in named.items() for word in (f"--{key}", f"s3://mill/{name}")]
    with cluster_of(2) as cluster:
        options += ["--submission", sample, "--address", cluster.address]
        process = run_on_s3(*options)
    assert process.returncode == 0, process.stderr[-5000:]
    bucket.invalidate_cache()
    assert bucket.cat_file("mill/out/submission.csv") == job.kernel
    files = [Path(name).name for name in bucket.ls("mill/out", detail=False)]
    assert not [name for name in files if name.endswith(".tmp")]
    assert len([name for name in files if name.startswith("part-")]) == -(-N_STRIPS // 16)


def test_a_folder_that_the_console_made_is_empty_and_no_bucket_is_made(bucket: Any) -> None:
    record = {"manifest": "abc", "images": "s3://mill/images"}
    bucket.pipe("mill/masks/", b"")
    Output("s3://mill/masks").check(record)
    before = bucket.ls("")
    output = Output("s3://mlil/masks")
    output.check(record)
    with pytest.raises(ValueError, match=r"s3://mlil/masks: cannot be written: .*bucket does not"):
        output.begin(record)
    bucket.invalidate_cache()
    assert bucket.ls("") == before


def test_no_such_bucket_is_one_line_before_any_work(bucket: Any, job: Job) -> None:
    bundle, output = str(job.folder / "dataset"), str(job.folder / "never")
    process = run_on_s3("--bundle", bundle, "--images", "s3://nobody/strips", "--output", output)
    assert process.returncode == 2
    [line] = [line for line in process.stderr.splitlines() if "error" in line]
    assert line.startswith("error: s3://nobody/strips: cannot be read:")
    assert not Path(output).exists()
