"""The manuals: every command in them can be run, every link in them leads somewhere."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from packing.metadata import Metadata
from packing.summary import print_next

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "weights" / "README.md"]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), ROOT / "tests" / "README.md"]
PACKED = {"dist/dataset/inference.py": "kernel/inference.py"}  # what the build makes of what
OTHERS = ("kaggle", "git", "pip", "export")  # are not of this project


def commands_of(text: str) -> list[list[str]]:
    """The words of every command in a page's plain code blocks and of `python …` in its text."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(
        r"`((?:python|make) [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    )
    starts = ("python ", "make ", "git ", "pip ", "kaggle ", "export ")
    return [shlex.split(line, comments=True) for line in lines if line.startswith(starts)]


COMMANDS = {
    f"{page.name}: {' '.join(words)}": words
    for page in PAGES
    for words in commands_of(page.read_text(encoding="utf-8"))
}


def help_of(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What a script prints for --help."""
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    return capsys.readouterr().out


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 15
    assert {words[0] for words in COMMANDS.values()} <= {"python", "make", *OTHERS}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_manuals_exists_with_its_options(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *words = COMMANDS[command]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets
    elif program == "python":
        script = ROOT / PACKED.get(words[0], words[0])
        own = words[: words.index("--")] if "--" in words else words  # the rest is another's
        options = {word.partition("=")[0] for word in own[1:] if word.startswith("--")}
        known = set(re.findall(r"--[a-z][a-z0-9-]*", help_of(script, monkeypatch, capsys)))
        assert options <= known, options - known


@pytest.mark.parametrize(
    ("page", "section", "competition", "name"),
    [
        (
            "README.md",
            "Submit your checkpoints",
            "severstal-steel-defect-detection",
            "severstal-steel-ensemble",
        ),
        ("docs/competitions.md", "Step by step", "SLUG", "NAME"),
    ],
)
def test_a_bundle_is_uploaded_and_submitted_as_the_build_prints_it(
    page: str, section: str, competition: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = f"your-kaggle-name/{name}"
    kernel = {"id": f"{own}-submission"}
    print_next(Path("dist"), Metadata({"id": own}, kernel), competition)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    printed = [shlex.split(line, comments=True) for line in lines if line.startswith("kaggle ")]
    text = (ROOT / page).read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    documented = [words for words in commands_of(text) if words[0] == "kaggle"]
    assert [words for words in documented if "download" not in words] == printed
    files = [line for line in lines if "takes files: " in line]
    assert len(files) == (page != "README.md")  # Severstal takes kernels alone
    inline = re.findall(r"`(kaggle (?!competitions submissions)[^`]+)`", text.replace("\n", " "))
    assert all(command in files[0] for command in inline)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_of_the_manuals_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        assert (page.parent / link).exists(), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_a_file_that_the_table_of_rooms_names_is_there() -> None:
    named = re.findall(r"`([a-z]+/|)([a-z_]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 8
    for room, name in named:
        assert (ROOT / (room or "kernel/") / name).is_file() or (ROOT / name).is_file(), name


def test_what_the_list_of_faults_names_is_one_file_and_is_a_test() -> None:
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    places = ["/" + file.relative_to(ROOT / "tests").as_posix() for file in files]
    for named in re.findall(r"`((?:[a-z]+/)?test_\w+\.py)`", text):
        assert sum(place.endswith(f"/{named}") for place in places) == 1, named
    tests = "".join(file.read_text(encoding="utf-8") for file in files)
    for named, cut in re.findall(r"`(test_\w+)(…?)`", text):
        assert f"def {named}{'' if cut else '('}" in tests, named
