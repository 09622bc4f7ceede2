"""A run's masks drawn on its strips, beside the ground truth where one is given."""

import base64
import itertools
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from kernel.inference import Image, progress, read_image
from weights.score import Masks, Scores, dice, draw_truth

COLOURS = ((66, 66, 245), (96, 201, 60), (245, 176, 66), (212, 86, 214))  # BGR of class 1–4
BAR, GAP = 44, 8  # pixels above a strip, for its caption, and below it

Canvas = npt.NDArray[np.uint8]  # (H, W, 3), BGR


def draw_strip(image: Image, masks: Masks, truth: Masks | None) -> Canvas:
    """One strip with its masks filled in colour and the ground truth outlined."""
    canvas = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    for mask, colour in zip(masks, itertools.cycle(COLOURS), strict=False):
        canvas[mask] = (0.55 * canvas[mask] + 0.45 * np.array(colour)).astype(np.uint8)
    for mask, colour in zip(
        truth if truth is not None else (), itertools.cycle(COLOURS), strict=False
    ):
        edges, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, edges, -1, (255, 255, 255), 5)
        cv2.drawContours(canvas, edges, -1, colour, 2)
    return canvas.astype(np.uint8, copy=False)


@dataclass(frozen=True)
class Picture:
    """A drawn strip and what is said of it."""

    name: str
    canvas: Canvas
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
        found = ", ".join(f"class {label}" for label in self.classes) or "no defect"
        said = "" if self.dice is None else f"   Dice {self.dice:.3f}"
        return f"{self.name}   found: {found}{said}"


@dataclass(frozen=True)
class Found:
    """A run's result beside what is known of it."""

    images: Path
    names: list[str]
    rles: dict[str, dict[int, str]]  # image → class → RLE; empty ones may be missing
    truth: dict[str, dict[int, str]] | None
    classes: int

    def draw(self, most: int = 24) -> tuple[list[Picture], Scores]:
        """Pictures of the first `most` strips, and the scores of all that have a truth."""
        pictures, scores = list[Picture](), Scores()
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
                canvas = draw_strip(image, masks, truth)
                pictures.append(Picture(name, canvas, sorted(rles), value))
        return pictures, scores


def captioned(picture: Picture) -> Canvas:
    """The strip under a bar with its caption."""
    bar = np.full((BAR, picture.canvas.shape[1], 3), 24, np.uint8)
    at, grey = (12, 31), (230, 230, 230)
    cv2.putText(bar, picture.caption, at, cv2.FONT_HERSHEY_SIMPLEX, 0.85, grey, 2, cv2.LINE_AA)
    return np.vstack([bar, picture.canvas])


def write_sheet(pictures: list[Picture], path: Path) -> None:
    """One under the other as one image, as wide as the widest."""
    strips = [captioned(picture) for picture in pictures]
    width = max(strip.shape[1] for strip in strips)
    padded = [np.pad(s, ((0, GAP), (0, width - s.shape[1]), (0, 0))) for s in strips]
    cv2.imwrite(str(path), np.vstack(padded))
