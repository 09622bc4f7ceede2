"""The kernel that fits the members on Kaggle: one script that carries kernel/ and training/."""

import argparse
import ast
import math
import os
import shlex
from pathlib import Path
from typing import Any

from kernel.command import split_line
from kernel.faults import one_line
from kernel.files import write_json
from packing.bundle import LEFT_BY_SYSTEMS, check_not_inside, check_out, scratch_beside, swap_in
from packing.metadata import read_fit_metadata
from packing.paths import FIT, FIT_SCRIPT, KERNEL_METADATA, MEMBERS, ROOT
from packing.wheels import WHEELS

FIT_ENTRIES = {FIT_SCRIPT, KERNEL_METADATA.name}
ROOMS = ("kernel", "training")
# What Kaggle's image lacks or has in another version; constraints.txt has the same.
REQUIREMENTS = [
    *("{}=={}".format(*wheel.split("-")[:2]) for wheel in WHEELS),
    "lightning==2.6.6",
    "iterative-stratification==0.1.9",
]

OWN_OPTIONS = {  # of train.py, and what they are on Kaggle
    "--competition": "Severstal's",
    "--data": "the competition's, as it is mounted",
    "--runs": "a folder of the kernel's output",
    "--out": "the kernel's output",
    "--workers": "the number of cores a GPU",
    "--device": "the GPU that is free",
}

PATHS = ("--extra", "--start-from", "--unlabelled", "--heads-on", "--teacher")  # of train.py
CHOICES = ("held-out", "train", "none")  # of --heads-on, which are no paths

DOCSTRING = '''\
"""Fits the members of a list on Kaggle, and leaves what build_kernel.py --weights packs.

It writes the modules below to a folder, installs what the image lacks, and runs
training/kaggle_fit.py from there. Built by build_kernel.py --fit.
"""
'''
START = """\
# --- what runs ------------------------------------------------------------------------------------

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def install(requirements):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *requirements]
    if subprocess.run(pip).returncode:
        print(f"error: pip cannot install {', '.join(requirements)}: turn the kernel's internet "
              "on, for which Kaggle wants a verified phone number", file=sys.stderr)
        if not keep_earlier():
            sys.exit(1)
        print("nothing was fitted: this version's output is the last one's; push again")
        sys.exit(0)


def keep_earlier():
    # Make an earlier session's output this one's: Kaggle keeps none of a version that fails.
    records = sorted(Path("/kaggle/input").rglob("out_of_fold.json"))
    for path in records[0].parent.rglob("*") if records else ():
        if path.is_file():
            target = Path("/kaggle/working", path.relative_to(records[0].parent))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)  # without its mode: the mount is read-only
    return bool(records)


def main():
    install(REQUIREMENTS)
    with tempfile.TemporaryDirectory(prefix="fit-", ignore_cleanup_errors=True) as folder:
        for name, text in FILES.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        script = str(Path(folder, "training/kaggle_fit.py"))
        command = [sys.executable, script, *ARGUMENTS, *sys.argv[1:]]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
"""


def _literal(text: str) -> str:
    """Return a text as a literal that is read like the file itself."""
    literal = f"r'''{text}'''"
    try:
        return literal if ast.literal_eval(literal) == text else repr(text)
    except (SyntaxError, ValueError):  # it holds ''', ends in a quote or a backslash
        return repr(text)


def read_members(path: Path) -> str:
    """Return a list of members, a line each; its options are checked where they are read.

    Raises:
        ValueError: it is no text, names no member, or two of them alike, or has an option of which
            the kernel on Kaggle says itself what it is, or a path of this machine.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = [words for line in text.splitlines() if (words := split_line(line))]
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--name")
        for option in PATHS:
            parser.add_argument(option, dest="paths", nargs="*", action="extend", default=[])
        parsed = [parser.parse_known_args(words)[0] for words in lines]
        names = [each.name for each in parsed]
    except FileNotFoundError as error:
        raise ValueError(one_line(error)) from None
    except (ValueError, argparse.ArgumentError) as error:  # no UTF-8, a quote that is not closed
        raise ValueError(f"{path}: no list of members: {error}") from error
    for words in lines:
        if own := [word for word in words if word.split("=")[0] in OWN_OPTIONS]:
            raise ValueError(
                f"{path}: {shlex.join(words)}: leave {own[0]} out, with --fit it is "
                f"{OWN_OPTIONS[own[0].split('=')[0]]}"
            )
    for given in (given for each in parsed for given in each.paths if given not in CHOICES):
        if Path(given.rsplit("=", 1)[0]).exists():
            raise ValueError(f"{path}: {given}: lies on this machine, which Kaggle's does not see")
    if not names or None in names or len(set(names)) < len(names):
        raise ValueError(
            f"{path}: members {names}, expected at least one, each with a --name of its own"
        )
    return text


def join_fit_kernel(members: str, hours: float, resume: bool = False) -> str:
    """Return the script: arguments, requirements, every module as it stands, and what runs them."""
    modules = sorted(path for room in ROOMS for path in (ROOT / room).glob("*.py"))
    files = {path: path.read_text(encoding="utf-8") for path in modules} | {MEMBERS: members}
    named = ((path.relative_to(ROOT).as_posix(), text) for path, text in files.items())
    entries = "".join(f"    {name!r}: {_literal(text)},\n" for name, text in named)
    arguments = ["--hours", str(hours), *(["--resume"] if resume else [])]
    settings = f"ARGUMENTS = {arguments!r}\nREQUIREMENTS = {REQUIREMENTS!r}\n"
    return f"{DOCSTRING}\n{settings}\nFILES = {{\n{entries}}}\n\n{START}"


def check_fit(folder: Path) -> None:
    """Raise ValueError where a folder that is to be replaced holds what is no fit kernel."""
    check_not_inside(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another --out")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set[str]()
    if others := found - FIT_ENTRIES - LEFT_BY_SYSTEMS:
        raise ValueError(
            f"{folder}: holds other things than a fit kernel ({min(others)}); choose another --out"
        )


def build_fit(
    out: Path, owner: str | None, members: Path, hours: float, resume: bool
) -> dict[str, Any]:
    """Write the kernel to `out`/fit, beside a bundle or alone; return its metadata.

    Raises:
        ValueError: `out` holds other things, Kaggle would refuse the metadata, or the list of
            members is none.
    """
    out = Path(os.path.realpath(out))
    check_out(out)
    check_fit(out / FIT)
    if not (math.isfinite(hours) and hours > 0):
        raise ValueError(f"--hours {hours}, expected a number above 0")
    metadata = read_fit_metadata(owner, resume)
    script = join_fit_kernel(read_members(members), hours, resume)
    with scratch_beside(out) as scratch:
        out.mkdir(exist_ok=True)
        folder = scratch / FIT
        folder.mkdir()
        (folder / FIT_SCRIPT).write_text(script, encoding="utf-8")
        write_json(folder / KERNEL_METADATA.name, metadata, sort_keys=True)
        swap_in(folder, out / FIT, scratch / "previous")
    return metadata
