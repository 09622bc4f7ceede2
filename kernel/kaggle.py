"""What a script finds where Kaggle runs it."""

import os
from pathlib import Path

KAGGLE_RUN = "KAGGLE_KERNEL_RUN_TYPE"  # set where Kaggle runs it
UNATTENDED = "Batch"  # its value where nobody looks on; else Interactive
SCORED_RUN = "KAGGLE_IS_COMPETITION_RERUN"  # set only where Kaggle scores what the run leaves
WORKING = Path("/kaggle/working")  # what is left there is the run's output


def is_scored_run() -> bool:
    """Whether this is the run that Kaggle scores, on the hidden images."""
    return bool(os.environ.get(SCORED_RUN))


def enter_working_folder() -> None:
    """Go where Kaggle takes the output from: an unattended script may start in a read-only folder.

    Where somebody looks on, below that folder and anywhere else, relative paths stay what they are.
    """
    there = Path.cwd().is_relative_to(WORKING)
    if os.environ.get(KAGGLE_RUN) == UNATTENDED and WORKING.is_dir() and not there:
        os.chdir(WORKING)
