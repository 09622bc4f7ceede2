"""Descriptions that ship with the project, by name: for its commands, and for what errors say.

The one file that Kaggle runs has none beside it.
"""

import argparse
from pathlib import Path

from kernel.checks import nearest_of, read_json
from kernel.competition import SEVERSTAL, Competition, parse_competition

INSTANCES = {  # slug → how they are written
    "airbus": "a row a ship",  # as one may call it
    "airbus-ship-detection": "a row a ship",
    "data-science-bowl-2018": "a row a nucleus",
    "sartorius-cell-instance-segmentation": "a row a cell",
    "hubmap-hacking-the-human-vasculature": "a code a vessel",
    "recodai-luc-scientific-image-forgery-detection": "a code a copied region",
}
RELATIVE = ("siim", "siim-acr-pneumothorax-segmentation")  # slugs


def _shipped_folder() -> Path:
    return Path(__file__).resolve().parents[1] / "competitions"


def shipped_names() -> list[str]:
    """Return the names of the descriptions that ship; none in a notebook, which has no file."""
    if "__file__" not in globals():
        return []
    return sorted(path.stem for path in _shipped_folder().glob("*.json"))


def add_competition_option(parser: argparse._ActionsContainer) -> None:
    """Add --competition, which `find_competition` reads."""
    names = ", ".join(shipped_names())
    about = f"a description that ships ({names}) or the path of another"
    parser.add_argument("--competition", metavar="NAME", help=about)


def check_scoring(slug: str, where: str) -> None:
    """Raise ValueError for one that scores instances or reads other codes; `where` names it."""
    if slug in INSTANCES:
        raise ValueError(
            f"{where}: scores instances, {INSTANCES[slug]}; this pipeline writes one mask of each "
            "class, so it does not fit"
        )
    if slug in RELATIVE:
        raise ValueError(
            f"{where}: reads relative codes, each start counted from the end of the run before; "
            "this pipeline writes absolute starts, so it does not fit"
        )


def find_competition(asked: str | None) -> Competition:
    """Return a shipped description by its name, or the one at a path; Severstal's for None.

    Raises:
        ValueError: there is none, it breaks a rule, or the competition is one that does not fit.
    """
    if asked is None:
        return SEVERSTAL
    check_scoring(asked, f"--competition {asked}")
    shipped = asked in shipped_names()
    path = _shipped_folder() / f"{asked}.json" if shipped else Path(asked)
    if not path.is_file():
        near = nearest_of(asked, shipped_names())
        raise ValueError(f"--competition {asked}: neither a file nor a shipped one; {near}")
    found = parse_competition(read_json(path), path)
    check_scoring(found.slug, f"{path}: slug {found.slug}")
    return found
