"""The engine: Ray, started here or joined where it runs, and the workers that fit on it."""

import logging
import os
import signal
import socket
import warnings
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning

from cluster.images import ImageSet
from cluster.output import Output, Totals
from cluster.worker import Worker
from kernel.logs import log

RETRIES = 3  # of a part whose process died; Ray Data itself would try for ever
# Ray runs parts in a thread. By itself this has a heap of its own, which keeps nothing large that a
# pass frees, whatever `keep_freed_memory` asks for: the next gets hundreds of MB page by page.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}  # of every worker
MAX_LOST = 8  # parts that a run may go on without; more are no image's fault


@dataclass(frozen=True)
class Workers:
    """How many workers there are, and what each has."""

    count: int
    gpus: int = 0
    cpus: int = 1  # threads; beside a GPU they are not asked of Ray

    def __str__(self) -> str:
        return f"{self.count} workers of {'a GPU' if self.gpus else f'{self.cpus} threads'} each"


def connect(address: str | None) -> None:
    """Join the cluster at an address, by default RAY_ADDRESS; without both start one here.

    Raises:
        ValueError: no cluster answers, or none can be started.
    """
    option = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    here = address == "local"
    fault = "Ray does not start" if here else f"{option} {address}: no cluster answers"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_worker_niceness", "0")  # of what starts here; by itself it is 15
    warnings.simplefilter("ignore", RayDeprecationWarning)  # of retries, which nothing else bounds
    before = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address)
        if not here:  # once, for 40 s, and not for a quarter of an hour
            os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
        dashboard = False if here else None  # one that is joined has its own
        ray.init(
            address,
            logging_level=logging.WARNING,
            include_dashboard=dashboard,
            runtime_env={"env_vars": ENVIRONMENT},
        )
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise ValueError(f"{fault}: {error}") from error
    signal.signal(signal.SIGTERM, before)  # Ray's handler ends the process without a word


def connect_anew(address: str | None) -> None:
    """Leave the cluster and join it again, or start another here, as `connect` does.

    A driver keeps a handle of a worker whose part was left out, and so the worker its processors.
    """
    ray.shutdown()
    connect(address)


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at host:port: Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def plan_workers(gpus: int | None, count: int | None, cpus: int | None) -> Workers:
    """Return the workers for what was asked: one a GPU, or else one a machine, with all of it.

    Raises:
        ValueError: the cluster has fewer GPUs or processors than that.
    """
    found = ray.nodes()  # type: ignore[no-untyped-call] # Ray gives it no type
    nodes = [node["Resources"] for node in found if node["Alive"]]
    has_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus is None and count is None and cpus is None:
        gpus = has_gpus
    if gpus:
        if gpus > has_gpus:
            raise ValueError(
                f"--gpus {gpus}: the cluster has {has_gpus}: give fewer, or leave it out"
            )
        beside = [node.get("CPU", 0) // node["GPU"] for node in nodes if node.get("GPU", 0) >= 1]
        return Workers(gpus, gpus=1, cpus=max(int(min(beside)), 1))
    sizes = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not sizes:
        raise ValueError("the cluster has no processors: start Ray on it without --num-cpus=0")
    cpus = cpus or (_most_threads_for(count, sizes) if count else _most_threads(sizes))
    room = sum(size // cpus for size in sizes)
    if (count or 1) > room:
        asked = f"--workers {count} of {cpus} threads" if count else f"--cpus-per-worker {cpus}"
        raise ValueError(
            f"{asked}: the cluster's machines have {sizes} processors, room for {room} workers: "
            "give fewer"
        )
    return Workers(count or room, cpus=cpus)


def warn_if_busy(workers: Workers) -> None:
    """Log that other jobs have what workers need: Ray lets them wait without a word."""
    kind, each = ("GPU", 1) if workers.gpus else ("CPU", workers.cpus)
    there = ray.available_resources()  # type: ignore[no-untyped-call] # Ray gives it no type
    free, asked = int(there.get(kind, 0)), workers.count * each
    if free < asked:
        log.warning(
            "%d of the %d %ss that %s need are free: the others wait until other jobs end",
            *(free, asked, kind, workers),
        )


def _most_threads_for(count: int, sizes: list[int]) -> int:
    """The most threads that each of so many workers can have on machines of such sizes."""
    fit = (cpus for cpus in range(max(sizes), 1, -1) if sum(s // cpus for s in sizes) >= count)
    return next(fit, 1)


def _most_threads(sizes: list[int]) -> int:
    """The most threads a worker with which machines of such sizes have hardly less work in all."""
    used = {size: size * sum(each // size for each in sizes) for size in sizes}
    return max(size for size in sizes if used[size] >= 0.9 * max(used.values()))


def predict_parts(
    images: ImageSet, per_part: int, workers: Workers, constructor: dict[str, Any], output: Output
) -> Totals:
    """Run the images through the workers, a part at a time, into the output.

    A part is a block of Ray Data's. Up to `MAX_LOST` parts that end their processes again and
    again have no rows in the end.

    Raises:
        RayError: there are more of them, or Ray gave up.
    """
    context = DataContext.get_current()
    context.max_errored_blocks = MAX_LOST
    context.raise_original_map_exception = True  # its message is what the run ends with
    context.execution_no_progress_timeout_s = -1  # a part may take hours, or wait for a machine
    names = images.names
    parts = ray.data.from_blocks(  # `from_arrow` runs a task for each, and keeps ten times as much
        [  # each of its own: a slice of one array is pickled with all of it
            pa.table({"image": pa.array(names[start : start + per_part], pa.string())})
            for start in range(0, len(names), per_part)
        ]
    )
    given = {"images": replace(images, names=[]), "output": output}
    given |= {"cpus": workers.cpus, "gpu": bool(workers.gpus)}
    waiting = 2 if workers.gpus else 1  # parts a worker has: one that waits may end the run late
    written = parts.map_batches(
        Worker,
        batch_size=per_part,  # a block; with GPUs Ray wants the number
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=workers.count, max_tasks_in_flight_per_actor=waiting),
        num_cpus=0 if workers.gpus else workers.cpus,
        num_gpus=workers.gpus,
        max_task_retries=RETRIES,
        fn_constructor_kwargs=constructor | given,
    )
    totals = Totals()
    for row in written.iter_rows():
        totals.add(Totals(**row))
    return totals
