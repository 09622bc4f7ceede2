"""A strip's state: what ran for it, what runs next, and its masks when it is done."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kernel.early_exit import Tally
from kernel.images import Size, Strip
from kernel.logs import log
from kernel.tta import Half

Step = tuple[Half, ...]  # the halves of a pass that run at once
ENCODE, DECODE, WHOLE = (Half.ENCODER,), (Half.DECODER,), (Half.ENCODER, Half.DECODER)
TOO_LATE = "no time was left for it"  # no fault of the networks: no other engine could mend it


@dataclass(eq=False)
class StripState:
    """A strip between its first pass and its masks."""

    strip: Strip
    images: Tensor  # (1, channels, H, W), on the device
    tally: Tally
    pass_ids: list[int] = field(default_factory=list)  # of the passes in its mean, in their order
    size: Size = (0, 0)  # of the strip
    ended_at_admission: int = 0  # how many strips had ended when it came
    encoded: list[tuple[Tensor, ...]] = field(default_factory=list)  # and not decoded yet
    ran: dict[Half, list[int]] = field(default_factory=lambda: {half: [] for half in Half})
    next_step: tuple[Step, int] = (ENCODE, 0)  # which halves of which pass
    pending_features: tuple[Tensor, ...] = ()  # what the step under way encoded
    masks: npt.NDArray[np.bool_] = field(init=False)  # (classes, H, W), once done without fault
    fault: str = ""
    alone: bool = False  # the others wait for its end: beside them memory was too small for it
    planned: list[int] = field(init=False)  # the passes that it began with, those of NaN too

    def __post_init__(self) -> None:
        self.planned = list(self.pass_ids)
        if self.pass_ids:
            self._set_next_step()

    @property
    def done(self) -> bool:
        """Whether its masks are known, or never will be."""
        return bool(self.fault) or not self.tally.open

    @property
    def failed(self) -> bool:
        """Whether the networks failed on it."""
        return bool(self.fault) and self.fault != TOO_LATE and self.strip.image is not None

    @property
    def kept_bytes(self) -> int:
        """Bytes of its images, its sum, and what is encoded and not decoded yet."""
        features = sum(tensor.nbytes for features in self.encoded for tensor in features)
        total = self.tally.total
        return self.images.nbytes + features + (0 if total is None else total.nbytes)

    def launch(self, encoded: tuple[Tensor, ...], probabilities: Tensor | None) -> Tensor:
        """Queue what its next step gave, gates first; return what `settle` takes."""
        self.pending_features = encoded
        return self.tally.launch(encoded[0][0] if encoded else None, probabilities)

    def settle(self, found: npt.NDArray[np.float64]) -> None:
        """End its next step with what `launch` found; a pass that gave NaN is dropped."""
        step, pass_id = self.next_step
        for half in step:
            self.ran[half].append(pass_id)
        index = len(self.tally.gates) if Half.ENCODER in step else self.tally.decoded
        if step == DECODE:
            del self.encoded[0]
        if not self.tally.settle(found):
            self._drop_pass(index)
        elif step == ENCODE:
            self.encoded.append(self.pending_features)
        self.pending_features = ()
        self._set_next_step()

    def cancel(self) -> None:
        """Give up what its next step launched: it failed, and may come again."""
        self.pending_features, self.tally.launched = (), (None, None)

    def release_features(self) -> None:
        """Give up what is encoded and not decoded yet: those passes are encoded again."""
        kept = self.pass_ids[self.tally.decoded : len(self.tally.gates)]
        self.ran[Half.ENCODER] = [i for i in self.ran[Half.ENCODER] if i not in kept]
        self.encoded.clear()
        self.tally.release_gates()
        self._set_next_step()

    def finalize(self) -> None:
        """End with the passes that are decoded, for the hour ends."""
        if self.tally.decoded:
            self.tally.finalize()
        else:
            self.fault = self.fault or TOO_LATE

    def _drop_pass(self, index: int) -> None:
        pass_id = self.pass_ids.pop(index)
        log.warning("%s: pass %d gives NaN, dropped from its mean", self.strip.name, pass_id)
        self.fault = "" if self.pass_ids else "every pass gave NaN"

    def _set_next_step(self) -> None:
        """Encoders alone while they may prove everything, else whole passes.

        What is encoded is decoded before that.
        """
        tally = self.tally
        if self.done:
            return
        if self.encoded and (len(tally.gates) == tally.n_passes or not tally.may_be_clean):
            self.next_step = (DECODE, self.pass_ids[tally.decoded])
        else:
            step = ENCODE if tally.may_be_clean else WHOLE
            self.next_step = (step, self.pass_ids[len(tally.gates)])


@dataclass(frozen=True)
class StripWork:
    """What ran for a strip that is done, by pass ids."""

    passes: tuple[int, ...]  # that it was planned with
    encoders: tuple[int, ...]  # whose encoder ran, in order
    decoders: tuple[int, ...]
    nan: tuple[int, ...]  # that gave NaN
    share: float  # that its halves have of the flops of all passes

    def renumber(self, ids: Mapping[int, int]) -> "StripWork":
        """Return the same by other ids of the passes, `ids` from old to new."""

        def new(old: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(ids[pass_id] for pass_id in old)

        halves = new(self.encoders), new(self.decoders)
        return StripWork(new(self.passes), *halves, new(self.nan), self.share)
