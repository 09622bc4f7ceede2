"""A session on Kaggle: who gets how long, its end in time, and what is gone on from.

A stub stands for train.py; tests/packing/test_fit_kernel.py runs the real one.
"""

import errno
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, draw_image, error_of, exit_code, save_image

from kernel.competition import SEVERSTAL
from kernel.files import write_json
from kernel.kaggle import KAGGLE_RUN, UNATTENDED
from packing.sources import unfinished
from training import fit_members, kaggle_fit, train
from training.config import Config
from training.fit_members import Job, read_jobs
from training.kaggle_fit import plan
from training.results import write_checkpoint

STUB = """
import shutil, sys, time
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name, folder = words["--name"], Path(words["--runs"], words["--name"])
(folder / "strips.ckpt").write_text("a state")
print("error: no such luck" if name == "bad" else "begun", flush=True)
time.sleep(60 if name == "slow" else 0)
if name == "bad":
    sys.exit(2)
shutil.copyfile(Path(__file__).with_name("fitted.safetensors"), f"{name}.safetensors")
(folder / "scores.json").write_text('{"fold": 1, "dice": 0.5}')
"""

Session = Callable[..., int]


@pytest.fixture
def session(
    config: Config, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Session:
    """Return a function that fits members of these names by the stub, in tmp_path/working."""
    (tmp_path / "stub.py").write_text(STUB)
    write_checkpoint(network, config, tmp_path / "fitted.safetensors")
    monkeypatch.setattr(fit_members, "SCRIPT", tmp_path / "stub.py")
    competition = tmp_path / "input" / "competition"
    save_image(competition / "train_images" / "a.png", draw_image(0))
    (competition / "train.csv").write_text("ImageId,EncodedPixels,ClassId\n")
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")

    def fit(*names: str, hours: float = 1.0, options: Sequence[str] = ("--devices", "cpu")) -> int:
        members = tmp_path / "members.txt"
        members.write_text("".join(f"--name {name} --encoder resnet34\n" for name in names))
        words = ["--input", tmp_path / "input", "--members", members, "--hours", hours]
        return exit_code(kaggle_fit.main, *words, *options)

    return fit


# --- who gets how long ----------------------------------------------------------------------------


def shipped() -> list[Job]:
    return read_jobs(kaggle_fit.MEMBERS, ["--data", "d"])


def test_two_devices_share_their_hours_among_five_members() -> None:
    planned = plan(shipped(), 2, 600)
    minutes = {job.name: train.parse_args(job.options).minutes for job in planned}
    assert minutes == {"densenet201": 300, "resnet34": 300, "se_resnet50": 200, "resnet50": 200,
                       "efficientnet-b0": 200}  # fmt: skip
    names = ["densenet201", "se_resnet50", "resnet50", "resnet34", "efficientnet-b0"]
    assert [job.name for job in planned] == names  # as they start: at 0, 0, 200, 300, 400


@pytest.mark.parametrize(("devices", "minutes"), [(1, 120), (5, 600), (8, 600)])
def test_any_number_of_devices_fits_every_member_once(devices: int, minutes: float) -> None:
    planned = plan(shipped(), devices, 600)
    assert sorted(job.name for job in planned) == sorted(job.name for job in shipped())
    assert {train.parse_args(job.options).minutes for job in planned} == {minutes}


def test_a_members_own_line_wins_over_what_is_common_on_kaggle() -> None:
    job = Job("a", ["--data", "d", "--name", "a", "--encoder", "e", "--crops", "7"], Path("log"))
    args = train.parse_args(plan([job], 1, 60)[0].options)
    assert (args.crops, args.encoder_weights, args.minutes) == (7, "imagenet", 60)
    assert args.crop_steps >= args.save_every >= 500  # a state is dear on a GPU
    own = [*job.options, "--minutes", "5"]
    assert train.parse_args(plan([Job("a", own, Path("log"))], 1, 60)[0].options).minutes == 5


def test_a_gate_of_kaggles_fit_opens_where_its_class_is_as_likely_there_as_not() -> None:
    """At weight 8 it opens at 1 in 9: a mask pays above 1 / (1 + its Dice), at a half or more."""
    weights = {train.parse_args(job.options).present_weight for job in plan(shipped(), 2, 600)}
    opens_at = {1 / (1 + weight) for weight in weights}
    assert opens_at == {0.5}


def test_the_heads_of_kaggles_fit_see_half_of_a_fold() -> None:
    """The other half is scored. Of 800 strips only 16 have the rarest class, one in fifty."""
    counts = {train.parse_args(job.options).presence_strips for job in plan(shipped(), 2, 600)}
    n_strips, folds = SEVERSTAL.n_training_images, Config.folds
    assert n_strips and counts == {n_strips // folds // 2}


def test_the_manual_has_the_settings_of_kaggles_fit_for_gpus_of_ones_own() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    [command] = [each for each in manual.split("```") if "members.txt -- --data severstal" in each]
    common = kaggle_fit.COMMON
    assert {*zip(common[::2], common[1::2], strict=True)} <= {*itertools.pairwise(command.split())}


# --- sessions -------------------------------------------------------------------------------------


def test_a_finished_session_leaves_what_a_build_packs_and_no_state(session: Session) -> None:
    assert session("a", "b") == 0
    manifest = json.loads(Path("ensemble.json").read_text())
    assert manifest["image_size"] == list(SMALL)
    assert manifest["min_area"] == 256
    assert [set(m) for m in manifest["members"]] == [{"name", "file", "model", "mean", "std"}] * 2
    record = {"fold": 1, "dice": 0.5}
    assert json.loads(Path("out_of_fold.json").read_text()) == {"a": record, "b": record}
    assert Path("curves.png").is_file()
    assert not list(Path().rglob("*.ckpt"))


def test_a_session_ends_in_time_and_the_next_one_fits_what_is_left(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()
    assert session("a", "slow", "b", hours=10 / 3600) == 0
    assert time.monotonic() - start < 40
    assert "not finished: slow, b; build with --fit --resume" in caplog.text
    assert "failed" not in caplog.text
    assert Path("a.safetensors").is_file() and Path("runs/slow/strips.ckpt").is_file()
    record = json.loads(Path("out_of_fold.json").read_text())
    assert record == {"a": {"fold": 1, "dice": 0.5}, "slow": None, "b": None}
    assert unfinished(Path()) == ["slow", "b"]
    Path().resolve().rename(tmp_path / "input" / "earlier")
    for path in (tmp_path / "input" / "earlier").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)  # as Kaggle mounts it
    (tmp_path / "stub.py").write_text(STUB.replace("60 if", "0 if"))
    (tmp_path / "working").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "working")
        assert session("a", "slow", "b") == 0
        assert all(json.loads(Path("out_of_fold.json").read_text()).values())
        assert unfinished(Path()) == []
        assert Path("runs/a/train.log").read_text() == "begun\n"
        assert Path("runs/slow/train.log").read_text() == "begun\nbegun\n"


def test_a_member_that_fails_costs_neither_the_others_nor_the_output(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    assert session("bad", "good") == 0
    assert "bad failed with exit code 2: error: no such luck" in caplog.text
    record = json.loads(Path("out_of_fold.json").read_text())
    assert record == {"bad": None, "good": {"fold": 1, "dice": 0.5}}


def test_where_nothing_came_of_it_the_kernel_fails(session: Session, tmp_path: Path) -> None:
    (tmp_path / "stub.py").write_text("raise SystemExit(2)")
    assert session("a") == 1


# --- what it refuses ------------------------------------------------------------------------------


def leave_output(folder: Path, state: bytes) -> None:
    """What a session without a finished member leaves: a record of none, and a state."""
    (folder / "runs" / "a").mkdir(parents=True)
    (folder / "out_of_fold.json").write_text("{}")
    (folder / "runs" / "a" / "crops.ckpt").write_bytes(state)


def test_two_earlier_outputs_that_differ_are_refused(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        leave_output(tmp_path / "input" / f"earlier-{number}", b"%d" % number)
    assert session("a") == 2
    message = error_of(capsys.readouterr().err)
    assert "more than one earlier output: " in message
    assert "earlier-1" in message and "earlier-2" in message


def test_an_earlier_output_that_is_mounted_twice_is_one(session: Session, tmp_path: Path) -> None:
    for number in (1, 2):
        leave_output(tmp_path / "input" / f"earlier-{number}", b"state")
    assert session("a") == 0
    assert set(json.loads(Path("out_of_fold.json").read_text())) == {"a"}


def test_a_member_that_came_damaged_is_fitted_anew(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert session("a", "b") == 0
    earlier = Path().resolve().rename(tmp_path / "input" / "earlier")
    torn = earlier / "a.safetensors"
    torn.write_bytes(torn.read_bytes()[:20])
    (tmp_path / "working").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "working")
        assert session("a", "b") == 0
        assert f"{torn} is damaged" in caplog.text and "it is fitted anew" in caplog.text
        assert Path("runs/a/train.log").read_text() == "begun\nbegun\n"
        assert Path("runs/b/train.log").read_text() == "begun\n"
        assert set(json.loads(Path("out_of_fold.json").read_text())) == {"a", "b"}


def test_a_session_that_is_to_go_on_and_finds_nothing_is_refused(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel's last version failed: hours of a GPU would begin anew, unsaid."""
    assert session("a", options=["--devices", "cpu", "--resume"]) == 2
    message = error_of(capsys.readouterr().err)
    assert "no earlier output under" in message and "build without --resume" in message
    assert not Path("runs").exists()


def test_a_session_without_a_gpu_is_refused_unless_it_is_asked_for(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert session("a", options=[]) == 2
    assert "no GPU is here" in error_of(capsys.readouterr().err)


@pytest.mark.parametrize("fault", ["no GPU", "list", "strip", "no competition"])
def test_what_an_earlier_session_left_outlasts_one_that_cannot_begin(
    fault: str,
    session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Kaggle keeps no output of a version that fails."""
    leave_output(tmp_path / "input" / "earlier", b"state")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    if fault == "strip":
        (tmp_path / "input" / "competition" / "train_images" / "a.png").write_bytes(b"torn")
    if fault == "no competition":
        (tmp_path / "input" / "competition" / "train.csv").unlink()
    names = ("a", "a") if fault == "list" else ("a",)
    assert session(*names, options=[] if fault == "no GPU" else ["--devices", "cpu"]) == 0
    assert "what was fitted before is this version's output" in caplog.text
    assert Path("runs/a/crops.ckpt").read_bytes() == b"state"


def test_a_session_that_breaks_off_keeps_the_members_that_it_finished(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the disk is full: Kaggle keeps no output of a version that fails."""

    def full(path: Path, entries: Any, **options: Any) -> None:
        if path.name == "out_of_fold.json" and any(entries.values()):
            raise OSError(28, "No space left on device")
        write_json(path, entries, **options)

    monkeypatch.setattr(kaggle_fit, "write_json", full)
    assert session("a") == 0
    assert "No space left on device; what was fitted before is this version's output" in caplog.text
    assert Path("a.safetensors").is_file()


def test_a_list_of_other_members_does_not_take_an_earlier_outputs_place(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where --resume was given without the --members of then."""
    assert session("a") == 0
    earlier = Path().resolve().rename(tmp_path / "input" / "earlier")
    (tmp_path / "working").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "working")
        assert session("b") == 0
        assert "the earlier output is of a, the list of b: build with the --members" in caplog.text
        for name in ("a.safetensors", "out_of_fold.json", "ensemble.json"):
            assert Path(name).read_bytes() == (earlier / name).read_bytes()
        assert not Path("b.safetensors").exists()


def test_members_of_which_nothing_was_fitted_bind_no_later_list(
    session: Session, tmp_path: Path
) -> None:
    earlier = tmp_path / "input" / "earlier"
    earlier.mkdir()
    (earlier / "out_of_fold.json").write_text('{"a": null}')
    assert session("b") == 0
    assert set(json.loads(Path("out_of_fold.json").read_text())) == {"b"}


@pytest.mark.parametrize("losses", ["step,lo", "step,loss\n1,nan\n2,na"])
def test_a_picture_that_cannot_be_drawn_ends_no_session(
    losses: str, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """A log that was cut off: within its first line, or within a word, which makes losses text."""
    log = Path("runs", "a", "crops", "version_0", "metrics.csv")
    log.parent.mkdir(parents=True)
    log.write_text(losses)
    assert session("a", "b") == 0
    assert set(json.loads(Path("out_of_fold.json").read_text())) == {"a", "b"}
    assert "no learning curves: " in caplog.text


def test_what_was_fitted_is_kept_whatever_a_session_fails_with(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as failing:
        failing.setattr(kaggle_fit, "fit_all", fail)
        with pytest.raises(RuntimeError):
            session("a", "b")
    assert session("a") == 0
    monkeypatch.setattr(kaggle_fit, "fit_all", fail)
    assert session("a", "b") == 0
    assert "can't start new thread; what was fitted before is this version's" in caplog.text


def test_every_strip_is_read_before_a_pace_is_measured(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = tmp_path / "input" / "competition" / "train_images", list[str]()
    for index in range(40):
        (folder / f"b{index}.png").write_bytes((folder / "a.png").read_bytes())
    read_bytes = Path.read_bytes

    def spied(path: Path) -> bytes:
        if path.parent == folder:
            read.append(path.name)
        if path.name == "b7.png":
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", spied)

    def fit_none(*_: object) -> list[tuple[Job, int]]:
        read.append("fits")
        return []

    monkeypatch.setattr(kaggle_fit, "fit_all", fit_none)
    assert session("a") == 0
    assert read[-1] == "fits"
    assert set(read[:-1]) == {path.name for path in folder.iterdir()}


def test_a_kernel_without_the_competition_or_without_hours_is_refused(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session("a", hours=-1) == 2
    assert "--hours -1.0, expected a number above 0" in error_of(capsys.readouterr().err)
    (tmp_path / "input" / "competition" / "train.csv").unlink()
    assert session("a") == 2
    message = error_of(capsys.readouterr().err)
    assert "no train.csv under" in message and "add the competition severstal" in message


@pytest.mark.parametrize("mounted", ["{}", "competitions/{}"])
def test_beside_the_strips_of_a_dataset_the_competitions_own_are_found(
    mounted: str, session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--extra names a folder with a train.csv too."""
    pseudo = tmp_path / "input" / "pseudo"
    pseudo.mkdir()
    (pseudo / "train.csv").write_text("ImageId,EncodedPixels,ClassId\na.png,1 2,3\n")
    assert session("a") == 2
    assert "more than one train.csv" in error_of(capsys.readouterr().err)
    competition = tmp_path / "input" / mounted.format("severstal-steel-defect-detection")
    competition.parent.mkdir(exist_ok=True)
    (tmp_path / "input" / "competition").rename(competition)
    assert session("a") == 0
    assert json.loads(Path("out_of_fold.json").read_text()).keys() == {"a"}


def test_an_unattended_fit_goes_into_the_folder_of_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "working").mkdir()
    monkeypatch.setattr("kernel.kaggle.WORKING", tmp_path / "working")
    monkeypatch.setenv(KAGGLE_RUN, UNATTENDED)
    monkeypatch.chdir(tmp_path)
    assert exit_code(kaggle_fit.main, "--help") == 0
    assert Path.cwd() == tmp_path / "working"
