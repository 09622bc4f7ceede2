"""Many strips take no more memory than few: `make soak` runs as many as the scored run has.

Members are stubs, all else is the kernel's: real JPEGs of full size, five members under three
flips, strips that are proven clean, proven half-way and never, a strip in a hundred that is broken.
"""

import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch
from helpers import ROOT, predict, run_script, tiny_entry, tiny_model, write_manifest

from kernel.manifest import MemberSpec
from kernel.members import Member
from kernel.submission import Submission

N_STRIPS = int(os.environ.get("SOAK", "200"))
N_MEMBERS = 5
N_IMAGES = 20  # that the strips are links to


def encode(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gates as bright as the brightest pixel, and the images as features."""
    return images.amax(dim=(-2, -1)).expand(-1, 4), images


def decode(gates: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The brighter a pixel, the surer a defect there."""
    return images.expand(-1, 4, -1, -1) * gates[:, :, None, None]


def lay(folder: Path) -> None:
    """Strips of all kinds, and a bundle of members that are never read."""
    rng, images = np.random.default_rng(3), folder / "images"
    images.mkdir()
    for index in range(N_IMAGES):
        grey = rng.integers(20, 90, (256, 1600), np.uint8)
        if index % 2:
            grey[60:200, 800 : 800 + 30 * index] = 120 + 6 * index
        cv2.imwrite(str(folder / f"{index}.jpg"), grey)
    for index in range(N_STRIPS):
        if index % 100 == 50:
            (images / f"{index}.jpg").write_bytes(b"broken")
        else:
            (images / f"{index}.jpg").symlink_to(folder / f"{index % N_IMAGES}.jpg")
    members = [tiny_entry(f"stub{index}", tiny_model()) for index in range(N_MEMBERS)]
    write_manifest(folder, members, image_size=[256, 1600])


def peak_mb() -> float:
    """The most memory that this process has held, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def soak(folder: Path) -> None:
    """One run; prints the peak after each tenth of the strips, and what was found."""
    peaks, set_masks = list[float](), Submission.set_masks

    def stubs(_: Path, specs: Sequence[MemberSpec], *__: Any, **___: Any) -> dict[str, Member]:
        return {spec.name: Member(spec, encode, decode, stride=32) for spec in specs}

    def spied(submission: Submission, image: str, rles: dict[int, str]) -> None:
        set_masks(submission, image, rles)
        peaks.append(peak_mb())

    with (
        mock.patch("kernel.ensemble_loading.load_members", stubs),
        mock.patch.object(Submission, "set_masks", spied),
    ):
        record = predict(folder, folder / "images", folder / "submission.csv")
    shares = [work["share"] for work in record["work"].values()]
    print("found", record["non_empty"], len(record["faults"]), min(shares), max(shares))
    print("peaks", *(f"{peaks[len(peaks) * tenth // 10]:.0f}" for tenth in range(1, 10)))


def test_memory_stays_flat_however_many_strips_come(tmp_path: Path) -> None:
    lay(tmp_path)
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    timeout_s = 300 + N_STRIPS
    ended = run_script(Path(__file__), tmp_path, timeout_s=timeout_s, PYTHONPATH=path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    printed = dict(line.split(" ", 1) for line in ended.stdout.splitlines()[-2:])
    non_empty, faults, least, most = map(float, printed["found"].split())
    assert non_empty > N_STRIPS / 2 and faults == N_STRIPS // 100
    assert least < 0.6 and most == 1  # some are proven early, some never
    peaks = [float(peak) for peak in printed["peaks"].split()]
    print(f"{N_STRIPS} strips, MB after each tenth: {peaks}")
    # the first strips warm up; of 120 more, the images alone, if they were kept, would be 49 MB
    assert peaks[-1] - peaks[3] < 30, peaks
    assert len((tmp_path / "submission.csv").read_text().splitlines()) == 4 * N_STRIPS + 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    soak(Path(sys.argv[1]))
