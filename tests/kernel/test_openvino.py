"""OpenVINO: packed halves give what plain PyTorch gives, and where they fail PyTorch runs."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    CPU,
    ROOT,
    change_member,
    draw_image,
    predict,
    predict_masks,
    random_network,
    save_strips,
    tiny_entry,
    tiny_model,
    write_manifest,
)
from safetensors.torch import save_file
from torch import Tensor

from kernel.competition import COMPETITION
from kernel.engines import (
    MAX_CACHED_SHAPES,
    OpenVino,
    load_checked_openvino,
    openvino_files,
)
from kernel.ensemble import Ensemble
from kernel.ensemble_loading import load_ensemble
from kernel.images import Strip
from kernel.manifest import MemberSpec, load_manifest
from kernel.members import Encoder, Member, load_member
from kernel.reference import entry_of, read_reference, reference_file
from kernel.scheduling import Scheduler
from kernel.stages import Stages
from kernel.tta import Half
from packing import bundle
from packing.members import pack_openvino, pack_reference


@pytest.fixture(scope="module")
def packed(session_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny members packed with OpenVINO's halves, without its wheel of 59 MB."""
    if not find_spec("openvino"):  # not by importing it: with its telemetry
        pytest.skip("OpenVINO is not installed")
    folder = tmp_path_factory.mktemp("openvino")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "OPENVINO_WHEEL", {})
        bundle.build(session_weights, folder / "dist", "somebody", openvino=True)
    return folder / "dist" / "dataset"


@pytest.fixture
def openvino_dataset(packed: Path, tmp_path: Path) -> Path:
    """A copy of the packed dataset, to be broken."""
    return Path(shutil.copytree(packed, tmp_path / "openvino"))


def specs_of(dataset: Path) -> list[MemberSpec]:
    return load_manifest(dataset).members


def greys(seed: int, batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 1, height, width, generator=torch.Generator().manual_seed(seed))


def engine_of(dataset: Path, spec: MemberSpec) -> Member:
    return load_checked_openvino(dataset, spec, 1, Stages())


def answers(member: Member, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        gates, *features = member.encoder(images)
        return gates, member.decoder(gates, *features)


def test_a_network_is_bound_to_no_core_for_another_process_may_choose_the_same(
    openvino_dataset: Path,
) -> None:
    encoder = engine_of(openvino_dataset, specs_of(openvino_dataset)[0]).encoder
    assert isinstance(encoder, OpenVino)
    encoder(greys(0, 1, 32, 64))
    [request] = encoder.requests.values()
    assert request.get_compiled_model().get_property("ENABLE_CPU_PINNING") is False


HANDLES = """
import gc, pathlib, signal, sys
import torch
from kernel.engines import load_openvino
from kernel.manifest import load_manifest
sys.addaudithook(lambda event, _: event == "os.fork" and print("forked"))
folder = pathlib.Path(sys.argv[1])
members = [load_openvino(folder, spec, 32) for spec in load_manifest(folder).members * 2]
for member in members:
    member.encoder(torch.zeros(1, 1, 32, 64))
del member
while members:
    del members[0]
    gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("heard"))
signal.raise_signal(signal.SIGTERM)
"""


def test_members_come_without_a_fork_and_a_signal_is_handled_after_they_are_gone(
    packed: Path,
) -> None:
    """OpenVINO's telemetry would fork, to wait for a network."""
    command = [sys.executable, "-c", HANDLES, str(packed)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "heard\n"), ran.stderr


# --- the answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 64, 96), (2, 64, 96), (1, 256, 320), (3, 32, 64)], ids=str)
def test_openvino_gives_what_plain_pytorch_gives(
    shape: tuple[int, int, int], openvino_dataset: Path
) -> None:
    for spec in specs_of(openvino_dataset):
        plain = load_member(openvino_dataset, spec, CPU)
        engine = engine_of(openvino_dataset, spec)
        assert isinstance(engine.encoder, OpenVino)
        assert engine.stride == plain.stride
        images = greys(2, *shape)
        found, expected = answers(engine, images), answers(plain, images)
        assert expected[1].std() > 0.01
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def test_a_member_in_one_piece_gives_the_bits_of_its_halves(openvino_dataset: Path) -> None:
    for spec in specs_of(openvino_dataset):
        engine, images = engine_of(openvino_dataset, spec), greys(10, 2, 64, 96)
        assert isinstance(engine.whole, OpenVino)
        for mine, theirs in zip(engine.whole(images), answers(engine, images), strict=True):
            assert torch.equal(mine, theirs)


def test_a_softmax_of_other_outputs_is_packed_whole_and_in_halves(
    session_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Path(shutil.copytree(session_weights, tmp_path / "weights"))
    model = tiny_model() | {"classes": 5, "aux_params": {"classes": 5, "pooling": "max"}}
    save_file(random_network(model, 1).state_dict(), weights / "unet-a.safetensors")
    entry = tiny_entry("unet-a", model) | {"channels": [4, 2, 3, 1], "softmax": True}
    write_manifest(weights, [entry])
    monkeypatch.setattr(bundle, "OPENVINO_WHEEL", {})
    bundle.build(weights, tmp_path / "dist", "somebody", openvino=True)
    dataset = tmp_path / "dist" / "dataset"
    [spec], images = specs_of(dataset), greys(3, 2, 64, 96)
    engine, plain = engine_of(dataset, spec), load_member(dataset, spec, CPU)
    assert engine.whole
    gates, masks = engine.whole(images)
    for mine, theirs in zip(answers(engine, images), (gates, masks), strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close((gates, masks), answers(plain, images), rtol=0, atol=1e-4)
    assert (masks <= gates[..., None, None]).all()
    change_member(dataset, softmax=False)
    with pytest.raises(ValueError, match="packed with softmax True, the manifest says False"):
        engine_of(dataset, specs_of(dataset)[0])


def test_a_reference_is_held_against_all_of_an_entry_that_changes_the_answers() -> None:
    spec = MemberSpec(**tiny_entry("one", tiny_model()))
    others = {"name", "file", "flops", "image_size"}
    assert entry_of(spec).keys() == {each.name for each in fields(MemberSpec)} - others


def test_a_reference_from_before_a_field_is_of_its_default(
    openvino_dataset: Path,
) -> None:
    [spec, *_] = specs_of(openvino_dataset)
    reference = read_reference(openvino_dataset / reference_file(spec.file))
    member = load_member(openvino_dataset, spec, CPU)
    del reference.entry["efficientnet_pytorch"]
    reference.check(member, 1)
    other = replace(member, spec=replace(spec, efficientnet_pytorch="0.6.3"))
    with pytest.raises(ValueError, match=r"packed with efficientnet_pytorch , the manifest says 0"):
        reference.check(other, 1)


class Noted:
    """An engine that notes when it runs."""

    def __init__(self, name: str, engine: Any, ran: list[str]) -> None:
        self.name, self.engine, self.ran = name, engine, ran

    def __call__(self, *tensors: Tensor) -> Any:
        self.ran.append(self.name)
        return self.engine(*tensors)


def noted(member: Member, ran: list[str]) -> Member:
    parts: dict[str, Any] = {name: Noted(name, getattr(member, name), ran) for name in WAYS}
    return replace(member, **parts)


WAYS = ("encoder", "decoder", "whole")


def test_a_strip_that_does_not_look_clean_runs_in_one_piece(openvino_dataset: Path) -> None:
    manifest, ran = load_manifest(openvino_dataset), list[str]()
    members = [noted(engine_of(openvino_dataset, spec), ran) for spec in manifest.members]
    image, masks = draw_image(6), list[np.ndarray]()
    for early_exit in (True, False):
        ran.clear()
        ensemble = Ensemble(manifest, members, CPU, Stages())
        masks.append(predict_masks(Scheduler(ensemble, early_exit=early_exit), [image]))
        tried = list(WAYS) + 2 * ["whole"]  # a member's first pass runs both ways
        assert ran == (6 * ["encoder"] + 6 * ["decoder"] + tried if early_exit else 3 * tried)
        assert ensemble.stages.networks.keys() == {(m.spec.name, h) for m in members for h in Half}
    np.testing.assert_array_equal(masks[0], masks[1])


def fails(*_: Tensor) -> Any:
    raise RuntimeError("out of working memory")


@pytest.mark.parametrize(
    ("whole", "reason"),
    [
        (lambda engine: lambda images: [each + 1e-7 for each in engine(images)], "its bits differ"),
        (lambda _: fails, "out of working memory"),
    ],
    ids=["differs", "fails"],
)
def test_a_member_that_differs_in_one_piece_runs_in_halves(
    whole: Any, reason: str, openvino_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, ran = load_manifest(openvino_dataset), list[str]()
    engines = [engine_of(openvino_dataset, spec) for spec in manifest.members]
    members = [replace(noted(m, ran), whole=whole(m.whole)) for m in engines]
    ensemble = Ensemble(manifest, members, CPU, Stages())
    found = predict_masks(Scheduler(ensemble, early_exit=False), [draw_image(6)])
    assert ran == ["encoder", "decoder"] * 9
    lines = [line for line in caplog.messages if "runs in two halves, not in one piece" in line]
    assert len(lines) == 3 and all(reason in line for line in lines)
    right = Ensemble(manifest, engines, CPU, Stages())
    expected = predict_masks(Scheduler(right, early_exit=False), [draw_image(6)])
    np.testing.assert_array_equal(found, expected)


def test_a_shape_that_does_not_compile_costs_no_other(
    openvino_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two members, so that each is told to release its memory for the other."""
    compile_shape = OpenVino._compile

    def refuse(engine: OpenVino, shapes: tuple[torch.Size, ...]) -> Any:
        if shapes[0][-1] == 96:
            raise RuntimeError("no memory for so wide an image")
        return compile_shape(engine, shapes)

    manifest = replace(load_manifest(openvino_dataset), image_size=None)  # none is resized
    engines = [engine_of(openvino_dataset, spec) for spec in manifest.members]
    monkeypatch.setattr(OpenVino, "_compile", refuse)
    scheduler = Scheduler(Ensemble(manifest, engines, CPU, Stages()), early_exit=False)
    widths = (64, 96, 64)
    strips = [Strip(str(i), draw_image(i, (64, width))) for i, width in enumerate(widths)]
    faults = [state.fault for state in scheduler.predict_strips(strips, len(strips))]
    assert [bool(fault) for fault in faults] == [False, True, False], faults
    assert "so wide an image" in faults[1]


def test_only_the_features_that_a_decoder_reads_leave_the_encoder(openvino_dataset: Path) -> None:
    counts = {
        spec.model["arch"]: len(engine_of(openvino_dataset, spec).encoder(greys(3, 1, 64, 96)))
        for spec in specs_of(openvino_dataset)
    }
    assert counts == {"Unet": 1 + 6, "FPN": 1 + 4}  # gates, and the levels from the image down


def test_what_an_engine_gave_stays_when_it_runs_again(openvino_dataset: Path) -> None:
    engine = engine_of(openvino_dataset, specs_of(openvino_dataset)[0])
    first = engine.encoder(greys(4, 1, 64, 96))
    copies = [tensor.clone() for tensor in first]
    engine.encoder(greys(5, 1, 64, 96))
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


@pytest.mark.parametrize("limit", ["1", None])
def test_an_engine_takes_no_more_threads_than_pytorch_was_given(
    limit: str | None,
    openvino_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as it says where it is limited
    if limit:
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
    spec = specs_of(openvino_dataset)[0]
    engine = load_checked_openvino(openvino_dataset, spec, 1, Stages()).encoder
    assert isinstance(engine, OpenVino)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)  # set by others, once it is loaded
    engine(greys(1, 1, 64, 96))
    [request] = engine.requests.values()
    found = request.get_compiled_model().get_property("INFERENCE_NUM_THREADS")
    default = engine.core.compile_model(engine.model, "CPU")
    assert found == (1 if limit else default.get_property("INFERENCE_NUM_THREADS"))


@pytest.mark.parametrize("failed", [False, True])
def test_pytorch_keeps_one_thread_unless_a_member_runs_on_it(
    failed: bool, openvino_dataset: Path
) -> None:
    if failed:
        last = specs_of(openvino_dataset)[-1]
        (openvino_dataset / openvino_files(last.file)[0]).write_text("<net", encoding="utf-8")
    torch.set_num_threads(3)
    try:
        load_ensemble(openvino_dataset, load_manifest(openvino_dataset), CPU, Stages(), None)
        assert torch.get_num_threads() == (3 if failed else 1)
    finally:
        torch.set_num_threads(1)  # as conftest has it


def test_engines_that_meet_many_sizes_keep_few_of_them_ready(openvino_dataset: Path) -> None:
    spec = specs_of(openvino_dataset)[0]
    plain, engine = load_member(openvino_dataset, spec, CPU), engine_of(openvino_dataset, spec)
    sizes = [(32 * side, 64) for side in range(1, MAX_CACHED_SHAPES + 2)]
    for size in [*sizes, sizes[0]]:  # the first once more, when it was put away
        images = greys(7, 1, *size)
        for mine, theirs in zip(answers(engine, images), answers(plain, images), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert [len(half.requests) for half in (engine.encoder, engine.decoder)] == [
        MAX_CACHED_SHAPES,
        MAX_CACHED_SHAPES,
    ]


def resident_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def test_an_engine_that_releases_its_memory_gives_the_same_bits_again(
    openvino_dataset: Path,
) -> None:
    engine, images = (
        engine_of(openvino_dataset, specs_of(openvino_dataset)[0]),
        greys(9, 1, 1024, 2048),
    )
    before = answers(engine, images)
    working = resident_mb()
    engine.release_memory()
    assert working - resident_mb() > images.nbytes / 2**20
    after = answers(engine, images)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_after_the_check_nothing_stays_compiled_for_the_reference(openvino_dataset: Path) -> None:
    engine = engine_of(openvino_dataset, specs_of(openvino_dataset)[0])
    assert not engine.encoder.requests
    assert not engine.decoder.requests


@torch.inference_mode()
def test_openvino_takes_tensors_that_lie_turned_in_memory(openvino_dataset: Path) -> None:
    engine = engine_of(openvino_dataset, specs_of(openvino_dataset)[0])
    images = greys(8, 1, 96, 64).transpose(-1, -2)
    assert not images.is_contiguous()
    assert torch.equal(engine(images), engine(images.contiguous()))


def test_a_member_that_is_packed_again_is_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    """OpenVINO's own names count what the process has made before."""
    fpn = next(spec for spec in specs_of(packed) if spec.name == "fpn-b")
    member = load_member(packed, fpn, CPU)
    pack_openvino(member, tmp_path)
    torch.set_num_threads(2)
    try:
        pack_reference(member, tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)  # as conftest has it
    again = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(name.split(".", 1)[1] for name in again) == [
        "decoder.bin",
        "decoder.xml",
        "encoder.bin",
        "encoder.xml",
        "reference",
    ]
    assert again == {name: (packed / name).read_bytes() for name in again}


# --- where it fails -------------------------------------------------------------------------------


def tear_a_half(dataset: Path, spec: MemberSpec, _: pytest.MonkeyPatch) -> None:
    (dataset / openvino_files(spec.file)[0]).write_text("<net", encoding="utf-8")


def tear_the_reference(dataset: Path, spec: MemberSpec, _: pytest.MonkeyPatch) -> None:
    (dataset / reference_file(spec.file)).write_bytes(b"torn")


def remove_the_reference(dataset: Path, spec: MemberSpec, _: pytest.MonkeyPatch) -> None:
    (dataset / reference_file(spec.file)).unlink()


def shift_the_masks(dataset: Path, _: MemberSpec, __: pytest.MonkeyPatch) -> None:
    change_member(dataset, mask_shift=0.5)


def call_the_images_rgb(dataset: Path, _: MemberSpec, __: pytest.MonkeyPatch) -> None:
    path = dataset / COMPETITION
    path.write_text(json.dumps(json.loads(path.read_text()) | {"channels": 3}), encoding="utf-8")


def remove_openvino(_: Path, __: MemberSpec, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "openvino", None)


def keep_requests_busy(_: Path, __: MemberSpec, patch: pytest.MonkeyPatch) -> None:
    def busy(_: OpenVino) -> None:
        raise RuntimeError("infer requests are busy")

    patch.setattr(OpenVino, "release_memory", busy)


def scale_outputs(number: int, factor: float) -> Any:
    """Return what scales an engine's gates, or the only output of a decoder."""

    def scale(_: Path, __: MemberSpec, patch: pytest.MonkeyPatch) -> None:
        run = OpenVino.__call__

        def scaled(engine: OpenVino, *tensors: Tensor) -> Any:
            found = run(engine, *tensors)
            if number == 0 and isinstance(found, tuple):
                return found[0] * factor, *found[1:]
            return found * factor if number == 1 and isinstance(found, Tensor) else found

        patch.setattr(OpenVino, "__call__", scaled)

    return scale


FAULTS: dict[str, tuple[Any, str]] = {
    "a torn half": (tear_a_half, "RuntimeError"),
    "a torn reference": (tear_the_reference, "SafetensorError"),
    "no reference": (remove_the_reference, "build and upload the bundle again"),
    "a manifest that changed": (
        shift_the_masks,
        "packed with mask_shift 0.0, the manifest says 0.5",
    ),
    "a competition that changed": (call_the_images_rgb, "images of 1 channels, they have 3"),
    "no OpenVINO": (remove_openvino, "ModuleNotFoundError"),
    "memory that is kept": (keep_requests_busy, "infer requests are busy"),
    "other gates": (scale_outputs(0, 0.98), "from PyTorch's"),
    "other masks": (scale_outputs(1, 0.98), "from PyTorch's"),
    "masks of NaN": (scale_outputs(1, torch.nan), "from PyTorch's"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_where_openvino_fails_pytorch_runs_and_the_log_says_so(
    case: str,
    openvino_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = specs_of(openvino_dataset)[0]
    fault, reason = FAULTS[case]
    fault(openvino_dataset, spec, monkeypatch)
    ensemble = load_ensemble(openvino_dataset, load_manifest(openvino_dataset), CPU, Stages(), None)
    assert isinstance(ensemble.members["unet-a"].encoder, Encoder)
    [line] = [line for line in caplog.messages if line.startswith("unet-a runs on PyTorch, not")]
    assert reason in line


@pytest.mark.parametrize("value", [1e-9, 0.999])
@pytest.mark.parametrize("half", ["gates", "masks"])
def test_what_differs_near_0_or_1_is_seen(half: str, value: float, openvino_dataset: Path) -> None:
    """A shipped member's gates are 1e-9 for a class that is not there."""
    spec = specs_of(openvino_dataset)[0]
    reference = read_reference(openvino_dataset / reference_file(spec.file))
    parts = {"gates": reference.gates, "masks": reference.masks}
    expected = parts | {half: torch.full_like(parts[half], value)}
    gates, masks = expected["gates"], expected["masks"]
    other = torch.sigmoid(torch.logit(expected[half]) - 1)

    def check(gates: Tensor, masks: Tensor) -> None:
        member = Member(spec, lambda _: (gates,), lambda *_: masks, reference.stride)
        replace(reference, gates=expected["gates"], masks=expected["masks"]).check(member, 1)

    check(gates, masks)
    with pytest.raises(ValueError, match="from PyTorch's"):
        check(other if half == "gates" else gates, other if half == "masks" else masks)


@pytest.mark.parametrize("changes", [{"name": "renamed"}, {"image_size": [64, 96]}], ids=str)
def test_what_is_not_packed_may_change(changes: dict[str, Any], openvino_dataset: Path) -> None:
    change_member(openvino_dataset, **changes)
    assert isinstance(engine_of(openvino_dataset, specs_of(openvino_dataset)[0]).encoder, OpenVino)


def test_halves_that_are_not_the_networks_stop_the_build(
    session_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "OPENVINO_WHEEL", {})
    scale_outputs(1, 0.98)(tmp_path, None, monkeypatch)
    with pytest.raises(ValueError, match=r"OpenVINO cannot run it: .*build without --openvino"):
        bundle.build(session_weights, tmp_path / "dist", "somebody", openvino=True)
    assert not (tmp_path / "dist").exists()


def test_a_checkpoint_that_changed_is_refused_though_its_halves_are_whole(
    openvino_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = specs_of(openvino_dataset)[0].file
    with (openvino_dataset / file).open("ab") as written:
        written.write(b" ")
    with pytest.raises(ValueError, match="changed after it was hashed"):
        load_ensemble(openvino_dataset, load_manifest(openvino_dataset), CPU, Stages(), None)
    assert "OpenVINO" not in caplog.text


def test_a_run_on_openvino_builds_no_network_of_pytorch(openvino_dataset: Path) -> None:
    code = f"""
import sys
from pathlib import Path
import torch
from kernel.ensemble_loading import load_ensemble
from kernel.images import Strip
from kernel.stages import Stages
from kernel.manifest import load_manifest
bundle = Path({str(openvino_dataset)!r})
ensemble = load_ensemble(bundle, load_manifest(bundle), torch.device("cpu"), Stages(), None)
ensemble.run_encoder(0, torch.rand(1, 1, 64, 96))
print(sorted({{"segmentation_models_pytorch", "timm"}} & sys.modules.keys()))
"""
    words = [sys.executable, "-c", code]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_openvino_that_is_not_installed_stops_the_build_with_the_remedy(
    session_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("packing.wheels.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"--openvino: not installed here; pip install"):
        bundle.build(session_weights, tmp_path / "dist", "somebody", openvino=True)
    assert not (tmp_path / "dist").exists()


def test_a_run_with_a_wrong_engine_writes_the_masks_of_plain_pytorch(
    openvino_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another member's halves lie where this one's should be."""
    images = tmp_path / "images"
    save_strips(images, ["0.png", "1.png"])
    (images / "0 broken.png").write_bytes(b"")  # the first in order is not the one to check on

    def submission(name: str) -> bytes:
        predict(openvino_dataset, images, tmp_path / name)
        return (tmp_path / name).read_bytes()

    expected = submission("right.csv")
    assert "PyTorch" not in caplog.text
    files = {spec.name: openvino_files(spec.file) for spec in specs_of(openvino_dataset)}
    for own, other in zip(files["unet-c"], files["unet-a"], strict=True):
        for suffix in (".xml", ".bin"):
            path = openvino_dataset / own
            shutil.copy((openvino_dataset / other).with_suffix(suffix), path.with_suffix(suffix))
    assert submission("wrong.csv") == expected
    assert "unet-c runs on PyTorch, not on OpenVINO" in caplog.text
