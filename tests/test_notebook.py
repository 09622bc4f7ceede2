"""The kernel as a notebook: valid, the same code, and run by Jupyter's own machinery."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import nbformat
import numpy as np
import pytest
from kaggle_stub import run_client, serve

from build_kernel import CODE, GUARD, build, join_modules, notebook_of, write_json
from kernel import dry_run
from kernel.mounts import read_sample
from kernel.validate import check_submission
from weights import steel

EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
source, target, folder = sys.argv[1:]
notebook = nbformat.read(source, as_version=4)
client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": folder}})
client.execute()
nbformat.write(notebook, target)
"""


def code_cells(notebook: dict[str, Any]) -> list[str]:
    return [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_valid_notebook_of_the_same_code_that_explains_itself_first() -> None:
    code = join_modules(CODE)
    notebook = notebook_of(code)
    nbformat.validate(nbformat.from_dict(notebook))
    *sections, run, picture = code_cells(notebook)
    assert len(sections) == code.count("\n# --- ") + 1
    words = "\n".join(sections).split()
    assert words == code.removesuffix(GUARD).split()
    assert run.endswith("main(ARGUMENTS)")
    assert "contact_sheet" in picture
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown" and "submission.csv" in first["source"]


def test_code_without_its_last_lines_is_no_kernel() -> None:
    with pytest.raises(ValueError, match="does not end in"):
        notebook_of("x = 1\n")


def execute(notebook: Path, folder: Path) -> nbformat.NotebookNode:
    """Jupyter's run of it in `folder`; a cell that fails fails the test."""
    target = folder.parent / "executed.ipynb"
    own = {"HOME": str(folder.parent), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(notebook), str(target), str(folder)],
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return nbformat.read(target, as_version=4)


def test_what_is_pushed_runs_in_jupyter_and_shows_what_it_found(
    tiny_weights: Path, tmp_path: Path
) -> None:
    build(tiny_weights, tmp_path / "dist", "somebody", notebook=True)
    kernel = tmp_path / "dist" / "kernel"
    built = {path.name: path.read_bytes() for path in kernel.iterdir()}
    assert set(built) == {"inference.ipynb", "kernel-metadata.json"}
    write_json(tmp_path / "again.ipynb", notebook_of(join_modules(CODE)))
    assert built["inference.ipynb"] == (tmp_path / "again.ipynb").read_bytes()
    with serve() as kaggle:
        run_client(kaggle, tmp_path, "kernels", "push", "-p", kernel)
    [pushed] = kaggle.kernels.values()
    assert (pushed["kernelType"], pushed["language"]) == ("notebook", "python")
    assert pushed["enableInternet"] is False

    steel.write_competition(tmp_path / "steel", train=0, test=3, seed=4, size=(64, 96))
    images = tmp_path / "steel" / "test_images"
    sample = dry_run.lay_tree(tmp_path, tmp_path / "dist", images)
    arguments = ["--input", str(tmp_path / "input")]
    text = json.dumps(arguments).replace('"', '\\"')
    assert pushed["text"].count("ARGUMENTS: list[str] = []") == 1
    path = tmp_path / "pushed.ipynb"
    path.write_text(pushed["text"].replace("list[str] = []", f"list[str] = {text}"))
    cells = execute(path, tmp_path / "working")["cells"]

    layout, pairs = read_sample(sample, None, 4)
    submission = tmp_path / "working" / "submission.csv"
    assert check_submission(submission, layout.columns, pairs, images).errors == []
    said = "".join(output.get("text", "") for output in cells[-2]["outputs"])
    assert " INFO valid\n" in said
    [picture] = [output["data"]["image/jpeg"] for output in cells[-1]["outputs"]]
    sheet = cv2.imdecode(np.frombuffer(base64.b64decode(picture), np.uint8), cv2.IMREAD_COLOR)
    assert sheet.shape[1] == 96
    assert (np.ptp(sheet.astype(int), axis=2) > 60).any()  # colour on grey steel
