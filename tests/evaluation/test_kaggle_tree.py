"""The Kaggle-like tree, and the kernel's process in it: without SMP, without a network."""

import contextlib
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import UNSHARE, may_deny_network, read_table, save_strips, site_without_smp

from evaluation.kaggle_tree import (
    join_cells,
    make_kaggle_tree,
    network_denial,
    run_kernel,
    runnable_script,
)
from kernel.competition import COMPETITION
from kernel.manifest import load_manifest
from kernel.worker import find_script
from packing.joining import GUARD
from packing.notebook import build_notebook
from packing.paths import NOTEBOOK

# --- the tree -------------------------------------------------------------------------------------


def test_the_tree_has_the_mounts_that_kaggle_makes(
    tiny_bundle: Path, labelled_strips: Path, tmp_path: Path
) -> None:
    made = make_kaggle_tree(tmp_path, tiny_bundle, labelled_strips / "test_images")
    competition = tmp_path / "input" / "competitions" / "severstal-steel-defect-detection"
    assert made == competition / "sample_submission.csv"
    slug = json.loads((tiny_bundle / "dataset" / "dataset-metadata.json").read_text())["id"]
    assert (tmp_path / "input" / "datasets" / slug / "ensemble.json").is_file()
    sample = made.read_text().splitlines()
    assert sample[0] == "ImageId,EncodedPixels,ClassId"
    assert len(sample) == 3
    assert all(line.endswith(",1 409600,0") for line in sample[1:])
    assert len(list((competition / "test_images").iterdir())) == 2


def test_images_of_another_suffix_than_the_competitions_get_no_row(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle, images = Path(shutil.copytree(tiny_bundle, tmp_path / "dist")), tmp_path / "images"
    described = asdict(replace(load_manifest(bundle / "dataset").competition, suffix=".png"))
    (bundle / "dataset" / COMPETITION).write_text(json.dumps(described))
    save_strips(images, ["a.jpg", "b.png", "c.png"])
    made = make_kaggle_tree(tmp_path / "all", bundle, images)
    assert [line.split(",")[0] for line in made.read_text().splitlines()[1:]] == ["b", "c"]


def test_what_lies_beside_the_images_is_not_mounted(
    tiny_bundle: Path, labelled_strips: Path, tmp_path: Path
) -> None:
    """A second sample or manifest there would end the run as ambiguous."""
    images = Path(shutil.copytree(labelled_strips / "test_images", tmp_path / "images"))
    for name in ("sample_submission.csv", "ensemble.json", "notes.txt"):
        (images / name).touch()
    made = make_kaggle_tree(tmp_path, tiny_bundle, images)
    found = [path.name for path in (made.parent / "test_images").iterdir()]
    assert len(found) == 2 and not {"sample_submission.csv", "ensemble.json"} & set(found)


# --- a notebook -----------------------------------------------------------------------------------

KERNEL = '"""Kernel."""\n\n# --- a.py ---\n\nx = 1\n\n\n# --- b.py ---\n\ndef main(given=None):\n'
KERNEL += "    print(x, given)\n    raise SystemExit(3)\n" + GUARD


def write_notebook(
    bundle: Path, code: str, arguments: list[str], as_jupyter_saves_it: bool = False
) -> Path:
    """Write a kernel as a notebook; return it as the script that a rehearsal in `bundle` runs."""
    notebook = build_notebook(code)
    run_cell = notebook["cells"][-2]
    run_cell["source"] = run_cell["source"].replace("= []", f"= {arguments!r}")
    if as_jupyter_saves_it:
        for cell in notebook["cells"]:
            cell["source"] = cell["source"].splitlines(keepends=True)
    for name in ("kernel", "working"):
        (bundle / name).mkdir()
    (bundle / "kernel" / NOTEBOOK).write_text(json.dumps(notebook))
    return runnable_script(bundle, bundle)


@pytest.mark.parametrize("as_jupyter_saves_it", [False, True])
def test_a_notebook_runs_with_its_own_arguments_and_the_input_of_the_tree(
    as_jupyter_saves_it: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = write_notebook(tmp_path, KERNEL, ["--layout two-column"], as_jupyter_saves_it)
    assert "IPython" not in script.read_text() and "# Severstal" not in script.read_text()
    assert run_kernel(tmp_path, script, quiet=True).exit_code == 3
    given = ["--layout two-column", "--input", str(tmp_path / "input")]
    assert capsys.readouterr().out == f"1 {given}\n"


def test_a_notebooks_paths_below_kaggle_input_are_those_of_the_tree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--sample", "/kaggle/input/a b/s.csv", "--bundle=/kaggle/input/b", "/kaggle/inputs"]
    script = write_notebook(tmp_path, KERNEL, [*given, "/kaggle/input"])
    assert run_kernel(tmp_path, script, quiet=True).exit_code == 3
    root = str(tmp_path / "input")
    there = ["--sample", f"{root}/a b/s.csv", f"--bundle={root}/b", "/kaggle/inputs", root]
    assert capsys.readouterr().out == f"1 {[*there, '--input', root]}\n"


def test_a_notebooks_workers_run_the_datasets_script_as_on_kaggle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = f"from pathlib import Path\n\n\n{inspect.getsource(find_script)}"
    code = KERNEL.replace("x = 1\n", f"{worker}\n\nx = find_script(Path('bundle'))\n")
    script = write_notebook(tmp_path, code, [])
    assert run_kernel(tmp_path, script, quiet=True).exit_code == 3
    assert capsys.readouterr().out.startswith("bundle/inference.py ")


def test_the_kernel_is_the_script_that_was_packed(tmp_path: Path) -> None:
    assert runnable_script(tmp_path / "dist", tmp_path) == tmp_path / "dist/kernel/inference.py"


@pytest.mark.parametrize("text", ["{}", '{"cells": [7]}', '{"cells": [{"cell_type": "code"}]}'])
def test_what_is_no_notebook_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / NOTEBOOK).write_text(text)
    with pytest.raises(ValueError, match=rf"{NOTEBOOK}: no notebook: build the bundle again"):
        join_cells(tmp_path / NOTEBOOK)


# --- the network ----------------------------------------------------------------------------------


def test_the_network_is_denied_where_the_system_allows_it() -> None:
    if not may_deny_network():
        pytest.skip("this system does not allow a process to give up its network")
    assert network_denial() == UNSHARE


@pytest.mark.parametrize(
    ("code", "denial"), [(0, UNSHARE), (1, []), (None, [])], ids=["allowed", "refused", "missing"]
)
def test_the_network_is_denied_by_a_program_that_is_tried_first(
    code: int | None, denial: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if code is not None:
        program = tmp_path / "unshare"
        program.write_text(f"#!/bin/sh\nexit {code}\n")
        program.chmod(0o755)
    assert network_denial() == denial


def test_a_rehearsal_in_an_unattended_session_on_kaggle_stays_in_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the kernel would go where Kaggle takes the session's own output from."""
    (tmp_path / "working").mkdir()
    script = tmp_path / "script.py"
    script.write_text("import os\nprint([n for n in os.environ if 'KAGGLE' in n])\nexit(3)\n")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")  # there nothing would be refused
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run_kernel(tmp_path, script, quiet=True).exit_code == 3
    assert printed.getvalue().strip() == "[]"


# --- the whole path -------------------------------------------------------------------------------


def test_the_whole_path_runs_without_smp_and_without_a_network(
    built_bundle: Path, labelled_strips: Path, tmp_path: Path
) -> None:
    if not may_deny_network():
        pytest.skip("this system does not allow a process to give up its network")
    make_kaggle_tree(tmp_path, built_bundle, labelled_strips / "test_images")
    python = [getattr(sys, "_base_executable", sys.executable), "-S"]
    bare = {"PYTHONPATH": str(site_without_smp(tmp_path / "site")), "PATH": os.environ["PATH"]}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*UNSHARE, *python, *arguments],
            env=bare, cwd=tmp_path / "working", capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert "No module named" in run("-c", "import segmentation_models_pytorch").stderr
    assert "No module named" in run("-c", "import timm").stderr
    reach = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    assert "unreachable" in run("-c", reach).stderr
    kernel = str(built_bundle / "kernel" / "inference.py")
    done = run(kernel, "--input", str(tmp_path / "input"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_table(tmp_path / "working" / "submission.csv")
    assert len(rows) == 8
    assert (rows.EncodedPixels != "").any()
