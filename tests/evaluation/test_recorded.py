"""Recorded passes: the strips that every measurement runs, and those that it does without."""

from pathlib import Path

import pytest
import torch
from helpers import CPU, save_strips

from evaluation.recorded import RecordedPasses, run_each
from kernel.ensemble import Ensemble
from kernel.manifest import Manifest
from kernel.stages import Stages


def test_a_strip_that_cannot_be_read_or_that_the_networks_fail_on_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torn, large, sound = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    save_strips(tmp_path, ["a.png", "b.png", "c.png"])
    torn.write_bytes(b"torn")

    def run(recorded: RecordedPasses) -> str:
        if recorded.name == large.name:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return f"{recorded.name} ran"

    ensemble = Ensemble(Manifest([]), [], CPU, Stages())
    [(recorded, found)] = run_each(ensemble, [torn, large, sound], "strips", run)
    assert (recorded.name, found) == (sound.name, f"{sound.name} ran")
    first, second = caplog.messages
    assert first.startswith(f"a.png is left out: {torn}: 4 bytes")
    assert second == "b.png is left out: CUDA out of memory"
