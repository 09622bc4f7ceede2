"""The contact sheet: strips with their masks filled in, for the dry run and the notebook."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from kernel.competition import Competition
from kernel.images import Image, Mask, read_image, size_of
from kernel.rle import decode_rle
from kernel.rows import masks_by_image, read_rows

Picture = npt.NDArray[np.uint8]  # BGR, (H, W, 3)

COLOURS = ((66, 66, 245), (96, 201, 60), (245, 176, 66), (212, 86, 214))  # BGR of class 1–4
BAR, GAP = 44, 8  # pixels above a strip, for its caption, and below it
MAX_STRIPS = 24  # on a sheet


def to_picture(image: Image) -> Picture:
    """Return a grey or RGB image as one to draw on; 16 bits as bright as they come."""
    if image.dtype != np.uint8:
        image = (image / max(int(image.max()), 1) * 255).astype(np.uint8)
    code = cv2.COLOR_GRAY2BGR if image.ndim == 2 else cv2.COLOR_RGB2BGR
    return cv2.cvtColor(image, code).astype(np.uint8, copy=False)


def overlay_masks(image: Image, masks: Iterable[Mask], truth: Iterable[Mask] = ()) -> Picture:
    """Draw a strip with its masks filled in colour and the ground truth, if any, outlined."""
    masks, truth = list(masks), list(truth)
    canvas = to_picture(image)
    for mask in (masks + truth)[:1]:
        if mask.shape != canvas.shape[:2]:  # a competition's masks may be smaller
            shown = cv2.resize(canvas, mask.shape[::-1], interpolation=cv2.INTER_AREA)
            canvas = shown.astype(np.uint8, copy=False)
    for mask, colour in zip(masks, itertools.cycle(COLOURS), strict=False):
        canvas[mask] = (0.55 * canvas[mask] + 0.45 * np.array(colour)).astype(np.uint8)
    for mask, colour in zip(truth, itertools.cycle(COLOURS), strict=False):
        edges, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, edges, -1, (255, 255, 255), 5)
        cv2.drawContours(canvas, edges, -1, colour, 2)
    return canvas.astype(np.uint8, copy=False)


def add_caption(strip: Picture, caption: str) -> Picture:
    """Put a bar with a caption above a drawn strip; bytes that are no text are spelt out."""
    caption = caption.encode(errors="backslashreplace").decode()  # OpenCV 5 dies of a surrogate
    bar = np.full((BAR, strip.shape[1], 3), 24, np.uint8)
    cv2.putText(bar, caption, (12, 31), cv2.FONT_HERSHEY_SIMPLEX, 0.85, (230,) * 3, 2, cv2.LINE_AA)
    return np.vstack([bar, strip])


def caption_of(name: str, labels: Sequence[int], competition: Competition) -> str:
    """Name an image and the classes found on it."""
    found = ", ".join(f"class {competition.name_of(label)}" for label in labels)
    return f"{name}   found: {found or 'no defect'}"


def stack(strips: Sequence[Picture]) -> Picture:
    """Stack drawn strips, the narrower ones padded with black on the right."""
    width = max((strip.shape[1] for strip in strips), default=0)
    padded = [np.pad(s, ((0, GAP), (0, width - s.shape[1]), (0, 0))) for s in strips]
    return np.vstack(padded).astype(np.uint8)


def draw_submission(
    submission: Path,
    images: Path,
    competition: Competition,
    most: int = MAX_STRIPS,
) -> Picture:
    """Draw the first strips of a kernel's submission that have a mask.

    Raises:
        ValueError: none has.
    """
    rows = read_rows(submission, competition, from_kernel=True).rows
    masks = masks_by_image(rows)
    if not masks:
        raise ValueError(f"{submission}: every mask is empty, there is nothing to draw")
    strips = []
    for name, rles in itertools.islice(masks.items(), most):
        image = read_image(images / name, competition)
        size = competition.size_of_mask(size_of(image))
        found = [decode_rle(rles.get(c, ""), size, competition) for c in range(1, max(rles) + 1)]
        strips.append(
            add_caption(overlay_masks(image, found), caption_of(name, sorted(rles), competition))
        )
    return stack(strips)
