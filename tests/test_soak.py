"""Many strips take no more memory than few: `make soak` runs as many as the scored run has.

Members are stubs, all else is the kernel's: real JPEGs of full size, five members under three
flips, strips that are proven clean, proven half-way and never, a strip in a hundred that is broken.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from conftest import tiny_entry, tiny_model, write_manifest

from kernel import ensemble, inference
from kernel.members import Member
from kernel.mounts import Options
from kernel.rows import Submission

STRIPS = int(os.environ.get("SOAK", "200"))
MEMBERS = 5
PICTURES = 20  # that the strips are links to


class Stub:
    """Both halves of a member: the brighter a strip's right half, the surer a defect there."""

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gates = images.amax(dim=(-2, -1)).expand(-1, 4)
        return gates, images

    def decode(self, gates: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return images.expand(-1, 4, -1, -1) * gates[:, :, None, None]


def lay(folder: Path) -> None:
    """Strips of all kinds, and a bundle of members that are never read."""
    rng, images = np.random.default_rng(3), folder / "images"
    images.mkdir()
    for index in range(PICTURES):
        grey = rng.integers(20, 90, (256, 1600), np.uint8)
        if index % 2:
            grey[60:200, 800 : 800 + 30 * index] = 120 + 6 * index
        cv2.imwrite(str(folder / f"{index}.jpg"), grey)
    for index in range(STRIPS):
        (images / f"{index}.jpg").symlink_to(folder / f"{index % PICTURES}.jpg")
        if index % 100 == 50:
            (images / f"{index}.jpg").unlink()
            (images / f"{index}.jpg").write_bytes(b"broken")
    members = [tiny_entry(f"stub{index}", tiny_model()) for index in range(MEMBERS)]
    write_manifest(folder, members, image_size=[256, 1600])


def peak_mb() -> float:
    """The most memory that this process has held, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def soak(folder: Path) -> None:
    """One run; prints the peak after each tenth of the strips, and what was found."""
    peaks, put = list[float](), Submission.put

    def members(_: Path, specs: Any, *__: Any) -> list[Member]:
        stub = Stub()
        return [Member(spec, stub.encode, stub.decode, stride=32) for spec in specs]

    def spied(submission: Submission, image: str, rles: dict[int, str]) -> None:
        put(submission, image, rles)
        peaks.append(peak_mb())

    ensemble.load_members = members
    Submission.put = spied  # type: ignore[method-assign]
    images, output = folder / "images", folder / "submission.csv"
    report = inference.run(Options(bundle=folder, images=images, output=output))
    shares = [work["share"] for work in report["work"].values()]
    print("found", report["non_empty"], len(report["faults"]), min(shares), max(shares))
    print("peaks", *(f"{peaks[len(peaks) * tenth // 10]:.0f}" for tenth in range(1, 10)))


def test_memory_stays_flat_however_many_strips_come(tmp_path: Path) -> None:
    lay(tmp_path)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(inference.__file__).parents[1])])
    command = [sys.executable, __file__, str(tmp_path)]
    ended = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = dict(line.split(" ", 1) for line in ended.stdout.splitlines()[-2:])
    non_empty, faults, least, most = map(float, told["found"].split())
    assert non_empty > STRIPS / 2 and faults == STRIPS // 100
    assert least < 0.6 and most == 1  # some are proven early, some never
    peaks = [float(peak) for peak in told["peaks"].split()]
    print(f"{STRIPS} strips, MB after each tenth: {peaks}")
    assert peaks[-1] - peaks[1] < 30, peaks  # a sum kept for each strip would be 6.5 MB of them
    assert len((tmp_path / "submission.csv").read_text().splitlines()) == 4 * STRIPS + 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    soak(Path(sys.argv[1]))
