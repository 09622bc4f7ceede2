"""Options of a run: their defaults, the command line that gives them, and what is refused."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernel.command import new_parser
from kernel.manifest import MANIFEST
from kernel.mounts import SAMPLE

LAST = ".last"  # beside a worker's csv: the image that it began last


@dataclass(frozen=True)
class Options:
    """The command line; its defaults are what runs on Kaggle."""

    input: Path = Path("/kaggle/input")
    bundle: Path | None = None
    images: Path | None = None
    sample: Path | None = None
    output: Path = Path("submission.csv")
    layout: str | None = None
    batch_size: int = 0  # strips; 0 is 4 on a GPU and 1 on the CPU
    early_exit: bool = True
    workers: int = 0  # processes; 0 is one a GPU, 1 the first alone
    worker: bool = False  # one of several processes, for rows of its own
    budget_s: float | None = None  # from the start; None: the competition's limit
    strict: bool = False  # a strip that failed is an error
    plain: bool = False  # no engine but fp32 PyTorch: where one broke a GPU down
    allow_missing_members: bool = False
    report: Path | None = None  # None is run.json beside the output

    @property
    def record(self) -> Path:
        """Where the run record goes."""
        return self.report or self.output.with_name("run.json")

    @property
    def last_image(self) -> Path | None:
        """The file in which a worker notes the image that it began last; touched while it works."""
        return self.output.with_suffix(LAST) if self.worker else None

    def for_worker(self, **own: Any) -> "Options":
        """Return a worker's: the same, but for its `own` and what the first process alone reads."""
        own |= {"worker": True, "input": Options.input}
        return replace(self, layout=None, workers=0, strict=False, **own)


def check_options(options: Options) -> None:
    """Raise ValueError for what could only fail, or mislead, after the first strip."""
    if not 0 <= options.batch_size < 2**31 or options.workers < 0:
        raise ValueError(
            f"--batch-size {options.batch_size}, --workers {options.workers}: expected 0 or more"
        )
    if options.budget_s is not None and not 0 < options.budget_s < math.inf:
        raise ValueError(f"--budget-s {options.budget_s}: expected seconds, above 0 and finite")
    output, report = options.output, options.record
    for option, path in (("--output", output), ("--report", report)):
        if not path.parent.is_dir():
            raise ValueError(f"{option} {path}: no such folder {path.parent}; make it first")
        if path.exists() and not path.is_file():
            raise ValueError(f"{option} {path}: is no regular file; name another")
    if os.path.realpath(report) == os.path.realpath(output):
        raise ValueError(f"--report {report}: is --output too, and would replace it; name another")


# --- command line ---------------------------------------------------------------------------------

EXAMPLE = "  python inference.py --bundle dist/dataset --images strips/ --output submission.csv"
ABOUT = "Predicts every strip once through every member under every flip, offline."


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Parse the command line; no argument is needed on Kaggle."""
    parser = new_parser(ABOUT, EXAMPLE)
    add = parser.add_argument
    about = "where the bundle and the competition are mounted"
    add("--input", type=Path, help=about)
    add("--bundle", type=Path, help=f"folder with {MANIFEST} (default: found under --input)")
    add("--images", type=Path, help="folder of images (default: beside the sample)")
    about = f"the rows to write (default: {SAMPLE} under --input, or every image of --images)"
    add("--sample", type=Path, help=about)
    add("--output", type=Path, help=f"default {Options.output}")
    about = "such as two-column; default: the sample's own, or without one the competition's last"
    add("--layout", help=about)
    add("--batch-size", type=int, help="strips; default 4 on a GPU and 1 on the CPU")
    about = "run every pass; the submission is the same unless a pass is dropped or gives NaN"
    add("--no-early-exit", dest="early_exit", action="store_false", help=about)
    add("--workers", type=int, help="processes; default one a GPU; 1: this one alone")
    add("--worker", action="store_true", help="as the first process starts others")
    about = "seconds until all is written; default: the competition's limit, Severstal's an hour"
    add("--budget-s", type=float, help=about)
    add("--strict", action="store_true", help="exit code 1 where a strip failed")
    add("--plain", action="store_true", help="run PyTorch in fp32 alone, slowly")
    add("--allow-missing-members", action="store_true", help="go on without a bad member")
    about = "seconds, work per strip and every failed strip (default: run.json beside the output)"
    add("--report", type=Path, help=about)
    parser.set_defaults(**vars(Options()))
    return Options(**vars(parser.parse_args(arguments)))


def arguments_of(options: Options) -> list[str]:
    """Return the command line that `parse_options` reads as these options."""
    words, defaults = list[str](), vars(Options())
    for name, value in vars(options).items():
        option = name.replace("_", "-")
        if value == defaults[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return words
