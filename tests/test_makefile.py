"""The Makefile: which Python it takes, and where it may lie. Stubs stand for Python."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")

NEW = f"""#!/bin/sh
[ "$1" = -c ] && exec '{sys.executable}' -c "$2"
echo "$@" >> calls
"""
OLD = f"""#!/bin/sh
[ "$1" = -c ] && exec '{sys.executable}' -c "import sys; sys.version_info = (3, 9, 2); $2"
[ "$1" = --version ] && exec echo Python 3.9.2
echo "$@" >> calls
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The project's Makefile in a folder, as from a shell of its own."""
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "-f", str(ROOT / "Makefile"), *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_an_old_python_is_named_with_the_remedy_before_anything_is_made(tmp_path: Path) -> None:
    old = write_script(tmp_path / "python3.9", OLD)
    ended = make(tmp_path, ".venv/installed-demo", f"PYTHON={old}")
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    needed = f"{required.removeprefix('>=')} or newer is needed: make .venv/installed-demo PYTHON="
    assert ended.returncode
    assert f"PYTHON={old} is Python 3.9.2; {needed}" in ended.stdout
    assert not (tmp_path / ".venv").exists() and not (tmp_path / "calls").exists()


def test_python_keeps_what_it_compiles_for_pip_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every process compiles all of PyTorch that it imports: 12 s instead of 4.5 s."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    write_script(tmp_path / ".venv/bin/python", "#!/bin/sh\nenv > environment\n")
    (tmp_path / ".venv" / "installed-demo").touch()
    make(tmp_path, "demo")
    variables = (tmp_path / "environment").read_text()
    assert "PATH=" in variables and "PYTHONDONTWRITEBYTECODE" not in variables


@pytest.mark.parametrize(("before", "options"), [(None, "--clear "), (OLD, "--clear "), (NEW, "")])
def test_an_environment_of_an_older_python_is_made_anew(
    before: str | None, options: str, tmp_path: Path
) -> None:
    """Else its own link to that Python stays, and pip refuses the project for ever."""
    new = write_script(tmp_path / "python3.12", NEW)
    if before:
        write_script(tmp_path / ".venv" / "bin" / "python", before)
    make(tmp_path, ".venv/installed-demo", f"PYTHON={new}")
    assert (tmp_path / "calls").read_text().splitlines()[0] == f"-m venv {options}.venv"


def test_the_demo_installs_openvino_beside_a_gpu_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that PyTorch has no code for leaves the CPU."""
    write_script(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    shown = make(tmp_path, "-n", "demo").stdout
    assert "--editable '.[openvino]'" in shown and "build_kernel.py --openvino" in shown


@pytest.mark.parametrize(
    ("free", "before", "said"), [(8.9e9, [], 1), (9.1e9, [], 0), (8.9e9, ["installed-demo"], 0)]
)
def test_a_disk_too_small_for_a_first_install_is_named_before_it(
    free: float, before: list[str], said: int, tmp_path: Path
) -> None:
    """It goes on: pip would find out minutes later, or not at all."""
    usage = f"shutil.disk_usage = lambda _: __import__('types').SimpleNamespace(free={free})"
    new = write_script(tmp_path / "python", NEW.replace('"$2"', f'"import shutil; {usage}; $2"'))
    (tmp_path / ".venv").mkdir()
    for name in before:
        (tmp_path / ".venv" / name).touch()
    ended = make(tmp_path, ".venv/installed", f"PYTHON={new}")
    assert ended.stdout.count(f"8.9 GB are free in {tmp_path}: an install takes up to 8,") == said
    assert "-m venv" in (tmp_path / "calls").read_text()


def test_the_oldest_versions_are_tested_in_a_folder_with_a_space_in_its_name(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "my steel"
    write_script(folder / ".venv-oldest/bin/python", '#!/bin/sh\necho "$PYTHONPATH" > path\n')
    for name in ("requirements-oldest.txt", ".venv-oldest/installed"):
        (folder / name).touch()
    ended = make(folder, "versions")
    assert ended.returncode == 0, ended.stderr
    assert (folder / "path").read_text() == f"{folder}\n"


@pytest.mark.parametrize("target", ["bench", "bench-cluster"])
def test_a_bench_leaves_the_users_own_bundle_alone(target: str, tmp_path: Path) -> None:
    """What lies in dist is uploaded: it may be of other members than the shipped ones."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "installed").touch()
    printed = make(tmp_path, "--dry-run", target).stdout
    (built,) = re.findall(r"build_kernel\.py .*--out (\S+)", printed)
    (raced,) = re.findall(r"bench/\w+\.py .*--bundle (\S+)", printed)
    assert built != "dist" and Path(raced).parts[0] == built
    assert built in make(tmp_path, "--dry-run", "clean").stdout.split()
    assert f"{built}/" in (ROOT / ".gitignore").read_text().splitlines()
