"""A run's masks drawn on its strips, beside the ground truth where one is given."""

import base64
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from kernel.contact_sheet import MOST, Picture, caption_of, captioned, draw_strip, stack
from kernel.images import read_image
from kernel.logs import progress
from weights.score import Scores, dice, draw_truth


@dataclass(frozen=True)
class Drawn:
    """A drawn strip and what is said of it."""

    name: str
    canvas: Picture
    classes: list[int]  # found
    dice: float | None  # None where no truth is known

    @property
    def uri(self) -> str:
        """The canvas as a JPEG inside its own address."""
        _, data = cv2.imencode(".jpg", self.canvas, [cv2.IMWRITE_JPEG_QUALITY, 85])
        return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"

    @property
    def caption(self) -> str:
        """One line."""
        said = "" if self.dice is None else f"   Dice {self.dice:.3f}"
        return caption_of(self.name, self.classes) + said


@dataclass(frozen=True)
class Found:
    """A run's result beside what is known of it."""

    images: Path
    names: list[str]
    rles: dict[str, dict[int, str]]  # image → class → RLE; empty ones may be missing
    truth: dict[str, dict[int, str]] | None
    classes: int

    def draw(self, most: int = MOST) -> tuple[list[Drawn], Scores]:
        """Pictures of the first `most` strips, and the scores of all that have a truth."""
        pictures, scores = list[Drawn](), Scores()
        for name in progress(self.names, "drawing", "strip"):
            if self.truth is None and len(pictures) == most:
                break
            try:
                image = read_image(self.images / name)
            except (ValueError, OSError):
                continue  # the kernel's log has named it
            size, rles, truth = (image.shape[0], image.shape[1]), self.rles.get(name, {}), None
            masks, value = draw_truth(rles, self.classes, size), None
            if self.truth is not None:
                truth = draw_truth(self.truth.get(name, {}), self.classes, size)
                value = float(np.mean(dice(masks, truth)))
                scores.add(masks, truth)
            if len(pictures) < most:
                canvas = draw_strip(image, masks, () if truth is None else truth)
                pictures.append(Drawn(name, canvas, sorted(rles), value))
        return pictures, scores


def write_sheet(pictures: list[Drawn], path: Path) -> None:
    """One under the other as one image, as wide as the widest."""
    strips = [captioned(drawn.canvas, drawn.caption) for drawn in pictures]
    if not strips:
        strips = [captioned(np.zeros((0, 1600, 3), np.uint8), "no strip could be read")]
    cv2.imwrite(str(path), stack(strips))
