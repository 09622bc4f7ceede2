"""Where results go: a place that takes none is refused before minutes or hours of work."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import error_of, exit_code, save_strips

from evaluation import growth, half_precision, score

COMMANDS: dict[str, tuple[Callable[[list[str]], object], str]] = {  # with what they work by
    "growth": (growth.main, "evaluation.growth.load_for_images"),
    "half precision": (half_precision.main, "evaluation.half_precision.measure"),
    "a score": (score.main, "evaluation.score.load_for_images"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    case: str,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main, work = COMMANDS[case]
    images, truth = tmp_path / "strips", tmp_path / "train.csv"
    save_strips(images, ["a.png"])
    truth.write_text("ImageId,ClassId,EncodedPixels\na.png,1,1 5\n")
    monkeypatch.setattr(work, None)
    words = ["--bundle", tiny_bundle / "dataset", "--images", images, "--out", tmp_path]
    words += ["--truth", truth] if case == "a score" else []
    assert exit_code(main, *words) == 2
    assert f"{tmp_path}: a folder, expected a file" in error_of(capsys.readouterr().err)
