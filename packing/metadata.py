"""Kaggle's metadata of a dataset and a kernel: whose they are, and what Kaggle would refuse."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel.checks import read_json
from kernel.competition import SEVERSTAL, Competition
from kernel.faults import short
from kernel.logs import log
from kernel.manifest import MANIFEST, Manifest
from packing.paths import DATASET_METADATA, FIT_SCRIPT, KERNEL_METADATA, NOTEBOOK, SCRIPT
from packing.wheels import WHEELS

PLACEHOLDER = "your-kaggle-name"  # the committed owner
NAME = "[a-z0-9][a-z0-9-]*"  # an owner or a slug; the client lets others pass, Kaggle does not

# --- rules ----------------------------------------------------------------------------------------


def slugify(title: str) -> str:
    """Return the address that Kaggle makes of a title of letters, digits, spaces and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _slug_of(meta: dict[str, Any]) -> str:
    ref = meta.get("id")
    if not re.fullmatch(f"{NAME}/{NAME}", str(ref)):
        raise ValueError(
            f"id {short(ref)} is not owner/slug in small letters, digits and hyphens; "
            "write your Kaggle name, a slash and a slug, or give --owner"
        )
    return str(ref).split("/")[1]


def _check_length(what: str, text: object, shortest: int, longest: int) -> None:
    length = len(text) if isinstance(text, str) else 0
    if not shortest <= length <= longest:
        raise ValueError(
            f"{what} {short(text)} has {length} characters, not {shortest} to {longest}; reword it"
        )


def check_dataset(meta: dict[str, Any], files: list[str]) -> None:
    """Raise ValueError for what `kaggle datasets create` refuses in the metadata of `files`."""
    _check_length("slug", _slug_of(meta), 6, 50)
    _check_length("title", meta.get("title"), 6, 50)
    if meta.get("subtitle"):
        _check_length("subtitle", meta["subtitle"], 20, 80)
    licences = meta.get("licenses")
    if not isinstance(licences, list) or len(licences) != 1 or not licences[0].get("name"):
        raise ValueError(
            f'licenses {short(licences)} is not exactly one licence; write [{{"name": "CC0-1.0"}}]'
        )
    paths = [resource.get("path") for resource in meta.get("resources") or []]
    absent = [path for path in paths if path not in files]
    if absent:
        raise ValueError(f"resources {absent} are not in the dataset; drop them from resources")
    if len(set(paths)) < len(paths):
        raise ValueError(f"resources {paths} name a file twice; name it once")


def _check_kernel_names(meta: dict[str, Any]) -> None:
    slug, title = _slug_of(meta), str(meta.get("title", ""))
    _check_length("title", title, 5, 50)
    _check_length("slug", slug, 5, 50)
    if not re.fullmatch("[A-Za-z0-9 -]*", title):  # `slugify` and Kaggle may differ for others
        raise ValueError(
            f"title {short(title)} is not of letters, digits, spaces and hyphens; reword it"
        )
    if slugify(title) != slug:
        raise ValueError(
            f"title {short(title)} resolves to {short(slugify(title))}, the id says {short(slug)}; "
            "make them agree"
        )


MACHINE_SHAPE = "NvidiaTeslaT4"  # two of them; the P100 lacks kernels for Kaggle's torch
SETTINGS = {  # of both kernels, that which submits and that which fits
    "language": "python",
    "is_private": True,
    "enable_gpu": True,
    "machine_shape": MACHINE_SHAPE,
}


def check_kernel(
    meta: dict[str, Any], dataset_id: str, competition: str, code_file: str = SCRIPT.name
) -> None:
    """Raise ValueError for what `kaggle kernels push` or an offline GPU competition refuses."""
    _check_kernel_names(meta)
    wanted = SETTINGS | {
        "code_file": code_file,
        "kernel_type": "notebook" if code_file == NOTEBOOK else "script",
        "enable_internet": False,  # the client's own default is true, which the competition forbids
        "dataset_sources": [dataset_id],
        "competition_sources": [competition],
    }
    for key, value in wanted.items():
        found = meta.get(key)
        if isinstance(value, list) and isinstance(found, list) and value[0] in found:
            continue  # others may stand beside it
        if json.dumps(found) != json.dumps(value):  # 0 is not false
            line = json.dumps({key: value})[1:-1]
            raise ValueError(f"{key} {short(found)} is not {value!r}; write {line}")
    pinning = meta.get("docker_image_pinning_type", "latest")
    if pinning not in ("original", "latest"):
        raise ValueError(f"docker_image_pinning_type {short(pinning)}; write original or latest")


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """Both metadata files, the kernel's filled in from the dataset's."""

    dataset: dict[str, Any]
    kernel: dict[str, Any]

    @property
    def owner(self) -> str:
        """Whose dataset and kernel it will be."""
        return str(self.dataset["id"]).split("/")[0]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before what is wrong in it."""
    try:
        yield
    except (TypeError, AttributeError) as error:  # a list of words where one of objects belongs
        raise ValueError(f"{path}: not Kaggle's metadata: {error}; compare its page") from error
    except ValueError as error:
        raise ValueError(f"{path}: Kaggle refuses it: {error}") from None


def _owned(meta: dict[str, Any], owner: str) -> str:
    return f"{owner}/{str(meta.get('id', '')).rpartition('/')[2]}"


def _renamed(
    dataset: dict[str, Any], kernel: dict[str, Any], competition: Competition
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both files for another competition than the committed ones are of."""
    words = competition.slug.replace("_", "-").split("-")
    while len(" ".join([*words, "ensemble submission"])) > 50:  # what Kaggle allows
        words.pop()
    title = " ".join([*words, "ensemble"]).capitalize()  # becomes the slug again
    owner, slug = str(dataset.get("id", "")).split("/")[0], slugify(title)
    renamed = {"id": f"{owner}/{slug}", "title": title}
    submission = {"id": f"{owner}/{slug}-submission", "title": f"{title} submission"}
    return dataset | renamed, kernel | submission | {"competition_sources": [competition.slug]}


def read_metadata(owner: str | None, manifest: Manifest, notebook: bool = False) -> Metadata:
    """Return both metadata files with one owner, checked against the Kaggle client's rules.

    Raises:
        ValueError: Kaggle would refuse one; names the file, the rule, the value and the remedy.
    """
    dataset, kernel = read_json(DATASET_METADATA), read_json(KERNEL_METADATA)
    committed = dataset.get("id")
    sources = kernel.get("competition_sources")
    if isinstance(sources, list) and manifest.competition.slug not in sources:
        dataset, kernel = _renamed(dataset, kernel, manifest.competition)
    if owner:
        dataset["id"] = _owned(dataset, owner)
    files = [MANIFEST, SCRIPT.name, *WHEELS, *(member.file for member in manifest.members)]
    with _naming(DATASET_METADATA):
        check_dataset(dataset, files)
    owner, code_file = dataset["id"].split("/")[0], NOTEBOOK if notebook else SCRIPT.name
    _warn_of_other_sources(kernel.get("dataset_sources"), (committed, dataset["id"]))
    kernel |= {"id": _owned(kernel, owner), "dataset_sources": [dataset["id"]]}
    if notebook:
        kernel |= {"code_file": NOTEBOOK, "kernel_type": "notebook"}
    with _naming(KERNEL_METADATA):
        check_kernel(kernel, dataset["id"], manifest.competition.slug, code_file)
    return Metadata(dataset, kernel)


def _warn_of_other_sources(sources: object, own: tuple[Any, ...]) -> None:
    """Log which datasets the submission kernel will not have: only the bundle is its own."""
    others = [
        each
        for each in (sources if isinstance(sources, list) else [])
        if each not in own and not str(each).startswith(f"{PLACEHOLDER}/")
    ]
    if others:
        log.warning(
            "%s: dataset_sources %s are left out; if the kernel needs them, add them to the file "
            "beside the packed script before the push",
            *(KERNEL_METADATA, others),
        )


def read_fit_metadata(owner: str | None, resume: bool) -> dict[str, Any]:
    """Return the fit kernel's metadata: the submission's, with a slug and sources of its own.

    With `resume` its own earlier output is a source.

    Raises:
        ValueError: Kaggle would refuse it.
    """
    dataset, kernel = read_json(DATASET_METADATA), read_json(KERNEL_METADATA)
    own = _owned(dataset, owner or str(dataset.get("id")).split("/")[0]) + "-fit"
    title = own.rpartition("/")[2].replace("-", " ").capitalize()  # becomes the slug again
    kernel |= SETTINGS | {
        "id": own,
        "title": title,
        "code_file": FIT_SCRIPT,
        "kernel_type": "script",
        "enable_internet": True,  # for pip and the encoders' weights; it is no submission
        "competition_sources": [SEVERSTAL.slug],
        "dataset_sources": [],
        "kernel_sources": [own] if resume else [],
    }
    with _naming(DATASET_METADATA):
        _check_kernel_names(kernel)
    return kernel


# --- owner ----------------------------------------------------------------------------------------


def _client_files() -> list[Path]:
    """Where the Kaggle client keeps who its user is: a key's file, a login's file."""
    configured = os.environ.get("KAGGLE_CONFIG_DIR")
    try:
        home = Path.home() / ".kaggle"
    except RuntimeError:  # this user has no home
        return [Path(configured, "kaggle.json")] if configured else []
    xdg = Path(os.environ.get("XDG_CONFIG_HOME") or home.parent / ".config") / "kaggle"
    default = xdg if sys.platform.startswith("linux") and not home.exists() else home
    return [Path(configured or default, "kaggle.json"), home / "credentials.json"]


def find_owner() -> str | None:
    """Return the Kaggle client's user: KAGGLE_USERNAME, or the name in its own files.

    An access token names nobody: there the client asks Kaggle, and a build asks for --owner.

    Raises:
        ValueError: a file of the client is no JSON object.
    """
    if os.environ.get("KAGGLE_USERNAME"):
        return os.environ["KAGGLE_USERNAME"]
    names = [read_json(path).get("username") for path in _client_files() if path.is_file()]
    return next((name for name in names if name), None)
