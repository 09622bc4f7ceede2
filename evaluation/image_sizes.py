"""The images' size: what the members make of it, and their flops at it."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import PIL.Image

from evaluation.checks import Check
from kernel.faults import one_line
from kernel.images import Size
from kernel.logs import log
from kernel.manifest import Manifest
from packing.members import flops_of, size_of_trial

LOOKED_AT = 32  # images
TOLERANCE = 0.05  # of height to width: a size is rounded to a network's stride


def usual_size(folder: Path, names: Sequence[str]) -> Size | None:
    """Return the (H, W) of most of a folder's images, by the headers of some; None without any."""
    sizes = Counter[Size]()
    for name in names[:: max(len(names) // LOOKED_AT, 1)]:
        with PIL.Image.open(folder / name) as image:
            sizes[image.height, image.width] += 1
    return sizes.most_common(1)[0][0] if sizes else None


def count_again(manifest: Manifest, size: Size) -> dict[str, list[int]]:
    """Return member → flops of its halves for an image of `size`, where the build's are of another.

    A member with an image_size sees every image in that, and is not in it; nor is one that does
    not take the size: that is logged.
    """
    found = dict[str, list[int]]()
    for spec in manifest.members:
        resized = spec.image_size or manifest.image_size
        if not resized and size_of_trial(spec, manifest) != size:
            try:
                found[spec.name] = flops_of(spec, size)
            except Exception as error:  # a network raises whatever it likes
                log.warning(
                    "%s: its flops at %s cannot be counted, those of the build stay: %s",
                    spec.name,
                    _text(size),
                    one_line(error),
                )
    return found


def check_sizes(manifest: Manifest, size: Size, counted_again: Collection[str]) -> list[Check]:
    """Name the sizes that members see most images in out of proportion, and flops of another size.

    `counted_again` are the members of `count_again`. None of it decides anything.
    """
    words = []
    for own in dict.fromkeys(spec.image_size or manifest.image_size for spec in manifest.members):
        if own and not math.isclose(own[0] * size[1], own[1] * size[0], rel_tol=TOLERANCE):
            words.append(
                f"images are resized from {_text(size)} to {_text(own)}, out of proportion: for a "
                "member trained on crops of full-size images remove image_size, and build again"
            )
    at = {size_of_trial(each, manifest) for each in manifest.members if each.name in counted_again}
    words += [
        f"most images are {_text(size)}, the build counted flops at {_text(other)}: they were "
        "counted again; if Kaggle's images are like these, set image_size in the description, and "
        "build again"
        for other in at
    ]
    return [Check(None, each) for each in words]


def _text(size: Size) -> str:
    return f"{size[0]}×{size[1]}"
