"""The outcome of a run: what became of its images."""

from collections import Counter
from dataclasses import dataclass, field

from kernel.strip_state import StripWork
from kernel.tta import Pass


@dataclass
class Outcome:
    """What became of every image; its masks are in the submission."""

    faults: dict[str, str] = field(default_factory=dict)  # image → why its rows stay empty
    failed: list[str] = field(default_factory=list)  # those of them that the networks failed on
    work: dict[str, StripWork] = field(default_factory=dict)  # image → what ran for it
    passes: list[Pass] = field(default_factory=list)  # that were loaded; `work` has their numbers
    dropped: Counter[str] = field(default_factory=Counter)  # "member/flip" → strips without it
    strip_s: dict[str, float] = field(default_factory=dict)  # image → seconds since the one before
    device: str = ""
    gpu_bytes: int = 0  # the most that PyTorch held on one GPU
    workers: int = 1  # processes that shared the images

    def add(self, other: "Outcome") -> None:
        """Add what became of other images."""
        if not self.work:  # the first that did any, whatever took leftovers
            self.device = other.device or self.device
        self.passes += [each for each in other.passes if each not in self.passes]
        number = {i: self.passes.index(each) for i, each in enumerate(other.passes)}
        for image, work in other.work.items():
            self.work[image] = work.renumber(number)
        self.faults = other.faults | self.faults  # the first reason stays
        self.failed += other.failed
        self.dropped += other.dropped
        self.strip_s |= other.strip_s
        self.gpu_bytes = max(self.gpu_bytes, other.gpu_bytes)
