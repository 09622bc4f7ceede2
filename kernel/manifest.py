"""The manifest `ensemble.json`: a bundle describes itself, and a wrong description is refused."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

from kernel.checks import (
    check_fields,
    check_size,
    expect,
    is_number,
    is_text,
    is_whole,
    read_json,
    with_tuples,
)
from kernel.competition import SEVERSTAL, Competition, check_competition, load_competition
from kernel.faults import short
from kernel.shipped import find_competition, shipped_names
from kernel.tta import FLIPS

MANIFEST = "ensemble.json"
MAX_NAME = 100  # characters of a member's name and file; a file system takes 255 bytes
LISTS = ("flips", "image_size")  # fields that are tuples
BUILT_FIELDS = ("sha256", "flops")  # of a member: a build fills them in
PADDED_OTHERWISE = ("0.6.3", "0.7.0")  # versions of efficientnet-pytorch, than 0.7.1 and SMP today


@dataclass(frozen=True)
class MemberSpec:
    """One member's entry in the manifest."""

    name: str
    file: str  # beside the manifest
    model: dict[str, Any]  # keyword arguments of smp.create_model
    mean: list[float]  # of grey in [0, 1], one number a channel
    std: list[float]
    sha256: str = ""  # of the file; empty before the bundle is built
    flops: list[int] = field(default_factory=lambda: [1, 1])  # of encoder and decoder, counted
    image_size: tuple[int, int] | None = None  # (H, W) of its own; None: the manifest's
    channels: list[int] | None = None  # the network's output of each class; None: in order
    softmax: bool = False  # over all outputs, in the place of each one's sigmoid
    mask_shift: float | list[float] = 0.0  # added to the mask logits, one number or one a class
    gate_shift: float | list[float] = 0.0  # and to the presence logits; evaluation/calibrate.py
    efficientnet_pytorch: str = ""  # its version under SMP before 0.3, for its padding

    @property
    def gated(self) -> bool:
        """Whether the member has a presence head beside its mask head."""
        return bool(self.model.get("aux_params"))


@dataclass(frozen=True)
class Manifest:
    """`ensemble.json`: which members under which flips, and what becomes of their mean."""

    members: list[MemberSpec]
    classes: int = len(SEVERSTAL.classes)
    threshold: float = 0.55  # on the mean probability
    min_area: int | list[int] = 0  # pixels, one number or one a class; with fewer it is left empty
    flips: tuple[str, ...] = ("none", "horizontal", "vertical")
    image_size: tuple[int, int] | None = None  # (H, W), strips are resized to it; None: are not
    empty_rows: bool = True  # three-column layout: write the rows of empty masks too
    competition: Competition = SEVERSTAL  # in the file its slug
    format: int = 1

    @property
    def min_areas(self) -> list[int]:
        """The `min_area` of each class."""
        return self.min_area if isinstance(self.min_area, list) else [self.min_area] * self.classes


TOGETHER = "ensemble"  # all members together, in reports and figures

# --- rules ----------------------------------------------------------------------------------------


def check_manifest(manifest: Manifest) -> None:
    """Raise ValueError for the first rule that is broken, naming the field and the value."""
    if manifest.format != 1:
        raise ValueError(f"format {short(manifest.format)}, this kernel reads format 1")
    if not manifest.members:
        raise ValueError("no members; list them under `members`")
    names = [member.name for member in manifest.members]
    _check_unique("two members named", names)
    if TOGETHER in names:
        raise ValueError(
            f"name {TOGETHER!r} is what reports call all members together; choose another"
        )
    _check_unique("two members share", [member.file for member in manifest.members], _one_file)
    expect(is_whole(manifest.classes), "classes", manifest.classes, "a whole number")
    n_classes = len(manifest.competition.classes)
    if manifest.classes != n_classes:
        raise ValueError(
            f"classes {manifest.classes}, the competition has {n_classes}; a member with other "
            "outputs says with `channels` which of them are the classes, in order"
        )
    threshold, flips = manifest.threshold, manifest.flips
    fits = is_number(threshold) and 0 < threshold < 1
    expected = "a number between 0 and 1"
    if isinstance(threshold, list):
        expected += (
            ", one for all classes; to move a single class set its mask_shift, as "
            "docs/checkpoints.md says"
        )
    expect(fits, "threshold", threshold, expected)
    size = manifest.competition.mask_size or manifest.competition.image_size
    most = math.prod(size) - 1 if size else math.inf  # one more would leave every mask empty
    areas = manifest.min_areas
    fits = len(areas) == n_classes and all(is_whole(a, 0) and a <= most for a in areas)
    expected = f"a whole number from 0 to {most}, or a list of {n_classes}, one a class"
    expect(fits, "min_area", manifest.min_area, expected)
    expect(bool(flips) and all(map(is_text, flips)), "flips", flips, f"some of {list(FLIPS)}")
    if not set(flips) <= set(FLIPS) or len(set(flips)) < len(flips):
        raise ValueError(f"flips {short(list(flips))}, expected some of {list(FLIPS)}, each once")
    check_size(manifest.image_size)
    _check_sides(manifest.image_size, manifest.competition)
    expect(isinstance(manifest.empty_rows, bool), "empty_rows", manifest.empty_rows, "true, false")
    for member in manifest.members:
        try:
            _check_member(member, manifest)
            _check_sides(member.image_size, manifest.competition)
        except ValueError as error:
            raise ValueError(f"member {member.name}: {error}") from None


def _one_file(name: str) -> str:
    """A key, equal for names that a file system may take for one: by case, or by how é is coded."""
    return normalize("NFC", name).casefold()


def _check_unique(what: str, values: list[str], same: Callable[[str], str] = str) -> None:
    fits = all(is_text(value) and len(value) <= MAX_NAME for value in values)
    expect(fits, "names and files", values, f"text of at most {MAX_NAME} characters")
    fits = not any(category(sign) in ("Cc", "Cs") for value in values for sign in value)
    expect(fits, "names and files", values, "letters, digits and signs that a file's name may have")
    value, times = Counter(map(same, values)).most_common(1)[0]
    if times > 1:
        found = dict.fromkeys(short(each) for each in values if same(each) == value)
        raise ValueError(f"{what} {' and '.join(found)}; rename one")


def _check_member(member: MemberSpec, manifest: Manifest) -> None:
    if Path(member.file).name != member.file or member.file in ("", ".."):
        raise ValueError(f"file {short(member.file)} is not beside the manifest")
    fits = re.fullmatch("([0-9a-fA-F]{64})?", str(member.sha256)) is not None
    expect(fits, "sha256", member.sha256, "64 hexadecimal digits, or none")
    check_size(member.image_size)
    fits = len(member.flops) == 2 and all(is_whole(each) and each > 0 for each in member.flops)
    expect(fits, "flops", member.flops, "its encoder's and its decoder's")
    _check_model(member.model)
    _check_channels(member, manifest.classes)
    _check_softmax(member)
    _check_normalisation(member, manifest.competition.bits)
    _check_shifts(member, manifest.classes)
    _check_padding(member)


def described_size(competition: Competition) -> tuple[int, int] | None:
    """Return the (H, W) of most images, where a description of the competition's own says it.

    Under another slug Severstal's stands for want of one, and the images may have any size.
    """
    slug = competition.slug
    own = slug == SEVERSTAL.slug or competition != replace(SEVERSTAL, slug=slug)
    return competition.image_size if own else None


def _check_sides(size: tuple[int, int] | None, competition: Competition) -> None:
    """Width and height the wrong way round would squeeze every strip, and nothing would fail.

    A size is so where its sides, swapped, are in the proportion of the images', within 5 %; of
    images that are nearly square exactly.
    """
    images, slug = described_size(competition), competition.slug
    if not (size and images):
        return
    other_way = (size[0] - size[1]) * (images[0] - images[1]) < 0  # one wide, the other high
    tolerance = 0.05 if max(images) > 1.1 * min(images) else 0.0
    if other_way and math.isclose(size[0] * images[0], size[1] * images[1], rel_tol=tolerance):
        raise ValueError(
            f"image_size {list(size)}: the images of {slug} are {list(images)}, "
            f"[height, width]: write {list(size[::-1])}"
        )


def _check_model(model: dict[str, Any]) -> None:
    if not isinstance(model, dict) or not {"arch", "encoder_name"} <= set(model):
        raise ValueError(f"model {short(model)} lacks arch or encoder_name")
    for key in ("arch", "encoder_name"):
        expect(is_text(model[key]), f"model's {key}", model[key], "text")
    aux = model.get("aux_params")
    expect(aux is None or isinstance(aux, dict), "model's aux_params", aux, "an object or null")
    for where, options in (("model", model), ("aux_params", aux or {})):
        for key in ("classes", "in_channels"):
            if key in options:
                value = options[key]
                expect(is_whole(value) and value > 0, f"{where}'s {key}", value, "a whole number")
        if options.get("activation") is not None:
            applied = "sigmoid"
            if where == "model":
                applied += ', or a softmax where the member says "softmax": true'
            raise ValueError(
                f"{where}'s activation {short(options['activation'])}: the kernel applies the "
                f"{applied}, so a packed network gives logits; remove it where the network was "
                "trained through that, else train it so"
            )


def _check_channels(member: MemberSpec, classes: int) -> None:
    """The network's outputs are the classes, or `channels` says which of them are."""
    outputs = member.model.get("classes", 1)  # SMP's default
    aux = member.model.get("aux_params") or {"classes": outputs}
    if aux.get("classes") != outputs:
        raise ValueError(
            f"aux_params's classes {aux.get('classes')}, the model's are {outputs}: such a head "
            "gates no masks; leave aux_params out and save the network without "
            "classification_head.*"
        )
    if outputs < classes:
        raise ValueError(
            f"model's classes {outputs}{' where it says nothing' * ('classes' not in member.model)}"
            f", expected {classes}: a member predicts all classes, one of fewer is not packed"
        )
    if member.channels is None:
        if outputs != classes:
            like = list(range(1, classes + 1))
            raise ValueError(
                f"model's classes {outputs}, expected {classes}; with other outputs say with "
                f'`channels` which are the classes, like "channels": {like}, and where they were '
                'trained through one softmax (cross-entropy) "softmax": true'
            )
        return
    found = member.channels
    fits = isinstance(found, list) and all(is_whole(c) and 0 <= c < outputs for c in found)
    if not fits or len(set(found)) != len(found) or len(found) != classes:
        raise ValueError(
            f"channels {short(found)}, expected {classes} different of 0 to {outputs - 1}"
        )


def _check_softmax(member: MemberSpec) -> None:
    expect(isinstance(member.softmax, bool), "softmax", member.softmax, "true, false")
    outputs, shift = member.model.get("classes", 1), member.mask_shift
    if member.softmax and outputs < 2:
        raise ValueError(f"softmax over model's classes {outputs} is 1 everywhere: leave it out")
    if member.softmax and (any(shift) if isinstance(shift, list) else shift):
        raise ValueError(f"mask_shift {short(shift)} shifts no softmax: set it to 0")


def _check_normalisation(member: MemberSpec, bits: int) -> None:
    channels = member.model.get("in_channels", 3)  # SMP's default
    expect(channels in (1, 3), "model's in_channels", channels, "1 or 3")
    for name, values in (("mean", member.mean), ("std", member.std)):
        fits = isinstance(values, list) and len(values) == channels
        if not fits or not all(map(is_number, values)):
            unsaid = " where it says nothing" * ("in_channels" not in member.model)
            raise ValueError(
                f"{name} {short(values)}, expected as many numbers as model's in_channels: "
                f"{channels}{unsaid}"
            )
    _check_range(member, bits)
    if min(member.mean) < 0 or min(member.std) <= 0:
        raise ValueError(
            f"mean {member.mean}, std {member.std}: expected a mean from 0, a std above 0"
        )


def _check_range(member: MemberSpec, bits: int) -> None:
    """Refuse mean and std together where both are of 0-255, or of 16 bits.

    Corrected one at a time, a std of 1 would pass beside a divided mean. Numbers up to 255 are of
    0-255 for 16-bit images too: they are ImageNet's, with which the network began.
    """
    most = 255 if max(member.mean + member.std) <= 255 else 2**bits - 1
    said = {"mean": member.mean, "std": member.std}
    if max(member.mean) <= 1 or max(member.std) < 1:
        said = {name: values for name, values in said.items() if max(values) > 1}
    if not said:
        return
    divided = {name: [float(f"{value / most:.4g}") for value in said[name]] for name in said}
    found, expected = (
        ", ".join(f"{name} {values}" for name, values in each.items()) for each in (said, divided)
    )
    raise ValueError(
        f"{found} of grey in 0-{most}, expected of [0, 1]: divide by {most}, {expected}"
    )


def _check_shifts(member: MemberSpec, classes: int) -> None:
    for name in ("mask_shift", "gate_shift"):
        found = getattr(member, name)
        values = found if isinstance(found, list) else [found] * classes
        if not all(map(is_number, values)) or len(values) != classes:
            raise ValueError(f"{name} {short(found)}, expected a number of logits, or {classes}")
    if member.gate_shift and not member.gated:
        raise ValueError(
            f"gate_shift {member.gate_shift}: without aux_params there is no presence head"
        )


def _check_padding(member: MemberSpec) -> None:
    version, encoder = member.efficientnet_pytorch, member.model["encoder_name"]
    fits = version in ("", *PADDED_OTHERWISE)
    expect(fits, "efficientnet_pytorch", version, f"{' or '.join(PADDED_OTHERWISE)}, as text")
    if version and not re.fullmatch("efficientnet-b[0-7]", encoder):
        raise ValueError(
            f"efficientnet_pytorch {version}: encoder {short(encoder)} is not of that library, "
            "efficientnet-b0 to -b7 are: leave it out"
        )


# --- reading --------------------------------------------------------------------------------------


def parse_manifest(entries: dict[str, Any], path: Path, competition: Competition) -> Manifest:
    """Return the manifest in the JSON object of the file `path`, of a bundle of a competition.

    Raises:
        ValueError: a field is missing, unknown or of another type, or a rule is broken.
    """
    try:
        check_fields(entries, Manifest, "the manifest")
        expect(isinstance(entries["members"], list), "members", entries["members"], "a list")
        members = [_parse_member(entry) for entry in entries["members"]]
        flips = entries.get("flips", list(Manifest.flips))
        expect(isinstance(flips, list), "flips", flips, f"a list of {list(FLIPS)}")
        slug = entries.get("competition", competition.slug)
        expect(is_text(slug), "competition", slug, "a slug")
        parsed = {"members": members, "competition": _with_slug(competition, slug)}
        default = {"classes": len(competition.classes)}
        manifest = Manifest(**with_tuples(default | entries | parsed, LISTS))
        check_manifest(manifest)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return manifest


def _with_slug(competition: Competition, slug: str) -> Competition:
    """The competition under the manifest's slug."""
    if slug != competition.slug:
        _check_other_slug(competition, slug)
    renamed = replace(competition, slug=slug)
    check_competition(renamed)
    return renamed


def _check_other_slug(competition: Competition, slug: str) -> None:
    """Under another slug than its own only Severstal's description holds, where none ships."""
    shipped = shipped_names()
    if slug in shipped:
        raise ValueError(
            f"competition {slug} is a name for --competition; its slug is "
            f"{find_competition(slug).slug}: write that"
        )
    if competition != SEVERSTAL:
        raise ValueError(
            f"competition {short(slug)}, its description is of {short(competition.slug)}: "
            "make them agree"
        )
    for name in shipped:
        if find_competition(name).slug == slug:
            raise ValueError(f"competition {slug} has a description: give --competition {name}")


def manifest_entries(manifest: Manifest) -> dict[str, Any]:
    """Return the JSON object of a manifest."""
    return asdict(manifest) | {"competition": manifest.competition.slug}


def source_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a member's entry without what a build fills in, and what is nothing."""
    names = [each.name for each in fields(MemberSpec) if each.name not in BUILT_FIELDS]
    return {name: entry[name] for name in names if entry.get(name)}


def source_entries(members: Iterable[dict[str, Any]], **others: Any) -> dict[str, Any]:
    """Return the JSON object of a manifest to build of: members' entries, `others`, defaults."""
    return {
        "format": Manifest.format, **others, "threshold": Manifest.threshold,
        "min_area": Manifest.min_area, "flips": Manifest.flips,
        "members": [source_entry(entry) for entry in members],
    }  # fmt: skip


def _parse_member(entry: object) -> MemberSpec:
    if not isinstance(entry, dict):
        raise ValueError(f"member {short(entry)}, expected an object")
    check_fields(entry, MemberSpec, f"member {entry.get('name')}")
    if not isinstance(entry.get("flops", []), list):
        raise ValueError(
            f"member {entry['name']}: flops {short(entry['flops'])}, expected two numbers"
        )
    return MemberSpec(**with_tuples(entry, LISTS))


def load_manifest(folder: Path) -> Manifest:
    """Return a bundle's manifest; raise ValueError where it is missing or breaks a rule."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path}: no such file; build the bundle with build_kernel.py")
    return parse_manifest(read_json(path), path, load_competition(folder))
