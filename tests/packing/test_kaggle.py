"""The real Kaggle client: what it uploads is the bundle, what it pushes runs from that alone."""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import (
    LABELS,
    all_bytes,
    read_submission,
    save_strips,
    site_without_smp,
    write_sample,
)
from kaggle_stub import Kaggle, customize_site, run_client, run_with_client, serve

from evaluation.kaggle_tree import network_denial
from kernel.competition import SEVERSTAL
from kernel.kaggle import KAGGLE_RUN, UNATTENDED, WORKING
from kernel.manifest import load_manifest
from kernel.mounts import SAMPLE
from kernel.task import read_sample
from kernel.validator import check_submission
from packing.metadata import check_dataset, check_kernel, find_owner, read_metadata, slugify
from packing.paths import KERNEL_METADATA
from packing.summary import print_next

pytestmark = pytest.mark.skipif(not find_spec("kaggle"), reason="Kaggle's client is not installed")

COMPETITION = "severstal-steel-defect-detection"


NAMES = ["b.jpg", "c.jpg", "a.jpg"]  # in the sample's order


def mount_arrived(kaggle: Kaggle, dataset: str, root: Path) -> Path:
    """Kaggle's tree of what arrived, read-only, in which nothing else of the build is."""
    mounted = root / "input" / "datasets" / dataset
    mounted.mkdir(parents=True)
    for name, content in kaggle.datasets[dataset].items():
        (mounted / name).write_bytes(content)
    competition = root / "input" / "competitions" / COMPETITION
    save_strips(competition / "test_images", NAMES)
    sample = write_sample(competition / SAMPLE, NAMES)
    for path in (root / "input").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (root / "working").mkdir()
    return sample


def run_as_kaggle(root: Path, text: str) -> subprocess.CompletedProcess[str]:
    """The pushed script, with no network where the system allows that, no SMP and no timm.

    It starts in its own folder, and its log goes to a file, unless it does something about them.
    """
    script = root / "src" / "script.py"
    script.parent.mkdir()
    assert text.count(f'"{WORKING}"') == 1
    script.write_text(text.replace(f'"{WORKING}"', repr(str(root / "working"))), encoding="utf-8")
    python = getattr(sys, "_base_executable", sys.executable)
    customize_site(site_without_smp(root / "site"), root / "kaggle.log", bare=True)
    bare = {"PYTHONPATH": str(root / "site"), "PATH": os.environ["PATH"], KAGGLE_RUN: UNATTENDED}
    command = [*network_denial(), python, str(script), "--input", str(root / "input")]
    return subprocess.run(
        command, env=bare, cwd=script.parent, capture_output=True, text=True, check=False
    )


def commands_told(bundle: Path, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """What a build says to type after `kaggle`."""
    manifest = load_manifest(bundle / "dataset")
    print_next(bundle, read_metadata("somebody", manifest), manifest.competition.slug)
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("  kaggle ")]


def check_created(kaggle: Kaggle, bundle: Path) -> str:
    """The dataset that arrived is the one that was built; returns its name."""
    [(dataset, files)] = kaggle.datasets.items()
    built = all_bytes(bundle / "dataset")
    metadata = json.loads(built.pop("dataset-metadata.json"))  # the client's own, never uploaded
    assert files == built
    assert dataset == metadata["id"] == "somebody/severstal-steel-ensemble"
    created = kaggle.requests["CreateDataset"]
    assert (created["title"], created["licenseName"]) == (metadata["title"], "other")
    assert created["isPrivate"] is True
    return dataset


def check_pushed(kaggle: Kaggle, dataset: str) -> str:
    """The kernel that arrived runs offline, on a T4, from that dataset; returns its script."""
    kernel = kaggle.kernels["somebody/severstal-steel-ensemble-submission"]
    assert kernel["datasetDataSources"] == [dataset]
    assert kernel["competitionDataSources"] == [COMPETITION]
    assert not {"kernelDataSources", "modelDataSources"} & set(kernel)  # empty ones are not sent
    assert (kernel["kernelType"], kernel["language"]) == ("script", "python")
    assert kernel["enableInternet"] is False
    assert kernel["enableGpu"] is kernel["isPrivate"] is True
    assert kernel["machineShape"] == "NvidiaTeslaT4"
    return str(kernel["text"])


def check_submitted(kaggle: Kaggle) -> None:
    """What was submitted is the kernel's only version."""
    [name], submitted = kaggle.kernels, kaggle.requests["CreateCodeSubmission"]
    assert submitted["competitionName"] == COMPETITION
    assert f"{submitted['kernelOwner']}/{submitted['kernelSlug']}" == name
    assert (submitted["kernelVersion"], submitted["fileName"]) == (1, "submission.csv")


def check_ran(root: Path, sample: Path) -> None:
    """The run left a whole submission with masks, run.json, and nothing else."""
    assert [path.name for path in (root / "src").iterdir()] == ["script.py"]
    left = {path.name for path in (root / "working").iterdir()}
    assert left == {"submission.csv", "run.json"}
    assert not list((root / "site").glob("segmentation_models_pytorch*"))
    layout, pairs = read_sample(sample, SEVERSTAL)
    submission = root / "working" / "submission.csv"
    findings = check_submission(
        submission, layout.columns, pairs, SEVERSTAL, sample.parent / "test_images"
    )
    assert findings.errors == []
    rows = read_submission(submission)
    assert list(rows) == [(name, label) for name in NAMES for label in LABELS]
    assert any(rows.values())


def test_what_the_client_sends_runs_on_kaggle(
    built_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create, status, push, wait, submit = commands_told(built_bundle, capsys)
    with serve() as kaggle:
        said = run_client(kaggle, tmp_path, *create)
        assert "Your private Dataset is being created" in said
        assert "kipping" not in said
        assert run_client(kaggle, tmp_path, *status).splitlines()[-1] == "ready"
        said = run_client(kaggle, tmp_path, *push)
        [version] = re.findall(r"Kernel version (\d+) successfully pushed", said)
        assert "title" not in said and "not valid" not in said
        assert "COMPLETE" in run_client(kaggle, tmp_path, *wait)
        run_client(kaggle, tmp_path, *(version if w == "VERSION" else w for w in submit))
    dataset = check_created(kaggle, built_bundle)
    script = check_pushed(kaggle, dataset)
    check_submitted(kaggle)

    sample = mount_arrived(kaggle, dataset, tmp_path)
    before = all_bytes(tmp_path / "input")
    ended = run_as_kaggle(tmp_path, script)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for line in (" INFO bundle, by sha256: ensemble.json ", " INFO valid\n"):
        assert ended.stdout.count(line) == 1
    assert (tmp_path / "kaggle.log").read_text() == ""  # there nobody would see them
    assert all_bytes(tmp_path / "input") == before
    check_ran(tmp_path, sample)


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
    built = all_bytes(folder)
    del built["dataset-metadata.json"]
    assert kaggle.datasets["somebody/severstal-steel-ensemble"] == built
    assert kaggle.requests["CreateDatasetVersion"]["body"]["versionNotes"] == "without a member"


# --- names: our rules and the client's ------------------------------------------------------------

TRY_NAMES = """
import contextlib, io, json, pathlib
from kaggle.api.kaggle_api_extended import KaggleApi
api = KaggleApi()
api.authenticate()
verdicts = []
for name, metadata in json.loads(pathlib.Path("names.json").read_text()):
    folder = pathlib.Path(name.removesuffix(".json"))
    (folder / name).write_text(json.dumps(metadata))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            if name.startswith("dataset"):
                api.dataset_create_new(str(folder), quiet=True)
            else:
                api.kernels_push(str(folder))
        verdicts.append("surprising" not in said.getvalue())
    except ValueError:
        verdicts.append(False)
print(json.dumps(verdicts))
"""


def ask_client(tmp_path: Path, metadata: list[tuple[str, dict[str, object]]]) -> list[bool]:
    """Whether the client sends each of these metadata files without a word."""
    (tmp_path / "names.json").write_text(json.dumps(metadata))
    (tmp_path / "dataset-metadata").mkdir()  # nothing to upload
    (tmp_path / "kernel-metadata").mkdir()
    (tmp_path / "kernel-metadata" / "inference.py").touch()
    with serve() as kaggle:
        script = f"import os\nos.chdir({str(tmp_path)!r})\n{TRY_NAMES}"
        verdicts = run_with_client(kaggle, tmp_path, script)
    return list(verdicts)


def ask_us(name: str, metadata: dict[str, object]) -> bool:
    try:
        if name.startswith("dataset"):
            check_dataset(metadata, [])
        else:
            check_kernel(metadata, "me/steel-members", COMPETITION)
    except ValueError:
        return False
    return True


def drawn(rng: random.Random, alphabet: str, *lengths: int) -> str:
    return "".join(rng.choices(alphabet, k=rng.choice(lengths)))


def dataset_named(rng: random.Random) -> dict[str, object]:
    subtitle = drawn(rng, "steel ö鋼!", 0, 20, 19, 50, 80, 81)
    return {
        "id": "me/" + drawn(rng, "az09", 5, 6, 7, 20, 49, 50, 51),
        "title": drawn(rng, "aB 3ö鋼-_!", 5, 6, 7, 20, 49, 50, 51),
        "licenses": [{"name": "CC0-1.0"}] * rng.choice([1, 1, 1, 1, 0, 2]),
        "subtitle": subtitle or None,
    }


def kernel_named(rng: random.Random, alphabet: str) -> dict[str, object]:
    title = drawn(rng, alphabet, 3, 4, 5, 6, 7, 12, 40)
    slug = slugify(title) if rng.random() < 0.7 else drawn(rng, "az09", 4, 5, 8)
    committed: dict[str, object] = json.loads(KERNEL_METADATA.read_text("utf-8"))
    return committed | {
        "id": f"me/{slug or 'empty'}",
        "title": title,
        "dataset_sources": ["me/steel-members"],
    }


def test_our_rules_and_the_clients_agree_on_200_names(tmp_path: Path) -> None:
    rng = random.Random(11)
    named = [("dataset-metadata.json", dataset_named(rng)) for _ in range(100)]
    named += [("kernel-metadata.json", kernel_named(rng, "aBz9 -")) for _ in range(100)]
    ours, theirs = [ask_us(*item) for item in named], ask_client(tmp_path, named)
    apart = [item for item, our, their in zip(named, ours, theirs, strict=True) if our != their]
    assert apart == []
    for half in (theirs[:100], theirs[100:]):
        assert 15 < sum(half) < 85


def test_a_title_of_other_letters_passes_our_rules_only_where_the_client_is_not_surprised(
    tmp_path: Path,
) -> None:
    rng = random.Random(12)
    named = [("kernel-metadata.json", kernel_named(rng, "aB9 -öß鋼',.&_")) for _ in range(100)]
    named += [("kernel-metadata.json", kernel_named(rng, "aB9 -,")) for _ in range(100)]
    ours, theirs = [ask_us(*item) for item in named], ask_client(tmp_path, named)
    assert [item for item, our, their in zip(named, ours, theirs, strict=True) if our > their] == []


STRICTER = ["Me/steel-members", "me/Steel_Members", "me/steel-members/2", "me/-steel-members"]


def test_names_that_the_client_sends_but_that_are_no_address_are_refused_here(
    tmp_path: Path,
) -> None:
    sound: dict[str, object] = {"title": "Steel members", "licenses": [{"name": "CC0-1.0"}]}
    assert ask_us("dataset-metadata.json", sound | {"id": "me/steel-members"})
    named = [("dataset-metadata.json", sound | {"id": ref}) for ref in STRICTER]
    assert ask_client(tmp_path, named) == [True] * len(STRICTER)
    assert [ask_us(*item) for item in named] == [False] * len(STRICTER)


# --- who the user is ------------------------------------------------------------------------------

WHO = """
import json
from kaggle.api.kaggle_api_extended import KaggleApi
api = KaggleApi()
api.authenticate()
print(json.dumps(api.config_values.get("username")))
"""
HOMES: dict[str, tuple[dict[str, str], dict[str, str]]] = {  # environment; file → its user
    "the environment": ({"KAGGLE_USERNAME": "env"}, {".kaggle/kaggle.json": "key"}),
    "a key": ({}, {".kaggle/kaggle.json": "key"}),
    "a folder of its own": (
        {"KAGGLE_CONFIG_DIR": "HOME/own"},
        {"own/kaggle.json": "own", ".kaggle/kaggle.json": "key"},
    ),
    "a newer home": ({}, {".config/kaggle/kaggle.json": "xdg"}),
    "XDG": ({"XDG_CONFIG_HOME": "HOME/cfg"}, {"cfg/kaggle/kaggle.json": "xdg"}),
    "an old home before a newer": (
        {},
        {".kaggle/kaggle.json": "key", ".config/kaggle/kaggle.json": "xdg"},
    ),
    "a login": ({}, {".kaggle/credentials.json": "login"}),
    "a key before a login": (
        {},
        {".kaggle/kaggle.json": "key", ".kaggle/credentials.json": "login"},
    ),
}


@pytest.mark.parametrize("case", HOMES)
def test_the_owner_is_who_the_client_says(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, files = HOMES[case]
    tokens = {"key": "k", "refresh_token": "r", "access_token": "a", "scopes": []}
    tokens["access_token_expiration"] = "2999-01-01T00:00:00+00:00"
    for name, user in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(tokens | {"username": user}))
    own = {key: value.replace("HOME", str(tmp_path)) for key, value in environment.items()}
    for key in [key for key in os.environ if key.startswith(("KAGGLE_", "XDG_"))]:
        monkeypatch.delenv(key)
    for key, value in (own | {"HOME": str(tmp_path)}).items():
        monkeypatch.setenv(key, value)
    with serve() as kaggle:
        secret = {"KAGGLE_KEY": "k"} if "KAGGLE_USERNAME" in own else {}
        theirs = run_with_client(kaggle, tmp_path, WHO, login=False, **own, **secret)
    assert find_owner() == theirs
    assert theirs in [*files.values(), "env"]


def test_a_user_without_a_home_is_found_by_the_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> Path:  # as Path.home does there
        raise RuntimeError("Could not determine home directory.")

    for key in [key for key in os.environ if key.startswith(("KAGGLE_", "XDG_"))]:
        monkeypatch.delenv(key)
    monkeypatch.setattr(Path, "home", nobody)
    assert find_owner() is None
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    assert find_owner() is None
    (tmp_path / "kaggle.json").write_text('{"username": "key"}')
    assert find_owner() == "key"
    (tmp_path / "kaggle.json").touch()
    monkeypatch.setenv("KAGGLE_USERNAME", "env")
    assert find_owner() == "env"


def test_an_empty_file_of_the_client_beside_the_environments_user_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    (tmp_path / "kaggle.json").touch()
    monkeypatch.setenv("KAGGLE_USERNAME", "env")
    assert find_owner() == "env"


def test_without_a_user_there_is_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)
    assert find_owner() is None
    (tmp_path / "kaggle.json").write_text("{")
    with pytest.raises(ValueError, match=r"kaggle\.json: no JSON"):
        find_owner()
