"""The real Kaggle client: what it uploads is the bundle, what it pushes runs from that alone."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import site_without_smp
from kaggle_stub import Kaggle, run_client, serve

from kernel import dry_run
from kernel.inference import SAMPLE, read_rows, read_sample
from kernel.validate import check_submission
from weights import steel

pytestmark = pytest.mark.skipif(not find_spec("kaggle"), reason="Kaggle's client is not installed")

COMPETITION = "severstal-steel-defect-detection"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lay_arrived(kaggle: Kaggle, dataset: str, strips: Path, root: Path) -> Path:
    """Kaggle's tree of what arrived, read-only, in which nothing else of the build is."""
    mounted = root / "input" / "datasets" / dataset
    mounted.mkdir(parents=True)
    for name, content in kaggle.datasets[dataset].items():
        (mounted / name).write_bytes(content)
    competition = root / "input" / "competitions" / COMPETITION
    shutil.copytree(strips, competition)
    names = sorted(path.name for path in (strips / "test_images").iterdir())
    rows = "".join(f"{name},1 6144,0\n" for name in names)
    (competition / SAMPLE).write_text(f"ImageId,EncodedPixels,ClassId\n{rows}")
    for path in (root / "input").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (root / "working").mkdir()
    return competition / SAMPLE


def run_as_kaggle(root: Path, text: str) -> subprocess.CompletedProcess[str]:
    """The pushed script, with no network where the system allows that, no SMP and no timm."""
    script = root / "src" / "script.py"
    script.parent.mkdir()
    script.write_text(text, encoding="utf-8")
    python = [getattr(sys, "_base_executable", sys.executable), "-S"]
    bare = {"PYTHONPATH": str(site_without_smp(root / "site")), "PATH": os.environ["PATH"]}
    command = [*dry_run.without_network(), *python, str(script), "--input", str(root / "input")]
    return subprocess.run(
        command, env=bare, cwd=root / "working", capture_output=True, text=True, check=False
    )


def test_what_the_client_sends_runs_on_kaggle(tiny_bundle: Path, tmp_path: Path) -> None:
    steel.write_competition(tmp_path / "strips", train=0, test=3, seed=4, size=(64, 96))
    with serve() as kaggle:
        said = run_client(kaggle, tmp_path, "datasets", "create", "-p", tiny_bundle / "dataset")
        assert "Your private Dataset is being created" in said
        assert "kipping" not in said
        said = run_client(kaggle, tmp_path, "kernels", "push", "-p", tiny_bundle / "kernel")
        assert "successfully pushed" in said
        assert "title" not in said and "not valid" not in said
    [(dataset, files)] = kaggle.datasets.items()
    built = contents(tiny_bundle / "dataset")
    metadata = json.loads(built.pop("dataset-metadata.json"))  # the client's own, never uploaded
    assert files == built
    assert dataset == metadata["id"] == "somebody/severstal-steel-ensemble"
    created = kaggle.requests["CreateDataset"]
    assert (created["title"], created["licenseName"]) == (metadata["title"], "other")
    assert created["isPrivate"] is True

    [(name, kernel)] = kaggle.kernels.items()
    assert name == "somebody/severstal-steel-ensemble-submission"
    assert kernel["datasetDataSources"] == [dataset]
    assert kernel["competitionDataSources"] == [COMPETITION]
    assert not {"kernelDataSources", "modelDataSources"} & set(kernel)  # empty ones are not sent
    assert (kernel["kernelType"], kernel["language"]) == ("script", "python")
    assert kernel["enableInternet"] is False
    assert kernel["enableGpu"] is kernel["isPrivate"] is True
    assert kernel["machineShape"] == "NvidiaTeslaT4"

    sample = lay_arrived(kaggle, dataset, tmp_path / "strips", tmp_path)
    before = contents(tmp_path / "input")
    ended = run_as_kaggle(tmp_path, kernel["text"])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert contents(tmp_path / "input") == before
    assert " INFO valid\n" in ended.stdout
    assert {path.name for path in (tmp_path / "working").iterdir()} == {"submission.csv"}
    layout, pairs = read_sample(sample, None, 4)
    submission = tmp_path / "working" / "submission.csv"
    findings = check_submission(submission, layout.columns, pairs, sample.parent / "test_images")
    assert findings.errors == []
    assert len(pairs) == 12
    assert any(rle for *_, rle in read_rows(submission)[1])


def test_a_later_version_replaces_the_files(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(tiny_bundle / "dataset", folder)
    with serve() as kaggle:
        run_client(kaggle, tmp_path, "datasets", "create", "-p", folder)
        refused = run_client(kaggle, tmp_path, "datasets", "create", "-p", folder)
        assert "already in use" in refused
        (folder / "unet-a.safetensors").unlink()
        (folder / "ensemble.json").write_text("{}")
        run_client(kaggle, tmp_path, "datasets", "version", "-p", folder, "-m", "without a member")
    assert kaggle.calls.count("CreateDataset") == kaggle.calls.count("CreateDatasetVersion") == 1
    built = contents(folder)
    del built["dataset-metadata.json"]
    assert kaggle.datasets["somebody/severstal-steel-ensemble"] == built
    assert kaggle.requests["CreateDatasetVersion"]["body"]["versionNotes"] == "without a member"
