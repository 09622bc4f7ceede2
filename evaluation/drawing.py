"""Drawing: a run's masks on its strips, with the ground truth where one is known."""

import base64
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from kernel.competition import SEVERSTAL, Competition
from kernel.contact_sheet import (
    MAX_STRIPS,
    Picture,
    add_caption,
    caption_of,
    overlay_masks,
    stack,
)
from kernel.images import read_image, size_of
from kernel.logs import progress
from training.ground_truth import decode_masks, decode_scored_masks
from training.metrics import Scores, dice


@dataclass(frozen=True)
class AnnotatedStrip:
    """A drawn strip, the classes found on it, and its Dice."""

    name: str
    canvas: Picture
    classes: list[int]  # found
    dice: float | None  # mean over the classes; None where no truth is known
    competition: Competition = SEVERSTAL

    @property
    def uri(self) -> str:
        """The canvas as a JPEG in a data URI."""
        _, data = cv2.imencode(".jpg", self.canvas, [cv2.IMWRITE_JPEG_QUALITY, 85])
        return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"

    @property
    def caption(self) -> str:
        """The strip's name, the classes found and the Dice."""
        dice_part = "" if self.dice is None else f"   Dice {self.dice:.3f}"
        return caption_of(self.name, self.classes, self.competition) + dice_part


@dataclass(frozen=True)
class Predictions:
    """A run's masks, and the ground truth if there is one."""

    images: Path
    names: list[str]
    rles: dict[str, dict[int, str]]  # image → class → RLE; empty ones may be missing
    truth: dict[str, dict[int, str]] | None  # likewise; an image that it does not name is clean
    competition: Competition = SEVERSTAL

    def draw(self, most: int = MAX_STRIPS) -> tuple[list[AnnotatedStrip], Scores]:
        """Draw the first `most` strips; score all of them where there is a ground truth."""
        pictures, scores = list[AnnotatedStrip](), Scores()
        for name in progress(self.names, "drawing", "strip"):
            if self.truth is None and len(pictures) == most:
                break
            try:
                image = read_image(self.images / name, self.competition)
            except (ValueError, OSError):
                continue  # the kernel's log has named it
            size, rles, truth, value = size_of(image), self.rles.get(name, {}), None, None
            mask_size = self.competition.size_of_mask(size)
            masks = decode_masks(self.rles, name, mask_size, self.competition)
            if self.truth is not None:
                truth = decode_scored_masks(self.truth, name, size, self.competition)
                value = float(np.mean(dice(masks, truth)))
                scores.add(masks, truth)
            if len(pictures) < most:
                canvas = overlay_masks(image, masks, () if truth is None else truth)
                found = sorted(rles)
                pictures.append(AnnotatedStrip(name, canvas, found, value, self.competition))
        return pictures, scores


def write_sheet(pictures: list[AnnotatedStrip], path: Path) -> None:
    """Write drawn strips as one image, one under the other."""
    strips = [add_caption(picture.canvas, picture.caption) for picture in pictures]
    if not strips:
        strips = [add_caption(np.zeros((0, 1600, 3), np.uint8), "no strip could be read")]
    cv2.imwrite(str(path), stack(strips))
