"""The kernel as a notebook: a cell a section, then one that runs it, then one with the masks."""

import json
import re
from pathlib import Path
from typing import Any

from kernel.competition import SEVERSTAL
from packing.joining import GUARD

TITLE_CELL = """\
# TITLE, an ensemble of segmentation networks

Every strip goes once through every member under every flip; the mean of the probabilities over the
threshold becomes `submission.csv`. Add the competition and the bundle's dataset as inputs, turn the
internet off and the GPU on. The cells below are the bundle's `inference.py`, section by section;
the last two run it and show what it found. Built by `build_kernel.py --notebook`."""

RUN_CELL = """\
ARGUMENTS: list[str] = []  # as on the command line, such as ["--no-early-exit"]
main(ARGUMENTS)"""

PICTURE_CELL = """\
try:
    import IPython.display

    if not is_scored_run():  # nobody looks on, and a read may hang
        sheet = draw_found(ARGUMENTS)
        display(IPython.display.Image(data=cv2.imencode(".jpg", sheet)[1].tobytes()))
except Exception as error:  # a picture must not cost the submission
    log.warning("no contact sheet: %s", error)"""


def build_notebook(code: str, title: str = SEVERSTAL.title) -> dict[str, Any]:
    """Return the joined code as a notebook of format 4.5, a cell for each of its sections."""
    assert code.endswith(GUARD)  # what runs a script, which a notebook leaves out
    sections = re.split(r"\n+(?=# --- )", code.removesuffix(GUARD).rstrip("\n"))
    cells, heading = [*sections, RUN_CELL, PICTURE_CELL], TITLE_CELL.replace("TITLE", title)
    return {
        "cells": [
            {"cell_type": "markdown", "id": "title", "metadata": {}, "source": heading},
            *(_code_cell(number, source) for number, source in enumerate(cells)),
        ],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def written_cells(notebook: Path) -> str:
    """Return what was written into a notebook's cells that give the arguments and run the kernel.

    Nothing where they are as they were built, or where there is no notebook.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells]  # Jupyter saves a list of lines
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    runs = [each for each in sources if re.search(r"^ *(ARGUMENTS|main\()", each, re.MULTILINE)]
    return "\n".join(cell for cell in runs if cell != RUN_CELL)


def _code_cell(number: int, source: str) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "id": f"cell-{number}",
        "execution_count": None,
        "metadata": {},
        "outputs": [],
        "source": source,
    }
