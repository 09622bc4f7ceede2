"""Loading an ensemble: each member of a bundle on the fastest engine that is right here."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from kernel.device import keep_freed_memory, share_freed_memory
from kernel.engines import (
    OpenVino,
    check_engine,
    compile_member,
    load_checked_openvino,
    openvino_files,
)
from kernel.ensemble import Ensemble
from kernel.images import Image, Size
from kernel.logs import log, progress
from kernel.manifest import Manifest, MemberSpec
from kernel.members import Member, check_sha256, load_member, use_wheels
from kernel.reference import reference_file
from kernel.stages import Stages


def load_openvino_members(bundle: Path, manifest: Manifest, stages: Stages) -> dict[str, Member]:
    """Load the members that run on OpenVINO here, by their names: packed for it, and right."""
    members, channels = dict[str, Member](), manifest.competition.channels
    for spec in progress(manifest.members, "members", "member"):
        names = [*openvino_files(spec.file), reference_file(spec.file)]
        if not any((bundle / name).is_file() for name in names):
            continue
        try:
            check_sha256(bundle / spec.file, spec.sha256)
        except (ValueError, OSError):  # that `load_member` will say
            continue
        try:
            members[spec.name] = load_checked_openvino(bundle, spec, channels, stages)
        except Exception as error:  # a failed engine must not cost the submission
            log.warning("%s runs on PyTorch, not on OpenVINO: %r", spec.name, error)
    return members


def _engine_of(plain: Member, device: torch.device) -> Member:
    try:
        return compile_member(plain, device)
    except Exception as error:  # a failed engine must not cost the submission
        log.warning("%s runs on plain PyTorch, it does not compile: %r", plain.spec.name, error)
        return plain


def load_members(
    bundle: Path,
    specs: Sequence[MemberSpec],
    device: torch.device,
    stages: Stages,
    *,
    allow_missing: bool,
    image: Image | None,
    plain: bool,
    size: Size | None,
) -> dict[str, Member]:
    """Load members of a bundle on PyTorch, by their names, checked on `image` if there is one.

    `plain` ones stay as they are loaded, unfolded and in fp32. Strips are resized to `size` for
    those that have none of their own.

    Raises:
        ValueError: as `load_member`, unless `allow_missing`.
    """
    checks = dict[str, Future[Member]]()
    with ThreadPoolExecutor(max_workers=2) as pool:  # one is checked while the next is loaded
        for spec in progress(specs, "members", "member"):
            try:
                with stages("load"):
                    member = load_member(bundle, spec, device)
                    engine = member if plain else _engine_of(member, device)
            except ValueError as error:
                if not allow_missing:
                    raise
                log.error("going on without member %s: %s", spec.name, error)
                continue
            own = spec.image_size or size
            checks[spec.name] = pool.submit(check_engine, engine, member, image, device, own)
        with stages("check"):
            return {name: check.result() for name, check in checks.items()}


def _tune_process(members: Sequence[Member], device: torch.device, plain: bool) -> None:
    """Set what the passes run with: memory that is kept, PyTorch's threads, cuDNN's choice."""
    if device.type == "cpu":
        keep_freed_memory()  # from here on: loading leaves scraps that no pass can use
    if all(isinstance(member.encoder, OpenVino) for member in members):
        torch.set_num_threads(1)  # idle ones would spin on the cores that OpenVINO's run on
    if device.type == "cuda":
        # Batches are filled up: few shapes, tried once each, so that each runs on one algorithm as
        # long as the process lives; the next may pick another. The check's shape never comes again:
        torch.backends.cudnn.benchmark = not plain


def load_ensemble(
    bundle: Path,
    manifest: Manifest,
    device: torch.device,
    stages: Stages,
    image: Image | None,
    allow_missing: bool = False,
    plain: bool = False,
) -> Ensemble:
    """Load the members of a bundle, ready to run.

    Engines are checked on an image like those to come; None where there is none to run. `plain`
    takes no engine but fp32 PyTorch, unchecked. This process is set up for them, too.

    Raises:
        ValueError: as `load_members`, or no member is left.
    """
    with stages("import"):
        use_wheels(bundle)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32: what engines are held against, too
    members = dict[str, Member]()
    if device.type == "cpu":
        share_freed_memory()  # a worker of the cluster has not done so yet
        members = {} if plain else load_openvino_members(bundle, manifest, stages)
    if left := [spec for spec in manifest.members if spec.name not in members]:
        with stages("import"):
            import segmentation_models_pytorch  # noqa: F401 - timed apart from the members
        members |= load_members(
            bundle,
            left,
            device,
            stages,
            allow_missing=allow_missing,
            image=None if plain else image,
            plain=plain,
            size=manifest.image_size,
        )
    if not members:
        raise ValueError(f"{bundle}: no member can be used")
    loaded = [members[spec.name] for spec in manifest.members if spec.name in members]
    _tune_process(loaded, device, plain)
    return Ensemble(manifest, loaded, device, stages)
