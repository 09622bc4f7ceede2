"""The reference: what plain fp32 PyTorch gave for one image where the bundle was built.

A member that runs on OpenVINO is held against it, and PyTorch builds no network for that.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from kernel.manifest import MemberSpec
from kernel.members import Member

LOGIT_TOLERANCE = 1e-2  # mean difference of logits in fp32
# probabilities, cut off for their logits; near 1 fp32 has few digits
MIN_PROBABILITY, MAX_PROBABILITY = 1e-12, 1 - 1e-4
PACKED = (  # into OpenVINO's files
    "model", "mean", "std", "channels", "softmax", "mask_shift", "gate_shift",
    "efficientnet_pytorch",
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """One image, and a member's answers."""

    images: Tensor  # (1, channels, H, W) in [0, 1]
    gates: Tensor  # (1, classes)
    masks: Tensor  # (1, classes, H, W), with all gates open
    stride: int  # the member's, which no network is built to ask
    entry: dict[str, Any]  # what the manifest said of the member

    def check(self, member: Member, channels: int) -> None:
        """Raise ValueError where a member is declared otherwise, or does not give the same.

        Images of the competition have `channels`. Gates and masks are compared apart, by their
        logits: a shut gate would hide wrong masks, and a sigmoid near 0 what differs there.
        """
        if self.images.shape[1] != channels:
            raise ValueError(
                f"packed for images of {self.images.shape[1]} channels, they have {channels}"
            )
        entry = entry_of(member.spec)
        older = {"efficientnet_pytorch": ""}  # what the references of older bundles lack
        for key, packed in (older | self.entry).items():
            if packed != entry[key]:
                raise ValueError(f"packed with {key} {packed}, the manifest says {entry[key]}")
        pairs = zip(answers(member, self.images), (self.gates, self.masks), strict=True)
        apart = [
            (logits_of(found) - logits_of(expected)).abs().mean().item()
            for found, expected in pairs
        ]
        if not all(difference <= LOGIT_TOLERANCE for difference in apart):  # NaN is not
            found = " and ".join(f"{difference:.2g}" for difference in apart)
            raise ValueError(f"logits of gates and masks are {found} from PyTorch's")


def logits_of(probabilities: Tensor) -> Tensor:
    """Return the logits of probabilities, but for those very near 0 and 1."""
    return torch.logit(probabilities.clamp(MIN_PROBABILITY, MAX_PROBABILITY))


@torch.inference_mode()
def answers(member: Member, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return a member's gates, and its masks with all gates open; release its working memory."""
    gates, *features = member.encoder(images)
    masks = member.decoder(torch.ones_like(gates), *features)
    member.release_memory()
    return gates, masks


def entry_of(spec: MemberSpec) -> dict[str, Any]:
    """Return what of a member's entry in the manifest is packed, as JSON has it."""
    entry = asdict(spec)
    kept = {key: entry[key] for key in PACKED} | {"sha256": spec.sha256.lower()}
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


def reference_file(file: str) -> str:
    """Name of the reference beside a member's checkpoint `file`."""
    return f"{Path(file).stem}.reference"  # no checkpoint in a bundle ends so


def write_reference(reference: Reference, path: Path) -> None:
    """Write a reference as safetensors."""
    tensors = {name: getattr(reference, name) for name in ("images", "gates", "masks")}
    # one key of metadata: several have no fixed order
    rest = json.dumps({"stride": reference.stride, "entry": reference.entry}, sort_keys=True)
    path.write_bytes(save(tensors, {"rest": rest}))


def read_reference(path: Path) -> Reference:
    """Read what `write_reference` wrote.

    Raises:
        ValueError: there is none; SafetensorError: it is torn.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; build and upload the bundle again")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("images", "gates", "masks")}
        return Reference(**tensors, **json.loads(file.metadata()["rest"]))
