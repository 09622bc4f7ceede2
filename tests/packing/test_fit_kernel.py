"""The kernel that fits: the script that is built, and its way through the real client and back."""

import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    ROOT,
    SMALL,
    all_bytes,
    error_of,
    exit_code,
    read_manifest,
    read_submission,
    run_script,
)
from kaggle_stub import Kaggle, customize_site, run_client, serve

from build_kernel import main
from evaluation import dry_run
from kernel.kaggle import KAGGLE_RUN, UNATTENDED, WORKING
from packing.fit_kernel import REQUIREMENTS, build_fit, join_fit_kernel
from packing.metadata import read_fit_metadata
from packing.paths import MEMBERS, OUT
from packing.summary import print_fit_next
from training.synthetic import Drawing, write_competition

COMPETITION = "severstal-steel-defect-detection"
NAME = "somebody/severstal-steel-ensemble-fit"

# --- what is built --------------------------------------------------------------------------------


def built_files(script: str) -> dict[str, str]:
    """FILES of a built script, read without running it."""
    for node in ast.parse(script).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FILES":
            files: dict[str, str] = ast.literal_eval(node.value)
            return files
    raise AssertionError("no FILES")


def test_the_script_carries_every_module_as_it_stands_and_the_list_it_was_given() -> None:
    files = built_files(join_fit_kernel("--name mine\n", 3.5))
    assert files.pop("training/members.txt") == "--name mine\n"
    rooms = [path for room in ("kernel", "training") for path in (ROOT / room).glob("*.py")]
    assert {ROOT / name for name in files} == set(rooms)
    assert all((ROOT / name).read_text(encoding="utf-8") == text for name, text in files.items())


def test_the_pins_are_those_the_suite_runs_with() -> None:
    constraints = (ROOT / "constraints.txt").read_text().replace("-", "_").splitlines()
    assert {pin.replace("-", "_") for pin in REQUIREMENTS} <= set(constraints)


def test_the_script_is_pushed_with_internet_and_its_own_output_only_to_resume() -> None:
    first, again = (read_fit_metadata("somebody", resume) for resume in (False, True))
    scripts = [join_fit_kernel("--name a", 2.0, resume) for resume in (False, True)]
    assert ["'--resume'" in script.split("REQUIREMENTS")[0] for script in scripts] == [False, True]
    assert (first["id"], first["title"]) == (NAME, "Severstal steel ensemble fit")
    assert first["enable_internet"] is first["enable_gpu"] is first["is_private"] is True
    assert first["competition_sources"] == [COMPETITION]
    assert first["dataset_sources"] == first["kernel_sources"] == []
    assert again == first | {"kernel_sources": [NAME]}


LISTS = {
    "latin.txt": "--name größe --encoder resnet18".encode("latin-1"),
    "quote.txt": b"--name 'a",
    "empty.txt": b"# none\n\n",
    "nameless.txt": b"--name a\n--encoder resnet18\n",
    "name.txt": b"--encoder resnet18 --name",
    "twice.txt": b"--name a\n--name=a --arch Unet\n",
    "clouds.txt": b"--name a --competition=clouds\n",
    "data.txt": b"--name b\n--name a --data mine\n",
    "extra.txt": b"--name a --heads-on none --extra clouds.txt=0.3\n",
}


@pytest.mark.parametrize(
    "text", ["--name a --encoder 'b'", "--name a\\", '--name "aTRIPLEb"\n', "--name a\r\n\t#\x00"]
)
def test_any_list_is_carried_as_it_stands(text: str) -> None:
    text = text.replace("TRIPLE", "'" * 3)
    names: dict[str, Any] = {"__name__": "script"}
    exec(compile(join_fit_kernel(text, 2.0), "fit.py", "exec"), names)
    assert names["FILES"]["training/members.txt"] == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hours", 0], "--hours 0.0, expected a number above 0"),
        (["--hours", "nan"], "--hours nan, expected a number above 0"),
        (["--members", "gone.txt"], "gone.txt"),
        (["--competition", "salt"], "--competition: leave it out with --fit"),
        (["--weights", "mine"], "--weights: leave it out with --fit"),
        (["--members", "latin.txt"], "latin.txt: no list of members: 'utf-8'"),
        (["--members", "quote.txt"], "quote.txt: no list of members: No closing quotation"),
        (["--members", "empty.txt"], "empty.txt: members [], expected at least one"),
        (["--members", "nameless.txt"], "nameless.txt: members ['a', None], expected"),
        (["--members", "name.txt"], "name.txt: no list of members: argument --name: expected one"),
        (["--members", "twice.txt"], "twice.txt: members ['a', 'a'], expected"),
        (["--members", "clouds.txt"], "clouds.txt: --name a --competition=clouds: leave --comp"),
        (["--members", "extra.txt"], "clouds.txt=0.3: lies on this machine, which Kaggle's does"),
        (["--members", "data.txt"], "leave --data out, with --fit it is the competition's, as"),
        (["--owner", "Two Words"], "dataset-metadata.json: Kaggle refuses it: id 'Two Words/"),
    ],
)
def test_a_fit_kernel_that_cannot_be_is_refused_in_one_line(
    options: list[object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in LISTS.items():
        Path(name).write_bytes(text)
    words = ["--fit", "--owner", "me", "--out", tmp_path / "dist", *options]
    assert exit_code(main, *words) == 2
    assert message in error_of(capsys.readouterr().err)
    assert not (tmp_path / "dist").exists()


def test_how_to_go_on_is_said_with_the_options_of_the_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = tmp_path / "my list.txt"
    members.write_text("--name a --heads-on held-out --teacher b.safetensors")
    out = tmp_path / "my dist"
    words = ["--fit", "--owner", "me", "--out", out, "--hours", 23]
    assert exit_code(main, *words, "--members", members) == 0
    said, place = capsys.readouterr().out, f"--owner me --out '{out}'"
    assert f"--fit --resume --hours 23 {place} --members '{members}', and push" in said
    assert f"build_kernel.py --weights fitted {place}\n" in said
    print_fit_next(OUT, {"id": "me/fit"}, 2.0, None)
    said = capsys.readouterr().out
    assert "--resume --hours 2 --owner me, and push" in said and "--out" not in said


def test_a_fit_kernel_is_not_written_among_other_things(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").touch()
    assert exit_code(main, "--fit", "--owner", "me", "--out", tmp_path) == 2
    assert "holds other things than a bundle (thesis.tex)" in error_of(capsys.readouterr().err)
    (tmp_path / "mine" / "fit").mkdir(parents=True)
    (tmp_path / "mine" / "fit" / "results.csv").touch()
    assert exit_code(main, "--fit", "--owner", "me", "--out", tmp_path / "mine") == 2
    assert "than a fit kernel (results.csv)" in error_of(capsys.readouterr().err)
    assert (tmp_path / "mine" / "fit" / "results.csv").exists()


def test_a_fit_kernel_that_cannot_be_put_in_place_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_fit(tmp_path / "dist", "me", MEMBERS, 2.0, resume=False)
    before, rename = all_bytes(tmp_path), Path.rename

    def interrupt(path: Path, target: Path) -> Path:
        if target == tmp_path / "dist" / "fit" and not target.exists():
            monkeypatch.undo()
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_fit(tmp_path / "dist", "me", MEMBERS, 3.0, resume=False)
    assert all_bytes(tmp_path) == before
    build_fit(tmp_path / "dist", "me", MEMBERS, 3.0, resume=False)
    assert all_bytes(tmp_path) != before


def test_without_the_internet_the_script_says_what_to_turn_on(tmp_path: Path) -> None:
    (tmp_path / "fit.py").write_text(join_fit_kernel("", 1.0), encoding="utf-8")
    (tmp_path / "pip.py").write_text("raise SystemExit(1)")  # stands for pip that reaches nothing
    ended = run_script(tmp_path / "fit.py", cwd=tmp_path)
    assert ended.returncode == 1
    line = error_of(ended.stderr)
    pins = ", ".join(REQUIREMENTS)
    assert line.startswith(f"pip cannot install {pins}: turn the kernel's internet on, ")
    assert not ended.stdout


def test_where_pip_fails_an_earlier_sessions_output_is_this_ones(tmp_path: Path) -> None:
    """Kaggle keeps no output of a version that fails."""
    script = join_fit_kernel("", 1.0, True)
    for folder in ("input", "working"):
        script = script.replace(f'"/kaggle/{folder}"', repr(str(tmp_path / folder)))
    earlier, working = tmp_path / "input" / "notebooks" / "fit", tmp_path / "working"
    for place in ("out_of_fold.json", "a.safetensors", "runs/b/crops.ckpt"):
        (earlier / place).parent.mkdir(parents=True, exist_ok=True)
        (earlier / place).write_text(place)
        (earlier / place).chmod(0o444)  # as Kaggle mounts it
    working.mkdir()
    (tmp_path / "fit.py").write_text(script, encoding="utf-8")
    (tmp_path / "pip.py").write_text("raise SystemExit(1)")
    ended = run_script(tmp_path / "fit.py", cwd=tmp_path)
    assert ended.returncode == 0
    assert error_of(ended.stderr).startswith("pip cannot install ")
    assert ended.stdout.startswith("nothing was fitted: ") and "push again" in ended.stdout
    assert all_bytes(working) == all_bytes(earlier)
    assert (working / "a.safetensors").stat().st_mode & 0o200  # what goes on writes over it


def test_what_the_script_unpacks_goes_when_it_ends(tmp_path: Path) -> None:
    """And its exit code is that of what it ran, here of a shorter fit."""
    fit = "import pathlib\nprint(pathlib.Path(__file__).parents[1])\nraise SystemExit(2)"
    before, mark, after = join_fit_kernel("", 1.0).rpartition("\nif __name__")
    script = f"{before}\nFILES['training/kaggle_fit.py'] = {fit!r}\n{mark}{after}"
    (tmp_path / "fit.py").write_text(script, encoding="utf-8")
    (tmp_path / "pip.py").touch()  # stands for pip that has everything
    (tmp_path / "scratch").mkdir()
    ended = run_script(tmp_path / "fit.py", cwd=tmp_path, TMPDIR=str(tmp_path / "scratch"))
    assert (ended.returncode, ended.stderr) == (2, "")
    assert Path(ended.stdout.strip()).parent == tmp_path / "scratch"
    assert list((tmp_path / "scratch").iterdir()) == []


# --- through the real client ----------------------------------------------------------------------

TINY = "--encoder tu-test_resnet --arch Unet --encoder-weights '' --minutes 0 --whole-steps 1 "
TINY += "--crops 1 --save-every 1 --folds 3 --presence-strips 3 --validation-strips 3"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files, its path short: the sockets of a fit's readers take 107 bytes.

    What a killed process leaves in it goes.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def start_as_kaggle(root: Path, text: str, scratch: Path) -> "subprocess.Popen[bytes]":
    """The pushed script as a process of a group of its own, which is to find root/working."""
    script, image = root / "src" / "script.py", root / "image"
    for folder in (script.parent, image):
        folder.mkdir(exist_ok=True)
    assert text.count(f'"{WORKING}"') == 2  # kernel/kaggle.py's, and where pip fails
    script.write_text(text.replace(f'"{WORKING}"', repr(str(root / "working"))), encoding="utf-8")
    customize_site(image, root / "kaggle.log")
    (root / "working").mkdir()
    own = {"PYTHONPATH": str(image), "TMPDIR": str(scratch), KAGGLE_RUN: UNATTENDED}
    environment = os.environ | own | {"OMP_NUM_THREADS": "1"}
    with (root / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(script), "--input", str(root / "input"), "--devices", "cpu"],
            cwd=script.parent, env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def kill_after_a_state(process: "subprocess.Popen[bytes]", state: Path) -> None:
    """End a group of processes as Kaggle does, once a state is there."""
    until = time.monotonic() + 240
    while not state.is_file() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def steps_of(folder: Path) -> list[int]:
    """The steps in a metrics.csv."""
    return [int(line.split(",")[3]) for line in (folder / "metrics.csv").read_text().split()[1:]]


def push(kaggle: Kaggle, folder: Path, scratch: Path) -> dict[str, Any]:
    """What arrives when the client pushes a kernel."""
    said = run_client(kaggle, scratch, "kernels", "push", "-p", folder)
    assert "successfully pushed" in said and "not valid" not in said
    request: dict[str, Any] = kaggle.kernels[NAME]
    assert request["enableInternet"] is request["enableGpu"] is True
    return request


def mount_output(root: Path) -> Path:
    """Make the working folder of a session the input of the next; return it."""
    earlier = root / "input" / "notebooks" / NAME
    earlier.parent.mkdir(parents=True)
    return (root / "working").rename(earlier)


def check_output(weights: Path) -> None:
    """What a user fetched: the two members, what they score, and logs of a resumed fit."""
    left = {path.name for path in weights.iterdir() if path.is_file()}
    assert left == {
        "a.safetensors", "b.safetensors", "ensemble.json", "out_of_fold.json", "experiments.csv",
        "curves.png", "severstal-steel-ensemble-fit.log",
    }  # fmt: skip
    assert not list(weights.rglob("*.ckpt"))
    assert (weights / "severstal-steel-ensemble-fit.log").read_text() == "its log"
    resumed = steps_of(weights / "runs" / "a" / "crops" / "version_1")
    assert resumed[0] > 0 and resumed[-1] == 29
    scores = json.loads((weights / "out_of_fold.json").read_text())
    assert [(scores[name]["fold"], scores[name]["strips"]) for name in "ab"] == [(0, 3), (1, 3)]
    assert all(0 <= scores[name]["dice"] <= 1 for name in "ab")
    manifest = read_manifest(weights)
    assert manifest["image_size"] == list(SMALL)
    assert [(m["mean"], m["std"]) for m in manifest["members"]] == [([0.34], [0.13])] * 2
    rows = (weights / "experiments.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["name", "a", "b"]


def rehearse(dist: Path, data: Path) -> None:
    """The dry run of what was built of them ends well."""
    words = ["--bundle", dist, "--images", data / "train_images", "--ground-truth"]
    code = exit_code(dry_run.main, *words, data / "train.csv")
    assert code in (0, 1)  # whether a T4 would take too long is unknown
    report = json.loads((dist / "report" / "report.json").read_text())
    assert report["run"]["exit_code"] == 0
    assert len(read_submission(dist / "report" / "submission.csv")) == 96


@pytest.mark.skipif(not find_spec("kaggle"), reason="Kaggle's client is not installed")
def test_from_an_account_to_an_ensemble_with_a_kill_between(
    tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Push, run what arrived, kill it, run it again on its output, fetch, build, rehearse."""
    members, dist, root = tmp_path / "members.txt", tmp_path / "dist", tmp_path / "kaggle"
    members.write_text(
        f"--name a --fold 0 --crop-steps 30 {TINY}\n--name b --fold 1 --crop-steps 1 {TINY}\n"
    )
    data, weights = root / "input" / "competitions" / COMPETITION, tmp_path / "fitted"
    write_competition(data, Drawing(5, SMALL), 24, 3, shares=(1.0, 1.0, 1.0, 1.0))
    build = ["--fit", "--owner", "somebody", "--out", dist, "--members", members]
    with serve() as kaggle:
        assert exit_code(main, *build) == 0
        assert f"kaggle kernels output {NAME} -p fitted -o" in capsys.readouterr().out
        request = push(kaggle, dist / "fit", tmp_path)
        assert "kernelDataSources" not in request
        process = start_as_kaggle(root, request["text"], scratch)
        kill_after_a_state(process, root / "working" / "runs" / "a" / "crops.ckpt")

        earlier = mount_output(root)
        before = all_bytes(earlier)
        assert exit_code(main, *build, "--resume") == 0
        request = push(kaggle, dist / "fit", tmp_path)
        assert request["kernelDataSources"] == [NAME]
        process = start_as_kaggle(root, request["text"], scratch)
        assert process.wait(timeout=300) == 0, (root / "log.txt").read_text()
        assert (root / "log.txt").read_text().count(" INFO going on from ") == 1
        assert all_bytes(earlier) == before
        assert len(list(scratch.glob("fit-*"))) == 1  # which the killed one left

        kaggle.outputs[NAME] = root / "working"
        run_client(kaggle, tmp_path, "kernels", "output", NAME, "-p", weights, "-o")
    check_output(weights)
    assert exit_code(main, "--weights", weights, "--owner", "somebody", "--out", dist) == 0
    assert (dist / "fit" / "fit.py").is_file()
    rehearse(dist, data)
