"""What a script finds where Kaggle runs it."""

import os
import time
from pathlib import Path

KAGGLE_RUN = "KAGGLE_KERNEL_RUN_TYPE"  # set where Kaggle runs it
UNATTENDED = "Batch"  # its value where nobody looks on; else Interactive
SCORED_RUN = "KAGGLE_IS_COMPETITION_RERUN"  # set only where Kaggle scores what the run leaves
WORKING = Path("/kaggle/working")  # what is left there is the run's output


def is_scored_run() -> bool:
    """Whether this is the run that Kaggle scores, on the hidden images."""
    return bool(os.environ.get(SCORED_RUN))


def run_began(limit_s: float) -> float:
    """Return when this run began, by time.monotonic(): with its process, where that is its own.

    So it is where this code is a script or a notebook, whose cells and imports take of its time. An
    age beyond the run's limit is not believed: a sandbox may say when its host started.
    """
    age_s = _process_age_s() if __name__ == "__main__" else 0.0
    return time.monotonic() - (age_s if age_s < limit_s else 0.0)


def _process_age_s() -> float:
    """Seconds since Linux started this process; 0 where that is not known."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after the system's own start
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return max(age_s, 0.0) if started_s else 0.0


def enter_working_folder() -> None:
    """Go where Kaggle takes the output from: an unattended script may start in a read-only folder.

    Where somebody looks on, below that folder and anywhere else, relative paths stay what they are.
    """
    there = Path.cwd().is_relative_to(WORKING)
    if os.environ.get(KAGGLE_RUN) == UNATTENDED and WORKING.is_dir() and not there:
        os.chdir(WORKING)
