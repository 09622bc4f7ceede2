"""Drawing: a run's masks on its strips, with the ground truth where one is known."""

import base64
from collections.abc import Sequence
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
from training.ground_truth import Rles, Truth, decode_masks, decode_scored_masks
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


def draw_predictions(
    images: Path,
    names: Sequence[str],
    rles: Rles,
    truth: Truth | None,
    competition: Competition = SEVERSTAL,
) -> tuple[list[AnnotatedStrip], Scores]:
    """Draw a run's masks `rles` on the first strips; score all of them by the `truth`, if any.

    An image or class that either of both does not name has no mask.
    """
    pictures, scores = list[AnnotatedStrip](), Scores()
    for name in progress(names, "drawing", "strip"):
        if truth is None and len(pictures) == MAX_STRIPS:
            break
        try:
            image = read_image(images / name, competition)
        except (ValueError, OSError):
            continue  # the kernel's log has named it
        size, true, value = size_of(image), None, None
        masks = decode_masks(rles, name, competition.size_of_mask(size), competition)
        if truth is not None:
            true = decode_scored_masks(truth, name, size, competition)
            value = float(np.mean(dice(masks, true)))
            scores.add(masks, true)
        if len(pictures) < MAX_STRIPS:
            canvas = overlay_masks(image, masks, () if true is None else true)
            found = sorted(rles.get(name, {}))
            pictures.append(AnnotatedStrip(name, canvas, found, value, competition))
    return pictures, scores


def write_sheet(pictures: list[AnnotatedStrip], path: Path) -> None:
    """Write drawn strips as one image, one under the other."""
    strips = [add_caption(picture.canvas, picture.caption) for picture in pictures]
    if not strips:
        strips = [add_caption(np.zeros((0, 1600, 3), np.uint8), "no strip could be read")]
    cv2.imwrite(str(path), stack(strips))
