"""The run record: what a run did for which strips and in how many seconds, and its run.json."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel.checks import read_json
from kernel.faults import one_line
from kernel.files import write_text
from kernel.kaggle import KAGGLE_RUN
from kernel.logs import log
from kernel.outcome import Outcome
from kernel.run_context import RunContext
from kernel.strip_state import StripWork
from kernel.task import Task
from kernel.tta import Half, Pass


@dataclass(kw_only=True)
class RunRecord(Outcome):
    """What run.json holds; of several workers the seconds are means."""

    strips: int
    rows: int  # of the submission
    non_empty: int  # of them
    share: float  # mean of the strips' in `work`
    budget_s: float
    seconds: float
    stages: dict[str, float]  # seconds, without the networks'
    networks: Mapping[str, Mapping[Half, float]]  # member → half → seconds
    kaggle: bool  # whether Kaggle ran it


def build_run_record(
    context: RunContext, task: Task, outcome: Outcome, rows: int, seconds: float
) -> RunRecord:
    """Return the record of a run that has ended."""
    stages, shares = context.stages, [work.share for work in outcome.work.values()]
    return RunRecord(
        **vars(outcome),
        strips=len(task.names),
        rows=rows,
        non_empty=len(context.submission.masked),
        share=sum(shares) / max(len(shares), 1),
        budget_s=context.budget_s,
        seconds=seconds,
        stages=dict(stages.seconds),
        networks=stages.network_table(),
        kaggle=KAGGLE_RUN in os.environ,
    )


# --- run.json -------------------------------------------------------------------------------------


def write_run_record(path: Path, record: RunRecord) -> None:
    """Write run.json, whole or not at all: the submission is there, and that is what counts."""
    try:
        write_text(path, json.dumps(vars(record), default=vars, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        log.warning("the submission is written, but not its record: %s", one_line(error))


def parse_run_record(entries: dict[str, Any], path: Path) -> RunRecord:
    """Parse the run.json that was read from `path`.

    Raises:
        ValueError: it is no run.json of this kernel.
    """
    try:
        passes = [
            Pass(each["member"], each["flip"], (each["flops"][0], each["flops"][1]))
            for each in entries["passes"]
        ]
        work = {name: _parse_work(each) for name, each in entries["work"].items()}
        networks = {
            member: {Half(half): seconds for half, seconds in halves.items()}
            for member, halves in entries["networks"].items()
        }
        parsed = {"passes": passes, "work": work, "networks": networks}
        return RunRecord(**entries | parsed | {"dropped": Counter(entries["dropped"])})
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not a run.json of this kernel: {error!r}") from error


def _parse_work(work: dict[str, Any]) -> StripWork:
    lists = {key: tuple(value) for key, value in work.items() if key != "share"}
    return StripWork(**lists, share=work["share"])


def read_run_record(path: Path) -> RunRecord:
    """Read a run.json; ValueError where there is none of this kernel."""
    return parse_run_record(read_json(path), path)
