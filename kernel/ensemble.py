"""The ensemble: members × flips, each pass from an image to its gates and probabilities."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from kernel.engines import MAX_CACHED_SHAPES
from kernel.images import Image, Size, image_to_tensor, pad_to_multiple, resize_images
from kernel.logs import log
from kernel.manifest import Manifest
from kernel.members import Member
from kernel.stages import Stages
from kernel.tta import Half, apply_flip, list_passes

Shape = tuple[int, int, int]  # of a batch: images, H, W


def _proof_cost(member: Member) -> tuple[bool, int, int]:
    """Sorts members by what their gates cost: a clean strip needs those of the first alone."""
    encoder, decoder = member.spec.flops
    return not member.spec.gated, encoder, decoder  # without a presence head gates prove nothing


class Ensemble:
    """Every member under every flip, the one with the cheapest gates first."""

    def __init__(
        self,
        manifest: Manifest,
        members: Sequence[Member],
        device: torch.device,
        stages: Stages,
    ) -> None:
        self.manifest, self.device, self.stages = manifest, device, stages
        self.is_async = device.type == "cuda"
        members = sorted(members, key=_proof_cost)
        specs = [(member.spec.name, member.spec.flops) for member in members]
        self.passes = list_passes(specs, manifest.flips)
        self.members = {member.spec.name: member for member in members}
        self.sizes = {m.spec.name: m.spec.image_size or manifest.image_size for m in members}
        self.active = ""  # the member that ran last
        self.tried = defaultdict[str, set[Shape]](set)  # by member: run in halves and in one piece

    def prepare(self, image: Image) -> Tensor:
        """Return an image, grey or RGB, as a pass takes it: (1, channels, H, W) in [0, 1]."""
        return image_to_tensor(image, self.device)

    def run_encoder(self, pass_id: int, images: Tensor) -> tuple[Tensor, ...]:
        """Resize, pad and flip images (B, channels, H, W); return gates (B, classes), features."""
        member, flip = self._activate(pass_id)
        with self._timed(member, Half.ENCODER):
            encoded: tuple[Tensor, ...] = member.encoder(
                self._resize_pad_flip(images, member, flip)
            )
        return encoded

    def run_decoder(self, pass_id: int, encoded: Sequence[Tensor], size: Size) -> Tensor:
        """Return probabilities (B, classes, H, W) of images of `size`, fp32.

        Flipped, cut and resized back, or to the size of the competition's masks: a mean of resized
        probabilities is the resized mean. None is above its gate: resizing may round it up.
        """
        member, flip = self._activate(pass_id)
        with self._timed(member, Half.DECODER):
            return self._flip_crop_resize(member.decoder(*encoded), encoded[0], member, flip, size)

    def run_pass(self, pass_id: int, images: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Return gates and probabilities of both halves, in one piece where the engine has one."""
        name = self.passes[pass_id].member
        tried = self.tried[name]
        known = self._shape_of(name, images) in tried
        member, flip = self._activate(pass_id)
        many = not known and len(tried) >= MAX_CACHED_SHAPES
        if member.whole is None or many:
            encoded = self.run_encoder(pass_id, images)
            return encoded[0], self.run_decoder(pass_id, encoded, size)
        if not known:
            return self._try_one_piece(pass_id, images, size)
        with self.stages.whole_pass(member.spec.name, self.passes[pass_id].flops):
            return self._run_whole(member, flip, images, size)

    def _timed(self, member: Member, half: Half) -> AbstractContextManager[None]:
        """Count the seconds of a half; of an asynchronous one who waits for it does."""
        return nullcontext() if self.is_async else self.stages.network(member.spec.name, half)

    def _run_whole(
        self, member: Member, flip: str, images: Tensor, size: Size
    ) -> tuple[Tensor, Tensor]:
        assert member.whole is not None
        gates, probabilities = member.whole(self._resize_pad_flip(images, member, flip))
        return gates, self._flip_crop_resize(probabilities, gates, member, flip, size)

    def _try_one_piece(self, pass_id: int, images: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Run a pass both ways; from here on the member runs in one piece if no bit differs.

        An engine compiles each shape anew: what holds for one need not for another. Where there are
        more than it keeps, the others run in halves.
        """
        member, flip = self._activate(pass_id)
        encoded = self.run_encoder(pass_id, images)
        halves = encoded[0], self.run_decoder(pass_id, encoded, size)
        member.release_memory()
        with self.stages("check"):
            try:
                whole = self._run_whole(member, flip, images, size)
                same = all(torch.equal(a, b) for a, b in zip(halves, whole, strict=True))
                fault = "" if same else "its bits differ"
            except Exception as error:  # a failed engine must not cost the submission
                fault = repr(error)
        if fault:
            log.warning("%s runs in two halves, not in one piece: %s", member.spec.name, fault)
            self.members[member.spec.name] = replace(member, whole=None)
        self.tried[member.spec.name].add(self._shape_of(member.spec.name, images))
        return halves

    def _shape_of(self, member: str, images: Tensor) -> Shape:
        """Return what a member sees of images: how many, and their size."""
        height, width = self.sizes[member] or images.shape[-2:]
        return len(images), height, width

    def _resize_pad_flip(self, images: Tensor, member: Member, flip: str) -> Tensor:
        """Resize, pad and flip images to what a member takes under a flip."""
        size = self.sizes[member.spec.name]
        if size and size != tuple(images.shape[-2:]):
            images = resize_images(images, size)
        return apply_flip(pad_to_multiple(images, member.stride), flip)

    def _flip_crop_resize(
        self, probabilities: Tensor, gates: Tensor, member: Member, flip: str, size: Size
    ) -> Tensor:
        """Flip, crop and resize a member's probabilities to those of images of `size`."""
        height, width = own_size = self.sizes[member.spec.name] or size
        probabilities = apply_flip(probabilities, flip)[..., :height, :width]
        mask_size = self.manifest.competition.size_of_mask(size)
        if own_size != mask_size:
            bound = gates[..., None, None]
            probabilities = torch.minimum(resize_images(probabilities, mask_size), bound)
        return probabilities

    def _activate(self, pass_id: int) -> tuple[Member, str]:
        """A pass's member and flip; a member that ran before keeps no working memory."""
        name = self.passes[pass_id].member
        if self.active not in ("", name):
            self.members[self.active].release_memory()
        self.active = name
        return self.members[name], self.passes[pass_id].flip
