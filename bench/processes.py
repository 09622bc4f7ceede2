"""The packed script as a process: its start, its memory, and what is not spent in networks."""

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from strips import repeat
from torch import nn

from evaluation.kaggle_tree import environment_elsewhere
from kernel.checks import read_json
from kernel.competition import SEVERSTAL
from kernel.files import write_json
from kernel.members import build_network
from packing.bundle import build

N_SCORED_IMAGES = SEVERSTAL.n_images
STARTS, LONG_RUN = 3, 100  # runs of one strip, and strips of the run whose memory is measured


@dataclass(frozen=True)
class Process:
    """One run of the packed script."""

    seconds: float  # from its start until its report was written, the last thing it does
    peak_gib: float  # resident, of this process alone
    report: dict[str, Any]

    @property
    def outside_networks(self) -> float:
        """Share of the strips' time in which no network ran."""
        networks = sum(s for halves in self.report["networks"].values() for s in halves.values())
        return float(1 - networks / sum(self.report["strip_s"].values()))

    @property
    def before_first_strip_s(self) -> float:
        """From the start of the process until the first strip enters its first pass."""
        stages, networks = self.report["stages"], self.report["networks"].values()
        working = [stages[stage] for stage in ("decode", "prepare", "tally", "rle", "write")]
        working += [seconds for halves in networks for seconds in halves.values()]
        return self.seconds - float(sum(working))


def run_script(dataset: Path, images: Path) -> Process:
    """The packed inference.py over a folder, as a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, str(dataset / "inference.py"), "--bundle", str(dataset)]
        command += ["--images", str(images), "--report", "run.json"]
        start = time.time()
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            command, cwd=scratch, env=environment_elsewhere(), stdout=quiet, stderr=quiet
        )
        peak_kb = 0  # not getrusage's, which starts at what this process holds
        while process.poll() is None:
            found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            peak_kb = int(found[1]) if found else peak_kb
            time.sleep(0.02)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        path = Path(scratch, "run.json")
        seconds = path.stat().st_mtime - start  # taking memory down is not waiting for a strip
        report = read_json(path)
    return Process(seconds, peak_kb / 2**20, report)


def stub_bundle(folder: Path) -> Path:
    """A member of next to no work, to run the whole length of the scored run."""
    model = {"arch": "FPN", "encoder_name": "tu-test_resnet", "in_channels": 1, "classes": 4}
    model |= {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}
    folder.mkdir()
    network = build_network(model)
    head = network.get_submodule("segmentation_head.0")
    assert isinstance(head, nn.Conv2d) and head.bias is not None
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, 3)  # every mask whole: noise would be gigabytes of run lengths
    save_file(network.state_dict(), folder / "stub.safetensors")
    entry = {"name": "stub", "file": "stub.safetensors", "model": model, "mean": [0.34]}
    manifest = {"members": [entry | {"std": [0.13]}], "flips": ["none"]}
    write_json(folder / "ensemble.json", manifest)
    build(folder, folder / "dist", "bench")
    return folder / "dist" / "dataset"


def measure_processes(dataset: Path, paths: list[Path], folder: Path) -> dict[str, Any]:
    """What the packed script takes as a process: one strip, 100, and as many as are scored."""
    print(f"one strip, {LONG_RUN} and {N_SCORED_IMAGES} (with a stub member) as processes")
    one = repeat(paths, folder / "one", 1)
    starts = [run_script(dataset, one) for _ in range(STARTS)]  # the first one warms the disk
    first = sorted(starts, key=lambda process: process.before_first_strip_s)[STARTS // 2]
    hundred = run_script(dataset, repeat(paths, folder / "hundred", LONG_RUN))
    stub = run_script(stub_bundle(folder / "stub"), repeat(paths, folder / "all", N_SCORED_IMAGES))
    return {
        "outside_networks": hundred.outside_networks,
        "start_to_first_strip_s": first.before_first_strip_s,
        "of_which_check_s": first.report["stages"]["check"],
        "peak_gib": hundred.peak_gib,
        "peak_gib_stub": stub.peak_gib,
    }


def process_lines(results: dict[str, Any]) -> list[str]:
    """What the table says of the packed script as a process, once that is measured."""
    if "outside_networks" not in results:
        return []
    return [
        f"Outside the networks: {results['outside_networks']:.1%} of the time.",
        f"From the start to the first strip: {results['start_to_first_strip_s']:.1f} s, "
        f"{results['of_which_check_s']:.1f} s of it the check of the engines.",
        f"Peak memory: {results['peak_gib']:.2f} GiB over {LONG_RUN} strips, "
        f"{results['peak_gib_stub']:.2f} GiB over {N_SCORED_IMAGES:,} of a stub member.",
    ]
