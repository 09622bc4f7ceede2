"""Was the run clean? What is checked of its process, its answer and its record."""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel.checks import read_json
from kernel.competition import Competition
from kernel.faults import one_line
from kernel.rows import layouts_of, read_rows
from kernel.run_record import RunRecord
from kernel.strip_state import TOO_LATE
from kernel.task import read_sample
from kernel.validator import check_submission
from packing.metadata import MACHINE_SHAPE, PLACEHOLDER, check_dataset, check_kernel
from packing.paths import DATASET_METADATA, KERNEL_METADATA, NOTEBOOK, SCRIPT
from packing.wheels import OPENVINO_WHEEL, WHEELS, lacking_wheels

KILLED = -9  # the exit code of a process that the system ended
MEMORY = 25_000_000_000  # bytes of one process, beside which others need some of Kaggle's 30 GB


@dataclass(frozen=True)
class Check:
    """One thing that was checked in the run."""

    ok: bool | None  # None: it decides nothing
    words: str


@dataclass(frozen=True)
class ProcessResult:
    """How the kernel's process went, seen from outside."""

    exit_code: int
    seconds: float
    network_denied: bool
    peak_bytes: int  # the most memory that one of its processes held


def how_it_ended(exit_code: int) -> str:
    """Say how a process ended: with an exit code or, where that is negative, by a signal."""
    if exit_code == KILLED:
        return (
            f"was ended by signal {-KILLED}, as by a system that is short of memory; Kaggle's has "
            "some 30 GB: free some here, or run it on a larger machine"
        )
    return f"ended {'with exit code' if exit_code >= 0 else 'by signal'} {abs(exit_code)}"


def check_process(result: ProcessResult) -> list[Check]:
    """Check the kernel's exit code, whether the network was denied, and its memory."""
    network = "the network was denied"
    if not result.network_denied:
        network = "the network was NOT denied: this system does not allow it"
    checks = [
        Check(result.exit_code == 0, f"the kernel {how_it_ended(result.exit_code)}"),
        Check(result.network_denied or None, network),
    ]
    if result.peak_bytes > MEMORY:
        words = f"one of its processes held {result.peak_bytes / 1e9:.0f} GB of memory here"
        checks.append(Check(None, f"{words}; Kaggle's machine has some 30 GB for all"))
    return checks


def check_answer(
    submission: Path, sample: Path, images: Path, competition: Competition
) -> list[Check]:
    """Return the validator's verdict, then its warnings; its table stands in the kernel's log.

    Another layout of the competition than the sample's is one that a notebook asks for.
    """
    layout, pairs = read_sample(sample, competition)
    try:
        answer, rows = read_rows(submission, competition, from_kernel=True)
    except (OSError, ValueError) as error:
        return [Check(False, f"{submission.name} is invalid: {one_line(error)}")]
    known = [each.columns for each in layouts_of(competition).values()]
    columns = answer.columns if answer.columns in known else layout.columns
    found = check_submission(submission, columns, pairs, competition, images, from_kernel=True)
    if found.errors:
        return [Check(False, f"{submission.name} is invalid: {'; '.join(found.errors)}")]
    checks = [Check(True, f"{submission.name} is valid: {len(rows):,} rows")]
    if columns != layout.columns:
        written, others = ",".join(columns), ",".join(layout.columns)
        words = f"its header is {written}, as --layout may ask, the sample's is {others}"
        checks.append(Check(None, words))
    return [*checks, *(Check(None, warning) for warning in found.warnings)]


def has_gpu(bundle: Path) -> bool:
    """Whether the kernel asks Kaggle for a GPU, as built; it may be switched off by hand.

    `machine_shape` overrides `enable_gpu`, as Kaggle's client says of its --accelerator.
    """
    with suppress(ValueError):  # what cannot be read is another check's
        meta = read_json(bundle / "kernel" / KERNEL_METADATA.name)
        return meta.get("enable_gpu") is not False or bool(_shape(meta))
    return True


def _shape(meta: dict[str, Any]) -> str:
    """The machine that a kernel's metadata name; a kernel that was pulled may have "None"."""
    shape = str(meta.get("machine_shape") or "")
    return "" if shape == "None" else shape


def check_metadata(bundle: Path, competition: Competition) -> list[Check]:
    """Check what Kaggle will be told, as the build did: it may have changed since."""
    folder, dataset = bundle / "kernel", bundle / "dataset"
    path = dataset / DATASET_METADATA.name
    code_file = NOTEBOOK if (folder / NOTEBOOK).is_file() else SCRIPT.name
    try:
        uploaded = read_json(path)
        check_dataset(uploaded, [each.name for each in dataset.iterdir()])
        path = folder / KERNEL_METADATA.name
        pushed = read_json(path)
        switched_off = pushed.get("enable_gpu") is False
        if switched_off:
            pushed |= {"enable_gpu": True, "machine_shape": _shape(pushed) or MACHINE_SHAPE}
        check_kernel(pushed, uploaded["id"], competition.slug, code_file)
    except (AttributeError, TypeError, ValueError) as error:
        return [Check(False, f"{path}: {error}")]
    checks = []
    if switched_off:
        words = "enable_gpu is false: judged on Kaggle's CPU"
        if has_gpu(bundle):
            words = (
                "enable_gpu is false, but machine_shape overrides it: for Kaggle's CPU empty both"
            )
        checks.append(Check(None, words))
    owners = [str(each["id"]).split("/")[0] for each in (uploaded, pushed)]
    if PLACEHOLDER in owners:
        words = f"the owner is still {PLACEHOLDER}: build again with --owner NAME"
        checks.append(Check(None, words))
    elif len(set(owners)) > 1:
        words = "the dataset is {}'s, the kernel {}'s, who needs access to it".format(*owners)
        checks.append(Check(None, words))
    return checks


def check_wheels(dataset: Path) -> Check:
    """Check that the dataset has its wheels whole: here the kernel finds what is installed."""
    has_halves = any(dataset.glob("*.encoder.xml"))  # OpenVINO's: on Kaggle nothing else runs them
    wheels = WHEELS | OPENVINO_WHEEL if has_halves else WHEELS
    if lacking := lacking_wheels(wheels, dataset):
        names = ", ".join(lacking)
        words = f"{dataset} lacks {names}, or has them damaged: build again"
        return Check(False, words)
    return Check(True, "the wheels that Kaggle's image lacks are packed")


def check_ended(working: Path) -> Check:
    """Return whether the run ended by itself: its watchdog leaves no run.json."""
    if (working / "run.json").is_file():
        return Check(True, "the kernel ended by itself")
    why = "a pass hung until its watchdog ended it, or the disk was full"
    return Check(False, f"the kernel left no run.json: {why}")


def check_record(record: RunRecord) -> list[Check]:
    """Check what run.json says of strips that failed, and of what was dropped to end in time."""
    failed = [f"{name}: {why}" for name, why in record.faults.items() if why != TOO_LATE]
    dropped, late = record.dropped, len(record.faults) - len(failed)
    checks = [Check(True, "no strip failed")]
    if failed:
        checks = [Check(False, f"strips that failed: {len(failed):,}; the first: {failed[0]}")]
    nan = Counter(pass_id for work in record.work.values() for pass_id in work.nan)
    if nan:
        passes = ", ".join(str(record.passes[pass_id]) for pass_id in sorted(nan))
        checks.append(Check(False, f"{passes} gave NaN, for up to {max(nan.values()):,} strips"))
    if dropped:
        passes, strips = ", ".join(sorted(dropped)), max(dropped.values())
        words = f"to end in time here, {passes} were dropped for up to {strips:,} strips"
        checks.append(Check(None, f"{words}, so the measured time is that of a lighter run"))
    if late:
        ok = None if record.work else False  # where none ran, there is nothing to judge by
        checks.append(Check(ok, f"no time was left here for {late:,} strips: they stay empty"))
    return checks


def is_clean(checks: Iterable[Check]) -> bool:
    """Whether no check failed."""
    return all(check.ok is not False for check in checks)


def failed_words(checks: Iterable[Check]) -> str:
    """Return what the checks that failed say, in one line."""
    return "; ".join(check.words for check in checks if check.ok is False)
