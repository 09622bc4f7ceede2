"""The worker: one process that loads the bundle once, and reads, predicts and writes.

Ray Data calls it for one part of the images after another, on whichever machine it runs.
"""

import atexit
import contextlib
import functools
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from ray.exceptions import UserCodeException

from cluster.images import ImageSet, NotFetched, open_local
from cluster.output import ROWS, Output
from kernel.batch_limits import default_batch_size
from kernel.competition import COMPETITION
from kernel.device import DeviceLost, pick_device
from kernel.ensemble_loading import load_ensemble
from kernel.images import Image, Strip
from kernel.logs import log
from kernel.manifest import MANIFEST, load_manifest
from kernel.members import hash_file
from kernel.rle import encode_rle
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from kernel.strip_state import StripState

if sys.platform != "win32":
    import fcntl

FOLDERS = "severstal-bundle-"  # start of the names of the workers' folders
READERS = 8  # threads, and images read ahead: most of a read may be its store's answer


@dataclass
class PartState:
    """What is known so far of the images of a part."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # of an image, by its name
    failed: list[Strip] = field(default_factory=list)  # by the networks
    not_fetched: dict[str, str] = field(default_factory=dict)  # image → why


def manifest_hash(bundle: Path) -> str:
    """The sha256 of a bundle's manifest and competition, and of the members that it gives none."""
    described = bundle / COMPETITION
    competition = described.read_bytes() if described.is_file() else b""
    whole = hashlib.sha256((bundle / MANIFEST).read_bytes() + competition)
    for spec in load_manifest(bundle).members:
        if not spec.sha256:
            whole.update(bytes.fromhex(hash_file(bundle / spec.file)))
    return whole.hexdigest()


def make_folder() -> Path:
    """Make a folder that goes with this process; those that killed ones left go now.

    A process has the lock on a file in its folder until it ends, however it does.
    """
    folder = Path(tempfile.mkdtemp(prefix=FOLDERS))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if sys.platform != "win32":
        for lock in folder.parent.glob(f"{FOLDERS}*/lock"):
            with contextlib.suppress(OSError), lock.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        unlocked = folder / "unlocked"  # a name that no other process looks for
        with contextlib.suppress(OSError):  # a file system without locks: the folder may stay
            fcntl.flock(os.open(unlocked, os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)  # stays open
            unlocked.rename(folder / "lock")
    return folder


class Worker:
    """The bundle, loaded once; each call predicts the images of a part and writes their rows."""

    def __init__(
        self,
        images: ImageSet,
        output: Output,
        bundle: str,
        sha256: str,
        image: Image,
        batch_size: int,
        early_exit: bool,
        cpus: int,
        gpu: bool = False,
        last_try: bool = False,
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = str(cpus)  # OpenVINO's, too; beside a GPU Ray says 1
        torch.set_num_threads(cpus)
        self.images, self.output = images, output
        self.output.check_shared()
        self.bundle = Path(open_local(bundle, str(make_folder() / "bundle")))
        if manifest_hash(self.bundle) != sha256:
            raise ValueError(
                f"{bundle}: on {platform.node()} it is not the bundle this run began with: put "
                "that one there"
            )
        self.image = image.copy()  # what Ray hands over cannot be written to, as PyTorch wants
        self.batch_size, self.early_exit = batch_size, early_exit
        self.last_try = last_try  # each image alone: what cannot be fetched now is its fault
        self.threads = torch.get_num_threads()
        self.readers = ThreadPoolExecutor(READERS)
        self.scheduler = self._load(pick_device() if gpu else torch.device("cpu"))

    @functools.cached_property
    def plain(self) -> Scheduler:
        """For what the networks fail on: it may be the engine, or the GPU's memory."""
        return self._load(torch.device("cpu"), plain=True)

    def _load(self, device: torch.device, plain: bool = False) -> Scheduler:
        """The kernel's ensemble, checked on the image that the kernel takes."""
        manifest = load_manifest(self.bundle)
        ensemble = load_ensemble(
            self.bundle, manifest, device, Stages(), image=self.image, plain=plain
        )
        batch_size = self.batch_size or default_batch_size(device)
        return Scheduler(ensemble, batch_size, self.early_exit)

    def __call__(self, part: pa.Table) -> pa.Table:
        """Predict the images that a part names and write their rows; return their totals."""
        names = part["image"].to_pylist()
        totals = self.output.write_part(names, self.predict(names))
        return pa.Table.from_pylist([asdict(totals)])

    def predict(self, names: Sequence[str]) -> pa.Table:
        """Return the rows of a part: every class of every image, in the part's order.

        Before the last try an image that its store does not give, though not for being missing, has
        no rows: the run tries it again, alone.

        Raises:
            UserCodeException: before it, not one image can be fetched: no image's own fault.
        """
        found = PartState()
        try:
            self._predict(self.scheduler, self._read(names, found), found)
        except DeviceLost as error:
            log.warning("%s: this worker continues on the CPU", error)
            self.scheduler = self._load(torch.device("cpu"))
            rest = [name for name in names if name not in found.rows]
            self._predict(self.scheduler, self._read(rest, found), found)
        if len(names) == len(found.not_fetched) and not self.last_try:
            raise UserCodeException(
                f"{self.images.root}: none of the {len(names)} images of a part can be fetched: "
                f"{found.not_fetched[names[0]]}"
            )
        if found.failed:
            self._try_again(found)
        rows = (row for name in names for row in found.rows.get(name, ()))
        return pa.Table.from_pylist(list(rows), schema=ROWS)

    def _read(self, names: Sequence[str], found: PartState) -> Iterator[Strip]:
        """Yield strips in order, the next ones read beside the networks."""
        for name, strip in self._read_ahead(names):
            try:
                yield strip.result()
            except NotFetched as error:
                found.not_fetched[name] = str(error)
                if self.last_try or error.missing:
                    yield Strip(name, None, str(error))

    def _read_ahead(self, names: Sequence[str]) -> Iterator[tuple[str, Future[Strip]]]:
        waiting = deque[tuple[str, Future[Strip]]]()
        for name in names:
            waiting.append((name, self.readers.submit(self.images.read, name)))
            if len(waiting) > READERS:
                yield waiting.popleft()
        yield from waiting

    def _predict(self, scheduler: Scheduler, strips: Iterator[Strip], found: PartState) -> None:
        """Every strip through the scheduler."""
        before = time.monotonic()
        for state in scheduler.predict_strips(strips):
            rows = self._rows(scheduler, state)
            before, since = time.monotonic(), before
            found.rows[state.strip.name] = [row | {"seconds": before - since} for row in rows]
            if state.failed:
                found.failed.append(state.strip)

    def _try_again(self, found: PartState) -> None:
        """What the networks failed on once more, on plain PyTorch; where that fails, it stays."""
        failed, threads = found.failed.copy(), torch.get_num_threads()
        fault = found.rows[failed[0].name][0]["fault"]
        log.warning("%s; %d images run again, on plain PyTorch", fault, len(failed))
        torch.set_num_threads(self.threads)  # one where OpenVINO's members run
        try:
            self._predict(self.plain, iter(failed), found)
        except Exception as error:  # short of memory for a second ensemble, for one
            log.warning("plain PyTorch fails, too: %r", error)
        finally:
            torch.set_num_threads(threads)

    def _rows(self, scheduler: Scheduler, state: StripState) -> Iterator[dict[str, Any]]:
        """One row a class; those of a bad image are empty and say why."""
        competition = scheduler.source.manifest.competition
        masks = [None] * len(competition.classes) if state.fault else list(state.masks)
        share = None if state.fault else scheduler.work(state).share
        for label, mask in enumerate(masks, 1):
            rle, area = (
                ("", 0) if mask is None else (encode_rle(mask, competition), int(mask.sum()))
            )
            row = {"image": state.strip.name, "class": label, "rle": rle, "pixels": area}
            yield row | {"fault": state.fault, "share": share}
