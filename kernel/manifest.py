"""The manifest: a bundle describes itself, and is refused where it would answer wrongly."""

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "ensemble.json"
COMPETITION = "severstal-steel-defect-detection"

FLIPS: dict[str, tuple[int, ...]] = {  # name → the axes of (B, C, H, W) that it turns round
    "none": (),
    "horizontal": (-1,),
    "vertical": (-2,),
    "both": (-2, -1),
}


@dataclass(frozen=True)
class MemberSpec:
    """One member's entry in the manifest."""

    name: str
    file: str  # beside the manifest
    model: dict[str, Any]  # keyword arguments of smp.create_model
    mean: list[float]  # of grey in [0, 1], one number a channel
    std: list[float]
    sha256: str = ""  # of the file; empty before the bundle is built
    flops: list[int] = field(
        default_factory=lambda: [1, 1]
    )  # a pass's encoder and decoder, counted

    @property
    def gated(self) -> bool:
        """Whether the member has a presence head beside its mask head."""
        return bool(self.model.get("aux_params"))


@dataclass(frozen=True)
class Manifest:
    """`ensemble.json`: which members under which flips, and what becomes of their mean."""

    members: list[MemberSpec]
    classes: int = 4
    threshold: float = 0.55  # on the mean probability
    min_area: int = 0  # pixels; a class with fewer is left empty
    flips: tuple[str, ...] = ("none", "horizontal", "vertical")
    image_size: tuple[int, int] = (256, 1600)  # (H, W), what the members were trained for
    empty_rows: bool = True  # today's layout: write the rows of empty masks too
    competition: str = COMPETITION
    format: int = 1


def first_fault(manifest: Manifest) -> str | None:
    """What makes a manifest unusable, in words, or nothing."""
    names = Counter(member.name for member in manifest.members)
    files = Counter(member.file for member in manifest.members)
    rules = [
        (bool(manifest.members), "no members"),
        (max(names.values(), default=1) == 1, f"two members named {names.most_common(1)}"),
        (max(files.values(), default=1) == 1, f"two members share {files.most_common(1)}"),
        (manifest.classes >= 1, f"classes {manifest.classes}, expected 1 or more"),
        (0 < manifest.threshold < 1, f"threshold {manifest.threshold}, expected between 0 and 1"),
        (manifest.min_area >= 0, f"min_area {manifest.min_area}, expected 0 or more"),
        (bool(manifest.flips), "no flips; name at least none"),
        (set(manifest.flips) <= set(FLIPS), f"flips {manifest.flips}, known are {list(FLIPS)}"),
        (len(set(manifest.flips)) == len(manifest.flips), f"flips {manifest.flips} name one twice"),
    ]
    rules += itertools.chain.from_iterable(member_rules(m, manifest) for m in manifest.members)
    return next((fault for holds, fault in rules if not holds), None)


def member_rules(member: MemberSpec, manifest: Manifest) -> list[tuple[bool, str]]:
    """What a member's entry must fulfil, each with what is wrong where it does not."""
    who, model = f"member {member.name}: ", member.model
    channels = model.get("in_channels", 3)
    aux = model.get("aux_params") or {"classes": manifest.classes}
    return [
        (
            Path(member.file).name == member.file not in ("", ".."),
            f"{who}file {member.file!r} is not beside the manifest",
        ),
        ({"arch", "encoder_name"} <= set(model), f"{who}model {model} lacks arch or encoder_name"),
        (
            model.get("classes", 1) == aux.get("classes") == manifest.classes,
            f"{who}its classes differ from the manifest's {manifest.classes}: {model}",
        ),
        (
            len(member.mean) == len(member.std) == channels and channels in (1, 3),
            f"{who}mean {member.mean}, std {member.std} for {channels} channels (1 or 3)",
        ),
        (all(std > 0 for std in member.std), f"{who}std {member.std}, expected above 0"),
        (
            all(map(math.isfinite, [*member.mean, *member.std])),
            f"{who}mean {member.mean}, std {member.std}, expected finite numbers",
        ),
        (
            len(member.flops) == 2 and min(member.flops) > 0,
            f"{who}flops {member.flops}, expected its encoder's and its decoder's",
        ),
    ]


def check_manifest(manifest: Manifest, path: Path) -> None:
    """Raises ValueError for the first rule that a manifest breaks."""
    try:
        fault = first_fault(manifest)
    except (TypeError, AttributeError) as error:  # a value of another type
        raise ValueError(f"{path}: not a manifest: {error!r}") from error
    if fault:
        raise ValueError(f"{path}: {fault}")


def parse_manifest(entries: dict[str, Any], path: Path) -> Manifest:
    """The manifest in the JSON object of the file `path`.

    Raises:
        ValueError: a field is missing or unknown, the format is a later one, or a rule is broken.
    """
    try:
        members = [MemberSpec(**member) for member in entries["members"]]
        fields = entries | {"members": members}
        fields |= {key: tuple(fields[key]) for key in ("flips", "image_size") if key in fields}
        manifest = Manifest(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest: {error!r}") from error
    if manifest.format != 1:
        raise ValueError(f"{path}: format {manifest.format}, this kernel reads format 1")
    check_manifest(manifest, path)
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ValueError where the file is missing or holds none."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # not JSON, not even UTF-8, or nested too deep
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: no JSON object, found a {type(entries).__name__}")
    return entries


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle; raises ValueError where it is missing or not as it must be."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path}: no such file; build the bundle with build_kernel.py")
    return parse_manifest(read_json(path), path)
