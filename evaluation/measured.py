"""A run by its run.json: what it says of the seconds of another."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kernel.competition import SEVERSTAL
from kernel.run_record import RunRecord
from kernel.strip_state import TOO_LATE, StripWork
from kernel.tta import Half
from training.metrics import Floats, Ints

FIXED_STAGES = {"start", "import", "load", "check"}  # paid once, however many the strips
DEVICE_STAGES = {"prepare", "tally"}  # on the networks' device; on a GPU next to nothing
MIN_GPU_STRIPS = 100  # of fewer, a GPU's start, which is in no stage, is most of the seconds


def spread_of_mean(values: Floats, resamples: int = 2000) -> tuple[float, float] | None:
    """Return how far below and above their mean that of other such values lies, in 95 % of cases.

    By the bootstrap; None of fewer than two values (values,).
    """
    if values.size < 2:
        return None
    rng = np.random.default_rng(0)
    drawn = [rng.choice(values, values.size).mean() for _ in range(resamples)]
    low, high = np.quantile(drawn, (0.025, 0.975)) - values.mean()
    return float(low), float(high)


@dataclass(frozen=True)
class MeasuredRun:
    """A run's record, and what it says of the seconds of another."""

    record: RunRecord
    n_images: int = SEVERSTAL.n_images  # of the scored run
    # member → flops of its halves at the images' size, where the record's are of another
    counted_again: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def workers(self) -> int:
        """Processes beside the first: one a GPU, or several; 0: none."""
        count, on_gpu = self.record.workers, self.record.device.startswith("cuda")
        return count if on_gpu or count > 1 else 0

    @property
    def work(self) -> Collection[StripWork]:
        """What ran for the strips that did not fail."""
        return self.record.work.values()

    @property
    def late(self) -> set[str]:
        """Strips that no time was left for."""
        return {name for name, fault in self.record.faults.items() if fault == TOO_LATE}

    @property
    def strip_s(self) -> Floats:
        """Seconds since the strip before, (strips that were not late,)."""
        late, strip_s = self.late, self.record.strip_s
        return np.array([seconds for name, seconds in strip_s.items() if name not in late])

    @property
    def fixed_s(self) -> float:
        """Seconds that do not grow with the strips."""
        return sum(self.record.stages.get(stage, 0.0) for stage in FIXED_STAGES)

    @property
    def begun(self) -> int:
        """Strips that time was left for: what the seconds went to. One at the least."""
        return max(self.record.strips - len(self.late), 1)

    @property
    def few_for_gpu(self) -> bool:
        """Whether a GPU had so few strips that its start is most of their seconds."""
        return self.record.device.startswith("cuda") and self.begun < MIN_GPU_STRIPS

    @property
    def per_strip_s(self) -> float:
        """Seconds that each strip adds."""
        return (self.record.seconds - self.fixed_s) / self.begun

    def beside_s(self, on_gpu: bool) -> float:
        """Return a worker's seconds for each strip in the stages beside the networks.

        `on_gpu`: as on a machine with a GPU.
        """
        stages, workers = self.record.stages, self.record.workers
        moved = DEVICE_STAGES if on_gpu and self.record.device == "cpu" else set()
        growing = stages.keys() - FIXED_STAGES - moved
        return sum(stages[stage] for stage in growing) * workers / self.begun

    @property
    def flops(self) -> Floats:
        """Flops of each half of each pass, (passes, 2), as the build counted them for any run."""
        return np.array([each.flops for each in self.record.passes], np.float64).reshape(-1, 2)

    @property
    def flops_here(self) -> Floats:
        """The same, at the size of this run's images."""
        passes = self.record.passes
        rows = [self.counted_again.get(each.member, each.flops) for each in passes]
        return np.array(rows, np.float64).reshape(-1, 2)

    @property
    def counts(self) -> Ints:
        """How many strips each half of each pass ran for, (passes, 2)."""
        return self._count(self.work)

    def _count(self, works: Iterable[StripWork]) -> Ints:
        counts = np.zeros((len(self.record.passes), 2), np.int64)
        for work in works:
            counts[list(work.encoders), 0] += 1
            counts[list(work.decoders), 1] += 1
        return counts

    @property
    def full_work(self) -> list[StripWork]:
        """The work of strips for which no pass was dropped: at least the first ones."""
        most = max((len(work.passes) for work in self.work), default=0)
        return [work for work in self.work if len(work.passes) == most]

    @property
    def dropped(self) -> bool:
        """Whether passes or whole strips were dropped for the run to end in time."""
        return bool(self.late) or len(self.full_work) < len(self.work)

    @property
    def strips_per_full_strip(self) -> float:
        """How many strips one of the `full_work` stands for among as many with all passes."""
        return len(self.work) / self.begun / max(len(self.full_work), 1)

    @property
    def full_counts(self) -> Floats:
        """How often each half of each pass runs for a strip if none is dropped, (passes, 2)."""
        return self._count(self.full_work).astype(np.float64) * self.strips_per_full_strip

    @property
    def ran(self) -> Ints:
        """How many encoders and decoders ran for each strip, (strips that did not fail, 2)."""
        ran = [(len(work.encoders), len(work.decoders)) for work in self.work]
        return np.array(ran, np.int64).reshape(-1, 2)

    @property
    def half_s(self) -> Floats:
        """A worker's seconds for each half of each pass for one strip, (passes, 2); 0 if none ran.

        A member's flips are assumed to cost the same.
        """
        passes, networks, counts = self.record.passes, self.record.networks, self.counts
        half_s = np.zeros((len(passes), 2))
        for member in {each.member for each in passes}:
            rows = [index for index, each in enumerate(passes) if each.member == member]
            for column, half in enumerate(Half):
                seconds = networks.get(member, {}).get(half, 0.0) * self.record.workers
                half_s[rows, column] = seconds / max(counts[rows, column].sum(), 1)
        return half_s

    @property
    def strip_flops(self) -> float:
        """Mean flops of a strip, of what ran."""
        return float((self.counts * self.flops).sum() / self.begun)

    def full_flops(self, flops: Floats) -> Floats:
        """Return the flops of a strip if no pass is dropped, by each of the `full_work`, (strips,).

        `flops` (passes, 2) are those of the halves. Their mean is over all strips that were begun,
        those that failed among them, which have none.
        """
        ran = [
            flops[list(work.encoders), 0].sum() + flops[list(work.decoders), 1].sum()
            for work in self.full_work
        ]
        return np.array(ran, np.float64) * (len(self.work) / self.begun)

    @property
    def per_strip_dropped_s(self) -> float:
        """Seconds that a strip's dropped passes would have added, in the networks."""
        fewer = self.full_counts - self.counts / self.begun
        return float((fewer * self.half_s).sum()) / self.record.workers
