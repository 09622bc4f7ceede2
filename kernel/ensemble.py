"""The ensemble: members × flips, each pass from an image to its gates and probabilities."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from kernel.engines import check_engine, compile_member
from kernel.images import Image, Size, image_to_tensor, pad_to_multiple
from kernel.logs import Stages, log, progress
from kernel.manifest import Manifest, MemberSpec
from kernel.members import Member, load_member, use_wheels
from kernel.tta import Half, apply_flip, list_passes


class Ensemble:
    """Every member under every flip, cheapest member first."""

    def __init__(
        self, manifest: Manifest, members: Sequence[Member], device: torch.device, stages: Stages
    ) -> None:
        self.manifest, self.device, self.stages = manifest, device, stages
        members = sorted(members, key=lambda member: sum(member.spec.flops))
        specs = [(member.spec.name, member.spec.flops) for member in members]
        self.passes = list_passes(specs, manifest.flips)
        self.members = {member.spec.name: member for member in members}
        self.sizes = {m.spec.name: m.spec.image_size or manifest.image_size for m in members}
        self.active_member = members[0]

    def prepare(self, image: Image) -> Tensor:
        """Return an image (H, W) as a pass takes it: (1, 1, H, W) in [0, 1]."""
        return image_to_tensor(image, self.device)

    def run_encoder(self, pass_id: int, images: Tensor) -> tuple[Tensor, ...]:
        """Resize, pad and flip images (B, 1, H, W); return gates (B, classes) and features."""
        member, flip = self._activate(pass_id)
        with self.stages.network(member.spec.name, Half.ENCODER):
            size = self.sizes[member.spec.name]
            if size and size != tuple(images.shape[-2:]):
                images = _resize(images, size)
            images = pad_to_multiple(images, member.stride)
            encoded: tuple[Tensor, ...] = member.encoder(apply_flip(images, flip))
        return encoded

    def run_decoder(self, pass_id: int, encoded: Sequence[Tensor], size: Size) -> Tensor:
        """Return probabilities (B, classes, H, W) of images of `size`, fp32.

        Flipped, cut and resized back, or to the size of the competition's masks: a mean of resized
        probabilities is the resized mean. None is above its gate: resizing may round it up.
        """
        member, flip = self._activate(pass_id)
        with self.stages.network(member.spec.name, Half.DECODER):
            probabilities = apply_flip(member.decoder(*encoded).float(), flip)
            height, width = own_size = self.sizes[member.spec.name] or size
            probabilities = probabilities[..., :height, :width]
            mask_size = self.manifest.competition.size_of_mask(size)
            if own_size != mask_size:
                gates = encoded[0].float()[..., None, None]
                probabilities = torch.minimum(_resize(probabilities, mask_size), gates)
        return probabilities

    def _activate(self, pass_id: int) -> tuple[Member, str]:
        """A pass's member and flip; only one member at a time keeps its working memory."""
        member = self.members[self.passes[pass_id].member]
        if member is not self.active_member:
            self.active_member.release_memory()
            self.active_member = member
        return member, self.passes[pass_id].flip


def _resize(images: Tensor, size: Size) -> Tensor:
    return nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)


# --- loading --------------------------------------------------------------------------------------


def load_members(
    bundle: Path,
    specs: Sequence[MemberSpec],
    device: torch.device,
    stages: Stages,
    allow_missing: bool,
    image: Image | None,
) -> list[Member]:
    """Load every member of a bundle on its engine, checked on `image` if there is one.

    Raises:
        ValueError: as `load_member`, unless `allow_missing`; or no member is left.
    """
    checks = list[Future[Member]]()
    with ThreadPoolExecutor(max_workers=2) as pool:  # one is checked while the next is loaded
        for spec in progress(specs, "members", "member"):
            try:
                with stages("load"):
                    plain = load_member(bundle, spec, device)
                    engine = compile_member(plain, bundle, device)
            except ValueError as error:
                if not allow_missing:
                    raise
                log.warning("going on without member %s: %s", spec.name, error)
                continue
            checks.append(pool.submit(check_engine, engine, plain, image, device))
        with stages("check"):
            members = [check.result() for check in checks]
    if not members:
        raise ValueError(f"{bundle}: no member can be used")
    return members


def load_ensemble(
    bundle: Path,
    manifest: Manifest,
    device: torch.device,
    stages: Stages,
    allow_missing: bool = False,
    image: Image | None = None,
) -> Ensemble:
    """Load the members of a bundle, ready to run; raise ValueError as `load_members` does."""
    with stages("import"):
        use_wheels(bundle)
        import segmentation_models_pytorch  # noqa: F401 - timed apart from the members
    members = load_members(bundle, manifest.members, device, stages, allow_missing, image)
    return Ensemble(manifest, members, device, stages)
