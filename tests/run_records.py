"""A run.json counted by hand, for the tests of projection, report and dry run."""

from pathlib import Path
from typing import Any

from evaluation.measured import MeasuredRun
from kernel.run_record import RunRecord, parse_run_record
from kernel.strip_state import TOO_LATE

PASSES = [
    {"member": "a", "flip": "none", "flops": [10, 20]},
    {"member": "a", "flip": "vertical", "flops": [10, 20]},
    {"member": "b", "flip": "none", "flops": [30, 40]},
    {"member": "b", "flip": "vertical", "flops": [30, 40]},
]


def strip_work(
    encoders: list[int], decoders: list[int], passes: list[int] | None = None
) -> dict[str, Any]:
    """What run.json says of one strip, planned with all four passes where `passes` is None."""
    planned = [0, 1, 2, 3] if passes is None else passes
    return {"passes": planned, "encoders": encoders, "decoders": decoders, "nan": [], "share": 0.5}


def run_json(**changes: Any) -> dict[str, Any]:
    """Two members, two flips; a clean strip, one half-way, one with every pass, and a fault."""
    return {
        "seconds": 20.0,
        "strips": 4,
        "rows": 16,
        "budget_s": 3600,
        "stages": {"start": 1.0, "import": 2.0, "load": 3.0, "check": 2.0, "decode": 0.5},
        "networks": {"a": {"encoder": 2.1, "decoder": 1.2}, "b": {"encoder": 2.4, "decoder": 2.0}},
        "passes": PASSES,
        "work": {
            "1.jpg": strip_work([0, 1, 2], []),
            "2.jpg": strip_work([0, 1, 2, 3], [0, 1, 2]),
            "3.jpg": strip_work([0, 1, 2, 3], [0, 1, 2, 3]),
        },
        "strip_s": {"1.jpg": 2.0, "2.jpg": 4.0, "3.jpg": 5.0},
        "faults": {"4.jpg": "no image"},
        "dropped": {},
        "share": 0.6,
        "gpu_bytes": 0,
        "non_empty": 2,
        "device": "cpu",
        "workers": 1,
        "kaggle": True,
    } | changes


def repeat(record: dict[str, Any], times: int = 25) -> dict[str, Any]:
    """A run of `times` as many strips, each as long: of few a GPU's has no rate."""
    fixed_s = sum(record["stages"][stage] for stage in ("start", "import", "load", "check"))
    strips = {
        key: {f"{copy}_{name}": of for copy in range(times) for name, of in record[key].items()}
        for key in ("work", "strip_s", "faults")
    }
    seconds = fixed_s + times * (record["seconds"] - fixed_s)
    return record | strips | {"strips": times * record["strips"], "seconds": seconds}


TRUNCATED: dict[str, Any] = {  # of four strips one had every pass, and one no time at all
    "work": {
        "1.jpg": strip_work([0, 1, 2, 3], [0, 1, 2, 3]),
        "2.jpg": strip_work([0, 2], [0, 2], passes=[0, 2]),
    },
    "faults": {"3.jpg": "no image", "4.jpg": TOO_LATE},
}


def a_record(**changes: Any) -> RunRecord:
    """The same, parsed."""
    return parse_run_record(run_json(**changes), Path("run.json"))


def a_run(**changes: Any) -> MeasuredRun:
    """The same, measured."""
    return MeasuredRun(a_record(**changes))
