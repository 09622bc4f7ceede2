"""Fitting: both parts' steps through Lightning's Trainer, each resumable at every saved state."""

import itertools
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Sampler

from kernel.command import needs

with needs("training"):  # before the modules of this room that import it too
    import lightning as L
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
    from lightning.pytorch.loggers import CSVLogger

from kernel.device import device_usable, is_out_of_memory
from kernel.faults import one_line
from kernel.images import image_to_tensor
from kernel.logs import log, progress
from training.batch_norm import retake_statistics
from training.batches import Batches
from training.callbacks import ProgressBar, StateEntries, StepTimer, StopOnNonFinite
from training.config import Config, Machine, Part
from training.module import COUNTER, MemberModule, load_into_network, new_network
from training.states import EXPERIMENT, AtomicCheckpointIO, read_state
from training.strips import Strips, read_each

T = TypeVar("T")

EMA_DECAY = 0.98
CLIP_NORM = 5.0
STATISTICS_STRIPS = 24
LOADER_TIMEOUT_S = 600  # a worker that died without a word ends the run instead of hanging it
MAX_CROPS = 64
SHM = Path("/dev/shm")
TOO_LARGE = (
    "out of memory with one crop or strip a step, take a smaller --encoder, or a CPU for a GPU"
)


@dataclass(frozen=True)
class Fit:
    """What the steps of both parts have in common."""

    config: Config
    sources: Sequence[Strips]  # to train on, as `Batches` takes them
    machine: Machine
    experiment: dict[str, Any]  # what its states are of

    def state(self, part: Part) -> Path:
        """Return the file of a part's last state."""
        return self.machine.folder(self.config) / f"{part.name}.ckpt"


# --- data loading ---------------------------------------------------------------------------------


class StepSampler(Sampler[int]):
    """The steps of one epoch of a part; an epoch is what lies between two saved states."""

    def __init__(self, part: Part, save_every: int, epoch: int) -> None:
        self.part, self.save_every, self.epoch = part, save_every, epoch

    def set_epoch(self, epoch: int) -> None:
        """Take the steps of epoch `epoch`, from 0; Lightning calls it."""
        self.epoch = epoch

    @property
    def steps(self) -> range:
        """The epoch's steps."""
        first = self.part.first + self.epoch * self.save_every
        return range(first, min(first + self.save_every, self.part.end))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)


def count_workers(asked: int, batch: tuple[Tensor, Tensor]) -> int:
    """Return the number of loader processes: none where shared memory is too small for them.

    A worker that finds no room in /dev/shm dies, and the run would wait for it for ever.
    """
    if not asked or not SHM.is_dir():
        return asked
    needed = 4 * asked * sum(tensor.nbytes for tensor in batch)  # two are fetched ahead
    free = shutil.disk_usage(SHM).free
    if free >= needed:
        return asked
    log.warning(
        "%s has %d MB free, %d loader processes may need %d MB: batches are made in the "
        "training process", SHM, free >> 20, asked, needed >> 20,
    )  # fmt: skip
    return 0


def new_loader(fit: Fit, part: Part, done: int) -> DataLoader[Any]:
    """Return the loader of a part's batches after the `done` first ones.

    The epoch is set at once: Lightning opens a resumed run's loader before it sets it.
    """
    batches, machine = Batches(fit.sources, fit.config), fit.machine
    workers = count_workers(machine.workers, batches[part.first])
    return DataLoader(
        batches,
        batch_size=None,
        sampler=StepSampler(part, machine.save_every, done // machine.save_every),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=machine.device.type == "cuda",
        timeout=LOADER_TIMEOUT_S if workers else 0,
    )


# --- Lightning's Trainer --------------------------------------------------------------------------


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out Lightning's advice: on loaders, loggers and devices, all of it decided here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def new_trainer(fit: Fit, part: Part, callbacks: Sequence[Callback]) -> L.Trainer:
    """Return the Trainer of one part."""
    config, machine, device = fit.config, fit.machine, fit.machine.device
    cuda = device.type == "cuda"
    # EMAWeightAveraging's function takes one tensor at a time: thousands of GPU kernels a step
    move_all = get_ema_multi_avg_fn(EMA_DECAY)  # type: ignore[no-untyped-call]
    average = WeightAveraging(device=device, multi_avg_fn=move_all)
    states = ModelCheckpoint(machine.folder(config), part.name, save_on_train_epoch_end=True,
                             enable_version_counter=False)  # fmt: skip
    return L.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=[device.index or 0] if cuda else 1,
        precision=config.precision,  # type: ignore[arg-type]
        max_epochs=math.ceil(part.steps / machine.save_every),
        gradient_clip_val=CLIP_NORM,
        callbacks=[*callbacks, average, states],
        logger=CSVLogger(machine.runs, f"{config.name}/{part.name}", flush_logs_every_n_steps=10),
        plugins=[AtomicCheckpointIO(), LightningEnvironment()],  # one process, under SLURM too
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        benchmark=cuda,
    )


# --- one part -------------------------------------------------------------------------------------


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turn Lightning's answer to Ctrl-C, and a loader process's traceback, into one line."""
    try:
        yield
    except SystemExit as stopped:
        saved = f"{path} is kept" if path.is_file() else "nothing was saved yet"
        raise KeyboardInterrupt(f"{saved}; the same command goes on from it") from stopped
    except (ValueError, OSError) as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise ValueError(f"the loader processes failed, try --workers 0: {error}") from error


def take_steps(
    network: Any,
    fit: Fit,
    part: Part,
    callbacks: Sequence[Callback],
    state: Mapping[str, Any] | None = None,
) -> None:
    """Take a part's steps through Lightning, those after `state`, which lies where it was saved.

    Raises as `fit_part` does.
    """
    path = fit.state(part)
    loader = new_loader(fit, part, state["global_step"] if state else 0)
    with quiet_lightning(), one_line_errors(path):
        trainer = new_trainer(fit, part, callbacks)
        module = MemberModule(network, fit.config, part)
        trainer.fit(module, loader, ckpt_path=path if state else None, weights_only=True)
    network.to(fit.machine.device)  # Lightning leaves it on the CPU


def fit_part(network: Any, fit: Fit, part: Part) -> float:
    """Take a part's steps from its saved state on; return the seconds that all of them took.

    `network` ends with the moving average of its weights.

    Raises:
        ValueError: the state is of another experiment, an image is broken, or the loss is no
            number.
        RuntimeError: the GPU's memory does not suffice, for one.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    config, machine = fit.config, fit.machine
    state = read_state(fit.state(part), fit.experiment)
    if state is not None:
        config = replace(config, crops=min(config.crops, state["crops"]))
        machine = replace(machine, save_every=state["save_every"])
        if state["global_step"] >= part.steps:
            MemberModule(network, config, part).load_state_dict(state["state_dict"])
            return float(state["seconds"])
    if not part.steps:
        return 0.0
    timer = StepTimer()
    entries = {EXPERIMENT: fit.experiment, "crops": config.crops, "save_every": machine.save_every}
    callbacks = [
        StopOnNonFinite(config, part),
        timer,
        ProgressBar(config, part),
        StateEntries(entries),
    ]
    take_steps(network, replace(fit, config=config, machine=machine), part, callbacks, state)
    return timer.seconds


# --- both parts, and what lies before each --------------------------------------------------------


def load_start(network: Any, start_from: Mapping[str, Tensor], config: Config) -> None:
    """Load the weights to start from into the network, and say how many fit.

    Raises:
        ValueError: none does, or without steps not all do.
    """
    lacking = load_into_network(network, start_from, presence=not config.steps)
    every = sum(not key.endswith(COUNTER) for key in network.state_dict())
    log.info("%s starts from %d of %d tensors", config.name, every - len(lacking), every)
    if lacking and not config.steps:
        raise ValueError(
            f"--start-from: without steps it has to be this network, and it has no {lacking[0]}"
            f" of {config.encoder} with {config.arch}: give the --encoder, --arch and "
            "--channels that it was fitted with"
        )
    if len(lacking) == every:
        raise ValueError(
            f"--start-from: no tensor of it fits {config.encoder} with {config.arch}: it has "
            f"{min(start_from)}, …, expected {min(network.state_dict())}, …"
        )


def retake_from_strips(network: Any, fit: Fit, strips: Sequence[Strips]) -> None:
    """Take batch-norm statistics anew from some whole strips, two at a time.

    Pooling branches (DeepLab's, PAN's) normalise over a batch alone, and one is too few for them:
    a strip whose neighbour has another size stands beside its mirror image.

    Raises:
        ValueError: no strip can be read; of others it is logged.
    """
    config, device = fit.config, fit.machine.device
    paths = [each.folder / name for each in strips for name in each.names]
    order = np.random.default_rng(config.seed).permutation(len(paths))
    module = MemberModule(network, config, config.whole_part).to(device)

    def batches() -> Iterator[Tensor]:
        what = "batch-norm statistics"
        images = read_each((paths[index] for index in order), what, strips[0].competition)
        chosen = list(itertools.islice(images, STATISTICS_STRIPS))
        pairs = list(zip(chosen[::2], chosen[1::2] or chosen, strict=False))
        for pair in progress(pairs, what, "pair"):
            first, second = (image_to_tensor(image, device) for image in pair)
            second = second if second.shape == first.shape else first.flip(-1)
            yield module.prepare(torch.cat([first, second]))

    retake_statistics(network, batches())


def fit_network(
    fit: Fit, statistics: Sequence[Strips], start_from: Mapping[str, Tensor] | None = None
) -> tuple[Any, float]:
    """Fit the network of an experiment through both parts; return it and the seconds of its steps.

    `statistics` are strips from which the batch-norm statistics are taken. A fit without steps
    leaves the network as it came.

    Raises:
        ValueError: as `fit_part`, SMP builds no such network, or `start_from` does not fit it.
        RuntimeError, KeyboardInterrupt: as `fit_part`.
    """
    config = fit.config
    resumed = any(fit.state(part).is_file() for part in config.parts)  # it needs no download
    network = new_network(replace(config, encoder_weights="") if resumed else config)
    if start_from:
        load_start(network, start_from, config)
    seconds = fit_part(network, fit, config.crop_part)
    if config.steps:
        try:
            retake_from_strips(network, fit, statistics)
            seconds += fit_part(network, fit, config.whole_part)
        except RuntimeError as error:
            if lacks_memory(error):  # which fewer crops would not mend
                raise ValueError(f"{TOO_LARGE}: {one_line(error)}") from error
            raise
    return network.to(fit.machine.device).eval(), seconds


# --- what the GPU's memory takes ------------------------------------------------------------------


def lacks_memory(error: RuntimeError) -> bool:
    """Whether memory was too small; of a GPU that is broken cuDNN and cuBLAS say the same."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return is_out_of_memory(error) and device_usable(device)


def fit_within_memory(attempt: Callable[[Config], T], config: Config) -> T:
    """Call `attempt`; where the GPU's memory does not suffice, again with half the crops a step.

    Raises:
        ValueError: one crop, or one whole strip, is too much.
    """
    while True:
        try:
            return attempt(config)
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            if config.crops == 1:
                raise ValueError(f"{TOO_LARGE}: {one_line(error)}") from error
        config = replace(config, crops=config.crops // 2)
        torch.cuda.empty_cache()
        log.warning("out of memory: from here on %d crops a step", config.crops)


def find_crops(config: Config, device: torch.device, most: int = MAX_CROPS) -> int:
    """Return the largest power of two of crops a step, up to `most`, that the GPU's memory takes.

    Raises:
        ValueError: it does not take one.
    """

    def try_step(tried: Config) -> int:
        module = MemberModule(new_network(tried).to(device), tried, tried.crop_part).train()
        masks = torch.zeros(tried.crops, tried.classes, *tried.crop_size, device=device)
        with module.autocast():
            loss = module.batch_loss(masks[:, :1].expand(-1, tried.channels, -1, -1), masks)
        loss.backward()  # type: ignore[no-untyped-call]
        return tried.crops

    return fit_within_memory(try_step, replace(config, crops=most))
