"""Packs trained checkpoints into a Kaggle dataset and an offline submission kernel.

Read top to bottom: manifest → metadata → wheels → members → one file → notebook → staging → table.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernel.engines import openvino_files, pad_to_multiple
from kernel.logs import progress, start_log
from kernel.manifest import MANIFEST, Manifest, MemberSpec, parse_manifest, read_json
from kernel.members import Member, check_sha256, load_member
from kernel.projection import CALIBRATION
from weights.checkpoints import fit, read_checkpoint, read_model, weights_file, without_activation

ROOT = Path(__file__).resolve().parent
DATASET = ROOT / "dataset-metadata.json"
KERNEL = ROOT / "kernel" / "kernel-metadata.json"
CODE = ROOT / "kernel" / "inference.py"
NOTEBOOK = "inference.ipynb"
BESIDE = (ROOT / "kernel" / "validate.py", ROOT / "kernel" / "contact_sheet.py")  # what CODE uses
PARTS = ("dataset", "kernel", "report", CALIBRATION)  # of a bundle; the dry run leaves the last two
CACHE = ROOT / ".cache" / "wheels"
PLACEHOLDER = "your-kaggle-name"  # the committed owner

# Pure Python that Kaggle's image lacks, or has in another version; the one place of their pins.
WHEELS = {  # file → sha256
    "segmentation_models_pytorch-0.6.0-py3-none-any.whl": (
        "c46162221b5abe3bc296b222fbea8aa80d0b56e7130f7ddef654f707804534e2"
    ),
    "timm-1.0.31-py3-none-any.whl": (
        "5bd50f7d0fe6d09bf9285ac2523234a1b7e6bf075c0be3e7aed09139fcb617c7"
    ),
}

OPENVINO_WHEEL = {  # for Kaggle's Python; packed on request
    "openvino-2026.4.1-22982-cp312-cp312-manylinux_2_28_x86_64.whl": (
        "6b4375c17ddcac83a5180349e2e2bb811185c261066e2a920659892d58ef0e3b"
    ),
}

# --- the source manifest ------------------------------------------------------------------------


def source_of(weights: Path, entry: dict[str, Any]) -> Path:
    """Where a source entry's checkpoint lies; raises ValueError where it leaves the folder."""
    path = Path(weights, entry["file"])
    if not path.resolve().is_relative_to(weights.resolve()):
        raise ValueError(
            f"member {entry['name']}: file {entry['file']!r} leaves {weights}; copy it there"
        )
    if not path.exists():
        raise ValueError(
            f"member {entry['name']}: {path}: no such checkpoint; train it or correct `file`"
        )
    return path


def packed_entry(weights: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """A source entry as it stands in the bundle: flat file name, model filled in, no sha256 yet."""
    source = source_of(weights, entry)
    model = entry["model"] if "model" in entry else read_model(source)
    name = re.sub(r"[^\w.-]+", "-", entry["name"])
    packed = {"file": f"{name}.safetensors", "model": without_activation(model), "sha256": ""}
    return entry | packed


def read_sources(weights: Path) -> tuple[Manifest, list[Path]]:
    """The bundle's manifest without hashes, and each member's checkpoint.

    Raises:
        ValueError: the manifest is missing or breaks a rule, or a checkpoint is missing or changed.
    """
    path = weights / MANIFEST
    entries = read_json(path)
    try:
        sources = [source_of(weights, entry) for entry in entries["members"]]
        members = [packed_entry(weights, entry) for entry in entries["members"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest: {error!r}") from error
    manifest = parse_manifest(entries | {"members": members}, path)
    for source, entry in zip(sources, entries["members"], strict=True):
        check_sha256(weights_file(source), entry.get("sha256", ""))
    return manifest, sources


# --- Kaggle's metadata --------------------------------------------------------------------------


def slugify(title: str) -> str:
    """A title of letters, digits, spaces and hyphens as Kaggle makes an address of it."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


Rule = tuple[bool, str, str]  # holds; the value that came and the rule; the remedy


def check_rules(path: Path, rules: Iterable[Rule]) -> None:
    """Raises ValueError for the first rule that does not hold, with its remedy."""
    for holds, rule, remedy in rules:
        if not holds:
            raise ValueError(f"{path}: Kaggle refuses it: {rule}; {remedy}")


NAME = "[a-z0-9][a-z0-9-]*"  # an owner or a slug; the client lets others pass, Kaggle does not
LICENCES = (  # the client's page lists these and rarer ones; `other` is told in the description
    *("CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "GPL-2.0"),
    *("GPL-3.0", "apache-2.0", "ODbL-1.0", "PDDL", "copyright-authors", "other", "unknown"),
)


def id_rule(meta: dict[str, Any]) -> Rule:
    """The rule that both files share."""
    return (
        bool(re.fullmatch(rf"{NAME}/{NAME}", str(meta.get("id", "")))),
        f"id {meta.get('id')!r} is not owner/slug in small letters, digits and hyphens",
        "write your Kaggle name, a slash and a slug, or give --owner",
    )


def dataset_rules(meta: dict[str, Any], files: list[str]) -> Iterator[Rule]:
    """What `kaggle datasets create` asks of dataset-metadata.json beside `files`."""
    yield id_rule(meta)
    slug, title, subtitle = meta["id"].split("/")[1], meta.get("title"), meta.get("subtitle")
    yield (
        6 <= len(slug) <= 50,
        f"slug {slug!r} has {len(slug)} characters, not 6 to 50",
        "rename it",
    )
    length = len(title) if isinstance(title, str) else 0
    yield 6 <= length <= 50, f"title {title!r} has {length} characters, not 6 to 50", "reword it"
    length = len(subtitle or "")
    fits = not subtitle or 20 <= length <= 80
    yield fits, f"subtitle {subtitle!r} has {length} characters, not 20 to 80", "reword or drop it"
    licences = meta.get("licenses")
    one = isinstance(licences, list) and len(licences) == 1 and isinstance(licences[0], dict)
    yield one, f"licenses {licences!r} is not exactly one licence", 'write [{"name": "CC0-1.0"}]'
    licence = licences[0].get("name") if licences else None
    yield licence in LICENCES, f"unknown licence {licence!r}", f"choose of {', '.join(LICENCES)}"
    paths = [resource.get("path") for resource in meta.get("resources") or []]
    absent = [path for path in paths if path not in files]
    yield not absent, f"resources {absent} are not in the dataset", "drop them from resources"
    yield len(set(paths)) == len(paths), f"resources {paths} name a file twice", "name it once"


def kernel_rules(
    meta: dict[str, Any], dataset_id: str, competition: str, code_file: str = CODE.name
) -> Iterator[Rule]:
    """What `kaggle kernels push` and an offline GPU competition ask of kernel-metadata.json."""
    yield id_rule(meta)
    slug, title = meta["id"].split("/")[1], str(meta.get("title", ""))
    for what, text in (("title", title), ("slug", slug)):
        yield len(text) >= 5, f"{what} {text!r} has fewer than 5 characters", "reword it"
    plain = bool(re.fullmatch("[A-Za-z0-9 -]*", title))  # `slugify` and Kaggle spell others apart
    yield plain, f"title {title!r} is not of letters, digits, spaces and hyphens", "reword it"
    other = f"title {title!r} resolves to {slugify(title)!r}, the id says {slug!r}"
    yield slugify(title) == slug, other, "make them agree"
    wanted: dict[str, Any] = {
        "code_file": code_file,
        "language": "python",
        "kernel_type": "notebook" if code_file == NOTEBOOK else "script",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": False,  # the client's own default is true, which the competition forbids
        "machine_shape": "NvidiaTeslaT4",  # two of them; the P100 lacks kernels for Kaggle's torch
        "dataset_sources": [dataset_id],
        "competition_sources": [competition],
    }
    for key, value in wanted.items():
        found = meta.get(key)
        same = type(found) is type(value) and found == value
        yield same, f"{key} {found!r} is not {value!r}", f"write {json.dumps({key: value})[1:-1]}"
    pinning = meta.get("docker_image_pinning_type", "latest")
    known = pinning in ("original", "latest")
    yield known, f"docker_image_pinning_type {pinning!r}", "write original or latest"


@dataclass(frozen=True)
class Metadata:
    """Both metadata files, the kernel's filled in from the dataset's."""

    dataset: dict[str, Any]
    kernel: dict[str, Any]

    @property
    def owner(self) -> str:
        """Whose dataset and kernel it will be."""
        return str(self.dataset["id"]).split("/")[0]


def read_metadata(owner: str | None, manifest: Manifest, notebook: bool = False) -> Metadata:
    """Both metadata files with one owner, checked against the Kaggle client's rules.

    Raises:
        ValueError: Kaggle would refuse one; names the file, the rule, the value and the remedy.
    """
    dataset, kernel = read_json(DATASET), read_json(KERNEL)
    if owner:
        dataset["id"] = f"{owner}/{str(dataset.get('id', '')).rpartition('/')[2]}"
    files = [MANIFEST, *(path.name for path in (CODE, *BESIDE)), *WHEELS]
    files += [member.file for member in manifest.members]
    check_rules(DATASET, dataset_rules(dataset, files))
    kernel["id"] = f"{dataset['id'].split('/')[0]}/{str(kernel.get('id', '')).rpartition('/')[2]}"
    kernel["dataset_sources"] = [dataset["id"]]
    if notebook:
        kernel |= {"code_file": NOTEBOOK, "kernel_type": "notebook"}
    code_file = NOTEBOOK if notebook else CODE.name
    check_rules(KERNEL, kernel_rules(kernel, dataset["id"], manifest.competition, code_file))
    return Metadata(dataset, kernel)


def client_configs() -> list[Path]:
    """Where the Kaggle client keeps who its user is: a key's file, a login's file."""
    home = Path.home() / ".kaggle"
    xdg = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kaggle"
    default = xdg if sys.platform.startswith("linux") and not home.exists() else home
    folder = Path(os.environ.get("KAGGLE_CONFIG_DIR") or default)
    return [folder / "kaggle.json", home / "credentials.json"]


def find_owner() -> str | None:
    """The user of the Kaggle client: KAGGLE_USERNAME, or who its own files name.

    An access token names nobody: there the client asks Kaggle, and a build asks for --owner.

    Raises:
        ValueError: a file of the client is no JSON object.
    """
    found = [path for path in client_configs() if path.is_file()]
    names = [os.environ.get("KAGGLE_USERNAME"), *(read_json(p).get("username") for p in found)]
    return next((name for name in names if name), None)


# --- wheels -------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """A file's sha256, empty where there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def fetch_wheels(folder: Path, wanted: dict[str, str] = WHEELS) -> list[Path]:
    """The pinned wheels, from the cache `folder` or, where they lack, into it by pip.

    Raises:
        ValueError: neither the cache nor a package registry has them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lacking = {name: sha for name, sha in wanted.items() if sha256_of(folder / name) != sha}
    if lacking:
        download_wheels(lacking, folder)
    return [folder / name for name in wanted]


def download_wheels(wheels: dict[str, str], folder: Path) -> None:
    """Fetches wheels by name, version and sha256 from the registry that pip is set up for."""
    pins = ["{}=={}".format(*name.split("-")[:2]) for name in wheels]
    print(f"fetching {', '.join(pins)} into {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wanted = Path(scratch, "requirements.txt")
        lines = (f"{p} --hash=sha256:{sha}\n" for p, sha in zip(pins, wheels.values(), strict=True))
        wanted.write_text("".join(lines), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        pip += ["--python-version=3.12", "--platform=manylinux_2_28_x86_64"]  # Kaggle's
        pip += ["--only-binary=:all:", "--retries=1", "--dest", scratch, "-r", str(wanted)]
        done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise ValueError(
                f"{folder} lacks {', '.join(pins)} and pip cannot fetch it ({reason}); build once "
                f"where a package registry answers, or copy {', '.join(wheels)} there"
            )
        for name in wheels:
            Path(scratch, name).replace(folder / name)


# --- members ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A member in the bundle, and what the table says of it."""

    spec: MemberSpec
    parameters: int
    size: int  # bytes
    notes: list[str]


def to_half(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Floating tensors in fp16, the others (batch norm's counters) as they are.

    Raises:
        ValueError: a weight is NaN or infinite, or becomes infinite in fp16.
    """
    half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{path}: {key} holds NaN or infinite values; take an earlier checkpoint"
            )
        if not torch.isfinite(half[key]).all():
            largest = value.abs().max().item()
            raise ValueError(
                f"{path}: {key} reaches {largest:.3g}, above fp16's 65504; retrain or clip it"
            )
    return {key: value.contiguous() for key, value in half.items()}


def count_flops(member: Member, size: tuple[int, int]) -> list[int]:
    """FLOPs of encoder and decoder for one image (H, W), a multiply-add as 2; drops the weights."""
    encoder, decoder = (half.to("meta") for half in (member.encode, member.decode))  # no arithmetic
    images = pad_to_multiple(torch.empty(1, 1, *size, device="meta"), member.stride)
    with torch.no_grad():
        with FlopCounterMode(display=False) as first:
            encoded = encoder(images)
        with FlopCounterMode(display=False) as second:
            decoder(*encoded)
    return [int(first.get_total_flops()), int(second.get_total_flops())]


def check_probabilities(member: Member, classes: int, path: Path) -> None:
    """Runs one small random image; raises ValueError for a wrong shape or NaN."""
    images = torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        probabilities = member(images)
    if probabilities.shape != (1, classes, 64, 96):
        found, expected = tuple(probabilities.shape), (1, classes, 64, 96)
        raise ValueError(f"{path}: gives probabilities {found}, expected {expected}")
    if not torch.isfinite(probabilities).all():
        raise ValueError(f"{path}: gives NaN for a random image; its weights do not suit fp16")


def pack_openvino(member: Member, folder: Path) -> int:
    """Writes both halves as OpenVINO reads them; their bytes. Any image size, any batch.

    In fp32, twice the checkpoint's bytes: batch norm is folded here, and rounded to fp16 once more
    the weights move 0.1 % of a mask's pixels.
    """
    import openvino

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # OpenVINO traces in a way that PyTorch calls deprecated
        images = torch.rand(1, 1, 2 * member.stride, 3 * member.stride)
        encoded = member.encode(images)
        decoder = openvino.convert_model(member.decode, example_input=encoded)
        encoder = openvino.convert_model(member.encode, example_input=images)
    for parameter, result in zip(decoder.get_parameters(), encoder.get_results(), strict=True):
        if not parameter.output(0).get_target_inputs():  # a level that this decoder does not read
            decoder.remove_parameter(parameter)
            encoder.remove_result(result)
    paths = [folder / name for name in openvino_files(member.spec.file)]
    for half, path in zip((encoder, decoder), paths, strict=True):
        half.set_friendly_name(path.stem)  # OpenVINO's own names count what this process has made
        for number, node in enumerate(half.get_ordered_ops()):
            node.set_friendly_name(f"{node.get_type_name()}_{number}")
        openvino.save_model(half, path, compress_to_fp16=False)
    return sum(path.stat().st_size + path.with_suffix(".bin").stat().st_size for path in paths)


def pack_member(
    source: Path, spec: MemberSpec, manifest: Manifest, folder: Path, openvino: bool
) -> Packed:
    """Checks a checkpoint, writes it as fp16 safetensors and loads that as the kernel will.

    Raises:
        ValueError: the checkpoint is unsafe, not of the declared model, or gives no probabilities.
    """
    checkpoint = read_checkpoint(source)
    fit(checkpoint, spec.model)
    known_later = ("sha256", "flops")
    entry = {key: value for key, value in asdict(spec).items() if key not in known_later}
    path = folder / spec.file
    header = {"member": json.dumps(entry, sort_keys=True)}  # one key: several have no fixed order
    path.write_bytes(save(to_half(checkpoint.weights, checkpoint.path), header))
    spec = replace(spec, sha256=sha256_of(path))
    member = load_member(folder, spec, torch.device("cpu"))
    check_probabilities(member, manifest.classes, checkpoint.path)
    parameters = sum(weight.numel() for weight in member.encode.network.parameters())
    size = path.stat().st_size + (pack_openvino(member, folder) if openvino else 0)
    spec = replace(spec, flops=count_flops(member, manifest.image_size))
    return Packed(spec, parameters, size, checkpoint.notes)


# --- the kernel's modules as one file -----------------------------------------------------------

GUARD = '\n\nif __name__ == "__main__":\n    main()\n'  # the end of what is run as a script
OWN_IMPORT = re.compile(r"^from kernel\.(\w+) import (?:\([^)]*\)|.+)\n", re.MULTILINE)


def needed(module: Path) -> list[Path]:
    """A module of kernel/ after those of kernel/ that it needs, each once."""
    names = OWN_IMPORT.findall(module.read_text(encoding="utf-8"))
    before = itertools.chain(*(needed(module.with_name(f"{name}.py")) for name in names))
    return list(dict.fromkeys([*before, module]))


def join_modules(script: Path) -> str:
    """A script of kernel/ and all that it imports from there as one file, for Kaggle runs one.

    A section a module, its code as it stands, without the imports of what stands above it. The
    script's docstring comes first, for it is the file's.
    """
    *others, _ = needed(script)
    docstring, end, rest = script.read_text(encoding="utf-8").partition('"""\n')
    parts = {path: path.read_text(encoding="utf-8").removesuffix(GUARD) for path in others}
    sections = [
        f"# --- {path.name} ".ljust(100, "-") + "\n\n" + OWN_IMPORT.sub("", code).strip("\n")
        for path, code in [*parts.items(), (script, rest)]
    ]
    return docstring + end + "\n" + "\n\n\n".join(sections) + "\n"


# --- the notebook -------------------------------------------------------------------------------

TITLE_CELL = """\
# Severstal: Steel Defect Detection, an ensemble of segmentation networks

Every strip goes once through every member under every flip; the mean of the probabilities over the
threshold becomes `submission.csv`. Add the competition and the bundle's dataset as inputs, turn the
internet off and the GPU on. The cells below are the bundle's `inference.py`, section by section;
the last two run it and show what it found. Built by `build_kernel.py --notebook`."""

RUN_CELL = """\
ARGUMENTS: list[str] = []  # as on the command line, such as ["--no-early-exit"]
main(ARGUMENTS)"""

PICTURE_CELL = """\
try:
    import contact_sheet  # the bundle's
    import IPython.display

    options = parse_options(ARGUMENTS)
    labels = [label for _, label, _ in read_rows(options.output)[1]]
    task = find_task(options, classes=max(labels))
    sheet = contact_sheet.draw_submission(options.output, task.images)
    display(IPython.display.Image(data=cv2.imencode(".jpg", sheet)[1].tobytes()))
except Exception as error:  # a picture must not cost the submission
    log.warning("no contact sheet: %s", error)"""


def notebook_of(code: str) -> dict[str, Any]:
    """The kernel's code as a notebook of format 4.5, a cell for each of its sections."""
    if not code.endswith(GUARD):
        raise ValueError(f"{CODE}: does not end in {GUARD.strip()!r}, which a notebook leaves out")
    sections = re.split(r"\n+(?=# --- )", code.removesuffix(GUARD).rstrip("\n"))
    cells = [*sections, RUN_CELL, PICTURE_CELL]
    parts: dict[str, Any] = {"cell_type": "code", "metadata": {}, "outputs": []}
    return {
        "cells": [
            {"cell_type": "markdown", "id": "title", "metadata": {}, "source": TITLE_CELL},
            *(
                parts | {"id": f"cell-{number}", "execution_count": None, "source": source}
                for number, source in enumerate(cells)
            ),
        ],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


# --- staging ------------------------------------------------------------------------------------


def write_json(path: Path, entries: dict[str, Any]) -> None:
    """JSON that is the same on every build."""
    text = json.dumps(entries, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def stage(
    bundle: Path,
    manifest: Manifest,
    sources: list[Path],
    metadata: Metadata,
    wheels: list[Path],
    openvino: bool,
) -> list[Packed]:
    """Lays bundle/dataset and bundle/kernel, both flat; Kaggle skips folders silently."""
    dataset, kernel = bundle / "dataset", bundle / "kernel"
    dataset.mkdir(parents=True)
    kernel.mkdir()
    pairs = list(zip(sources, manifest.members, strict=True))
    bar = progress(pairs, "packing", "member")
    packed = [pack_member(source, spec, manifest, dataset, openvino) for source, spec in bar]
    write_json(dataset / MANIFEST, asdict(replace(manifest, members=[p.spec for p in packed])))
    write_json(dataset / DATASET.name, metadata.dataset)
    write_json(kernel / KERNEL.name, metadata.kernel)
    for wheel in wheels:
        shutil.copyfile(wheel, dataset / wheel.name)
    for script in (CODE, *BESIDE):
        (dataset / script.name).write_text(join_modules(script), encoding="utf-8")
    if metadata.kernel["kernel_type"] == "notebook":
        code = (dataset / CODE.name).read_text(encoding="utf-8")
        write_json(kernel / NOTEBOOK, notebook_of(code))
    else:
        shutil.copyfile(dataset / CODE.name, kernel / CODE.name)
    return packed


def check_out(out: Path) -> None:
    """Raises ValueError where `out` holds what is no bundle: the swap would take it away."""
    if not out.exists():
        return
    found = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    whole = found <= set(PARTS) and (out / "dataset" / MANIFEST).is_file()
    if found and not whole:
        listed = ", ".join(sorted(found)[:3])
        raise ValueError(
            f"{out}: holds other things than a bundle ({listed}); choose another --out"
        )


def swap_in(bundle: Path, out: Path, previous: Path) -> None:
    """Puts a complete bundle in the place of the previous one, which goes to `previous`."""
    if out.exists():
        out.rename(previous)
    try:
        bundle.rename(out)
    except OSError:
        if previous.exists():
            previous.rename(out)
        raise


def build(
    weights: Path, out: Path, owner: str | None, openvino: bool = False, notebook: bool = False
) -> tuple[Metadata, list[Packed]]:
    """Builds the bundle aside and swaps it in when it is whole.

    Raises:
        ValueError: an input is bad; what stood at `out` stays as it was.
    """
    out = out.resolve()
    check_out(out)
    if openvino and not find_spec("openvino"):
        raise ValueError("--openvino: not installed here; pip install -e '.[openvino]'")
    manifest, sources = read_sources(weights)
    metadata = read_metadata(owner, manifest, notebook)
    wheels = fetch_wheels(CACHE, WHEELS | OPENVINO_WHEEL if openvino else WHEELS)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        packed = stage(Path(scratch, "bundle"), manifest, sources, metadata, wheels, openvino)
        if (out / CALIBRATION).is_file():  # Kaggle's machines stay what they were measured to be
            shutil.copy(out / CALIBRATION, Path(scratch, "bundle"))
        swap_in(Path(scratch, "bundle"), out, Path(scratch, "previous"))
    return metadata, packed


# --- the table ----------------------------------------------------------------------------------


def table_line(
    name: str, encoder: str, decoder: str, parameters: int, size: int, flops: int
) -> str:
    """One line of the table, under its header's columns."""
    numbers = f"{parameters:>11,} {size / 1e6:>7.1f} {flops / 1e9:>11.1f}"
    return f"{name:<20} {encoder:<24} {decoder:<12} {numbers}"


def print_table(packed: list[Packed]) -> None:
    """One line a member, and the totals."""
    heads = ("member", "encoder", "decoder", "parameters", "MB", "GFLOP/pass")
    print("{:<20} {:<24} {:<12} {:>11} {:>7} {:>11}".format(*heads))
    for p in packed:
        model = p.spec.model
        names = (p.spec.name, model["encoder_name"], model["arch"])
        print(table_line(*names, p.parameters, p.size, sum(p.spec.flops)))
        for note in p.notes:
            print(f"  {note}")
    parameters, size = sum(p.parameters for p in packed), sum(p.size for p in packed)
    flops = sum(sum(p.spec.flops) for p in packed)
    print(table_line("total", "", "", parameters, size, flops))
    print("A pass is one image through one member; a multiply-add counts as 2.")


def print_next(out: Path, metadata: Metadata) -> None:
    """The commands that upload and submit the bundle, and what must be done before."""
    kernel = metadata.kernel
    if metadata.owner == PLACEHOLDER:
        print(
            f"\nThe owner is still {PLACEHOLDER}: build again with --owner NAME before uploading."
        )
    print(f"\nNext, for {metadata.owner}:\n  kaggle datasets create -p {out / 'dataset'}")
    print(f"  kaggle kernels push -p {out / 'kernel'}")
    print("and when that version of the kernel has run on Kaggle:")
    print(
        f"  kaggle competitions submit {kernel['competition_sources'][0]} -k {kernel['id']}"
        " -v 1 -f submission.csv -m first"
    )
    print(f"Later versions: kaggle datasets version -p {out / 'dataset'} -m MESSAGE")


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and builds; bad input is one line and exit code 2."""
    start_log()
    parser = argparse.ArgumentParser(
        usage="python build_kernel.py --owner NAME [--weights weights] [--out dist] [--openvino] "
        "[--notebook]",
        description=(__doc__ or "").splitlines()[0],
    )
    weights, out = ROOT / "weights", Path("dist")
    parser.add_argument("--weights", type=Path, default=weights, help=f"{MANIFEST}'s folder")
    parser.add_argument("--out", type=Path, default=out, help="becomes OUT/dataset, OUT/kernel")
    about = "your Kaggle name (default: KAGGLE_USERNAME, or who the kaggle client's files name)"
    parser.add_argument("--owner", help=about)
    about = "also pack OpenVINO and the members as it reads them: for kernels without a GPU"
    parser.add_argument("--openvino", action="store_true", help=about)
    about = f"the kernel as {NOTEBOOK} instead of a script"
    parser.add_argument("--notebook", action="store_true", help=about)
    args = parser.parse_args(argv)
    try:
        owner = args.owner or find_owner()
        metadata, packed = build(args.weights, args.out, owner, args.openvino, args.notebook)
    except (ValueError, OSError) as error:
        print(f"build_kernel: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print_table(packed)
    print_next(args.out, metadata)


if __name__ == "__main__":
    main()
