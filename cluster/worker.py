"""The worker: one process that loads the bundle once and turns images into rows.

Ray Data calls it for one part of the images after another, on whichever machine it runs.
"""

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from ray.exceptions import UserCodeException

from cluster.images import ImageSet, NotFetched, open_local
from cluster.output import ROWS
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

STRIPS = pa.schema(
    {
        "image": pa.string(),
        "shape": pa.list_(pa.int32()),  # (H, W) or (H, W, 3)
        "dtype": pa.string(),
        "pixels": pa.large_binary(),  # none of a bad image
        "fault": pa.string(),  # null: the image was left out
    }
)


def read_strips(part: pa.Table, images: ImageSet) -> pa.Table:
    """Read and decode the images of a part; runs beside the workers.

    Of several images, one that its store does not give, though not for being missing, is left out:
    the run tries it again, alone.

    Raises:
        UserCodeException: there are several, and not one can be fetched: no image's own fault.
    """
    rows, not_fetched = [], list[str]()
    names = part["image"].to_pylist()
    for name in names:
        try:
            strip = images.read(name)
        except NotFetched as error:
            strip = Strip(name, None, str(error))
            not_fetched.append(strip.fault)
            if len(names) > 1 and not error.missing:
                rows.append((name, None, None, None, None))
                continue
        image = strip.image
        pixels = (None,) * 3 if image is None else (image.shape, image.dtype.name, image.tobytes())
        rows.append((strip.name, *pixels, strip.fault))
    if len(names) == len(not_fetched) > 1:
        raise UserCodeException(
            f"{images.root}: none of the {len(names)} images of a part can be fetched: "
            f"{not_fetched[0]}"
        )
    columns = zip(*rows, strict=True)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, STRIPS, strict=True)]
    return pa.Table.from_arrays(arrays, schema=STRIPS)


def unpack_strips(strips: pa.Table) -> Iterator[Strip]:
    """Yield the strips of `read_strips` that are not left out."""
    for row in strips.to_batches(max_chunksize=1):  # one at a time is in memory twice
        (strip,) = row.to_pylist()
        if strip["fault"] is None:
            continue
        image = None
        if strip["pixels"] is not None:
            flat = np.frombuffer(bytearray(strip["pixels"]), strip["dtype"])
            image = flat.reshape(strip["shape"])
        yield Strip(strip["image"], image, strip["fault"])


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
    """The bundle, loaded once; each call takes the strips of a part and returns their rows."""

    def __init__(
        self, bundle: str, sha256: str, image: Image, batch_size: int, early_exit: bool, cpus: int
    ) -> None:
        if cpus:
            os.environ["OMP_NUM_THREADS"] = str(cpus)  # OpenVINO's, too
            torch.set_num_threads(cpus)
        self.bundle = Path(open_local(bundle, str(make_folder() / "bundle")))
        if manifest_hash(self.bundle) != sha256:
            raise ValueError(f"{bundle}: is not the bundle this run began with: put that one back")
        self.image = image.copy()  # what Ray hands over cannot be written to, as PyTorch wants
        self.batch_size, self.early_exit = batch_size, early_exit
        self.threads = torch.get_num_threads()
        self.scheduler = self._load(torch.device("cpu") if cpus else pick_device())

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

    def __call__(self, strips: pa.Table) -> pa.Table:
        """Return the rows of a part: every class of every image, in the part's order.

        Of an image that was left out it is one row, which is not written.
        """
        left_out = strips["image"].filter(pc.is_null(strips["fault"])).to_pylist()
        found: dict[str, list[dict[str, Any]]]
        found = {name: [{"image": name, "fault": None}] for name in left_out}
        try:
            self._predict(self.scheduler, unpack_strips(strips), found)
        except DeviceLost as error:
            log.warning("%s: this worker continues on the CPU", error)
            self.scheduler = self._load(torch.device("cpu"))
            rest = (strip for strip in unpack_strips(strips) if strip.name not in found)
            self._predict(self.scheduler, rest, found)
        self._try_again(strips, found)
        rows = (row for name in strips["image"].to_pylist() for row in found[name])
        return pa.Table.from_pylist(list(rows), schema=ROWS)

    def _try_again(self, strips: pa.Table, found: dict[str, list[dict[str, Any]]]) -> None:
        """What the networks failed on once more, on plain PyTorch; where that fails, it stays."""
        faults = {name: rows[0]["fault"] for name, rows in found.items() if rows[0]["fault"]}
        read = pc.is_valid(strips["pixels"])
        names = [name for name in strips.filter(read)["image"].to_pylist() if name in faults]
        if not names:
            return
        fault, threads = faults[names[0]], torch.get_num_threads()
        log.warning("%s; %d images run again, on plain PyTorch", fault, len(names))
        torch.set_num_threads(self.threads)  # one where OpenVINO's members run
        try:
            failed = (strip for strip in unpack_strips(strips) if strip.name in names)
            self._predict(self.plain, failed, found)
        except Exception as error:  # short of memory for a second ensemble, for one
            log.warning("plain PyTorch fails, too: %r", error)
        finally:
            torch.set_num_threads(threads)

    def _predict(
        self, scheduler: Scheduler, strips: Iterator[Strip], found: dict[str, list[dict[str, Any]]]
    ) -> None:
        """Every strip through the scheduler; image → its rows go to `found`."""
        before = time.monotonic()
        for state in scheduler.predict_strips(strips):
            rows = self._rows(scheduler, state)
            before, since = time.monotonic(), before
            found[state.strip.name] = [row | {"seconds": before - since} for row in rows]

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
