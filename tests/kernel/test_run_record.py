"""The run record: run.json says which halves of which passes ran for which strip.

A spy in the members' own halves knows strip and flip by the pixels that come in, and nothing of
ids, schedulers or records.
"""

import errno
import json
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, predict, read_manifest, read_submission, save_strips
from run_records import run_json
from torch import Tensor, nn

from kernel.backends import Backend
from kernel.deadline import Deadline
from kernel.images import Image
from kernel.inference import main, run_options
from kernel.members import Member, build_network
from kernel.options import parse_options
from kernel.outcome import Outcome
from kernel.run_record import RunRecord, read_run_record, write_run_record
from kernel.strip_state import StripWork
from kernel.tta import Half, Pass

NAMES = [f"{number}.png" for number in range(6)]
SIZE = (32, 64)  # needs no padding: a view is known by its pixels
NETWORKS: dict[str, nn.Module] = {}
CLEAN = "4.png"  # its gates are shut: no decoder is needed
TURN: dict[str, Callable[[Image], Image]] = {
    "none": lambda image: image,
    "horizontal": np.fliplr,
    "vertical": np.flipud,
}


class Spy:
    """Notes (member, flip) of every half that runs, strip by strip and in order."""

    def __init__(self, images: Mapping[str, Image]) -> None:
        self.views = {
            turn(image).tobytes(): (name, flip)
            for name, image in images.items()
            for flip, turn in TURN.items()
        }
        self.features: dict[bytes, tuple[str, str]] = {}  # of an encoded strip → strip, flip
        self.ran = {half: defaultdict[str, list[tuple[str, str]]](list) for half in Half}
        self.nan = set[tuple[Half, str, str, str]]()  # half, strip, member, flip
        self.before_encoder: Callable[[str], None] = lambda strip: None

    def wrap(self, member: Member) -> Member:
        """The same member, watched."""
        name = member.spec.name

        def encoder(images: Tensor) -> tuple[Tensor, ...]:
            views = [(image[0] * 255).round().byte().numpy().tobytes() for image in images]
            strips = [self.views[view] for view in views]
            for strip in {strip for strip, _ in strips}:
                self.before_encoder(strip)
            gates, *features = member.encoder(images)
            for row, (strip, flip) in enumerate(strips):
                self.features[features[-1][row].numpy().tobytes()] = strip, flip
                gates[row] *= strip != CLEAN
                if (Half.ENCODER, strip, name, flip) in self.nan:
                    gates[row] = torch.nan
            self._note(Half.ENCODER, name, strips)
            return gates, *features

        def decoder(gates: Tensor, *features: Tensor) -> Tensor:
            strips = [self.features[row.numpy().tobytes()] for row in features[-1]]
            probabilities: Tensor = member.decoder(gates, *features)
            for row, (strip, flip) in enumerate(strips):
                if (Half.DECODER, strip, name, flip) in self.nan:
                    probabilities[row, 0, 0, 0] = torch.nan
            self._note(Half.DECODER, name, strips)
            return probabilities

        return replace(member, encoder=encoder, decoder=decoder)

    def _note(self, half: Half, member: str, strips: Iterable[tuple[str, str]]) -> None:
        for strip, flip in dict.fromkeys(strips):  # a batch is filled up with its last strip
            self.ran[half][strip].append((member, flip))

    def forget(self, strip: str) -> None:
        """Of a strip that starts anew only the second time counts."""
        for half in Half:
            self.ran[half].pop(strip, None)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path / "strips"


def build_once(model: dict[str, Any]) -> nn.Module:
    """The network of a model; each run loads the same weights into it again."""
    key = json.dumps(model)
    if key not in NETWORKS:
        NETWORKS[key] = build_network(model)
    return NETWORKS[key]


@pytest.fixture
def spy(images: Path, monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy(save_strips(images, NAMES, SIZE))
    monkeypatch.setattr("kernel.members.build_network", build_once)
    monkeypatch.setattr("kernel.ensemble_loading.compile_member", lambda plain, *_: spy.wrap(plain))
    monkeypatch.setattr("kernel.ensemble_loading.check_engine", lambda engine, *_: engine)
    return spy


def run_record(bundle: Path, images: Path, **options: Any) -> dict[str, Any]:
    """The record of a run, as run.json holds it."""
    return predict(bundle, images, images.with_name("submission.csv"), **options)


def named(record: dict[str, Any], ids: Iterable[int]) -> list[tuple[str, str]]:
    """(member, flip) of pass ids."""
    return [(record["passes"][i]["member"], record["passes"][i]["flip"]) for i in ids]


def flops_of(bundle: Path) -> dict[str, list[int]]:
    return {member["name"]: member["flops"] for member in read_manifest(bundle)["members"]}


def assert_record_is_what_ran(record: dict[str, Any], spy: Spy, strips: Iterable[str]) -> None:
    """For every strip the record has what the spy saw, by name and in order."""
    assert record["work"].keys() == set(strips)
    for strip, work in record["work"].items():
        for half in Half:
            assert named(record, work[f"{half}s"]) == spy.ran[half][strip], (strip, half)
        planned = named(record, work["passes"])
        assert set(spy.ran[Half.DECODER][strip]) <= set(spy.ran[Half.ENCODER][strip])
        assert set(spy.ran[Half.ENCODER][strip]) <= set(planned)
        assert len(set(planned)) == len(planned)
    assert any(spy.ran[Half.DECODER][strip] for strip in strips)


def assert_shares(record: dict[str, Any], spy: Spy, flops: Mapping[str, list[int]]) -> None:
    """Each strip's share, reckoned from the spy's notes and the manifest's flops."""
    total = sum(sum(flops[each["member"]]) for each in record["passes"])
    for strip, work in record["work"].items():
        ran = sum(
            flops[member][index]
            for index, half in enumerate(Half)
            for member, _ in spy.ran[half][strip]
        )
        assert work["share"] == pytest.approx(ran / total)


# --- members --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_record_names_what_ran_for_each_strip(
    batch_size: int, tiny_bundle: Path, images: Path, spy: Spy
) -> None:
    bundle = tiny_bundle / "dataset"
    record = run_record(bundle, images, batch_size=batch_size)
    assert_record_is_what_ran(record, spy, NAMES)
    assert_shares(record, spy, flops_of(bundle))
    assert record["work"][CLEAN]["decoders"] == []
    assert len(record["work"][CLEAN]["encoders"]) < 9
    assert all(record["work"][name]["decoders"] for name in NAMES if name != CLEAN)
    shares = [work["share"] for work in record["work"].values()]
    assert record["share"] == pytest.approx(sum(shares) / 6)
    assert (record["device"], record["workers"], record["dropped"]) == ("cpu", 1, {})


def test_without_the_early_exit_every_half_of_every_pass_ran(
    tiny_bundle: Path, images: Path, spy: Spy
) -> None:
    record = run_record(tiny_bundle / "dataset", images, early_exit=False)
    assert_record_is_what_ran(record, spy, NAMES)
    for work in record["work"].values():
        assert work["passes"] == work["encoders"] == work["decoders"] == list(range(9))
        assert work["share"] == 1


@pytest.mark.parametrize(
    ("member", "damage"),
    [("unet-a", "missing"), ("fpn-b", "broken"), ("fpn-b", "missing"), ("unet-c", "broken")],
)
def test_a_member_that_cannot_be_used_is_in_no_pass(
    member: str, damage: str, dataset: Path, images: Path, spy: Spy
) -> None:
    path, flops = dataset / f"{member}.safetensors", flops_of(dataset)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    record = run_record(dataset, images, allow_missing_members=True)
    others = flops.keys() - {member}
    expected = sorted(
        (name, flip, flops[name]) for name in others for flip in ("none", "horizontal", "vertical")
    )
    found = [(each["member"], each["flip"], each["flops"]) for each in record["passes"]]
    assert sorted(found) == expected
    assert_record_is_what_ran(record, spy, NAMES)
    assert_shares(record, spy, flops)
    assert record["networks"].keys() == others
    assert all(work["passes"] == list(range(6)) for work in record["work"].values())


def test_seconds_stand_by_member_and_half(tiny_bundle: Path, images: Path, spy: Spy) -> None:
    record = run_record(tiny_bundle / "dataset", images)
    ran = {half: {member for strip in NAMES for member, _ in spy.ran[half][strip]} for half in Half}
    for member, halves in record["networks"].items():
        assert halves.keys() == {half.value for half in Half if member in ran[half]}
        assert all(seconds > 0 for seconds in halves.values())
    assert record["networks"].keys() == ran[Half.ENCODER]
    assert not record["networks"].keys() & record["stages"].keys()
    stages = {"import", "load", "check", "decode", "prepare", "tally", "rle", "write", "validate"}
    assert record["stages"].keys() == stages


# --- the deadline, and passes that give NaN -------------------------------------------------------


class Simulated(Deadline):
    """Each half takes 1 s by its own clock, and there are 80 s for 6 strips of 18 halves."""

    def __init__(self, *_: Any) -> None:
        self.now_s = 0.0
        super().__init__(1e3, 0.0, lambda: self.now_s)
        self.end = 80.0

    def half_done(self, member: str, half: Half, seconds: float, strips: int) -> None:
        self.now_s += 1.0
        super().half_done(member, half, 1.0, strips)


def test_a_flip_that_the_deadline_drops_for_some_strips_is_in_no_work_of_theirs(
    tiny_bundle: Path, images: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernel.run_context.Deadline", Simulated)
    bundle = tiny_bundle / "dataset"
    record = run_record(bundle, images, early_exit=False)
    assert_record_is_what_ran(record, spy, NAMES)
    assert_shares(record, spy, flops_of(bundle))
    ran = spy.ran[Half.ENCODER]
    assert len(ran["0.png"]) == 9  # nothing was measured before it
    missing: dict[str, int] = {}
    for member, flip in named(record, range(9)):
        without = [name for name in NAMES if (member, flip) not in ran[name]]
        if without:
            missing[f"{member}/{flip}"] = len(without)
            assert not any(
                (member, flip) in named(record, record["work"][n]["passes"]) for n in without
            )
    assert record["dropped"] == missing
    assert missing and max(missing.values()) < 6
    assert {name.split("/")[1] for name in missing} <= {"horizontal", "vertical"}


@pytest.mark.parametrize("early_exit", [True, False])
@pytest.mark.parametrize("half", Half)
def test_a_pass_that_gives_nan_ran_though_it_counts_in_no_mean(
    half: Half, early_exit: bool, tiny_bundle: Path, images: Path, spy: Spy
) -> None:
    spy.nan = {(half, "1.png", "unet-a", "none"), (half, "3.png", "fpn-b", "none")}
    record = run_record(tiny_bundle / "dataset", images, early_exit=early_exit)
    assert not record["faults"]
    assert_record_is_what_ran(record, spy, NAMES)
    for _, strip, member, flip in spy.nan:
        work = record["work"][strip]
        assert (member, flip) in named(record, work["encoders"])
        decoded = (member, flip) in named(record, work["decoders"])
        assert decoded or (half is Half.ENCODER and early_exit)  # else both halves ran at once
        assert len(work["passes"]) == 9
        assert named(record, work["nan"]) == [(member, flip)]


@pytest.mark.parametrize("again", [True, False])
def test_a_strip_whose_passes_are_all_nan_runs_on_plain_pytorch_or_has_a_fault(
    again: bool, tiny_bundle: Path, images: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spy is the engine: plain PyTorch runs unseen, and gives numbers."""
    if not again:
        monkeypatch.setattr(Backend, "next_after", lambda *_, **__: None)
    members = ("unet-a", "fpn-b", "unet-c")
    spy.nan = {(Half.ENCODER, "1.png", member, flip) for member in members for flip in TURN}
    record = run_record(tiny_bundle / "dataset", images)
    assert record["faults"] == ({} if again else {"1.png": "every pass gave NaN"})
    if again:
        assert len(record["work"].pop("1.png")["encoders"]) > 0
        return
    assert_record_is_what_ran(record, spy, [name for name in NAMES if name != "1.png"])


# --- several parts of one run ---------------------------------------------------------------------


def passes_of(*names: str) -> list[Pass]:
    pairs = [name.split("/") for name in names]
    return [Pass(member, flip, (1, 2)) for member, flip in pairs]


def work_of(passes: list[int], encoders: list[int], decoders: list[int]) -> StripWork:
    return StripWork(tuple(passes), tuple(encoders), tuple(decoders), tuple(passes[1:]), 0.5)


def test_outcomes_whose_passes_differ_are_added_by_the_names_of_their_passes() -> None:
    first = Outcome(
        work={"1": work_of([0, 1], [1, 0], [0])},
        passes=passes_of("a/none", "b/none"),
        faults={"2": "no image"},
        device="cuda",
        gpu_bytes=7,
    )
    second = Outcome(
        work={"3": work_of([0, 2, 1], [2, 1], [2])},
        passes=passes_of("c/none", "a/none", "b/none"),
        strip_s={"3": 0.5},
        device="cpu",
    )
    second.dropped["a/none"] = 2
    first.add(second)
    assert first.passes == passes_of("a/none", "b/none", "c/none")
    assert first.work == {
        "1": work_of([0, 1], [1, 0], [0]),
        "3": work_of([2, 1, 0], [1, 0], [1]),
    }
    assert (first.faults, first.strip_s) == ({"2": "no image"}, {"3": 0.5})
    assert (first.device, first.gpu_bytes, first.dropped) == ("cuda", 7, {"a/none": 2})


def test_the_same_pass_of_other_flops_is_another_pass() -> None:
    """A member that was packed anew between two parts of a run costs what it costs."""
    first = Outcome(passes=[Pass("a", "none", (1, 2))], work={"1": work_of([0], [0], [0])})
    first.add(Outcome(passes=[Pass("a", "none", (3, 4))], work={"2": work_of([0], [0], [0])}))
    assert [each.flops for each in first.passes] == [(1, 2), (3, 4)]
    assert first.work["2"] == work_of([1], [1], [1])


@pytest.mark.parametrize("first_has_all", [True, False])
def test_after_a_lost_device_both_parts_are_numbered_alike(
    first_has_all: bool, dataset: Path, images: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device breaks down at the third strip; one of the two parts lacks a member."""
    member, aside = dataset / "fpn-b.safetensors", dataset / "aside"
    if not first_has_all:
        member.rename(aside)

    def break_down(strip: str) -> None:
        if strip == "2.png":
            spy.before_encoder = lambda strip: None
            raise RuntimeError("unspecified launch failure")

    def device_usable(_: torch.device) -> bool:
        member.rename(aside) if first_has_all else aside.rename(member)
        return False

    spy.before_encoder = break_down
    monkeypatch.setattr("kernel.backends.pick_device", lambda: CPU)
    monkeypatch.setattr("kernel.scheduling.device_usable", device_usable)
    record = run_record(dataset, images, allow_missing_members=True)
    assert_record_is_what_ran(record, spy, NAMES)
    assert len(record["passes"]) == 9
    counts = [len(record["work"][name]["passes"]) for name in NAMES]
    assert counts == ([9, 9, 6, 6, 6, 6] if first_has_all else [6, 6, 9, 9, 9, 9])
    second = [3, 4, 5, 6, 7, 8] if first_has_all else [6, 7, 8, 0, 1, 2, 3, 4, 5]
    assert record["work"]["5.png"]["passes"] == second  # fpn-b is the cheapest member


class Ended:
    """A worker that ran in this process, and has ended."""

    returncode = 0

    def poll(self) -> int:
        return 0

    def terminate(self) -> None:
        pass

    def wait(self, timeout: float | None = None) -> int:
        return 0


@pytest.mark.parametrize("lacking", [0, 1, 2])  # the worker without a member; 0 is none
def test_two_workers_give_the_union_of_what_each_ran(
    lacking: int, dataset: Path, images: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, aside = dataset / "fpn-b.safetensors", dataset / "aside"

    def start(command: list[str], **_: object) -> Ended:
        options = parse_options(command[2:])
        number = int(options.output.stem)
        if number == lacking:
            member.rename(aside)
        assert run_options(options) == 0
        if number == lacking:
            aside.rename(member)
        return Ended()

    monkeypatch.setattr(subprocess, "Popen", start)
    record = run_record(dataset, images, workers=2, allow_missing_members=True)
    assert record["workers"] == 2
    assert_record_is_what_ran(record, spy, NAMES)
    assert len(record["passes"]) == 9
    counts = {name: len(record["work"][name]["passes"]) for name in NAMES}
    without = {1: NAMES[::2], 2: NAMES[1::2]}.get(lacking, [])
    assert counts == {name: 6 if name in without else 9 for name in NAMES}
    assert record["strip_s"].keys() == set(NAMES)
    assert record["networks"].keys() == {"unet-a", "fpn-b", "unet-c"}


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kaggle", [False, True])
def test_the_record_lies_in_run_json_beside_the_submission(
    kaggle: bool,
    session_light: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    if kaggle:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    save_strips(images, NAMES, SIZE)
    (images / "bad.png").write_bytes(b"")
    paths = ("--bundle", session_light, "--images", images, "--output", tmp_path / "out.csv")
    main([str(path) for path in paths])
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record.keys() == {
        *("strips", "rows", "non_empty", "faults", "passes", "work", "strip_s", "dropped"),
        *("share", "device", "gpu_bytes", "workers", "budget_s", "seconds", "stages", "networks"),
        *("failed", "kaggle"),
    }
    assert record["kaggle"] is kaggle
    assert (record["strips"], record["rows"], record["budget_s"]) == (7, 28, 3600)
    assert list(record["faults"]) == ["bad.png"]
    assert record["strip_s"].keys() == {*NAMES, "bad.png"}
    assert record["passes"] == [{"member": "fpn", "flip": "none", "flops": [1, 1]}]


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    record = RunRecord(
        strips=3,
        rows=12,
        non_empty=2,
        faults={"2.jpg": "the networks failed", "3.jpg": "no image"},
        failed=["2.jpg"],
        passes=passes_of("a/none", "b/vertical"),
        work={"1.jpg": StripWork((1, 0), (1, 0), (0,), (1,), 0.25)},
        strip_s={"1.jpg": 0.5},
        dropped=Counter({"b/vertical": 1}),
        share=0.25,
        device="cpu",
        gpu_bytes=7,
        workers=2,
        budget_s=3600.0,
        seconds=9.5,
        stages={"load": 1.5},
        networks={"a": {Half.ENCODER: 2.5, Half.DECODER: 0.5}},
        kaggle=True,
    )
    write_run_record(tmp_path / "run.json", record)
    assert read_run_record(tmp_path / "run.json") == record
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries.pop("budget_s"),
        lambda entries: entries.update(speed=1.0),
        lambda entries: entries.update(work={"1.jpg": {"passes": [0], "share": 1.0}}),
        lambda entries: entries.update(networks={"a": {"middle": 1.0}}),
        lambda entries: entries.update(passes=["a/none"]),
    ],
    ids=["a field less", "a field more", "work without halves", "a third half", "a bare name"],
)
def test_a_file_of_another_kernel_is_refused(
    change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    entries = run_json()
    change(entries)
    (tmp_path / "run.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"run\.json: not a run\.json of this kernel"):
        read_run_record(tmp_path / "run.json")


def test_a_record_that_the_disk_has_no_room_for_costs_no_submission(
    session_light: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_strips(images, NAMES, SIZE)
    write_text = Path.write_text

    def full(path: Path, *words: Any, **options: Any) -> int:
        if path.name.startswith("run.json"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_text(path, *words, **options)

    monkeypatch.setattr(Path, "write_text", full)
    paths = ("--bundle", session_light, "--images", images, "--output", tmp_path / "out.csv")
    main([str(path) for path in paths])  # exits with a code but 0 otherwise
    assert "the submission is written, but not its record" in caplog.text
    assert "no space left on device" in caplog.text
    assert len(read_submission(tmp_path / "out.csv")) == 4 * len(NAMES)
    assert not (tmp_path / "run.json").exists()
