"""The kernel as a notebook: valid, the same code, and run by Jupyter's own machinery."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import nbformat
import numpy as np
import pytest
from helpers import (
    LABELS,
    SMALL,
    draw_described,
    read_submission,
    save_strips,
    shrunk,
    write_described,
    write_sample,
)
from kaggle_stub import run_client, serve

from kernel.competition import SEVERSTAL
from kernel.files import write_json
from kernel.kaggle import SCORED_RUN
from kernel.mounts import SAMPLE
from kernel.shipped import find_competition
from kernel.task import read_sample
from kernel.validator import check_submission
from packing.bundle import build
from packing.joining import GUARD, join_modules
from packing.notebook import RUN_CELL, build_notebook, written_cells
from packing.paths import SCRIPT

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
    code = join_modules(SCRIPT)
    notebook = build_notebook(code)
    nbformat.validate(notebook)
    *sections, run, picture = code_cells(notebook)
    assert len(sections) == code.count("\n# --- ") + 1
    words = "\n".join(sections).split()
    assert words == code.removesuffix(GUARD).split()
    assert run.endswith("main(ARGUMENTS)")
    assert "draw_found(ARGUMENTS)" in picture
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown" and "submission.csv" in first["source"]


def test_what_no_file_is_needed_for_goes_without_one() -> None:
    """A notebook has no `__file__`, and an error names the descriptions that ship beside it."""
    names = dict[str, Any](__name__="__main__")
    exec(join_modules(SCRIPT).removesuffix(GUARD), names)
    assert names["shipped_names"]() == []


@pytest.mark.parametrize("scored", [True, False])
def test_the_last_cell_looks_at_nothing_in_the_scored_run(
    scored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is written then, nobody sees a picture, and a read may hang."""
    monkeypatch.setenv(SCORED_RUN, "1" if scored else "")
    names = dict[str, Any](__name__="__main__", ARGUMENTS=["--layout", "two-column"])
    *sections, _, picture = code_cells(build_notebook(join_modules(SCRIPT)))
    exec("\n".join(sections), names)
    drawn = list[list[str]]()
    names["draw_found"] = drawn.append
    exec(picture, names)
    assert drawn == ([] if scored else [names["ARGUMENTS"]])


@pytest.mark.parametrize(
    "written",
    [
        RUN_CELL.replace("= []", '= ["--layout", "two-column"]'),
        RUN_CELL.replace("\n", '\nARGUMENTS += ["--layout", "two-column"]\n'),
        'ARGUMENTS = [\n  "--input",  # mine\n  "a = [1]",\n]\nmain(ARGUMENTS)',
        'main(["--layout", "two-column"])',
        "try:\n    main(ARGUMENTS)\nfinally:\n    print(1)",
        RUN_CELL + "\n1 +",  # no Python
        "",
    ],
)
@pytest.mark.parametrize("lines", [False, True])
def test_what_was_written_into_the_cell_that_runs_is_found(
    written: str, lines: bool, tmp_path: Path
) -> None:
    notebook = build_notebook(join_modules(SCRIPT))
    [run] = [each for each in notebook["cells"] if each["source"] == RUN_CELL]
    for text in (RUN_CELL, written):
        run["source"] = text.splitlines(keepends=True) if lines else text  # as Jupyter saves it
        write_json(tmp_path / "a.ipynb", notebook)
        assert written_cells(tmp_path / "a.ipynb") == ("" if text == RUN_CELL else written)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"cells": [{}]}', '{"cells": [1]}'])
def test_nothing_was_written_into_what_is_no_notebook_of_the_kernel(
    text: str | None, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "a.ipynb").write_text(text)
    assert written_cells(tmp_path / "a.ipynb") == ""


def test_a_build_says_what_the_notebook_had_that_it_replaces(
    session_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dist, given = tmp_path / "dist", 'main(["--layout", "two-column"])'
    notebook = dist / "kernel" / "inference.ipynb"
    build(session_weights, dist, "somebody", notebook=True)
    text = notebook.read_text().replace("main(ARGUMENTS)", json.dumps(given)[1:-1])
    notebook.write_text(text)
    capsys.readouterr()
    build(session_weights, dist, "somebody")
    said = f"{notebook}: no build keeps what you wrote there:\n"
    written = RUN_CELL.replace("main(ARGUMENTS)", given)
    assert capsys.readouterr().out == f"{said}{written}\n"
    build(session_weights, dist, "somebody")
    assert capsys.readouterr().out == ""


def execute(notebook: Path, folder: Path) -> list[dict[str, Any]]:
    """Its cells after Jupyter's run in `folder`; a cell that fails fails the test."""
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
    read: Any = nbformat.read  # untyped
    cells: list[dict[str, Any]] = read(target, as_version=4)["cells"]
    return cells


def write_pushed(text: str, folder: Path) -> Path:
    """A pushed notebook that takes its input from `folder`/input."""
    arguments = json.dumps(["--input", str(folder / "input")]).replace('"', '\\"')
    assert text.count("ARGUMENTS: list[str] = []") == 1
    path = folder / "pushed.ipynb"
    path.write_text(text.replace("list[str] = []", f"list[str] = {arguments}"))
    return path


def test_what_is_pushed_runs_in_jupyter_and_shows_what_it_found(
    session_weights: Path, tmp_path: Path
) -> None:
    build(session_weights, tmp_path / "dist", "somebody", notebook=True)
    kernel = tmp_path / "dist" / "kernel"
    built = {path.name: path.read_bytes() for path in kernel.iterdir()}
    assert set(built) == {"inference.ipynb", "kernel-metadata.json"}
    again = build_notebook(join_modules(SCRIPT))
    write_json(tmp_path / "again.ipynb", again, sort_keys=True)
    assert built["inference.ipynb"] == (tmp_path / "again.ipynb").read_bytes()
    with serve() as kaggle:
        run_client(kaggle, tmp_path, "kernels", "push", "-p", kernel)
    [pushed] = kaggle.kernels.values()
    assert (pushed["kernelType"], pushed["language"]) == ("notebook", "python")
    assert pushed["enableInternet"] is False

    mounted = tmp_path / "input"
    shutil.copytree(tmp_path / "dist" / "dataset", mounted / "bundle")
    images, names = mounted / "competition" / "test_images", ["b.jpg", "c.jpg", "a.jpg"]
    save_strips(images, names)
    sample = write_sample(images.with_name(SAMPLE), names)
    (tmp_path / "working").mkdir()
    cells = execute(write_pushed(pushed["text"], tmp_path), tmp_path / "working")

    layout, pairs = read_sample(sample, SEVERSTAL)
    submission = tmp_path / "working" / "submission.csv"
    assert check_submission(submission, layout.columns, pairs, SEVERSTAL, images).errors == []
    assert list(read_submission(submission)) == [(name, c) for name in names for c in LABELS]
    said = "".join(output.get("text", "") for output in cells[-2]["outputs"])
    assert " INFO valid\n" in said
    [picture] = [output["data"]["image/jpeg"] for output in cells[-1]["outputs"]]
    sheet = cv2.imdecode(np.frombuffer(base64.b64decode(picture), np.uint8), cv2.IMREAD_COLOR)
    assert sheet is not None and sheet.shape[1] == SMALL[1]
    assert (np.ptp(sheet.astype(int), axis=2) > 60).any()  # colour on grey steel


def test_another_competition_goes_through_the_client_and_jupyter_by_its_description(
    tmp_path: Path,
) -> None:
    clouds, dist = shrunk(find_competition("clouds")), tmp_path / "dist"
    weights = write_described(tmp_path / "weights", clouds)
    build(weights, dist, "somebody", notebook=True, competition=clouds)
    with serve() as kaggle:
        said = run_client(kaggle, tmp_path, "datasets", "create", "-p", dist / "dataset")
        said += run_client(kaggle, tmp_path, "kernels", "push", "-p", dist / "kernel")
    assert "being created" in said and "successfully pushed" in said
    assert "kipping" not in said and "not valid" not in said
    [(dataset, files)] = kaggle.datasets.items()
    assert dataset == "somebody/understanding-cloud-ensemble"
    [(name, pushed)] = kaggle.kernels.items()
    assert name == "somebody/understanding-cloud-ensemble-submission"
    assert pushed["competitionDataSources"] == ["understanding_cloud_organization"]
    assert pushed["datasetDataSources"] == [dataset]
    assert clouds.title in pushed["text"] and "Severstal" not in pushed["text"].split("# --- ")[0]

    mounted = tmp_path / "input"
    (mounted / "bundle").mkdir(parents=True)
    for file, content in files.items():
        (mounted / "bundle" / file).write_bytes(content)
    (mounted / "clouds").mkdir()
    names = list(draw_described(mounted / "clouds" / "test_images", clouds))
    rows = [f"{each}_{label},1 1" for each in names for label in clouds.classes]
    sample = mounted / "clouds" / SAMPLE
    sample.write_text("\n".join(["Image_Label,EncodedPixels", *rows, ""]))
    (tmp_path / "working").mkdir()
    cells = execute(write_pushed(pushed["text"], tmp_path), tmp_path / "working")

    said = "".join(output.get("text", "") for output in cells[-2]["outputs"])
    assert " INFO valid\n" in said
    text = (tmp_path / "working" / "submission.csv").read_text()
    assert [line.split(",")[0] for line in text.splitlines()[1:]] == [r.split(",")[0] for r in rows]
    assert any(line.split(",")[1] for line in text.splitlines()[1:])
