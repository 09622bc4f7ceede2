"""The report: what the output holds and how fast the run was, as a line and as a page.

The page is styled like the dry run's (evaluation/page.html) and drawn from the rows alone: counts
are of all rows in the output, seconds and rate of the run that has just ended.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.engine import Workers
from cluster.images import ImageSet
from cluster.output import Output, Totals
from evaluation.drawing import AnnotatedStrip
from evaluation.page import render_page
from kernel.contact_sheet import MAX_STRIPS, overlay_masks
from kernel.files import write_text
from kernel.images import size_of
from kernel.logs import log
from kernel.rows import masks_by_image
from training.ground_truth import decode_masks

MAX_FAULTS = 100  # that are listed


@dataclass(frozen=True)
class Run:
    """What one run did."""

    totals: Totals
    workers: Workers
    seconds: float

    @property
    def images_per_s(self) -> float:
        """Images a second, from the workers' start on."""
        return self.totals.images / self.seconds

    def __str__(self) -> str:
        totals = self.totals
        return (
            f"{totals.images} images in {self.seconds:.1f} s, {self.images_per_s:.2f} images/s, "
            f"{totals.faults} faults, {totals.masks} non-empty masks, "
            f"{totals.mean_share:.0%} of the full work, {self.workers}"
        )


def draw(output: Output, images: ImageSet) -> Iterator[AnnotatedStrip]:
    """Yield some strips with their masks: the first parts' that have any and can be read."""
    competition = images.competition
    rows = output.masks(MAX_STRIPS * len(competition.classes))
    rles = masks_by_image((row["image"], row["class"], row["rle"]) for row in rows)
    for name in itertools.islice(rles, MAX_STRIPS):
        try:
            image = images.load(name)
            masks = decode_masks(rles, name, competition.size_of_mask(size_of(image)), competition)
        except Exception as error:  # gone or another since: the page does without it
            log.warning("%s is not drawn: %s", name, error)
            continue
        yield AnnotatedStrip(
            name, overlay_masks(image, masks), sorted(rles[name]), None, competition
        )


def write_page(path: Path, output: Output, images: ImageSet, run: Run | None) -> None:
    """Write the page; `run` is None where every image had its rows already."""
    page = render_page(
        Path(__file__).with_suffix(".html"),
        list(draw(output, images)),
        address=output.address,
        totals=output.totals(),
        faults=output.faults(MAX_FAULTS),
        run=run,
    )
    write_text(path, page)
