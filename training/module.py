"""The member in Lightning's form: one step, its optimiser and its learning rate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.base import SegmentationModel
from torch import Tensor, nn

from kernel.images import pad_to_multiple
from kernel.members import build_network, to_channels
from training.batch_norm import freeze_statistics
from training.config import Config, Part
from training.losses import MASK_WEIGHT, Outputs, member_loss, run_network, taught_loss
from training.teacher import mask_probabilities, read_teacher

COUNTER = "num_batches_tracked"  # a batch norm's, which no network needs


def new_network(config: Config) -> Any:
    """Build the network of an experiment, seeded, its encoder's weights downloaded if asked.

    Raises:
        ValueError: SMP knows no such architecture, encoder or weights, or they cannot be had, or
            the architecture has a forward of its own.
    """
    torch.manual_seed(config.seed)
    model = config.spec.model
    network: Any = build_network(model)
    if type(network).forward is not SegmentationModel.forward:
        raise ValueError(f"--arch {config.arch}: its forward is its own, train FPN or Unet")
    if not config.encoder_weights:
        return network
    try:
        return smp.create_model(**{**model, "encoder_weights": config.encoder_weights})
    except Exception as error:  # urllib's, the hub's or SMP's own: no weights in any case
        what = f"--encoder-weights {config.encoder_weights} of {config.encoder}"
        raise ValueError(f"{what}: {error}") from error


def load_into_network(
    network: nn.Module, weights: Mapping[str, Tensor], presence: bool
) -> list[str]:
    """Load what fits by name and shape, a whole member or another's encoder; return what does not.

    Without `presence` that head stays as drawn: its last fit leaves all gates open for single
    cells, which is no start for more steps.
    """
    own = network.state_dict()
    head = set() if presence else {k for k in own if k.startswith("classification_head.")}
    fitting = {
        key: value
        for key, value in weights.items()
        if key in own.keys() - head and value.shape == own[key].shape
    }
    network.load_state_dict(own | fitting)
    return [key for key in own if key not in fitting and not key.endswith(COUNTER)]


class MemberModule(L.LightningModule):
    """A network that is trained through one part's steps.

    Batches are images (B, channels, H, W), float in [0, 1], and masks (B, classes, H, W), bool.
    """

    mean: Tensor  # (1, channels, 1, 1)
    std: Tensor

    def __init__(self, network: Any, config: Config, part: Part) -> None:
        super().__init__()
        self.config, self.part = config, part
        self.network = network.to(memory_format=torch.channels_last)  # an eighth less time on a CPU
        device = next(network.parameters()).device  # it may come from a fit on a GPU
        for name, of_channels in (("mean", config.spec.mean), ("std", config.spec.std)):
            values = torch.tensor(of_channels, device=device).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.stride = int(network.encoder.output_stride)

    def autocast(self) -> torch.autocast:
        """Return the context of this experiment's precision, for what runs outside the Trainer."""
        mixed = self.config.precision != "32"
        dtype = torch.float16 if self.config.precision == "16-mixed" else torch.bfloat16
        return torch.autocast(self.mean.device.type, dtype, enabled=mixed)

    def prepare(self, images: Tensor) -> Tensor:
        """Return images (B, channels, H, W) as the network takes them: padded, normalised."""
        images = to_channels(images, self.mean.shape[1])
        inputs = (pad_to_multiple(images, self.stride) - self.mean) / self.std
        return inputs.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Outputs:
        """Return the logits of images (B, channels, H, W); masks cut to their size."""
        height, width = images.shape[-2:]
        outputs = run_network(self.network, self.prepare(images))
        masks = outputs.masks[..., :height, :width]
        return Outputs(masks, outputs.presence, outputs.together, outputs.cells)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        step = self.part.first + self.global_step
        torch.manual_seed(self.config.seed * 1_000_003 + step)  # dropout, resumed or not
        self.network.train()
        if self.part.frozen:
            freeze_statistics(self.network)
        loss = self.batch_loss(*batch)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict({"loss": loss, "learning_rate": rate})
        return loss

    def batch_loss(self, images: Tensor, masks: Tensor) -> Tensor:
        """Return the loss of images (B, channels, H, W) and their masks."""
        outputs = self(images).float()
        loss = member_loss(outputs, pad_to_multiple(masks.float(), self.stride))
        if self.config.teacher:
            teacher = read_teacher(Path(self.config.teacher), self.config.classes)  # once a process
            taught = mask_probabilities(teacher, images)
            loss = loss + MASK_WEIGHT * taught_loss(outputs.masks, taught)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW with the part's cycle of the learning rate."""
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.config.learning_rate, weight_decay=1e-2
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.part.rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
