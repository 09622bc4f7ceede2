"""The source manifest: which checkpoints are to be packed, and as what."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kernel.checks import read_json
from kernel.competition import COMPETITION, SEVERSTAL, Competition, load_competition
from kernel.faults import short
from kernel.files import json_text, write_text
from kernel.manifest import MANIFEST, Manifest, MemberSpec, parse_manifest, source_entries
from kernel.members import check_sha256
from packing.models import read_model, with_todays_options, without_activation
from packing.reading import SUFFIXES, no_such_checkpoint, read_header, weights_file

OUT_OF_FOLD = "out_of_fold.json"  # of a fit on Kaggle: each member's scores, or null


def _source_of(weights: Path, entry: dict[str, Any]) -> Path:
    path = Path(weights, entry["file"])
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(weights)):
        raise ValueError(
            f"member {entry['name']}: file {short(entry['file'])} leaves {weights}; copy it there"
        )
    if not weights_file(path).is_file():
        raise ValueError(f"member {entry['name']}: {no_such_checkpoint(weights_file(path))}")
    return path


def _saved_model(weights: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The model of an entry that names none, from beside its weights."""
    source = _source_of(weights, entry)
    try:
        return read_model(source)
    except ValueError as error:
        raise ValueError(f"member {entry['name']}: {error}") from error


def _packed_entry(weights: Path, entry: Any) -> Any:
    """A source entry as it stands in the bundle: flat file name, model filled in.

    What is no member stays as it is: `parse_manifest` says why.
    """
    fields = entry if isinstance(entry, dict) else {}
    if not all(isinstance(fields.get(key), str) for key in ("name", "file")):
        return entry
    model = entry["model"] if "model" in entry else _saved_model(weights, entry)
    model = with_todays_options(without_activation(model, fields.get("softmax") is True))
    name = re.sub(r"[^\w.-]+", "-", entry["name"], flags=re.ASCII)
    if not entry["name"].isascii():  # others may have become the same
        name = f"{name[:80]}-{hashlib.sha256(ascii(entry['name']).encode()).hexdigest()[:6]}"
    return entry | {"file": f"{name}.safetensors", "model": model}


def propose_manifest(path: Path, competition: Competition) -> None:
    """Write a manifest of the checkpoints beside it that say themselves what they are, and say so.

    `training/train.py` writes a member's entry into its checkpoint's header. What is of the
    ensemble is the default. Where no checkpoint says so nothing is written. Another competition
    than Severstal's stands in it, and its description beside it, for builds to come.
    """
    found = {file: read_header(file) for file in sorted(path.parent.glob("*.safetensors"))}
    members = [entry | {"file": file.name} for file, entry in found.items() if entry]
    if not members:
        return
    other = competition != SEVERSTAL
    entries = source_entries(members, **({"competition": competition.slug} if other else {}))
    description, beside = path.with_name(COMPETITION), ""
    if other and not description.exists():
        write_text(description, json_text(asdict(competition)))
        beside = f", {COMPETITION} beside it"
    write_text(path, json_text(entries))
    files = ", ".join(entry["file"] for entry in members)
    print(f"{path}: was not there; written of what {files} say of themselves{beside}: look at it")


def left_out(weights: Path, sources: Iterable[Path]) -> list[str]:
    """Return the names of the checkpoints in a folder that are no member's."""
    packed = {os.path.realpath(weights_file(source)) for source in sources}
    found = {each.name: weights_file(each) for each in sorted(weights.iterdir())}
    return [
        name
        for name, file in found.items()
        if file.suffix in SUFFIXES and file.is_file() and os.path.realpath(file) not in packed
    ]


def unfinished(weights: Path) -> list[str]:
    """Return the members that a fit on Kaggle did not finish, by its record among the weights.

    A member that another fit finished, so that its checkpoint is there, is not among them.
    """
    try:
        record = read_json(weights / OUT_OF_FOLD)
    except (ValueError, OSError):  # it says nothing, and no build needs it
        return []
    names = [name for name, scores in record.items() if scores is None]
    return [name for name in names if not (weights / f"{name}.safetensors").is_file()]


def _check_different(sources: list[Path], members: list[MemberSpec]) -> None:
    """Raise ValueError where two members are one checkpoint, and alike but for their names."""
    alike = [
        replace(spec, name="", sha256="", file=os.path.realpath(weights_file(source)))
        for source, spec in zip(sources, members, strict=True)
    ]
    for index, each in enumerate(alike):
        first = alike.index(each)
        if first < index:
            raise ValueError(
                f"members {members[first].name} and {members[index].name} are the same: "
                f"{each.file}; leave one out, correct its `file`, or copy it to count it twice"
            )


def read_sources(
    weights: Path, competition: Competition | None = None
) -> tuple[Manifest, list[Path]]:
    """Return the bundle's manifest, hashes and flops to come, and each member's checkpoint.

    The competition is the one asked for, else the one described beside the manifest.

    Raises:
        ValueError: the manifest is missing or breaks a rule, or a checkpoint is missing, changed or
            there twice.
    """
    path = weights / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path}: no such file; write one, or give its folder with --weights")
    entries = read_json(path)
    members = entries.get("members")
    if isinstance(members, list):
        entries = entries | {"members": [_packed_entry(weights, entry) for entry in members]}
    described = weights / COMPETITION
    if competition and described.is_file() and load_competition(weights) != competition:
        print(f"{described}: says otherwise than --competition; builds without that option take it")
    manifest = parse_manifest(entries, path, competition or load_competition(weights))
    sources = [_source_of(weights, entry) for entry in members or []]
    for source, spec in zip(sources, manifest.members, strict=True):
        check_sha256(weights_file(source), spec.sha256)
    _check_different(sources, manifest.members)
    return manifest, sources
