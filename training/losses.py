"""What the two heads are asked: logits of every question, and their loss."""

from dataclasses import dataclass, fields
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

MASK_WEIGHT = 4.0  # of the masks' BCE
PRESENCE_POS_WEIGHT = 4.0  # a gate wrongly shut loses a mask, one wrongly open leaves it to the
# mask head
TEMPERATURE = 2.0  # of a teacher's masks: what it is not sure of counts too
GROUP = 4  # crops asked together: in 32 of 128×256 every class is there, and none is denied
SURE = 1e-6  # a probability so near to 0 or 1 that its logit is cut off
DICE = smp.losses.DiceLoss("multilabel", smooth=0.5)  # 0.5 on half the sizes: 1 on the sizes


@dataclass(frozen=True)
class Outputs:
    """A network's logits for one batch."""

    masks: Tensor  # (B, C, H, W)
    presence: Tensor  # (B, C)
    together: Tensor  # (G, C), the presence head asked of a group as if it were one strip
    cells: Tensor  # (B, C, h, w), and of each cell of the deepest features alone

    def float(self) -> "Outputs":
        """Return the same in single precision, where a loss is computed."""
        return Outputs(*(getattr(self, field.name).float() for field in fields(self)))


def presence_layer(network: Any) -> nn.Linear:
    """Return what the presence head is, behind its pooling: one linear layer."""
    return next(m for m in network.classification_head if isinstance(m, nn.Linear))


def in_groups(batch: Tensor) -> Tensor:
    """Return a batch (B, …) as groups (G, B / G, …) of `GROUP`; one that they do not fill as one.

    A strip alone is a group too.
    """
    groups = max(len(batch) // GROUP, 1) if len(batch) % GROUP == 0 else 1
    return batch.reshape(groups, -1, *batch.shape[1:])


def run_network(network: Any, images: Tensor) -> Outputs:
    """Return all logits of normalised images (B, channels, H, W), sides multiples of the stride."""
    features = network.encoder(images)
    masks = network.segmentation_head(network.decoder(features))
    linear = presence_layer(network)
    together = linear(in_groups(features[-1]).amax(dim=(1, 3, 4)))
    cells = F.conv2d(features[-1], linear.weight[:, :, None, None], linear.bias)
    return Outputs(masks, network.classification_head(features[-1]), together, cells)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Soft Dice loss over a batch's classes that are there; 0 where none is.

    SMP's takes an absent class as 0 into the mean: it has no overlap to learn from.
    """
    present = masks.amax(dim=(0, 2, 3)).sum()
    loss: Tensor = DICE(logits, masks) * masks.shape[1] / present.clamp_min(1)
    return loss


def presence_loss(logits: Tensor, present: Tensor) -> Tensor:
    """BCE in which a class that is there weighs `PRESENCE_POS_WEIGHT`."""
    weight = present.new_tensor(PRESENCE_POS_WEIGHT)
    return F.binary_cross_entropy_with_logits(logits, present, pos_weight=weight)


def taught_loss(logits: Tensor, taught: Tensor) -> Tensor:
    """BCE of mask logits against a teacher's probabilities, both softened (Hinton et al., 2015).

    The temperature squared keeps the gradient's size.
    """
    soft = torch.sigmoid(torch.logit(taught, SURE) / TEMPERATURE)
    return TEMPERATURE**2 * F.binary_cross_entropy_with_logits(logits / TEMPERATURE, soft)


def member_loss(outputs: Outputs, masks: Tensor) -> Tensor:
    """BCE and soft Dice of the masks (B, C, H, W); BCE of the presence by cell, image and group.

    One label a crop is too few to teach the deepest features small defects, and a strip has twelve
    times a crop's cells to take the maximum of: hence the cells, and crops pooled together.
    `masks` may be padded: the mask logits' own size counts for them, all of it for the presence.
    """
    height, width = outputs.masks.shape[-2:]
    own = masks[..., :height, :width]
    present = own.amax(dim=(-2, -1))
    cells = F.adaptive_max_pool2d(masks, outputs.cells.shape[-2:])
    presence = presence_loss(outputs.presence, present)
    presence = presence + presence_loss(outputs.together, in_groups(present).amax(dim=1))
    mask_loss = MASK_WEIGHT * F.binary_cross_entropy_with_logits(outputs.masks, own)
    mask_loss = mask_loss + dice_loss(outputs.masks, own)
    return mask_loss + presence + 2 * F.binary_cross_entropy_with_logits(outputs.cells, cells)
