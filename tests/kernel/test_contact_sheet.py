"""The contact sheet: masks filled in the colour of their class, the ground truth outlined."""

import numpy as np

from kernel.contact_sheet import overlay_masks


def test_masks_are_coloured_by_class_and_the_truth_is_outlined() -> None:
    image = np.full((64, 96), 100, np.uint8)
    masks = np.zeros((4, 64, 96), np.bool_)
    for label in range(4):
        masks[label, 8:24, 4 + 24 * label : 16 + 24 * label] = True
    canvas = overlay_masks(image, masks).astype(int)
    inside = [tuple(canvas[16, 10 + 24 * label]) for label in range(4)]
    assert len(set(inside)) == 4
    assert all(np.ptp(colour) > 20 for colour in inside)
    assert (canvas[40:] == 100).all()
    outlined = overlay_masks(image, np.zeros_like(masks), masks).astype(int)
    assert np.ptp(outlined[8, 10]) > 20  # the edge
    assert (outlined[16, 10] == 100).all()  # not the inside
